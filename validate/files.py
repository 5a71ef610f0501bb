"""Whether two models have the same weights: a comparison of two checkpoints says nothing about an engine."""

from __future__ import annotations

import torch

from shuntyard.engines.build import eos_token_ids
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.weights import match_weights
from shuntyard.validate.dequantise import DequantisedCheckpoint
from shuntyard.validate.report import Check, Report
from shuntyard.validate.subjects import Subject


def check_files(report: Report, engine: Subject, reference: Subject, *, allow_other: bool) -> None:
    """Adds a failed check, or with ``allow_other`` a note, where the weights' files differ, or the tokenizer's."""
    files = [subject.path / "tokenizer.json" for subject in (engine, reference)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        detail = "the engine's tokenizer.json is another than the reference's, by which texts are read here"
        if allow_other:
            report.notes.append(detail)
        else:
            report.checks.append(Check("files: tokenizer.json", "another", "the same", False, detail))
    if engine.manifest is not None and reference.kind != "engine":
        ids = eos_token_ids(reference.path)
        if ids != engine.manifest.eos_token_ids:
            report.notes.append(f"the engine ends texts at {engine.manifest.eos_token_ids}, the reference at {ids}")
    mine, theirs = engine.identity, reference.identity
    if mine.rewritten_from is not None and mine.rewritten_from == theirs.fingerprint:
        _check_rewritten(report, engine, reference)
        return
    if mine.fingerprint == theirs.fingerprint and mine.shards == theirs.shards:
        return
    detail = "the engine was built from other files than the reference reads"
    if allow_other:
        report.notes.append(detail)
    else:
        report.checks.append(Check("files: the same", "no", "yes", False, detail))


def _check_rewritten(report: Report, engine: Subject, reference: Subject) -> None:
    """Holds an engine's own weights, written anew in another type or layout, to the reference's, value by value."""
    if not any(path.suffix == ".safetensors" for path in engine.path.iterdir()):
        report.notes.append(
            "the engine's weights were rewritten from a checkpoint of the same names, types and shapes; whether from "
            "these values cannot be seen, for the plan has them in a form of its own"
        )
        return
    theirs, ours = DequantisedCheckpoint(reference.path), DequantisedCheckpoint(engine.path)
    types = {stored.entry.dtype for _, stored in match_weights(open_checkpoint(engine.path)).stored()}
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    narrowed = narrow.get(types.pop()) if len(types) == 1 else None
    exact = True
    for name in theirs.shapes:  # one at a time: all of them need not fit in memory
        value = theirs.outer(name)
        rounded = value if narrowed is None else value.to(narrowed).float()
        exact = exact and torch.equal(rounded, value)
        if name not in ours.shapes or not torch.equal(ours.outer(name), rounded):
            detail = f"'{name}' of the engine is not what a rewrite of the reference's gives"
            report.checks.append(Check("files: the same values", "no", "yes", False, detail))
            return
    report.checks.append(Check("files: the same values", "yes", "yes", True, "rewritten from the reference"))
    if not exact:
        report.notes.append(
            "the rewrite rounded the weights, and the reference has them as they were: hold the engine to the model "
            "directory to judge the engine alone"
        )
