"""From the words of a command line to an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn, Protocol

from offprompts_env.errors import ConfigError, OffPromptsError, unknown_name
from offprompts_env.printing import printable

_EXAMPLES = """\
examples:
  offprompts record OffPrompts-Synthetic-v0 --n 10000 --out log --env n_prompts=100
  offprompts import service.csv --out log --context age visits --action prompt --reward clicked
  offprompts inspect log
  offprompts learn log --learner is --hold-out 0.5 --out policy
  offprompts evaluate policy log --estimator snips dr

offprompts COMMAND --help says more about a command.
exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted
"""


class Command(Protocol):
    """What a command is: a frozen record of its options."""

    def run(self) -> None:
        """Do it.

        Raises:
            OffPromptsError: it cannot be done.
        """


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command is.

    Attributes:
        module: that has it.
        name: of its class.
        summary: one line.
        prefixes: whether options of inner records begin with these records' names, as where two have one of a name.
    """

    module: str
    name: str
    summary: str
    prefixes: bool = False


COMMANDS = {
    "record": Entry("agents.cli.record", "Record", "record what a policy does in an environment"),
    "import": Entry("agents.cli.importing", "Import", "make a log of a Parquet, CSV or JSON-lines file"),
    "inspect": Entry("agents.cli.inspecting", "Inspect", "say what a log holds, what is odd, and what it allows"),
    "render": Entry("agents.cli.render", "Render", "show rounds of a log as text"),
    "generate": Entry("agents.cli.generate", "Generate", "fill a store with the sentences that rounds will need"),
    "freeze": Entry("agents.cli.freeze", "Freeze", "export frozen sentences, which are replayed without a model"),
    "sentences": Entry("agents.cli.sentences", "Sentences", "say what a store of sentences holds, or show some"),
    "methods": Entry("agents.cli.methods", "Methods", "list learners and estimators, or the settings of one"),
    "learn": Entry("agents.cli.learn", "Learn", "learn a policy from a log"),
    "evaluate": Entry("agents.cli.evaluate", "Evaluate", "estimate a policy's value from a log"),
    "build-assets": Entry(
        "offprompts_env.movielens.cli", "BuildAssets", "build an asset bundle from raw MovieLens files", True
    ),
    "build-domain": Entry(
        "offprompts_env.domain.cli", "BuildDomain", "build a bundle from your own items, reactions and prompts", True
    ),
    "card": Entry("offprompts_env.movielens.cli", "Card", "print the model card of a bundle"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process); return the exit code.

    Raises:
        SystemExit: with code 0 after help, and with 2 where options are wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _main(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (``| head``); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from offprompts_env import __version__

        print(f"offprompts {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"offprompts: {unknown_name('command', words[0], COMMANDS)}", file=sys.stderr)
        return 2
    return _answer(words[0], words[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {entry.summary}" for name, entry in COMMANDS.items())
    return f"usage: offprompts COMMAND ...\n\ncommands:\n{listed}\n\n{_EXAMPLES}"


def _answer(name: str, words: list[str]) -> int:
    try:
        with warnings.catch_warnings(), _stopped_alike():
            warnings.showwarning = _show_plainly  # type: ignore[assignment]
            _parsed(name, words).run()
    except ConfigError as error:
        print(printable(f"offprompts: {error}"), file=sys.stderr)
        return 2
    except OffPromptsError as error:
        print(printable(f"offprompts: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        said = f": {interrupt}" if str(interrupt) else "; run the same command again to go on"
        print(f"\noffprompts: interrupted{said}", file=sys.stderr)
        return 130
    return 0


def _parsed(name: str, words: list[str]) -> Command:
    import tyro

    entry = COMMANDS[name]
    kind = getattr(importlib.import_module(entry.module), entry.name)
    omitted = () if entry.prefixes else (tyro.conf.OmitArgPrefixes,)
    config = (tyro.conf.FlagCreatePairsOff, *omitted)
    command: Command = tyro.cli(kind, prog=f"offprompts {name}", args=words, config=config)
    return command


@contextmanager
def _stopped_alike() -> Iterator[None]:
    """Let a request to terminate do what Ctrl-C does: keep what there is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_plainly(message: Warning | str, category: type[Warning], *rest: object) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)
