"""Reads weights, in pieces, to see that every value is finite and fits a type."""

from __future__ import annotations

import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from shuntyard.errors import CheckpointError
from shuntyard.exporter.safetensors_header import TensorEntry

_NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
_PIECE = 4 * 1024 * 1024  # values at a time: bounds the memory, large enough for the disk


def check_finite(entries: Iterable[TensorEntry], largest: float | None = None) -> None:
    """Reads every value of the given tensors.

    ``largest`` bounds the magnitude as well, for weights that are going to be cast to a narrower type.

    Raises:
        CheckpointError: a value is NaN or infinite, or larger than ``largest``; names the tensor and the place.
    """
    for entry in entries:
        values = np.memmap(entry.file, dtype=_NUMPY[entry.dtype], mode="r", offset=entry.offset, shape=(_count(entry),))
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE].astype(np.float32)
            bad = ~np.isfinite(piece)
            if bad.any():
                _refuse(entry, start + int(bad.argmax()), float(piece[bad.argmax()]), "is not finite")
            if largest is not None and (too_large := np.abs(piece) > largest).any():
                first = int(too_large.argmax())
                _refuse(entry, start + first, float(piece[first]), f"is beyond {largest:g}, the type's largest value")


def has_equal_rows(entry: TensorEntry) -> bool:
    """Whether two rows of a matrix are the same, byte by byte."""
    rows = np.memmap(entry.file, dtype=_NUMPY[entry.dtype], mode="r", offset=entry.offset, shape=entry.shape)
    return len({row.tobytes() for row in rows}) < len(rows)


def _count(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _refuse(entry: TensorEntry, flat: int, value: float, why: str) -> None:
    place = [int(i) for i in np.unravel_index(flat, entry.shape)]
    raise CheckpointError(
        f"{entry.file}: tensor '{entry.name}' at {place} holds {value}, which {why}",
        hint="the checkpoint is damaged; download the file again" if "finite" in why else "build with another --dtype",
    )
