"""Routing and scatter-add on every kind of device, whatever the order in which their threads run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.plugins.forms import FORMATS, Array
from tests.plugins.native_build import (
    ALL_FILLS,
    OK,
    CMakeBuild,
    Fenced,
    Memory,
    Native,
    formats,
    memories,
    same_numbers,
)

DEVICES = {"ada": (89, 3), "hopper": (90, 132), "slice of hopper": (90, 16), "blackwell": (120, 170)}
SEEDS = st.integers(0, 2**32)
LOGITS = ("normal", "ties", "special", "one expert", "NaN alone")

ROUTE_TWICE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.test_device(90, 132)
library.test_largest_cluster(8)
given = sys.stdin.buffer.read()
logits = (ctypes.c_char * len(given)).from_buffer_copy(given)
scores, permutation, offsets, workspace = ((ctypes.c_int32 * 20000)() for _ in range(4))
sizes = [ctypes.c_int64(size) for size in (8500, 16, 1)]
for _ in range(2):
    places = logits, scores, offsets, permutation
    assert library.shuntyard_moe_routing(*places, *sizes, workspace, ctypes.c_size_t(80000), None) == 0
    sys.stdout.buffer.write(bytes(permutation)[: 4 * 8500])
"""


@pytest.fixture(autouse=True, scope="module")
def usual_device(on_host: Native) -> Iterator[None]:
    yield
    on_host.library.test_device(90, 4)
    on_host.seed(1)


def play(on_host: Native, device: str, seed: int) -> None:
    on_host.library.test_device(*DEVICES[device])
    on_host.seed(seed)


def logits_like(rng: np.random.Generator, kind: str, tokens: int, experts: int) -> Array:
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "special":
        logits = rng.choice(np.asarray([np.nan, -np.inf, np.inf, -0.0, 0.0, 1e-45, -3e38], np.float32), logits.shape)
    elif kind == "one expert":
        logits[:, rng.integers(experts)] += 1000
    elif kind == "NaN alone":
        logits[:] = np.nan
    return logits


def routed(logits: Array, top_k: int) -> tuple[Array, Array, Array]:
    """Scores, offsets and permutation: numbers before NaN, larger ones first, lower experts first among equals."""
    experts = logits.shape[1]
    index = np.broadcast_to(np.arange(experts), logits.shape)
    missing = np.isnan(logits)
    best = np.lexsort((index, -np.where(missing, 0, logits), missing), axis=-1)[:, :top_k].reshape(-1)
    permutation = np.argsort(best, kind="stable").astype(np.int32)
    offsets = np.searchsorted(best[permutation], np.arange(experts + 1)).astype(np.int32)
    chosen = logits[permutation // top_k, best[permutation]].astype(np.float64)
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-chosen))).astype(np.float32), offsets, permutation


def same_routes(on_host: Native, logits: Array, top_k: int, memory: Memory) -> None:
    status, (scores, offsets, permutation) = on_host.routing(logits, top_k, memory)
    expected = routed(logits, top_k)
    assert status == OK
    np.testing.assert_array_equal(offsets, expected[1])
    np.testing.assert_array_equal(permutation, expected[2])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6, atol=1e-38)


@settings(max_examples=150)
@given(
    seed=SEEDS,
    device=st.sampled_from(list(DEVICES)),
    tokens=st.sampled_from([0, 1, 3, 31, 32, 100, 257, 600, 2100]),
    experts=st.sampled_from([1, 2, 4, 5, 8, 13, 16, 24, 32, 33, 64, 100, 128, 200, 256, 300, 384, 511, 512, 513, 640]),
    top_k=st.integers(1, 9),
    kind=st.sampled_from(LOGITS),
    memory=memories,
)
@example(seed=5, device="hopper", tokens=8500, experts=16, top_k=1, kind="ties", memory=Memory())  # 16 blocks
@example(seed=6, device="hopper", tokens=300, experts=512, top_k=8, kind="normal", memory=Memory())
@example(seed=7, device="blackwell", tokens=4200, experts=16, top_k=2, kind="normal", memory=Memory())  # 8 blocks
@example(seed=8, device="ada", tokens=4200, experts=16, top_k=4, kind="ties", memory=Memory())  # slots in workspace
@example(seed=9, device="hopper", tokens=3, experts=512, top_k=512, kind="special", memory=Memory())
@example(seed=9, device="hopper", tokens=9, experts=40, top_k=40, kind="special", memory=Memory())
def test_routing(
    on_host: Native, seed: int, device: str, tokens: int, experts: int, top_k: int, kind: str, memory: Memory
) -> None:
    top_k = min(top_k, experts)
    assume(tokens * experts <= 160_000 and tokens * top_k <= 20_000)
    play(on_host, device, seed)
    same_routes(on_host, logits_like(np.random.default_rng(seed), kind, tokens, experts), top_k, memory)


@pytest.mark.parametrize("experts", [16, 128])
def test_routing_of_logits_between_quads(on_host: Native, experts: int) -> None:
    """An address that is no multiple of 16, where the number of experts is one of 4."""
    logits = logits_like(np.random.default_rng(0), "normal", 50, experts)
    shifted = Fenced(logits.nbytes + 4)
    shifted.bytes[:-4] = logits.reshape(-1).view(np.uint8)
    given_ = Fenced(0)
    given_.address = shifted.address
    assert shifted.address % 16 == 12
    outputs = [Fenced(size) for size in (50 * 2 * 4, (experts + 1) * 4, 50 * 2 * 4)]
    workspace = Fenced(on_host.workspace_size("moe_routing", (), (50, experts, 2)))
    assert on_host.launch("moe_routing", (), [given_, *outputs], (50, experts, 2), workspace) == OK
    _, offsets, permutation = routed(logits, 2)
    np.testing.assert_array_equal(outputs[1].bytes.view(np.int32), offsets)
    np.testing.assert_array_equal(outputs[2].bytes.view(np.int32), permutation)


def test_routing_where_clusters_are_small(built: CMakeBuild) -> None:
    """In a process of its own, as a device that has refused 16 blocks is not asked again: here, twice in one launch."""
    path = built.directory / "plugins/native/tests/libshuntyard_on_host.so"
    logits = logits_like(np.random.default_rng(3), "ties", 8500, 16)
    command = [sys.executable, "-c", ROUTE_TWICE, str(path)]
    done = subprocess.run(command, input=logits.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.int32), np.tile(routed(logits, 1)[2], 2))


def added(feeds: dict[str, Array], top_k: int) -> Array:
    """Of two rows for one slot the later counts, a slot without a row is NaN."""
    base, rows, permutation = feeds.values()
    slots = len(permutation)
    row_of = np.full(slots, -1)
    inside = np.flatnonzero((permutation >= 0) & (permutation < slots))
    np.maximum.at(row_of, permutation[inside], inside)
    total = base.astype(np.float32)
    for k in range(top_k):
        row = row_of[k::top_k]
        with np.errstate(over="ignore", invalid="ignore"):
            total += np.where((row < 0)[:, None], np.float32(np.nan), rows[row].astype(np.float32))
    with np.errstate(over="ignore"):
        return total.astype(base.dtype)


def feeds_like(rng: np.random.Generator, tokens: int, top_k: int, hidden: int, compute: str) -> dict[str, Any]:
    def numbers(rows: int) -> Array:
        made: Array = rng.normal(size=(rows, hidden)).astype(FORMATS[compute])
        return made

    slots = tokens * top_k
    return {
        "base": numbers(tokens),
        "rows": numbers(slots),
        "permutation": rng.permutation(slots).astype(np.int32),
    }


@settings(max_examples=100)
@given(
    seed=SEEDS,
    device=st.sampled_from(list(DEVICES)),
    tokens=st.sampled_from([1, 2, 7, 60, 333, 1001]),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([1, 3, 4, 8, 12, 16, 40, 64, 131, 520, 1032]),
    compute=formats,
    spoiled=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    at_start=st.booleans(),
)
@example(seed=1, device="ada", tokens=60, top_k=300, hidden=2, compute="bf16", spoiled=0.1, at_start=True)
@example(seed=2, device="hopper", tokens=1, top_k=13000, hidden=1, compute="fp32", spoiled=0.0, at_start=False)
@example(seed=3, device="ada", tokens=33000, top_k=2, hidden=1, compute="fp16", spoiled=0.0, at_start=False)
@example(seed=4, device="ada", tokens=66000, top_k=1, hidden=8, compute="bf16", spoiled=0.0, at_start=False)
def test_scatter_add(
    on_host: Native,
    seed: int,
    device: str,
    tokens: int,
    top_k: int,
    hidden: int,
    compute: str,
    spoiled: float,
    at_start: bool,
) -> None:
    assume(tokens * top_k * hidden <= 150_000 or tokens > 30_000)
    rng = np.random.default_rng(seed)
    feeds = feeds_like(rng, tokens, top_k, hidden, compute)
    slots = tokens * top_k
    wrong = rng.uniform(size=slots) < spoiled
    far = rng.integers(-(2**31), 2**31, size=slots)
    near = rng.integers(-3, slots + 3, size=slots)
    feeds["permutation"] = np.where(wrong, np.where(rng.uniform(size=slots) < 0.3, far, near), feeds["permutation"])
    feeds["permutation"] = feeds["permutation"].astype(np.int32)
    expected = added(feeds, top_k)
    play(on_host, device, seed)
    for fill in ALL_FILLS if spoiled else ALL_FILLS[:1]:
        status, out = on_host.scatter_add(feeds, top_k, Memory(fill, at_start))
        assert status == OK
        same_numbers(out, expected)


def test_more_rows_than_are_searched_with_broken_indices(on_host: Native) -> None:
    """Which of two rows for one slot counts is open there; a slot without a row is NaN, whatever memory held."""
    rng = np.random.default_rng(0)
    feeds = feeds_like(rng, 66_000, 1, 1, "fp32")
    feeds["permutation"][rng.uniform(size=66_000) < 0.1] = rng.choice([-1, 66_000, 2**31 - 1, -(2**31)])
    expected = added(feeds, 1)
    assert np.isnan(expected).any()
    for fill in ALL_FILLS:
        status, out = on_host.scatter_add(feeds, 1, Memory(fill))
        assert status == OK
        same_numbers(out, expected)
