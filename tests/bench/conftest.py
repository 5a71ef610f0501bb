"""The native build of tests/plugins."""

from tests.plugins.conftest import built

__all__ = ["built"]
