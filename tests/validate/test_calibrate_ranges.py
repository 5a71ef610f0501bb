"""Clips of small data are those of brute force; what comes in pieces is what comes at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shuntyard.errors import NotFiniteError, UnsupportedError
from shuntyard.exporter.calibration import LEAST_CLIP
from shuntyard.validate import calibrate_ranges
from shuntyard.validate.calibrate_ranges import FRACTIONS, Method, MethodName, Range
from shuntyard.validate.values import Array

METHODS = [Method(), Method("percentile", 50), Method("percentile", 99.9), Method("mse")]


def arrays(longest: int = 60) -> st.SearchStrategy[Array]:
    anything, usual = st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-8, 8, width=32)
    return hnp.arrays(np.float32, st.integers(1, longest), elements=anything) | hnp.arrays(
        np.float32, st.integers(1, longest), elements=usual
    )


def clip(values: Array, method: Method) -> float:
    own = Range("it", method)
    own.add(values)
    return own.clip()


@given(arrays())
def test_amax(values: Array) -> None:
    largest = float(np.abs(values).max())
    assert clip(values, Method()) == (largest if largest >= LEAST_CLIP else 1.0)


@given(arrays(), st.sampled_from([0.5, 10, 50, 90, 97.3, 99.9, 100]))
def test_percentile(values: Array, percent: float) -> None:
    ordered = sorted(abs(float(value)) for value in values)
    exact = next(v for i, v in enumerate(ordered) if (i + 1) / len(ordered) * 100 >= percent - 1e-9)
    found = clip(values, Method("percentile", percent))
    if ordered[-1] < LEAST_CLIP:
        assert found == 1.0
    elif exact < LEAST_CLIP:
        assert found == ordered[-1] or found <= 2 * LEAST_CLIP
    else:
        assert exact <= found <= min(exact * (1 + 1 / 512), ordered[-1])


@pytest.mark.parametrize(("percent", "place"), [(99.9, 998), (99.85, 998), (99.91, 999), (100, 999), (0.1, 0)])
def test_a_percentile_is_counted_in_whole_values(percent: float, place: int) -> None:
    """999 of 1000 values are 99.9 %, though 0.999 is less in binary."""
    values = np.float32(2) ** np.linspace(-20, 20, 1000, dtype=np.float32)
    found = clip(np.random.default_rng(0).permutation(values), Method("percentile", percent))
    assert values[place] <= found <= values[place] * (1 + 1 / 512)


def test_a_percentile_of_zero_gives_way_to_the_largest() -> None:
    values = np.zeros(1000, np.float32)
    values[7] = -3.5
    assert clip(values, Method("percentile", 99)) == 3.5


def brute_error(values: Array, clip: float) -> float:
    """By a table of all e4m3 numbers, the nearest of them, the even one of two."""
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale, total = np.float32(clip) / np.float32(448), 0.0
    for value in np.abs(values):
        distance = np.abs(numbers - float(value / scale))
        nearest = np.flatnonzero(distance == distance.min())
        code = next((n for n in nearest if n % 2 == 0), nearest[0])
        total += (float(value) - numbers[code] * float(scale)) ** 2
    return total


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([2.0, 3.0, 30.0]), st.integers(1, 80))
def test_least_squared_error(seed: int, freedom: float, count: int) -> None:
    """Of values with heavy tails: no clip of the grid is better than the one that is found, but for the bins' width."""
    values = np.random.default_rng(seed).standard_t(freedom, count).astype(np.float32)
    largest = float(np.abs(values).max())
    found = clip(values, Method("mse"))
    grid = [float(np.float32(fraction * largest)) for fraction in FRACTIONS]
    assert found in grid
    error = [brute_error(values, each) for each in grid]
    # A value stands for its bin's middle: it may be off by 1/1024 of itself.
    slack = 2 * np.sqrt(min(error)) * np.linalg.norm(values) / 1024 + (np.linalg.norm(values) / 1024) ** 2
    assert brute_error(values, found) <= min(error) + 2 * slack


def test_the_largest_value_is_cut_where_many_pay_for_it() -> None:
    """Many values halfway between the two largest e4m3 numbers of the largest value's scale."""
    values = np.append(np.full(1000, 0.964, np.float32), np.float32(1)) * np.float32(16)
    found = clip(values, Method("mse"))
    assert found == np.float32(16 * FRACTIONS[1])
    assert brute_error(values[-50:], found) < 0.1 * brute_error(values[-50:], 16.0)
    assert clip(values, Method()) == 16


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(data=st.data())
def test_pieces_and_their_order_do_not_matter(method: Method, data: st.DataObject) -> None:
    values = data.draw(arrays())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    own = Range("it", method)
    for piece in reversed(np.split(values, cuts)):
        own.add(piece)
    assert own.count == len(values)
    assert own.clip() == clip(values, method)


def test_large_tensors_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    wanted = [clip(values, method) for method in METHODS]
    monkeypatch.setattr(calibrate_ranges, "PIECE", 16)
    assert [clip(values, method) for method in METHODS] == wanted


def test_memory_is_bounded() -> None:
    own = Range("it", Method("mse"))
    own.add(np.array([0, 1e-45, 1, np.finfo(np.float32).max], np.float32))
    assert own.counts is not None and own.counts.nbytes < 2**20 and own.counts.sum() == 4


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_largest_numbers_of_fp32(method: Method) -> None:
    largest = np.finfo(np.float32).max
    found = clip(np.array([largest, -largest, 1], np.float32), method)
    assert 0 < found <= largest and np.isfinite(found)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-45, LEAST_CLIP / 2])
def test_what_no_scale_can_be_made_of_is_zero(method: Method, value: float) -> None:
    own = Range("it", method)
    assert own.is_zero and own.clip() == 1.0
    own.add(np.full(9, value, np.float32))
    assert own.is_zero and own.clip() == 1.0
    own.add(np.full(100, LEAST_CLIP, np.float32))
    assert own.largest == LEAST_CLIP and own.clip() == LEAST_CLIP


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    with pytest.raises(NotFiniteError, match="'it' gets values that are not finite"):
        clip(np.array([1, value, 2], np.float32), Method())


@pytest.mark.parametrize(
    ("name", "percent", "said"),
    [
        ("amax", 99.9, "amax"),
        ("mse", 99.9, "mse"),
        ("percentile", 99.9, "percentile 99.9"),
        ("percentile", 99, "percentile 99"),
        ("percentile", 99.99999, "percentile 99.99999"),
    ],
)
def test_names(name: MethodName, percent: float, said: str) -> None:
    assert str(Method(name, percent)) == said


@pytest.mark.parametrize("percent", [0, -1, 100.1, np.nan])
def test_percentages_that_are_none(percent: float) -> None:
    with pytest.raises(UnsupportedError, match="percentile"):
        Method("percentile", percent)
