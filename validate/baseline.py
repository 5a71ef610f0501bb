"""Baselines: the numbers of an engine that was good, kept in a repository for later engines to be held to.

A file of JSON, made for diffs: sorted keys, nine digits, a sequence a line. It holds entries by name, so that engines
of several backends and precisions share one. A sequence's key is its label and the SHA-256 of its tokens: other tokens
are another sequence, and are never compared.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import shuntyard
from shuntyard.errors import EngineError, OutputError
from shuntyard.exporter.output import is_partial_of, lock
from shuntyard.exporter.strict_json import parse_json
from shuntyard.validate.outputs import write_file
from shuntyard.validate.report import Check, Regression, Report, SequenceMetrics
from shuntyard.validate.statistics import RATE, RESOLUTIONS, gate

SCHEMA = 1
"""Of the file. Raised when a field changes its meaning or goes."""

REFERENCE_DRIFT = 2e-3
"""Nats, mean over tokens. The reference's own loss moves by less between machines: a tie between two experts, decided
the other way, changes one token by a nat or two."""

_PATIENCE = 10.0  # seconds to wait for another run that is saving
_DIGITS = 9
_NAMED = 3  # sequences that an error names
_KEY = re.compile(r"(?P<label>.*) (?P<sha256>[0-9a-f]{64})", re.DOTALL)
_HINT_ANEW = "save the baseline anew with --save-baseline, from an engine that you trust"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sequence(_Strict):
    """One sequence's numbers; as in :class:`~shuntyard.validate.report.SequenceMetrics`."""

    tokens: int = Field(gt=0)
    nll: float
    nll_reference: float
    kl: float
    top1_miss: float
    top5_miss: float
    routing_miss: float | None
    forced_error: float | None


class Entry(_Strict):
    """One engine. ``sequences`` by ``"LABEL SHA256"``."""

    backend: str
    dtype: str
    reference: str
    shuntyard: str  # version that saved it
    sequences: dict[str, Sequence]


class Baseline(_Strict):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    entries: dict[str, Entry]


def entry_name(report: Report) -> str:
    """The entry that a report goes by where no name is given."""
    return f"{report.backend}-{report.dtype}"


def save_baseline(report: Report, path: Path, entry: str | None = None, *, allow_failed: bool = False) -> None:
    """Writes a report's sequences as one entry of a baseline file, and leaves its other entries as they are.

    Runs that save at the same time wait for each other.

    Raises:
        EngineError: the report failed (and ``allow_failed`` is off) or has no sequences, a number is not finite, or
            what is at ``path`` is no baseline.
        OutputError: it cannot be written there.
    """
    if not report.passed and not allow_failed:
        first = f", first '{report.failures[0].name}'" if report.failures else ", and passed none"
        raise EngineError(
            f"{report.engine}: failed {len(report.failures)} checks{first}: no baseline",
            hint="save the baseline from an engine that passes, or allow a failed one explicitly",
        )
    new = Entry(
        backend=report.backend,
        dtype=report.dtype,
        reference=report.reference,
        shuntyard=shuntyard.__version__,
        sequences={key: _kept(found) for key, found in _by_key(report).items()},
    )
    with _alone_in(path.resolve().parent, path):
        entries = dict(load_baseline(path).entries) if path.exists() else {}
        entries[entry or entry_name(report)] = new
        data = {name: kept.model_dump(mode="json") for name, kept in entries.items()}
        write_file(path, _text({"schema": SCHEMA, "entries": data}) + "\n")


@contextmanager
def _alone_in(directory: Path, path: Path) -> Iterator[None]:
    """Holds the lock of a directory, and removes what killed runs left of the file."""
    deadline = time.monotonic() + _PATIENCE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                descriptor = lock(directory)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"{path}: another run is writing beside it", hint="wait until it ends, or give another path"
                    ) from error
                time.sleep(0.02)
    except OSError as error:
        raise OutputError(
            f"{path}: {directory} cannot be locked: {error.strerror or error}",
            hint="give a place that you can write to, on a file system with locks: without, runs could lose each "
            "other's entries",
        ) from error
    try:
        for left in directory.iterdir():
            if is_partial_of(path.resolve(), left.name) and left.is_file():
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _text(value: Any, depth: int = 0) -> str:
    """JSON with sorted keys and an indent of 1, a sequence (four levels down) a line."""
    if not isinstance(value, dict) or not value or depth == 4:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    pad = "\n" + " " * (depth + 1)
    items = (f"{json.dumps(key, ensure_ascii=False)}: {_text(value[key], depth + 1)}" for key in sorted(value))
    return "{" + pad + f",{pad}".join(items) + "\n" + " " * depth + "}"


def load_baseline(path: Path) -> Baseline:
    """Reads and checks a file.

    Raises:
        EngineError: there is none, or it is not what :func:`save_baseline` writes.
    """
    try:
        raw = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise EngineError(
            f"{path}: no such file", hint=f"--save-baseline {path} makes one, from an engine that you trust"
        ) from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}", hint="check that you may read it") from error
    except ValueError as error:
        raise EngineError(f"{path}: is no valid JSON: {error}", hint=f"restore it, or {_HINT_ANEW}") from error
    if isinstance(raw, dict) and "schema" in raw and raw["schema"] != SCHEMA:
        raise EngineError(
            f"{path}: schema is {raw['schema']!r}, this shuntyard reads {SCHEMA}",
            hint=f"use the shuntyard that wrote it, or remove it and {_HINT_ANEW}",
        )
    try:
        found = Baseline.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise EngineError(f"{path}: {where}: {first['msg']}", hint=f"restore it, or {_HINT_ANEW}") from error
    for name, entry in found.entries.items():
        for key in entry.sequences:
            if not _KEY.fullmatch(key):
                raise EngineError(
                    f"{path}: entries.{name}.sequences: '{key}' is no label with a SHA-256",
                    hint=f"restore it, or {_HINT_ANEW}",
                )
    return found


def _by_key(report: Report) -> dict[str, SequenceMetrics]:
    if not report.sequences:
        raise EngineError(
            f"{report.engine}: the report has no sequences", hint="validate with a text or prompts, on which logits are"
        )
    out: dict[str, SequenceMetrics] = {}
    for found in report.sequences:
        key = f"{found.label} {found.sha256}"
        if key in out:
            raise EngineError(f"sequence '{found.label}' is there twice", hint="leave one of the two out")
        out[key] = found
    return out


def _kept(found: SequenceMetrics) -> Sequence:
    """Rounded to nine digits."""
    numbers: dict[str, Any] = {"tokens": found.tokens}
    for name in Sequence.model_fields.keys() - {"tokens"}:
        value = getattr(found, name)
        if value is not None and not math.isfinite(value):
            raise EngineError(
                f"sequence '{found.label}': {name} is {value}",
                hint="a baseline is saved from an engine whose numbers are finite",
            )
        numbers[name] = None if value is None else float(f"{value:.{_DIGITS}g}")
    return Sequence(**numbers)


def compare_with_baseline(report: Report, path: Path, entry: str | None = None, rate: float = RATE) -> Regression:
    """Holds a report's sequences to those of a baseline's entry; see :func:`~shuntyard.validate.statistics.gate`.

    Raises:
        EngineError: no such file or entry, another version, other sequences, another reference, a metric that was not
            measured this time, or too few sequences for the rate.
    """
    name = entry or entry_name(report)
    entries = load_baseline(path).entries
    if name not in entries:
        there = ", ".join(sorted(entries)) or "none"
        raise EngineError(
            f"{path}: has no entry '{name}'; there: {there}",
            hint=f"name one of them with --baseline-entry, or {_HINT_ANEW}",
        )
    old, ours = entries[name], _by_key(report)
    _check_same_sequences(f"{path}: entry '{name}'", old.sequences, ours)
    keys = sorted(ours)
    then, now = [old.sequences[key] for key in keys], [ours[key] for key in keys]
    tokens = [found.tokens for found in now]
    drifts = [t * (a.nll_reference - b.nll_reference) for t, a, b in zip(tokens, now, then, strict=True)]
    drift = math.fsum(drifts) / sum(tokens)
    if not abs(drift) <= REFERENCE_DRIFT:
        raise EngineError(
            f"{path}: entry '{name}' is of another reference: the loss of {old.reference} was {-drift:+.3g} nats from "
            f"that of {report.reference} now",
            hint=f"give the checkpoint that the baseline was made with, or {_HINT_ANEW}",
        )
    notes: list[str] = []
    if (old.backend, old.dtype) != (report.backend, report.dtype):
        notes.append(f"the baseline is of {old.backend}, {old.dtype}; this engine is {report.backend}, {report.dtype}")
    if old.reference != report.reference:
        notes.append(f"the baseline's reference was {old.reference}; its loss was the same")
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for metric in RESOLUTIONS:
        was, is_now = [getattr(found, metric) for found in then], [getattr(found, metric) for found in now]
        lost = [found.label for found, a, b in zip(now, was, is_now, strict=True) if a is not None and b is None]
        if lost:
            raise EngineError(
                f"{path}: entry '{name}' has {metric} of sequence '{lost[0]}', which was not measured this time",
                hint=f"validate as for the baseline, with each layer alone, or {_HINT_ANEW}",
            )
        if None in was:
            if set(is_now) != {None}:
                notes.append(f"{metric} is not held to the baseline, which does not have it")
            continue
        before[metric], after[metric] = was, is_now
    return Regression(str(path), name, rate, len(keys), gate(after, before, tokens, rate), notes)


def _check_same_sequences(where: str, then: dict[str, Sequence], now: dict[str, SequenceMetrics]) -> None:
    gone, new = ([_label(key) for key in sorted(a.keys() - b.keys())] for a, b in ((then, now), (now, then)))
    if gone or new:
        changed = sorted(set(gone) & set(new))
        parts = [
            f"{what} {_named(labels)}"
            for what, labels in (
                ("other tokens in", changed),
                ("not there now:", [label for label in gone if label not in changed]),
                ("not in the baseline:", [label for label in new if label not in changed]),
            )
            if labels
        ]
        raise EngineError(
            f"{where} is of other sequences: {'; '.join(parts)}",
            hint=f"give the --text or --prompts, and the tokenizer, that it was made with, or {_HINT_ANEW}",
        )
    for key, found in now.items():
        if then[key].tokens != found.tokens:
            raise EngineError(
                f"{where}, sequence '{found.label}': tokens is {then[key].tokens}, and {found.tokens} now",
                hint=f"the file was edited; restore it, or {_HINT_ANEW}",
            )


def _label(key: str) -> str:
    return key.rpartition(" ")[0]


def _named(labels: list[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(f"'{label}'" for label in labels[:_NAMED]) + more


def apply_regression(report: Report, regression: Regression) -> None:
    """Makes the gate a part of the report and of its verdict; takes the place of an earlier one."""
    report.checks = [check for check in report.checks if not check.name.startswith("baseline: ")]
    for found in regression.gates:
        finite = math.isfinite(found.worse)
        detail = f"now {found.now:.6g}, baseline {found.baseline:.6g}, p = {found.p_value:.3g}"
        report.checks.append(
            Check(
                name=f"baseline: {found.metric}",
                value=found.worse if finite else "not finite",
                bound=f"<= {found.resolution + found.noise:.3g}",
                ok=found.ok,
                detail=detail,
            )
        )
    report.notes += [note for note in regression.notes if note not in report.notes]
    report.regression = regression
