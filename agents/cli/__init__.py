"""The command line ``offprompts``; :func:`main` is its entry point.

What a command needs is imported when it is run, so that ``offprompts --help`` is quick.
"""

from agents.cli.main import main

__all__ = ["main"]
