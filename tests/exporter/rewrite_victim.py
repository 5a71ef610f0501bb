"""A small rewrite, and a process that starts it again and again and kills it at random times. No torch: it forks."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from shuntyard.exporter.resumable import resumable_directory
from shuntyard.exporter.rewrite import Piece, Quantize, Target, request_key, rewrite
from shuntyard.exporter.safetensors_header import read_header

SHARD_BYTES, CHUNK_BYTES = 500_000, 32_000

FORMS: tuple[tuple[Literal["tensor", "channel", "group"], int], ...] = (("channel", 0), ("group", 32), ("tensor", 0))


def targets_of(source: Path, *, quantised: bool = False) -> list[Target]:
    """A fused ``[E, H, 2F]`` tensor, split into ``[F, H]`` matrices: F16, or quantised in all ways by turns."""
    [entry] = read_header(source).tensors
    experts, hidden, inner = entry.shape[0], entry.shape[1], entry.shape[2] // 2
    found: list[Target] = []
    for e in range(experts):
        for part, c in (("gate", 0), ("up", inner)):
            name, pieces = f"{e}.{part}", ((Piece(entry, e, (c, c + inner), transpose=True),),)
            if quantised:
                form, group = FORMS[len(found) % len(FORMS)]
                how = Quantize(form, group, f"{name}.scale")
                found.append(Target(name, how.dtype, (inner, hidden), pieces, how))
            else:
                found.append(Target(name, "F16", (inner, hidden), pieces))
    return found


def run(
    source: Path,
    out: Path,
    *,
    workers: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    quantised: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """The whole of it. Quantised values take less, so their chunks are smaller: as many places to die at."""
    chunk_bytes = chunk_bytes // 8 if quantised else chunk_bytes
    targets = targets_of(source, quantised=quantised)
    with resumable_directory(out, request_key(targets, "", SHARD_BYTES, chunk_bytes)) as work:
        rewrite(
            targets,
            work,
            source_fingerprint="",
            shard_bytes=SHARD_BYTES,
            chunk_bytes=chunk_bytes,
            workers=workers,
            progress=progress,
        )


def entries(out: Path) -> int:
    """How much the journals beside ``out`` say is done."""
    journals = out.parent.glob(f".{out.name}.partial-*/journal")
    return sum(line.startswith("done ") for path in journals for line in path.read_text().splitlines())


def one_life(source: Path, out: Path, seconds: float | None, *, quantised: bool) -> bool:
    """Runs it in a child, for so long at most; whether it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(source, out, quantised=quantised)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def main(source: Path, folder: Path, kills: int, *, quantised: bool) -> None:
    """Kills until so many deaths came upon work that had begun; says after each how much was done."""
    rng = random.Random(0)
    begin = time.monotonic()
    one_life(source, folder / "undisturbed", None, quantised=quantised)
    longest = time.monotonic() - begin
    deaths: list[int] = []
    number = attempts = 0
    while sum(done > 0 for done in deaths) < kills and attempts < 20 * kills:
        attempts += 1
        out = folder / f"out-{number}"
        if one_life(source, out, rng.uniform(0, longest / 2), quantised=quantised):
            deaths.append(entries(out))
        number += out.exists()
    if not (folder / f"out-{number}").exists():
        one_life(source, folder / f"out-{number}", None, quantised=quantised)
    json.dump(deaths, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), quantised=sys.argv[4] == "quantised")
