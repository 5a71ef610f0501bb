"""What a mixture-of-experts layer has to read, write and multiply, from its extents alone."""

from __future__ import annotations

from typing import NamedTuple

TOKENS = (1, 8, 64, 512, 4096, 16384)

WEIGHT_BYTES = {"fp8": 1, "bf16": 2}
"""Of one weight; rows are bf16 with either."""

ROW_BYTES, LOGIT_BYTES, SCALE_BYTES = 2, 4, 4


class Model(NamedTuple):
    """The extents of one layer; each token goes to one expert."""

    name: str
    experts: int
    hidden: int = 5120
    width: int = 8192

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.width


MODELS = {model.name: model for model in (Model("scout", 16), Model("maverick", 128))}


class Work(NamedTuple):
    """What cannot be avoided, if every byte moves once."""

    bytes: float
    flops: float

    def floors(self, gigabytes: float, teraflops: float) -> tuple[float, float]:
        """Microseconds at a rate of memory (GB/s, read and written) and of arithmetic (TFLOP/s)."""
        return self.bytes / gigabytes / 1e3, self.flops / teraflops / 1e6


def touched(experts: int, tokens: int) -> float:
    """How many experts get a token, if all are as likely."""
    return experts * (1 - (1 - 1 / experts) ** tokens)


def work_of(model: Model, tokens: int, precision: str, experts: float, shared: bool = False) -> Work:
    """From logits, inputs ``[T, H]`` and the shared expert's outputs to the sum; so many experts have tokens.

    ``shared`` counts a shared expert of the same extents in, too.
    """
    experts += shared
    weights = experts * model.expert_weights * WEIGHT_BYTES[precision]
    if precision == "fp8":
        weights += experts * (2 * model.width + model.hidden) * SCALE_BYTES
    rows = 3 * tokens * model.hidden * ROW_BYTES + tokens * model.experts * LOGIT_BYTES
    return Work(weights + rows, 2.0 * tokens * (1 + shared) * model.expert_weights)


def table(
    models: list[Model], tokens: list[int], gigabytes: float, teraflops: dict[str, float], shared: bool = False
) -> list[str]:
    """Lines of the floors, for uniform routing, with or without a shared expert; of at most 80 columns."""
    given = ", ".join(f"{rate:,.0f} TFLOP/s ({precision})" for precision, rate in teraflops.items())
    lines = [
        f"floors at {gigabytes:,.0f} GB/s and {given},",
        "each token to one expert, all as likely" + (", and to the shared one" if shared else ""),
        f"{'model':10}{'':6}{'tokens':>10}{'experts':>9}{'MB':>9}{'GFLOP':>10}{'memory us':>12}{'math us':>11}",
    ]
    for model in models:
        for precision, rate in teraflops.items():
            for count in tokens:
                experts = touched(model.experts, count)
                work = work_of(model, count, precision, experts, shared)
                memory, math = work.floors(gigabytes, rate)
                head = f"{model.name:10}{precision:6}{count:10,}{experts + shared:9.1f}"
                lines.append(f"{head}{work.bytes / 1e6:9,.0f}{work.flops / 1e9:10,.1f}{memory:12,.1f}{math:11,.1f}")
    return lines
