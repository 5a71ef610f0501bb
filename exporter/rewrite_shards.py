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

    @property
    def row_bytes(self) -> int:
        """Size of a row of the rectangle."""
        return self.columns * self.target.item_bytes

    @property
    def nbytes(self) -> int:
        """Size of the rectangle."""
        return self.rows * self.row_bytes

    def bands(self, nbytes: int) -> Iterator[Chunk]:
        """The same in smaller parts, of about ``nbytes``, where nothing is transposed.

        They pass through a core's cache. A transposed chunk stays whole: it is read in runs as long as it is high.
        """
        if any(piece.transpose for piece in self.blocks):
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
            )


@dataclass(frozen=True)
class Shard:
    """A new file: its name, all bytes before its data, its size, and its tensors' chunks."""

    name: str
    header: bytes
    file_bytes: int
    targets: tuple[Target, ...]
    chunks: tuple[Chunk, ...]


def plan_shards(targets: Sequence[Target], shard_bytes: int, chunk_bytes: int) -> list[Shard]:
    """Fills shards with targets in their order, each to ``shard_bytes`` of data at most, or with one larger tensor.

    Within a shard the wider types come first, so that each tensor is aligned to its own type, as the safetensors
    library does it.
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
    ordered = sorted(group, key=lambda target: -target.item_bytes)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for target in ordered:
        offsets = [reached, reached + target.nbytes]
        entries[target.name] = {"dtype": target.dtype, "shape": list(target.shape), "data_offsets": offsets}
        reached += target.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    chunks: list[Chunk] = []
    place = len(header)
    for target in ordered:
        chunks += _cut(target, place, chunk_bytes)
        place += target.nbytes
    return Shard(name, header, place, tuple(ordered), tuple(chunks))


def _cut(target: Target, place: int, chunk_bytes: int) -> Iterator[Chunk]:
    item, width = target.item_bytes, matrix(target.shape)[1]
    stride = width * item
    for blocks in target.pieces:
        height = blocks[0].shape[0]
        least = LEAST_RUN if any(piece.transpose for piece in blocks) else 1
        rows = min(height, max(chunk_bytes // max(stride, 1), least, 1))
        columns = min(width, max(chunk_bytes // max(rows * item, 1), 1))
        if height and width:
            yield from _rectangles(Chunk(target, blocks, 0, height, 0, width, place, stride), rows, columns)
        place += height * stride


def index_of(shards: Sequence[Shard]) -> bytes:
    """The text of ``model.safetensors.index.json``."""
    weight_map = {target.name: shard.name for shard in shards for target in shard.targets}
    total = sum(target.nbytes for shard in shards for target in shard.targets)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
