"""Directories that appear whole, by rename, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from shuntyard.errors import OutputError

_LOCK = ".lock"


def _remove_abandoned(target: Path) -> None:
    """Removes what a killed run left beside ``target``: a partial directory whose lock nobody holds."""
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        try:
            with (partial / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
        except OSError:
            continue  # somebody is at work there, or it is not ours to remove


@contextlib.contextmanager
def output_directory(target: Path) -> Iterator[Path]:
    """Yields a partial directory beside ``target`` to fill; renames it when the block ends without an error.

    Raises:
        OutputError: ``target`` exists, its parent cannot be written to, or the disk is full.
    """
    if os.path.lexists(target):
        raise OutputError(f"{target}: exists already", hint="give another path, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        with (partial / _LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            (partial / _LOCK).unlink()
            if os.path.lexists(target):
                raise OutputError(f"{target}: appeared meanwhile", hint="give another path, or remove it first")
            partial.rename(target)
    except OSError as error:
        raise _explain(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _explain(error: OSError, target: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        return OutputError(f"{target}: the disk is full ({free:,} bytes free)", hint="free some space, or give another")
    where = error.filename or target
    return OutputError(f"{where}: cannot be written: {error.strerror or error}")


def link_or_copy(source: Path, directory: Path, *, copy: bool, total_bytes: int) -> None:
    """Brings a weight file into ``directory`` under its own name, as a hard link (of what a symlink points to).

    Runtimes refuse symlinks, absolute paths and ``../`` for external data; a hard link costs no space.

    Raises:
        OutputError: links are impossible here and ``copy`` is off; says what copying would cost.
    """
    real, place = source.resolve(strict=True), directory / source.name
    if not stat.S_ISREG(real.stat().st_mode):
        raise OutputError(f"{source}: is no regular file")
    if copy:
        needed, free = total_bytes, shutil.disk_usage(directory).free
        if real.stat().st_size > free:
            raise OutputError(f"{directory.parent}: {needed:,} bytes are needed, {free:,} are free")
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
