"""Kernels in the space of sentences, and the logging policy's density there.

    π₀(s | x, q) = E_{a ~ π₀(·|x,q), s' ~ p(·|q,a)}[ K(s, s') ]

Source: Kiyohara, Cao, Saito, Joachims, RecSys 2025 (arXiv 2504.02646), with the conventions of the released code:
distances are ``‖s − s'‖ / d_o``, and normal noise is added to both sentences first, a stand-in for an imperfect
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agents.networks import MLP, StackedMLP
from agents.training import (
    BLOCK,
    Schedule,
    StackedLogs,
    check_hidden,
    check_one_each,
    check_seeds,
    normals,
    train,
    world_streams,
)
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, DataError, NumericalError
from offprompts_env.sampling import check_policy, check_probabilities, row_parts
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Policy

# Rows of outputs that a generator is asked for at once.
_ROWS_AT_ONCE = 1 << 17

_LABEL = "logging density"


class Kernel(Protocol):
    """Similarity of two sentences as a function of their difference."""

    @property
    def output_noise(self) -> float:
        """Standard deviation of the noise added to each of both sentences."""
        ...

    def __call__(self, difference: Tensor) -> Tensor:
        """Return K for differences ``s − s'`` (..., d_o), noise included, (...)."""
        ...


@dataclass(frozen=True, slots=True)
class _DistanceKernel:
    """What kernels of ``δ = ‖s − s'‖ / d_o`` share: settings, their check, and the distance."""

    tau: float = 1.0
    output_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, Real) and math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"tau: expected a bandwidth > 0, got {self.tau!r}; 1.0 is the published default")
        check_number("output_noise", self.output_noise, 0)

    @staticmethod
    def _squared(difference: Tensor) -> Tensor:
        """Return δ² for differences (..., d_o)."""
        return difference.square().sum(-1) / difference.shape[-1] ** 2


@dataclass(frozen=True, slots=True)
class GaussianKernel(_DistanceKernel):
    """``K = exp(−δ² / 2τ²) / (√(2π) τ)`` with ``δ = ‖s − s'‖ / d_o``.

    Attributes:
        tau: bandwidth τ > 0.
        output_noise: standard deviation of the noise added to each of both sentences.
    """

    def __call__(self, difference: Tensor) -> Tensor:
        """Return K for differences (..., d_o)."""
        return (self._squared(difference) * (-0.5 / self.tau**2)).exp() / (math.sqrt(2 * math.pi) * self.tau)


@dataclass(frozen=True, slots=True)
class UniformKernel(_DistanceKernel):
    """``K = 1{δ < 3τ} / 6τ`` with ``δ = ‖s − s'‖ / d_o``: the factor 3 makes τ comparable with the Gaussian's.

    Attributes:
        tau: bandwidth τ > 0.
        output_noise: standard deviation of the noise added to each of both sentences.
    """

    def __call__(self, difference: Tensor) -> Tensor:
        """Return K for differences (..., d_o)."""
        radius = 3 * self.tau
        return (self._squared(difference) < radius**2).to(difference.dtype) / (2 * radius)


def blurred(kernel: Kernel, left: Tensor, right: Tensor, noise: Tensor) -> Tensor:
    """Return ``K(left + ε − right − ε')``, (...).

    The two noises only matter through ``ε − ε' = √2 · output_noise · noise``, `noise` standard normal (..., d_o).
    """
    return kernel(left - right + math.sqrt(2) * kernel.output_noise * noise)


def draw_actions(policy: Policy, contexts: Contexts, rows: IntArray, rng: np.random.Generator) -> IntArray:
    """Draw one prompt for each of `rows` (m,) of `contexts`; rows may repeat, and the pmf of a row is made once."""
    own = getattr(policy, "sample", None)
    if own is not None:
        return np.asarray(own(contexts.take(rows), rng)[0])
    uniforms = rng.random(len(rows))
    order = np.argsort(rows, kind="stable")
    actions = np.empty(len(rows), dtype=np.int64)
    n_prompts = policy.n_prompts
    for span in row_parts(len(contexts), n_prompts):
        low, high = np.searchsorted(rows, [span.start, span.stop], sorter=order)
        if low == high:
            continue
        part, index = contexts.take(span), order[low:high]
        pmf = check_probabilities(policy.probabilities(part), len(part), n_prompts)
        cumulative = np.cumsum(pmf, axis=1, dtype=np.float64)
        cumulative /= cumulative[:, -1:]
        # One sorted line for all rows: row i takes up (i, i + 1].
        own_row = rows[index] - span.start
        line = (cumulative + np.arange(len(part))[:, None]).ravel()
        found = np.searchsorted(line, own_row + uniforms[index], side="right") - own_row * n_prompts
        actions[index] = np.minimum(found, n_prompts - 1)
    return actions


def generate(
    generator: OutputModel, contexts: Contexts, rows: IntArray, actions: IntArray, rng: np.random.Generator
) -> FloatArray:
    """Return the embeddings (m, d_o) of what `generator` answers to `actions` (m,) in `rows` (m,) of `contexts`.

    Raises:
        NumericalError: an embedding is NaN or infinite.
    """
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        parts.append(generator.sample(contexts.take(rows[part]), actions[part], rng).embedding)
    embedding = np.concatenate(parts)
    wrong = ~np.isfinite(embedding).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise NumericalError(
            f"generator: expected finite output embeddings, got {embedding[row]} for prompt {int(actions[row])}; "
            "check the language model and the sentence encoder"
        )
    return embedding


class LoggingDensity(Protocol):
    """A way to get ``π₀(s | x, q)`` at the logged sentences."""

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Return the density at the logged sentences (n,) of each log, positive."""
        ...


def _check_worlds(
    logs: Sequence[LoggedDataset], generators: Sequence[OutputModel], logging_policies: Sequence[Policy]
) -> None:
    for name, parts in (("generators", generators), ("logging_policies", logging_policies)):
        check_one_each(name, parts, logs)
    for log, policy in zip(logs, logging_policies, strict=True):
        check_policy(policy, log.prompts, "the log")


@dataclass(frozen=True)
class MonteCarloDensity:
    """Mean similarity to sentences simulated for each round: unbiased for the density, biased for its inverse.

    Attributes:
        n_samples: simulated sentences a round.
        floor: added to the mean, so that a sentence far from all simulated ones has a large weight, not infinite.
    """

    n_samples: int = 100
    floor: float = 1e-10

    def __post_init__(self) -> None:
        check_integer("n_samples", self.n_samples, 1)
        check_number("floor", self.floor, 0, strict=True)

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Return the density at the logged sentences (n,) of each log."""
        _check_worlds(logs, generators, logging_policies)
        densities = []
        worlds = zip(logs, generators, logging_policies, check_seeds(logs, seeds), strict=True)
        for log, generator, policy, seed in worlds:
            rngs = [world_streams([seed], "Monte Carlo density", name)[0] for name in ("actions", "outputs", "noise")]
            density = np.empty(len(log), dtype=np.float32)
            size = max(1, _ROWS_AT_ONCE // self.n_samples)
            for start in range(0, len(log), size):
                part = slice(start, start + size)
                contexts, logged = log.contexts.take(part), torch.from_numpy(log.output[part])[:, None]
                rows = np.repeat(np.arange(len(contexts)), self.n_samples)
                actions = draw_actions(policy, contexts, rows, rngs[0])
                drawn = torch.from_numpy(generate(generator, contexts, rows, actions, rngs[1]))
                drawn = drawn.view(len(contexts), self.n_samples, -1)
                noise = torch.from_numpy(rngs[2].standard_normal(tuple(drawn.shape), dtype=np.float32))
                density[part] = blurred(kernel, logged, drawn, noise).mean(-1).numpy() + self.floor
            densities.append(density)
        return densities


@dataclass(frozen=True, slots=True)
class DensityBatch:
    """Inputs ``[x, q, s, 1]`` (W, B, d + 1) and similarities of s to a second sentence, (W, B, 1)."""

    inputs: Tensor
    similarity: Tensor


_SHARPNESS = 0.5  # β of the softplus log(1 + exp(β z)) / β
_FLOOR = 1e-10


def positive(z: Tensor) -> Tensor:
    """Return ``softplus(z)`` with β = 0.5, plus 1e-10: the network's output as a density."""
    return torch.nn.functional.softplus(z, beta=_SHARPNESS) + _FLOOR


def density_error(outputs: Tensor, batch: DensityBatch) -> Tensor:
    """Return the mean of ``(f(x, q, s) − K(s, s'))²`` over the batch, (W,); its minimum over f is the density."""
    return (positive(outputs) - batch.similarity).square().mean((1, 2))


def density_error_gradient(outputs: Tensor, batch: DensityBatch) -> tuple[Tensor, Tensor]:
    """Return :func:`density_error` and its derivative, by hand."""
    residual = positive(outputs) - batch.similarity
    return residual.square().mean((1, 2)), residual * torch.sigmoid(_SHARPNESS * outputs) * (2 / residual.shape[1])


class _SimulatedPairs:
    """Feed of pairs of sentences, both from π₀ and the generator, for logged contexts drawn with replacement."""

    def __init__(
        self,
        stack: StackedLogs,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        policies: Sequence[Policy],
        seeds: Sequence[int],
        config: NetworkDensity,
    ) -> None:
        self._stack, self._kernel, self._batch_size = stack, kernel, config.batch_size
        self._noise = world_streams(seeds, _LABEL, "noise")
        self._pick = world_streams(seeds, _LABEL, "pairs")
        wanted = config.steps * config.batch_size
        budget = wanted if config.max_sentences is None else min(wanted, config.max_sentences)
        self._fresh, self._used = budget == wanted, 0
        rows, first, second = [], [], []
        for log, offset, generator, policy, seed in zip(
            stack.logs, stack.offsets.tolist(), generators, policies, seeds, strict=True
        ):
            streams = [world_streams([seed], _LABEL, name)[0] for name in ("rounds", "actions", "outputs")]
            drawn = streams[0].integers(len(log), size=budget)
            simulated = [
                generate(
                    generator, log.contexts, drawn, draw_actions(policy, log.contexts, drawn, streams[1]), streams[2]
                )
                for _ in range(2 if self._fresh else 1)
            ]
            rows.append(drawn + offset)
            # Within a budget the logged sentence is the first of the pair: it too comes from π₀ and the generator.
            first.append(simulated[0] if self._fresh else log.output[drawn])
            second.append(simulated[-1])
        self._rows, self._first, self._second = (torch.from_numpy(np.stack(part)) for part in (rows, first, second))

    def block(self, steps: int, network: StackedMLP) -> list[DensityBatch]:
        steps = min(steps, BLOCK)
        worlds, budget = self._rows.shape
        shape = (steps, self._batch_size)
        if self._fresh:
            start, length = self._used, steps * self._batch_size
            self._used += length

            def pick(pairs: Tensor) -> Tensor:
                part = pairs[:, start : start + length]
                return part.reshape(worlds, *shape, *pairs.shape[2:]).transpose(0, 1)
        else:
            index = np.stack([rng.integers(budget, size=shape) for rng in self._pick], axis=1)
            flat = torch.from_numpy(index + budget * np.arange(worlds)[:, None])

            def pick(pairs: Tensor) -> Tensor:
                return pairs.flatten(0, 1)[flat]

        rows, first, second = pick(self._rows), pick(self._first), pick(self._second)
        own = self._stack.inputs[rows]
        inputs = torch.cat([own[..., :-1], first, own[..., -1:]], dim=-1)
        similarity = blurred(self._kernel, first, second, normals(self._noise, *shape, first.shape[-1]))
        return [DensityBatch(x, y) for x, y in zip(inputs, similarity[..., None], strict=True)]


@dataclass(frozen=True)
class NetworkDensity:
    """A perceptron on (x, q, s) fitted by least squares to similarities of simulated pairs of sentences.

    ``min_f E[(f(x, q, s) − K(s, s'))²]`` over s, s' drawn from π₀ and the generator: the minimum is
    ``f(x, q, s) = π₀(s | x, q)``.

    Attributes:
        hidden: numbers of hidden units.
        steps: gradient steps.
        batch_size: pairs a step.
        learning_rate: of Adam.
        max_sentences: ask the generator for at most this many sentences. None asks for two a pair, all fresh. A budget
            below ``steps · batch_size`` asks for one a pair, takes the logged sentence as the other, and draws batches
            of these pairs with replacement: the fit then has the sampling error of that many pairs.
    """

    hidden: tuple[int, ...] = (100,)
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    max_sentences: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_hidden(self.hidden))
        if self.max_sentences is not None:
            check_integer("max_sentences", self.max_sentences, 1)
        self._schedule()

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_size, self.learning_rate)

    def networks(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[MLP]:
        """Fit one perceptron a log; :func:`positive` of its output is the density."""
        _check_worlds(logs, generators, logging_policies)
        stack, chosen = StackedLogs(logs), check_seeds(logs, seeds)
        feed = _SimulatedPairs(stack, kernel, generators, logging_policies, chosen, self)
        n_inputs = stack.inputs.shape[1] - 1 + stack.output.shape[1]
        network = StackedMLP.initialise((n_inputs, *self.hidden, 1), world_streams(chosen, _LABEL, "initial weights"))
        train(network, feed, density_error_gradient, self._schedule(), label=_LABEL)
        return network.unstack()

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Return the density at the logged sentences (n,) of each log."""
        networks = self.networks(
            logs, kernel=kernel, generators=generators, logging_policies=logging_policies, seeds=seeds
        )
        densities = []
        for network, log in zip(networks, logs, strict=True):
            z = network(np.concatenate([log.context, log.query, log.output], axis=1))
            densities.append(positive(torch.from_numpy(z[:, 0])).numpy())
        return densities


@dataclass(frozen=True)
class KnownDensity:
    """Densities that are already known, in place of a way to estimate them.

    Attributes:
        values: density at the logged sentences (n,) of each log, positive.
    """

    values: tuple[FloatArray, ...]

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Return the values.

        Raises:
            DataError: not one positive value a logged round.
        """
        found = [np.shape(value) for value in self.values]
        if found != [(len(log),) for log in logs]:
            raise DataError(f"density: expected shapes {[(len(log),) for log in logs]}, one value a round, got {found}")
        for value in self.values:
            if not (np.isfinite(value).all() and np.min(value) > 0):
                raise DataError("density: expected finite values > 0; add a small floor")
        return [np.asarray(value, dtype=np.float32) for value in self.values]
