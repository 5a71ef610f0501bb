"""Assembles the ONNX model: one function call a layer, weights as external data in the checkpoint's own files.

The graph's interface, for every call with B sequences of S new tokens::

    input_ids       i64 [B, S]
    position_ids    i64 [B, S]   consecutive in each sequence; all in one chunk
    logits_indices  i64 [B, R]   which of the S tokens get logits (0 .. S - 1)
    past_key_values.N.key / .value   [B, G, L, D] of the compute type; zeros at the start
 -> logits          f32 [B, R, V]
    present.N.key / .value       the cache with this call's rows written

L is ``context`` for a NoPE layer and ``chunk`` for a chunked one. A sequence that is shorter than S (a ragged batch)
is padded on the right with any token: what padding writes lies behind the sequence's end, where nothing looks until
real tokens have overwritten it. That holds within a chunk only: a sequence that has ended stays out of calls on later
chunks, where its padding would overwrite its last chunk's cache rows from the start.

Values in between have names too: ``model.layers.N`` is a layer's output ``[B, S, H]``, and
``model.layers.N.feed_forward.router`` its router's logits ``f32 [B*S, E]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from shuntyard.exporter import trace
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.model import LayerKind, kind_of, layer_weights
from shuntyard.exporter.safetensors_header import TensorEntry
from shuntyard.plugins.contract import DOMAIN, DOMAIN_VERSION
from shuntyard.plugins.functions import OPSET, all_functions

IR_VERSION = 11

COMPUTE_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

_WEIGHT_TYPES = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}


def _initializer(entry: TensorEntry) -> ir.Value:
    """A checkpoint tensor as external data: file name, offset and length, under its own name."""
    dtype, shape = _WEIGHT_TYPES[entry.dtype], ir.Shape(entry.shape)
    tensor = ir.ExternalTensor(
        entry.file.name,
        entry.offset,
        entry.nbytes,
        dtype,
        shape=shape,
        name=entry.name,
        base_dir=str(entry.file.parent),
    )
    return ir.Value(name=entry.name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)


class _Assembly:
    """The main graph while it grows."""

    def __init__(self, config: Llama4Config, dtype: ir.DataType, weights: Mapping[str, TensorEntry]) -> None:
        self.config, self.dtype = config, dtype
        self.weights = {name: _initializer(entry) for name, entry in weights.items()}
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def value(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        self.inputs.append(self.value(name, dtype, *shape))
        return self.inputs[-1]

    def call(self, function: ir.Function, name: str, inputs: list[ir.Value], outputs: list[ir.Value]) -> None:
        attribute = ir.AttrInt64(trace.DTYPE_ATTRIBUTE, int(self.dtype))
        node = ir.Node(DOMAIN, function.name, inputs, [attribute], outputs=outputs, name=name)
        self.nodes.append(node)

    def layer(self, i: int, function: ir.Function, hidden: ir.Value, places: list[ir.Value]) -> ir.Value:
        c, kind = self.config, kind_of(self.config, i)
        rows = "chunk" if kind.rope and c.attention_chunk_size is not None else "context"
        cache = ("batch", c.num_key_value_heads, rows, c.head_dim)
        name = f"model.layers.{i}"
        past = [self.input(f"past_key_values.{i}.{part}", self.dtype, *cache) for part in ("key", "value")]
        present = [self.value(f"present.{i}.{part}", self.dtype, *cache) for part in ("key", "value")]
        out = self.value(name, self.dtype, "batch", "sequence", c.hidden_size)
        outputs = [out, *present]
        if kind.moe:
            logits = f"{name}.feed_forward.router"
            outputs.append(self.value(logits, ir.DataType.FLOAT, "tokens", c.num_local_experts))
        own = [self.weights[f"{name}.{weight}"] for weight in layer_weights(c, kind)]
        self.call(function, name, [hidden, *places, *past, *own], outputs)
        self.outputs += present
        return out


def build_model(config: Llama4Config, weights: Mapping[str, TensorEntry], dtype: str) -> ir.Model:
    """The whole model, computing in ``dtype`` (``fp32``, ``fp16`` or ``bf16``)."""
    kinds: dict[LayerKind, ir.Function] = {}
    for i in range(config.num_hidden_layers):
        kind = kind_of(config, i)
        if kind not in kinds:
            kinds[kind] = trace.layer_function(config, kind)
    embedding, head = trace.embedding_function(config), trace.head_function(config)
    rotary = trace.rotary_function(config) if any(kind.rope for kind in kinds) else None
    i64, f32, compute = ir.DataType.INT64, ir.DataType.FLOAT, COMPUTE_TYPES[dtype]
    g = _Assembly(config, compute, weights)
    input_ids = g.input("input_ids", i64, "batch", "sequence")
    position_ids = g.input("position_ids", i64, "batch", "sequence")
    logits_indices = g.input("logits_indices", i64, "batch", "outputs")
    hidden = g.value("model.embed_tokens", compute, "batch", "sequence", config.hidden_size)
    g.call(embedding, "model.embed_tokens", [input_ids, g.weights["model.embed_tokens.weight"]], [hidden])
    rope_places: list[ir.Value] = []
    if rotary is not None:
        half = config.head_dim // 2
        slots = g.value("rotary.slots", i64, "batch", "sequence")
        angles = [g.value(f"rotary.{name}", f32, "batch", "sequence", half) for name in ("cos", "sin")]
        rope_places = [slots, *angles]
        g.call(rotary, "model.rotary_emb", [position_ids], rope_places)
    for i in range(config.num_hidden_layers):
        kind = kind_of(config, i)
        hidden = g.layer(i, kinds[kind], hidden, rope_places if kind.rope else [position_ids])
    logits = g.value("logits", f32, "batch", "outputs", config.vocab_size)
    lm_head = g.weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    g.call(head, "lm_head", [hidden, logits_indices, g.weights["model.norm.weight"], lm_head], [logits])
    functions = [embedding, *([rotary] if rotary is not None else []), *kinds.values(), head]
    if any(kind.moe for kind in kinds):
        functions += all_functions(config.num_local_experts)
    else:
        functions += [f for f in all_functions(1) if "Moe" not in f.name]
    graph = ir.Graph(
        g.inputs,
        [logits, *g.outputs],
        nodes=g.nodes,
        initializers=list(g.weights.values()),
        opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION},
        name="llama4",
    )
    for function in functions:
        function.opset_imports.update({"": OPSET, DOMAIN: DOMAIN_VERSION})
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="shuntyard", functions=functions)


def retarget(model: ir.Model, dtype: str) -> None:
    """Makes a model compute in another type, in place: the types of calls, cache and hidden states change."""
    new = COMPUTE_TYPES[dtype]
    old: ir.DataType | None = None
    for node in model.graph:
        attribute = node.attributes.get(trace.DTYPE_ATTRIBUTE)
        if attribute is not None:
            old = ir.DataType(attribute.as_int())
            node.attributes.add(ir.AttrInt64(trace.DTYPE_ATTRIBUTE, int(new)))
    keep = {"logits"} | {v.name for v in model.graph.initializers.values()}
    computed = [value for node in model.graph for value in node.outputs]
    for value in [*model.graph.inputs, *computed]:
        is_fixed = value.name in keep or str(value.name).startswith("rotary.") or str(value.name).endswith(".router")
        if value.dtype == old and not is_fixed:
            value.dtype = new
