"""Gives a traced layer function the inputs of weights as they are stored, and its products the types they are to have.

A function is traced with plain weights, experts fused. Case 1, a quantised matrix: the input gets its scale beside
it, and a ``ShuntyardDequantize`` stands where the weight was used. Case 2, its activations are quantised too: a
``ShuntyardQuantize`` stands before the product, which is then one of e4m3 numbers in fp32, scaled behind it. Case 3, a
product that is to be computed in a type of its own: casts stand around it. Case 4, experts in another form: the inputs
of the function and of its experts node become the lists of that form; the experts op takes all forms itself. Case 5, an
FP8 KV cache: keys and values are rounded to e4m3 numbers, times their scale, before they are cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from shuntyard.exporter.trace import DTYPE_ATTRIBUTE
from shuntyard.exporter.weights import Experts, Stored, Weights
from shuntyard.plugins.contract import CACHED_ATTENTION, DEQUANTIZE, DOMAIN, EXPERTS, QUANTIZE, ExpertsForm, Op
from shuntyard.plugins.functions import all_functions

FUSED_EXPERTS = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
"""The inputs of a traced function that become the lists of the experts' form."""

EXPERTS_NODE = "feed_forward.experts"
"""The experts of a layer, among its weights."""

_WORDS = {"none": "", "tensor": "Fp8", "channel": "Fp8", "group": "Int4"}
_ACTIVATIONS = {"none": "", "static": "Static", "dynamic": "Dynamic"}

PRODUCT_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
"""Types that a product can be given, whatever the engine's is."""


class Linear(NamedTuple):
    """How one matrix of a function is stored and multiplied, where that is not plainly and in the engine's type."""

    name: str  # of the function's input
    form: str  # none, tensor, channel, group
    group_size: int
    activations: str  # none, static, dynamic
    product: str  # fp32, fp16, or empty: the engine's type

    @property
    def words(self) -> str:
        """For the name of a function."""
        return _WORDS[self.form] + _ACTIVATIONS[self.activations] + self.product.title()


@dataclass(frozen=True)
class Storage:
    """How the weights of one function are stored: those that are not plain, and the experts."""

    linears: tuple[Linear, ...] = ()
    experts: ExpertsForm | None = None
    experts_product: str = ""  # fp32, fp16, or empty: the engine's type
    fp8_cache: bool = False

    @property
    def suffix(self) -> str:
        """Words for a function's name: ``LinearInt4``; nothing for plain weights and fused experts."""
        words = ""
        if self.experts is not None:
            layout = "" if self.experts.layout == "fused" else self.experts.layout.title()
            words = layout + _WORDS[self.experts.quantization] + _ACTIVATIONS[self.experts.activations]
            words += self.experts_product.title()
        if self.linears:
            words += "On" + "And".join(dict.fromkeys(own.words for own in self.linears))
        return words + ("Fp8Cache" if self.fp8_cache else "")


def storage_of(
    weights: Mapping[str, Stored],
    experts: Experts | None,
    products: Mapping[str, str] | None = None,
    *,
    fp8_cache: bool = False,
) -> Storage:
    """The storage of a function's weights, by the names of its inputs; ``products``: those of a type of their own."""
    products = products or {}
    linears = (Linear(n, s.form, s.group_size, s.activations, products.get(n, "")) for n, s in weights.items())
    kept = tuple(own for own in linears if own.form != "none" or own.product)
    return Storage(kept, None if experts is None else experts.form, products.get(EXPERTS_NODE, ""), fp8_cache)


def scale_name(name: str) -> str:
    """The input that holds the scale of the input ``name``."""
    return f"{name}_scale"


def input_scale_name(name: str) -> str:
    """The input that holds the scale of what the input ``name`` is multiplied with."""
    return f"{name}_input_scale"


def apply_storage(function: ir.Function, storage: Storage) -> None:
    """Rewrites ``function`` in place for weights that are stored so."""
    shared: dict[ir.Value, tuple[ir.Value, ...]] = {}
    for linear in storage.linears:
        if linear.form != "none":
            _dequantize(function, linear)
        if linear.activations != "none":
            _quantize_activations(function, linear, shared)
        elif linear.product:
            _compute_in(function, linear)
    if storage.experts is not None:
        _give_experts(function, storage.experts)
        if storage.experts_product:
            _compute_experts_in(function, storage.experts_product)
    if storage.fp8_cache:
        _round_cache(function)


def _dequantize(function: ir.Function, linear: Linear) -> None:
    """Case 1."""
    inputs = list(function.inputs)
    name = linear.name
    place, weight = next((i, value) for i, value in enumerate(inputs) if value.name == name)
    scale = ir.Value(name=scale_name(name))
    node = ir.Node(
        DOMAIN,
        overloaded(DEQUANTIZE, linear.form),
        [weight, scale],
        [ir.AttrInt64("group_size", linear.group_size)],
        name=f"{name}_dequantized",
    )
    node.outputs[0].name = f"{name}_dequantized"
    weight.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, weight)
    function.insert_before(function[0], node)
    inputs.insert(place + 1, scale)
    _set_inputs(function, inputs)


def _product(function: ir.Function, name: str) -> tuple[ir.Node, ir.Node, ir.Node | None]:
    """The product with the weight ``name``, the Transpose of the weight, and the Cast before it, where there is one."""
    module = name.removesuffix(".weight")
    product = next(node for node in function if node.op_type == "MatMul" and node.name == module)
    weight = product.inputs[1]
    transpose = None if weight is None else weight.producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        raise AssertionError(f"the weight of product {module} is not turned as it was when this was written")
    cast = transpose.inputs[0].producer()
    return product, transpose, cast if cast is not None and cast.op_type == "Cast" else None


def _cast(function: ir.Function, before: ir.Node, value: ir.Value, to: ir.Attr, name: str) -> ir.Value:
    node = ir.Node("", "Cast", [value], [to], name=name)
    node.outputs[0].name = name
    function.insert_before(before, node)
    return node.outputs[0]


def _to_compute(function: ir.Function, value: ir.Value, name: str) -> None:
    """Behind ``value``, a cast to the engine's type, which everything else uses."""
    producer = value.producer()
    assert producer is not None
    node = ir.Node("", "Cast", [value], [ir.RefAttr("to", DTYPE_ATTRIBUTE, ir.AttributeType.INT)], name=name)
    node.outputs[0].name = name
    value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    node.replace_input_with(0, value)
    function.insert_after(producer, node)


def _quantize_activations(function: ir.Function, linear: Linear, shared: dict[ir.Value, tuple[ir.Value, ...]]) -> None:
    """Case 2. Products of the same tokens share what is quantised by token."""
    name, module = linear.name, linear.name.removesuffix(".weight")
    product, transpose, cast = _product(function, name)
    x = product.inputs[0]
    assert x is not None
    if linear.activations == "dynamic" and x in shared:
        codes, factor = shared[x]
    else:
        given = [x]
        if linear.activations == "static":
            inputs = list(function.inputs)
            place = next(i for i, value in enumerate(inputs) if value.name == scale_name(name))
            given.append(ir.Value(name=input_scale_name(name)))
            inputs.insert(place + 1, given[1])
            _set_inputs(function, inputs)
        node = ir.Node(
            DOMAIN, overloaded(QUANTIZE, linear.activations), given, num_outputs=2, name=f"{module}.quantize"
        )
        codes, factor = node.outputs
        codes.name, factor.name = f"{module}.codes", f"{module}.factor"
        function.insert_before(product, node)
        if linear.activations == "dynamic":
            shared[x] = codes, factor
    product.replace_input_with(0, codes)
    is_fp32 = cast is not None and not cast.attributes["to"].is_ref()  # a router's, in engines of all types
    if cast is not None:  # the weight in fp32, not rounded to the compute type
        transpose.replace_input_with(0, cast.inputs[0])
        if not cast.outputs[0].uses():
            function.remove(cast, safe=True)
    out = product.outputs[0]
    scaled = ir.Node("", "Mul", [out, factor], name=f"{module}.scale")
    scaled.outputs[0].name = f"{module}.scaled"
    out.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
    scaled.replace_input_with(0, out)
    function.insert_after(product, scaled)
    if not is_fp32:
        _to_compute(function, scaled.outputs[0], f"{module}.rounded")


def _compute_in(function: ir.Function, linear: Linear) -> None:
    """Case 3."""
    module = linear.name.removesuffix(".weight")
    product, transpose, cast = _product(function, linear.name)
    to = int(PRODUCT_TYPES[linear.product])
    x, weight = product.inputs[0], transpose.inputs[0]
    assert x is not None and weight is not None
    product.replace_input_with(0, _cast(function, product, x, ir.AttrInt64("to", to), f"{module}.widened"))
    if cast is not None and len(cast.outputs[0].uses()) == 1:
        cast.attributes.add(ir.AttrInt64("to", to))
    else:
        transpose.replace_input_with(
            0, _cast(function, transpose, weight, ir.AttrInt64("to", to), f"{module}.weight_widened")
        )
    _to_compute(function, product.outputs[0], f"{module}.rounded")


def _compute_experts_in(function: ir.Function, product: str) -> None:
    """Case 3, for the experts: their x in another type, and their rows in the engine's again."""
    node = next(node for node in function if op_of(node.op_type) == EXPERTS.name and node.domain == DOMAIN)
    x = node.inputs[0]
    assert x is not None
    to = ir.AttrInt64("to", int(PRODUCT_TYPES[product]))
    node.replace_input_with(0, _cast(function, node, x, to, f"{EXPERTS_NODE}.widened"))
    _to_compute(function, node.outputs[0], f"{EXPERTS_NODE}.rounded")


CACHE_SCALES = ("self_attn.k_scale", "self_attn.v_scale")
"""The inputs of a function whose cache holds FP8 numbers, its last ones."""


def _round_cache(function: ir.Function) -> None:
    """Case 5."""
    node = next(node for node in function if op_of(node.op_type) == CACHED_ATTENTION.name and node.domain == DOMAIN)
    inputs = list(function.inputs)
    for place, name in zip((1, 2), CACHE_SCALES, strict=True):
        value, scale = node.inputs[place], ir.Value(name=name)
        assert value is not None
        inputs.append(scale)
        own = name.removesuffix("_scale")
        rounding = ir.Node(
            DOMAIN, overloaded(QUANTIZE, "static"), [value, scale], num_outputs=2, name=f"{own}.quantize"
        )
        codes, factor = rounding.outputs
        codes.name, factor.name = f"{own}.codes", f"{own}.factor"
        scaled = ir.Node("", "Mul", [codes, factor], name=f"{own}.scale")
        scaled.outputs[0].name = f"{own}.scaled"
        function.insert_before(node, [rounding, scaled])
        node.replace_input_with(place, scaled.outputs[0])
        _to_compute(function, scaled.outputs[0], f"{own}.rounded")
    _set_inputs(function, inputs)


def _give_experts(function: ir.Function, form: ExpertsForm) -> None:
    """Case 2."""
    node = next(node for node in function if node.op_type == EXPERTS.name and node.domain == DOMAIN)
    if form == ExpertsForm(form.experts):
        return
    names = (*form.weight_names, *form.scale_names, *form.activation_scale_names)
    lists = [ir.Value(name=f"feed_forward.experts.{own}") for own in names]
    fixed = len(EXPERTS.inputs)
    attributes = [
        *(node.attributes[name] for name in node.attributes if name not in ("layout", "group_size", "activations")),
        ir.AttrString("layout", form.layout),
        ir.AttrInt64("group_size", form.group_size),
        ir.AttrString("activations", form.activations),
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


def forms_of(weights: Weights) -> tuple[set[ExpertsForm], set[str], set[str]]:
    """Which functions a model needs: the forms of its experts, of dequantised matrices, and of what they multiply."""
    experts = {own.form for own in weights.experts.values()}
    dequantized: set[str] = {stored.form for stored in weights.linears.values() if stored.form != "none"}
    quantized: set[str] = {own.activations for own in weights.linears.values() if own.activations != "none"}
    return experts, dequantized, quantized | ({"static"} if weights.kv_scales else set())
