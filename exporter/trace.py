"""Traces each part of the model once with ``torch.export`` and turns it into an ONNX function.

Weights are inputs of the functions, so a kind of layer is traced once however many layers are of it, from
fake tensors: no weight is ever loaded. Functions are generic over the compute type: they are traced with fp16
for it and bf16 for the weights, two types that nothing else uses, so every cast to fp16 is a cast to the compute
type, and becomes ``Cast(to=@dtype)`` with ``dtype`` an attribute of the function.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shuntyard.exporter import model
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import LayerKind, layer_weights
from shuntyard.plugins import contract
from shuntyard.plugins.contract import (
    ATTRIBUTE_KINDS,
    DOMAIN,
    DOMAIN_VERSION,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    ExpertsForm,
    Op,
)
from shuntyard.plugins.functions import OPSET

COMPUTE = torch.float16
WEIGHT = torch.bfloat16

DTYPE_ATTRIBUTE = "dtype"
"""Attribute of every function: the ONNX number of the compute type."""

_B, _S, _R = torch.export.Dim("batch"), torch.export.Dim("sequence"), torch.export.Dim("outputs")
_L = torch.export.Dim("rows")


@contextlib.contextmanager
def _schemas() -> Iterator[None]:
    """Tells onnx the private ops' schemas while onnxscript, which asks for them, translates; then takes them back.

    They must not stay: onnx's checker would refuse the plugin attributes, which the schemas do not have.
    """
    schema = onnx.defs.OpSchema
    types = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32", "int64")]
    for op in contract.OPS:
        # Layers are traced with plain, fused experts: two weights where the op takes lists.
        names = (*op.inputs, *(ExpertsForm(1).weight_names if op.variadic else ()))
        params = {name: f"T_{name}" for name in (*names, *op.outputs)}
        kinds = {float: schema.AttrType.FLOAT, str: schema.AttrType.STRING, int: schema.AttrType.INT}
        onnx.defs.register_schema(
            schema(
                op.name,
                DOMAIN,
                DOMAIN_VERSION,
                inputs=[schema.FormalParameter(name, params[name]) for name in names],
                outputs=[schema.FormalParameter(name, params[name]) for name in op.outputs],
                type_constraints=[(param, types, "") for param in params.values()],
                attributes=[
                    schema.Attribute(name, kinds[ATTRIBUTE_KINDS.get(name, int)], required=True)
                    for name in op.attributes
                ],
            )
        )
    try:
        yield
    finally:
        for op in contract.OPS:
            onnx.defs.deregister_schema(op.name, DOMAIN_VERSION, DOMAIN)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes a private op: as a node of the same name."""
    opset: Any = Opset(DOMAIN, DOMAIN_VERSION)

    def routing(logits: Any, top_k: int) -> Any:
        return opset.ShuntyardMoeRouting(logits, top_k=top_k)

    def moe_experts(
        x: Any,
        scores: Any,
        offsets: Any,
        permutation: Any,
        weights: Any,
        scales: Any,
        activation_scales: Any,
        top_k: int,
        experts: int,
        layout: str,
        group_size: int,
        activations: str,
    ) -> Any:
        assert not scales and not activation_scales
        form: dict[str, Any] = {"top_k": top_k, "experts": experts, "layout": layout}
        form |= {"group_size": group_size, "activations": activations}
        return opset.ShuntyardMoeExperts(x, scores, offsets, permutation, *weights, **form)

    def scatter_add(base: Any, rows: Any, permutation: Any, top_k: int) -> Any:
        return opset.ShuntyardMoeScatterAdd(base, rows, permutation, top_k=top_k)

    def attention(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, slots: Any, scale: float) -> Any:
        return opset.ShuntyardCachedAttention(q, k, v, past_k, past_v, slots, scale=scale)

    def dequantize(weight: Any, scale: Any, group_size: int) -> Any:
        raise AssertionError("layers are traced with plain weights")

    def quantize(x: Any, scale: Any) -> Any:
        raise AssertionError("layers are traced with plain activations")

    table: dict[Op, Callable[..., Any]] = {
        contract.ROUTING: routing,
        contract.EXPERTS: moe_experts,
        contract.SCATTER_ADD: scatter_add,
        contract.CACHED_ATTENTION: attention,
        contract.DEQUANTIZE: dequantize,
        contract.QUANTIZE: quantize,
    }
    return {_torch_overload(op): translate for op, translate in table.items()}


def _torch_overload(op: Op) -> Callable[..., Any]:
    overload: Callable[..., Any] = getattr(torch.ops.shuntyard, op.torch_name.split("::")[1]).default
    return overload


class _Part(nn.Module):
    """A function of positional tensors, as the module that torch.export wants."""

    def __init__(self, forward: Callable[..., Any], tables: nn.Module | None = None) -> None:
        super().__init__()
        self.run = forward
        self.tables = tables

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx reports on stdout and warns about packages that it does not need; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace_function(
    name: str,
    part: nn.Module,
    inputs: dict[str, tuple[tuple[Any, ...], torch.dtype]],
    outputs: Sequence[str],
) -> ir.Function:
    """Traces ``part`` into a function called ``name``.

    ``inputs`` maps each input to its shape, whose dynamic entries are ``torch.export.Dim``, and type.
    """
    dims = {_B: 3, _S: 5, _R: 7, _L: 11}  # any sizes: distinct, so that no two are taken for one
    with FakeTensorMode(allow_non_fake_inputs=True):
        examples = tuple(torch.empty([dims.get(n, n) for n in shape], dtype=dtype) for shape, dtype in inputs.values())
    dynamic = ({i: n for i, n in enumerate(shape) if n in dims} for shape, _ in inputs.values())
    with _quiet(), _schemas():
        program = torch.export.export(part, examples, dynamic_shapes=(tuple(dynamic),), strict=False)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=_translations(), verbose=False
        )
    assert exported is not None
    graph = exported.model.graph
    _name_values(graph, list(inputs), outputs)
    _constants_into_body(graph)
    _generic_over_dtype(graph)
    _name_products(graph)
    _mark_private(graph)
    attribute = ir.Attr(DTYPE_ATTRIBUTE, ir.AttributeType.INT, None)
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[attribute])


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        if value.producer() is None:
            raise AssertionError(f"output {name} of the traced part is one of its inputs")
        value.name = name
    # Functions are untyped: types were right for the traced ones only; and where torch found what is nobody's business.
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        value.metadata_props.clear()
        value.type = value.shape = None


def _constants_into_body(graph: ir.Graph) -> None:
    """A function has no initializers: each becomes a Constant node."""
    first = graph[0]
    for value in list(graph.initializers.values()):
        node = ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, value.const_value)])
        node.outputs[0].name = value.name
        graph.insert_before(first, node)
        value.replace_all_uses_with(node.outputs[0])
        graph.initializers.pop(value.name)  # type: ignore[arg-type]


def _generic_over_dtype(graph: ir.Graph) -> None:
    """Case 1: a cast to the traced compute type follows the attribute. Case 2: a constant of it is a defect."""
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
            node.attributes.add(ir.RefAttr("to", DTYPE_ATTRIBUTE, ir.AttributeType.INT))
        if node.op_type == "Constant":
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                raise AssertionError(f"constant {tensor} is of the compute type: compute with it in fp32")


def _name_products(graph: ir.Graph) -> None:
    """Calls each product after the weight that it multiplies with, as ``self_attn.q_proj``.

    These names come back in a TensorRT plan's layers, where they say which precision a module was built in.
    """
    for node in graph:
        if node.op_type != "MatMul":
            continue
        source = node.inputs[1]
        while source is not None and (producer := source.producer()) is not None:
            source = producer.inputs[0]
        if source is None or not str(source.name).endswith(".weight"):
            raise AssertionError(f"product {node.name} multiplies with no weight")
        node.name = str(source.name).removesuffix(".weight")


def _mark_private(graph: ir.Graph) -> None:
    """Names the private nodes, and on each that has one its plugin: TensorRT then prefers it to the function's body.

    A plan's layers show the names of nodes and not of plugins, so a plugin's node is called as the plugin is.
    """
    plugins = {op.name for op in contract.PLUGINS}
    for node in graph:
        if node.domain != DOMAIN:
            continue
        node.name = node.op_type if node.op_type in plugins else "self_attn"
        if node.op_type in plugins:
            node.attributes.add(ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE))
            node.attributes.add(ir.AttrString("plugin_version", PLUGIN_VERSION))


def layer_function(config: Llama4Config, kind: LayerKind) -> ir.Function:
    """The function of one kind of layer: hidden, places, past, then weights by ``parameters.layer_weights``."""
    weights = layer_weights(config, kind)
    groups, head_dim = config.num_key_value_heads, config.head_dim
    places: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {"slots": ((_B, _S), torch.int64)}
    if kind.rope:
        places |= dict.fromkeys(("cos", "sin"), ((_B, _S, head_dim // 2), torch.float32))
    count = len(places)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        hidden, past = tensors[0], (tensors[1 + count], tensors[2 + count])
        own = dict(zip(weights, tensors[3 + count :], strict=True))
        out = model.decoder_layer(config, kind, own, hidden, tensors[1 : 1 + count], past)
        return tuple(tensor for tensor in out if tensor is not None)

    cache = ((_B, groups, _L, head_dim), COMPUTE)
    inputs: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
        "hidden": ((_B, _S, config.hidden_size), COMPUTE),
        **places,
        "past_key": cache,
        "past_value": cache,
        **{name: (shape, WEIGHT) for name, shape in weights.items()},
    }
    outputs = [
        "hidden_out",
        "present_key",
        "present_value",
        "attention",
        "feed_forward",
        "input_norm",
        "post_attention_norm",
    ]
    if kind.moe:
        outputs += ["router_logits", "shared_expert"]
    return trace_function(kind.function_name, _Part(run), inputs, outputs)


def rotary_function(config: Llama4Config) -> ir.Function:
    """``position_ids`` -> ``slots, cos, sin`` of the RoPE layers."""
    table = model.RotaryTable(config)
    inputs = {"position_ids": ((_B, _S), torch.int64)}
    return trace_function("Llama4RotaryTable", _Part(table.forward, table), inputs, ["slots", "cos", "sin"])


def embedding_function(config: Llama4Config) -> ir.Function:
    """``input_ids, weight`` -> ``hidden``."""
    inputs = {
        "input_ids": ((_B, _S), torch.int64),
        "weight": ((config.vocab_size, config.hidden_size), WEIGHT),
    }
    part = _Part(lambda ids, weight: model.embed(ids, weight, COMPUTE))
    return trace_function("Llama4Embedding", part, inputs, ["hidden"])


def head_function(config: Llama4Config) -> ir.Function:
    """``hidden, logits_indices, norm, lm_head`` -> ``logits``."""
    hidden, vocab = config.hidden_size, config.vocab_size
    inputs = {
        "hidden": ((_B, _S, hidden), COMPUTE),
        "logits_indices": ((_B, _R), torch.int64),
        "norm.weight": ((hidden,), WEIGHT),
        "lm_head.weight": ((vocab, hidden), WEIGHT),
    }
    return trace_function(
        "Llama4Head", _Part(lambda x, i, norm, lm: model.head(config, x, i, norm, lm)), inputs, ["logits"]
    )
