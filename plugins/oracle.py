"""The private ops in numpy: the slowest face and the one that settles arguments.

Written for reading, loop by loop from :mod:`shuntyard.plugins.contract`; shapes by its legend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def moe_experts(
    x: Array, scores: Array, expert_offsets: Array, permutation: Array, gate_up: Array, down: Array, top_k: int
) -> Array:
    """Grouped SwiGLU, see the contract. Returns ``rows [T*K, H]`` of x's type."""
    dtype = x.dtype
    rows = np.zeros((len(permutation), x.shape[1]), dtype)
    for e in range(len(expert_offsets) - 1):
        own = slice(int(expert_offsets[e]), int(expert_offsets[e + 1]))
        tokens = permutation[own] // top_k
        scaled = (x[tokens].astype(np.float32) * scores[own, None]).astype(dtype).astype(np.float32)
        both = (scaled @ gate_up[e].astype(dtype).astype(np.float32)).astype(dtype).astype(np.float32)
        gate, up = np.split(both, 2, axis=1)
        hidden = (gate * _sigmoid(gate) * up).astype(dtype).astype(np.float32)
        rows[own] = (hidden @ down[e].astype(dtype).astype(np.float32)).astype(dtype)
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
