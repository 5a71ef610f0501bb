"""TensorRT-RTX engines, compiled ahead of time without a GPU: the plan is what was asked, or there is none."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from shuntyard.engines import lower, open_engine, proof, tensorrt_build
from shuntyard.engines.build import Reporter, Request, build
from shuntyard.engines.inspect import inspect
from shuntyard.engines.layer_table import Layer, parse_tensorrt_log
from shuntyard.engines.manifest import load_manifest, verify_files
from shuntyard.engines.proof import Asked, check_plugins, check_precision
from shuntyard.errors import EngineError, ShuntyardError, UnsupportedError
from shuntyard.exporter.export import export
from shuntyard.plugins.contract import EXPERTS, PLUGINS
from shuntyard.plugins.library import BuildInfo
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.engines.planting import planted

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

Patch = pytest.MonkeyPatch
NAMES = {op.name for op in PLUGINS}


def request(**changes: Any) -> Request:
    usual: dict[str, Any] = {"backend": "tensorrt-rtx", "gpu": "sm89", "dtype": "bf16", "max_context": 40}
    return Request(**usual | changes)


@pytest.fixture(scope="module")
def engine(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtx") / "engine"
    build(model_directory, out, request())
    return out


def layers_of(engine: Path) -> list[Layer]:
    return [Layer(**layer) for layer in json.loads((engine / "layers.json").read_text())]


def test_the_layer_table_names_the_three_plugins(engine: Path) -> None:
    plugins = [layer for layer in layers_of(engine) if layer.plugin]
    assert Counter(layer.plugin for layer in plugins) == dict.fromkeys(NAMES, 4) == load_manifest(engine).plugins
    for layer in plugins:
        (origin,) = layer.origins
        module, _, name = origin.rpartition(".")
        assert name == layer.plugin
        assert module in {f"model.layers.{i}" for i in (1, 3, 5, 7)}


def asked(precision: dict[str, str]) -> dict[str, Asked]:
    """A manifest's precision, of plain weights in fp32 and fused experts, as it was asked for."""
    experts = [path for path in precision if path.endswith(EXPERTS.name)]
    return {path: Asked(compute) for path, compute in precision.items()} | {
        path: Asked(precision[path], "", 2, "fp32") for path in experts
    }


def test_each_product_is_in_its_type(engine: Path) -> None:
    layers, manifest = layers_of(engine), load_manifest(engine)
    assert Counter(manifest.precision.values()) == {"bf16": 73, "fp32": 8}
    for layer in layers:
        if layer.kind == "gemm":
            expected = "fp32" if layer.origins[0].endswith(".feed_forward.router") else "bf16"
            assert set(layer.inputs) == set(layer.outputs) == {expected}, layer
    check_precision(layers, asked(manifest.precision), "bf16")  # what build has checked


def test_the_directory_is_self_describing(engine: Path) -> None:
    manifest = load_manifest(engine)
    verify_files(engine, manifest, contents=True)
    assert {"engine.plan", "build.log", "layers.json", "libshuntyard_plugins.so"} <= set(manifest.files)
    assert (manifest.backend, manifest.target, manifest.dtype) == ("tensorrt-rtx", "sm89", "bf16")
    assert manifest.plugin_build is not None
    facts = inspect(engine)
    assert len(facts["plugins"]) == 12
    assert not [p for p in engine.iterdir() if p.name.startswith(".")]


def test_it_says_that_it_needs_a_gpu(engine: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="a tensorrt-rtx engine for sm89 needs a GPU") as refused:
        open_engine(engine)
    assert "onnxruntime" in str(refused.value.hint)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_types(model_directory: Path, tmp_path: Path, dtype: str) -> None:
    manifest = build(model_directory, tmp_path / "engine", request(dtype=dtype))
    assert set(manifest.precision.values()) == {dtype, "fp32"}
    assert sum(manifest.plugins.values()) == 12


def test_a_realistic_layer_for_another_gpu(tmp_path: Path) -> None:
    """bf16 weights straight into the plugin; heads of 128, for which attention is one kernel."""
    raw = raw_config(
        num_hidden_layers=4,
        hidden_size=256,
        head_dim=128,
        intermediate_size=128,
        interleave_moe_layer_step=1,
        attention_chunk_size=64,
        max_position_embeddings=256,
    )
    weights = random_weights(parsed(raw), dtype=torch.bfloat16)
    export(write_checkpoint(tmp_path / "checkpoint", raw, weights), tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", request(gpu="sm120", max_context=256))
    layers = layers_of(tmp_path / "engine")
    experts = [layer for layer in layers if layer.plugin == "ShuntyardMoeExperts"]
    assert [layer.constants for layer in experts] == [["bf16", "bf16"]] * 4


def test_progress_is_reported(model_directory: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    lines: list[str] = []
    reporter = Reporter(line=lines.append, progress=lambda *event: seen.append(event))
    build(model_directory, tmp_path / "engine", request(), reporter)
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)
    assert any("layers in the plan" in line for line in lines)


def refusal(model: Path, out: Path, **changes: Any) -> ShuntyardError:
    with pytest.raises(ShuntyardError) as refused:
        build(model, out, request(**changes))
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return refused.value


def cast_product(model: ir.Model, name: str, to: ir.DataType, back: ir.DataType) -> None:
    """Every product called ``name`` in another type, and its result back in the type it had."""
    for function in model.functions.values():
        for node in [node for node in function if node.name == name]:
            for i, value in enumerate(node.inputs):
                cast = ir.node("Cast", [value], {"to": to})
                function.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])
            result = node.outputs[0]
            uses = list(result.uses())
            cast = ir.node("Cast", [result], {"to": back})
            function.insert_after(node, cast)
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            if result in function.outputs:
                function.outputs[function.outputs.index(result)] = cast.outputs[0]


def halve_lm_head(model: ir.Model) -> None:
    """In fp16. (In fp32 and back, it would be built as the bf16 product that it is equal to.)"""
    cast_product(model, "lm_head", ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def narrow_router(model: ir.Model) -> None:
    cast_product(model, proof.ROUTER, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


def test_a_module_in_another_type_is_caught(model_directory: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    planted(monkeypatch, halve_lm_head)
    error = refusal(model_directory, tmp_path / "engine")
    assert "lm_head was to compute in bf16, but layer" in error.message
    assert "fp16" in error.message
    assert "log is kept in" in str(error.hint)
    assert Path(str(error.hint).rsplit(" ", 1)[1]).is_file()


def test_a_router_that_is_not_in_fp32_is_caught(model_directory: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    planted(monkeypatch, narrow_router)
    message = refusal(model_directory, tmp_path / "engine").message
    assert "feed_forward.router was to compute in fp32, but layer" in message


def test_a_plugin_that_is_not_in_the_plan_is_caught(model_directory: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The parser takes a function body where a node names no plugin; nothing but our check would notice."""
    from shuntyard.plugins.functions import moe_scatter_add

    def with_a_body(model: ir.Model) -> None:
        body = moe_scatter_add()
        body.opset_imports.update({"": 24})
        model.functions[body.identifier()] = body
        for function in model.functions.values():
            for node in function:
                if node.op_type == body.name:
                    node.attributes.pop("plugin_namespace")

    planted(monkeypatch, with_a_body)
    message = refusal(model_directory, tmp_path / "engine").message
    assert message == "the plan has 0 layers of plugin ShuntyardMoeScatterAdd, the graph asks for 4"


def test_a_parser_error_is_told(model_directory: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    def misspell(model: ir.Model) -> None:
        for function in model.functions.values():
            for node in function:
                if node.op_type == "ShuntyardMoeExperts":
                    node.op_type = "ShuntyardMoeExpertz"

    planted(monkeypatch, misspell)
    message = refusal(model_directory, tmp_path / "engine").message
    assert "the ONNX parser refuses the graph" in message
    assert "ShuntyardMoeExpertz" in message


@pytest.mark.parametrize("script", ["kill -SEGV $$", "echo first; echo it broke >&2; exit 3"], ids=["signal", "status"])
def test_a_crash_of_the_compiler_is_explained(
    model_directory: Path, tmp_path: Path, monkeypatch: Patch, script: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "executable", str(fake))
    error = refusal(model_directory, tmp_path / "out" / "engine")
    expected = "was killed by signal 11" if "SEGV" in script else "ended with status 3: it broke"
    assert expected in error.message
    assert "log is kept in" in str(error.hint)


def test_a_library_that_cannot_be_loaded(model_directory: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tensorrt_build, "library_path", lambda: broken)
    assert "is no plugin library of shuntyard" in refusal(model_directory, tmp_path / "out" / "engine").message


@pytest.mark.parametrize("gpu", ["sm70", "sm90", "h100", "89", ""])
def test_gpus_that_cannot_be_built_for(model_directory: Path, tmp_path: Path, gpu: str) -> None:
    error = refusal(model_directory, tmp_path / "engine", gpu=gpu)
    assert isinstance(error, UnsupportedError)
    assert f"cannot build for '{gpu}'" in error.message
    assert ("--backend tensorrt" if gpu in ("sm90", "h100") else "sm89") in str(error.hint)


def test_a_gpu_without_kernels_is_warned_of(model_directory: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    manifest = build(model_directory, tmp_path / "engine", request(gpu="sm80"), Reporter(warning=warnings.append))
    assert manifest.plugin_build is not None
    if manifest.plugin_build.runs_on("sm80"):
        assert not warnings
    else:
        (warning,) = warnings
        assert "will not run there" in warning
        assert "SHUNTYARD_CUDA_ARCHITECTURES=80" in warning


def test_which_kernels_run_where() -> None:
    def info(cuda: str | None, *architectures: int) -> BuildInfo:
        return BuildInfo(version="1", abi_version=1, cuda=cuda, cuda_source="pip", architectures=architectures)

    usual = info("13.0", 89, 90, 120)
    assert [t for t in ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121") if usual.runs_on(t)] == [
        "sm89",
        "sm90",
        "sm120",
        "sm121",
    ]
    assert info("13.0", 80).runs_on("sm89")
    assert info("13.0", 75).runs_on("sm120")  # by PTX
    assert not info(None).runs_on("sm89")


LINE = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: a, Dimensions: [1], Datatype: {read}, Format: x }}], "
    "Constants: [], Outputs: [ {{ Name: b, Datatype: BFloat16 }}], TacticName: t, StreamId: 0, Metadata: {metadata}"
)


def parse(read: str = "BFloat16", kind: str = "gemm", name: str = "q", metadata: str | None = None) -> list[Layer]:
    metadata = "[ONNX Layer: self_attn.q_proj | model.layers.0 (Kind)]" if metadata is None else metadata
    return parse_tensorrt_log("VERBOSE x\n" + LINE.format(name=name, kind=kind, read=read, metadata=metadata) + "\n")


def test_precision_is_read_strictly() -> None:
    expected = {"model.layers.0.self_attn.q_proj": Asked("bf16")}
    check_precision(parse(), expected, "bf16")
    check_precision(parse(kind="kgen"), expected, "bf16")
    for read, kind in (("Float", "gemm"), ("Half", "gemm"), ("FP8", "gemm"), ("Half", "kgen"), ("UInt8", "conv")):
        with pytest.raises(EngineError, match=r"q_proj"):
            check_precision(parse(read, kind), expected, "bf16")
    with pytest.raises(EngineError, match="no layer of the plan shows that it computes"):
        check_precision(parse("Float", "kgen"), expected, "bf16")  # fp32 in between is no proof of bf16
    with pytest.raises(EngineError, match="no layer of the plan shows that it computes"):
        check_precision(parse(metadata=""), expected, "bf16")
    with pytest.raises(EngineError, match="computes in fp16, which nobody asked for"):
        check_precision([*parse(), *parse("Half", "kgen", metadata="")], expected, "bf16")


def test_types_that_nobody_knows_are_refused() -> None:
    for read in ("Int8", "FP4", "NewType"):
        with pytest.raises(EngineError, match=f"a type that is not known: {read}"):
            parse(read)


def test_streams_are_joined_by_layers_that_compute_nothing() -> None:
    """As TensorRT-RTX 1.7 writes them for a model of hidden size 256 and more."""
    lines = [
        f"Name: __mye{i}, LayerType: {kind}, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: {i}, "
        "EventId: 1, Metadata: "
        for i, kind in enumerate(("signal", "wait"))
    ]
    layers = parse_tensorrt_log("\n".join(lines))
    assert [(layer.kind, layer.origins, layer.plugin) for layer in layers] == [("signal", [], None), ("wait", [], None)]
    check_precision([*parse(), *layers], {"model.layers.0.self_attn.q_proj": Asked("bf16")}, "bf16")


def test_dumps_in_other_forms_are_refused() -> None:
    with pytest.raises(EngineError, match="has no layer dump"):
        parse_tensorrt_log("VERBOSE nothing here")
    with pytest.raises(EngineError, match="a line in an unknown form"):
        parse_tensorrt_log("Name: x, LayerType: y, but nothing more")
    with pytest.raises(EngineError, match="the plan has 1 layers of plugin ShuntyardMoeExperts, the graph asks for 0"):
        check_plugins(parse(kind="PluginV3", name="ShuntyardMoeExperts_3"), Counter())
    assert parse(kind="kgen", name="ShuntyardMoeExperts_3")[0].plugin is None


def test_lowering_leaves_no_body_to_fall_back_on(model_directory: Path) -> None:
    from shuntyard.engines.build import open_model

    model = open_model(model_directory).model
    lower.for_tensorrt(model, "bf16", context=40, chunk=8)
    assert not NAMES & {function.name for function in model.functions.values()}
