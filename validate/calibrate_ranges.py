"""The range of many values, in bounded memory: their largest magnitude, and how often each magnitude occurs.

Magnitudes are counted in bins that do not depend on what comes: of all fp32 numbers, those with the same exponent and
the same first 9 bits of the mantissa share a bin, which is 1/512 wide, relatively, at most (1 MiB of counts in all).
So one pass suffices, counts are whole numbers, and the order of what comes does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.errors import NotFiniteError, UnsupportedError
from shuntyard.exporter.calibration import LEAST_CLIP
from shuntyard.plugins.contract import LARGEST_CODE

MethodName = Literal["amax", "percentile", "mse"]

MANTISSA_BITS = 9
_SHIFT = 23 - MANTISSA_BITS
_BINS = 255 << MANTISSA_BITS

STEPS = 80
FRACTIONS = tuple(2.0 ** (-i / 16) for i in range(STEPS + 1))
"""Of the largest magnitude: the clips that ``mse`` tries, down to 1/32. The first of the best is taken."""

HINT_VALUES = "a weight is not finite, or far too large: shuntyard export --check-values finds the first that is not"

PIECE = 2**20
"""Values that are looked at at once."""


@dataclass(frozen=True)
class Method:
    """How a clip is chosen.

    ``amax``: the largest magnitude. ``percentile``: the least magnitude that so many percent of all values do not
    exceed, to the upper end of its bin; the largest where that is 0. ``mse``: of ``FRACTIONS`` of the largest, the one
    with the least squared error of e4m3 numbers with the scale ``clip / 448``, each value taken for its bin's middle.

    Raises:
        UnsupportedError: the percentage is none.
    """

    name: MethodName = "amax"
    percentile: float = 99.9  # of ``percentile`` alone

    def __post_init__(self) -> None:
        if self.name == "percentile" and not 0 < self.percentile <= 100:
            raise UnsupportedError(f"a percentile of {self.percentile}", hint="above 0 and at most 100, as 99.9")

    def __str__(self) -> str:
        return f"percentile {self.percentile:.15g}" if self.name == "percentile" else self.name


class Range:
    """What was seen of one tensor's values."""

    def __init__(self, name: str, method: Method) -> None:
        self.name, self._method = name, method
        self.largest = np.float32(0)
        self.count = 0
        self.counts: NDArray[np.int64] | None = None  # [bins], where the method needs them

    def add(self, values: NDArray[Any]) -> None:
        """More values, float32 of any shape.

        Raises:
            NotFiniteError: one is NaN or infinite.
        """
        flat = values.reshape(-1)
        for begin in range(0, len(flat), PIECE):
            self._add(np.abs(flat[begin : begin + PIECE], dtype=np.float32))

    def _add(self, magnitudes: NDArray[np.float32]) -> None:
        largest = magnitudes.max()
        if not np.isfinite(largest):
            raise NotFiniteError(
                f"the reference: '{self.name}' gets values that are not finite",
                hint=HINT_VALUES,
            )
        self.largest, self.count = max(self.largest, largest), self.count + len(magnitudes)
        if self._method.name == "amax":
            return
        if self.counts is None:
            self.counts = np.zeros(_BINS, np.int64)
        bins = magnitudes.view(np.int32) >> _SHIFT
        first = int(bins.min())
        found = np.bincount(bins - first)
        self.counts[first : first + len(found)] += found

    @property
    def is_zero(self) -> bool:
        """Whether nothing came, or nothing that a scale in fp32 could be made of."""
        return bool(self.largest < LEAST_CLIP)

    def clip(self) -> float:
        """A positive number of fp32; 1 where the range is zero."""
        if self.is_zero:
            return 1.0
        if self._method.name == "amax":
            return float(self.largest)
        clip = self._percentile() if self._method.name == "percentile" else self._least_error()
        return float(clip if clip >= LEAST_CLIP else self.largest)

    def _percentile(self) -> np.float32:
        assert self.counts is not None
        # Exactly: 99.9 % of 1000 values are 999 of them, whatever 99.9 is in binary.
        wanted = math.ceil(Fraction(repr(self._method.percentile)) * self.count / 100)
        place = int(np.searchsorted(np.cumsum(self.counts), wanted))
        if place == 0:
            return np.float32(0)
        return min(_edges(np.array([place + 1]))[0], self.largest)

    def _least_error(self) -> np.float32:
        assert self.counts is not None
        places = np.flatnonzero(self.counts)
        places = places[places > 0]  # the first bin is zero, and what is next to it
        weights = self.counts[places].astype(np.float64)
        values = np.minimum((_edges(places).astype(np.float64) + _edges(places + 1)) / 2, self.largest)
        clips = [np.float32(fraction * float(self.largest)) for fraction in FRACTIONS]
        clips = [clip for clip in clips if clip >= LEAST_CLIP]
        return clips[int(np.argmin([squared_error(values, clip, weights) for clip in clips]))]


def _edges(places: NDArray[Any]) -> NDArray[np.float32]:
    """The least number of each bin; of the bin behind the last, infinity, which is taken for the largest number."""
    edges: NDArray[np.float32] = (places.astype(np.int32) << _SHIFT).view(np.float32)
    return np.minimum(edges, np.finfo(np.float32).max)


def squared_error(values: NDArray[Any], clip: np.float32, weights: NDArray[np.float64] | None = None) -> float:
    """Of e4m3 numbers with the scale ``clip / 448``, summed over all values; each counts ``weights`` times."""
    scale = np.float32(clip) / np.float32(LARGEST_CODE)
    codes = np.clip(values / scale, -LARGEST_CODE, LARGEST_CODE).astype(ml_dtypes.float8_e4m3fn)
    errors = values.astype(np.float64) - codes.astype(np.float64) * float(scale)
    squares = errors**2 if weights is None else errors**2 * weights
    return float(squares.sum())
