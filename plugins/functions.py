"""The private ops as ONNX functions of standard ops (opset 24): any runtime runs a graph that carries them.

The experts' function is routed, not dense: the permutation has made each expert's tokens one contiguous run
of rows, so expert ``e`` is a Slice, two MatMuls and a SwiGLU, unrolled over E. An expert without tokens works on
zero rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shuntyard.plugins import contract
from shuntyard.plugins.contract import ATTRIBUTE_KINDS, DOMAIN, ExpertsForm, Op

OPSET = 24


class _Body(Tape):
    """A tape with shorthands for constants."""

    def const(self, value: Sequence[int] | float, dtype: type[np.generic] = np.int64) -> ir.Value:
        """A Constant node holding a small array."""
        return self.op("Constant", [], {"value": ir.tensor(np.asarray(value, dtype))})

    def attribute(self, name: str) -> ir.Value:
        """The function's integer attribute as an int64 tensor of one element."""
        scalar = self.op("Constant", [], {"value_int": ir.RefAttr("value_int", name, ir.AttributeType.INT)})
        return self.op("Reshape", [scalar, self.const([1])])

    def iota(self, end: ir.Value, to: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """``0 .. end - 1`` for an int64 tensor ``end [1]``."""
        scalar = self.op("Squeeze", [end, self.const([0])])
        count = self.op("Range", [self.const(0), scalar, self.const(1)])
        return count if to == ir.DataType.INT64 else self.op("Cast", [count], {"to": to})

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """One dimension of ``x`` as an int64 tensor ``[1]``."""
        return self.op("Shape", [x], {"start": axis, "end": axis + 1})

    def as_float(self, x: ir.Value) -> ir.Value:
        """``x`` in fp32."""
        return self.op("Cast", [x], {"to": ir.DataType.FLOAT})


def _function(
    op: Op, build: Callable[..., Sequence[ir.Value]], overload: str = "", lists: Sequence[str] = ()
) -> ir.Function:
    """Wraps what ``build(tape, *inputs)`` writes as the function of ``op``; ``lists`` names its further inputs."""
    tape = _Body()
    inputs = [ir.val(name) for name in (*op.inputs, *lists)]
    outputs = build(tape, *inputs)
    for name, value in zip(op.outputs, outputs, strict=True):
        value.name = name
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, opset_imports={"": OPSET}, name=op.name)
    kinds = {float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING, int: ir.AttributeType.INT}
    attributes = [ir.Attr(name, kinds[ATTRIBUTE_KINDS.get(name, int)], None) for name in op.attributes]
    function = ir.Function(DOMAIN, op.name, overload, graph=graph, attributes=attributes)
    for i, value in enumerate(v for node in graph for v in node.outputs if v.name is None):
        value.name = f"t{i}"
    return function


def moe_routing() -> ir.Function:
    """Top-k, then a stable counting sort of the slots by expert."""

    def build(tape: _Body, logits: ir.Value) -> tuple[ir.Value, ...]:
        op = tape.op
        experts, top_k = tape.size(logits, 1), tape.attribute("top_k")
        values, chosen = tape.op_multi_out(
            "TopK", [logits, top_k], {"axis": 1, "largest": 1, "sorted": 1}, num_outputs=2
        )
        expert_of_slot = op("Reshape", [chosen, tape.const([-1])])  # [T*K]
        column = op("Unsqueeze", [expert_of_slot, tape.const([1])])
        is_expert = op("Equal", [column, tape.iota(experts)])
        one_hot = op("Cast", [is_expert], {"to": ir.DataType.INT32})  # [T*K, E]
        counts = op("ReduceSum", [one_hot, tape.const([0])], {"keepdims": 0})  # [E]
        ends = op("CumSum", [counts, tape.const(0)])
        offsets = op("Concat", [tape.const([0], np.int32), ends], {"axis": 0})  # [E+1]
        place = op("Mul", [op("CumSum", [one_hot, tape.const(0)]), one_hot])
        rank = op("Sub", [op("ReduceSum", [place, tape.const([1])], {"keepdims": 0}), tape.const(1, np.int32)])
        row_of_slot = op("Add", [op("Gather", [offsets, expert_of_slot]), rank])
        permutation = _invert(tape, row_of_slot)
        slot_scores = op("Sigmoid", [op("Reshape", [values, tape.const([-1])])])
        return op("Gather", [slot_scores, permutation]), offsets, permutation

    return _function(contract.ROUTING, build)


def _invert(tape: _Body, permutation: ir.Value) -> ir.Value:
    """The inverse of an int32 permutation."""
    identity = tape.iota(tape.size(permutation, 0), ir.DataType.INT32)
    index = tape.op("Cast", [permutation], {"to": ir.DataType.INT64})
    return tape.op("ScatterElements", [identity, index, identity], {"axis": 0})


def experts_overload(experts: int, layout: str, quantization: str, group_size: int, activations: str = "none") -> str:
    """What sets ``moe_experts`` of these arguments apart from others, for the nodes that call it."""
    return ExpertsForm(experts, layout, quantization, group_size, activations).check().overload


def moe_experts(
    experts: int, layout: str = "fused", quantization: str = "none", group_size: int = 0, activations: str = "none"
) -> ir.Function:
    """Grouped SwiGLU, unrolled over so many experts, for weights of one form (``contract.ExpertsForm``)."""
    form = ExpertsForm(experts, layout, quantization, group_size, activations).check()
    names = (form.weight_names, form.scale_names, form.activation_scale_names)

    def build(
        tape: _Body,
        x: ir.Value,
        scores: ir.Value,
        expert_offsets: ir.Value,
        permutation: ir.Value,
        *lists: ir.Value,
    ) -> tuple[ir.Value]:
        op = tape.op
        top_k = op("Cast", [tape.attribute("top_k")], {"to": ir.DataType.INT32})
        tokens = op("Div", [permutation, top_k])
        by_row = op("Mul", [tape.as_float(op("Gather", [x, tokens])), op("Unsqueeze", [scores, tape.const([1])])])
        scaled = op("CastLike", [by_row, x])  # [T*K, H]
        offsets = tape.op_multi_out(
            "Split", [expert_offsets], {"axis": 0, "num_outputs": experts + 1}, num_outputs=experts + 1
        )
        own_lists = iter(lists)
        weights, scales, activation_scales = (list(itertools.islice(own_lists, len(own))) for own in names)
        parts = _parts(tape, form, x, weights, scales, activation_scales)
        rows = []
        for e in range(experts):
            own = op("Slice", [scaled, offsets[e], offsets[e + 1], tape.const([0], np.int32)])
            products = _products(tape, form, own, [part[e] for part in parts[:-1]])
            if len(products) == 1:
                products = list(tape.op_multi_out("Split", products, {"axis": 1, "num_outputs": 2}, num_outputs=2))
            gate, up = products
            wide = tape.as_float(gate)
            silu = op("Mul", [wide, op("Sigmoid", [wide])])
            hidden = op("CastLike", [op("Mul", [silu, tape.as_float(up)]), x])
            rows += _products(tape, form, hidden, [parts[-1][e]])
        return (op("Concat", rows, {"axis": 0}),)

    return _function(contract.EXPERTS, build, form.overload, list(itertools.chain(*names)))


class _Part(NamedTuple):
    """What one product of one expert takes; constants, once they are folded."""

    weight: ir.Value  # [in, out] of x's type; e4m3 numbers in fp32 if activations are quantised
    weight_scale: ir.Value | None  # f32 [1] or [1, out], if they are
    activation_scale: ir.Value | None  # if it is given


def _parts(
    tape: _Body,
    form: ExpertsForm,
    x: ir.Value,
    weights: Sequence[ir.Value],
    scales: Sequence[ir.Value],
    activation_scales: Sequence[ir.Value],
) -> list[list[_Part]]:
    """For each of ``form.parts`` what each expert's product takes."""
    matrices, factors = [], []
    for i, weight in enumerate(weights):
        if form.activations != "none":
            matrix = tape.as_float(weight)
            shape = [form.experts, 1, -1] if _each_has_scales(form) else [1, -1]
            factors.append(tape.op("Reshape", [tape.as_float(scales[i]), tape.const(shape)]))
        else:
            matrix = tape.op("CastLike", [_scaled(tape, form, weight, scales[i]) if scales else weight, x])
        matrices.append(tape.op("Transpose", [matrix], {"perm": [1, 0]}) if form.layout == "linear" else matrix)
    experts = form.experts
    if form.layout == "fused":
        matrices = [own for stacked in matrices for own in _each_expert(tape, stacked, experts)]
        if _each_has_scales(form):
            factors = [own for stacked in factors for own in _each_expert(tape, stacked, experts)]
        else:
            factors = [factor for factor in factors for _ in range(experts)]
        activation_scales = [scale for scale in activation_scales for _ in range(experts)]
    every = itertools.zip_longest(matrices, factors, activation_scales)  # lists are empty where a form has none
    parts = [_Part(*own) for own in every]
    return [parts[i : i + experts] for i in range(0, len(parts), experts)]


def _each_has_scales(form: ExpertsForm) -> bool:
    """Whether one tensor has scales for every channel of every expert."""
    return form.layout == "fused" and form.quantization == "channel"


def _products(tape: _Body, form: ExpertsForm, rows: ir.Value, parts: Sequence[_Part]) -> list[ir.Value]:
    """``rows [.., in]`` times the matrices of these parts, in x's type."""
    if form.activations == "none":
        return [tape.op("MatMul", [rows, part.weight]) for part in parts]
    made = []
    codes = factor = rows
    for i, part in enumerate(parts):
        if i == 0 or form.activations == "static":  # a row's own factor is the same for all
            codes, factor = _quantized(tape, rows, part.activation_scale)
        assert part.weight_scale is not None
        summed = tape.op("Mul", [tape.op("MatMul", [codes, part.weight]), factor])
        made.append(tape.op("CastLike", [tape.op("Mul", [summed, part.weight_scale]), rows]))
    return made


def _quantized(tape: _Body, x: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Codes and factor of ``ShuntyardQuantize``. With a scale of 1 QuantizeLinear is the rounding alone."""
    op, wide = tape.op, tape.as_float(x)
    if scale is None:
        # ReduceMax leaves open what it makes of NaN; ONNX Runtime's depends on the place.
        numbers = op("Where", [op("IsNaN", [wide]), tape.const(0.0, np.float32), op("Abs", [wide])])
        largest = op("ReduceMax", [numbers, tape.const([-1])], {"keepdims": 1})
        largest = op("Max", [largest, tape.const(contract.SMALLEST_AMAX, np.float32)])
        factor = op("Div", [largest, tape.const(contract.LARGEST_CODE, np.float32)])
    else:
        factor = op("Reshape", [tape.as_float(scale), tape.const([1])])
    one = tape.const(1.0, np.float32)
    eight_bits = op(
        "QuantizeLinear", [op("Div", [wide, factor]), one], {"output_dtype": ir.DataType.FLOAT8E4M3FN, "saturate": 1}
    )
    return op("DequantizeLinear", [eight_bits, one]), factor


def quantize(form: str) -> ir.Function:
    """e4m3 numbers of the rows that a product takes, with a scale of one of ``contract.QUANTIZE_FORMS``."""
    if form not in contract.QUANTIZE_FORMS:
        raise ValueError(f"form is {form!r}, must be one of {', '.join(contract.QUANTIZE_FORMS)}")

    def build(tape: _Body, x: ir.Value, scale: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        return _quantized(tape, x, scale)

    return _function(contract.QUANTIZE, build, form, contract.QUANTIZE.optional if form == "static" else ())


def _scaled(tape: _Body, form: ExpertsForm, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """A weight times its scale, in fp32.

    No DequantizeLinear: ONNX Runtime keeps it for a quantised product that it may find, and so does not fold it.
    """
    if form.quantization == "group":
        return _group_scaled(tape, weight, scale, tape.const([0, -1, form.group_size]))
    shape = [form.experts, 1, -1] if _each_has_scales(form) else [-1, 1] if form.layout == "linear" else [1, -1]
    factor = tape.op("Reshape", [tape.as_float(scale), tape.const(shape)])
    return tape.op("Mul", [tape.as_float(weight), factor])


def _group_scaled(tape: _Body, weight: ir.Value, scale: ir.Value, groups: ir.Value) -> ir.Value:
    """``UINT4 [out, in]``, ``scale [out, in/group]`` -> f32 ``[out, in]``; ``groups`` is the shape ``0, -1, group``.

    Exact but for the one product: a nibble less 8 is a small integer.
    """
    values = tape.op("Sub", [tape.op("Reshape", [tape.as_float(weight), groups]), tape.const(8.0, np.float32)])
    factor = tape.op("Unsqueeze", [tape.as_float(scale), tape.const([2])])
    return tape.op("Reshape", [tape.op("Mul", [values, factor]), tape.const([0, -1])])


def _each_expert(tape: _Body, stacked: ir.Value, experts: int) -> list[ir.Value]:
    """``[E, in, out]`` as E matrices ``[in, out]``."""
    if experts == 1:
        return [tape.op("Squeeze", [stacked, tape.const([0])])]
    parts = tape.op_multi_out("Split", [stacked], {"axis": 0, "num_outputs": experts}, num_outputs=experts)
    return [tape.op("Squeeze", [part, tape.const([0])]) for part in parts]


def moe_scatter_add() -> ir.Function:
    """Gathers each token's rows and adds them to the base, in fp32."""

    def build(tape: _Body, base: ir.Value, rows: ir.Value, permutation: ir.Value) -> tuple[ir.Value]:
        op = tape.op
        by_slot = tape.as_float(op("Gather", [rows, _invert(tape, permutation)]))  # [T*K, H]
        shape = op("Concat", [tape.const([-1]), tape.attribute("top_k"), tape.size(rows, 1)], {"axis": 0})
        routed = op("ReduceSum", [op("Reshape", [by_slot, shape]), tape.const([1])], {"keepdims": 0})
        return (op("CastLike", [op("Add", [tape.as_float(base), routed]), base]),)

    return _function(contract.SCATTER_ADD, build)


def cached_attention() -> ir.Function:
    """TensorScatter into the cache, then Attention with a boolean mask."""

    def build(
        tape: _Body,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        slots: ir.Value,
    ) -> tuple[ir.Value, ...]:
        op = tape.op
        first = op("Gather", [slots, tape.const(0)], {"axis": 1})  # [B]
        present_key = op("TensorScatter", [past_key, key, first], {"axis": 2})
        present_value = op("TensorScatter", [past_value, value, first], {"axis": 2})
        cache_rows = tape.iota(tape.size(past_key, 2))
        visible = op("LessOrEqual", [cache_rows, op("Unsqueeze", [slots, tape.const([2])])])  # [B, S, L]
        # Boolean, not additive: no finite number added to a score hides every score.
        mask = op("Unsqueeze", [visible, tape.const([1])])
        scale = ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT)
        out = op("Attention", [query, present_key, present_value, mask], {"scale": scale}, name="attention")
        return out, present_key, present_value

    return _function(contract.CACHED_ATTENTION, build)


DEQUANTIZE_FORMS = ("tensor", "channel", "group")
"""The overloads of ``dequantize``, called as the quantisations of ``contract.ExpertsForm``."""


def dequantize(form: str) -> ir.Function:
    """A quantised weight ``[out, in]`` in fp32, for a scale of one of ``DEQUANTIZE_FORMS``."""
    if form not in DEQUANTIZE_FORMS:
        raise ValueError(f"form is {form!r}, must be one of {', '.join(DEQUANTIZE_FORMS)}")

    def build(tape: _Body, weight: ir.Value, scale: ir.Value) -> tuple[ir.Value]:
        op = tape.op
        if form == "group":
            groups = op("Concat", [tape.const([0, -1]), tape.attribute("group_size")], {"axis": 0})
            return (_group_scaled(tape, weight, scale, groups),)
        factor = op("Reshape", [tape.as_float(scale), tape.const([-1, 1])])
        return (op("Mul", [tape.as_float(weight), factor]),)

    return _function(contract.DEQUANTIZE, build, form)


def all_functions(
    experts: Iterable[ExpertsForm], dequantized: Iterable[str] = (), quantized: Iterable[str] = ()
) -> list[ir.Function]:
    """The functions of a model whose experts, dequantised Linears and quantised inputs of Linears are of these forms.

    Raises:
        ValueError: the forms are of several numbers of experts, which ``overload`` would not always tell apart.
    """
    forms = sorted(set(experts))
    if len({form.experts for form in forms}) > 1:
        raise ValueError(f"the experts of one model come in the forms {', '.join(map(str, forms))}")
    moe = [moe_routing(), *(moe_experts(*form) for form in forms), moe_scatter_add()] if forms else []
    linears = [dequantize(form) for form in sorted(set(dequantized))] + [
        quantize(form) for form in sorted(set(quantized))
    ]
    return [*moe, cached_attention(), *linears]
