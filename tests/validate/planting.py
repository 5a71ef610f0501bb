"""How faults are planted: in the code that is traced, in a graph, and in the engine's run. See ``faults.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shuntyard.engines.onnxruntime_runner import OnnxRuntimeRunner
from shuntyard.exporter import model, trace
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import LayerKind
from shuntyard.plugins.contract import DOMAIN

Patch = pytest.MonkeyPatch
Code = Callable[[Patch, Llama4Config], None]
Surgery = Callable[[ir.Model], None]
Moe = tuple[Tensor, Tensor, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[model.Weights, Tensor, Tensor, Tensor, int], Tensor]

EXPERT = 1
"""Where a fault is in one expert alone."""


# In the code: attention


def attention_with(
    change: Callable[[Any, Llama4Config, tuple[Any, ...]], Any], where: Callable[[LayerKind], bool] = lambda kind: True
) -> Code:
    """``change(right, config, arguments)`` takes the place of the cached attention in the layers of some kinds."""

    def plant(patch: Patch, config: Llama4Config) -> None:
        attention, right = model.attention, torch.ops.shuntyard.cached_attention
        here: list[LayerKind] = []

        def noted(config: Llama4Config, kind: LayerKind, *rest: Any) -> Any:
            here[:] = [kind]
            return attention(config, kind, *rest)

        def changed(*arguments: Any) -> Any:
            return change(right, config, arguments) if where(here[0]) else right(*arguments)

        patch.setattr(model, "attention", noted)
        patch.setattr(torch.ops.shuntyard, "cached_attention", changed)

    return plant


def is_rope(kind: LayerKind) -> bool:
    return kind.rope


def is_nope(kind: LayerKind) -> bool:
    return not kind.rope


def qk_normed(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    q, k, *rest = arguments
    return right(model.rms_norm(q, config.rms_norm_eps), model.rms_norm(k, config.rms_norm_eps), *rest)


def tempered(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    q, *rest = arguments
    scale = model.temperature(rest[-2], config)[:, None, :, None]
    return right((q.float() * scale).to(q.dtype), *rest)


def scaled_twice(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    return right(*arguments[:-1], 1 / config.head_dim)


def tiled_groups(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
    """Head ``h`` gets group ``h mod G``, not ``h // (N / G)``."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    order = [h for g in range(groups) for h in range(heads) if h % groups == g]
    back = [order.index(h) for h in range(heads)]
    q, *rest = arguments
    out, key, value = right(torch.stack([q[:, h] for h in order], 1), *rest)
    return torch.stack([out[:, h] for h in back], 1), key, value


Mask = Callable[[Tensor, Tensor, int, int], Tensor]


def future(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """One row too many is seen."""
    return rows <= slots + 1


def window(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """The last ``chunk`` tokens, wherever chunks begin."""
    return (rows <= slots) & (rows > slots - chunk)


def unchunked_decoding(rows: Tensor, slots: Tensor, length: int, chunk: int) -> Tensor:
    """Chunks in prefill only: a single token sees all before it."""
    return (rows <= slots) & ((rows >= slots - slots % chunk) | torch.tensor(length == 1))


def masked(mask: Mask, chunk: int, where: Callable[[LayerKind], bool] = lambda kind: True) -> Code:
    """Another mask, in the eager model."""

    def change(right: Any, config: Llama4Config, arguments: tuple[Any, ...]) -> Any:
        q, k, v, past_k, past_v, slots, scale = arguments
        place = slots[:, None, :, None].expand(k.shape)
        key, value = past_k.scatter(2, place, k), past_v.scatter(2, place, v)
        visible = mask(torch.arange(key.shape[2]), slots[:, :, None], q.shape[2], chunk)[:, None]
        out = functional.scaled_dot_product_attention(q, key, value, visible, scale=scale, enable_gqa=True)
        return out.contiguous(), key, value

    return attention_with(change, where)


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (part.float() for part in x.chunk(2, dim=-1))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotated_within(chunk: int) -> Code:
    """Rotation as it should be, where the configuration knows no chunks; slots are positions."""

    def plant(patch: Patch, config: Llama4Config) -> None:
        right = model.RotaryTable.forward

        def forward(table: model.RotaryTable, positions: Tensor) -> tuple[Tensor, ...]:
            return (positions, *right(table, positions % chunk)[1:])

        patch.setattr(model.RotaryTable, "forward", forward)

    return plant


def replaced(name: str, wrong: Any) -> Code:
    """Another function of ``exporter/model.py``; ``wrong(right)`` makes it."""
    return lambda patch, config: patch.setattr(model, name, wrong(getattr(model, name)))


# In the code: experts


def float_router(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().T


def moe_with(
    *,
    router: Callable[[Tensor, Tensor], Tensor] = float_router,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits,
    score: Score | None = None,
    on_output: bool = False,
    shared_counts: bool = True,
    rows: Rows | None = None,
) -> Code:
    """The mixture of experts with one thing changed; with nothing changed it is the right one."""

    def moe(config: Llama4Config, w: model.Weights, x: Tensor) -> Moe:
        ops, top_k = torch.ops.shuntyard, config.num_experts_per_tok
        logits = router(x, w["feed_forward.router.weight"])
        scores, offsets, permutation = ops.moe_routing(choose(logits), top_k)
        if score is not None:
            scores = score(scores, logits[permutation.long() // top_k])
        fused = [w["feed_forward.experts.gate_up_proj"], w["feed_forward.experts.down_proj"]]
        given = torch.ones_like(scores) if on_output else scores
        experts = config.num_local_experts
        found = ops.moe_experts(x, given, offsets, permutation, fused, [], top_k, experts, "fused", 0)
        if on_output:
            found = (found.float() * scores[:, None]).to(x.dtype)
        if rows is not None:
            own = torch.arange(permutation.shape[0])
            of_one = (own >= offsets[EXPERT]) & (own < offsets[EXPERT + 1])
            scaled = (x[permutation.long() // top_k].float() * scores[:, None]).to(x.dtype)
            found = torch.where(of_one[:, None], rows(w, scaled, found, logits, EXPERT), found)
        shared = model.swiglu(x, w, "feed_forward.shared_expert")
        base = shared if shared_counts else torch.zeros_like(shared)
        return ops.moe_scatter_add(base, found, permutation, top_k), logits, base

    def plant(patch: Patch, config: Llama4Config) -> None:
        named = trace._name_products

        def lenient(graph: ir.Graph) -> None:
            with contextlib.suppress(AssertionError):  # a product with an expert's weight, which the graph has none of
                named(graph)

        patch.setattr(model, "moe", moe)
        patch.setattr(trace, "_name_products", lenient)

    return plant


def softmax_score(scores: Tensor, logits: Tensor) -> Tensor:
    return (torch.logit(scores) - logits.logsumexp(-1)).exp()


def without_best(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits >= logits.amax(-1, keepdim=True), -1e4)


def in_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    return (x.bfloat16() @ weight.bfloat16().T).float()


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: float_router(x, weight).to(dtype).float()


def gelu_rows(w: model.Weights, scaled: Tensor, found: Tensor, logits: Tensor, expert: int) -> Tensor:
    into, down = (w[f"feed_forward.experts.{n}_proj"][expert].to(scaled.dtype) for n in ("gate_up", "down"))
    gate, up = (scaled @ into).chunk(2, dim=-1)
    return (functional.gelu(gate.float()) * up.float()).to(scaled.dtype) @ down


def nan_rows(w: model.Weights, scaled: Tensor, found: Tensor, logits: Tensor, expert: int) -> Tensor:
    """NaN in one channel."""
    return torch.where(torch.arange(found.shape[1]) == 3, torch.full_like(found, torch.nan), found)


def clamped_swiglu(largest: float) -> Code:
    """``gate * up`` kept to what fp16 holds."""

    def swiglu(x: Tensor, w: model.Weights, prefix: str) -> Tensor:
        gate = functional.silu(model.linear(x, w[f"{prefix}.gate_proj.weight"]))
        product = gate.float() * model.linear(x, w[f"{prefix}.up_proj.weight"]).float()
        return model.linear(product.clamp(-largest, largest).to(x.dtype), w[f"{prefix}.down_proj.weight"])

    return lambda patch, config: patch.setattr(model, "swiglu", swiglu)


# In a graph


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


def other_experts(layer: int, order: list[int]) -> Surgery:
    """The experts' weights come in another order, the router's rows do not."""

    def cut(graph: ir.Model) -> None:
        node = layer_call(graph, layer)
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.array(order, np.int64)))])
        constant.outputs[0].name = f"order.{layer}"
        graph.graph.insert_before(graph.graph[0], constant)
        for i, value in enumerate(node.inputs):
            if value is not None and ".experts." in str(value.name):
                taken = ir.Node("", "Gather", [value, constant.outputs[0]], [ir.AttrInt64("axis", 0)])
                taken.outputs[0].name = f"{value.name}.in_order"
                taken.outputs[0].type, taken.outputs[0].shape = value.type, value.shape
                graph.graph.insert_before(node, taken)
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


# In the run of an engine

Run = Callable[[Patch, int], None]


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
