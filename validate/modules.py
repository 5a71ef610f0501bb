"""One layer's modules against the reference's: errors by module, routing, and the tokens whose experts flipped."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shuntyard.validate.bounds import Bounds
from shuntyard.validate.report import Flip, Module, Routing
from shuntyard.validate.values import PARTS, Array, LayerValues, Sequence, module_name

AFTER_ROUTING = ("feed_forward.experts", "feed_forward", "")
"""Parts that depend on which experts were chosen."""

FLOOR = 0.3
"""A vector shorter than this, by the median of all tokens' vectors, counts as that long: an error relative to nearly
nothing says nothing."""


@dataclass
class LayerComparison:
    """What came out for one layer, or for the embedding or the head."""

    modules: list[Module] = field(default_factory=list)
    routing: Routing | None = None
    flips: list[Flip] = field(default_factory=list)
    errors: list[NDArray[np.float64]] = field(default_factory=list)  # of each module, mean square error by sequence
    misses: NDArray[np.float64] | None = None  # share of each sequence's tokens with other experts


def chosen_experts(logits: Array, top_k: int) -> NDArray[np.int64]:
    """``[T, E]`` -> ``[T, k]``, ascending; of equal logits the lower expert is taken (``plugins/contract.py``)."""
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    out: NDArray[np.int64] = np.sort(order[:, :top_k], axis=1)
    return out


def ties(logits: Array, top_k: int, margin: float) -> NDArray[np.bool_]:
    """``[T, E]`` -> ``[T]``: whether the last chosen and the first rejected logit are closer than ``margin``."""
    if logits.shape[1] <= top_k:
        return np.zeros(len(logits), bool)
    ordered = -np.sort(-logits.astype(np.float64), axis=1)
    out: NDArray[np.bool_] = ordered[:, top_k - 1] - ordered[:, top_k] <= margin * _rms(logits)
    return out


def _rms(values: Array) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.sqrt(np.mean(values.astype(np.float64) ** 2, axis=1))
    return out


def compare_module(
    name: str,
    layer: int,
    part: str,
    mode: str,
    bounds: Bounds,
    sequences: Many[Sequence],
    expected: Many[Array],
    actual: Many[Array],
    keep: Many[NDArray[np.bool_]] | None = None,
    slack: Many[Array] | None = None,
) -> tuple[Module, NDArray[np.float64]]:
    """One module's values ``[S, ...]`` of each sequence; ``keep [S]`` of each says which tokens count.

    ``slack [S, 2]`` of each: by how much more than by the bounds a token may be off, as ``activations.py`` says it.

    Returns the errors, and the mean square relative error of each sequence (NaN where no token of it counts).
    """
    relative_bound, coordinate_bound = bounds.module(name, part, mode)
    lengths = [len(array) for array in expected]
    y = np.concatenate([array.reshape(len(array), -1) for array in expected]).astype(np.float64)
    x = np.concatenate([array.reshape(len(array), -1) for array in actual]).astype(np.float64)
    kept = np.ones(len(y), bool) if keep is None else np.concatenate(list(keep))
    rms = _rms(y)
    # The median's: a single token of massive activations, which real models have, must not excuse all others.
    floor = FLOOR * float(np.median(rms))
    scale = np.maximum(rms, floor) if floor > 0 else np.ones(len(y))
    with np.errstate(invalid="ignore"):
        difference = np.abs(x - y)
    difference[np.isnan(difference)] = np.inf  # a NaN, or infinity for infinity, is as wrong as can be
    with np.errstate(over="ignore", invalid="ignore"):
        relative = np.sqrt(np.mean(difference**2, axis=1)) / scale
        coordinate = difference.max(axis=1) / scale
    owner = np.repeat(np.arange(len(lengths)), lengths)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where(kept, relative**2, 0.0)
        errors = np.bincount(owner, squares, len(lengths)) / np.bincount(owner, kept, len(lengths))
    if not kept.any():
        return Module(name, layer, part, mode, 0.0, None, 0.0, None, "no token counts", 0, None), errors
    more = np.zeros((len(y), 2)) if slack is None else np.concatenate(list(slack)) / scale[:, None]
    more = more * np.array(bounds.slack(name))
    judged = [
        _worst(relative, relative_bound, more[:, 0], kept),
        _worst(coordinate, coordinate_bound, more[:, 1], kept),
    ]
    # Where it is worst by the metric that is furthest beyond its bound.
    (worst_relative, relative_bound, _), (worst_coordinate, coordinate_bound, _) = judged
    _, _, token = max(judged, key=lambda j: j[0] / j[1] if j[1] else 0.0)
    sequence = int(owner[token])
    place = token - sum(lengths[:sequence])
    channel = int(difference[token].argmax())
    where = f"sequence '{sequences[sequence].label}', token {place}, {_channel(expected[sequence], channel)}"
    verdicts = [value <= bound for value, bound, _ in judged if bound is not None]
    ok = all(verdicts) if verdicts else None
    return (
        Module(
            name,
            layer,
            part,
            mode,
            worst_relative,
            relative_bound,
            worst_coordinate,
            coordinate_bound,
            where,
            int(kept.sum()),
            ok,
            sequence,
            place,
        ),
        errors,
    )


def _worst(
    errors: NDArray[np.float64], bound: float | None, more: NDArray[np.float64], kept: NDArray[np.bool_]
) -> tuple[float, float | None, int]:
    """The error that is furthest beyond its token's bound, that bound, and the token."""
    if bound is None:
        token = int(np.where(kept, errors, -1.0).argmax())  # NaN is the largest
        return float(errors[token]), None, token
    bounds = bound + more
    with np.errstate(divide="ignore", invalid="ignore"):
        by = np.where(errors == 0, 0.0, errors / bounds)
    by[np.isnan(by)] = np.inf
    token = int(np.where(kept, by, -1.0).argmax())
    return float(errors[token]), float(bounds[token]), token


def _channel(array: Array, flat: int) -> str:
    if array.ndim == 3:  # keys and values
        head, channel = divmod(flat, array.shape[2])
        return f"head {head}, channel {channel}"
    return f"channel {flat}"


def compare_layer(
    layer: int,
    top_k: int,
    mode: str,
    bounds: Bounds,
    sequences: Many[Sequence],
    expected: Many[LayerValues],
    actual: Many[LayerValues],
    keep: Many[NDArray[np.bool_]] | None = None,
) -> LayerComparison:
    """All modules of one layer. In mode "free" only tokens of ``keep`` count."""
    out = LayerComparison()
    agreed = list(keep) if keep is not None else [np.ones(len(s.tokens), bool) for s in sequences]
    before = list(agreed)
    if expected[0].router is not None:
        agreed = _compare_routing(out, layer, top_k, bounds, sequences, expected, actual, before)
    for part in PARTS:
        theirs, ours = [v.part(part) for v in expected], [v.part(part) for v in actual]
        if any(array is None for array in (*theirs, *ours)):
            continue
        module, errors = compare_module(
            module_name(layer, part),
            layer,
            part,
            mode,
            bounds,
            sequences,
            [a for a in theirs if a is not None],
            [a for a in ours if a is not None],
            agreed if part in AFTER_ROUTING else before,
            _slack(expected, part),
        )
        if part == "feed_forward.experts" and module.tokens:
            module = _with_experts(module, expected, top_k)
        out.modules.append(module)
        out.errors.append(errors)
    return out


def _slack(expected: Many[LayerValues], part: str) -> list[Array] | None:
    """``[S, 2]`` of each sequence."""
    found = [v.slack[:, PARTS.index(part)] for v in expected if v.slack is not None]
    return found if len(found) == len(expected) else None


def _with_experts(module: Module, expected: Many[LayerValues], top_k: int) -> Module:
    """Says which experts the worst token has: one of them is the one to look at."""
    router = expected[module.sequence].router
    assert router is not None
    (chosen,) = chosen_experts(router[module.token : module.token + 1], top_k).tolist()
    return replace(module, where=f"{module.where}, expert {', '.join(map(str, chosen))}")


def _compare_routing(
    out: LayerComparison,
    layer: int,
    top_k: int,
    bounds: Bounds,
    sequences: Many[Sequence],
    expected: Many[LayerValues],
    actual: Many[LayerValues],
    keep: Many[NDArray[np.bool_]],
) -> list[NDArray[np.bool_]]:
    """Fills in routing, flips and misses; returns which tokens of each sequence have the same experts."""
    name = module_name(layer, "feed_forward.router")
    margin_bound, slack_of = bounds.margin(name), bounds.slack(name)[1]
    agreed, misses = [], []
    score_error, worst, count = 0.0, 0.0, 0
    experts = expected[0].router.shape[1] if expected[0].router is not None else 0
    loads = np.zeros((2, experts), np.int64)
    judged = np.zeros(experts, bool)
    for sequence, theirs, ours, counts in zip(sequences, expected, actual, keep, strict=True):
        y, x = theirs.router, ours.router
        assert y is not None and x is not None
        a, b = chosen_experts(y, top_k), chosen_experts(x, top_k)
        same = (a == b).all(axis=1)
        exact = ties(y, top_k, 0.0)  # which of equal ones the reference took is not told by its logits
        for row, chosen in enumerate((a, b)):
            loads[row] += np.bincount(chosen[counts].reshape(-1), minlength=experts)
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-y.astype(np.float64))), 1 / (1 + np.exp(-x.astype(np.float64)))
        rows = np.arange(len(a))[:, None]
        off = np.abs(scores[0][rows, a] - scores[1][rows, a])[same & counts]
        score_error = max(score_error, float(off.max(initial=0.0)))
        rms = np.maximum(_rms(y), np.finfo(np.float64).tiny)
        judged[np.unique(b[same & counts & ~exact])] = True
        for token in np.flatnonzero(~same & counts):
            left, entered = np.setdiff1d(a[token], b[token]), np.setdiff1d(b[token], a[token])
            margin = float(y[token, left].max() - y[token, entered].min())
            relative = margin / float(rms[token])
            bound = margin_bound
            if theirs.slack is not None:  # of two logits
                bound += 2 * slack_of * float(theirs.slack[token, PARTS.index("feed_forward.router"), 1] / rms[token])
            worst = max(worst, relative)
            out.flips.append(
                Flip(
                    layer,
                    sequence.label,
                    int(token),
                    "",
                    "",
                    "",
                    [int(e) for e in a[token]],
                    [int(e) for e in b[token]],
                    relative,
                    bound,
                    bool(relative <= bound),
                )
            )
        count += int(counts.sum())
        misses.append(float((~same & counts).sum() / max(1, counts.sum())))
        agreed.append(same & counts & ~exact)
    flips = len(out.flips)
    out.misses = np.array(misses)
    out.routing = Routing(
        layer,
        count,
        1 - flips / max(1, count),
        score_error,
        flips,
        worst,
        margin_bound,
        [int(n) for n in loads[0]],
        [int(n) for n in loads[1]],
        [int(e) for e in np.flatnonzero((loads[1] > 0) & ~judged)],
    )
    return agreed
