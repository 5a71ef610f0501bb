"""How faults are planted in the code that is run and traced: attention, then experts. See ``faults.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shuntyard.exporter import model, trace
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import LayerKind

Patch = pytest.MonkeyPatch
Code = Callable[[Patch, Llama4Config], None]
Moe = tuple[Tensor, Tensor, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[model.Weights, Tensor, Tensor, Tensor, int], Tensor]

EXPERT = 1
"""Where a fault is in one expert alone."""


def attention_with(
    change: Callable[[Any, Llama4Config, tuple[Any, ...]], Any], where: Callable[[LayerKind], bool] = lambda kind: True
) -> Code:
    """``change(right, config, arguments)`` takes the place of the cached attention in the layers of some kinds."""

    def plant(patch: Patch, config: Llama4Config) -> None:
        attention, right = model.attention, torch.ops.shuntyard.cached_attention
        here: list[LayerKind] = []

        def noted(config: Llama4Config, kind: LayerKind, *rest: Any) -> Any:
            here[:] = [kind]
            return attention(config, kind, *rest)

        def changed(*arguments: Any) -> Any:
            return change(right, config, arguments) if where(here[0]) else right(*arguments)

        patch.setattr(model, "attention", noted)
        # The model's own view of torch alone: an export goes through all of torch.ops itself.
        ops = _View(torch.ops.shuntyard, cached_attention=changed)
        patch.setattr(model, "torch", _View(torch, ops=_View(torch.ops, shuntyard=ops)))

    return plant


class _View:
    """Another's attributes, but for some."""

    def __init__(self, of: Any, **changes: Any) -> None:
        self._of = of
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def is_rope(kind: LayerKind) -> bool:
    return kind.rope


def is_nope(kind: LayerKind) -> bool:
    return not kind.rope


def qk_normed(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    q, k, *rest = arguments
    return right(model.rms_norm(q, config.rms_norm_eps), model.rms_norm(k, config.rms_norm_eps), *rest)


def tempered(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    q, *rest = arguments
    scale = model.temperature(rest[-2], config)[:, None, :, None]
    return right((q.float() * scale).to(q.dtype), *rest)


def scaled_twice(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    return right(*arguments[:-1], 1 / config.head_dim)


def tiled_groups(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    """Head ``h`` gets group ``h mod G``, not ``h // (N / G)``."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    order = [h for g in range(groups) for h in range(heads) if h % groups == g]
    back = [order.index(h) for h in range(heads)]
    q, *rest = arguments
    out, key, value = right(torch.stack([q[:, h] for h in order], 1), *rest)
    return torch.stack([out[:, h] for h in back], 1), key, value


Mask = Callable[[Tensor, Tensor, int, int], Tensor]


def future(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """One row too many is seen."""
    return rows <= slots + 1


def window(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """The last ``chunk`` tokens, wherever chunks begin."""
    return (rows <= slots) & (rows > slots - chunk)


def unchunked_decoding(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """Chunks in prefill only: a single token sees all before it."""
    return (rows <= slots) & ((rows >= slots - slots % chunk) | torch.tensor(length == 1))


def masked(mask: Mask, chunk: int, where: Callable[[LayerKind], bool] = lambda kind: True) -> Code:
    """Another mask, in the eager model."""

    def change(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
        q, k, v, past_k, past_v, slots, scale = arguments
        place = slots[:, None, :, None].expand(k.shape)
        key, value = past_k.scatter(2, place, k), past_v.scatter(2, place, v)
        visible = mask(torch.arange(key.shape[2]), slots[:, :, None], q.shape[2], chunk)[:, None]
        out = functional.scaled_dot_product_attention(q, key, value, visible, scale=scale, enable_gqa=True)
        return out.contiguous(), key, value

    return attention_with(change, where)


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (part.float() for part in x.chunk(2, dim=-1))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotated_within(chunk: int) -> Code:
    """Rotation as it should be, where the configuration knows no chunks; slots are positions."""

    def plant(patch: Patch, config: Llama4Config) -> None:
        right = model.RotaryTable.forward

        def forward(table: model.RotaryTable, positions: Tensor) -> tuple[Tensor, ...]:
            return (positions, *right(table, positions % chunk)[1:])

        patch.setattr(model.RotaryTable, "forward", forward)

    return plant


def replaced(name: str, wrong: Any) -> Code:
    """Another function of ``exporter/model.py``; ``wrong(right)`` makes it."""
    return lambda patch, config: patch.setattr(model, name, wrong(getattr(model, name)))


def float_router(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().T


def moe_with(
    *,
    router: Callable[[Tensor, Tensor], Tensor] = float_router,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits,
    score: Score | None = None,
    on_output: bool = False,
    shared_counts: bool = True,
    rows: Rows | None = None,
) -> Code:
    """The mixture of experts with one thing changed; with nothing changed it is the right one."""

    def moe(config: Llama4Config, w: model.Weights, x: Tensor) -> Moe:
        ops, top_k = torch.ops.shuntyard, config.num_experts_per_tok
        logits = router(x, w["feed_forward.router.weight"])
        scores, offsets, permutation = ops.moe_routing(choose(logits), top_k)
        if score is not None:
            scores = score(scores, logits[permutation.long() // top_k])
        fused = [w["feed_forward.experts.gate_up_proj"], w["feed_forward.experts.down_proj"]]
        given = torch.ones_like(scores) if on_output else scores
        experts = config.num_local_experts
        found = ops.moe_experts(x, given, offsets, permutation, fused, [], [], top_k, experts, "fused", 0, "none")
        if on_output:
            found = (found.float() * scores[:, None]).to(x.dtype)
        if rows is not None:
            own = torch.arange(permutation.shape[0])
            of_one = (own >= offsets[EXPERT]) & (own < offsets[EXPERT + 1])
            scaled = (x[permutation.long() // top_k].float() * scores[:, None]).to(x.dtype)
            found = torch.where(of_one[:, None], rows(w, scaled, found, logits, EXPERT), found)
        shared = model.swiglu(x, w, "feed_forward.shared_expert")
        base = shared if shared_counts else (shared.float() * 0).to(x.dtype)
        return ops.moe_scatter_add(base, found, permutation, top_k), logits, base

    def plant(patch: Patch, config: Llama4Config) -> None:
        named = trace._name_products

        def lenient(graph: ir.Graph) -> None:
            with contextlib.suppress(AssertionError):  # a product with an expert's weight, which the graph has none of
                named(graph)

        patch.setattr(model, "moe", moe)
        patch.setattr(trace, "_name_products", lenient)

    return plant


def softmax_score(scores: Tensor, logits: Tensor) -> Tensor:
    return (torch.logit(scores) - logits.logsumexp(-1)).exp()


def without_best(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits >= logits.amax(-1, keepdim=True), -1e4)


def in_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    return (x.bfloat16() @ weight.bfloat16().T).float()


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: float_router(x, weight).to(dtype).float()


def gelu_rows(w: model.Weights, scaled: Tensor, found: Tensor, logits: Tensor, expert: int) -> Tensor:
    into, down = (w[f"feed_forward.experts.{n}_proj"][expert].to(scaled.dtype) for n in ("gate_up", "down"))
    gate, up = (scaled @ into).chunk(2, dim=-1)
    return (functional.gelu(gate.float()) * up.float()).to(scaled.dtype) @ down


def nan_rows(w: model.Weights, scaled: Tensor, found: Tensor, logits: Tensor, expert: int) -> Tensor:
    """NaN in one channel."""
    wide = found.float()
    return torch.where(torch.arange(found.shape[1]) == 3, wide * torch.nan, wide).to(found.dtype)


def clamped_swiglu(largest: float) -> Code:
    """``gate * up`` kept to what fp16 holds."""

    def swiglu(x: Tensor, w: model.Weights, prefix: str) -> Tensor:
        gate = functional.silu(model.linear(x, w[f"{prefix}.gate_proj.weight"]))
        product = gate.float() * model.linear(x, w[f"{prefix}.up_proj.weight"]).float()
        return model.linear(product.clamp(-largest, largest).to(x.dtype), w[f"{prefix}.down_proj.weight"])

    return lambda patch, config: patch.setattr(model, "swiglu", swiglu)
