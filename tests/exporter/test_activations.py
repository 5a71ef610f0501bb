"""Declared activations: what is attached where it is asked for, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.activations import attach_activations
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.weights import Weights, match_weights
from tests.exporter.exported import by_hand
from tests.exporter.handmade import CHANNEL, TENSOR, Handmade, Way, declare_compressed_tensors, declare_modelopt

ATTENTION = "model.layers.1.self_attn"
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
DYNAMIC = STATIC | {"strategy": "token", "dynamic": True}


def made(
    scheme: dict[str, Any] | None, way: Way = CHANNEL, *, scales: bool = True, kv: dict[str, Tensor] | None = None
) -> Handmade:
    """Linear experts, everything but the routers and the head quantised; scales 1, 2, 3 ... of inputs."""
    own = declare_compressed_tensors(by_hand(way, lambda name: "router" in name, "linear"))
    for group in own.raw["quantization_config"]["config_groups"].values():
        group["input_activations"] = scheme
    if scales:
        names = [name for name in own.tensors if name.endswith("weight_scale")]
        for i, name in enumerate(names, 1):
            own.tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([float(i)])
    if kv is not None:
        own.raw["quantization_config"]["kv_cache_scheme"] = STATIC
        own.tensors |= kv
    return own


def attached(own: Handmade, folder: Path) -> Weights:
    checkpoint = open_checkpoint(own.write(folder / "checkpoint"))
    weights = match_weights(checkpoint)
    before = {name: stored.activations for name, stored in weights.stored()}
    found = attach_activations(weights, checkpoint)
    assert {name: stored.activations for name, stored in weights.stored()} == before  # the given ones stay
    assert set(before.values()) == {"none"}
    return found


def test_static(tmp_path: Path) -> None:
    """Each module gets the scale that is called after it, each expert's matrices too."""
    found = attached(made(STATIC), tmp_path)
    assert found.waived == []
    for name, stored in found.stored():
        if stored.form == "none":
            assert stored.activations == "none" and stored.input_scale is None
            continue
        assert stored.activations == "static" and stored.input_scale is not None
        assert stored.input_scale.name == stored.entry.name.removesuffix("weight") + "input_scale", name
    assert {own.form.activations for own in found.experts.values()} == {"static"}
    assert found.tensors == len(open_checkpoint(tmp_path / "checkpoint").tensors)


def test_dynamic(tmp_path: Path) -> None:
    found = attached(made(DYNAMIC, scales=False), tmp_path)
    kinds = {stored.form: (stored.activations, stored.input_scale) for _, stored in found.stored()}
    assert kinds == {"none": ("none", None), "channel": ("dynamic", None)}
    assert {own.form.activations for own in found.experts.values()} == {"dynamic"}


def test_modelopt(tmp_path: Path) -> None:
    own = declare_modelopt(by_hand(TENSOR, lambda name: "router" in name, "fused"), kv="FP8")
    for name in list(own.tensors):
        if name.endswith("weight_scale"):
            own.tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5)
    own.tensors |= {f"{ATTENTION}.{part}_proj.{part}_scale": torch.tensor(0.25) for part in "kv"}
    found = attached(own, tmp_path)
    experts = found.experts[1]
    assert [part.input_scale.name for part in experts.parts if part.input_scale] == [
        f"model.layers.1.feed_forward.experts.{part}_proj_input_scale" for part in ("gate_up", "down")
    ]
    keys, values = found.kv_scales[1]
    assert (keys.name, values.name) == (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale")
    assert found.kv_scales.keys() == {1} and found.waived == []


def test_nothing_is_declared(tmp_path: Path) -> None:
    own = made(None, scales=False)
    found = attached(own, tmp_path)
    assert {stored.activations for _, stored in found.stored()} == {"none"} and found.kv_scales == {}


BLOCKS = STATIC | {"strategy": "group", "group_size": 16, "dynamic": True}


@pytest.mark.parametrize(
    ("scheme", "way", "said"),
    [
        (STATIC | {"num_bits": 4}, CHANNEL, "float of 4 bits by tensor, static"),
        (STATIC | {"type": "int"}, CHANNEL, "int of 8 bits by tensor, static"),
        (DYNAMIC | {"type": "int"}, CHANNEL, "int of 8 bits by token, dynamic"),
        (STATIC | {"strategy": "channel"}, CHANNEL, "float of 8 bits by channel, static"),
        (DYNAMIC | {"strategy": "tensor"}, CHANNEL, "float of 8 bits by tensor, dynamic"),
        (STATIC | {"dynamic": "local"}, CHANNEL, "float of 8 bits by tensor, dynamic"),
        (BLOCKS, CHANNEL, "float of 8 bits by group, dynamic"),
        (DYNAMIC, Way("group", 16), "float of 8 bits by token, dynamic"),
        (STATIC, Way("group", 16), "float of 8 bits by tensor, static"),
    ],
)
def test_other_ways_are_refused(tmp_path: Path, scheme: dict[str, Any], way: Way, said: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"'model.layers.0.self_attn.q_proj' has .* activations {said}"
    ) as caught:
        attached(made(scheme, way, scales=False), tmp_path)
    assert "without --recipe" in caught.value.hint


@pytest.mark.parametrize("module", ["model.layers.2.self_attn.v_proj", "model.layers.3.feed_forward.experts.2.up_proj"])
def test_scales_that_are_missing(tmp_path: Path, module: str) -> None:
    own = made(STATIC)
    del own.tensors[f"{module}.input_scale"]
    with pytest.raises(CheckpointError, match=f"'{module}' has static activations .* no tensor '{module}.input_scale'"):
        attached(own, tmp_path)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{ATTENTION}.q_proj.input_scale", f"{ATTENTION}.v_scale"])
def test_scales_that_are_none(tmp_path: Path, name: str, value: float) -> None:
    own = made(STATIC, kv={f"{ATTENTION}.{part}_scale": torch.ones(1) for part in "kv"})
    own.tensors[name] = torch.tensor([value])
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds {value}: a scale"):
        attached(own, tmp_path)


def test_caches_by_head_are_refused(tmp_path: Path) -> None:
    own = made(STATIC, kv={f"{ATTENTION}.{part}_scale": torch.ones(2) for part in "kv"})
    with pytest.raises(UnsupportedError, match=rf"'{ATTENTION}.k_scale' is F32 \[2\]; a scale .* is one number"):
        attached(own, tmp_path)


@pytest.mark.parametrize(("part", "word"), [("k", "keys"), ("v", "values")])
def test_half_a_cache_is_refused(tmp_path: Path, part: str, word: str) -> None:
    own = made(STATIC, kv={f"{ATTENTION}.{part}_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"'{ATTENTION}' has a scale for {word} alone"):
        attached(own, tmp_path)


def test_experts_of_one_layer_alike(tmp_path: Path) -> None:
    """Some of a layer's experts with dynamic activations, some with none."""
    own = made(DYNAMIC, scales=False)
    groups = own.raw["quantization_config"]["config_groups"]
    (group,) = groups.values()
    apart = [name for name in group["targets"] if ".3.feed_forward.experts.1." in name]
    group["targets"] = [name for name in group["targets"] if name not in apart]
    groups["other"] = group | {"targets": apart, "input_activations": None}
    with pytest.raises(UnsupportedError, match=r"experts of 'model.layers.3.feed_forward.experts' .* dynamic and none"):
        attached(own, tmp_path)
