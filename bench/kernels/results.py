"""What a run has measured, as JSON.

A machine with a GPU may lack pydantic, so these are dataclasses; pydantic checks what is read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Times:
    """Microseconds a call: median, quartiles and least of so many rounds."""

    median: float
    low: float
    high: float
    least: float
    rounds: int


@dataclass(frozen=True)
class Entry:
    """One contender at one point. ``difference`` is the norm of what it differs from ours, by the norm of ours."""

    name: str
    times: Times | None = None
    difference: float | None = None
    captured: bool = True
    problem: str = ""


@dataclass(frozen=True)
class Point:
    """One shape, with the floors of what it touches."""

    model: str
    precision: str
    skew: str
    tokens: int
    experts_touched: int
    bytes: float
    flops: float
    memory_floor: float
    math_floor: float
    entries: list[Entry]

    @property
    def floor(self) -> float:
        """Microseconds."""
        return max(self.memory_floor, self.math_floor)


@dataclass(frozen=True)
class Run:
    """All of it. ``absent`` says of each peer that is not there why."""

    machine: dict[str, Any]
    copy_gigabytes: float
    teraflops: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)


def write(run: Run, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(dataclasses.asdict(run), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Run:
    """From JSON.

    Raises:
        ValueError: it is not what a run has written; says in a line why.
        OSError: it cannot be read.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Run).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "json_invalid":
            raise ValueError("it is not JSON") from error
        if first["type"] == "missing":
            raise ValueError(f"it has no {place}") from error
        if not place:
            raise ValueError("it holds no run's figures") from error
        raise ValueError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
