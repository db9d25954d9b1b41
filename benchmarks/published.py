"""Compare the learners with the published synthetic experiment, cell by cell.

    python -m benchmarks.published --n 500 8000 --worlds 20 --learners logging is dso regression online

Worlds are those of the preset ``paper_code``, seeds 0, 1, 2, ...; a value is the optimality
``(V(π) − V(uniform)) / (V(optimal) − V(uniform))``, exact over 10,000 contexts, mean ± standard error over worlds. The
published worlds were drawn by another generator: a cell agrees if the means differ by at most two combined standard
errors.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import agents
from offprompts_env.collecting import collect
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import LoggedDataset, Policy

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
        seconds: processor time of training a world, the worlds batched.
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


HEADER = f"{'learner':<11} {'n':>6}  {'here':>14}   {'published':>14}   {'dev/se':>6}   {'s/world':>8}"


class Comparison:
    """The worlds of the comparison, with what is needed to judge policies in them.

    Args:
        worlds: number of worlds; their seeds are 0, 1, 2, ...
    """

    def __init__(self, worlds: int) -> None:
        self.seeds = list(range(worlds))
        self.simulators: list[Simulator] = [SyntheticConfig.preset("paper_code", seed=s).build() for s in self.seeds]
        self.generators = [simulator.outputs for simulator in self.simulators]
        self._floor = self._values([agents.UniformPolicy(simulator.n_prompts) for simulator in self.simulators])
        self._range = self._values([agents.OraclePolicy(simulator) for simulator in self.simulators]) - self._floor
        started = time.process_time()
        self.logging = agents.logging_policies(self.simulators, seeds=self.seeds)
        self.logging_seconds = time.process_time() - started

    def _values(self, policies: Sequence[Policy]) -> np.ndarray:
        pairs = zip(self.simulators, policies, strict=True)
        return np.array([simulator.policy_value(policy).value for simulator, policy in pairs])

    def optimality(self, policies: Sequence[Policy]) -> np.ndarray:
        """Return the optimality of one policy a world, (worlds,)."""
        return np.asarray((self._values(policies) - self._floor) / self._range)

    def logs(self, n: int) -> list[LoggedDataset]:
        """Record `n` rounds of the logging policy in each world."""
        worlds = zip(self.simulators, self.logging, self.seeds, strict=True)
        return [collect(simulator, policy, n, seed=seed, progress=False) for simulator, policy, seed in worlds]

    def cell(self, learner: str, n: int, policies: Sequence[Policy], seconds: float) -> Cell:
        """Judge policies that took `seconds` to train, and compare."""
        reached, worlds = self.optimality(policies), len(policies)
        mean, error = float(reached.mean()), float(reached.std(ddof=1) / math.sqrt(worlds))
        published, published_error = PUBLISHED[learner][n]
        deviation = (mean - published) / math.hypot(error, published_error)
        return Cell(learner, n, worlds, mean, error, published, published_error, deviation, seconds / worlds)


Method = Callable[[Comparison, Sequence[LoggedDataset]], Sequence[Policy]]


def _importance_sampling(comparison: Comparison, logs: Sequence[LoggedDataset]) -> Sequence[Policy]:
    return agents.ImportanceSamplingPG().fit_many(logs, seeds=comparison.seeds)


def _regression(comparison: Comparison, logs: Sequence[LoggedDataset]) -> Sequence[Policy]:
    return agents.RegressionPG().fit_many(logs, seeds=comparison.seeds)


def _greedy(comparison: Comparison, logs: Sequence[LoggedDataset]) -> Sequence[Policy]:
    models = agents.PromptRewardRegression().fit_many(logs, seeds=comparison.seeds)
    return [agents.EpsilonGreedyPolicy(model, model.n_prompts) for model in models]


def _dso(comparison: Comparison, logs: Sequence[LoggedDataset]) -> Sequence[Policy]:
    return agents.DSO().fit_many(
        logs, generators=comparison.generators, logging_policies=comparison.logging, seeds=comparison.seeds
    )


METHODS: Mapping[str, Method] = {
    "is": _importance_sampling,
    "regression": _regression,
    "greedy": _greedy,
    "dso": _dso,
}


def compare(worlds: int, sizes: Sequence[int], learners: Sequence[str], report: Callable[[Cell], None]) -> list[Cell]:
    """Fill the table.

    Args:
        worlds: number of worlds, at least 2.
        sizes: numbers of logged rounds, of :data:`SIZES`.
        learners: names in :data:`PUBLISHED`.
        report: called with each cell as soon as it is known.
    """
    comparison, cells = Comparison(worlds), []
    if "logging" in learners:
        cells.append(comparison.cell("logging", sizes[0], comparison.logging, comparison.logging_seconds))
        report(cells[-1])
    if "online" in learners:
        started = time.process_time()
        policies = agents.OnlinePG().fit_many(comparison.simulators, seeds=comparison.seeds)
        cells.append(comparison.cell("online", sizes[0], policies, time.process_time() - started))
        report(cells[-1])
    for n in sizes:
        logs = comparison.logs(n)
        for learner in (name for name in METHODS if name in learners):
            started = time.process_time()
            learned = METHODS[learner](comparison, logs)
            cells.append(comparison.cell(learner, n, learned, time.process_time() - started))
            report(cells[-1])
    return cells


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[500, 8000], choices=SIZES, help="logged rounds")
    parser.add_argument("--worlds", type=int, default=10, help="number of worlds (seeds 0, 1, 2, ...)")
    parser.add_argument("--learners", nargs="+", default=["logging", "is", "dso"], choices=sorted(PUBLISHED))
    parser.add_argument("--out", type=Path, help="write the cells to this CSV file")
    chosen = parser.parse_args()
    # At these sizes the published regressions overfit, and say so in every cell.
    warnings.simplefilter("ignore", agents.TrainingWarning)
    print(HEADER, flush=True)
    cells = compare(chosen.worlds, chosen.n, chosen.learners, lambda cell: print(cell, flush=True))
    if chosen.out is not None:
        with chosen.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Cell)])
            writer.writeheader()
            writer.writerows(asdict(cell) for cell in cells)


if __name__ == "__main__":
    main()
