"""``offprompts record``."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import tyro

import offprompts_env as op
from agents.cli.output import print_json
from agents.cli.policies import logging_softmax, open_policy
from agents.cli.settings import read_settings
from offprompts_env.errors import ConfigError, OffPromptsError, StorageError, foreign, unknown_name
from offprompts_env.manifest import find_manifest
from offprompts_env.simulator import Simulator
from offprompts_env.storage import Mode


@dataclass(frozen=True)
class Record:
    """Record rounds of a policy in an environment, with propensities.

    In use:
      offprompts record OffPrompts-Synthetic-v0 --n 10000 --out log
      offprompts record OffPrompts-MovieLens-v0 --n 5000 --out log --env n_prompts=100
      offprompts record OffPrompts-MovieLens-v0 --n 5000 --out better --policy policy

    An interrupted recording goes on with the same command and --mode append.
    """

    env_id: Annotated[str, tyro.conf.Positional]
    """Id of the environment: OffPrompts-Synthetic-v0, OffPrompts-MovieLens-v0, or of your own domain, module:id."""
    out: Path
    """Directory of the log."""
    n: int = 10_000
    """Rows of the log, those that are there already included."""
    policy: str = "uniform"
    """uniform, softmax (over a reward regression on uniform rounds, as published), or the directory of a policy."""
    beta: float = 1.0
    """Inverse temperature of the softmax policy."""
    env: tuple[str, ...] = ()
    """Settings of the environment, as name=value: n_prompts=100 seed=3."""
    seed: int = 0
    """Names the rounds; the world has a seed of its own among its settings."""
    mode: Mode = "refuse"
    """What to do where there is a log already: refuse, append what is missing to n rows, or overwrite it."""
    quiet: bool = False
    """Show no progress (it is never shown where standard error is not a terminal)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        env = make_env(self.env_id, read_settings(self.env, "--env"))
        simulator: Simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
        if self.policy == "softmax":
            policy = logging_softmax(simulator, self.beta, self.seed)
        else:
            policy = open_policy(self.policy, simulator.prompts)
        progress = False if self.quiet or not sys.stderr.isatty() else None
        try:
            log = op.collect(env, policy, self.n, self.out, seed=self.seed, mode=self.mode, progress=progress)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self._how_to_go_on()) from interrupt
        mean = float(log.reward.mean())
        if self.json:
            print_json({"path": str(self.out), "rounds": len(log), "prompts": log.n_prompts, "mean_reward": mean})
        else:
            print(f"{self.out}: {len(log):,} rounds of {log.n_prompts:,} prompts, mean reward {mean:.4g}")

    def _how_to_go_on(self) -> str:
        try:
            found = find_manifest(self.out, warn=False)
        except StorageError:
            found = None
        rows = 0 if found is None else found.rows
        if not rows:
            return "no rows were written; run the same command again"
        return f"{self.out} has {rows:,} of {self.n:,} rows; go on with the same command and --mode append"


def make_env(env_id: str, settings: dict[str, Any]) -> gym.Env[Any, Any]:
    """Make an environment of this project, or one that ``register_domain`` registered; ``module:id`` imports first.

    Raises:
        AgentError: the module cannot be imported.
        ConfigError: no such environment, or a setting is unknown or out of range.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        with foreign(f"import of {module}"):
            importlib.import_module(module)
    # Own domains and the built-in environments have their classes in this package.
    ours = [own for own, spec in gym.registry.items() if str(spec.entry_point).startswith("offprompts_env.")]
    if name not in ours:
        raise unknown_name("environment", name, ours)
    try:
        return gym.make(env_id, **settings)
    except OffPromptsError:
        raise
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"--env: {env_id} cannot be made with {settings}: {error}") from error
