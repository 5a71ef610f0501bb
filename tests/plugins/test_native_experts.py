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
from tests.plugins.forms import FORMATS, FP8, KINDS, Array, Weights, form_of, group_sizes, kinds
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
    broken,
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
    return Weights(form, weights, scales)


@pytest.mark.parametrize(("quantization", "compute"), list(itertools.product(("none", "tensor", "channel"), FORMATS)))
def test_layouts_give_the_same_bits(on_host: Native, quantization: str, compute: str) -> None:
    feeds, fused, top_k = feeds_of({**CHUNKS, "H": 9}, compute, "bf16", ExpertsForm(5, "fused", quantization))
    fused.scales[:] = [scale.reshape(-1 if quantization == "tensor" else (5, 1, -1)) for scale in fused.scales]
    expected = on_host.experts(feeds, fused, top_k)[1]
    for layout in contract.LAYOUTS:
        status, rows = on_host.experts(feeds, recut(fused, layout), top_k)
        assert status == OK
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_tile_they_fall_into(on_host: Native, kind: tuple[str, str]) -> None:
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
    kind=kinds,
)
def test_experts_with_broken_indices(
    on_host: Native,
    seed: int,
    tokens: int,
    top_k: int,
    experts: int,
    order: bool,
    at_start: bool,
    kind: tuple[str, str],
) -> None:
    """Each row is NaN, or what an expert that claims it makes of it; whatever memory held before."""
    rng = np.random.default_rng(seed)
    case = {**CHUNKS, "T": tokens, "K": top_k, "E": experts, "H": 6, "F": 3, "seed": seed}
    feeds, made, _ = feeds_of(case, "fp32", "fp32", form_of(kind, experts))
    rows_count = tokens * top_k
    offsets = broken(rng, experts + 1, rows_count)
    feeds["expert_offsets"] = np.sort(offsets) if order else offsets
    feeds["permutation"] = broken(rng, rows_count, rows_count)

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
        candidates.append(by_oracle(harmless, made, top_k))
    for i, row in enumerate(results[0]):
        claims = [e for e in range(experts) if feeds["expert_offsets"][e] <= i < feeds["expert_offsets"][e + 1]]
        if np.isnan(row).all():
            # Rising offsets leave no doubt about a row's expert.
            assert not (order and claims and exists[i]), (i, claims)
            continue
        assert exists[i] and claims, (i, claims, exists[i])
        assert any(np.allclose(row, candidates[e][i], rtol=1e-5, atol=1e-6) for e in claims), (i, claims)


# -- refused calls

MOST = 2**31 - 1  # rows, which have 32-bit numbers
WIDEST = 65535 * 128  # columns, by the limit of CUDA's grids


def launch(on_host: Native, x_type: int, extents: tuple[int, ...], weights: ExpertWeights) -> int:
    """On tensors that have no bytes: what is refused must be refused before anything is touched."""
    tensors = [Fenced(0) for _ in range(5)]
    assert on_host.workspace_size("moe_experts", (x_type,), extents) <= 1 << 16
    return on_host.launch("moe_experts", (x_type,), tensors, extents, Fenced(1 << 16), weights)


def untouchable(form: ExpertsForm, weight: Any = np.float32, scale: Any = np.float32) -> ExpertWeights:
    count = len(form.weight_names)
    weights, scales = ([np.zeros(0, dtype)] * n for dtype, n in ((weight, count), (scale, len(form.scale_names))))
    memories = [[Fenced(0) for _ in arrays] for arrays in (weights, scales)]
    return expert_weights(Weights(form, weights, scales), *memories)


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
    for weights in refused:
        assert launch(on_host, 0, extents, weights) == INVALID_ARGUMENT
    for x_type in (-1, 3, 4):
        assert launch(on_host, x_type, extents, untouchable(plain)) == INVALID_ARGUMENT
    odd = untouchable(group._replace(group_size=4), np.int32)
    assert launch(on_host, 0, (tokens, 4, 1, 16, 36), odd) == INVALID_ARGUMENT  # 36 is no multiple of 8
    accepted = [untouchable(plain), untouchable(channel, FP8), untouchable(group, np.int32)]
    assert [launch(on_host, 0, (0, *extents[1:]), weights) for weights in accepted] == [OK] * 3
