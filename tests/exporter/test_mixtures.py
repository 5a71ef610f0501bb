"""Models whose every module is stored in a way of its own; and that a mistake in reading them shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shuntyard.engines.build import Request, build
from shuntyard.errors import CheckpointError
from shuntyard.exporter import split as split_module
from shuntyard.exporter.export import export
from tests.checkpoints import parsed, random_weights
from tests.exporter.exported import OTHER, RAW, by_hand, logits, reference
from tests.exporter.handmade import CHANNEL, Handmade, Way, declare_compressed_tensors, declare_modelopt, handmade
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MISTAKE_MIN_ABS, MODEL_MAX_ABS, ROUTER_MARGIN


@st.composite
def ways(draw: st.DrawFn, modelopt: bool = False) -> Way:
    form = draw(st.sampled_from(["plain", "tensor"] if modelopt else ["plain", "tensor", "channel", "group"]))
    scale = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    shapes: dict[str, list[tuple[int, ...]]] = {"tensor": [(), (1,), (1, 1)], "channel": [(-1, 1), (-1,)]}
    shape = draw(st.sampled_from(shapes[form])) if form in shapes else None
    return Way(form, draw(st.sampled_from([8, 16])) if form == "group" else 0, scale, shape)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Handmade, int]:
    """Every module stored in a way of its own, every layer's experts in a layout of its own."""
    raw = draw(st.sampled_from([RAW, OTHER]))
    modelopt = draw(st.booleans())
    seed = draw(st.integers(0, 2**16))
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    weights = {name: w.to(draw(st.sampled_from(kinds))) for name, w in random_weights(parsed(raw), seed).items()}
    layouts = [draw(st.sampled_from(["fused", "linear"])) for _ in range(raw["num_hidden_layers"])]
    for name in weights:  # experts of a layer are of one type
        if name.endswith("experts.down_proj"):
            weights[name] = weights[name].to(weights[name.replace("down_proj", "gate_up_proj")].dtype)

    def way(module: str) -> Way:
        fused = module.endswith(".experts") and layouts[int(module.split(".")[2])] == "fused"
        return draw(ways(modelopt or fused))

    made = handmade(raw, weights, way, layouts.__getitem__)
    if modelopt:
        return declare_modelopt(made), seed
    if all(one.form == "plain" for one in made.ways.values()):
        return made, seed
    return declare_compressed_tensors(made), seed


@settings(max_examples=8)
@given(checkpoints())
def test_mixtures(drawn: tuple[Handmade, int]) -> None:
    made, seed = drawn
    raw = {key: value for key, value in made.raw.items() if key != "quantization_config"}
    ids = np.random.default_rng(seed).integers(0, raw["vocab_size"], size=(2, 19))
    model = Reference(raw, made.values)
    expected = model.logits(ids)
    assume(model.margin > ROUTER_MARGIN)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if seed % 2:
            largest = max(value.numel() for name, value in made.values.items() if ".experts." in name)
            patch.setattr(split_module, "LARGEST_TENSOR", largest - 1)
        checkpoint = made.write(Path(folder) / "checkpoint")
        export(checkpoint, Path(folder) / "model", check_values=True)
        got = logits(Path(folder) / "model" / "model.onnx", raw, ids)
    assert largest_difference(got, expected) <= MODEL_MAX_ABS


# Mistakes.


def by_group(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(value.unflatten(1, (-1, 16))).flatten(1)


def rescaled(value: Tensor, axis: int) -> Tensor:
    """Each row times the scale of the next one along an axis."""
    largest = value.abs().amax(-1, keepdim=True)
    return value / largest * largest.roll(1, axis)


MISTAKES: dict[str, tuple[Way, Callable[[Tensor], Tensor]]] = {
    "nibbles from the highest": (Way("group", 16), lambda w: w.unflatten(1, (-1, 8)).flip(2).flatten(1)),
    "nibbles along the outputs": (Way("group", 16), lambda w: w.unflatten(0, (-1, 8)).flip(1).flatten(0, 1)),
    "one number more": (Way("group", 16), lambda w: by_group(w, lambda g: g + g.abs().amax(-1, keepdim=True) / 7.5)),
    "scales of the next group": (Way("group", 16), lambda w: by_group(w, lambda g: rescaled(g, 1))),
    "scales of the next channel": (CHANNEL, lambda w: rescaled(w, 0)),
    "one scale for all channels": (CHANNEL, lambda w: w / w.abs().amax(1, keepdim=True) * w.abs().amax()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_one_matrix_shows(name: str) -> None:
    """Read wrongly, one query projection of one layer moves logits far beyond what parity tolerates."""
    way, mistake = MISTAKES[name]
    values = by_hand(way, lambda module: False, "linear").values
    query = "model.layers.3.self_attn.q_proj.weight"
    difference = largest_difference(reference(values | {query: mistake(values[query])}), reference(values))
    assert difference > MISTAKE_MIN_ABS


def test_build_refuses_what_is_beyond_its_type(tmp_path: Path) -> None:
    """Numbers and scales are in order, their products are not."""
    made = declare_compressed_tensors(by_hand(CHANNEL, lambda name: False, "linear"))
    name = "model.layers.0.self_attn.q_proj.weight"
    made.tensors[f"{name}_scale"][9] = 4096
    export(made.write(tmp_path / "checkpoint"), tmp_path / "model", check_values=True)
    with pytest.raises(CheckpointError, match=rf"{name}' at \[9, \d+\] holds .*beyond 65504") as refused:
        build(tmp_path / "model", tmp_path / "engine", Request(dtype="fp16", max_context=16))
    assert "--dtype" in refused.value.hint and not (tmp_path / "engine").exists()
