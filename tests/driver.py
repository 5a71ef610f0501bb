"""Drives a model over whole sequences, as a caller of the exported graph must (see ``exporter/graph.py``).

A call never crosses a chunk edge, and a sequence that has ended takes part in no further call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.model import Llama4

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Cache = list[Any]
Step = Callable[[Ints, Ints, Cache], tuple[Floats, Cache]]
"""``input_ids [B, S], position_ids [B, S]``, cache -> logits ``[B, S, V]``, cache; batch is the cache's first axis."""


def calls(length: int, chunk: int | None, cuts: Iterable[int], decode_from: int) -> Iterator[tuple[int, int]]:
    """Where each call begins and ends: at chunk edges, at ``cuts``, and at every token from ``decode_from`` on."""
    edges = set(range(chunk, length, chunk)) if chunk else set()
    ends = sorted({n for n in edges | set(cuts) | set(range(decode_from, length)) if 0 < n < length} | {length})
    yield from zip([0, *ends[:-1]], ends, strict=True)


def run(
    step: Step,
    cache: Cache,
    ids: Ints,
    chunk: int | None,
    lengths: Sequence[int] | None = None,
    cuts: Iterable[int] = (),
    decode_from: int | None = None,
) -> Floats:
    """Logits ``[B, S, V]`` of every token from an empty cache, NaN behind a sequence's end."""
    batch, length = ids.shape
    ends = np.asarray([length] * batch if lengths is None else lengths)
    out: Floats | None = None
    for begin, end in calls(length, chunk, cuts, length if decode_from is None else decode_from):
        active = np.flatnonzero(ends > begin)
        if not len(active):
            break
        positions = np.broadcast_to(np.arange(begin, end), (len(active), end - begin)).copy()
        logits, new = step(ids[active, begin:end], positions, [rows[active] for rows in cache])
        for rows, updated in zip(cache, new, strict=True):
            rows[active] = updated
        if out is None:
            out = np.full((batch, length, logits.shape[2]), np.nan, np.float32)
        out[active, begin:end] = logits
    assert out is not None
    out[np.arange(length)[None, :] >= ends[:, None]] = np.nan
    return out


def eager(model: Llama4, batch: int, context: int) -> tuple[Step, Cache]:
    """A step of our model in eager PyTorch."""

    def step(ids: Ints, positions: Ints, cache: Cache) -> tuple[Floats, Cache]:
        pairs = list(zip(cache[0::2], cache[1::2], strict=True))
        with torch.no_grad():
            logits, new = model(torch.from_numpy(ids), torch.from_numpy(positions), pairs)
        return logits.numpy(), [part for pair in new for part in pair]

    return step, [part for pair in model.empty_cache(batch, context) for part in pair]


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one graph, on one thread and without its warnings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exported(
    session: onnxruntime.InferenceSession, config: Llama4Config, batch: int, context: int
) -> tuple[Step, Cache]:
    """A step of an exported graph in ONNX Runtime."""
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    presents = [i.name.replace("past_key_values", "present") for i in pasts]
    kind = np.float16 if "float16" in pasts[0].type else np.float32

    def step(ids: Ints, positions: Ints, cache: Cache) -> tuple[Floats, Cache]:
        every = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": every}
        feeds |= {i.name: rows for i, rows in zip(pasts, cache, strict=True)}
        logits, *new = session.run(["logits", *presents], feeds)
        return logits, new

    cache = []
    for i in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, config.cache_rows(i, context), config.head_dim)
        cache += [np.zeros(shape, kind), np.zeros(shape, kind)]
    return step, cache
