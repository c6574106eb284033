"""The command line: one short file per command, no logic. Everything it does is a call of the library."""

from dsv4tools.cli.main import main

__all__ = ["main"]
