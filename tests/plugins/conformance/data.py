"""What cases are made of: tensors of a distribution, and tokens sent to experts."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.conformance.files import Array, Bits, Input, Source, Table, Uniform
from tests.plugins.forms import FORMATS, FP8, Weights

SKEWS = ("uniform", "even", "zipf", "one expert", "few experts")

BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
"""Of a significand."""


def seed_of(rng: np.random.Generator) -> int:
    """A tensor's seed."""
    return int(rng.integers(2**63))


@cache
def _normal(size: int) -> Array:
    return np.asarray([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)])


def normal(rng: np.random.Generator, spread: float, dtype: Any, size: int = 256) -> Table:
    """Of a normal distribution, in 256 steps."""
    return Table(seed_of(rng), (_normal(size) * spread).astype(dtype))


def uniform(rng: np.random.Generator, spread: float, stored: str) -> Uniform:
    """In -spread .. spread, which becomes a power of two, with all bits that the format has."""
    return Uniform(seed_of(rng), BITS[stored], int(np.round(np.log2(spread))) - BITS[stored] + 1)


def positive(rng: np.random.Generator, low: float, high: float, dtype: Any) -> Table:
    """64 numbers of a range."""
    return Table(seed_of(rng), rng.uniform(low, high, size=64).astype(dtype))


def codes(rng: np.random.Generator) -> Table:
    """e4m3 weights of about 50, with extremes: zero, the largest, the smallest, a subnormal."""
    table = (_normal(256) * 50).astype(FP8)
    table[rng.integers(0, 256, size=4)] = np.asarray([0, 448, -(2.0**-9), 2.0**-7], FP8)
    return Table(seed_of(rng), table)


def small_whole(rng: np.random.Generator, dtype: Any) -> Table:
    """-2 .. 2: sums of products of such are exact in every format, and on every tensor core."""
    return Table(seed_of(rng), np.arange(-2, 3).astype(dtype))


def zipf(rng: np.random.Generator, experts: int) -> Array:
    """What is added to logits so that the r-th expert is chosen about as 1 / r."""
    bias: Array = -np.log(1.0 + rng.permutation(experts))
    return bias


def routed(rng: np.random.Generator, tokens: int, experts: int, top_k: int, skew: str) -> tuple[Array, Array]:
    """``expert_offsets [E+1]`` and ``permutation [T*K]`` of tokens that are sent so."""
    wishes = rng.gumbel(size=(tokens, experts))
    if skew == "even":
        turn = np.arange(tokens)[:, None] * top_k + np.arange(experts)
        wishes = -((np.arange(experts) - turn[:, :1]) % experts).astype(np.float64)
    elif skew == "zipf":
        wishes += zipf(rng, experts)
    elif skew == "one expert":
        wishes[:, int(rng.integers(experts))] += 1e3
    elif skew == "few experts":
        wishes[:, rng.permutation(experts)[: max(top_k, experts // 8)]] += 1e3
    chosen = np.argsort(-wishes, axis=1, kind="stable")[:, :top_k].reshape(-1)
    counts = np.bincount(chosen, minlength=experts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return offsets, np.argsort(chosen, kind="stable").astype(np.int32)


def weights_of(
    rng: np.random.Generator, form: ExpertsForm, hidden: int, width: int, stored: str, whole: bool
) -> list[list[Input]]:
    """Weights, scales and scales of activations; ``stored`` is the type of plain weights, or of the scales."""
    dtype = np.dtype(FORMATS[stored])
    lists: list[list[Input]] = [[], [], []]
    for shape in form.weight_shapes(hidden, width):
        spread = hidden**-0.5
        source: Source
        if form.quantization == "none":
            source = uniform(rng, 2 * spread, stored) if rng.uniform() < 0.5 else normal(rng, spread, dtype)
            lists[0].append(Input(shape, dtype, source))
        elif form.quantization == "group":
            lists[0].append(Input(shape, np.dtype(np.int32), Bits(seed_of(rng))))
        else:
            lists[0].append(Input(shape, np.dtype(FP8), small_whole(rng, FP8) if whole else codes(rng)))
    scale = positive(rng, 0.5, 2, np.float64).table * {"tensor": 1 / 50, "channel": 1 / 50, "group": 1 / 4}.get(
        form.quantization, 1.0
    )
    scale = (scale * hidden**-0.5 * (50 if whole else 1)).astype(dtype)
    flat = rng.uniform() < 0.5
    for shape, count in zip(form.weight_shapes(hidden, width), form.scale_sizes(hidden, width), strict=False):
        lists[1].append(Input(_scale_shape(form, shape, count, flat), dtype, Table(seed_of(rng), scale)))
    for _ in form.activation_scale_names:
        # Some rows go beyond what these hold, whether they are the inputs or the hidden ones.
        own = np.ones(1, dtype) if whole else (rng.uniform(0.5, 2, size=1) / 200).astype(dtype)
        lists[2].append(Input(() if flat else (1,), dtype, Table(seed_of(rng), own)))
    return lists


def _scale_shape(form: ExpertsForm, weight: tuple[int, ...], count: int, flat: bool) -> tuple[int, ...]:
    if form.quantization == "tensor":
        return () if flat else (1,)
    if form.quantization == "group":
        return weight[0], count // weight[0]
    if flat:
        return (count,)
    return {"fused": (form.experts, 1, count // form.experts), "split": (1, count)}.get(form.layout, (count, 1))


def made_of(form: ExpertsForm, lists: list[list[Input]]) -> Weights:
    """The lists' content."""
    weights, scales, activation_scales = ([tensor.make() for tensor in tensors] for tensors in lists)
    return Weights(form, weights, scales, activation_scales)
