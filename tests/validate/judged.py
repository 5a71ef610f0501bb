"""Runs ``validate`` on windows of a text, as the tests ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.validate.report import Report
from shuntyard.validate.validate import Inputs, Plan, validate


@dataclass(frozen=True)
class Asked:
    """What differs between tests."""

    windows: int = 8
    length: int | None = None
    decode: int = 96
    allow_other_files: bool = False


def judged(engine: Path | str, checkpoint: Path | str, text: str, asked: Asked, **more: Any) -> Report:
    """The report; ``more`` is of :class:`Plan`."""
    inputs = Inputs(text, asked.windows, asked.length)
    plan = Plan(inputs=inputs, decode=asked.decode, allow_other_files=asked.allow_other_files, **more)
    return validate(str(engine), str(checkpoint), plan)
