"""Walks two models layer by layer: each layer fed the reference's input, its own predecessor's, or the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shuntyard.exporter.config import Llama4Config
from shuntyard.validate.bounds import Bounds, excess
from shuntyard.validate.modules import LayerComparison, compare_layer, compare_module, ties
from shuntyard.validate.record import Recording
from shuntyard.validate.report import Module
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Sequence
from shuntyard.validate.whole import WholeRun

Mode = Literal["forced", "inverse", "free"]
Masks = list[NDArray[np.bool_]]


@dataclass
class Walk:
    """What one look at all layers found, in the order of computation."""

    mode: Mode
    comparisons: list[LayerComparison] = field(default_factory=list)

    @property
    def modules(self) -> list[Module]:
        """Of all layers."""
        return [module for comparison in self.comparisons for module in comparison.modules]

    def add(self, comparison: LayerComparison) -> None:
        """The next layer's."""
        self.comparisons.append(comparison)

    def errors(self) -> NDArray[np.float64]:
        """Root mean square over all modules of the relative error, by sequence."""
        squares = np.array([errors for c in self.comparisons for errors in c.errors])
        counts = np.maximum(1, (~np.isnan(squares)).sum(0))
        out: NDArray[np.float64] = np.sqrt(np.nansum(squares, axis=0) / counts)
        return out

    def misses(self, sequences: int) -> NDArray[np.float64]:
        """Share of token-layer pairs with other experts, by sequence."""
        found = [c.misses for c in self.comparisons if c.misses is not None]
        return np.mean(found, axis=0) if found else np.zeros(sequences)


def before_ties(reference: Recording, config: Llama4Config, bounds: Bounds) -> list[Masks]:
    """For each layer, and last for the head, which tokens of each sequence no near tie up to there can have changed.

    A tie changes the token itself and, by attention, those after it.
    """
    open_so_far = [np.ones(len(s.tokens), bool) for s in reference.sequences]
    out: list[Masks] = []
    for i in range(config.num_hidden_layers):
        if config.is_moe(i):
            margin = bounds.margin(f"model.layers.{i}.feed_forward.router")
            for row, values in enumerate(reference.layer(i)):
                assert values.router is not None
                near = ties(np.asarray(values.router), config.num_experts_per_tok, margin)
                if near.any():
                    open_so_far[row] = open_so_far[row].copy()
                    open_so_far[row][int(near.argmax()) :] = False
        out.append(list(open_so_far))
    return [*out, list(open_so_far)]


def _ends(
    name: str,
    layer: int,
    mode: Mode,
    bounds: Bounds,
    sequences: Many[Sequence],
    expected: Many[Array],
    actual: Many[Array],
    slack: Many[Array] | None = None,
) -> LayerComparison:
    """The embedding or the head, which are one module each."""
    part = name.split(".")[-1]
    module, errors = compare_module(name, layer, part, mode, bounds, sequences, expected, actual, None, slack)
    return LayerComparison([module], errors=[errors])


def walk_stack(
    stack: Stack,
    reference: Recording,
    bounds: Bounds,
    *,
    free: bool,
    masks: list[Masks],
    on_logits: Callable[[int, Array], None] | None = None,
    progress: Callable[[int], None] = lambda layer: None,
) -> list[Walk]:
    """A stack's layers fed the reference's inputs and, with ``free``, their own too: each layer is loaded once.

    ``on_logits`` gets the free-running logits ``[S, V]`` of each sequence, unless a layer before is not finite.
    """
    c, sequences, n = stack.config, reference.sequences, len(reference.sequences)
    forced, running = Walk("forced"), Walk("free")
    own = list(stack.embed([s.tokens for s in sequences]))
    first = _ends("model.embed_tokens", -1, "forced", bounds, sequences, reference.embedding(), own)
    forced.add(first)
    for i in range(c.num_hidden_layers):
        progress(i)
        if free and not all(np.isfinite(hidden).all() for hidden in own):
            free = False  # nothing that follows could be told from what is broken before it
        inputs = [*reference.hidden_before(i), *(own if free else ())]
        expected, found = reference.layer(i), list(stack.layer(i, inputs))
        top_k = c.num_experts_per_tok
        forced.add(compare_layer(i, top_k, "forced", bounds, sequences, expected, found[:n]))
        if free:
            running.add(compare_layer(i, top_k, "free", bounds, sequences, expected, found[n:], masks[i]))
            own = [values.hidden for values in found[n:]]
    last = c.num_hidden_layers
    heads = stack.head([*reference.hidden_before(last), *(own if free else ())])
    forced.add(_head(last, "forced", bounds, sequences, reference.logits(), heads, reference.logits_slack()))
    if free and on_logits is not None:
        for row, logits in enumerate(heads):
            on_logits(row, logits)
    return [forced, running] if running.comparisons else [forced]


def _head(
    layer: int,
    mode: Mode,
    bounds: Bounds,
    sequences: Many[Sequence],
    expected: Iterable[Array],
    actual: Iterator[Array],
    slack: Iterable[Array] | None,
) -> LayerComparison:
    """The head, one sequence's logits at a time, for they are the largest values; the worst stands for all."""
    more = [None] * len(sequences) if slack is None else [[own] for own in slack]
    found = [
        _ends("lm_head", layer, mode, bounds, [sequence], [theirs], [next(actual)], own)
        for sequence, theirs, own in zip(sequences, expected, more, strict=True)
    ]
    modules = [comparison.modules[0] for comparison in found]
    worst = max(modules, key=excess)
    merged = replace(worst, tokens=sum(m.tokens for m in modules))
    if slack is None:  # else bounds are a token's own, and not another's
        largest = max(m.relative for m in modules), max(m.coordinate for m in modules)
        merged = replace(merged, relative=largest[0], coordinate=largest[1])
    return LayerComparison([merged], errors=[np.concatenate([c.errors[0] for c in found])])


def walk_whole(runs: Many[WholeRun], reference: Recording, bounds: Bounds, c: Llama4Config, masks: list[Masks]) -> Walk:
    """A marked engine's own values against the reference's, both free-running; rows of ``reference`` by sequence."""
    walk = Walk("free")
    places = [run.row for run in runs]
    sequences = [run.sequence for run in runs]
    for i in range(c.num_hidden_layers):
        expected = reference.layer(i)
        walk.add(
            compare_layer(
                i,
                c.num_experts_per_tok,
                "free",
                bounds,
                sequences,
                [expected[p] for p in places],
                [run.layer(i) for run in runs],
                [masks[i][p] for p in places],
            )
        )
    return walk


def walk_inverse(runs: Many[WholeRun], reference: Stack, bounds: Bounds) -> Walk:
    """The reference's layers fed what a marked engine's layers were fed: shows wiring and cache, in every format."""
    walk, c = Walk("inverse"), reference.config
    sequences = [run.sequence for run in runs]
    theirs = list(reference.embed([s.tokens for s in sequences]))
    ours = [run.embedding() for run in runs]
    walk.add(_ends("model.embed_tokens", -1, "inverse", bounds, sequences, theirs, ours))
    for i in range(c.num_hidden_layers):
        expected: list[LayerValues] = list(reference.layer(i, [run.hidden_before(i) for run in runs]))
        actual = [run.layer(i) for run in runs]
        walk.add(compare_layer(i, c.num_experts_per_tok, "inverse", bounds, sequences, expected, actual))
    last = c.num_hidden_layers
    before = [run.hidden_before(last) for run in runs]
    logits, slack = reference.head(before), reference.head_slack(before)
    walk.add(_head(last, "inverse", bounds, sequences, logits, (run.logits for run in runs), slack))
    return walk
