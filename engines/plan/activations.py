"""What one call of an engine needs besides weights and cache: the largest set of tensors that are alive together.

The lists follow the layer dump of TensorRT-RTX 1.7 plans (sm89, bf16) of the exported graph: what it fuses away is not
in them, what it adds is. Two things it adds grow with the context, and are most of it from some 100,000 tokens on:

* its fused attention takes as many key and value heads as query heads, so the whole cache of the layer at work is
  copied and repeated: N / G times the layer's cache, in the compute type, while that layer runs;
* the boolean mask becomes an additive one of the compute type, ``[B, 1, S, L]``; there is one for RoPE and one for NoPE
  layers, made once for all layers.

Other builders may need less. What they do with the graph has to be looked up in a plan of theirs; a plan's layers
are in its engine directory's ``build.log``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shuntyard.engines.plan.footprint import COMPUTE, key_heads
from shuntyard.exporter.config import Llama4Config


@dataclass(frozen=True)
class Call:
    """The largest call: ``batch`` sequences of ``tokens`` new tokens, in caches made for ``context``."""

    batch: int
    tokens: int
    context: int
    gpus: int = 1
    all_logits: bool = False  # logits of every token, and not of each sequence's last


@dataclass(frozen=True)
class Term:
    """A line of the sum: what it is, its bytes, and their formula: letters as in the legend, C is the context."""

    name: str
    formula: str
    nbytes: int


@dataclass(frozen=True)
class LiveSet:
    """Tensors that are alive together while ``stage`` runs."""

    stage: str
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        """Their sum."""
        return sum(term.nbytes for term in self.terms)


def tokens_in_call(config: Llama4Config, tokens: int, context: int) -> int:
    """Tokens of a sequence in one call: a call never crosses a chunk's edge (``engines/build.py``)."""
    return min(tokens, context, config.attention_chunk_size or context)


def largest_live_set(config: Llama4Config, call: Call) -> LiveSet:
    """The largest of :func:`live_sets`."""
    return max(live_sets(config, call), key=lambda live: live.nbytes)


def live_sets(config: Llama4Config, call: Call) -> Iterator[LiveSet]:
    """The live set of each stage of a call, on each GPU; B, S, T, N, G, F are those of one GPU."""
    always, in_layers = tuple(_always(config, call)), tuple(_in_layers(config, call))
    for stage, terms in _stages(config, call):
        yield LiveSet(stage, (*terms, *in_layers, *always))
    yield LiveSet("head", (*_head(config, call), *always))


def workspace(tokens: int, top_k: int, hidden: int, intermediate: int) -> int:
    """``shuntyard_moe_experts_workspace`` for the compute type (``plugins/native/kernels/experts.cu``), in bytes."""
    rows = tokens * top_k * COMPUTE
    return _aligned(rows * hidden) + _aligned(rows * intermediate) + _DESCRIPTORS


_DESCRIPTORS = 3 * 512 * 128
"""By which Hopper copies weights: of 128 bytes, three for each expert, room for the most experts."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def _always(config: Llama4Config, call: Call) -> Iterator[Term]:
    """What lives as long as the call."""
    batch, new = call.batch, tokens_in_call(config, call.tokens, call.context)
    tokens, hidden = batch * new, config.hidden_size
    heads, keys = config.num_attention_heads // call.gpus, key_heads(config, call.gpus)
    yield Term("hidden state", "2TH", tokens * hidden * COMPUTE)
    if call.gpus > 1:
        yield Term("sum over the GPUs", "2TH", tokens * hidden * COMPUTE)
    # int64 ids, positions, indices and slots; int32 rows of the caches (six a token and head); fp32 factors of QK norm.
    indices = tokens * (4 * 8 + 6 * 4 * keys + 4 * (heads + keys))
    yield Term("ids, positions, indices", "T(32 + 24G + 4(N + G))", indices)
    outputs = new if call.all_logits else 1
    yield Term("logits", "4TV" if call.all_logits else "4BV", batch * outputs * config.vocab_size * 4)


def _in_layers(config: Llama4Config, call: Call) -> Iterator[Term]:
    """What is made once for all layers."""
    tokens = call.batch * tokens_in_call(config, call.tokens, call.context)
    rope = [i for i in range(config.num_hidden_layers) if config.uses_rope(i)]
    if rope:
        yield Term("mask of RoPE layers", "2TL", tokens * config.cache_rows(rope[0], call.context) * COMPUTE)
        yield Term("cos, sin", "4TD", tokens * config.head_dim * 4)
    if len(rope) < config.num_hidden_layers:
        yield Term("mask of NoPE layers", "2TC", tokens * call.context * COMPUTE)


def _head(config: Llama4Config, call: Call) -> list[Term]:
    """Room for the logits of every token, whatever is asked for: an execution context is made for its largest call.

    Where the builder finds no kernel that writes a product in fp32, the logits are there in the compute type too.
    """
    tokens = call.batch * tokens_in_call(config, call.tokens, call.context)
    normed = Term("normalised", "2TH", tokens * config.hidden_size * COMPUTE)
    return [normed, Term("logits of all tokens, bf16", "2TV", tokens * config.vocab_size * COMPUTE)]


def _stages(config: Llama4Config, call: Call) -> Iterator[tuple[str, list[Term]]]:
    """What lives in one stage, in the order of a layer."""
    batch, new = call.batch, tokens_in_call(config, call.tokens, call.context)
    tokens, hidden, head_dim = batch * new, config.hidden_size, config.head_dim
    heads, keys = config.num_attention_heads // call.gpus, key_heads(config, call.gpus)
    row = tokens * hidden * COMPUTE
    normed = Term("normalised", "2TH", row)
    query = tokens * heads * head_dim
    projected = Term("q, k, v", "2T(N + 2G)D", (query + 2 * tokens * keys * head_dim) * COMPUTE)

    def repeated(rows: int, formula: str) -> Term:
        return Term("keys, values of each query head", formula, 2 * batch * heads * rows * head_dim * COMPUTE)

    kinds = {config.uses_rope(i) for i in range(config.num_hidden_layers)}
    if True in kinds:
        first = next(i for i in range(config.num_hidden_layers) if config.uses_rope(i))
        copies = repeated(config.cache_rows(first, call.context), "4BNLD")
        yield "attention of a RoPE layer", [copies, projected, Term("rotated q, fp32", "4TND", query * 4)]
    if False in kinds:
        copies = repeated(call.context, "4BNCD")
        yield "attention of a NoPE layer", [copies, projected, Term("scaled q", "2TND", query * COMPUTE)]
    if len(config.moe_layers) < config.num_hidden_layers:
        width = tokens * config.intermediate_size_mlp // call.gpus * COMPUTE
        yield "dense FFN", [normed, Term("gate, up, product", "6TF", 3 * width)]
    if config.moe_layers:
        yield from _moe_stages(config, call, tokens, normed)


def _moe_stages(config: Llama4Config, call: Call, tokens: int, normed: Term) -> Iterator[tuple[str, list[Term]]]:
    """Any token may go to any expert: a GPU's experts may get all rows, so these are not divided."""
    hidden, expert, top_k = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    rows = Term("rows", "2TKH", tokens * top_k * hidden * COMPUTE)
    routes = Term("scores, permutation", "8TK", 8 * tokens * top_k)
    wide = Term("normalised, fp32", "4TH", tokens * hidden * 4)
    logits = Term("router logits", "4TE", tokens * config.num_local_experts * 4)
    yield "routing", [normed, wide, logits]
    scratch = Term("workspace", "2TK(H + F) + 192 KiB", workspace(tokens, top_k, hidden, expert))
    yield "routed experts", [normed, rows, routes, scratch]
    width = tokens * expert // call.gpus * COMPUTE
    yield "shared expert", [normed, rows, routes, Term("gate, up, product", "6TF", 3 * width)]
    out = Term("shared and sum", "4TH", 2 * tokens * hidden * COMPUTE)
    yield "coupling", [rows, routes, out]
