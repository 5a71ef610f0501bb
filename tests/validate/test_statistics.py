"""The gate keeps its rate on noise with heavy tails, sees what is worse, and refuses what it cannot judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.errors import EngineError
from shuntyard.validate.report import SequenceMetrics
from shuntyard.validate.statistics import (
    FEWEST,
    RECOMMENDED,
    RESOLUTIONS,
    Resolution,
    fewest_sequences,
    gate,
    interval,
    perplexity,
)
from tests.validate.metrics_samples import Numbers, numbers

NOTHING = {name: Resolution(0.0, 0.0, "none") for name in RESOLUTIONS}
values = st.floats(-100, 100).map(lambda x: round(x, 3))


def _exchanged(n: int, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
    """Two engines of the same quality on the same text."""
    a, b = numbers(n, rng), numbers(n, rng)
    b["nll"] = a["nll"] + 1e-3 * rng.standard_t(2, n)
    return a, b


def test_every_metric_of_a_sequence_is_looked_at() -> None:
    fields = set(SequenceMetrics.__dataclass_fields__) - {"label", "sha256", "tokens", "nll_reference"}
    assert set(RESOLUTIONS) == fields
    for found in RESOLUTIONS.values():
        assert found.absolute > 0 and found.relative >= 0 and len(found.reason) > 20


@pytest.mark.parametrize("n", [8, 16, 32])
def test_the_rate_is_kept(n: int) -> None:
    """400 pairs of the same quality, with weights that differ: no more firings than 5 % give (99.9 %)."""
    rng, trials, rate = np.random.default_rng(n), 400, 0.05
    weights = rng.integers(16, 256, n).astype(float)
    fired = [
        min(found.p_value for found in gate(*_exchanged(n, rng), weights, rate, NOTHING)) <= rate for _ in range(trials)
    ]
    spread = 3.3 * math.sqrt(rate * (1 - rate) / trials)
    assert rate - spread - 2**-n * len(RESOLUTIONS) < np.mean(fired) < rate + spread


def test_with_resolutions_it_fires_less_often() -> None:
    rng = np.random.default_rng(5)
    fired = [any(not found.ok for found in gate(*_exchanged(16, rng), np.ones(16))) for _ in range(200)]
    assert np.mean(fired) <= 0.05


@pytest.mark.parametrize(("n", "loss_alone"), [(16, False), (RECOMMENDED, True)])
def test_one_percent_worse_is_seen(n: int, loss_alone: bool) -> None:
    """200 engines with a perplexity 1 % above the baseline's, unevenly over the sequences.

    ``loss_alone``: no metric but the loss tells, and its noise has the standard deviation that ``bench/noisy.py`` gives
    of a coarse engine (0.0147 nats), with heavier tails.
    """
    rng, fired = np.random.default_rng(6), []
    for _ in range(200):
        baseline, now = _exchanged(n, rng)
        burden = math.log(1.01) * rng.gamma(4.0, 0.25, n)
        now["nll"] = baseline["nll"] + burden
        if loss_alone:
            now["nll"] += 0.0147 / math.sqrt(3) * rng.standard_t(3, n)
        else:
            now["kl"] = now["kl"] + burden
        fired.append(any(not found.ok for found in gate(now, baseline, np.ones(n))))
    assert np.mean(fired) > 0.95


@given(
    differences=st.lists(st.tuples(values, values), min_size=7, max_size=24),
    rate=st.sampled_from([0.05, 0.1, 0.2]),
    resolution=st.floats(0, 10),
)
def test_what_is_shown_is_what_is_judged(
    differences: list[tuple[float, float]], rate: float, resolution: float
) -> None:
    """Worse by more than resolution and noise, p at most the rate, and not ok are one thing."""
    names = ("nll", "kl")
    table = {name: Resolution(resolution, 0.0, "drawn") for name in names}
    columns = np.array(differences).T
    zero = {name: np.zeros(len(differences)) for name in names}
    found = gate(dict(zip(names, columns, strict=True)), zero, np.ones(len(differences)), rate, table)
    for one in found:
        assert one.ok == (one.p_value > rate) and 0 < one.p_value <= 1
        assert one.resolution == resolution
        gap = one.worse - one.resolution - one.noise
        if abs(gap) > 1e-6:
            assert one.ok == (gap < 0)


@given(
    differences=st.lists(st.tuples(values, values), min_size=7, max_size=13),
    scale=st.sampled_from([2.0**-20, 0.125, 4.0, 2.0**30]),
    seed=st.integers(0, 99),
)
def test_neither_units_nor_order_matter(differences: list[tuple[float, float]], scale: float, seed: int) -> None:
    """While all signs are gone through: with random ones, order is chance."""
    columns = np.array(differences).T
    n = columns.shape[1]
    order = np.random.default_rng(seed).permutation(n)
    zero = {"nll": np.zeros(n), "kl": np.zeros(n)}
    a = gate({"nll": columns[0], "kl": columns[1]}, zero, np.ones(n), 0.05, NOTHING)
    b = gate({"kl": scale * columns[1][order], "nll": columns[0][order]}, zero, np.ones(n), 0.05, NOTHING)
    assert {one.metric: one.p_value for one in a} == {one.metric: one.p_value for one in b}


def test_it_says_the_same_twice() -> None:
    pair = _exchanged(40, np.random.default_rng(1))
    assert gate(*pair, np.arange(1.0, 41.0)) == gate(*pair, np.arange(1.0, 41.0))


def test_p_values_by_hand() -> None:
    """One metric, eight sequences, one of them better by far: of 256 signs, few give as large a sum."""
    x = np.array([1.0, 1, 1, 1, 1, 1, 1, -0.5])
    (found,) = gate({"kl": x}, {"kl": np.zeros(8)}, np.ones(8), 0.05, NOTHING)
    # Sums of at least 6.5: all as they are (6.5) and the last one turned (7.5).
    assert found.p_value == 2 / 256 and not found.ok
    assert found.worse == pytest.approx(6.5 / 8)


def test_equal_engines_pass() -> None:
    same = numbers(12, np.random.default_rng(2))
    for table in (RESOLUTIONS, NOTHING):
        for found in gate(same, same, np.ones(12), resolutions=table):
            assert found.ok and found.worse == 0 and found.noise == 0 and found.p_value == 1


@pytest.mark.parametrize("n", [fewest_sequences(6, 0.05), 8, 13, 14, 200])
@pytest.mark.parametrize("metric", RESOLUTIONS)
def test_worse_everywhere_alike_fires(n: int, metric: str) -> None:
    """Without any noise to be above, and whatever the others do."""
    baseline = numbers(n, np.random.default_rng(3))
    step = RESOLUTIONS[metric].of(float(baseline[metric].mean()))
    for size, fires in ((1.01, True), (0.99, False)):
        now = {**baseline, metric: baseline[metric] + size * step}
        judged = {found.metric: found.ok for found in gate(now, baseline, np.ones(n))}
        assert judged == {name: not (fires and name == metric) for name in RESOLUTIONS}


def test_better_never_fires() -> None:
    baseline = numbers(10, np.random.default_rng(4))
    now = {name: found - 1.0 for name, found in baseline.items()}
    assert all(found.ok and found.worse < 0 for found in gate(now, baseline, np.ones(10)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [2, 12])
def test_what_is_not_finite_fires(value: float, n: int) -> None:
    """Be it a single sequence of a single metric, and the others are judged all the same."""
    baseline = numbers(12, np.random.default_rng(5))
    spoiled = baseline["kl"].copy()
    spoiled[n - 1] = value
    judged = {found.metric: found for found in gate({**baseline, "kl": spoiled}, baseline, np.ones(12))}
    assert [name for name, found in judged.items() if not found.ok] == ["kl"]
    assert judged["kl"].p_value == 0 and judged["kl"].worse == math.inf


def test_long_sequences_weigh_more() -> None:
    now = np.array([1.0, 0, 0, 0, 0, 0, 0, 0])
    (found,) = gate({"kl": now}, {"kl": np.zeros(8)}, [93.0, 1, 1, 1, 1, 1, 1, 1])
    assert found.worse == pytest.approx(0.93) and found.now == pytest.approx(0.93)


@pytest.mark.parametrize(
    ("metrics", "rate", "fewest"), [(1, 0.05, 5), (6, 0.05, 7), (6, 0.01, 10), (1, 0.5, 2)], ids=str
)
def test_too_few_sequences_are_refused(metrics: int, rate: float, fewest: int) -> None:
    assert fewest_sequences(metrics, rate) == fewest
    names = list(RESOLUTIONS)[:metrics]
    for n in range(1, fewest + 2):
        baseline = {name: np.ones(n) for name in names}
        now = {name: 9 * np.ones(n) for name in names}
        if n < fewest:
            with pytest.raises(EngineError, match=rf"{n} sequences cannot tell.*; {fewest} can") as caught:
                gate(now, baseline, np.ones(n), rate)
            assert "more sequences" in caught.value.hint
        else:
            assert not any(found.ok for found in gate(now, baseline, np.ones(n), rate))


@pytest.mark.parametrize(
    ("now", "baseline", "weights", "rate", "message"),
    [
        ({"kl": [0.0] * 8}, {"nll": [0.0] * 8}, [1.0] * 8, 0.05, "on one side only: kl, nll"),
        ({"speed": [0.0] * 8}, {"speed": [0.0] * 8}, [1.0] * 8, 0.05, "no resolution for speed"),
        ({"kl": [0.0] * 7}, {"kl": [0.0] * 8}, [1.0] * 8, 0.05, "7 values now, 8 in the baseline"),
        ({"kl": [0.0] * 8}, {"kl": [math.nan] * 8}, [1.0] * 8, 0.05, "the baseline is not finite"),
        ({"kl": [0.0] * 8}, {"kl": [0.0] * 8}, [1.0] * 7 + [0.0], 0.05, "without tokens"),
        ({"kl": []}, {"kl": []}, [], 0.05, "no sequences"),
        ({"kl": [0.0] * 8}, {"kl": [0.0] * 8}, [1.0] * 8, 0.0, "a rate of 0 "),
        ({"kl": [0.0] * 8}, {"kl": [0.0] * 8}, [1.0] * 8, 1.0, "a rate of 1 "),
    ],
)
def test_what_cannot_be_judged_is_refused(
    now: dict[str, list[float]], baseline: dict[str, list[float]], weights: list[float], rate: float, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        gate(now, baseline, weights, rate)
    assert caught.value.hint


@pytest.mark.parametrize("n", [FEWEST, 8, 16])
def test_intervals_hold_the_mean(n: int) -> None:
    """95 % of them, of skewed values with weights; 3 % are forgiven, 400 trials add 3.3 standard errors."""
    rng, trials = np.random.default_rng(n), 400
    held = 0
    for _ in range(trials):
        found = interval(np.exp(0.5 * rng.standard_normal(n)), rng.integers(32, 128, n).astype(float))
        held += found.low <= math.exp(0.125) <= found.high
    assert 0.92 - 3.3 * math.sqrt(0.05 * 0.95 / trials) < held / trials < 0.99


@given(st.lists(values, min_size=FEWEST, max_size=12), st.floats(-50, 50))
def test_intervals_move_with_their_values(drawn: list[float], shift: float) -> None:
    weights = np.arange(1.0, len(drawn) + 1)
    found = interval(drawn, weights)
    assert found.low <= found.value <= found.high or math.isclose(found.low, found.high)
    assert found.value == pytest.approx(np.average(drawn, weights=weights))
    moved = interval(np.array(drawn) + shift, weights)
    assert moved.value == pytest.approx(found.value + shift, abs=1e-9)


def test_an_interval_of_few_or_equal_values() -> None:
    alone = interval([2.5], [10.0])
    assert alone.value == 2.5 and math.isnan(alone.low) and math.isnan(alone.high)
    assert math.isnan(interval([1.0] * (FEWEST - 1), np.ones(FEWEST - 1)).low)
    equal = interval([3.0] * 9, np.ones(9))
    assert (equal.value, equal.low, equal.high) == (3.0, 3.0, 3.0)


def test_perplexity_is_exp_of_the_mean() -> None:
    nll, weights = 3.0 + 0.3 * np.random.default_rng(0).standard_normal(20), np.arange(1.0, 21.0)
    found, mean = perplexity(nll, weights), interval(nll, weights)
    assert [found.value, found.low, found.high] == pytest.approx(np.exp([mean.value, mean.low, mean.high]).tolist())
    assert found == perplexity(nll, weights)


@pytest.mark.parametrize(
    ("numbers_", "weights", "message"),
    [([], [], "no sequences"), ([1.0, math.nan], [1.0, 1.0], "sequence 1: "), ([1.0], [1.0, 1.0], "1 sequences, 2")],
)
def test_an_interval_of_nothing_is_refused(numbers_: list[float], weights: list[float], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        interval(numbers_, weights)
