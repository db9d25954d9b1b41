"""True values: by hand on two rounds, against closed forms, and on drawn sentences."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError
from tests.tiny_bundle import make_tiny_bundle

CHOOSE = np.array([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
SCORE = np.array([[1.0, 5.0], [2.0, 0.0], [4.0, 3.0]])
TRUTH = op.Truth(op.Contexts(np.zeros((3, 1)), np.zeros((3, 1))), CHOOSE, SCORE, np.array([0, 0, 1]), 0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    env = gym.make("OffPrompts-MovieLens-v0", bundle=str(make_tiny_bundle(tmp_path_factory.mktemp("truth") / "bundle")))
    return env.unwrapped.simulator


def test_what_the_environment_owns_is_chosen_on_one_half_and_scored_on_the_other():
    # Clusters are the rounds (0, 1) and (2): each counts once, whatever its number of rounds.
    assert TRUTH.uniform().value == pytest.approx(np.mean([(3.0 + 1.0) / 2, 3.5]))
    assert TRUTH.uniform().standard_error == pytest.approx(np.std([2.0, 3.5], ddof=1) / np.sqrt(2))
    best, single = TRUTH.best_single()
    assert (best, single.value) == (1, np.mean([(5.0 + 0.0) / 2, 3.0]))
    assert TRUTH.oracle().value == np.mean([(5.0 + 2.0) / 2, 3.0])
    assert {name: own.value for name, own in TRUTH.references().items()} == pytest.approx(
        {"no prompt": 0.0, "uniform": 2.75, "best single": 2.75, "oracle": 3.25}
    )


def test_values_are_expectations_under_the_policy():
    assert TRUTH.value(agents.UniformPolicy(2)).value == TRUTH.uniform().value
    assert TRUTH.value(agents.ConstantPolicy(1, 2)).value == TRUTH.best_single()[1].value
    assert TRUTH.optimality(agents.UniformPolicy(2)) == 0.0
    assert TRUTH.optimality(agents.ConstantPolicy(0, 2)) == pytest.approx((2.75 - 2.75) / 0.5)
    assert TRUTH.of_actions(np.array([0, 0, 0])).value == np.mean([1.5, 4.0])


def test_some_rounds_are_a_truth_of_their_own():
    part = TRUTH.take(np.array([2]))
    assert (len(part.contexts), part.no_prompt) == (1, 0.0)
    assert part.oracle().value == 3.0
    assert TRUTH.take(np.array([0, 1])).oracle().value == 3.5


def test_without_a_prompt_is_no_option_on_vectors():
    simulator = op.SyntheticConfig(n_prompts=6).build()
    truth = op.Truth.exact(simulator, n=50)
    policy = agents.ConstantPolicy(2, 6)
    assert truth.value(policy).value == pytest.approx(simulator.policy_value(policy, n=50).value)
    assert truth.optimality(agents.OraclePolicy(simulator)) == pytest.approx(1.0)
    assert set(truth.references()) == {"uniform", "best single", "oracle"}


def test_a_drawn_truth_that_was_read_is_the_one_that_was_made(text, tmp_path):
    made = op.Truth.drawn(text, users=3, movies=2, samples=3)
    made.save(tmp_path / "truth")
    read = op.Truth.load(tmp_path / "truth")
    assert {name: own.value for name, own in read.references().items()} == {
        name: own.value for name, own in made.references().items()
    }


def test_drawn_sentences_serve_every_user(text):
    truth = op.Truth.drawn(text, users=3, movies=2, samples=2, seed=5)
    assert truth.score.shape == (6, text.n_prompts)
    assert truth.no_prompt == 0.0
    assert truth.cluster.tolist() == [0, 1] * 3
    assert (truth.choose != truth.score).any()
    again = op.Truth.drawn(text, users=3, movies=2, samples=2, seed=5)
    np.testing.assert_array_equal(truth.score, again.score)
    # Users differ in the rows, movies come in the same order for each.
    np.testing.assert_array_equal(truth.contexts.query[:2], truth.contexts.query[4:])
    assert len(np.unique(truth.contexts.context, axis=0)) == 3


@pytest.mark.parametrize("no_prompt", [0.0, None])
def test_it_comes_back_from_its_file(tmp_path, no_prompt):
    truth = op.Truth(TRUTH.contexts, CHOOSE, SCORE, TRUTH.cluster, no_prompt)
    truth.save(tmp_path / "deep" / "truth.safetensors")
    back = op.Truth.load(tmp_path / "deep" / "truth.safetensors")
    np.testing.assert_array_equal(back.score, SCORE)
    np.testing.assert_array_equal(back.choose, CHOOSE)
    assert back.no_prompt == no_prompt
    assert back.value(agents.UniformPolicy(2)).value == TRUTH.uniform().value
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["truth.safetensors"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda s: op.Truth(TRUTH.contexts, CHOOSE[:2], SCORE, TRUTH.cluster), DataError, r"\(2, 2\)"),
        (lambda s: op.Truth(TRUTH.contexts, CHOOSE, SCORE, TRUTH.cluster[:1]), DataError, r"\(1,\)"),
        (lambda s: op.Truth.exact(s), ConfigError, "Truth.drawn"),
        (lambda s: op.Truth.drawn(op.SyntheticConfig(n_prompts=3).build()), ConfigError, "Truth.exact"),
        (lambda s: op.Truth.drawn(s, users=0), ConfigError, "users"),
    ],
)
def test_what_is_wrong_is_said(text, make, kind, message):
    with pytest.raises(kind, match=message):
        make(text)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda truth: op.Truth.exact(None), ConfigError, "simulator: expected"),
        (
            lambda truth: op.Truth.exact(op.SyntheticConfig(n_prompts=3).build(), 0),
            ConfigError,
            "n: expected an integer",
        ),
        (lambda truth: truth.value(3), ConfigError, "policy: expected"),
        (lambda truth: truth.value(agents.UniformPolicy(7)), DimensionError, "expected 3 prompts as here, got 7"),
        (lambda truth: op.Truth.load("nowhere.safetensors"), StorageError, "that Truth.save wrote"),
    ],
)
def test_wrong_input_is_named(make, kind, message):
    with pytest.raises(kind, match=message):
        make(op.Truth.exact(op.SyntheticConfig(n_prompts=3).build(), 10))
