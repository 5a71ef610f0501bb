"""Reads weights, in pieces, to see that every value is finite and fits a type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError
from shuntyard.exporter.safetensors_header import TensorEntry, numpy_dtype, read_values
from shuntyard.exporter.weights import Stored, Weights

_PIECE = 4 * 1024 * 1024  # values at a time: bounds the memory, large enough for the disk


def check_finite(weights: Weights, largest: float | None = None) -> None:
    """Reads every value of the model's weights, quantised ones times their scales.

    ``largest`` bounds the magnitude as well, for weights that are going to be cast to a narrower type.

    Raises:
        CheckpointError: a value is NaN or infinite, or larger than ``largest``, or a scale is negative; names the
            tensor and the place.
    """
    for _, stored in weights.stored():
        if stored.scale is None:
            for start, piece in _pieces(stored.entry):
                _check(stored.entry, start, piece, largest)
            continue
        scale = read_values(stored.scale).astype(np.float32)
        _check(stored.scale, 0, scale.reshape(-1), None)
        if (scale < 0).any():
            first = int((scale < 0).argmax())
            _refuse(stored.scale, first, float(scale.reshape(-1)[first]), "is negative: a scale is not")
        if stored.form == "group":
            # The values of INT4 are -8 .. 7: their bytes matter only where 8 scales would be too large.
            if largest is not None and (scale * 8 > largest).any():
                _check_int4(stored, scale, largest)
            continue
        columns = math.prod(stored.entry.shape[1:]) if stored.form == "channel" else 1
        for start, piece in _pieces(stored.entry, columns):
            factor = scale.reshape(-1, 1)
            if stored.form == "channel":
                factor = factor[start // columns : (start + len(piece)) // columns]
            _check(stored.entry, start, (piece.reshape(-1, columns) * factor).reshape(-1), largest)


def _check_int4(stored: Stored, scale: NDArray[np.float32], largest: float) -> None:
    """Whether a product of a nibble and its scale is beyond ``largest``; row by row."""
    entry = stored.entry
    packed = np.memmap(entry.file, np.int32, "r", entry.offset, entry.shape)
    for row, (words, scales) in enumerate(zip(packed, scale, strict=True)):
        numbers = ((words[:, None] >> np.arange(0, 32, 4, dtype=np.int32)) & 15).reshape(-1) - 8
        products = numbers * np.repeat(scales, stored.group_size)
        if (too_large := np.abs(products) > largest).any():
            column = int(too_large.argmax())
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' stands for {products[column]:g} at [{row}, {column}], which is "
                f"beyond {largest:g}, the type's largest value",
                hint="build with another --dtype",
            )


def _pieces(entry: TensorEntry, multiple: int = 1) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor's values in fp32, some at a time, with the index of the first; a whole ``multiple`` at once."""
    size = max(1, _PIECE // multiple) * multiple
    dtype, count = numpy_dtype(entry), math.prod(entry.shape)
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        for start in range(0, count, size):
            data = stream.read(min(size, count - start) * dtype.itemsize)
            if len(data) % (multiple * dtype.itemsize) or not data:
                raise CheckpointError(
                    f"{entry.file}: ends within tensor '{entry.name}'", hint="download the file again"
                )
            yield start, np.frombuffer(data, dtype).astype(np.float32)


def _check(entry: TensorEntry, start: int, values: NDArray[Any], largest: float | None) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        _refuse(entry, start + int(bad.argmax()), float(values[bad.argmax()]), "is not finite")
    if largest is not None and (too_large := np.abs(values) > largest).any():
        first = int(too_large.argmax())
        _refuse(entry, start + first, float(values[first]), f"is beyond {largest:g}, the type's largest value")


def has_equal_rows(stored: Stored) -> bool:
    """Whether two rows of a matrix are the same, byte by byte, quantised or not."""
    rows = read_values(stored.entry)
    scale = None if stored.scale is None or stored.form == "tensor" else read_values(stored.scale)
    keys = {row.tobytes() + (b"" if scale is None else scale[i].tobytes()) for i, row in enumerate(rows)}
    return len(keys) < len(rows)


def _refuse(entry: TensorEntry, flat: int, value: float, why: str) -> None:
    place = [int(i) for i in np.unravel_index(flat, entry.shape)]
    raise CheckpointError(
        f"{entry.file}: tensor '{entry.name}' at {place} holds {value}, which {why}",
        hint="build with another --dtype" if "beyond" in why else "the checkpoint is damaged; download the file again",
    )
