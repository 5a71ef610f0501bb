"""Holds what was built to what was asked, module by module.

What is asked stands in the model directory's manifest, from the recipe and the files; which nodes compute it, in the
graph; what was built, in the layers that the builder says its plan has (``layer_table``). TensorRT 11 is strongly
typed, so a difference is a defect of ours or of the compiler's: either way the engine is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import onnx_ir as ir

from shuntyard.engines.layer_table import Layer, join
from shuntyard.errors import EngineError
from shuntyard.exporter.modules import EXPERTS as EXPERTS_MODULE
from shuntyard.exporter.precision import ModulePrecision
from shuntyard.exporter.storage import op_of
from shuntyard.plugins.contract import CACHED_ATTENTION, DOMAIN, EXPERTS, PLUGINS, ROUTING, SCATTER_ADD

NOT_ASKED = "the plan is not what was asked for"

_FLOATS = frozenset({"fp32", "fp16", "bf16", "fp8", "int4"})
"""Types of values; INT4 stands for weights that are numbers, not indices."""

ROUTER = "feed_forward.router"
"""The product that computes in fp32 whatever the engine's type is."""


_MIXED = frozenset({"kgen", "runtime_fusion", "cast", "reshape", "shape_call", "signal", "wait"})
"""Kinds of layers that do other things beside a product, or none. Every other kind, known or not, is taken for one and
held to it as a ``gemm`` is."""


class Asked(NamedTuple):
    """What a node is to compute in, and how its weights are stored where they are quantised."""

    compute: str  # fp32, fp16, bf16, or fp8: a product of e4m3 numbers
    stored: str = ""  # fp8, int4
    copies: int = 0  # of the experts: how many weights the plugin is to be given
    plain: str = ""  # of the experts: the type of weights that are not quantised


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


def expected_precision(model: ir.Model, dtype: str, modules: Mapping[str, ModulePrecision]) -> dict[str, Asked]:
    """What each product, attention and plugin of the graph is to compute in, by its path.

    Raises:
        EngineError: the graph has no product of a module whose precision was asked for, or one of a module that nobody
            knows.
    """
    paths = {CACHED_ATTENTION.name: "self_attn.attention", **{op.name: op.name for op in PLUGINS}}
    inside = {
        function.name: [
            (paths.get(op_of(node.op_type), str(node.name)), node)
            for node in function
            if node.op_type == "MatMul" or op_of(node.op_type) in paths
        ]
        for function in model.functions.values()
        if op_of(function.name) not in paths
    }
    left = {name for name in modules if name != "model.embed_tokens"}
    found = {}
    for call in model.graph:
        for name, node in inside.get(call.op_type, []):
            path = join(str(call.name), name)
            if node.op_type != "MatMul" and op_of(node.op_type) != EXPERTS.name:
                found[path] = Asked("fp32" if op_of(node.op_type) == ROUTING.name else dtype)
                continue
            module = path if node.op_type == "MatMul" else f"{call.name}{EXPERTS_MODULE}"
            if path == "lm_head" and module not in modules:
                module = "model.embed_tokens"  # tied
            own = modules.get(module)
            if own is None:
                raise EngineError(f"the graph computes '{path}', whose precision nobody asked for", hint=NOT_ASKED)
            left.discard(module)
            found[path] = _asked(module, own, node, dtype)
    if left:
        raise EngineError(f"the graph has no product of module '{min(left)}'", hint=NOT_ASKED)
    return found


def _asked(module: str, own: ModulePrecision, node: ir.Node, dtype: str) -> Asked:
    stored = own.weights if own.granularity else ""
    if module.endswith(ROUTER):
        return Asked("fp32", stored)
    if node.op_type == "MatMul":
        return Asked(own.computes_in(dtype), stored)
    fixed = len(EXPERTS.inputs)
    lists = {"": 1, "fp8-static": 3}.get(own.activations if stored else "", 2)
    plain = "" if stored else own.weights
    return Asked(own.computes_in(dtype), stored, (len(node.inputs) - fixed) // lists, plain)


def compute_types(expected: Mapping[str, Asked]) -> dict[str, str]:
    """Path -> type, as the manifest keeps it."""
    return {path: asked.compute for path, asked in expected.items()}


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


def check_experts(said: Mapping[str, set[str]], modules: Mapping[str, ModulePrecision]) -> None:
    """Holds what the experts' plugins say of their rows (``layer_table.experts_activations``) to what was asked.

    Raises:
        EngineError: they round a module's rows in another way, or are silent about it.
    """
    asked = {
        name: {own.activations.removeprefix("fp8-")} for name, own in modules.items() if name.endswith(EXPERTS_MODULE)
    }
    for name in sorted(asked.keys() | said.keys()):
        if said.get(name) != asked.get(name):
            was, does = (" and ".join(sorted(kinds.get(name, {"nothing"}))) for kinds in (asked, said))
            raise EngineError(
                f"'{name}' was to have activations {was}, but its plugin in the plan says {does}", hint=NOT_ASKED
            )


def check_precision(layers: list[Layer], expected: Mapping[str, Asked], dtype: str) -> None:
    """Holds what the plan computes in to what was asked, in an engine of ``dtype``.

    Every product, attention and plugin of the graph must be found in the plan, in layers that read its type; such a
    layer may read fp32 beside it (a norm that is fused with it, the scales of a product), but a plain ``gemm`` or a
    plugin must not. A product of e4m3 numbers must read them on both sides, and nothing else but scales; what rounds to
    them before, and scales and rounds behind it, bears its name too. What lies between modules (norms, rotation,
    residuals) may be of the engine's type or fp32.

    Raises:
        EngineError: a node is in another type, or cannot be found in the plan.
    """
    found = dict.fromkeys(expected, False)
    kept: set[str] = set()
    finished = {origin.rsplit(".", 1)[0] for layer in layers for origin in layer.origins if origin.endswith(_BEHIND)}
    for layer in layers:
        own = {origin.split(".weight", 1)[0] for origin in layer.origins} & expected.keys()
        stored = {expected[module].stored for module in own}
        for path in expected.keys() & set(layer.origins):
            found[path] |= _shows(layer, path, expected[path], dtype, stored)
        kept |= {module for module in own if expected[module].stored in layer.constants}
    for path, is_there in found.items():
        if not is_there:
            asked = expected[path]
            raise EngineError(f"no layer of the plan shows that it computes {path} in {asked.compute}", hint=NOT_ASKED)
    for path, asked in expected.items():
        # A call and its product may share a name, which their nodes then have twice.
        if asked.compute == "fp8" and not asked.copies and not {path, f"{path}.{path}"} & finished:
            raise EngineError(f"no layer of the plan scales what {path} computes in fp8", hint=NOT_ASKED)
        if asked.stored and not asked.copies and path not in kept:
            raise EngineError(f"no layer of the plan holds the weight of {path} in {asked.stored}", hint=NOT_ASKED)
    plain = {"fp32", dtype, *(asked.compute for asked in expected.values())} - {"fp8"}
    in_fp8 = {path for path, asked in expected.items() if asked.compute == "fp8"}
    for layer in layers:
        others = {t for t in (*layer.inputs, *layer.outputs) if t in _FLOATS} - plain
        if others == {"fp8"} and any(_belongs(origin, in_fp8) for origin in layer.origins):
            continue
        if others:
            names = ", ".join(sorted(others))
            raise EngineError(f"layer '{layer.name}' computes in {names}, which nobody asked for", hint=NOT_ASKED)


_BEHIND = (".scale", ".rounded")
"""What a product of e4m3 numbers has behind it (``exporter/storage.py``)."""


def _belongs(origin: str, modules: Iterable[str]) -> bool:
    """Whether a node is a module's product, or what rounds its inputs or scales what comes out."""
    return any(origin == module or origin.startswith(f"{module}.") for module in modules)


def _shows(layer: Layer, path: str, asked: Asked, dtype: str, stored: set[str]) -> bool:
    """Whether ``layer`` proves that ``path`` is computed as asked. ``stored``: its weights' types, of all its modules.

    Raises:
        EngineError: it proves that it is not.
    """
    activations = {t for t in layer.inputs if t in _FLOATS}
    weights = {t for t in layer.constants if t in _FLOATS}
    if layer.plugin == EXPERTS.name:
        return _shows_experts(layer, path, asked, dtype)
    if asked.compute == "fp8":
        return _shows_fp8(layer, path, activations, weights, dtype)
    if layer.plugin == SCATTER_ADD.name:
        activations, weights = {layer.inputs[0]}, set()
    is_product = layer.kind not in _MIXED and not layer.plugin
    strange = {*layer.inputs, *layer.constants} - _FLOATS if is_product else set()
    allowed = {asked.compute} if is_product or layer.plugin else {asked.compute, dtype, "fp32"}
    # A layer that only prepares weights may do so for several products that are computed as one.
    quantised = {asked.stored} if is_product else stored
    if strange or activations - allowed or weights - {asked.compute, "fp32", *quantised}:
        raise _wrong(layer, path, asked.compute, activations | weights | strange)
    return asked.compute in activations


def _wrong(layer: Layer, path: str, compute: str, read: Iterable[str]) -> EngineError:
    hint = NOT_ASKED
    if compute == "fp32" and "bf16" in read:
        # TensorRT-RTX 1.7 narrows a product whose factors are all bf16 numbers, and which is rounded to bf16 again.
        hint += ": a product of bf16 numbers that is rounded to bf16 is the same in both; leave it out of the fp32 rule"
    return EngineError(
        f"{path} was to compute in {compute}, but layer '{layer.name}' ({layer.kind}) reads {', '.join(sorted(read))}",
        hint=hint,
    )


def _shows_fp8(layer: Layer, path: str, activations: set[str], weights: set[str], dtype: str) -> bool:
    """A product of e4m3 numbers: a layer that reads them as inputs and as constants."""
    strange = {*layer.inputs, *layer.constants} - _FLOATS
    multiplies = layer.kind not in _MIXED or (activations == {"fp8"} and "fp8" in weights)
    if multiplies and (strange or activations != {"fp8"} or "fp8" not in weights or weights - {"fp8", "fp32"}):
        raise _wrong(layer, path, "fp8", activations | weights | strange)
    # What scales and rounds behind the product has no weight of the engine's type, but where a norm that follows is
    # fused with it: then nodes of others are in the layer, too. Else it would be a second product's.
    alone = all(_belongs(origin, [path]) for origin in layer.origins)
    others = {"fp32", "fp8"} | (set() if alone else {dtype})
    if not multiplies and (activations - {"fp32", "fp8", dtype} or weights - others):
        raise _wrong(layer, path, "fp8", activations | weights)
    return multiplies


_GIVEN_AS = {"fp8": "fp8", "int4": "int32"}
"""How the experts' plugin is given quantised weights: packed INT4 as int32."""


def _shows_experts(layer: Layer, path: str, asked: Asked, dtype: str) -> bool:
    """The plugin's x is of the engine's type or of the experts' own; its weights are those that are stored.

    Whether it rounds its rows to FP8 within is told by the plugin itself (:func:`check_experts`).
    """
    x, out = layer.inputs[0], layer.outputs[0]
    own = asked.compute if asked.compute != "fp8" else dtype
    if {x, out} != {own}:
        raise _wrong(layer, path, own, {x, out})
    given = Counter([*layer.inputs[len(EXPERTS.inputs) :], *layer.constants])
    if asked.stored and given[_GIVEN_AS[asked.stored]] != asked.copies:
        raise EngineError(
            f"{path} was to read {asked.copies} weights in {asked.stored}, but layer '{layer.name}' reads "
            + (", ".join(f"{count} {name}" for name, count in sorted(given.items())) or "none"),
            hint=NOT_ASKED,
        )
    if not asked.stored and given != {asked.plain: asked.copies}:
        raise _wrong(layer, path, own, given)
    return True
