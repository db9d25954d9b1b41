"""What a user may have: in a file, since sweeps name such functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import agents


def learner(prompts: Any, seed: int) -> Any:
    return agents.ImportanceSamplingPG(steps=3)


def estimator(prompts: Any, seed: int) -> Any:
    return agents.IS()


def nothing(prompts: Any, seed: int) -> Any:
    return object()


def _learner(prompts: Any, seed: int, steps: int) -> Any:
    return agents.ImportanceSamplingPG(steps=steps)


bound = partial(_learner, steps=3)
