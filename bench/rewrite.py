"""Rewriting weights against copying them: the same source, the same disk, both synced to it at the end.

The source holds experts of Llama 4 Scout's widths, fused, in bf16. Three rewrites take turns with a plain copy
(``shutil.copyfile`` and ``fsync``): into transposed matrices, one for each expert (the hard case: every value moves),
into fp32, and into fp16. Each runs in a process of its own. As they write different amounts, what is compared is the
bytes that are read and written in a second.

*Cold*: the source was dropped from the page cache before each run; *warm*: it was read just before. Old outputs are
removed, and the disk is idle, before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from shuntyard.exporter.resumable import resumable_directory, sync
from shuntyard.exporter.rewrite import Piece, Target, default_workers, request_key, rewrite
from shuntyard.exporter.safetensors_header import TensorEntry, read_header

HIDDEN, INNER = 5120, 8192
EXPERT_BYTES = 3 * HIDDEN * INNER * 2

LEAST_SHARE = 0.8
"""The claim: of what the copy achieves."""

MOST_MEMORY = 1_000_000_000
"""The claim: bytes, of the whole process."""

REWRITES = {"transposed": "BF16", "fp32": "F32", "fp16": "F16"}
_NUMPY: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16, "F8_E4M3": np.uint8, "I32": np.int32
}  # fmt: skip
_BLOCK = 16 * 2**20


def write_source(path: Path, experts: int, seed: int = 0) -> None:
    """Random signs and mantissas; exponents from -23 to 0, so that all fit fp16, a third of them as subnormals."""
    rng = np.random.default_rng(seed)
    sizes = {"gate_up_proj": (experts, HIDDEN, 2 * INNER), "down_proj": (experts, INNER, HIDDEN)}
    header, reached = {}, 0
    for name, shape in sizes.items():
        nbytes = 2 * shape[0] * shape[1] * shape[2]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [reached, reached + nbytes]}
        reached += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(reached // (HIDDEN * INNER * 2)):
            bits = rng.integers(0, 2**16, HIDDEN * INNER, dtype=np.uint16) & 0x807F
            bits |= rng.integers(127 - 23, 127 + 1, HIDDEN * INNER, dtype=np.uint16) << 7
            file.write(bits.tobytes())
        os.fsync(file.fileno())


def targets_of(source: Path, what: str) -> list[Target]:
    """The new tensors of a rewrite."""
    entries = {entry.name: entry for entry in read_header(source).tensors}
    if what == "transposed":
        return list(_linear(entries["gate_up_proj"], entries["down_proj"]))
    return [Target(entry.name, REWRITES[what], entry.shape, ((Piece(entry),),)) for entry in entries.values()]


def _linear(gate_up: TensorEntry, down: TensorEntry) -> Iterator[Target]:
    for e in range(gate_up.shape[0]):
        for part, begin in (("gate_proj", 0), ("up_proj", INNER)):
            piece = Piece(gate_up, e, (begin, begin + INNER), transpose=True)
            yield Target(f"{e}.{part}.weight", "BF16", piece.shape, ((piece,),))
        piece = Piece(down, e, transpose=True)
        yield Target(f"{e}.down_proj.weight", "BF16", piece.shape, ((piece,),))


def work(what: str, source: Path, out: Path, workers: int) -> None:
    """One contender's work, to the last byte on the disk."""
    if what == "copy":
        out.mkdir()
        shutil.copyfile(source, out / source.name)
        sync(out / source.name)
        sync(out)
        return
    targets = targets_of(source, what)
    with resumable_directory(out, request_key(targets, "")) as place:
        rewrite(targets, place, source_fingerprint="", workers=workers)


def child(what: str, source: Path, out: Path, workers: int) -> None:
    """In a process of its own. Prints seconds, seconds of the processors, and the most memory that was resident.

    The latter is VmHWM, as getrusage's figure begins with what the parent had when it forked.
    """
    begin = time.perf_counter()
    work(what, source, out, workers)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "cpu_seconds": sum(os.times()[:2]), "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The most memory of this process that was resident."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def prepare(source: Path, out: Path, cache: str) -> None:
    """An idle disk without old outputs, and the source in the page cache or not."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    with source.open("rb", buffering=0) as file:
        if cache == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            block = bytearray(_BLOCK)
            while file.readinto(block):
                pass


def run(
    what: str, source: Path, out: Path, cache: str, workers: int, script: str = __file__, more: Sequence[str] = ()
) -> dict[str, float]:
    """One measurement, in a process of its own: ``script --child`` with ``more`` arguments."""
    prepare(source, out, cache)
    command = [sys.executable, script, "--child", what, "--workers", str(workers), "--work", str(source.parent), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    moved = source.stat().st_size + sum(p.stat().st_size for p in out.iterdir())
    return {**measured, "bytes": moved, "bytes_per_second": moved / measured["seconds"]}


def values_of(entry: TensorEntry) -> NDArray[Any]:
    """A tensor's values, mapped."""
    return np.memmap(entry.file, dtype=_NUMPY[entry.dtype], mode="r", offset=entry.offset, shape=entry.shape)


def check(what: str, source: Path, out: Path) -> None:
    """Compares the last expert's matrices with numpy's own.

    Raises:
        ValueError: they differ.
    """
    stored = {entry.name: values_of(entry) for entry in read_header(source).tensors}
    found = {entry.name: values_of(entry) for p in out.glob("*.safetensors") for entry in read_header(p).tensors}
    e = len(stored["down_proj"]) - 1
    gate_up, down = stored["gate_up_proj"][e], stored["down_proj"][e]
    if what == "transposed":
        wanted = {"gate_proj": gate_up[:, :INNER].T, "up_proj": gate_up[:, INNER:].T, "down_proj": down.T}
        pairs = [(found[f"{e}.{name}.weight"], matrix) for name, matrix in wanted.items()]
    else:
        pairs = [(found["gate_up_proj"][e], gate_up), (found["down_proj"][e], down)]
    for new, old in pairs:
        for row in range(0, len(new), 512):
            if new[row : row + 512].tobytes() != old[row : row + 512].astype(new.dtype).tobytes():
                raise ValueError(f"{what}: a matrix of expert {e} differs")


def in_turns(
    names: list[str], rounds: int, measure_one: Callable[[str], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """Each contender once a round, another one first in each."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(measure_one(name))
    return runs


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders in turns, cold and warm."""
    experts = max(1, round(args.bytes / EXPERT_BYTES))
    source, out = folder / "source.safetensors", folder / "out"
    write_source(source, experts)
    neighbours = timing.Neighbours()
    names = ["copy", *REWRITES]
    for what in REWRITES:
        run(what, source, out, "warm", args.workers)
        check(what, source, out)
    results = {}
    for cache in args.cache:
        runs = in_turns(names, args.rounds, partial(run, source=source, out=out, cache=cache, workers=args.workers))
        results[cache] = {name: summary(runs[name], runs["copy"]) for name in names}
    shutil.rmtree(out)
    return {
        "what": "rewriting weights against copying them",
        "machine": timing.machine(args.workers) | {"cpu_share_of_others": neighbours.share()},
        "source": {"experts": experts, "hidden": HIDDEN, "inner": INNER, "bytes": source.stat().st_size},
        "rounds": args.rounds,
        "results": results,
    }


def summary(runs: list[dict[str, float]], copies: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and quartiles; each run's share of the copy in the same round."""
    shares = [own["bytes_per_second"] / copy["bytes_per_second"] for own, copy in zip(runs, copies, strict=True)]
    return {
        "bytes": runs[0]["bytes"],
        "share_of_copy": quartiles(shares),
        **{key: quartiles([own[key] for own in runs]) for key in ("seconds", "bytes_per_second", "cpu_seconds")},
        "peak_bytes": max(own["peak_bytes"] for own in runs),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def print_table(result: dict[str, Any], width: int = 130) -> None:
    """Medians and quartiles on stdout."""
    source = result["source"]
    title = f"{source['experts']} experts of {HIDDEN} x {INNER}, {source['bytes'] / 1e9:.2f} GB of bf16"
    caption = "median (quartiles); GB/s of bytes read and written; share of the copy in the same round"
    table = Table(title=title, caption=caption)
    for column in ("source", "", "s", "GB/s", "share of copy", "CPU s", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for cache, rows in result["results"].items():
        for name, row in rows.items():
            rate = {key: value / 1e9 for key, value in row["bytes_per_second"].items()}
            shown = [timing.shown(part) for part in (row["seconds"], rate, row["share_of_copy"], row["cpu_seconds"])]
            table.add_row(cache, name, *shown, f"{row['peak_bytes'] / 1e6:.0f}")
    Console(width=width).print(table)


def main() -> None:
    """The command line. Exit status 1: a rewrite is slower than the claim, or takes more memory."""
    parser = argparse.ArgumentParser(description="Rewriting weights against copying them.")
    parser.add_argument("--bytes", type=float, default=4e9, help="of the source (default: %(default).0f)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--work", type=Path, help="folder on the disk that is meant; takes up to 3 times --bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["copy", *REWRITES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.work / "source.safetensors", args.work / "out", args.workers)
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="rewrite-") as folder:
        result = measure(args, Path(folder))
    print_table(result)
    timing.write_json(args.json, result)
    failed = False
    for cache, rows in result["results"].items():
        for name in REWRITES:
            share, peak = rows[name]["share_of_copy"]["median"], rows[name]["peak_bytes"]
            held = share >= LEAST_SHARE and peak <= MOST_MEMORY
            failed |= not held
            print(f"{'ok' if held else 'FAIL'}: {name}, {cache}: {share:.2f} of a copy's rate, {peak / 1e6:.0f} MB")
    sys.exit(failed)


if __name__ == "__main__":
    main()
