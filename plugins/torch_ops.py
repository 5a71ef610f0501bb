"""The private ops as ``torch.library`` ops: real eager semantics, and fake kernels for tracing.

Importing this module registers ``torch.ops.shuntyard.*``. Semantics and shapes: :mod:`shuntyard.plugins.contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shuntyard.plugins.contract import LARGEST_CODE, SMALLEST_AMAX, ExpertsForm, experts_form


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


def _unpacked(weight: Tensor) -> Tensor:
    """``int32 [out, in/8]``, each 8 nibbles with the lowest first, stored as value + 8 -> f32 ``[out, in]``."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    return ((weight[..., None] >> shifts & 15) - 8).flatten(-2).float()


def _dequantized(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """``weight [out, in]`` in f32; the scale is of the tensor, of each out channel, or of each group."""
    if group_size == 0:
        return weight.float() * scale.float().reshape(-1, 1)
    factors = scale.float().reshape(weight.shape[0], -1, 1)  # [out, groups, 1]
    return (_unpacked(weight).view(*factors.shape[:2], group_size) * factors).flatten(1)


_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _check_types(
    weights: Sequence[Tensor], scales: Sequence[Tensor], group_size: int, activation_scales: Sequence[Tensor] = ()
) -> None:
    allowed = {torch.int32} if group_size else {torch.float8_e4m3fn} if scales else _FLOATS
    lists = (("weights", weights, allowed), ("scales", scales, _FLOATS))
    for what, tensors, types in (*lists, ("activation scales", activation_scales, _FLOATS)):
        found = {tensor.dtype for tensor in tensors}
        if len(found) > 1 or not found <= types:
            raise ValueError(
                f"{what} are of {', '.join(sorted(map(str, found)))}, must all be of one of "
                f"{', '.join(sorted(map(str, types)))}"
            )


@torch.library.custom_op("shuntyard::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 numbers of ``x [..., in]``: ``codes f32 [..., in]``, and ``factor f32 [1]``, or ``[..., 1]`` with no scale.

    Raises:
        ValueError: x or scale are not what the contract allows.
    """
    _check_quantizable(x, scale)
    return _quantized(x, scale)


@quantize.register_fake
def _(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_quantizable(x, scale)
    factor = (*x.shape[:-1], 1) if scale is None else (1,)
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(factor, dtype=torch.float32)


def _check_quantizable(x: Tensor, scale: Tensor | None) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"x is of {x.dtype}, must be of one of {', '.join(sorted(map(str, _FLOATS)))}")
    if scale is not None and (scale.numel() != 1 or scale.dtype not in _FLOATS):
        raise ValueError(f"the scale is {list(scale.shape)} of {scale.dtype}, must be one float")


def _quantized(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and factor of checked arguments."""
    wide = x.float()
    if scale is None:
        largest = wide.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX)
        factor = largest / torch.full_like(largest, LARGEST_CODE)  # by a number, CUDA would multiply with 1 / 448
    else:
        factor = scale.detach().to(torch.float32, copy=True).reshape(1)
    # Beyond 464 the cast would give NaN.
    codes = (wide / factor).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn).float()
    return codes, factor


class _Lists(NamedTuple):
    """The experts' three lists."""

    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    activation_scales: Sequence[Tensor]

    def form(self, x: Tensor, experts: int, layout: str, group_size: int, activations: str) -> ExpertsForm:
        """The form that they are in; types and shapes are checked.

        Raises:
            ValueError: they are in no form that there is.
        """
        _check_types(self.weights, self.scales, group_size, self.activation_scales)
        of_weights, of_scales, given = ([tuple(tensor.shape) for tensor in tensors] for tensors in self)
        return experts_form(experts, layout, group_size, x.shape[1], of_weights, of_scales, given, activations)


class _Matrix(NamedTuple):
    """What one product of one expert takes."""

    weight: Tensor  # [out, in], of x's type; e4m3 numbers in fp32 if activations are quantised
    weight_scale: Tensor  # f32 [1] or [out]; of meaning only if they are
    activation_scale: Tensor | None

    def product(self, form: ExpertsForm, rows: Tensor) -> Tensor:
        """``rows [.., in]`` -> ``[.., out]``, both of x's type."""
        if form.activations == "none":
            return rows @ self.weight.T
        codes, factor = _quantized(rows, self.activation_scale)
        return (codes @ self.weight.T * factor * self.weight_scale).to(rows.dtype)


def _matrices(form: ExpertsForm, e: int, lists: _Lists, dtype: torch.dtype) -> list[_Matrix]:
    """The matrices of one expert, in the order of ``form.parts``; plain ones are rounded to a type."""
    matrices = []
    for part in range(len(form.parts)):
        i = part if form.layout == "fused" else part * form.experts + e
        weight = lists.weights[i][e] if form.layout == "fused" else lists.weights[i]
        if form.layout != "linear":
            weight = weight.T
        scale = lists.scales[i] if lists.scales else torch.ones(1)
        if form.layout == "fused" and form.quantization == "channel":
            scale = scale.reshape(form.experts, -1)[e]
        if form.activations != "none":
            weight, scale = weight.float(), scale.float().reshape(-1)
        else:
            weight = (_dequantized(weight, scale, form.group_size) if lists.scales else weight).to(dtype)
        matrices.append(_Matrix(weight, scale, lists.activation_scales[i] if lists.activation_scales else None))
    return matrices


@torch.library.custom_op("shuntyard::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor,
    scores: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    activation_scales: Sequence[Tensor],
    top_k: int,
    experts: int,
    layout: str,
    group_size: int,
    activations: str,
) -> Tensor:
    """Grouped SwiGLU over the permuted tokens, scores scaling the input -> ``rows [T*K, H]``.

    Raises:
        ValueError: the weights are in no form that the contract knows.
    """
    lists = _Lists(weights, scales, activation_scales)
    form = lists.form(x, experts, layout, group_size, activations)
    tokens = torch.div(permutation, top_k, rounding_mode="floor")
    scaled = (x[tokens].float() * scores[:, None]).to(x.dtype)
    rows = x.new_empty(len(permutation), x.shape[1])
    offsets = expert_offsets.tolist()
    for e, (first, end) in enumerate(pairwise(offsets)):
        if first == end:
            continue
        *into, down = _matrices(form, e, lists, x.dtype)
        products = [matrix.product(form, scaled[first:end]) for matrix in into]
        gate, up = products if len(products) == 2 else products[0].chunk(2, dim=1)
        hidden = (functional.silu(gate.float()) * up.float()).to(x.dtype)
        rows[first:end] = down.product(form, hidden)
    return rows


@moe_experts.register_fake
def _(
    x: Tensor,
    scores: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    activation_scales: Sequence[Tensor],
    top_k: int,
    experts: int,
    layout: str,
    group_size: int,
    activations: str,
) -> Tensor:
    _Lists(weights, scales, activation_scales).form(x, experts, layout, group_size, activations)
    return x.new_empty(permutation.shape[0], x.shape[1])


@torch.library.custom_op("shuntyard::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """A quantised weight of one Linear, ``[out, in]`` -> f32 ``[out, in]``.

    Raises:
        ValueError: weight and scale are in no form that the contract knows.
    """
    _check_quantized(weight, scale, group_size)
    return _dequantized(weight, scale, group_size)


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    _check_quantized(weight, scale, group_size)
    values = 8 if group_size else 1
    return weight.new_empty(weight.shape[0], weight.shape[1] * values, dtype=torch.float32)


def _check_quantized(weight: Tensor, scale: Tensor, group_size: int) -> None:
    _check_types([weight], [scale], group_size)
    out, columns = weight.shape
    if group_size and columns * 8 % group_size:
        raise ValueError(f"{columns * 8} columns are no multiple of the group size {group_size}")
    sizes = (out * (columns * 8 // group_size),) if group_size else (1, out)
    if scale.numel() not in sizes:
        raise ValueError(
            f"a weight of {list(weight.shape)} with group_size {group_size} cannot have a scale of {list(scale.shape)}"
        )


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
