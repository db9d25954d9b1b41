"""Reward models of sentences whose form is chosen by validation, with their uncertainty.

    PolynomialRidge         E[r | x, q, s] as a polynomial, its penalty by leave-one-out
    NetworkEnsemble         as the mean of perceptrons, each stopped by its own fold
    SentenceRewardSearch    the candidate that predicts held-out rounds best

A fitted model is a handful of *members*: posterior draws, or networks trained on different rounds. Their mean is the
prediction, their spread its uncertainty.

Symbols: ``n`` rounds, ``m`` sentences a round, ``d_o`` output dimension, ``R`` members.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from agents.networks import MLP, StackedMLP, homogeneous
from agents.records import Record, recorded
from agents.regression import RegressionRounds, squared_error_gradient
from agents.rewards import SavesModel, SentenceModel
from agents.ridge import MOST_FEATURES, Polynomial, fit_ridge, interactions, n_interactions, shift_and_scale
from agents.training import (
    Schedule,
    StackedLogs,
    TrainingWarning,
    check_hidden,
    check_seeds,
    train,
    warn_if_useless,
)
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError, DataError, DimensionError
from offprompts_env.rng import stream
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, Outputs

_LABEL = "sentence-reward model"


@runtime_checkable
class SentenceRewardEnsemble(SentenceModel, Protocol):
    """A fitted ``r̂(x, q, s)`` with members."""

    @property
    def members(self) -> int:
        """``R``."""
        ...

    @property
    def validation(self) -> Mapping[str, float]:
        """Held-out mean squared error ("error") and that of the mean reward ("baseline"); of candidates by name."""
        ...

    def member(self, index: int, contexts: FloatArray, sentences: FloatArray) -> FloatArray:
        """Return what one member predicts for `contexts` ``[x, q]`` (n, d_c) and `sentences` (n, m, d_o), (n, m)."""
        ...

    def to_record(self) -> Record:
        """Return what it is made of."""
        ...


def predict(
    model: SentenceRewardEnsemble, contexts: FloatArray, sentences: FloatArray, pessimism: float = 0.0
) -> FloatArray:
    """Return ``mean − pessimism · standard deviation`` over the members, (n, m).

    Args:
        model: the members.
        contexts: ``[x, q]``, (n, d_c).
        sentences: (n, m, d_o).
        pessimism: how many standard deviations below the mean; negative is optimistic.
    """
    total = model.member(0, contexts, sentences)
    if model.members == 1:
        return total
    # Deviations from the first member, since predictions that are large beside their spread would lose digits.
    first, square = total.copy(), np.zeros_like(total)
    total[:] = 0
    for index in range(1, model.members):
        deviation = model.member(index, contexts, sentences) - first
        total += deviation
        if pessimism:
            square += np.square(deviation)
    mean = total / model.members
    if not pessimism:
        return first + mean
    variance = np.maximum(square / model.members - np.square(mean), 0)
    return first + mean - np.float32(pessimism) * np.sqrt(variance)


class _Members(SavesModel):
    """What fitted models share."""

    def __call__(self: SentenceRewardEnsemble, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return predicted rewards, (n,)."""
        return predict(self, side_by_side(contexts), outputs.embedding[:, None])[:, 0]


def side_by_side(contexts: Contexts) -> FloatArray:
    """Return ``[x, q]``, (n, d_c) float32."""
    return np.concatenate([contexts.context, contexts.query], axis=1, dtype=np.float32)


@recorded("reward model")
@dataclass(frozen=True, eq=False)
class PolynomialRewards(_Members):
    """A fitted polynomial, its members draws from the posterior around the mean.

    Attributes:
        polynomial: R members.
        validation: see :class:`SentenceRewardEnsemble`.
    """

    polynomial: Polynomial
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def members(self) -> int:
        """``R``."""
        return len(self.polynomial.level)

    def member(self, index: int, contexts: FloatArray, sentences: FloatArray) -> FloatArray:
        """Return what one member predicts, (n, m); raises :class:`DimensionError` for other dimensions."""
        fitted = (self.polynomial.context.shape[1], self.polynomial.sentence.shape[1])
        found = (contexts.shape[1], sentences.shape[2])
        if found != fitted:
            raise DimensionError(f"{_LABEL}: expected contexts and sentences of dimensions {fitted}, got {found}")
        return self.polynomial(contexts, sentences, index)

    def to_record(self) -> Record:
        """Return what it is made of."""
        names = ("level", "context", "sentence", "cross", "square")
        tensors = {name: np.ascontiguousarray(getattr(self.polynomial, name)) for name in names}
        return Record("PolynomialRewards", {"validation": dict(self.validation)}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> PolynomialRewards:
        """Inverse of :meth:`to_record`."""
        return cls(Polynomial(**record.tensors), **record.settings)


@recorded("reward model")
@dataclass(frozen=True, eq=False)
class NetworkRewards(_Members):
    """Fitted perceptrons on ``[x, q, s]``.

    Attributes:
        networks: R members.
        validation: see :class:`SentenceRewardEnsemble`.
    """

    networks: tuple[MLP, ...]
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def members(self) -> int:
        """``R``."""
        return len(self.networks)

    def member(self, index: int, contexts: FloatArray, sentences: FloatArray) -> FloatArray:
        """Return what one member predicts, (n, m); raises :class:`DimensionError` for other dimensions."""
        network, d = self.networks[index], contexts.shape[1]
        found = d + sentences.shape[2]
        if found != network.sizes[0]:
            raise DimensionError(
                f"{_LABEL}: expected contexts and sentences of {network.sizes[0]} dimensions together, got {found}"
            )
        # The first layer's part of the context is computed once a round.
        first = network.layers[0]
        hidden = sentences @ first[d:-1]
        hidden += (contexts @ first[:d] + first[-1])[:, None]
        return network.upper(hidden)[..., 0]

    def to_record(self) -> Record:
        """Return what it is made of."""
        tensors = {
            name: value
            for index, network in enumerate(self.networks)
            for name, value in network.tensors(f"member{index}.").items()
        }
        return Record("NetworkRewards", {"validation": dict(self.validation), "members": self.members}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> NetworkRewards:
        """Inverse of :meth:`to_record`."""
        settings = dict(record.settings)
        members = range(settings.pop("members"))
        return cls(tuple(MLP.from_tensors(record.tensors, f"member{index}.") for index in members), **settings)


class EnsembleSource(Protocol):
    """What gives a :class:`SentenceRewardEnsemble` for each log."""

    def fit_many(
        self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None
    ) -> list[SentenceRewardEnsemble]:
        """Return one model a log."""
        ...


class Candidate(EnsembleSource, Protocol):
    """A source that a search can choose."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    def suits(self, log: LoggedDataset) -> bool:
        """Return whether it can be fitted to logs of such dimensions in reasonable time."""
        ...


def _checked(logs: Sequence[LoggedDataset], least: int) -> StackedLogs:
    stack = StackedLogs(logs)
    stack.require_outputs("a sentence-reward model")
    for size in stack.sizes:
        if size < least:
            raise DataError(f"{_LABEL}: expected at least {least} rounds, got {size}; record more rounds")
    return stack


@dataclass(frozen=True)
class PolynomialRidge:
    """Ridge regression on :func:`agents.ridge.interactions` of context and sentence.

    Attributes:
        degree: 1 or 2.
        members: posterior draws that tell the uncertainty.
    """

    degree: int = 2
    members: int = 8

    def __post_init__(self) -> None:
        check_integer("degree", self.degree, 1, 2)
        check_integer("members", self.members, 1)

    @property
    def name(self) -> str:
        """What the candidate is called in tables."""
        return f"polynomial of degree {self.degree}"

    def suits(self, log: LoggedDataset) -> bool:
        """Return whether the polynomial has no more features than :func:`agents.ridge.interactions` allows."""
        d_c = log.context.shape[1] + log.query.shape[1]
        return n_interactions(d_c, log.output.shape[1], self.degree) <= MOST_FEATURES

    def fit_many(
        self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None
    ) -> list[SentenceRewardEnsemble]:
        """Return one model a log; raises :class:`DataError` for a log of fewer than 3 rounds or without outputs."""
        _checked(logs, 3)
        models: list[SentenceRewardEnsemble] = []
        for log, seed in zip(logs, check_seeds(logs, seeds), strict=True):
            context = side_by_side(log.contexts).astype(np.float64)
            target = log.reward.astype(np.float64)
            features = interactions(context, log.output.astype(np.float64), self.degree)
            fit = fit_ridge(features, target[:, None])
            draws = fit.draws(self.members, stream(seed, _LABEL, self.name))[..., 0]
            # Draws are centred on the mean, so that the mean over the members is the posterior's.
            draws -= draws.mean(axis=0)
            # They turn about the mean of the features: what is far from all logged rounds is what is uncertain.
            polynomial = Polynomial.of_weights(
                fit.intercept[0] - draws @ fit.centre,
                fit.weights[:, 0] + draws,
                context.shape[1],
                log.output.shape[1],
                self.degree,
            )
            models.append(PolynomialRewards(polynomial, _validation(fit.leave_one_out[:, 0], target)))
        return models


def _validation(predicted: FloatArray, target: FloatArray) -> dict[str, float]:
    n = len(target)
    # The mean of the others, for each round: what leave-one-out and folds compare with.
    others = (target.sum() - target) / (n - 1)
    return {
        "error": float(np.mean(np.square(predicted - target))),
        "baseline": float(np.mean(np.square(others - target))),
    }


@dataclass(frozen=True)
class NetworkEnsemble:
    """Perceptrons, each trained on all folds but one and stopped where it predicts that one best.

    Held-out errors of the folds together are those of the whole log. Inputs and rewards are standardised; what comes
    out takes and gives raw ones.

    Attributes:
        hidden: numbers of hidden units.
        folds: R, the number of folds and members.
        steps: gradient steps at most.
        batch_size: rounds a step, drawn with replacement.
        learning_rate: of Adam.
        weight_decay: of AdamW (Loshchilov and Hutter, 2019).
        look_every: steps between two looks at the held-out fold.
        patience: looks without improvement after which a member is done.
    """

    hidden: tuple[int, ...] = (100,)
    folds: int = 5
    steps: int = 2_000
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    look_every: int = 50
    patience: int = 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_hidden(self.hidden))
        for name, low in (("folds", 2), ("look_every", 1), ("patience", 1)):
            check_integer(name, getattr(self, name), low)
        self._schedule()

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_size, self.learning_rate, self.weight_decay)

    @property
    def name(self) -> str:
        """What the candidate is called in tables."""
        return f"{self.folds} networks with {'-'.join(map(str, self.hidden))} hidden units"

    def suits(self, log: LoggedDataset) -> bool:
        """Return True."""
        return True

    def fit_many(
        self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None
    ) -> list[SentenceRewardEnsemble]:
        """Return one model a log; raises :class:`DataError` for fewer rounds than twice the folds or no outputs."""
        stack, chosen = _checked(logs, 2 * self.folds), check_seeds(logs, seeds)
        inputs, target, scales = [], [], []
        for log in logs:
            raw = np.concatenate([side_by_side(log.contexts), log.output], axis=1)
            scale = _Scale.of(raw, log.reward)
            scales.append(scale)
            inputs.append(scale.inputs(raw))
            target.append(scale.target(log.reward))
        feed_inputs, feed_target = StackedLogs.join([homogeneous([part]) for part in inputs]), StackedLogs.join(target)
        parts, held_out, rngs, starts = [], [], [], []
        for size, offset, seed in zip(stack.sizes, stack.offsets.tolist(), chosen, strict=True):
            fold = stream(seed, _LABEL, "folds").permutation(size) % self.folds
            for index in range(self.folds):
                parts.append(torch.from_numpy(np.flatnonzero(fold != index)) + offset)
                held_out.append(torch.from_numpy(np.flatnonzero(fold == index)) + offset)
                rngs.append(stream(seed, _LABEL, "batches", index))
                starts.append(stream(seed, _LABEL, "initial weights", index))
        network = StackedMLP.initialise((feed_inputs.shape[1] - 1, *self.hidden, 1), starts)
        best = _Best(network, feed_inputs, feed_target, held_out, self.patience)

        def look(step: int) -> bool:
            return step % self.look_every == 0 and best.look()

        feed = RegressionRounds(stack, feed_inputs, feed_target, parts, rngs, self.batch_size)
        train(network, feed, squared_error_gradient, self._schedule(), label=_LABEL, on_step=look)
        best.look()
        models: list[SentenceRewardEnsemble] = []
        for world, (log, scale) in enumerate(zip(logs, scales, strict=True)):
            own = slice(world * self.folds, (world + 1) * self.folds)
            predicted = np.empty(len(log))
            for rows, values in zip(held_out[own], best.predicted[own], strict=True):
                predicted[(rows - stack.offsets[world]).numpy()] = scale.raw_target(values)
            networks = tuple(scale.raw(member) for member in best.networks[own])
            models.append(NetworkRewards(networks, _validation(predicted, log.reward.astype(np.float64))))
        return models


@dataclass(frozen=True, eq=False)
class _Scale:
    """Shift and scale of inputs and target."""

    shift: FloatArray
    scale: FloatArray
    level: float
    spread: float

    @classmethod
    def of(cls, inputs: FloatArray, target: FloatArray) -> _Scale:
        (level,), (spread,) = shift_and_scale(target[:, None])
        return cls(*shift_and_scale(inputs), float(level), float(spread) if np.isfinite(spread) else 1.0)

    def inputs(self, raw: FloatArray) -> FloatArray:
        return np.asarray((raw - self.shift) / self.scale, dtype=np.float32)

    def target(self, raw: FloatArray) -> FloatArray:
        return ((raw - self.level) / self.spread).astype(np.float32)

    def raw_target(self, scaled: FloatArray) -> FloatArray:
        return scaled * self.spread + self.level

    def raw(self, network: MLP) -> MLP:
        """Return the network on raw inputs with raw outputs, given the one on scaled ones."""
        layers = [layer.copy() for layer in network.layers]
        layers[0][:-1] /= self.scale[:, None]
        layers[0][-1] -= (self.shift @ layers[0][:-1]).astype(np.float32)
        layers[-1] *= self.spread
        layers[-1][-1] += self.level
        return MLP(tuple(layers))


class _Best:
    """Keeps each member as it was when it predicted its held-out fold best."""

    def __init__(
        self, network: StackedMLP, inputs: Tensor, target: Tensor, held_out: Sequence[Tensor], patience: int
    ) -> None:
        self._network, self._patience = network, patience
        self._inputs = [inputs[rows, :-1].numpy() for rows in held_out]
        self._target = [target[rows].numpy() for rows in held_out]
        self._error, self._idle = [np.inf] * len(held_out), [0] * len(held_out)
        self.networks = network.unstack()
        self.predicted = [np.zeros(len(rows), dtype=np.float32) for rows in held_out]

    def look(self) -> bool:
        """Compare the members with their best; return whether all are done."""
        for index, network in enumerate(self._network.unstack()):
            # A member that is done stays as it is, as it would alone, while others of the stack go on.
            if self._idle[index] >= self._patience:
                continue
            predicted = network(self._inputs[index])[:, 0]
            error = float(np.mean(np.square(predicted - self._target[index])))
            self._idle[index] += 1
            if error < self._error[index]:
                self._error[index], self._idle[index] = error, 0
                self.networks[index], self.predicted[index] = network, predicted
        return min(self._idle) >= self._patience


@dataclass(frozen=True)
class SentenceRewardSearch:
    """The candidate with the smallest held-out squared error, each log its own.

    Polynomials are judged by exact leave-one-out, networks by folds: both predict rounds they were not fitted to. A
    candidate that does not suit the log's dimensions, such as products of hundreds of them, is left out.

    Attributes:
        candidates: what is tried.
    """

    candidates: tuple[Candidate, ...] = (PolynomialRidge(1), PolynomialRidge(2), NetworkEnsemble())

    def __post_init__(self) -> None:
        if len(self.candidates) == 0:
            raise ConfigError("candidates: expected at least one, got none; agents.PolynomialRidge() is a good start")
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) < len(names):
            raise ConfigError(f"candidates: expected different ones, got {names}")

    def fit(self, log: LoggedDataset, *, seed: int = 0) -> SentenceRewardEnsemble:
        """Fit one log; raises what the candidates do."""
        return self.fit_many([log], seeds=[seed])[0]

    def fit_many(
        self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None
    ) -> list[SentenceRewardEnsemble]:
        """Return the best model of each log; its `validation` has the error of every candidate by name."""
        chosen = check_seeds(logs, seeds)
        StackedLogs(logs).require_outputs("a sentence-reward model")
        candidates = [candidate for candidate in self.candidates if candidate.suits(logs[0])]
        if not candidates:
            raise ConfigError(
                f"candidates: expected one that suits outputs of dimension {logs[0].output.shape[1]}, got "
                f"{[candidate.name for candidate in self.candidates]}; add agents.NetworkEnsemble()"
            )
        fitted = [candidate.fit_many(logs, seeds=chosen) for candidate in candidates]
        models = []
        for log, *own in zip(logs, *fitted, strict=True):
            errors = {fit.name: model.validation["error"] for fit, model in zip(candidates, own, strict=True)}
            best = min(own, key=lambda model: model.validation["error"])
            if np.ptp(log.reward) == 0:
                warnings.warn(
                    f"{_LABEL}: all {len(log)} rewards are {log.reward[0]:g}, so the log cannot tell sentences apart; "
                    "check how rewards were recorded, or record more rounds",
                    TrainingWarning,
                    stacklevel=2,
                )
            else:
                warn_if_useless(_LABEL, best.validation["error"], best.validation["baseline"])
            models.append(replace(best, validation={**best.validation, **errors}))
        return models
