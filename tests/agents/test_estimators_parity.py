"""The estimators that the Open Bandit Pipeline has too, on the same rounds, to the last digits of its doubles."""

from __future__ import annotations

import numpy as np
import pytest
from obp import ope

import agents
from offprompts_env.types import LoggedDataset, PromptSet
from tests.agents.tiny_bandit import Table

N, A = 300, 6
RNG = np.random.default_rng(11)
LOGGING, TARGET = RNG.dirichlet(np.ones(A), N), RNG.dirichlet(np.full(A, 0.5), N)
MODEL = RNG.normal(size=(N, A))
ACTION = (LOGGING.cumsum(1) < RNG.random((N, 1))).sum(1).clip(max=A - 1)
REWARD = (MODEL[np.arange(N), ACTION] + RNG.normal(size=N)).astype(np.float32)
PROPENSITY = LOGGING[np.arange(N), ACTION]
Q = agents.FittedRewards((Table(MODEL),))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (agents.IS(), ope.InverseProbabilityWeighting()),
        (agents.SNIPS(), ope.SelfNormalizedInverseProbabilityWeighting()),
        (agents.DM(Q, n_draws=None), ope.DirectMethod()),
        (agents.DR(Q, n_draws=None), ope.DoublyRobust()),
        (agents.SNDR(Q, n_draws=None), ope.SelfNormalizedDoublyRobust()),
        (agents.SwitchDR(Q, n_draws=None, tau=2.0), ope.SwitchDoublyRobust(tau=2.0)),
        (agents.DRos(Q, n_draws=None, shrinkage=3.0), ope.DoublyRobustWithShrinkage(lambda_=3.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_same_value(ours, theirs):
    # Each round has a context of its own: the row of the tables.
    log = LoggedDataset(
        context=np.arange(N)[:, None],
        query=np.zeros((N, 1)),
        action=ACTION,
        propensity=PROPENSITY,
        reward=REWARD,
        output=np.zeros((N, 1)),
        prompts=PromptSet(np.eye(A)),
    )
    expected = theirs.estimate_policy_value(
        reward=REWARD.astype(np.float64),
        action=ACTION,
        pscore=PROPENSITY,
        action_dist=TARGET[:, :, None],
        estimated_rewards_by_reg_model=MODEL[:, :, None],
        position=np.zeros(N, dtype=int),
    )
    assert ours.estimate(Table(TARGET), log).value == pytest.approx(expected, rel=1e-10)
