"""Builds plugins/native for tests, and calls its C interface on memory that shows every stray access."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from bench.kernels.ours import ExpertWeights as ExpertWeights  # the tests of this folder have it from here
from shuntyard.plugins import contract
from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.forms import FORMATS, FP8, Array, Weights, fitting, make_weights
from tests.plugins.test_experts import activations_of
from tests.plugins.test_faces import logits_of, oracle, sizes

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "plugins" / "native"

OK, INVALID_ARGUMENT, WORKSPACE_TOO_SMALL, NO_KERNELS, UNSUPPORTED_TACTIC = 0, -1, -2, -3, -4  # of shuntyard_plugins.h
BY_SHAPE, PLAIN_TACTIC, DIRECT_8, DIRECT_16, DIRECT_32, DIRECT_64, HOPPER_64, HOPPER_128, HOPPER_WIDE = range(9)
"""Tactics."""
TYPE_CODES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(ml_dtypes.bfloat16): 2,
    np.dtype(FP8): 3,
    np.dtype(np.int32): 4,
}
_PROT_NONE = 0  # mmap does not name it


def find_tool(name: str) -> str | None:
    """A program of this environment, active or not, else of PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


class CMakeBuild:
    """A build directory of the root CMakeLists.txt, configured without CUDA: ``status`` and ``configured`` say how."""

    def __init__(self, directory: Path, *definitions: str) -> None:
        cmake, ninja, make = (find_tool(name) for name in ("cmake", "ninja", "make"))
        compilers = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)]
        if cmake is None or not compilers or (ninja is None and make is None):
            pytest.skip(f"cmake: {cmake}, ninja: {ninja}, make: {make}, C++ compilers: {compilers}; cannot build")
        self.directory, self._cmake = directory, cmake
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        options = ["-DSHUNTYARD_CUDA=off", *(f"-D{definition}" for definition in definitions)]
        self.status, self.configured = self._run("-S", str(ROOT), "-B", str(directory), *generator, *options)

    def _run(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run([self._cmake, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def build(self, target: str = "all") -> tuple[int, str]:
        """Exit status, and all that was printed."""
        return self._run("--build", str(self.directory), "--target", target, "--parallel", str(os.cpu_count() or 1))


class Fenced:
    """``size`` bytes between pages that cannot be accessed.

    The fence touches the end, or with ``at_start`` the start; what lies between the other side and its fence holds
    a pattern that :meth:`check` looks at.
    """

    _WALL = 0xA5

    def __init__(self, size: int, fill: int = 0xFF, at_start: bool = False) -> None:
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        whole = np.frombuffer(mmap.mmap(-1, inner + 2 * page), np.uint8)
        self._inner = whole[page : page + inner]
        self._inner[:] = self._WALL
        self._first = 0 if at_start else inner - size
        self.bytes = self._inner[self._first : self._first + size]
        self.bytes[:] = fill
        self.address = whole.ctypes.data + page + self._first
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for fence in (whole.ctypes.data, whole.ctypes.data + page + inner):
            failed = protect(ctypes.c_void_p(fence), ctypes.c_size_t(page), _PROT_NONE)
            assert not failed, os.strerror(ctypes.get_errno())

    @classmethod
    def holding(cls, array: Array, at_start: bool = False) -> Fenced:
        """A copy of an array."""
        memory = cls(array.nbytes, at_start=at_start)
        memory.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return memory

    def array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A copy of the content."""
        content: Array = self.bytes.copy().view(dtype).reshape(shape)
        return content

    def check(self) -> None:
        """Fails if something was written beside the content."""
        end = self._first + self.bytes.size
        beside = np.concatenate([self._inner[: self._first], self._inner[end:]])
        assert (beside == self._WALL).all(), "written outside its memory"


@dataclass(frozen=True)
class Memory:
    """What a call's outputs and workspace hold before it, where fences touch, and what the workspace lacks."""

    fill: int = 0xFF  # NaN in every float format, -1 as an integer
    at_start: bool = False
    missing: int = 0


PLAIN = Memory()


# More tokens than the other faces get: none, and enough for the slots to fill several of routing's chunks of 64.
cases = st.builds(
    lambda case, tokens, experts: {**case, "T": tokens, "E": experts},
    sizes,
    st.sampled_from([0, 1, 2, 7, 33, 64, 65, 130]),
    st.one_of(st.integers(1, 17), st.just(300)),
)
formats = st.sampled_from(list(FORMATS))
memories = st.builds(Memory, at_start=st.booleans())
CHUNKS: dict[str, Any] = {"T": 130, "E": 5, "K": 4, "H": 8, "F": 5, "skew": "ties", "seed": 1}
ALL_FILLS = (0xFF, 0x00, 0x7B)  # NaN, zero, and a large number in every float format


def expert_weights(made: Weights, memories: Sequence[Fenced]) -> ExpertWeights:
    """The struct for the three lists, one after the other, that lie in such memory."""
    rest = iter(memories)
    weights, scales, activation_scales = ([next(rest) for _ in arrays] for arrays in made.lists)

    def addresses(memories: Sequence[Fenced]) -> Any:
        return (ctypes.c_void_p * len(memories))(*(memory.address for memory in memories))

    return ExpertWeights(
        contract.LAYOUTS.index(made.form.layout),
        TYPE_CODES[made.weights[0].dtype],
        contract.QUANTIZATIONS.index(made.form.quantization),
        TYPE_CODES[made.scales[0].dtype] if made.scales else -1,
        made.form.group_size,
        addresses(weights),
        addresses(scales) if scales else None,
        contract.ACTIVATIONS.index(made.form.activations),
        TYPE_CODES[made.activation_scales[0].dtype] if activation_scales else -1,
        addresses(activation_scales) if activation_scales else None,
    )


class Native:
    """The C interface of a plugin library; with the host build, arrays take the place of device memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.shuntyard_status_text.restype = ctypes.c_char_p

    def seed(self, number: int) -> None:
        """The order in which the emulator runs threads from here on."""
        self.library.test_seed(ctypes.c_uint64(number))

    def workspace_size(self, name: str, types: tuple[int, ...], sizes: tuple[int, ...], activations: int = 0) -> int:
        """Of a call with these type codes and sizes, in the order of the C function's arguments."""
        query = getattr(self.library, f"shuntyard_{name}_workspace")
        query.restype = ctypes.c_size_t
        if name == "moe_experts":
            tokens, _, top_k, hidden, intermediate = sizes
            codes = (ctypes.c_int(types[0]), ctypes.c_int(activations))
            return int(query(*codes, *map(ctypes.c_int64, (tokens, top_k, hidden, intermediate))))
        return int(query(*map(ctypes.c_int64, sizes if name == "moe_routing" else sizes[:2])))

    def launch(
        self,
        name: str,
        types: tuple[int, ...],
        tensors: list[Fenced],
        sizes: tuple[int, ...],
        workspace: Fenced,
        weights: ExpertWeights | None = None,
        tactic: int = BY_SHAPE,
    ) -> int:
        """The call itself; returns its status. Only experts, who have weights, have tactics."""
        function = getattr(self.library, f"shuntyard_{name}")
        status: int = function(
            *map(ctypes.c_int, types),
            *([] if weights is None else [ctypes.byref(weights)]),
            *(ctypes.c_void_p(tensor.address) for tensor in tensors),
            *map(ctypes.c_int64, sizes),
            *([] if weights is None else [ctypes.c_int(tactic)]),
            ctypes.c_void_p(workspace.address),
            ctypes.c_size_t(workspace.bytes.size),
            None,
        )
        for memory in (*tensors, workspace):
            memory.check()
        return status

    def call(
        self,
        name: str,
        types: tuple[int, ...],
        inputs: list[Array],
        outputs: Sequence[tuple[tuple[int, ...], Any]],
        sizes: tuple[int, ...],
        memory: Memory,
        made: Weights | None = None,
        tactic: int = BY_SHAPE,
    ) -> tuple[int, list[Array]]:
        """Status and outputs of a call whose workspace has just the size asked for; inputs must stay as they are."""
        read = [*inputs, *(made.arrays if made is not None else [])]
        given = [Fenced.holding(array, memory.at_start) for array in read]
        results = [
            Fenced(int(np.prod(shape)) * np.dtype(dtype).itemsize, memory.fill, memory.at_start)
            for shape, dtype in outputs
        ]
        weights = None
        if made is not None:
            weights = expert_weights(made, given[len(inputs) :])
        activations = 0 if weights is None else weights.activations
        size = self.workspace_size(name, types, sizes, activations) - memory.missing
        workspace = Fenced(size, memory.fill, memory.at_start)
        status = self.launch(name, types, [*given[: len(inputs)], *results], sizes, workspace, weights, tactic)
        for before, after in zip(read, given, strict=True):
            assert np.ascontiguousarray(before).tobytes() == after.bytes.tobytes(), "an input was changed"
        return status, [m.array(shape, dtype) for m, (shape, dtype) in zip(results, outputs, strict=True)]

    def routing(self, logits: Array, top_k: int, memory: Memory = PLAIN) -> tuple[int, list[Array]]:
        """``ShuntyardMoeRouting``: status and scores, expert_offsets, permutation."""
        tokens, experts = logits.shape
        rows = tokens * top_k
        outputs = [((rows,), np.float32), ((experts + 1,), np.int32), ((rows,), np.int32)]
        return self.call("moe_routing", (), [logits], outputs, (tokens, experts, top_k), memory)

    def experts(
        self, feeds: dict[str, Array], made: Weights, top_k: int, memory: Memory = PLAIN, tactic: int = BY_SHAPE
    ) -> tuple[int, Array]:
        """``ShuntyardMoeExperts``: status and rows."""
        tokens, hidden = feeds["x"].shape
        experts, width = made.form.experts, made.width
        sizes = (tokens, experts, top_k, hidden, width)
        outputs = [((tokens * top_k, hidden), feeds["x"].dtype)]
        types = (TYPE_CODES[feeds["x"].dtype],)
        status, (rows,) = self.call("moe_experts", types, list(feeds.values()), outputs, sizes, memory, made, tactic)
        return status, rows

    def scatter_add(self, feeds: dict[str, Array], top_k: int, memory: Memory = PLAIN) -> tuple[int, Array]:
        """``ShuntyardMoeScatterAdd``: status and out."""
        tokens, hidden = feeds["base"].shape
        types = (TYPE_CODES[feeds["base"].dtype],)
        outputs = [((tokens, hidden), feeds["base"].dtype)]
        sizes = (tokens, top_k, hidden)
        status, (out,) = self.call("moe_scatter_add", types, list(feeds.values()), outputs, sizes, memory)
        return status, out


def feeds_of(
    case: dict[str, Any], compute: str, stored: str, form: ExpertsForm | None = None
) -> tuple[dict[str, Array], Weights, int]:
    """Inputs of the experts op, its weights, and K."""
    form = form or ExpertsForm(case["E"])
    case = fitting(case, form)
    feeds, top_k = activations_of(case, compute)
    rng = np.random.default_rng(case["seed"])
    return feeds, make_weights(rng, form, case["H"], case["F"], stored, flat_scales=case["seed"] % 2 == 0), top_k


def scatter_feeds_of(case: dict[str, Any], compute: str) -> tuple[dict[str, Array], int]:
    """Inputs of the scatter-add op, and K."""
    logits, top_k = logits_of(case)
    _, _, permutation = oracle.moe_routing(logits, top_k)
    rng = np.random.default_rng(case["seed"])
    feeds: dict[str, Array] = {
        "base": rng.normal(size=(case["T"], case["H"])).astype(FORMATS[compute]),
        "rows": rng.normal(size=(case["T"] * top_k, case["H"])).astype(FORMATS[compute]),
        "permutation": permutation,
    }
    return feeds, top_k


def broken(rng: np.random.Generator, count: int, near: int) -> Array:
    """Indices of which some are right, some just wrong, and some far off."""
    far = rng.integers(-(2**31), 2**31, size=count)
    limits = rng.choice([-(2**31), -1, near, near + 1, 2**31 - 1], size=count)
    close = rng.integers(-3, near + 4, size=count)
    return np.choose(rng.choice(4, size=count, p=[0.1, 0.1, 0.4, 0.4]), [far, limits, close, abs(close) % near]).astype(
        np.int32
    )


def broken_feeds(rng: np.random.Generator, feeds: dict[str, Array], order: bool) -> dict[str, Array]:
    """The experts' inputs with broken indices; the offsets of experts rise with ``order``."""
    rows, offsets = len(feeds["permutation"]), broken(rng, len(feeds["expert_offsets"]), len(feeds["permutation"]))
    return {
        **feeds,
        "expert_offsets": np.sort(offsets) if order else offsets,
        "permutation": broken(rng, rows, rows),
    }


def same_numbers(got: Array, expected: Array) -> None:
    """The same bits, but a NaN may be any NaN."""
    assert got.dtype == expected.dtype
    with np.errstate(invalid="ignore"):  # a signalling NaN
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(got), nan)
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(got[~nan].view(bits), expected[~nan].view(bits))
