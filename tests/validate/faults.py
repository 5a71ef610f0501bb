"""Faults that a validator must see, and the module that it must name for each.

A fault is planted into our side alone: into its weights, its ``config.json``, the code that is run and traced, the
graph of an engine, or the engine's run. transformers reads the checkpoint as it was. All models have eight layers:
NoPE in 3 and 7, experts in 1, 3, 5 and 7; chunk and temperature have edges within a few dozen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tests.validate import planting as p
from tests.validate import planting_engine as e

Tensors = dict[str, Tensor]
Raw = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """What is wrong, and which modules count as named right; names may hold ``*``."""

    name: str
    right: tuple[str, ...]
    base: str = "plain"
    weights: Callable[[Tensors], None] | None = None  # in place
    config: Callable[[Raw, int], None] | None = None  # in place; the chunk as it was
    code: Callable[[int], p.Code] | None = None  # of a chunk; runs in eager and in an export
    eager: Callable[[int], p.Code] | None = None  # what code does that cannot be traced; an engine has it in its graph
    graph: Callable[[int], e.Surgery] | None = None
    run: e.Run | None = None
    refused: str = ""  # a word of the error where the fault is no report, but a refusal by name
    unfit: dict[str, str] = field(default_factory=dict)  # formats that the sound model does not fit in, and why
    coarse: dict[str, str] = field(default_factory=dict)  # formats that round as much as the fault is, and why

    @property
    def is_eager(self) -> bool:
        """Whether the eager model can have it."""
        return self.run is None and (self.graph is None or self.eager is not None)

    def is_right(self, culprit: str) -> bool:
        """Whether this module is the one to look at."""
        return any(fnmatchcase(culprit, pattern) for pattern in self.right)


def layer(number: int, *parts: str) -> tuple[str, ...]:
    """Modules of one layer."""
    return tuple(f"model.layers.{number}.{part}" for part in parts)


# Weights


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def plant(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].float()).to(tensors[name].dtype).contiguous()

    return plant


def _part(number: int, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return _change(f"model.layers.{number}.{name}", change)


def _each(*plants: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    return lambda tensors: [plant(tensors) for plant in plants][-1]


def _exchanged(a: int, b: int, size: int = 1) -> Callable[[Tensor], Tensor]:
    """Blocks of rows in each other's place."""

    def change(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        rows = [slice(i * size, (i + 1) * size) for i in (a, b)]
        out[rows[0]], out[rows[1]] = tensor[rows[1]], tensor[rows[0]]
        return out

    return change


def _scaled(factor: float, *place: int | slice) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out[place] *= factor
        return out

    return change


def _heads(tensors: Tensors) -> None:
    """Query heads 0 and 1 in each other's place; heads are an eighth or a fourth of the rows: all models have four."""
    rows = len(tensors["model.layers.2.self_attn.q_proj.weight"]) // 4
    _part(2, "self_attn.q_proj.weight", _exchanged(0, 1, rows))(tensors)


def _scale_of_channel(tensors: Tensors) -> None:
    tensors["model.layers.3.feed_forward.experts.1.up_proj.weight_scale"][5] *= 2


def _no_bias(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".bias")]:
        del tensors[name]


def _with_nan(tensor: Tensor) -> Tensor:
    tensor[p.EXPERT, 2, 3] = torch.nan
    return tensor


# config.json


def _set(**changes: Any) -> Callable[[Raw, int], None]:
    def plant(raw: Raw, chunk: int) -> None:
        raw.pop("layer_types", None)
        raw.update(changes)

    return plant


def _rope(**changes: float) -> Callable[[Raw, int], None]:
    return lambda raw, chunk: raw["rope_parameters"].update(changes)


def _plain_rope(raw: Raw, chunk: int) -> None:
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_parameters"]["rope_theta"]}


def _chunk_off_by_one(raw: Raw, chunk: int) -> None:
    _set(attention_chunk_size=chunk - 1)(raw, chunk)


def _kind(number: int, rope: int) -> Callable[[Raw, int], None]:
    def plant(raw: Raw, chunk: int) -> None:
        right = [1, 1, 1, 0, 1, 1, 1, 0]
        _set(no_rope_layers=[rope if i == number else own for i, own in enumerate(right)])(raw, chunk)

    return plant


def _code(code: p.Code) -> Callable[[int], p.Code]:
    return lambda chunk: code


def _surgery(surgery: e.Surgery) -> Callable[[int], e.Surgery]:
    return lambda chunk: surgery


UP = "feed_forward.experts.gate_up_proj"
FIRST_EXPERTS = layer(1, "feed_forward.experts")
FIRST_KEY = layer(0, "self_attn.key")
FIRST_ATTENTION = layer(0, "self_attn")
CACHE = ("self_attn.key", "self_attn.value", "self_attn")

FAULTS: tuple[Fault, ...] = (
    Fault("a transposed weight", layer(2, "self_attn"), weights=_part(2, "self_attn.q_proj.weight", lambda t: t.T)),
    Fault(
        "two experts exchanged",
        layer(3, "feed_forward.experts"),
        weights=_each(_part(3, UP, _exchanged(1, 2)), _part(3, "feed_forward.experts.down_proj", _exchanged(1, 2))),
    ),
    Fault("the score applied to the output", FIRST_EXPERTS, code=_code(p.moe_with(on_output=True))),
    Fault("a NoPE layer given RoPE", layer(3, "self_attn.key"), config=_kind(3, 1)),
    Fault("chunk off by one", (*FIRST_KEY, *FIRST_ATTENTION), config=_chunk_off_by_one),
    Fault("rope scaling off", FIRST_KEY, config=_plain_rope),
    Fault(
        "temperature a token late",
        layer(3, "self_attn"),
        code=_code(p.replaced("temperature", lambda right: lambda at, config: right(at - 1, config))),
    ),
    Fault("QK norm off", FIRST_KEY, config=_set(use_qk_norm=False)),
    Fault(
        "one channel of one expert 1.5 times too large",
        layer(5, "feed_forward.experts"),
        weights=_part(5, UP, _scaled(1.5, p.EXPERT, slice(None), 7)),
    ),
    Fault(
        "the shared expert dropped", layer(1, "feed_forward.shared_expert"), code=_code(p.moe_with(shared_counts=False))
    ),
    Fault(
        "the router in bf16",
        layer(1, "feed_forward.router"),
        eager=_code(p.moe_with(router=p.in_bfloat16)),
        graph=_surgery(e.router_through(ir.DataType.BFLOAT16)),
    ),
    Fault("softmax for sigmoid", FIRST_EXPERTS, code=_code(p.moe_with(score=p.softmax_score))),
    Fault(
        "a sliding window for chunks",
        (*FIRST_KEY, *FIRST_ATTENTION),
        config=_set(attention_chunk_size=None),
        eager=lambda chunk: p.masked(p.window, chunk, p.is_rope),
        graph=lambda chunk: e.mask_in_graph(p.window, chunk, rope_only=True),
    ),
    Fault(
        "QK norm on NoPE layers too",
        layer(3, "self_attn.key"),
        code=_code(p.attention_with(p.qk_normed, p.is_nope)),
    ),
    Fault("a stale rope scaling, 8/4 for 16/1", FIRST_KEY, config=_rope(factor=8.0, high_freq_factor=4.0)),
    Fault(
        "stale cache rows are seen",
        FIRST_ATTENTION,
        graph=lambda chunk: e.mask_in_graph(p.future, chunk, rope_only=False),
        run=e.stale_rows,
    ),
    Fault(
        "gate and up exchanged",
        layer(1, "feed_forward.experts"),
        weights=_part(1, UP, lambda t: torch.cat(t.chunk(2, -1)[::-1], -1)),
    ),
    Fault("half-split RoPE", FIRST_KEY, code=_code(p.replaced("rotate", lambda right: p.half_split))),
    Fault("a RoPE layer without RoPE", layer(5, "self_attn.key"), config=_kind(5, 0)),
    Fault("no chunks", (*FIRST_KEY, *FIRST_ATTENTION), config=_set(attention_chunk_size=None)),
    Fault("temperature off", layer(3, "self_attn"), config=_set(attn_temperature_tuning=False)),
    Fault("temperature on RoPE layers", FIRST_ATTENTION, code=_code(p.attention_with(p.tempered, p.is_rope))),
    Fault("one expert of two", FIRST_EXPERTS, base="top-2", config=_set(num_experts_per_tok=1)),
    Fault("the second-best expert", FIRST_EXPERTS, code=_code(p.moe_with(choose=p.without_best))),
    Fault("no score", FIRST_EXPERTS, code=_code(p.moe_with(score=lambda scores, logits: torch.ones_like(scores)))),
    Fault("the score squared", FIRST_EXPERTS, code=_code(p.moe_with(score=lambda scores, logits: scores**2))),
    Fault(
        "an input norm's weight forgotten",
        layer(4, "input_layernorm"),
        weights=_part(4, "input_layernorm.weight", torch.ones_like),
    ),
    Fault(
        "a post-attention norm's weight forgotten",
        layer(5, "post_attention_layernorm"),
        weights=_part(5, "post_attention_layernorm.weight", torch.ones_like),
    ),
    Fault("the final norm's weight forgotten", ("lm_head",), weights=_change("model.norm.weight", torch.ones_like)),
    Fault("eps 1e-3 for 1e-5", layer(0, "input_layernorm", "self_attn.key"), config=_set(rms_norm_eps=1e-3)),
    Fault("lm_head's rows shifted by one", ("lm_head",), weights=_change("lm_head.weight", lambda t: t.roll(1, 0))),
    Fault(
        "one token's embedding is another's",
        ("model.embed_tokens",),
        weights=_change("model.embed_tokens.weight", _exchanged(5, 9)),
    ),
    Fault("two query heads exchanged", layer(2, "self_attn"), weights=_heads),
    Fault("groups tiled, not repeated", FIRST_ATTENTION, code=_code(p.attention_with(p.tiled_groups))),
    Fault("attention scaled by 1/D", FIRST_ATTENTION, code=_code(p.attention_with(p.scaled_twice))),
    Fault(
        "a column of o_proj is zero",
        layer(6, "self_attn"),
        weights=_part(6, "self_attn.o_proj.weight", _scaled(0.0, slice(None), 3)),
    ),
    Fault("gelu for silu in one expert", FIRST_EXPERTS, code=_code(p.moe_with(rows=p.gelu_rows))),
    Fault(
        "products clamped to fp16's range",
        layer(1, "feed_forward.shared_expert"),
        base="large",
        code=_code(p.clamped_swiglu(65504.0)),
        unfit={"fp16": "without the clamp it overflows"},
    ),
    Fault(
        "biases forgotten",
        layer(0, "self_attn.key", "self_attn.value"),
        base="bias",
        weights=_no_bias,
        config=_set(attention_bias=False),
    ),
    Fault("NaN in one expert's rows", FIRST_EXPERTS, code=_code(p.moe_with(rows=p.nan_rows))),
    Fault("the scale of one channel doubled", layer(3, "feed_forward.experts"), base="fp8", weights=_scale_of_channel),
    Fault("the cache a row late at a chunk's edge", layer(2, *CACHE), run=e.late_at_edge(2)),
    Fault("positions off by one after an edge", layer(0, *CACHE), run=e.early_after_edge()),
    Fault(
        "chunks ignored in decoding",
        FIRST_ATTENTION,
        config=_set(attention_chunk_size=None),
        code=p.rotated_within,
        eager=lambda chunk: p.masked(p.unchunked_decoding, chunk, p.is_rope),
        graph=lambda chunk: e.mask_in_graph(p.unchunked_decoding, chunk, rope_only=True),
    ),
    Fault("writes to a cache lost in decoding", layer(4, *CACHE), run=e.dropped_writes(4)),
    Fault("caches of two layers exchanged", layer(1, *CACHE), run=e.exchanged_caches(1, 4)),
    Fault("two layers in the wrong order", ("model.layers.4", "model.layers.4.*"), graph=_surgery(e.in_other_order(4))),
    Fault("a layer skipped", ("model.layers.6", "model.layers.6.*"), graph=_surgery(e.skipped(5))),
    Fault("a layer reads another's cache", layer(4, *CACHE), graph=_surgery(e.cache_of(4, 0))),
    Fault(
        "router logits through fp16",
        layer(1, "feed_forward.router"),
        eager=_code(p.moe_with(router=p.rounded_to(torch.float16))),
        graph=_surgery(e.router_through(ir.DataType.FLOAT16)),
    ),
    Fault(
        "two experts exchanged in the graph",
        layer(3, "feed_forward.experts"),
        graph=_surgery(e.other_experts(3)),
    ),
    Fault(
        "key's and value's weights exchanged",
        layer(2, "self_attn.key", "self_attn.value"),
        graph=_surgery(e.exchanged(2, "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    ),
    Fault(
        "the next token is seen",
        FIRST_ATTENTION,
        eager=lambda chunk: p.masked(p.future, chunk),
        graph=lambda chunk: e.mask_in_graph(p.future, chunk, rope_only=False),
    ),
    Fault(
        "NaN in one expert's weight",
        FIRST_EXPERTS,
        weights=_part(3, "feed_forward.experts.down_proj", _with_nan),
        refused="model.layers.3.feed_forward.experts.down_proj",
    ),
)
"""Numbered from 1 in this order."""
