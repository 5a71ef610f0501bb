"""``python -m shuntyard.cli``."""

from shuntyard.cli.commands import main

main()
