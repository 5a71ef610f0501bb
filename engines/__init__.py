"""Takes: a model directory. Gives: an engine directory, and ``open_engine`` to run it.

May import: ``plugins``, ``exporter``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shuntyard.engines.engine import Engine as Engine
    from shuntyard.engines.engine import open_engine as open_engine

__all__ = ["Engine", "open_engine"]


def __getattr__(name: str) -> Any:
    """Loads the public names when they are asked for: importing the room costs nothing."""
    if name in __all__:
        from shuntyard.engines import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'shuntyard.engines' has no attribute '{name}'")
