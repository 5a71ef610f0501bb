"""The fifth face of the private ops: the kernels of plugins/native, compiled for the host, against the oracle."""

from __future__ import annotations

import ctypes
import subprocess
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.plugins.forms import FORMATS, FP8, Array, pack
from tests.plugins.native_build import (
    ALL_FILLS,
    CHUNKS,
    INVALID_ARGUMENT,
    NO_KERNELS,
    OK,
    PLAIN,
    TYPE_CODES,
    WORKSPACE_TOO_SMALL,
    CMakeBuild,
    Fenced,
    Memory,
    Native,
    broken,
    cases,
    feeds_of,
    formats,
    memories,
    same_numbers,
    scatter_feeds_of,
)
from tests.plugins.test_faces import logits_of, oracle, same_routing


@pytest.mark.parametrize(
    ("library", "mode"), [("tests/libshuntyard_on_host.so", "host"), ("libshuntyard_plugins.so", "absent")]
)
def test_plugins_do_what_tensorrt_asks(built: CMakeBuild, library: str, mode: str) -> None:
    native = built.directory / "plugins/native"
    command = [str(native / "tests/shuntyard_driver"), str(native / library), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "all is well\n"), done.stdout + done.stderr


@settings(max_examples=150)
@given(case=cases, memory=memories)
@example(case=CHUNKS, memory=PLAIN)
@example(case={**CHUNKS, "skew": "one expert"}, memory=PLAIN)
def test_routing(on_host: Native, case: dict[str, Any], memory: Memory) -> None:
    logits, top_k = logits_of(case)
    status, outputs = on_host.routing(logits, top_k, memory)
    assert status == OK
    same_routing(outputs, oracle.moe_routing(logits, top_k))


def test_routing_ranks_nan_behind_every_number(on_host: Native) -> None:
    rng = np.random.default_rng(0)
    logits = rng.choice([np.nan, -np.inf, -1.0, 0.0, 2.0], size=(40, 6)).astype(np.float32)
    status, (scores, offsets, permutation) = on_host.routing(logits, 4)
    slots = []
    for t, row in enumerate(logits):
        best = sorted(range(6), key=lambda e: (np.isnan(row[e]), 0 if np.isnan(row[e]) else -row[e], e))[:4]
        slots += [(e, 4 * t + k) for k, e in enumerate(best)]
    slots.sort()
    assert status == OK
    assert permutation.tolist() == [slot for _, slot in slots]
    assert offsets.tolist() == [sum(e < bound for e, _ in slots) for bound in range(7)]
    chosen = np.asarray([logits[slot // 4, e] for e, slot in slots])
    np.testing.assert_array_equal(np.isnan(scores), np.isnan(chosen))
    assert np.isnan(chosen).any()


@settings(max_examples=100)
@given(case=cases, compute=formats, memory=memories)
def test_scatter_add(on_host: Native, case: dict[str, Any], compute: str, memory: Memory) -> None:
    feeds, top_k = scatter_feeds_of(case, compute)
    status, out = on_host.scatter_add(feeds, top_k, memory)
    assert status == OK
    same_numbers(out, oracle.moe_scatter_add(*feeds.values(), top_k=top_k))


@pytest.mark.parametrize("compute", FORMATS)
def test_scatter_add_in_place(on_host: Native, compute: str) -> None:
    feeds, top_k = scatter_feeds_of(CHUNKS, compute)
    base, rows, permutation = (Fenced.holding(array) for array in feeds.values())
    types, extents = (TYPE_CODES[feeds["base"].dtype],), (CHUNKS["T"], top_k, CHUNKS["H"])
    workspace = Fenced(on_host.workspace_size("moe_scatter_add", types, extents))
    assert on_host.launch("moe_scatter_add", types, [base, rows, permutation, base], extents, workspace) == OK
    out = base.array(feeds["base"].shape, feeds["base"].dtype)
    same_numbers(out, oracle.moe_scatter_add(*feeds.values(), top_k=top_k))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 5, 40]),
    top_k=st.integers(1, 3),
    compute=formats,
    at_start=st.booleans(),
)
def test_scatter_add_with_broken_indices(
    on_host: Native, seed: int, tokens: int, top_k: int, compute: str, at_start: bool
) -> None:
    """A token is NaN if one of its slots has no row; of two rows for one slot, the host build takes the later."""
    rng = np.random.default_rng(seed)
    feeds, _ = scatter_feeds_of({**CHUNKS, "T": tokens, "K": top_k, "seed": seed}, compute)
    spoiled = rng.uniform(size=tokens * top_k) < rng.choice([0.05, 0.5, 1.0])
    wrong = broken(rng, tokens * top_k, tokens * top_k)
    feeds["permutation"] = np.where(spoiled, wrong, feeds["permutation"]).astype(np.int32)
    row_of_slot = {int(slot): row for row, slot in enumerate(feeds["permutation"])}
    expected = feeds["base"].astype(np.float32)
    for slot in range(tokens * top_k):
        row = row_of_slot.get(slot)
        expected[slot // top_k] += np.nan if row is None else feeds["rows"][row].astype(np.float32)
    for fill in ALL_FILLS:
        status, out = on_host.scatter_add(feeds, top_k, Memory(fill, at_start))
        assert status == OK
        same_numbers(out, expected.astype(FORMATS[compute]))


# -- refused calls

MOST = 2**31 - 1  # rows, which have 32-bit numbers
WIDEST = 65535 * 128  # columns, by the limit of CUDA's grids
REFUSED: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {
    ("moe_routing", ()): [  # T, E, K
        *[(-1, 4, 1), (1, 0, 1), (1, -1, 1), (1, MOST, 1), (1, 4, 0), (1, 4, -1), (1, 4, 5)],
        *[(2**30, 4, 2), (2**62, 4, 4), (MOST, 2**20, 1)],
    ],
    ("moe_scatter_add", (0,)): [  # T, K, H
        *[(-1, 1, 2), (1, 0, 2), (1, 1, 0), (1, 1, WIDEST + 1), (2**30, 2, 2), (2**62, 4, 2)]
    ],
    **{("moe_scatter_add", (type_,)): [(0, 1, 2), (1, 1, 2)] for type_ in (3, -1)},
}


@pytest.mark.parametrize(
    ("name", "types", "extents"), [(*call, extents) for call, refused in REFUSED.items() for extents in refused]
)
def test_invalid_arguments(on_host: Native, name: str, types: tuple[int, ...], extents: tuple[int, ...]) -> None:
    """Refused before anything is touched: the tensors here have no bytes."""
    tensors = [Fenced(0) for _ in range(4)]
    assert on_host.launch(name, types, tensors, extents, Fenced(1 << 16)) == INVALID_ARGUMENT
    assert on_host.workspace_size(name, types, extents) <= 1 << 16


@pytest.mark.parametrize("missing", [1, 256])
def test_workspace_too_small(on_host: Native, missing: int) -> None:
    memory = Memory(fill=0x7B, missing=missing)
    logits, top_k = logits_of(CHUNKS)
    routing_status, routed = on_host.routing(logits, top_k, memory)
    experts_status, rows = on_host.experts(*feeds_of(CHUNKS, "fp32", "fp32"), memory)
    scatter_status, out = on_host.scatter_add(scatter_feeds_of(CHUNKS, "fp32")[0], top_k, memory)
    assert [routing_status, experts_status, scatter_status] == [WORKSPACE_TOO_SMALL] * 3
    for untouched in (*routed, rows, out):
        assert set(untouched.tobytes()) == {0x7B}


def test_workspace_grows_with_every_extent(on_host: Native) -> None:
    """The builder reserves for the largest of each extent: no smaller call may need more."""
    for name, types, extents in [
        ("moe_routing", (), (70, 5, 2)),
        ("moe_experts", (1, 1), (70, 5, 2, 33, 9)),
        ("moe_scatter_add", (1,), (70, 2, 8)),
    ]:
        size = on_host.workspace_size(name, types, extents)
        assert size > 0 and size % 256 == 0
        for i in range(len(extents)):
            for more in (1, 100):
                larger = tuple(extent + more * (i == j) for j, extent in enumerate(extents))
                if name != "moe_routing" or larger[2] <= larger[1]:
                    assert on_host.workspace_size(name, types, larger) >= size


def test_library_without_kernels_says_so(without_kernels: Native) -> None:
    logits, top_k = logits_of(CHUNKS)
    assert without_kernels.routing(logits, top_k)[0] == NO_KERNELS
    assert without_kernels.experts(*feeds_of(CHUNKS, "fp16", "bf16"))[0] == NO_KERNELS
    assert without_kernels.scatter_add(scatter_feeds_of(CHUNKS, "fp16")[0], top_k)[0] == NO_KERNELS
    assert b"without CUDA kernels" in without_kernels.library.shuntyard_status_text(NO_KERNELS)


def test_every_status_has_words(on_host: Native) -> None:
    words = [on_host.library.shuntyard_status_text(status) for status in range(-10, 1000)]
    assert all(words)
    assert len(set(words[5:11])) == 6  # the five of the header and "unknown"


# -- conversions


def converted(on_host: Native, name: str, values: Array, dtype: Any) -> Array:
    made = np.zeros(values.shape, dtype)
    pointers = (ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(made.ctypes.data))
    getattr(on_host.library, f"test_{name}")(*pointers, ctypes.c_int64(values.size))
    return made


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_conversions(on_host: Native, name: str, dtype: Any) -> None:
    """Widening of every pattern; narrowing of every pattern, every midpoint and its neighbours, and many others."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = every.astype(np.float32)
    same_numbers(converted(on_host, f"{name}_to_fp32", every, np.float32), wide)
    same_numbers(converted(on_host, f"fp32_to_{name}", wide, dtype), every)

    positive = np.sort(wide[wide >= 0]).astype(np.float64)
    positive[-1] = 2 * positive[-2] - positive[-3]  # in infinity's place, where the next number would be
    middle = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    assert np.isfinite(middle).all()
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
        rng = np.random.default_rng(0)
        random = rng.integers(0, 1 << 32, size=2_000_000, dtype=np.uint32).view(np.float32)
        moderate = (rng.normal(size=500_000) * 2.0 ** rng.integers(-30, 20, size=500_000)).astype(np.float32)
        values = np.concatenate([near, -near, random, moderate])
        same_numbers(converted(on_host, f"fp32_to_{name}", values, dtype), values.astype(dtype))


def test_fp32_to_e4m3(on_host: Native) -> None:
    """Every number and midpoint and its neighbours, and many others; clipped as ml_dtypes is not."""
    every = np.arange(1 << 8, dtype=np.uint8).view(FP8)
    wide = every.astype(np.float32)
    same_numbers(converted(on_host, "fp32_to_e4m3", wide, FP8), every)
    positive = np.sort(wide[wide >= 0]).astype(np.float64)
    middle = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        values = np.concatenate(
            [
                *(middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))),
                np.asarray([447.99, 448, 448.01, 463.9, 464, 464.1, 480, 512, 1e30, np.inf, np.nan, 1e-45], np.float32),
                rng.integers(0, 1 << 32, size=1_000_000, dtype=np.uint32).view(np.float32),
                (rng.normal(size=500_000) * 2.0 ** rng.integers(-14, 10, size=500_000)).astype(np.float32),
            ]
        )
        values = np.concatenate([values, -values])
        same_numbers(converted(on_host, "fp32_to_e4m3", values, FP8), np.clip(values, -448, 448).astype(FP8))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_nan_survives_narrowing(on_host: Native, name: str, dtype: Any) -> None:
    """Also one whose only set bits are below those that are kept: truncation would make it infinite."""
    payloads = np.concatenate([1 << np.arange(23), [0x7FFFFF, 0x400000, 0x1FFF]]).astype(np.uint32)
    bits = np.concatenate([payloads | 0x7F800000, payloads | 0xFF800000]).astype(np.uint32)
    assert np.isnan(converted(on_host, f"fp32_to_{name}", bits.view(np.float32), dtype).astype(np.float32)).all()


def test_every_fp8_code_is_read(on_host: Native) -> None:
    every = np.arange(256, dtype=np.uint8).view(FP8)
    same_numbers(converted(on_host, "e4m3_to_fp32", every, np.float32), every.astype(np.float32))


def test_every_int4_value_is_read_at_every_place(on_host: Native) -> None:
    values = np.stack([np.roll(np.arange(-8, 8), turn) for turn in range(16)])
    made = np.zeros(values.shape, np.float32)
    words = pack(values)
    pointers = (ctypes.c_void_p(words.ctypes.data), ctypes.c_void_p(made.ctypes.data))
    on_host.library.test_int4_to_fp32(*pointers, ctypes.c_int64(words.size))
    np.testing.assert_array_equal(made, values)
