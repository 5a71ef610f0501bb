"""The private ops in numpy: the slowest face and the one that settles arguments.

Written for reading, loop by loop from :mod:`shuntyard.plugins.contract`; shapes by its legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.plugins.contract import LARGEST_CODE, SMALLEST_AMAX, ExpertsForm, experts_form

Array = NDArray[Any]


def _sigmoid(x: Array) -> Array:
    """Logistic function in fp32, without overflow for large ``-x``."""
    e = np.exp(-np.abs(x.astype(np.float32)))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)


def moe_routing(logits: Array, top_k: int) -> tuple[Array, Array, Array]:
    """``logits f32 [T, E]`` -> ``scores f32 [T*K]``, ``expert_offsets i32 [E+1]``, ``permutation i32 [T*K]``.

    Raises:
        ValueError: ``top_k`` is not in ``1..E``, or a logit is NaN.
    """
    _, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, must be in 1..{experts}")
    if np.isnan(logits).any():
        raise ValueError("a router logit is NaN")
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # [T, K], ties: lower expert first
    expert_of_slot = chosen.reshape(-1)
    permutation = np.argsort(expert_of_slot, kind="stable").astype(np.int32)
    counts = np.bincount(expert_of_slot, minlength=experts)
    expert_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    slot_scores = _sigmoid(np.take_along_axis(logits, chosen, axis=1)).reshape(-1)
    return slot_scores[permutation], expert_offsets, permutation


def dequantize(weight: Array, scale: Array, group_size: int) -> Array:
    """A quantised weight ``[out, in]`` in fp32, see the contract; INT4 comes as ``int32 [out, in/8]``.

    Raises:
        ValueError: weight or scale are not what the contract allows.
    """
    if weight.dtype != (np.int32 if group_size else ml_dtypes.float8_e4m3fn):
        raise ValueError(f"weights are of {weight.dtype} with group_size {group_size}")
    if group_size == 0:
        values = weight.astype(np.float32)
        if scale.size not in (1, len(weight)):
            raise ValueError(f"a scale of {scale.size} elements for {len(weight)} out channels")
        return values * scale.astype(np.float32).reshape(-1, 1)
    words = weight.view(np.uint32)
    nibbles = np.stack([words >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], axis=2).reshape(len(words), -1)
    values = nibbles.astype(np.float32) - 8
    if scale.size * group_size != values.size or values.shape[1] % group_size:
        raise ValueError(f"a scale of {scale.size} elements for groups of {group_size} in {list(values.shape)}")
    return values * np.repeat(scale.astype(np.float32).reshape(len(values), -1), group_size, axis=1)


def quantize(x: Array, scale: Array | None) -> tuple[Array, Array]:
    """e4m3 numbers of ``x [..., in]``, and what a product of them is to be multiplied with, see the contract.

    Returns ``codes f32 [..., in]`` and ``factor f32``: ``[1]`` with a scale, ``[..., 1]`` without.

    Raises:
        ValueError: the scale has more elements than one.
    """
    wide = x.astype(np.float32)
    if scale is None:
        numbers = np.where(np.isnan(wide), np.float32(0), np.abs(wide))
        largest = np.maximum(numbers.max(axis=-1, keepdims=True), np.float32(SMALLEST_AMAX))
        factor = largest / np.float32(LARGEST_CODE)
    elif scale.size == 1:
        factor = scale.astype(np.float32).reshape(1)
    else:
        raise ValueError(f"a scale of {scale.size} elements, must have 1")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        quotient = np.clip(wide / factor, -LARGEST_CODE, LARGEST_CODE)
        return quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), factor


@dataclass(frozen=True)
class _Part:
    """What one product of one expert takes."""

    weight: Array  # f32 [in, out], ready to multiply with; e4m3 numbers if activations are quantised
    weight_scale: Array | None  # f32 [1] or [out], what the product is then multiplied with
    activation_scale: Array | None  # of 1 element

    def product(self, form: ExpertsForm, rows: Array) -> Array:
        """``rows [.., in]`` -> ``[.., out]``, both of x's type."""
        if form.activations == "none":
            return (rows.astype(np.float32) @ self.weight).astype(rows.dtype)
        assert self.weight_scale is not None
        codes, factor = quantize(rows, self.activation_scale)
        return (codes @ self.weight * factor * self.weight_scale).astype(rows.dtype)


def _expert(form: ExpertsForm, e: int, lists: Sequence[Sequence[Array]], dtype: Any) -> tuple[_Part, _Part, _Part]:
    """Gate, up ``[H, F]`` and down ``[F, H]`` of one expert; plain weights are rounded to a type."""
    weights, scales, activation_scales = lists
    parts = []
    for part in range(len(form.parts)):
        i = part if form.layout == "fused" else part * form.experts + e
        weight, scale = weights[i], scales[i] if scales else None
        if form.layout == "fused":
            weight = weight[e]
            if scale is not None and scale.size > 1:
                scale = scale.reshape(form.experts, -1)[e]
        if form.layout != "linear":
            weight = weight.T  # to [out, in]
        if form.activations != "none":
            assert scale is not None
            weight, scale = weight.astype(np.float32), scale.astype(np.float32).reshape(-1)
        elif scale is not None:
            weight, scale = dequantize(weight, scale, form.group_size), None
        if form.activations == "none":
            weight = weight.astype(dtype).astype(np.float32)
        parts.append(_Part(weight.T, scale, activation_scales[i] if activation_scales else None))
    if form.layout != "linear":
        both = parts[0]
        scale = both.weight_scale
        halves = [scale, scale] if scale is None or scale.size == 1 else np.split(scale, 2)
        parts[:1] = [
            _Part(weight, own, both.activation_scale)
            for weight, own in zip(np.split(both.weight, 2, axis=1), halves, strict=True)
        ]
    gate, up, down = parts
    return gate, up, down


def moe_experts(
    x: Array,
    scores: Array,
    expert_offsets: Array,
    permutation: Array,
    weights: Sequence[Array],
    scales: Sequence[Array],
    activation_scales: Sequence[Array],
    top_k: int,
    experts: int,
    layout: str,
    group_size: int,
    activations: str,
) -> Array:
    """Grouped SwiGLU, see the contract. Returns ``rows [T*K, H]`` of x's type.

    Raises:
        ValueError: the shapes of weights and scales are in no form that the contract knows.
    """
    lists = (weights, scales, activation_scales)
    of_weights, of_scales, given = ([array.shape for array in arrays] for arrays in lists)
    form = experts_form(experts, layout, group_size, x.shape[1], of_weights, of_scales, given, activations)
    dtype = x.dtype
    rows = np.zeros((len(permutation), x.shape[1]), dtype)
    for e in range(experts):
        own = slice(int(expert_offsets[e]), int(expert_offsets[e + 1]))
        tokens = permutation[own] // top_k
        gate, up, down = _expert(form, e, lists, dtype)
        scaled = (x[tokens].astype(np.float32) * scores[own, None]).astype(dtype)
        gated, raised = (part.product(form, scaled).astype(np.float32) for part in (gate, up))
        hidden = (gated * _sigmoid(gated) * raised).astype(dtype)
        rows[own] = down.product(form, hidden)
    return rows


def moe_scatter_add(base: Array, rows: Array, permutation: Array, top_k: int) -> Array:
    """Adds every row to its token, see the contract. Returns ``out [T, H]`` of base's type."""
    row_of_slot = np.empty_like(permutation)
    row_of_slot[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    total = base.astype(np.float32)
    for k in range(top_k):
        total += rows[row_of_slot[k::top_k]].astype(np.float32)
    return total.astype(base.dtype)


def cached_attention(
    query: Array, key: Array, value: Array, past_key: Array, past_value: Array, slots: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Attention over a static cache, see the contract; the softmax in fp32.

    Raises:
        ValueError: a write would run past the cache's last row, or slots are not consecutive.
    """
    batch, _, length, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    present_key, present_value = past_key.copy(), past_value.copy()
    out = np.zeros_like(query)
    for b in range(batch):
        first = int(slots[b, 0])
        if first < 0 or first + length > past_key.shape[2]:
            raise ValueError(f"rows {first}..{first + length} do not fit a cache of {past_key.shape[2]}")
        if (slots[b] != np.arange(first, first + length)).any():
            raise ValueError("the slots of one call must be consecutive")
        present_key[b, :, first : first + length] = key[b]
        present_value[b, :, first : first + length] = value[b]
        for s in range(length):
            seen = first + s + 1
            for n in range(query.shape[1]):
                k = present_key[b, n // groups, :seen].astype(np.float32)
                v = present_value[b, n // groups, :seen].astype(np.float32)
                scores = k @ query[b, n, s].astype(np.float32) * scale
                weights = np.exp(scores - scores.max())
                out[b, n, s] = (weights / weights.sum() @ v).astype(query.dtype)
    return out, present_key, present_value
