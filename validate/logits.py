"""Logits of a whole model against the reference's: numbers by sequence, and over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shuntyard.validate import metrics
from shuntyard.validate.report import SequenceMetrics
from shuntyard.validate.values import Array, Sequence, Tokens

AT_ONCE = 2**22
"""Logits that are looked at together: bounds the memory of what is computed in float64."""

EDGES = np.arange(-9.0, 2.01, 0.5)
"""Of the histogram: log10 of a logit's absolute error; smaller ones count as the smallest."""


@dataclass
class SequenceStatistics:
    """One sequence's numbers, by token: ``[n]`` each, for its tokens from ``first`` on."""

    sequence: Sequence
    first: int
    kl: NDArray[np.float64]
    top1: NDArray[np.float64]  # 1 where the most likely next token is the same
    top5: NDArray[np.float64]  # overlap of the five most likely
    nll: NDArray[np.float64]  # of the next token; the last of the sequence has none and is NaN
    nll_reference: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    relative: NDArray[np.float64]  # |x - y| / |y| of a token's logits
    cosine: NDArray[np.float64]  # 1 - cos(x, y)
    rms: NDArray[np.float64]  # of the reference's logits
    worst: NDArray[np.int64]  # the logit that is furthest off


@dataclass
class LogitStatistics:
    """Of all sequences of one part: prefill, or decoding."""

    sequences: list[SequenceStatistics] = field(default_factory=list)
    vocabulary: int = 2
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))

    def add(self, sequence: Sequence, reference: Array, actual: Array, first: int = 0) -> None:
        """Adds a sequence's logits ``[S, V]``, of which those from ``first`` on count."""
        self.vocabulary = reference.shape[1]
        step = max(1, AT_ONCE // self.vocabulary)
        found: list[dict[str, Array]] = []
        for begin in range(first, len(reference), step):
            place = slice(begin, min(begin + step, len(reference)))
            found.append(self._tokens(reference[place], actual[place], _next(sequence.tokens, place)))
        merged = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        self.sequences.append(SequenceStatistics(sequence, first, **merged))

    def _tokens(self, reference: Array, actual: Array, targets: Tokens) -> dict[str, Array]:
        y, x = reference.astype(np.float64), actual.astype(np.float64)
        off = np.abs(x - y)
        exponent = np.log10(np.maximum(off, 10 ** EDGES[0]))
        self.counts += np.histogram(np.minimum(exponent, EDGES[-1]), EDGES)[0]
        length = np.maximum(np.linalg.norm(y, axis=1), np.finfo(np.float64).tiny)
        cosine = (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * length, np.finfo(np.float64).tiny)
        five = min(5, y.shape[1])
        best = [np.argpartition(-logits, five - 1, axis=1)[:, :five] for logits in (y, x)]
        overlap = (best[0][:, :, None] == best[1][:, None, :]).any(2).mean(1)
        has_next = targets >= 0
        safe = np.where(has_next, targets, 0)
        logs = [metrics.log_softmax(logits) for logits in (x, y)]
        losses = [np.where(has_next, metrics.loss_of_logs(log, safe), np.nan) for log in logs]
        return {
            "kl": np.maximum(0.0, metrics.kl_of_logs(logs[1], logs[0])),
            "top1": (y.argmax(1) == x.argmax(1)).astype(np.float64),
            "top5": overlap,
            "nll": losses[0],
            "nll_reference": losses[1],
            "max_abs": off.max(1),
            "relative": np.linalg.norm(off, axis=1) / length,
            "cosine": 1 - cosine,
            "rms": length / y.shape[1] ** 0.5,
            "worst": off.argmax(1),
        }

    def metrics_of(
        self, routing: Many[float] | None = None, errors: Many[float] | None = None
    ) -> list[SequenceMetrics]:
        """What a baseline keeps of each sequence that has a next token to predict."""
        out = []
        for i, s in enumerate(self.sequences):
            if np.isnan(s.nll).all():
                continue
            out.append(
                SequenceMetrics(
                    label=s.sequence.label,
                    sha256=hashlib.sha256(s.sequence.tokens.astype("<i8").tobytes()).hexdigest(),
                    tokens=int((~np.isnan(s.nll)).sum()),
                    nll=float(np.nanmean(s.nll)),
                    nll_reference=float(np.nanmean(s.nll_reference)),
                    kl=float(s.kl.mean()),
                    top1_miss=float(1 - s.top1.mean()),
                    top5_miss=float(1 - s.top5.mean()),
                    routing_miss=None if routing is None else float(routing[i]),
                    forced_error=None if errors is None else float(errors[i]),
                )
            )
        return out


def _next(tokens: Tokens, place: slice) -> Tokens:
    """The next token of each place, -1 behind the last."""
    following = np.append(tokens[1:], -1)
    return following[place]
