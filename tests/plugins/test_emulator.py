"""What plays the GPU for kernels that use more of one than threads: it computes as a GPU does, and finds faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.forms import FP8, Array
from tests.plugins.native_build import CMakeBuild, Fenced, Native

OPERANDS = (np.float16, ml_dtypes.bfloat16, FP8)
HALF, BFLOAT, E4M3 = range(3)
ALONG_K, ALONG_N = 0, 1
GROUP_PRODUCTS = [
    *(
        (operand, major, columns)
        for operand in (HALF, BFLOAT)
        for major in (ALONG_K, ALONG_N)
        for columns in (128, 256)
    ),
    *((E4M3, ALONG_K, columns) for columns in (64, 128)),
]
FAULTS = {
    "no sync_block": "other numbers",
    "no sync_block before reuse": "other numbers",
    "no sync_warp": "other numbers",
    "lane leaves": "it exits while other lanes of its warp wait for it in sync_warp",
    "lanes part": "it comes to ballot while other lanes of its warp are in sync_warp",
    "part of a warp": "barrier 1 has 16 lanes of warp 0, must have all",
    "counts differ": "barrier 1 for 32 threads, while others wait there for 64",
    "barriers cross": "thread 0 .. 31: sync_some of barrier 1 for 64 threads",
    "outside shared": "its block has written outside of its shared memory",
    "unaligned": "a load of 16 bytes from",
    "unaligned pair": "which its type is not aligned to",
    "block leaves": "of the cluster has exited",
    "no sync_cluster": "other numbers",
    "never initialised": "there is no initialised barrier at",
    "overwritten": "the barrier at 0 was overwritten",
    "one arrival more": "barrier_wait at 0, parity 1",  # the reader has fallen a phase behind
    "one arrival less": "barrier_wait at 8, parity 0",
    "no fence": "no barrier_init_fence has followed",
    "fewer bytes": "what no copy has brought",
    "more bytes": "0 of 1 arrivals pending, 1 bytes awaited",
    "box offset": "a box at 128, must be at a multiple of 1024",
    "early read": "what no copy has brought",
    "early refill": "deadlock",
    "released early": "other numbers",
    "not waited": "products that were not waited for",
    "not committed": "products that were not waited for",
    "committed twice": "there is no product to commit",
    "not begun": "no products_begin since",
    "touched": "thread 7 has written register 3 while a product was working on it",
    "partly shared": "the threads of its group multiply different matrices",
    "registers gone": "that a product was working on are gone",
    "not brought": "what no copy has brought",
    "operands written": "has written operands that a product was reading",
    "operands not begun": "no products_begin since",
    "copy left": "its block ends while a copy to 0 is under way",
    "no acquire": "by a map that its thread has not acquired",
    "acquired by another": "by a map that its thread has not acquired",
    "not published": "by a map in global memory that was not published",
    "map on stack": "a parameter must be a SHUNTYARD_TABLE",
    "none given": "128 .. 383: more_registers",
}
SEEDS = st.integers(0, 2**32)

# The kernel without the fault under many seeds, then with it until it shows.
RUN_FAULT = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
library, number = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
library.test_device(int(sys.argv[3]), 4)
def run(seed, planted):
    library.test_seed(ctypes.c_uint64(seed))
    out = (ctypes.c_float * 4096)()
    assert library.test_fault(number, planted, out) == 0
    return bytes(out)
sound = {run(seed, 0) for seed in range(25)}
assert len(sound) == 1
print("sound", flush=True)
for seed in range(25):
    if run(seed, 1) not in sound:
        print("other numbers")
        break
"""


def pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def words_of(matrix: Array) -> Array:
    """Rows as 32-bit words, as registers hold them."""
    words: Array = np.ascontiguousarray(matrix).view(np.uint32)
    return words


def run_fault(built: CMakeBuild, name: str, capability: int = 90) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which the emulator may end."""
    path = built.directory / "plugins/native/tests/libshuntyard_on_host.so"
    number = list(FAULTS).index(name) + 1
    command = [sys.executable, "-c", RUN_FAULT, str(path), str(number), str(capability)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(built: CMakeBuild, name: str) -> None:
    done = run_fault(built, name)
    assert done.stdout.startswith("sound\n"), done.stderr
    assert FAULTS[name] in done.stdout + done.stderr
    assert done.returncode == (0 if FAULTS[name] == "other numbers" else -6)


def test_every_fault_is_tried(on_host: Native) -> None:
    named = on_host.library.test_fault_name
    named.restype = ctypes.c_char_p
    assert [named(number).decode() for number in range(1, len(FAULTS) + 1)] == list(FAULTS)
    assert named(len(FAULTS) + 1) is None


@pytest.mark.parametrize(("name", "capability"), [("one arrival more", 89), ("no fence", 120), ("none given", 120)])
def test_what_only_hopper_has_is_found_elsewhere(built: CMakeBuild, name: str, capability: int) -> None:
    done = run_fault(built, name, capability)
    assert (done.stdout, done.returncode) == ("", -6)
    assert f"on a device of compute capability {capability}" in done.stderr


@settings(max_examples=25)
@given(seed=SEEDS, operand=st.sampled_from([HALF, BFLOAT, E4M3]))
def test_warp_products(on_host: Native, seed: int, operand: int) -> None:
    rng = np.random.default_rng(seed)
    depth = 32 if operand == E4M3 else 16
    a = rng.normal(size=(16, depth)).astype(OPERANDS[operand])
    b = rng.normal(size=(depth, 8)).astype(OPERANDS[operand])
    d = rng.normal(size=(16, 8)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    on_host.seed(seed)
    words = words_of(a), words_of(b.T)
    assert on_host.library.test_multiply(operand, *map(pointer, words), pointer(d)) == 0
    np.testing.assert_allclose(d, expected, rtol=0, atol=1e-5)


def group_product(
    on_host: Native, operand: int, major: int, a: Array, b: Array, d: Array, stages: int, columns: int
) -> int:
    """d [64, columns] += a [64, K] @ b [K, columns] by TMA and wgmma; returns the status."""
    stored = Fenced.holding(b if major == ALONG_N else b.T), Fenced.holding(a)
    sizes = ctypes.c_int64(a.shape[1]), ctypes.c_int(stages)
    places = ctypes.c_void_p(stored[1].address), ctypes.c_void_p(stored[0].address), pointer(d)
    status: int = on_host.library.test_group_product(operand, major, columns, *places, *sizes)
    return status


@settings(max_examples=60)
@given(seed=SEEDS, shape=st.sampled_from(GROUP_PRODUCTS), chunks=st.integers(1, 45), stages=st.integers(2, 4))
def test_group_products(on_host: Native, seed: int, shape: tuple[int, int, int], chunks: int, stages: int) -> None:
    """Whatever the order of things; a depth of so many 16 bytes, the last block of K being ragged."""
    operand, major, columns = shape
    rng = np.random.default_rng(seed)
    depth = chunks * (16 if operand == E4M3 else 8)
    a = rng.normal(size=(64, depth)).astype(OPERANDS[operand])
    b = rng.normal(size=(depth, columns)).astype(OPERANDS[operand])
    d = rng.normal(size=(64, columns)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    on_host.seed(seed)
    assert group_product(on_host, operand, major, a, b, d, stages, columns) == 0
    np.testing.assert_allclose(d, expected, rtol=0, atol=3e-4)


@settings(max_examples=25)
@given(seed=SEEDS, operand=st.sampled_from([HALF, BFLOAT]), columns=st.sampled_from([64, 128]))
def test_group_products_of_registers(on_host: Native, seed: int, operand: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(64, 64)).astype(OPERANDS[operand])
    b = rng.normal(size=(columns, 64)).astype(OPERANDS[operand])
    d = rng.normal(size=(64, columns)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.T.astype(np.float64)
    on_host.seed(seed)
    stored = Fenced.holding(b)
    words = words_of(a)
    places = pointer(words), ctypes.c_void_p(stored.address), pointer(d)
    assert on_host.library.test_register_product(operand, columns, *places) == 0
    np.testing.assert_allclose(d, expected, rtol=0, atol=1e-4)


def test_hopper_keeps_14_bits_of_e4m3_sums(on_host: Native) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.5, 2, size=size).astype(FP8) for size in ((64, 64), (64, 64)))
    expected = np.zeros((64, 64), np.float32)
    for first in (0, 32):
        for k in range(first, first + 32):
            expected += np.outer(a[:, k].astype(np.float32), b[k].astype(np.float32))
        expected = (expected.view(np.uint32) & np.uint32(0xFFFFFC00)).view(np.float32)
    made = np.zeros((64, 64), np.float32)
    on_host.library.test_hopper_fp8(1)
    try:
        assert group_product(on_host, E4M3, ALONG_K, a, b, made, 2, 64) == 0
    finally:
        on_host.library.test_hopper_fp8(0)
    np.testing.assert_array_equal(made, expected)
    assert (made != a.astype(np.float32) @ b.astype(np.float32)).any()


@settings(max_examples=60)
@given(
    seed=SEEDS,
    size=st.sampled_from([1, 2]),
    columns=st.integers(1, 200),
    rows=st.integers(1, 70),
    padding=st.integers(0, 2),
    box_rows=st.sampled_from([1, 8, 64, 256]),
    column=st.integers(-140, 210),
    row=st.integers(-70, 80),
)
def test_tma_loads(
    on_host: Native, seed: int, size: int, columns: int, rows: int, padding: int, box_rows: int, column: int, row: int
) -> None:
    """A box anywhere, also beside the matrix: there are zeros. Chunk c of row r lies at chunk c ^ (r % 8)."""
    rng = np.random.default_rng(seed)
    pitch = (-(-columns * size // 16) + padding) * 16
    dtype = (np.uint8, np.uint16)[size - 1]
    matrix = rng.integers(1, 255, size=(rows, pitch // size)).astype(dtype)
    wide = 128 // size
    box = np.zeros((box_rows, wide), dtype)
    for i, j in np.ndindex(box_rows, wide):
        if 0 <= row + i < rows and 0 <= column + j < columns:
            box[i, j] = matrix[row + i, column + j]
    expected = np.empty((box_rows, 8, 16), np.uint8)
    chunks = box.view(np.uint8).reshape(box_rows, 8, 16)
    for i, c in np.ndindex(box_rows, 8):
        expected[i, c ^ (i % 8)] = chunks[i, c]
    # The last row's padding is not there: what lies beside the matrix must not be read.
    stored = Fenced.holding(matrix.view(np.uint8).reshape(-1)[: pitch * (rows - 1) + columns * size], at_start=True)
    made = Fenced(expected.size)
    on_host.seed(seed)
    extents = (ctypes.c_int64(value) for value in (columns, rows, pitch))
    places = ctypes.c_void_p(stored.address), ctypes.c_void_p(made.address)
    assert on_host.library.test_tma_load(size, places[0], *extents, box_rows, column, row, places[1]) == 0
    np.testing.assert_array_equal(made.bytes, expected.reshape(-1))


@pytest.mark.parametrize(
    "changed",
    [
        *({"size": 4}, {"columns": 0}, {"rows": 0}, {"pitch": 72}, {"pitch": 32}, {"pitch": 2**40}),
        *({"box_rows": 0}, {"box_rows": 257}, {"shift": 8}),
    ],
)
def test_maps_that_a_driver_refuses(on_host: Native, changed: dict[str, int]) -> None:
    given_ = {"size": 2, "columns": 32, "rows": 4, "pitch": 64, "box_rows": 8, "shift": 0, **changed}
    stored = Fenced(4096, at_start=True)
    extents = (ctypes.c_int64(given_[name]) for name in ("columns", "rows", "pitch"))
    matrix = ctypes.c_void_p(stored.address + given_["shift"])
    status = on_host.library.test_tma_load(given_["size"], matrix, *extents, given_["box_rows"], 0, 0, None)
    assert status == 1


@settings(max_examples=25)
@given(seed=SEEDS)
def test_warps_exchange(on_host: Native, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**24, size=32).astype(np.uint32)
    lanes = rng.integers(0, 32, size=32).astype(np.int32)
    out = np.zeros((12, 32), np.uint32)
    on_host.seed(seed)
    assert on_host.library.test_exchange(pointer(values), pointer(lanes), pointer(out)) == 0
    every = np.arange(32)
    floats = values.astype(np.float32)
    matching = (values[:, None] % 7 == values[None, :] % 7) * (1 << every)
    both = [[*int(v).to_bytes(4, "little"), *int(~v & 0xFFFFFFFF).to_bytes(4, "little")] for v in map(int, values)]
    permuted = []
    for lane, value in enumerate(map(int, values)):
        selector = lane * 0x1111 ^ value >> 16
        chosen = [selector >> 4 * i & 0xF for i in range(4)]
        picked = [both[lane][c & 7] if c < 8 else 0xFF * (both[lane][c & 7] >> 7) for c in chosen]
        permuted.append(int.from_bytes(bytes(picked), "little"))
    with np.errstate(over="ignore"):
        halves, bfloats = (
            floats.astype(dtype).view(np.uint16) | (-floats).astype(dtype).view(np.uint16).astype(np.uint32) << 16
            for dtype in (np.float16, ml_dtypes.bfloat16)
        )
    expected: list[Any] = [
        *(values[lanes], floats[lanes].view(np.uint32), values[every ^ 5], floats[every ^ 16].view(np.uint32)),
        values[np.where(every < 3, every, every - 3)],
        np.full(32, int(((values % 3 == 0) * (1 << every)).sum())),
        *(matching.sum(1), np.full(32, values.max()), np.full(32, values.min()), permuted, halves, bfloats),
    ]
    np.testing.assert_array_equal(out, np.asarray(expected, np.uint32))


@pytest.mark.parametrize(
    ("launch", "status"),
    [
        *(((3, 64, 1, 0), 0), ((16, 1024, 16, 0), 0), ((2, 1024, 2, 227 * 1024), 0)),
        *(((0, 64, 1, 0), 9), ((1, 0, 1, 0), 9), ((1, 1056, 1, 0), 9), ((1, 33, 1, 0), 9)),
        *(((3, 64, 2, 0), 9), ((17, 64, 17, 0), 9), ((1, 64, 1, 227 * 1024 + 1), 1)),
    ],
)
def test_launches(on_host: Native, launch: tuple[int, int, int, int], status: int) -> None:
    """CUDA's limits, and whole warps."""
    grid, block, cluster, shared = launch
    assert on_host.library.test_launch(grid, block, cluster, ctypes.c_int64(shared)) == status


def test_launches_elsewhere(on_host: Native) -> None:
    on_host.library.test_device(89, 100)
    try:
        assert on_host.library.test_launch(2, 64, 2, ctypes.c_int64(0)) == 9
        assert on_host.library.test_launch(2, 64, 1, ctypes.c_int64(99 * 1024)) == 0
        assert on_host.library.test_launch(2, 64, 1, ctypes.c_int64(99 * 1024 + 1)) == 1
    finally:
        on_host.library.test_device(90, 4)
