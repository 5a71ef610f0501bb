"""``export`` with other weights than the stored ones: the same values, in another type and layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shuntyard.engines.build import Request, build, eos_token_ids
from shuntyard.engines.text import Tokenizer
from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter import export as export_module
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import export
from shuntyard.exporter.relayout import Relayout
from shuntyard.exporter.weights import match_weights
from shuntyard.validate.dequantise import dequantised_state
from tests import driver
from tests.checkpoints import parsed, random_text, random_weights, raw_config, write_checkpoint, write_tokenizer
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, handmade
from tests.validate.judged import Asked, judged

RAW = raw_config(intermediate_size=32, intermediate_size_mlp=48)
IDS = np.random.default_rng(0).integers(0, 64, size=(2, 20))

STORED = {
    "plain fused": (PLAIN, "fused"),
    "plain linear": (PLAIN, "linear"),
    "FP8 fused": (TENSOR, "fused"),
    "FP8 linear": (CHANNEL, "linear"),
    "INT4": (Way("group", 16), "linear"),
}


def checkpoint_of(folder: Path, way: Way, layout: str) -> Path:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda module: PLAIN if "router" in module else way, lambda layer: layout)
    if way is not PLAIN:
        declare_compressed_tensors(made)
    return made.write(folder / "checkpoint")


def logits(model: Path) -> np.ndarray:
    step, cache = driver.exported(driver.open_session(model / "model.onnx"), open_checkpoint(model).config, 2, 20)
    return driver.run(step, cache, IDS, 8, decode_from=15)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("experts", [None, "fused", "linear"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_values_are_the_same(stored: str, experts: str | None, weights: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, *STORED[stored])
    result = export(checkpoint, tmp_path / "model", relayout=Relayout(weights, experts))
    assert result.bytes_linked == 0 < result.bytes_written
    expected, got = dequantised_state(checkpoint), dequantised_state(tmp_path / "model")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value if weights == "fp32" else value.to(torch.bfloat16).float()
        assert torch.equal(got[name], wanted), name
    opened = match_weights(open_checkpoint(tmp_path / "model"))
    layout = experts or STORED[stored][1]
    assert {own.form.layout for own in opened.experts.values()} == {layout}
    assert {own.entry.dtype for _, own in opened.stored()} == {"F32" if weights == "fp32" else "BF16"}


@pytest.mark.parametrize("stored", ["plain fused", "INT4"])
def test_logits_are_the_same_bit_for_bit(stored: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, *STORED[stored])
    export(checkpoint, tmp_path / "model")
    export(checkpoint, tmp_path / "rewritten", relayout=Relayout("fp32", "linear"))
    np.testing.assert_array_equal(logits(tmp_path / "rewritten"), logits(tmp_path / "model"))


def test_split_experts_are_rewritten_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, PLAIN, "fused")
    states = []
    for largest in (2**31, 100):
        monkeypatch.setattr("shuntyard.exporter.split.LARGEST_TENSOR", largest)
        for experts in ("fused", "linear"):
            export(checkpoint, tmp_path / f"{largest}-{experts}", relayout=Relayout("fp16", experts))
            states.append(dequantised_state(tmp_path / f"{largest}-{experts}"))
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, PLAIN, "fused")
    asked = Relayout("fp32", "linear")
    export(checkpoint, tmp_path / "whole", relayout=asked)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_write_graph", interrupt)  # the weights are there, the graph is not
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, tmp_path / "model", relayout=asked)
    assert not (tmp_path / "model").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".model.partial-")]
    export(checkpoint, tmp_path / "model", relayout=asked)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    whole, again = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "model"))
    assert whole == again


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_new_directory_stands_alone_and_validates(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, CHANNEL, "linear")
    write_tokenizer(checkpoint, 64)
    export(checkpoint, tmp_path / "model", relayout=Relayout("fp32", "fused"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    build(tmp_path / "model", tmp_path / "engine", Request(max_context=40))
    for reference in (checkpoint, tmp_path / "model"):
        report = judged(tmp_path / "engine", reference, random_text(300, 64), Asked(windows=2, length=20))
        assert report.passed, report.checks
    again = tmp_path / "again"
    export(tmp_path / "model", again)  # what was written is a checkpoint like any other
    np.testing.assert_array_equal(logits(again), logits(tmp_path / "model"))


def test_other_values_of_the_same_shapes_are_told_apart(tmp_path: Path) -> None:
    """Fingerprints are of headers: a rewritten engine's values are compared themselves."""
    made = handmade(RAW, random_weights(parsed(RAW), dtype=torch.bfloat16), lambda module: PLAIN)
    checkpoint = made.write(tmp_path / "checkpoint")
    made.tensors["lm_head.weight"] = made.tensors["lm_head.weight"] * 1.01
    other = made.write(tmp_path / "other")
    for path in (checkpoint, other):
        write_tokenizer(path, 64)
    export(checkpoint, tmp_path / "model", relayout=Relayout("bf16", "linear"))
    build(tmp_path / "model", tmp_path / "engine", Request(max_context=40))
    plan = Asked(windows=2, length=20)
    assert judged(tmp_path / "engine", checkpoint, random_text(300, 64), plan).passed
    report = judged(tmp_path / "engine", other, random_text(300, 64), plan)
    (failed,) = [check for check in report.checks if check.name.startswith("files")]
    assert not failed.ok and "'lm_head.weight' of the engine is not what a rewrite" in failed.detail


def test_text_tokens_of_a_nested_configuration_stay(tmp_path: Path) -> None:
    text = {**RAW, "eos_token_id": [5, 6], "bos_token_id": 7}
    nested = {"model_type": "llama4", "text_config": text, "eos_token_id": None}
    made = handmade(nested, random_weights(parsed(RAW), dtype=torch.bfloat16), lambda module: PLAIN)
    checkpoint = made.write(tmp_path / "checkpoint")
    write_tokenizer(checkpoint, 64)
    for asked in (Relayout(), Relayout("fp32")):
        export(checkpoint, tmp_path / f"{asked.weights}", relayout=asked)
        assert eos_token_ids(tmp_path / f"{asked.weights}") == [5, 6]
        assert Tokenizer.from_directory(tmp_path / f"{asked.weights}").encode("w3 w4") == [7, 3, 4]


def test_refusals(tmp_path: Path) -> None:
    quantised = checkpoint_of(tmp_path, CHANNEL, "linear")
    with pytest.raises(
        UnsupportedError, match=r"is quantised, and --experts alone leaves values as they are"
    ) as refused:
        export(quantised, tmp_path / "model", relayout=Relayout(None, "fused"))
    assert "--weights bf16" in refused.value.hint
    with pytest.raises(UnsupportedError, match="--weights fp8 is not known"):
        export(quantised, tmp_path / "model", relayout=Relayout("fp8"))
    weights = random_weights(parsed(RAW))
    weights["model.norm.weight"][3] = 1e6
    large = write_checkpoint(tmp_path / "large", RAW, weights)
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        export(large, tmp_path / "model", relayout=Relayout("fp16"))
    unchunked = {**RAW, "attention_chunk_size": None, "max_position_embeddings": 2**24}
    endless = write_checkpoint(tmp_path / "endless", unchunked)
    with pytest.raises(UnsupportedError, match="rotary positions must stay below"):
        export(endless, tmp_path / "model", relayout=Relayout("fp16"), progress=no_byte)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))


def no_byte(*_: object) -> None:
    raise AssertionError("nothing is to be written before a refusal that is known")
