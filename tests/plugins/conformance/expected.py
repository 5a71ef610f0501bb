"""Between which numbers the experts' rows lie, in every form: tests/plugins/bounds.py, but by how sums are made.

A row that holds NaN, or that dynamic scales make NaN of infinity, is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from shuntyard.plugins.contract import EXPERTS
from shuntyard.plugins.oracle import dequantize
from tests.plugins.bounds import SIGMOID, Interval, codes_of, exactly
from tests.plugins.forms import Array, Weights
from tests.tolerances import Sums

_CODE_UNITS = 2.0**9
"""Every e4m3 number is a whole number of 2**-9."""


class Part(NamedTuple):
    """What one product of an expert takes: ``[in, out]``, and with quantised activations its scales."""

    matrix: Array
    weight_scale: Array | None
    activation_scale: Array | None


def parts_of(made: Weights, e: int, dtype: Any) -> tuple[Part, Part, Part]:
    """Gate, up and down of one expert; fp64."""
    form, parts = made.form, []
    for number in range(len(form.parts)):
        i = number if form.layout == "fused" else number * form.experts + e
        weight = made.weights[i][e] if form.layout == "fused" else made.weights[i]
        weight = weight if form.layout == "linear" else weight.T  # [out, in]
        scale = None
        if made.scales:
            scale = made.scales[i].astype(np.float32)
            if form.layout == "fused" and scale.size > 1:
                scale = scale.reshape(form.experts, -1)[e]
        if form.activations != "none":
            assert scale is not None
            channels = np.broadcast_to(scale.reshape(-1).astype(np.float64), len(weight))
            own = made.activation_scales[i] if made.activation_scales else None
            parts.append(Part(weight.astype(np.float64).T, channels, own))
            continue
        values = weight if scale is None else dequantize(weight, scale, form.group_size)
        parts.append(Part(values.astype(dtype).astype(np.float64).T, None, None))
    if len(parts) == 2:
        both = parts[0]
        halves = [slice(both.matrix.shape[1] // 2), slice(both.matrix.shape[1] // 2, None)]
        scales = [both.weight_scale[own] if both.weight_scale is not None else None for own in halves]
        parts[:1] = [
            Part(both.matrix[:, own], scale, both.activation_scale) for own, scale in zip(halves, scales, strict=True)
        ]
    gate, up, down = parts
    return gate, up, down


def _least_units(codes: Array, axis: int) -> Array:
    """The largest power of two that all of them are multiples of, in units of 2**-9; of zeros alone, a huge one."""
    whole = np.abs(codes * _CODE_UNITS).astype(np.int64)
    result: Array = np.where(whole == 0, 1 << 40, whole & -whole).min(axis).astype(np.float64)
    return result


def slack_of_codes(codes: Interval, matrix: Array, sums: Sums) -> Array:
    """How far a product of e4m3 numbers may be off, ``[rows, out]``, beyond what sums in fp32 are.

    Tensor cores line the terms of a step up to the largest, and what is summed so far too, and cut off what lies
    below: towards zero, by half a unit in the mean and 0.58 in the root of mean squares. So terms of one sign add up
    to half a unit each, and those of either sign to a multiple of the root of their number: 4 is seven standard
    deviations. Sums whose terms and partial sums all fit are exact.
    """
    total = np.zeros((len(codes.low), matrix.shape[1]))
    if sums.code_unit is None:
        return total
    largest, middle = np.maximum(abs(codes.low), abs(codes.high)), (codes.low + codes.high) / 2
    for first in range(0, matrix.shape[0], sums.promoted_every):
        own = slice(first, first + sums.promoted_every)
        rows, weights = largest[:, own], matrix[own]
        size = rows @ abs(weights)
        sum_to = abs(middle[:, own] @ weights) + ((codes.high - codes.low)[:, own] / 2) @ abs(weights)
        reached = np.minimum(size, sum_to + 2 * np.sqrt((rows**2) @ (weights**2)))  # by a term, or a partial sum
        steps = rows.shape[1] + -(-rows.shape[1] // 32)
        one_sided = abs(np.sign(middle[:, own]) @ np.sign(weights)) / 2 + steps / rows.shape[1] / 2
        unit = np.minimum(_least_units(codes.low[:, own], 1), _least_units(codes.high[:, own], 1))[:, None]
        unit = unit * _least_units(weights, 0)[None, :] / _CODE_UNITS**2
        cut_off = (one_sided + 4 * steps**0.5) * sums.code_unit * reached
        total += np.where(size * sums.code_unit < unit, 0, cut_off)
    return total


def product(rows: Interval, part: Part, sums: Sums, dtype: Any) -> Interval:
    """``rows [n, in]``, of x's type, times a part, rounded to x's type."""
    factor = None
    if part.weight_scale is not None:
        rows, factor = codes_of(rows, part.activation_scale)
    middle, radius = (rows.low + rows.high) / 2, (rows.high - rows.low) / 2
    center, reach = middle @ part.matrix, radius @ abs(part.matrix)
    size = np.maximum(abs(rows.low), abs(rows.high)) @ abs(part.matrix)
    result = Interval(center - reach, center + reach).wider((part.matrix.shape[0] + 1) * sums.unit * size)
    if factor is not None:
        assert part.weight_scale is not None
        result = result.wider(slack_of_codes(rows, part.matrix, sums))
        result = result.times(factor).times(exactly(part.weight_scale))
    return result.rounded(dtype)


def of_expert(scaled: Array, made: Weights, e: int, sums: Sums) -> Interval:
    """What one expert makes of scaled inputs ``[n, H]``; NaN where a row becomes it."""
    dtype = scaled.dtype
    wide = scaled.astype(np.float32)
    spoiled = np.asarray(np.isnan(wide).any(axis=1))
    if made.form.activations == "dynamic":
        spoiled |= np.isinf(wide).any(1)
    gate_part, up_part, down_part = parts_of(made, e, dtype)
    known = exactly(np.where(spoiled[:, None], np.zeros_like(scaled), scaled))
    gate, up = (product(known, part, sums, dtype) for part in (gate_part, up_part))
    with np.errstate(over="ignore"):
        slopes = [1 / (1 + np.exp(-bound)) for bound in gate]
    activated = gate.times(Interval(slopes[0] - SIGMOID, slopes[1] + SIGMOID))
    rows = product(activated.times(up).rounded(dtype), down_part, sums, dtype)
    for bound in rows:
        bound[spoiled] = np.nan
    return rows


def scaled_inputs(x: Array, scores: Array, slots: Array, top_k: int) -> Array:
    """The scaled inputs of rows ``[n, H]`` that hold these slots."""
    with np.errstate(invalid="ignore"):
        result: Array = (x[slots // top_k].astype(np.float32) * scores[:, None]).astype(x.dtype)
    return result


def rows_between(feeds: dict[str, Array], made: Weights, top_k: int, sums: Sums) -> Interval:
    """The bounds of ``rows [T*K, H]``; ``feeds`` are the op's inputs before the lists, by name."""
    x, scores, offsets, permutation = (feeds[name] for name in EXPERTS.inputs)
    rows = Interval(*np.zeros((2, len(permutation), x.shape[1])))
    for e in np.flatnonzero(np.diff(offsets)):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        found = of_expert(scaled_inputs(x, scores[own], permutation[own], top_k), made, int(e), sums)
        for bound, result in zip(rows, found, strict=True):
            bound[own] = result
    return rows
