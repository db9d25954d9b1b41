"""Policies that choose in two stages: a cluster of prompts, then a prompt of the cluster.

    π(a | x, q) = π(c(a) | x, q) · π(a | x, q, c(a))

The second stage reads a reward model within the cluster, so that drawing a prompt scores clusters and the members of
one of them, never all prompts. Symbols: ``n`` rounds, ``A`` prompts, ``C`` clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from agents.clustering import PromptClusters
from agents.policies import Saves, greedy, softmax
from agents.records import Record, Recordable, recorded, revive
from agents.rewards import PromptRewards
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.sampling import check_probabilities, inverse_cdf, pick, row_parts, sample_actions
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy


@dataclass(frozen=True, eq=False)
class SecondStage:
    """``π(a | x, q, c)`` from a reward model: the best prompt of a cluster, or ``∝ exp(β q̂(x, q, a))`` within it.

    Attributes:
        clusters: the partition.
        rewards: q̂.
        beta: β, inverse temperature; None is greedy.

    Raises:
        DimensionError: clusters and rewards are of different prompts.
    """

    clusters: PromptClusters
    rewards: PromptRewards
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_number("beta", self.beta)
        if self.clusters.n_prompts != self.rewards.n_prompts:
            raise DimensionError(
                f"clusters: expected labels of the reward model's {self.rewards.n_prompts} prompts, "
                f"got {self.clusters.n_prompts}"
            )

    def within(self, contexts: Contexts, cluster: int) -> Iterator[tuple[slice, FloatArray, FloatArray]]:
        """Yield rows of `contexts`, with q̂ and the pmf of the members of `cluster` in them, (m, members) each."""
        members = self.clusters.members[cluster]
        rewards = self.rewards.among(members)
        for rows in row_parts(len(contexts), len(members)):
            predicted = rewards(contexts.take(rows))
            yield rows, predicted, greedy(predicted) if self.beta is None else softmax(self.beta * predicted)

    def values(self, contexts: Contexts) -> FloatArray:
        """Return ``Σ_a π(a | x, q, c) q̂(x, q, a)`` for every cluster, (n, C)."""
        found = np.empty((len(contexts), self.clusters.n_clusters), dtype=np.float32)
        for cluster in range(self.clusters.n_clusters):
            for rows, predicted, pmf in self.within(contexts, cluster):
                found[rows, cluster] = (predicted * pmf).sum(axis=1)
        return found


@recorded("policy")
@dataclass(frozen=True, eq=False)
class TwoStagePolicy(Saves):
    """``π(a | x, q) = π(c(a) | x, q) · π(a | x, q, c(a))``.

    Attributes:
        first: over the clusters.
        second: within a cluster.

    Raises:
        DimensionError: the first stage is over another number of clusters.
    """

    first: Policy
    second: SecondStage

    def __post_init__(self) -> None:
        if self.first.n_prompts != self.second.clusters.n_clusters:
            raise DimensionError(
                f"first: expected a policy over {self.second.clusters.n_clusters} clusters, "
                f"got one over {self.first.n_prompts}"
            )

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.second.clusters.n_prompts

    @property
    def catalogue(self) -> str | None:
        """Fingerprint of the prompts, where they are known."""
        return self.second.rewards.catalogue or self.second.clusters.catalogue

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        chances = check_probabilities(
            self.first.probabilities(contexts), len(contexts), self.second.clusters.n_clusters
        )
        found = np.empty((len(contexts), self.n_prompts), dtype=np.float32)
        for cluster, members in enumerate(self.second.clusters.members):
            for rows, _, pmf in self.second.within(contexts, cluster):
                found[rows, members] = chances[rows, cluster, None] * pmf
        return found

    def sample(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Draw prompts at the cost of the clusters and of the members of one cluster a round."""
        clusters, propensities = sample_actions(self.first, contexts, rng)
        uniforms, actions = rng.random(len(contexts)), np.empty(len(contexts), dtype=np.int64)
        for cluster, members in enumerate(self.second.clusters.members):
            chosen = np.flatnonzero(clusters == cluster)
            for part, _, pmf in self.second.within(contexts.take(chosen), cluster):
                rows = chosen[part]
                index = inverse_cdf(pmf, uniforms[rows])
                actions[rows] = members[index]
                propensities[rows] *= pick(pmf, index)
        return actions, propensities

    def to_record(self) -> Record:
        """Return what it is made of.

        Raises:
            ConfigError: the first stage cannot be written.
        """
        if not isinstance(self.first, Recordable):
            raise ConfigError(
                f"first: expected a policy of this package, got {type(self.first).__name__}, which has no to_record(); "
                "clone it with agents.BehaviorCloning to get one that saves"
            )
        parts = {
            "first": self.first.to_record(),
            "clusters": self.second.clusters.to_record(),
            "rewards": self.second.rewards.to_record(),
        }
        return Record.of_parts("TwoStagePolicy", {"beta": self.second.beta}, parts)

    @classmethod
    def from_record(cls, record: Record) -> TwoStagePolicy:
        """Inverse of :meth:`to_record`."""
        clusters: PromptClusters = revive(record.part("clusters"), "clusters")
        rewards: PromptRewards = revive(record.part("rewards"), "reward model")
        second = SecondStage(clusters, rewards, record.settings["beta"])
        return cls(revive(record.part("first"), "policy"), second)
