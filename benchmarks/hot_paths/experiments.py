"""How fast agents of Vowpal Wabbit, coba and obp play and learn through their adapters, and our worlds run in coba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import agents
import offprompts_env as op
from agents.adapters.base import Adapter, features
from agents.adapters.coba import Coba, coba_environment
from agents.adapters.obp import OBP
from agents.adapters.vowpal_wabbit import VowpalWabbit
from benchmarks.hot_paths.bandits import Work, beside_library, collected
from benchmarks.hot_paths.timing import Figure, fastest
from offprompts_env.types import LoggedDataset, PromptSet


def experiments(n_prompts: int = 20, rounds: int = 2048, batch: int = 512, repeat: int = 3) -> list[Figure]:
    """Return the speed of agents in the closed-form world with `n_prompts` prompts.

    Args:
        n_prompts: A.
        rounds: of a recording.
        batch: rounds between two calls of ``learn``; alone, a library learns after each round, as it is meant to.
        repeat: recordings; the fastest counts.
    """
    world = op.SyntheticConfig.preset("paper_code", n_prompts=n_prompts).build()
    log = collected(world, agents.UniformPolicy(n_prompts), rounds, batch)
    rows = []
    for name, wrapped, bare in _agents():

        def through(wrapped: Callable[[PromptSet], Adapter] = wrapped) -> Callable[[], object]:
            adapter = wrapped(world.prompts)
            return lambda: collected(world, adapter, rounds, batch)

        def alone(bare: Callable[[PromptSet], Work] = bare) -> Callable[[], object]:
            work = bare(world.prompts)
            return lambda: work(log)

        rows.append(beside_library(name, rounds, fastest(through, repeat), fastest(alone, repeat)))
    return [*rows, _worlds(world, rounds, repeat)]


def _worlds(world: op.Simulator, rounds: int, repeat: int) -> Figure:
    """Return the rounds a second of one of our worlds as an environment of coba, a reward of each included."""

    def play() -> None:
        for number, round_ in enumerate(coba_environment(world, rounds).read()):
            round_["rewards"](round_["actions"][number % world.n_prompts])

    uniform = agents.UniformPolicy(world.n_prompts)
    bare = fastest(lambda: lambda: collected(world, uniform, rounds, rounds), repeat)
    return Figure(
        "a world of ours in coba", rounds / fastest(lambda: play, repeat), "rounds/s", "higher", 10e3, rounds / bare,
        "op.collect of a uniform policy",
    )  # fmt: skip


def _agents() -> list[tuple[str, Callable[[PromptSet], Adapter], Callable[[PromptSet], Work]]]:
    """Return of each library: its name, an adapter, and what its users would write themselves for a log."""
    import coba
    from obp.policy import LinTS, LinUCB

    def policy(kind: Any, n_prompts: int) -> Any:
        return kind(dim=10, n_actions=n_prompts, random_state=0)

    return [
        ("Vowpal Wabbit --cb_explore", VowpalWabbit, _arms),
        ("Vowpal Wabbit --cb_explore_adf", lambda prompts: VowpalWabbit(prompts, adf=True), _prompts_as_features),
        (
            "coba LinUCBLearner",
            lambda prompts: Coba(coba.LinUCBLearner(), prompts, embeddings=True),
            lambda prompts: _learner(coba.LinUCBLearner(), prompts.embeddings),
        ),
        (
            "coba BanditEpsilonLearner",
            lambda prompts: Coba(coba.BanditEpsilonLearner(), prompts),
            lambda prompts: _learner(coba.BanditEpsilonLearner(), np.eye(len(prompts))),
        ),
        (
            "obp LinUCB",
            lambda prompts: OBP(policy(LinUCB, len(prompts)), prompts),
            lambda prompts: _bandit(policy(LinUCB, len(prompts))),
        ),
        (
            "obp LinTS, draws=100",
            lambda prompts: OBP(policy(LinTS, len(prompts)), prompts, draws=100),
            lambda prompts: _bandit(policy(LinTS, len(prompts))),
        ),
    ]


def _text(row: list[float]) -> str:
    return " ".join([f"f{index}:{value!r}" for index, value in enumerate(row)])


def _arms(prompts: PromptSet) -> Work:
    from vowpalwabbit.pyvw import Workspace

    workspace = Workspace(f"--cb_explore {len(prompts)} --epsilon 0.05 --quiet")

    def work(log: LoggedDataset) -> None:
        for x, action, reward, propensity in _rounds(log):
            line = f"|x {_text(x)}"
            workspace.predict(line)
            workspace.learn(f"{action + 1}:{-reward!r}:{propensity!r} {line}")

    return work


def _prompts_as_features(prompts: PromptSet) -> Work:
    from vowpalwabbit.pyvw import Workspace

    workspace = Workspace("--cb_explore_adf --epsilon 0.05 -q xa --quiet")
    lines = [f"|a {_text(row)}" for row in prompts.embeddings.tolist()]

    def work(log: LoggedDataset) -> None:
        for x, action, reward, propensity in _rounds(log):
            shared = f"shared |x {_text(x)}"
            workspace.predict([shared, *lines])
            chosen = f"0:{-reward!r}:{propensity!r} {lines[action]}"
            workspace.learn([shared, *lines[:action], chosen, *lines[action + 1 :]])

    return work


def _learner(learner: Any, rows: np.ndarray[Any, Any]) -> Work:
    actions = [tuple(row) for row in rows.tolist()]

    def work(log: LoggedDataset) -> None:
        for x, action, reward, propensity in _rounds(log):
            learner.predict(x, actions)
            learner.learn(x, actions[action], reward, propensity)

    return work


def _bandit(policy: Any) -> Work:
    def work(log: LoggedDataset) -> None:
        for x, action, reward, _ in _rounds(log):
            context = np.array([x])
            policy.select_action(context)
            policy.update_params(action, reward, context)

    return work


def _rounds(log: LoggedDataset) -> list[tuple[list[float], int, float, float]]:
    columns = features(log.contexts), log.action, log.reward, log.propensity
    return list(zip(*(column.tolist() for column in columns), strict=True))
