from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import agents
import offprompts_env as op
from offprompts_env.errors import ActionError, DataError, DimensionError, PropensityError
from offprompts_env.interchange.obp import from_obp, to_obp
from offprompts_env.types import LoggedDataset, LogMetadata, Oracle, PromptSet
from tests.agents.tiny_bandit import Table
from tests.test_storage import assert_same, make_log

N, A = 400, 6
RNG = np.random.default_rng(3)
LOGGING, TARGET = RNG.dirichlet(np.ones(A), N), RNG.dirichlet(np.full(A, 0.5), N)
MODEL = RNG.normal(size=(N, A))


def tabular_log() -> LoggedDataset:
    """Rounds whose context is their row in the tables above."""
    action = (LOGGING.cumsum(1) < RNG.random((N, 1))).sum(1).clip(max=A - 1)
    return LoggedDataset(
        context=np.arange(N)[:, None],
        query=RNG.normal(size=(N, 2)),
        action=action,
        propensity=LOGGING[np.arange(N), action],
        reward=MODEL[np.arange(N), action] + RNG.normal(size=N),
        output=np.empty((N, 0)),
        prompts=PromptSet(np.eye(A)),
    )


def known(log: LoggedDataset) -> LoggedDataset:
    return replace(log, propensity=np.where(np.isnan(log.propensity), 0.5, log.propensity))


def held(log: LoggedDataset) -> LoggedDataset:
    """What the format can hold of a log."""
    names = ("sentence", "user_id", "item_id", "query_text", "oracle")
    log = replace(log, prompts=PromptSet(log.prompts.embeddings), metadata=LogMetadata(), **dict.fromkeys(names))
    return replace(log, output=np.empty((len(log), 0)))


def test_obps_own_evaluation_agrees_with_ours() -> None:
    ope = pytest.importorskip("obp.ope")
    log = tabular_log()
    with pytest.warns(UserWarning, match="bandit_feedback of obp cannot hold provenance") as caught:
        feedback = to_obp(replace(log, metadata=LogMetadata(seed=1)), Table(LOGGING))
    assert len(caught) == 1
    judges = [
        ope.InverseProbabilityWeighting(), ope.SelfNormalizedInverseProbabilityWeighting(),
        ope.DirectMethod(), ope.DoublyRobust(),
    ]  # fmt: skip
    theirs = ope.OffPolicyEvaluation(feedback, judges).estimate_policy_values(
        TARGET[:, :, None], estimated_rewards_by_reg_model=MODEL[:, :, None]
    )
    q = agents.FittedRewards((Table(MODEL),))
    ours = {
        "ipw": agents.IS(),
        "snipw": agents.SNIPS(),
        "dm": agents.DM(q, n_draws=None),
        "dr": agents.DR(q, n_draws=None),
    }
    assert theirs.keys() == ours.keys()
    for name, judge in ours.items():
        assert judge.estimate(Table(TARGET), log).value == pytest.approx(theirs[name], rel=1e-9), name
    # With the logging policy's own probabilities obp finds the mean reward.
    found = ope.OffPolicyEvaluation(feedback, judges[:1]).estimate_policy_values(feedback["pi_b"])
    assert found["ipw"] == pytest.approx(log.reward.astype(float).mean(), rel=1e-9)


def test_what_obp_gets() -> None:
    log = known(make_log(20))
    with pytest.warns(UserWarning, match="output embeddings, sentences, user ids, .*expected rewards, prompt texts"):
        feedback = to_obp(log)
    assert set(feedback) == {
        "n_rounds", "n_actions", "context", "action_context", "action", "position", "reward", "pscore",
    }  # fmt: skip
    assert (feedback["n_rounds"], feedback["n_actions"], feedback["position"]) == (20, 7, None)
    np.testing.assert_array_equal(feedback["context"], np.hstack([log.context, log.query]))
    np.testing.assert_array_equal(feedback["pscore"], log.propensity)
    feedback["action"][:] = 0
    assert log.action.any()


@pytest.mark.filterwarnings("ignore:bandit_feedback of obp cannot hold")
@pytest.mark.parametrize("dims", [(3, 2, 4), (3, 0, 0)])
def test_round_trip(dims: tuple[int, int, int]) -> None:
    log = known(make_log(30, dims=dims))
    assert_same(from_obp(to_obp(log), context_dim=3), held(log))
    back = from_obp(to_obp(log), log.prompts, context_dim=3, metadata=log.metadata)
    assert back.prompts is log.prompts
    assert back.metadata == log.metadata


def test_a_recorded_log_with_its_policy() -> None:
    simulator = op.SyntheticConfig(n_prompts=9).build()
    policy = agents.UniformPolicy(9)
    log = op.collect(simulator, policy, 50, progress=False)
    with pytest.warns(UserWarning, match="output embeddings, expected rewards"):
        feedback = to_obp(log, policy)
    np.testing.assert_allclose(feedback["pi_b"], np.full((50, 9, 1), 1 / 9))


def test_a_synthetic_dataset_of_obp() -> None:
    dataset = pytest.importorskip("obp.dataset")
    feedback = dataset.SyntheticBanditDataset(
        n_actions=4,
        dim_context=3,
        reward_function=dataset.logistic_reward_function,
        behavior_policy_function=dataset.linear_behavior_policy,
    ).obtain_batch_bandit_feedback(200)
    log = from_obp(feedback, context_dim=2, oracle=True)
    assert (log.n_prompts, log.context.shape, log.query.shape, log.output.shape) == (4, (200, 2), (200, 1), (200, 0))
    np.testing.assert_array_equal(log.propensity, feedback["pscore"])
    np.testing.assert_array_equal(log.reward, feedback["reward"])
    np.testing.assert_array_equal(log.prompts.embeddings, np.eye(4))
    assert isinstance(log.oracle, Oracle)
    expected = feedback["expected_reward"][np.arange(200), feedback["action"]]
    np.testing.assert_allclose(log.oracle.expected_reward, expected, rtol=1e-6)
    assert from_obp(feedback).oracle is None
    agents.IS().estimate(agents.UniformPolicy(4), log)


def test_without_propensities() -> None:
    feedback = {name: value for name, value in GOOD.items() if name != "pscore"}
    assert np.isnan(from_obp(feedback).propensity).all()
    assert np.isnan(from_obp({**feedback, "pscore": None, "position": [0, 0, 0]}).propensity).all()


GOOD: dict[str, Any] = {
    "n_rounds": 3,
    "n_actions": 2,
    "context": np.ones((3, 2)),
    "action_context": np.eye(2),
    "action": np.array([0, 1, 1]),
    "position": None,
    "reward": np.array([0.0, 1.0, 2.0]),
    "pscore": np.array([0.5, 0.5, 0.25]),
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "context gone": ({"context": None}, DataError, "feedback: expected the keys .*, but context is missing"),
    "two gone": ({"reward": None, "action": None}, DataError, "but action, reward is missing"),
    "rounds": ({"n_rounds": 4}, DataError, "expected n_rounds to be 3, the rows of context, got 4"),
    "flat context": ({"context": np.ones(3)}, DataError, "context: expected an array of numbers with 2 dimensions"),
    "words": ({"context": np.array([["a"]] * 3)}, DataError, "context: .* dtype <U1"),
    "slates": ({"position": np.array([0, 1, 2])}, DataError, "position: expected one for all rounds, got 3"),
    "action": ({"action": np.array([0, 1, 2])}, ActionError, r"expected an index in \[0, 2\), got 2 in row 2"),
    "half action": ({"action": np.array([0, 1, 1.5])}, ActionError, "expected integers"),
    "short": ({"reward": np.array([0.0, 1.0])}, DataError, "reward: expected 3 values"),
    "infinite": ({"reward": np.array([0.0, 1.0, np.inf])}, DataError, "reward: expected finite .* in row 2"),
    "pscore": ({"pscore": np.array([0.5, 0.5, 0.0])}, PropensityError, "got 0.0 in row 2"),
    "more actions": ({"n_actions": 3}, DimensionError, "prompts: expected 3 as n_actions says, got 2"),
    "no catalogue": ({"action_context": None}, DataError, "prompts: expected a PromptSet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_feedback(case: str) -> None:
    change, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        from_obp({**GOOD, **change})


BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no dict": (lambda: from_obp([GOOD]), DataError, "expected the dict bandit_feedback of obp, got list"),  # type: ignore[arg-type]
    "split": (lambda: from_obp(GOOD, context_dim=3), DimensionError, "context_dim: expected a number from 0 to 2"),
    "catalogue": (lambda: from_obp(GOOD, PromptSet(np.eye(3))), DimensionError, "expected 2 as n_actions says, got 3"),
    "no oracle": (lambda: from_obp(GOOD, oracle=True), DataError, "expected_reward: expected an array"),
    "oracle": (
        lambda: from_obp({**GOOD, "expected_reward": np.ones((3, 3))}, oracle=True),
        DataError,
        r"expected_reward: expected shape \(3, 2\)",
    ),
    "unknown": (lambda: to_obp(make_log(5)), PropensityError, "bandit_feedback of obp needs .* in 2 of 5 rows"),
    "other policy": (lambda: to_obp(tabular_log(), Table(TARGET)), PropensityError, "policy: expected the one that"),
    "other size": (lambda: to_obp(tabular_log(), agents.UniformPolicy(5)), DimensionError, "expected 6 prompts"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_is_wrong_with_a_call(case: str) -> None:
    call, error, words = BAD_CALLS[case]
    with pytest.raises(error, match=words):
        call()
