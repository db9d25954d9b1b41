"""The speed of taking logs to other people's formats and back."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import agents
import offprompts_env as op
from benchmarks.hot_paths.timing import Figure, seconds
from offprompts_env.interchange.d3rlpy import from_d3rlpy, to_d3rlpy
from offprompts_env.interchange.minari import from_minari, to_minari
from offprompts_env.interchange.obp import from_obp, to_obp
from offprompts_env.interchange.vowpal import from_vowpal, from_vowpal_adf, to_vowpal, to_vowpal_adf


def exports(rows: int = 100_000) -> list[Figure]:
    """Rows a second of each export and import of a log with 10 floats a round."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # What each format drops is said elsewhere.
        warnings.simplefilter("ignore", UserWarning)
        log, place = _log(rows, 1000), Path(folder)
        return [*_minari(log, place), *_d3rlpy(_log(rows // 5, 1000)), *_obp(log), *_vowpal(log, place),
                *_vowpal_adf(_log(rows // 20, 100), place)]  # fmt: skip


def _log(rows: int, prompts: int) -> op.LoggedDataset:
    simulator = op.SyntheticConfig(n_prompts=prompts).build()
    return op.collect(simulator, agents.UniformPolicy(prompts), rows, progress=False)


def _figures(
    rows: int, name: str, work: tuple[Callable[[], object], Callable[[], object]], targets: tuple[float, float],
    limits: tuple[Callable[[], object], Callable[[], object]], limit_is: tuple[str, str],
) -> list[Figure]:  # fmt: skip
    return [
        Figure(f"{way} {name}", rows / seconds(do, 3), "rows/s", "higher", target, rows / seconds(least, 3), what)
        for way, do, target, least, what in zip(("to", "from"), work, targets, limits, limit_is, strict=True)
    ]


def _minari(log: op.LoggedDataset, place: Path) -> list[Figure]:
    import h5py

    names = iter(range(1_000_000))
    dataset = to_minari(log, "log-v0", root=place / "read")
    columns = ("context", "query", "action", "reward", "propensity", "output")

    def write() -> None:
        with h5py.File(place / "bare.hdf5", "w") as file:
            for name in columns:
                file.create_dataset(name, data=getattr(log, name))

    def read() -> None:
        with h5py.File(place / "bare.hdf5") as file:
            for name in columns:
                file[name][()]

    return _figures(
        len(log), "Minari (HDF5)",
        (lambda: to_minari(log, f"log-v{next(names)}", root=place / "write"), lambda: from_minari(dataset)),
        (3e5, 5e5), (write, read), ("writing the same columns with h5py alone", "reading them with h5py alone"),
    )  # fmt: skip


def _d3rlpy(log: op.LoggedDataset) -> list[Figure]:
    from d3rlpy.constants import ActionSpace
    from d3rlpy.dataset import MDPDataset

    observations, ones = np.hstack([log.context, log.query]), np.ones(len(log), np.float32)
    actions, rewards = log.action[:, None], log.reward[:, None]

    def make() -> MDPDataset:
        return MDPDataset(
            observations, actions, rewards, ones, action_space=ActionSpace.DISCRETE, action_size=log.n_prompts
        )

    dataset = make()

    def join() -> None:
        for name in ("observations", "actions", "rewards"):
            np.concatenate([getattr(episode, name) for episode in dataset.episodes])

    return _figures(
        len(log), "d3rlpy's MDPDataset",
        (lambda: to_d3rlpy(log), lambda: from_d3rlpy(dataset, log.prompts, context_dim=5)),
        (5e4, 5e5), (make, join), ("MDPDataset itself", "joining the arrays of its episodes"),
    )  # fmt: skip


def _obp(log: op.LoggedDataset) -> list[Figure]:
    feedback = to_obp(log)

    def copy() -> None:
        np.hstack([log.context, log.query])
        for column in (log.action, log.reward, log.propensity):
            column.astype(np.float64)

    what = "copying its columns"
    return _figures(
        len(log), "bandit_feedback of obp", (lambda: to_obp(log), lambda: from_obp(feedback, context_dim=5)),
        (5e6, 5e6), (copy, copy), (what, what),
    )  # fmt: skip


def _vowpal(log: op.LoggedDataset, place: Path) -> list[Figure]:
    import pyarrow as pa
    import pyarrow.csv as csv

    path, bare = place / "cb.txt", place / "cb.csv"
    numbers = [log.action, log.reward, log.propensity, *log.context.T, *log.query.T]
    table = pa.table({str(i): np.ascontiguousarray(column) for i, column in enumerate(numbers)})
    to_vowpal(log, path)
    return _figures(
        len(log), "Vowpal Wabbit's text", (lambda: to_vowpal(log, path), lambda: from_vowpal(path, log.prompts)),
        (3e5, 3e5),
        (lambda: csv.write_csv(table, bare), lambda: csv.read_csv(bare, csv.ReadOptions(use_threads=False))),
        ("writing the same numbers as CSV with pyarrow alone", "reading that CSV with pyarrow alone"),
    )  # fmt: skip


def _vowpal_adf(log: op.LoggedDataset, place: Path) -> list[Figure]:
    path, bare = place / "adf.txt", place / "adf.bytes"
    content = to_vowpal_adf(log, path).read_bytes()
    return _figures(
        len(log), "Vowpal Wabbit's text, 100 prompts a round",
        (lambda: to_vowpal_adf(log, path), lambda: from_vowpal_adf(path, log.prompts)), (2e4, 1e4),
        (lambda: bare.write_bytes(content), lambda: path.read_bytes().split(b"\n\n")),
        ("writing the same bytes, already made", "reading its bytes and splitting them at empty lines"),
    )  # fmt: skip
