"""Runs on text: the embedded MovieLens with all its prompts, logs of it, and what learners share.

A world of this benchmark is a log: there is one simulator, several logging policies with a log each (seeds of worlds),
and several learning seeds on every log. A score is the improvement over sentences without a prompt, which are worth 0
by definition, in 100 users × 60 movies with one sentence of every (movie, prompt) to choose with and one to score with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
from safetensors.numpy import load_file, save_file

import agents
import offprompts_env as op
from agents.embeddings import Readers
from benchmarks.demo import movielens as demo
from benchmarks.methods import BEYOND, PAPER, QUICK, Effort, Greedy, Logging, Method, Shuffled, Skyline
from benchmarks.pages.stories import stories
from benchmarks.plan import Point, Sweep
from benchmarks.rows import Result
from benchmarks.settings.worlds import BenchWorlds
from benchmarks.store import LOGS, Codec, Kept, Store, digest, policies
from offprompts_env.collecting import collect
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.text.cache import SampleTable
from offprompts_env.types import Array, Contexts, Estimate, IntArray, LoggedDataset, Outputs, Policy, PromptSet

T = TypeVar("T")

_DEMO = demo(None)

# 76,800 rounds, for which 12,836 sentences are written: the policy soon asks for few. They reached 1.30 (seed 0), half
# of them at a learning rate of 8e-3 1.03. On the true values of 60 movies, where rounds are free, the 640,000 of the
# published schedule reached 1.43.
ONLINE = agents.OnlinePG(steps=600, batch_size=128, learning_rate=5e-3, refresh=5)
"""The skyline."""

_REGRESSION = agents.PromptRewardRegression(steps=20_000)
_DSO = cast("agents.DSO", _DEMO.learners["DSO"])

TEXT: Mapping[str, Method] = {
    "logging": Logging(),
    "regression": agents.RegressionPG(rewards=_REGRESSION),
    "is": agents.ImportanceSamplingPG(),
    "dr": agents.DoublyRobustPG(rewards=_REGRESSION),
    "potec": agents.POTEC(rewards=_REGRESSION),
    "dso": replace(_DSO, max_sentences=20_000),
    "greedy": Greedy(rewards=_REGRESSION),
    "online": Skyline(ONLINE),
    "exact-dso": agents.ExactDSO(tau=0.13, output_noise=0.0),
    "sentence-greedy": agents.SentenceGreedy(),
    "sentence-pg": agents.SentencePG(),
}
"""The learners. The published regression (100,000 steps) overfits logs of this size, and DSO has a budget of sentences,
since one costs 1.5 ms of a core: 20,000 for its steps and 10,000 for its density."""

# The bandwidth of the published experiment on text is not known; this one is that of the other sweeps.
_PUBLISHED_DSO = agents.DSO(kernel=_DSO.kernel, refresh=100)

PUBLISHED: Mapping[str, Method] = {
    **PAPER,
    **BEYOND,
    "dso": TEXT["dso"],
    "online": TEXT["online"],
    "exact-dso": TEXT["exact-dso"],
}
"""The published schedules, but for DSO and the skyline, whose sentences have a price."""

TRUTH: Codec[op.Truth] = Codec(
    lambda truth, folder: truth.save(folder / "truth.safetensors"),
    lambda folder: op.Truth.load(folder / "truth.safetensors"),
)
"""True values."""


@dataclass(frozen=True, eq=False)
class AskedDensity:
    """A logging density, and what it took.

    Attributes:
        values: at the logged sentences, (n,).
        sentences: that the generator was asked for.
    """

    values: Array
    sentences: int


def _write_density(density: AskedDensity, folder: Path) -> None:
    held = {"values": np.ascontiguousarray(density.values), "sentences": np.array([density.sentences])}
    save_file(held, folder / "density.safetensors")


def _read_density(folder: Path) -> AskedDensity:
    held = load_file(folder / "density.safetensors")
    return AskedDensity(held["values"], int(held["sentences"][0]))


DENSITY = Codec(_write_density, _read_density)
"""Densities."""


@dataclass(frozen=True)
class TextSetting:
    """MovieLens, and how much of it is logged and judged.

    Attributes:
        rounds: that are logged.
        prompts: number of prompts; None is all of them.
        warm_up: uniform rounds behind the logging policy.
        users: in which policies are valued.
        movies: in which policies are valued, each with every user.
        curve_rounds: of these users and movies, in which policies are valued while they are trained.
        effort: share of the schedules.
        bundle: folder of the assets, which names them: changed ones go into another; None are the embedded ones.
    """

    rounds: int = 10_000
    prompts: int | None = None
    warm_up: int = 2_000
    users: int = 100
    movies: int = 60
    curve_rounds: int = 1_500
    effort: Effort = field(default_factory=Effort)
    bundle: str | None = None

    @property
    def recorded(self) -> TextSetting:
        """The setting without what changes no log and nothing that is learned from one."""
        return replace(self, users=0, movies=0, curve_rounds=0)

    @property
    def catalogue(self) -> tuple[int | None, str | None]:
        """What names the simulator."""
        return self.prompts, self.bundle

    def score(self, result: Result) -> float:
        """Return the improvement over no prompt."""
        return result.value - result.references["no prompt"]

    def quick(self) -> TextSetting:
        """Return 100 prompts, 4,000 rounds, a small truth and a tenth of the steps and of the sentences asked."""
        few = 100 if self.prompts is None else min(self.prompts, 100)
        return replace(
            self, rounds=4_000, prompts=few, warm_up=1_000, users=40, movies=30, curve_rounds=400, effort=QUICK
        )

    @property
    def recorder(self) -> tuple[object, ...]:
        """What names the logging policies, besides their seeds."""
        return self.catalogue, self.warm_up, _DEMO.beta, self._regression

    def recorders(self, simulator: Simulator, logs: Sequence[int]) -> Sequence[Policy]:
        """Return the logging policy of each log: the demo's, a softmax over a regression on uniform rounds."""
        same, n, beta = [simulator] * len(logs), self.warm_up, _DEMO.beta
        return agents.logging_policies(same, n=n, beta=beta, regression=self._regression, seeds=logs)

    @property
    def _regression(self) -> agents.PromptRewardRegression:
        return self.effort.of(_DEMO.regression)

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        """Run `method` for `units`, (seed of the log, seed of learning) each, as one problem."""
        return _Logs(self, units, store).perform(self.effort.of(method))


@dataclass(frozen=True)
class PublishedSetting(TextSetting):
    """MovieLens as the paper logs it: by a softmax over what a policy found that was learned online.

    Attributes:
        beta: inverse temperature of the softmax.
    """

    beta: float = 0.2

    @property
    def recorder(self) -> tuple[object, ...]:
        """See :class:`TextSetting`."""
        return self.catalogue, self.beta, self.effort.of(ONLINE)

    def recorders(self, simulator: Simulator, logs: Sequence[int]) -> Sequence[Policy]:
        """See :class:`TextSetting`."""
        same, online = [remembering(simulator)] * len(logs), self.effort.of(ONLINE)
        return agents.online_logging_policies(same, beta=self.beta, online=online, seeds=logs)


def remembering(simulator: Simulator) -> Simulator:
    """Return `simulator` with one sentence a request, written when it is first asked for."""
    return Simulator(simulator.contexts, _table(simulator), simulator.rewards, reward_std=simulator.noise.std)


def _table(simulator: Simulator) -> SampleTable:
    # A sentence depends on its batch in the last digits, so what is made never finds those that others asked for.
    return SampleTable(cast("Any", simulator.outputs), slots=1)


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


# Kept as long as a process lives: loading takes seconds.
@lru_cache(maxsize=2)
def _opened(prompts: int | None, bundle: str | None) -> gym.Env[Any, Any]:
    # Models of one's own may need an accelerator; the embedded ones are small, and their rows are of the CPU.
    given = {"n_prompts": prompts, "bundle": bundle, "device": None if bundle is None else "auto"}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return gym.make(_DEMO.env_id, **settings)


class _Logs(BenchWorlds):
    """Logs of a setting, each learned from with several seeds, with what is shared in the store."""

    def __init__(self, setting: TextSetting, units: Sequence[tuple[int, int]], store: Store) -> None:
        self.setting = setting
        self._env = _opened(*setting.catalogue)
        self._simulator: Simulator = self._env.unwrapped.simulator  # type: ignore[attr-defined]
        self._counters = self._counted(len(units))
        seeds = [seed for _, seed in units]
        super().__init__(units, store, [self._simulator] * len(units), self._counters, seeds, setting.rounds)
        self._sources = [log for log, _ in units]
        self._spent = np.zeros(len(units), dtype=np.int64)

    def keys(self, stage: str, *parts: object) -> list[str]:
        """See :class:`BenchWorlds`."""
        return [digest(stage, self.setting.recorded, *parts, log, seed) for log, seed in self.units]

    def _counted(self, n: int) -> list[CountedOutputs]:
        """Return `n` generators that know the sentences of one another."""
        table = _table(self._simulator)
        return [CountedOutputs(table) for _ in range(n)]

    def _once(
        self,
        stage: str,
        parts: Sequence[object],
        names: Sequence[int],
        make: Callable[[list[int]], Sequence[T]],
        codec: Codec[T],
    ) -> list[Kept[T]]:
        """Return one artefact a unit, where units of one of `names` have the same; `make` is given names."""
        distinct = list(dict.fromkeys(names))
        keys = [digest(stage, *parts, name) for name in distinct]
        kept = self.store.many(stage, keys, lambda missing: make([distinct[index] for index in missing]), codec)
        held = dict(zip(distinct, kept, strict=True))
        return [held[name] for name in names]

    @cached_property
    def logging(self) -> list[Policy]:
        """See :class:`BenchWorlds`; one a log."""

        def make(logs: list[int]) -> Sequence[Policy]:
            return self.setting.recorders(self._simulator, logs)

        codec: Codec[Policy] = policies(self._simulator.prompts)
        return self.share(self._once("logging", self.setting.recorder, self._sources, make, codec))

    @cached_property
    def logs(self) -> list[LoggedDataset]:
        """See :class:`BenchWorlds`."""
        recorders = dict(zip(self._sources, self.logging, strict=True))

        def make(logs: list[int]) -> list[LoggedDataset]:
            n = self.setting.rounds
            return [collect(self._env, recorders[log], n, seed=log, progress=False) for log in logs]

        return self.share(self._once("logs", (self.setting.recorded,), self._sources, make, LOGS))

    def skylines(self, learner: agents.OnlinePG) -> list[Kept[Policy]]:
        """See :class:`BenchWorlds`; they know no log, so logs share those of a seed."""
        real = self._simulator

        def make(seeds: list[int]) -> Sequence[Policy]:
            return learner.fit_many([remembering(real)] * len(seeds), seeds=seeds)

        codec: Codec[Policy] = policies(real.prompts)
        return self._once("skyline", (self.setting.catalogue, learner), self.seeds, make, codec)

    def density(self, density: agents.LoggingDensity, kernel: agents.Kernel) -> agents.KnownDensity:
        """See :class:`BenchWorlds`; one a log, since it is no part of what is learned."""
        first = {log: index for index, log in reversed(list(enumerate(self._sources)))}
        logs, logging = self.logs, self.logging

        def make(names: list[int]) -> list[AskedDensity]:
            counters = self._counted(len(names))
            values = density.fit_many(
                [logs[first[log]] for log in names],
                kernel=kernel,
                generators=counters,
                logging_policies=[logging[first[log]] for log in names],
                seeds=names,
            )
            return [AskedDensity(own, counter.asked) for own, counter in zip(values, counters, strict=True)]

        parts = (self.setting.recorded, density, kernel)
        found: list[AskedDensity] = self.share(self._once("density", parts, self._sources, make, DENSITY))
        self._spent += [one.sentences for one in found]
        return agents.KnownDensity(tuple(one.values for one in found))

    @cached_property
    def _truth(self) -> op.Truth:
        size = {"users": self.setting.users, "movies": self.setting.movies}
        key = digest("truth", self.setting.catalogue, size)

        def make() -> op.Truth:
            return op.Truth.drawn(self._simulator, **size, samples=1, seed=99)

        return self.store.one("truth", key, make, TRUTH).value

    @cached_property
    def _part(self) -> op.Truth:
        n = len(self._truth.contexts)
        drawn = stream(0, "benchmarks", "rounds of a curve").permutation(n)[: self.setting.curve_rounds]
        return self._truth.take(np.sort(drawn))

    @cached_property
    def _owned(self) -> dict[str, Estimate]:
        return self._truth.references()

    @cached_property
    def _recorders(self) -> dict[int, Estimate]:
        """What the logging policies are worth."""
        policies_of = dict(zip(self._sources, self.logging, strict=True))
        return {log: self._truth.value(policy) for log, policy in policies_of.items()}

    @cached_property
    def references(self) -> list[Mapping[str, float]]:
        """See :class:`BenchWorlds`."""
        kept = dict(zip(self.seeds, self.skylines(self.setting.effort.of(ONLINE)), strict=True))
        online = {seed: self._truth.value(one.value).value for seed, one in kept.items()}
        owned = {name: own.value for name, own in self._owned.items()}
        return [{**owned, "logging": self._recorders[log].value, "online": online[seed]} for log, seed in self.units]

    def value(self, index: int, policy: Policy) -> Estimate:
        """See :class:`BenchWorlds`."""
        return self._truth.value(policy)

    def glance(self, index: int, policy: Policy) -> float:
        """See :class:`BenchWorlds`."""
        return self._part.value(policy).value

    def evaluation(self, index: int) -> Contexts:
        """See :class:`BenchWorlds`."""
        return self._truth.contexts

    def of_actions(self, index: int, actions: IntArray) -> Estimate:
        """See :class:`BenchWorlds`."""
        return self._truth.of_actions(actions)

    def perform(self, method: Method) -> list[Result]:
        """See :class:`BenchWorlds`; what a skyline plays counts as asked for."""
        if isinstance(method, Skyline):
            self._spent += method.learner.steps * method.learner.batch_size
        return super().perform(method)

    def told(self, index: int, policy: Policy | None, value: Estimate) -> dict[str, Any]:
        """Return paired differences, the sentences asked for, and of the first log and seed what users are shown."""
        log = self.units[index][0]
        measures: dict[str, float] = {}
        for name, other in (("best single", self._owned["best single"]), ("logging", self._recorders[log])):
            gain = value.minus(other)
            measures |= {f"over {name}": gain.value, f"over {name} error": gain.standard_error}
        more: dict[str, Any] = {
            "measures": measures,
            "sentences": int(self._spent[index]) + self._counters[index].asked,
        }
        if policy is not None and self.units[index] == (0, 0):
            before = self.logging[index]
            more["details"] = {"stories": [asdict(story) for story in stories(self._simulator, before, policy)]}
        return more


def _budgets() -> dict[int, Mapping[str, Method]]:
    """Return learners by the sentences that they may ask for; DSO takes a third of them for its density."""
    points: dict[int, Mapping[str, Method]] = {}
    for total in (0, 1_000, 4_000, 16_000):
        points[total] = {"sentence-greedy": agents.SentenceGreedy(agents.SentenceModels(budget=total))}
    for total in (3_000, 7_500, 15_000, 30_000, 60_000):
        density = agents.NetworkDensity(max_sentences=total // 3)
        points[total] = {"dso": replace(_DSO, density=density, max_sentences=total - total // 3)}
    return dict(sorted(points.items()))


def _embeddings() -> tuple[Point, Point]:
    """Return learners with the embeddings of prompts as they are, and shuffled for those that read them."""
    own = {name: TEXT[name] for name in ("is", "dso", *_READERS)}
    return (
        Point("embeddings=own", 0, TextSetting(), own),
        Point("embeddings=shuffled", 1, TextSetting(), _shuffled(TEXT)),
    )


# Learners that read the embeddings of prompts.
_READERS = ("regression", "dr", "potec", "greedy", "sentence-greedy")


def _shuffled(methods: Mapping[str, Method]) -> dict[str, Method]:
    return {name: Shuffled(cast("agents.Learner", methods[name])) for name in _READERS}


def _published() -> tuple[Point, ...]:
    """Return the paper's experiment, and what may decide it: DSO without a bound, embeddings that say nothing."""
    return (
        Point("prompts=all", 1062, PublishedSetting(), PUBLISHED),
        Point("prompts=all/sentences=unbounded", 1062, PublishedSetting(), {"dso": _PUBLISHED_DSO}),
        Point("prompts=all/embeddings=shuffled", 1062, PublishedSetting(), _shuffled(PUBLISHED)),
    )


def _distances() -> tuple[Point, ...]:
    """Return what compares sentences, with the embeddings of the encoder and with learned ones."""
    kernels = {name: cast("agents.Learner", TEXT[name]) for name in ("dso", "exact-dso")}

    def learned(of: Readers) -> Mapping[str, Method]:
        return {name: agents.Embedded(own, agents.RewardEmbedding(of=of)) for name, own in kernels.items()}

    return (
        Point("embedding=encoder", 0, TextSetting(), kernels),
        Point("embedding=users", 1, TextSetting(), learned("users")),
        Point("embedding=round", 2, TextSetting(), learned("round")),
    )


def sweeps() -> list[Sweep]:
    """Return the sweeps on text.

    DSO at 30,000 sentences, sentence-greedy at 0, and learners with the embeddings as they are, are the very runs of
    the first sweep.
    """
    return [
        Sweep(
            "movielens",
            "MovieLens: improvement over no prompt",
            "prompts",
            (Point("prompts=all", 1062, TextSetting(), TEXT),),
            worlds=5,
            seeds=5,
            world_name="log",
            quick_worlds=2,
            quick_seeds=1,
        ),
        Sweep(
            "movielens_published",
            "MovieLens, logged as in the paper: improvement over no prompt",
            "prompts",
            _published(),
            worlds=5,
            seeds=5,
            world_name="log",
            quick_worlds=2,
            quick_seeds=1,
        ),
        Sweep(
            "movielens_budget",
            "MovieLens: sentences that learners ask for",
            "sentences",
            tuple(Point(f"budget={total}", total, TextSetting(), methods) for total, methods in _budgets().items()),
            worlds=2,
            world_name="log",
            quick_worlds=1,
        ),
        Sweep(
            "movielens_embeddings",
            "MovieLens: what the embeddings of prompts give away",
            "embeddings of prompts",
            _embeddings(),
            worlds=5,
            world_name="log",
            quick_worlds=1,
        ),
        Sweep(
            "movielens_distances",
            "MovieLens: what distances between sentences say",
            "embeddings of sentences",
            _distances(),
            worlds=5,
            world_name="log",
            quick_worlds=1,
        ),
    ]
