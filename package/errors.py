"""The errors that shuntyard raises on purpose. The tree::

ShuntyardError            one clear line and a hint
|-- UnsupportedError      understood well enough to know that it is not supported
|-- CheckpointError       a checkpoint that is broken, incomplete or contradicts itself
|-- OutputError           the place to write to exists, is full, or cannot take what is asked
`-- EngineError           an engine or model directory that cannot be opened, built or run
    `-- NotFiniteError    an engine computed NaN or infinity
"""

from __future__ import annotations


class ShuntyardError(Exception):
    """An error that a user can act on: ``message`` says what is wrong, and where; ``hint`` what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"


class UnsupportedError(ShuntyardError):
    """A model, tensor, config key, type or request that shuntyard does not support."""


class CheckpointError(ShuntyardError):
    """A checkpoint that is broken, incomplete or contradicts itself."""


class OutputError(ShuntyardError):
    """The output cannot be written where it is asked for."""


class EngineError(ShuntyardError):
    """A model or engine directory that cannot be opened, built or run."""


class NotFiniteError(EngineError):
    """An engine computed NaN or infinity."""
