"""Reward regressions: what a round pays, predicted from the prompt or from the sentence.

    PromptRewardRegression    (x, q, e_a) → E[r]        SentenceRewardRegression    (x, q, s) → E[r]

Both fit a perceptron by least squares, as in the paper (arXiv 2504.02646), whose released settings are the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.networks import MLP, StackedMLP
from agents.records import Record, Recordable, load_record, recorded, save_record
from agents.regression import Contrasts, RegressionRounds, pessimistic_error_gradient, squared_error_gradient
from agents.streaming import HELD_OUT_ROWS, Window, training_windows
from agents.training import (
    Phase,
    Schedule,
    StackedLogs,
    check_hidden,
    check_one_each,
    check_seeds,
    train,
    train_in_phases,
    warn_if_useless,
    world_streams,
)
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError, DataError, DimensionError
from offprompts_env.rng import integer_seed
from offprompts_env.sampling import check_catalogue
from offprompts_env.streaming import LogStream
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Outputs

# Hidden units that are held at once when all prompts are predicted: 512 KiB of float32 stay in the second-level cache.
_HIDDEN_AT_ONCE = 1 << 17

_STEM = "rewards"


class SavesModel:
    """Gives a reward model its ``save``."""

    def save(self: Recordable, path: str | Path) -> Path:
        """Write this model into the directory `path`, which is made if need be; :func:`load_rewards` reads it.

        Raises:
            StorageError: the directory cannot be written.
        """
        return save_record(self.to_record(), path, what="reward model", stem=_STEM)


def load_rewards(path: str | Path) -> Any:
    """Read a reward model that its ``save`` wrote, with the same bits.

    Raises:
        ConfigError: not a known kind of reward model.
        StorageError: not such a directory, damaged, or of a newer format version.
    """
    return load_record(path, what="reward model", stem=_STEM)


@recorded("reward model")
@dataclass(frozen=True, eq=False)
class PromptRewards(SavesModel):
    """A fitted ``q̂(x, q, a)``; called with contexts it gives the scores of all prompts.

    Attributes:
        network: on ``[x, q, e_a]``.
        embeddings: of the prompts, (A, d_e).
        catalogue: fingerprint of the prompts.
        validation: held-out mean squared error ("error") and that of the training mean ("baseline"); NaN without
            held-out rounds.
    """

    network: MLP
    embeddings: FloatArray
    catalogue: str | None = None
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.embeddings)

    def __call__(self, contexts: Contexts) -> FloatArray:
        """Return predicted rewards of all prompts, (n, A).

        The first layer is a sum of a part of the context and a part of the prompt, each computed once.
        """
        first = self.network.layers[0]
        inputs = _side_by_side(contexts.context, contexts.query)
        d = inputs.shape[1]
        if d + self.embeddings.shape[1] + 1 != len(first):
            raise DimensionError(
                f"reward model: expected contexts with d_x + d_q = {len(first) - 1 - self.embeddings.shape[1]}, got {d}"
            )
        own, prompts = inputs @ first[:d] + first[-1], self.embeddings @ first[d:-1]
        predicted = np.empty((len(own), len(prompts)), dtype=np.float32)
        size = max(1, _HIDDEN_AT_ONCE // prompts.size)
        for start in range(0, len(own), size):
            rows = slice(start, start + size)
            predicted[rows] = self.network.upper(own[rows, None] + prompts)[..., 0]
        return predicted

    def among(self, prompts: IntArray) -> PromptRewards:
        """Return the model of a part of the `prompts`, in their order."""
        return replace(self, embeddings=self.embeddings[prompts], catalogue=None)

    def chosen(self, contexts: Contexts, actions: IntArray) -> FloatArray:
        """Return predicted rewards of `actions`, (n,)."""
        inputs = _side_by_side(contexts.context, contexts.query, self.embeddings[actions])
        return np.asarray(self.network(inputs)[:, 0])

    def to_record(self) -> Record:
        """Return what it is made of."""
        settings: dict[str, Any] = {"catalogue": self.catalogue, "validation": dict(self.validation)}
        tensors = {"embeddings": np.ascontiguousarray(self.embeddings)} | self.network.tensors("rewards.")
        return Record("PromptRewards", settings, tensors)

    @classmethod
    def from_record(cls, record: Record) -> PromptRewards:
        """Inverse of :meth:`to_record`."""
        return cls(MLP.from_tensors(record.tensors, "rewards."), record.tensors["embeddings"], **record.settings)


@recorded("reward model")
@dataclass(frozen=True, eq=False)
class SentenceRewards(SavesModel):
    """A fitted ``r̂(x, q, s)``.

    Attributes:
        network: on ``[x, q, s]``.
        validation: as in :class:`PromptRewards`.
    """

    network: MLP
    validation: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return predicted rewards, (n,)."""
        return np.asarray(self.network(_side_by_side(contexts.context, contexts.query, outputs.embedding))[:, 0])

    def to_record(self) -> Record:
        """Return what it is made of."""
        return Record("SentenceRewards", {"validation": dict(self.validation)}, self.network.tensors())

    @classmethod
    def from_record(cls, record: Record) -> SentenceRewards:
        """Inverse of :meth:`to_record`."""
        return cls(MLP.from_tensors(record.tensors), **record.settings)


def _side_by_side(*columns: FloatArray) -> FloatArray:
    return np.concatenate(columns, axis=1, dtype=np.float32)


@dataclass(frozen=True)
class _Regression:
    """What both regressions share.

    Attributes:
        hidden: numbers of hidden units.
        steps: gradient steps.
        batch_size: rounds a step, drawn with replacement.
        learning_rate: of Adam.
        train_fraction: share of the rounds that is trained on; the rest only measures the error that is reported.
    """

    hidden: tuple[int, ...] = (100,)
    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    train_fraction: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_hidden(self.hidden))
        check_number("train_fraction", self.train_fraction, 0, strict=True)
        if self.train_fraction > 1:
            raise ConfigError(f"train_fraction: expected a share in (0, 1], got {self.train_fraction}")
        self._schedule()

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_size, self.learning_rate)

    def _phase(
        self,
        steps: int,
        stack: StackedLogs,
        inputs: Tensor,
        parts: Sequence[Tensor],
        seeds: Sequence[int],
        label: str,
    ) -> Phase[Any]:
        """Return `steps` steps on `parts` of the rounds, with `inputs` (Σn, d + 1)."""
        rngs = world_streams(seeds, label, "batches")
        feed = RegressionRounds(stack, inputs, stack.reward, parts, rngs, self.batch_size)
        return Phase(steps, feed, squared_error_gradient)

    def _fit(
        self, stack: StackedLogs, inputs: Tensor, seeds: Sequence[int], label: str
    ) -> list[tuple[MLP, dict[str, float]]]:
        """Fit one network a world on `inputs` (Σn, d + 1)."""
        for size in stack.sizes:
            if round(self.train_fraction * size) < 2:
                raise DataError(
                    f"{label}: expected at least 2 rounds to train on, got {round(self.train_fraction * size)} of "
                    f"{size}; record more rounds"
                )
        parts, held_out = stack.split(world_streams(seeds, label, "split"), self.train_fraction)
        network = StackedMLP.initialise(
            (inputs.shape[1] - 1, *self.hidden, 1), world_streams(seeds, label, "initial weights")
        )
        phase = self._phase(self.steps, stack, inputs, parts, seeds, label)
        train(network, phase.feed, phase.gradient, self._schedule(), label=label)
        fitted = []
        for mlp, part, rest in zip(network.unstack(), parts, held_out, strict=True):
            mean = float(stack.reward[part].mean())
            fitted.append((mlp, _validate(mlp, inputs[rest], stack.reward[rest], mean, label)))
        return fitted

    def _fit_stream(
        self, log: LogStream, inputs: Callable[[StackedLogs], Tensor], seed: int, label: str
    ) -> tuple[MLP, dict[str, float]]:
        """Fit one network to `log` window by window; `inputs` gives those of a window, (n, d + 1)."""
        kept, held_out = log.split(self.train_fraction, seed=integer_seed(seed, label, "split"))
        total, rounds = 0.0, 0

        def phase(window: Window) -> Phase[Any]:
            nonlocal total, rounds
            stack = StackedLogs([window.log])
            total, rounds = total + float(stack.reward.sum(dtype=torch.float64)), rounds + len(window.log)
            return self._phase(
                window.steps, stack, inputs(stack), [torch.arange(len(window.log))], [window.seed], label
            )

        n_inputs = inputs(StackedLogs([log.head(1)])).shape[1] - 1
        network = StackedMLP.initialise((n_inputs, *self.hidden, 1), world_streams([seed], label, "initial weights"))
        phases = map(phase, training_windows(kept, self._schedule(), seed))
        train_in_phases(network, phases, self._schedule(), label=label)
        (mlp,) = network.unstack()
        if len(held_out) == 0:
            return mlp, _validate(mlp, torch.empty(0, n_inputs + 1), torch.empty(0), total / rounds, label)
        rest = StackedLogs([held_out.head(HELD_OUT_ROWS)])
        return mlp, _validate(mlp, inputs(rest), rest.reward, total / rounds, label)


def _validate(mlp: MLP, inputs: Tensor, reward: Tensor, mean: float, label: str) -> dict[str, float]:
    """Return what the held-out rounds say; `mean` is that of the rewards trained on."""
    validation = {"error": float("nan"), "baseline": float("nan"), "rounds": float(len(reward))}
    if len(reward):
        truth = reward.numpy()
        validation["error"] = float(np.mean((mlp(inputs[:, :-1].numpy())[:, 0] - truth) ** 2))
        validation["baseline"] = float(np.mean((mean - truth) ** 2))
        warn_if_useless(label, validation["error"], validation["baseline"])
    return validation


class PromptRewardSource(Protocol):
    """What gives a prompt-level reward model for each log: a regression, or models that are already fitted."""

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[PromptRewards]:
        """Return one model a log."""
        ...


@dataclass(frozen=True)
class PromptRewardRegression(_Regression):
    """Least squares on (x, q, e_a): ``min_θ Σ_i (r_i − q̂_θ(x_i, q_i, e_{a_i}))²``.

    The other settings are those of the base class: `hidden`, `steps`, `batch_size`, `learning_rate`, `train_fraction`.

    Attributes:
        pessimism: weight λ ≥ 0 of a penalty on what is predicted for uniform prompts beyond logged ones,
            :func:`agents.regression.pessimistic_error`; 0.1 in the released code's pessimistic variant.
    """

    pessimism: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("pessimism", self.pessimism, 0)

    def _phase(
        self,
        steps: int,
        stack: StackedLogs,
        inputs: Tensor,
        parts: Sequence[Tensor],
        seeds: Sequence[int],
        label: str,
    ) -> Phase[Any]:
        plain = super()._phase(steps, stack, inputs, parts, seeds, label)
        if self.pessimism == 0:
            return plain
        feed = Contrasts(plain.feed, stack, world_streams(seeds, label, "other prompts"), self.batch_size)
        return Phase(steps, feed, partial(pessimistic_error_gradient, pessimism=self.pessimism))

    def fit(self, log: LoggedDataset, *, seed: int = 0) -> PromptRewards:
        """Fit one log.

        Raises:
            DataError: fewer than two rounds to train on.
            NumericalError: training diverged.
        """
        return self.fit_many([log], seeds=[seed])[0]

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[PromptRewards]:
        """Fit several logs as one batched problem, each with its own seed."""
        stack = StackedLogs(logs)
        fitted = self._fit(stack, _with_prompts(stack), check_seeds(logs, seeds), "prompt-reward regression")
        return [
            PromptRewards(network, log.prompts.embeddings, log.prompts.fingerprint, validation)
            for log, (network, validation) in zip(logs, fitted, strict=True)
        ]

    def fit_stream(self, log: LogStream, *, seed: int = 0) -> FittedRewards:
        """Fit a log that is larger than memory, window by window; of a single window it is what :meth:`fit` gives.

        The held-out part is of at most 65,536 rounds.
        """
        if log.n_windows <= 1:
            return FittedRewards((self.fit(log.load(), seed=seed),))
        network, validation = self._fit_stream(log, _with_prompts, seed, "prompt-reward regression")
        return FittedRewards((PromptRewards(network, log.prompts.embeddings, log.prompts.fingerprint, validation),))


def _with_prompts(stack: StackedLogs) -> Tensor:
    """Return ``[x, q, e_a, 1]`` of the logged rounds, (Σn, d + 1)."""
    own = stack.embeddings[
        stack.action + torch.arange(stack.worlds).repeat_interleave(torch.tensor(stack.sizes)) * stack.n_prompts
    ]
    return torch.cat([stack.inputs[:, :-1], own, stack.inputs[:, -1:]], dim=1)


@dataclass(frozen=True)
class FittedRewards:
    """Prompt-level reward models that are already fitted, in place of a regression.

    Attributes:
        models: one a log, in the order of the logs.
    """

    models: tuple[PromptRewards, ...]

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[PromptRewards]:
        """Return the models.

        Raises:
            ConfigError: not as many models as logs.
            DimensionError: a model over another catalogue than its log's.
        """
        check_one_each("models", self.models, logs)
        for model, log in zip(self.models, logs, strict=True):
            check_catalogue("reward model", model.catalogue, log.prompts)
        return list(self.models)


class SentenceModel(Protocol):
    """A reward model of sentences, such as :class:`SentenceRewards`: ``r̂(x, q, s)``."""

    def __call__(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return predicted rewards, (n,)."""
        ...


class SentenceRewardSource(Protocol):
    """What gives a sentence-level reward model for each log: a regression, or models that are already fitted."""

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> Sequence[SentenceModel]:
        """Return one model a log."""
        ...


@dataclass(frozen=True)
class SentenceRewardRegression(_Regression):
    """Least squares on (x, q, s): ``min_θ Σ_i (r_i − r̂_θ(x_i, q_i, s_i))²``, s the output's embedding.

    The settings are those of the base class: `hidden`, `steps`, `batch_size`, `learning_rate`, `train_fraction`.
    """

    def fit(self, log: LoggedDataset, *, seed: int = 0) -> SentenceRewards:
        """Fit one log; raises what :meth:`PromptRewardRegression.fit` does, and DataError for a log without outputs."""
        return self.fit_many([log], seeds=[seed])[0]

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[SentenceRewards]:
        """Fit several logs as one batched problem, each with its own seed."""
        stack = StackedLogs(logs)
        fitted = self._fit(stack, _with_outputs(stack), check_seeds(logs, seeds), "sentence-reward regression")
        return [SentenceRewards(network, validation) for network, validation in fitted]

    def fit_stream(self, log: LogStream, *, seed: int = 0) -> FittedSentenceRewards:
        """Fit a log that is larger than memory; see :meth:`PromptRewardRegression.fit_stream`."""
        if log.n_windows <= 1:
            return FittedSentenceRewards((self.fit(log.load(), seed=seed),))
        network, validation = self._fit_stream(log, _with_outputs, seed, "sentence-reward regression")
        return FittedSentenceRewards((SentenceRewards(network, validation),))


def _with_outputs(stack: StackedLogs) -> Tensor:
    """Return ``[x, q, s, 1]`` of the logged rounds, (Σn, d + 1)."""
    stack.require_outputs("agents.SentenceRewardRegression")
    return torch.cat([stack.inputs[:, :-1], stack.output, stack.inputs[:, -1:]], dim=1)


@dataclass(frozen=True)
class FittedSentenceRewards:
    """Sentence-level reward models that are already fitted, in place of a regression.

    Attributes:
        models: one a log, in the order of the logs.
    """

    models: tuple[SentenceModel, ...]

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> Sequence[SentenceModel]:
        """Return the models.

        Raises:
            ConfigError: not as many models as logs.
        """
        check_one_each("models", self.models, logs)
        return list(self.models)
