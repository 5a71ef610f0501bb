"""Cases to be timed: the expert layers of Llama 4, of generated weights; and a few such calls to be judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.conformance import data
from tests.plugins.conformance.files import Case, Input, Output, Table, Unjudged, literal
from tests.plugins.conformance.make import F32, I32, judge_experts
from tests.plugins.forms import FORMATS
from tests.tolerances import Sums

TOKENS = (1, 8, 64, 512, 4096, 16384)


class Model(NamedTuple):
    """Widths of a model's expert layers; top-1."""

    name: str
    experts: int
    hidden: int = 5120
    width: int = 8192


SCOUT, MAVERICK = Model("Scout", 16), Model("Maverick", 128)

FP8 = ("linear", "channel", "dynamic")
"""As FP8 checkpoints of Llama 4 have it."""

TIMED: tuple[tuple[Model, tuple[str, str, str], str, Sequence[int]], ...] = (
    (SCOUT, FP8, "uniform", TOKENS),
    (SCOUT, FP8, "zipf", (64, 512, 4096)),
    (SCOUT, FP8, "one expert", (512, 4096)),
    (SCOUT, ("fused", "channel", "static"), "uniform", (1, 64, 4096)),
    (SCOUT, ("fused", "none", "none"), "uniform", TOKENS),
    (MAVERICK, FP8, "uniform", TOKENS),
    (MAVERICK, FP8, "zipf", (64, 4096)),
)


def _experts(
    model: Model, kind: tuple[str, str, str], skew: str, tokens: int, seed: int
) -> tuple[Case, ExpertsForm, list[list[Input]]]:
    """A call in bf16, not judged yet. Its weights are the same for every number of tokens."""
    layout, quantization, activations = kind
    form = ExpertsForm(model.experts, layout, quantization, 0, activations).check()
    bf16 = np.dtype(FORMATS["bf16"])
    lists = data.weights_of(np.random.default_rng(seed), form, model.hidden, model.width, "bf16", False)
    rng = np.random.default_rng([seed, tokens])
    offsets, permutation = data.routed(rng, tokens, model.experts, 1, skew)
    x = Input((tokens, model.hidden), bf16, data.normal(rng, 1, bf16))
    levels = np.linspace(0.3, 1, 64).astype(np.float32)
    scores = Input((tokens,), F32, Table(data.seed_of(rng), levels))
    inputs = [x, scores, literal(offsets), literal(permutation), *itertools.chain(*lists)]
    name = f"experts {model.name} {' '.join(kind)} {skew} T={tokens}"
    outputs = [Output((tokens, model.hidden), bf16, Unjudged())]
    case = Case(name, 1, inputs, outputs, 1, model.experts, layout, 0, activations)
    return case, form, lists


def timed_cases() -> Iterator[Case]:
    """Cases without judgement."""
    bf16 = np.dtype(FORMATS["bf16"])
    for model in (SCOUT, MAVERICK):
        for tokens in TOKENS:
            rng = np.random.default_rng(tokens)
            logits = Input((tokens, model.experts), F32, data.uniform(rng, 8, "fp32"))
            shapes = [((tokens,), F32), ((model.experts + 1,), I32), ((tokens,), I32)]
            outputs = [Output(shape, dtype, Unjudged()) for shape, dtype in shapes]
            yield Case(f"routing {model.name} T={tokens}", 0, [logits], outputs, 1)
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        base, rows = (Input((tokens, SCOUT.hidden), bf16, data.normal(rng, 1, bf16)) for _ in range(2))
        _, permutation = data.routed(rng, tokens, SCOUT.experts, 1, "uniform")
        outputs = [Output((tokens, SCOUT.hidden), bf16, Unjudged())]
        yield Case(f"scatter T={tokens}", 2, [base, rows, literal(permutation)], outputs, 1)
    for model, kind, skew, counts in TIMED:
        for tokens in counts:
            yield _experts(model, kind, skew, tokens, seed=0)[0]


def large_cases(sums: Sums) -> Iterator[Case]:
    """Calls that are large enough for every path of a kernel to be taken often, and are judged."""
    model = Model("large", 8, 1024, 2048)
    kinds = [FP8, ("fused", "channel", "static"), ("split", "tensor", "dynamic"), ("fused", "none", "none")]
    for number, (kind, (tokens, skew)) in enumerate(
        itertools.product(kinds, [(24, "uniform"), (300, "zipf"), (200, "one expert")])
    ):
        case, form, lists = _experts(model, kind, skew, tokens, seed=number)
        judge_experts(case, form, lists, sums, False)
        yield case
