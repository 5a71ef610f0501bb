"""Gives a traced layer function the inputs of weights as they are stored.

A function is traced with plain weights, experts fused. Case 1, a quantised matrix: the input gets its scale beside
it, and a ``ShuntyardDequantize`` stands where the weight was used. Case 2, experts in another form: the inputs of the
function and of its experts node become the lists of that form; the experts op takes all forms itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from shuntyard.exporter.weights import Experts, Stored, Weights
from shuntyard.plugins.contract import DEQUANTIZE, DOMAIN, EXPERTS, ExpertsForm, Op
from shuntyard.plugins.functions import all_functions

FUSED_EXPERTS = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
"""The inputs of a traced function that become the lists of the experts' form."""

_WORDS = {"none": "", "tensor": "Fp8", "channel": "Fp8", "group": "Int4"}


@dataclass(frozen=True)
class Storage:
    """How the weights of one function are stored: those that are quantised, and the experts."""

    quantized: tuple[tuple[str, str, int], ...] = ()  # name, form, group size
    experts: ExpertsForm | None = None

    @property
    def suffix(self) -> str:
        """Words for a function's name: ``LinearInt4``; nothing for plain weights and fused experts."""
        words = ""
        if self.experts is not None:
            layout = "" if self.experts.layout == "fused" else self.experts.layout.title()
            words = layout + _WORDS[self.experts.quantization]
        if self.quantized:
            words += "On" + "And".join(dict.fromkeys(_WORDS[form] for _, form, _ in self.quantized))
        return words


def storage_of(weights: Mapping[str, Stored], experts: Experts | None) -> Storage:
    """The storage of a function's weights, by the names of its inputs."""
    quantized = tuple((n, s.form, s.group_size) for n, s in weights.items() if s.form != "none")
    return Storage(quantized, None if experts is None else experts.form)


def scale_name(name: str) -> str:
    """The input that holds the scale of the input ``name``."""
    return f"{name}_scale"


def apply_storage(function: ir.Function, storage: Storage) -> None:
    """Rewrites ``function`` in place for weights that are stored so."""
    if storage.quantized:
        _dequantize(function, storage)
    if storage.experts is not None:
        _give_experts(function, storage.experts)


def _dequantize(function: ir.Function, storage: Storage) -> None:
    """Case 1."""
    inputs = list(function.inputs)
    for name, form, group_size in storage.quantized:
        place, weight = next((i, value) for i, value in enumerate(inputs) if value.name == name)
        scale = ir.Value(name=scale_name(name))
        node = ir.Node(
            DOMAIN,
            overloaded(DEQUANTIZE, form),
            [weight, scale],
            [ir.AttrInt64("group_size", group_size)],
            name=f"{name}_dequantized",
        )
        node.outputs[0].name = f"{name}_dequantized"
        weight.replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, weight)
        function.insert_before(function[0], node)
        inputs.insert(place + 1, scale)
    _set_inputs(function, inputs)


def _give_experts(function: ir.Function, form: ExpertsForm) -> None:
    """Case 2."""
    node = next(node for node in function if node.op_type == EXPERTS.name and node.domain == DOMAIN)
    if form == ExpertsForm(form.experts):
        return
    lists = [ir.Value(name=f"feed_forward.experts.{own}") for own in (*form.weight_names, *form.scale_names)]
    fixed = len(EXPERTS.inputs)
    attributes = [
        *(node.attributes[name] for name in node.attributes if name not in ("layout", "group_size")),
        ir.AttrString("layout", form.layout),
        ir.AttrInt64("group_size", form.group_size),
    ]
    new = ir.Node(
        node.domain,
        overloaded(EXPERTS, form.overload),
        [*node.inputs[:fixed], *lists],
        attributes,
        name=node.name,
    )
    new.outputs[0].name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(new.outputs[0])
    function.insert_after(node, new)
    function.remove(node, safe=True)
    inputs: list[ir.Value] = []
    for value in function.inputs:
        if value.name == FUSED_EXPERTS[0]:
            inputs += lists
        elif value.name != FUSED_EXPERTS[1]:
            inputs.append(value)
    _set_inputs(function, inputs)


def _set_inputs(function: ir.Function, inputs: list[ir.Value]) -> None:
    function.inputs.clear()
    function.inputs.extend(inputs)


def overloaded(op: Op, overload: str) -> str:
    """The name of an op's function for one form.

    ONNX has a field for the overload, but ONNX Runtime 1.32 does not find a function by it within another function.
    """
    return f"{op.name}_{overload}" if overload else op.name


def op_of(op_type: str) -> str:
    """The name of the op that a function of this name is a form of."""
    return op_type.split("_", 1)[0]


def functions_of(weights: Weights) -> list[ir.Function]:
    """The functions of the private ops, in the forms that a model needs, each under a name of its own."""
    functions = all_functions(*forms_of(weights))
    for function in functions:
        function.name = f"{function.name}_{function.overload}" if function.overload else function.name
        function.overload = ""
    return functions


def forms_of(weights: Weights) -> tuple[set[ExpertsForm], set[str]]:
    """Which functions a model needs: the forms of its experts, and those of its dequantised matrices."""
    experts = {own.form for own in weights.experts.values()}
    return experts, {stored.form for stored in weights.linears.values() if stored.form != "none"}
