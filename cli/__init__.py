"""Takes: a command line. Gives: exit status, text or JSON; words for people.

May import: every room.
"""

from shuntyard.cli.commands import main as main

__all__ = ["main"]
