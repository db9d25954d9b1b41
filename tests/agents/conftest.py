from __future__ import annotations

import pytest
import torch

import agents
import offprompts_env as op
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import LoggedDataset


@pytest.fixture(scope="session")
def simulator() -> Simulator:
    """A small world where rewards are large against their noise."""
    return SyntheticConfig.preset("paper_code", n_prompts=12, reward_std=0.2, seed=3).build()


@pytest.fixture(scope="session")
def log(simulator: Simulator) -> LoggedDataset:
    return op.collect(simulator, agents.UniformPolicy(12), 2_000, seed=5)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Small products are slower on several threads, and far slower when other work has the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    """Tests may draw from torch's own generator: each starts it afresh, so that none depends on which ran before."""
    torch.manual_seed(0)
