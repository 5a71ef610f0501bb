"""Between which numbers the experts' rows lie when activations are quantised.

A tolerance would not do. Two right faces may sum in different orders, and a hidden value that comes to lie on the other
side of a tie between two e4m3 numbers moves by a sixteenth. So this follows intervals from step to step, from plain
fp64 mathematics that shares no code with a face but the rounding to e4m3, which is held to its own tests: where no tie
is near, and that is nearly everywhere, an interval is about one number of x's type wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.plugins.forms import FP8, Array, Weights

UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative: what one rounding may be off by."""

SIGMOID = 4e-7
"""What a face's sigmoid may be off by: runtimes approximate it, ONNX Runtime's by some units of 2**-24."""


class Interval(NamedTuple):
    """What an array's elements lie between; fp64."""

    low: Array
    high: Array

    def rounded(self, dtype: Any) -> Interval:
        """The bounds of what is rounded to fp32 and then to ``dtype``: rounding keeps order."""
        with np.errstate(over="ignore"):
            return Interval(*(bound.astype(np.float32).astype(dtype).astype(np.float64) for bound in self))

    def wider(self, by: Array | float) -> Interval:
        return Interval(self.low - by, self.high + by)

    def times(self, other: Interval, roundings: int = 1) -> Interval:
        """The product in fp32."""
        corners = np.stack([a * b for a in self for b in other])
        return Interval(corners.min(0), corners.max(0)).wider(abs(corners).max(0) * (roundings * UNIT))


def exactly(value: Array) -> Interval:
    return Interval(value.astype(np.float64), value.astype(np.float64))


def codes_of(rows: Interval, scale: Array | None) -> tuple[Interval, Interval]:
    """Codes ``[.., in]`` and factor ``[1]`` or ``[.., 1]`` of rows whose bounds are of x's type."""
    if scale is None:
        least = np.where((rows.low < 0) & (rows.high > 0), 0, np.minimum(abs(rows.low), abs(rows.high)))
        most = np.maximum(abs(rows.low), abs(rows.high))
        factors = [
            np.maximum(bound.max(-1, keepdims=True), 2.0**-100).astype(np.float32) / np.float32(448)
            for bound in (least, most)
        ]
    else:
        factors = [scale.astype(np.float32).reshape(1)] * 2
    with np.errstate(over="ignore"):
        quotients = [np.float32(1) * bound.astype(np.float32) / factor for bound in rows for factor in factors]
    codes = np.stack([np.clip(q, -448, 448).astype(FP8).astype(np.float64) for q in quotients])
    return Interval(codes.min(0), codes.max(0)), Interval(*(factor.astype(np.float64) for factor in factors))


def product(rows: Interval, weight: Array, weight_scale: Array, scale: Array | None, dtype: Any) -> Interval:
    """Rows times ``weight [out, in]``, of e4m3 numbers, rounded to x's type."""
    codes, factor = codes_of(rows, scale)
    terms = [bound[:, None, :] * weight for bound in codes]  # [rows, out, in]
    sums = Interval(np.minimum(*terms).sum(-1), np.maximum(*terms).sum(-1))
    slack = (weight.shape[1] + 1) * UNIT * np.maximum(*map(abs, terms)).sum(-1)
    return sums.wider(slack).times(factor).times(exactly(weight_scale)).rounded(dtype)


def parts_of(made: Weights, e: int) -> list[tuple[Array, Array, Array | None]]:
    """Of gate, up and down of one expert: values ``[out, in]``, weight scales ``[out]``, the activations' scale."""
    form, parts = made.form, []
    for part in range(len(form.parts)):
        i = part if form.layout == "fused" else part * form.experts + e
        weight = made.weights[i][e] if form.layout == "fused" else made.weights[i]
        values = (weight if form.layout == "linear" else weight.T).astype(np.float64)
        scale = made.scales[i].astype(np.float64).reshape(-1)
        if scale.size > len(values):
            scale = scale[e * len(values) : (e + 1) * len(values)]
        scale = np.broadcast_to(scale, len(values))
        own = made.activation_scales[i] if made.activation_scales else None
        half = len(values) // 2
        halves = [slice(half), slice(half, None)] if len(form.parts) == 2 and part == 0 else [slice(None)]
        parts += [(values[rows], scale[rows], own) for rows in halves]
    return parts


def bounds_of(feeds: dict[str, Array], made: Weights, top_k: int) -> Interval:
    """The bounds of ``rows [T*K, H]``."""
    x, offsets = feeds["x"], feeds["expert_offsets"]
    dtype = x.dtype
    scaled = (x[feeds["permutation"] // top_k].astype(np.float32) * feeds["scores"][:, None]).astype(dtype)
    rows = Interval(*np.zeros((2, *scaled.shape)))
    for e in range(made.form.experts):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        if own.start == own.stop:
            continue
        gate_part, up_part, down_part = parts_of(made, e)
        gate, up = (product(exactly(scaled[own]), *part, dtype) for part in (gate_part, up_part))
        with np.errstate(over="ignore"):
            slopes = np.stack([1 / (1 + np.exp(-bound)) for bound in gate])
        activated = gate.times(Interval(slopes.min(0) - SIGMOID, slopes.max(0) + SIGMOID))
        hidden = activated.times(up).rounded(dtype)
        for bound, result in zip(rows, product(hidden, *down_part, dtype), strict=True):
            bound[own] = result
    return rows


def check_between(got: Array, bounds: Interval, dtype: Any) -> None:
    """Fails where an element is out of its bounds, or they are of no number."""
    assert got.dtype == dtype and got.shape == bounds.low.shape, (got.dtype, got.shape, bounds.low.shape)
    wide = got.astype(np.float64)
    out = ~((bounds.low <= wide) & (wide <= bounds.high))
    first = np.argwhere(out)[:3].tolist()
    assert not out.any(), f"{out.sum()} of {out.size} out of bounds, as {first}: {wide[out][:3]}"


def relative_width(bounds: Interval) -> Array:
    """How far an interval's bounds are apart, by the largest element of all."""
    result: Array = (bounds.high - bounds.low) / abs(np.stack(bounds)).max()
    return result
