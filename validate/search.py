"""Finds a recipe of few bytes within a bound on quality: ``shuntyard precision --within "kl<=0.01"``.

1. **Sensitivity**: every matrix alone is made INT4, FP8, and FP8 with FP8 activations, the rest staying bf16.
2. **Order**: each step down of a module costs KL and saves bytes; taken by least KL for each byte, the steps make a row
   of ever smaller recipes (of each module only steps on its lower convex hull: the others are never worth it).
3. **Bisection** along the row, each recipe measured as a whole, for losses do not simply add.
4. **Moves** from the best recipe that is within the bound, the shipped ones included: one module lower; one higher and
   another lower. Predicted by the sensitivities, kept if the measurement says so.

Steps are ordered by KL whatever the bound is on: a single module's perplexity is lost in the noise of a text. The bound
itself is always measured. Everything is deterministic: there are no draws, and the end is a number of runs, not a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shuntyard.errors import EngineError, UnsupportedError
from shuntyard.exporter.modules import Module
from shuntyard.exporter.recipe import SHIPPED, Precision, read_recipe, resolve
from shuntyard.validate.charts import three
from shuntyard.validate.emulate import Emulation, Preparer
from shuntyard.validate.matrices import Numbers
from shuntyard.validate.values import Tokens
from shuntyard.validate.walk import Outcome, Walker
from shuntyard.validate.within import Bound
from shuntyard.validate.worth import BASELINE, GROUP_SIZES, check_finite_outcome, check_windows, stored_or_new

Choice = tuple[tuple[str, Precision], ...]
"""The precision of every module, in the model's order: a recipe without its rules."""

MOST_MOVES = 96
"""Recipes that are measured as moves, at most."""

AT_ONCE = 4
"""Moves that are measured together, of which the best counts."""

SHARES = (1.0, 0.9, 1.1, 0.8)
"""Of the bound: how far down moves go by prediction, in the order in which they are tried."""

Options = Mapping[str, Sequence[Precision]]
"""What each module is tried as."""


@dataclass(frozen=True)
class Sensitivity:
    """One module alone in a precision, all others bf16."""

    module: str
    precision: Precision
    saved: int  # bytes
    kl: float
    perplexity_change: float
    top1: float


@dataclass(frozen=True)
class Trial:
    """A recipe that was measured as a whole."""

    name: str  # a shipped one's, else empty
    choice: Choice
    bytes: int
    outcome: Outcome
    value: float  # of the bound's metric
    within: bool


@dataclass
class Found:
    """What the search found, and all that it saw on the way."""

    bound: Bound
    best: Trial
    baseline: Trial
    sensitivities: list[Sensitivity]
    trials: list[Trial]
    tokens: int
    windows: int
    passes: float  # forward passes over all windows that it took
    notes: list[str] = field(default_factory=list)
    doubt: str = ""  # where the text is too short for the bound

    def kept(self) -> str:
        """What the best recipe keeps, for people: the bound's metric, and KL beside any other."""
        shown = self.bound.shown(self.best.value)
        return shown if self.bound.metric == "kl" else f"{shown}, KL {three(self.best.outcome.mean_kl)}"

    def shipped(self) -> list[Trial]:
        """The shipped recipes as they were measured."""
        return [trial for trial in self.trials if trial.name]


def search(
    numbers: Numbers,
    bound: Bound,
    windows: Sequence[Tokens],
    *,
    moves: int = MOST_MOVES,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The recipe of the fewest bytes within the bound that was found, measured.

    Args:
        numbers: the checkpoint.
        bound: what it is held to.
        windows: tokens to measure on.
        moves: recipes that are measured as moves, at most.
        report: hears what it will cost, and what was found.
        progress: hears how many layers of how many were run.

    Raises:
        EngineError: the windows are too short, or a module computes NaN or infinity.
        CheckpointError: the checkpoint is broken.
    """
    check_windows(windows)
    return _Search(numbers, bound, windows, moves, report, progress).run()


class _Search:
    def __init__(
        self,
        numbers: Numbers,
        bound: Bound,
        windows: Sequence[Tokens],
        moves: int,
        report: Callable[[str], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self.numbers, self.bound, self.moves, self.report = numbers, bound, moves, report
        self.windows = windows
        self.preparer = Preparer(numbers)
        self.walker = Walker(numbers.config, windows, progress)
        self.modules = self.preparer.modules
        self.base = resolve(read_recipe(BASELINE), numbers.config).precision
        self.tried: dict[Choice, Trial] = {}
        self.alone: dict[tuple[str, Precision], float] = {}  # KL
        self.notes: list[str] = []

    def run(self) -> Found:
        shipped = self._shipped()
        options = {name: candidates(module, self.numbers) for name, module in self.modules.items()}
        single = [(name, own) for name, precisions in options.items() for own in precisions]
        plans = [self.base, *(self.base | {name: own} for name, own in single), *shipped.values()]
        self._announce(plans, len(single))
        outcomes = self._measured(plans)
        self.reference = outcomes[0]
        baseline = self._trial(BASELINE, self.base, outcomes[0])
        sensitivities = [
            self._sensitivity(name, own, outcome)
            for (name, own), outcome in zip(single, outcomes[1 : 1 + len(single)], strict=True)
        ]
        self.alone = {(s.module, s.precision): s.kl for s in sensitivities}
        for (name, plan), outcome in zip(shipped.items(), outcomes[1 + len(single) :], strict=True):
            self._trial(name, plan, outcome)
        for (name, own), outcome in zip(single, outcomes[1:], strict=False):
            self._trial("", self.base | {name: own}, outcome)
        self._bisect(options)
        best = self._improved(options)
        passes = self.walker.layers_run / self.numbers.config.num_hidden_layers
        tokens = sum(len(window) for window in self.windows)
        trials, windows = list(self.tried.values()), len(self.windows)
        found = Found(self.bound, best, baseline, sensitivities, trials, tokens, windows, passes, self.notes)
        found.doubt = self.bound.doubt(best.outcome, self.reference)
        if found.doubt:
            self.report(f"warning: {found.doubt}")
        self.report(
            f"found: {found.kept()} at {best.bytes:,} bytes, bf16 has {baseline.bytes:,} "
            f"({best.bytes / baseline.bytes:.1%}); {passes:.0f} forward passes"
        )
        return found

    def _shipped(self) -> dict[str, dict[str, Precision]]:
        """The shipped recipes that this model can have, but bf16."""
        found = {}
        for name in SHIPPED:
            try:
                resolved = resolve(read_recipe(name), self.numbers.config)
            except UnsupportedError as error:
                self.notes.append(f"recipe {name} is left out: {error.message}")
                continue
            same = [
                m.name for m in self.modules.values() if stored_as_int4(self.numbers, m, resolved.precision[m.name])
            ]
            if same:
                self.notes.append(f"recipe {name} is left out: '{same[0]}' is stored in INT4 of these groups already")
            elif name != BASELINE:
                found[name] = resolved.precision
        return found

    def _announce(self, plans: Sequence[Mapping[str, Precision]], single: int) -> None:
        layers = self.numbers.config.num_hidden_layers
        first = self.walker.cost([self._emulation(plan) for plan in plans]) / layers
        steps = math.ceil(math.log2(single + 2)) + 1
        self.report(
            f"{single} precisions of single modules and {len(plans) - single - 1} shipped recipes: {first:.0f} forward "
            f"passes over {sum(len(window) for window in self.windows):,} tokens; then at most "
            f"{2 * (steps + self.moves)} to look for the best recipe"  # each time bf16 too
        )

    def _emulation(self, plan: Mapping[str, Precision]) -> Emulation:
        return Emulation(self.preparer, plan)

    def _measured(self, plans: Sequence[Mapping[str, Precision]]) -> list[Outcome]:
        """Of each; the baseline is the first."""
        outcomes = self.walker.run([self._emulation(plan) for plan in plans])
        check_finite_outcome("bf16", outcomes[0])
        return outcomes

    def _sensitivity(self, name: str, own: Precision, outcome: Outcome) -> Sensitivity:
        check_finite_outcome(f"{name} as {own}", outcome)
        module = self.modules[name]
        saved = self._size(module, self.base[name]) - self._size(module, own)
        change = math.expm1(outcome.mean_nll - self.reference.mean_nll)
        return Sensitivity(name, own, saved, outcome.mean_kl, change, outcome.mean_top1)

    def _size(self, module: Module, precision: Precision) -> int:
        return sum(stored_or_new(self.numbers, module, precision))

    def _choice(self, plan: Mapping[str, Precision]) -> Choice:
        return tuple((name, plan[name]) for name in self.modules)

    def _trial(self, name: str, plan: Mapping[str, Precision], outcome: Outcome) -> Trial:
        value = self.bound.value_of(outcome, self.reference)
        choice = self._choice(plan)
        size = sum(self._size(self.modules[module], own) for module, own in choice)
        finite = math.isfinite(outcome.mean_kl) and math.isfinite(outcome.mean_nll)
        trial = Trial(name, choice, size, outcome, value, finite and self.bound.holds(value))
        return self.tried.setdefault(choice, trial)

    def _try(self, plans: Sequence[Mapping[str, Precision]]) -> list[Trial]:
        """Measures those that were not measured before."""
        new = {self._choice(plan): plan for plan in plans if self._choice(plan) not in self.tried}
        if new:
            outcomes = self._measured([self.base, *new.values()])[1:]
            for plan, outcome in zip(new.values(), outcomes, strict=True):
                self._trial("", plan, outcome)
        return [self.tried[self._choice(plan)] for plan in plans]

    def _kl(self, name: str, own: Precision) -> float:
        """Of a module alone; of a precision that was not measured, that of the worst."""
        if own == self.base[name]:
            return 0.0
        known = [kl for (module, _), kl in self.alone.items() if module == name]
        return self.alone.get((name, own), max(known, default=0.0))

    def _steps(self, plan: Mapping[str, Precision], options: Options) -> list[tuple[str, float, Precision]]:
        """Steps down of a plan's modules, the KL of each, by least KL for each byte; those of a module in order."""
        steps = []
        for place, (name, precisions) in enumerate(options.items()):
            module, now = self.modules[name], plan[name]
            points = [(self._size(module, own), self._kl(name, own), own) for own in (now, *precisions)]
            size = self._size(module, now)
            hull = lower_hull([point for point in points if point[0] < size or point[2] == now])
            for number, (above, below) in enumerate(pairwise(hull)):
                steps.append((_slope(above, below), place, number, name, below[1] - above[1], below[2]))
        return [(name, kl, own) for _, _, _, name, kl, own in sorted(steps, key=lambda step: step[:3])]

    def _bisect(self, options: Options) -> None:
        """Measures recipes along the steps from bf16 down, towards the last one that is within the bound."""
        steps = [(name, own) for name, _, own in self._steps(self.base, options)]
        low, high = 0, len(steps) + 1  # within; not within
        middle = len(steps)
        while high - low > 1:
            (trial,) = self._try([self.base | dict(steps[:middle])])
            low, high = (middle, high) if trial.within else (low, middle)
            middle = (low + high) // 2

    def _best(self) -> Trial:
        # There is one: bf16 is within any bound, for it is what all are compared with.
        return min((trial for trial in self.tried.values() if trial.within), key=self._rank)

    def _rank(self, trial: Trial) -> tuple[int, float]:
        return trial.bytes, self.bound.loss(trial.value)

    def _improved(self, options: Options) -> Trial:
        """The best recipe, after moves from it: each round measures the most promising ones, the best one counts."""
        best, left = self._best(), self.moves
        while left > 0:
            found = best
            for plans in self._moves(best, options):
                new = [plan for plan in plans if self._choice(plan) not in self.tried][:left]
                left -= len(new)
                found = min([best, *(trial for trial in self._try(new) if trial.within)], key=self._rank)
                if found is not best or left <= 0:
                    break
            if found is best:
                break
            best = found
        return best

    def _moves(self, best: Trial, options: Options) -> Iterator[list[dict[str, Precision]]]:
        """Recipes of fewer bytes, some at a time: as far down as is predicted, with and without a module raised."""
        plan = dict(best.choice)
        alone = sum(self._kl(name, own) for name, own in best.choice)
        scale = best.outcome.mean_kl / alone if alone > 0 and best.outcome.mean_kl > 0 else 1.0
        limit = self._limit(best)
        raises = self._raises(plan, options)
        for share in SHARES:
            lowered = [self._filled(plan, options, alone, share * limit / scale)]
            for name, kl, own in raises[: AT_ONCE - 1]:
                lowered.append(self._filled(plan | {name: own}, options, alone + kl, share * limit / scale, name))
            yield self._smaller(lowered, best)
        yield self._smaller([plan | {name: own} for name, _, own in self._steps(plan, options)], best)[:AT_ONCE]
        for begin in range(AT_ONCE - 1, len(raises), AT_ONCE):
            some = raises[begin : begin + AT_ONCE]
            yield self._smaller(
                [self._filled(plan | {n: own}, options, alone + kl, limit / scale, n) for n, kl, own in some], best
            )

    def _smaller(self, plans: Sequence[dict[str, Precision]], best: Trial) -> list[dict[str, Precision]]:
        """Those of fewer bytes, or of as many and less KL by the sensitivities, each once."""
        kept: dict[Choice, dict[str, Precision]] = {}
        now = best.bytes, sum(self._kl(name, own) for name, own in best.choice)
        for plan in plans:
            choice = self._choice(plan)
            size = sum(self._size(self.modules[name], own) for name, own in choice)
            if (size, sum(self._kl(name, own) for name, own in choice)) < now:
                kept[choice] = plan
        return list(kept.values())

    def _filled(
        self, plan: Mapping[str, Precision], options: Options, alone: float, limit: float, but: str = ""
    ) -> dict[str, Precision]:
        """The plan, lowered step by step while the sum of its KLs, ``alone`` now, stays below a limit."""
        filled, shut = dict(plan), {but}
        for name, kl, own in self._steps(plan, options):
            if name in shut or alone + kl > limit:
                shut.add(name)
                continue
            filled[name], alone = own, alone + kl
        return filled

    def _raises(self, plan: Mapping[str, Precision], options: Options) -> list[tuple[str, float, Precision]]:
        """Steps up of the modules, and the KL of each, most KL for each byte first."""
        found = []
        for place, (name, precisions) in enumerate(options.items()):
            module, now = self.modules[name], plan[name]
            for own in (self.base[name], *precisions):
                cost, kl = self._size(module, own) - self._size(module, now), self._kl(name, own) - self._kl(name, now)
                if own != now and cost >= 0 and kl < 0:
                    found.append((kl / max(cost, 1), place, name, kl, own))
        return [(name, kl, own) for _, _, name, kl, own in sorted(found, key=lambda move: move[:2])]

    def _limit(self, best: Trial) -> float:
        """The KL that a recipe may have, as far as it can be told from the best one."""
        now = best.outcome.mean_kl
        if self.bound.metric == "kl":
            return self.bound.value
        if self.bound.metric == "top1":  # disagreement goes with the error, KL with its square
            return now * ((1 - self.bound.value) / (1 - best.value)) ** 2 if best.value < 1 else 4 * now
        return now * min(4.0, self.bound.value / abs(best.value)) if best.value else 4 * now


def candidates(module: Module, numbers: Numbers) -> list[Precision]:
    """What a module is tried as: INT4 by the largest group that divides, FP8 with and without FP8 activations."""
    if not module.can_be_quantised:
        return []
    found = [Precision("fp8", "channel", "fp8-dynamic"), Precision("fp8", "channel")]
    fitting = [size for size in GROUP_SIZES if all(into % size == 0 for _, into in module.shapes)]
    if fitting:
        int4 = Precision("int4", "group", "none", fitting[0])
        found = found if stored_as_int4(numbers, module, int4) else [int4, *found]
    return found


def stored_as_int4(numbers: Numbers, module: Module, precision: Precision) -> bool:
    """Whether a module is to become INT4 of the groups that it is stored in: an export does not write that anew."""
    if precision.weights != "int4" or not module.can_be_quantised:
        return False
    return any(part.group_size == precision.group_size for part in numbers.stored(module))


def lower_hull(points: Sequence[tuple[int, float, Precision]]) -> list[tuple[int, float, Precision]]:
    """Of points of bytes and loss, the lower convex hull from the most bytes to the fewest: where each next step costs
    more for a byte than the one before. Steps that cost nothing, or less, are among them."""
    hull: list[tuple[int, float, Precision]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if hull and point[0] == hull[-1][0]:
            continue  # as many bytes, and no less loss
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(above: tuple[int, float, Precision], below: tuple[int, float, Precision]) -> float:
    return (below[1] - above[1]) / (above[0] - below[0])


def check_found(found: Found, precision: Mapping[str, Precision]) -> None:
    """Holds a recipe that was written to what was measured.

    Raises:
        EngineError: they differ; names the module.
    """
    for name, own in found.best.choice:
        if precision[name] != own:
            raise EngineError(
                f"the recipe makes '{name}' {precision[name]}, measured was {own}", hint="please report this"
            )
