"""A checkpoint's matrices as numbers and scales, as they are stored or quantised in memory.

Values are read by the safetensors library and dequantised in torch, apart from the exporter; what it says of them is
where they lie and what they declare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from shuntyard.errors import CheckpointError
from shuntyard.exporter.activations import attach_activations
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.modules import Module
from shuntyard.exporter.quantise import quantise_matrix
from shuntyard.exporter.quantise_stream import quantise_rows
from shuntyard.exporter.recipe import PLAIN, Precision
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.exporter.safetensors_header import TensorEntry
from shuntyard.exporter.weights import Stored, Weights, match_weights
from shuntyard.validate.dequantise import unpacked_int4

PLAIN_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Matrix:
    """A matrix ``[out, in]`` as numbers and scale, and how what it multiplies is rounded.

    ``numbers``: plain values, e4m3 ones, or with ``group_size`` int32 ``[out, in / 8]`` of eight INT4 values each.
    ``input_scale``: of activations that are ``static``.
    """

    numbers: Tensor
    scale: Tensor | None = None
    group_size: int = 0
    activations: str = "none"  # none, static, dynamic
    input_scale: Tensor | None = None

    def value(self) -> Tensor:
        """Its values in fp32."""
        if self.scale is None:
            return self.numbers.float()
        if self.group_size:
            return unpacked_int4(self.numbers, self.scale)
        return self.numbers.float() * self.scale.float().reshape(-1, 1)


def quantised(value: Tensor, precision: Precision) -> Matrix:
    """fp32 ``value [out, in]`` in the weights of a precision: the numbers that ``exporter/quantise.py`` defines."""
    if precision.weights in PLAIN:
        return Matrix(value.to(PLAIN_TYPES[precision.weights]))
    how = Quantize(cast(Any, precision.granularity), precision.group_size, "")
    w = np.ascontiguousarray(value.numpy())
    if how.form == "tensor":
        codes, scale = quantise_matrix(w, how)
        codes = codes.view(np.uint8)
    else:
        rows, columns = w.shape
        is_int4 = how.form == "group"
        codes = np.empty((rows, columns // 8), np.int32) if is_int4 else np.empty((rows, columns), np.uint8)
        scale = np.empty(how.scale_shape(rows, columns), np.uint16 if is_int4 else np.float32)
        quantise_rows(w, how, codes, scale.view(ml_dtypes.bfloat16) if is_int4 else scale)
    if how.form == "group":
        return Matrix(torch.from_numpy(codes), torch.from_numpy(scale).view(torch.bfloat16), precision.group_size)
    return Matrix(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale))


class Numbers:
    """A checkpoint's matrices as they are stored, one at a time.

    Raises:
        CheckpointError: the checkpoint is broken, or contradicts itself.
        UnsupportedError: it holds something that is not understood.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.config = self.checkpoint.config
        self.weights = match_weights(self.checkpoint, alike=False)
        self._attached: Weights | None = None

    def declared(self) -> Weights:
        """The weights with their activations; see ``attach_activations`` for what it raises."""
        if self._attached is None:
            self._attached = attach_activations(self.weights, self.checkpoint)
        return self._attached

    def stored(self, module: Module, *, declared: bool = False) -> list[Stored]:
        """What a module lies in: one for a Linear, all parts for experts."""
        weights = self.declared() if declared else self.weights
        if module.kind == "experts":
            assert module.layer is not None
            return list(weights.experts[module.layer].parts)
        return [weights.linears[f"{module.name}.weight"]]

    def matrices(self, module: Module, *, declared: bool = False) -> list[Matrix]:
        """A module's matrices ``[out, in]``; of experts gate, up and down, all experts of each."""
        parts = self.stored(module, declared=declared)
        if module.kind != "experts" or len(parts) > 2:
            return [_matrix(stored, module.shapes[0] if module.kind != "experts" else None) for stored in parts]
        gate_up, down = parts
        count, width = module.copies, module.shapes[0][0]
        both = [_matrix(gate_up, None, e) for e in range(count)]
        gates = [replace(matrix, numbers=matrix.numbers[:width]) for matrix in both]
        ups = [replace(matrix, numbers=matrix.numbers[width:]) for matrix in both]
        return [*gates, *ups, *(_matrix(down, None, e) for e in range(count))]

    def plain(self, name: str) -> Tensor:
        """A vector, bias or router as it is stored, in fp32."""
        return _matrix(self.weights.linears[name], None).value()

    def nbytes(self, module: Module) -> tuple[int, int]:
        """Bytes of a module's weights, and of their scales, in the files."""
        parts = self.stored(module)
        return sum(part.entry.nbytes for part in parts), sum(part.scale.nbytes for part in parts if part.scale)

    def number(self, *names: str) -> float | None:
        """The first of these tensors that is there: a scale of activations or of a cache.

        Raises:
            CheckpointError: it is not one positive number.
        """
        entry = next((self.checkpoint.tensors[name] for name in names if name in self.checkpoint.tensors), None)
        if entry is None:
            return None
        values = _read(entry).float().reshape(-1).tolist()
        if len(values) != 1 or not 0 < values[0] < float("inf"):
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' holds {values!s:.80}: a scale is a positive number",
                hint="the checkpoint is damaged, or was not calibrated",
            )
        return float(values[0])


def _read(entry: TensorEntry, index: int | None = None) -> Tensor:
    with safe_open(entry.file, framework="pt") as stream:
        if index is None:
            return cast(Tensor, stream.get_tensor(entry.name).clone())
        return cast(Tensor, stream.get_slice(entry.name)[index : index + 1][0].clone())


def _matrix(stored: Stored, shape: tuple[int, int] | None, index: int | None = None) -> Matrix:
    """What is stored; one expert of a stack ``[E, in, out]`` as ``[out, in]``."""
    numbers = _read(stored.entry, index)
    if index is not None:
        numbers = numbers.T
    scale = None if stored.scale is None else _read(stored.scale)
    inputs = None if stored.input_scale is None else _read(stored.input_scale).float().reshape(1)
    wide = numbers if numbers.dtype == torch.int32 else numbers.float()
    if not bool(wide.isfinite().all()) or (scale is not None and not bool(scale.float().isfinite().all())):
        raise CheckpointError(
            f"{stored.entry.file}: tensor '{stored.entry.name}' holds values that are not finite",
            hint="the checkpoint is damaged; download it again",
        )
    assert shape is None or stored.elements == shape[0] * shape[1]
    return Matrix(numbers, scale, stored.group_size, stored.activations, inputs)
