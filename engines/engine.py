"""Opens an engine directory and drives it: splits calls at chunk edges, keeps ragged batches apart, samples greedily.

What a call may look like is the graph's contract (``exporter/graph.py``): the positions of a sequence are
consecutive and lie in one chunk. The driver keeps it in three moves:

1. Sequences are sorted by length, longest first, so those still at work are always a prefix of the batch,
   and their cache rows one piece of memory.
2. A prefill goes in pieces that end at chunk edges (and at ``max_tokens``). Sequences start at position 0
   together, so an edge is an edge for all of them.
3. What a shorter sequence's padding writes lies behind its end, where nothing looks before it is overwritten.
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuntyard.engines.manifest import EngineManifest, file_state, load_manifest, verify_files
from shuntyard.errors import EngineError, NotFiniteError

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


class Runner(abc.ABC):
    """One backend's session with its KV cache on the device."""

    @abc.abstractmethod
    def start(self, batch: int, context: int) -> None:
        """Begins anew with zeroed caches for so many sequences of at most so many tokens."""

    @abc.abstractmethod
    def step(self, input_ids: Tokens, position_ids: Tokens, logits_indices: Tokens) -> Floats:
        """One call on the first ``B`` sequences: ``[B, S], [B, S], [B, R]`` -> logits ``[B, R, V]``."""

    @abc.abstractmethod
    def cache_rows(self, layer: int, active: int, rows: Tokens) -> tuple[Floats, Floats]:
        """Keys and values ``[active, len(rows), G, D]`` that the first sequences have in these rows of a cache."""

    @property
    def marked(self) -> dict[str, Floats]:
        """What the last call gave for the values in between that are marked as outputs, by name; a copy."""
        return {}


@dataclass
class Recording:
    """What an engine computed for ``B`` sequences of at most ``S`` tokens; NaN behind a sequence's end."""

    logits: Floats  # [B, S, V]
    keys: list[Floats]  # of each layer [B, S, G, D], as they stood in the cache after the call that wrote them
    values: list[Floats]
    inside: dict[str, Floats]  # of a marked engine: [B, S, ...] by name


class Engine:
    """An opened engine. It has one KV cache: one call or stream at a time, from one thread."""

    def __init__(self, path: Path, manifest: EngineManifest, runner: Runner) -> None:
        self.path, self.manifest, self._runner = path, manifest, runner
        self._state = file_state(path, manifest)
        self._epoch = 0  # of the cache: every start is a new one

    def _start(self, batch: int, context: int) -> None:
        """Begins anew; weights that were written to since the engine was opened would be used as they are now."""
        if file_state(self.path, self.manifest) != self._state:
            raise EngineError(
                f"{self.path}: has changed since the engine was opened",
                hint="weights are hard links: somebody wrote into the checkpoint's file; export and build again",
            )
        self._epoch += 1
        self._runner.start(batch, context)

    def logits(self, tokens: Any, lengths: Sequence[int] | None = None, *, decode_from: int | None = None) -> Floats:
        """Logits of every token, from an empty cache.

        Args:
            tokens: int64 ``[B, S]``.
            lengths: real length of each sequence, for a ragged batch padded on the right; default all S.
            decode_from: feed the tokens from this place on one at a time, as generation does.

        Returns:
            float32 ``[B, S, V]``; NaN behind a sequence's end. Each sequence's are what it gets when run alone.

        Raises:
            EngineError: the tokens are not integers of the vocabulary, or too many for the engine.
            NotFiniteError: the engine computed NaN or infinity.
        """
        batch = _Batch(self, tokens, lengths)
        decode_from = None if decode_from is None else _integer(decode_from, "decode_from")
        out = np.full((*batch.tokens.shape, self.manifest.vocab_size), np.nan, np.float32)
        for _ in self._steps(batch, decode_from, out):
            pass
        return out

    def _steps(self, batch: _Batch, decode_from: int | None, out: Floats) -> Iterator[tuple[int, int, int]]:
        """Makes all calls of a batch, each token's logits into ``out``; gives ``begin, end, active`` after each."""
        for begin, end, ids, positions in batch.pieces(extra=0, decode_from=decode_from):
            every = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
            piece = self._runner.step(ids, positions, every)
            for row, place in batch.places(begin, end, len(ids)):
                out[place] = _finite(piece[row, : place[1].stop - begin])
            yield begin, end, len(ids)

    def record(self, tokens: Any, lengths: Sequence[int] | None = None, *, decode_from: int | None = None) -> Recording:
        """As :meth:`logits`, with what the KV cache was given, and what a marked engine shows of its inside.

        Raises:
            EngineError: as for :meth:`logits`.
            NotFiniteError: as for :meth:`logits`.
        """
        batch = _Batch(self, tokens, lengths)
        shapes = self.manifest.cache
        full = batch.tokens.shape

        def empty(*rest: int) -> Floats:
            return np.full((*full, *rest), np.nan, np.float32)

        found = Recording(
            empty(self.manifest.vocab_size),
            [empty(shape.heads, shape.head_dim) for shape in shapes],
            [empty(shape.heads, shape.head_dim) for shape in shapes],
            {},
        )
        for begin, end, active in self._steps(batch, decode_from, found.logits):
            positions = np.arange(begin, end)
            # A chunked layer's cache has a row for each position of the chunk, any other one for each position.
            caches = [self._runner.cache_rows(shape.layer, active, positions % shape.rows) for shape in shapes]
            inside = {
                name: value.reshape(active, end - begin, *value.shape[value.ndim - 1 :])
                for name, value in self._runner.marked.items()
            }
            for row, place in batch.places(begin, end, active):
                own = place[1].stop - begin
                for i, (key, value) in enumerate(caches):
                    found.keys[i][place], found.values[i][place] = key[row, :own], value[row, :own]
                for name, part in inside.items():
                    found.inside.setdefault(name, empty(part.shape[-1]))[place] = part[row, :own]
        return found

    def generate(
        self,
        tokens: Any,
        max_new_tokens: int,
        lengths: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
    ) -> Tokens:
        """Greedy continuation.

        Args:
            tokens: int64 ``[B, S]``.
            max_new_tokens: how many to add at most.
            lengths: as for :meth:`logits`.
            stop: token ids that end a sequence; default the checkpoint's end-of-sequence ids.

        Returns:
            int64 ``[B, N]`` with ``N <= max_new_tokens`` the new tokens only; -1 behind a sequence's stop token.

        Raises:
            EngineError: as for :meth:`logits`, or the context would be exceeded.
        """
        steps = list(self.stream(tokens, max_new_tokens, lengths, stop))
        if not steps:
            return np.empty((len(np.atleast_2d(tokens)), 0), np.int64)
        return np.stack(steps, axis=1)

    def stream(
        self,
        tokens: Any,
        max_new_tokens: int,
        lengths: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
    ) -> Iterator[Tokens]:
        """As :meth:`generate`, one int64 ``[B]`` a step as it comes.

        Raises:
            EngineError: as for :meth:`generate`; and, at the next step, if another call has used the engine meanwhile.
        """
        if max_new_tokens < 0:
            raise EngineError(f"max_new_tokens is {max_new_tokens}, must not be negative", hint="0 gives no tokens")
        batch = _Batch(self, tokens, lengths)
        stops = self.manifest.eos_token_ids if stop is None else list(stop)
        batch.check_context(max(0, max_new_tokens - 1))
        return self._stream(batch, max_new_tokens, stops) if max_new_tokens else iter(())

    def _stream(self, batch: _Batch, max_new_tokens: int, stops: list[int]) -> Iterator[Tokens]:
        rows = len(batch.order)
        newest = np.zeros(rows, np.int64)  # in sorted order, as all below
        for begin, end, ids, positions in batch.pieces(extra=max_new_tokens - 1):
            last = np.asarray(batch.sorted_lengths[: len(ids)]) - 1
            here = (begin <= last) & (last < end)
            picked = self._runner.step(ids, positions, np.where(here, last - begin, 0)[:, None])
            newest[: len(ids)][here] = _finite(picked[here, 0]).argmax(axis=1)
        epoch = self._epoch
        positions = np.asarray(batch.sorted_lengths, np.int64)
        ended = np.zeros(rows, bool)
        for count in range(max_new_tokens):
            yield batch.unsorted(np.where(ended, -1, newest))
            ended |= np.isin(newest, stops)
            if ended.all() or count == max_new_tokens - 1:
                return
            if self._epoch != epoch:
                raise EngineError(
                    "another call has taken this engine's KV cache in the middle of a stream",
                    hint="finish a stream before the next call, or open the engine a second time",
                )
            # An ended sequence rides along, at the place where it ended: nothing of it is looked at any more.
            picked = self._runner.step(newest[:, None], positions[:, None], np.zeros((rows, 1), np.int64))
            newest[~ended] = _finite(picked[~ended, 0]).argmax(axis=1)
            positions = np.where(ended, positions, positions + 1)


def _finite(logits: Floats) -> Floats:
    """The logits themselves.

    Raises:
        NotFiniteError: one is NaN or infinite: no token is the most likely one then.
    """
    if not np.isfinite(logits).all():
        raise NotFiniteError(
            "the engine computed logits that are not finite",
            hint="activations overflow: build with --dtype fp32 (or bf16, on a GPU)",
        )
    return logits


def _integer(value: Any, name: str) -> int:
    """An integer and nothing that would have to be rounded."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise EngineError(f"{name} is {value!r:.80}, must be an integer", hint="convert it first") from error


class _Batch:
    """Checked tokens, sorted by length, and the calls that prefill them."""

    def __init__(self, engine: Engine, tokens: Any, lengths: Sequence[int] | None) -> None:
        limits, vocab = engine.manifest.limits, engine.manifest.vocab_size
        try:
            array = np.asarray(tokens)
        except ValueError as error:
            raise EngineError(
                f"tokens must be integers [batch, sequence]: {error}",
                hint="pad shorter sequences on the right and give their lengths",
            ) from error
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
            raise EngineError(
                f"tokens must be integers [batch, sequence], not empty; got {array.dtype} {list(array.shape)}",
                hint="pad shorter sequences on the right and give their lengths",
            )
        batch, length = array.shape
        if batch > limits.max_batch:
            raise EngineError(
                f"a batch of {batch} is larger than the engine's {limits.max_batch}", hint="build with --max-batch"
            )
        if lengths is not None and not isinstance(lengths, Sequence | np.ndarray):
            raise EngineError(f"lengths are {lengths!r:.80}, must be a list", hint="one length a sequence")
        own = [length] * batch if lengths is None else [_integer(n, "a length") for n in lengths]
        if len(own) != batch or not all(1 <= n <= length for n in own):
            raise EngineError(f"lengths {own} must be {batch} numbers in 1..{length}", hint="one length a sequence")
        for row, n in enumerate(own):
            bad = (array[row, :n] < 0) | (array[row, :n] >= vocab)
            if bad.any():
                place = int(bad.argmax())
                raise EngineError(
                    f"token {int(array[row, place])} at [{row}, {place}] is not in the vocabulary of {vocab}",
                    hint="is the text from another tokenizer?",
                )
        self._engine = engine
        self.order = np.argsort(-np.asarray(own), kind="stable")
        self.sorted_lengths = [own[i] for i in self.order]
        padding = np.arange(length)[None, :] >= np.asarray(own)[:, None]
        self.tokens = np.where(padding, 0, array).astype(np.int64)[self.order]

    def unsorted(self, values: Tokens) -> Tokens:
        """Values ``[B]`` in the caller's order."""
        out = np.empty_like(values)
        out[self.order] = values
        return out

    def pieces(self, extra: int, decode_from: int | None = None) -> Iterator[tuple[int, int, Tokens, Tokens]]:
        """Starts the runner, then gives ``begin, end, ids [A, S], positions [A, S]`` of each call, A still active.

        ``extra`` tokens of context are kept for decoding; from ``decode_from`` on, pieces are single tokens.
        """
        limits, longest = self._engine.manifest.limits, self.sorted_lengths[0]
        self.check_context(extra)
        self._engine._start(len(self.order), longest + extra)
        begin = 0
        while begin < longest:
            edge = longest if limits.chunk is None else (begin // limits.chunk + 1) * limits.chunk
            end = min(edge, longest, begin + limits.max_tokens)
            if decode_from is not None:
                end = min(end, decode_from) if begin < decode_from else begin + 1
            active = sum(n > begin for n in self.sorted_lengths)
            positions = np.broadcast_to(np.arange(begin, end), (active, end - begin))
            yield begin, end, self.tokens[:active, begin:end], np.ascontiguousarray(positions)
            begin = end

    def places(self, begin: int, end: int, active: int) -> Iterator[tuple[int, tuple[int, slice]]]:
        """Of each active row in sorted order: where its own tokens of a call stand in the caller's arrays."""
        for row in range(active):
            yield row, (int(self.order[row]), slice(begin, min(end, self.sorted_lengths[row])))

    def check_context(self, extra: int) -> None:
        """Whether the longest sequence and ``extra`` tokens after it fit; see :meth:`Engine.generate`."""
        limits, longest = self._engine.manifest.limits, self.sorted_lengths[0]
        if longest + extra > limits.max_context:
            raise EngineError(
                f"{longest} tokens and {extra} after them exceed the engine's context of {limits.max_context}",
                hint="ask for less, or build with a larger --max-context (the model's own is the largest)",
            )


def open_engine(directory: str | Path, *, verify: bool = False, marked: bool = False) -> Engine:
    """Opens an engine directory.

    Args:
        directory: what ``shuntyard build`` wrote.
        verify: read every file and hold it to its recorded hash, not only those that were written to since.
        marked: give out the values in between, too (:meth:`Engine.record`). ONNX Runtime's graph is marked as it is
            opened; a TensorRT plan must have been built so.

    Raises:
        CheckpointError: there is no manifest.
        EngineError: the directory is damaged, or this machine cannot run the engine.
    """
    path = Path(directory)
    manifest = load_manifest(path)
    verify_files(path, manifest, contents=verify)
    runner: Runner
    if manifest.backend == "onnxruntime":
        from shuntyard.engines.onnxruntime_runner import OnnxRuntimeRunner

        runner = OnnxRuntimeRunner(path / manifest.engine_file, manifest, marked=marked)
    elif marked and not manifest.marked:
        raise EngineError(
            f"{path}: gives out nothing of its inside", hint="build an engine with --mark beside the one that is used"
        )
    else:
        from shuntyard.engines.tensorrt_runner import TensorRTRunner

        runner = TensorRTRunner(path, manifest)
    return Engine(path, manifest, runner)
