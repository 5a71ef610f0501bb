"""How sure is a number that comes from a few sequences? Intervals of means, and the gate against a baseline.

Sequences are what is resampled, never tokens: the tokens of a sequence share its text and its errors.

**Intervals** are by the studentised bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 12.5).

**The gate** asks for several metrics at once whether an engine is worse than its baseline on the same sequences, by
more than the metric's :data:`RESOLUTIONS`. Two engines of the same quality can be exchanged in any sequence: its
differences change their signs together, and nothing else changes. So signs are redrawn, sequence by sequence for all
metrics jointly, and the largest studentised mean over the metrics is compared with the largest of each redrawing
(Westfall and Young, Resampling-Based Multiple Testing, 1993, the single-step maxT). That keeps the rate, at any number
of sequences and however heavy the tails. Bootstraps of the sequences do not: ``bench/gate.py`` measures all three.

What exchanging cannot see is what two builds of the same quality differ by in *all* sequences: each has its own
rounding errors, and on many sequences even the smallest difference is no noise. That is what resolutions are for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shuntyard.errors import EngineError
from shuntyard.validate.report import Gate, Interval

Floats = NDArray[np.float64]

RATE = 0.05
"""Default rate at which the gate fires on engines of the same quality, all metrics together."""

RECOMMENDED = 64
"""Sequences from which on an engine whose perplexity is 1 % worse fires in more than 95 of 100 cases, even where only
its loss tells and its baseline is as coarse as bf16 arithmetic (``bench/gate.py``). More noise is seen from 8 on."""

FEWEST = 5
"""Sequences below which there is no interval."""

DRAWS = 9_999
"""Resamplings. A p-value of 5 % is then good to .2 %."""

EXHAUSTIVE = 13
"""Up to so many sequences all of their signs are gone through."""

SEED = 20_170_922


@dataclass(frozen=True)
class Resolution:
    """The smallest difference of a metric that matters: builds of the same quality may be that far apart.

    The larger one of ``absolute`` and ``relative`` times the baseline's mean.
    """

    absolute: float
    relative: float
    reason: str

    def of(self, baseline: float) -> float:
        """In the metric's unit."""
        return max(self.absolute, self.relative * abs(baseline))


RESOLUTIONS = {
    "nll": Resolution(
        1e-3, 0.0, "a thousandth of the perplexity; builds of fp16's or bf16's roundings were up to 6e-4 nats apart"
    ),
    "kl": Resolution(
        1e-8, 0.25, "goes with the square of an error, so this is an eighth of the error; builds are a fifth apart"
    ),
    "top1_miss": Resolution(2e-4, 0.10, "goes with the error; builds of the same roundings are a tenth apart"),
    "top5_miss": Resolution(2e-4, 0.10, "as top1_miss: goes with the error; builds are a tenth apart"),
    "routing_miss": Resolution(2e-4, 0.25, "few tokens are near a tie, so chance is large: builds are a fifth apart"),
    "forced_error": Resolution(
        1e-6, 0.10, "goes with the error, of few modules each; the floor is what fp32's other orders of summation make"
    ),
}
"""By field of :class:`~shuntyard.validate.report.SequenceMetrics`: what the gate looks at. How far builds are apart is
the miniature's, whose few weights average less of their noise than a large model's (``bench/gate.py``). An engine whose
perplexity is 1 % worse by noise has three times the KL and twice the misses or more."""


def interval(values: Sequence[float] | Floats, weights: Sequence[float] | Floats) -> Interval:
    """A token-weighted mean over sequences, and its 95 % confidence interval.

    ``values, weights [n]``: a mean over each sequence's tokens, and how many they are. Below :data:`FEWEST` sequences
    the bounds are NaN: so few do not tell how far sequences are apart.

    Raises:
        EngineError: there is no sequence, a value is not finite, or a weight is not positive.
    """
    v, w = np.asarray(values, np.float64), _checked_weights(weights)
    if v.shape != w.shape:
        raise EngineError(f"{v.size} sequences, {w.size} weights", hint="give one weight for each sequence")
    if not np.isfinite(v).all():
        raise EngineError(
            f"sequence {int(np.flatnonzero(~np.isfinite(v))[0])}: its mean is not finite",
            hint="an engine that computes NaN or infinity has no mean; see the failed checks",
        )
    mean = float(w @ v / w.sum())
    if len(v) < FEWEST:
        return Interval(mean, math.nan, math.nan)
    drawn, centred = _resamples(len(v)), v - mean
    shifts = drawn @ (w * centred) / (drawn @ w)  # of the mean, [draws]
    ones = np.ones((1, len(v)))
    error = float(_standard_errors(ones, centred, w, np.zeros(1))[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = shifts / _standard_errors(drawn, centred, w, shifts)
    t = np.where(np.isnan(t), 0.0, t)  # a draw of equal values, all at the mean
    low, high = np.quantile(t, [0.025, 0.975], method="inverted_cdf")
    if error == 0:
        return Interval(mean, mean, mean)
    return Interval(mean, mean - float(high) * error, mean - float(low) * error)


def perplexity(nll: Sequence[float] | Floats, weights: Sequence[float] | Floats) -> Interval:
    """exp of the mean negative log-likelihood, and of its bounds; see :func:`interval`."""
    found = interval(nll, weights)
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(x)) for x in (found.value, found.low, found.high))
    return Interval(value, low, high)


def _standard_errors(counts: Floats, centred: Floats, weights: Floats, means: Floats) -> Floats:
    """Of the weighted mean of each draw, a ratio of two sums, by linearisation: ``[draws, n] -> [draws]``."""
    n, squared = len(centred), weights * weights
    spread = counts @ (squared * centred**2)
    spread = spread + means * (means * (counts @ squared) - 2 * (counts @ (squared * centred)))
    errors: Floats = np.asarray(np.sqrt(n / (n - 1) * np.maximum(spread, 0.0)), np.float64)
    return errors / (counts @ weights)


@functools.lru_cache(maxsize=8)
def _resamples(n: int) -> Floats:
    """How often each of ``n`` sequences is in each draw of ``n``: ``[draws, n]``."""
    rng = np.random.default_rng([SEED, n])
    out: Floats = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
    return out


@functools.lru_cache(maxsize=8)
def _signs(n: int) -> Floats:
    """Signs of ``n`` sequences, first those as they are: ``[draws, n]``; all that there are, or random ones."""
    if n <= EXHAUSTIVE:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        bits = np.random.default_rng([SEED, n]).integers(0, 2, (DRAWS + 1, n))
        bits[0] = 0
    return np.where(bits == 0, 1.0, -1.0)


def fewest_sequences(metrics: int, rate: float) -> int:
    """From how many sequences on a metric that is worse in each of them alike fires, whatever the others do."""
    return max(2, math.ceil(math.log2(metrics / rate)))


def gate(
    now: Mapping[str, Sequence[float] | Floats],
    baseline: Mapping[str, Sequence[float] | Floats],
    weights: Sequence[float] | Floats,
    rate: float = RATE,
    resolutions: Mapping[str, Resolution] = RESOLUTIONS,
) -> list[Gate]:
    """Judges whether each metric is worse than its baseline.

    ``now[metric], baseline[metric], weights [n]``: each sequence's mean over its tokens, lower is better, and how many
    tokens. A metric fires where its mean difference is above its resolution by more than ``noise``. On engines of the
    same quality any of them fires at ``rate`` or less. A metric that is not finite now fires by itself.

    Raises:
        EngineError: the metrics or their lengths do not match, the baseline is not finite, the rate is no probability,
            or the sequences are too few for the rate.
    """
    w = _checked_weights(weights)
    ours, theirs = _checked_metrics(now, baseline, len(w), resolutions)
    if not 0 < rate < 1:
        raise EngineError(f"a rate of {rate:g} is no probability", hint="give one above 0 and below 1, as 0.05")
    finite = [name for name in ours if np.isfinite(ours[name]).all()]
    needed = fewest_sequences(max(len(finite), 1), rate)
    if finite and len(w) < needed:
        raise EngineError(
            f"{len(w)} sequences cannot tell {len(finite)} metrics from noise at a rate of {rate:g}; {needed} can",
            hint="compare more sequences (a longer text, or more prompts), or give a larger rate",
        )
    judged = _max_t({name: ours[name] - theirs[name] for name in finite}, theirs, w, rate, resolutions)
    share = w / w.sum()
    return [
        Gate(
            metric=name,
            now=float(share @ ours[name]),
            baseline=float(share @ theirs[name]),
            worse=float(share @ (ours[name] - theirs[name])) if name in judged else math.inf,
            noise=judged[name][0] if name in judged else 0.0,
            p_value=judged[name][1] if name in judged else 0.0,
            ok=name in judged and judged[name][1] > rate,
            resolution=resolutions[name].of(float(share @ theirs[name])),
        )
        for name in ours
    ]


def _max_t(
    differences: Mapping[str, Floats],
    baseline: Mapping[str, Floats],
    weights: Floats,
    rate: float,
    resolutions: Mapping[str, Resolution],
) -> dict[str, tuple[float, float]]:
    """Noise and adjusted p-value of each metric.

    Under changed signs the sum of squares stays, so Student's t grows with ``sum(x) / norm(x)``, in the same way for
    all metrics: that is what is compared. ``noise`` turns its critical value back into t, times the standard error, so
    that "above resolution and noise" and "p <= rate" are the same.
    """
    if not differences:
        return {}
    n, share = len(weights), weights / weights.sum()
    shifts = [resolutions[name].of(float(share @ baseline[name])) for name in differences]
    x = np.stack([n * share * (d - r) for d, r in zip(differences.values(), shifts, strict=True)], axis=1)  # [n, M]
    x = x / np.where((largest := np.abs(x).max(axis=0)) > 0, largest, 1.0)  # squares of denormals are zero
    norms = np.linalg.norm(x, axis=0)
    columns = x / np.where(norms > 0, norms, 1.0)
    drawn = _signs(n) @ columns  # [draws, M]
    highest = np.sort(drawn.max(axis=1))[::-1]
    p_values = [float(np.mean(highest >= seen - _TIE)) for seen in drawn[0]]
    critical = float(highest[math.floor(rate * len(highest))])
    t = critical * math.sqrt((n - 1) / max(n - critical**2, _TIE))
    errors = largest * x.std(axis=0, ddof=1) / math.sqrt(n)
    return {name: (float(t * e), p) for name, e, p in zip(differences, errors, p_values, strict=True)}


_TIE = 1e-9
"""Sums of the same numbers in another order are that close."""


def _checked_weights(weights: Sequence[float] | Floats) -> Floats:
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not len(w):
        raise EngineError("no sequences to compare", hint="give a text or prompts with at least one sequence")
    if not (np.isfinite(w).all() and (w > 0).all()):
        raise EngineError("a sequence without tokens has no mean", hint="leave it out")
    return w


def _checked_metrics(
    now: Mapping[str, Sequence[float] | Floats],
    baseline: Mapping[str, Sequence[float] | Floats],
    n: int,
    resolutions: Mapping[str, Resolution],
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    if set(now) != set(baseline):
        odd = sorted(set(now) ^ set(baseline))
        raise EngineError(f"metrics on one side only: {', '.join(odd)}", hint="compare the same metrics")
    unknown = sorted(set(now) - set(resolutions))
    if unknown:
        raise EngineError(f"no resolution for {', '.join(unknown)}", hint=f"there is one for {', '.join(resolutions)}")
    ours = {name: np.asarray(values, np.float64) for name, values in now.items()}
    theirs = {name: np.asarray(baseline[name], np.float64) for name in now}
    for name in ours:
        if ours[name].shape != (n,) or theirs[name].shape != (n,):
            raise EngineError(
                f"{name}: {ours[name].size} values now, {theirs[name].size} in the baseline, {n} sequences",
                hint="compare the same sequences",
            )
        if not np.isfinite(theirs[name]).all():
            raise EngineError(f"{name}: the baseline is not finite", hint="save it again from an engine that is right")
    return ours, theirs
