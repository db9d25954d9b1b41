"""The speed table: every hot path beside its limit, both measured in the same run.

    python -m benchmarks.speed [--only NAME ...] [--json FILE]

A figure is the best of several repetitions, on one core (`torch` and BLAS are held to one thread), because noise on a
shared machine only ever adds time. `of limit` is how much of the reachable speed is used: 100% is the limit itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import gymnasium as gym
import numpy as np

import offprompts_env as op


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: what was measured.
        value: how fast, in `unit`.
        unit: of value, target and limit.
        better: whether a higher or a lower value is better.
        target: what the project promises.
        limit: what the machine could reach, measured in the same run.
        limit_is: what that limit is.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    target: float
    limit: float
    limit_is: str

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    @property
    def share(self) -> float:
        """Share of the limit reached."""
        return self.value / self.limit if self.better == "higher" else self.limit / self.value


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Return the shortest wall time of `repeat` runs of `work`, after one run that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops() -> float:
    """Return float32 FLOP/s of a large matrix product on one core."""
    import torch

    torch.set_num_threads(1)
    a = torch.rand(1024, 1024)
    return 2 * 1024**3 / seconds(lambda: a @ a, 9)


class _Trivial(gym.Env[Any, Any]):
    """The least a one-step environment with this observation can do: what Gymnasium itself costs."""

    observation_space = gym.spaces.Dict({k: gym.spaces.Box(-np.inf, np.inf, (5,), np.float32) for k in ("context", "query")})
    action_space = gym.spaces.Discrete(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"context": np.zeros(5, np.float32), "query": np.zeros(5, np.float32)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = {"context": np.zeros(5, np.float32), "query": np.zeros(5, np.float32)}
        return observation, 0.0, True, False, {"expected_reward": 0.0}


def single_environment() -> Figure:
    """Steps a second of one synthetic environment, reset included."""
    gym.register("SpeedTrivial-v0", entry_point=_Trivial)

    def rate(env_id: str) -> float:
        env = gym.make(env_id)
        env.reset(seed=0)

        def play() -> None:
            for _ in range(5000):
                env.reset()
                env.step(7)

        return 5000 / seconds(play)

    return Figure(
        "single synthetic environment", rate("OffPrompts-Synthetic-v0"), "steps/s", "higher", 60e3,
        rate("SpeedTrivial-v0"), "an environment that does nothing, through gym.make",
    )  # fmt: skip


def vector_environment(n: int = 4096) -> Figure:
    """Rounds a second of the native vector environment."""
    envs = gym.make_vec("OffPrompts-Synthetic-v0", num_envs=n)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(1000, size=n)
    rng = np.random.default_rng(0)

    def play() -> None:
        for _ in range(50):
            envs.step(actions)

    def numbers() -> None:
        for _ in range(50):
            rng.standard_normal((n, 16), dtype=np.float32)

    return Figure(
        f"vector environment, {n:,} rounds", 50 * n / seconds(play), "rounds/s", "higher", 4e6,
        50 * n / seconds(numbers), "drawing the 16 normals of a round",
    )  # fmt: skip


def closed_form() -> Figure:
    """Expected rewards of 1,000 contexts and 1,000 prompts."""
    simulator = op.SyntheticConfig().build()
    contexts = simulator.evaluation_contexts(1000)
    left, right = np.random.default_rng(0).random((1000, 6)), np.random.default_rng(1).random((6, 1000))
    return Figure(
        "closed-form expected rewards, 1,000 × 1,000", 1e3 * seconds(lambda: simulator.expected_rewards(contexts), 20),
        "ms", "lower", 5, 1e3 * seconds(lambda: left @ right, 20), "the float64 matrix product alone",
    )  # fmt: skip


def import_time() -> Figure:
    """Wall time of the import in a fresh interpreter, less that of starting the interpreter."""

    def run(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), 5)

    start = run("pass")
    return Figure(
        "import offprompts_env", run("import offprompts_env") - start, "s", "lower", 0.5,
        run("import gymnasium, gymnasium.vector") - start, "importing gymnasium",
    )  # fmt: skip
