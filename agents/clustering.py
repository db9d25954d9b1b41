"""Clusters of prompts, by k-means on their embeddings or on what the generator makes of them.

Symbols: ``A`` prompts, ``C`` clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from agents.kernels import generate
from agents.records import Record, recorded
from agents.training import check_one_each, check_seeds, world_streams
from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, DimensionError, missing_dependency
from offprompts_env.rng import integer_seed
from offprompts_env.sampling import check_catalogue
from offprompts_env.simulator import GaussianOutputs, OutputModel
from offprompts_env.types import FloatArray, IntArray, LoggedDataset


@recorded("clusters")
@dataclass(frozen=True, eq=False)
class PromptClusters:
    """A partition of the prompts.

    Attributes:
        labels: cluster of each prompt, (A,) int64; none of the C clusters is empty.
        centres: (C, d) float32.
        catalogue: fingerprint of the prompts, where they are known.

    Raises:
        DataError: labels that are not a partition into as many clusters as there are centres, or centres with NaN.
    """

    labels: IntArray
    centres: FloatArray
    catalogue: str | None = None

    def __post_init__(self) -> None:
        labels, centres = np.asarray(self.labels), np.asarray(self.centres, dtype=np.float32)
        if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels: expected one cluster index a prompt, got shape {labels.shape} of type {labels.dtype}"
            )
        if centres.ndim != 2 or not np.isfinite(centres).all():
            raise DataError(f"centres: expected finite numbers (C, d), got shape {centres.shape}; check the embeddings")
        found = np.unique(labels)
        if not np.array_equal(found, np.arange(len(centres))):
            raise DataError(
                f"labels: expected each of 0 to {len(centres) - 1}, one a centre, got {found.tolist()[:20]}; number "
                "the clusters without gaps and give a centre for each"
            )
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "centres", centres)

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.labels)

    @property
    def n_clusters(self) -> int:
        """``C``."""
        return len(self.centres)

    @cached_property
    def members(self) -> tuple[IntArray, ...]:
        """The prompts of each cluster, ascending."""
        order = np.argsort(self.labels, kind="stable")
        return tuple(np.split(order, np.cumsum(np.bincount(self.labels))[:-1]))

    def marginal(self, pmf: FloatArray) -> FloatArray:
        """Return ``π(c) = Σ_{a ∈ c} π(a)`` for a `pmf` (n, A), (n, C)."""
        return np.stack([pmf[:, members].sum(axis=1) for members in self.members], axis=1)

    def to_record(self) -> Record:
        """Return what it is made of."""
        tensors = {"labels": self.labels, "centres": np.ascontiguousarray(self.centres)}
        return Record("PromptClusters", {"catalogue": self.catalogue}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> PromptClusters:
        """Inverse of :meth:`to_record`."""
        return cls(record.tensors["labels"], record.tensors["centres"], **record.settings)


def kmeans(points: FloatArray, n_clusters: int, seed: int, catalogue: str | None = None) -> PromptClusters:
    """Cluster `points` (A, d) by k-means (Lloyd's algorithm from one k-means++ start, scikit-learn).

    Args:
        points: one a prompt.
        n_clusters: C; where there are fewer distinct points, each of them is a cluster.
        seed: of the stream ``"k-means"``.
        catalogue: fingerprint of the prompts, where they are known.

    Raises:
        DataError: points that are not finite.
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise missing_dependency("scikit-learn", "clustering", "clustering of prompts") from error
    check_integer("n_clusters", n_clusters, 1)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise DataError(f"points: expected finite numbers, one row a prompt, got shape {points.shape}")
    distinct = len(np.unique(points, axis=0))
    # scikit-learn takes seeds of 32 bits.
    state = integer_seed(seed, "k-means") % 2**32
    found = KMeans(min(n_clusters, distinct), n_init=1, random_state=state).fit(points.astype(np.float64))
    return PromptClusters(found.labels_, found.cluster_centers_, catalogue)


class PromptClustering(Protocol):
    """What gives a partition of the prompts for each log: a method, or partitions that are already known."""

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[PromptClusters]:
        """Return one partition a log."""
        ...


@dataclass(frozen=True)
class EmbeddingClusters:
    """k-means on the embeddings of the prompts.

    Attributes:
        n_clusters: C, at most.
    """

    n_clusters: int = 10

    def __post_init__(self) -> None:
        check_integer("n_clusters", self.n_clusters, 1)

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[PromptClusters]:
        """Return one partition a log."""
        return [
            kmeans(log.prompts.embeddings, self.n_clusters, seed, log.prompts.fingerprint)
            for log, seed in zip(logs, check_seeds(logs, seeds), strict=True)
        ]


@dataclass(frozen=True)
class OutputClusters:
    """k-means on the mean output of each prompt: prompts that read alike, whatever their embeddings are.

    The mean is known where the generator is Gaussian. Another generator answers every prompt on the same `n_samples`
    logged queries. Without a generator it is the mean of the logged outputs, whose queries differ between prompts;
    prompts that were never logged then join the cluster of the logged prompt with the nearest embedding.

    Attributes:
        n_clusters: C, at most.
        n_samples: sentences a prompt that a generator is asked for.
    """

    n_clusters: int = 10
    n_samples: int = 16

    def __post_init__(self) -> None:
        check_integer("n_clusters", self.n_clusters, 1)
        check_integer("n_samples", self.n_samples, 1)

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[PromptClusters]:
        """Return one partition a log.

        Raises:
            DataError: no generator, and a log without outputs.
        """
        chosen = check_seeds(logs, seeds)
        if generators is None:
            return [self._of_logged(log, seed) for log, seed in zip(logs, chosen, strict=True)]
        return [
            kmeans(self._means(log, generator, seed), self.n_clusters, seed, log.prompts.fingerprint)
            for log, generator, seed in zip(logs, generators, chosen, strict=True)
        ]

    def _means(self, log: LoggedDataset, generator: OutputModel, seed: int) -> FloatArray:
        """Return the mean output of each prompt up to what all prompts share, (A, d_o)."""
        if isinstance(generator, GaussianOutputs):
            return generator.effects
        rows_rng, outputs_rng = (world_streams([seed], "output clusters", name)[0] for name in ("rounds", "outputs"))
        total = np.zeros((log.n_prompts, generator.output_dim))
        prompts = np.arange(log.n_prompts)
        for row in rows_rng.integers(len(log), size=self.n_samples):
            total += generate(generator, log.contexts, np.full(log.n_prompts, row), prompts, outputs_rng)
        return total / self.n_samples

    def _of_logged(self, log: LoggedDataset, seed: int) -> PromptClusters:
        if log.output.shape[1] == 0:
            raise DataError(
                "agents.OutputClusters: the log has no outputs; pass generator=, or use agents.EmbeddingClusters"
            )
        counts = np.bincount(log.action, minlength=log.n_prompts)
        total = np.zeros((log.n_prompts, log.output.shape[1]))
        np.add.at(total, log.action, log.output)
        seen = np.flatnonzero(counts)
        found = kmeans(total[seen] / counts[seen, None], self.n_clusters, seed)
        labels = np.empty(log.n_prompts, dtype=np.int64)
        labels[seen] = found.labels
        for prompt in np.flatnonzero(counts == 0):
            gaps = np.square(log.prompts.embeddings[seen] - log.prompts.embeddings[prompt]).sum(axis=1)
            labels[prompt] = found.labels[gaps.argmin()]
        return PromptClusters(labels, found.centres, log.prompts.fingerprint)


@dataclass(frozen=True)
class KnownClusters:
    """Partitions that are already known, in place of a way to find them.

    Attributes:
        partitions: one a log, in the order of the logs.
    """

    partitions: tuple[PromptClusters, ...]

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[PromptClusters]:
        """Return the partitions.

        Raises:
            ConfigError: not as many partitions as logs.
            DimensionError: a partition of other prompts than its log's.
        """
        check_one_each("partitions", self.partitions, logs)
        for clusters, log in zip(self.partitions, logs, strict=True):
            if clusters.n_prompts != log.n_prompts:
                raise DimensionError(f"clusters: expected labels of {log.n_prompts} prompts, got {clusters.n_prompts}")
            check_catalogue("clusters", clusters.catalogue, log.prompts)
        return list(self.partitions)
