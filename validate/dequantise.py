"""Weights of a quantised checkpoint in fp32, for the reference, which cannot read them itself.

Written apart from the exporter, in torch and by the safetensors library, so that the two check each other. transformers
5.24 is no reference for these files: it reads ModelOpt's FP8 numbers without their scales, rounds what
compressed-tensors dequantises to the scale's bf16, or quantises activations too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shuntyard.errors import CheckpointError

IMAGES = ("vision_model.", "multi_modal_projector.")
NOT_WEIGHTS = (
    ".input_scale",
    ".k_scale",
    ".v_scale",
    "_proj_input_scale",
    ".weight_shape",
    ".rotary_emb.inv_freq",
    ".rotary_emb.freqs",
)


def text_config(checkpoint: Path) -> dict[str, Any]:
    """The text model's part of ``config.json``, for transformers' ``Llama4TextConfig``."""
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    section = raw.get("text_config", raw)
    beside = ("architectures", "dtype", "torch_dtype", "quantization_config", "model_type")
    return {key: value for key, value in section.items() if key not in beside}


def dequantised_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight in fp32 under the names of transformers' ``Llama4ForCausalLM``, experts fused.

    Raises:
        CheckpointError: a tensor is left over that is no weight; names it.
    """
    tensors = dict(_tensors(checkpoint))
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((*NOT_WEIGHTS, "_scale")):
            continue
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            state[f"{module}.weight"] = _int4(tensor, tensors[f"{module}.weight_scale"])
            continue
        scale = tensors.get(f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale")
        if (scale is None and not tensor.dtype.is_floating_point) or (tensor.dtype.itemsize == 1 and scale is None):
            raise CheckpointError(f"{checkpoint}: tensor '{name}' is {tensor.dtype} without a scale", hint="export it")
        state[name] = tensor.float() if scale is None else tensor.float() * _against(scale, tensor)
    return _fused(state)


def is_taken_apart(checkpoint: Path) -> bool:
    """Whether experts are stored one by one, which transformers does not read unless they are quantised."""
    return any(".experts.0." in name for file in _files(checkpoint) for name in _names(file))


def _files(checkpoint: Path) -> list[Path]:
    """The shards that the index names, or the only one; what else lies in the directory is no part of it."""
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return [checkpoint / "model.safetensors"]
    return [checkpoint / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stream:
        return list(stream.keys())


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _files(checkpoint):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  it is no dict
                if not name.startswith(IMAGES):
                    yield name.removeprefix("language_model."), stream.get_tensor(name)


def _against(scale: Tensor, tensor: Tensor) -> Tensor:
    """A scale of one number, or one for each row, so that it multiplies."""
    return scale.float().reshape(-1, *[1] * (tensor.dim() - 1)) if scale.numel() > 1 else scale.float().reshape(())


def _int4(packed: Tensor, scale: Tensor) -> Tensor:
    """compressed-tensors' ``pack-quantized``: nibble ``i`` of an int32 is value ``i``, less 8."""
    columns = [(packed >> 4 * i) & 0xF for i in range(8)]
    values = torch.stack(columns, dim=2).flatten(1).float() - 8
    return values * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-expert matrices ``[out, in]`` as transformers' stacks ``[E, in, out]``, gate before up."""
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name or name.endswith("_proj")}
    layers = {name.split(".experts.")[0] for name in state.keys() - fused.keys()}
    for layer in layers:
        own = [name for name in state if name.startswith(f"{layer}.experts.")]
        count = 1 + max(int(name.removeprefix(f"{layer}.experts.").split(".")[0]) for name in own)

        def stack(part: str, layer: str = layer, count: int = count) -> Tensor:
            return torch.stack([state[f"{layer}.experts.{e}.{part}.weight"].T for e in range(count)])

        fused[f"{layer}.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=2)
        fused[f"{layer}.experts.down_proj"] = stack("down_proj")
    return fused
