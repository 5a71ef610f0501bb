"""Greedy continuation: where the engine's tokens part from the reference's, and whether at a near tie."""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np

from shuntyard.engines.engine import Engine
from shuntyard.validate.bounds import Bounds
from shuntyard.validate.layers import before_ties
from shuntyard.validate.record import cached_recording
from shuntyard.validate.report import Check, Report
from shuntyard.validate.subjects import Subject
from shuntyard.validate.values import Sequence

PROMPTS = 3
"""Sequences that are continued, of three lengths."""


def compare(
    report: Report,
    bounds: Bounds,
    engine: Engine,
    reference: Subject,
    sequences: Many[Sequence],
    rows: Many[int],
    split: int,
    count: int,
    cache: Path | None,
) -> None:
    """Same tokens, or a first different one that the reference likes nearly as well; adds a check for each prompt.

    Behind a near tie of experts a token that differs is not judged: another expert may change any logit.

    The reference need not generate: run once over prompt and continuation, it says at each place what it would have
    chosen, and up to the first difference that is what it has before it.
    """
    count = min(count, engine.manifest.limits.max_context - split + 1)
    chosen = [sequences[row].tokens for row in rows[:PROMPTS]]
    lengths = [max(1, split * (PROMPTS - i) // PROMPTS) for i in range(len(chosen))]
    new = engine.generate(np.stack([tokens[:split] for tokens in chosen]), count, lengths, stop=[])
    whole = [
        Sequence(f"greedy {i}", np.concatenate([tokens[:n], ours[:-1]]))
        for i, (tokens, n, ours) in enumerate(zip(chosen, lengths, new, strict=True))
    ]
    assert reference.make_stack is not None
    with cached_recording(reference.make_stack, reference.key, whole, cache) as recording:
        clear = before_ties(recording, reference.config, bounds)[-1]
        for row, (n, ours, logits) in enumerate(zip(lengths, new, recording.logits(), strict=True)):
            name = f"greedy: {count} tokens after {n}"
            scored = np.asarray(logits[n - 1 : n - 1 + count])
            theirs = scored.argmax(1)
            if (theirs == ours).all():
                judged = bounds.whole.tie is not None
                report.checks.append(Check(name, "equal", "equal" if judged else "-", judged or None))
                continue
            place = int((theirs != ours).argmax())
            margin = float(scored[place].max() - scored[place][int(ours[place])])
            detail = f"engine {int(ours[place])}, reference {int(theirs[place])}, margin {margin:.3g}"
            if bounds.whole.tie is None:
                report.checks.append(Check(name, f"differ at {place}", "-", None, detail))
                continue
            bound = f"equal, or a margin < {bounds.whole.tie:g}"
            ok: bool | None = margin < bounds.whole.tie
            if not ok and not clear[row][n - 1 + place]:
                ok, detail = None, f"{detail}; the reference's experts nearly tied before"
            report.checks.append(Check(name, f"differ at {place}", bound, ok, detail))
