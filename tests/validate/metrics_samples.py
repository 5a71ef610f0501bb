"""Reports with the numbers of sequences, whose noise has heavy tails, as flips of experts give it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuntyard.validate.report import Report, SequenceMetrics
from shuntyard.validate.statistics import RESOLUTIONS

Numbers = dict[str, NDArray[np.float64]]


def numbers(n: int, rng: np.random.Generator) -> Numbers:
    """One engine's metrics of ``n`` sequences, by Student's t with 2 degrees of freedom: its variance is infinite."""
    flips = 1e-3 * np.abs(rng.standard_t(2, n))  # they move every metric of a sequence at once
    return {
        "nll": 3.5 + 0.3 * rng.standard_normal(n) + 1e-3 * rng.standard_t(2, n),
        "kl": flips,
        "top1_miss": np.round(128 * (0.01 + flips)) / 128,
        "top5_miss": 0.01 + flips,
        "routing_miss": np.round(128 * 4 * (0.002 + flips)) / 512,
        "forced_error": 0.01 + 1e-4 * rng.standard_normal(n),
    }


def report(found: Numbers, **changes: Any) -> Report:
    """A report that passed, of sequences of different lengths."""
    n = len(found["nll"])
    sequences = [
        SequenceMetrics(
            label=f"window {i}",
            sha256=hashlib.sha256(str(i).encode()).hexdigest(),
            tokens=64 + i,
            nll_reference=3.5,
            **{name: float(found[name][i]) for name in RESOLUTIONS},
        )
        for i in range(n)
    ]
    base = Report("engine", "checkpoint", "onnxruntime", "fp32", sum(s.tokens for s in sequences), sequences=sequences)
    base.at_most("prefill: mean KL", 1e-9, 1e-8)
    return dataclasses.replace(base, **changes)


def with_sequences(base: Report, **changes: Any) -> Report:
    """The same report, a field of every sequence changed."""
    return dataclasses.replace(base, sequences=[dataclasses.replace(one, **changes) for one in base.sequences])
