"""Tactics of the experts: which there are for a call, which is chosen, and the Hopper family against the oracle."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.plugins.bounds import bounds_of, check_between
from tests.plugins.forms import EVERY_KIND, FORMATS, FP8, Array, Weights, form_of, make_weights
from tests.plugins.native_build import (
    ALL_FILLS,
    BY_SHAPE,
    DIRECT_8,
    DIRECT_16,
    DIRECT_32,
    DIRECT_64,
    HOPPER_64,
    HOPPER_128,
    HOPPER_WIDE,
    INVALID_ARGUMENT,
    OK,
    PLAIN,
    PLAIN_TACTIC,
    TYPE_CODES,
    UNSUPPORTED_TACTIC,
    Fenced,
    Memory,
    Native,
    broken,
    expert_weights,
    feeds_of,
)
from tests.plugins.test_experts import activations_of, by_oracle
from tests.tolerances import ONE_OP

DIRECT = [DIRECT_8, DIRECT_16, DIRECT_32, DIRECT_64]
HOPPER = [HOPPER_64, HOPPER_128]
ALONG_K = [("linear", "none"), ("linear", "tensor", "dynamic"), ("linear", "channel", "dynamic")]
ALONG_K += [("linear", "tensor", "static"), ("linear", "channel", "static")]
HOPPER_KINDS: list[tuple[str, ...]] = [("fused", "none"), ("split", "none"), *ALONG_K]
MIXED_KINDS = [("linear", "tensor"), ("linear", "channel"), ("linear", "group")]  # become 16-bit on their way
HALVES = ["fp16", "bf16"]


def hopper_tactics(kind: tuple[str, ...]) -> list[int]:
    """Wide tiles are an alternative where activations are quantised; elsewhere 128 rows have them anyhow."""
    return [*HOPPER, HOPPER_WIDE] if len(kind) == 3 else HOPPER


WITH_TACTIC = [(kind, tactic) for kind in HOPPER_KINDS for tactic in hopper_tactics(kind)]


@pytest.fixture
def device(on_host: Native) -> Iterator[Any]:
    """Sets the emulated device: its compute capability, its multiprocessors."""

    def become(capability: int, multiprocessors: int = 4) -> None:
        on_host.library.test_device(ctypes.c_int(capability), ctypes.c_int(multiprocessors))

    yield become
    become(90)


def check_rows(rows: Array, feeds: dict[str, Array], made: Weights, top_k: int, compute: str) -> None:
    if made.form.activations == "none":
        ONE_OP[compute].check(rows, by_oracle(feeds, made, top_k))
    else:
        check_between(rows, bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute]))


def tactics_of(native: Native, feeds: dict[str, Array], made: Weights, top_k: int) -> list[int]:
    """What the library says that it has for a call."""
    memories = [Fenced(0) for _ in made.arrays]
    weights = expert_weights(made, memories)
    tokens, hidden = feeds["x"].shape
    found = (ctypes.c_int32 * HOPPER_WIDE)()
    sizes = map(ctypes.c_int64, (tokens, made.form.experts, top_k, hidden, made.width))
    code = ctypes.c_int(TYPE_CODES[feeds["x"].dtype])
    count = native.library.shuntyard_moe_experts_tactics(code, ctypes.byref(weights), *sizes, found)
    return list(found)[:count]


# -- which there are

CASE: dict[str, Any] = {"T": 9, "E": 3, "K": 2, "H": 64, "F": 128, "skew": "even", "seed": 1}


@pytest.mark.parametrize(("compute", "kind"), list(itertools.product(FORMATS, EVERY_KIND)))
def test_every_listed_tactic_runs_and_no_other(on_host: Native, compute: str, kind: tuple[str, ...]) -> None:
    # fitting() cuts extents of INT4 to three and two groups: here, to what these kernels want of it.
    feeds, made, top_k = feeds_of({**CASE, "H": 128, "F": 256}, compute, compute, form_of(kind, 3, 128))
    listed = tactics_of(on_host, feeds, made, top_k)
    expected = {PLAIN_TACTIC}
    layout, quantization = kind[:2]
    if compute != "fp32" and (layout == "linear" or quantization == "none"):
        expected |= set(DIRECT if layout == "linear" else DIRECT[:2])
        expected |= set(hopper_tactics(kind))
    assert set(listed) == expected and listed == sorted(listed)
    for tactic in range(BY_SHAPE, HOPPER_WIDE + 1):
        status, rows = on_host.experts(feeds, made, top_k, tactic=tactic)
        if tactic in {BY_SHAPE, *listed}:
            assert status == OK
            check_rows(rows, feeds, made, top_k, compute)
        else:
            assert status == UNSUPPORTED_TACTIC and set(rows.tobytes()) == {0xFF}
    for tactic in (-1, HOPPER_WIDE + 1):
        assert on_host.experts(feeds, made, top_k, tactic=tactic)[0] == INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("capability", "families"),
    [(80, []), (86, []), (89, DIRECT), (90, [*DIRECT, *HOPPER, HOPPER_WIDE]), (100, DIRECT), (120, DIRECT)],
)
def test_devices_have_their_tactics(on_host: Native, device: Any, capability: int, families: list[int]) -> None:
    device(capability)
    feeds, made, top_k = feeds_of(CASE, "bf16", "bf16", form_of(("linear", "channel", "dynamic"), 3))
    assert tactics_of(on_host, feeds, made, top_k) == [PLAIN_TACTIC, *families]
    status, rows = on_host.experts(feeds, made, top_k)
    assert status == OK
    check_rows(rows, feeds, made, top_k, "bf16")


@pytest.mark.parametrize("kind", [("fused", "none"), ("linear", "none"), ("linear", "channel", "dynamic")])
@pytest.mark.parametrize(("hidden", "width"), [(60, 64), (64, 60)])
def test_odd_extents_have_plain_kernels(on_host: Native, kind: tuple[str, ...], hidden: int, width: int) -> None:
    feeds, made, top_k = feeds_of({**CASE, "H": hidden, "F": width}, "bf16", "bf16", form_of(kind, 3))
    assert tactics_of(on_host, feeds, made, top_k) == [PLAIN_TACTIC]
    status, rows = on_host.experts(feeds, made, top_k)
    assert status == OK
    check_rows(rows, feeds, made, top_k, "bf16")


def test_weights_off_16_bytes_have_plain_kernels(on_host: Native) -> None:
    """What a list of tactics cannot know, a call does: it is refused, or by shape goes to kernels that can."""
    feeds, made, top_k = feeds_of(CASE, "bf16", "bf16", form_of(("linear", "none"), 3))
    tokens, hidden = feeds["x"].shape
    extents = (tokens, 3, top_k, hidden, made.width)
    codes = (TYPE_CODES[feeds["x"].dtype],)
    given = [Fenced.holding(array) for array in feeds.values()]
    # An element more than there is, up to a fence: they start 2 bytes off.
    weights = [Fenced.holding(np.concatenate([w.reshape(-1), w.reshape(-1)[:1]])) for w in made.weights]
    assert all(memory.address % 16 for memory in weights)
    struct = expert_weights(made, weights)
    for tactic, status in {DIRECT_8: UNSUPPORTED_TACTIC, HOPPER_64: UNSUPPORTED_TACTIC, BY_SHAPE: OK}.items():
        rows = Fenced(tokens * top_k * hidden * 2)
        workspace = Fenced(on_host.workspace_size("moe_experts", codes, extents))
        assert on_host.launch("moe_experts", codes, [*given, rows], extents, workspace, struct, tactic) == status
    made_rows = rows.array((tokens * top_k, hidden), feeds["x"].dtype)
    check_rows(made_rows, feeds, made, top_k, "bf16")


def test_every_tactic_has_a_name(on_host: Native) -> None:
    name = on_host.library.shuntyard_tactic_name
    name.restype = ctypes.c_char_p
    names = [name(tactic).decode() for tactic in range(-1, HOPPER_WIDE + 2)]
    assert names[0] == names[-1] == "an unknown tactic" and len(set(names)) == HOPPER_WIDE + 2
    assert names[1] == "by shape" and names[-2].startswith("hopper, 128 rows a wide")


# -- the Hopper family

hopper_cases = st.fixed_dictionaries(
    {
        "T": st.sampled_from([1, 3, 17, 64, 65, 130, 200]),
        "E": st.sampled_from([1, 2, 5, 40]),
        "K": st.integers(1, 3),
        # Around the 64 columns of a box, and the 64 or 128 numbers of a stage; several times round the ring.
        "H": st.sampled_from([16, 64, 80, 128, 144, 528]),
        "F": st.sampled_from([16, 48, 64, 128, 272, 656]),
        "skew": st.sampled_from(["even", "one expert", "ties"]),
        "seed": st.integers(0, 2**16),
    }
)
ROUND_THE_RING: dict[str, Any] = {"T": 150, "E": 3, "K": 1, "H": 784, "F": 272, "skew": "one expert", "seed": 3}


@settings(max_examples=60)
@given(
    case=hopper_cases,
    with_tactic=st.sampled_from(WITH_TACTIC),
    compute=st.sampled_from(HALVES),
    order=st.integers(0, 2**16),
    at_start=st.booleans(),
)
@example(case=ROUND_THE_RING, with_tactic=(HOPPER_KINDS[0], HOPPER_64), compute="bf16", order=1, at_start=False)
@example(case=ROUND_THE_RING, with_tactic=(HOPPER_KINDS[-1], HOPPER_128), compute="fp16", order=2, at_start=False)
@example(case=ROUND_THE_RING, with_tactic=(HOPPER_KINDS[3], HOPPER_WIDE), compute="fp16", order=3, at_start=False)
@example(case=ROUND_THE_RING, with_tactic=(HOPPER_KINDS[-1], HOPPER_WIDE), compute="bf16", order=4, at_start=False)
def test_hopper(
    on_host: Native,
    case: dict[str, Any],
    with_tactic: tuple[tuple[str, ...], int],
    compute: str,
    order: int,
    at_start: bool,
) -> None:
    kind, tactic = with_tactic
    case = {**case, "K": min(case["K"], case["E"])}
    feeds, made, top_k = feeds_of(case, compute, compute, form_of(kind, case["E"]))
    on_host.seed(order)
    status, rows = on_host.experts(feeds, made, top_k, Memory(at_start=at_start), tactic)
    assert status == OK
    check_rows(rows, feeds, made, top_k, compute)


def feeds_of_whole_blocks(
    case: dict[str, Any], compute: str, stored: str, kind: tuple[str, ...], group_size: int
) -> tuple[dict[str, Array], Weights, int]:
    """As feeds_of, INT4 with all of the case's extents."""
    form = form_of(kind, case["E"], group_size)
    feeds, top_k = activations_of(case, compute)
    return feeds, make_weights(np.random.default_rng(case["seed"]), form, case["H"], case["F"], stored), top_k


@settings(max_examples=30)
@given(
    case=hopper_cases,
    blocks=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kind=st.sampled_from(MIXED_KINDS),
    group_size=st.sampled_from([32, 64, 128]),
    compute=st.sampled_from(HALVES),
    stored=st.sampled_from(list(FORMATS)),
    tactic=st.sampled_from(HOPPER),
    order=st.integers(0, 2**16),
)
@example(
    case={**ROUND_THE_RING, "E": 2},
    blocks=(7, 7),
    kind=("linear", "group"),
    group_size=32,
    compute="bf16",
    stored="bf16",
    tactic=HOPPER_128,
    order=1,
)
def test_hopper_with_weights_that_become_16_bit(
    on_host: Native,
    case: dict[str, Any],
    blocks: tuple[int, int],
    kind: tuple[str, ...],
    group_size: int,
    compute: str,
    stored: str,
    tactic: int,
    order: int,
) -> None:
    """Extents are whole blocks, of 64 numbers or of 128 of INT4; scales may be of X, and are multiplied in X then."""
    unit = 128 if kind[1] == "group" else 64
    case = {**case, "K": min(case["K"], case["E"]), "H": unit * blocks[0], "F": unit * blocks[1]}
    feeds, made, top_k = feeds_of_whole_blocks(case, compute, stored, kind, group_size)
    on_host.seed(order)
    status, rows = on_host.experts(feeds, made, top_k, PLAIN, tactic)
    assert status == OK
    check_rows(rows, feeds, made, top_k, compute)


@pytest.mark.parametrize("kind", MIXED_KINDS)
@pytest.mark.parametrize(("hidden", "width"), [(96, 128), (128, 96)])
def test_hopper_leaves_broken_blocks_to_others(on_host: Native, kind: tuple[str, ...], hidden: int, width: int) -> None:
    feeds, made, top_k = feeds_of_whole_blocks({**CASE, "H": hidden, "F": width}, "bf16", "bf16", kind, 32)
    assert tactics_of(on_host, feeds, made, top_k) == [PLAIN_TACTIC, *DIRECT]


@pytest.mark.parametrize("kind", [("fused", "none"), ("linear", "none"), ("linear", "channel", "static")])
def test_hopper_goes_through_tall_groups_of_tiles(on_host: Native, kind: tuple[str, ...]) -> None:
    """More than 16 tiles of rows: the order of tiles is in groups then, the last of them shorter."""
    case = {"T": 2200, "E": 2, "K": 1, "H": 64, "F": 160, "skew": "one expert", "seed": 0}
    feeds, made, top_k = feeds_of(case, "bf16", "bf16", form_of(kind, 2))
    for tactic in hopper_tactics(kind):
        status, rows = on_host.experts(feeds, made, top_k, tactic=tactic)
        assert status == OK
        check_rows(rows, feeds, made, top_k, "bf16")


@pytest.mark.parametrize(("kind", "tactic"), [*WITH_TACTIC, *itertools.product(MIXED_KINDS, HOPPER)])
def test_hopper_gives_the_same_bits_in_any_order(
    on_host: Native, device: Any, kind: tuple[str, ...], tactic: int
) -> None:
    """Of threads, and with blocks for all tiles, a few, or one."""
    case = {**ROUND_THE_RING, "T": 90, "H": 768, "F": 384}
    feeds, made, top_k = feeds_of_whole_blocks(case, "bf16", "bf16", kind, 32)
    seen = set()
    for order, multiprocessors in enumerate((1, 3, 132)):
        on_host.seed(order)
        device(90, multiprocessors)
        status, rows = on_host.experts(feeds, made, top_k, tactic=tactic)
        assert status == OK
        seen.add(rows.tobytes())
    assert len(seen) == 1


@settings(max_examples=60)
@given(
    random=st.integers(0, 2**16),
    kind=st.sampled_from(
        [
            ("fused", "none"),
            ("linear", "channel", "dynamic"),
            ("linear", "tensor", "static"),
            ("linear", "channel"),
            ("linear", "group"),
        ]
    ),
    tactic=st.sampled_from([PLAIN_TACTIC, DIRECT_8, DIRECT_64, HOPPER_64, HOPPER_128]),
    at_start=st.booleans(),
)
def test_broken_indices(on_host: Native, random: int, kind: tuple[str, ...], tactic: int, at_start: bool) -> None:
    """Whatever they hold, nothing outside is touched (the fences), a row without an expert or a token is NaN, and any
    other is of the expert that all kernels agree on: offsets count for no less than those before them."""
    rng = np.random.default_rng(random)
    case = {**CASE, "T": 30, "K": 1, "H": 128, "seed": random}
    feeds, made, top_k = feeds_of_whole_blocks(case, "bf16", "bf16", kind, 32)
    tactic = DIRECT_8 if tactic == DIRECT_64 and kind[0] == "fused" else tactic
    feeds["expert_offsets"] = broken(rng, 4, 30) if random % 2 else rng.integers(0, 31, 4).astype(np.int32)
    feeds["permutation"] = np.where(rng.uniform(size=30) < 0.3, broken(rng, 30, 30), feeds["permutation"])
    feeds["permutation"] = feeds["permutation"].astype(np.int32)
    offsets = np.maximum.accumulate(np.clip(feeds["expert_offsets"], 0, 30))
    exists = (feeds["permutation"] >= 0) & (feeds["permutation"] < 30)
    owned = (np.arange(30) >= offsets[0]) & (np.arange(30) < offsets[-1]) & exists
    sound = {**feeds, "expert_offsets": offsets, "permutation": np.where(exists, feeds["permutation"], 0)}
    for fill in ALL_FILLS:
        status, rows = on_host.experts(feeds, made, top_k, Memory(fill, at_start), tactic)
        assert status == OK
        assert np.isnan(rows[~owned].astype(np.float32)).all()
        if made.form.activations == "none":
            expected = by_oracle({**sound, "permutation": sound["permutation"].astype(np.int32)}, made, top_k)
            ONE_OP["bf16"].check(rows[owned], expected[owned])
        else:
            bounds = bounds_of(sound, made, top_k)
            check_between(rows[owned], type(bounds)(*(bound[owned] for bound in bounds)), np.dtype(FORMATS["bf16"]))


def cut_off(sums: Array) -> Array:
    """fp32 numbers to 14 bits, towards zero, as FP8 units of Hopper keep their sums."""
    cut: Array = (sums.astype(np.float32).view(np.uint32) & ~np.uint32(0x3FF)).view(np.float32)
    return cut


@pytest.mark.parametrize("tactic", [*HOPPER, HOPPER_WIDE])
def test_fp8_sums_move_on_before_they_lose_much(on_host: Native, tactic: int) -> None:
    """On units that keep 14 bits, where all terms are positive and so every loss adds up; H / 32 products a sum."""
    hidden, width = 4096, 64
    form = form_of(("linear", "tensor", "dynamic"), 1)
    rng = np.random.default_rng(0)
    shapes = form.weight_shapes(hidden, width)
    # Gates so large that SwiGLU passes them, numbers whose sums need all the bits.
    weights = [np.asarray(rng.uniform(1, 448, size=shape), FP8) for shape in shapes]
    made = Weights(form, weights, [np.full(1, 2.0**-16, np.float32)] * 3)
    feeds, _ = activations_of({**CASE, "T": 4, "E": 1, "K": 1, "H": hidden, "F": width}, "fp16")
    feeds["x"] = np.asarray(rng.uniform(0.5, 1, size=(4, hidden)), np.float16)
    feeds["scores"] = np.ones(4, np.float32)
    status, exact = on_host.experts(feeds, made, 1, PLAIN, tactic)
    on_host.library.test_hopper_fp8(1)
    try:
        again, rows = on_host.experts(feeds, made, 1, PLAIN, tactic)
    finally:
        on_host.library.test_hopper_fp8(0)
    assert (status, again) == (OK, OK)
    lost = 1 - rows.astype(np.float64) / exact
    # The first product alone would lose more if nothing moved on, and it counts twice.
    terms = (feeds["x"].astype(np.float32) * 448).astype(FP8).astype(np.float32) * weights[0][0].astype(np.float32)
    total = np.zeros(4, np.float32)
    for step in range(0, hidden, 32):
        total = cut_off(total + terms[:, step : step + 32].sum(1))
    unmoved = 1 - total / terms.sum(1)
    assert abs(lost.mean()) < 1e-3 < unmoved.min(), (lost, unmoved)


def test_no_tokens(on_host: Native) -> None:
    feeds, made, top_k = feeds_of({**CASE, "T": 0}, "bf16", "bf16", form_of(("linear", "none"), 3))
    for tactic in (BY_SHAPE, PLAIN_TACTIC, DIRECT_8, HOPPER_64):
        assert on_host.experts(feeds, made, top_k, PLAIN, tactic)[0] == OK
