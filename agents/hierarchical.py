"""A softmax over prompts in two levels, both neural, whose step costs about √A.

    π(a | x, q) = π(g(a) | x, q) · π(a | x, q, g(a))
    π(g | x, q) ∝ exp(z₁(x, q) · φ̄_g)        π(a | x, q, g) ∝ exp(z₂(x, q) · φ_a),  a in g

Prompts are arranged in groups of equal size and similar embeddings; φ are their embeddings, standardised, φ̄_g the mean
of a group's. A perceptron gives z₁ and z₂, so that it does not grow with the number of prompts, and what it learns of a
prompt holds for similar ones. Two levels are those of Morin and Bengio (AISTATS 2005), with log-bilinear scores as of
Mnih and Hinton (NeurIPS 2008).

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``n`` rounds, ``A`` prompts, ``G`` groups, ``M`` members of a group,
``k`` dimensions of φ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from agents.gradients import ActionDistribution
from agents.networks import MLP
from agents.policies import NeuralPolicy, softmax
from agents.records import Record, recorded
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.sampling import inverse_cdf, pick, row_parts
from offprompts_env.types import Contexts, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class PromptTree:
    """Prompts, arranged in groups.

    Attributes:
        features: φ, (A, k) float32.
        order: the prompts, those of a group next to each other, (A,) int64.
        n_groups: ``G``; sizes differ by at most one.
    """

    features: FloatArray
    order: IntArray
    n_groups: int

    @classmethod
    def arrange(cls, embeddings: FloatArray, n_groups: int | None = None) -> PromptTree:
        """Arrange prompts by their `embeddings` (A, k): halve along the widest dimension until there are G groups.

        Args:
            embeddings: one a prompt.
            n_groups: G, at most A; None is √A.
        """
        n_prompts = len(embeddings)
        groups = min(n_prompts, round(n_prompts**0.5) if n_groups is None else n_groups)
        spread = embeddings.std(axis=0)
        features = (embeddings - embeddings.mean(axis=0)) / np.where(spread > 0, spread, 1)
        ends = np.cumsum([len(part) for part in np.array_split(np.arange(n_prompts), groups)])

        def sort(prompts: IntArray, first: int, last: int) -> list[IntArray]:
            if last - first == 1:
                return [np.sort(prompts)]
            middle = (first + last) // 2
            widest = int(np.argmax(np.var(features[prompts], axis=0)))
            ranked = prompts[np.argsort(features[prompts, widest], kind="stable")]
            cut = ends[middle - 1] - (ends[first - 1] if first else 0)
            return sort(ranked[:cut], first, middle) + sort(ranked[cut:], middle, last)

        order = np.concatenate(sort(np.arange(n_prompts), 0, groups))
        return cls(features.astype(np.float32), order, groups)

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.order)

    @cached_property
    def members(self) -> IntArray:
        """The prompts of each group, (G, M); −1 where a group has one fewer."""
        parts = np.array_split(self.order, self.n_groups)
        found = np.full((self.n_groups, len(parts[0])), -1, dtype=np.int64)
        for group, part in enumerate(parts):
            found[group, : len(part)] = part
        return found

    @cached_property
    def place(self) -> tuple[IntArray, IntArray]:
        """Group of each prompt, and its position there, (A,) each."""
        group, position = np.empty_like(self.order), np.empty_like(self.order)
        rows, columns = np.nonzero(self.members >= 0)
        prompts = self.members[rows, columns]
        group[prompts], position[prompts] = rows, columns
        return group, position

    @cached_property
    def centres(self) -> FloatArray:
        """Mean features of each group, (G, k)."""
        starts = np.cumsum([0, *(self.members >= 0).sum(axis=1)[:-1]])
        sums = np.add.reduceat(self.features[self.order], starts, axis=0, dtype=np.float64)
        centres: FloatArray = (sums / (self.members >= 0).sum(axis=1)[:, None]).astype(np.float32)
        return centres


class TreeHead:
    """What makes distributions of the outputs ``[z₁, z₂]`` of W networks.

    Attributes:
        trees: one a world.
        n_outputs: ``2 k``.
        width: numbers a round that a distribution holds at once.
    """

    def __init__(self, trees: Sequence[PromptTree]) -> None:
        self.trees = tuple(trees)
        groups, members = trees[0].members.shape
        k = trees[0].features.shape[1]
        self.n_outputs, self.width = 2 * k, groups + members * k
        self.centres = torch.from_numpy(np.stack([tree.centres for tree in trees]))
        self.members = torch.from_numpy(np.stack([tree.members for tree in trees]))
        self.group, self.position = (
            torch.from_numpy(np.stack([tree.place[level] for tree in trees])) for level in range(2)
        )
        # In the order of the groups, so that the features of a group are read in one go.
        padded = [tree.features[np.maximum(tree.members, 0)] for tree in trees]
        self.features = torch.from_numpy(np.stack(padded))

    def __call__(self, outputs: Tensor) -> ActionDistribution:
        """Return the policies' distributions for `outputs` (W, B, 2 k)."""
        return TreeDistribution(outputs, self)

    def policies(self, networks: Sequence[MLP], catalogues: Sequence[str]) -> list[NeuralPolicy]:
        """Return the policies of W trained networks."""
        parts = zip(networks, catalogues, self.trees, strict=True)
        return [HierarchicalPolicy(network, catalogue, tree=tree) for network, catalogue, tree in parts]


class TreeDistribution(ActionDistribution):
    """``π(· | x, q)`` of a batch, of which only what is asked for is worked out."""

    def __init__(self, outputs: Tensor, head: TreeHead) -> None:
        self._head = head
        self._of_groups, self._of_members = outputs.chunk(2, dim=-1)
        self._group_logits = self._of_groups @ head.centres.mT
        self._worlds = torch.arange(len(outputs))[:, None]

    def __getattr__(self, name: str) -> Tensor:
        if name in ("logits", "pmf"):
            raise ConfigError(
                "this method needs the probabilities of all prompts in each step, which a policy in two levels avoids; "
                "learn with tree=None"
            )
        raise AttributeError(name)

    def _member_logits(self, groups: Tensor) -> Tensor:
        """Return the logits within `groups` (W, B), −∞ where there is no member, (W, B, M)."""
        logits = (self._head.features[self._worlds, groups] @ self._of_members[..., None])[..., 0]
        return logits.masked_fill(self._head.members[self._worlds, groups] < 0, -torch.inf)

    def sample(self, uniforms: Tensor) -> Tensor:
        """Return prompts drawn by inversion, in the order of the groups, (W, B) int64."""
        with torch.no_grad():
            # What is left of a uniform after the group is chosen chooses the member: 24 bits are enough for both.
            group, left = _invert(self._group_logits, uniforms.double())
            member, _ = _invert(self._member_logits(group), left)
            return self._head.members[self._worlds, group, member]

    def probability(self, actions: Tensor) -> Tensor:
        """Return ``π(a)``, without gradient, (W, B)."""
        with torch.no_grad():
            return self.log_probability(actions).exp()

    def log_probability(self, actions: Tensor) -> Tensor:
        """Return ``log π(a)``, differentiable in the outputs, (W, B)."""
        group, position = self._head.group[self._worlds, actions], self._head.position[self._worlds, actions]
        of_group = torch.log_softmax(self._group_logits, -1).gather(-1, group[..., None])
        of_member = torch.log_softmax(self._member_logits(group), -1).gather(-1, position[..., None])
        return (of_group + of_member)[..., 0]


def _invert(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index whose cumulative probability exceeds the uniform, and where in its share that lies."""
    # Rounded to float32 first: what has no probability there is never drawn.
    pmf = torch.softmax(logits, -1).double()
    cumulative = pmf.cumsum(-1)
    # Scaled by the last sum, and below it: rounding must not carry a point past the last positive probability.
    total = cumulative[..., -1:]
    target = torch.minimum(uniforms[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    own = pmf.gather(-1, index)
    share = (target - cumulative.gather(-1, index) + own) / own
    return index[..., 0], share[..., 0].clamp(0, 1)


@dataclass(frozen=True)
class TreeSoftmax:
    """A policy in two levels in place of one softmax over all prompts: for catalogues of ten thousand and more.

    A step of a learner that samples prompts costs about √A, and the network does not grow with A. It knows a prompt by
    its embedding alone: prompts of the same embedding are chosen alike.

    Attributes:
        n_groups: G; None is √A.
    """

    n_groups: int | None = None

    def __post_init__(self) -> None:
        if self.n_groups is not None:
            check_integer("n_groups", self.n_groups, 1)

    def head(self, embeddings: Sequence[FloatArray]) -> TreeHead:
        """Return the head for prompts with `embeddings` (A, k), one matrix a world."""
        return TreeHead([PromptTree.arrange(own, self.n_groups) for own in embeddings])


@recorded("policy")
@dataclass(frozen=True, eq=False)
class HierarchicalPolicy(NeuralPolicy):
    """A policy in two levels; see :mod:`agents.hierarchical`.

    Attributes:
        network: (d_x + d_q) → hidden → 2 k.
        catalogue: fingerprint of the prompts, where they are known.
        tree: the prompts.
    """

    tree: PromptTree = field(kw_only=True)

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.tree.n_prompts

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        of_groups, of_members = self._levels(contexts)
        groups, members = self.tree.members.shape
        logits = np.full((len(contexts), groups * members), -np.inf, dtype=np.float32)
        filled = (self.tree.members >= 0).ravel()
        logits[:, filled] = of_members @ self.tree.features[self.tree.order].T
        within = softmax(logits.reshape(-1, groups, members))
        within *= softmax(of_groups @ self.tree.centres.T)[..., None]
        found = np.empty((len(contexts), self.n_prompts), dtype=np.float32)
        found[:, self.tree.order] = within.reshape(len(contexts), -1)[:, filled]
        return found

    def logits(self, contexts: Contexts) -> FloatArray:
        """Return log-probabilities, (n, A)."""
        return np.log(np.maximum(self.probabilities(contexts), np.finfo(np.float32).tiny))

    def sample(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Draw prompts at the cost of the groups and of the members of one."""
        uniforms, actions = rng.random((2, len(contexts))), np.empty(len(contexts), dtype=np.int64)
        propensities = np.empty(len(contexts))
        for rows in self._parts(len(contexts)):
            of_groups, of_members = self._levels(contexts.take(rows))
            pmf = softmax(of_groups @ self.tree.centres.T)
            group = inverse_cdf(pmf, uniforms[0, rows])
            within = self._within(of_members, group)
            position = inverse_cdf(within, uniforms[1, rows])
            actions[rows] = self.tree.members[group, position]
            propensities[rows] = pick(pmf, group) * pick(within, position)
        return actions, propensities

    def chosen(self, contexts: Contexts, actions: IntArray) -> FloatArray:
        """Return ``π(a_i | x_i, q_i)`` of `actions`, at the cost of :meth:`sample`, (n,)."""
        found = np.empty(len(contexts))
        for rows in self._parts(len(contexts)):
            of_groups, of_members = self._levels(contexts.take(rows))
            group, position = (level[actions[rows]] for level in self.tree.place)
            within = self._within(of_members, group)
            found[rows] = pick(softmax(of_groups @ self.tree.centres.T), group) * pick(within, position)
        return found

    def _levels(self, contexts: Contexts) -> tuple[FloatArray, FloatArray]:
        outputs = super().logits(contexts)
        of_groups, of_members = np.split(outputs, 2, axis=1)
        return of_groups, of_members

    def _within(self, of_members: FloatArray, group: IntArray) -> FloatArray:
        """Return the pmf within each round's group, (n, M)."""
        members = self.tree.members[group]
        logits = np.einsum("nk,nmk->nm", of_members, self.tree.features[np.maximum(members, 0)])
        return softmax(np.where(members < 0, -np.inf, logits))

    def _parts(self, n: int) -> list[slice]:
        groups, members = self.tree.members.shape
        return list(row_parts(n, groups + members * self.tree.features.shape[1]))

    def to_record(self) -> Record:
        """Return what it is made of."""
        tensors = {"features": self.tree.features, "order": self.tree.order, **self.network.tensors("network.")}
        return Record("HierarchicalPolicy", {"catalogue": self.catalogue, "n_groups": self.tree.n_groups}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> HierarchicalPolicy:
        """Inverse of :meth:`to_record`."""
        settings, tensors = dict(record.settings), record.tensors
        tree = PromptTree(tensors["features"], tensors["order"], settings.pop("n_groups"))
        return cls(MLP.from_tensors(tensors, "network."), **settings, tree=tree)
