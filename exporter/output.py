"""Directories that appear whole, by rename, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from shuntyard.errors import OutputError


def lock(directory: Path) -> int:
    """A descriptor that holds a lock on the directory, until it is closed or the process ends, however it dies.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no such locks, or the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a lock on a directory; see :func:`lock` for what it raises."""
    descriptor = lock(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def is_partial_of(target: Path, name: str) -> bool:
    """Whether a run for ``target`` may have left a partial directory of this name, and no run for another target."""
    return re.fullmatch(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]+", name) is not None


def remove_abandoned(target: Path, own: Path | None = None) -> None:
    """Removes what killed runs left beside ``target``: partial directories, but ``own``, whose lock nobody holds."""
    for partial in target.parent.iterdir():
        if partial == own or not is_partial_of(target, partial.name):
            continue
        # Busy: somebody is at work there. No locks here: nobody can tell, so it stays.
        with contextlib.suppress(OSError), _locked(partial):
            shutil.rmtree(partial)


def _make_partial(target: Path, stack: contextlib.ExitStack) -> Path:
    """A new directory beside ``target``, locked until ``stack`` closes and then removed where it still exists."""
    while True:
        partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        try:
            stack.enter_context(_locked(partial))
        except (BlockingIOError, FileNotFoundError):
            continue  # another run took it for abandoned in the instant before the lock
        except OSError:
            pass  # no locks on this file system: nobody will take it for abandoned either
        if partial.exists():
            return partial


def refuse_existing(target: Path) -> None:
    """Looks before the work begins.

    Raises:
        OutputError: something is at ``target``, be it a dangling link.
    """
    if os.path.lexists(target):
        raise OutputError(f"{target}: exists already", hint="give another path, or remove it first")


@contextlib.contextmanager
def output_directory(target: Path) -> Iterator[Path]:
    """Yields a partial directory beside ``target`` to fill; renames it when the block ends without an error.

    Raises:
        OutputError: ``target`` exists, its parent cannot be written to, or the disk is full.
    """
    refuse_existing(target)
    try:
        with contextlib.ExitStack() as stack:
            for parent in reversed([p for p in target.parents if not p.exists()]):
                parent.mkdir(exist_ok=True)
                stack.callback(remove_if_empty, parent)
            remove_abandoned(target)
            partial = _make_partial(target, stack)
            yield partial
            if os.path.lexists(target):
                raise OutputError(f"{target}: appeared meanwhile", hint="give another path, or remove it first")
            partial.rename(target)
    except OSError as error:
        raise _explain(error, target) from error


def remove_if_empty(directory: Path) -> None:
    """Removes a directory, if there is nothing in it."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def _explain(error: OSError, target: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{target}: the disk is full", hint="free some space, or write to another file system")
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(
        f"{target}: cannot be written: {error.strerror or error}{where}", hint="give a place that you can write to"
    )


def link_or_copy(source: Path, directory: Path, *, copy: bool, total_bytes: int) -> None:
    """Brings a weight file into ``directory`` under its own name, as a hard link (of what a symlink points to).

    Runtimes refuse symlinks, absolute paths and ``../`` for external data; a hard link costs no space.

    Raises:
        OutputError: links are impossible here and ``copy`` is off; says what copying would cost.
    """
    real, place = source.resolve(strict=True), directory / source.name
    if not stat.S_ISREG(real.stat().st_mode):
        raise OutputError(f"{source}: is no regular file", hint="the checkpoint changed while it was read")
    if copy:
        copied, free = sum(p.stat().st_size for p in directory.glob("*.safetensors")), shutil.disk_usage(directory).free
        if total_bytes - copied > free:
            raise OutputError(
                f"{directory.parent}: the copies need {total_bytes - copied:,} bytes, {free:,} are free",
                hint="write to the file system of the checkpoint, where hard links cost nothing",
            )
        shutil.copyfile(real, place)
        return
    try:
        os.link(real, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        free = shutil.disk_usage(directory).free
        raise OutputError(
            f"{source}: cannot be hard-linked into {directory.parent} ({error.strerror})",
            hint=f"write to the file system of the checkpoint, or give --copy: that copies {total_bytes:,} bytes "
            f"({free:,} are free)",
        ) from error
