"""Random cases of each op, with what must come out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from shuntyard.plugins import contract, oracle
from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.conformance import data
from tests.plugins.conformance.expected import of_expert, rows_between, scaled_inputs
from tests.plugins.conformance.files import (
    Array,
    Between,
    Candidates,
    Case,
    Exact,
    Input,
    Judgement,
    Near,
    OneOf,
    Output,
    Source,
    Table,
    Uniform,
    literal,
)
from tests.plugins.forms import EVERY_KIND, FORMATS, form_of
from tests.tolerances import ONE_OP, Sums

MOST_JUDGED = 1024
"""Elements of an output that are judged; all are compared between runs."""

MOST_WEIGHTS = 4_000_000
TOKENS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 200, 257, 300, 513)
EXPERTS = (1, 2, 3, 4, 5, 8, 15, 16, 16, 17, 32, 64, 128, 128, 256, 300, 512)
WIDTHS = (1, 3, 8, 16, 24, 32, 48, 64, 64, 72, 80, 96, 112, 128, 128, 136, 144, 192, 200, 256, 256, 320, 384, 512)
GROUPS = (1, 4, 8, 12, 16, 32, 32, 64, 128, 128)
ALIGNED = (8, 16, 16, 32, 64)
CHOICES = (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)

F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


def pick(rng: np.random.Generator, of: Any) -> Any:
    """One of them."""
    return of[int(rng.integers(len(of)))]


def stride_of(shape: tuple[int, ...]) -> int:
    """So that few enough elements are judged, of every column in turn."""
    stride = max(1, -(-math.prod(shape) // MOST_JUDGED))
    while stride > 1 and math.gcd(stride, shape[-1]) != 1:
        stride += 1
    return stride


def exact(values: Array) -> Output:
    """An output of which bits are known."""
    stride = stride_of(values.shape)
    return Output(values.shape, values.dtype, Exact(stride, values.reshape(-1)[::stride]))


# -- routing


def routing_logits(rng: np.random.Generator, shape: tuple[int, int], skew: str) -> Source:
    """Where logits of a skew come from."""
    experts = shape[1]
    if skew == "ties":
        return Table(data.seed_of(rng), np.asarray([-2, -1, -0.0, 0.0, 1, 1.5], np.float32))
    if skew == "all equal":
        return Table(data.seed_of(rng), np.asarray([-0.25], np.float32))
    if skew in ("extreme", "with NaN"):
        special = [-np.inf, -1e30, -100, 0, 1e-40, 90, 1e30, np.inf]
        return Table(data.seed_of(rng), np.asarray(special + [np.nan] * 2 * (skew == "with NaN"), np.float32))
    bias: Array | None = None
    if skew == "zipf":
        bias = data.zipf(rng, experts)
    elif skew == "one expert":
        bias = np.where(np.arange(experts) == rng.integers(experts), 50, 0)
    elif skew == "few experts":
        bias = np.where(rng.permutation(experts) < max(1, experts // 8), 0, -50)
    return Uniform(data.seed_of(rng), 24, -21, None if bias is None else bias.astype(np.float32))


def route(logits: Array, top_k: int) -> tuple[Array, Array, Array]:
    """The oracle, with NaN behind every number."""
    ranked = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -ranked, np.isnan(logits)), axis=1)
    slots = np.argsort(order[:, :top_k].reshape(-1), kind="stable").astype(np.int32)
    if not np.isnan(logits).any():
        scores, offsets, permutation = oracle.moe_routing(logits, top_k)
        np.testing.assert_array_equal(permutation, slots)
        return scores, offsets, permutation
    chosen = order[:, :top_k].reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=logits.shape[1]))]).astype(np.int32)
    values = np.take_along_axis(logits, order[:, :top_k], 1).reshape(-1)[slots].astype(np.float64)
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-values))).astype(np.float32), offsets, slots


def routing_case(rng: np.random.Generator, name: str) -> Case:
    """One call of routing."""
    tokens, experts = int(pick(rng, TOKENS)), int(pick(rng, EXPERTS))
    top_k = min(int(pick(rng, CHOICES)), experts)
    skew = pick(rng, [*data.SKEWS, "ties", "ties", "all equal", "extreme", "with NaN"])
    logits = Input((tokens, experts), F32, routing_logits(rng, (tokens, experts), skew))
    scores, offsets, permutation = route(logits.make(), top_k)
    named = f"{name} T={tokens} E={experts} K={top_k} {skew}"
    judged: Judgement = Near(ONE_OP["fp32"].relative, 1, scores)
    return Case(
        named,
        0,
        [logits],
        [
            Output(scores.shape, F32, judged),
            *(Output(a.shape, I32, Exact(1, a)) for a in (offsets, permutation)),
        ],
        top_k,
    )


# -- scatter-add


def broken(rng: np.random.Generator, count: int, near: int) -> Array:
    """Indices of which some are right, some just wrong, and some far off."""
    far = rng.integers(-(2**31), 2**31, size=count)
    limits = rng.choice([-(2**31), -1, near, near + 1, 2**31 - 1], size=count)
    close = rng.integers(-3, near + 4, size=count)
    kinds = rng.choice(4, size=count, p=[0.1, 0.1, 0.4, 0.4])
    return np.choose(kinds, [far, limits, close, abs(close) % max(1, near)]).astype(np.int32)


def tokens_from(base: Array, rows: Array, permutation: Array, top_k: int) -> OneOf:
    """Of broken indices: a token is NaN if a slot has no row, and of rows that share a slot either may be it."""
    claims: dict[int, list[int]] = {}
    for row, slot in enumerate(permutation.tolist()):
        claims.setdefault(slot, []).append(row)
    found = []
    for t in range(len(base)):
        own = [claims.get(t * top_k + k, []) for k in range(top_k)]
        sums = []
        for choice in itertools.product(*own):
            total = base[t].astype(np.float32)
            for row in choice:
                total = total + rows[row].astype(np.float32)
            sums.append(total.astype(base.dtype))
        found.append(Candidates(not sums, [(total, total) for total in sums]))
    return OneOf(found)


def scatter_case(rng: np.random.Generator, name: str) -> Case:
    """One call of scatter-add."""
    kind = pick(rng, ["regular"] * 8 + ["with NaN", "broken", "broken"])
    tokens, compute = int(pick(rng, TOKENS)), pick(rng, list(FORMATS))
    experts, hidden = int(pick(rng, EXPERTS)), int(pick(rng, WIDTHS))
    if kind != "regular":
        tokens, hidden = min(tokens, 40), min(hidden, 24)
    if kind == "broken":
        experts = max(experts, 3)
    top_k = min(int(pick(rng, CHOICES)), experts, 3 if kind == "broken" else 8)
    _, permutation = data.routed(rng, tokens, experts, top_k, pick(rng, data.SKEWS))
    dtype = np.dtype(FORMATS[compute])
    spread = float(pick(rng, [1, 1, 64]))
    base = Input((tokens, hidden), dtype, data.uniform(rng, 1, compute))
    rows = Input((tokens * top_k, hidden), dtype, data.uniform(rng, spread, compute))
    if kind == "with NaN":
        for tensor in (base, rows):
            for value in (np.nan, np.inf, -np.inf):
                if tokens:
                    tensor.patches[int(rng.integers(tensor.shape[0] * hidden))] = value
    case = Case("", 2, [base, rows, literal(permutation)], [], top_k)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "broken" and tokens:
            spoiled = rng.uniform(size=permutation.size) < rng.choice([0.05, 0.3, 1.0])
            wrong = broken(rng, permutation.size, permutation.size)
            permutation = np.where(spoiled, wrong, permutation).astype(np.int32)
            case.inputs[2] = literal(permutation)
            inside = permutation[(permutation >= 0) & (permutation < permutation.size)]
            case.runs_may_differ = len(set(inside.tolist())) < inside.size
            found = tokens_from(base.make(), rows.make(), permutation, top_k)
            case.outputs = [Output(base.shape, dtype, found)]
        else:
            case.outputs = [exact(oracle.moe_scatter_add(base.make(), rows.make(), permutation, top_k))]
    case.name = f"{name} T={tokens} K={top_k} H={hidden} {compute} {kind}"
    return case


# -- experts


def extents_of(rng: np.random.Generator, form_kind: tuple[str, ...], most_work: int, aligned: bool) -> dict[str, int]:
    """T, E, K, H, F and the group size, of at most so many multiplications."""
    unit = int(pick(rng, ALIGNED)) if aligned else 1
    widths = [width for width in WIDTHS if width % unit == 0]
    groups = [group for group in GROUPS if not aligned or group % 32 == 0]
    while True:
        group = int(pick(rng, groups)) if "group" in form_kind else 0
        found = {"T": pick(rng, TOKENS), "E": pick(rng, EXPERTS), "H": pick(rng, widths), "F": pick(rng, widths)}
        if group:
            unit = math.lcm(8, group)
            found |= {name: unit * max(1, round(found[name] / unit)) for name in "HF"}
        found["K"] = min(int(pick(rng, CHOICES)), found["E"])
        each = 3 * found["H"] * found["F"]
        if each * found["E"] <= MOST_WEIGHTS and each * found["T"] * found["K"] <= most_work:
            return {**found, "group": group}


def experts_case(rng: np.random.Generator, name: str, sums: Sums, most_work: int) -> Case:
    """One call of the experts: of any form, or of such a one as kernels for tensor cores take."""
    fast = rng.uniform() < 0.65
    kind = pick(rng, EVERY_KIND)
    manner = pick(rng, ["regular"] * 8 + ["with NaN", "broken"])
    if manner == "broken":
        most_work = min(most_work, 100_000)
    size = extents_of(rng, kind, most_work, fast)
    tokens, experts, top_k, hidden, width = (size[n] for n in ("T", "E", "K", "H", "F"))
    form = form_of(kind, experts, size["group"]).check()
    compute, stored = pick(rng, ["fp16", "bf16"] if fast else list(FORMATS)), pick(rng, list(FORMATS))
    if fast and form.quantization == "none":
        stored = compute
    dtype = np.dtype(FORMATS[compute])
    whole = form.activations != "none" and rng.uniform() < 0.4
    skew = pick(rng, data.SKEWS)
    offsets, permutation = data.routed(rng, tokens, experts, top_k, skew)
    source: Source = data.uniform(rng, 2, compute) if rng.uniform() < 0.5 else data.normal(rng, 1, dtype)
    x = Input((tokens, hidden), dtype, data.small_whole(rng, dtype) if whole else source)
    levels = [1, 0.5] if whole else [1, *rng.uniform(0.01, 1, size=62), 1e-3]
    scores = Input((tokens * top_k,), F32, Table(data.seed_of(rng), np.asarray(levels, np.float32)))
    lists = data.weights_of(rng, form, hidden, width, stored, whole)
    if manner == "with NaN" and tokens:
        values = {"none": [np.nan], "static": [np.nan, np.inf, -np.inf], "dynamic": [np.nan, np.inf]}
        for value in values[form.activations]:
            x.patches[int(rng.integers(tokens * hidden))] = value
    if manner == "broken" and tokens:
        wrong = broken(rng, experts + 1, permutation.size)
        offsets = np.sort(wrong) if rng.uniform() < 0.5 else wrong
        permutation = broken(rng, permutation.size, permutation.size)
    named = [f"T={tokens} E={experts} K={top_k} H={hidden} F={width}", " ".join(kind), f"{compute} x {stored}", skew]
    named += [f"group {form.group_size}"] * (form.group_size > 0) + ["whole"] * whole + [manner] * (manner != "regular")
    case = Case(
        f"{name} {', '.join(named)}",
        1,
        [x, scores, literal(offsets), literal(permutation), *itertools.chain(*lists)],
        [],
        top_k,
        experts,
        form.layout,
        form.group_size,
        form.activations,
    )
    judge_experts(case, form, lists, sums, manner == "broken" and tokens > 0)
    return case


def judge_experts(case: Case, form: ExpertsForm, lists: list[list[Input]], sums: Sums, is_broken: bool) -> None:
    """Gives a case what must come out."""
    x, scores, offsets, permutation = (tensor.make() for tensor in case.inputs[:4])
    made = data.made_of(form, lists)
    shape = (len(permutation), x.shape[1])
    if not is_broken:
        feeds = dict(zip(contract.EXPERTS.inputs, (x, scores, offsets, permutation), strict=True))
        bounds = rows_between(feeds, made, case.top_k, sums)
        stride = stride_of(shape)
        low, high = (bound.reshape(-1)[::stride] for bound in bounds)
        case.outputs = [Output(shape, x.dtype, Between(stride, low, high))]
        return
    rising = bool((np.diff(offsets.astype(np.int64)) >= 0).all())
    rows, shared = [], False
    for i, slot in enumerate(permutation.tolist()):
        exists = 0 <= slot < len(permutation)
        claims = [e for e in range(form.experts) if offsets[e] <= i < offsets[e + 1]] if exists else []
        shared |= len(claims) > 1
        pairs = []
        for e in claims:
            scaled = scaled_inputs(x, scores[i : i + 1], np.asarray([slot]), case.top_k)
            low, high = of_expert(scaled, made, e, sums)
            pairs.append((low[0], high[0]))
        rows.append(Candidates(not (rising and claims), pairs))  # rising offsets leave no doubt about a row's expert
    case.runs_may_differ = shared
    case.outputs = [Output(shape, x.dtype, OneOf(rows))]


def make_cases(
    count: int, sums: Sums, most_work: int, seed: int = 0, ops: tuple[int, ...] = (0, 1, 2)
) -> Iterator[Case]:
    """So many of each op."""
    for op, index in itertools.product(ops, range(count)):
        rng = np.random.default_rng([seed, op, index])
        name = f"{('routing', 'experts', 'scatter')[op]}-{index}"
        if op == 1:
            yield experts_case(rng, name, sums, most_work)
        else:
            yield routing_case(rng, name) if op == 0 else scatter_case(rng, name)
