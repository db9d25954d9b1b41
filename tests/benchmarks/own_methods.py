"""What a user may have: in a file, since sweeps name such functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import agents
from agents.adapters import FunctionAgent


def learner(prompts: Any, seed: int) -> Any:
    return agents.ImportanceSamplingPG(steps=3)


def estimator(prompts: Any, seed: int) -> Any:
    return agents.IS()


def nothing(prompts: Any, seed: int) -> Any:
    return object()


def _learner(prompts: Any, seed: int, steps: int) -> Any:
    return agents.ImportanceSamplingPG(steps=steps)


bound = partial(_learner, steps=3)


counts = np.empty(0)
"""Of the last adapter."""


def adapter(prompts: Any, seed: int) -> Any:
    global counts
    totals, counts = np.zeros(len(prompts)), np.ones(len(prompts))

    def best(contexts: Any) -> Any:
        return np.full(len(contexts), np.argmax(totals / counts))

    def learn(log: Any) -> None:
        np.add.at(totals, log.action, log.reward)
        np.add.at(counts, log.action, 1)

    return FunctionAgent.choosing(prompts, best, epsilon=0.2, learn=learn)


def uniform(prompts: Any, seed: int) -> Any:
    return agents.UniformPolicy(len(prompts))
