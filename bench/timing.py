"""Side-by-side timing: contenders take turns in one run, so what disturbs the machine disturbs them alike."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 0.05
"""Pause before a measurement: both runtimes' idle threads spin for a while and would steal the other's cores."""


def settle() -> None:
    """Lets threads of the runtime that ran before go to sleep."""
    time.sleep(SETTLE_SECONDS)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` times; another contender begins in each round."""
    names = list(calls)
    for name in names:
        for _ in range(warmup):
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            settle()
            times[name].append(seconds(calls[name]))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and smallest, in milliseconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "min": 1e3 * min(times), "n": len(times)}


def shown(stats: Mapping[str, float]) -> str:
    """``12.3 (12.0 .. 12.9)``: median and quartiles."""
    return f"{stats['median']:.3g} ({stats['low']:.3g} .. {stats['high']:.3g})"


def ratios(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times faster, round by round: median and quartiles."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(slower, faster, strict=True)], n=4, method="inclusive"
    )
    return {"median": median, "low": low, "high": high}


class Neighbours:
    """How much of the machine other processes took since this was made (Linux)."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """CPU seconds of the whole machine, idle or not, and those that others worked."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        user, nice, system, idle, iowait, irq, softirq, steal = (tick / os.sysconf("SC_CLK_TCK") for tick in ticks[:8])
        busy = user + nice + system + irq + softirq + steal
        return busy + idle + iowait, busy - sum(os.times()[:4])

    def share(self) -> float:
        """Between 0 and 1."""
        (total, others), (total_then, others_then) = self._now(), self._begin
        return round(max(others - others_then, 0) / (total - total_then), 3)


def command() -> str:
    """What was run, but for where its files went."""
    script, *arguments = sys.argv
    kept: list[str] = []
    while arguments:
        kept += [arguments.pop(0)]
        if kept[-1] in ("--json", "--peers", "--profile", "--work"):
            kept.pop()
            arguments = arguments[1:]
    return shlex.join(["python", f"bench/{Path(script).name}", *kept])


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    packages = ("shuntyard", "onnxruntime", "torch", "transformers")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "command": command(),
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result where ``--json`` asks for it."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
