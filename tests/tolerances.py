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
