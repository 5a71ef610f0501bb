"""Baselines: what is saved comes back, differs in few lines, and is never compared with something else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.errors import EngineError, OutputError
from shuntyard.exporter.output import lock
from shuntyard.validate import baseline as module
from shuntyard.validate.baseline import apply_regression, compare_with_baseline, load_baseline, save_baseline
from shuntyard.validate.report import Check, Report
from shuntyard.validate.statistics import RESOLUTIONS
from tests.validate.metrics_samples import numbers, report, with_sequences

N = 12


@pytest.fixture
def good() -> Report:
    return report(numbers(N, np.random.default_rng(0)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "baseline.json"


def test_an_engine_passes_its_own_baseline(good: Report, path: Path) -> None:
    save_baseline(good, path)
    found = compare_with_baseline(good, path)
    assert (found.path, found.entry, found.rate, found.sequences) == (str(path), "onnxruntime-fp32", 0.05, N)
    assert [gate.metric for gate in found.gates] == list(RESOLUTIONS) and found.notes == []
    for gate in found.gates:
        assert gate.ok and abs(gate.worse) < 1e-8
        assert gate.now == pytest.approx(gate.baseline, rel=1e-8)


@pytest.mark.parametrize("metric", RESOLUTIONS)
def test_what_is_worse_fails_the_report(good: Report, path: Path, metric: str) -> None:
    save_baseline(good, path)
    mean = np.mean([getattr(one, metric) for one in good.sequences])
    step = 3 * RESOLUTIONS[metric].of(float(mean))
    worse = [dataclasses.replace(one, **{metric: getattr(one, metric) + step}) for one in good.sequences]
    now = dataclasses.replace(good, sequences=worse, checks=list(good.checks), notes=[])
    regression = compare_with_baseline(now, path)
    apply_regression(now, regression)
    assert now.regression == regression and not now.passed
    assert [check.name for check in now.failures] == [f"baseline: {metric}"]
    (failure,) = now.failures
    assert failure.value == pytest.approx(step, rel=1e-6) and failure.module == "" and "p = " in failure.detail
    apply_regression(now, regression)
    assert sum(check.name == f"baseline: {metric}" for check in now.checks) == 1
    apply_regression(now, compare_with_baseline(good, path))
    assert now.passed


def test_what_is_not_finite_fails_the_report(good: Report, path: Path) -> None:
    save_baseline(good, path)
    good.sequences[3] = dataclasses.replace(good.sequences[3], nll=math.nan)
    apply_regression(good, compare_with_baseline(good, path))
    assert [(check.name, check.value) for check in good.failures] == [("baseline: nll", "not finite")]


def test_the_file_is_made_for_diffs(good: Report, path: Path) -> None:
    save_baseline(good, path)
    before = path.read_text(encoding="utf-8")
    data = json.loads(before)
    assert data["schema"] == 1 and list(data) == sorted(data)
    (entry,) = data["entries"].values()
    assert list(entry) == sorted(entry) and list(entry["sequences"]) == sorted(entry["sequences"])
    lines = before.splitlines()
    assert sum('"kl": ' in line for line in lines) == N == sum(before.count(one.sha256) for one in good.sequences)
    assert lines[1] == ' "entries": {' and before.endswith("}\n") and max(map(len, lines)) < 400
    digits = [found.lstrip("0") for found in re.findall(r"\d+\.(\d+)", before)]
    assert len(digits) > 6 * N and max(map(len, digits)) <= 9
    changed = [dataclasses.replace(good.sequences[0], kl=0.125), *good.sequences[1:]]
    save_baseline(dataclasses.replace(good, sequences=changed), path)
    after = path.read_text(encoding="utf-8").splitlines()
    assert sum(a != b for a, b in zip(lines, after, strict=True)) == 1
    save_baseline(good, path)
    assert path.read_text(encoding="utf-8") == before


@given(
    label=st.text(max_size=20),
    values=st.lists(st.floats(0, 1e6), min_size=5, max_size=5),
    routing=st.none() | st.floats(0, 1),
)
def test_what_is_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory, label: str, values: list[float], routing: float | None
) -> None:
    """To nine digits, under any label; a label that is no text is refused before anything is written."""
    path = tmp_path_factory.mktemp("baseline") / "b.json"
    one = report(numbers(1, np.random.default_rng(0)))
    names = ("nll", "nll_reference", "kl", "top1_miss", "top5_miss")
    changes: dict[str, Any] = {"label": label, "routing_miss": routing, **dict(zip(names, values, strict=True))}
    saved = with_sequences(one, **changes)
    save_baseline(saved, path)
    (entry,) = load_baseline(path).entries.values()
    ((key, back),) = entry.sequences.items()
    assert key == f"{label} {saved.sequences[0].sha256}"
    for name in (*names, "routing_miss", "forced_error"):
        value = getattr(saved.sequences[0], name)
        assert getattr(back, name) == (None if value is None else pytest.approx(value, rel=1e-8))
    save_baseline(saved, path)  # and can be read by the next one


def test_entries_share_a_file(good: Report, path: Path) -> None:
    save_baseline(good, path)
    half = dataclasses.replace(good, dtype="bf16")
    save_baseline(half, path)
    save_baseline(half, path, "nightly: ä")
    first = load_baseline(path).entries["onnxruntime-fp32"]
    save_baseline(with_sequences(good, kl=0.5), path, "nightly: ä")
    entries = load_baseline(path).entries
    assert sorted(entries) == ["nightly: ä", "onnxruntime-bf16", "onnxruntime-fp32"]
    assert entries["onnxruntime-fp32"] == first
    assert all(one.kl == 0.5 for one in entries["nightly: ä"].sequences.values())
    assert compare_with_baseline(half, path).entry == "onnxruntime-bf16"
    across = compare_with_baseline(half, path, "onnxruntime-fp32")
    assert across.notes == ["the baseline is of onnxruntime, fp32; this engine is onnxruntime, bf16"]


def test_another_entry_is_refused_by_name(good: Report, path: Path) -> None:
    save_baseline(good, path)
    with pytest.raises(EngineError, match="has no entry 'tensorrt-bf16'; there: onnxruntime-fp32") as caught:
        compare_with_baseline(dataclasses.replace(good, backend="tensorrt", dtype="bf16"), path)
    assert "--baseline-entry" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[1:], "not there now: 'window 0'"),
        (lambda s: [dataclasses.replace(s[0], label="new"), *s[1:]], "not there now: 'window 0'; not in the .*: 'new'"),
        (lambda s: [dataclasses.replace(s[0], sha256="0" * 64), *s[1:]], "other tokens in 'window 0'"),
        (lambda s: [dataclasses.replace(x, sha256="0" * 64) for x in s], r"'window 0', 'window 1', .* and 9 more"),
        (lambda s: [dataclasses.replace(s[0], tokens=65), *s[1:]], "'window 0': tokens is 64, and 65 now"),
        (lambda s: [*s, s[0]], "sequence 'window 0' is there twice"),
        (lambda s: [], "the report has no sequences"),
    ],
)
def test_other_sequences_are_refused(good: Report, path: Path, change: Any, message: str) -> None:
    save_baseline(good, path)
    with pytest.raises(EngineError, match=message) as caught:
        compare_with_baseline(dataclasses.replace(good, sequences=change(good.sequences)), path)
    assert caught.value.hint


def test_another_reference_is_refused(good: Report, path: Path) -> None:
    """By its own loss: paths differ between machines, and losses do not."""
    save_baseline(good, path)
    elsewhere = dataclasses.replace(with_sequences(good, nll_reference=3.5005), reference="/elsewhere")
    assert compare_with_baseline(elsewhere, path).notes == [
        "the baseline's reference was checkpoint; its loss was the same"
    ]
    for other in (3.51, 3.49, math.nan):
        with pytest.raises(EngineError, match="another reference"):
            compare_with_baseline(with_sequences(good, nll_reference=other), path)


def test_a_metric_that_vanished_is_refused(good: Report, path: Path) -> None:
    save_baseline(good, path)
    for metric in ("routing_miss", "forced_error"):
        gone = with_sequences(good, **{metric: None})
        with pytest.raises(
            EngineError, match=rf"has {metric} of sequence 'window 0', which was not measured"
        ) as caught:
            compare_with_baseline(gone, path)
        assert caught.value.hint
        partly = dataclasses.replace(good, sequences=[*good.sequences[:-1], gone.sequences[-1]])
        with pytest.raises(EngineError, match=metric):
            compare_with_baseline(partly, path)


def test_a_metric_that_is_new_is_noted(good: Report, path: Path) -> None:
    save_baseline(with_sequences(good, routing_miss=None, forced_error=None), path)
    found = compare_with_baseline(good, path)
    assert [gate.metric for gate in found.gates] == ["nll", "kl", "top1_miss", "top5_miss"]
    assert found.notes == [
        f"{name} is not held to the baseline, which does not have it" for name in ("routing_miss", "forced_error")
    ]
    apply_regression(good, found)
    assert good.passed and good.notes == found.notes
    assert compare_with_baseline(with_sequences(good, routing_miss=None, forced_error=None), path).notes == []


def test_a_failed_engine_is_no_yardstick(good: Report, path: Path) -> None:
    failed = dataclasses.replace(good, checks=[Check("prefill: mean KL", 1.0, "<= 0.1", False)])
    with pytest.raises(EngineError, match="failed 1 checks, first 'prefill: mean KL'"):
        save_baseline(failed, path)
    assert not path.exists()
    save_baseline(failed, path, allow_failed=True)
    assert list(load_baseline(path).entries) == ["onnxruntime-fp32"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_yardstick(good: Report, path: Path, value: float) -> None:
    with pytest.raises(EngineError, match="sequence 'window 0': kl is "):
        save_baseline(with_sequences(good, kl=value), path)
    assert not path.exists()


def _edited(path: Path, change: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _sequence(data: Any) -> Any:
    return next(iter(data["entries"]["onnxruntime-fp32"]["sequences"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "schema is 2, this shuntyard reads 1"),
        (lambda d: d.pop("schema"), r"schema: Field required"),
        (lambda d: d.update(more=1), r"more: Extra inputs"),
        (lambda d: _sequence(d).update(kl="x"), r"entries.onnxruntime-fp32.sequences.*kl"),
        (lambda d: _sequence(d).pop("kl"), r"kl: Field required"),
        (lambda d: _sequence(d).update(speed=1.0), r"speed: Extra inputs"),
        (lambda d: _sequence(d).update(tokens=0), "tokens"),
        (lambda d: d["entries"]["onnxruntime-fp32"]["sequences"].update(x=_sequence(d)), "'x' is no label with a SHA"),
    ],
)
def test_a_damaged_file_is_refused_by_key(good: Report, path: Path, change: Any, message: str) -> None:
    save_baseline(good, path)
    _edited(path, change)
    before = path.read_bytes()
    for use in (compare_with_baseline, save_baseline):
        with pytest.raises(EngineError, match=message) as caught:
            use(good, path)
        assert str(path) in caught.value.message and caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no valid JSON"),
        ("<<<<<<< HEAD", "is no valid JSON"),
        ("[]", "the file"),
        ('{"schema": 1, "schema": 1, "entries": {}}', "'schema' stands there twice"),
        ('{"schema": 1, "entries": {"x": NaN}}', "NaN"),
        ("\ud800", "is no valid JSON"),
    ],
)
def test_what_is_no_baseline_is_refused(good: Report, path: Path, text: str, message: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(EngineError, match=message):
        compare_with_baseline(good, path)


def test_a_file_that_is_not_there(good: Report, path: Path) -> None:
    with pytest.raises(EngineError, match="no such file") as caught:
        compare_with_baseline(good, path)
    assert "--save-baseline" in caught.value.hint


SAVER = """
import dataclasses, sys
from pathlib import Path
import numpy as np
from shuntyard.validate.baseline import save_baseline
from tests.validate.metrics_samples import numbers, report
for i in range(6):
    save_baseline(report(numbers(8, np.random.default_rng(0))), Path(sys.argv[1]), f"{sys.argv[2]}-{i}")
"""


def test_runs_at_the_same_time_lose_nothing(path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", SAVER, str(path), str(i)], cwd=root, env=os.environ) for i in range(3)
    ]
    assert [one.wait() for one in running] == [0, 0, 0]
    assert sorted(load_baseline(path).entries) == [f"{i}-{j}" for i in range(3) for j in range(6)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_does_not_wait_for_ever(good: Report, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    descriptor = lock(path.parent)
    try:
        with pytest.raises(OutputError, match="another run is writing"):
            save_baseline(good, path)
    finally:
        os.close(descriptor)
    save_baseline(good, path)


def test_a_save_that_dies_leaves_the_old_file(good: Report, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_baseline(good, path)
    before = path.read_bytes()

    def die(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(OutputError, match="No space left"):
        save_baseline(with_sequences(good, kl=9.0), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_a_killed_save_left_is_removed(good: Report, path: Path) -> None:
    for name in (".baseline.json.partial-0a1b2c3d", ".other.json.partial-0a1b2c3d"):
        (path.parent / name).write_text("{", encoding="utf-8")
    save_baseline(good, path)
    assert sorted(file.name for file in path.parent.iterdir()) == [".other.json.partial-0a1b2c3d", path.name]


def test_a_link_stays_a_link(good: Report, path: Path) -> None:
    real = path.parent / "elsewhere" / "real.json"
    path.symlink_to(real)
    save_baseline(good, path)
    save_baseline(good, path, "second")
    assert path.is_symlink() and len(load_baseline(real).entries) == 2
