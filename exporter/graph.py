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

Values in between have names too, for whoever wants to look inside. ``model.layers.N`` is a layer's output
``[B, S, H]``; below it are ``.self_attn`` and ``.feed_forward``, what was added for it, ``.input_layernorm`` and
``.post_attention_layernorm``, what those two were computed from, ``.feed_forward.router``, its router's logits
``f32 [B*S, E]``, and ``.feed_forward.shared_expert``, the shared expert's part ``[B*S, H]``. Nothing is computed for
them alone, and none is an output of the graph unless it is marked as one (:func:`mark`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import onnx
import onnx_ir as ir

from shuntyard.exporter import trace
from shuntyard.exporter.checkpoint import TEXT_PREFIX
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import kind_of, layer_weights
from shuntyard.exporter.safetensors_header import TensorEntry
from shuntyard.exporter.split import cut_large
from shuntyard.exporter.storage import (
    CACHE_SCALES,
    EXPERTS_NODE,
    Storage,
    apply_storage,
    functions_of,
    input_scale_name,
    scale_name,
    storage_of,
)
from shuntyard.exporter.weights import Experts, Stored, Weights
from shuntyard.plugins.contract import DOMAIN, DOMAIN_VERSION
from shuntyard.plugins.functions import OPSET

IR_VERSION = 11

COMPUTE_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

_WEIGHT_TYPES = {
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
    "F32": ir.DataType.FLOAT,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I32": ir.DataType.UINT4,  # packed INT4: the same bytes, see plugins/contract.py
}


WIDENED = "_widened"
"""What a quantised weight's name ends in behind the Cast that it goes through.

ONNX Runtime 1.32 refuses FP8 and UINT4 as inputs of functions, so a quantised weight is cast to fp16 before the call,
which is exact: e4m3 and small integers are fp16 numbers. Nothing else is done to it outside the functions.
"""

_QUANTIZED = (ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT4)


def initializer_name(entry: TensorEntry) -> str:
    """A tensor's own name, without the prefix that checkpoints with a vision tower have."""
    return entry.name.removeprefix(TEXT_PREFIX)


def _initializer(entry: TensorEntry) -> ir.Value:
    """A checkpoint tensor as external data: file name, offset and length, under its own name."""
    dtype, shape, name = _WEIGHT_TYPES[entry.dtype], entry.shape, initializer_name(entry)
    if dtype == ir.DataType.UINT4:
        shape = (*shape[:-1], shape[-1] * 8)
    tensor = ir.ExternalTensor(
        entry.file.name,
        entry.offset,
        entry.nbytes,
        dtype,
        shape=ir.Shape(shape),
        name=name,
        base_dir=str(entry.file.parent),
    )
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)


class _Functions:
    """The functions of a model: each part is traced once, and given the inputs of each way in which it is stored."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, Storage], ir.Function] = {}
        self._traced: dict[str, bytes] = {}

    def get(self, name: str, storage: Storage, make: Callable[[], ir.Function]) -> ir.Function:
        if (name, storage) not in self.made:
            if name not in self._traced:
                self._traced[name] = ir.to_proto(make()).SerializeToString()
            proto = onnx.FunctionProto.FromString(self._traced[name])
            function = ir.serde.deserialize_function(proto)
            apply_storage(function, storage)
            function.name = self._unique(name + storage.suffix)
            self.made[name, storage] = function
        return self.made[name, storage]

    def _unique(self, name: str) -> str:
        """TensorRT tells functions apart by their names alone."""
        taken = {function.name for function in self.made.values()}
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}{number}", number + 1
        return unique


class _Assembly:
    """The main graph while it grows."""

    def __init__(self, config: Llama4Config, dtype: ir.DataType, weights: Weights, products: Mapping[str, str]) -> None:
        self.config, self.dtype, self.weights, self.products = config, dtype, weights, products
        self.initializers: list[ir.Value] = []
        self.given: dict[str, ir.Value] = {}
        self.functions = _Functions()
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def value(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        self.inputs.append(self.value(name, dtype, *shape))
        return self.inputs[-1]

    def weight(self, entry: TensorEntry) -> ir.Value:
        """What a function gets for a stored tensor: the initializer itself, or its values in fp16."""
        name = initializer_name(entry)
        if name not in self.given:
            initializer = _initializer(entry)
            self.initializers.append(initializer)
            self.given[name] = initializer
            if initializer.dtype in _QUANTIZED:
                wide = ir.Value(
                    name=f"{name}{WIDENED}", type=ir.TensorType(ir.DataType.FLOAT16), shape=initializer.shape
                )
                to = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
                self.nodes.append(ir.Node("", "Cast", [initializer], [to], outputs=[wide], name=str(wide.name)))
                self.given[name] = wide
        return self.given[name]

    def call(
        self,
        part: str,
        make: Callable[[], ir.Function],
        name: str,
        inputs: list[ir.Value],
        outputs: list[ir.Value],
        linears: dict[str, Stored] | None = None,
        experts: Experts | None = None,
        kv_scales: tuple[TensorEntry, TensorEntry] | None = None,
    ) -> None:
        """Calls the function ``part`` as the node ``name``; the weights follow the inputs, as they are stored."""
        linears = linears or {}
        modules = {own: name if own == "lm_head.weight" else f"{name}.{own.removesuffix('.weight')}" for own in linears}
        if experts is not None:
            modules[EXPERTS_NODE] = f"{name}.{EXPERTS_NODE}"
        products = {own: self.products[module] for own, module in modules.items() if module in self.products}
        storage = storage_of(linears, experts, products, fp8_cache=kv_scales is not None)
        function = self.functions.get(part, storage, make)
        given: dict[str, TensorEntry] = {}
        for own, stored in linears.items():
            names = (own, scale_name(own), input_scale_name(own))
            given |= dict(zip(names, stored.entries(), strict=False))
        given |= dict(zip(CACHE_SCALES, kv_scales or (), strict=False))
        if experts is not None:
            form, prefix = experts.form, "feed_forward.experts"
            given |= {f"{prefix}.{n}": p.entry for n, p in zip(form.weight_names, experts.parts, strict=True)}
            scales = [p.scale for p in experts.parts if p.scale is not None]
            given |= {f"{prefix}.{n}": scale for n, scale in zip(form.scale_names, scales, strict=True)}
            inputs_scales = [p.input_scale for p in experts.parts if p.input_scale is not None]
            pairs = zip(form.activation_scale_names, inputs_scales, strict=True)
            given |= {f"{prefix}.{n}": scale for n, scale in pairs}
        wanted = [str(value.name) for value in function.inputs][len(inputs) :]
        if experts is not None and experts.form.overload == "":
            # Traced under the checkpoint's own names.
            given |= {f"{n}_proj": given[n] for n in ("feed_forward.experts.gate_up", "feed_forward.experts.down")}
        attribute = ir.AttrInt64(trace.DTYPE_ATTRIBUTE, int(self.dtype))
        inputs = [*inputs, *(self.weight(given[own]) for own in wanted)]
        self.nodes.append(ir.Node(DOMAIN, function.name, inputs, [attribute], outputs=outputs, name=name))

    def layer(self, i: int, hidden: ir.Value, places: list[ir.Value]) -> ir.Value:
        c, kind = self.config, kind_of(self.config, i)
        rows = "chunk" if kind.rope and c.attention_chunk_size is not None else "context"
        cache = ("batch", c.num_key_value_heads, rows, c.head_dim)
        name = f"model.layers.{i}"
        past = [self.input(f"past_key_values.{i}.{part}", self.dtype, *cache) for part in ("key", "value")]
        present = [self.value(f"present.{i}.{part}", self.dtype, *cache) for part in ("key", "value")]
        out = self.value(name, self.dtype, "batch", "sequence", c.hidden_size)
        inside = [f"{name}.{p}" for p in ("self_attn", "feed_forward", "input_layernorm", "post_attention_layernorm")]
        outputs = [out, *present, *(self.value(n, self.dtype, "batch", "sequence", c.hidden_size) for n in inside)]
        if kind.moe:
            moe = f"{name}.feed_forward"
            outputs.append(self.value(f"{moe}.router", ir.DataType.FLOAT, "tokens", c.num_local_experts))
            outputs.append(self.value(f"{moe}.shared_expert", self.dtype, "tokens", c.hidden_size))
        own = {
            weight: self.weights.linears[f"{name}.{weight}"]
            for weight in layer_weights(c, kind)
            if f"{name}.{weight}" in self.weights.linears
        }
        self.call(
            kind.function_name,
            partial(trace.layer_function, c, kind),
            name,
            [hidden, *places, *past],
            outputs,
            own,
            self.weights.experts.get(i),
            self.weights.kv_scales.get(i),
        )
        self.outputs += present
        return out


def build_model(
    config: Llama4Config, weights: Weights, dtype: str, products: Mapping[str, str] | None = None
) -> ir.Model:
    """The whole model, computing in ``dtype`` (``fp32``, ``fp16`` or ``bf16``).

    ``products`` names modules whose product is computed in a type of its own, ``fp32`` or ``fp16``.
    """
    weights = cut_large(weights)
    i64, f32, compute = ir.DataType.INT64, ir.DataType.FLOAT, COMPUTE_TYPES[dtype]
    g = _Assembly(config, compute, weights, products or {})
    input_ids = g.input("input_ids", i64, "batch", "sequence")
    position_ids = g.input("position_ids", i64, "batch", "sequence")
    logits_indices = g.input("logits_indices", i64, "batch", "outputs")
    hidden = g.value("model.embed_tokens", compute, "batch", "sequence", config.hidden_size)
    embedding = weights.linears["model.embed_tokens.weight"]
    g.call(
        "Llama4Embedding",
        partial(trace.embedding_function, config),
        "model.embed_tokens",
        [input_ids],
        [hidden],
        {"weight": embedding},
    )
    rope_places: list[ir.Value] = []
    if any(config.uses_rope(i) for i in range(config.num_hidden_layers)):
        half = config.head_dim // 2
        slots = g.value("rotary.slots", i64, "batch", "sequence")
        angles = [g.value(f"rotary.{name}", f32, "batch", "sequence", half) for name in ("cos", "sin")]
        rope_places = [slots, *angles]
        g.call(
            "Llama4RotaryTable", partial(trace.rotary_function, config), "model.rotary_emb", [position_ids], rope_places
        )
    for i in range(config.num_hidden_layers):
        hidden = g.layer(i, hidden, rope_places if config.uses_rope(i) else [position_ids])
    logits = g.value("logits", f32, "batch", "outputs", config.vocab_size)
    head = {
        "norm.weight": weights.linears["model.norm.weight"],
        "lm_head.weight": embedding if config.tie_word_embeddings else weights.linears["lm_head.weight"],
    }
    g.call("Llama4Head", partial(trace.head_function, config), "lm_head", [hidden, logits_indices], [logits], head)
    functions = [*g.functions.made.values(), *functions_of(weights)]
    graph = ir.Graph(
        g.inputs,
        [logits, *g.outputs],
        nodes=g.nodes,
        initializers=g.initializers,
        opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION},
        name="llama4",
    )
    for function in functions:
        function.opset_imports.update({"": OPSET, DOMAIN: DOMAIN_VERSION})
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="shuntyard", functions=functions)


def mark(model: ir.Model) -> list[str]:
    """Makes outputs of the graph of all values in between, in place; returns their names.

    A builder fuses less around an output: a marked engine is for looking inside, not for use.
    """
    taken = set(model.graph.outputs)
    inside = [
        value
        for node in model.graph
        for value in node.outputs
        if str(value.name).startswith(("model.embed_tokens", "model.layers.")) and value not in taken
    ]
    inside = [value for value in inside if not str(value.name).endswith(WIDENED)]
    model.graph.outputs.extend(inside)
    return [str(value.name) for value in inside]


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
        name = str(value.name)
        is_fixed = name in keep or name.startswith("rotary.") or name.endswith((".router", WIDENED))
        if value.dtype == old and not is_fixed:
            value.dtype = new
