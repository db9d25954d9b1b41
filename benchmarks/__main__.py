"""Reproduce the published figures, and compare learners and agents of one's own."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks import figures, leaderboard, published
from benchmarks.clusters import Dask, Ray
from benchmarks.engines import Engine, Joblib, processes
from benchmarks.methods import Own
from benchmarks.pages import report
from benchmarks.plan import Run
from benchmarks.progress import Forecast, Progress, duration
from benchmarks.rows import ResultsWarning, read_rows
from benchmarks.running import PACKAGE, Plan, plan, run_all, tasks_of
from benchmarks.settings import failures
from benchmarks.sweeps import SWEEPS, select
from offprompts_env.errors import ConfigError, MissingDependencyError, OffPromptsError
from offprompts_env.movielens.bundle import Bundle

ROOMS = (figures, report, published, failures, leaderboard)
"""Modules with commands of their own."""

_EXAMPLES = """\
examples:
  python -m benchmarks list                                   the sweeps
  python -m benchmarks list data_size/n=500                   the runs of a point
  python -m benchmarks run data_size prompts noise --quick    three figures, few worlds, a tenth of the steps
  python -m benchmarks run 'data_size/*/learner=dso'          one learner
  python -m benchmarks run data_size --dry-run                what there is to do, and for how long
  python -m benchmarks run data_size --agent mine:make_agent  an agent of one's own beside the others
  python -m benchmarks run data_size --engine ray --address auto

exit codes: 0 done, 1 something failed or could not be written, 2 bad usage, 130 interrupted
A run that is there is not run again; a sweep that was stopped goes on with the same command.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="show sweeps, or the runs that patterns match")
    listing.set_defaults(do=_list)
    running = commands.add_parser(
        "run",
        help="run what is not there yet",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    running.set_defaults(do=_run)
    for command in (listing, running):
        command.add_argument("patterns", nargs="*" if command is listing else "+", metavar="PATTERN",
                             help="a sweep, an id, the beginning of one, or a pattern with *")  # fmt: skip
        command.add_argument("--quick", action="store_true", help="few worlds and a tenth of the steps")
        command.add_argument("--worlds", type=int, help="number of worlds")
        command.add_argument("--agent", metavar="MODULE:FUNCTION", help="a learner or agent of your own")
        command.add_argument("--name", default="own", help="its name (default: own)")
        command.add_argument("--bundle", type=Path, help="assets for the sweeps on text (default: the embedded ones)")
        command.add_argument("--prompts", type=int, help="number of prompts in the sweeps on text (default: all)")
    running.add_argument("--out", type=Path, help="folder of the results (default: runs, with --quick runs/quick)")
    running.add_argument("--engine", choices=("joblib", "ray", "dask"), default="joblib",
                         help="what runs tasks: processes here, or a cluster (default: joblib)")  # fmt: skip
    running.add_argument("--address", help="of a running Ray or Dask cluster (default: start one here); its machines "
                         "need --out in a folder they share")  # fmt: skip
    running.add_argument("--workers", type=int, default=-1, help="processes (default: one a core)")
    running.add_argument("--again", action="store_true", help="also what is there, with what runs share")
    running.add_argument("--dry-run", action="store_true", help="only say what would be run")
    for room in ROOMS:
        room.add_command(commands)
    return parser


def _selected(chosen: argparse.Namespace) -> list[Run]:
    if chosen.worlds is not None and chosen.worlds < 1:
        raise ConfigError(f"--worlds: expected a positive number, got {chosen.worlds}")
    if not re.fullmatch(r"[\w.+@-]+", chosen.name):
        raise ConfigError(
            f"--name: expected letters, digits and any of . + @ - _, got {chosen.name!r}; it is part of ids"
        )
    bundle = None
    if chosen.bundle is not None:
        Bundle.open(chosen.bundle)
        bundle = str(chosen.bundle.resolve())
    own = {chosen.name: Own.of(chosen.agent)} if chosen.agent else {}
    if chosen.prompts is not None:
        most = len(Bundle.open(chosen.bundle).keywords)
        if not 1 <= chosen.prompts <= most:
            raise ConfigError(f"--prompts: expected 1 to {most}, what the bundle has, got {chosen.prompts}")
    return select(
        chosen.patterns, short=chosen.quick, worlds=chosen.worlds, own=own, bundle=bundle, prompts=chosen.prompts
    )


def _engine(chosen: argparse.Namespace) -> Engine:
    processes(chosen.workers)
    if chosen.engine == "joblib":
        if chosen.address is not None:
            raise ConfigError("--address: the engine joblib has none; give --engine ray or --engine dask too")
        return Joblib(chosen.workers)
    return (Ray if chosen.engine == "ray" else Dask)(chosen.workers, chosen.address)


def _run(chosen: argparse.Namespace) -> int:
    runs, engine = _selected(chosen), _engine(chosen)
    out = chosen.out or Path("runs/quick" if chosen.quick else "runs")
    if chosen.dry_run:
        return _dry_run(plan(runs, read_rows(out), again=chosen.again), engine)
    outcome = run_all(runs, out, engine, again=chosen.again, progress=Progress())
    print(f"{outcome.new} new rows, {len(outcome.plan.known)} were there, {len(outcome.failures)} tasks failed: {out}")
    _say_more(outcome.plan)
    for label, failure, file in outcome.failures:
        print(f"failed: {label}: {failure.message} ({file})", file=sys.stderr)
    if outcome.failures:
        print("the same command tries again what failed", file=sys.stderr)
        return 1
    print(f"next: python -m benchmarks figures --out {out}, or report --out {out}")
    return 0


def _say_more(found: Plan) -> None:
    if found.replaced:
        print(f"{found.replaced} of these had rows already, of other settings or to be made again: the newest count")
    for name, count in found.other_versions.items():
        print(f"{count} rows were made by {PACKAGE} {name} and count as known; --again makes them anew")


def _dry_run(found: Plan, engine: Engine) -> int:
    tasks = tasks_of(found.wanted, Path())
    waiting = Counter(run.learner for _, own in tasks for run in own)
    print(f"{len(found.wanted)} runs to do in {len(tasks)} tasks, {len(found.known)} are there")
    for sweep, count in Counter(run.sweep.name for run in found.wanted).items():
        print(f"  {sweep}: {count} runs")
    _say_more(found)
    work = Forecast(waiting, found.seconds, 1).work()
    workers = processes(engine.workers)
    if waiting:
        print(f"about {duration(work / workers)} with {workers} processes, by what runs took that are there, without "
              "what they share" if work is not None else "no rows yet to tell how long it takes")  # fmt: skip
    return 0


def _list(chosen: argparse.Namespace) -> int:
    if not chosen.patterns:
        width = max(map(len, SWEEPS))
        for sweep in SWEEPS.values():
            size = f"{len(sweep.points)} points, {sweep.worlds} {sweep.world_name}s"
            print(f"{sweep.name:<{width}} {len(sweep.runs()):>5} runs  {sweep.title} ({size})")
        return 0
    for run in _selected(chosen):
        print(run.id)
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_plainly(message: Warning | str, category: type[Warning], *rest: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    chosen = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", ResultsWarning)
            warnings.showwarning = _show_plainly  # type: ignore[assignment]
            code: int = chosen.do(chosen)
        sys.stdout.flush()
    except (ConfigError, MissingDependencyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OffPromptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (``| head``); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    raise SystemExit(main())
