"""Compare the learners with the published synthetic experiment, cell by cell.

    python -m benchmarks.published --n 500 8000 --worlds 20 --learners logging is dso --out cells.csv

A cell is written to the file as soon as it is known, and one that is there already is not computed again: a run that
was interrupted goes on where it stopped.

Worlds are those of the preset ``paper_code``, seeds 0, 1, 2, ...; a value is the optimality
``(V(π) − V(uniform)) / (V(optimal) − V(uniform))``, exact over 10,000 contexts, mean ± standard error over worlds. The
published worlds were drawn by another generator: a cell agrees if the means differ by at most two combined standard
errors.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import agents
from benchmarks.rows import append_row, read_rows
from offprompts_env.collecting import collect
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import LoggedDataset, Policy

T = TypeVar("T")

SIZES = (500, 1000, 2000, 4000, 8000)

# Mean and standard error over 20 worlds; data-size sweep of Kiyohara et al., RecSys 2025 (arXiv 2504.02646).
PUBLISHED: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "logging": dict.fromkeys(SIZES, (0.041, 0.004)),
    "regression": dict(
        zip(SIZES, [(0.019, 0.016), (0.038, 0.016), (0.037, 0.031), (0.093, 0.027), (0.133, 0.031)], strict=True)
    ),
    "is": dict(
        zip(SIZES, [(0.139, 0.007), (0.143, 0.007), (0.157, 0.005), (0.181, 0.007), (0.217, 0.008)], strict=True)
    ),
    "dso": dict(
        zip(SIZES, [(0.262, 0.015), (0.337, 0.018), (0.397, 0.016), (0.436, 0.021), (0.458, 0.019)], strict=True)
    ),
    "dr": dict(
        zip(SIZES, [(0.016, 0.016), (0.134, 0.016), (0.191, 0.009), (0.228, 0.009), (0.245, 0.009)], strict=True)
    ),
    "potec": dict(
        zip(SIZES, [(0.003, 0.015), (0.040, 0.012), (0.067, 0.013), (0.117, 0.016), (0.173, 0.018)], strict=True)
    ),
    "greedy": dict(
        zip(SIZES, [(0.002, 0.011), (0.036, 0.010), (0.051, 0.009), (0.097, 0.014), (0.150, 0.018)], strict=True)
    ),
    "online": dict.fromkeys(SIZES, (0.705, 0.010)),
}


@dataclass(frozen=True)
class Cell:
    """One learner at one data size.

    Attributes:
        learner: name in :data:`PUBLISHED`.
        n: logged rounds.
        worlds: number of worlds.
        mean: of the optimality over worlds.
        standard_error: of that mean.
        published_mean: what the paper's code reached.
        published_standard_error: of that.
        deviation: difference of the means in combined standard errors.
        seconds: processor time of training a world, the worlds batched; that of the regression it shares with others
            included.
        torch_version: provenance.
    """

    learner: str
    n: int
    worlds: int
    mean: float
    standard_error: float
    published_mean: float
    published_standard_error: float
    deviation: float
    seconds: float
    torch_version: str = torch.__version__

    def __str__(self) -> str:
        return (
            f"{self.learner:<11} {self.n:>6}  {self.mean:6.3f} ± {self.standard_error:.3f}   "
            f"{self.published_mean:6.3f} ± {self.published_standard_error:.3f}   {self.deviation:+6.1f}   "
            f"{self.seconds:6.1f} s"
        )


# Why a cell may be off although the method is the published one: what was measured, not what is hoped.
_REGRESSION = (
    "what rests on the prompt-reward regression, and the logging policy too, lies one to two standard errors above the "
    "published means at nearly every size; all cells share their worlds. Why was not found, and nothing was tuned"
)
REASONS: Mapping[tuple[str, int], str] = {
    ("greedy", 2000): _REGRESSION,
    ("potec", 2000): _REGRESSION,
    ("regression", 8000): _REGRESSION,
}


def verdict(cells: Sequence[Cell]) -> str:
    """Say which cells are more than two combined standard errors off, and why."""
    off = [cell for cell in cells if abs(cell.deviation) > 2]
    by_chance = 0.0455 * len(cells)
    lines = [
        f"{len(off)} of {len(cells)} cells deviate by more than two standard errors; {by_chance:.1f} would by chance"
    ]
    lines += [f"{cell}   {REASONS.get((cell.learner, cell.n), 'not explained')}" for cell in off]
    return "\n".join(lines)


HEADER = f"{'learner':<11} {'n':>6}  {'here':>14}   {'published':>14}   {'dev/se':>6}   {'s/world':>8}"


class Comparison:
    """The worlds of the comparison, with what is needed to judge policies in them.

    Args:
        seeds: of the worlds.
        settings: of the worlds, on top of the preset ``paper_code``.
        contexts: rounds over which policies are valued.
    """

    def __init__(self, seeds: Iterable[int], settings: Mapping[str, Any] | None = None, contexts: int = 10_000) -> None:
        self.seeds, self.contexts = list(seeds), contexts
        self.simulators: list[Simulator] = [
            SyntheticConfig.preset("paper_code", **(settings or {}), seed=seed).build() for seed in self.seeds
        ]
        self.generators = [simulator.outputs for simulator in self.simulators]

    @cached_property
    def logging(self) -> tuple[list[agents.SoftmaxPolicy], float]:
        """The logging policies, and the processor time they took."""
        return _timed(lambda: agents.logging_policies(self.simulators, seeds=self.seeds))

    @cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of the uniform policy, and what the optimal one adds to them, (worlds,) each."""
        floor = self._values([agents.UniformPolicy(simulator.n_prompts) for simulator in self.simulators])
        return floor, self._values([agents.OraclePolicy(simulator) for simulator in self.simulators]) - floor

    def _values(self, policies: Sequence[Policy]) -> np.ndarray:
        pairs = zip(self.simulators, policies, strict=True)
        return np.array([simulator.policy_value(policy, n=self.contexts).value for simulator, policy in pairs])

    def optimality(self, policies: Sequence[Policy]) -> np.ndarray:
        """Return the optimality of one policy a world, (worlds,)."""
        floor, scale = self._scale
        return np.asarray((self._values(policies) - floor) / scale)

    def cell(self, learner: str, n: int, policies: Sequence[Policy], seconds: float) -> Cell:
        """Judge policies that took `seconds` to train, and compare."""
        reached, worlds = self.optimality(policies), len(policies)
        mean, error = float(reached.mean()), float(reached.std(ddof=1) / math.sqrt(worlds))
        published, published_error = PUBLISHED[learner][n]
        deviation = (mean - published) / math.hypot(error, published_error)
        return Cell(learner, n, worlds, mean, error, published, published_error, deviation, seconds / worlds)


def _timed(make: Callable[[], T]) -> tuple[T, float]:
    started = time.process_time()
    return make(), time.process_time() - started


class Logs:
    """What the learners of one data size share: the logs, and the reward regression.

    Args:
        comparison: the worlds.
        n: rounds the logging policy records in each.
    """

    def __init__(self, comparison: Comparison, n: int) -> None:
        self.comparison, self.n = comparison, n
        worlds = zip(comparison.simulators, comparison.logging[0], comparison.seeds, strict=True)
        self._logs: list[LoggedDataset] = [
            collect(simulator, policy, n, seed=seed, progress=False) for simulator, policy, seed in worlds
        ]

    @cached_property
    def regression(self) -> tuple[list[agents.PromptRewards], float]:
        """The prompt-level reward models, and the processor time they took."""
        return _timed(lambda: agents.PromptRewardRegression().fit_many(self._logs, seeds=self.comparison.seeds))

    def fitted(self) -> agents.FittedRewards:
        """Return the reward models in place of a regression."""
        return agents.FittedRewards(tuple(self.regression[0]))

    def learn(self, learner: agents.Learner) -> Sequence[Policy]:
        """Let `learner` learn from the logs."""
        return learner.fit_many(
            self._logs,
            generators=self.comparison.generators,
            logging_policies=self.comparison.logging[0],
            seeds=self.comparison.seeds,
        )

    def cell(self, learner: str) -> Cell:
        """Train `learner`, a name in :data:`METHODS`, and compare."""
        shared = 0.0 if learner in WITHOUT_REGRESSION else self.regression[1]
        policies, seconds = _timed(lambda: METHODS[learner](self))
        return self.comparison.cell(learner, self.n, policies, shared + seconds)


Method = Callable[[Logs], Sequence[Policy]]

METHODS: Mapping[str, Method] = {
    "is": lambda logs: logs.learn(agents.ImportanceSamplingPG()),
    "greedy": lambda logs: [agents.EpsilonGreedyPolicy(model, model.n_prompts) for model in logs.regression[0]],
    "regression": lambda logs: logs.learn(agents.RegressionPG(rewards=logs.fitted())),
    "dr": lambda logs: logs.learn(agents.DoublyRobustPG(rewards=logs.fitted())),
    "potec": lambda logs: logs.learn(agents.POTEC(rewards=logs.fitted())),
    "dso": lambda logs: logs.learn(agents.DSO()),
}

WITHOUT_REGRESSION = ("is", "dso")


def compare(
    worlds: int,
    sizes: Sequence[int],
    learners: Sequence[str],
    report: Callable[[Cell], None],
    known: Sequence[Cell] = (),
) -> list[Cell]:
    """Fill the table.

    Args:
        worlds: number of worlds, at least 2.
        sizes: numbers of logged rounds, of :data:`SIZES`.
        learners: names in :data:`PUBLISHED`.
        report: called with each new cell as soon as it is known.
        known: cells of an earlier run; those of as many worlds are not computed again.

    Returns:
        The cells that were asked for, known ones first.
    """
    comparison = Comparison(range(worlds))
    cells = [cell for cell in known if cell.worlds == worlds and cell.learner in learners and cell.n in sizes]
    there = {(cell.learner, cell.n) for cell in cells}

    def add(cell: Cell) -> None:
        cells.append(cell)
        report(cell)

    # What no log changes stands at the first size.
    if "logging" in learners and ("logging", sizes[0]) not in there:
        add(comparison.cell("logging", sizes[0], *comparison.logging))
    if "online" in learners and ("online", sizes[0]) not in there:
        online = _timed(lambda: agents.OnlinePG().fit_many(comparison.simulators, seeds=comparison.seeds))
        add(comparison.cell("online", sizes[0], *online))
    for n in sizes:
        missing = [learner for learner in METHODS if learner in learners and (learner, n) not in there]
        if missing:
            logs = Logs(comparison, n)
            for learner in missing:
                add(logs.cell(learner))
    return cells


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[500, 8000], choices=SIZES, help="logged rounds")
    parser.add_argument("--worlds", type=int, default=10, help="number of worlds (seeds 0, 1, 2, ...)")
    parser.add_argument("--learners", nargs="+", default=["logging", "is", "dso"], choices=sorted(PUBLISHED))
    parser.add_argument("--out", type=Path, help="write the cells to this CSV file, and take up those that are there")
    chosen = parser.parse_args()
    # At these sizes the published regressions overfit, and say so in every cell.
    warnings.simplefilter("ignore", agents.TrainingWarning)
    print(HEADER, flush=True)

    def report(cell: Cell) -> None:
        print(cell, flush=True)
        if chosen.out is not None:
            append_row(chosen.out, cell)

    known = read_rows(chosen.out, Cell) if chosen.out is not None else []
    cells = compare(chosen.worlds, chosen.n, chosen.learners, report, known)
    print(verdict(cells))


if __name__ == "__main__":
    main()
