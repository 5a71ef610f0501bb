"""Reads the header of a ``.safetensors`` file without its data, and believes nothing that it says.

Format: 8 bytes little-endian header length, JSON ``{name: {dtype, shape, data_offsets}}``, then the data, without
holes (the README of huggingface/safetensors is the specification). We need the absolute offsets, which the
safetensors library does not give out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError
from shuntyard.exporter.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

MAX_RANK = 16
"""No tensor of any model comes near it; bounds the arithmetic on what a header says."""

DAMAGED = "the header is wrong; download the file again"

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` on in ``file`` (counted from the file's start)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their data, and the hash of the header's bytes."""

    file: Path
    file_bytes: int
    sha256: str
    tensors: tuple[TensorEntry, ...]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, raw: Any, data_start: int, data_bytes: int) -> TensorEntry:
    where = f"{path}: tensor '{name}'"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must have dtype, shape and data_offsets", hint=DAMAGED)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.80}", hint=DAMAGED)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where}: shape {shape!r:.80} is not a list of sizes", hint=DAMAGED)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.80} is not a pair of byte offsets", hint=DAMAGED)
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            f"{where}: data_offsets {begin}..{end} lie outside the file's {data_bytes} bytes of data",
            hint="the file is truncated, or its header is wrong; download it again",
        )
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {bits} bits, but data_offsets give it {8 * (end - begin)}",
            hint=DAMAGED,
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def read_header(path: Path) -> Header:
    """Reads and checks one file's header.

    Raises:
        CheckpointError: the file is missing, truncated, or its header contradicts itself or the file's size.
    """
    download = "the file is truncated or no safetensors file; download it again"
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file", hint=download)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: {size} bytes cannot hold the header that it announces", hint=download)
            text = stream.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="download the missing shard") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", hint="check that you may read it") from error
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON: {error}", hint=download) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object", hint=download)
    if not isinstance(raw.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: __metadata__ in its header is not a JSON object", hint=download)
    data_start, data_bytes = 8 + length, size - 8 - length
    tensors = [_entry(path, name, entry, data_start, data_bytes) for name, entry in raw.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    reached = data_start
    for tensor in tensors:
        if tensor.offset != reached:
            what = "overlaps the tensor before it" if tensor.offset < reached else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor '{tensor.name}' {what} (starts at byte {tensor.offset}, expected {reached})",
                hint=DAMAGED,
            )
        reached += tensor.nbytes
    if reached != size:
        raise CheckpointError(
            f"{path}: {size - reached} bytes at its end belong to no tensor", hint="the header is wrong or incomplete"
        )
    return Header(path, size, hashlib.sha256(text).hexdigest(), tuple(tensors))


_NUMPY: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I32": np.int32,
    "I64": np.int64,
}


def numpy_dtype(entry: TensorEntry) -> np.dtype[Any]:
    """numpy's type for a tensor's values."""
    dtype: np.dtype[Any] = np.dtype(_NUMPY[entry.dtype])
    return dtype


def read_values(entry: TensorEntry) -> NDArray[Any]:
    """A small tensor's values, in its shape.

    Raises:
        CheckpointError: the file became shorter.
    """
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        data = stream.read(entry.nbytes)
    if len(data) < entry.nbytes:
        raise CheckpointError(f"{entry.file}: ends within tensor '{entry.name}'", hint="download the file again")
    return np.frombuffer(data, numpy_dtype(entry)).reshape(entry.shape)
