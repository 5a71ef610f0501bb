"""``build``: what an engine directory holds, and what is refused before one appears."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from shuntyard.engines import lower
from shuntyard.engines.build import Reporter, Request, build, open_model
from shuntyard.engines.inspect import inspect
from shuntyard.engines.manifest import load_manifest, sha256_of, verify_files
from shuntyard.errors import CheckpointError, EngineError, OutputError, ShuntyardError, UnsupportedError
from shuntyard.exporter.export import export
from shuntyard.exporter.graph import retarget
from shuntyard.plugins.contract import PLUGINS
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint

RAW = raw_config(num_hidden_layers=8)


def test_the_manifest_describes_the_directory(engine_directory: Path, model_directory: Path) -> None:
    manifest = load_manifest(engine_directory)
    verify_files(engine_directory, manifest, contents=True)
    assert set(manifest.files) == {p.name for p in engine_directory.iterdir()} - {"shuntyard.json"}
    assert manifest.graph_sha256 == sha256_of(model_directory / "model.onnx")
    assert (manifest.backend, manifest.target, manifest.dtype) == ("onnxruntime", "cpu", "fp32")
    assert (manifest.limits.max_context, manifest.limits.chunk, manifest.limits.max_tokens) == (40, 8, 8)
    assert [shape.rows for shape in manifest.cache] == [8, 8, 8, 40, 8, 8, 8, 40]
    assert manifest.precision["model.layers.1.feed_forward.router"] == "fp32"
    assert manifest.precision["lm_head"] == "fp32"
    layers = json.loads((engine_directory / "layers.json").read_text())
    assert [layer["name"] for layer in layers if "layers" in layer["name"]] == [f"model.layers.{i}" for i in range(8)]


def test_precision_names_every_product(model_directory: Path) -> None:
    opened = open_model(model_directory)
    from shuntyard.engines.proof import compute_types, expected_precision

    precision = compute_types(expected_precision(opened.model, "fp16", opened.manifest.precision))
    for i in range(8):
        own = {path.removeprefix(f"model.layers.{i}.") for path in precision if path.startswith(f"model.layers.{i}.")}
        projections = {f"self_attn.{name}_proj" for name in "qkvo"} | {"self_attn.attention"}
        mlp = "feed_forward.shared_expert" if i % 2 else "feed_forward"
        expected = projections | {f"{mlp}.{name}_proj" for name in ("gate", "up", "down")}
        if i % 2:
            expected |= {"feed_forward.router", *(op.name for op in PLUGINS)}
        assert own == expected
    in_fp32 = {path for path, dtype in precision.items() if dtype == "fp32"}
    assert in_fp32 == {
        f"model.layers.{i}.{name}" for i in range(1, 8, 2) for name in ("feed_forward.router", "ShuntyardMoeRouting")
    }


def refusal(out: Path, model: Path, **request: object) -> ShuntyardError:
    with pytest.raises(ShuntyardError) as refused:
        build(model, out, Request(**request))  # type: ignore[arg-type]
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))
    assert refused.value.hint
    return refused.value


def test_requests_that_cannot_be_met(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    error = refusal(out, model_directory, dtype="bf16")
    assert isinstance(error, UnsupportedError)
    assert "CPU provider cannot compute in bf16" in error.message
    assert "--dtype fp32" in str(error.hint)
    assert "has no meaning" in str(refusal(out, model_directory, gpu="sm89"))
    assert "backend 'openvino' is not known" in refusal(out, model_directory, backend="openvino").message
    assert "beyond the model's max_position_embeddings, 128" in refusal(out, model_directory, max_context=129).message
    assert "dtype 'fp64' is not supported" in refusal(out, model_directory, dtype="fp64").message
    assert "max_batch is 0" in refusal(out, model_directory, max_batch=0).message
    assert "needs to know for which GPU" in refusal(out, model_directory, backend="tensorrt-rtx").message
    error = refusal(out, model_directory, backend="tensorrt-rtx", gpu="sm90")
    assert "cannot build for 'sm90'" in error.message
    assert "--backend tensorrt" in str(error.hint)


def test_existing_output_is_left_alone(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "precious").write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        build(model_directory, tmp_path / "engine", Request())
    assert (tmp_path / "engine" / "precious").read_text() == "kept"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = random_weights(parsed(RAW))
    weights["model.layers.3.feed_forward.experts.down_proj"][2, 5, 7] = value
    export(write_checkpoint(tmp_path / "bad", RAW, weights), tmp_path / "model")  # does not look at values
    error = refusal(tmp_path / "engine", tmp_path / "model")
    assert isinstance(error, CheckpointError)
    assert "tensor 'model.layers.3.feed_forward.experts.down_proj' at [2, 5, 7] holds" in error.message
    assert "is not finite" in error.message


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    weights["lm_head.weight"][1, 2] = 70000.0
    export(write_checkpoint(tmp_path / "large", RAW, weights), tmp_path / "model")
    error = refusal(tmp_path / "engine", tmp_path / "model", dtype="fp16")
    assert "'lm_head.weight' at [1, 2] holds 70144.0, which is beyond 65504" in error.message
    build(tmp_path / "model", tmp_path / "engine", Request(dtype="fp32"))


def test_routers_whose_experts_tie_are_warned_of(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW))
    router = weights["model.layers.3.feed_forward.router.weight"]
    router[2] = router[0]
    export(write_checkpoint(tmp_path / "tied", RAW, weights), tmp_path / "model")
    warnings: list[str] = []
    build(tmp_path / "model", tmp_path / "engine", Request(), Reporter(warning=warnings.append))
    (warning,) = warnings
    assert warning.startswith("model.layers.3.feed_forward.router.weight has equal rows")


def test_a_model_directory_that_was_changed_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "own", RAW)
    export(checkpoint, tmp_path / "model", copy=True)
    graph = tmp_path / "model" / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole.replace(b"Llama4Head", b"Llama4Tail"))
    assert "is not the graph that was exported" in refusal(tmp_path / "engine", tmp_path / "model").message
    graph.write_bytes(whole)
    other = write_checkpoint(tmp_path / "other", RAW, random_weights(parsed(RAW), dtype=torch.bfloat16))
    (tmp_path / "model" / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert "its shards are not those that were exported" in refusal(tmp_path / "engine", tmp_path / "model").message
    engine = tmp_path / "an engine"
    engine.mkdir()
    (engine / "shuntyard.json").write_text('{"kind": "engine"}')
    error = refusal(tmp_path / "engine", engine)
    assert isinstance(error, EngineError)
    assert "is not a model directory" in error.message


def test_the_graph_for_tensorrt_is_the_portable_graph(model_directory: Path) -> None:
    """But for the bodies of the ops that have plugins, and for cache sizes, which become numbers.

    And each layer with experts has a copy of its function, in which the experts know whose they are.
    """
    portable, lowered = open_model(model_directory).model, open_model(model_directory).model
    retarget(portable, "bf16")
    lower.for_tensorrt(lowered, "bf16", context=40, chunk=8)
    plugins = {op.name for op in PLUGINS}
    ours, theirs = ir.to_proto(portable), ir.to_proto(lowered)
    kept = {f.name: f for f in ours.functions if f.name not in plugins}
    assert len(kept) == len(ours.functions) - len(plugins)
    own = {f.name: f for f in theirs.functions}
    for before, after in zip(ours.graph.node, theirs.graph.node, strict=True):
        if before.op_type in own and before.op_type == after.op_type:
            continue
        copied = own.pop(after.op_type)
        (experts,) = (node for node in copied.node if node.op_type == "ShuntyardMoeExperts")
        (module,) = (attribute for attribute in experts.attribute if attribute.name == "module")
        assert module.s.decode() == f"{before.name}.feed_forward.experts"
        experts.attribute.remove(module)
        copied.name = after.op_type = before.op_type
        assert copied.SerializeToString(deterministic=True) == kept[before.op_type].SerializeToString(
            deterministic=True
        )
    shared = {name for name, function in kept.items() if all(n.op_type != "ShuntyardMoeExperts" for n in function.node)}
    assert own.keys() == shared
    for name in shared:
        assert own[name].SerializeToString(deterministic=True) == kept[name].SerializeToString(deterministic=True)
    assert [n.SerializeToString() for n in ours.graph.node] == [n.SerializeToString() for n in theirs.graph.node]
    assert list(ours.graph.initializer) == list(theirs.graph.initializer)
    sizes = {"context": 40, "chunk": 8}
    for value in (*ours.graph.input, *ours.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    assert list(ours.graph.input) == list(theirs.graph.input)
    assert list(ours.graph.output) == list(theirs.graph.output)


def test_inspect_knows_all_three_kinds(checkpoint: Path, model_directory: Path, engine_directory: Path) -> None:
    kinds = [inspect(path) for path in (checkpoint, model_directory, engine_directory)]
    assert [facts["kind"] for facts in kinds] == ["checkpoint", "model", "engine"]
    assert len({facts["fingerprint"] for facts in kinds}) == 1
    total = sum(weight.numel() for weight in random_weights(parsed(RAW)).values())
    idle = 4 * 2 * 3 * RAW["hidden_size"] * RAW["intermediate_size"]  # MoE layers * idle experts * gate, up, down
    assert kinds[0]["parameters"] == kinds[1]["parameters"] == f"{total:,} ({total - idle:,} active a token)"
    assert kinds[1]["layer functions"]["Llama4RopeMoeLayer"] == 2
    assert kinds[2]["backend"].startswith("onnxruntime ")
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect(checkpoint / "nowhere")
