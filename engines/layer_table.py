"""The layer table of an engine: what was really built, layer by layer.

For TensorRT it is read back from the builder's verbose log, which ends with one line a layer::

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Datatype: BFloat16, … } ], Constants: […], Outputs: […],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: self_attn.q_proj | model.layers.0 (Llama4RopeMoeLayer)]

Layers of kind ``signal`` and ``wait`` compute nothing: they join streams, and have an ``EventId`` after the stream's.
Each ``ONNX Layer`` is a node that the layer computes, innermost first, and so names the checkpoint's module.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from shuntyard.errors import EngineError
from shuntyard.exporter.graph import COMPUTE_TYPES
from shuntyard.exporter.trace import DTYPE_ATTRIBUTE
from shuntyard.plugins.contract import EXPERTS, PLUGINS

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
    "Bool": "bool",
    "UInt8": "uint8",
}
UNKNOWN_FORM = "this version of TensorRT writes its log differently; what it built cannot be checked"

PLUGIN_KINDS = frozenset({"customlayer", "pluginv3"})
"""What TensorRT-RTX and TensorRT call a plugin's layer."""


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
    """Raises EngineError for a type that nobody has seen there: it could be one that a product was narrowed to."""
    found = _DATATYPE.findall(text)
    if strange := [name for name in found if name not in _TENSORRT_TYPES]:
        raise EngineError(f"the builder's layer dump has a type that is not known: {strange[0]}", hint=UNKNOWN_FORM)
    return [_TENSORRT_TYPES[name] for name in found]


def _origins(metadata: str) -> list[str]:
    """Each node's path, outermost call first."""
    paths = (origin.split("|") for origin in _ORIGIN.findall(metadata))
    return list(dict.fromkeys(join(*(part.strip().split(" ", 1)[0] for part in reversed(path))) for path in paths))


def join(*parts: str) -> str:
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


_IN_THE_PLAN = re.compile(rf"{EXPERTS.name} in the plan: (\S+) with activations (\w+)$", re.MULTILINE)


def experts_activations(log: str) -> dict[str, set[str]]:
    """What the experts' plugin says that it does with its rows, by module, as it is written into the plan."""
    found: dict[str, set[str]] = {}
    for module, kind in _IN_THE_PLAN.findall(log):
        found.setdefault(module, set()).add(kind)
    return found


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
