"""Measure the learners of this project against the goals set for them, on vectors and on text.

    python -m benchmarks.goals synthetic [--points n=500 prompts=10 noise=0 ...] [--learners ...] [--worlds 20]
    python -m benchmarks.goals movielens [--learners ...] [--data-seeds 5] [--seeds 5]

*Synthetic*: worlds of the preset ``paper_code``, at the points of the published sweeps: 8,000 logged rounds, 1,000
prompts and reward noise 1, but for the one thing that is varied. A value is the optimality
``(V(π) − V(uniform)) / (V(optimal) − V(uniform))``, mean ± standard error over worlds.

*MovieLens*: all prompts of the embedded bundle and 10,000 logged rounds. A value is the improvement over sentences
without a prompt, in 100 users × 60 movies with one fresh sentence of every (movie, prompt) a half; its mean is over
data seeds and, within each, learning seeds.

What is recorded and learned from is kept under `out`, results row by row in a CSV file there: a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch

import agents
import offprompts_env as op
from benchmarks.demo import kept, movielens
from benchmarks.published import METHODS, PUBLISHED, SIZES, Comparison, Logs, Method
from benchmarks.rows import append_row, read_rows
from benchmarks.truth import Truth, drawn_truth
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.types import Contexts, IntArray, LoggedDataset, Outputs, Policy, PromptSet

# --- vectors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A point of the published sweeps.

    Attributes:
        n: logged rounds.
        prompts: number of prompts.
        noise: standard deviation of the reward's noise.
    """

    n: int = 8000
    prompts: int = 1000
    noise: float = 1.0

    @property
    def process(self) -> str:
        """Names the worlds, which the number of rounds does not change."""
        return f"{self.prompts}-prompts-noise-{self.noise:g}"


POINTS: Mapping[str, Point] = (
    {f"n={n}": Point(n=n) for n in SIZES}
    | {f"prompts={prompts}": Point(prompts=prompts) for prompts in (10, 50, 100, 500)}
    | {f"noise={noise}": Point(noise=noise) for noise in (0, 2, 3)}
)
"""The sweeps meet in ``n=8000``, which is also their point of 1,000 prompts and of noise 1."""

SENTENCE_LEARNERS: Mapping[str, Method] = {
    "sentence-greedy": lambda logs: logs.learn(agents.SentenceGreedy()),
    "sentence-pg": lambda logs: logs.learn(agents.SentencePG()),
    "sentence-dr": lambda logs: logs.learn(agents.SentenceDR()),
    "exact-dso": lambda logs: logs.learn(agents.ExactDSO()),
}
VECTOR_LEARNERS = {**SENTENCE_LEARNERS, **METHODS}

# Optimality, mean of 20 worlds, that the sentence-level direct method is to reach with its defaults.
GOALS: Mapping[str, float] = {"n=500": 0.75, "n=8000": 0.93}


@dataclass(frozen=True)
class VectorRow:
    """One learner in one world.

    Attributes:
        point: name in :data:`POINTS`.
        learner: name in :data:`VECTOR_LEARNERS`.
        world: its seed, which is also that of the log and of learning.
        optimality: what the policy reached.
        torch_version: provenance.
    """

    point: str
    learner: str
    world: int
    optimality: float
    torch_version: str = torch.__version__

    def __str__(self) -> str:
        return f"{self.point:<13} {self.learner:<16} world {self.world:>2}  {self.optimality:6.3f}"


class Worlds(Comparison):
    """Worlds whose logging policies are kept on disk."""

    def __init__(self, point: Point, seeds: Sequence[int], out: Path, contexts: int) -> None:
        super().__init__(seeds, {"n_prompts": point.prompts, "reward_std": point.noise}, contexts)
        self._folder = out / "worlds" / point.process

    @cached_property
    def logging(self) -> tuple[list[agents.SoftmaxPolicy], float]:
        """The logging policies; the time they took is not measured."""
        policies = [self._kept(own, seed) for own, seed in zip(self.simulators, self.seeds, strict=True)]
        return cast("list[agents.SoftmaxPolicy]", policies), 0.0

    def _kept(self, simulator: Simulator, seed: int) -> Policy:
        return kept(self._folder / f"{seed}", simulator.prompts, lambda: agents.logging_policy(simulator, seed=seed))


def measure_vectors(
    points: Sequence[str],
    learners: Sequence[str],
    worlds: int,
    out: Path,
    report: Callable[[VectorRow], None],
    *,
    contexts: int = 2_000,
    at_once: int = 5,
) -> list[VectorRow]:
    """Return the rows that are asked for, computing those that `out` does not hold.

    Args:
        points: names in :data:`POINTS`.
        learners: names in :data:`VECTOR_LEARNERS`.
        worlds: number of worlds; their seeds are 0, 1, 2, ...
        out: folder.
        report: called with each new row.
        contexts: rounds over which policies are valued.
        at_once: worlds that are trained as one problem, between two writes.
    """
    path = out / "rows.csv"
    known = {(row.point, row.learner, row.world): row for row in read_rows(path, VectorRow)}

    @lru_cache(maxsize=1)
    def logs(point: str, seeds: tuple[int, ...]) -> Logs:
        return Logs(Worlds(POINTS[point], seeds, out, contexts), POINTS[point].n)

    parts = [range(start, min(start + at_once, worlds)) for start in range(0, worlds, at_once)]
    for point, part, name in product(points, parts, learners):
        missing = tuple(seed for seed in part if (point, name, seed) not in known)
        if not missing:
            continue
        own = logs(point, missing)
        for seed, reached in zip(missing, own.comparison.optimality(VECTOR_LEARNERS[name](own)), strict=True):
            row = VectorRow(point, name, seed, float(reached))
            known[point, name, seed] = row
            append_row(path, row)
            report(row)
    wanted = [(point, name, seed) for point in points for name in learners for seed in range(worlds)]
    return [known[key] for key in wanted]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, NaN of a single one."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def vector_table(rows: Sequence[VectorRow]) -> str:
    """Return means over worlds beside the goal, or beside what the paper's code reached."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cells.setdefault((row.point, row.learner), []).append(row.optimality)
    lines = [f"{'point':<13} {'learner':<16} {'worlds':>6}  {'optimality':>14}   {'published':>14}   goal"]
    for (point, learner), values in cells.items():
        mean, error = mean_and_error(values)
        published = ""
        if point.startswith("n=") and learner in PUBLISHED:
            published = "{:6.3f} ± {:.3f}".format(*PUBLISHED[learner][POINTS[point].n])
        goal = ""
        if learner == "sentence-greedy" and point in GOALS:
            goal = f"{GOALS[point]}: {'reached' if mean >= GOALS[point] else 'missed'}"
        lines.append(
            f"{point:<13} {learner:<16} {len(values):>6}  {mean:6.3f} ± {error:.3f}   {published:>14}   {goal}".rstrip()
        )
    return "\n".join(lines)


def ahead(rows: Sequence[VectorRow], own: str = "sentence-greedy") -> str:
    """Say at each point by how much `own` is ahead of each published method, in the same worlds."""
    reached = {(row.point, row.learner, row.world): row.optimality for row in rows}
    lines = []
    for point, other in dict.fromkeys((row.point, row.learner) for row in rows if row.learner in METHODS):
        worlds = [world for p, name, world in reached if (p, name) == (point, other) and (p, own, world) in reached]
        if worlds:
            gains = [reached[point, own, world] - reached[point, other, world] for world in worlds]
            mean, error = mean_and_error(gains)
            lines.append(f"{point:<13} {own} over {other:<12} {mean:+6.3f} ± {error:.3f}   ({len(worlds)} worlds)")
    return "\n".join(lines)


# --- text ------------------------------------------------------------------------------------------------------------


class CountedOutputs:
    """A generator that counts the sentences it is asked for.

    Args:
        outputs: the generator.
    """

    def __init__(self, outputs: OutputModel) -> None:
        self._outputs = outputs
        self.asked = 0

    @property
    def prompts(self) -> PromptSet:
        """The catalogue."""
        return self._outputs.prompts

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return self._outputs.output_dim

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Answer, and count."""
        self.asked += len(actions)
        return self._outputs.sample(contexts, actions, rng)


@dataclass(frozen=True)
class TextLearner:
    """A learner and what it asks for sentences.

    Attributes:
        learner: with all its settings.
        generator: made once a log from the simulator; None where the log is enough.
    """

    learner: agents.Learner
    generator: Callable[[Simulator], OutputModel] | None = None


def text_learners() -> dict[str, TextLearner]:
    """Return the learners by name: the demo's settings of the published ones, defaults of the new ones."""
    setting = movielens(None)
    # A sentence costs 1.5 ms of one core, so DSO gets a budget of them.
    dso = replace(cast("agents.DSO", setting.learners["DSO"]), max_sentences=20_000)
    learners = {
        "sentence-greedy": TextLearner(agents.SentenceGreedy()),
        "sentence-pg": TextLearner(agents.SentencePG()),
        "sentence-dr": TextLearner(agents.SentenceDR()),
        "regression": TextLearner(setting.learners["regression PG"]),
        "is": TextLearner(setting.learners["IS PG"]),
        "dso": TextLearner(dso, setting.generator),
    }
    for tau in (0.13, 0.2, 0.3):
        learners[f"exact-dso-{tau}"] = TextLearner(agents.ExactDSO(tau=tau, output_noise=0.0))
    for budget in (1000, 4000, 16_000):
        models = agents.SentenceModels(budget=budget)
        learners[f"budget-{budget}"] = TextLearner(agents.SentenceGreedy(models), lambda own: own.outputs)
    return learners


@dataclass(frozen=True)
class TextRow:
    """One learner with one data seed and one learning seed.

    Attributes:
        learner: name in :func:`text_learners`.
        data_seed: of the logging policy and the log.
        seed: of learning.
        value: improvement over no prompt.
        value_error: its standard error over the movies of the truth, which are the same for all rows.
        over_single: paired difference to the best single prompt.
        over_single_error: its standard error over movies.
        sentences: that the generator was asked for.
        seconds: processor time of learning, sentences included.
        torch_version: provenance.
    """

    learner: str
    data_seed: int
    seed: int
    value: float
    value_error: float
    over_single: float
    over_single_error: float
    sentences: int
    seconds: float
    torch_version: str = torch.__version__

    def __str__(self) -> str:
        return (
            f"{self.learner:<16} log {self.data_seed} seed {self.seed}  {self.value:6.3f}   "
            f"{self.sentences:>6} sentences   {self.seconds:6.1f} s"
        )


class Text:
    """The simulator with all its prompts, the logs and the truth, made when first asked for and kept.

    Args:
        out: folder.
        env: None for the embedded bundle with all prompts.
        rounds: of a log.
        users: of the truth.
        movies: of the truth.
    """

    def __init__(
        self,
        out: Path,
        env: gym.Env[Any, Any] | None = None,
        rounds: int = 10_000,
        users: int = 100,
        movies: int = 60,
    ) -> None:
        self._env = gym.make("OffPrompts-MovieLens-v0") if env is None else env
        self.simulator: Simulator = self._env.unwrapped.simulator  # type: ignore[attr-defined]
        self.out, self._rounds, self._size = out, rounds, (users, movies)

    @cached_property
    def truth(self) -> Truth:
        """Expected rewards of all prompts in the evaluation rounds."""
        path = self.out / "truth.safetensors"
        if not path.exists():
            users, movies = self._size
            drawn_truth(self.simulator, users=users, movies=movies, samples=1, seed=99).save(path)
        return Truth.load(path)

    def logging(self, data_seed: int) -> Policy:
        """Return the logging policy: the demo's."""
        setting = movielens(None)
        return kept(
            self.out / "logging" / f"{data_seed}",
            self.simulator.prompts,
            lambda: agents.logging_policy(
                self.simulator, n=setting.warm_up, beta=setting.beta, regression=setting.regression, seed=data_seed
            ),
        )

    def log(self, data_seed: int) -> LoggedDataset:
        """Return the log."""
        path, policy = self.out / "logs" / f"{data_seed}", self.logging(data_seed)
        with warnings.catch_warnings():
            # A second run finds its log complete, as it should.
            warnings.filterwarnings("ignore", message=".*nothing was recorded")
            op.collect(self._env, policy, n=self._rounds, path=path, seed=data_seed, mode="append")
        return LoggedDataset.load(path)


def measure_text(
    text: Text, learners: Mapping[str, TextLearner], data_seeds: int, seeds: int, report: Callable[[TextRow], None]
) -> list[TextRow]:
    """Return the rows that are asked for, computing those that the folder does not hold.

    Args:
        text: simulator, logs and truth.
        learners: by name.
        data_seeds: number of logs.
        seeds: number of learning seeds a log.
        report: called with each new row.
    """
    path = text.out / "rows.csv"
    known = {(row.learner, row.data_seed, row.seed): row for row in read_rows(path, TextRow)}
    for data_seed in range(data_seeds):
        for name, entry in learners.items():
            missing = [seed for seed in range(seeds) if (name, data_seed, seed) not in known]
            if not missing:
                continue
            log, logging = text.log(data_seed), text.logging(data_seed)
            generators = None
            if entry.generator is not None:
                # Learning seeds share the generator, so that a table holds a sentence for all of them.
                shared = entry.generator(text.simulator)
                generators = [CountedOutputs(shared) for _ in missing]
            began = time.process_time()
            policies = entry.learner.fit_many(
                [log] * len(missing), generators=generators, logging_policies=[logging] * len(missing), seeds=missing
            )
            seconds = (time.process_time() - began) / len(missing)
            _, single = text.truth.best_single()
            for index, (seed, policy) in enumerate(zip(missing, policies, strict=True)):
                value = text.truth.value(policy)
                gain = value.minus(single)
                asked = 0 if generators is None else generators[index].asked
                row = TextRow(
                    name, data_seed, seed, value.value, value.standard_error, gain.value, gain.standard_error, asked,
                    seconds,
                )  # fmt: skip
                known[name, data_seed, seed] = row
                append_row(path, row)
                report(row)
    wanted = [(name, data_seed, seed) for name in learners for data_seed in range(data_seeds) for seed in range(seeds)]
    return [known[key] for key in wanted]


def clustered(rows: Sequence[TextRow], of: Callable[[TextRow], float]) -> tuple[float, float]:
    """Return the mean over data seeds of means over learning seeds, and its standard error over data seeds."""
    by_data: dict[int, list[float]] = {}
    for row in rows:
        by_data.setdefault(row.data_seed, []).append(of(row))
    return mean_and_error([float(np.mean(own)) for own in by_data.values()])


def text_table(rows: Sequence[TextRow], truth: Truth) -> str:
    """Return the improvements over no prompt, beside DSO's and the best single prompt's.

    The ± of a value is over data seeds. The one of the difference to the best single prompt adds that over the movies
    of the truth, which all rows share.
    """
    prompt, single = truth.best_single()
    oracle = truth.oracle()
    by_learner: dict[str, list[TextRow]] = {}
    for row in rows:
        by_learner.setdefault(row.learner, []).append(row)
    dso = clustered(by_learner["dso"], lambda row: row.value)[0] if "dso" in by_learner else math.nan
    lines = [f"{'learner':<16} {'runs':>4}  {'improvement':>14}  {'x DSO':>5}   {'over best single':>16}   sentences"]
    for learner, own in by_learner.items():
        mean, error = clustered(own, lambda row: row.value)
        gain, gain_error = clustered(own, lambda row: row.over_single)
        gain_error = math.hypot(gain_error, float(np.mean([row.over_single_error for row in own])))
        asked = np.mean([row.sentences for row in own])
        lines.append(
            f"{learner:<16} {len(own):>4}  {mean:6.3f} ± {error:.3f}  {mean / dso:5.2f}   "
            f"{gain:+7.3f} ± {gain_error:.3f}   {asked:>9,.0f}"
        )
    lines += [
        f"best single prompt, {prompt}: {single.value:.3f} ± {single.standard_error:.3f} over movies",
        f"oracle: {oracle.value:.3f} ± {oracle.standard_error:.3f} over movies",
    ]
    return "\n".join(lines)


def progress(row: VectorRow | TextRow) -> None:
    """Show a new row to who sits at a terminal; the tables come at the end."""
    if sys.stderr.isatty():
        print(row, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("goals"), help="where everything is kept (default: goals)")
    commands = parser.add_subparsers(dest="command", required=True)
    vectors = commands.add_parser("synthetic", help="vectors: the points of the published sweeps")
    vectors.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    vectors.add_argument("--learners", nargs="+", default=["sentence-greedy"], choices=list(VECTOR_LEARNERS))
    vectors.add_argument("--worlds", type=int, default=20, help="number of worlds (seeds 0, 1, 2, ...)")
    words = commands.add_parser("movielens", help="text: the embedded MovieLens with all its prompts")
    named = text_learners()
    words.add_argument(
        "--learners",
        nargs="+",
        default=["sentence-greedy", "sentence-pg", "regression", "is", "dso"],
        choices=list(named),
    )
    words.add_argument("--data-seeds", type=int, default=5, help="number of logs (seeds 0, 1, 2, ...)")
    words.add_argument("--seeds", type=int, default=5, help="number of learning seeds a log (0, 1, 2, ...)")
    chosen = parser.parse_args(arguments)
    # At these sizes the published regressions overfit, and say so every time.
    warnings.simplefilter("ignore", agents.TrainingWarning)
    if chosen.command == "synthetic":
        rows = measure_vectors(chosen.points, chosen.learners, chosen.worlds, chosen.out / "synthetic", progress)
        print(vector_table(rows))
        print(ahead(rows))
        return
    text = Text(chosen.out / "movielens")
    learners = {name: named[name] for name in chosen.learners}
    found = measure_text(text, learners, chosen.data_seeds, chosen.seeds, progress)
    print(text_table(found, text.truth))


if __name__ == "__main__":
    main()
