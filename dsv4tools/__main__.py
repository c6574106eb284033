"""``python -m dsv4tools``."""

from dsv4tools.cli import main

main()
