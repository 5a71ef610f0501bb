"""Lays new tensors out in shards, and cuts them into chunks, the units of work.

The layout depends on the request alone, not on the machine: a run that was interrupted goes on with other workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shuntyard.exporter.rewrite_request import Piece, Target, matrix

LEAST_RUN = 2048
"""Columns of a stored matrix that a transposed chunk takes at least, where it can: so many values are read in a run."""

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a target's matrix, within one row of blocks.

    ``row`` is where the rectangle begins within that row of blocks; ``place`` is the byte of the shard that its first
    value goes to, and ``stride`` the bytes from one row to the next.
    """

    target: Target
    blocks: tuple[Piece, ...]
    row: int
    rows: int
    column: int
    columns: int
    place: int
    stride: int
    scale_place: int = 0

    @property
    def row_bytes(self) -> int:
        """Size of a row of the rectangle, as it is written."""
        return self.columns * self.target.item_bytes if self.target.quantize is None else self.stride

    @property
    def scale_row_bytes(self) -> int:
        """Size of the scales of a row; 0 where they are not by row."""
        if self.target.quantize is None or self.target.quantize.form == "tensor":
            return 0
        scale = self.target.stored[1]
        return scale.item_bytes * scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of what is written: the rectangle, and its scales. By tensor, the scale belongs to the only chunk."""
        if self.target.quantize is not None and self.target.quantize.form == "tensor":
            return self.target.nbytes
        return self.rows * (self.row_bytes + self.scale_row_bytes)

    @property
    def turned(self) -> bool:
        """Whether some of it is read in runs as long as it is high."""
        return any(piece.transpose for piece in self.blocks)

    def rows_of(self, count: int) -> Iterator[Chunk]:
        """The same in bands of ``count`` rows at most, each as wide."""
        yield from _rectangles(self, min(count, self.rows), self.columns)

    def bands(self, nbytes: int) -> Iterator[Chunk]:
        """The same in smaller parts, of about ``nbytes``, where nothing is transposed.

        They pass through a core's cache. A transposed chunk stays whole: it is read in runs as long as it is high.
        """
        if self.turned:
            yield self
        else:
            rows, columns = max(1, nbytes // self.row_bytes), max(1, nbytes // self.target.item_bytes)
            yield from _rectangles(self, min(rows, self.rows), min(columns, self.columns))


def _rectangles(chunk: Chunk, rows: int, columns: int) -> Iterator[Chunk]:
    for row in range(0, chunk.rows, rows):
        for column in range(0, chunk.columns, columns):
            yield replace(
                chunk,
                row=chunk.row + row,
                rows=min(rows, chunk.rows - row),
                column=chunk.column + column,
                columns=min(columns, chunk.columns - column),
                place=chunk.place + row * chunk.stride + column * chunk.target.item_bytes,
                scale_place=chunk.scale_place + row * chunk.scale_row_bytes,
            )


@dataclass(frozen=True)
class Shard:
    """A new file: its name, all bytes before its data, its size, its tensors' names and size, and their chunks."""

    name: str
    header: bytes
    file_bytes: int
    tensors: tuple[str, ...]
    data_bytes: int
    chunks: tuple[Chunk, ...]


def plan_shards(targets: Sequence[Target], shard_bytes: int, chunk_bytes: int) -> list[Shard]:
    """Fills shards with targets in their order, each to ``shard_bytes`` of data at most, or with one larger tensor.

    Within a shard the wider types come first, so that each tensor is aligned to its own type, as the safetensors
    library does it. A scale lies in the shard of its weight.
    """
    groups: list[list[Target]] = []
    size = 0
    for target in targets:
        if not groups or size + target.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.nbytes
    return [
        _plan_shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group, chunk_bytes)
        for i, group in enumerate(groups, 1)
    ]


def _plan_shard(name: str, group: list[Target], chunk_bytes: int) -> Shard:
    ordered = sorted((stored for target in group for stored in target.stored), key=lambda stored: -stored.item_bytes)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    reached = 0
    for stored in ordered:
        places[stored.name] = reached
        offsets = [reached, reached + stored.nbytes]
        entries[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
        reached += stored.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    chunks: list[Chunk] = []
    for target in sorted(group, key=lambda target: places[target.name]):
        found = [len(header) + places[stored.name] for stored in target.stored]
        chunks += _cut(target, found[0], found[-1], chunk_bytes)
    return Shard(name, header, len(header) + reached, tuple(stored.name for stored in ordered), reached, tuple(chunks))


def _cut(target: Target, place: int, scale_place: int, chunk_bytes: int) -> Iterator[Chunk]:
    if target.data is not None:
        if target.data:
            yield Chunk(target, (), 0, 1, 0, len(target.data) // target.item_bytes, place, len(target.data))
        return
    item, width = target.item_bytes, matrix(target.shape)[1]
    stride = width * item if target.quantize is None else target.stored[0].nbytes // target.shape[0]
    for blocks in target.pieces:
        height = blocks[0].shape[0]
        whole = Chunk(target, blocks, 0, height, 0, width, place, stride, scale_place)
        if target.quantize is None:
            least = LEAST_RUN if whole.turned else 1
            rows = min(height, max(chunk_bytes // max(stride, 1), least, 1))
            columns = min(width, max(chunk_bytes // max(rows * item, 1), 1))
            if height and width:
                yield from _rectangles(whole, rows, columns)
        elif target.quantize.form == "tensor":
            yield whole  # no number is known before the last value was seen
        elif height:
            yield from _rectangles(whole, min(height, max(chunk_bytes // stride, 1)), width)
        place += height * stride
        scale_place += height * whole.scale_row_bytes


def index_of(shards: Sequence[Shard]) -> bytes:
    """The text of ``model.safetensors.index.json``."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
