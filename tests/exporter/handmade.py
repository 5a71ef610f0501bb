"""Quantised checkpoints made by hand: bits, scales and declarations by no library's code, so that each can be spoiled.

What a name holds, and in which bits, is in ``exporter/weights.py`` and ``plugins/contract.py``; it is written a second
time here, and compared with what the formats' own libraries write in ``test_formats.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

E4M3_MAX = 448.0
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


class Way(NamedTuple):
    """How one matrix is stored: ``plain``, FP8 with a scale a ``tensor`` or a ``channel``, or INT4 by ``group``."""

    form: str = "plain"
    group: int = 0
    scale: torch.dtype = torch.bfloat16
    scale_shape: tuple[int, ...] | None = None  # of one number, or of a channel's; None: [] and [out, 1]


PLAIN, TENSOR, CHANNEL = Way(), Way("tensor"), Way("channel")


@dataclass
class Handmade:
    """A checkpoint in memory: what is going to be in its files, and the fp32 values that they stand for."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)  # under the names of transformers, experts fused
    ways: dict[str, Way] = field(default_factory=dict)  # of each Linear, and of each tensor of fused experts
    beside: dict[str, Any] | None = None  # hf_quant_config.json

    def write(self, path: Path) -> Path:
        """The directory, in one shard."""
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.raw))
        if self.beside is not None:
            (path / "hf_quant_config.json").write_text(json.dumps(self.beside))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path / "model.safetensors")
        return path


def handmade(
    raw: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    way: Callable[[str], Way],
    layout: Callable[[int], str] = lambda layer: "linear",
) -> Handmade:
    """Stores each Linear as ``way`` says of its module, the experts of a layer in the ``layout`` that is said of it.

    ``way`` is asked once for all experts of a layer, by the name ``model.layers.N.feed_forward.experts``.
    """
    made = Handmade(dict(raw))
    experts = [name.removesuffix(".gate_up_proj") for name in weights if name.endswith("experts.gate_up_proj")]
    for name, weight in weights.items():
        if ".experts." in name:
            continue
        if weight.dim() < 2 or name == "model.embed_tokens.weight":
            made.tensors[name] = made.values[name] = weight
        else:
            made.values[name] = _linear(made, name.removesuffix(".weight"), weight, way(name.removesuffix(".weight")))
    for module in experts:
        fused = {part: weights[f"{module}.{part}"] for part in ("gate_up_proj", "down_proj")}
        store = _linear_experts if layout(int(module.split(".")[2])) == "linear" else _fused_experts
        store(made, module, fused, way(module))
    return made


def linear(module: str, weight: Tensor, way: Way) -> tuple[dict[str, Tensor], Tensor]:
    """What a Linear ``[out, in]`` has in the files, and the fp32 values that it stands for."""
    if way.form == "plain":
        return {f"{module}.weight": weight}, weight.float()
    if way.form == "group":
        groups = weight.float().unflatten(1, (-1, way.group))
        scale = (groups.abs().amax(-1) / 7.5).to(way.scale)
        numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        stored = {"packed": packed(numbers.flatten(1).int()), "scale": scale, "shape": torch.tensor(weight.shape)}
        tensors = {f"{module}.weight_{name}": tensor for name, tensor in stored.items()}
        return tensors, (numbers * scale.float()[..., None]).flatten(1)
    largest = weight.float().abs()
    scale = ((largest.amax() if way.form == "tensor" else largest.amax(1, keepdim=True)) / E4M3_MAX).to(way.scale)
    numbers = e4m3(weight, scale)
    shaped = scale if way.scale_shape is None else scale.reshape(way.scale_shape)
    return {f"{module}.weight": numbers, f"{module}.weight_scale": shaped}, numbers.float() * scale.float()


def _linear(made: Handmade, module: str, weight: Tensor, way: Way) -> Tensor:
    """Stores a Linear; gives its values."""
    tensors, value = linear(module, weight, way)
    made.ways[module] = way
    made.tensors |= tensors
    return value


def e4m3(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 numbers for a weight over its scale, the scale's rounding not pushing any beyond the largest."""
    return (weight.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def data(tensor: Tensor) -> bytes:
    """The bytes that a file has for a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def packed(numbers: Tensor) -> Tensor:
    """Integers -8 .. 7 ``[out, in]`` as int32 ``[out, in / 8]``: each plus 8, the first in the lowest four bits."""
    nibbles = (numbers.numpy() + 8).astype(np.uint32).reshape(len(numbers), -1, 8)
    words = np.zeros(nibbles.shape[:2], np.uint32)
    for place in range(8):
        words |= nibbles[:, :, place] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def _linear_experts(made: Handmade, module: str, fused: dict[str, Tensor], way: Way) -> None:
    """Three Linears an expert, ``[out, in]``: transposed against the fused tensors, whose first half is the gate."""
    matrices: dict[str, list[Tensor]] = {part: [] for part in EXPERT_PARTS}
    for e, (gate_up, down) in enumerate(zip(fused["gate_up_proj"], fused["down_proj"], strict=True)):
        for part, matrix in zip(EXPERT_PARTS, (*gate_up.chunk(2, dim=1), down), strict=True):
            matrices[part].append(_linear(made, f"{module}.{e}.{part}", matrix.T, way).T)
    gate, up, down = (torch.stack(matrices[part]) for part in EXPERT_PARTS)
    made.values |= {f"{module}.gate_up_proj": torch.cat([gate, up], dim=2), f"{module}.down_proj": down}


def _fused_experts(made: Handmade, module: str, fused: dict[str, Tensor], way: Way) -> None:
    """Two tensors for all experts, plain or FP8 with one scale."""
    for part, weight in fused.items():
        name = f"{module}.{part}"
        made.ways[name] = way
        made.tensors[name] = weight
        made.values[name] = weight.float()
        if way.form != "plain":
            scale = (weight.float().abs().amax().reshape(way.scale_shape or ()) / E4M3_MAX).to(way.scale)
            made.tensors |= {name: e4m3(weight, scale), f"{name}_weight_scale": scale}
            made.values[name] = made.tensors[name].float() * scale.float()


def arguments(way: Way) -> dict[str, Any]:
    """compressed-tensors' ``QuantizationArgs`` for a form."""
    if way.form == "group":
        return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": way.group}
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": way.form, "dynamic": False}


def declare_compressed_tensors(made: Handmade, **changes: Any) -> Handmade:
    """Adds the declaration of what is stored: a group of modules, by name, for each form; the rest is ignored."""
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for module, way in made.ways.items():
        if way.form != "plain":
            group = groups.setdefault((way.form, way.group), {"targets": [], "weights": arguments(way)})
            group["targets"].append(module)
    section = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [module for module, way in made.ways.items() if way.form == "plain"],
    }
    made.raw["quantization_config"] = {key: value for key, value in (section | changes).items() if value is not ...}
    return made


def declare_modelopt(made: Handmade, kv: str | None = None) -> Handmade:
    """Adds ``hf_quant_config.json``: everything is FP8 with a scale a tensor, but for what is excluded by name."""
    assert {way.form for way in made.ways.values()} <= {"plain", "tensor"}
    excluded = ["model.embed_tokens", *(module for module, way in made.ways.items() if way.form == "plain")]
    made.beside = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": kv, "exclude_modules": excluded},
    }
    return made
