"""Reports of engines that never were: seeded, of any size, sound or with one faulty module."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from shuntyard.validate.report import (
    Check,
    Flip,
    Gate,
    Interval,
    Module,
    Regression,
    Report,
    Routing,
    SequenceMetrics,
)
from shuntyard.validate.values import PARTS, module_name

TEXT = "the engine that was built for a yard of wagons sorts them by weight , and each goes to its own track"
WORDS = TEXT.split()
MOE_ONLY = ("feed_forward.router", "feed_forward.shared_expert", "feed_forward.experts")


def make_report(
    layers: int = 8,
    experts: int = 8,
    *,
    fault: tuple[int, str] | None = None,
    mode: str = "forced",
    moe_every: int = 1,
    seed: int = 0,
) -> Report:
    """A bf16 engine's report with everything in it; ``fault`` is a layer and one of ``PARTS``, wrong in ``mode``."""
    rng = np.random.default_rng(seed)
    report = Report("yard/engine", "meta-llama/miniature", "onnxruntime", "bf16", 6 * 224, layers=layers)
    if fault is not None:
        report.culprit, report.culprit_mode = module_name(*fault), mode
    for look in ("forced", "free"):
        report.modules += _modules(rng, layers, moe_every, look, fault if look == mode or look == "free" else None)
    routed = [layer for layer in range(layers) if layer % moe_every == moe_every - 1]
    unsound = fault[0] if fault is not None and fault[1] == "feed_forward.router" and mode == "forced" else None
    report.routing = [_routing(rng, layer, experts, bad=layer == unsound) for layer in routed]
    report.flips = [_flip(rng, routing, experts) for routing in report.routing for _ in range(routing.flips)]
    report.sequences = [_sequence(rng, f"chunk {i}") for i in range(6)]
    report.perplexity = Interval(12.3456, 11.82, 12.91)
    report.perplexity_reference = Interval(12.3391, 11.81, 12.9)
    edges = [float(edge) for edge in np.arange(-6.0, 1.01, 0.25)]
    centres = np.array(edges[:-1]) + 0.125
    report.histogram = {"edges": edges, "counts": [float(round(9e5 * math.exp(-((c + 2.1) ** 2)))) for c in centres]}
    report.precision = [
        {"attention": "bf16", "router": "fp32", "experts": "bf16" if layer in (0, layers - 1) else "int4, group 128"}
        for layer in range(layers)
    ]
    report.facts = {
        "built for": "SM89, TensorRT-RTX 1.7",
        "longest context": "1024 tokens",
        "plugins": "8 MoE\n8 ChunkedAttention",
        "weights": "29.4 MB",
        "built in": "41.2 s",
    }
    metrics = [("nll", 2.5133, 2.5129, 4e-4), ("kl", 0.0119, 0.0121, -2e-4), ("routing_miss", 0.031, 0.012, 0.019)]
    gates = [
        Gate(name, now, base, worse, 3e-3, 0.0008 if worse > 3e-3 else 0.61, fault is None or worse <= 3e-3)
        for name, now, base, worse in metrics
        if fault is not None or worse <= 3e-3
    ]
    report.regression = Regression("baselines/yard.json", "bf16 on SM89", 0.01, 6, gates)
    report.notes = ["greedy: 2 of 3 prompts met a near tie; nothing was judged after it"]
    _checks(report, fault is None)
    return report


def _modules(
    rng: np.random.Generator, layers: int, moe_every: int, mode: str, fault: tuple[int, str] | None
) -> list[Module]:
    def module(name: str, layer: int, part: str, grown: float) -> Module:
        after = fault is not None and layer > fault[0] and part == "" and mode == "free"
        wrong = fault is not None and (layer, part) == fault
        bound = 0.02 if mode == "forced" else 0.08
        ratio = float(rng.uniform(0.08, 0.5)) * grown * (1.4 if part == "feed_forward.experts" else 1.0)
        ratio = 38.0 if wrong else 1.3 + 4 * math.exp(-(layer - fault[0]) / 8) if after and fault is not None else ratio
        where = f"sequence 'chunk {rng.integers(6)}', token {rng.integers(224)}, channel {rng.integers(256)}"
        ok = ratio <= 1
        return Module(name, layer, part, mode, ratio * bound, bound, ratio * 0.6, 1.0, where, 1340, ok)

    found = [module("model.embed_tokens", -1, "embed_tokens", 0.02)]
    for layer in range(layers):
        grown = 1.0 if mode == "forced" else 0.3 + 1.1 * math.sqrt((layer + 1) / (layers + 1))
        moe = layer % moe_every == moe_every - 1
        parts = [part for part in PARTS if moe or part not in MOE_ONLY]
        found += [module(module_name(layer, part), layer, part, grown) for part in parts]
    return [*found, module("lm_head", layers, "lm_head", 0.9)]


def _routing(rng: np.random.Generator, layer: int, experts: int, *, bad: bool) -> Routing:
    tokens = 1344
    reference = rng.multinomial(tokens, rng.dirichlet(np.full(experts, 2.5)))
    engine = reference.copy()
    flips = tokens // 8 if bad else int(rng.integers(0, 6))
    for _ in range(flips):
        start, end = rng.choice(experts, 2, replace=False)
        if engine[start]:
            engine[start] -= 1
            engine[end] += 1
    loads = ([int(load) for load in reference], [int(load) for load in engine])
    margin = 1.7 if bad else 0.031 if flips else 0.0
    return Routing(layer, tokens, 1 - flips / tokens, 0.42 if bad else 0.011, flips, margin, 0.05, *loads)


def _flip(rng: np.random.Generator, routing: Routing, experts: int) -> Flip:
    start = int(rng.integers(len(WORDS) - 5))
    old, new = (int(expert) for expert in rng.choice(experts, 2, replace=False))
    margin = float(rng.uniform(0, max(routing.worst_margin, 1e-3)))
    before, after = " ".join(WORDS[max(0, start - 4) : start]), " " + " ".join(WORDS[start + 1 : start + 5])
    place = (f"chunk {rng.integers(6)}", int(rng.integers(224)))
    bound = routing.margin_bound
    return Flip(routing.layer, *place, before, f" {WORDS[start]}", after, [old], [new], margin, bound, margin <= bound)


def _sequence(rng: np.random.Generator, label: str) -> SequenceMetrics:
    nll = float(rng.normal(2.5, 0.1))
    digest = hashlib.sha256(label.encode()).hexdigest()
    return SequenceMetrics(label, digest, 224, nll, nll - 6e-4, 0.0119, 0.06, 0.03, 0.012, 0.0051)


def _checks(report: Report, sound: bool) -> None:
    for part in ("prefill", "decode"):
        report.at_most(f"{part}: max abs error", 0.412, None, "sequence 'chunk 3', token 101, logit 17", "logits")
        report.at_most(f"{part}: mean KL", 0.0119 if sound else 0.317, 0.03, module="logits")
        report.at_least(f"{part}: top-1 agreement", 0.941, 0.85, module="logits")
        report.at_most(f"{part}: perplexity, relative", 5.3e-4, 0.02, "engine 12.3456, reference 12.3391", "logits")
    for module in report.modules:
        if module.relative_bound is not None:
            name = f"{module.mode}: {module.module}, relative"
            report.at_most(name, module.relative, module.relative_bound, module.where, module.module)
    report.checks.append(Check("greedy: 20 tokens after 8", "the same", "the same, or a tie", True))
