"""Scales for activations and KV caches: waived where they are declared and belong to something, else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exporter.handmade import CHANNEL, PLAIN, Handmade
from tests.exporter.spoiling import ATTENTION, EXPERT, EXPERTS, INT4, Q, match, modelopt, nested, refusal, sound

STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
DYNAMIC = STATIC | {"strategy": "token", "dynamic": True}
INPUT_SCALES = {f"{Q}.input_scale": torch.ones(1), f"{EXPERT}.input_scale": torch.ones(())}
KV_SCALES = {f"{ATTENTION}.k_scale": torch.ones(1), f"{ATTENTION}.v_scale": torch.ones(2, 1, 1)}
INPUT, KV = {f"{Q}.input_scale": torch.ones(1)}, {f"{ATTENTION}.k_scale": torch.ones(1)}


def declared(scheme: dict[str, Any] | None, kv: bool, scales: dict[str, Tensor], way: Any = CHANNEL) -> Handmade:
    """A checkpoint whose declaration says this of activations and caches, and that has these scales."""
    made = sound(way)
    for group in made.raw["quantization_config"]["config_groups"].values():
        group["input_activations"] = scheme
    made.raw["quantization_config"]["kv_cache_scheme"] = STATIC if kv else None
    made.tensors |= scales
    return made


@pytest.mark.parametrize("way", [CHANNEL, INT4], ids=["FP8", "INT4"])
def test_waived(way: Any, tmp_path: Path) -> None:
    weights = match(declared(STATIC, True, INPUT_SCALES | KV_SCALES, way), tmp_path)
    assert sorted(weights.waived) == sorted(INPUT_SCALES | KV_SCALES)


def test_waived_of_a_cache_alone(tmp_path: Path) -> None:
    assert sorted(match(declared(DYNAMIC, True, KV_SCALES), tmp_path).waived) == sorted(KV_SCALES)


def test_waived_of_modelopt(tmp_path: Path) -> None:
    made = modelopt("FP8")
    names = ["k_proj.k_scale", "v_proj.v_scale", "q_proj.input_scale"]
    scales = [f"{ATTENTION}.{name}" for name in names] + [f"{EXPERTS}.down_proj_input_scale"]
    made.tensors |= {name: torch.ones(()) for name in scales}
    assert sorted(match(made, tmp_path).waived) == sorted(scales)


def test_waived_under_a_prefix(tmp_path: Path) -> None:
    made = nested(declared(STATIC, True, INPUT_SCALES | KV_SCALES))
    assert sorted(match(made, tmp_path).waived) == sorted(INPUT_SCALES | KV_SCALES)


def modelopt_with(name: str) -> Handmade:
    made = modelopt()
    made.tensors[name] = torch.ones(())
    return made


UNDECLARED: dict[str, tuple[Callable[[], Handmade], str]] = {
    "input_scale under dynamic": (lambda: declared(DYNAMIC, False, INPUT), "activations, but config.json"),
    "input_scale under dynamic, with a cache": (lambda: declared(DYNAMIC, True, INPUT), "activations, but config.json"),
    "input_scale of weights alone": (lambda: declared(None, False, INPUT), "activations, but config.json"),
    "k_scale without a scheme": (lambda: declared(DYNAMIC, False, KV), "a KV cache, but config.json"),
    "k_scale without a scheme, static": (lambda: declared(STATIC, False, KV), "a KV cache, but config.json"),
    "ModelOpt's k_scale": (
        lambda: modelopt_with(f"{ATTENTION}.k_proj.k_scale"),
        "a KV cache, but hf_quant_config.json",
    ),
}


@pytest.mark.parametrize("case", UNDECLARED)
def test_undeclared(case: str, tmp_path: Path) -> None:
    make, message = UNDECLARED[case]
    made = make()
    name = next(name for name in made.tensors if name.endswith((".input_scale", ".k_scale")))
    assert f"tensor '{name}' is a scale for {message} declares none" in refusal(made, tmp_path).message


ODD: dict[str, Tensor] = {
    f"{Q}.input_scale": torch.ones(32),
    f"{EXPERT}.input_scale": torch.ones(1, dtype=torch.int32),
    f"{ATTENTION}.k_proj.input_scale": torch.ones(2),  # as many as there are key/value heads
    f"{ATTENTION}.k_scale": torch.ones(3),
    f"{ATTENTION}.v_scale": torch.ones(0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str, tmp_path: Path) -> None:
    """Anything but one number (or one a head) is no such scale, whatever it is called."""
    message = refusal(declared(STATIC, True, {name: ODD[name]}), tmp_path).message
    assert f"tensor '{name}' is " in message and "a scale is one number" in message


STRAYS = (
    "lm_head.input_scale",  # which is plain
    "model.embed_tokens.input_scale",
    "model.input_scale",
    "model.layers.0.input_layernorm.input_scale",
    "model.layers.0.self_attn.input_scale",
    "model.layers.7.self_attn.q_proj.input_scale",
    "model.layers.7.self_attn.k_scale",
    "model.layers.0.self_attn.q_proj.k_scale",
    "model.layers.0.self_attn.q_scale",
    "model.layers.0.feed_forward.gate_proj.k_scale",
    "model.layers.0.feed_forward.experts.down_proj_input_scale",
    "model.layers.1.feed_forward.experts.4.up_proj.input_scale",
    "model.layers.1.feed_forward.experts.down_proj_input_scale",  # whose experts are linear
)


@pytest.mark.parametrize("name", STRAYS)
def test_scales_of_nothing(name: str, tmp_path: Path) -> None:
    """A scale is waived beside what it is a scale of, and nowhere else."""
    made = declared(STATIC, True, {name: torch.ones(1)})
    assert f"tensor '{name}' is not understood" in refusal(made, tmp_path).message


def test_scale_in_a_plain_checkpoint(tmp_path: Path) -> None:
    made = sound(PLAIN)
    made.tensors |= INPUT
    assert f"tensor '{Q}.input_scale' is not understood" in refusal(made, tmp_path).message
