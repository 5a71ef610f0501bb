"""How faults are planted in an engine: in its graph, and in its run. See ``faults.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from shuntyard.engines.onnxruntime_runner import OnnxRuntimeRunner
from shuntyard.plugins.contract import DOMAIN
from tests.validate.planting import Mask, future, unchunked_decoding, window

Patch = pytest.MonkeyPatch
Surgery = Callable[[ir.Model], None]
Run = Callable[[Patch, int], None]


def call_of(graph: ir.Model, name: str) -> ir.Node:
    return next(node for node in graph.graph if node.name == name)


def layer_call(graph: ir.Model, layer: int) -> ir.Node:
    return call_of(graph, f"model.layers.{layer}")


def in_other_order(first: int) -> Surgery:
    """Layer ``first + 1`` runs before layer ``first``."""

    def cut(graph: ir.Model) -> None:
        a, b, after = (layer_call(graph, first + i) for i in range(3))
        b.replace_input_with(0, a.inputs[0])
        a.replace_input_with(0, b.outputs[0])
        after.replace_input_with(0, a.outputs[0])
        graph.graph.remove(a)
        graph.graph.insert_after(b, a)

    return cut


def skipped(layer: int) -> Surgery:
    """Its output goes nowhere."""
    return lambda graph: layer_call(graph, layer + 1).replace_input_with(0, layer_call(graph, layer).inputs[0])


def cache_of(layer: int, other: int) -> Surgery:
    """A layer reads another's past."""

    def cut(graph: ir.Model) -> None:
        node = layer_call(graph, layer)
        inputs = {str(value.name): value for value in graph.graph.inputs}
        for i, value in enumerate(node.inputs):
            name = "" if value is None else str(value.name)
            if name.startswith(f"past_key_values.{layer}."):
                node.replace_input_with(i, inputs[name.replace(f".{layer}.", f".{other}.")])

    return cut


def exchanged(layer: int, one: str, other: str) -> Surgery:
    """Two weights of a layer in each other's place."""

    def cut(graph: ir.Model) -> None:
        node = layer_call(graph, layer)
        names = [f"model.layers.{layer}.{name}" for name in (one, other)]
        places = [next(i for i, v in enumerate(node.inputs) if v is not None and v.name == name) for name in names]
        values = [node.inputs[place] for place in places]
        for place, value in zip(places, reversed(values), strict=True):
            node.replace_input_with(place, value)

    return cut


def other_experts(layer: int) -> Surgery:
    """The weights of experts 1 and 2 come in each other's place, the router's rows do not."""

    def cut(graph: ir.Model) -> None:
        node = layer_call(graph, layer)
        for i, value in enumerate(node.inputs):
            if value is None or ".experts." not in str(value.name):
                continue
            assert value.shape is not None
            order = np.arange(value.shape.numpy()[0])
            order[[1, 2]] = 2, 1
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(order))])
            constant.outputs[0].name = f"order.{value.name}"
            taken = ir.Node("", "Gather", [value, constant.outputs[0]], [ir.AttrInt64("axis", 0)])
            taken.outputs[0].name = f"in_order.{value.name}"
            taken.outputs[0].type, taken.outputs[0].shape = value.type, value.shape
            graph.graph.insert_before(node, [constant, taken])
            node.replace_input_with(i, taken.outputs[0])

    return cut


def router_through(dtype: ir.DataType) -> Surgery:
    """The router's input and its logits are rounded, in all layers."""

    def rounded(function: ir.Function, value: ir.Value, before: ir.Node) -> ir.Value:
        for i, to in enumerate((dtype, ir.DataType.FLOAT)):
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))])
            node.outputs[0].name = f"{value.name}_through_{i}"
            function.insert_before(before, node)
            value = node.outputs[0]
        return value

    def cut(graph: ir.Model) -> None:
        for function in graph.functions.values():
            product = next((node for node in function if node.name == "feed_forward.router"), None)
            if product is None:
                continue
            source = product.inputs[0]
            assert source is not None
            product.replace_input_with(0, rounded(function, source, product))
            logits = product.outputs[0]
            users = [(use.node, use.idx) for use in logits.uses()]
            following = list(function)[list(function).index(product) + 1]
            coarse = rounded(function, logits, following)
            for user, place in users:
                user.replace_input_with(place, coarse)
            for i, output in enumerate(function.outputs):
                if output is logits:
                    coarse.name, logits.name = logits.name, "router_logits_exact"
                    function.outputs[i] = coarse

    return cut


def mask_in_graph(mask: Mask, chunk: int, *, rope_only: bool) -> Surgery:
    """As :func:`masked`, in the body of the attention that the layers call."""

    def cut(graph: ir.Model) -> None:
        right = next(f for f in graph.functions.values() if f.name == "ShuntyardCachedAttention")
        proto = ir.to_proto(right)
        proto.name = "WrongCachedAttention"
        wrong = ir.serde.deserialize_function(proto)
        _edit_mask(wrong, mask, chunk)
        graph.functions[wrong.identifier()] = wrong
        for function in graph.functions.values():
            for node in function:
                if node.domain == DOMAIN and node.op_type == right.name and ("Rope" in function.name or not rope_only):
                    node.op_type = wrong.name

    return cut


def _edit_mask(function: ir.Function, mask: Mask, chunk: int) -> None:
    node = next(node for node in function if node.op_type == "LessOrEqual")
    rows, slots = node.inputs
    assert rows is not None and slots is not None

    def op(name: str, *inputs: ir.Value) -> ir.Value:
        made = ir.Node("", name, list(inputs))
        made.outputs[0].name = f"wrong_{len(list(function))}"
        function.insert_before(node, made)
        return made.outputs[0]

    def const(value: int) -> ir.Value:
        made = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.array(value, np.int64)))])
        made.outputs[0].name = f"wrong_{len(list(function))}"
        function.insert_before(node, made)
        return made.outputs[0]

    seen = op("LessOrEqual", rows, op("Add", slots, const(1)) if mask is future else slots)
    if mask is window:
        seen = op("And", seen, op("Greater", rows, op("Sub", slots, const(chunk))))
    if mask is unchunked_decoding:
        begin = op("Sub", slots, op("Mod", slots, const(chunk)))
        length = op("Gather", op("Shape", function.inputs[5]), const(1))
        single = op("Equal", length, const(1))
        seen = op("And", seen, op("Or", op("GreaterOrEqual", rows, begin), single))
    node.outputs[0].replace_all_uses_with(seen)
    function.remove(node, safe=True)


def around_step(
    before: Callable[[OnnxRuntimeRunner, Any, Any], Any], after: Callable[[OnnxRuntimeRunner, Any, Any], None]
) -> Run:
    """``before(runner, positions, chunk)`` gives the positions to run with; ``after`` what it kept."""

    def plant(patch: Patch, chunk: int) -> None:
        right = OnnxRuntimeRunner.step

        def step(runner: OnnxRuntimeRunner, ids: Any, positions: Any, indices: Any) -> Any:
            kept = {name: cache.copy() for name, cache in runner._caches.items()}
            logits = right(runner, ids, before(runner, positions, chunk), indices)
            after(runner, kept, positions)
            return logits

        patch.setattr(OnnxRuntimeRunner, "step", step)

    return plant


def same_positions(runner: OnnxRuntimeRunner, positions: Any, chunk: int) -> Any:
    return positions


def dropped_writes(layer: int) -> Run:
    """In decoding, one layer's cache stays as it was."""

    def after(runner: OnnxRuntimeRunner, kept: Any, positions: Any) -> None:
        if positions.shape[1] == 1:
            for part in ("key", "value"):
                runner._caches[f"{layer}.{part}"][:] = kept[f"{layer}.{part}"]

    return around_step(same_positions, after)


def late_at_edge(layer: int) -> Run:
    """What a call that begins at a chunk's edge writes into one layer's cache lands a row late."""

    def after(runner: OnnxRuntimeRunner, kept: Any, positions: Any) -> None:
        for part in ("key", "value"):
            cache = runner._caches[f"{layer}.{part}"]
            first = int(positions[0, 0])
            if first and first % cache.shape[2] == 0:
                written = cache.copy()
                cache[:, :, 1:], cache[:, :, 0] = written[:, :, :-1], kept[f"{layer}.{part}"][:, :, 0]

    return around_step(same_positions, after)


def exchanged_caches(one: int, other: int) -> Run:
    """Before each token that is decoded, two layers' caches change places."""

    def before(runner: OnnxRuntimeRunner, positions: Any, chunk: int) -> Any:
        if positions.shape[1] == 1:
            for part in ("key", "value"):
                a, b = (f"{layer}.{part}" for layer in (one, other))
                runner._caches[a], runner._caches[b] = runner._caches[b], runner._caches[a]
        return positions

    return around_step(before, lambda runner, kept, positions: None)


def early_after_edge() -> Run:
    """Tokens that are decoded behind the first chunk's edge are taken to be one place earlier."""

    def before(runner: OnnxRuntimeRunner, positions: Any, chunk: int) -> Any:
        return positions - ((positions >= chunk) & (positions.shape[1] == 1))

    return around_step(before, lambda runner, kept, positions: None)


def stale_rows(patch: Patch, chunk: int) -> None:
    """Caches are not zeroed between sequences: rows of the one before are there."""
    right = OnnxRuntimeRunner.start
    old: dict[str, Any] = {}

    def start(runner: OnnxRuntimeRunner, batch: int, context: int) -> None:
        old.update(runner._caches)
        right(runner, batch, context)
        for name, cache in runner._caches.items():
            if name in old:
                stale = old[name]
                rows = min(cache.shape[2], stale.shape[2])
                cache[:, :, :rows] = stale[:1, :, :rows]

    patch.setattr(OnnxRuntimeRunner, "start", start)
