"""Where logs come from: directories that were recorded, and tables whose columns are named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offprompts_env.errors import ConfigError, DataError, StorageError
from offprompts_env.manifest import MANIFEST
from offprompts_env.types import LoggedDataset

if TYPE_CHECKING:
    from offprompts_env.simulator import Simulator

_OURS = re.compile(r"OffPrompts-\w+-v\d+")
_ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "json lines", ".ndjson": "json lines"}


@dataclass(frozen=True)
class ColumnNames:
    """Which column of a Parquet, CSV or JSON-lines file is what; a recorded directory needs none of these."""

    context: tuple[str, ...] = ()
    """Columns with user features: names, one list-valued column, or the prefix of numbered ones (context_0, ...)."""
    query: tuple[str, ...] = ()
    """Columns with item features; none if there are none, which is the default where --context is given."""
    action: str = "action"
    """Column with the prompt: its text or its index."""
    reward: str = "reward"
    """Column with what was observed."""
    propensity: str | None = None
    """Column with the probability of the chosen prompt; without one it is unknown. Columns from here on are found by
    these names themselves; none leaves one out."""
    output: tuple[str, ...] = ()
    """Columns with the sentence's embedding; as --query."""
    sentence: str | None = None
    """Column with the sentence."""
    user_id: str | None = None
    """Column with integers."""
    item_id: str | None = None
    """Column with integers."""
    query_text: str | None = None
    """Column with text."""
    prompts: Path | None = None
    """File with the prompts, one a line, where not every prompt is in the log or actions are indices."""

    def chosen(self) -> dict[str, Any]:
        """Return the names in the form of :func:`offprompts_env.interchange.from_csv`."""
        by_hand = bool(self.context)
        names: dict[str, Any] = {"action": self.action, "reward": self.reward}
        for name in ("context", "query", "output"):
            given = getattr(self, name)
            if [word.lower() for word in given] == ["none"] or (not given and by_hand):
                names[name] = None
            elif given:
                names[name] = given[0] if len(given) == 1 else given
        for name in ("propensity", "sentence", "user_id", "item_id", "query_text"):
            if (given := getattr(self, name)) is not None:
                names[name] = "" if given.lower() == "none" else given
        return names


_DEFAULT = ColumnNames()


def open_log(path: Path, columns: ColumnNames = _DEFAULT) -> LoggedDataset:
    """Read a recorded directory, or a Parquet, CSV or JSON-lines file.

    Raises:
        ConfigError: names of columns are given for a directory.
        StorageError: there is nothing, or something else.
        DataError: the file does not have the columns, or a cell is wrong.
    """
    if path.is_dir() and (path / MANIFEST).exists():
        if columns != _DEFAULT:
            raise ConfigError(f"{path}: is a recorded log, which knows its columns; names of columns are for files")
        return LoggedDataset.load(path)
    if not path.exists():
        raise StorageError(f"{path}: expected a log or a file, there is none; record one with: offprompts record")
    return _reader(path)(path, _prompts(columns.prompts), **columns.chosen())


def _reader(path: Path) -> Callable[..., LoggedDataset]:
    from offprompts_env.interchange import from_csv, from_json_lines, from_parquet

    readers: dict[str, Callable[..., LoggedDataset]] = {
        "parquet": from_parquet, "csv": from_csv, "json lines": from_json_lines,
    }  # fmt: skip
    endings = [Path(path.name.removesuffix(".gz")).suffix.lower()]
    if path.is_dir():
        endings = [Path(file.name.removesuffix(".gz")).suffix.lower() for file in path.rglob("*") if file.is_file()]
    kinds = {_ENDINGS[ending] for ending in endings if ending in _ENDINGS}
    if len(kinds) != 1:
        raise StorageError(
            f"{path}: expected a log directory (with {MANIFEST}), or a file that ends in {', '.join(_ENDINGS)}; rename "
            "the file by what is in it, or pass the directory that was recorded"
        )
    return readers[kinds.pop()]


def _prompts(path: Path | None) -> Any:
    if path is None:
        return None
    from offprompts_env.types import PromptSet

    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--prompts: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        # A line left out would shift the indices of those after it.
        if not line.strip():
            raise DataError(f"--prompts: expected a prompt a line, line {number} of {path} is blank; remove it")
    return PromptSet(np.eye(len(lines)), tuple(line.removesuffix("\r") for line in lines))


def fingerprint(log: LoggedDataset) -> str:
    """Return a checksum of contexts, prompts chosen and rewards: the same for the same rounds in the same order."""
    digest = hashlib.sha256(log.prompts.fingerprint.encode())
    for column in (log.context, log.query, log.action, log.reward):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def split(log: LoggedDataset, hold_out: float, seed: int) -> tuple[LoggedDataset, LoggedDataset | None]:
    """Return the rounds to learn from, and a random share `hold_out` of all to evaluate on; None if that is 0.

    Raises:
        ConfigError: not a share, or nothing is left on one side.
    """
    from offprompts_env.rng import stream

    if not 0 <= hold_out < 1:
        raise ConfigError(f"--hold-out: expected a share in [0, 1), got {hold_out}; 0.5 is usual")
    if hold_out == 0:
        return log, None
    kept = round(len(log) * (1 - hold_out))
    if not 0 < kept < len(log):
        raise ConfigError(f"--hold-out: {hold_out} of {len(log)} rounds leaves none on one side; record more rounds")
    order = stream(seed, "hold-out").permutation(len(log))
    return log.take(np.sort(order[:kept])), log.take(np.sort(order[kept:]))


def simulator_of(log: LoggedDataset) -> Simulator | None:
    """Return the simulator of the environment that `log` names, made again; None if it names none.

    Raises:
        DataError: it names one that is not of this project, or that cannot be made again here.
    """
    import gymnasium as gym

    from offprompts_env.errors import OffPromptsError

    env_id, config = log.metadata.env_id, log.metadata.env_config
    if env_id is None:
        return None
    # Gymnasium imports the module that an id may name: an id from a file must not run code.
    if not _OURS.fullmatch(env_id):
        raise DataError(f"log: expected an environment OffPrompts-..., got {env_id!r}; go on with --no-generator")
    try:
        made: Any = gym.make(env_id, **config)
    except (OffPromptsError, gym.error.Error, TypeError) as error:
        raise DataError(
            f"log: {env_id} cannot be made again as recorded: {error}; go on without its generator: --no-generator"
        ) from error
    simulator: Simulator = made.unwrapped.simulator
    return simulator
