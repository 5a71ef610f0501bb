"""Judges in numpy what the runner has written: a second opinion on what the runner says itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.plugins.conformance.files import Array, Between, Case, Exact, Near, OneOf, Output, Unjudged


def judge(case: Case, outputs: list[bytes]) -> list[str]:
    """What is wrong with the outputs of a case; empty if nothing is."""
    assert len(outputs) == len(case.outputs)
    wrong = []
    for number, (output, data) in enumerate(zip(case.outputs, outputs, strict=True)):
        got = np.frombuffer(data, output.dtype)
        if got.size != int(np.prod(output.shape)):
            wrong.append(f"{case.name}: output {number} has {got.size} elements")
            continue
        with np.errstate(invalid="ignore"):
            bad = _bad_elements(output, got)
        if bad.size:
            what = "rows" if isinstance(output.judgement, OneOf) else "elements"
            wrong.append(f"{case.name}: output {number}: {bad.size} {what} are wrong, as {bad[:3].tolist()}")
    return wrong


def _wide(array: Array) -> Array:
    result: Array = array.astype(np.float64)
    return result


def _between(got: Array, low: Array, high: Array) -> Any:
    return np.where(np.isnan(low), np.isnan(got), (low <= got) & (got <= high))


def _bad_elements(output: Output, got: Array) -> Array:
    """Numbers of the elements that are wrong, or of the rows."""
    judgement = output.judgement
    if isinstance(judgement, Unjudged):
        return np.zeros(0, np.int64)
    if isinstance(judgement, OneOf):
        rows = _wide(got).reshape(len(judgement.rows), -1) if judgement.rows else np.zeros((0, 1))
        fit = [
            (row.may_be_nan and bool(np.isnan(own).all()))
            or any(_between(own, *(_wide(b.astype(output.dtype)) for b in pair)).all() for pair in row.bounds)
            for own, row in zip(rows, judgement.rows, strict=True)
        ]
        return np.flatnonzero(~np.asarray(fit, bool))
    judged = got[:: judgement.stride]
    wide = _wide(judged)
    if isinstance(judgement, Between):
        low, high = (_wide(bound.astype(output.dtype)) for bound in (judgement.low, judgement.high))
        held = _between(wide, low, high)
    else:
        expected = _wide(judgement.values)
        if isinstance(judgement, Near):
            near = (wide == expected) | (abs(wide - expected) <= judgement.tolerance)
        else:
            assert isinstance(judgement, Exact)
            bits = f"u{output.dtype.itemsize}"
            near = judged.view(bits) == judgement.values.view(bits)
        held = np.where(np.isnan(expected), np.isnan(wide), near)
    return np.flatnonzero(~held) * judgement.stride
