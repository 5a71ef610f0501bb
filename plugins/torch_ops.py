"""The private ops as ``torch.library`` ops: real eager semantics, and fake kernels for tracing.

Importing this module registers ``torch.ops.shuntyard.*``. Semantics and shapes: :mod:`shuntyard.plugins.contract`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op("shuntyard::moe_routing", mutates_args=())
def moe_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``logits f32 [T, E]`` -> ``scores f32 [T*K]``, ``expert_offsets i32 [E+1]``, ``permutation i32 [T*K]``."""
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, must be in 1..{experts}")
    if bool(logits.isnan().any()):
        raise ValueError("a router logit is NaN")
    # A stable sort, not topk: topk leaves the order of equal logits open.
    values, chosen = torch.sort(logits, dim=1, descending=True, stable=True)
    expert_of_slot = chosen[:, :top_k].reshape(-1)  # [T*K]
    permutation = torch.sort(expert_of_slot, stable=True).indices
    counts = torch.bincount(expert_of_slot, minlength=experts)
    expert_offsets = functional.pad(counts.cumsum(0), (1, 0))
    scores = values[:, :top_k].reshape(-1).sigmoid()[permutation]
    return scores, expert_offsets.int(), permutation.int()


@moe_routing.register_fake
def _(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0] * top_k
    return (
        logits.new_empty(rows),
        logits.new_empty(logits.shape[1] + 1, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.int32),
    )


@torch.library.custom_op("shuntyard::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor, scores: Tensor, expert_offsets: Tensor, permutation: Tensor, gate_up: Tensor, down: Tensor, top_k: int
) -> Tensor:
    """Grouped SwiGLU over the permuted tokens, scores scaling the input -> ``rows [T*K, H]``."""
    tokens = torch.div(permutation, top_k, rounding_mode="floor")
    scaled = (x[tokens].float() * scores[:, None]).to(x.dtype)
    rows = x.new_empty(len(permutation), x.shape[1])
    offsets = expert_offsets.tolist()
    for e, (first, end) in enumerate(pairwise(offsets)):
        if first == end:
            continue
        gate, up = (scaled[first:end] @ gate_up[e].to(x.dtype)).chunk(2, dim=1)
        hidden = (functional.silu(gate.float()) * up.float()).to(x.dtype)
        rows[first:end] = hidden @ down[e].to(x.dtype)
    return rows


@moe_experts.register_fake
def _(
    x: Tensor, scores: Tensor, expert_offsets: Tensor, permutation: Tensor, gate_up: Tensor, down: Tensor, top_k: int
) -> Tensor:
    return x.new_empty(permutation.shape[0], x.shape[1])


@torch.library.custom_op("shuntyard::moe_scatter_add", mutates_args=())
def moe_scatter_add(base: Tensor, rows: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """``base [T, H]`` plus each token's rows, summed in fp32 in the order of k."""
    row_of_slot = torch.empty_like(permutation, dtype=torch.long)
    row_of_slot[permutation.long()] = torch.arange(len(permutation), device=permutation.device)
    total = base.float()
    for k in range(top_k):
        total = total + rows[row_of_slot[k::top_k]].float()
    return total.to(base.dtype)


@moe_scatter_add.register_fake
def _(base: Tensor, rows: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("shuntyard::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, slots: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes key and value to the cache at ``slots``, then attends to all rows up to each query's slot."""
    batch, heads, length, _ = query.shape
    groups, cache_rows = past_key.shape[1], past_key.shape[2]
    if bool((slots[:, 0] < 0).any()) or bool((slots[:, 0] + length > cache_rows).any()):
        raise ValueError(f"slots {slots[:, 0].tolist()} + {length} do not fit a cache of {cache_rows} rows")
    if bool((slots != slots[:, :1] + torch.arange(length, device=slots.device)).any()):
        raise ValueError("the slots of one call must be consecutive")
    present_key, present_value = past_key.clone(), past_value.clone()
    rows = slots[:, None, :, None].expand(batch, groups, length, key.shape[3])
    present_key.scatter_(2, rows, key)
    present_value.scatter_(2, rows, value)
    visible = torch.arange(cache_rows, device=slots.device) <= slots[:, :, None]  # [B, S, L]
    out = functional.scaled_dot_product_attention(
        query, present_key, present_value, attn_mask=visible[:, None], scale=scale, enable_gqa=heads != groups
    )
    return out.contiguous(), present_key, present_value


@cached_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, slots: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)
