"""The answer of ``plan`` in rows and lines, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shuntyard.engines.plan.activations import tokens_in_call
from shuntyard.engines.plan.answer import Plan
from shuntyard.engines.plan.budget import MOST
from shuntyard.engines.plan.footprint import COMPONENTS, SCALES, parameters
from shuntyard.engines.plan.gpus import GIB

Rows = Iterator[tuple[str, ...]]

SUMS = ("total", "needed", "there is")
"""First cells of rows that add up others."""


@dataclass(frozen=True)
class Unit:
    """What sizes are told in."""

    name: str
    nbytes: int

    def __call__(self, nbytes: int) -> str:
        """A size in this unit."""
        return f"{nbytes / self.nbytes:,.2f}"


def unit_of(plan: Plan) -> Unit:
    """GiB, or MiB for a model that would be none of them."""
    return Unit("GiB", GIB) if plan.model.held(plan.asked.weights).total >= GIB else Unit("MiB", 2**20)


def heading(plan: Plan) -> str:
    """What was asked, in one line."""
    asked = plan.asked
    many = f"{asked.gpus} x {asked.gpu.name}" if asked.gpus > 1 else asked.gpu.name
    sequences = f"{asked.batch:,} sequences" if asked.batch > 1 else "1 sequence"
    return f"{many}, weights {asked.weights}, KV cache {asked.kv}, {sequences} of {asked.context:,} tokens"


def weight_rows(plan: Plan) -> Rows:
    """The weights of the whole model by component: values, type and size as stored, type and size in the engine."""
    unit, stored, held = unit_of(plan), plan.model.stored, plan.model.held(plan.asked.weights)
    counts = parameters(plan.model.config)
    yield "weights", "values", "as stored", unit.name, "in the engine", unit.name
    for component in COMPONENTS:
        if component in counts:
            before, after = stored.of(component), held.of(component)
            sizes = unit(sum(before.values())), unit(sum(after.values()))
            yield component, _short(counts[component]), _types(before, unit), sizes[0], _types(after, unit), sizes[1]
    yield "total", _short(sum(counts.values())), "", unit(stored.total), "", unit(held.total)


def _short(count: int) -> str:
    """As 96.64 G."""
    for size, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.2f}{name}"
    return str(count)


def _types(by_type: dict[str, int], unit: Unit) -> str:
    names = [name for name in sorted(by_type, key=lambda name: -by_type[name]) if name != SCALES]
    scales = " + scales" if float(unit(by_type.get(SCALES, 0)).replace(",", "")) else ""
    return ", ".join(name.removesuffix("_E4M3") for name in names) + scales


def budget_rows(plan: Plan) -> Rows:
    """What one GPU has to hold: what, how it is counted, its size."""
    asked, budget, unit = plan.asked, plan.budget, unit_of(plan)
    cache, live = budget.cache, budget.live
    yield "on each GPU" if asked.gpus > 1 else "on the GPU", "", unit.name
    shared = f"1/{asked.gpus} of them, but norms and routers whole" if asked.gpus > 1 else ""
    yield "weights", shared, unit(sum(budget.weights.values()))
    sequences = f"{asked.batch:,} x " if asked.batch > 1 else ""
    for name, layers, rows, nbytes in (
        ("local", cache.local_layers, cache.local_rows, cache.local_bytes),
        ("global", cache.global_layers, cache.global_rows, cache.global_bytes),
    ):
        if layers:
            how = f"{sequences}{layers} layers x {rows:,} rows x {cache.row_bytes:,} bytes"
            yield f"KV cache, {name}", how, unit(nbytes)
    if cache.naive > cache.local_bytes + cache.global_bytes:
        yield "", f"({unit(cache.naive)} {unit.name} if no layer were local)", ""
    tokens = tokens_in_call(plan.model.config, asked.tokens, asked.context)
    yield "activations", f"{sequences}{tokens:,} tokens a call, at their most in the", unit(live.nbytes)
    yield "", f"{live.stage}:", ""
    for term in sorted(live.terms, key=lambda term: -term.nbytes):
        if term.nbytes >= max(live.nbytes // 50, unit.nbytes // 200):
            yield "", f"{unit(term.nbytes):>7}  {term.name}, {term.formula}", ""
    yield "reserve", "CUDA context, kernels, rounding (--reserve)", unit(budget.reserve)
    yield "needed", "", unit(budget.needed)
    yield "there is", asked.gpu.title, unit(budget.usable)


def verdict(plan: Plan) -> str:
    """The answer in one line."""
    unit, left, reason = unit_of(plan), plan.budget.left, plan.reason()
    if reason is None:
        return f"fits, {unit(left)} {unit.name} left"
    why = f"{reason.term} {unit(reason.nbytes)}, room for {unit(reason.room)}"
    return f"does not fit, {unit(-left)} {unit.name} missing: {why}"


def options(plan: Plan) -> Rows:
    """What would fit, the least loss first: the change, what is left then, what it costs."""
    unit = unit_of(plan)
    for change in plan.nearest:
        yield change.what, f"{unit(change.budget.left)} {unit.name} left", change.loss


def remarks(plan: Plan) -> Iterator[str]:
    """What else there is to know."""
    unit = unit_of(plan)
    if plan.fits:
        longest, most = plan.largest_context, plan.largest_batch
        assert longest is not None and most is not None
        whole = ", all that the model knows" if longest == plan.model.config.max_position_embeddings else ""
        yield f"largest context for this batch: {longest:,}{whole}"
        yield f"largest batch for this context: {most:,}{' or more' if most == MOST else ''}"
    elif not plan.nearest:
        yield "no single change is enough, nor one of GPUs, or of types, together"
    gpus = plan.asked.gpus
    files = f"engine files: {gpus} x" if gpus > 1 else "engine file:"
    yield f"{files} {unit(plan.plan_bytes)} {unit.name}; to open one takes as much host memory"
    for note in plan.notes:
        yield f"note: {note}"
