"""Fills in what a report shows beyond its checks: modules, routing, flips in their text, sequences, precision."""

from __future__ import annotations

import re
from collections.abc import Sequence as Many
from dataclasses import replace

from shuntyard.engines.text import Tokenizer
from shuntyard.errors import CheckpointError
from shuntyard.validate import statistics
from shuntyard.validate.layers import Walk
from shuntyard.validate.logits import EDGES, LogitStatistics
from shuntyard.validate.record import Recording
from shuntyard.validate.report import Flip, Report
from shuntyard.validate.subjects import Subject

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def fill_in(
    report: Report,
    subject: Subject,
    reference: Subject,
    recording: Recording,
    prefill: LogitStatistics,
    walks: Many[Walk],
) -> None:
    """Everything but checks, culprit and notes, which are there already."""
    report.modules = [module for walk in walks for module in walk.modules]
    # Layers alone are looked at first; where they cannot be, the reference's layers stand in.
    walk = next((w for mode in ("forced", "inverse") for w in walks if w.mode == mode), None)
    routing = errors = None
    if walk is not None:
        report.routing = [c.routing for c in walk.comparisons if c.routing is not None]
        idle = [
            (r.layer, r.load_reference.count(0), len(r.load_reference)) for r in report.routing if 0 in r.load_reference
        ]
        if idle:
            worst = max(idle, key=lambda entry: entry[1])
            report.notes.append(
                f"not exercised: experts that no token reaches, in {len(idle)} of {len(report.routing)} layers (in "
                f"model.layers.{worst[0]} {worst[1]} of {worst[2]}); give more text"
            )
        report.flips = _in_text([flip for c in walk.comparisons for flip in c.flips], reference, recording)
        if walk.mode == "forced":  # of all sequences
            errors = walk.errors().tolist()
            routing = walk.misses(len(recording.sequences)).tolist()
    report.sequences = prefill.metrics_of(routing, errors)
    if report.sequences:
        weights = [float(s.tokens) for s in report.sequences]
        report.perplexity = statistics.perplexity([s.nll for s in report.sequences], weights)
        report.perplexity_reference = statistics.perplexity([s.nll_reference for s in report.sequences], weights)
    if prefill.sequences:
        report.histogram = {"edges": EDGES.tolist(), "counts": prefill.counts.astype(float).tolist()}
    report.precision = _precision(report, subject)


def _in_text(flips: list[Flip], reference: Subject, recording: Recording) -> list[Flip]:
    try:
        tokenizer: Tokenizer | None = Tokenizer.from_directory(reference.path)
    except CheckpointError:  # token ids do without
        tokenizer = None
    tokens = {sequence.label: sequence.tokens.tolist() for sequence in recording.sequences}
    out = []
    for flip in flips:
        before, text, after = _excerpt(tokenizer, tokens[flip.sequence], flip.token)
        out.append(replace(flip, before=before, text=text, after=after))
    return out


def _excerpt(tokenizer: Tokenizer | None, tokens: list[int], place: int, around: int = 12) -> tuple[str, str, str]:
    """The text before, of and behind a token; token ids where there is no tokenizer."""

    def words(ids: list[int]) -> str:
        return tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))

    text = words(tokens[place : place + 1]) or f"<{tokens[place]}>"
    return words(tokens[max(0, place - around) : place]), text, words(tokens[place + 1 : place + 1 + around])


def _precision(report: Report, subject: Subject) -> list[dict[str, str]]:
    """By layer, each module's number format; those of the head and the embedding are facts."""
    if subject.manifest is None:
        return []
    rows: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    for path, dtype in subject.manifest.precision.items():
        found = _LAYER.match(path)
        if found:
            rows.setdefault(int(found[1]), {})[found[2]] = dtype
        else:
            outside[path] = dtype
    if outside:
        report.facts["outside the layers"] = ", ".join(f"{path} {dtype}" for path, dtype in outside.items())
    return [rows.get(layer, {}) for layer in range(report.layers)]
