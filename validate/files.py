"""Whether two models have the same weights: a comparison of two checkpoints says nothing about an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from shuntyard.engines.build import eos_token_ids
from shuntyard.validate.dequantise import ROUNDING, DequantisedCheckpoint
from shuntyard.validate.report import Check, Report
from shuntyard.validate.subjects import Subject


def check_files(report: Report, engine: Subject, reference: Subject, *, allow_other: bool) -> bool:
    """Adds a failed check, or with ``allow_other`` a note, where the weights' files differ, or the tokenizer's.

    Returns whether the reference is the very checkpoint that a recipe made the engine of, by quantising weights or KV
    caches: the two are to differ then.
    """
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
        return _check_rewritten(report, engine, reference)
    if mine.fingerprint == theirs.fingerprint and mine.shards == theirs.shards:
        return False
    detail = "the engine was built from other files than the reference reads"
    if allow_other:
        report.notes.append(detail)
    else:
        report.checks.append(Check("files: the same", "no", "yes", False, detail))
    return False


def _check_rewritten(report: Report, engine: Subject, reference: Subject) -> bool:
    """Holds an engine's own weights, written anew in another form, to the reference's, value by value."""
    if not any(path.suffix == ".safetensors" for path in engine.path.iterdir()):
        report.notes.append(
            "the engine's weights were rewritten from a checkpoint of the same names, types and shapes; whether from "
            "these values cannot be seen, for the plan has them in a form of its own"
        )
        manifest = engine.manifest
        by_recipe = manifest is not None and manifest.recipe is not None
        return by_recipe and any(own.granularity for own in (engine.modules or {}).values())
    theirs, ours = DequantisedCheckpoint(reference.path), DequantisedCheckpoint(engine.path)
    exact, quantised = True, 0
    for name in theirs.shapes:  # one at a time: all of them need not fit in memory
        value, own = theirs.outer(name), ours.outer(name) if name in ours.shapes else None
        rounded = value.to(NARROW.get(ours.plain_type(name), torch.float32)).float() if own is not None else value
        if own is not None and torch.equal(own, rounded):
            exact = exact and torch.equal(rounded, value)
            continue
        if own is None or not _is_rounded(value, own, ours.reach(name)):
            detail = f"'{name}' of the engine is not what a rewrite of the reference's gives"
            report.checks.append(Check("files: the same values", "no", "yes", False, detail))
            return False
        misfit = ours.misfit(name, value)
        if misfit:
            detail = f"'{name}' of the engine: its scales are {misfit} than its values need"
            report.checks.append(Check("files: quantised from the reference's", "no", "yes", False, detail))
            return False
        quantised += 1
    if quantised:
        detail = f"{quantised} of {len(theirs.shapes)} weights are the reference's, each value rounded to the nearest"
        report.checks.append(Check("files: quantised from the reference's", "yes", "yes", True, detail))
        return True
    report.checks.append(Check("files: the same values", "yes", "yes", True, "rewritten from the reference"))
    if not exact:
        report.notes.append(
            "the rewrite rounded the weights, and the reference has them as they were: hold the engine to the model "
            "directory to judge the engine alone"
        )
    return bool(engine.fp8_kv_cache)


NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def _is_rounded(value: Tensor, own: Tensor, reach: Tensor | None) -> bool:
    """Whether each number of ``own`` is one that its ``value`` can be rounded to."""
    if reach is None or own.shape != value.shape:
        return False
    above = value - own
    return bool(((above >= -ROUNDING * reach[0]) & (above <= ROUNDING * reach[1])).all())
