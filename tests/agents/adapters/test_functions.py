"""Callables as agents, and what is said of foreign code that misbehaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import offprompts_env as op
from agents.adapters import FunctionAgent
from agents.adapters.base import Adapter
from offprompts_env.errors import ActionError, AgentError, ConfigError, DataError, OffPromptsError
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator


class Counts:
    """Plays the prompt with the best mean so far."""

    def __init__(self, n_prompts: int) -> None:
        self.total, self.count = np.zeros(n_prompts), np.ones(n_prompts)

    def choose(self, contexts: Contexts) -> np.ndarray:
        assert contexts.context.shape[1] == 5, "expected five numbers"
        return np.full(len(contexts), np.argmax(self.total / self.count))

    def learn(self, log: LoggedDataset) -> None:
        np.add.at(self.total, log.action, log.reward)
        np.add.at(self.count, log.action, 1)


class TestChoosing(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        counts = Counts(len(prompts))
        return FunctionAgent.choosing(prompts, counts.choose, epsilon=0.2, learn=counts.learn)

    def test_save_and_load(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="BehaviorCloning"):
            self.taught().save(tmp_path)

    test_a_pickle_is_not_opened_unasked = None  # type: ignore[assignment]
    test_a_damaged_file_is_named = None  # type: ignore[assignment]


class TestDrawing(TestChoosing):
    learns = False

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        def softmax(contexts: Contexts) -> np.ndarray:
            assert contexts.context.shape[1] == 5, "expected five numbers"
            scores = np.exp(contexts.context[:, :1] * np.arange(len(prompts)) / 3)
            return scores / scores.sum(axis=1, keepdims=True)

        return FunctionAgent.drawing(prompts, softmax)


def raises(contexts: Contexts) -> np.ndarray:
    raise KeyError("weights")


WRONG = [
    (lambda c: np.full(len(c), 1.5), ActionError, "expected integers"),
    (lambda c: np.full(len(c), N_PROMPTS), ActionError, r"\[0, 6\), got 6"),
    (lambda c: np.zeros((len(c), 1), dtype=int), ActionError, "one a round"),
    (raises, AgentError, "KeyError: 'weights'"),
]


@pytest.mark.parametrize(("function", "error", "says"), WRONG)
def test_a_function_that_chooses_wrongly_is_told(
    function: object, error: type[OffPromptsError], says: str, tmp_path: Path
) -> None:
    world = simulator()
    calls = []

    def later(contexts: Contexts) -> np.ndarray:
        calls.append(len(contexts))
        return np.zeros(len(contexts), dtype=int) if len(calls) < 3 else function(contexts)  # type: ignore[operator]

    agent = FunctionAgent.choosing(world.prompts, later)
    with pytest.raises(error, match=says):
        op.collect(world, agent, 400, tmp_path / "log", batch_size=100, progress=False)
    assert len(op.LoggedDataset.load(tmp_path / "log")) == 200


@pytest.mark.parametrize(
    ("pmf", "says"),
    [
        (np.full(N_PROMPTS, 0.3), "sum to 1, got sum 1.8"),
        (np.array([1.5, -0.5, 0, 0, 0, 0]), "minimum -0.5"),
        (np.ones(2) / 2, r"expected shape \(5, 6\), got \(5, 2\)"),
        (np.array(["a"] * N_PROMPTS), "expected numbers"),
    ],
)
def test_a_wrong_pmf_is_told(pmf: np.ndarray, says: str) -> None:
    world = simulator()
    agent = FunctionAgent.drawing(world.prompts, lambda contexts: np.tile(pmf, (len(contexts), 1)))
    with pytest.raises(DataError, match=says):
        agent.probabilities(world.contexts.sample(5, np.random.default_rng(0)))


def test_an_agent_that_raises_while_it_learns_loses_no_row(tmp_path: Path) -> None:
    world = simulator()

    class Forgetful:
        def act(self, contexts: Contexts, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros(len(contexts), dtype=int), np.ones(len(contexts))

        def learn(self, log: LoggedDataset) -> None:
            raise ZeroDivisionError("no rounds")

    with pytest.raises(
        AgentError, match=r"Forgetful.learn raised after row 99; .*ZeroDivisionError: no rounds"
    ) as told:
        op.collect(world, Forgetful(), 400, tmp_path / "log", batch_size=100, progress=False)
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert len(op.LoggedDataset.load(tmp_path / "log")) == 100


def test_no_function_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected a function, got int"):
        FunctionAgent.drawing(simulator().prompts, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epsilon"):
        FunctionAgent.choosing(simulator().prompts, raises, epsilon=2)
