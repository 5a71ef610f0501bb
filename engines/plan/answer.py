"""The answer of ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shuntyard.engines.plan import footprint
from shuntyard.engines.plan.budget import MOST, Asked, Budget, Model, Request, budget_of, check_request, read_model
from shuntyard.engines.plan.footprint import StoredBytes
from shuntyard.engines.plan.gpus import GIB
from shuntyard.engines.plan.nearest import Change, largest, nearest

PLAN_BYTES, PLAN_BYTES_PER_LAYER = 6_000_000, 250_000
"""What a plan holds besides weights: 6.3 MB with 4 layers, 10.8 with 24, 15.4 with 48 (TensorRT-RTX 1.7, sm89)."""


@dataclass(frozen=True)
class Reason:
    """What is too large: ``nbytes``, where all else leaves ``room`` for it."""

    term: str
    nbytes: int
    room: int


@dataclass(frozen=True)
class Plan:
    """The answer."""

    model: Model
    asked: Asked
    budget: Budget
    largest_context: int | None  # with this batch; None: not even one token fits
    largest_batch: int | None  # with this context; None: not even one sequence fits
    nearest: tuple[Change, ...]  # least loss first; empty where the engine fits, or nothing helps
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the engine fits."""
        return self.budget.fits

    @property
    def plan_bytes(self) -> int:
        """Size of the engine file of one GPU; who opens it reads it into host memory first."""
        layers = self.model.config.num_hidden_layers
        return sum(self.budget.weights.values()) + PLAN_BYTES + PLAN_BYTES_PER_LAYER * layers

    def reason(self) -> Reason | None:
        """Why it does not fit; None: it does."""
        budget = self.budget
        if budget.fits:
            return None
        beside = budget.usable - budget.fixed
        if beside < 0:
            weights = sum(budget.weights.values())
            return Reason("weights", weights, budget.usable - budget.reserve)
        largest_term = max(
            (budget.cache.global_bytes, "KV cache of global layers"),
            (budget.cache.local_bytes, "KV cache of local layers"),
            (budget.live.nbytes, "activations"),
        )
        rest = budget.needed - budget.fixed
        room = beside - (rest - largest_term[0])
        if room < 0:
            return Reason("KV cache and activations", rest, beside)
        return Reason(largest_term[1], largest_term[0], room)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``. Sizes are in bytes; those of ``per_gpu`` are of one GPU."""
        reason = self.reason()
        return {
            "checkpoint": str(self.model.path),
            "fits": self.fits,
            "asked": _asked_dict(self.asked),
            "parameters": footprint.parameters(self.model.config),
            "stored": _by_component(self.model.stored),
            "held": _by_component(self.model.held(self.asked.weights)),
            "vision": self.model.stored.vision,
            "waived": self.model.stored.waived,
            "per_gpu": _budget_dict(self.budget),
            "plan_bytes": self.plan_bytes,
            "reason": None if reason is None else asdict(reason),
            "largest_context": self.largest_context,
            "largest_batch": self.largest_batch,
            "nearest": [
                {
                    "what": change.what,
                    "loss": change.loss,
                    "asked": _asked_dict(change.asked),
                    "needed": change.budget.needed,
                    "left": change.budget.left,
                }
                for change in self.nearest
            ],
            "notes": list(self.notes),
        }


def _asked_dict(asked: Asked) -> dict[str, Any]:
    return {**asdict(asked), "gpu": asked.gpu.name}


def _by_component(stored: StoredBytes) -> dict[str, dict[str, int]]:
    return {component: stored.of(component) for component in footprint.COMPONENTS if stored.of(component)}


def _budget_dict(budget: Budget) -> dict[str, Any]:
    return {
        "weights": budget.weights,
        "cache": {
            **asdict(budget.cache),
            "local": budget.cache.local_bytes,
            "global": budget.cache.global_bytes,
            "naive": budget.cache.naive,
        },
        "activations": asdict(budget.live),
        "reserve": budget.reserve,
        "needed": budget.needed,
        "usable": budget.usable,
        "left": budget.left,
    }


def plan(path: Path, request: Request) -> Plan:
    """Plans an engine of the checkpoint at ``path``; see :func:`read_model` and :func:`check_request` for errors."""
    return plan_model(read_model(path, request.weights), request)


def plan_model(model: Model, request: Request) -> Plan:
    """As :func:`plan`, for a model that was read."""
    asked = check_request(model, request)
    budget = budget_of(model, asked)

    def fits(**changes: Any) -> bool:
        return budget_of(model, replace(asked, **changes)).fits

    return Plan(
        model=model,
        asked=asked,
        budget=budget,
        largest_context=largest(lambda n: fits(context=n), model.config.max_position_embeddings),
        largest_batch=largest(lambda n: fits(batch=n), MOST),
        nearest=() if budget.fits else tuple(nearest(model, asked)),
        notes=tuple(_notes(model, asked)),
    )


def _notes(model: Model, asked: Asked) -> Iterator[str]:
    if asked.gpus > 1:
        yield f"shuntyard's engines use one GPU today: what stands here for {asked.gpus} is arithmetic"
    if asked.kv == "fp8":
        yield "an FP8 cache is arithmetic: TensorRT's cache update takes no FP8"
    resolved = model.resolved(asked.weights)
    if resolved.recipe.is_a_file:
        yield from resolved.unused
    yield "activations as TensorRT-RTX plans them for sm89; other builders' plans were not seen"
    if model.stored.vision:
        yield f"the vision tower, {model.stored.vision / GIB:.2f} GiB of the files, is no part of the text engine"
