"""``validate``: sound engines pass, engines of another model fail, and what was not exercised is said."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from shuntyard.engines.build import Request, build
from shuntyard.engines.engine import Engine
from shuntyard.engines.onnxruntime_runner import OnnxRuntimeRunner
from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.export import export
from shuntyard.validate.reference import Reference
from shuntyard.validate.report import Report
from shuntyard.validate.validate import Inputs, Plan, validate
from tests.checkpoints import parsed, random_text, random_weights, raw_config, write_checkpoint, write_tokenizer
from tests.conftest import Worded
from tests.validate.judged import Asked, judged

CHANGES: dict[str, Any] = {"num_hidden_layers": 8, "bos_token_id": 1, "eos_token_id": 2}
TEXT = random_text(400, 64)
PLAN = Asked(windows=6, length=28, decode=20)
FEW = "not exercised: batches of more than 6 of 8 sequences"
OTHER = replace(PLAN, allow_other_files=True)


def test_a_sound_engine_passes(worded: Worded) -> None:
    report = judged(worded.engine, worded.checkpoint, TEXT, PLAN)
    assert report.passed, report.as_dict()
    assert [note for note in report.notes if "exercised" in note or "files" in note] == [FEW]
    assert (report.culprit, report.failures) == ("", [])
    assert report.tokens == 6 * 28
    names = [check.name for check in report.checks]
    for part in ("prefill", "decode"):
        assert f"{part}: max abs error" in names
        assert f"{part}: perplexity, relative" in names
    assert [n for n in names if n.startswith("greedy")] == [f"greedy: 20 tokens after {n}" for n in (8, 5, 2)]
    for mode in ("forced", "inverse", "free"):  # 8 layers, 4 of them routed
        own = [module for module in report.modules if module.mode == mode]
        assert len(own) == 8 * 7 + 4 * 3 + (0 if mode == "free" else 2)
        assert all(module.ok for module in own)
    assert [routing.layer for routing in report.routing] == [1, 3, 5, 7]
    assert all(sum(r.load_reference) == sum(r.load_engine) == 2 * 6 * 28 for r in report.routing)  # top-2
    assert sum(report.histogram["counts"]) == 6 * 28 * 64
    assert len(report.sequences) == 6
    assert all(s.routing_miss == 0.0 and 0 < (s.forced_error or 0) < 1e-5 for s in report.sequences)


def test_both_perplexities_are_the_text_s(worded: Worded) -> None:
    report = judged(worded.engine, worded.checkpoint, TEXT, PLAN)
    (check,) = [c for c in report.checks if c.name == "prefill: perplexity, relative"]
    reference = Reference(worded.checkpoint)
    ids = [1, *(int(word[1:]) for word in TEXT.split())]
    losses = []
    for i in range(6):
        window = torch.tensor([[ids[0], *ids[1 + 27 * i : 28 + 27 * i]]])
        logits = torch.from_numpy(reference.logits(window.numpy()))[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1].double(), window[0, 1:]).item())
    expected = math.exp(sum(losses) / 6)
    assert check.detail == f"engine {expected:.6g}, reference {expected:.6g}"


def engine_of(folder: Path, changes: dict[str, Any], weights: dict[str, torch.Tensor], **request: Any) -> Path:
    checkpoint = write_checkpoint(folder / "checkpoint", raw_config(**CHANGES | changes), weights)
    write_tokenizer(checkpoint, 64)
    export(checkpoint, folder / "model")
    build(folder / "model", folder / "engine", Request(max_context=64, **request))
    return folder / "engine"


FAULTS: dict[str, dict[str, Any]] = {
    "temperature off": {"attn_temperature_tuning": False},
    "QK norm off": {"use_qk_norm": False},
    "chunks of another size": {"attention_chunk_size": 12},
    "rope scaling off": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_engine_of_another_model_fails(name: str, worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    report = judged(engine_of(tmp_path, FAULTS[name], weights), worded.checkpoint, TEXT, OTHER)
    assert not report.passed
    failed = {check.name for check in report.checks if check.ok is False}
    assert {"prefill: max abs error", "decode: max abs error"} <= failed
    assert "the engine was built from other files than the reference reads" in report.notes


def test_one_swapped_expert_fails(worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    name = "model.layers.5.feed_forward.experts.down_proj"
    weights[name] = weights[name][[1, 0, 2, 3]].contiguous()
    engine = engine_of(tmp_path, {}, weights)
    report = judged(engine, worded.checkpoint, TEXT, OTHER)
    assert not report.passed
    assert {check.name for check in report.checks if check.ok is False} >= {"prefill: mean KL", "decode: mean KL"}
    report = judged(engine, worded.checkpoint, TEXT, PLAN)
    assert report.checks[0].name == "files: the same"
    assert report.checks[0].ok is False


def test_other_files_fail_even_if_they_agree(worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    engine = engine_of(tmp_path, {"use_cache": True}, weights)
    report = judged(engine, worded.checkpoint, TEXT, PLAN)
    assert [check.name for check in report.checks if check.ok is False] == ["files: the same"]
    report = judged(engine, worded.checkpoint, TEXT, OTHER)
    assert report.passed
    assert report.notes == [FEW, "the engine was built from other files than the reference reads"]


def test_a_fault_in_all_sequences_but_the_first_fails(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    """In decoding, where batches were not looked at once; with one window too."""
    real = OnnxRuntimeRunner.step

    def faulty(self: OnnxRuntimeRunner, ids: Any, positions: Any, picked: Any) -> Any:
        out = real(self, ids, positions, picked)
        if ids.shape[1] == 1:
            out[1:] = out[1:, :, ::-1]
        return out

    monkeypatch.setattr(OnnxRuntimeRunner, "step", faulty)
    for plan in (PLAN, replace(PLAN, windows=1)):
        failed = {c.name for c in judged(worded.engine, worded.checkpoint, TEXT, plan).checks if c.ok is False}
        assert "decode: max abs error" in failed
        assert any(name.startswith("greedy") for name in failed)
        assert "prefill: max abs error" not in failed


@pytest.mark.parametrize("length", [9, 12, 15, 16, 17, 28])
def test_decoding_crosses_a_chunk_s_edge_whatever_the_length(
    worded: Worded, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    real = OnnxRuntimeRunner.step

    def faulty(self: OnnxRuntimeRunner, ids: Any, positions: Any, picked: Any) -> Any:
        out = real(self, ids, positions, picked)
        if ids.shape[1] == 1 and positions[0, 0] % 8 == 0:
            out = out[:, :, ::-1].copy()
        return out

    monkeypatch.setattr(OnnxRuntimeRunner, "step", faulty)
    report = judged(worded.engine, worded.checkpoint, TEXT, replace(PLAN, length=length, decode=3))
    assert "decode: max abs error" in {c.name for c in report.checks if c.ok is False}


def test_vocabularies_that_differ_are_refused(worded: Worded, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", raw_config(**CHANGES | {"vocab_size": 80}))
    write_tokenizer(other, 64)
    with pytest.raises(EngineError, match="has vocab_size 64, .* has 80"):
        judged(worded.engine, other, TEXT, PLAN)
    small = tmp_path / "small"
    shutil.copytree(worded.checkpoint, small)
    write_tokenizer(small, 90)
    with pytest.raises(EngineError, match="json gives token 89, the model's vocabulary has 64"):
        judged(worded.engine, small, random_text(400, 90), PLAN)


def test_greedy_is_greedy_whatever_the_generation_config_likes(worded: Worded, tmp_path: Path) -> None:
    liked = tmp_path / "liked"
    shutil.copytree(worded.checkpoint, liked)
    wishes = {"repetition_penalty": 1.5, "num_beams": 3, "no_repeat_ngram_size": 2, "suppress_tokens": [5]}
    (liked / "generation_config.json").write_text(json.dumps(wishes))
    report = judged(worded.engine, liked, TEXT, PLAN)
    assert report.passed, report.as_dict()


def test_configurations_that_change_the_form_of_answers(worded: Worded, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(worded.checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    wishes = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    (other / "config.json").write_text(json.dumps(config | wishes))
    assert judged(worded.engine, other, TEXT, OTHER).passed


def test_an_fp16_engine_is_judged_by_fp16_s_tolerances(worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    report = judged(engine_of(tmp_path, {}, weights, dtype="fp16"), worded.checkpoint, TEXT, PLAN)
    by_name = {check.name: check for check in report.checks}
    assert by_name["prefill: max abs error"].ok is None
    assert by_name["prefill: mean KL"].bound == "<= 0.002"


def test_logits_that_are_not_finite_fail(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeRunner.step

    def poisoned(self: OnnxRuntimeRunner, *arguments: Any) -> Any:
        out = real(self, *arguments)
        out[0, 0, 4] = math.nan
        return out

    monkeypatch.setattr(OnnxRuntimeRunner, "step", poisoned)
    report = judged(worded.engine, worded.checkpoint, TEXT, PLAN)
    parts = ("prefill", "decode", "greedy", "inverse")
    assert [(c.name, c.ok) for c in report.checks if c.ok is False] == [(f"{p}: logits finite", False) for p in parts]


def test_a_greedy_difference_fails_unless_it_is_a_tie(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.generate

    def other(self: Engine, *arguments: Any, **named: Any) -> Any:
        out = real(self, *arguments, **named)
        out[0, 7] = (out[0, 7] + 1) % 64
        return out

    monkeypatch.setattr(Engine, "generate", other)
    report = judged(worded.engine, worded.checkpoint, TEXT, PLAN)
    check = next(check for check in report.checks if check.name.startswith("greedy"))
    assert (check.value, check.ok) == ("differ at 7", False)
    assert "margin" in check.detail


def test_what_a_short_text_does_not_exercise_is_said(worded: Worded) -> None:
    report: Report = judged(worded.engine, worded.checkpoint, TEXT, Asked(windows=2, length=4, decode=2))
    assert any("the edge of a chunk (8 tokens)" in note for note in report.notes)
    report = judged(worded.engine, worded.checkpoint, TEXT, Asked(windows=2, length=9, decode=2))
    assert report.notes == [FEW.replace("6", "2")]
    report = judged(worded.engine, worded.checkpoint, TEXT, Asked(windows=99, length=99, decode=2))
    assert report.notes == [
        "windows are 64 tokens, the engine's context, not 99",
        "the text holds 6 such windows, not 99",
        FEW,
    ]


def test_texts_that_are_too_short(worded: Worded) -> None:
    with pytest.raises(EngineError, match="the text has 3 tokens, a window takes 28"):
        judged(worded.engine, worded.checkpoint, "w3 w4", PLAN)
    with pytest.raises(EngineError, match="windows of 3 tokens are too short"):
        judged(worded.engine, worded.checkpoint, TEXT, Asked(length=3))


def test_an_engine_that_was_tampered_with_is_not_validated(worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    engine = engine_of(tmp_path, {}, weights, copy=True)
    graph = engine / "engine.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"model.layers.3", b"model.layers.5", 1))
    with pytest.raises(EngineError, match="has changed since the engine was built"):
        judged(engine, worded.checkpoint, TEXT, PLAN)


def test_a_reference_with_a_missing_weight_proves_nothing(worded: Worded, tmp_path: Path) -> None:
    weights = load_file(worded.checkpoint / "model.safetensors")
    del weights["model.layers.2.self_attn.q_proj.weight"]
    checkpoint = write_checkpoint(tmp_path / "less", raw_config(**CHANGES), weights)
    write_tokenizer(checkpoint, 64)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' is missing"):
        judged(worded.engine, checkpoint, TEXT, PLAN)
    with pytest.raises(CheckpointError, match="q_proj"):
        Reference(checkpoint)


def test_without_a_verdict_nothing_has_passed() -> None:
    report = Report("e", "r", "onnxruntime", "fp32", 0)
    assert not report.passed
    report.at_most("prefill: relative error", 0.0, None)
    assert not report.passed
    report.at_most("prefill: mean KL", 0.0, 1.0)
    assert report.passed


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Worded:
    """All router rows are equal: every token ties, exactly, in every layer."""
    folder = tmp_path_factory.mktemp("tied")
    weights = random_weights(parsed(raw_config(**CHANGES)), seed=5)
    for name in weights:
        if name.endswith("router.weight"):
            weights[name] = weights[name][:1].expand_as(weights[name]).contiguous()
    return Worded(folder / "checkpoint", folder / "model", engine_of(folder, {}, weights))


def test_where_all_tokens_tie_nothing_is_passed_unseen(tied: Worded) -> None:
    """Its experts are whichever a runtime takes: the shipped engine alone gets no verdict, and is told why."""
    report = judged(tied.engine, tied.checkpoint, TEXT, PLAN, shipped_only=True)
    assert not report.passed
    assert "prefill: tokens to judge" in {check.name for check in report.failures}


def test_sequences_of_one_token(worded: Worded) -> None:
    """Nothing is decoded, and that is said."""
    report = validate(str(worded.engine), str(worded.checkpoint), Plan(Inputs(tokens=one_token(worded.model.parent))))
    assert report.passed, report.as_dict()
    assert "not exercised: decoding; give a longer sequence" in report.notes
    assert {m.mode for m in report.modules} == {"forced", "inverse", "free"}


def one_token(folder: Path) -> Path:
    path = folder / "one.jsonl"
    path.write_text("[5]\n[7]\n")
    return path


def test_a_garbage_expert_behind_a_near_tie_fails(worded: Worded, tmp_path: Path) -> None:
    """Every token of expert 0 flips to 3 at an allowed margin, and is left out: 3 was judged on no token."""
    raw = raw_config(**CHANGES | {"num_experts_per_tok": 1})
    weights = random_weights(parsed(raw), seed=5)
    router, down = (f"model.layers.1.feed_forward.{name}" for name in ("router.weight", "experts.down_proj"))
    for folder, factor in (("right", 1 - 1e-5), ("wrong", 1 + 1e-5)):
        own = {name: weight.clone() for name, weight in weights.items()}
        own[router][3] = own[router][0] * factor
        if folder == "wrong":
            own[down][3] *= -100
        write_tokenizer(write_checkpoint(tmp_path / folder, raw, own), 64)
    report = judged(f"eager:{tmp_path / 'wrong'}", tmp_path / "right", TEXT, OTHER)
    assert not report.passed
    assert "forced: model.layers.1.feed_forward.experts, experts judged" in {check.name for check in report.failures}


def test_a_token_of_massive_activations_excuses_no_other(worded: Worded, tmp_path: Path) -> None:
    raw = raw_config(**CHANGES)
    weights = random_weights(parsed(raw), seed=5)
    weights["model.embed_tokens.weight"][1] *= 1e4  # the token that opens each sequence
    write_tokenizer(write_checkpoint(tmp_path / "right", raw, weights), 64)
    weights["model.layers.2.self_attn.o_proj.weight"][5] *= 1.5
    write_tokenizer(write_checkpoint(tmp_path / "wrong", raw, weights), 64)
    report = judged(f"eager-fp16:{tmp_path / 'wrong'}", tmp_path / "right", TEXT, OTHER)
    assert report.culprit == "model.layers.2.self_attn"


def test_a_greedy_token_that_the_reference_does_not_like_is_no_tie(
    worded: Worded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the reference's own best two may be close."""
    real = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, *a, **k: (real(self, *a, **k) + 7) % 64)
    report = judged(worded.engine, worded.checkpoint, TEXT, replace(PLAN, length=28), shipped_only=True)
    checks = [check for check in report.checks if check.name.startswith("greedy")]
    assert len(checks) == 3 and all(check.ok is False for check in checks)


def test_wiring_is_seen_where_layers_run_alone(worded: Worded, tmp_path: Path) -> None:
    """A layer whose output nobody reads: run one by one, all layers are right."""
    shutil.copytree(worded.model, tmp_path / "model")
    path = tmp_path / "model" / "model.onnx"
    graph = ir.load(path)
    calls = {node.name: node for node in graph.graph}
    calls["model.layers.6"].replace_input_with(0, calls["model.layers.4"].outputs[0])
    path.unlink()
    ir.save(graph, path)
    with pytest.raises(EngineError, match="is not the graph that was exported"):
        judged(f"graph:{tmp_path / 'model'}", worded.checkpoint, TEXT, PLAN)
    manifest = json.loads((tmp_path / "model" / "shuntyard.json").read_text())
    manifest["graph_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "model" / "shuntyard.json").unlink()
    (tmp_path / "model" / "shuntyard.json").write_text(json.dumps(manifest))
    report = judged(f"graph:{tmp_path / 'model'}", worded.checkpoint, TEXT, PLAN)
    assert not report.passed
    assert report.culprit == "model.layers.6"
    assert "wiring: model.layers.6" in {check.name for check in report.failures}
    with pytest.raises(EngineError, match=r"model\.layers\.6 reads model\.layers\.4, not model\.layers\.5"):
        judged(worded.engine, f"graph:{tmp_path / 'model'}", TEXT, PLAN)


def test_labels_are_told_apart(worded: Worded, tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"tokens": [1, 2, 3], "label": "text 1 (28 tokens)"}) + "\n")
    plan = Plan(Inputs(TEXT, 2, 28, (), path), decode=8)
    report = validate(f"eager-bf16:{worded.checkpoint}", str(worded.checkpoint), plan)
    labels = [sequence.label for sequence in report.sequences]
    assert labels == ["text 1 (28 tokens)", "text 2 (28 tokens)", "text 1 (28 tokens) #2"]
    assert "bounds" not in " ".join(report.notes)
    report = validate(str(worded.engine), f"eager-bf16:{worded.checkpoint}", plan)
    assert "bounds are those of bf16, the reference's format" in report.notes
