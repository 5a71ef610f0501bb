"""Engines of quantised models: every module is in the precision that was asked, and one that is not is caught."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from shuntyard.engines.build import Request, build
from shuntyard.engines.inspect import module_rows
from shuntyard.engines.layer_table import Layer, experts_activations
from shuntyard.engines.manifest import EngineManifest, load_manifest
from shuntyard.engines.proof import Asked, check_experts, check_precision
from shuntyard.errors import EngineError, UnsupportedError
from shuntyard.exporter.export import export
from shuntyard.exporter.precision import ModulePrecision
from shuntyard.exporter.recipe import SHIPPED, parse_recipe, read_recipe
from shuntyard.plugins.contract import EXPERTS, QUANTIZE
from tests.engines.planting import Change, planted

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
EVERY_KIND = b"""
[[rule]]
modules = ["*.q_proj", "*.o_proj"]
weights = "fp8"
granularity = "tensor"
activations = "fp8-dynamic"
[[rule]]
modules = "*.k_proj"
weights = "int4"
group_size = 32
[[rule]]
modules = "*.shared_expert.up_proj"
weights = "fp16"
[[rule]]
modules = "*.feed_forward.down_proj"
weights = "fp8"
[[rule]]
modules = "*.1.feed_forward.experts"
weights = "fp32"
[[rule]]
modules = "*.3.feed_forward.experts"
weights = "int4"
group_size = 64
[[rule]]
modules = ["*.feed_forward.experts", "lm_head"]
weights = "fp8"
activations = "fp8-dynamic"
[[rule]]
modules = "*"
weights = "bf16"
"""

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")


def request_for(**changes: Any) -> Request:
    return Request(**{"backend": "tensorrt-rtx", "gpu": "sm89", "dtype": "bf16", "max_context": 256, **changes})


def exported(out: Path, recipe: str | bytes) -> Path:
    own = read_recipe(recipe) if isinstance(recipe, str) else parse_recipe(recipe, "own", "own.toml")
    export(MINIATURE, out, recipe=own)
    return out


@pytest.fixture(scope="module")
def all_linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("proof") / "model", "fp8-all-linear")


def hold_to_the_recipe(engine: Path, manifest: EngineManifest) -> Counter[str]:
    """Every module is in the table, once, in the type that was asked; counts the types."""
    rows = [row for row in module_rows(engine, manifest) if row.asked]
    assert {row.module for row in rows} | {"model.embed_tokens"} == set(manifest.modules)
    assert len(rows) == len(manifest.modules) - 1
    for row in rows:
        asked = manifest.modules[row.module]
        expected = "fp32" if row.module.endswith(".router") else asked.computes_in("bf16")
        assert (row.actual, bool(row.built)) == (expected, True), row
    return Counter(row.actual for row in rows)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_shipped_recipes_are_built_as_they_say(recipe: str, tmp_path: Path) -> None:
    model = exported(tmp_path / "model", recipe)
    manifest = build(model, tmp_path / "engine", request_for())
    counts = {
        "bf16": {"bf16": 61, "fp32": 4},
        "fp8": {"bf16": 58, "fp8": 3, "fp32": 4},
        "fp8-ffn": {"bf16": 40, "fp8": 21, "fp32": 4},
        "fp8-all-linear": {"bf16": 1, "fp8": 60, "fp32": 4},
        "int4-experts": {"bf16": 61, "fp32": 4},
    }
    assert hold_to_the_recipe(tmp_path / "engine", manifest) == counts[recipe]


def test_every_kind_of_precision_in_one_engine(tmp_path: Path) -> None:
    model = exported(tmp_path / "model", EVERY_KIND)
    manifest = build(model, tmp_path / "engine", request_for())
    found = hold_to_the_recipe(tmp_path / "engine", manifest)
    assert found == {"bf16": 37, "fp8": 19, "fp16": 4, "fp32": 5}
    layers = [Layer(**layer) for layer in json.loads((tmp_path / "engine" / "layers.json").read_text())]
    products = [layer for layer in layers if layer.kind == "gemm" and "fp8" in layer.inputs]
    assert len(products) >= 17 and all(set(layer.inputs) == {"fp8"} for layer in products)


# What is planted into the lowered graph of a model, all of whose linears are FP8.


def _function_of(model: ir.Model, layer: int) -> ir.Function:
    call = next(node for node in model.graph if node.name == f"model.layers.{layer}")
    return next(function for function in model.functions.values() if function.name == call.op_type)


def activations_stay(model: ir.Model) -> None:
    """One product gets its inputs as they are, in fp32."""
    function = _function_of(model, 2)
    node = next(n for n in function if n.name == "self_attn.o_proj.quantize")
    wide = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.float32))})
    function.insert_before(node, [wide, one])
    for old, new in zip(node.outputs, (wide.outputs[0], one.outputs[0]), strict=True):
        old.replace_all_uses_with(new)
    function.remove(node, safe=True)


def experts_in_another_way(model: ir.Model) -> None:
    function = _function_of(model, 5)
    node = next(n for n in function if n.op_type == EXPERTS.name)
    node.attributes.add(ir.AttrString("activations", "none"))


def router_in_fp8(model: ir.Model) -> None:
    """A module that nobody asked for computes in FP8: its inputs are rounded like its neighbours'."""
    function = _function_of(model, 1)
    router = next(n for n in function if n.name == "feed_forward.router")
    quantizer = next(f for f in model.functions.values() if f.name.startswith(QUANTIZE.name))
    weight = router.inputs[1]
    copy = ir.serde.deserialize_function(ir.to_proto(quantizer))
    copy.name = f"{QUANTIZE.name}_planted"
    for i, inner in enumerate(copy):
        inner.name = f"planted_{i}"
    model.functions[copy.identifier()] = copy
    rounded = ir.Node("shuntyard", copy.name, [router.inputs[0]], num_outputs=2, name="planted")
    rounded.outputs[0].name, rounded.outputs[1].name = "planted_codes", "planted_factor"
    one = ir.node("Constant", [], {"value": ir.tensor(np.float32(1))})
    q = ir.node(
        "QuantizeLinear", [weight, one.outputs[0]], {"output_dtype": ir.DataType.FLOAT8E4M3FN}, name="planted_q"
    )
    dq = ir.node("DequantizeLinear", [q.outputs[0], one.outputs[0]], name="planted_dq")
    function.insert_before(router, [rounded, one, q, dq])
    router.replace_input_with(0, rounded.outputs[0])
    router.replace_input_with(1, dq.outputs[0])


PLANTED: dict[str, tuple[Change, str]] = {
    "activations": (activations_stay, r"model\.layers\.2\.self_attn\.o_proj"),
    "experts": (experts_in_another_way, r"layers\.5\S+ was to have activations dynamic, but its plugin .* says none"),
    "router": (router_in_fp8, r"feed_forward\.router was to compute in fp32"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_precision_is_caught(
    fault: str, all_linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = PLANTED[fault]
    planted(monkeypatch, change)
    with pytest.raises(EngineError, match=said):
        build(all_linear, tmp_path / "engine", request_for())
    assert not (tmp_path / "engine").exists()


def test_a_precision_that_the_plan_does_not_have_is_caught(all_linear: Path, tmp_path: Path) -> None:
    """The other way round: the plan is right, and the manifest asks for something else."""
    path = all_linear / "shuntyard.json"
    manifest = json.loads(path.read_text())
    try:
        path.write_text(json.dumps(manifest | {"precision": manifest["precision"] | {"lm_head": {"weights": "fp16"}}}))
        with pytest.raises(UnsupportedError, match="asks for fp16 in 'lm_head'"):
            build(all_linear, tmp_path / "engine", request_for())
        module = "model.layers.4.feed_forward.up_proj"
        path.write_text(json.dumps(manifest | {"precision": manifest["precision"] | {module: {"weights": "bf16"}}}))
        with pytest.raises(EngineError, match=rf"{module} was to compute in bf16"):
            build(all_linear, tmp_path / "engine", request_for())
    finally:
        path.write_text(json.dumps(manifest))


def test_another_type_than_the_recipes_is_refused(all_linear: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match="asks for bf16 in 'lm_head', which an engine of --dtype fp16"
    ) as refused:
        build(all_linear, tmp_path / "engine", request_for(dtype="fp16"))
    assert refused.value.hint == "give --dtype bf16"


PATH = "model.layers.0.self_attn.q_proj"


def layer(
    inputs: list[str], constants: list[str], kind: str = "gemm", origins: tuple[str, ...] = (PATH,), **others: Any
) -> Layer:
    return Layer("l", kind, inputs, constants, ["fp32"], list(origins), **others)


QUANTIZER = Layer("q", "kgen", ["bf16"], ["fp32"], ["fp8", "fp32"], [f"{PATH}.quantize.Cast"])
EPILOGUE = layer(["fp32", "fp32"], ["fp32"], "kgen", (PATH, f"{PATH}.rounded", f"{PATH}.weight_dequantized"))


def test_a_product_in_fp8_reads_it_on_both_sides() -> None:
    asked = {PATH: Asked("fp8", "fp8")}
    right = layer(["fp8"], ["fp8", "fp32"])
    check_precision([QUANTIZER, right, EPILOGUE], asked, "bf16")
    for wrong in (
        layer(["bf16"], ["fp8", "fp32"]),
        layer(["bf16"], ["bf16"]),
        layer(["fp32"], ["fp32"]),
        layer(["fp8", "bf16"], ["fp8"]),
        layer(["fp8"], ["fp8", "bf16"]),
        layer(["fp8"], ["bf16"]),
        layer(["fp8"], []),
    ):
        with pytest.raises(EngineError, match="q_proj was to compute in fp8, but layer 'l'"):
            check_precision([QUANTIZER, wrong, EPILOGUE], asked, "bf16")
    with pytest.raises(EngineError, match="no layer of the plan shows that it computes"):
        check_precision([QUANTIZER, EPILOGUE], asked, "bf16")
    with pytest.raises(EngineError, match="no layer of the plan scales what"):
        check_precision([QUANTIZER, right], asked, "bf16")
    second = layer(["bf16"], ["bf16"], "kgen")
    with pytest.raises(EngineError, match="q_proj was to compute in fp8, but layer 'l'"):
        check_precision([QUANTIZER, right, EPILOGUE, second], asked, "bf16")
    for kind in ("conv", "a kind that nobody knows"):
        with pytest.raises(EngineError, match="q_proj was to compute in fp8"):
            check_precision([QUANTIZER, layer(["uint8"], ["fp8"], kind), EPILOGUE], asked, "bf16")


def test_a_product_shows_its_type_by_what_comes_in() -> None:
    """fp32 scales of a product of bf16 numbers are no proof of fp32."""
    router = "model.layers.1.feed_forward.router"
    asked = {router: Asked("fp32")}
    check_precision([layer(["fp32"], ["fp32"], origins=(router,))], asked, "bf16")
    for kind in ("kgen", "gemm"):
        with pytest.raises(EngineError, match="router"):
            check_precision([layer(["bf16"], ["bf16", "fp32"], kind, (router,))], asked, "bf16")


def test_weights_of_two_modules_may_be_prepared_together() -> None:
    """TensorRT-RTX 1.7 puts the weights of products of the same inputs into one, whatever they are stored in."""
    gate, up = (f"model.layers.1.feed_forward.shared_expert.{name}_proj" for name in ("gate", "up"))
    asked = {gate: Asked("bf16", "fp8"), up: Asked("bf16")}
    both = layer([], ["bf16", "fp32", "fp8"], "kgen", (gate, up, f"{gate}.weight_dequantized"))
    product = layer(["bf16"], ["bf16"], origins=(gate, up))
    check_precision([both, product], asked, "bf16")
    with pytest.raises(EngineError, match="no layer of the plan shows"):
        check_precision([both], asked, "bf16")


def test_fp8_belongs_to_modules_that_asked_for_it() -> None:
    other = "model.layers.0.self_attn.k_proj"
    asked = {PATH: Asked("fp8", "fp8"), other: Asked("bf16")}
    layers = [QUANTIZER, layer(["fp8"], ["fp8", "fp32"]), layer(["bf16"], ["bf16"], origins=(other,)), EPILOGUE]
    check_precision(layers, asked, "bf16")
    stray = Layer("s", "kgen", ["bf16"], [], ["fp8"], ["model.layers.0.node_mul"])
    with pytest.raises(EngineError, match="layer 's' computes in fp8, which nobody asked for"):
        check_precision([*layers, stray], asked, "bf16")
    with pytest.raises(EngineError, match="k_proj was to compute in bf16"):
        check_precision([*layers[:2], layer(["fp8"], ["fp8"], origins=(other,))], asked, "bf16")


def test_experts_read_as_many_quantised_weights_as_they_have() -> None:
    path = f"model.layers.1.{EXPERTS.name}"
    asked = {path: Asked("fp8", "fp8", 6)}

    def plugin(x: str, *constants: str) -> Layer:
        rows = [x, "fp32", "int32", "int32"]
        return Layer("l", "custom_layer", rows, list(constants), [x, "uint8"], [path], plugin=EXPERTS.name)

    check_precision([plugin("bf16", *["fp8"] * 6, *["fp32"] * 6)], asked, "bf16")
    for wrong in (plugin("bf16", *["fp8"] * 5), plugin("bf16", *["bf16"] * 6), plugin("fp16", *["fp8"] * 6)):
        with pytest.raises(EngineError, match=EXPERTS.name):
            check_precision([wrong], asked, "bf16")
    plain = {path: Asked("bf16", "", 2, "bf16")}
    check_precision([plugin("bf16", "bf16", "bf16")], plain, "bf16")
    for constants in (("fp8", "fp8"), ("bf16",), ("bf16", "fp16"), ("uint8", "uint8"), ("bf16", "bf16", "fp32")):
        with pytest.raises(EngineError, match=EXPERTS.name):
            check_precision([plugin("bf16", *constants)], plain, "bf16")
    narrower = replace(plugin("bf16", "bf16", "bf16"), outputs=["fp16", "uint8"])
    with pytest.raises(EngineError, match=EXPERTS.name):
        check_precision([narrower], plain, "bf16")


def test_what_the_experts_say_is_held_to_what_was_asked() -> None:
    names = [f"model.layers.{i}.feed_forward.experts" for i in range(2)]
    modules = {
        name: ModulePrecision.model_validate({"weights": "fp8", "granularity": "channel", "activations": kind})
        for name, kind in zip(names, ("fp8-dynamic", "none"), strict=True)
    }
    lines = [
        f"INFO [shuntyard] {EXPERTS.name} in the plan: {name} with activations {kind}"
        for name, kind in zip(names, ("dynamic", "none"), strict=True)
    ]
    said = experts_activations("\n".join([*lines, *lines, "INFO something else"]))
    check_experts(said, modules)
    for wrong in (
        {},
        {names[0]: {"dynamic"}},
        {names[0]: {"none"}, names[1]: {"dynamic"}},
        {names[0]: {"dynamic", "none"}, names[1]: {"none"}},
        said | {"model.layers.2.feed_forward.experts": {"none"}},
    ):
        with pytest.raises(EngineError, match="was to have activations"):
            check_experts(wrong, modules)
    check_experts({}, {})


def test_an_engine_records_what_was_asked(all_linear: Path, tmp_path: Path) -> None:
    build(all_linear, tmp_path / "engine", Request(dtype="fp32", max_context=256))
    manifest = load_manifest(tmp_path / "engine")
    assert manifest.recipe is not None and manifest.recipe.name == "fp8-all-linear"
    assert manifest.modules["model.layers.0.self_attn.q_proj"].activations == "fp8-dynamic"
    assert manifest.precision["model.layers.0.self_attn.q_proj"] == "fp8"
    assert not any(row.built for row in module_rows(tmp_path / "engine", manifest))
