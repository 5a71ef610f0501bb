"""The experts' kernel, compiled for the host, against the oracle: every layout and format of weights."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shuntyard.plugins import contract
from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.bounds import bounds_of, check_between, exactly, relative_width
from tests.plugins.forms import (
    EVERY_KIND,
    FORMATS,
    FP8,
    KINDS,
    QUANTISING,
    Array,
    Weights,
    form_of,
    group_sizes,
    kinds,
    quantising,
)
from tests.plugins.native_build import (
    ALL_FILLS,
    CHUNKS,
    INVALID_ARGUMENT,
    OK,
    PLAIN,
    TYPE_CODES,
    ExpertWeights,
    Fenced,
    Memory,
    Native,
    broken_feeds,
    cases,
    expert_weights,
    feeds_of,
    formats,
    memories,
)
from tests.plugins.test_experts import by_oracle
from tests.tolerances import ONE_OP

ONE_SIDED: dict[str, Any] = {**CHUNKS, "skew": "one expert"}


@settings(max_examples=120)
@given(case=cases, kind=kinds, group_size=group_sizes, compute=formats, stored=formats, memory=memories)
@example(
    case={**CHUNKS, "skew": "one expert"}, kind=KINDS[0], group_size=8, compute="fp16", stored="bf16", memory=PLAIN
)
@example(case={**CHUNKS, "E": 512}, kind=("linear", "group"), group_size=4, compute="bf16", stored="bf16", memory=PLAIN)
def test_experts(
    on_host: Native,
    case: dict[str, Any],
    kind: tuple[str, str],
    group_size: int,
    compute: str,
    stored: str,
    memory: Memory,
) -> None:
    feeds, made, top_k = feeds_of(case, compute, stored, form_of(kind, case["E"], group_size))
    status, rows = on_host.experts(feeds, made, top_k, memory)
    assert status == OK
    ONE_OP[compute].check(rows, by_oracle(feeds, made, top_k))


@pytest.mark.parametrize(("compute", "stored", "kind"), list(itertools.product(FORMATS, FORMATS, KINDS)))
def test_experts_in_every_form(on_host: Native, compute: str, stored: str, kind: tuple[str, str]) -> None:
    """With enough rows an expert that tiles of every height occur."""
    case = {**CHUNKS, "T": 60, "H": 32, "F": 24}
    feeds, made, top_k = feeds_of(case, compute, stored, form_of(kind, 5))
    status, rows = on_host.experts(feeds, made, top_k)
    assert {size % 8 for size in np.diff(feeds["expert_offsets"])} > {0} and status == OK
    ONE_OP[compute].check(rows, by_oracle(feeds, made, top_k))


@settings(max_examples=120)
@given(case=cases, kind=quantising, compute=formats, stored=formats, memory=memories)
@example(case=ONE_SIDED, kind=QUANTISING[0], compute="fp16", stored="bf16", memory=PLAIN)
@example(case={**CHUNKS, "E": 512}, kind=("linear", "channel", "static"), compute="bf16", stored="bf16", memory=PLAIN)
def test_experts_with_quantised_activations(
    on_host: Native, case: dict[str, Any], kind: tuple[str, ...], compute: str, stored: str, memory: Memory
) -> None:
    feeds, made, top_k = feeds_of(case, compute, stored, form_of(kind, case["E"]))
    status, rows = on_host.experts(feeds, made, top_k, memory)
    assert status == OK
    check_between(rows, bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute]))


@pytest.mark.parametrize(("compute", "stored", "kind"), list(itertools.product(FORMATS, FORMATS, QUANTISING)))
def test_experts_with_quantised_activations_in_every_form(
    on_host: Native, compute: str, stored: str, kind: tuple[str, ...]
) -> None:
    case = {**CHUNKS, "T": 60, "H": 32, "F": 24}
    feeds, made, top_k = feeds_of(case, compute, stored, form_of(kind, 5))
    status, rows = on_host.experts(feeds, made, top_k)
    assert status == OK
    bounds = bounds_of(feeds, made, top_k)
    check_between(rows, bounds, np.dtype(FORMATS[compute]))
    assert (relative_width(bounds) <= 1e-5).mean() > 0.9


@pytest.mark.parametrize("kind", QUANTISING)
def test_quantised_activations_are_the_oracles_bits(on_host: Native, kind: tuple[str, ...]) -> None:
    """Without sums only exp() is left to differ."""
    case = {**CHUNKS, "T": 3000, "K": 1, "E": 40, "H": 1, "F": 1, "skew": "even"}
    feeds, made, _ = feeds_of(case, "bf16", "fp32", form_of(kind, 40))
    _, rows = on_host.experts(feeds, made, 1)
    assert (rows == by_oracle(feeds, made, 1)).mean() > 0.99


@pytest.mark.parametrize("activations", contract.QUANTIZE_FORMS)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(on_host: Native, activations: str, spoiled: float) -> None:
    """NaN in a number's place gives NaN rows; an infinite one what the oracle makes of it."""
    case = {**CHUNKS, "T": 20, "H": 9, "F": 7}
    feeds, made, top_k = feeds_of(case, "fp32", "fp32", form_of(("split", "tensor", activations), 5))
    feeds["x"][7, 4] = spoiled
    status, rows = on_host.experts(feeds, made, top_k)
    with np.errstate(invalid="ignore"):
        expected = by_oracle(feeds, made, top_k)
    assert status == OK
    own = feeds["permutation"] // top_k == 7
    np.testing.assert_array_equal(np.isnan(rows), np.isnan(expected))
    assert np.isfinite(rows[~own]).all()
    assert np.isnan(rows[own]).all() == (np.isnan(spoiled) or activations == "dynamic")


@pytest.mark.parametrize(("compute", "activations"), list(itertools.product(FORMATS, contract.ACTIVATIONS)))
def test_workspace_is_what_the_header_says(on_host: Native, compute: str, activations: str) -> None:
    def padded(nbytes: int) -> int:
        return -(-nbytes // 256) * 256

    itemsize, code = np.dtype(FORMATS[compute]).itemsize, TYPE_CODES[np.dtype(FORMATS[compute])]
    for tokens, top_k, hidden, width in [(70, 2, 33, 9), (1, 1, 1, 1), (0, 1, 8, 8), (513, 4, 64, 96)]:
        rows = tokens * top_k
        expected = padded(rows * width * itemsize)
        if compute != "fp32":
            expected += 3 * 512 * 128
        if activations == "none":
            expected += padded(rows * hidden * itemsize)
        else:
            expected += padded(rows * hidden) * (2 if activations == "static" else 1) + padded(rows * width)
        if activations == "dynamic":
            expected += padded(rows * 4)
        extents, number = (tokens, 8, top_k, hidden, width), contract.ACTIVATIONS.index(activations)
        assert on_host.workspace_size("moe_experts", (code,), extents, number) == expected
        assert on_host.workspace_size("moe_experts", (code,), extents, 3 if tokens % 2 else -1) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "group"])
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_experts_round_where_the_contract_says(on_host: Native, compute: str, kind: tuple[str, str]) -> None:
    """Without sums only exp() is left to differ: a rounding that is missing or too many moves far more rows."""
    case = {**CHUNKS, "T": 3000, "K": 1, "E": 40, "H": 1, "F": 1, "skew": "even"}
    feeds, made, _ = feeds_of(case, compute, "fp32", form_of(kind, 40))
    _, rows = on_host.experts(feeds, made, 1)
    assert (rows == by_oracle(feeds, made, 1)).mean() > 0.99


def recut(made: Weights, layout: str) -> Weights:
    """Fused weights in another layout."""
    form = made.form._replace(layout=layout)
    if layout == "fused":
        return made
    channels = made.form.quantization == "channel"
    parts = [(weight, made.scales[i] if made.scales else None) for i, weight in enumerate(made.weights)]
    if layout == "linear":
        (both, scale), down = parts
        half = both.shape[2] // 2
        halves = [slice(None, half), slice(half, None)]
        parts = [(both[:, :, own], scale[..., own] if scale is not None and channels else scale) for own in halves]
        parts.append(down)
    weights: list[Array] = []
    scales: list[Array] = []
    for weight, scale in parts:
        weights += [weight[e].T if layout == "linear" else weight[e] for e in range(form.experts)]
        if scale is not None:
            scales += [scale[e].reshape(-1) if channels else scale for e in range(form.experts)]
    of_parts = list(made.activation_scales)
    if layout == "linear":
        of_parts[1:] = made.activation_scales
    return Weights(form, weights, scales, [scale for scale in of_parts for _ in range(form.experts)])


FUSED_KINDS = [kind[1:] for kind in EVERY_KIND if kind[0] == "fused"]


@pytest.mark.parametrize(("kind", "compute"), list(itertools.product(FUSED_KINDS, FORMATS)))
def test_layouts_give_the_same_bits(on_host: Native, kind: tuple[str, ...], compute: str) -> None:
    quantization = kind[0]
    feeds, fused, top_k = feeds_of({**CHUNKS, "H": 9}, compute, "bf16", form_of(("fused", *kind), 5))
    fused.scales[:] = [scale.reshape(-1 if quantization == "tensor" else (5, 1, -1)) for scale in fused.scales]
    expected = on_host.experts(feeds, fused, top_k)[1]
    for layout in contract.LAYOUTS:
        status, rows = on_host.experts(feeds, recut(fused, layout), top_k)
        assert status == OK
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_rows_do_not_depend_on_the_tile_they_fall_into(on_host: Native, kind: tuple[str, ...]) -> None:
    """One expert's rows, 1 to 17 at a time: each row has the bits that it has alone."""
    case = {**CHUNKS, "T": 17, "E": 1, "K": 1, "H": 9, "F": 7}
    all_feeds, made, _ = feeds_of(case, "fp32", "fp32", form_of(kind, 1))
    alone = []
    for t in range(17):
        one = {**all_feeds, "x": all_feeds["x"][t : t + 1], "scores": all_feeds["scores"][t : t + 1]}
        one |= {"expert_offsets": np.asarray([0, 1], np.int32), "permutation": np.zeros(1, np.int32)}
        alone.append(on_host.experts(one, made, 1)[1][0])
    for count in range(1, 18):
        feeds = {**all_feeds, **{name: all_feeds[name][:count] for name in ("x", "scores", "permutation")}}
        feeds["expert_offsets"] = np.asarray([0, count], np.int32)
        np.testing.assert_array_equal(on_host.experts(feeds, made, 1)[1], np.stack(alone[:count]))


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 5, 20]),
    top_k=st.integers(1, 3),
    experts=st.sampled_from([3, 4, 9]),
    order=st.booleans(),
    at_start=st.booleans(),
    kind=st.sampled_from(EVERY_KIND),
)
@example(
    seed=0, tokens=20, top_k=2, experts=9, order=True, at_start=False, kind=("fused", "channel", "static")
)  # a hidden value of row 4 lies at a tie
def test_experts_with_broken_indices(
    on_host: Native,
    seed: int,
    tokens: int,
    top_k: int,
    experts: int,
    order: bool,
    at_start: bool,
    kind: tuple[str, ...],
) -> None:
    """Each row is NaN, or what an expert that claims it makes of it; whatever memory held before."""
    rng = np.random.default_rng(seed)
    case = {**CHUNKS, "T": tokens, "K": top_k, "E": experts, "H": 6, "F": 3, "seed": seed}
    feeds, made, _ = feeds_of(case, "fp32", "fp32", form_of(kind, experts))
    rows_count = tokens * top_k
    feeds = broken_feeds(rng, feeds, order)

    results = []
    for fill in ALL_FILLS:
        status, rows = on_host.experts(feeds, made, top_k, Memory(fill, at_start))
        assert status == OK
        results.append(rows)
    for rows in results[1:]:
        np.testing.assert_array_equal(rows, results[0], err_msg="the result depends on stale memory")

    exists = (feeds["permutation"] >= 0) & (feeds["permutation"] < rows_count)
    harmless = {**feeds, "permutation": np.where(exists, feeds["permutation"], 0).astype(np.int32)}
    candidates = []
    for e in range(experts):
        harmless["expert_offsets"] = np.where(np.arange(experts + 1) <= e, 0, rows_count)
        if made.form.activations == "none":
            candidates.append(exactly(by_oracle(harmless, made, top_k)))
        else:  # next to a tie of two codes, either is right
            candidates.append(bounds_of(harmless, made, top_k))
    for i, row in enumerate(results[0]):
        claims = [e for e in range(experts) if feeds["expert_offsets"][e] <= i < feeds["expert_offsets"][e + 1]]
        if np.isnan(row).all():
            # Rising offsets leave no doubt about a row's expert.
            assert not (order and claims and exists[i]), (i, claims)
            continue
        assert exists[i] and claims, (i, claims, exists[i])
        nearest = [np.clip(row, candidates[e].low[i], candidates[e].high[i]) for e in claims]
        assert any(np.allclose(row, one, rtol=1e-5, atol=1e-6) for one in nearest), (i, claims)


# -- refused calls

MOST = 2**31 - 1  # rows, which have 32-bit numbers
WIDEST = 65535 * 128  # columns, by the limit of CUDA's grids


def launch(on_host: Native, x_type: int, extents: tuple[int, ...], weights: ExpertWeights) -> int:
    """On tensors that have no bytes: what is refused must be refused before anything is touched."""
    tensors = [Fenced(0) for _ in range(5)]
    assert on_host.workspace_size("moe_experts", (x_type,), extents, weights.activations) <= 1 << 18
    return on_host.launch("moe_experts", (x_type,), tensors, extents, Fenced(1 << 18), weights)


def untouchable(form: ExpertsForm, weight: Any = np.float32, scale: Any = np.float32) -> ExpertWeights:
    counts = ((weight, form.weight_names), (scale, form.scale_names), (scale, form.activation_scale_names))
    made = Weights(form, *([np.zeros(0, dtype)] * len(names) for dtype, names in counts))
    return expert_weights(made, [Fenced(0) for _ in made.arrays])


@pytest.mark.parametrize(
    "extents",  # T, E, K, H, F
    [
        *[(-1, 4, 1, 2, 2), (1, 0, 1, 2, 2), (1, 513, 1, 2, 2), (1, MOST, 1, 2, 2), (1, 4, 0, 2, 2), (1, 4, 5, 2, 2)],
        *[(1, 4, 1, 0, 2), (1, 4, 1, 2, 0), (1, 4, 1, WIDEST + 1, 2), (1, 4, 1, 2, WIDEST + 1)],
        *[(2**30, 4, 2, 2, 2), (2**62, 4, 4, 2, 2)],
    ],
)
def test_invalid_extents(on_host: Native, extents: tuple[int, ...]) -> None:
    assert launch(on_host, 0, extents, untouchable(ExpertsForm(4))) == INVALID_ARGUMENT


def changed(given: ExpertWeights, /, **fields: Any) -> ExpertWeights:
    for name, value in fields.items():
        setattr(given, name, value)
    return given


@pytest.mark.parametrize("tokens", [0, 1])
def test_invalid_weights(on_host: Native, tokens: int) -> None:
    extents = (tokens, 4, 1, 16, 32)
    plain, channel = ExpertsForm(4, "split"), ExpertsForm(4, "linear", "channel")
    group = ExpertsForm(4, "linear", "group", 16)
    refused = [
        *[changed(untouchable(plain), type=type_) for type_ in (-1, 3, 4, 5)],
        *[changed(untouchable(plain), layout=layout) for layout in (-1, 3)],
        *[changed(untouchable(plain), scaling=scaling) for scaling in (-1, 1, 2, 3, 4)],
        changed(untouchable(plain), weights=None),
        *[changed(untouchable(channel, FP8), type=type_) for type_ in (0, 1, 2, 4)],
        *[changed(untouchable(channel, FP8), scale_type=type_) for type_ in (-1, 3, 4)],
        changed(untouchable(channel, FP8), scales=None),
        *[changed(untouchable(group, np.int32), group_size=size) for size in (-16, 0, 3, 32)],
        *[changed(untouchable(group, np.int32), layout=layout) for layout in (0, 1)],
        changed(untouchable(group, np.int32), type=TYPE_CODES[np.dtype(FP8)]),
    ]
    static, dynamic = (ExpertsForm(4, "linear", "tensor", 0, activations) for activations in contract.QUANTIZE_FORMS)
    refused += [
        *[changed(untouchable(channel, FP8), activations=value) for value in (-1, 3)],
        *[changed(untouchable(plain), activations=value) for value in (1, 2)],
        *[changed(untouchable(group, np.int32), activations=value) for value in (1, 2)],
        *[changed(untouchable(static, FP8), activation_scale_type=type_) for type_ in (-1, 3, 4)],
        changed(untouchable(static, FP8), activation_scales=None),
        changed(untouchable(dynamic, FP8), type=1),
    ]
    for weights in refused:
        assert launch(on_host, 0, extents, weights) == INVALID_ARGUMENT
    for x_type in (-1, 3, 4):
        assert launch(on_host, x_type, extents, untouchable(plain)) == INVALID_ARGUMENT
    odd = untouchable(group._replace(group_size=4), np.int32)
    assert launch(on_host, 0, (tokens, 4, 1, 16, 36), odd) == INVALID_ARGUMENT  # 36 is no multiple of 8
    accepted = [untouchable(plain), untouchable(group, np.int32)]
    accepted += [untouchable(form, FP8) for form in (channel, static, dynamic)]
    assert [launch(on_host, 0, (0, *extents[1:]), weights) for weights in accepted] == [OK] * 5
