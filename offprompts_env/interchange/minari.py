"""Logged datasets from and to Minari.

A log becomes a dataset in HDF5 whose episodes are batches of at most 10,000 rounds, each round a step that terminates:
an episode a round would cost a group of files' metadata a row. As everywhere in Minari, observations and infos have one
entry more than there are steps: observations repeat their last one, and what came of step t is at ``t + 1`` of infos.

    <root>/<dataset id>/data/
      metadata.json         Minari's own; under "offprompts" the provenance of the log
      main_data.hdf5        observations (context, query), actions, rewards; in infos propensity, output, sentence, ...
      prompts.safetensors   the catalogue: embeddings (A, d_e), and the texts in its header
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError, missing_dependency
from offprompts_env.types import Array, LoggedDataset, LogMetadata, Oracle, PromptSet

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from minari import MinariDataset

EPISODE_ROWS = 10_000
_KEY, _VERSION = "offprompts", 1
_PROMPTS = "prompts.safetensors"
_SHOWN = ("context", "query")
_TEXTS = ("sentence", "query_text")
_INTEGERS = ("user_id", "item_id")
_SAID = ("propensity", "output", *_TEXTS, *_INTEGERS)
_ORACLE = "expected_reward"
# Arguments of an environment that are objects: a log has only the names of their classes.
_PARTS = ("contexts", "prompts", "outputs", "rewards")


def to_minari(
    log: LoggedDataset, dataset_id: str, *, root: str | Path | None = None, oracle: bool = False
) -> MinariDataset:
    """Write the log as a Minari dataset, which :func:`from_minari` reads back as an equal log.

    ``recover_environment()`` makes the environment again where the log has its id and settings. HDF5 cannot hold texts
    with a NUL character: a column that has one is written as JSON strings.

    Args:
        log: the rounds.
        dataset_id: ``(namespace/)name-v0``; there must be no dataset of that name.
        root: directory of datasets; None takes Minari's own (``MINARI_DATASETS_PATH``, or ``~/.minari/datasets``).
        oracle: keep the expected rewards, too; whoever reads the dataset can then see the truth.

    Raises:
        ConfigError: `dataset_id` is malformed.
        StorageError: there is a dataset of that name, or it cannot be written.
        DataError: a text is no valid Unicode, the metadata does not fit into JSON, or there is no oracle to keep.

    Warns:
        UserWarning: the log names an environment that cannot be made again from what it says.
    """
    minari, storage_class, buffer_class = _minari()
    columns, as_json = _columns(log, oracle)
    target = _directory(dataset_id, root)
    if target.exists():
        raise StorageError(
            f"{target}: expected no dataset of that name, there is one; choose another version, or delete it with "
            "minari.delete_dataset"
        )
    about = _about(log, as_json)
    shown = {name: getattr(log, name) for name in _SHOWN}
    boxes: dict[str, gym.Space[Any]] = {
        name: spaces.Box(-np.inf, np.inf, v.shape[1:], np.float32) for name, v in shown.items() if v.shape[1]
    }
    space, actions = spaces.Dict(boxes), spaces.Discrete(log.n_prompts)

    def buffers() -> Iterator[Any]:
        # One at a time: Minari writes each before it asks for the next, so that no copy of the log is held.
        for start in range(0, len(log), EPISODE_ROWS):
            yield buffer_class(**_episode(log, boxes, columns, slice(start, start + EPISODE_ROWS)))

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".offprompts-", dir=target.parent) as hidden:
            data = Path(hidden) / target.name / "data"
            data.mkdir(parents=True)
            storage = storage_class.new(data, space, actions, _environment(log.metadata), "hdf5")
            _write_prompts(data / _PROMPTS, log.prompts)
            description = log.metadata.notes or "Rounds of a contextual bandit over prompts, one a step."
            storage.update_metadata(
                {
                    "dataset_id": dataset_id,
                    "minari_version": minari.__version__,
                    "description": description,
                    _KEY: about,
                }
            )
            storage.update_episodes(buffers())
            data.parent.rename(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot write: {error}; free some space or pass another root=") from error
    return minari.MinariDataset(target / "data")


def from_minari(
    dataset: MinariDataset | str,
    prompts: PromptSet | None = None,
    *,
    root: str | Path | None = None,
    oracle: bool = False,
) -> LoggedDataset:
    """Read a Minari dataset of rounds: one of :func:`to_minari`, or one that ``minari.DataCollector`` recorded.

    A collector keeps what is in `info` only with ``record_infos=True``, and only keys that both ``reset`` and ``step``
    return. What is not there is unknown: propensities are NaN, outputs have dimension 0. Only ``expected_reward``
    is left out on purpose.

    Args:
        dataset: the dataset, possibly filtered, or its id.
        prompts: the catalogue, needed for a dataset without one: ``env.unwrapped.simulator.prompts``.
        root: directory of datasets, where `dataset` is an id; None takes Minari's own.
        oracle: put ``expected_reward`` into the oracle field.

    Raises:
        StorageError: there is no such dataset, or a file of it is missing or damaged.
        DataError: a step does not terminate, or a column is missing or has the wrong length or type.
        DimensionError: the catalogue is not that of the dataset.
        ActionError, PropensityError: an action or a propensity is none.
    """
    found = _open(dataset, root)
    about = _read_about(found)
    names = (*_SAID, _ORACLE) if oracle else _SAID
    parts: dict[str, list[Array]] = {}
    for index, episode in enumerate(_episodes(found)):
        for name, values in _read_episode(episode, names).items():
            parts.setdefault(name, []).append(values)
        for name, found_so_far in parts.items():
            if len(found_so_far) != index + 1:
                raise DataError(f"{name}: expected it in all episodes or in none, but only some up to {index} have it")
    if not parts:
        raise DataError(f"{found.id}: expected at least one episode, got none")
    columns: dict[str, Any] = {name: np.concatenate(values) for name, values in parts.items()}
    as_json = about["json_texts"] if about else ()
    columns |= {name: _decode(columns[name], name, name in as_json) for name in _TEXTS if name in columns}
    n = len(columns["reward"])
    columns.setdefault("propensity", np.full(n, np.nan))
    for name in (*_SHOWN, "output"):
        columns.setdefault(name, np.empty((n, 0), dtype=np.float32))
    if oracle:
        if _ORACLE not in columns:
            raise DataError(f"{found.id}: expected {_ORACLE!r} in infos, it is missing; pass oracle=False")
        columns["oracle"] = Oracle(columns.pop(_ORACLE))
    return LoggedDataset(**columns, prompts=_catalogue(found, about, prompts), metadata=_provenance(found, about))


def _minari() -> tuple[Any, Any, Any]:
    """Return Minari, its storage class and its class of episodes."""
    try:
        import h5py  # noqa: F401  (Minari asks for it late, and with an error of its own)
        import minari
        import PIL  # noqa: F401
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise missing_dependency("minari[hdf5] with pillow", "minari", "a Minari dataset") from error
    return minari, MinariStorage, EpisodeBuffer


def _directory(dataset_id: str, root: str | Path | None) -> Path:
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"dataset_id: expected '(namespace/)name-v0' of letters, digits, - and _, got {dataset_id!r}; "
            "a namespace has at least two characters, and the version must be there"
        ) from error
    return get_dataset_path(dataset_id) if root is None else Path(root) / dataset_id


# ----------------------------------------------------------------------------------------------------------- writing


def _columns(log: LoggedDataset, oracle: bool) -> tuple[dict[str, Array], list[str]]:
    """Return what goes into infos, and which of it are texts written as JSON."""
    from offprompts_env.columns import check_texts

    check_texts(log)
    columns: dict[str, Any] = {name: getattr(log, name) for name in _SAID if getattr(log, name) is not None}
    if log.output.shape[1] == 0:
        del columns["output"]
    if np.isnan(log.propensity).all():
        del columns["propensity"]
    as_json = [name for name in _TEXTS if name in columns and "\x00" in "".join(columns[name])]
    for name in as_json:
        columns[name] = np.array([json.dumps(text) for text in columns[name]], dtype=object)
    if oracle:
        if log.oracle is None:
            raise DataError("oracle: expected a log with expected rewards, this one has none; pass oracle=False")
        columns[_ORACLE] = log.oracle.expected_reward
    return columns, as_json


def _episode(log: LoggedDataset, shown: Mapping[str, Any], columns: Mapping[str, Array], rows: slice) -> dict[str, Any]:
    """Return the fields of one episode buffer."""
    n = len(log.action[rows])
    observations = {name: getattr(log, name)[rows] for name in shown}
    return {
        "observations": {name: np.concatenate([values, values[-1:]]) for name, values in observations.items()},
        "actions": log.action[rows],
        "rewards": log.reward[rows],
        "terminations": np.ones(n, dtype=bool),
        "truncations": np.zeros(n, dtype=bool),
        "infos": {name: np.concatenate([_blank(values), values[rows]]) for name, values in columns.items()},
    }


def _blank(values: Array) -> Array:
    """Return the entry of infos before the first step."""
    filler: Any = {"f": np.nan, "i": 0, "O": ""}[values.dtype.kind]
    return np.full((1, *values.shape[1:]), filler, dtype=values.dtype)


def _about(log: LoggedDataset, as_json: list[str]) -> dict[str, Any]:
    from offprompts_env.manifest import json_text

    about = {
        "version": _VERSION,
        "prompt_fingerprint": log.prompts.fingerprint,
        "json_texts": as_json,
        "metadata": asdict(log.metadata),
    }
    result: dict[str, Any] = json.loads(json_text(about))
    return result


def _environment(metadata: LogMetadata) -> EnvSpec | None:
    """Return what makes the environment of a log again, if it can be made."""
    if metadata.env_id is None:
        return None
    own = [name for name in _PARTS if name in metadata.env_config]
    try:
        spec = copy.deepcopy(gym.spec(metadata.env_id))
    except gym.error.Error as error:
        why = str(error)
    else:
        if not own:
            spec.kwargs.update(metadata.env_config)
            return spec
        why = f"it has parts of its own ({', '.join(own)}) that cannot be written"
    warnings.warn(
        f"the environment {metadata.env_id} of the log cannot be recovered from the Minari dataset: {why}",
        stacklevel=3,
    )
    return None


def _write_prompts(file: Path, prompts: PromptSet) -> None:
    from safetensors.numpy import save_file

    texts = None if prompts.texts is None else {"texts": json.dumps(prompts.texts)}
    save_file({"embeddings": np.ascontiguousarray(prompts.embeddings)}, file, texts)


# ----------------------------------------------------------------------------------------------------------- reading


def _open(dataset: MinariDataset | str, root: str | Path | None) -> Any:
    minari, storage_class, _ = _minari()
    if not isinstance(dataset, str):
        if not isinstance(dataset, minari.MinariDataset):
            raise DataError(f"dataset: expected a MinariDataset or the id of one, got {type(dataset).__name__}")
        return dataset
    data = _directory(dataset, root) / "data"
    try:
        raw = storage_class.read_raw_metadata(data)
        # Without them Minari would make the environment, with whatever class the file names.
        missing = [name for name in ("observation_space", "action_space") if name not in raw]
        found = None if missing else minari.MinariDataset(data)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise StorageError(f"{data}: expected a Minari dataset, cannot read it: {error}; check id and root=") from error
    if missing:
        raise DataError(f"{data}: expected spaces in metadata.json, but {' and '.join(missing)} is missing")
    return found


def _read_about(dataset: Any) -> dict[str, Any] | None:
    """Return what :func:`to_minari` noted, or None for a dataset from elsewhere."""
    data = dataset.storage.data_path
    about = dataset.storage.read_raw_metadata(data).get(_KEY)
    if about is None:
        return None
    try:
        version, needed = about["version"], (about["prompt_fingerprint"], about["json_texts"], about["metadata"])
        LogMetadata(**needed[-1])
    except (KeyError, TypeError) as error:
        raise StorageError(f"{data}: expected {_KEY!r} in metadata.json to be whole, it is not: {error!r}") from error
    if version != _VERSION:
        raise StorageError(
            f"{data}: expected format version {_VERSION} of {_KEY!r} in metadata.json, got {version!r}; "
            "upgrade with: pip install -U offprompts-env"
        )
    return dict(about)


def _episodes(dataset: Any) -> Iterator[Mapping[str, Any]]:
    try:
        yield from dataset.storage.get_episodes(dataset.episode_indices)
    except (OSError, KeyError, AssertionError) as error:
        raise StorageError(
            f"{dataset.storage.data_path}: expected whole episodes, cannot read them: {error}; restore them from a copy"
        ) from error


def _read_episode(episode: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Array]:
    where = f"episode {episode['id']}"
    rewards, shown = np.asarray(episode["rewards"]), episode["observations"]
    n = len(rewards)
    if not np.all(episode["terminations"]) or np.any(episode["truncations"]):
        raise DataError(
            f"{where}: expected every step to terminate, as one is a round, got one that does not; this is no bandit's "
            "dataset, or its environment is wrapped in a time limit"
        )
    if not isinstance(shown, Mapping) or not set(shown) <= set(_SHOWN):
        keys = ", ".join(shown) if isinstance(shown, Mapping) else type(shown).__name__
        raise DataError(f"{where}: expected observations with the keys context and query, got {keys}")
    columns: dict[str, Array] = {"action": np.asarray(episode["actions"]), "reward": rewards}
    for name, values in shown.items():
        # The last one belongs to no step.
        columns[name] = np.asarray(values)[:n]
    infos = episode["infos"] or {}
    for name in names:
        if name in infos:
            columns[name] = _said(np.asarray(infos[name]), name, n, where)
    return columns


def _said(values: Array, name: str, n: int, where: str) -> Array:
    """Return what infos say of n steps; some writers leave out the entry before the first."""
    if len(values) not in (n, n + 1):
        raise DataError(f"{where}: expected {n + 1} values of {name} in infos, got {len(values)}")
    if name in _INTEGERS and values.dtype.kind not in "iu":
        raise DataError(f"{where}: expected integers of {name} in infos, got dtype {values.dtype}")
    return values[len(values) - n :]


def _decode(values: Array, name: str, as_json: bool) -> Array:
    plain = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in values]
    for text in plain:
        if not isinstance(text, str):
            raise DataError(f"{name}: expected texts in infos, got {text!r} of type {type(text).__name__}")
    texts = np.empty(len(values), dtype=object)
    try:
        texts[:] = [json.loads(text) for text in plain] if as_json else plain
    except ValueError as error:
        raise DataError(f"{name}: expected JSON strings in infos, as metadata.json says: {error}") from error
    return texts


def _catalogue(dataset: Any, about: Mapping[str, Any] | None, prompts: PromptSet | None) -> PromptSet:
    if prompts is None:
        if about is None:
            raise DataError(
                f"prompts: expected the catalogue that actions index, as {dataset.id} has none; "
                "pass prompts=env.unwrapped.simulator.prompts"
            )
        prompts = _read_prompts(Path(dataset.storage.data_path) / _PROMPTS)
    if about is not None:
        from offprompts_env.sampling import check_catalogue

        check_catalogue(f"Minari dataset {dataset.id}", about["prompt_fingerprint"], prompts)
    space = dataset.action_space
    if not isinstance(space, spaces.Discrete) or space.start != 0 or space.n != len(prompts):
        raise DimensionError(f"prompts: expected actions Discrete({len(prompts)}), as there are prompts, got {space}")
    return prompts


def _read_prompts(file: Path) -> PromptSet:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as content:
            texts = (content.metadata() or {}).get("texts")
            return PromptSet(content.get_tensor("embeddings"), None if texts is None else tuple(json.loads(texts)))
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(
            f"{file}: expected the prompts of the log, cannot read them: {error}; restore it from a copy, or pass "
            "prompts="
        ) from error


def _provenance(dataset: Any, about: Mapping[str, Any] | None) -> LogMetadata:
    if about is not None:
        return LogMetadata(**about["metadata"])
    spec = dataset.env_spec
    return LogMetadata() if spec is None else LogMetadata(spec.id, dict(spec.kwargs))
