"""Logs that are larger than memory, read in windows of bounded size.

A window is an ordinary :class:`offprompts_env.types.LoggedDataset`. For learning, the shards come in an order of their
own in each pass, so that the stages of a recording are mixed. Within a shard rows stay in order, as shuffling millions
takes longer than reading them: draw batches at random from a window, which is what learners do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from offprompts_env.columns import value_bytes
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, StorageError
from offprompts_env.manifest import Manifest, Shard
from offprompts_env.rng import stream
from offprompts_env.storage import in_batches, read_manifest, read_prompts, read_shard
from offprompts_env.types import Array, IntArray, LoggedDataset, LogMetadata, PromptSet

# Rows of a window take about this much memory; learning from it takes as much again for tensors, twice while the next
# one is read.
WINDOW_BYTES = 1 << 27


@dataclass(frozen=True)
class _Part:
    """A random share of the rows of every shard, or the rows that it leaves."""

    fraction: float
    seed: int
    rest: bool

    def count(self, rows: int) -> int:
        kept = round(self.fraction * rows)
        return rows - kept if self.rest else kept

    def of(self, rows: IntArray, *names: int) -> IntArray:
        order = stream(self.seed, "split", *names).permutation(rows)
        kept = round(self.fraction * len(rows))
        return np.sort(order[kept:] if self.rest else order[:kept])


@dataclass(frozen=True, eq=False)
class LogStream:
    """A recorded directory, of which one window is in memory at a time.

    Learners and ``agents.estimate_stream`` take it in place of a log.

    Attributes:
        path: the directory.
        manifest: what is recorded there.
        prompts: the catalogue.
        window: rows of a window, at most.
    """

    path: Path
    manifest: Manifest
    prompts: PromptSet
    window: int
    _parts: tuple[_Part, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, window: int | None = None) -> Self:
        """Open the log at `path`.

        Args:
            path: a directory that was recorded or saved.
            window: rows of a window, at most; by default what takes 128 MiB, a sentence being taken for 1 KiB.

        Raises:
            ConfigError: `window` is not positive.
            StorageError: there is no log, it has no rows, or a file is damaged.
        """
        root = Path(path)
        manifest = read_manifest(root)
        if manifest.rows == 0:
            raise StorageError(f"{root}: expected at least one flushed row, found none; record some rounds first")
        if window is None:
            window = max(1, WINDOW_BYTES // sum(map(value_bytes, manifest.columns.values())))
        check_integer("window", window, 1)
        return cls(root, manifest, read_prompts(root, manifest), window)

    def __len__(self) -> int:
        return sum(self._rows(shard.rows) for shard in self.manifest.shards)

    @property
    def n_prompts(self) -> int:
        """Number of prompts ``A``."""
        return len(self.prompts)

    @property
    def metadata(self) -> LogMetadata:
        """Provenance."""
        return self.manifest.metadata

    @property
    def n_windows(self) -> int:
        """Number of windows of a pass; they are of about the same size."""
        return -(-len(self) // self.window)

    def windows(self, *, seed: int | None = None) -> Iterator[LoggedDataset]:
        """Read the log once, window by window.

        A log of a single window is given as it was recorded.

        Args:
            seed: names the order of the shards; None is as recorded.

        Raises:
            StorageError: a file is missing or damaged, when it is reached.
        """
        if len(self) == 0:
            return
        numbers = np.arange(len(self.manifest.shards))
        if seed is not None and self.n_windows > 1:
            stream(seed, "windows").shuffle(numbers)
        shards = (self._columns(int(number)) for number in numbers)
        yield from in_batches(shards, -(-len(self) // self.n_windows), self.prompts, self.metadata)

    def head(self, rows: int) -> LoggedDataset:
        """Return the first `rows` rows as recorded, or all if there are fewer.

        Raises:
            ConfigError: there are none: the stream is an empty part of a split.
            StorageError: a file is missing or damaged.
        """
        check_integer("rows", rows, 1)
        if len(self) == 0:
            raise ConfigError(f"{self.path}: expected at least one row, this part has none; split off a larger share")
        shards = map(self._columns, range(len(self.manifest.shards)))
        return next(in_batches(shards, min(rows, len(self)), self.prompts, self.metadata))

    def load(self) -> LoggedDataset:
        """Return all rows as recorded; raises as :meth:`head`."""
        return self.head(max(1, len(self)))

    def split(self, fraction: float, *, seed: int) -> tuple[LogStream, LogStream]:
        """Return two streams: a random `fraction` of the rows of each shard, the same in every pass, and the others.

        Raises:
            ConfigError: `fraction` is outside [0, 1].
        """
        check_number("fraction", fraction, 0)
        if fraction > 1:
            raise ConfigError(f"fraction: expected a share in [0, 1], got {fraction}")
        kept, rest = (replace(self, _parts=(*self._parts, _Part(fraction, seed, part))) for part in (False, True))
        return kept, rest

    def _rows(self, rows: int) -> int:
        for part in self._parts:
            rows = part.count(rows)
        return rows

    def _columns(self, number: int) -> Mapping[str, Array]:
        shard: Shard = self.manifest.shards[number]
        columns = read_shard(self.path, shard, self.manifest)
        index: IntArray = np.arange(shard.rows)
        for depth, part in enumerate(self._parts):
            index = part.of(index, depth, number)
        return {name: np.array(values) if not self._parts else values[index] for name, values in columns.items()}
