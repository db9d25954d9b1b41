"""Where a pure direct method fails, and which learner does not: small worlds, each with one thing made difficult.

    python -m benchmarks run failures --out runs
    python -m benchmarks failures --out runs

200 prompts and 2,000 rounds where a case says nothing else; IS PG, regression PG, DR PG and DSO with 5,000 steps at
learning rate 2e-3 in place of 20,000 at 5e-4. Differences between learners are paired over worlds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import agents
from benchmarks.methods import Logging, Method
from benchmarks.pages.markup import number
from benchmarks.plan import Point, Sweep
from benchmarks.rows import Row, read_rows
from benchmarks.settings.vectors import VectorSetting
from benchmarks.summaries import comparable, grouped, over_worlds, standard_error
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.simulator import GaussianOutputs, OutputModel, Simulator
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Outputs, Policy


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


@dataclass(frozen=True)
class CaseSetting(VectorSetting):
    """A synthetic process whose log hides something.

    Attributes:
        support: share of the prompts that the logging policy plays.
        shown: the log and the generator show only this many first output dimensions; None shows all.
    """

    n: int = 2_000
    prompts: int = 200
    support: float = 1.0
    shown: int | None = None

    @property
    def process(self) -> VectorSetting:
        """The setting without what changes neither worlds nor the policies that record."""
        return replace(self, n=0, shown=None)

    def recorder(self, policy: Policy, seed: int) -> Policy:
        """Return `policy`, held to the prompts that the case lets it play."""
        if self.support == 1:
            return policy
        order = stream(seed, "failures", "support").permutation(policy.n_prompts)
        return SupportedPolicy(policy, order < max(1, round(self.support * policy.n_prompts)))

    def generator(self, simulator: Simulator) -> OutputModel:
        """Return the generator with the output dimensions that are shown.

        Raises:
            ConfigError: dimensions are hidden of a generator that is not Gaussian.
        """
        outputs = simulator.outputs
        if self.shown is None:
            return outputs
        if not isinstance(outputs, GaussianOutputs):
            raise ConfigError(f"shown: expected a Gaussian generator, got {type(outputs).__name__}; leave shown=None")
        return ShownOutputs(outputs, self.shown)

    def seen(self, log: LoggedDataset) -> LoggedDataset:
        """Return `log` with the output dimensions that are shown."""
        return log if self.shown is None else replace(log, output=log.output[:, : self.shown])


@dataclass(frozen=True)
class Case:
    """A world with one thing made difficult.

    Attributes:
        what: what is difficult.
        setting: the process and its log.
        models: of the learners that predict rewards of sentences.
    """

    what: str
    setting: CaseSetting = field(default_factory=CaseSetting)
    models: agents.SentenceModels = field(default_factory=agents.SentenceModels)


_LINEAR = agents.SentenceModels(rewards=agents.SentenceRewardSearch((agents.PolynomialRidge(1),)))

CASES: Mapping[str, Case] = {
    "baseline": Case("nothing"),
    "misspecified": Case("the reward model is linear, the reward bilinear", models=_LINEAR),
    "confounded": Case(
        "no prompt moves 3 of the 5 output dimensions that the reward reads",
        CaseSetting(extra=(("confounded_dims", 3),)),
    ),
    "sparse": Case("the reward reads 1 of 5 output dimensions", CaseSetting(extra=(("reward_dims", 1),))),
    "binary": Case("rewards are 0 or 1", CaseSetting(extra=(("reward_type", "binary"),))),
    "tiny": Case("100 rounds", CaseSetting(n=100)),
    "deficient": Case("the logging policy never plays 80% of the prompts", CaseSetting(support=0.2)),
    "lossy": Case(
        "10 prompts, and log and generator show only 2 of 5 output dimensions",
        CaseSetting(n=8_000, prompts=10, shown=2),
    ),
}

MIXED = ("sentence-dr", "sentence-dr-action", "sentence-dr+e")
"""Learners that choose among a direct method, its corrections, and weights alone."""

PURE = ("sentence-greedy", "exact-dso", "is", "dr")
"""What they should not be worse than."""


def _methods(models: agents.SentenceModels) -> Mapping[str, Method]:
    # A quarter of the published steps, each four times as long.
    short: Mapping[str, Any] = {"steps": 5_000, "learning_rate": 2e-3}
    # "+e": the reward model also reads the prompt's embedding.
    informed = replace(models, prompt_embedding=True)
    return {
        "logging": Logging(),
        "sentence-greedy": agents.SentenceGreedy(models),
        "sentence-greedy+e": agents.SentenceGreedy(informed),
        "exact-dso": agents.ExactDSO(),
        "is": agents.ImportanceSamplingPG(**short),
        "regression": agents.RegressionPG(**short),
        "dr": agents.DoublyRobustPG(**short),
        "dso": agents.DSO(**short),
        "sentence-dr": agents.SentenceDR(models=models),
        "sentence-dr-action": agents.SentenceDR(models=models, residual="action"),
        "sentence-dr+e": agents.SentenceDR(models=informed, residual="action"),
    }


def sweep() -> Sweep:
    """Return the sweep: a point a case."""
    points = (Point(f"case={name}", math.nan, case.setting, _methods(case.models)) for name, case in CASES.items())
    return Sweep("failures", "Where direct methods fail", "case", tuple(points), worlds=8, chunk=4)


def verdict(rows: Iterable[Row]) -> list[str]:
    """Say for each case which pure learner is best, and how far a mixed one is from it over common worlds."""
    own = [row for row in rows if row.sweep == "failures"]
    held = {key: over_worlds(some) for key, some in grouped(own, lambda row: (row.point, row.learner)).items()}
    lines = []
    for name in CASES:
        pure = {learner: held[f"case={name}", learner] for learner in PURE if (f"case={name}", learner) in held}
        for learner in MIXED if pure else ():
            best = _best(pure)
            mixed = held.get((f"case={name}", learner), {})
            leads = [value - pure[best][world] for world, value in mixed.items() if world in pure[best]]
            if leads:
                lines.append(f"{name:<13} {learner} − {best}: {_mean(leads)}")
    return lines


def _best(pure: Mapping[str, Mapping[int, float]]) -> str:
    # Of those that were run as often as any, or a lucky world would make one best.
    most = max(map(len, pure.values()))
    means = {learner: sum(worlds.values()) / most for learner, worlds in pure.items() if len(worlds) == most}
    return max(means, key=means.__getitem__)


def _mean(values: Sequence[float]) -> str:
    return f"{number(sum(values) / len(values))} ± {number(standard_error(values))} ({len(values)} worlds)"


def _print(chosen: argparse.Namespace) -> int:
    missing = f"{chosen.out} has no rows of it yet: python -m benchmarks run failures --out {chosen.out}"
    print("\n".join(verdict(comparable(read_rows(chosen.out))) or [missing]))
    return 0


def add_command(commands: Any) -> None:
    """Add ``failures`` to the command line."""
    command = commands.add_parser("failures", help="where direct methods fail: mixed learners beside the best pure one")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    command.set_defaults(do=_print)
