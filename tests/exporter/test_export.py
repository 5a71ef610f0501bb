"""What an export writes: the graph, the weights' places, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

from shuntyard.exporter import trace
from shuntyard.exporter.export import check_graph, export
from shuntyard.exporter.graph import retarget
from tests import driver
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.tolerances import MODEL_MAX_ABS

RAW = raw_config(num_hidden_layers=8)
IDS = np.random.default_rng(0).integers(0, RAW["vocab_size"], size=(2, 20))


@pytest.fixture(scope="module")
def graph(model_directory: Path) -> onnx.ModelProto:
    return onnx.load(model_directory / "model.onnx", load_external_data=False)


def run_exported(path: Path | bytes) -> Any:
    step, cache = driver.exported(driver.open_session(path), parsed(RAW), *IDS.shape)
    return driver.run(step, cache, IDS, RAW["attention_chunk_size"], decode_from=18)


def test_one_call_a_layer(graph: onnx.ModelProto) -> None:
    calls = Counter(node.op_type for node in graph.graph.node)
    assert calls == {
        "Llama4Embedding": 1,
        "Llama4RotaryTable": 1,
        "Llama4RopeDenseLayer": 4,
        "Llama4RopeMoeLayer": 2,
        "Llama4NopeMoeLayer": 2,
        "Llama4Head": 1,
    }
    names = [node.name for node in graph.graph.node]
    assert [name for name in names if "layers" in name] == [f"model.layers.{i}" for i in range(8)]
    functions = Counter(function.name for function in graph.functions)
    assert set(calls) < set(functions) and set(functions.values()) == {1}
    assert {node.domain for function in graph.functions for node in function.node} == {"", "shuntyard"}


def test_plugins_are_named_on_their_nodes(graph: onnx.ModelProto) -> None:
    for function in graph.functions:
        for node in function.node:
            if node.domain == "shuntyard" and "Moe" in node.op_type:
                attributes = {a.name: a.s for a in node.attribute}
                assert attributes["plugin_namespace"] == b"shuntyard" and attributes["plugin_version"] == b"1"


def test_weights_are_the_checkpoints_own_bytes(graph: onnx.ModelProto, model_directory: Path, checkpoint: Path) -> None:
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    seen = set()
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            for name in shard.keys():  # noqa: SIM118  not a dict
                place = {entry.key: entry.value for entry in initializers[name].external_data}
                assert place["location"] == file.name
                begin, length = int(place["offset"]), int(place["length"])
                data = (model_directory / place["location"]).read_bytes()[begin : begin + length]
                tensor = shard.get_tensor(name)
                assert data == tensor.tobytes()
                assert tuple(initializers[name].dims) == tensor.shape
                seen.add(name)
    assert seen == set(initializers)


def test_files(model_directory: Path, checkpoint: Path) -> None:
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    others = {"model.onnx", "shuntyard.json", "config.json", "model.safetensors.index.json"}
    assert {path.name for path in model_directory.iterdir()} == shards | others
    for name in shards:
        assert os.path.samefile(model_directory / name, checkpoint / name)
    manifest = json.loads((model_directory / "shuntyard.json").read_text())
    assert manifest["graph_sha256"] == hashlib.sha256((model_directory / "model.onnx").read_bytes()).hexdigest()
    assert manifest["shards"] == {name: (checkpoint / name).stat().st_size for name in shards}
    assert manifest["waived"] == [] and manifest["values_checked"] is False
    assert [path.name for path in model_directory.parent.iterdir()] == [model_directory.name]
    assert model_directory.stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checker(graph: onnx.ModelProto, model_directory: Path) -> None:
    check_graph(graph, model_directory)


def test_values_in_between_have_names(graph: onnx.ModelProto, model_directory: Path) -> None:
    """Layer outputs and router logits can be asked for; the routers' are those that choose the experts."""
    wanted = [f"model.layers.{i}" for i in range(8)] + [f"model.layers.{i}.feed_forward.router" for i in (1, 3, 5, 7)]
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    path = model_directory.parent / "probed.onnx"
    for file in model_directory.glob("*.safetensors"):
        os.link(file, model_directory.parent / file.name)
    path.write_bytes(copy.SerializeToString())
    session = driver.open_session(path)
    config = parsed(RAW)
    step_cache = driver.exported(session, config, 2, 20)[1]
    feeds: dict[str, Any] = {"input_ids": IDS[:, :5], "logits_indices": np.zeros((2, 1), np.int64)}
    feeds["position_ids"] = np.broadcast_to(np.arange(5), (2, 5)).copy()
    pasts = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    values = session.run(wanted, feeds | dict(zip(pasts, step_cache, strict=True)))
    for name, value in zip(wanted, values, strict=True):
        assert value.dtype == np.float32 and np.isfinite(value).all()
        assert value.shape == ((10, 4) if name.endswith("router") else (2, 5, 32)), name
    for file in model_directory.parent.glob("*.*"):
        file.unlink()


def test_two_exports_are_the_same_bytes(
    checkpoint: Path, model_directory: Path, tmp_path: Path, trace_once: dict[str, Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second one traces anew."""
    for name, function in trace_once.items():
        monkeypatch.setattr(trace, name, function)
    export(checkpoint, tmp_path / "again")
    for name in ("model.onnx", "shuntyard.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model_directory / name).read_bytes()


def test_retarget_is_exporting_in_the_other_type(checkpoint: Path, model_directory: Path, tmp_path: Path) -> None:
    directories = {"fp32": model_directory}
    for dtype in ("fp16", "bf16"):
        directories[dtype] = tmp_path / dtype
        export(checkpoint, tmp_path / dtype, dtype=dtype)
    for old in directories:
        for new in directories:
            model = ir.load(directories[old] / "model.onnx")
            retarget(model, new)
            proto, expected = ir.to_proto(model), ir.to_proto(ir.load(directories[new] / "model.onnx"))
            assert proto.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    wide, narrow = run_exported(model_directory / "model.onnx"), run_exported(tmp_path / "fp16" / "model.onnx")
    assert 0 < np.abs(narrow - wide).mean() < 0.02 * np.abs(wide).mean()  # single logits are off where experts flip
    assert (narrow.argmax(-1) == wide.argmax(-1)).mean() > 0.9


def test_huggingface_cache_layout(checkpoint: Path, model_directory: Path, tmp_path: Path) -> None:
    """Snapshots of links to blobs: the blob is hard-linked, under the shard's name."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    export(snapshot, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert not file.is_symlink()
        if file.suffix == ".safetensors":
            assert file.stat().st_nlink == 2 and file.stat().st_ino == (snapshot / file.name).resolve().stat().st_ino
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (model_directory / "model.onnx").read_bytes()


def test_model_directory_outlives_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    again = write_checkpoint(tmp_path / "again", RAW, random_weights(parsed(RAW), seed=3))
    export(again, tmp_path / "out")
    before = run_exported(tmp_path / "out" / "model.onnx")
    for file in again.iterdir():
        file.unlink()
    again.rmdir()
    np.testing.assert_array_equal(run_exported(tmp_path / "out" / "model.onnx"), before)
    export(tmp_path / "out", tmp_path / "from the model directory")  # it is a checkpoint too


def test_tensors_at_odd_offsets(checkpoint: Path, model_directory: Path, tmp_path: Path) -> None:
    """Headers need not be padded: data may begin at any byte."""
    weights = random_weights(parsed(RAW))
    straight = write_checkpoint(tmp_path / "straight", RAW, weights)
    data = (straight / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = data[8 : 8 + length].rstrip()
    odd += b" " * ((3 - len(odd)) % 8)
    (straight / "model.safetensors").unlink()
    (straight / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + length :])
    export(straight, tmp_path / "out", check_values=True)
    got, expected = (run_exported(path / "model.onnx") for path in (tmp_path / "out", model_directory))
    assert np.abs(got - expected).max() <= MODEL_MAX_ABS


def test_waived_tensors_are_reported(tmp_path: Path) -> None:
    weights = {**random_weights(parsed(RAW)), "model.rotary_emb.inv_freq": torch.ones(4)}
    checkpoint = write_checkpoint(tmp_path / "old", RAW, weights)
    assert export(checkpoint, tmp_path / "out").waived == ["model.rotary_emb.inv_freq"]
    assert json.loads((tmp_path / "out" / "shuntyard.json").read_text())["waived"] == ["model.rotary_emb.inv_freq"]


def test_exporting_reads_no_weights(tmp_path: Path) -> None:
    """Shards of 4 GB, which are holes: the export needs little memory and hardly any disk."""
    raw = raw_config(num_hidden_layers=1, vocab_size=16_000_000)
    config = parsed(raw)
    small = random_weights(parsed(raw_config(num_hidden_layers=1)))
    checkpoint = write_checkpoint(tmp_path / "big", raw, {n: w for n, w in small.items() if w.shape[0] != 64})
    header: dict[str, Any] = {}
    reached = 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        nbytes = config.vocab_size * config.hidden_size * 4
        header[name] = {
            "dtype": "F32",
            "shape": [config.vocab_size, config.hidden_size],
            "data_offsets": [reached, reached + nbytes],
        }
        reached += nbytes
    text = json.dumps(header).encode()
    with (checkpoint / "holes.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + reached)
    (checkpoint / "model.safetensors").rename(checkpoint / "layers.safetensors")
    with safe_open(checkpoint / "layers.safetensors", "np") as shard:
        weight_map = dict.fromkeys(shard.keys(), "layers.safetensors") | dict.fromkeys(header, "holes.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(checkpoint, tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    holes = (tmp_path / "out" / "holes.safetensors").stat()
    assert holes.st_size > 4e9 and holes.st_blocks * 512 < 1e6


def test_nothing_of_the_checkpoint_changes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "own", RAW, shards=2)

    def state() -> dict[str, Any]:
        files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_mode) for p in checkpoint.iterdir()}
        return files | {"": checkpoint.stat().st_mtime_ns}

    before = state()
    export(checkpoint, tmp_path / "out", check_values=True)
    assert state() == before


def test_without_rope_and_without_experts(tmp_path: Path) -> None:
    """Parts that no layer uses are not in the graph."""
    raw = raw_config(num_hidden_layers=1, no_rope_layers=[0], moe_layers=[])
    export(write_checkpoint(tmp_path / "plain", raw), tmp_path / "out")
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    names = {function.name for function in proto.functions}
    assert names == {"Llama4Embedding", "Llama4NopeDenseLayer", "Llama4Head", "ShuntyardCachedAttention"}
    driver.open_session(tmp_path / "out" / "model.onnx")


def test_weights_of_mixed_types_keep_them(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW))
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    names = [name for name in weights if ".experts." not in name]
    mixed = {name: w.to(kinds[names.index(name) % 3] if name in names else kinds[2]) for name, w in weights.items()}
    checkpoint = write_checkpoint(tmp_path / "mixed", RAW, mixed)
    export(checkpoint, tmp_path / "out", check_values=True)
    wide = write_checkpoint(tmp_path / "wide", RAW, {name: w.float() for name, w in mixed.items()})
    export(wide, tmp_path / "out of wide")
    got, expected = (run_exported(tmp_path / name / "model.onnx") for name in ("out", "out of wide"))
    np.testing.assert_array_equal(got, expected)  # widening is exact
