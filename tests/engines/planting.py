"""Faults that are planted into a lowered graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

Change = Callable[[ir.Model], None]


def planted(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Changes the lowered graph behind the back of what holds the plan to it."""
    real = ir.to_proto

    def changed(model: Any) -> Any:
        if isinstance(model, ir.Model):
            change(model)
        return real(model)

    monkeypatch.setattr(ir, "to_proto", changed)
