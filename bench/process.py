"""Runs a program alone and says what it took: time, memory of its whole process tree, exit status (Linux)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Limits:
    """What a program may take before it is killed: MiB of memory that no cache can give back, and seconds."""

    memory_mib: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a program took. ``stopped`` is ``"memory"`` or ``"time"`` where a limit ended it."""

    seconds: float
    peak_mib: float
    peak_anonymous_mib: float
    status: int
    stopped: str | None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return dict(self.__dict__)


def descendants(pid: int) -> Iterator[int]:
    """A process and all that it started, as far as they live."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended meanwhile
            continue
        for child in children:
            yield from descendants(int(child))


def memory_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process tree, and its part that is not pages of files.

    The kernel keeps each process's own peak; where that is more than all have now, it counts. (The peak that ``wait4``
    tells does not: it begins with the size of the process that forked.)
    """
    resident = anonymous = highest = 0
    for process in set(descendants(pid)):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            continue
        fields = {words[0]: int(words[1]) for line in lines if len(words := line.split()) == 3 and words[2] == "kB"}
        resident += fields.get("VmRSS:", 0)
        highest = max(highest, fields.get("VmHWM:", 0))
        anonymous += fields.get("RssAnon:", 0) + fields.get("RssShmem:", 0)
    return max(resident, highest) / 1024, anonymous / 1024


def run(command: Sequence[str], log: Path, limits: Limits, environment: Mapping[str, str]) -> Outcome:
    """Runs ``command`` to its end or to a limit; what it prints goes to ``log``. Memory is read 20 times a second."""
    peak = peak_anonymous = 0.0
    stopped = None
    begin = time.perf_counter()
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        ) as child,
    ):
        try:
            while (status := child.poll()) is None:
                spent = time.perf_counter() - begin
                resident, anonymous = memory_mib(child.pid)
                peak, peak_anonymous = max(peak, resident), max(peak_anonymous, anonymous)
                if anonymous > limits.memory_mib or spent > limits.seconds:
                    stopped = "memory" if anonymous > limits.memory_mib else "time"
                    os.killpg(child.pid, signal.SIGKILL)
                    status = child.wait()
                    break
                time.sleep(SAMPLE_SECONDS)
        except BaseException:  # an interrupt ends us, and what we started
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return Outcome(time.perf_counter() - begin, peak, peak_anonymous, status, stopped)


def written_bytes(directory: Path, own: Path) -> int:
    """Blocks on disk under ``directory``, in bytes, without files that are hard links into ``own``."""
    linked = {(s.st_dev, s.st_ino) for s in (path.stat() for path in own.rglob("*") if path.is_file())}
    stats = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    inodes = {(s.st_dev, s.st_ino): 512 * s.st_blocks for s in stats if (s.st_dev, s.st_ino) not in linked}
    return sum(inodes.values())
