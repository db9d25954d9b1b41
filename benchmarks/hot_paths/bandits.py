"""How fast agents of contextualbandits, mabwiser and scikit-learn play and learn through their adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import agents
import offprompts_env as op
from agents.adapters.base import Adapter, features
from agents.adapters.contextual_bandits import ContextualBandits
from agents.adapters.mabwiser import MABWiser
from agents.adapters.scikit_learn import ScikitLearnClassifier, ScikitLearnRegressor
from benchmarks.hot_paths.timing import Figure, fastest
from offprompts_env.types import Agent, LoggedDataset, Policy, PromptSet

Work = Callable[[LoggedDataset], object]
# The name of an agent, its adapter, and what its users would write themselves for a batch.
Entry = tuple[str, Callable[[PromptSet], Adapter], Callable[[PromptSet], Work]]


def bandits(n_prompts: int = 20, rounds: int = 4096, batch: int = 512, repeat: int = 3) -> list[Figure]:
    """Return the speed of agents of each library, in the closed-form world with `n_prompts` prompts.

    Args:
        n_prompts: A.
        rounds: of a recording; an eighth where the adapter asks the agent context by context.
        batch: rounds between two calls of ``learn``; an eighth there as well.
        repeat: recordings; the fastest counts.
    """
    world = op.SyntheticConfig.preset("paper_code", n_prompts=n_prompts).build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            _speed(entry, world, rounds // share, batch // share, repeat)
            for entry in _agents()
            for share in (8 if "draws" in entry[0] else 1,)
        ]


def _speed(entry: Entry, world: op.Simulator, rounds: int, batch: int, repeat: int) -> Figure:
    name, wrapped, bare = entry
    log = collected(world, agents.UniformPolicy(world.n_prompts), rounds, batch)
    parts = [log.take(slice(start, start + batch)) for start in range(0, rounds, batch)]

    def through() -> Callable[[], object]:
        adapter = wrapped(world.prompts)
        return lambda: collected(world, adapter, rounds, batch)

    def alone() -> Callable[[], object]:
        work = bare(world.prompts)
        return lambda: [work(part) for part in parts]

    return beside_library(name, rounds, fastest(through, repeat), fastest(alone, repeat))


def collected(world: op.Simulator, agent: Policy | Agent, rounds: int, batch: int) -> LoggedDataset:
    """Record `agent`, which learns after each batch."""
    return op.collect(world, agent, rounds, batch_size=batch, progress=False)


def beside_library(name: str, rounds: int, through: float, alone: float) -> Figure:
    """Return the figure of an agent that took `through` seconds, beside those of its library alone."""
    return Figure(
        f"{name}, {rounds:,} rounds", rounds / through, "rounds/s", "higher", rounds / alone / 2, rounds / alone,
        "the library's own choosing and learning, without us or a world",
    )  # fmt: skip


def _agents() -> list[Entry]:
    from contextualbandits.online import LinTS, LinUCB
    from mabwiser.mab import MAB, LearningPolicy
    from sklearn.linear_model import SGDClassifier, SGDRegressor

    def predicting(make: Callable[[int], Any]) -> Callable[[PromptSet], Work]:
        def bare(prompts: PromptSet) -> Work:
            agent = make(len(prompts))

            def work(log: LoggedDataset) -> None:
                x = features(log.contexts)
                if getattr(agent, "is_fitted", True):
                    agent.predict(x)
                agent.partial_fit(x, log.action, log.reward.astype(np.float64))

            return work

        return bare

    def arms(policy: Any) -> Callable[[int], Any]:
        return lambda n_prompts: MAB(list(range(n_prompts)), policy, seed=1)

    def pulling(policy: Any) -> Callable[[PromptSet], Work]:
        def bare(prompts: PromptSet) -> Work:
            agent = arms(policy)(len(prompts))

            def work(log: LoggedDataset) -> None:
                x = features(log.contexts)
                if agent._is_initial_fit:
                    agent.predict(x)
                agent.partial_fit(log.action, log.reward.astype(np.float64), x)

            return work

        return bare

    def classifying(prompts: PromptSet) -> Work:
        agent, every = classifier(), np.arange(len(prompts))

        def work(log: LoggedDataset) -> None:
            x, counts = features(log.contexts), log.reward > 0
            if hasattr(agent, "classes_"):
                agent.predict_proba(x)
            agent.partial_fit(x[counts], log.action[counts], every, log.reward[counts].astype(np.float64))

        return work

    def regressing(prompts: PromptSet) -> Work:
        agent = SGDRegressor(random_state=0)

        def work(log: LoggedDataset) -> None:
            x, n_prompts = features(log.contexts), len(prompts)
            if hasattr(agent, "coef_"):
                tiled = np.tile(prompts.embeddings, (len(x), 1))
                agent.predict(np.concatenate([np.repeat(x, n_prompts, axis=0), tiled], axis=1))
            agent.partial_fit(np.concatenate([x, prompts.embeddings[log.action]], axis=1), log.reward)

        return work

    def classifier() -> Any:
        return SGDClassifier(loss="log_loss", random_state=0)

    lin_ucb, lin_ts = LearningPolicy.LinUCB(alpha=1.0), LearningPolicy.LinTS(alpha=1.0)
    return [
        (
            "contextualbandits LinUCB",
            lambda prompts: ContextualBandits(LinUCB(len(prompts), random_state=1), prompts),
            predicting(lambda n_prompts: LinUCB(n_prompts, random_state=1)),
        ),
        (
            "contextualbandits LinTS, draws=100",
            lambda prompts: ContextualBandits(LinTS(len(prompts), random_state=1), prompts, draws=100),
            predicting(lambda n_prompts: LinTS(n_prompts, random_state=1)),
        ),
        ("mabwiser LinUCB", lambda prompts: MABWiser(arms(lin_ucb)(len(prompts)), prompts), pulling(lin_ucb)),
        (
            "mabwiser LinTS, draws=100",
            lambda prompts: MABWiser(arms(lin_ts)(len(prompts)), prompts, draws=100),
            pulling(lin_ts),
        ),
        ("scikit-learn SGDClassifier", lambda prompts: ScikitLearnClassifier(classifier(), prompts), classifying),
        (
            "scikit-learn SGDRegressor",
            lambda prompts: ScikitLearnRegressor(SGDRegressor(random_state=0), prompts),
            regressing,
        ),
    ]
