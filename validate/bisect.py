"""Names the first module that diverges: the one to look at when an engine is wrong."""

from __future__ import annotations

from collections.abc import Sequence as Many

from shuntyard.validate.layers import Walk
from shuntyard.validate.report import Module, Routing


def first_diverging(walks: Many[Walk]) -> tuple[str, str]:
    """The first module out of its bounds and the mode in which it is; empty where none is.

    Teacher-forced errors come first: such a module is wrong by itself. What only the whole engine shows (the
    reference's layers fed the engine's inputs, or both free-running) is wiring, or the cache.
    """
    for mode in ("forced", "inverse", "free"):
        for walk in (w for w in walks if w.mode == mode):
            for comparison in walk.comparisons:
                failed = [module for module in comparison.modules if module.ok is False]
                bad_flips = [flip for flip in comparison.flips if not flip.ok and mode != "free"]
                if failed or bad_flips:
                    return _name(failed, comparison.routing if bad_flips else None), mode
    return "", ""


def _name(failed: list[Module], routing: Routing | None) -> str:
    if failed:
        return failed[0].module
    assert routing is not None  # the choice alone: the logits are within their bounds
    return f"model.layers.{routing.layer}.feed_forward.router"
