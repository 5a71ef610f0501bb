"""The smallest changes that make an engine fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from shuntyard.engines.plan import footprint
from shuntyard.engines.plan.budget import Asked, Budget, Model, budget_of, lacks_fp8
from shuntyard.engines.plan.gpus import GPUS
from shuntyard.errors import UnsupportedError
from shuntyard.exporter.recipe import SHIPPED


@dataclass(frozen=True)
class Change:
    """One thing, or two, done otherwise, so that the engine fits. ``loss`` is what that costs."""

    what: str
    loss: str
    asked: Asked
    budget: Budget


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number in 1..most that fits, if each smaller one does too; None: 1 does not."""
    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def nearest(model: Model, asked: Asked) -> Iterator[Change]:
    """The smallest change along each single axis that fits, the least loss first; else two changes at once."""
    axes = (_fewer_tokens, _larger_gpu, _more_gpus, _smaller_batch, _narrower_cache, _narrower_weights, _less_context)
    found = [change for axis in axes for change in axis(model, asked)]
    yield from found
    if not found:
        yield from _two_changes(model, asked)


def _change(model: Model, asked: Asked, what: str, loss: str, **changes: Any) -> Iterator[Change]:
    """The change, if it fits."""
    changed = replace(asked, **changes)
    budget = budget_of(model, changed)
    if budget.fits and not lacks_fp8(model, changed):
        yield Change(what, loss, changed, budget)


def _numbers(model: Model, asked: Asked, key: str, what: str, loss: str) -> Iterator[Change]:
    """The largest smaller number."""
    now: int = getattr(asked, key)

    def fits(number: int) -> bool:
        changes: dict[str, Any] = {key: number}
        return budget_of(model, replace(asked, **changes)).fits

    most = largest(fits, now - 1)
    if most is not None and most < now:
        yield from _change(model, asked, what.format(most), loss, **{key: most})


def _fewer_tokens(model: Model, asked: Asked) -> Iterator[Change]:
    yield from _numbers(model, asked, "tokens", "--tokens {}", "prompts go in smaller pieces")


def _smaller_batch(model: Model, asked: Asked) -> Iterator[Change]:
    yield from _numbers(model, asked, "batch", "--batch {}", "fewer sequences at once")


def _less_context(model: Model, asked: Asked) -> Iterator[Change]:
    yield from _numbers(model, asked, "context", "--context {}", "shorter texts")


def _larger_gpu(model: Model, asked: Asked) -> Iterator[Change]:
    for gpu in GPUS.values():
        if gpu.usable > asked.gpu.usable:
            changes = list(_change(model, asked, f"--gpu {gpu.name}", gpu.title, gpu=gpu))
            if changes:
                yield changes[0]
                return


def _more_gpus(model: Model, asked: Asked) -> Iterator[Change]:
    for count in footprint.possible_gpus(model.config):
        if count > asked.gpus:
            changes = list(_change(model, asked, f"--gpus {count}", "engines use one GPU today", gpus=count))
            if changes:
                yield changes[0]
                return


def _narrower_cache(model: Model, asked: Asked) -> Iterator[Change]:
    if asked.kv != "fp8":
        yield from _change(model, asked, "--kv fp8", "TensorRT's cache update takes no FP8", kv="fp8")


def _narrower_weights(model: Model, asked: Asked) -> Iterator[Change]:
    # With another recipe goes the cache that the first one asked for.
    is_of_recipe = asked.kv == "fp8" and "fp8" in model.resolved(asked.weights).kv_cache.values()
    for recipe in _narrower(model, asked):
        what = f"--weights {recipe}{' --kv fp8' if is_of_recipe else ''}"
        changes = list(_change(model, asked, what, _loss(model, recipe), weights=recipe))
        if changes:
            yield changes[0]
            return


def _loss(model: Model, recipe: str) -> str:
    return model.resolved(recipe).recipe.description


def _narrower(model: Model, asked: Asked) -> Iterator[str]:
    """Shipped recipes that take less than what is asked for, the least loss first."""
    now = model.held(asked.weights).total
    for name in SHIPPED:
        try:
            smaller = model.held(name).total < now
        except UnsupportedError:
            continue  # this recipe does not go with this model
        if smaller:
            yield name


def _two_changes(model: Model, asked: Asked) -> Iterator[Change]:
    """Other machines, the least memory first; and a narrower cache with narrower weights."""
    machines = [
        (count * gpu.usable, count, gpu)
        for gpu in GPUS.values()
        for count in footprint.possible_gpus(model.config)
        if gpu.usable > asked.gpu.usable and count > asked.gpus
    ]
    for _, count, gpu in sorted(machines, key=lambda machine: machine[:2]):
        what = f"--gpu {gpu.name} --gpus {count}"
        changes = list(_change(model, asked, what, "engines use one GPU today", gpu=gpu, gpus=count))
        if changes:
            yield changes[0]
            break
    if asked.kv != "fp8":
        for recipe in _narrower(model, asked):
            what = f"--kv fp8 --weights {recipe}"
            changes = list(_change(model, asked, what, _loss(model, recipe), weights=recipe, kv="fp8"))
            if changes:
                yield changes[0]
                return
