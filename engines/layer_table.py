"""The layer table of an engine: what was really built, layer by layer.

For TensorRT it is read back from the builder's verbose log, which ends with one line a layer::

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Datatype: BFloat16, … } ], Constants: […], Outputs: […],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: self_attn.q_proj | model.layers.0 (Llama4RopeMoeLayer)]

Layers of kind ``signal`` and ``wait`` compute nothing: they join streams, and have an ``EventId`` after the stream's.
Each ``ONNX Layer`` is a node that the layer computes, innermost first, and so names the checkpoint's module.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from shuntyard.errors import EngineError
from shuntyard.exporter.graph import COMPUTE_TYPES
from shuntyard.exporter.storage import op_of
from shuntyard.exporter.trace import DTYPE_ATTRIBUTE
from shuntyard.plugins.contract import CACHED_ATTENTION, DOMAIN, EXPERTS, PLUGINS, ROUTING, SCATTER_ADD

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+, (?:EventId: -?\d+, )?"
    r"Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

_TENSORRT_TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "FP8": "fp8",
    "Int4": "int4",
    "Int32": "int32",
    "Int64": "int64",
}
_FLOATS = frozenset({"fp32", "fp16", "bf16", "fp8", "int4"})
"""Types of values; INT4 stands for weights that are numbers, not indices."""

NOT_ASKED = "the plan is not what was asked for"
UNKNOWN_FORM = "this version of TensorRT writes its log differently; what it built cannot be checked"

PLUGIN_KINDS = frozenset({"customlayer", "pluginv3"})
"""What TensorRT-RTX and TensorRT call a plugin's layer."""

ROUTER = "feed_forward.router"
"""The product that computes in fp32 whatever the engine's type is."""


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the types of what it reads and writes, and the nodes of the graph that it computes."""

    name: str
    kind: str
    inputs: list[str]
    constants: list[str]
    outputs: list[str]
    origins: list[str]  # as model.layers.0.self_attn.q_proj
    plugin: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``layers.json``."""
        return asdict(self)


def _types(text: str) -> list[str]:
    return [_TENSORRT_TYPES.get(name, name.lower()) for name in _DATATYPE.findall(text)]


def _origins(metadata: str) -> list[str]:
    """Each node's path, outermost call first."""
    paths = (origin.split("|") for origin in _ORIGIN.findall(metadata))
    return list(dict.fromkeys(_join(*(part.strip().split(" ", 1)[0] for part in reversed(path))) for path in paths))


def _join(*parts: str) -> str:
    """``model.layers.0`` and ``self_attn`` as one path; a call and its only product may share a name."""
    return ".".join(part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1])


def parse_tensorrt_log(log: str) -> list[Layer]:
    """The layers of the dump in a builder's log.

    Raises:
        EngineError: the log has no dump, or one in another form than the one above.
    """
    lines = [line for line in log.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    layers = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            raise EngineError(
                f"the builder's layer dump has a line in an unknown form: {line[:160]}", hint=UNKNOWN_FORM
            )
        is_plugin = match["type"].lower().replace("_", "") in PLUGIN_KINDS
        layers.append(
            Layer(
                name=match["name"],
                kind=match["type"],
                inputs=_types(match["inputs"]),
                constants=_types(match["constants"]),
                outputs=_types(match["outputs"]),
                origins=_origins(match["metadata"]),
                plugin=next((op.name for op in PLUGINS if is_plugin and match["name"].startswith(op.name)), None),
            )
        )
    if not layers:
        raise EngineError("the builder's log has no layer dump", hint=UNKNOWN_FORM)
    return layers


def graph_layers(model: ir.Model) -> list[Layer]:
    """The layer table of a graph that a runtime takes as it is: one entry a function call."""
    names = {int(dtype): name for name, dtype in COMPUTE_TYPES.items()}
    layers = []
    for node in model.graph:
        if DTYPE_ATTRIBUTE not in node.attributes:
            continue  # a quantised weight, widened
        compute = names[node.attributes[DTYPE_ATTRIBUTE].as_int()]
        constants = [_short(v.dtype) for v in node.inputs if v is not None and v.is_initializer()]
        plain = [_short(v.dtype) for v in node.inputs if v is not None and not v.is_initializer()]
        outputs = [_short(v.dtype) for v in node.outputs]
        layers.append(Layer(str(node.name), f"{node.op_type}<{compute}>", plain, constants, outputs, [str(node.name)]))
    return layers


def _short(dtype: ir.DataType | None) -> str:
    names = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    return "?" if dtype is None else names.get(dtype, dtype.name.lower())


def expected_plugins(model: ir.Model) -> Counter[str]:
    """How many nodes of each plugin op the whole graph runs, counting through its function calls."""
    plugin_names = {op.name for op in PLUGINS}
    inside = {
        function.name: Counter(
            op_of(n.op_type) for n in function if n.domain == DOMAIN and op_of(n.op_type) in plugin_names
        )
        for function in model.functions.values()
    }
    total: Counter[str] = Counter()
    for node in model.graph:
        total.update(inside.get(node.op_type, Counter()))
    return total


def expected_precision(model: ir.Model, dtype: str) -> dict[str, str]:
    """What each product, attention and plugin of the graph is to compute in: path -> type."""
    paths = {CACHED_ATTENTION.name: "self_attn.attention", **{op.name: op.name for op in PLUGINS}}
    inside = {
        function.name: [
            paths.get(op_of(node.op_type), str(node.name))
            for node in function
            if node.op_type == "MatMul" or op_of(node.op_type) in paths
        ]
        for function in model.functions.values()
        if op_of(function.name) not in paths
    }
    in_fp32 = {ROUTER, ROUTING.name}
    return {
        _join(str(call.name), node): "fp32" if node in in_fp32 else dtype
        for call in model.graph
        for node in inside.get(call.op_type, [])
    }


def stored_types(model: ir.Model) -> dict[str, str]:
    """Which weights a product may read beside its own type, because they are stored quantised: path -> type."""
    names = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT4: "int4", ir.DataType.UINT4: "int4"}
    return {
        str(value.name).rsplit(".weight", 1)[0]: names[value.dtype]
        for value in model.graph.initializers.values()
        if value.dtype in names
    }


def check_plugins(layers: list[Layer], expected: Counter[str]) -> dict[str, int]:
    """Holds the plugins in the plan to those in the graph.

    Raises:
        EngineError: a plugin is missing, or there as often as it should not be.
    """
    built = Counter(layer.plugin for layer in layers if layer.plugin is not None)
    for name in sorted(set(expected) | set(built)):
        if built[name] != expected[name]:
            raise EngineError(
                f"the plan has {built[name]} layers of plugin {name}, the graph asks for {expected[name]}",
                hint=NOT_ASKED,
            )
    return {str(name): count for name, count in sorted(built.items(), key=str)}


def check_precision(layers: list[Layer], expected: dict[str, str], stored: dict[str, str]) -> None:
    """Holds what the plan computes in to what was asked; ``stored`` has the types of quantised weights.

    Every product, attention and plugin of the graph must be found in the plan, in layers that read its type; such a
    layer may read fp32 beside it (a norm that is fused with it, the scales of a product), but a plain ``gemm`` or a
    plugin must not. What lies between (norms, rotation, residuals) may be the asked type or fp32.

    Raises:
        EngineError: a node is in another type, or cannot be found in the plan.
    """
    found = dict.fromkeys(expected, False)
    for layer in layers:
        for path in expected.keys() & set(layer.origins):
            found[path] |= _shows(layer, path, expected[path], stored.get(path))
    for path, is_there in found.items():
        if not is_there:
            raise EngineError(f"no layer of the plan shows that it computes {path} in {expected[path]}", hint=NOT_ASKED)
    for layer in layers:
        floats = {t for t in (*layer.inputs, *layer.outputs) if t in _FLOATS}
        others = floats - {"fp32", *expected.values()}
        if others:
            names = ", ".join(sorted(others))
            raise EngineError(f"layer '{layer.name}' computes in {names}, which nobody asked for", hint=NOT_ASKED)


def _shows(layer: Layer, path: str, dtype: str, stored: str | None) -> bool:
    """Whether ``layer`` proves that ``path`` is computed in ``dtype``, from weights that may be of type ``stored``.

    Raises:
        EngineError: it proves that it is not.
    """
    activations = {t for t in layer.inputs if t in _FLOATS}
    weights = {t for t in layer.constants if t in _FLOATS}
    if layer.plugin in (EXPERTS.name, SCATTER_ADD.name):
        activations, weights = {layer.inputs[0]}, set()  # scores are fp32, weights of the checkpoint's type
    allowed = {dtype} if layer.kind == "gemm" or layer.plugin else {dtype, "fp32"}
    if activations - allowed or weights - {dtype, "fp32", stored}:
        read = ", ".join(sorted(activations | weights))
        raise EngineError(
            f"{path} was to compute in {dtype}, but layer '{layer.name}' ({layer.kind}) reads {read}", hint=NOT_ASKED
        )
    return dtype in activations | weights
