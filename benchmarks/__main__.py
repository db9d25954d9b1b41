"""Reproduce the published figures, and compare learners and agents of one's own.

python -m benchmarks list [PATTERN ...]
python -m benchmarks run PATTERN ... [--quick] [--engine joblib] [--agent MODULE:FUNCTION]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines import Joblib
from benchmarks.methods import Own
from benchmarks.running import Task, elapsed, run_all
from benchmarks.sweeps import SWEEPS, select
from offprompts_env.errors import OffPromptsError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show sweeps, or the runs that patterns match")
    running = commands.add_parser("run", help="run what is not there yet")
    for command in (listing, running):
        command.add_argument("patterns", nargs="*" if command is listing else "+", metavar="PATTERN",
                             help="a sweep, an id, the beginning of one, or a pattern with *")  # fmt: skip
        command.add_argument("--quick", action="store_true", help="few worlds and a tenth of the steps")
        command.add_argument("--worlds", type=int, help="number of worlds")
        command.add_argument("--agent", metavar="MODULE:FUNCTION", help="a learner or agent of your own")
        command.add_argument("--name", default="own", help="its name (default: own)")
    running.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    running.add_argument("--workers", type=int, default=-1, help="processes (default: one a core)")
    running.add_argument("--again", action="store_true", help="also what is there")
    return parser


def _run(chosen: argparse.Namespace) -> int:
    own = {chosen.name: Own.of(chosen.agent)} if chosen.agent else {}
    runs = select(chosen.patterns, short=chosen.quick, worlds=chosen.worlds, own=own)
    started = time.monotonic()

    def report(task: Task, done: int, of: int) -> None:
        print(f"{done}/{of} runs, {elapsed(started)}: {task.label}", flush=True)

    outcome = run_all(runs, chosen.out, Joblib(chosen.workers), again=chosen.again, report=report)
    print(f"{outcome.new} runs in {elapsed(started)}, {outcome.known} were there, {len(outcome.failures)} failed")
    for label, failure in outcome.failures:
        print(f"failed: {label}: {failure.message}\n{failure.trace}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _list(chosen: argparse.Namespace) -> int:
    if not chosen.patterns:
        for sweep in SWEEPS.values():
            print(f"{sweep.name:<12} {len(sweep.runs()):>5} runs  {sweep.title}")
        return 0
    own = {chosen.name: Own.of(chosen.agent)} if chosen.agent else {}
    for run in select(chosen.patterns, short=chosen.quick, worlds=chosen.worlds, own=own):
        print(run.id)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    chosen = _parser().parse_args(arguments)
    try:
        return {"list": _list, "run": _run}[chosen.command](chosen)
    except OffPromptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
