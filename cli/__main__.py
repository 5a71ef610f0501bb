"""``python -m shuntyard.cli``."""

from shuntyard.cli.main import main

main()
