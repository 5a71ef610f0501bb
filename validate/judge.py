"""Turns statistics of logits and of caches into checks of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from shuntyard.validate.bounds import WHOLE, Bounds, excess, over
from shuntyard.validate.layers import Masks, Walk
from shuntyard.validate.logits import LogitStatistics
from shuntyard.validate.modules import compare_module
from shuntyard.validate.record import Recording
from shuntyard.validate.report import Check, Module, Report, Routing
from shuntyard.validate.values import module_name
from shuntyard.validate.whole import WholeRun

MOST_KL = 1.0
LEAST_TOP1 = 0.2
"""Mean KL in nats and the share of equal tokens, beyond which a quantised engine is not the model it was made of."""


def judge_logits(
    report: Report,
    part: str,
    statistics: LogitStatistics,
    bounds: Bounds,
    keep: Many[NDArray[np.bool_]],
    *,
    layers: bool,
) -> None:
    """Adds the checks of one part; ``keep [S]`` of each sequence says which tokens count.

    ``layers``: whether layers are looked at, too, and can give a verdict where no token counts here.
    """
    whole = bounds.whole
    masks = [k[s.first : s.first + len(s.kl)] for k, s in zip(keep, statistics.sequences, strict=True)]
    total, counted = sum(len(m) for m in masks), sum(int(m.sum()) for m in masks)
    if counted < total:
        report.notes.append(
            f"{part}: {total - counted} of {total} tokens are left out: the reference's experts nearly tied before"
        )
    if not counted:
        # The modules' bounds decide then; where no layer is looked at, that is no verdict.
        detail = "the reference's experts nearly tie from the first token on: give other prompts"
        report.checks.append(Check(f"{part}: tokens to judge", 0.0, ">= 1", None if layers else False, detail, WHOLE))
        return

    def over_tokens(name: str) -> NDArray[np.float64]:
        return np.concatenate([getattr(s, name)[m] for s, m in zip(statistics.sequences, masks, strict=True)])

    off = np.concatenate([np.where(m, s.max_abs, -1.0) for s, m in zip(statistics.sequences, masks, strict=True)])
    flat, owner = int(off.argmax()), np.repeat(np.arange(len(masks)), [len(m) for m in masks])
    worst = statistics.sequences[int(owner[flat])]
    token = flat - sum(len(m) for m in masks[: int(owner[flat])])
    where = f"sequence '{worst.sequence.label}', token {worst.first + token}, logit {int(worst.worst[token])}"
    # Logits of ten are rounded ten times as coarsely as those of one.
    scale = max(1.0, float(np.sqrt(np.mean(over_tokens("rms") ** 2))))
    report.at_most(
        f"{part}: max abs error",
        float(off.max()),
        None if whole.max_abs is None else whole.max_abs * scale,
        where,
        WHOLE,
    )
    report.at_most(f"{part}: relative error", float(over_tokens("relative").max()), None, module=WHOLE)
    report.at_most(f"{part}: cosine distance", float(over_tokens("cosine").max()), None, module=WHOLE)
    report.at_most(f"{part}: mean KL", float(over_tokens("kl").mean()), whole.mean_kl, module=WHOLE)
    report.at_least(f"{part}: top-1 agreement", float(over_tokens("top1").mean()), whole.top1, module=WHOLE)
    if not bounds.alike:
        _judge_floor(report, part, float(over_tokens("kl").mean()), float(over_tokens("top1").mean()), bounds)
    report.at_most(f"{part}: top-5 disagreement", float(1 - over_tokens("top5").mean()), None, module=WHOLE)
    losses = over_tokens("nll"), over_tokens("nll_reference")
    if not np.isnan(losses[0]).all():
        ours, theirs = (float(np.nanmean(loss)) for loss in losses)
        # On a text that a model knows less of than by guessing, losses are any number, and are rounded as such.
        guessing = float(np.log(statistics.vocabulary))
        report.at_most(
            f"{part}: perplexity, relative",
            float(np.abs(np.expm1(ours - theirs))),
            None if whole.perplexity is None else whole.perplexity * max(1.0, theirs / guessing),
            f"engine {np.exp(ours):.6g}, reference {np.exp(theirs):.6g}",
            WHOLE,
        )


def _judge_floor(report: Report, part: str, mean_kl: float, top1: float, bounds: Bounds) -> None:
    """What no recipe costs: adds a failed check where the engine is another model than the reference."""
    whole = bounds.whole
    near = whole.mean_kl is not None or mean_kl <= MOST_KL
    if near and (whole.top1 is not None or top1 >= LEAST_TOP1):
        return
    value, bound = f"KL {mean_kl:.3g}, top-1 {top1:.3g}", f"KL <= {MOST_KL:g}, top-1 >= {LEAST_TOP1:g}"
    detail = "what the engine computes is not this model: no recipe costs so much"
    report.checks.append(Check(f"{part}: the same model", value, bound, False, detail, WHOLE))


def judge_cache(
    report: Report, part: str, recording: Recording, runs: Many[WholeRun], bounds: Bounds, masks: list[Masks]
) -> None:
    """Adds a check of what the running engine's KV cache holds: the worst layer, or the first that is out of bounds."""
    worst: Module | None = None
    for module in _cached(report.layers, recording, runs, bounds, masks):
        if bounds.whole.kv is not None and not module.relative <= bounds.whole.kv:
            worst = module
            break
        if worst is None or module.relative > worst.relative:
            worst = module
    if worst is not None:
        detail = f"{worst.module}: {worst.where}"
        report.at_most(f"{part}: KV cache, relative", worst.relative, bounds.whole.kv, detail, worst.module)


def _cached(
    layers: int, recording: Recording, runs: Many[WholeRun], bounds: Bounds, masks: list[Masks]
) -> Iterator[Module]:
    """Keys and values of each layer, in the order of computation."""
    sequences = [run.sequence for run in runs]
    for layer in range(layers):
        expected = recording.layer(layer)
        keep = [masks[layer][run.row][: run.length] for run in runs]
        keys, values = ([run.keys[layer] for run in runs], [run.values[layer] for run in runs])
        for part, theirs, ours in (
            ("self_attn.key", [expected[run.row].key[: run.length] for run in runs], keys),
            ("self_attn.value", [expected[run.row].value[: run.length] for run in runs], values),
        ):
            name = module_name(layer, part)
            yield compare_module(name, layer, part, "free", bounds, sequences, theirs, ours, keep)[0]


def judge_modules(report: Report, walks: Many[Walk], bounds: Bounds) -> None:
    """Adds a check for each kind of module, its worst layer standing for it, and one for each that is out of bounds."""
    for walk in walks:
        failed = [module for module in walk.modules if module.ok is False]
        kinds = dict.fromkeys(module.part for module in walk.modules)
        for kind in kinds:
            own = [module for module in walk.modules if module.part == kind and module.tokens]
            if not own or any(module.ok is False for module in own):
                continue
            _add(report, walk.mode, kind or "layer", max(own, key=lambda m: (excess(m), max(m.relative, m.coordinate))))
        for module in failed:
            _add(report, walk.mode, module.module, module)
        for module in walk.modules:
            if walk.mode != "free" and not module.tokens:
                name = f"{walk.mode}: {module.module}, tokens to judge"
                report.checks.append(Check(name, 0.0, ">= 1", False, "all tie", module.module))
        _judge_flips(report, walk, bounds)


def _add(report: Report, mode: str, name: str, module: Module) -> None:
    """The metric that is furthest from its bound."""
    relative = over(module.relative, module.relative_bound) >= over(module.coordinate, module.coordinate_bound)
    metric, value, bound = (
        ("relative", module.relative, module.relative_bound)
        if relative
        else ("coordinate", module.coordinate, module.coordinate_bound)
    )
    report.at_most(f"{mode}: {name}, {metric}", value, bound, f"{module.module}: {module.where}", module.module)


FEW_TOKENS = 20
LEAST_AGREEMENT = 0.5
"""Tokens whose experts nearly tie are left out; of a layer where most are, too few are left to say that it is right."""


def _judge_agreement(report: Report, walk: Walk, routed: list[Routing], *, exact: bool) -> None:
    """``exact``: in fp32 ties are so rare that an expert which only they reach is no accident."""
    for routing in routed:
        if routing.unjudged:
            experts = ", ".join(map(str, routing.unjudged))
            name = module_name(routing.layer, "feed_forward.experts")
            if exact:
                detail = f"expert {experts} is used by no token but those whose experts nearly tie"
                report.checks.append(
                    Check(f"{walk.mode}: {name}, experts judged", "not all", "all", False, detail, name)
                )
            else:
                report.notes.append(f"{walk.mode}: expert {experts} of {name} is used by tied tokens alone: not judged")
        if routing.agreement < LEAST_AGREEMENT and (routing.tokens >= FEW_TOKENS or routing.agreement == 0):
            module = module_name(routing.layer, "feed_forward.router")
            detail = f"{routing.flips} of {routing.tokens} tokens have other experts, be it at near ties"
            report.at_least(f"{walk.mode}: {module}, agreement", routing.agreement, LEAST_AGREEMENT, detail, module)


def _judge_flips(report: Report, walk: Walk, bounds: Bounds) -> None:
    """Margins of flips; free-running ones follow from errors elsewhere and are counted only."""
    routed = [c.routing for c in walk.comparisons if c.routing is not None]
    if not routed:
        return
    tokens, flips = sum(r.tokens for r in routed), sum(r.flips for r in routed)
    if walk.mode != "free" and bounds.alike:
        _judge_agreement(report, walk, routed, exact=bounds.format == "fp32" and not bounds.fp8)
    agreement = 1 - flips / max(1, tokens)
    report.checks.append(
        Check(f"{walk.mode}: routing agreement", agreement, "-", None, f"{flips} of {tokens} choices differ")
    )
    if walk.mode == "free":
        return
    every = [flip for c in walk.comparisons for flip in c.flips]
    if not every:
        return
    worst = max(every, key=lambda flip: flip.margin / flip.bound if flip.bound else flip.margin)
    module = module_name(worst.layer, "feed_forward.router")
    report.at_most(
        f"{walk.mode}: margin of the worst flip",
        worst.margin,
        None if math.isinf(worst.bound) else worst.bound,
        f"{module}: sequence '{worst.sequence}', token {worst.token}, experts {worst.reference} became {worst.engine}",
        module,
    )
    report.at_most(f"{walk.mode}: score error", max(r.score_error for r in routed), None, module="")
