"""Cases as the conformance runner reads them, and what it writes: plugins/native/conformance/cases.h has the format.

Most tensors are not stored but made, here and there, from a seed and an element's number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]

OPS = ("ShuntyardMoeRouting", "ShuntyardMoeExperts", "ShuntyardMoeScatterAdd")
MAGIC = b"SHYCASES" + struct.pack("<I", 1)
RUNS_MAY_DIFFER = 1

TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(np.int32): 3,
    np.dtype(ml_dtypes.float8_e4m3fn): 6,
    np.dtype(ml_dtypes.bfloat16): 7,
}
"""nvinfer1::DataType."""

_GOLDEN = 0x9E3779B97F4A7C15


def numbers(seed: int, count: int) -> NDArray[np.uint64]:
    """The 64-bit numbers of elements 0 .. count of a seed: splitmix64, whose state is a counter."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


class Tables:
    """A case's tables, each once."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._known: dict[tuple[str, bytes], int] = {}

    def number(self, table: Array) -> int:
        key = (str(table.dtype), _bytes(table))
        if key not in self._known:
            self._known[key] = len(self.arrays)
            self.arrays.append(table)
        return self._known[key]


class Source(Protocol):
    """Where a tensor's content comes from."""

    def make(self, count: int, dtype: np.dtype[Any]) -> Array:
        """So many elements."""

    def pack(self, tables: Tables) -> bytes:
        """As the file has it."""


class Literal(NamedTuple):
    """Content that is stored."""

    array: Array

    def make(self, count: int, dtype: np.dtype[Any]) -> Array:
        assert self.array.size == count and self.array.dtype == dtype
        return self.array.reshape(-1)

    def pack(self, tables: Tables) -> bytes:
        return b"\0" + _bytes(self.array)


class Uniform(NamedTuple):
    """Whole numbers of so many bits, from the least negative on, times a power of two: exact in their type.

    With ``bias``, fp32 alone: element ``i`` is added ``bias[i % len(bias)]``.
    """

    seed: int
    bits: int
    exponent: int
    bias: Array | None = None

    def make(self, count: int, dtype: np.dtype[Any]) -> Array:
        whole = (numbers(self.seed, count) >> np.uint64(64 - self.bits)).astype(np.int64) - (1 << (self.bits - 1))
        value = whole.astype(np.float32) * np.float32(2.0**self.exponent)
        if self.bias is not None:
            assert dtype == np.float32
            biased: Array = value + np.resize(self.bias, count)
            return biased
        made = value.astype(dtype)
        assert (made.astype(np.float32) == value).all(), "not exact in this type"
        return made

    def pack(self, tables: Tables) -> bytes:
        kind = 1 if self.bias is None else 4
        packed = struct.pack("<BQBi", kind, self.seed, self.bits, self.exponent)
        return packed if self.bias is None else packed + struct.pack("<H", tables.number(self.bias))


class Table(NamedTuple):
    """Each element one of a table."""

    seed: int
    table: Array

    def make(self, count: int, dtype: np.dtype[Any]) -> Array:
        assert self.table.dtype == dtype
        top = numbers(self.seed, count) >> np.uint64(32)
        made: Array = self.table[((top * np.uint64(len(self.table))) >> np.uint64(32)).astype(np.int64)]
        return made

    def pack(self, tables: Tables) -> bytes:
        return struct.pack("<BQH", 2, self.seed, tables.number(self.table))


class Bits(NamedTuple):
    """Any bits."""

    seed: int

    def make(self, count: int, dtype: np.dtype[Any]) -> Array:
        return numbers(self.seed, count).astype(f"u{dtype.itemsize}").view(dtype)

    def pack(self, tables: Tables) -> bytes:
        return struct.pack("<BQ", 3, self.seed)


@dataclass
class Input:
    """A tensor and its content; ``patches`` are elements that differ from the source."""

    shape: Shape
    dtype: np.dtype[Any]
    source: Source
    patches: dict[int, Any] = field(default_factory=dict)

    def make(self) -> Array:
        """The content."""
        flat = self.source.make(int(np.prod(self.shape)), self.dtype)
        if self.patches:
            flat = flat.copy()
            flat[list(self.patches)] = np.asarray(list(self.patches.values()), self.dtype)
        return flat.reshape(self.shape)

    def pack(self, tables: Tables) -> bytes:
        parts = [_head(self.shape, self.dtype), self.source.pack(tables), struct.pack("<I", len(self.patches))]
        for element, value in self.patches.items():
            parts += [struct.pack("<Q", element), _bytes(np.asarray([value], self.dtype))]
        return b"".join(parts)


def literal(array: Array) -> Input:
    """An input that is stored."""
    return Input(array.shape, array.dtype, Literal(array))


class Unjudged(NamedTuple):
    """Of cases that are timed."""

    def pack(self, dtype: np.dtype[Any]) -> bytes:
        return b"\0"


class Exact(NamedTuple):
    """Elements 0, stride, 2 * stride, ...; bit for bit, but any NaN is one."""

    stride: int
    values: Array

    def pack(self, dtype: np.dtype[Any]) -> bytes:
        assert self.values.dtype == dtype
        return struct.pack("<BQQ", 1, self.stride, self.values.size) + _bytes(self.values)


class Near(NamedTuple):
    """The same, but for a tolerance."""

    tolerance: float
    stride: int
    values: Array

    def pack(self, dtype: np.dtype[Any]) -> bytes:
        assert self.values.dtype == dtype
        return struct.pack("<BdQQ", 2, self.tolerance, self.stride, self.values.size) + _bytes(self.values)


class Between(NamedTuple):
    """The same, between two numbers of the output's type, or NaN where the lower one is."""

    stride: int
    low: Array
    high: Array

    def pack(self, dtype: np.dtype[Any]) -> bytes:
        bounds = [bound.astype(dtype) for bound in (self.low, self.high)]
        return struct.pack("<BQQ", 3, self.stride, self.low.size) + b"".join(map(_bytes, bounds))


class Candidates(NamedTuple):
    """What one row may be: lower and upper bounds of each possibility."""

    may_be_nan: bool
    bounds: Sequence[tuple[Array, Array]]


class OneOf(NamedTuple):
    """Row by row."""

    rows: Sequence[Candidates]

    def pack(self, dtype: np.dtype[Any]) -> bytes:
        parts = [b"\4"]
        for row in self.rows:
            parts.append(struct.pack("<BH", row.may_be_nan, len(row.bounds)))
            parts += [_bytes(bound.astype(dtype)) for pair in row.bounds for bound in pair]
        return b"".join(parts)


Judgement = Unjudged | Exact | Near | Between | OneOf


@dataclass
class Output:
    """What must come out."""

    shape: Shape
    dtype: np.dtype[Any]
    judgement: Judgement


@dataclass
class Case:
    """A call. ``op`` is an index into OPS; the attributes but ``top_k`` are of experts alone."""

    name: str
    op: int
    inputs: list[Input]
    outputs: list[Output]
    top_k: int
    experts: int = 0
    layout: str = ""
    group_size: int = 0
    activations: str = ""
    runs_may_differ: bool = False

    def pack(self) -> bytes:
        """The case in the file."""
        tables = Tables()
        inputs = [tensor.pack(tables) for tensor in self.inputs]
        flags = RUNS_MAY_DIFFER if self.runs_may_differ else 0
        parts = [_text(self.name), struct.pack("<BBii", self.op, flags, self.top_k, self.experts)]
        parts += [_text(self.layout), struct.pack("<i", self.group_size), _text(self.activations)]
        parts.append(struct.pack("<H", len(tables.arrays)))
        for table in tables.arrays:
            parts += [struct.pack("<BI", table.dtype.itemsize, table.size), _bytes(table)]
        parts += [struct.pack("<I", len(inputs)), *inputs, struct.pack("<I", len(self.outputs))]
        for output in self.outputs:
            parts += [_head(output.shape, output.dtype), output.judgement.pack(output.dtype)]
        body = b"".join(parts)
        return struct.pack("<Q", len(body)) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data)) + data


def _head(shape: Shape, dtype: np.dtype[Any]) -> bytes:
    return struct.pack(f"<BB{len(shape)}q", TYPES[dtype], len(shape), *shape)


class Result(NamedTuple):
    """What the runner wrote of one case and tactic."""

    name: str
    tactic: int
    outputs: list[bytes]


def read_results(path: Path) -> Iterator[Result]:
    """What ``--outputs`` has left."""
    with path.open("rb") as file:
        while head := file.read(2):
            name = _take(file, struct.unpack("<H", head)[0]).decode()
            tactic, count = struct.unpack("<iI", _take(file, 8))
            outputs = [_take(file, struct.unpack("<Q", _take(file, 8))[0]) for _ in range(count)]
            yield Result(name, tactic, outputs)


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    assert len(data) == count, "the file ends within a result"
    return data
