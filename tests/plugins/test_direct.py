"""The direct family of the experts' kernels, on the emulator, against the oracle: weights straight into registers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.bounds import bounds_of, check_between
from tests.plugins.forms import FORMATS, FP8, Array, Weights, form_of, make_weights, pack
from tests.plugins.native_build import (
    ALL_FILLS,
    DIRECT_8,
    DIRECT_16,
    DIRECT_32,
    DIRECT_64,
    OK,
    PLAIN_TACTIC,
    UNSUPPORTED_TACTIC,
    Memory,
    Native,
    broken_feeds,
    same_numbers,
)
from tests.plugins.test_experts import activations_of, by_oracle
from tests.tolerances import ONE_OP

HALVES = ["fp16", "bf16"]
ALONG_N: list[tuple[str, ...]] = [("fused", "none"), ("split", "none")]
DEQUANTISED: list[tuple[str, ...]] = [("linear", "tensor"), ("linear", "channel"), ("linear", "group")]
CODES: list[tuple[str, ...]] = [
    ("linear", scaling, activations) for scaling in ("tensor", "channel") for activations in ("static", "dynamic")
]
KINDS = [("linear", "none"), *ALONG_N, *DEQUANTISED, *CODES]
SHORT = {"T": 20, "E": 3, "K": 2, "H": 72, "F": 144, "skew": "even", "seed": 1}


def tiles_of(kind: tuple[str, ...]) -> list[int]:
    return [DIRECT_8, DIRECT_16, *([] if kind in ALONG_N else [DIRECT_32, DIRECT_64])]


KINDS_AND_TILES = [(kind, tile) for kind in KINDS for tile in tiles_of(kind)]


def unit_of(kind: tuple[str, ...]) -> int:
    """What both extents must be multiples of: the numbers in 16 bytes of weights."""
    return {"none": 8, "tensor": 16, "channel": 16, "group": 32}[kind[1]]


def feeds_of(
    case: dict[str, Any], kind: tuple[str, ...], compute: str, scales: str = "fp32", group: int = 32
) -> tuple[dict[str, Array], Weights, int]:
    """Inputs of the experts op, its weights, and K; extents are rounded up to what the form asks for."""
    form = form_of(kind, case["E"], group)
    unit = np.lcm(unit_of(kind), max(form.group_size, 1))
    hidden, width = (int(-(-case[name] // unit) * unit) for name in "HF")
    feeds, top_k = activations_of({**case, "H": hidden}, compute)
    rng = np.random.default_rng(case["seed"])
    stored = compute if form.quantization == "none" else scales
    return feeds, make_weights(rng, form, hidden, width, stored, flat_scales=case["seed"] % 2 == 0), top_k


def check_rows(rows: Array, feeds: dict[str, Array], made: Weights, top_k: int) -> None:
    compute = next(name for name in HALVES if feeds["x"].dtype == FORMATS[name])
    if made.form.activations == "none":
        ONE_OP[compute].check(rows, by_oracle(feeds, made, top_k))
    else:
        check_between(rows, bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute]))


def run(native: Native, feeds: dict[str, Array], made: Weights, top_k: int, tile: int, memory: Memory) -> Array:
    status, rows = native.experts(feeds, made, top_k, memory, tile)
    assert status == OK
    return rows


SKEWS = ["even", "one expert", "few experts"]


@pytest.mark.parametrize(("kind", "tile"), KINDS_AND_TILES)
@pytest.mark.parametrize("compute", HALVES)
def test_every_form_and_tile(on_host: Native, kind: tuple[str, ...], compute: str, tile: int) -> None:
    for seed, skew in enumerate(SKEWS):
        feeds, made, top_k = feeds_of({**SHORT, "skew": skew, "seed": seed}, kind, compute, ["fp32", *HALVES][seed])
        check_rows(run(on_host, feeds, made, top_k, tile, Memory()), feeds, made, top_k)


cases = st.fixed_dictionaries(
    {
        "T": st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 65, 70])),
        "E": st.sampled_from([1, 2, 3, 40]),
        "K": st.integers(1, 3),
        # Around a warp's 16 to 64 channels and the 16 to 128 numbers of K of its slot, and eight warps' of either.
        "H": st.sampled_from([1, 16, 40, 64, 72, 128, 136, 264, 520]),
        "F": st.sampled_from([1, 24, 32, 56, 104, 128, 144, 272]),
        "skew": st.sampled_from([*SKEWS, "ties"]),
        "seed": st.integers(0, 2**16),
    }
)
WIDE = {"T": 3, "E": 2, "K": 1, "skew": "even", "seed": 0}


@settings(max_examples=50)
@given(
    case=cases,
    kind_and_tile=st.sampled_from(KINDS_AND_TILES),
    compute=st.sampled_from(HALVES),
    scales=st.sampled_from(["fp32", *HALVES]),
    group=st.sampled_from([32, 64, 96]),
    memory=st.builds(Memory, fill=st.sampled_from(ALL_FILLS), at_start=st.booleans()),
    order=st.integers(0, 2**16),
)
# More slots than a warp keeps on their way, the last of them short.
@example({**WIDE, "H": 840, "F": 56}, (KINDS[0], DIRECT_8), "bf16", "fp32", 32, Memory(), 1)
@example({**WIDE, "H": 72, "F": 472}, (ALONG_N[0], DIRECT_16), "fp16", "fp32", 32, Memory(), 2)
@example({**WIDE, "H": 1616, "F": 48}, (("linear", "channel"), DIRECT_8), "fp16", "bf16", 32, Memory(), 3)
@example({**WIDE, "H": 3104, "F": 32}, (("linear", "group"), DIRECT_8), "bf16", "bf16", 32, Memory(), 4)
@example({**WIDE, "H": 32, "F": 2208}, (("linear", "group"), DIRECT_32), "fp16", "fp32", 96, Memory(), 5)
@example({**WIDE, "H": 48, "F": 1168}, (CODES[0], DIRECT_8), "fp16", "bf16", 32, Memory(), 6)
@example({**WIDE, "H": 80, "F": 336}, (CODES[3], DIRECT_64), "bf16", "fp16", 32, Memory(), 7)
def test_any_shape(
    on_host: Native,
    case: dict[str, Any],
    kind_and_tile: tuple[tuple[str, ...], int],
    compute: str,
    scales: str,
    group: int,
    memory: Memory,
    order: int,
) -> None:
    kind, tile = kind_and_tile
    feeds, made, top_k = feeds_of({**case, "K": min(case["K"], case["E"])}, kind, compute, scales, group)
    on_host.seed(order)
    check_rows(run(on_host, feeds, made, top_k, tile, memory), feeds, made, top_k)


@pytest.mark.parametrize("experts", [128, 129, 512])
@pytest.mark.parametrize("kind", [KINDS[0], ("linear", "group"), CODES[0]])
def test_many_experts_take_several_launches(on_host: Native, kind: tuple[str, ...], experts: int) -> None:
    case = {**SHORT, "T": 6, "E": experts, "H": 32, "F": 32}
    for skew in ("even", "one expert"):
        feeds, made, top_k = feeds_of({**case, "skew": skew}, kind, "bf16")
        rows = run(on_host, feeds, made, top_k, DIRECT_8, Memory())
        check_rows(rows, feeds, made, top_k)


def one_hot(
    rng: np.random.Generator, kind: tuple[str, ...], compute: str, scales: str
) -> tuple[dict[str, Array], Weights, int]:
    """Products without sums: a row has one number that is not 0, and each expert makes one hidden value that is not."""
    experts, tokens = 4, 96
    case = {"T": tokens, "E": experts, "K": 1, "H": 96, "F": 64, "skew": "even", "seed": 7}
    feeds, made, top_k = feeds_of(case, kind, compute, scales)
    feeds["x"][:] = 0
    feeds["x"][np.arange(tokens), rng.permutation(tokens)] = rng.normal(size=tokens).astype(FORMATS[compute])
    for e in range(experts):
        own = int(rng.integers(64))
        if kind[0] == "linear":
            only = np.zeros_like(made.weights[e]) if kind[1] != "group" else pack(np.zeros((64, 96), np.int64))
            only[own] = made.weights[e][own]
            made.weights[e] = only
        else:
            gate = made.weights[0][e] if kind[0] == "fused" else made.weights[e]
            gate[:, [f for f in range(64) if f != own]] = 0
    return feeds, made, top_k


@pytest.mark.parametrize("kind", [KINDS[0], *ALONG_N, *DEQUANTISED])
@pytest.mark.parametrize(("compute", "scales"), list(itertools.product(HALVES, ["fp32", *HALVES])))
def test_weights_are_scaled_and_rounded_as_by_the_oracle(
    on_host: Native, kind: tuple[str, ...], compute: str, scales: str
) -> None:
    """To the bit but for exp(), whatever the scales' type: those of INT4 that x's type holds take another way."""
    feeds, made, top_k = one_hot(np.random.default_rng(3), kind, compute, scales)
    expected = by_oracle(feeds, made, top_k)
    assert (expected != 0).mean() > 0.7
    for tile in tiles_of(kind):
        rows = run(on_host, feeds, made, top_k, tile, Memory())
        assert (rows == expected).mean() > 0.99


@pytest.mark.parametrize("compute", HALVES)
def test_int4_scales_of_all_sizes(on_host: Native, compute: str) -> None:
    """Subnormal, overflowing, infinite and not a number: exact in x's type or not, all are what fp32 makes of them.

    What becomes infinite is NaN in the end, as it is multiplied with the hidden zeros, too.
    """
    rng = np.random.default_rng(5)
    feeds, made, top_k = one_hot(rng, ("linear", "group"), compute, "fp32")
    feeds["scores"][:] = 1
    odd = np.asarray([2.0**-24, 2.0**-133, 3e-39, 1e-45, 65504, 65520, 3e38, np.inf, np.nan, 0.1, 1.0], np.float32)
    for scale in made.scales[-4:]:  # of down
        scale[:] = rng.choice(odd, size=scale.shape)
    with np.errstate(all="ignore"):
        expected = by_oracle(feeds, made, top_k)
    rows = run(on_host, feeds, made, top_k, DIRECT_8, Memory())
    np.testing.assert_array_equal(np.isnan(rows), np.isnan(expected))
    with np.errstate(invalid="ignore"):
        assert ((rows == expected) | np.isnan(expected)).mean() > 0.99
    assert 0.1 < np.isnan(expected).mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_in_its_place(on_host: Native, kind: tuple[str, ...]) -> None:
    """A row that is NaN spoils no other, and a channel's weight no other channel: nothing is read but what is asked."""
    case = {**SHORT, "H": 88, "F": 72}
    for tile in tiles_of(kind):
        feeds, made, top_k = feeds_of(case, kind, "bf16")
        feeds["x"][7, 5] = np.nan
        rows = run(on_host, feeds, made, top_k, tile, Memory())
        np.testing.assert_array_equal(np.isnan(rows).all(1), feeds["permutation"] // top_k == 7)
        assert np.isnan(rows).any(1).sum() == np.isnan(rows).all(1).sum()
        if kind[1] == "group":
            continue
        feeds, made, top_k = feeds_of(case, kind, "bf16")
        down = made.weights[-1][1] if kind[0] == "fused" else made.weights[-2]  # of the second expert
        down[(3, 1) if kind[0] == "linear" else (1, 3)] = np.nan
        rows = run(on_host, feeds, made, top_k, tile, Memory())
        expected = np.zeros(rows.shape, bool)
        expected[feeds["expert_offsets"][1] : feeds["expert_offsets"][2], 3] = True
        np.testing.assert_array_equal(np.isnan(rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_neighbours(on_host: Native, kind: tuple[str, ...]) -> None:
    """A row has the bits that it has alone, and tiles that split K the same way agree."""
    count = 19
    case = {**SHORT, "T": count, "E": 1, "K": 1, "H": 264}
    feeds, made, _ = feeds_of(case, kind, "bf16")
    by_tile = {}
    for tile in tiles_of(kind):
        together = run(on_host, feeds, made, 1, tile, Memory())
        for first, end in [(0, 1), (3, 4), (3, 12), (10, 19)]:
            some = {name: feeds[name][first:end] for name in ("x", "scores")}
            some |= {
                "expert_offsets": np.asarray([0, end - first], np.int32),
                "permutation": np.arange(end - first, dtype=np.int32),
            }
            np.testing.assert_array_equal(run(on_host, some, made, 1, tile, Memory()), together[first:end])
        by_tile[tile] = together.tobytes()
    split_k = tiles_of(kind)[: 2 if kind in ALONG_N else 3]
    assert len({by_tile[tile] for tile in split_k}) == 1


@pytest.mark.parametrize(("kind", "tile"), KINDS_AND_TILES)
def test_bits_do_not_depend_on_the_order_of_threads(on_host: Native, kind: tuple[str, ...], tile: int) -> None:
    feeds, made, top_k = feeds_of({**SHORT, "T": 20, "H": 272}, kind, "fp16")
    seen = set()
    for order in range(4):
        on_host.seed(order)
        seen.add(run(on_host, feeds, made, top_k, tile, Memory()).tobytes())
    assert len(seen) == 1


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 5, 20]),
    top_k=st.integers(1, 3),
    experts=st.sampled_from([3, 4, 40]),
    order=st.booleans(),
    at_start=st.booleans(),
    kind_and_tile=st.sampled_from(KINDS_AND_TILES),
)
@example(seed=1, tokens=20, top_k=3, experts=160, order=False, at_start=False, kind_and_tile=(KINDS[0], DIRECT_8))
def test_broken_indices(
    on_host: Native,
    seed: int,
    tokens: int,
    top_k: int,
    experts: int,
    order: bool,
    at_start: bool,
    kind_and_tile: tuple[tuple[str, ...], int],
) -> None:
    """Each row is NaN, or what an expert that claims it makes of it; whatever memory held before."""
    kind, tile = kind_and_tile
    rng = np.random.default_rng(seed)
    case = {**SHORT, "T": tokens, "K": top_k, "E": experts, "H": 32, "F": 32, "seed": seed}
    feeds, made, _ = feeds_of(case, kind, "bf16")
    rows_count = tokens * top_k
    feeds = broken_feeds(rng, feeds, order)
    results = [run(on_host, feeds, made, top_k, tile, Memory(fill, at_start)) for fill in ALL_FILLS]
    for rows in results[1:]:
        same_numbers(rows, results[0])  # else they depend on stale memory

    exists = (feeds["permutation"] >= 0) & (feeds["permutation"] < rows_count)
    given_offsets = feeds["expert_offsets"].astype(np.int64)
    claims = [[e for e in range(experts) if given_offsets[e] <= i < given_offsets[e + 1]] for i in range(rows_count)]
    lost = np.isnan(results[0].astype(np.float32))
    assert (lost.all(1) == lost.any(1)).all()
    for i in range(rows_count):
        # The first expert whose end lies behind a row has it, if it is not before the first one's start.
        owned = min(max(given_offsets[0], 0), rows_count) <= i < given_offsets.max()
        assert lost[i].all() == (not owned or not exists[i]), (i, claims[i])
        assert not owned or claims[i]
    harmless = {**feeds, "permutation": np.where(exists, feeds["permutation"], 0).astype(np.int32)}
    for e in {e for i in np.flatnonzero(~lost.all(1)) for e in claims[i][:1]}:
        harmless["expert_offsets"] = np.where(np.arange(experts + 1) <= e, 0, rows_count).astype(np.int32)
        mine = [i for i in np.flatnonzero(~lost.all(1)) if claims[i][:1] == [e]]
        if made.form.activations == "none":
            ONE_OP["bf16"].check(results[0][mine], by_oracle(harmless, made, top_k)[mine])
        else:
            bounds = bounds_of(harmless, made, top_k)
            check_between(results[0][mine], type(bounds)(*(bound[mine] for bound in bounds)), np.dtype(FORMATS["bf16"]))


def test_what_is_not_taken(on_host: Native) -> None:
    """Groups of INT4 that 16 bytes straddle, extents that 16 bytes do not divide, weights of another 16-bit type."""
    refused: list[tuple[ExpertsForm, int, int, Any]] = [
        (form_of(("linear", "group"), 3, 16), 96, 64, np.float32),
        (form_of(("linear", "group"), 3, 8), 40, 64, np.float32),
        (form_of(("linear", "tensor"), 3), 72, 64, np.float32),
        (form_of(("linear", "channel", "dynamic"), 3), 64, 72, np.float32),
        (form_of(("linear", "none"), 3), 64, 68, FORMATS["bf16"]),
        (form_of(("fused", "none"), 3), 60, 64, FORMATS["bf16"]),
        (form_of(("linear", "none"), 3), 64, 64, FORMATS["fp16"]),
        (form_of(("fused", "tensor"), 3), 64, 64, np.float32),
    ]
    names = {np.float32: "fp32", FORMATS["bf16"]: "bf16", FORMATS["fp16"]: "fp16"}
    for form, hidden, width, stored in refused:
        feeds, top_k = activations_of({**SHORT, "H": hidden}, "bf16")
        made = make_weights(np.random.default_rng(0), form, hidden, width, names[stored])
        for tile in (DIRECT_8, DIRECT_16, DIRECT_32, DIRECT_64):
            assert on_host.experts(feeds, made, top_k, tactic=tile)[0] == UNSUPPORTED_TACTIC
        assert on_host.experts(feeds, made, top_k, tactic=PLAIN_TACTIC)[0] == OK
    assert made.weights[0].dtype == FP8
