"""Where the command speaks: data to stdout, progress and logs to stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

EXIT_FAILED, EXIT_REFUSED, EXIT_DEFECT, EXIT_INTERRUPTED = 1, 3, 4, 130

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

PATH = click.Path(path_type=Path)


def say(line: str) -> None:
    """A line of progress."""
    stderr.print(line, style="dim", markup=False)


def warn(line: str) -> None:
    """A warning, in a line of its own however narrow the terminal."""
    stderr.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)


def emit(data: Any) -> None:
    """A result as JSON."""
    click.echo(json.dumps(data, indent=2))


def one_line(text: str) -> str:
    """Names from files are printed as they are written in Python: no control character reaches the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
