"""Llama 4's text model as Meta's own code computes it, written anew from reading it: the second reference.

What was read: github.com/meta-llama/llama-models, commit a9c89c4, ``models/llama4/model.py``, ``moe.py``, ``ffn.py``
and ``args.py``. Kept are its layout of weights (as its checkpoints store them), its complex rotation, its constants,
its order of operations and types, and what it does wrong. Left out are images, its sharding and its quantisation.
Letters in shapes are by the legend in ``plugins/contract.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROPE_FACTOR, ROPE_HIGH_FREQUENCY, ROPE_LOW_FREQUENCY, ROPE_CONTEXT = 16.0, 1.0, 1.0, 8192
"""What ``args.py`` and ``model.py`` put for the scaled RoPE, whatever a Hugging Face ``config.json`` says."""


@dataclass(frozen=True)
class MetaArgs:
    """``params.json`` under Meta's names and with Meta's defaults; head size and FFN sizes follow from the weights."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    num_experts: int
    top_k: int = 1
    interleave_moe_layer_step: int = 1
    nope_layer_interval: int | None = None
    attention_chunk_size: int | None = None
    norm_eps: float = 1e-5
    use_qk_norm: bool = False
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1

    def is_nope(self, layer: int) -> bool:
        """Whether a layer knows no positions."""
        return self.nope_layer_interval is not None and (layer + 1) % self.nope_layer_interval == 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is routed."""
        return self.num_experts > 0 and (layer + 1) % self.interleave_moe_layer_step == 0


def args_of(raw: dict[str, Any]) -> MetaArgs:
    """Meta's arguments of a raw Hugging Face configuration; asserts that Meta's code can express it."""
    assert raw["head_dim"] * raw["num_attention_heads"] == raw["hidden_size"]
    assert not any(raw.get(key) for key in ("attention_bias", "tie_word_embeddings", "moe_layers", "no_rope_layers"))
    rope = raw["rope_parameters"]
    assert rope.get("original_max_position_embeddings", ROPE_CONTEXT) == ROPE_CONTEXT
    return MetaArgs(
        dim=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"],
        n_kv_heads=raw["num_key_value_heads"],
        num_experts=0 if raw.get("moe_layers") == [] else raw["num_local_experts"],
        top_k=raw["num_experts_per_tok"],
        interleave_moe_layer_step=raw["interleave_moe_layer_step"],
        nope_layer_interval=raw["no_rope_layer_interval"],
        attention_chunk_size=raw["attention_chunk_size"],
        norm_eps=raw["rms_norm_eps"],
        use_qk_norm=raw["use_qk_norm"],
        rope_theta=rope["rope_theta"],
        use_scaled_rope=rope["rope_type"] == "llama3",
        attn_temperature_tuning=raw["attn_temperature_tuning"],
        floor_scale=raw["floor_scale"],
        attn_scale=raw["attn_scale"],
    )


def stored_moe(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors below ``feed_forward.`` of a routed layer, as in :func:`stored` below ``layers.N.``."""
    gate, up = own["experts.gate_up_proj"].chunk(2, dim=2)  # [E, H, F]
    out = {
        "router_DE": own["router.weight"].T,
        "experts.moe_w_in_eD_F": gate.flatten(0, 1),
        "experts.moe_w_swiglu_eD_F": up.flatten(0, 1),
        "experts.moe_w_out_eF_D": own["experts.down_proj"].flatten(0, 1),
    }
    for part, name in (("w_in_shared_FD", "gate"), ("w_swiglu_FD", "up"), ("w_out_shared_DF", "down")):
        out[f"{part}.weight"] = own[f"shared_expert.{name}_proj.weight"]
    return {f"feed_forward.{name}": weight for name, weight in out.items()}


def stored(weights: dict[str, Tensor], args: MetaArgs) -> dict[str, Tensor]:
    """Hugging Face's tensors under the names and in the shapes of a ``consolidated.pth`` of Meta's, unsharded."""
    out = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i in range(args.n_layers):
        theirs, ours = f"layers.{i}.", f"model.layers.{i}."
        heads = [weights[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv"]
        out[theirs + "attention.wqkv.weight"] = torch.cat(heads)
        out[theirs + "attention.wo.weight"] = weights[ours + "self_attn.o_proj.weight"]
        out[theirs + "attention.wqkv.layer_norm_weight"] = weights[ours + "input_layernorm.weight"]
        ours += "feed_forward."
        norm = weights[f"model.layers.{i}.post_attention_layernorm.weight"]
        if not args.is_moe(i):
            theirs += "feed_forward.mlp."
            out[theirs + "layer_norm_weight"] = norm
            out[theirs + "fc1_weight"] = torch.cat([weights[f"{ours}{name}_proj.weight"] for name in ("gate", "up")])
            out[theirs + "fc2_weight"] = weights[ours + "down_proj.weight"]
            continue
        out[theirs + "feed_forward.norm.weight"] = norm
        own = {name.removeprefix(ours): weight for name, weight in weights.items() if name.startswith(ours)}
        out |= {theirs + name: weight for name, weight in stored_moe(own).items()}
    return out


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """In fp32, rounded to x's type; a weight is multiplied after that, in x's type."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).type_as(x)


def inverse_frequencies(head_dim: int, theta: float, scaled: bool) -> Tensor:
    """f32 ``[D/2]``; scaled ones as Meta's ``apply_scaling`` has them, one by one."""
    plain = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if not scaled:
        return plain
    out = []
    for frequency in plain:
        turns = ROPE_CONTEXT * frequency / (2 * math.pi)  # in the original context
        if turns > ROPE_HIGH_FREQUENCY:
            out.append(frequency)
            continue
        assert turns < ROPE_LOW_FREQUENCY  # the band between is empty: Meta's code stops here
        out.append(frequency / ROPE_FACTOR)
    return torch.stack(out)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """``x [B, S, heads, D]`` as D/2 complex numbers, times ``rotation`` complex64 ``[S, D/2]``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[None, :, None]).flatten(-2).type_as(x)


def temperature(positions: Tensor, args: MetaArgs) -> Tensor:
    """f32, of the shape of ``positions``."""
    floor = torch.floor((positions.float() + 1.0) / args.floor_scale)
    return torch.log(floor + 1.0) * args.attn_scale + 1.0


def chunk_mask(length: int, chunk: int) -> Tensor:
    """bool ``[S, S]``: who sees whom, by the places **within the call**."""
    places = torch.arange(length)
    same = places[:, None] // chunk == places[None, :] // chunk
    return same & (places[None, :] <= places[:, None])


def moe(args: MetaArgs, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """``x [T, H]`` -> ``[T, H]``: every expert on every token, those that were not chosen on zeros."""
    experts = args.num_experts
    logits = x @ w["feed_forward.router_DE"]  # [T, E], in x's type
    best = logits.topk(args.top_k, dim=1)
    kept = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
    scaled = x * kept.sigmoid().T[:, :, None]  # [E, T, H]
    into, gated, back = (
        w[f"feed_forward.experts.moe_w_{name}"].unflatten(0, (experts, -1))
        for name in ("in_eD_F", "swiglu_eD_F", "out_eF_D")
    )
    rows = (functional.silu(scaled @ into) * (scaled @ gated)) @ back  # [E, T, H]
    shared = {name: w[f"feed_forward.{name}.weight"] for name in ("w_in_shared_FD", "w_swiglu_FD", "w_out_shared_DF")}
    hidden = functional.silu(functional.linear(x, shared["w_in_shared_FD"]))
    out = functional.linear(hidden * functional.linear(x, shared["w_swiglu_FD"]), shared["w_out_shared_DF"])
    tokens = torch.arange(len(x)).repeat(experts)[:, None].expand(-1, x.shape[1])
    return out.scatter_add(0, tokens, rows.flatten(0, 1))


class MetaLlama4:
    """Meta's ``Transformer`` with its KV cache: ``model(tokens, start)``, from position 0 on."""

    def __init__(self, args: MetaArgs, state: dict[str, Tensor]) -> None:
        self.args, self.state = args, state
        self.head_dim = args.dim // args.n_heads
        self.frequencies = inverse_frequencies(self.head_dim, args.rope_theta, args.use_scaled_rope)
        self.cache: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Logits f32 ``[B, S, V]`` of ``tokens [B, S]``, the first of which is at position ``start``."""
        args, length = self.args, tokens.shape[1]
        if start == 0:
            self.cache = []
        hidden = functional.embedding(tokens, self.state["tok_embeddings.weight"])
        angles = torch.outer(torch.arange(start, start + length, dtype=torch.float32), self.frequencies)
        rotation = torch.polar(torch.ones_like(angles), angles)
        everything, chunked = None, None
        if length > 1:  # so a call of one token has no mask, whatever stands in the cache
            everything = torch.full((length, length), -torch.inf).triu(1).type_as(hidden)
            if args.attention_chunk_size:
                chunked = chunk_mask(length, args.attention_chunk_size)
        for i in range(args.n_layers):
            w = {name.split(".", 2)[2]: t for name, t in self.state.items() if name.startswith(f"layers.{i}.")}
            mask = everything if args.is_nope(i) or chunked is None else chunked
            normed = rms_norm(hidden, args.norm_eps) * w["attention.wqkv.layer_norm_weight"]
            hidden = hidden + self._attention(i, w, normed, start, rotation, mask)
            norm = w["feed_forward.norm.weight" if args.is_moe(i) else "feed_forward.mlp.layer_norm_weight"]
            hidden = hidden + self._feed_forward(i, w, rms_norm(hidden, args.norm_eps) * norm)
        hidden = rms_norm(hidden, args.norm_eps) * self.state["norm.weight"]
        return functional.linear(hidden, self.state["output.weight"]).float()

    def _attention(
        self, layer: int, w: dict[str, Tensor], x: Tensor, start: int, rotation: Tensor, mask: Tensor | None
    ) -> Tensor:
        args = self.args
        weights = w["attention.wqkv.weight"].split([n * self.head_dim for n in (args.n_heads, *[args.n_kv_heads] * 2)])
        query, key, value = (functional.linear(x, part).unflatten(-1, (-1, self.head_dim)) for part in weights)
        if not args.is_nope(layer):
            query, key = rotate(query, rotation), rotate(key, rotation)
            if args.use_qk_norm:
                query, key = rms_norm(query, args.norm_eps), rms_norm(key, args.norm_eps)
        elif args.attn_temperature_tuning:
            places = torch.arange(start, start + x.shape[1])
            query = query * temperature(places, args)[:, None, None]  # fp32 from here on, whatever x is
        if start == 0:
            self.cache.append((key.to(query), value.to(query)))
        else:
            past = self.cache[layer]
            self.cache[layer] = (torch.cat([past[0], key.to(query)], 1), torch.cat([past[1], value.to(query)], 1))
        keys, values = (part.repeat_interleave(args.n_heads // args.n_kv_heads, 2) for part in self.cache[layer])
        query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return functional.linear(out.transpose(1, 2).flatten(2), w["attention.wo.weight"])

    def _feed_forward(self, layer: int, w: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.args.is_moe(layer):
            return moe(self.args, w, x.flatten(0, 1)).view_as(x)
        gate, up = w["feed_forward.mlp.fc1_weight"].chunk(2)
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(hidden, w["feed_forward.mlp.fc2_weight"])
