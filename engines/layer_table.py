"""The layer table of an engine: what was really built, layer by layer.

For TensorRT it is read back from the builder's verbose log, which ends with one line a layer::

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Datatype: BFloat16, … } ], Constants: […], Outputs: […],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: self_attn.q_proj | model.layers.0 (Llama4RopeMoeLayer)]

Layers of kind ``signal`` and ``wait`` compute nothing: they join streams, and have an ``EventId`` after the stream's.
A name ends with the number of its layer among those of one compiled graph, as ``_myl0_17``.
Each ``ONNX Layer`` is a node that the layer computes, innermost first, and so names the checkpoint's module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

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
_TENSOR = re.compile(r"\{ Name: ([^{}]*?), Dimensions: \[([-\d,]*)\], [^{}]*?Datatype: (\w+)")
_NUMBER = re.compile(r"_myl(\d+)_(\d+)$")
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

MIXED_KINDS = frozenset({"kgen", "runtime_fusion", "cast", "reshape", "shape_call", "signal", "wait"})
"""Kinds of layers that do other things beside a product, or none; a ``gemm`` is a product and nothing else."""


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
    matrices: list[str] = field(default_factory=list)
    """Types of what can be weights: of constants, and of what other layers make of constants alone, where two
    dimensions are above one."""

    def as_dict(self) -> dict[str, Any]:
        """For ``layers.json``."""
        return asdict(self)


class _Tensor(NamedTuple):
    name: str
    type: str
    is_matrix: bool


def _tensors(text: str) -> list[_Tensor]:
    """Raises EngineError for a type that nobody has seen there: it could be one that a product was narrowed to."""
    found = _TENSOR.findall(text)
    if not len(found) == text.count("Datatype: ") == text.count("{ Name: "):
        raise EngineError(
            f"the builder's layer dump has a tensor in an unknown form: {text.strip()[:160]}", hint=UNKNOWN_FORM
        )
    if strange := [kind for _, _, kind in found if kind not in _TENSORRT_TYPES]:
        raise EngineError(f"the builder's layer dump has a type that is not known: {strange[0]}", hint=UNKNOWN_FORM)
    return [
        _Tensor(name, _TENSORRT_TYPES[kind], sum(size != "1" for size in sizes.split(",") if size) > 1)
        for name, sizes, kind in found
    ]


def _origins(metadata: str) -> list[str]:
    """Each node's path, outermost call first."""
    paths = (origin.split("|") for origin in _ORIGIN.findall(metadata))
    return list(dict.fromkeys(join(*(part.strip().split(" ", 1)[0] for part in reversed(path))) for path in paths))


def join(*parts: str) -> str:
    """``model.layers.0`` and ``self_attn`` as one path; a call and its only product may share a name."""
    return ".".join(part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1])


def parse_tensorrt_log(log: str, inputs: Collection[str] | None = None, outputs: Collection[str] = ()) -> list[Layer]:
    """The layers of the dump in a builder's log, all of them: ``inputs`` and ``outputs`` are the network's.

    Nothing else in the log counts the layers. That no line is missing is told by the layers' own numbers and, where the
    network is given, by its values: what one layer reads, another writes, and all of ``outputs`` are written. A layer
    without a number, whose values nobody reads, can be lost unseen.

    Raises:
        EngineError: the log has no dump, one in another form than the one above, or one with lines missing.
    """
    lines = [line for line in log.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    parsed = [_parse(line) for line in lines]
    if not parsed:
        raise EngineError("the builder's log has no layer dump", hint=UNKNOWN_FORM)
    layers = [layer for layer, *_ in parsed]
    _check_numbers(layers)
    reads = {tensor.name: layer.name for layer, read, *_ in parsed for tensor in read}
    written = {tensor.name for *_, made in parsed for tensor in made}
    if inputs is not None and (unknown := min(reads.keys() - written - {*inputs}, default=None)) is not None:
        raise _lines_missing(f"no layer writes '{unknown}', which '{reads[unknown]}' reads")
    if lost := sorted({*outputs} - written):
        raise _lines_missing(f"no layer writes the network's '{lost[0]}'")
    prepared = {tensor.name for layer, read, made in parsed if layer.matrices and not read for tensor in made}
    for layer, read, _ in parsed:
        layer.matrices.extend(tensor.type for tensor in read if tensor.is_matrix and tensor.name in prepared)
    return layers


def _parse(line: str) -> tuple[Layer, list[_Tensor], list[_Tensor]]:
    """One layer, what it reads, and what it writes."""
    match = _LINE.match(line)
    if match is None:
        raise EngineError(f"the builder's layer dump has a line in an unknown form: {line[:160]}", hint=UNKNOWN_FORM)
    name, kind = match["name"], match["type"]
    is_plugin = kind.lower().replace("_", "") in PLUGIN_KINDS
    if not is_plugin and kind not in MIXED_KINDS | {"gemm"}:
        raise EngineError(
            f"the builder's layer dump has a kind of layer that is not known: {kind}, of '{name}'", hint=UNKNOWN_FORM
        )
    read, constants, made = (_tensors(match[part]) for part in ("inputs", "constants", "outputs"))
    layer = Layer(
        name=name,
        kind=kind,
        inputs=[tensor.type for tensor in read],
        constants=[tensor.type for tensor in constants],
        outputs=[tensor.type for tensor in made],
        origins=_origins(match["metadata"]),
        plugin=next((op.name for op in PLUGINS if is_plugin and name.startswith(op.name)), None),
        matrices=[tensor.type for tensor in constants if tensor.is_matrix],
    )
    return layer, read, made


def _lines_missing(why: str) -> EngineError:
    return EngineError(f"the builder's layer dump has lines missing: {why}", hint=UNKNOWN_FORM)


def _check_numbers(layers: Sequence[Layer]) -> None:
    """Raises EngineError where the numbers of a graph's layers have gaps, or come twice."""
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        if number := _NUMBER.search(layer.name):
            numbers.setdefault(number[1], []).append(int(number[2]))
    for graph, found in numbers.items():
        if (there := sorted(found)) != list(range(len(found))):
            wrong = next(i for i, number in enumerate(there) if number != i)
            raise _lines_missing(f"of those of graph {graph}, number {wrong} is not there, or one before it is twice")


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
