"""Where a pure direct method fails, and which learner does not: small worlds, each with one thing made difficult.

    python -m benchmarks.failures --worlds 8 --cases baseline lossy --out failures.csv

A row, one learner in one world of a case, is written to the file as soon as it is known, and one that is there already
is not computed again.

Worlds are those of the preset ``paper_code``, seeds 0, 1, 2, ..., with the settings of :data:`CASES` on top; a value is
the optimality ``(V(π) − V(uniform)) / (V(optimal) − V(uniform))``, exact over 10,000 contexts. Differences between
learners are paired over worlds.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import agents
from benchmarks.published import Comparison
from benchmarks.rows import append_row, read_rows
from offprompts_env.collecting import collect
from offprompts_env.rng import stream
from offprompts_env.simulator import GaussianOutputs, OutputModel
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Outputs, Policy


@dataclass(frozen=True)
class Case:
    """A world with one thing made difficult.

    Attributes:
        what: what is difficult.
        n: logged rounds.
        settings: of the worlds.
        models: of the learners that predict rewards of sentences.
        support: share of the prompts that the logging policy plays.
        shown: the log and the generator show only this many first output dimensions; None shows all.
    """

    what: str
    n: int = 2_000
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: agents.SentenceModels = field(default_factory=agents.SentenceModels)
    support: float = 1.0
    shown: int | None = None


_LINEAR = agents.SentenceModels(rewards=agents.SentenceRewardSearch((agents.PolynomialRidge(1),)))

CASES: Mapping[str, Case] = {
    "baseline": Case("nothing"),
    "misspecified": Case("the reward model is linear, the reward bilinear", models=_LINEAR),
    "confounded": Case(
        "no prompt moves 3 of the 5 output dimensions that the reward reads", settings={"confounded_dims": 3}
    ),
    "sparse": Case("the reward reads 1 of 5 output dimensions", settings={"reward_dims": 1}),
    "binary": Case("rewards are 0 or 1", settings={"reward_type": "binary"}),
    "tiny": Case("100 rounds", n=100),
    "deficient": Case("the logging policy never plays 80% of the prompts", support=0.2),
    "lossy": Case(
        "10 prompts, and log and generator show only 2 of 5 output dimensions", 8_000, {"n_prompts": 10}, shown=2
    ),
}

N_PROMPTS = 200

# A quarter of the published steps, each four times as long.
_SHORT: Mapping[str, Any] = {"steps": 5_000, "learning_rate": 2e-3}

CAPTION = (
    f"optimality, mean ± standard error over worlds; {N_PROMPTS} prompts and 2,000 rounds where nothing else is said; "
    "is, regression, dr and dso with 5,000 steps at learning rate 2e-3 in place of 20,000 at 5e-4"
)


class SupportedPolicy:
    """A policy held to some of its prompts: ``π(a) ∝ π₀(a) 1{a supported}``.

    Args:
        policy: π₀.
        supported: which prompts are played, (A,) bool.
    """

    def __init__(self, policy: Policy, supported: npt.NDArray[np.bool_]) -> None:
        self.policy, self.supported = policy, supported
        self.n_prompts, self.catalogue = policy.n_prompts, getattr(policy, "catalogue", None)

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        pmf = self.policy.probabilities(contexts) * self.supported
        return np.asarray(pmf / pmf.sum(axis=1, keepdims=True))


class ShownOutputs:
    """The first dimensions of a Gaussian generator's outputs: all that a lossy encoder lets through.

    Args:
        whole: the generator.
        dims: how many are shown.
    """

    def __init__(self, whole: GaussianOutputs, dims: int) -> None:
        self.whole, self.output_dim, self.prompts = whole, dims, whole.prompts
        self.effects: FloatArray = whole.effects[:, :dims]
        self.noise_std: FloatArray = whole.noise_std[:dims]

    def base(self, contexts: Contexts) -> FloatArray:
        """The part of the mean that no prompt changes, (n, dims)."""
        return self.whole.base(contexts)[:, : self.output_dim]

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one output a round."""
        return Outputs(self.whole.sample(contexts, actions, rng).embedding[:, : self.output_dim])


@cache
def _comparison(seeds: tuple[int, ...], settings: tuple[tuple[str, Any], ...], contexts: int) -> Comparison:
    """Return the worlds, the same for all cases that differ in the log only: their logging policies are made once."""
    return Comparison(seeds, dict(settings), contexts)


class Trial:
    """The worlds of a case with their logs, and what learners share.

    Args:
        case: what is difficult.
        seeds: of the worlds.
        settings: of the worlds, for those that the case does not set.
        contexts: rounds over which policies are valued.
    """

    def __init__(
        self, case: Case, seeds: Sequence[int], settings: Mapping[str, Any] | None = None, contexts: int = 10_000
    ) -> None:
        self.case, self.seeds = case, list(seeds)
        known = {"n_prompts": N_PROMPTS, **(settings or {}), **case.settings}
        self.comparison = _comparison(tuple(self.seeds), tuple(sorted(known.items())), contexts)

    @cached_property
    def logging(self) -> list[Policy]:
        """The policies that record the logs."""
        policies: list[Policy] = list(self.comparison.logging[0])
        if self.case.support == 1:
            return policies
        held: list[Policy] = []
        for policy, seed in zip(policies, self.seeds, strict=True):
            order = stream(seed, "failures", "support").permutation(policy.n_prompts)
            held.append(SupportedPolicy(policy, order < max(1, round(self.case.support * policy.n_prompts))))
        return held

    @cached_property
    def generators(self) -> list[OutputModel]:
        """The generators as learners see them."""
        if self.case.shown is None:
            return list(self.comparison.generators)
        return [
            ShownOutputs(generator, self.case.shown)
            for generator in self.comparison.generators
            if isinstance(generator, GaussianOutputs)
        ]

    @cached_property
    def logs(self) -> list[LoggedDataset]:
        """The logs as learners see them."""
        worlds = zip(self.comparison.simulators, self.logging, self.seeds, strict=True)
        logs = [collect(world, policy, self.case.n, seed=seed, progress=False) for world, policy, seed in worlds]
        return [replace(log, output=log.output[:, : self.case.shown]) for log in logs]

    @cached_property
    def prompt_rewards(self) -> agents.FittedRewards:
        """The prompt-level reward models."""
        return agents.FittedRewards(tuple(agents.PromptRewardRegression().fit_many(self.logs, seeds=self.seeds)))

    def learn(self, learner: agents.Learner) -> Sequence[Policy]:
        """Let `learner` learn from the logs."""
        return learner.fit_many(self.logs, generators=self.generators, logging_policies=self.logging, seeds=self.seeds)


# "+e": the reward model also reads the prompt's embedding.
METHODS: Mapping[str, Callable[[Trial], Sequence[Policy]]] = {
    "logging": lambda trial: trial.logging,
    "greedy": lambda trial: trial.learn(agents.SentenceGreedy(trial.case.models)),
    "greedy+e": lambda trial: trial.learn(agents.SentenceGreedy(replace(trial.case.models, prompt_embedding=True))),
    "exact dso": lambda trial: trial.learn(agents.ExactDSO()),
    "is": lambda trial: trial.learn(agents.ImportanceSamplingPG(**_SHORT)),
    "regression": lambda trial: trial.learn(agents.RegressionPG(**_SHORT, rewards=trial.prompt_rewards)),
    "dr": lambda trial: trial.learn(agents.DoublyRobustPG(**_SHORT, rewards=trial.prompt_rewards)),
    "dso": lambda trial: trial.learn(agents.DSO(**_SHORT)),
    "sdr kernel": lambda trial: trial.learn(agents.SentenceDR(models=trial.case.models)),
    "sdr action": lambda trial: trial.learn(agents.SentenceDR(models=trial.case.models, residual="action")),
    "sdr+e": lambda trial: trial.learn(
        agents.SentenceDR(models=replace(trial.case.models, prompt_embedding=True), residual="action")
    ),
}

MIXED = ("sdr kernel", "sdr action", "sdr+e")
"""Learners that choose among a direct method, its corrections, and weights alone."""

PURE = ("greedy", "exact dso", "is", "dr")
"""What they should not be worse than."""


@dataclass(frozen=True)
class Row:
    """One learner in one world of a case.

    Attributes:
        case: name in :data:`CASES`.
        learner: name in :data:`METHODS`.
        world: its seed.
        optimality: what the learned policy reaches.
        seconds: processor time of training, shared regressions included for the learner that comes first.
        torch_version: provenance.
    """

    case: str
    learner: str
    world: int
    optimality: float
    seconds: float
    torch_version: str = torch.__version__


def reached(rows: Sequence[Row], case: str, learner: str) -> FloatArray:
    """Return the optimalities of `learner` in the worlds of `case`, by seed."""
    own = sorted((row for row in rows if (row.case, row.learner) == (case, learner)), key=lambda row: row.world)
    return np.array([row.optimality for row in own])


def _mean(values: FloatArray) -> str:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.3f} ± {error:.3f}"


def table(rows: Sequence[Row]) -> str:
    """Return what learners reach, a line a learner and a column a case."""
    cases = [case for case in CASES if any(row.case == case for row in rows)]
    lines = [" " * 11 + "".join(f"{case:>17}" for case in cases)]
    for learner in METHODS:
        cells = [reached(rows, case, learner) for case in cases]
        if any(map(len, cells)):
            lines.append(f"{learner:<11}" + "".join(f"{_mean(cell) if len(cell) else '':>17}" for cell in cells))
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Say for each case which pure learner is best, and how far a mixed one is from it over the same worlds."""
    lines = []
    for case in CASES:
        pure = {learner: reached(rows, case, learner) for learner in PURE}
        pure = {learner: values for learner, values in pure.items() if len(values)}
        if not pure:
            continue
        best = max(pure, key=lambda learner: float(pure[learner].mean()))
        for learner in MIXED:
            values = reached(rows, case, learner)
            if len(values) == len(pure[best]):
                lines.append(f"{case:<13} {learner} − {best}: {_mean(values - pure[best])}")
    return "\n".join(lines)


def compare(
    worlds: int,
    cases: Sequence[str],
    learners: Sequence[str],
    report: Callable[[Row], None],
    known: Sequence[Row] = (),
) -> list[Row]:
    """Fill the table.

    Args:
        worlds: number of worlds of each case.
        cases: names in :data:`CASES`.
        learners: names in :data:`METHODS`.
        report: called with each new row as soon as it is known.
        known: rows of an earlier run, which are not computed again.

    Returns:
        The rows that were asked for, known ones first.
    """
    asked = [row for row in known if row.case in cases and row.learner in learners and row.world < worlds]
    rows, there = list(asked), {(row.case, row.learner, row.world) for row in asked}
    for case in cases:
        open_worlds = {
            learner: [seed for seed in range(worlds) if (case, learner, seed) not in there] for learner in learners
        }
        seeds = sorted({seed for missing in open_worlds.values() for seed in missing})
        trial = Trial(CASES[case], seeds)
        for learner in (name for name in METHODS if open_worlds.get(name)):
            started = time.process_time()
            policies = METHODS[learner](trial)
            seconds = (time.process_time() - started) / len(seeds)
            found = zip(seeds, trial.comparison.optimality(policies).tolist(), strict=True)
            for seed, optimality in found:
                if seed in open_worlds[learner]:
                    rows.append(Row(case, learner, seed, optimality, seconds))
                    report(rows[-1])
    return rows


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worlds", type=int, default=4, help="number of worlds (seeds 0, 1, 2, ...) of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--learners", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file, and take up those that are there")
    chosen = parser.parse_args()
    # Where a direct method is made to fail, its regression says so.
    warnings.simplefilter("ignore", agents.TrainingWarning)

    def report(row: Row) -> None:
        print(f"{row.case:<13} {row.learner:<11} {row.world:>3} {row.optimality:6.3f} {row.seconds:6.1f} s", flush=True)
        if chosen.out is not None:
            append_row(chosen.out, row)

    known = read_rows(chosen.out, Row) if chosen.out is not None else []
    rows = compare(chosen.worlds, chosen.cases, chosen.learners, report, known)
    print("\n".join(["", CAPTION, "", table(rows), "", verdict(rows)]))


if __name__ == "__main__":
    main()
