"""Quantising weights against copying them: the same source, the same disk, both synced to it at the end.

The source holds experts of Llama 4 Scout's widths, fused, in bf16. It is quantised as it lies (each stored matrix is
taken for ``[out, in]``) and turned (Scout's own layout: an output channel is a column). What is compared with is a copy
by the same means: as many threads, ``preadv`` and ``pwrite`` of a megabyte, read ahead, the disk space reserved, the
page cache given back; it reads the source through, and writes as many bytes as the quantised file has.

*Cold*: the source was dropped from the page cache before each run; *warm*: it was read just before. Each run has a
process of its own, which has imported torch, as an export has. First, outputs with 1, 2 and 4 threads are hashed, and
the last expert's are compared with the definition.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from bench.rewrite import (
    EXPERT_BYTES,
    HIDDEN,
    INNER,
    in_turns,
    peak_bytes,
    print_table,
    summary,
    values_of,
    write_source,
)
from bench.rewrite import run as run_script
from shuntyard.exporter import quantise_native, quantise_stream
from shuntyard.exporter.quantise import quantise_matrix
from shuntyard.exporter.resumable import resumable_directory, sync
from shuntyard.exporter.rewrite import Piece, Quantize, Target, default_workers, request_key, rewrite
from shuntyard.exporter.safetensors_header import read_header

LEAST_SHARE = 0.8
"""The claim for FP8 by channel: of what the copy achieves."""

MOST_MEMORY = 1_000_000_000
"""The claim: bytes, of the whole process."""

THREADS = (1, 2, 4)

FORMS = {
    "channel": (Quantize("channel"), False),
    "channel, turned": (Quantize("channel"), True),
    "tensor": (Quantize("tensor"), False),
    "tensor, turned": (Quantize("tensor"), True),
    "int4": (Quantize("group", 128), False),
    "int4, turned": (Quantize("group", 128), True),
}
LYING = (("gate_up", "gate_up_proj", None), ("down", "down_proj", None))
TURNED = (
    ("gate", "gate_up_proj", (0, INNER)),
    ("up", "gate_up_proj", (INNER, 2 * INNER)),
    ("down", "down_proj", None),
)
COPIES = {"copy to 8 bits": "channel", "copy to 4 bits": "int4"}
CLAIMED = ("channel", "channel, turned")

_BLOCK, _JOB = 2**20, 80 * 2**20  # bytes that are written at a time, and by a thread before it takes the next


def targets_of(source: Path, form: str) -> Iterator[Target]:
    """A target for each expert and part."""
    how, turned = FORMS[form]
    entries = {entry.name: entry for entry in read_header(source).tensors}
    for e in range(entries["down_proj"].shape[0]):
        for part, name, columns in TURNED if turned else LYING:
            piece = Piece(entries[name], e, columns, transpose=turned)
            own = Quantize(how.form, how.group_size, f"{e}.{part}.scale")
            yield Target(f"{e}.{part}.weight", own.dtype, piece.shape, ((piece,),), own)


def copy(source: Path, out: Path, written: int, workers: int) -> None:
    """Reads all of the source, and writes ``written`` bytes of what it read, evenly."""
    size = source.stat().st_size
    reading, writing = os.open(source, os.O_RDONLY), os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(writing, 0, written)
    ratio = size / written
    begins = range(0, written, _JOB)

    def ask(number: int) -> None:
        if number < len(begins):
            first, last = int(begins[number] * ratio), min(int((begins[number] + _JOB) * ratio), size)
            for place in range(first, last, 128 * 1024):
                os.posix_fadvise(reading, place, min(128 * 1024, last - place), os.POSIX_FADV_WILLNEED)

    def work(number: int) -> None:
        ask(number + workers)
        end = min(begins[number] + _JOB, written)
        buffer = memoryview(bytearray(int(_BLOCK * ratio) + 2))
        for place in range(begins[number], end, _BLOCK):
            last = min(place + _BLOCK, end)
            first, until = int(place * ratio), size if last == written else int(last * ratio)
            while first < until:
                first += os.preadv(reading, [buffer[: until - first]], first)
            os.pwrite(writing, buffer[: last - place], place)
        for begin in (begins[number], max(begins[number] - 2**30, 0)):
            os.posix_fadvise(writing, begin, 2**29 if begin != begins[number] else _JOB, os.POSIX_FADV_DONTNEED)

    for number in range(workers):
        ask(number)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, range(len(begins))):
            pass
    sync(writing)
    os.close(reading)
    os.close(writing)


def child(what: str, source: Path, out: Path, workers: int, made_by: str) -> None:
    """In a process of its own. Prints seconds, seconds of the processors, and the most memory that was resident."""
    import torch  # noqa: F401

    if made_by == "numpy":
        mock.patch.object(quantise_stream, "native", return_value=None).start()
    elif quantise_native.native() is None:
        raise RuntimeError("install shuntyard again: its compiled loops are not there")
    form = COPIES.get(what, what)
    targets = list(targets_of(source, form))
    begin, cpu = time.perf_counter(), sum(os.times()[:2])
    if what in COPIES:
        out.mkdir()
        copy(source, out / "copy", sum(target.nbytes for target in targets), workers)
        sync(out)
    else:
        with resumable_directory(out, request_key(targets, "")) as place:
            rewrite(targets, place, source_fingerprint="", workers=workers)
    seconds, cpu = time.perf_counter() - begin, sum(os.times()[:2]) - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}))


def run(what: str, source: Path, out: Path, cache: str, workers: int, made_by: str) -> dict[str, float]:
    """One measurement."""
    return run_script(what, source, out, cache, workers, __file__, ["--made-by", made_by])


def check(what: str, source: Path, out: Path) -> None:
    """Compares the last target with the definition.

    Raises:
        ValueError: they differ.
    """
    stored = {entry.name: values_of(entry) for entry in read_header(source).tensors}["down_proj"][-1]
    found = {entry.name: values_of(entry) for p in out.glob("*.safetensors") for entry in read_header(p).tensors}
    how, turned = FORMS[what]
    codes, scale = quantise_matrix((stored.T if turned else stored).astype(np.float32), how)
    last = source_experts(source) - 1
    if found[f"{last}.down.weight"].tobytes() != codes.tobytes():
        raise ValueError(f"{what}: the codes of the last matrix differ")
    if found[f"{last}.down.scale"].tobytes() != scale.tobytes():
        raise ValueError(f"{what}: the scales of the last matrix differ")


def source_experts(source: Path) -> int:
    """How many there are."""
    return next(entry.shape[0] for entry in read_header(source).tensors if entry.name == "down_proj")


def hashes(what: str, source: Path, out: Path, made_by: str) -> dict[str, Any]:
    """SHA-256 over all files with each number of threads, and the most memory that any took."""
    found: dict[int, str] = {}
    peaks: dict[int, float] = {}
    for threads in THREADS:
        peaks[threads] = run(what, source, out, "warm", threads, made_by)["peak_bytes"]
        digest = hashlib.sha256()
        for path in sorted(out.iterdir()):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        found[threads] = digest.hexdigest()
    check(what, source, out)
    return {"sha256": found, "peak_bytes": peaks, "same": len(set(found.values())) == 1}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders in turns, cold and warm."""
    experts = max(1, round(args.bytes / EXPERT_BYTES))
    source, out = folder / "source.safetensors", folder / "out"
    write_source(source, experts)
    neighbours = timing.Neighbours()
    threads = {name: hashes(name, source, out, args.made_by) for name in args.forms}
    copies = [name for name, of in COPIES.items() if any((of == "int4") == ("int4" in form) for form in args.forms)]
    names = [*copies, *args.forms]
    results: dict[str, Any] = {}
    for cache in args.cache:
        one = partial(run, source=source, out=out, cache=cache, workers=args.workers, made_by=args.made_by)
        runs = in_turns(names, args.rounds, one)
        of = {name: name if name in COPIES else next(c for c, f in COPIES.items() if (f == "int4") == ("int4" in name))
              for name in names}  # fmt: skip
        results[cache] = {name: summary(runs[name], runs[of[name]]) for name in names}
    shutil.rmtree(out)
    return {
        "what": "quantising weights against copying them",
        "machine": timing.machine(args.workers) | {"cpu_share_of_others": neighbours.share()},
        "source": {"experts": experts, "hidden": HIDDEN, "inner": INNER, "bytes": source.stat().st_size},
        "made_by": args.made_by,
        "rounds": args.rounds,
        "threads": threads,
        "results": results,
    }


def main() -> None:
    """The command line. Exit status 1: slower than the claim, more memory, or bytes that depend on threads."""
    parser = argparse.ArgumentParser(description="Quantising weights against copying them.")
    parser.add_argument("--bytes", type=float, default=10e9, help="of the source (default: %(default).0f)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--cache", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--made-by", choices=["native", "numpy"], default="native")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--work", type=Path, help="folder on the disk that is meant; takes up to 2 times --bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=[*COPIES, *FORMS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.work / "source.safetensors", args.work / "out", args.workers, args.made_by)
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="quantise-") as folder:
        result = measure(args, Path(folder))
    print_table(result, width=140)
    timing.write_json(args.json, result)
    failed = False
    for name, own in result["threads"].items():
        peak = max(own["peak_bytes"].values())
        held = own["same"] and peak <= MOST_MEMORY
        failed |= not held
        hashed = " ".join(f"{threads}:{digest[:16]}" for threads, digest in own["sha256"].items())
        print(f"{'ok' if held else 'FAIL'}: {name}: bytes by threads {hashed}, at most {peak / 1e6:.0f} MB")
    for cache, rows in result["results"].items():
        for name in (form for form in CLAIMED if form in rows):
            share = rows[name]["share_of_copy"]["median"]
            failed |= share < LEAST_SHARE
            print(f"{'ok' if share >= LEAST_SHARE else 'FAIL'}: {name}, {cache}: {share:.2f} of a copy's rate")
    sys.exit(failed)


if __name__ == "__main__":
    main()
