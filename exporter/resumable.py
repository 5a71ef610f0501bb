"""Directories that appear whole, by rename, or not at all, and whose making can be interrupted and continued.

Beside the target lies ``.NAME.partial-KEY``, which holds ``output``, the directory that is going to appear, and
``journal``, a list of what is done. A run with the same key goes on there; any other run for the same target, resumable
or not, takes it for abandoned and removes it. While a run works, it holds a lock on the partial directory.

What a death can lose: bytes that ``write`` took are the kernel's, and a killed process loses none of them, so an entry
that is written after its data is true. When the power fails, the kernel loses what it had not brought to the disk yet.
So the journal says in which boot of the machine each entry was made: in another boot, only entries count that an
``fsync`` of their file had followed. Syncing each entry instead would make every worker wait for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shuntyard.errors import CheckpointError, OutputError, UnsupportedError
from shuntyard.exporter.output import lock, refuse_existing, remove_abandoned, remove_if_empty

_PATIENCE = 2.0  # seconds to wait for somebody who may just be removing the directory

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""What a journal may list: nothing else is removed on its word."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Workspace:
    """Where a resumable run works: it fills ``directory`` and keeps its journal at ``journal``."""

    target: Path
    directory: Path
    journal: Path


@contextlib.contextmanager
def resumable_directory(target: Path, key: str) -> Iterator[Workspace]:
    """Yields a workspace beside ``target``; its ``directory`` becomes ``target`` when the block ends without an error.

    At first it holds the files that the journal of an interrupted run with the same ``key`` lists, and nothing else.
    After an error it stays, to be continued, where its journal has entries and the error can be another one next time:
    it is removed when the checkpoint is at fault.

    Raises:
        OutputError: ``target`` exists, another run with this key is at work, the parent cannot be written to, or the
            disk is full.
    """
    refuse_existing(target)
    try:
        with contextlib.ExitStack() as stack:
            for parent in reversed([p for p in target.parents if not p.exists()]):
                parent.mkdir(exist_ok=True)
                stack.callback(remove_if_empty, parent)
            partial, continued = _enter(target, key, stack)
            remove_abandoned(target, partial)
            work = Workspace(target, partial / "output", partial / "journal")
            stack.push(_Leave(partial, work.journal, continued))
            _clear(work)
            yield work
            if os.path.lexists(target):
                raise OutputError(f"{target}: appeared meanwhile", hint="give another path, or remove it first")
            work.directory.rename(target)
            with contextlib.suppress(OSError):
                sync(target.parent)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise _explain(error, target) from error


class _Leave:
    """Removes a partial directory that no later run could go on with."""

    def __init__(self, partial: Path, journal: Path, continued: bool) -> None:
        self._partial, self._journal, self._continued = partial, journal, continued

    def __call__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        spoiled = isinstance(error, CheckpointError | UnsupportedError)
        if spoiled or not self._continued or not any(line.startswith("done ") for line in _lines(self._journal)):
            shutil.rmtree(self._partial, ignore_errors=True)
        return False


def _enter(target: Path, key: str, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """Makes or finds the partial directory of ``key``, locked until ``stack`` closes; says if it can be continued."""
    partial = target.parent / f".{target.name}.partial-{key[:16]}"
    deadline = time.monotonic() + _PATIENCE
    while True:
        partial.mkdir(exist_ok=True)
        try:
            descriptor = lock(partial)
        except FileNotFoundError:
            continue  # another run took it for abandoned in the instant before the lock
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{target}: another run is writing it", hint="wait until it ends, or give another path"
                ) from error
            time.sleep(0.05)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL):
                raise
            # No locks here: two runs could meet in it. So each has its own, and none is continued.
            remove_if_empty(partial)
            partial = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"
            partial.mkdir()
            return partial, False
        if _is_at(descriptor, partial):
            stack.callback(os.close, descriptor)
            return partial, True
        os.close(descriptor)


def _is_at(descriptor: int, directory: Path) -> bool:
    """Whether a directory is still the one that was locked, and not a new one of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(directory, follow_symlinks=False))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _clear(work: Workspace) -> None:
    """Leaves nothing in the directory but the files that the journal lists."""
    kept = set(journal_files(work.journal))
    work.directory.mkdir(exist_ok=True)
    for path in work.directory.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _explain(error: OSError, target: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{target}: the disk is full", hint="free some space and give the same command: it goes on where it stopped"
        )
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(
        f"{target}: cannot be written: {error.strerror or error}{where}", hint="give a place that you can write to"
    )


def sync(path: Path | int) -> None:
    """Waits until a file or directory is on the disk."""
    if isinstance(path, int):
        os.fsync(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _boot() -> str:
    """Names this boot of the machine; something new each time where the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return secrets.token_hex(16)


def _lines(path: Path) -> list[str]:
    """The whole lines of a journal; what a dying process wrote half is not one."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line.decode(errors="replace") for line in text.split(b"\n")[:-1]]


def journal_files(path: Path) -> list[str]:
    """The names of the files that a journal lists; none where it cannot be read."""
    lines = _lines(path)
    try:
        files = json.loads(lines[0])["files"] if lines else []
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in files if isinstance(name, str) and _SHARD.fullmatch(name)]


@dataclass
class Journal:
    """What is done of a request: ``done`` holds (file, part), ``synced`` the files that are on the disk, by number.

    The text: a line of JSON with the key and the files, then ``boot ID``, ``done FILE PART`` and ``synced FILE``.
    """

    path: Path
    key: str
    files: Sequence[str]
    done: set[tuple[int, int]] = field(default_factory=set)
    synced: set[int] = field(default_factory=set)
    _descriptor: int = -1

    def read(self) -> None:
        """Takes what an earlier run with the same key left; forgets everything where there is none."""
        self.done, self.synced = set(), set()
        lines = _lines(self.path)
        if not lines or lines[0] != self._head:
            return
        here, boot = _boot(), ""
        sure: set[tuple[int, int]] = set()
        unsure: set[tuple[int, int]] = set()
        synced: set[int] = set()
        try:
            for kind, *words in (line.split(" ") for line in lines[1:]):
                if kind == "boot":
                    [boot] = words
                elif kind == "done":
                    file, part = map(int, words)
                    (sure if boot == here else unsure).add((file, part))
                elif kind == "synced":
                    synced.update(map(int, words))
                else:
                    return
        except ValueError:
            return  # nothing that we wrote
        if not {file for file, _ in sure | unsure} | synced <= set(range(len(self.files))):
            return
        self.done, self.synced = sure | {(file, part) for file, part in unsure if file in synced}, synced

    def open(self) -> None:
        """Begins to write: the head, where it is new, and everything that still counts."""
        text = [self._head, f"boot {_boot()}"]
        text += [f"done {file} {part}" for file, part in sorted(self.done)]
        text += [f"synced {file}" for file in sorted(self.synced)]
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text("\n".join(text) + "\n", encoding="utf-8")
        new.replace(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def mark_done(self, file: int, part: int) -> None:
        """Writes that a part's bytes were written to its file."""
        self.done.add((file, part))
        self._append(f"done {file} {part}\n")

    def mark_synced(self, file: int) -> None:
        """Writes that all bytes of a file are on the disk."""
        self.synced.add(file)
        self._append(f"synced {file}\n")

    def close(self) -> None:
        """Ends the writing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, line: str) -> None:
        data = line.encode()
        if os.write(self._descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def _head(self) -> str:
        return json.dumps({"format": 1, "key": self.key, "files": list(self.files)})
