"""The example workflow: its commands exist, and do what it says, run as GitHub runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import yaml

from shuntyard.cli import main
from shuntyard.validate.baseline import load_baseline
from shuntyard.validate.statistics import RECOMMENDED

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["engine"]["steps"]
FEW = 8
"""Windows here: the workflow's take a minute."""


def _commands() -> list[list[str]]:
    """Every shuntyard command line, its words as the shell splits them."""
    lines = [line for step in STEPS for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    return [words for words in map(shlex.split, lines) if words and words[0] == "shuntyard"]


def test_it_is_a_workflow() -> None:
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "permissions", "env", "jobs"} == set(WORKFLOW)
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    used = [step["uses"].partition("@")[0] for step in STEPS if "uses" in step]
    assert used == ["actions/checkout", "actions/setup-python", "actions/cache", "actions/upload-artifact"]
    assert STEPS[-1]["if"] == "${{ always() }}", "a failed run's report is the one that matters"


def test_its_options_exist() -> None:
    assert [words[1] for words in _commands()] == ["export", "build", "validate"]
    for _, name, *words in _commands():
        command = main.commands[name]
        known = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
        assert {word for word in words if word.startswith("-")} <= known
        command.make_context(name, [word.replace("$WINDOWS", WORKFLOW["env"]["WINDOWS"]) for word in words])


def test_it_uses_what_it_is_an_example_of() -> None:
    words = _commands()[-1]
    assert {"--baseline", "--junit", "--html", "--github", "--cache"} <= set(words)
    cache = next(step for step in STEPS if step.get("uses", "").startswith("actions/cache@"))
    assert cache["with"]["path"] == words[words.index("--cache") + 1]
    kept = Path(STEPS[-1]["with"]["path"])
    for option in ("--html", "--junit"):
        assert Path(words[words.index(option) + 1]).parent == kept


def test_its_baseline_is_of_its_windows() -> None:
    (entry,) = load_baseline(EXAMPLES / "baseline.json").entries.values()
    assert (entry.backend, entry.dtype) == ("onnxruntime", "fp32")
    assert len(entry.sequences) == int(WORKFLOW["env"]["WINDOWS"]) >= RECOMMENDED
    assert entry.reference == "examples/miniature"
    assert {one.tokens for one in entry.sequences.values()} == {129}  # of 130, what comes next is known of all but one


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the miniature, and of the baseline the first windows; ``shuntyard`` on the path."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(EXAMPLES / "miniature", root / "examples" / "miniature")
    baseline = json.loads((EXAMPLES / "baseline.json").read_text(encoding="utf-8"))
    (entry,) = baseline["entries"].values()
    first = {f"text {i + 1} (130 tokens)" for i in range(FEW)}
    entry["sequences"] = {k: v for k, v in entry["sequences"].items() if k.rpartition(" ")[0] in first}
    assert len(entry["sequences"]) == FEW
    (root / "examples" / "baseline.json").write_text(json.dumps(baseline), encoding="utf-8")
    command = root / "bin" / "shuntyard"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m shuntyard.cli "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return root


def _run(step: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """One step, as GitHub's runner calls bash where no shell is named."""
    script = next(found["run"] for found in STEPS if found.get("name") == step)
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **WORKFLOW["env"], "WINDOWS": str(FEW), "PATH": path, "GITHUB_ACTIONS": "true"}
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_it_runs(checkout: Path) -> None:
    """And once more, with the activations of the first run and a baseline that the engine falls short of."""
    built = _run("Export and build", checkout)
    assert built.returncode == 0, built.stderr
    passed = _run("Validate", checkout)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    lines = passed.stdout.splitlines()
    assert lines and all(re.match(r"::(error|warning|notice) title=", line) for line in lines)
    assert "passed" in lines[-1]
    suite = ElementTree.parse(checkout / "report" / "junit.xml").getroot()[0]
    gated = [case.get("name") for case in suite.findall("testcase") if case.get("classname") == "baseline"]
    assert suite.get("failures") == "0" and len(gated) == 6
    assert "<html" in (checkout / "report" / "index.html").read_text(encoding="utf-8")
    assert any((checkout / "activations").rglob("*"))

    path = checkout / "examples" / "baseline.json"
    baseline = json.loads(path.read_text(encoding="utf-8"))
    (entry,) = baseline["entries"].values()
    for one in entry["sequences"].values():
        one["nll"] -= 0.00995  # the engine is now 1 % worse in perplexity than its baseline
    path.write_text(json.dumps(baseline), encoding="utf-8")
    failed = _run("Validate", checkout)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    errors = [line for line in failed.stdout.splitlines() if line.startswith("::error")]
    assert len(errors) == 1 and "nll" in errors[0] and "baseline" in errors[0]
    suite = ElementTree.parse(checkout / "report" / "junit.xml").getroot()[0]
    assert suite.get("failures") == "1"
