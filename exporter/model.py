"""Llama 4's text model, written to be traced: one function a part, weights passed in by their checkpoint names.

The layer is the whole story; what is special about Llama 4 stands in it:

* RoPE layers rotate in real arithmetic, by ``position mod chunk``: they attend within their chunk only, and
  RoPE depends on position differences alone, so the scores are the same as with absolute positions, in exact
  arithmetic; in float32 they are better, since angles stay small. Their KV cache holds one chunk.
* NoPE layers attend to everything and scale the query with the position (temperature tuning).
* The router scales the *input* of the experts by ``sigmoid(logit)``; a shared expert is added.

Everything is computed in the type of ``hidden``, but norms, rotation, temperature and routing in float32.
Weights keep their type and are cast where they are used. Nothing here imports transformers, which stays the
independent reference (``models/llama4/modeling_llama4.py``). Shapes by the legend in ``plugins/contract.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import LayerKind, kind_of, layer_weights
from shuntyard.plugins import torch_ops  # noqa: F401  registers torch.ops.shuntyard

MAX_ROTARY_ROWS = 2**24
"""Slots of a RoPE layer lie below it; Scout's whole context, without chunks, is 10,485,760."""

Weights = Mapping[str, Tensor]
"""By checkpoint name. In place of a matrix there may be a :data:`Product`, for number formats that are tried out
(``validate/emulate.py``); so may there be ``feed_forward.experts``, called as ``moe_experts`` with its first four
arguments, and ``self_attn.k_cache`` and ``v_cache``, through which goes what is cached. Tracing sees tensors alone."""

Product = Callable[..., Tensor]


def _product(w: Weights, name: str) -> Product | None:
    found: Any = w.get(name)
    return found  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor | Product) -> Tensor:
    """``x [..., in] @ weight [out, in].T``, the weight cast to x's type where it is used."""
    return x @ weight.to(x.dtype).T if isinstance(weight, Tensor) else weight(x)


def projection(x: Tensor, w: Weights, name: str) -> Tensor:
    """A Linear with a bias where the model has one."""
    out, bias = linear(x, w[f"{name}.weight"]), w.get(f"{name}.bias")
    return out if bias is None else out + bias.to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis in fp32, rounded to x's type."""
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs of ``x [B, S, heads, D]`` with ``cos, sin f32 [B, S, D/2]``."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()  # [B, S, heads, D/2]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def temperature(positions: Tensor, config: Llama4Config) -> Tensor:
    """Query scale of a NoPE layer, f32 ``[B, S]``: grows with the log of the position (arXiv 2501.19399)."""
    steps = torch.floor((positions.float() + 1.0) / config.floor_scale)
    return torch.log(1.0 + steps) * config.attn_scale + 1.0


def swiglu(x: Tensor, w: Weights, prefix: str) -> Tensor:
    """``down(silu(gate(x)) * up(x))``."""
    gate = functional.silu(linear(x, w[f"{prefix}.gate_proj.weight"]))
    return linear(gate * linear(x, w[f"{prefix}.up_proj.weight"]), w[f"{prefix}.down_proj.weight"])


def attention(
    config: Llama4Config,
    kind: LayerKind,
    w: Weights,
    x: Tensor,
    places: tuple[Tensor, ...],
    past: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention over a static cache.

    ``places`` is ``(slots, cos, sin)`` for a RoPE layer and ``(slots,)`` for a NoPE layer, whose slots are the
    positions. Returns the output ``[B, S, H]`` and the cache with this call's rows written.
    """
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query = projection(x, w, "self_attn.q_proj").unflatten(-1, (heads, head_dim))  # [B, S, N, D]
    key = projection(x, w, "self_attn.k_proj").unflatten(-1, (groups, head_dim))  # [B, S, G, D]
    value = projection(x, w, "self_attn.v_proj").unflatten(-1, (groups, head_dim))
    if kind.rope:
        slots, cos, sin = places
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if config.use_qk_norm:
            query, key = rms_norm(query, config.rms_norm_eps), rms_norm(key, config.rms_norm_eps)
    else:
        (slots,) = places
        if config.attn_temperature_tuning:
            scale = temperature(slots, config)[:, :, None, None]
            query = (query.float() * scale).to(query.dtype)
    if (cache := _product(w, "self_attn.k_cache")) is not None:
        key = cache(key)
    if (cache := _product(w, "self_attn.v_cache")) is not None:
        value = cache(value)
    out, present_key, present_value = torch.ops.shuntyard.cached_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *past, slots, head_dim**-0.5
    )
    out = out.transpose(1, 2).flatten(2)  # [B, S, N * D]
    return projection(out, w, "self_attn.o_proj"), present_key, present_value


def moe(config: Llama4Config, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routed plus shared experts: ``x [T, H]`` -> ``[T, H]``, the router's logits ``f32 [T, E]``, the shared part."""
    top_k = config.num_experts_per_tok
    ops = torch.ops.shuntyard
    logits = x.float() @ w["feed_forward.router.weight"].float().T
    scores, expert_offsets, permutation = ops.moe_routing(logits, top_k)
    if (product := _product(w, "feed_forward.experts")) is not None:
        rows = product(x, scores, expert_offsets, permutation)
    else:
        fused, form = [w[f"feed_forward.experts.{name}_proj"] for name in ("gate_up", "down")], ("fused", 0, "none")
        experts = config.num_local_experts
        rows = ops.moe_experts(x, scores, expert_offsets, permutation, fused, [], [], top_k, experts, *form)
    shared = swiglu(x, w, "feed_forward.shared_expert")
    return ops.moe_scatter_add(shared, rows, permutation, top_k), logits, shared


class LayerOutputs(NamedTuple):
    """What a layer gives. What comes after the cache is there to be looked at: nothing is computed for it alone."""

    hidden: Tensor  # [B, S, H]
    present_key: Tensor  # [B, G, L, D]
    present_value: Tensor
    attention: Tensor  # [B, S, H]  behind o_proj
    feed_forward: Tensor  # [B, S, H]
    attention_input: Tensor  # [B, S, H]  behind input_layernorm
    feed_forward_input: Tensor  # [B, S, H]  behind post_attention_layernorm
    router: Tensor | None = None  # f32 [B * S, E] logits
    shared: Tensor | None = None  # [B * S, H]  the shared expert alone


class AttentionHalf(NamedTuple):
    """A layer up to where its feed-forward part begins."""

    hidden: Tensor  # [B, S, H]  the residual stream behind attention
    present_key: Tensor
    present_value: Tensor
    attention: Tensor
    attention_input: Tensor
    feed_forward_input: Tensor


def attention_half(
    config: Llama4Config,
    kind: LayerKind,
    w: Weights,
    hidden: Tensor,
    places: tuple[Tensor, ...],
    past: tuple[Tensor, Tensor],
) -> AttentionHalf:
    """Both norms, and attention with its residual, on ``hidden [B, S, H]``."""
    before = rms_norm(hidden, config.rms_norm_eps) * w["input_layernorm.weight"].to(hidden.dtype)
    attended, present_key, present_value = attention(config, kind, w, before, places, past)
    hidden = hidden + attended
    normed = rms_norm(hidden, config.rms_norm_eps) * w["post_attention_layernorm.weight"].to(hidden.dtype)
    return AttentionHalf(hidden, present_key, present_value, attended, before, normed)


def decoder_layer(
    config: Llama4Config,
    kind: LayerKind,
    w: Weights,
    hidden: Tensor,
    places: tuple[Tensor, ...],
    past: tuple[Tensor, Tensor],
) -> LayerOutputs:
    """One layer on ``hidden [B, S, H]``; a dense one has no router and no shared expert."""
    hidden, present_key, present_value, attended, before, normed = attention_half(config, kind, w, hidden, places, past)
    if not kind.moe:
        out = swiglu(normed, w, "feed_forward")
        return LayerOutputs(hidden + out, present_key, present_value, attended, out, before, normed)
    routed, logits, shared = moe(config, w, normed.flatten(0, 1))
    out = routed.view_as(hidden)
    return LayerOutputs(hidden + out, present_key, present_value, attended, out, before, normed, logits, shared)


def embed(input_ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``input_ids [B, S]`` -> hidden ``[B, S, H]`` of the compute type."""
    return functional.embedding(input_ids, weight).to(dtype)


def head(
    config: Llama4Config, hidden: Tensor, logits_indices: Tensor, norm: Tensor, lm_head: Tensor | Product
) -> Tensor:
    """Logits ``f32 [B, R, V]`` of the tokens at ``logits_indices i64 [B, R]`` (places in this call, ``0..S-1``)."""
    picked = torch.gather(hidden, 1, logits_indices.unsqueeze(2).expand(-1, -1, config.hidden_size))
    picked = rms_norm(picked, config.rms_norm_eps) * norm.to(hidden.dtype)
    return linear(picked, lm_head).float()


class RotaryTable(nn.Module):
    """Slots and rotation of the RoPE layers: ``position_ids [B, S]`` -> ``slots, cos, sin``.

    Slots are positions within the chunk. Angles come from two small tables in float64, rounded to float32
    once: a slot is ``high * width + low``, and ``cos(a + b)``, ``sin(a + b)`` follow from the tables' entries. So
    the result is good to about 2e-7 at any position, where ``position * frequency`` in float32 is off by up
    to half a unit in the last place of the position itself, 0.5 radians at ten million.
    """

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.chunk = config.attention_chunk_size
        rows = self.chunk or config.max_position_embeddings
        if rows >= MAX_ROTARY_ROWS:
            key = "attention_chunk_size" if self.chunk else "max_position_embeddings"
            raise UnsupportedError(
                f"config key {key} is {rows}: rotary positions must stay below {MAX_ROTARY_ROWS}",
                hint="the exported graph divides them in float32, which is exact up to there",
            )
        # A power of two: the traced graph divides slots by it in float32, which is exact then (below 2**24).
        self.width = 1 << (max(rows - 1, 1).bit_length() + 1) // 2
        frequencies = config.rope.inverse_frequencies(config.head_dim)
        low = np.arange(self.width)[:, None] * frequencies
        high = np.arange(-(-rows // self.width))[:, None] * self.width * frequencies
        for name, angles in (("low", low), ("high", high)):
            self.register_buffer(f"{name}_cos", torch.from_numpy(np.cos(angles).astype(np.float32)))
            self.register_buffer(f"{name}_sin", torch.from_numpy(np.sin(angles).astype(np.float32)))

    low_cos: Tensor
    low_sin: Tensor
    high_cos: Tensor
    high_sin: Tensor

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``position_ids i64 [B, S]`` -> ``slots i64 [B, S]``, ``cos, sin f32 [B, S, D/2]``."""
        slots = position_ids if self.chunk is None else position_ids % self.chunk
        high = torch.div(slots, self.width, rounding_mode="floor")
        low = slots - high * self.width
        cos_a, sin_a = functional.embedding(high, self.high_cos), functional.embedding(high, self.high_sin)
        cos_b, sin_b = functional.embedding(low, self.low_cos), functional.embedding(low, self.low_sin)
        return slots, cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


class Llama4(nn.Module):
    """The whole model in eager PyTorch, from weights by checkpoint name; the same code that is traced."""

    def __init__(self, config: Llama4Config, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.weights, self.dtype = config, dict(weights), dtype
        self.rotary = RotaryTable(config)

    def empty_cache(self, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
        """Zeroed key and value caches ``[B, G, L, D]`` of every layer."""
        c = self.config
        shapes = [
            (batch, c.num_key_value_heads, c.cache_rows(i, context), c.head_dim) for i in range(c.num_hidden_layers)
        ]
        return [(torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)) for shape in shapes]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One call: ``input_ids, position_ids i64 [B, S]`` -> logits ``f32 [B, S, V]`` and the new cache.

        The positions of a sequence are consecutive, and lie in one chunk.
        """
        w, c = self.weights, self.config
        rope_places = self.rotary(position_ids)
        hidden = embed(input_ids, w["model.embed_tokens.weight"], self.dtype)
        presents: list[tuple[Tensor, Tensor]] = []
        for i, past in enumerate(cache):
            kind = kind_of(c, i)
            own = {name: w[f"model.layers.{i}.{name}"] for name in layer_weights(c, kind)}
            places = rope_places if kind.rope else (position_ids,)
            out = decoder_layer(c, kind, own, hidden, places, past)
            hidden = out.hidden
            presents.append((out.present_key, out.present_value))
        every = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        lm_head = w["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return head(c, hidden, every, w["model.norm.weight"], lm_head), presents
