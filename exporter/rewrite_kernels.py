"""Makes the bytes of one chunk: reads stored tiles, dequantises, casts, checks and turns them.

A tile is small enough for a core's cache. Where it is going to be turned, its rows stand an odd number of cache lines
apart: at a stride of a power of two, as the models' widths are, a column's values would share one set of the cache
(numpy's copy then takes 3.5 ns a value instead of 0.5). Files are read with ``pread``, never mapped: a file that
shrinks is then an error and no signal, and its pages do not count as this process's memory.

Numbers are little-endian, in the files and in memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError
from shuntyard.exporter.quantise_native import native
from shuntyard.exporter.rewrite_request import Piece, Target, entries_of, scale_layout, stamp
from shuntyard.exporter.rewrite_shards import Chunk
from shuntyard.exporter.safetensors_header import ITEM_BITS, TensorEntry, read_header

TILE_ROWS, TILE_COLUMNS = 256, 8192
"""A tile that is turned: it is read in runs of so many columns, and placed in runs of so many rows."""

TILE_VALUES = 512 * 1024
"""A tile that is not turned."""

_LINE = 64  # bytes of a cache line
_MOST_VECTORS = 1024  # IOV_MAX, in one call of preadv

_CHANGED = "the checkpoint changed while it was read; export again when nothing else writes to it"

_TYPES: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn
}  # fmt: skip
_BITS: dict[str, Any] = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "F8_E4M3": np.uint8}
_SIGNED: dict[str, Any] = {"F32": np.int32, "F16": np.int16, "BF16": np.int16, "F8_E4M3": np.int8}
_FIRST_BAD = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F}
"""The smallest bits, without a sign, of what is no finite number."""


@functools.cache
def _table(source: str, target: str) -> NDArray[Any]:
    """The bits in ``target`` of every value of ``source``, cast once by ml_dtypes: faster than casting each anew."""
    every = np.arange(1 << ITEM_BITS[source], dtype=_BITS[source]).view(_TYPES[source])
    with np.errstate(over="ignore", invalid="ignore"):
        table: NDArray[Any] = every.astype(_TYPES[target]).view(_BITS[target])
    return table


_BYTES = np.arange(256)
_FROM_INT4 = np.stack([(_BYTES & 15) - 8, (_BYTES >> 4) - 8], axis=1).astype(np.float32).view(np.float64)[:, 0]
"""Of each byte the two values that it packs, as the halves of a 64-bit number: a copy of bits, never computed with."""


class Sources:
    """The opened files of a request, which must stay as they are."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """Opens every file, and reads its header again.

        Raises:
            CheckpointError: a file is missing, or does not hold a tensor where the request expects it.
        """
        self._descriptors: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._asked_for: set[tuple[Path, int, int]] = set()
        wanted = set(entries_of(targets))
        try:
            for file in sorted({entry.file for entry in wanted}):
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint=_CHANGED) from error
                self._stamps[file] = stamp(self._descriptors[file])
                found = set(read_header(file).tensors)
                for entry in wanted:
                    if entry.file == file and entry not in found:
                        raise CheckpointError(
                            f"{file}: tensor '{entry.name}' no longer lies where it lay", hint=_CHANGED
                        )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def check_unchanged(self) -> None:
        """Compares every file's identity, size and time of writing with what they were when it was opened.

        Raises:
            CheckpointError: one differs, or is gone; names it.
        """
        for file, before in self._stamps.items():
            if stamp(file) != before:
                raise CheckpointError(f"{file}: changed while it was read", hint=_CHANGED)

    def read(self, file: Path, offset: int, into: NDArray[np.uint8], stride: int) -> None:
        """Fills the rows of ``into`` with bytes that lie ``stride`` apart, from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before; names it.
        """
        width = into.shape[1]
        if width != stride and (twin := native()) is not None:  # a call for each row is dear, above all among threads
            filled = twin.read_rows(self._descriptors[file], offset, into, stride)
            into, offset = into[filled:], offset + filled * stride
        lines: list[Any] = [into.reshape(-1)] if width == stride and into.flags.c_contiguous else list(into)
        most = _MOST_VECTORS if width == stride else 1
        try:
            for first in range(0, len(lines), most):
                self._read_run(file, offset + first * stride, lines[first : first + most])
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check the disk") from error

    def _read_run(self, file: Path, offset: int, lines: list[Any]) -> None:
        descriptor = self._descriptors[file]
        if os.preadv(descriptor, lines, offset) == len(lines) * len(lines[0]):
            return
        for line in lines:  # a short read is no error yet
            view = memoryview(line)
            while view and (got := os.preadv(descriptor, [view], offset)):
                view, offset = view[got:], offset + got
            if view:
                raise CheckpointError(f"{file}: ends at byte {offset}, within a tensor", hint=_CHANGED)

    def will_need(self, file: Path, offset: int, nbytes: int) -> None:
        """Asks the system, once, to read a range ahead, whatever order it is then read in."""
        if (file, offset, nbytes) in self._asked_for:
            return
        self._asked_for.add((file, offset, nbytes))
        step = 128 * 1024  # more at a time is cut off, on a disk with a small read-ahead
        for begin in range(offset, offset + nbytes, step):
            size = min(step, offset + nbytes - begin)
            os.posix_fadvise(self._descriptors[file], begin, size, os.POSIX_FADV_WILLNEED)


class Scratch:
    """Buffers of one worker, which are used again for each chunk."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, slot: str, rows: int, columns: int, dtype: Any, *, apart: bool = False) -> NDArray[Any]:
        """A matrix in the buffer called ``slot``; with ``apart``, its rows stand an odd number of cache lines apart."""
        width = columns * np.dtype(dtype).itemsize
        stride = (-(-width // _LINE) | 1) * _LINE if apart else width
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < rows * stride:
            buffer = self._buffers[slot] = np.empty(rows * stride, np.uint8)
        return buffer[: rows * stride].reshape(rows, stride)[:, :width].view(dtype)


def parts_of(chunk: Chunk) -> list[tuple[Piece, tuple[int, int, int, int], int]]:
    """The pieces within a chunk: each with its stored rows and columns that are taken (begin, end, begin, end), and the
    column of the chunk that it is placed at.
    """
    parts = []
    left = 0
    for piece in chunk.blocks:
        width = piece.shape[1]
        begin, end = max(chunk.column, left) - left, min(chunk.column + chunk.columns, left + width) - left
        if begin < end:
            rows, columns = (chunk.row, chunk.row + chunk.rows), (begin, end)
            if piece.transpose:
                rows, columns = columns, rows
            first = piece.cut[0]
            parts.append((piece, (*rows, first + columns[0], first + columns[1]), left + begin - chunk.column))
        left += width
    return parts


def prefetch(chunk: Chunk, sources: Sources) -> None:
    """Asks for all stored rows that ``fill`` will read from, as one run each."""
    for piece, (row, last_row, _, _), _ in parts_of(chunk):
        sources.will_need(
            piece.entry.file, piece.offset + row * piece.row_bits // 8, (last_row - row) * piece.row_bits // 8
        )


def fill(chunk: Chunk, sources: Sources, scratch: Scratch) -> NDArray[np.uint8]:
    """The bytes of a chunk, ``[rows, row_bytes]``. They are valid until ``scratch`` is used again.

    Raises:
        CheckpointError: a value is not finite, or does not fit the type; or a file changed. Names tensor and place.
    """
    out: NDArray[Any] = scratch.array("out", chunk.rows, chunk.columns, _BITS[chunk.target.dtype])
    fill_into(out, chunk, sources, scratch)
    return out.view(np.uint8)


def fill_into(out: NDArray[Any], chunk: Chunk, sources: Sources, scratch: Scratch) -> None:
    """``fill``, into unsigned integers ``[rows, columns]`` that the caller has."""
    dtype = chunk.target.dtype
    for piece, (row, last_row, column, last_column), at in parts_of(chunk):
        width = (last_row - row) if piece.transpose else (last_column - column)
        place = out[:, at : at + width]
        if piece.transpose:
            place, most_columns = place.T, TILE_COLUMNS
        else:
            most_columns = TILE_VALUES
        for r in range(row, last_row, _tile_rows(piece, last_column - column)):
            rows = min(_tile_rows(piece, last_column - column), last_row - r)
            for c in range(column, last_column, most_columns):
                columns = min(most_columns, last_column - c)
                tile = place[r - row : r - row + rows, c - column : c - column + columns]
                _Tile(piece, r, rows, c, columns).write(dtype, tile, sources, scratch)


def _tile_rows(piece: Piece, columns: int) -> int:
    if piece.transpose:
        return max(TILE_ROWS, min(_MOST_VECTORS, TILE_ROWS * TILE_COLUMNS // max(columns, 1)))
    return max(1, TILE_VALUES // max(columns, 1))


class _Tile:
    """A part of a stored matrix: ``rows`` rows from ``row`` on, ``columns`` columns from ``column`` on."""

    def __init__(self, piece: Piece, row: int, rows: int, column: int, columns: int) -> None:
        self.piece, self.row, self.rows, self.column, self.columns = piece, row, rows, column, columns

    def write(self, dtype: str, place: NDArray[Any], sources: Sources, scratch: Scratch) -> None:
        """Writes the tile's values into ``place``, as bits of ``dtype``, in the order that they are stored in."""
        turned = self.piece.transpose
        if not self._computed and self.piece.entry.dtype == dtype and not turned:
            self._read(place.view(np.uint8), sources)
            self._check(place, dtype, sources)
            return
        raw = self._raw(sources, scratch)
        if not self._computed and self.piece.entry.dtype == dtype:
            self._check(raw, dtype, sources)
            np.copyto(place, raw)
            return
        cast = scratch.array("cast", self.rows, self.columns, _BITS[dtype], apart=True) if turned else place
        source = self.piece.entry.dtype
        if self._computed:
            _cast(self._dequantised(raw, sources, scratch), cast.view(_TYPES[dtype]))
        elif source == "F32" or (source, dtype) == ("BF16", "F32"):
            _cast(raw.view(_TYPES[source]), cast.view(_TYPES[dtype]))
        else:
            looked_up = scratch.array("values", self.rows, self.columns, _BITS[dtype])
            np.copyto(cast, np.take(_table(source, dtype), raw, out=looked_up, mode="clip"))
        self._check(cast, dtype, sources)
        if turned:
            np.copyto(place, cast)

    @property
    def _computed(self) -> bool:
        """Whether values are products of what is stored and a scale."""
        return self.piece.scale is not None

    def _raw(self, sources: Sources, scratch: Scratch) -> NDArray[Any]:
        """The stored bits; of int4 the bytes that hold the tile's columns, and perhaps one more on either side."""
        if self.piece.group:
            first, last = self.column // 2, -(-(self.column + self.columns) // 2)
            raw = scratch.array("raw", self.rows, last - first, np.uint8)
            sources.read(self.piece.entry.file, self._offset(first), raw, self.piece.row_bits // 8)
            return raw
        bits = _BITS[self.piece.entry.dtype]
        raw = scratch.array("raw", self.rows, self.columns, bits, apart=self.piece.transpose)
        self._read(raw.view(np.uint8), sources)
        return raw

    def _read(self, into: NDArray[np.uint8], sources: Sources) -> None:
        item = ITEM_BITS[self.piece.entry.dtype] // 8
        sources.read(self.piece.entry.file, self._offset(self.column * item), into, self.piece.row_bits // 8)

    def _offset(self, byte: int) -> int:
        return self.piece.offset + self.row * self.piece.row_bits // 8 + byte

    def _dequantised(self, raw: NDArray[Any], sources: Sources, scratch: Scratch) -> NDArray[np.float32]:
        """stored * scale, in fp32, ``[rows, columns]``."""
        if self.piece.group:
            pairs = scratch.array("pairs", raw.shape[0], raw.shape[1], np.float64)
            np.take(_FROM_INT4, raw, out=pairs, mode="clip")
            skip = self.column % 2
            stored = pairs.view(np.float32)[:, skip : skip + self.columns]
        else:
            stored = scratch.array("values", self.rows, self.columns, np.float32)
            np.take(_table("F8_E4M3", "F32"), raw, out=stored.view(np.uint32), mode="clip")
        with np.errstate(over="ignore", invalid="ignore"):
            return np.multiply(stored, self._scales(sources), out=stored)

    def _scales(self, sources: Sources) -> NDArray[np.float32]:
        """The tile's scales in fp32, of a shape that broadcasts to the tile's."""
        piece, layout = self.piece, scale_layout(self.piece)
        assert piece.scale is not None and layout is not None  # the request was checked
        row, rows = (self.row, self.rows) if layout.rows > 1 else (0, 1)
        column, last = 0, layout.columns
        if piece.group:
            column, last = self.column // piece.group, -(-(self.column + self.columns) // piece.group)
        item = ITEM_BITS[piece.scale.dtype] // 8
        stored = np.empty((rows, last - column), _TYPES[piece.scale.dtype])
        offset = piece.scale.offset + (layout.first + row * layout.columns + column) * item
        sources.read(piece.scale.file, offset, stored.view(np.uint8), layout.columns * item)
        scales: NDArray[np.float32] = stored.astype(np.float32)
        if not (finite := np.isfinite(scales)).all():
            r, c = (int(i) for i in np.argwhere(~finite)[0])
            flat = layout.first + (row + r) * layout.columns + column + c
            raise _refusal(piece.scale, np.unravel_index(flat, piece.scale.shape), float(scales[r, c]), None)
        if (scales < 0).any():
            raise CheckpointError(
                f"{piece.scale.file}: tensor '{piece.scale.name}' holds {float(scales.min())}: a scale is not negative",
                hint="the checkpoint is damaged; download the file again",
            )
        if piece.group:
            scales = np.take(scales, np.arange(self.column, self.column + self.columns) // piece.group - column, axis=1)
        return scales

    def _check(self, bits: NDArray[Any], dtype: str, sources: Sources) -> None:
        """Two maxima see every NaN and infinity: of positive ones as signed, of negative ones as unsigned numbers."""
        first_bad, sign = _FIRST_BAD[dtype], 1 << (ITEM_BITS[dtype] - 1)
        if int(bits.view(_SIGNED[dtype]).max()) < first_bad and int(bits.max()) < first_bad + sign:
            return
        r, c = (int(i) for i in np.argwhere((bits & (sign - 1)) >= first_bad)[0])
        one = _Tile(self.piece, self.row + r, 1, self.column + c, 1)
        raw = one._raw(sources, Scratch())
        if self._computed:
            value = float(one._dequantised(raw, sources, Scratch())[0, 0])
        else:
            value = float(raw.view(_TYPES[self.piece.entry.dtype])[0, 0])
        shape = self.piece.entry.shape if self.piece.index is None else self.piece.entry.shape[1:]
        if self.piece.group:
            shape = (*shape[:-1], 8 * shape[-1])
        place = np.unravel_index(one.row * self.piece.stored[1] + one.column, shape)
        index = () if self.piece.index is None else (self.piece.index,)
        raise _refusal(self.piece.entry, (*index, *place), value, dtype)


def _cast(values: NDArray[Any], into: NDArray[Any]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(into, values, casting="unsafe")


def _refusal(entry: TensorEntry, place: Sequence[Any], value: float, dtype: str | None) -> CheckpointError:
    where = f"{entry.file}: tensor '{entry.name}' at {[int(i) for i in place]} holds {value}"
    if dtype is None or not np.isfinite(value):
        hint = "the checkpoint is damaged; download the file again"
        return CheckpointError(f"{where}, which is not finite", hint=hint)
    largest = float(np.array(_FIRST_BAD[dtype] - 1, _BITS[dtype]).view(_TYPES[dtype]))
    return CheckpointError(
        f"{where}, which is beyond {largest:g}, the largest value of {dtype}", hint="ask for a wider type"
    )
