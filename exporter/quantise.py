"""What quantised weights are, to the bit: ``quantise_matrix`` is the definition, written for reading.

``quantise_stream`` makes the same numbers of matrices that do not fit in memory, ``plugins/native/quantise`` makes them
fast. All arithmetic is in fp32, each operation rounded to nearest even, divisions too: no order of evaluation is left
open, so every machine and every number of threads makes the same bytes.

FP8 (e4m3fn), by channel or tensor
    ``scale = max|w| / 448`` over a row or the matrix, ``code = e4m3(clip(w / scale, -448, 448))``.

INT4, by group
    ``code = clip(rint(w / scale), -8, 7)``, with the scale of least squared error among ``max|w| / d`` for each ``d``
    of ``DENOMINATORS``, the first of them where several are as good. A scale is rounded to bf16, as it is stored,
    before it is tried; while scales are tried, ``w * (1 / scale)`` stands for ``w / scale``. The error is measured in
    units of ``max|w|``, so that it neither overflows nor vanishes.

A scale is at least 2**-126, the smallest normal number of fp32 and bf16; where all values are 0, it is 1.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.plugins.contract import LARGEST_CODE

LARGEST_FP8 = np.float32(LARGEST_CODE)

LEAST_SCALE = np.float32(2.0**-126)

DENOMINATORS = np.array([8.0, 7.5, 7.0, 6.5, 6.0, 8.5, 9.0, 9.5, 10.0], np.float32)
"""Of the scales that INT4 tries. 8 and above cut the largest values off, which serves the many small ones."""

LANES = 16
"""A group's squared errors are summed in so many running sums, value ``i`` in sum ``i % 16``; then the upper half of
the sums is added to the lower, until one is left."""


def quantise_matrix(w: NDArray[np.float32], how: Quantize) -> tuple[NDArray[Any], NDArray[Any]]:
    """Quantises fp32 ``w [out, in]``, all of whose values are finite.

    Returns:
        Codes and scale, in the types and shapes that ``Quantize`` lists.
    """
    if how.form == "group":
        return _int4(w, how.group_size)
    largest = np.abs(w).max(axis=1, keepdims=True) if how.form == "channel" else np.abs(w).max().reshape(1)
    scale = fp8_scale(largest)
    return fp8_codes(w, scale), scale


def fp8_scale(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale of values whose largest magnitude is ``largest``, for each of its elements."""
    scale: NDArray[np.float32] = np.maximum(largest / LARGEST_FP8, LEAST_SCALE)
    return np.where(largest == 0, np.float32(1), scale)


def fp8_codes(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[Any]:
    """``w [out, in]`` over ``scale [out, 1]`` or ``[1]``, as e4m3fn."""
    codes: NDArray[Any] = np.clip(w / scale, -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
    return codes


def _int4(w: NDArray[np.float32], group: int) -> tuple[NDArray[np.int32], NDArray[Any]]:
    rows, columns = w.shape
    w = w.reshape(rows, columns // group, group)
    largest = np.abs(w).max(axis=2)
    unit = np.where(largest == 0, np.float32(1), largest)
    best = np.full(largest.shape, np.inf, np.float32)
    scale = np.ones(largest.shape, np.float32)
    for denominator in DENOMINATORS:
        tried: NDArray[Any] = np.maximum(largest / denominator, LEAST_SCALE)
        tried = np.where(largest == 0, np.float32(1), tried.astype(ml_dtypes.bfloat16).astype(np.float32))
        exact: NDArray[Any] = w * (np.float32(1) / tried)[..., None]
        ratio = tried / unit
        error = _sum((exact - _rounded(exact)) ** 2) * (ratio * ratio)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
    divided: NDArray[Any] = w / scale[..., None]
    return _packed(_rounded(divided).reshape(rows, columns)), scale.astype(ml_dtypes.bfloat16)


def _rounded(exact: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.rint(exact), np.float32(-8), np.float32(7))


def _sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis, in the order that ``LANES`` says."""
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % LANES)]
    lanes = np.pad(values, padding).reshape(*values.shape[:-1], -1, LANES)
    sums: NDArray[np.float32] = np.zeros_like(lanes[..., 0, :])
    for i in range(lanes.shape[-2]):
        sums = sums + lanes[..., i, :]
    while (half := sums.shape[-1] // 2) > 0:
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _packed(codes: NDArray[np.float32]) -> NDArray[np.int32]:
    """Eight values an integer, the first in the lowest bits, each as value + 8."""
    nibbles = (codes + 8).astype(np.uint32).reshape(len(codes), -1, 8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    packed: NDArray[np.int32] = np.bitwise_or.reduce(nibbles << shifts, axis=2).view(np.int32)
    return packed
