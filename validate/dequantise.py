"""Weights of a checkpoint in fp32, for the reference, tensor by tensor as they are asked for.

Written apart from the exporter, in torch and by the safetensors library, so that the two check each other. transformers
5.24 is no reference for quantised files: it reads ModelOpt's FP8 numbers without their scales, rounds what
compressed-tensors dequantises to the scale's bf16, or quantises activations too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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

PIECE = 2**21
"""Values that are read at once: 8 MiB of them in fp32. A piece's file is opened anew, for the safetensors library maps
the whole file, and pages that were read stay with the process until the map is closed."""

ROUNDING = 1 + 2.0**-7
"""Of what a scale may be off by: scales are rounded too, to bf16 at the coarsest, some after the numbers are chosen."""

LARGEST_FP8, LEAST_SCALE = 448.0, 2.0**-126
INT4_STEPS = (6.0, 10.0)
"""A group's largest magnitude is at least so many of its scale, and at most so many: more are cut off, for the sake of
the small ones."""

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")

Index = tuple[slice, ...]


def text_config(checkpoint: Path) -> dict[str, Any]:
    """The text model's part of ``config.json``, for transformers' ``Llama4TextConfig``."""
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    section = raw.get("text_config", raw)
    beside = ("architectures", "dtype", "torch_dtype", "quantization_config", "model_type")
    return {key: value for key, value in section.items() if key not in beside}


@dataclass(frozen=True)
class _Place:
    """A tensor in its file, under the file's name for it."""

    file: Path
    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    def read(self, index: Index = ()) -> Tensor:
        """A copy of some of its values; no page of the file is held afterwards."""
        with safe_open(self.file, framework="pt") as stream:
            values: Tensor = stream.get_tensor(self.name)[index].clone()
        return values


@dataclass(frozen=True)
class _Weight:
    """A parameter, or one expert's matrix: numbers, and the scale that they are of where there is one."""

    numbers: _Place
    scale: _Place | None = None
    packed: bool = False  # eight INT4 numbers in an int32

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, last = self.numbers.shape
        return (*rows, 8 * last) if self.packed else self.numbers.shape

    def is_scaled_right(self) -> bool:
        """Whether the scale's shape is one that is understood."""
        scale = () if self.scale is None else self.scale.shape
        if self.packed:
            rows, groups = scale if len(scale) == 2 else (0, 0)
            return len(self.shape) == 2 and rows == self.shape[0] and groups > 0 and self.shape[1] % groups == 0
        return math.prod(scale) in (1, *self.shape[:1])

    def read_reach(self, into: Tensor) -> None:
        """Writes ``[2, ...]``: how far below and above each value lies what is rounded to it."""
        assert self.scale is not None
        numbers, scale = self.numbers.read(), self.scale.read()
        if self.packed:
            values = unpacked_int4(numbers, torch.ones_like(scale, dtype=torch.float32))
            half = 0.5 * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
            into[0] = torch.where(values == -8, math.inf, half)  # what is larger than all numbers becomes the largest
            into[1] = torch.where(values == 7, math.inf, half)
            return
        exponents = numbers.float().abs().clamp(min=2.0**-6).frexp().exponent - 1
        into[:] = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 4) * _against(scale, numbers)

    def misfit(self, value: Tensor) -> str:
        """How the scale is no scale that ``value``, of its shape, is rounded by: "coarser", "finer", or ""."""
        assert self.scale is not None
        scale = self.scale.read().float().reshape(-1)
        largest = value.reshape(len(scale), -1).abs().amax(1)  # of a group, a row, or all
        most, least = largest / LARGEST_FP8, torch.zeros_like(largest)  # finer FP8 cuts off, which its reach shows
        if self.packed:
            most, least = largest / INT4_STEPS[0], largest / INT4_STEPS[1]
        some = largest > 0  # zeros are zeros by any scale
        if bool((some & ~(scale <= ROUNDING * most.clamp(min=LEAST_SCALE))).any()):
            return "coarser"
        return "finer" if bool((some & ~(scale * ROUNDING >= least)).any()) else ""

    def read(self, into: Tensor) -> None:
        """Writes the values, in fp32, into a tensor (or a transposed view) of its shape."""
        scale = None if self.scale is None else self.scale.read()
        for index in _pieces(self.numbers.shape):
            numbers = self.numbers.read(index)
            if scale is None:
                into[index] = numbers
                continue
            own = scale[index[0]] if scale.numel() > 1 else scale
            into[index[:1] if self.packed else index] = (
                unpacked_int4(numbers, own) if self.packed else numbers.float() * _against(own, numbers)
            )


def _pieces(shape: tuple[int, ...]) -> Iterator[Index]:
    """Cuts a tensor along its first axis, and a stack of matrices along their rows too where one is large."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if row > PIECE and len(shape) > 2:
        for i in range(shape[0]):
            for rest in _pieces(shape[1:]):
                yield (slice(i, i + 1), *rest)
        return
    step = max(1, PIECE // max(row, 1))
    for i in range(0, shape[0], step):
        yield (slice(i, min(i + step, shape[0])),)


class DequantisedCheckpoint:
    """The text model's weights in fp32, under the names of transformers' ``Llama4ForCausalLM``, experts fused.

    Headers are read once; values when they are asked for, in pieces, so that memory is that of what is given.

    Attributes:
        shapes: every parameter's shape, by name.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is left over that is no weight; names it.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint
        places = self._places()
        self._input_scales = {name: place for name, place in places.items() if name.endswith("input_scale")}
        matrices = self._weights(places)
        self._experts = self._stacks(matrices)
        own = {name for stack in self._experts.values() for name in stack}
        self._plain = {name: weight for name, weight in matrices.items() if name not in own}
        self.shapes: dict[str, tuple[int, ...]] = {name: weight.shape for name, weight in self._plain.items()}
        for module, stack in self._experts.items():
            count, (width, hidden) = len(stack) // len(EXPERT_PARTS), stack[f"{module}.0.gate_proj.weight"].shape
            self.shapes[f"{module}.gate_up_proj"] = (count, hidden, 2 * width)
            self.shapes[f"{module}.down_proj"] = (count, width, hidden)

    def outer(self, name: str) -> Tensor:
        """One parameter, such as ``model.norm.weight``."""
        module, _, part = name.rpartition(".")
        if module in self._experts:
            return self._stack(module, part)
        tensor = torch.empty(self.shapes[name])
        self._plain[name].read(tensor)
        return tensor

    def reach(self, name: str) -> Tensor | None:
        """How far below and above each value of a parameter lies what is rounded to it, ``[2, ...]``; None: plain."""
        module, _, part = name.rpartition(".")
        if module in self._experts:
            first = next(iter(self._experts[module].values()))
            return None if first.scale is None else self._stack(module, part, reach=True)
        weight = self._plain[name]
        if weight.scale is None:
            return None
        found = torch.empty(2, *weight.shape)
        weight.read_reach(found)
        return found

    def misfit(self, name: str, value: Tensor) -> str:
        """Whether a parameter's scales are "coarser" or "finer" than those that ``value`` is quantised by; "" if not.

        By the reach alone everything is rounded to zero where a scale is only large enough.
        """
        module, _, part = name.rpartition(".")
        if module not in self._experts:
            weight = self._plain[name]
            return "" if weight.scale is None else weight.misfit(value)
        for matrix, own in self._matrices(module, part, value):
            found = "" if own.scale is None else own.misfit(matrix.transpose(-1, -2))
            if found:
                return found
        return ""

    def plain_type(self, name: str) -> str:
        """The type that a parameter's numbers are stored in, as safetensors spells it."""
        module = name.rpartition(".")[0]
        own = next(iter(self._experts[module].values())) if module in self._experts else self._plain[name]
        return own.numbers.dtype

    def input_scale(self, *names: str) -> Tensor:
        """The scale of a module's inputs, fp32 ``[1]``, under the first of these names that there is.

        Raises:
            CheckpointError: there is none, or it is not one positive number.
        """
        place = next((self._input_scales[name] for name in names if name in self._input_scales), None)
        if place is None:
            raise CheckpointError(
                f"{self._path}: there is no tensor '{names[0]}', by which the engine rounds activations",
                hint="hold the engine to the model directory that it was built from",
            )
        scale = place.read().float().reshape(-1)
        if scale.numel() != 1 or not 0 < float(scale[0]) < math.inf:
            raise CheckpointError(
                f"{place.file}: tensor '{place.name}' is no scale: it must be one positive number",
                hint="the checkpoint is damaged, or was not calibrated",
            )
        return scale

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's parameters, by their names below ``model.layers.INDEX.``."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): self.outer(name) for name in self.shapes if name.startswith(prefix)}

    def _places(self) -> dict[str, _Place]:
        """The text model's tensors, by their names without a prefix."""
        places: dict[str, _Place] = {}
        for file in _files(self._path):
            try:
                with safe_open(file, framework="pt") as stream:
                    slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118  it is no dict
                    found = [_Place(file, n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}", hint="download the file again") from error
            for place in found:
                if place.name.startswith(IMAGES):
                    continue
                name = place.name.removeprefix("language_model.")
                if name in places:
                    raise CheckpointError(
                        f"{self._path}: tensor '{name}' is there twice, in {places[name].file.name} and {file.name}",
                        hint="the shards are of different checkpoints; download them again",
                    )
                places[name] = place
        return places

    def _weights(self, places: Mapping[str, _Place]) -> dict[str, _Weight]:
        """What has values of its own, each with its scale. Every tensor is used, or known to be no weight."""
        weights: dict[str, _Weight] = {}
        scales: set[str] = set()
        for name, place in places.items():
            if name.endswith((*NOT_WEIGHTS, "_scale")):
                continue
            module = name.removesuffix(".weight_packed")
            packed = module != name
            beside = f"{module}.weight_scale" if packed else _scale_name(name)
            scale = places.get(beside)
            if scale is None and place.dtype not in ("F64", "F32", "F16", "BF16"):
                raise CheckpointError(
                    f"{self._path}: tensor '{name}' is {place.read((slice(0),) * bool(place.shape)).dtype} "
                    "without a scale",
                    hint="export it",
                )
            weight = _Weight(place, scale, packed)
            if not weight.is_scaled_right():
                raise CheckpointError(
                    f"{self._path}: tensor '{beside}' does not fit '{name}' of shape {list(place.shape)}",
                    hint="one scale, one for each row, or of INT4 one for each group of each row",
                )
            weights[f"{module}.weight" if packed else name] = weight
            scales.add(beside)
        left = [n for n in places if n.endswith("_scale") and not n.endswith(NOT_WEIGHTS) and n not in scales]
        if left:
            raise CheckpointError(
                f"{self._path}: tensor '{left[0]}' is a scale without its weight", hint="download the shards again"
            )
        return weights

    def _stacks(self, matrices: Mapping[str, _Weight]) -> dict[str, dict[str, _Weight]]:
        """Experts that are stored one by one: module -> their matrices ``[out, in]``, by full name."""
        stacks: dict[str, dict[str, _Weight]] = {}
        for name, weight in matrices.items():
            module, dot, rest = name.partition(".experts.")
            if dot and rest.split(".")[0].isdigit():
                stacks.setdefault(f"{module}.experts", {})[name] = weight
        for module, stack in stacks.items():
            count = 1 + max(int(name.removeprefix(f"{module}.").split(".")[0]) for name in stack)
            # No more than there are: a number in a name is no reason to make a list of that length.
            wanted = {f"{module}.{e}.{part}.weight" for e in range(min(count, len(stack))) for part in EXPERT_PARTS}
            both = {f"{module}.gate_up_proj", f"{module}.down_proj"} & matrices.keys()
            odd = sorted(wanted ^ stack.keys()) or sorted(both)
            if odd:
                raise CheckpointError(
                    f"{self._path}: tensor '{odd[0]}' is {'missing' if odd[0] in wanted else 'not understood'}",
                    hint=f"each of {module} has three matrices, or all are in two tensors",
                )
            width, hidden = stack[f"{module}.0.gate_proj.weight"].shape
            for name, weight in stack.items():
                if weight.shape != ((hidden, width) if name.endswith("down_proj.weight") else (width, hidden)):
                    raise CheckpointError(
                        f"{self._path}: tensor '{name}' has shape {list(weight.shape)}, unlike {module}.0",
                        hint="the experts of a layer are of one size",
                    )
        return stacks

    def _stack(self, module: str, part: str, *, reach: bool = False) -> Tensor:
        """Per-expert matrices ``[out, in]`` as transformers' stacks ``[E, in, out]``, gate before up."""
        shape = self.shapes[f"{module}.{part}"]
        stacked = torch.empty(2, *shape) if reach else torch.empty(shape)
        for matrix, weight in self._matrices(module, part, stacked):
            (weight.read_reach if reach else weight.read)(matrix.transpose(-1, -2))
        return stacked

    def _matrices(self, module: str, part: str, stacked: Tensor) -> Iterator[tuple[Tensor, _Weight]]:
        """Each matrix ``[..., in, out]`` of a stack, a view, and what it is stored in."""
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for e in range(stacked.shape[-3]):
            for name, matrix in zip(parts, stacked[..., e, :, :].chunk(len(parts), dim=-1), strict=True):
                yield matrix, self._experts[module][f"{module}.{e}.{name}.weight"]


def dequantised_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight in fp32 under the names of transformers' ``Llama4ForCausalLM``, experts fused.

    Raises:
        CheckpointError: a tensor is left over that is no weight; names it.
    """
    weights = DequantisedCheckpoint(checkpoint)
    return {name: weights.outer(name) for name in weights.shapes}


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


def _scale_name(name: str) -> str:
    return f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale"


def _against(scale: Tensor, tensor: Tensor) -> Tensor:
    """A scale of one number, or one for each row, so that it multiplies."""
    return scale.float().reshape(-1, *[1] * (tensor.dim() - 1)) if scale.numel() > 1 else scale.float().reshape(())


def unpacked_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """compressed-tensors' ``pack-quantized``: nibble ``i`` of an int32 is value ``i``, less 8."""
    columns = [(packed >> 4 * i) & 0xF for i in range(8)]
    values = torch.stack(columns, dim=2).flatten(1).float() - 8
    return values * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
