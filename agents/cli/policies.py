"""Policies on the command line: a name, or a directory; and where a learned one comes from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offprompts_env.errors import StorageError
from offprompts_env.sampling import check_policy
from offprompts_env.types import LoggedDataset, Policy, PromptSet

if TYPE_CHECKING:
    from offprompts_env.simulator import Simulator

_ORIGIN = "learned.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """How a policy was learned; kept beside it.

    Attributes:
        learner: its name.
        settings: those that were set.
        log: fingerprint of the log.
        rounds: of them learned from.
        hold_out: share of the log that was left out.
        seed: of the learner, and of the share.
    """

    learner: str
    settings: dict[str, Any]
    log: str
    rounds: int
    hold_out: float
    seed: int

    def save(self, directory: Path) -> None:
        """Write it into the policy's directory.

        Raises:
            StorageError: it cannot be written.
        """
        from offprompts_env.manifest import write_atomic

        try:
            write_atomic(directory / _ORIGIN, (json.dumps(asdict(self), indent=2) + "\n").encode())
        except OSError as error:
            raise StorageError(f"{directory}: cannot write {_ORIGIN}: {error}; free some space") from error

    @classmethod
    def load(cls, directory: Path) -> Origin | None:
        """Return that of the policy in `directory`, or None where nothing is known of it.

        Raises:
            StorageError: the file is damaged.
        """
        file = directory / _ORIGIN
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            origin = cls(**{field.name: found[field.name] for field in fields(cls)})
            known = isinstance(origin.hold_out, int | float) and isinstance(origin.seed, int) and origin.seed >= 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file}: cannot read it: {error!r}; learn the policy again, or remove the file"
            ) from error
        if not known or not 0 <= origin.hold_out < 1:
            raise StorageError(f"{file}: expected a share hold_out in [0, 1) and a seed ≥ 0; learn the policy again")
        return origin


def open_policy(name: str, prompts: PromptSet) -> Policy:
    """Return the uniform policy, or the one in a directory.

    Raises:
        StorageError: no such directory, or one of an agent whose file is a pickle.
        DimensionError: the policy is over other prompts.
    """
    import agents

    if name == "uniform":
        return agents.UniformPolicy(len(prompts))
    if not Path(name).is_dir():
        raise StorageError(
            f"policy: expected 'uniform' or the directory of a saved policy, there is no directory {name!r}"
        )
    if (Path(name) / "agent.json").is_file():
        from agents.adapters import load_agent

        agent = load_agent(name)
        check_policy(agent, prompts, "the log")
        return agent
    return agents.load_policy(name, prompts)


def logging_softmax(simulator: Simulator, beta: float, seed: int) -> Policy:
    """Return the published kind of logging policy: a softmax over a reward regression on uniform rounds."""
    import agents

    return agents.logging_policy(simulator, beta=beta, seed=seed)


def known_logger(directory: Path | None, log: LoggedDataset) -> Policy | None:
    """Return the logging policy in `directory`, where one is given; raises as :func:`open_policy`."""
    return None if directory is None else open_policy(str(directory), log.prompts)
