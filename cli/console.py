"""Where the command speaks: data to stdout, progress and logs to stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EXIT_FAILED, EXIT_REFUSED, EXIT_DEFECT, EXIT_INTERRUPTED = 1, 3, 4, 130

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

PATH = click.Path(path_type=Path)


def say(line: str) -> None:
    """A line of progress."""
    stderr.print(line, style="dim", markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """A warning, in a line of its own however narrow the terminal."""
    stderr.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)


def emit(data: Any) -> None:
    """A result as JSON."""
    click.echo(json.dumps(data, indent=2))


def one_line(text: str) -> str:
    """Names from files are printed as they are written in Python: no control character reaches the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """A callback ``(phase, done, total)`` behind progress bars on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase[:48], total=max(total, 1))
            bars.update(tasks[phase], completed=done if total else 1)

        yield update
