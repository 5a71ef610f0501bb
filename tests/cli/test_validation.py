"""``shuntyard validate`` as scripts use it: exit status, JSON, files that it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from shuntyard.cli import main
from shuntyard.validate.report import SCHEMA
from tests.conftest import Worded

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "validate.md"


def validate(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["validate", *map(str, arguments)])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sequences of 12 to 21 tokens: past the chunk of 8 and the floor of 4."""
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    rows = [torch.randint(0, 64, (12 + i,), generator=generator).tolist() for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def swapped(worded: Worded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with two experts of layer 5 exchanged."""
    folder = tmp_path_factory.mktemp("swapped") / "checkpoint"
    folder.mkdir()
    for file in worded.checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.5.feed_forward.experts.down_proj"
    weights[name] = weights[name][[1, 0, 2, 3]].contiguous()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_any_two_and_what_the_json_has(worded: Worded, tokens: Path, cache: Path, swapped: Path) -> None:
    """Sound ones pass, the swapped expert is named, whichever two are compared."""
    common: Sequence[str | Path] = ("--tokens", tokens, "--cache", cache, "--json")
    for subject in (f"eager:{worded.checkpoint}", f"graph:{worded.model}", f"transformers:{worded.checkpoint}"):
        result = validate(subject, "--reference", worded.checkpoint, *common)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout, parse_constant=pytest.fail)  # no NaN, no Infinity
        assert (report["schema"], report["passed"], report["culprit"]) == (SCHEMA, True, "")
        assert report["tokens"] == sum(12 + i for i in range(10))
        assert len(report["sequences"]) == 10
    pairs = (f"eager:{swapped}", str(worded.checkpoint)), (str(worded.engine), f"eager:{swapped}")
    for subject, reference in pairs:
        result = validate(subject, "--reference", reference, *common, "--allow-other-files")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert (report["passed"], report["culprit_mode"]) == (False, "forced")
        assert report["culprit"] == "model.layers.5.feed_forward.experts"
        assert {"name", "value", "bound", "ok", "detail", "module"} == set(report["checks"][0])
    documented = DOCUMENT.read_text(encoding="utf-8")
    assert [key for key in report if f"`{key}`" not in documented and key not in UNDOCUMENTED] == []


UNDOCUMENTED = ("engine", "reference", "backend", "dtype", "tokens", "layers", "perplexity_reference")
"""Fields that say what they are."""


def test_by_layers_and_shipped_only(worded: Worded, tokens: Path, cache: Path) -> None:
    common = (worded.engine, "--reference", worded.checkpoint, "--tokens", tokens, "--cache", cache, "--json")
    parts: dict[str, set[str]] = {}
    for option in ("--by-layers", "--shipped-only"):
        result = validate(*common, option)
        assert result.exit_code == 0, result.output
        parts[option] = {check["name"].split(":")[0] for check in json.loads(result.stdout)["checks"]}
    assert parts["--by-layers"] == {"logits", "forced", "free"}
    assert parts["--shipped-only"] == {"prefill", "decode", "greedy"}
    assert validate(*common, "--by-layers", "--shipped-only").exit_code == 3


def test_what_it_writes(worded: Worded, tokens: Path, cache: Path, tmp_path: Path) -> None:
    common = (worded.engine, "--reference", worded.checkpoint, "--tokens", tokens, "--cache", cache, "--shipped-only")
    baseline, page, junit = tmp_path / "baseline.json", tmp_path / "report.html", tmp_path / "junit.xml"
    result = validate(*common, "--save-baseline", baseline)
    assert result.exit_code == 0, result.output
    result = validate(*common, "--baseline", baseline, "--html", page, "--junit", junit, "--github")
    assert result.exit_code == 0, result.output
    assert all(line.startswith("::") for line in result.stdout.splitlines())
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert int(ElementTree.parse(junit).getroot()[0].get("failures", "1")) == 0

    kept = json.loads(baseline.read_text())
    (entry,) = kept["entries"].values()
    for one in entry["sequences"].values():
        one["nll"] -= 0.02  # the engine is worse than that
    baseline.write_text(json.dumps(kept))
    result = validate(*common, "--baseline", baseline, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [check["name"] for check in report["checks"] if check["ok"] is False] == ["baseline: nll"]
    result = validate(*common, "--baseline", baseline)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout and "nll" in result.stdout

    result = validate(*common, "--baseline", tmp_path / "none.json", "--html", tmp_path / "kept.html")
    assert result.exit_code == 3
    assert (tmp_path / "kept.html").is_file()  # what was found is not lost


def test_a_failed_run_is_no_baseline(worded: Worded, swapped: Path, tokens: Path, cache: Path, tmp_path: Path) -> None:
    result = validate(
        f"eager:{swapped}",
        *("--reference", worded.checkpoint, "--tokens", tokens, "--cache", cache, "--allow-other-files"),
        *("--save-baseline", tmp_path / "baseline.json"),
    )
    assert result.exit_code == 1
    assert "not saved" in result.stderr
    assert not (tmp_path / "baseline.json").exists()
    lines = result.stdout.splitlines()
    assert lines[-1].startswith(
        "FAILED: model.layers.5.feed_forward.experts is the first module that is wrong by itself"
    )
    assert any("failed: forced: model.layers.5.feed_forward.experts, " in line and "expert" in line for line in lines)


def test_tolerances_of_a_file(worded: Worded, swapped: Path, tokens: Path, cache: Path, tmp_path: Path) -> None:
    common = (f"eager:{swapped}", "--reference", worded.checkpoint, "--tokens", tokens, "--cache", cache)
    entries: list[dict[str, Any]] = [
        {"module": "model.layers.[567]*", "metric": metric, "bound": 1e9}
        for metric in ("relative", "coordinate", "margin")
    ]
    entries += [{"module": "lm_head", "metric": "relative", "bound": 1e9}]
    entries += [
        {"module": "logits", "metric": m, "bound": b} for m, b in (("max_abs", 1e9), ("mean_kl", 9.0), ("top1", 0.0))
    ]
    entries += [{"module": "logits", "metric": "perplexity", "bound": 9.0}]
    path = tmp_path / "t.toml"
    lines = [
        "[[tolerance]]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
        + 'reason = "test"\n'
        for entry in entries
    ]
    path.write_text("\n".join(lines))
    result = validate(*common, "--tolerances", path, "--allow-other-files", "--json")
    assert result.exit_code == 0, result.output
    assert sum("(test)" in note for note in json.loads(result.stdout)["notes"]) == len(entries)
    path.write_text(lines[0].replace("model.layers.[567]*", "model.layers.77.self_attn"))
    result = validate(*common, "--tolerances", path, "--allow-other-files")
    assert result.exit_code == 3
    assert "tolerance for 'model.layers.77.self_attn': there is no such module" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--prompts", "shart"), 2, "there is no set 'shart'"),
        (("--rate", "0.1"), 2, "--rate is the gate's"),
        (("--json", "--github"), 2, "both write to stdout"),
        (("--tokens", "nowhere.jsonl"), 3, "nowhere.jsonl"),
        (("--tolerances", "nowhere.toml"), 3, "nowhere.toml: no such file"),
    ],
)
def test_what_is_asked_wrongly(worded: Worded, arguments: tuple[str, ...], status: int, said: str) -> None:
    result = validate(worded.engine, "--reference", worded.checkpoint, *arguments)
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert result.stdout == ""


def test_subjects_that_cannot_be(worded: Worded) -> None:
    for subject, said in (
        (str(worded.checkpoint), "is a checkpoint, not an engine"),
        (str(worded.model), "is a model directory, not an engine"),
        (f"graph:{worded.checkpoint}", "is no model directory"),
        (f"eager:{worded.engine}", "is an engine"),
        ("eager:nowhere", "nowhere: no such directory"),
    ):
        result = validate(subject, "--reference", worded.checkpoint)
        assert result.exit_code == 3, result.output
        assert said in result.stderr
