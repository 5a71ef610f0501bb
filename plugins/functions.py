"""The private ops as ONNX functions of standard ops (opset 24): any runtime runs a graph that carries them.

The experts' function is routed, not dense: the permutation has made each expert's tokens one contiguous run
of rows, so expert ``e`` is a Slice, two MatMuls and a SwiGLU, unrolled over E. An expert without tokens works on
zero rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shuntyard.plugins import contract
from shuntyard.plugins.contract import DOMAIN, Op

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


def _function(op: Op, build: Callable[..., Sequence[ir.Value]], overload: str = "") -> ir.Function:
    """Wraps what ``build(tape, *inputs)`` writes as the function of ``op``."""
    tape = _Body()
    inputs = [ir.val(name) for name in op.inputs]
    outputs = build(tape, *inputs)
    for name, value in zip(op.outputs, outputs, strict=True):
        value.name = name
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, opset_imports={"": OPSET}, name=op.name)
    kinds = {"scale": ir.AttributeType.FLOAT}
    attributes = [ir.Attr(name, kinds.get(name, ir.AttributeType.INT), None) for name in op.attributes]
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


def moe_experts(experts: int) -> ir.Function:
    """Grouped SwiGLU, unrolled over so many experts."""

    def build(
        tape: _Body,
        x: ir.Value,
        scores: ir.Value,
        expert_offsets: ir.Value,
        permutation: ir.Value,
        gate_up: ir.Value,
        down: ir.Value,
    ) -> tuple[ir.Value]:
        op = tape.op
        top_k = op("Cast", [tape.attribute("top_k")], {"to": ir.DataType.INT32})
        tokens = op("Div", [permutation, top_k])
        by_row = op("Mul", [tape.as_float(op("Gather", [x, tokens])), op("Unsqueeze", [scores, tape.const([1])])])
        scaled = op("CastLike", [by_row, x])  # [T*K, H]
        offsets = tape.op_multi_out(
            "Split", [expert_offsets], {"axis": 0, "num_outputs": experts + 1}, num_outputs=experts + 1
        )
        gates_ups = _each_expert(tape, op("CastLike", [gate_up, x]), experts)
        downs = _each_expert(tape, op("CastLike", [down, x]), experts)
        rows = []
        for e in range(experts):
            own = op("Slice", [scaled, offsets[e], offsets[e + 1], tape.const([0], np.int32)])
            both = op("MatMul", [own, gates_ups[e]])
            gate, up = tape.op_multi_out("Split", [both], {"axis": 1, "num_outputs": 2}, num_outputs=2)
            wide = tape.as_float(gate)
            silu = op("Mul", [wide, op("Sigmoid", [wide])])
            hidden = op("CastLike", [op("Mul", [silu, tape.as_float(up)]), x])
            rows.append(op("MatMul", [hidden, downs[e]]))
        return (op("Concat", rows, {"axis": 0}),)

    return _function(contract.EXPERTS, build)


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


def all_functions(experts: int) -> list[ir.Function]:
    """The four functions, for a model of so many experts."""
    return [moe_routing(), moe_experts(experts), moe_scatter_add(), cached_attention()]
