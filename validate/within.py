"""Bounds on what a recipe may change against bf16: ``kl<=0.01``, ``perplexity<=1%``, ``top1>=0.99``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shuntyard.errors import UnsupportedError
from shuntyard.validate.charts import three
from shuntyard.validate.statistics import interval
from shuntyard.validate.walk import Outcome

Metric = Literal["kl", "perplexity", "top1"]


@dataclass(frozen=True)
class Bound:
    """A bound on what a recipe may change against bf16."""

    metric: Metric
    value: float
    text: str  # as it was given

    def value_of(self, outcome: Outcome, baseline: Outcome) -> float:
        """The metric: KL in nats, the relative change of the perplexity, or the share of equal top-1 tokens."""
        if self.metric == "kl":
            return outcome.mean_kl
        if self.metric == "top1":
            return outcome.mean_top1
        return math.expm1(outcome.mean_nll - baseline.mean_nll)

    def holds(self, value: float) -> bool:
        """Whether a value is within it. A perplexity that falls is another model's as much as one that rises."""
        return value >= self.value if self.metric == "top1" else abs(value) <= self.value

    def loss(self, value: float) -> float:
        """A value so that less is better."""
        return -value if self.metric == "top1" else abs(value)

    def doubt(self, outcome: Outcome, baseline: Outcome) -> str:
        """Where the text is too short for this bound: a sentence; else empty.

        It is where the metric's 95 % interval, over windows, is wider than what the bound leaves.
        """
        if self.metric == "perplexity":
            found = interval(outcome.nll - baseline.nll, (outcome.tokens - 1).astype(np.float64))
            low, high = math.expm1(found.low), math.expm1(found.high)
        else:
            found = interval(outcome.kl if self.metric == "kl" else outcome.top1, outcome.tokens.astype(np.float64))
            low, high = found.low, found.high
        if math.isnan(low) or math.isnan(high):
            return f"so few windows ({len(outcome.tokens)}) do not tell how far {self.text} holds on other text"
        if high - low <= (1 - self.value if self.metric == "top1" else self.value):
            return ""
        return (
            f"on text like this it may be from {self.shown(low)} to {self.shown(high)} (95 %), which is wider than "
            f"{self.text}: measure on more text"
        )

    def shown(self, value: float) -> str:
        """A value for people."""
        if self.metric == "kl":
            return f"KL {three(value)}"
        return f"top-1 agreement {value:.4%}" if self.metric == "top1" else f"perplexity {value:+.3%}"


def parse_bound(text: str) -> Bound:
    """``kl<=0.01``, ``perplexity<=1%`` (its change against bf16's, up or down), ``top1>=0.99`` or ``top1>=99%``.

    Raises:
        UnsupportedError: it is anything else, or nothing can be within it.
    """
    hint = "one of kl<=0.01, perplexity<=1%, top1>=0.99"
    found = re.fullmatch(
        r"\s*(kl|perplexity|top1)\s*(<=|>=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", text
    )
    if found is None:
        raise UnsupportedError(f"--within {text!r:.80} is not understood", hint=hint)
    metric, sign, number, per_cent = found.groups()
    if (sign == ">=") != (metric == "top1"):
        raise UnsupportedError(f"--within {text!r:.80}: {metric} is bounded from the other side", hint=hint)
    if metric == "perplexity" and not per_cent:
        raise UnsupportedError(
            f"--within {text!r:.80}: perplexity is bounded by how much it changes, in %", hint="as in perplexity<=1%"
        )
    if metric == "kl" and per_cent:
        raise UnsupportedError(f"--within {text!r:.80}: KL is no share", hint=hint)
    value = float(number) / (100 if per_cent else 1)
    if not math.isfinite(value) or (metric != "top1" and value < 0) or (metric == "top1" and not 0 <= value <= 1):
        nearest = {
            "kl": "KL is at least 0, and bf16's own",
            "top1": "agreement is at most 1, bf16's with itself",
            "perplexity": "a change either way counts, and bf16's is 0",
        }[metric]
        raise UnsupportedError(f"--within {text!r:.80}: nothing is within it: {nearest}", hint=hint)
    return Bound(metric, value, text.strip())  # type: ignore[arg-type]
