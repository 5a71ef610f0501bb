"""Quantises one chunk of a rewrite: its codes and scales, band by band, the same numbers as ``quantise`` defines.

A band of whole rows is filled as a plain one would be, in bf16 where all that it is made of is bf16 and in fp32 else,
and quantised while it is in the cache. By tensor, no code is known before the largest value of the whole matrix: such
a target is one chunk, read twice; the first time as it lies, for a maximum needs nothing turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shuntyard.exporter.quantise import fp8_codes, fp8_scale, quantise_matrix
from shuntyard.exporter.quantise_native import native
from shuntyard.exporter.rewrite_kernels import Scratch, Sources, fill, fill_into, parts_of
from shuntyard.exporter.rewrite_request import Quantize, Target
from shuntyard.exporter.rewrite_shards import Chunk

BAND_VALUES = 2**19
"""Of a band that is read as it lies: it stays in a core's cache, and the reads are long."""

TURNED_BYTES = 96 * 2**20
"""Of the values of a band that is turned: the more, the longer are the runs that are read. In bf16, one matrix of an
expert of Llama 4; its codes take half as much again."""

_TILE_VALUES = 2**16  # of what numpy quantises at a time, with about ten temporary arrays as large

_STORED: dict[str, Any] = {"F8_E4M3": np.uint8, "I32": np.int32, "F32": np.float32, "BF16": ml_dtypes.bfloat16}


def quantised(chunk: Chunk, sources: Sources, scratch: Scratch) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Places in the shard, and the bytes that belong there: codes of each band, at last the scales.

    The bytes are valid until the next are asked for.

    Raises:
        CheckpointError: a value is not finite; or a file changed. Names tensor and place.
    """
    how = chunk.target.quantize
    assert how is not None
    weight, scale = chunk.target.stored
    plain = all(piece.scale is None and piece.entry.dtype == "BF16" for piece in chunk.blocks)
    source = "BF16" if plain else "F32"
    columns, scale_columns = weight.shape[1], scale.shape[-1]
    scale_rows = 1 if how.form == "tensor" else chunk.rows
    scales = scratch.array("scales", scale_rows, scale_columns, _STORED[scale.dtype])
    if how.form == "tensor":
        scales[0, 0] = fp8_scale(_largest(chunk, source, sources, scratch))[0]
    most = TURNED_BYTES // np.dtype(_STORED[source]).itemsize if chunk.turned else BAND_VALUES
    bands = -(-chunk.rows // max(1, most // chunk.columns))
    for band in chunk.rows_of(-(-chunk.rows // bands)):
        values = _values(band, source, sources, scratch)
        codes = scratch.array("codes", band.rows, columns, _STORED[weight.dtype])
        first = band.row - chunk.row
        own = scales if how.form == "tensor" else scales[first : first + band.rows]
        quantise_rows(values, how, codes, own)
        yield band.place, codes.view(np.uint8).reshape(-1)
    yield chunk.scale_place, scales.view(np.uint8).reshape(-1)


def quantise_rows(values: NDArray[Any], how: Quantize, codes: NDArray[Any], scales: NDArray[Any]) -> None:
    """Quantises bf16 or fp32 ``values [rows, columns]`` into ``codes`` and ``scales``; by tensor, with ``scales``."""
    if (twin := native()) is not None:
        twin.quantise_rows(values, how, codes, scales)
        return
    step = max(1, _TILE_VALUES // values.shape[1])
    for row in range(0, len(values), step):
        w = values[row : row + step].astype(np.float32)
        if how.form == "tensor":
            codes[row : row + step] = fp8_codes(w, scales).view(np.uint8)
        else:
            made, scale = quantise_matrix(w, how)
            codes[row : row + step], scales[row : row + step] = made.view(codes.dtype), scale


def _values(chunk: Chunk, dtype: str, sources: Sources, scratch: Scratch) -> NDArray[Any]:
    """The rectangle's values in ``dtype``, ``[rows, columns]``, all finite. Where all of it is turned, they are read as
    they lie, and what is returned is a view.
    """
    if not all(piece.transpose for piece in chunk.blocks):
        plain = replace(chunk.target, dtype=dtype, quantize=None)
        return fill(replace(chunk, target=plain), sources, scratch).view(_STORED[dtype])
    bits = np.uint16 if dtype == "BF16" else np.uint32
    values: NDArray[Any] = scratch.array("out", chunk.columns, chunk.rows, bits, apart=True)
    for piece, (row, last_row, _, _), at in parts_of(chunk):
        lying = replace(piece, transpose=False)
        target = Target(chunk.target.name, dtype, lying.shape, ((lying,),))
        part = Chunk(target, (lying,), row, last_row - row, chunk.row, chunk.rows, 0, 0)
        fill_into(values[at : at + last_row - row], part, sources, scratch)
    return values.T.view(_STORED[dtype])


def _largest(chunk: Chunk, dtype: str, sources: Sources, scratch: Scratch) -> NDArray[np.float32]:
    """The largest magnitude of a whole matrix, ``[1]``."""
    bits, positive = (np.uint16, 0x7FFF) if dtype == "BF16" else (np.uint32, 0x7FFFFFFF)
    largest = 0
    for piece in chunk.blocks:
        lying = replace(piece, transpose=False)
        rows, columns = lying.shape
        target = Target(chunk.target.name, dtype, lying.shape, ((lying,),))
        whole = Chunk(target, (lying,), 0, rows, 0, columns, 0, 0)
        for band in whole.rows_of(max(1, BAND_VALUES // columns)):
            values = _values(band, dtype, sources, scratch)
            # Of finite numbers, the larger magnitude has the larger bits; two maxima are cheaper than a copy.
            above = int(values.view(np.int16 if dtype == "BF16" else np.int32).max())
            largest = max(largest, above, int(values.view(bits).max()) & positive)
    found: NDArray[np.float32] = np.array([largest], bits).view(_STORED[dtype]).astype(np.float32)
    return found
