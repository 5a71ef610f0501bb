"""The layer table of an engine: what was really built, layer by layer.

For TensorRT it is read back from the builder's verbose log, which ends with one line a layer::

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Datatype: BFloat16, … } ], Constants: […], Outputs: […],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: node_matmul | model.layers.0 (Llama4RopeMoeLayer)]

The last part of each ``ONNX Layer`` names the call in our graph, and so the checkpoint's module.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from shuntyard.errors import EngineError
from shuntyard.exporter.graph import COMPUTE_TYPES
from shuntyard.exporter.trace import DTYPE_ATTRIBUTE
from shuntyard.plugins.contract import DOMAIN, PLUGINS

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+, Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

_TENSORRT_TYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "Int32": "int32", "Int64": "int64"}


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the types of what it reads and writes, and the modules of the checkpoint it computes."""

    name: str
    kind: str
    inputs: list[str]
    constants: list[str]
    outputs: list[str]
    modules: list[str]
    plugin: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``layers.json``."""
        return asdict(self)


def _types(text: str) -> list[str]:
    return [_TENSORRT_TYPES.get(name, name.lower()) for name in _DATATYPE.findall(text)]


def _modules(metadata: str) -> list[str]:
    calls = (origin.rsplit("|", 1)[-1].strip().split(" ", 1)[0] for origin in _ORIGIN.findall(metadata))
    return list(dict.fromkeys(calls))


def parse_tensorrt_log(log: str) -> list[Layer]:
    """The layers of the last dump in a builder's log.

    Raises:
        EngineError: the log has no dump, or one in another form than the one above.
    """
    lines = [line for line in log.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    layers = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            raise EngineError(f"the builder's layer dump has a line in an unknown form: {line[:160]}")
        plugin = next((op.name for op in PLUGINS if op.name in f"{match['name']} {match['metadata']}"), None)
        is_plugin = "plugin" in match["type"].lower()
        layers.append(
            Layer(
                name=match["name"],
                kind=match["type"],
                inputs=_types(match["inputs"]),
                constants=_types(match["constants"]),
                outputs=_types(match["outputs"]),
                modules=_modules(match["metadata"]),
                plugin=plugin if is_plugin else None,
            )
        )
    if not layers:
        raise EngineError("the builder's log has no layer dump", hint="keep profiling verbosity at DETAILED")
    return layers


def graph_layers(model: ir.Model) -> list[Layer]:
    """The layer table of a graph that a runtime takes as it is: one entry a function call."""
    names = {int(dtype): name for name, dtype in COMPUTE_TYPES.items()}
    layers = []
    for node in model.graph:
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
        function.name: Counter(n.op_type for n in function if n.domain == DOMAIN and n.op_type in plugin_names)
        for function in model.functions.values()
    }
    total: Counter[str] = Counter()
    for node in model.graph:
        total.update(inside.get(node.op_type, Counter()))
    return total


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
                hint="see build.log; the engine would not compute what was asked",
            )
    return {str(name): count for name, count in sorted(built.items(), key=str)}


def check_precision(layers: list[Layer], dtype: str, modules: list[str]) -> dict[str, str]:
    """Holds what the plan computes in to what was asked: returns module -> compute type.

    A module's compute type shows in its matrix products and plugins: those must read and write the asked
    type (the router's product, in fp32 by contract, apart). fp32 in between (norms, rotation) is wanted.

    Raises:
        EngineError: a module runs in another type, or none of its layers can be found in the plan.
    """
    found: dict[str, set[str]] = {module: set() for module in modules}
    floats = {"fp32", "fp16", "bf16", "fp8"}
    for layer in layers:
        for module in layer.modules:
            if module in found:
                found[module].update(t for t in (*layer.inputs, *layer.constants, *layer.outputs) if t in floats)
    allowed = {dtype, "fp32"}
    for module, types in found.items():
        if dtype not in types:
            raise EngineError(f"no layer of module {module} computes in {dtype}; the plan has {sorted(types) or 'none'}")
        if types - allowed:
            raise EngineError(f"module {module} computes in {sorted(types - allowed)}, asked for was {dtype}")
    return {module: dtype for module in modules}
