"""Writes weights anew, in another type or layout, as a stream: memory stays the same however large a tensor is.

A request (``rewrite_request``) says which stored matrices make each new tensor. ``rewrite_shards`` lays the new tensors
out in shards and cuts them into chunks of tens of megabytes; ``rewrite_kernels`` makes a chunk's bytes, of which
``quantise_stream`` makes quantised ones and their scales. Here, threads work through the chunks: numpy's copies and
casts, ``pread`` and ``pwrite`` all let other threads run meanwhile. A chunk's bytes depend on nothing but the request,
so they are the same with any number of threads.

Every value is seen, and NaN and infinity are refused, in copies too. A chunk is done once ``write`` took it. Each shard
is synced to the disk as it becomes complete, all before the directory appears (``resumable`` says why that is enough).
"""

from __future__ import annotations

import os
import queue
import shutil
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.errors import OutputError
from shuntyard.exporter.quantise_stream import quantised
from shuntyard.exporter.resumable import Journal, Workspace, journal_files, sync
from shuntyard.exporter.rewrite_kernels import Scratch, Sources, fill, prefetch
from shuntyard.exporter.rewrite_request import Piece, Quantize, Target, check_request, describe
from shuntyard.exporter.rewrite_shards import INDEX_NAME, Chunk, Shard, index_of, plan_shards
from shuntyard.exporter.safetensors_header import Header, read_header

__all__ = ["Piece", "Quantize", "Target", "request_key", "rewrite"]

SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 80 * 2**20
"""What is done or not done after an interruption; in bf16, one matrix of an expert of Llama 4."""

WRITE_BYTES = 2**20
"""What is written at a time. Where nothing is transposed, a band of this size is read, cast and written while it is in
the core's cache. Larger writes also make the kernel take larger pages: 80 MiB at a time took twice the processor time.
"""

CACHED_BYTES = 2**29
"""How much of a shard stays in the page cache behind the place that is written. A cache that grows takes new pages from
the machine, at up to three times the processor time of pages that were just given back (a virtual machine, 8 GB).
"""

MOST_WORKERS = 4
"""Each holds a chunk: with torch beside it, the process stays below 1 GB. More would rather wait for the disk."""

FORMAT = 1
"""Of what is written. A later version of shuntyard that writes other bytes must not go on with ours."""


def request_key(
    targets: Sequence[Target],
    source_fingerprint: str,
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> str:
    """Names a request: another source, target, layout or version has another key.

    Raises:
        CheckpointError: a file of the source is not there.
    """
    extra = {"format": FORMAT, "source": source_fingerprint, "shard": shard_bytes, "chunk": chunk_bytes}
    return describe(targets, extra)


def rewrite(
    targets: Sequence[Target],
    work: Workspace,
    *,
    source_fingerprint: str,
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Header]:
    """Writes all targets into new shards and their index in ``work.directory``, going on with what is done there.

    ``progress`` is called in this thread with a tensor's name, and the bytes that are done and that there are in all.

    Returns:
        The headers of the new shards, as they are read back.

    Raises:
        CheckpointError: the source is not as the request says, changed meanwhile, or holds a value that is not finite
            or does not fit its new type.
        UnsupportedError: a type that cannot be rewritten.
        OutputError: there is not enough space.
        OSError: the shards cannot be written; ``resumable_directory`` explains it.
    """
    check_request(targets)
    shards = plan_shards(targets, shard_bytes, chunk_bytes)
    with ExitStack() as stack:
        sources = Sources(targets)
        stack.callback(sources.close)
        # Only now: a file that changes before it is opened has another key, one that changes later is found out.
        key = request_key(targets, source_fingerprint, shard_bytes, chunk_bytes)
        journal = Journal(work.journal, key, [shard.name for shard in shards])
        journal.read()
        kept = _forget_damaged(shards, work.directory, journal)
        _check_space(shards, kept, work)
        journal.open()
        stack.callback(journal.close)
        for i, shard in enumerate(shards):
            if i not in kept:
                _reserve(work.directory / shard.name, shard)
        files = stack.enter_context(_Files(shards, work.directory))
        _Run(shards, files, sources, journal, progress).run(workers or default_workers())
        sources.check_unchanged()
        index = work.directory / INDEX_NAME
        index.unlink(missing_ok=True)
        index.write_bytes(index_of(shards))
        sync(index)
        sync(work.directory)
    return [read_header(work.directory / shard.name) for shard in shards]


def default_workers() -> int:
    """As many as there are cores for this process, within reason."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def _forget_damaged(shards: Sequence[Shard], directory: Path, journal: Journal) -> set[int]:
    """Removes the files of an earlier run that cannot be continued, and their entries; tells which shards can."""
    known = journal.synced | {file for file, _ in journal.done}
    kept = {i for i in known if _is_ours(directory / shards[i].name, shards[i])}
    for name in set(journal_files(journal.path)) - {shards[i].name for i in kept}:
        (directory / name).unlink(missing_ok=True)
    journal.done = {(file, part) for file, part in journal.done if file in kept}
    journal.synced &= kept
    return kept


def _is_ours(path: Path, shard: Shard) -> bool:
    """Whether a file is a shard that an earlier run began: its size and header, and no other name of the same file."""
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_size != shard.file_bytes or state.st_nlink != 1:
            return False
        with path.open("rb") as stream:
            return stream.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


def _check_space(shards: Sequence[Shard], kept: set[int], work: Workspace) -> None:
    missing, free = sum(shard.file_bytes for shard in shards), shutil.disk_usage(work.directory).free
    for i in kept:
        missing -= min((work.directory / shards[i].name).stat().st_blocks * 512, shards[i].file_bytes)
    if missing > free:
        raise OutputError(
            f"{work.target}: the new weights need {missing:,} bytes, {free:,} are free",
            hint="free some space, write to another file system, or keep the weights as they are stored",
        )


def _reserve(path: Path, shard: Shard) -> None:
    """Makes a new file with a shard's header and room for its data: the disk is full now, or will not be."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write(descriptor, memoryview(shard.header), 0)
        os.posix_fallocate(descriptor, 0, shard.file_bytes)
    finally:
        os.close(descriptor)


class _Files:
    """The shards' files, each open while it is worked on."""

    def __init__(self, shards: Sequence[Shard], directory: Path) -> None:
        self._paths = [directory / shard.name for shard in shards]
        self._descriptors: dict[int, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for shard in list(self._descriptors):
            self.close(shard)

    def __getitem__(self, shard: int) -> int:
        """A descriptor."""
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._paths[shard], os.O_WRONLY | os.O_NOFOLLOW)
        return self._descriptors[shard]

    def close(self, shard: int) -> None:
        os.close(self._descriptors.pop(shard))


def _write(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], place)
        data, place = data[written:], place + written


@dataclass(frozen=True)
class _Job:
    shard: int
    part: int
    chunk: Chunk


class _Run:
    """Works through all chunks that are not done."""

    def __init__(
        self,
        shards: Sequence[Shard],
        files: _Files,
        sources: Sources,
        journal: Journal,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._shards, self._files, self._sources, self._journal = shards, files, sources, journal
        self._progress = progress
        jobs = [_Job(i, k, chunk) for i, shard in enumerate(shards) for k, chunk in enumerate(shard.chunks)]
        self._jobs = [job for job in jobs if (job.shard, job.part) not in journal.done]
        self._total = sum(job.chunk.nbytes for job in jobs)
        self._done = self._total - sum(job.chunk.nbytes for job in self._jobs)
        self._left = [len(shard.chunks) for shard in shards]
        for shard, _ in journal.done:
            self._left[shard] -= 1
        self._scratch: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        self._ahead: ThreadPoolExecutor

    def run(self, workers: int) -> None:
        for _ in range(workers):
            self._scratch.put(Scratch())
        self._progress("", self._done, self._total)
        # Asking for a range to be read waits where the disk has enough to do, which is no work for a worker.
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(1) as ahead:
            self._ahead = ahead
            for job in self._jobs[:workers]:
                self._ahead.submit(prefetch, job.chunk, self._sources)
            waiting: dict[Future[None], _Job | int] = {}
            todo = iter(range(len(self._jobs)))

            def submit() -> None:
                if (number := next(todo, None)) is not None:
                    job = self._jobs[number]
                    waiting[pool.submit(self._do, number, self._files[job.shard], workers)] = job

            def sync_shard(shard: int) -> None:
                waiting[syncing.submit(sync, self._files[shard])] = shard

            try:
                for shard, left in enumerate(self._left):
                    if left == 0 and shard not in self._journal.synced:
                        sync_shard(shard)
                for _ in range(2 * workers):
                    submit()
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        what = waiting.pop(future)
                        future.result()
                        if isinstance(what, int):
                            self._journal.mark_synced(what)
                            self._files.close(what)
                            continue
                        self._finish(what)
                        if self._left[what.shard] == 0:
                            sync_shard(what.shard)
                        submit()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _finish(self, job: _Job) -> None:
        self._journal.mark_done(job.shard, job.part)
        self._left[job.shard] -= 1
        self._done += job.chunk.nbytes
        self._progress(job.chunk.target.name, self._done, self._total)

    def _do(self, number: int, descriptor: int, ahead: int) -> None:
        """In a worker: one chunk, from the source to the shard. Meanwhile the system reads for a later one."""
        if number + ahead < len(self._jobs):
            self._ahead.submit(prefetch, self._jobs[number + ahead].chunk, self._sources)
        chunk = self._jobs[number].chunk
        scratch = self._scratch.get()
        try:
            self._write_chunk(chunk, descriptor, scratch)
        finally:
            self._scratch.put(scratch)
        # Asks for this part to be written to the disk now, instead of all at once when the shard is synced; and of what
        # was asked for some time ago, that it leaves the page cache, which the machine has better uses for.
        for begin, end in ((chunk.place, chunk.place + chunk.rows * chunk.stride), _behind(chunk)):
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _write_chunk(self, chunk: Chunk, descriptor: int, scratch: Scratch) -> None:
        if chunk.target.data is not None:
            _write(descriptor, memoryview(chunk.target.data), chunk.place)
        elif chunk.target.quantize is not None:
            for place, made in quantised(chunk, self._sources, scratch):
                codes: Any = made
                _write(descriptor, memoryview(codes), place)
        else:
            for band in chunk.bands(WRITE_BYTES):
                data: Any = fill(band, self._sources, scratch)
                if band.row_bytes == band.stride:
                    _write(descriptor, memoryview(data.reshape(-1)), band.place)
                else:
                    for row, line in enumerate(data):
                        _write(descriptor, memoryview(line), band.place + row * band.stride)


def _behind(chunk: Chunk) -> tuple[int, int]:
    """The range of the shard that lies ``CACHED_BYTES`` before a chunk, as far as again."""
    return max(chunk.place - 2 * CACHED_BYTES, 0), max(chunk.place - CACHED_BYTES, 1)
