"""The tolerances of the tests, by the number format that is computed in, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """``relative`` is to the largest magnitude of the expected array: sums cancel, single elements say little."""

    relative: float
    reason: str

    def check(self, got: NDArray[Any], expected: NDArray[Any]) -> None:
        """Fails where ``got`` differs in type, shape, or by more than is tolerated."""
        assert got.dtype == expected.dtype and got.shape == expected.shape, (got.dtype, expected.dtype, got.shape)
        if expected.size == 0:
            return
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        assert np.isfinite(got).all()
        bound = self.relative * max(1.0, float(np.abs(expected).max()))
        worst = float(np.abs(got - expected).max())
        assert worst <= bound, f"off by {worst:.3g}, tolerated {bound:.3g}: {self.reason}"


ONE_OP = {
    "fp32": Tolerance(2e-6, "2**-24 a rounding, sums of at most 100 products in another order"),
    "fp16": Tolerance(4e-3, "2**-11 a rounding, at most four roundings on the way, one of which may be of a sum"),
    "bf16": Tolerance(3e-2, "2**-8 a rounding, as fp16"),
}
"""Faces of one op against its oracle."""

MODEL_MAX_ABS = 1e-4
"""fp32 model against fp32 transformers, largest difference of any logit: correct ones are within 1e-5, since only the
order of summation differs; the mildest of the known mistakes is off by more than 100 times as much."""

MISTAKE_MIN_ABS = 100 * MODEL_MAX_ABS
"""Every planted mistake must be off by more."""

ROUTER_MARGIN = 1e-4
"""Two correct fp32 implementations may disagree about the chosen experts where the last chosen and the first rejected
logit are closer than this: such inputs have no single right answer, so tests leave them out, by measuring."""


@dataclass(frozen=True)
class Sums:
    """How far sums of products may be off.

    ``unit`` is an addition's error by the sum of all terms' magnitudes. ``code_unit`` is what a step of a sum of e4m3
    products cuts off, by the largest magnitude in it; None where such sums are fp32, too. They are added to sums in
    fp32 after every ``promoted_every`` terms.
    """

    unit: float
    code_unit: float | None
    promoted_every: int
    reason: str


FP32_SUMS = Sums(2.0**-24, None, 128, "fp32 in any order: each addition is off by half a unit in the last place")

TENSOR_CORE_SUMS = Sums(
    2.0**-22,
    2.0**-13,
    128,
    "tensor cores cut off where fp32 would round, and line up their terms first: four times fp32's half unit; of e4m3 "
    "products Hopper keeps about 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: 13 behind the first)",
)
