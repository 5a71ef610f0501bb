"""What a validation found: checks, each with its value and bound, and the verdict over them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison. ``ok`` is None where the value is reported and not judged."""

    name: str
    value: float | str
    bound: str
    ok: bool | None
    detail: str = ""


@dataclass
class Report:
    """The whole result."""

    engine: str
    reference: str
    backend: str
    dtype: str
    tokens: int
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every judged check holds."""
        return all(check.ok is not False for check in self.checks)

    def at_most(self, name: str, value: float, bound: float | None, detail: str = "") -> None:
        """Adds a check ``value <= bound``; NaN fails."""
        ok = None if bound is None else bool(value <= bound)
        self.checks.append(Check(name, value, "-" if bound is None else f"<= {bound:g}", ok, detail))

    def at_least(self, name: str, value: float, bound: float, detail: str = "") -> None:
        """Adds a check ``value >= bound``; NaN fails."""
        self.checks.append(Check(name, value, f">= {bound:g}", bool(value >= bound), detail))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"passed": self.passed, **asdict(self)}
