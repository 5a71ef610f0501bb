"""What recipes are worth: bytes against what they change, measured by emulating them (``precision --measure``).

The baseline is the shipped recipe ``bf16``. All are computed in fp32, the baseline too, so that what differs is what
the recipes say; an engine adds the roundings of its compute type, to all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shuntyard.errors import EngineError
from shuntyard.exporter.calibration import Calibration
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import Module, modules
from shuntyard.exporter.recipe import STORED, Precision, Recipe, Resolved, nbytes, parse_recipe, read_recipe, resolve
from shuntyard.validate import statistics
from shuntyard.validate.emulate import Preparer, emulation_of
from shuntyard.validate.matrices import Numbers
from shuntyard.validate.values import Tokens
from shuntyard.validate.walk import Outcome, Walker

BASELINE = "bf16"

GROUP_SIZES = (128, 64, 32, 16, 8)

NOTES = (
    "all are computed in fp32, bf16 too: what differs is what the recipes say",
    "bytes are those of matrices and their scales; norms and the KV cache are not counted",
)


@dataclass(frozen=True)
class Worth:
    """One recipe on one checkpoint and text, against bf16.

    Shares are of tokens, KL is by token in nats; ``kl_low`` and ``kl_high`` bound it at 95 %, over windows, and are
    None for too few. ``router``: share of tokens whose experts are the same, over all MoE layers, each layer fed by
    the recipe's own; None without such layers.
    """

    recipe: str
    description: str
    weight_bytes: int
    scale_bytes: int
    tokens: int
    perplexity: float
    perplexity_change: float  # relative to bf16's
    kl: float
    kl_low: float | None
    kl_high: float | None
    top1: float
    router: float | None
    router_worst: float | None
    router_worst_layer: int | None

    @property
    def bytes(self) -> int:
        """Of weights and scales."""
        return self.weight_bytes + self.scale_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all fields, and ``bytes``."""
        return {**asdict(self), "bytes": self.bytes}


def stored_or_new(numbers: Numbers, module: Module, precision: Precision) -> tuple[int, int]:
    """Bytes of a module's weights and scales under a precision; those of the files where it stays as it is stored."""
    if module.is_fixed or precision.weights == STORED:
        return numbers.nbytes(module)
    return nbytes(module, precision)


def recipe_bytes(numbers: Numbers, resolved: Resolved) -> tuple[int, int]:
    """Bytes of all weights and of all scales under a recipe."""
    found = [stored_or_new(numbers, module, resolved.precision[module.name]) for module in resolved.modules]
    return sum(weights for weights, _ in found), sum(scales for _, scales in found)


def measure(
    checkpoint: Path,
    recipes: Sequence[Resolved],
    windows: Sequence[Tokens],
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Worth]:
    """Bytes and quality of each recipe on windows of tokens; bf16 first, whether it is among them or not.

    Raises:
        EngineError: the windows are too short, or a recipe computes NaN or infinity.
        CheckpointError: the checkpoint is broken, or the calibration another's.
        UnsupportedError: something in it is not understood, or a recipe needs a scale that is nowhere.
    """
    check_windows(windows)
    numbers = Numbers(checkpoint)
    if calibration is not None:
        calibration.check(numbers.checkpoint)
    baseline = resolve(read_recipe(BASELINE), numbers.config)
    same = BASELINE, baseline.recipe.sha256  # one of another name has its own row, be it equal
    every = [baseline, *(own for own in recipes if (own.recipe.name, own.recipe.sha256) != same)]
    emulations = []
    kept = Preparer(numbers, "fp32", calibration)
    for own in every:
        kept.where = own.recipe.where
        emulations.append(emulation_of(kept, own))
    outcomes = Walker(numbers.config, windows, progress).run(emulations)
    return [
        worth_of(own, recipe_bytes(numbers, own), outcome, outcomes[0])
        for own, outcome in zip(every, outcomes, strict=True)
    ]


def check_windows(windows: Sequence[Tokens]) -> None:
    """Refuses what says nothing.

    Raises:
        EngineError: there are no windows, or one has no next token.
    """
    if not windows or min(len(window) for window in windows) < 2:
        raise EngineError("there is nothing to measure on", hint="give a longer --text, or a larger --length")


def worth_of(resolved: Resolved, size: tuple[int, int], outcome: Outcome, baseline: Outcome) -> Worth:
    """A recipe's measured worth, given its bytes of weights and scales.

    Raises:
        EngineError: what it computes is not finite.
    """
    check_finite_outcome(resolved.recipe.where, outcome)
    interval = statistics.interval(outcome.kl, outcome.tokens.astype(np.float64))
    layer = min(outcome.router, key=lambda i: (outcome.router[i], i)) if outcome.router else None
    return Worth(
        recipe=resolved.recipe.name,
        description=resolved.recipe.description,
        weight_bytes=size[0],
        scale_bytes=size[1],
        tokens=int(outcome.tokens.sum()),
        perplexity=outcome.perplexity,
        perplexity_change=math.expm1(outcome.mean_nll - baseline.mean_nll),
        kl=outcome.mean_kl,
        kl_low=None if math.isnan(interval.low) else interval.low,
        kl_high=None if math.isnan(interval.high) else interval.high,
        top1=outcome.mean_top1,
        router=sum(outcome.router.values()) / len(outcome.router) if outcome.router else None,
        router_worst=None if layer is None else outcome.router[layer],
        router_worst_layer=layer,
    )


def check_finite_outcome(where: str, outcome: Outcome) -> None:
    """Refuses NaN and infinity.

    Raises:
        EngineError: there is one.
    """
    if not (math.isfinite(outcome.mean_kl) and math.isfinite(outcome.mean_nll)):
        raise EngineError(
            f"{where}: its logits are not finite", hint="a module overflows in the type that the recipe gives it"
        )


def group_size_recipes(config: Llama4Config) -> list[Recipe]:
    """``int4-experts`` at all of ``GROUP_SIZES`` that divide the experts' inputs: the curve over group size."""
    inputs = [into for module in modules(config) if module.kind == "experts" for _, into in module.shapes]
    return [_int4_experts(size) for size in GROUP_SIZES if inputs and all(into % size == 0 for into in inputs)]


def _int4_experts(size: int) -> Recipe:
    name = f"int4-experts-{size}"
    text = (
        f'description = "routed experts in INT4 by groups of {size}; all else bf16"\n'
        '[[rule]]\nmodules = "model.layers.*.feed_forward.experts"\nweights = "int4"\n'
        f'group_size = {size}\n[[rule]]\nmodules = "*"\nweights = "bf16"\n'
    )
    return parse_recipe(text.encode(), name, name)
