"""Policies out: one file that serves a policy with nothing but torch.

    agents.export_policy(policy, "policy.pt2", contexts=log.contexts, prompts=log.prompts)

and elsewhere, without this package:

    serve = torch.export.load("policy.pt2").module()
    probabilities = serve(context, query)          # (n, d_x), (n, d_q) float32 -> (n, A), for any n

The file is a ``torch.export`` program: a graph of tensor operations with its weights as raw bytes, and a JSON
description that :func:`describe_export` reads without torch. TorchScript is not offered: torch calls it deprecated and
warns to switch to ``torch.export``.

What is written holds no pickle. ``torch.export.load``, however, also reads archives that do, so load files from people
you trust, as torch itself says. This module only writes.

Symbols: ``n`` rounds, ``A`` prompts, ``m`` sentences a round, ``R`` members, ``d_c = d_x + d_q``.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from agents.hierarchical import HierarchicalPolicy
from agents.networks import MLP
from agents.policies import (
    ConstantPolicy,
    EpsilonGreedyPolicy,
    NeuralPolicy,
    SoftmaxPolicy,
    TiltedPolicy,
    UniformPolicy,
)
from agents.rewards import PromptRewards
from agents.ridge import Polynomial
from agents.sentence_rewards import NetworkRewards, PolynomialRewards
from agents.sentences import AffineSentences, LearnedSentences, SentenceScores, WithPrompts
from agents.two_stage import TwoStagePolicy
from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, NumericalError, StorageError
from offprompts_env.manifest import write_atomic
from offprompts_env.recording import package_versions
from offprompts_env.sampling import check_policy, check_probabilities
from offprompts_env.types import Array, Contexts, Policy, PromptSet

FORMAT_VERSION = 1
_DESCRIPTION = "offprompts.json"
# Rounds on which a file is compared with its policy, and by how much probabilities may differ by rounding.
_CHECKED_ROUNDS, _TOLERANCE = 64, 1e-4
# Share of these rounds that may differ by more: where two scores are equal up to rounding, greedy may take the other.
_TIES = 0.05


class _Module(nn.Module):
    """A module whose arrays are buffers."""

    def keep(self, name: str, array: Array) -> None:
        """Keep a copy of `array` under `name`."""
        dtype = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32
        self.register_buffer(name, torch.from_numpy(np.array(array, dtype=dtype)))


class _Perceptron(_Module):
    """An :class:`agents.networks.MLP`."""

    def __init__(self, network: MLP) -> None:
        super().__init__()
        self._depth = len(network.layers)
        for index, layer in enumerate(network.layers):
            self.keep(f"weight{index}", layer[:-1])
            self.keep(f"bias{index}", layer[-1])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.upper(inputs @ self.get_buffer("weight0") + self.get_buffer("bias0"))

    def upper(self, hidden: Tensor) -> Tensor:
        """Return the outputs for what the first layer gives before its ReLU."""
        for index in range(1, self._depth):
            hidden = torch.relu(hidden) @ self.get_buffer(f"weight{index}") + self.get_buffer(f"bias{index}")
        return hidden

    def first(self, part: Tensor, rows: slice) -> Tensor:
        """Return what `part` of the inputs adds to the first layer; `rows` are its rows of the weights."""
        return part @ self.get_buffer("weight0")[rows]


# Scores: inputs [x, q] (n, d_c) -> (n, A)


class _PromptScores(_Module):
    """A :class:`agents.rewards.PromptRewards`."""

    def __init__(self, model: PromptRewards) -> None:
        super().__init__()
        self.network = _Perceptron(model.network)
        self.keep("embeddings", model.embeddings)

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings, d = self.get_buffer("embeddings"), inputs.shape[1]
        own = self.network.first(inputs, slice(0, d)) + self.network.get_buffer("bias0")
        prompts = self.network.first(embeddings, slice(d, None))
        return self.network.upper(own[:, None] + prompts)[..., 0]


class _SentenceScores(_Module):
    """A :class:`agents.sentences.SentenceScores`: mean minus pessimism times spread of the members at the means."""

    def __init__(self, model: SentenceScores, d_x: int) -> None:
        super().__init__()
        self.means = _means(model.sentences, d_x)
        self.members = _members(model.rewards, model.pessimism != 0)
        self._pessimism = model.pessimism

    def forward(self, inputs: Tensor) -> Tensor:
        values: Tensor = self.members(inputs, self.means(inputs))
        # Deviations from the first member, as agents.sentence_rewards.predict has them, and for its reason.
        deviations = values - values[:1]
        mean = deviations.mean(0)
        if not self._pessimism:
            return values[0] + mean
        variance = (deviations.square().mean(0) - mean.square()).clamp(min=0)
        return values[0] + mean - self._pessimism * variance.sqrt()


class _PolynomialMembers(_Module):
    """A :class:`agents.ridge.Polynomial`: contexts (n, d_c), sentences (n, m, d_o) -> members' values (R, n, m)."""

    def __init__(self, polynomial: Polynomial, spread: bool) -> None:
        super().__init__()
        for name in ("level", "context", "sentence", "cross", "square"):
            array = getattr(polynomial, name)
            # The mean of polynomials is the polynomial of mean coefficients.
            self.keep(name, array if spread else array.mean(axis=0, dtype=np.float64, keepdims=True))
        self._squared = bool(polynomial.square.any())

    def forward(self, context: Tensor, sentences: Tensor) -> Tensor:
        fixed = (context @ self.get_buffer("context").mT + self.get_buffer("level")).mT
        slope = self.get_buffer("sentence")[:, None] + context @ self.get_buffer("cross")
        values = (sentences @ slope[..., None])[..., 0] + fixed[..., None]
        if self._squared:
            values = values + ((sentences @ self.get_buffer("square")[:, None]) * sentences).sum(-1)
        return values


class _NetworkMembers(_Module):
    """The networks of :class:`agents.sentence_rewards.NetworkRewards`, shapes as for polynomials."""

    def __init__(self, networks: Sequence[MLP]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(_Perceptron(network) for network in networks)

    def forward(self, context: Tensor, sentences: Tensor) -> Tensor:
        found, d = [], context.shape[1]
        for network in cast("Sequence[_Perceptron]", self.networks):
            own = network.first(context, slice(0, d)) + network.get_buffer("bias0")
            found.append(network.upper(network.first(sentences, slice(d, None)) + own[:, None])[..., 0])
        return torch.stack(found)


def _members(model: object, spread: bool) -> nn.Module:
    """Return the members of a reward model of sentences; their mean alone may do, if their `spread` is not needed."""
    if isinstance(model, PolynomialRewards):
        return _PolynomialMembers(model.polynomial, spread)
    if isinstance(model, NetworkRewards):
        return _NetworkMembers(model.networks)
    raise _unknown(model)


# Means of sentences: inputs [x, q] (n, d_c) -> (n, A, d_o)


class _AffineMeans(_Module):
    """An :class:`agents.sentences.AffineSentences`."""

    def __init__(self, model: AffineSentences) -> None:
        super().__init__()
        self.keep("matrix", model.matrix)
        self.keep("effects", model.effects)

    def forward(self, inputs: Tensor) -> Tensor:
        matrix = self.get_buffer("matrix")
        return (inputs @ matrix[:-1] + matrix[-1])[:, None] + self.get_buffer("effects")


class _LearnedMeans(_Module):
    """An :class:`agents.sentences.LearnedSentences`; a known query is found by comparing with all of them."""

    def __init__(self, model: LearnedSentences, d_x: int) -> None:
        super().__init__()
        d_q, d_e, d_o = model.queries.shape[1], model.embeddings.shape[1], model.output_dim
        self._d_x, self._sizes, self._offsets = d_x, (d_e, d_o), len(model.queries) > 0
        first, second = np.triu_indices(d_e)
        own = np.concatenate([model.embeddings, model.embeddings[:, first] * model.embeddings[:, second]], axis=1)
        alone = np.concatenate([model.weights[d_q : d_q + d_e], model.weights[d_q + d_e + d_q * d_e :]])
        self.keep("fixed", own @ alone + model.offsets)
        self.keep("level", model.weights[:d_q])
        self.keep("cross", model.weights[d_q + d_e : d_q + d_e + d_q * d_e].reshape(d_q, d_e * d_o))
        self.keep("embeddings", model.embeddings)
        # torch.export.save fails on empty tensors.
        if self._offsets:
            self.keep("queries", model.queries)
            self.keep("query_offsets", model.query_offsets)

    def forward(self, inputs: Tensor) -> Tensor:
        query = inputs[:, self._d_x :]
        slopes = (query @ self.get_buffer("cross")).reshape(-1, *self._sizes)
        level = query @ self.get_buffer("level")
        if self._offsets:
            known = (query[:, None] == self.get_buffer("queries")).all(-1)
            level = level + known.to(level.dtype) @ self.get_buffer("query_offsets")
        return self.get_buffer("embeddings") @ slopes + self.get_buffer("fixed") + level[:, None]


class _MeansWithPrompts(_Module):
    """An :class:`agents.sentences.WithPrompts`."""

    def __init__(self, model: WithPrompts, d_x: int) -> None:
        super().__init__()
        self.means = _means(model.sentences, d_x)
        self.keep("embeddings", model.embeddings)

    def forward(self, inputs: Tensor) -> Tensor:
        means: Tensor = self.means(inputs)
        embeddings = self.get_buffer("embeddings")
        return torch.cat([means, embeddings.expand(means.shape[0], *embeddings.shape)], dim=2)


def _means(model: object, d_x: int) -> nn.Module:
    if isinstance(model, AffineSentences):
        return _AffineMeans(model)
    if isinstance(model, LearnedSentences):
        return _LearnedMeans(model, d_x)
    if isinstance(model, WithPrompts):
        return _MeansWithPrompts(model, d_x)
    raise _unknown(model)


def _scores(scores: object, d_x: int) -> nn.Module:
    if isinstance(scores, PromptRewards):
        return _PromptScores(scores)
    if isinstance(scores, SentenceScores):
        return _SentenceScores(scores, d_x)
    raise _unknown(scores)


# Policies: inputs [x, q] (n, d_c) -> (n, A)


def _greedy(scores: Tensor) -> Tensor:
    """Return 1 at the first largest score along the last axis; NaN where the best score is not finite.

    A graph cannot raise, so a row for which the policy would is a row that no one takes for probabilities.
    """
    best = scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, best, 1.0) + scores.amax(-1, keepdim=True) * 0


class _Fixed(_Module):
    """A pmf that does not look at the round."""

    def __init__(self, pmf: Array) -> None:
        super().__init__()
        self.keep("pmf", pmf)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.get_buffer("pmf").expand(inputs.shape[0], -1).clone()


class _Neural(_Module):
    def __init__(self, policy: NeuralPolicy) -> None:
        super().__init__()
        self.network = _Perceptron(policy.network)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.softmax(self.network(inputs), -1)


class _Softmax(_Module):
    def __init__(self, scores: nn.Module, beta: float) -> None:
        super().__init__()
        self.scores, self._beta = scores, beta

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.softmax(self._beta * self.scores(inputs), -1)


class _EpsilonGreedy(_Module):
    def __init__(self, scores: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.scores, self._epsilon = scores, epsilon

    def forward(self, inputs: Tensor) -> Tensor:
        best = _greedy(self.scores(inputs))
        return best * (1 - self._epsilon) + self._epsilon / best.shape[1]


class _Tilted(_Module):
    def __init__(self, policy: TiltedPolicy, d_x: int) -> None:
        super().__init__()
        self.scores, self.network, self._beta = _scores(policy.scores, d_x), _Perceptron(policy.network), policy.beta

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.softmax(self.network(inputs) + self._beta * self.scores(inputs), -1)


class _Groups(_Module):
    """Prompts in groups: from (n, A) to (n, G, M), what no prompt fills at −∞, and back."""

    def __init__(self, members: Sequence[Array]) -> None:
        super().__init__()
        width = max(map(len, members))
        prompts, absent = np.zeros((len(members), width), dtype=np.int64), np.zeros((len(members), width), np.float32)
        place = np.empty(sum(map(len, members)), dtype=np.int64)
        for group, own in enumerate(members):
            prompts[group, : len(own)] = own
            absent[group, len(own) :] = -np.inf
            place[own] = group * width + np.arange(len(own))
        self.keep("prompts", prompts)
        self.keep("absent", absent)
        self.keep("place", place)

    def forward(self, scores: Tensor) -> Tensor:
        return scores[:, self.get_buffer("prompts")] + self.get_buffer("absent")

    def back(self, values: Tensor) -> Tensor:
        return values.flatten(1)[:, self.get_buffer("place")]


class _TwoStage(_Module):
    def __init__(self, policy: TwoStagePolicy, d_x: int, d_q: int) -> None:
        super().__init__()
        self.first = _module(policy.first, d_x, d_q)
        self.scores = _scores(policy.second.rewards, d_x)
        self.groups = _Groups(policy.second.clusters.members)
        self._beta = policy.second.beta

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.scores(inputs)
        if self._beta is None:
            within = _greedy(self.groups(scores))
        else:
            within = torch.softmax(self.groups(self._beta * scores), -1)
        return self.groups.back(self.first(inputs)[:, :, None] * within)


class _Hierarchical(_Module):
    def __init__(self, policy: HierarchicalPolicy) -> None:
        super().__init__()
        self.network = _Perceptron(policy.network)
        self.keep("features", policy.tree.features)
        self.keep("centres", policy.tree.centres)
        self.groups = _Groups([own[own >= 0] for own in policy.tree.members])

    def forward(self, inputs: Tensor) -> Tensor:
        of_groups, of_members = self.network(inputs).chunk(2, dim=-1)
        within = torch.softmax(self.groups(of_members @ self.get_buffer("features").mT), -1)
        chances = torch.softmax(of_groups @ self.get_buffer("centres").mT, -1)
        return self.groups.back(chances[:, :, None] * within)


# Of exactly these classes: a subclass may choose in another way.
_BUILDERS: Mapping[type, Callable[[Any, int, int], nn.Module]] = {
    UniformPolicy: lambda policy, d_x, d_q: _Fixed(np.full(policy.n_prompts, 1 / policy.n_prompts)),
    ConstantPolicy: lambda policy, d_x, d_q: _Fixed(np.eye(1, policy.n_prompts, policy.action)[0]),
    NeuralPolicy: lambda policy, d_x, d_q: _Neural(policy),
    SoftmaxPolicy: lambda policy, d_x, d_q: _Softmax(_scores(policy.scores, d_x), policy.beta),
    EpsilonGreedyPolicy: lambda policy, d_x, d_q: _EpsilonGreedy(_scores(policy.scores, d_x), policy.epsilon),
    TiltedPolicy: lambda policy, d_x, d_q: _Tilted(policy, d_x),
    TwoStagePolicy: lambda policy, d_x, d_q: _TwoStage(policy, d_x, d_q),
    HierarchicalPolicy: lambda policy, d_x, d_q: _Hierarchical(policy),
}


def _module(policy: object, d_x: int, d_q: int) -> nn.Module:
    if type(policy) not in _BUILDERS:
        raise _unknown(policy)
    return _BUILDERS[type(policy)](policy, d_x, d_q)


def _unknown(found: object) -> ConfigError:
    return ConfigError(
        f"export_policy: expected one of {', '.join(sorted(kind.__name__ for kind in _BUILDERS))}, over networks or "
        f"polynomials that this package fitted, got {type(found).__name__}; clone the policy: "
        "agents.BehaviorCloning().fit(log) or agents.OnlineCloning gives a NeuralPolicy, which exports"
    )


class _Served(nn.Module):
    """What the file computes."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        # To the letter what is in the file: (n, d_x), (n, d_q) -> (n, A).
        found: Tensor = self.policy(torch.cat([context, query], dim=1))
        return found


def export_policy(policy: Policy, path: str | Path, *, contexts: Contexts, prompts: PromptSet | None = None) -> Path:
    """Write `policy` as a ``torch.export`` program that serves without this package; see :mod:`agents.export`.

    Before it is written, the program is compared with ``policy.probabilities`` on the first 64 of `contexts`. It gives
    a row of NaN where a greedy policy would raise, since a graph cannot. Policies over reward models hold n · A · h
    numbers at once, h the hidden units or the dimension of sentences, so ask for large catalogues in small batches.

    Args:
        policy: one of this package.
        path: of the file, which ends in ``.pt2``; its directory is made if need be.
        contexts: some rounds, such as ``log.contexts``: they tell d_x and d_q, which the program then expects.
        prompts: the catalogue; its texts go into the description, and the policy is checked against it.

    Returns:
        The path.

    Raises:
        ConfigError: a policy that is no composition of networks and tables, or another suffix.
        DimensionError: a policy over another catalogue, or over contexts of other dimensions.
        NumericalError: the program does not give what the policy gives.
        StorageError: the file cannot be written.
    """
    file = Path(path)
    if file.suffix != ".pt2":
        raise ConfigError(f"path: expected a file that ends in .pt2, got {file}")
    check_kind("contexts", contexts, Contexts, "of a log pass log.contexts")
    if len(contexts) == 0:
        raise ConfigError("contexts: expected at least one round, got none; pass log.contexts")
    if prompts is not None:
        check_policy(policy, prompts, "prompts")
    d_x, d_q = contexts.context.shape[1], contexts.query.shape[1]
    served = _Served(_module(policy, d_x, d_q)).eval()
    rounds = contexts.take(slice(0, _CHECKED_ROUNDS))
    expected = check_probabilities(policy.probabilities(rounds), len(rounds), policy.n_prompts)
    program = _export(served, d_x, d_q)
    difference = _compare(program, rounds, expected)
    description = _describe(policy, prompts, (d_x, d_q)) | {
        "checked": {"rounds": len(rounds), "largest_difference": difference}
    }
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_DESCRIPTION: json.dumps(description, indent=2)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, buffer.getvalue())
    except OSError as error:
        raise StorageError(f"export_policy: cannot write {file}: {error}; choose another path") from error
    return file


def _export(served: nn.Module, d_x: int, d_q: int) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("n", min=1)
    example = (torch.zeros(2, d_x), torch.zeros(2, d_q))
    with torch.no_grad():
        program = torch.export.export(served, example, dynamic_shapes={"context": {0: rows}, "query": {0: rows}})
    # Example inputs are the one part that torch would pickle; stack traces name files of this machine.
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _compare(program: torch.export.ExportedProgram, rounds: Contexts, expected: Array) -> float:
    """Return the largest difference of probabilities.

    Raises:
        NumericalError: it is more than rounding.
    """
    context, query = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rounds.context, rounds.query))
    with torch.no_grad():
        found = program.module()(context, query).numpy()
    difference = np.abs(found - expected).max(axis=1)
    wrong = ~(difference <= _TOLERANCE)
    if wrong.mean() > _TIES:
        row = int(np.argmax(wrong))
        raise NumericalError(
            f"export_policy: expected the program to give the policy's probabilities, but they differ by "
            f"{difference[row]:.2g} in row {row} and in {wrong.mean():.0%} of rows; scale the contexts, or clone the "
            "policy with agents.BehaviorCloning"
        )
    return float(difference.max())


def _describe(policy: Policy, prompts: PromptSet | None, dims: tuple[int, int]) -> dict[str, Any]:
    catalogue = getattr(policy, "catalogue", None) if prompts is None else prompts.fingerprint
    return {
        "format_version": FORMAT_VERSION,
        "policy": type(policy).__name__,
        "inputs": [{"name": "context", "dim": dims[0]}, {"name": "query", "dim": dims[1]}],
        "dtype": "float32",
        "n_prompts": policy.n_prompts,
        "prompt_texts": None if prompts is None else prompts.texts,
        "catalogue": catalogue,
        "versions": package_versions(),
    }


def describe_export(path: str | Path) -> dict[str, Any]:
    """Read what is written about an exported policy, without loading it: dimensions, prompts, versions.

    Raises:
        StorageError: not a file of :func:`export_policy`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/extra/{_DESCRIPTION}"))
            found: dict[str, Any] = json.loads(archive.read(name))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise StorageError(f"expected a file that export_policy wrote at {path}, but {error!r}") from error
    return found
