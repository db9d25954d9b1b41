"""Policy Convolution: importance sampling between policies that are smoothed over neighbouring prompts.

Source: Sachdeva, Wang, Liang, Kallus, McAuley, WWW 2024 (arXiv 2310.15433). Neighbourhoods are kept as k places a
prompt, never as a matrix of all pairs.

Symbols: ``A`` prompts, ``k`` places of a neighbourhood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.feeds import Batch
from agents.gradients import ActionDistribution
from agents.learners.base import Objective, OfflinePolicyGradient
from agents.learners.cloning import BehaviorCloning
from agents.training import StackedLogs
from agents.worlds import Worlds
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import PropensityError
from offprompts_env.sampling import pmf_by_parts, row_parts
from offprompts_env.types import FloatArray, IntArray, LoggedDataset, Policy


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The neighbourhood of each prompt.

    Attributes:
        index: prompts near it, itself among them, (A, k) int64.
        share: what each counts, rows sum to 1, (A, k) float32; 0 for a place that is not used.
    """

    index: IntArray
    share: FloatArray


class Neighbourhood(Protocol):
    """What says which prompts are alike."""

    def of(self, embeddings: FloatArray) -> Neighbours:
        """Return the neighbourhoods of prompts with these embeddings (A, d_e)."""
        ...


def nearest(embeddings: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Return the k nearest prompts of each, itself first, and their squared distances, (A, k) each; k at most A."""
    places = min(k, len(embeddings))
    points = embeddings.astype(np.float64)
    norms = np.square(points).sum(axis=1)
    index = np.empty((len(points), places), dtype=np.int64)
    squared = np.empty((len(points), places))
    for rows in row_parts(len(points), len(points)):
        distance = norms[rows, None] + norms - 2 * points[rows] @ points.T
        # Rounding may put a copy of a prompt before the prompt itself.
        distance[np.arange(len(distance)), np.arange(rows.start, rows.stop)] = -1.0
        found = np.argpartition(distance, places - 1, axis=1)[:, :places] if places < len(points) else None
        near = np.broadcast_to(np.arange(places), distance.shape) if found is None else np.sort(found, axis=1)
        order = np.argsort(np.take_along_axis(distance, near, axis=1), axis=1, kind="stable")
        index[rows] = np.take_along_axis(near, order, axis=1)
        squared[rows] = np.take_along_axis(distance, index[rows], axis=1)
    return index, np.maximum(squared, 0.0)


def _shared(index: IntArray, weight: FloatArray) -> Neighbours:
    return Neighbours(index, (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32))


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """The k nearest prompts, all alike.

    Attributes:
        k: with the prompt itself; 1 smoothes nothing.
    """

    k: int = 10

    def __post_init__(self) -> None:
        check_integer("k", self.k, 1)

    def of(self, embeddings: FloatArray) -> Neighbours:
        """Return the neighbourhoods."""
        index, squared = nearest(embeddings, self.k)
        return _shared(index, np.ones_like(squared))


@dataclass(frozen=True, slots=True)
class BallNeighbours:
    """All prompts within a radius, alike.

    Attributes:
        radius: in the space of prompt embeddings.
        k: at most so many, the nearest.
    """

    radius: float = 1.0
    k: int = 50

    def __post_init__(self) -> None:
        check_number("radius", self.radius, 0)
        check_integer("k", self.k, 1)

    def of(self, embeddings: FloatArray) -> Neighbours:
        """Return the neighbourhoods."""
        index, squared = nearest(embeddings, self.k)
        return _shared(index, (squared <= self.radius**2).astype(np.float64))


@dataclass(frozen=True, slots=True)
class KernelNeighbours:
    """Nearer prompts count more: ``share ∝ exp(−‖e − e'‖² / 2τ²)`` over the k nearest.

    Attributes:
        tau: bandwidth in the space of prompt embeddings.
        k: at most so many, the nearest.
    """

    tau: float = 1.0
    k: int = 50

    def __post_init__(self) -> None:
        check_number("tau", self.tau, 0, strict=True)
        check_integer("k", self.k, 1)

    def of(self, embeddings: FloatArray) -> Neighbours:
        """Return the neighbourhoods."""
        index, squared = nearest(embeddings, self.k)
        return _shared(index, np.exp(-0.5 * squared / self.tau**2))


@dataclass(frozen=True, slots=True)
class TreeNeighbours:
    """All prompts of a leaf of a tree, alike: a cut at the median along the main axis, until leaves are small.

    Attributes:
        k: prompts of a leaf at most.
    """

    k: int = 10

    def __post_init__(self) -> None:
        check_integer("k", self.k, 1)

    def of(self, embeddings: FloatArray) -> Neighbours:
        """Return the neighbourhoods."""
        points = embeddings.astype(np.float64)
        pending, leaves = [np.arange(len(points))], []
        while pending:
            members = pending.pop()
            if len(members) <= self.k:
                leaves.append(members)
                continue
            centred = points[members] - points[members].mean(axis=0)
            axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
            order = members[np.argsort(centred @ axis, kind="stable")]
            pending += [np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])]
        width = max(map(len, leaves))
        index = np.repeat(np.arange(len(points))[:, None], width, axis=1)
        used = np.zeros((len(points), width))
        for members in leaves:
            index[members, : len(members)] = members
            used[members, : len(members)] = 1
        return _shared(index, used)


def convolved_propensities(policy: Policy, log: LoggedDataset, near: Neighbours) -> FloatArray:
    """Return ``π̃₀(a_i | x_i, q_i) = Σ_j share_j π₀(neighbour_j | x_i, q_i)`` of the logged prompts, (n,) float64.

    Raises:
        PropensityError: `policy` never chooses a logged prompt nor any of its neighbours.
    """
    found = np.empty(len(log))
    for rows, _, pmf in pmf_by_parts(policy, log.contexts):
        actions = log.action[rows]
        own = np.take_along_axis(pmf, near.index[actions], axis=1) * near.share[actions]
        found[rows] = own.sum(axis=1, dtype=np.float64) / pmf.sum(axis=1, dtype=np.float64)
    if not (found > 0).all():
        row = int(np.argmin(found > 0))
        raise PropensityError(
            f"logging_policy: gives the logged prompt {log.action[row]} of row {row} and its neighbours probability "
            f"{found[row]}, so it did not record this log; pass the policy that did"
        )
    return found


@dataclass(frozen=True)
class PolicyConvolutionPG(OfflinePolicyGradient):
    """Policy gradient of Policy Convolution, :func:`agents.gradients.convolved_importance_sampling`.

    Needs the logging policy as a whole, not only the recorded propensities; where it is not given it is cloned from the
    log.

    Attributes:
        neighbourhood: which prompts are alike.
        clip: upper bound of the weight.
        cloning: how a missing logging policy is estimated.
    """

    neighbourhood: Neighbourhood = field(default_factory=NearestNeighbours)
    clip: float = 200.0
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    label: ClassVar[str] = "policy convolution PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        stack = worlds.stack
        policies = worlds.logging_policies_or_clones("agents.PolicyConvolutionPG", self.cloning)
        near = [self.neighbourhood.of(log.prompts.embeddings) for log in stack.logs]
        index, share = _stacked(near)
        columns = [
            convolved_propensities(policy, log, own)
            for policy, log, own in zip(policies, stack.logs, near, strict=True)
        ]
        propensity = StackedLogs.join(columns).to(torch.float32)

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            places = stack.prompt_rows(stack.action[batch.rows])
            return gradients.convolved_importance_sampling(
                policy, index[places], share[places], propensity[batch.rows], stack.reward[batch.rows], self.clip
            )

        return Objective.of(self._rounds(worlds), loss)


def _stacked(near: Sequence[Neighbours]) -> tuple[Tensor, Tensor]:
    """Return index and share (W · A, k) of all worlds, neighbourhoods padded to the widest."""
    width = max(own.index.shape[1] for own in near)
    pads = [((0, 0), (0, width - own.index.shape[1])) for own in near]
    index = StackedLogs.join([np.pad(own.index, pad) for own, pad in zip(near, pads, strict=True)])
    return index, StackedLogs.join([np.pad(own.share, pad) for own, pad in zip(near, pads, strict=True)])
