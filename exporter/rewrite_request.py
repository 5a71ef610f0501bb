"""What a rewrite is asked for: new tensors, each a mosaic of stored matrices, as they are or quantised.

A stored tensor is seen as a matrix: its last axis are the columns, all axes before it the rows; a vector is one row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.safetensors_header import ITEM_BITS, TensorEntry

SOURCE_DTYPES = ("BF16", "F16", "F32", "F8_E4M3")
TARGET_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
SCALE_DTYPES = ("F32", "BF16", "F16")

QUANTIZATION = 1
"""Of the numbers that ``quantise`` makes. A later version that makes others must not go on with ours."""

MOST_COLUMNS = 2**20
"""Of a matrix that is quantised: some of its rows are in memory at a time, whole. Llama 4 has 16,384."""

_MISMATCH = "config.json and the shards must be of the same checkpoint"


@dataclass(frozen=True)
class Piece:
    """A matrix taken out of one stored tensor.

    ``index`` picks one of a stacked ``[E, rows, columns]`` tensor; ``columns`` (begin, end) cuts its last axis;
    ``transpose`` turns what is left. ``scale`` dequantises: value = stored * scale, in fp32. It holds one value, or one
    for each stored row (output channel); for a stacked tensor it may be stacked too.

    ``group`` > 0 says that ``entry`` is int4, as compressed-tensors packs it: int32 ``[rows, columns / 8]`` of eight
    values each, the lowest nibble first, stored as value + 8; ``scale`` is then ``[rows, columns / group]``.
    """

    entry: TensorEntry
    index: int | None = None
    columns: tuple[int, int] | None = None
    transpose: bool = False
    scale: TensorEntry | None = None
    group: int = 0

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix, before anything is cut; int4 counts values."""
        rows, columns = matrix(self.entry.shape if self.index is None else self.entry.shape[1:])
        return rows, columns * 8 if self.group else columns

    @property
    def cut(self) -> tuple[int, int]:
        """Begin and end of the stored columns that are taken."""
        return self.columns or (0, self.stored[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the piece as it is placed."""
        rows, columns = self.stored[0], self.cut[1] - self.cut[0]
        return (columns, rows) if self.transpose else (rows, columns)

    @property
    def row_bits(self) -> int:
        """Size of a stored row."""
        return self.stored[1] * (4 if self.group else ITEM_BITS[self.entry.dtype])

    @property
    def offset(self) -> int:
        """Where in the file the stored matrix begins."""
        return self.entry.offset + (self.index or 0) * self.stored[0] * self.row_bits // 8


@dataclass(frozen=True)
class Quantize:
    """How a target is quantised: FP8 by ``tensor`` or by ``channel`` (row), INT4 by ``group`` of columns of a row.

    The numbers are those of ``quantise.quantise_matrix``. ``scale_name`` is the tensor that the scales are written to.

    ========== ================================== ==================================
    form       the weight, of ``[out, in]``       its scale
    ========== ================================== ==================================
    tensor     F8_E4M3 ``[out, in]``              F32 ``[1]``
    channel    F8_E4M3 ``[out, in]``              F32 ``[out, 1]``
    group      I32 ``[out, in / 8]``, packed      BF16 ``[out, in / group_size]``
    ========== ================================== ==================================
    """

    form: Literal["tensor", "channel", "group"]
    group_size: int = 0
    scale_name: str = ""

    @property
    def dtype(self) -> str:
        """The type that the weight is stored in."""
        return "I32" if self.form == "group" else "F8_E4M3"

    @property
    def scale_dtype(self) -> str:
        """The type that its scale is stored in."""
        return "BF16" if self.form == "group" else "F32"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scale of a matrix."""
        if self.form == "group":
            return rows, columns // self.group_size
        return (rows, 1) if self.form == "channel" else (1,)


class Stored(NamedTuple):
    """A tensor as the header of a new shard has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Size of a value; of a packed one, that of what it is packed into."""
        return ITEM_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class Target:
    """A new tensor, and its scale where it is quantised.

    ``pieces`` are rows of blocks: the pieces of an inner tuple stand side by side (joined along the last axis), the
    rows of blocks below each other. One piece is ``((piece,),)``; a stack of experts has one row of blocks for each.

    With ``quantize``, ``shape`` counts values, ``[out, in]``, and ``dtype`` is ``quantize.dtype``. With ``data``, its
    bytes are the tensor's, of any type, and there are no pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    quantize: Quantize | None = None
    data: bytes | None = None

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What is written: the tensor, then its scale if it has one."""
        if self.quantize is None:
            return (Stored(self.name, self.dtype, self.shape),)
        rows, columns = matrix(self.shape)
        packed = columns // 8 if self.quantize.form == "group" else columns
        scale = self.quantize.scale_shape(rows, columns)
        return (
            Stored(self.name, self.dtype, (rows, packed)),
            Stored(self.quantize.scale_name, self.quantize.scale_dtype, scale),
        )

    @property
    def item_bytes(self) -> int:
        """Size of a value of the tensor itself, as it is stored."""
        return self.stored[0].item_bytes

    @property
    def nbytes(self) -> int:
        """Size of the tensor, with its scale."""
        return sum(stored.nbytes for stored in self.stored)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor that is seen as a matrix."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def entries_of(targets: Sequence[Target]) -> Iterator[TensorEntry]:
    """Every stored tensor that is read, once for each time that it is asked for."""
    for target in targets:
        for blocks in target.pieces:
            for piece in blocks:
                yield piece.entry
                if piece.scale is not None:
                    yield piece.scale


def check_request(targets: Sequence[Target]) -> None:
    """Checks that every target can be made of its pieces, before anything is read or written.

    Raises:
        CheckpointError: shapes contradict each other; names the tensor.
        UnsupportedError: a type that cannot be read or written.
    """
    seen: set[str] = set()
    for target in targets:
        _check_type(target)
        for name, _, _ in target.stored:
            if name in seen or name in ("", "__metadata__"):
                raise CheckpointError(f"tensor '{name}' would be written twice, or is no name", hint=_MISMATCH)
            seen.add(name)
        if target.data is not None:
            if target.pieces or len(target.data) != target.nbytes:
                raise _contradiction(target)
            continue
        rows, columns = matrix(target.shape)
        for blocks in target.pieces:
            for piece in blocks:
                _check_piece(piece)
            if len({piece.shape[0] for piece in blocks}) != 1 or sum(piece.shape[1] for piece in blocks) != columns:
                raise _contradiction(target)
            rows -= blocks[0].shape[0]
        if rows != 0:
            raise _contradiction(target)


def _check_type(target: Target) -> None:
    """Whether a target's type can be written; quantised, whether its shape can be too."""
    how = target.quantize
    if how is None:
        whole = [dtype for dtype, bits in ITEM_BITS.items() if bits % 8 == 0]
        if target.dtype not in (TARGET_DTYPES if target.data is None else whole):
            raise UnsupportedError(
                f"tensor '{target.name}': {target.dtype} cannot be written", hint=f"one of {', '.join(TARGET_DTYPES)}"
            )
        return
    if how.form not in ("tensor", "channel", "group") or (how.group_size > 0) != (how.form == "group"):
        raise UnsupportedError(
            f"tensor '{target.name}' cannot be quantised by {how.form} with groups of {how.group_size}",
            hint="by tensor, by channel, or by group with a group size",
        )
    if target.dtype != how.dtype or target.data is not None:
        raise UnsupportedError(
            f"tensor '{target.name}': {target.dtype} is not what is quantised by {how.form}", hint=f"it is {how.dtype}"
        )
    shown = f"tensor '{target.name}' of shape {list(target.shape)}"
    if len(target.shape) != 2 or 0 in target.shape or target.shape[1] > MOST_COLUMNS:
        raise UnsupportedError(
            f"{shown} cannot be quantised", hint=f"a matrix [out, in] can, of at most {MOST_COLUMNS} columns"
        )
    if how.form == "group" and (target.shape[1] % how.group_size or target.shape[1] % 8):
        raise UnsupportedError(
            f"{shown} cannot be quantised in groups of {how.group_size}",
            hint="its columns must be a multiple of the group size and of 8",
        )
    if how.form == "tensor" and len(target.pieces) != 1:
        raise UnsupportedError(
            f"{shown} has several rows of blocks and cannot be quantised by tensor", hint="quantise it by channel"
        )


def _contradiction(target: Target) -> CheckpointError:
    shapes = [[list(piece.shape) for piece in blocks] for blocks in target.pieces]
    return CheckpointError(
        f"tensor '{target.name}' of shape {list(target.shape)} cannot be put together of {shapes!r:.200}",
        hint=_MISMATCH,
    )


def _check_piece(piece: Piece) -> None:
    entry = piece.entry
    where = f"{entry.file}: tensor '{entry.name}'"
    if piece.group < 0 or entry.dtype not in (("I32",) if piece.group else SOURCE_DTYPES):
        raise UnsupportedError(
            f"{where} is {entry.dtype}, which cannot be rewritten{' as int4' if piece.group else ''}",
            hint=f"one of {', '.join(SOURCE_DTYPES)}, or int4 packed into I32",
        )
    if piece.index is not None and (len(entry.shape) < 2 or not 0 <= piece.index < entry.shape[0]):
        raise CheckpointError(f"{where} of shape {list(entry.shape)} has no part {piece.index}", hint=_MISMATCH)
    begin, end = piece.cut
    if not 0 <= begin <= end <= piece.stored[1]:
        raise CheckpointError(f"{where} of shape {list(entry.shape)} has no columns {begin}..{end}", hint=_MISMATCH)
    if math.prod(entry.shape) * ITEM_BITS[entry.dtype] != 8 * entry.nbytes:
        raise CheckpointError(
            f"{where} of shape {list(entry.shape)} does not take {entry.nbytes} bytes", hint=_MISMATCH
        )
    if piece.scale is not None:
        _check_scale(piece, piece.scale, where)
    elif piece.group:
        raise CheckpointError(f"{where} is int4, but has no scale", hint="download the shard that holds its scale")


def _check_scale(piece: Piece, scale: TensorEntry, where: str) -> None:
    if piece.entry.dtype not in ("F8_E4M3", "I32"):
        raise UnsupportedError(f"{where} is {piece.entry.dtype} and has a scale", hint="only fp8 and int4 have scales")
    if scale.dtype not in SCALE_DTYPES:
        raise UnsupportedError(
            f"{scale.file}: tensor '{scale.name}' is {scale.dtype}, which is no type of a scale",
            hint=f"one of {', '.join(SCALE_DTYPES)}",
        )
    if scale_layout(piece) is None:
        raise CheckpointError(
            f"{scale.file}: tensor '{scale.name}' of shape {list(scale.shape)} is no scale for '{piece.entry.name}' "
            f"of shape {list(piece.entry.shape)}",
            hint=_MISMATCH,
        )


@dataclass(frozen=True)
class ScaleLayout:
    """The scales of one stored matrix: ``rows * columns`` values, from the ``first``-th of the tensor on.

    A side of 1 serves the whole side of the matrix; in int4, one column serves ``group`` columns.
    """

    first: int
    rows: int
    columns: int


def scale_layout(piece: Piece) -> ScaleLayout | None:
    """How a piece's scale is laid out; None where its shape fits no layout, or fits two."""
    if piece.scale is None:
        return None
    rows, columns = piece.stored
    wanted = [(rows, -(-columns // piece.group))] if piece.group else [(rows, 1), (1, 1)]
    count, parts = math.prod(piece.scale.shape), 1 if piece.index is None else piece.entry.shape[0]
    stacked = piece.index is not None and bool(piece.scale.shape) and piece.scale.shape[0] == parts
    found = set()
    for side in wanted:
        if stacked and count == parts * math.prod(side):
            found.add(ScaleLayout((piece.index or 0) * math.prod(side), *side))
        if count == math.prod(side):
            found.add(ScaleLayout(0, *side))
    return found.pop() if len(found) == 1 else None


def describe(targets: Sequence[Target], extra: dict[str, Any]) -> str:
    """SHA-256 over a request and over the size, time and place of every file that it reads, but not over paths.

    Raises:
        CheckpointError: a file is not there.
    """
    files = sorted({entry.file for entry in entries_of(targets)})
    numbers = {file: i for i, file in enumerate(files)}

    def entry_of(entry: TensorEntry | None) -> list[Any] | None:
        if entry is None:
            return None
        return [entry.name, entry.dtype, entry.shape, numbers[entry.file], entry.offset, entry.nbytes]

    def piece_of(piece: Piece) -> list[Any]:
        flags = [piece.index, piece.columns, piece.transpose, piece.group]
        return [entry_of(piece.entry), entry_of(piece.scale), *flags]

    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for file in files:
        digest.update(json.dumps([file.name, *stamp(file)]).encode())
    for target in targets:
        pieces = [[piece_of(piece) for piece in blocks] for blocks in target.pieces]
        described: list[Any] = [target.name, target.dtype, target.shape, pieces]
        if target.quantize is not None:
            described.append(["quantize", QUANTIZATION, *astuple(target.quantize)])
        if target.data is not None:
            described.append(["data", hashlib.sha256(target.data).hexdigest()])
        digest.update(json.dumps(described).encode())
    return digest.hexdigest()


def stamp(file: Path | int) -> tuple[int, int, int, int]:
    """What tells whether a file was changed or replaced: device, inode, size and time of the last write.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        state = os.stat(file)  # noqa: PTH116, descriptors too
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="it was there before") from error
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
