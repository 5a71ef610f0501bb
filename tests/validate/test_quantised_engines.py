"""Engines that round activations to FP8 are held to a reference that does so, too: sound ones pass, others do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.engines import lower
from shuntyard.engines.build import Request, build
from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter import storage
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import export
from shuntyard.exporter.recipe import read_recipe
from shuntyard.plugins import functions
from shuntyard.validate.activations import Activations, rounded
from shuntyard.validate.bounds import Bounds, read_overrides
from shuntyard.validate.demo import miniature
from shuntyard.validate.dequantise import DequantisedCheckpoint
from shuntyard.validate.graph import GraphStack
from shuntyard.validate.inputs import Inputs, windows_of
from shuntyard.validate.judge import _judge_floor
from shuntyard.validate.outputs import github_annotations, junit_xml
from shuntyard.validate.page import render, why
from shuntyard.validate.reference import LayeredReference
from shuntyard.validate.report import Report
from shuntyard.validate.stack import Stack
from shuntyard.validate.tolerances import CODES
from shuntyard.validate.validate import Plan, validate
from shuntyard.validate.values import Array, Tokens
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.recipes import recipe, rule, write_calibration
from tests.validate.planting_engine import Surgery, exchanged

RAW = raw_config(hidden_size=32, intermediate_size=48, intermediate_size_mlp=64, head_dim=16, num_experts_per_tok=1)
REST = rule("*", weights="bf16")
RULES = {
    "dynamic": (rule("model.layers.*", weights="fp8", activations="fp8-dynamic", granularity="channel"), REST),
    "static": (rule("model.layers.*", weights="fp8", activations="fp8-static", granularity="tensor"), REST),
    "head": (rule(["lm_head", "*.experts"], weights="fp8", activations="fp8-dynamic", granularity="tensor"), REST),
}


@dataclass
class Made:
    """A checkpoint, and of each recipe the model directory; what the reference computed is kept."""

    folder: Path
    checkpoint: Path
    plan: Plan
    models: dict[str, Path] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        if name not in self.models:
            self.models[name] = self.export(self.folder / name, name)
        return self.models[name]

    def export(self, out: Path, name: str) -> Path:
        calibration = write_calibration(self.folder / "calibration.json", self.checkpoint)
        static = calibration if name == "static" else None
        export(self.checkpoint, out, recipe=recipe(*RULES[name]), calibration=static)
        return out

    def engine(self, model: Path, out: Path, dtype: str = "fp32", surgery: Surgery | None = None) -> Path:
        right = lower.for_onnxruntime

        def lowered(graph: ir.Model, own: str) -> None:
            right(graph, own)
            if surgery is not None:
                surgery(graph)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower, "for_onnxruntime", lowered)
            build(model, out, Request(dtype=dtype, max_context=48))
        return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("quantised")
    weights = random_weights(parsed(RAW), seed=5, dtype=torch.bfloat16)
    checkpoint = write_checkpoint(folder / "checkpoint", RAW, weights)
    random = np.random.default_rng(3)
    lines = [random.integers(0, RAW["vocab_size"], n).tolist() for n in (40, 21, 5)]
    (folder / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return Made(folder, checkpoint, Plan(Inputs(tokens=folder / "tokens.jsonl"), decode=16, cache=folder / "cache"))


# Sound ones


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", RULES)
def test_a_sound_engine_passes(name: str, dtype: str, made: Made, tmp_path: Path) -> None:
    engine = made.engine(made.model(name), tmp_path / "engine", dtype)
    report = validate(str(engine), str(made.model(name)), made.plan)
    assert report.passed, report.failures
    (note,) = [note for note in report.notes if note.startswith("the reference rounds activations to FP8 numbers, too")]
    asked = json.loads((engine / "shuntyard.json").read_text())["modules"]
    count = sum(module["activations"] != "none" for module in asked.values())
    assert f"in {count} modules ({count} {'static' if name == 'static' else 'by token'})" in note and count > 2
    assert report.facts["activations"].startswith(f"FP8 in {count} modules")
    assert any(m.mode == "forced" and m.part == "feed_forward.experts" and m.ok for m in report.modules)


@pytest.mark.parametrize("prefix", ["graph:", "eager:", "eager-bf16:"])
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_other_subjects_do_what_the_engine_does(name: str, prefix: str, made: Made) -> None:
    model = made.model(name)
    report = validate(f"{prefix}{model}", str(model), made.plan)
    assert report.passed, report.failures
    assert any("too: in" in note for note in report.notes)


def test_a_checkpoint_s_eager_model_follows_the_engine(made: Made, tmp_path: Path) -> None:
    """Of the files alone nobody says that activations are to be rounded: the other side does."""
    bare = tmp_path / "bare"
    shutil.copytree(made.model("static"), bare, ignore=shutil.ignore_patterns("shuntyard.json", "*.onnx"))
    assert validate(f"eager:{bare}", f"graph:{made.model('static')}", made.plan).passed
    report = validate(f"eager:{bare}", str(bare), made.plan)
    assert report.passed and not any("too: in" in note for note in report.notes)  # as they are stored, both


def test_exported_without_a_recipe_nothing_is_rounded(made: Made, tmp_path: Path) -> None:
    export(made.model("static"), tmp_path / "plain")
    engine = made.engine(tmp_path / "plain", tmp_path / "engine")
    report = validate(str(engine), str(tmp_path / "plain"), made.plan)
    assert report.passed and "activations" not in report.facts
    assert validate(f"eager:{tmp_path / 'plain'}", str(tmp_path / "plain"), made.plan).passed


# Faults

Patch = pytest.MonkeyPatch


def _unquantised(name: str) -> Callable[[Patch], None]:
    """A Linear whose input stays as it is."""
    right = storage._quantize_activations

    def lenient(function: Any, linear: storage.Linear, shared: Any) -> None:
        if linear.name != f"{name}.weight":
            right(function, linear, shared)

    return lambda patch: patch.setattr(storage, "_quantize_activations", lenient)


def _products(change: Callable[[bool], Any]) -> Callable[[Patch], None]:
    """The experts' products, quantised by ``change(whether hidden rows are)``."""
    right = functions._products

    def products(tape: Any, form: Any, rows: Any, parts: Any) -> Any:
        own = change(len(parts) == 1 and parts[0] is not None and form.layout == "linear")
        with pytest.MonkeyPatch.context() as patch:
            if own is not None:
                patch.setattr(functions, "_quantized", own)
            return right(tape, form, rows, parts)

    return lambda patch: patch.setattr(functions, "_products", products)


def _as_it_is(tape: Any, x: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    return tape.as_float(x), tape.const([1.0], np.float32)


def _unsaturated(patch: Patch) -> None:
    right = functions._quantized

    def quantized(tape: Any, x: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        found = right(tape, x, scale)
        codes = found[0].producer()
        assert codes is not None and codes.inputs[0] is not None
        node = codes.inputs[0].producer()
        assert node is not None and node.op_type == "QuantizeLinear"
        node.attributes.add(ir.AttrInt64("saturate", 0))
        return found

    patch.setattr(functions, "_quantized", quantized)


def _scaled(name: str, factor: float) -> Surgery:
    """A scale of the graph's, times a factor."""

    def cut(graph: ir.Model) -> None:
        scale = next(v for node in graph.graph for v in node.inputs if v is not None and v.name == name)
        dtype = ml_dtypes.bfloat16 if scale.dtype == ir.DataType.BFLOAT16 else np.float32
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.array([factor], dtype)))])
        constant.outputs[0].name = "planted"
        product = ir.Node("", "Mul", [scale, constant.outputs[0]])
        product.outputs[0].name = f"planted.{name}"  # no name of a module: that would be marked
        (call,) = (node for node in graph.graph if scale in node.inputs)
        call.replace_input_with(list(call.inputs).index(scale), product.outputs[0])
        graph.graph.insert_before(call, [constant, product])

    return cut


@dataclass(frozen=True)
class Fault:
    """What is wrong with an engine, and the modules that may be named for it."""

    name: str
    right: tuple[str, ...]
    base: str = "dynamic"
    code: Callable[[Patch], None] | None = None
    graph: Surgery | None = None


O_PROJ, EXPERTS = "model.layers.0.self_attn", "model.layers.1.feed_forward.experts"
FAULTS = [
    Fault("o_proj's input not quantised", (O_PROJ,), code=_unquantised("self_attn.o_proj")),
    Fault(
        "the shared expert's hidden rows not quantised",
        ("model.layers.1.feed_forward.shared_expert",),
        code=_unquantised("feed_forward.shared_expert.down_proj"),
    ),
    Fault("hidden rows not quantised", (EXPERTS,), code=_products(lambda hidden: _as_it_is if hidden else None)),
    Fault("experts' input not quantised", (EXPERTS,), code=_products(lambda hidden: None if hidden else _as_it_is)),
    Fault(
        "the scale of another module",
        ("model.layers.2.self_attn",),
        "static",
        graph=exchanged(2, "self_attn.q_proj.input_scale", "self_attn.o_proj.input_scale"),
    ),
    Fault(
        "a scale half as large",
        ("model.layers.2.self_attn.value",),
        "static",
        graph=_scaled("model.layers.2.self_attn.v_proj.input_scale", 0.5),
    ),
    Fault(
        "a scale 1.25 times as large",
        ("model.layers.2.self_attn.value",),
        "static",
        graph=_scaled("model.layers.2.self_attn.v_proj.input_scale", 1.25),
    ),
    Fault(
        "a scale of one expert off",
        ("model.layers.3.feed_forward.experts",),
        "static",
        graph=_scaled("model.layers.3.feed_forward.experts.2.down_proj.input_scale", 0.75),
    ),
    Fault("not saturated", ("model.layers.0.self_attn.key", "model.layers.0.self_attn.value"), "static", _unsaturated),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(fault: Fault, made: Made, tmp_path: Path) -> None:
    model = made.model(fault.base)
    if fault.code is not None:
        with pytest.MonkeyPatch.context() as patch:
            fault.code(patch)
            model = made.export(tmp_path / "model", fault.base)
    engine = made.engine(model, tmp_path / "engine", surgery=fault.graph)
    report = validate(str(engine), str(made.model(fault.base)), made.plan)
    assert not report.passed
    assert report.culprit in fault.right, report.failures


def test_weights_quantised_otherwise_are_caught(made: Made, tmp_path: Path) -> None:
    rules = (rule("model.layers.*", weights="fp8", activations="fp8-dynamic", granularity="tensor"), REST)
    export(made.checkpoint, tmp_path / "model", recipe=recipe(*rules))
    engine = made.engine(tmp_path / "model", tmp_path / "engine")
    plan = Plan(made.plan.inputs, decode=16, cache=made.plan.cache, allow_other_files=True)
    report = validate(str(engine), str(made.model("dynamic")), plan)
    assert not report.passed and report.culprit.startswith("model.layers.0.self_attn")


def test_a_reference_without_the_engine_s_scales_is_refused(made: Made, tmp_path: Path) -> None:
    """Another checkpoint than the one that the engine's weights were made of."""
    weights = random_weights(parsed(RAW), seed=6, dtype=torch.bfloat16)
    other = write_checkpoint(tmp_path / "other", RAW | {"use_cache": True}, weights)
    engine = made.engine(made.model("static"), tmp_path / "engine")
    plan = Plan(made.plan.inputs, allow_other_files=True)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.0.self_attn.q_proj.input_scale'"):
        validate(str(engine), str(other), plan)


# Layer by layer


def errors(engine: Stack, reference: Stack, windows: list[Tokens]) -> tuple[list[Array], list[Array]]:
    """By layer, each token's relative error of the output, both fed the reference's input; and its slack."""
    hidden, found, slacks = list(reference.embed(windows)), [], []
    for i in range(reference.config.num_hidden_layers):
        values = list(reference.layer(i, hidden))
        ours = np.concatenate([own.hidden for own in engine.layer(i, hidden)])
        hidden = [own.hidden for own in values]
        theirs = np.concatenate(hidden)
        length = np.linalg.norm(theirs, axis=1)
        found.append(np.linalg.norm(ours - theirs, axis=1) / length)
        slack = [np.zeros(len(v.hidden)) if v.slack is None else v.slack[:, -1, 0] for v in values]
        slacks.append(np.concatenate(slack) * np.sqrt(theirs.shape[1]) / length)
    return found, slacks


CUSTOM = {
    "static by tensor": RULES["static"],
    "dynamic by tensor": (rule("model.layers.*", weights="fp8", activations="fp8-dynamic", granularity="tensor"), REST),
    "static experts": (rule("*.experts", weights="fp8", activations="fp8-static", granularity="channel"), REST),
}


ATTENTION_BY_TOKEN = ("fp8-all-linear", "dynamic by tensor")


@pytest.mark.parametrize("name", ["fp8", "fp8-ffn", "fp8-all-linear", *CUSTOM])
def test_layers_of_the_miniature_are_the_emulation_s(name: str, tmp_path: Path) -> None:
    own = recipe(*CUSTOM[name]) if name in CUSTOM else read_recipe(name)
    calibration = write_calibration(tmp_path / "calibration.json", miniature()) if "static" in name else None
    export(miniature(), tmp_path / "model", recipe=own, calibration=calibration)
    build(tmp_path / "model", tmp_path / "engine", Request(max_context=256))
    modules = json.loads((tmp_path / "engine" / "shuntyard.json").read_text())["modules"]
    kinds = {n: m["activations"].removeprefix("fp8-") for n, m in modules.items() if m["activations"] != "none"}
    config = parsed(json.loads((miniature() / "config.json").read_text()))
    windows = [s.tokens for s in windows_of(miniature() / "held_out.txt", miniature(), config, 2, 100, print)]
    engine = GraphStack(tmp_path / "engine" / "engine.onnx", "fp32", optimise=True)
    reference = LayeredReference(tmp_path / "model", Activations(kinds, CODES["fp32"].noise))
    found, slack = errors(engine, reference, windows)
    # A number at a step, turned, moves its token, and behind attention later ones: the reference knows which.
    clear = [own[more < 1e-5] for own, more in zip(found, slack, strict=True)]
    assert kinds and all(len(own) >= 5 and own.max() <= 1e-3 for own in clear)
    assert all(np.median(own) <= 1e-3 for own in found)
    beyond = [own - CODES["fp32"].slack * more for own, more in zip(found, slack, strict=True)]
    assert max(own.max() for own in beyond) <= 1e-3
    assert max(np.sqrt(np.mean(own**2)) for own in found) <= (1e-2 if name in ATTENTION_BY_TOKEN else 1e-3)
    left, _ = errors(engine, LayeredReference(tmp_path / "model"), windows)
    assert max(np.median(own) for own in left) > 1e-3  # had the reference left activations as they are


# What a recipe costs


@pytest.fixture(scope="module")
def engine(made: Made) -> Path:
    return made.engine(made.model("dynamic"), made.folder / "engine")


def test_against_the_original_costs_are_reported(made: Made, engine: Path, tmp_path: Path) -> None:
    report = validate(str(engine), str(made.checkpoint), made.plan)
    assert report.verdict == "not judged" and not report.passed and not report.failures
    assert report.as_dict()["verdict"] == "not judged" and 'name="verdict" value="not judged"' in junit_xml(report)
    assert "not judged: what the recipe costs" in github_annotations(report)[-1]
    assert "What the recipe costs" in why(report)
    (files,) = [check for check in report.checks if check.name.startswith("files")]
    assert files.name == "files: quantised from the reference's" and files.ok
    for metric in ("mean KL", "top-1 agreement", "perplexity, relative"):
        (check,) = [check for check in report.checks if check.name == f"prefill: {metric}"]
        assert check.ok is None and check.bound == "-" and check.value
    assert all(module.ok is None for module in report.modules)
    assert any("what the recipe costs, and is not judged" in note for note in report.notes)
    (tmp_path / "bounds.toml").write_text(
        '[[tolerance]]\nmodule = "logits"\nmetric = "mean_kl"\nbound = 1e-9\nreason = "ours"\n'
    )
    plan = Plan(made.plan.inputs, 16, cache=made.plan.cache, overrides=tuple(read_overrides(tmp_path / "bounds.toml")))
    report = validate(str(engine), str(made.checkpoint), plan)
    assert {check.name for check in report.failures} == {"prefill: mean KL", "decode: mean KL"}


@pytest.mark.parametrize("what", ["one code", "a plain weight"])
def test_weights_that_are_not_the_original_s_rounded_are_caught(
    what: str, made: Made, engine: Path, tmp_path: Path
) -> None:
    """Of an original with the same headers."""
    other = tmp_path / "other"
    weights = random_weights(parsed(RAW), seed=5, dtype=torch.bfloat16)
    if what == "one code":
        weights["model.layers.1.feed_forward.experts.gate_up_proj"][1, 3, 5] += 1.0
    else:
        weights["lm_head.weight"][3, 4] *= 1.01
    write_checkpoint(other, RAW, weights)
    report = validate(str(engine), str(other), made.plan)
    (files,) = [check for check in report.checks if check.name.startswith("files")]
    assert files.ok is False and "is not what a rewrite of the reference's gives" in files.detail


def test_int4_is_seen_to_be_the_original_s(made: Made, tmp_path: Path) -> None:
    own = recipe(rule("*.experts", weights="int4", granularity="group", group_size=16), REST)
    export(made.checkpoint, tmp_path / "model", recipe=own)
    engine = made.engine(tmp_path / "model", tmp_path / "engine")
    report = validate(str(engine), str(made.checkpoint), made.plan)
    assert report.verdict == "not judged" and "files: quantised from the reference's" in {
        check.name for check in report.checks
    }
    assert validate(str(engine), str(tmp_path / "model"), made.plan).passed


@pytest.mark.parametrize(("own", "scale", "number"), [("fp8", 1e4, 0), ("int4", 1e4, 0x88), ("int4", 1e-9, 0xFF)])
def test_scales_that_round_everything_are_caught(
    own: str, scale: float, number: int, made: Made, tmp_path: Path
) -> None:
    """All is within half a step of a number where steps are large enough; and of the largest, nothing is too large."""
    how: dict[str, Any] = {"granularity": "channel"} if own == "fp8" else {"granularity": "group", "group_size": 16}
    export(made.checkpoint, tmp_path / "model", recipe=recipe(rule("*.experts", weights=own, **how), REST))
    tensors = open_checkpoint(tmp_path / "model").tensors
    entry = next(e for n, e in tensors.items() if ".experts." in n and n.endswith("_scale") and "input" not in n)
    matrix = tensors[entry.name.removesuffix("_scale") if own == "fp8" else entry.name.replace("_scale", "_packed")]
    kind = np.float32 if own == "fp8" else ml_dtypes.bfloat16
    with entry.file.open("r+b") as file:
        file.seek(matrix.offset)
        file.write(bytes([number]) * matrix.nbytes)
        file.seek(entry.offset)
        file.write(np.full(entry.nbytes // np.dtype(kind).itemsize, scale, kind).tobytes())
    ours, theirs = DequantisedCheckpoint(tmp_path / "model"), DequantisedCheckpoint(made.checkpoint)
    found = {name: ours.misfit(name, theirs.outer(name)) for name in theirs.shapes}
    assert sorted(filter(None, found.values())) == ["finer" if number == 0xFF else "coarser"]


def test_another_model_is_told_from_a_cost() -> None:
    report, bounds = Report("e", "r", "b", "fp32", 1), Bounds(("fp32",), alike=False)
    _judge_floor(report, "prefill", 0.9, 0.3, bounds)
    assert not report.checks
    for kl, top1 in ((1.1, 0.9), (0.1, 0.1), (float("nan"), 0.5)):
        _judge_floor(report, "prefill", kl, top1, bounds)
    assert len(report.failures) == 3 and "is not this model" in report.failures[0].detail
    assert report.verdict == "failed"


def test_files_that_differ_are_not_hidden_by_what_fails_later(made: Made, tmp_path: Path) -> None:
    other = write_checkpoint(
        tmp_path / "other", RAW | {"use_cache": True}, random_weights(parsed(RAW), seed=6, dtype=torch.bfloat16)
    )
    engine = made.engine(made.model("static"), tmp_path / "engine")
    report = validate(str(engine), str(other), Plan(made.plan.inputs))
    assert [check.name for check in report.failures] == ["files: the same", "run: to its end"]
    assert "no tensor" in report.failures[1].detail


# The rounding itself

NUMBERS = st.floats(-600, 600, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.sampled_from([None, 1.0, 0.37]), st.sampled_from([0.0, 1e-3]))
def test_values_are_rounded_as_ml_dtypes_does(row: list[float], scale: float | None, noise: float) -> None:
    x = np.array(row, np.float32)
    factor = np.float32(scale) if scale else max(np.abs(x).max(), np.float32(2.0**-100)) / np.float32(448)
    expected = np.clip(x / factor, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * factor
    both = torch.from_numpy(np.stack([x, x]))[:, None]
    straight, twin = rounded(both, None if scale is None else torch.tensor([scale]), noise)[:, 0].numpy()
    np.testing.assert_array_equal(straight, expected)
    if noise == 0:
        np.testing.assert_array_equal(twin, expected)
        return
    # Turned where noise reaches a step, by no more than it and a step.
    reach = noise * (np.sqrt(np.mean(x.astype(np.float64) ** 2)) + np.abs(x))
    ends = [np.clip((x + sign * reach) / factor, -448, 448).astype(ml_dtypes.float8_e4m3fn) for sign in (-0.999, 0.999)]
    assert (twin != straight)[(ends[0] != ends[1]) & (factor > 1e-30)].all()
    step = np.maximum((np.abs(straight) + reach) / 8, factor * 2.0**-9)
    assert (np.abs(twin - straight) <= 1.01 * (reach + step)).all()


@given(st.lists(st.floats(2.0**-5, 448.0, width=32), min_size=1, max_size=40))
def test_a_scale_twice_as_large_changes_no_number(row: list[float]) -> None:
    """e4m3 numbers are floats: between the smallest normal number and the largest, nobody can see it, or need to."""
    x = torch.tensor([row, row])
    assert torch.equal(rounded(x, torch.tensor([1.0]), 0.0), rounded(x, torch.tensor([2.0]), 0.0))


def test_slack_is_where_numbers_are_near_a_step(made: Made) -> None:
    """Without noise there is none; with more there is more, and at first for few tokens."""
    model, tokens = made.model("dynamic"), [np.arange(30) % 64]
    modules = json.loads((model / "shuntyard.json").read_text())["precision"]
    kinds = {n: "dynamic" for n, m in modules.items() if m["activations"] != "none"}
    slacks = []
    for noise in (0.0, 1e-5, 1e-3):
        stack = LayeredReference(model, Activations(kinds, noise))
        (values,) = stack.layer(0, list(stack.embed(tokens)))
        assert values.slack is not None
        slacks.append(values.slack[:, 2, 0])  # of self_attn.value
    assert not slacks[0].any() and (slacks[1] > 0).sum() < 5 < (slacks[2] > 0).sum()


def report_of(made: Made, engine: Path) -> Report:
    return validate(str(engine), str(made.model("dynamic")), made.plan)


def test_reports_say_it(made: Made, engine: Path) -> None:
    report = report_of(made, engine)
    text = json.dumps(report.as_dict())
    page = render(report)
    for shown in (text, page):
        assert "the reference rounds activations to FP8 numbers, too" in shown and "FP8 in " in shown


def test_an_fp8_cache_has_no_reference(made: Made, tmp_path: Path) -> None:
    """A right engine would be told to be wrong; what it costs can be seen."""
    own = recipe(rule("*.self_attn", kv_cache="fp8"))
    calibration = write_calibration(tmp_path / "calibration.json", made.checkpoint)
    export(made.checkpoint, tmp_path / "model", recipe=own, calibration=calibration)
    engine = str(made.engine(tmp_path / "model", tmp_path / "engine"))
    with pytest.raises(UnsupportedError, match="caches FP8 numbers in"):
        validate(engine, str(tmp_path / "model"), made.plan)
    report = validate(engine, str(made.checkpoint), made.plan)
    assert report.verdict == "not judged" and any("recipe" in note for note in report.notes)
