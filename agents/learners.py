"""Learners: one frozen configuration each; ``fit(log, ...)`` gives a policy, ``fit_many`` one for each of many logs.

A learner looks at a log, and where the method is so defined at the generator and the logging policy; never at rewards
of sentences that were not logged. Several logs (worlds, seeds) are fitted as one batched problem, with the same result
as one by one. Defaults are those of the released code of Kiyohara, Cao, Saito, Joachims (RecSys 2025, 2504.02646).

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.feeds import (
    Batch,
    FreshFeed,
    LinearFeed,
    LoggedRounds,
    OnlineBatch,
    PlayedFeed,
    PreparedFeed,
    SentenceBatch,
)
from agents.gradients import ActionDistribution
from agents.kernels import GaussianKernel, Kernel, LoggingDensity, NetworkDensity, blurred
from agents.networks import StackedMLP
from agents.policies import NeuralPolicy
from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.training import (
    Feed,
    HasInputs,
    Schedule,
    StackedLogs,
    check_hidden,
    check_seeds,
    check_simulators,
    differentiate,
    train,
    world_streams,
)
from offprompts_env.config import check_integer, check_kind, check_number
from offprompts_env.errors import ConfigError, DimensionError, PropensityError
from offprompts_env.sampling import check_catalogue, check_policy, chosen_probabilities
from offprompts_env.simulator import GaussianOutputs, OutputModel, Simulator
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Policy

BatchT = TypeVar("BatchT", bound=HasInputs)

OnStep = Callable[[int, list[NeuralPolicy]], bool | None]


@dataclass(frozen=True, slots=True)
class Callback:
    """Look at the policies while they are trained: to track their true values, or to save them against interruptions.

    Attributes:
        every: steps between two looks.
        on_step: called with the number of steps done and a copy of each world's policy; True ends training.
    """

    every: int
    on_step: OnStep

    def __post_init__(self) -> None:
        check_integer("every", self.every, 1)


@runtime_checkable
class Learner(Protocol):
    """What turns a log into a policy."""

    def fit(
        self,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Policy:
        """Learn from `log` alone; `generator` and `logging_policy` are for methods that are defined with them."""
        ...

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        logging_policies: Sequence[Policy] | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Sequence[Policy]:
        """Learn a policy from each log, as one batched problem."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """What all learners of a neural softmax policy share.

    Attributes:
        hidden: numbers of hidden units of the policy's network.
        steps: gradient steps.
        batch_size: rounds a step, drawn with replacement.
        learning_rate: of Adam.
    """

    hidden: tuple[int, ...] = (100,)
    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", check_hidden(self.hidden))
        self._schedule()

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_size, self.learning_rate)

    def _optimise(
        self,
        n_inputs: int,
        catalogues: Sequence[str],
        n_prompts: int,
        feed: Feed[BatchT],
        surrogate: Callable[[ActionDistribution, BatchT], Tensor],
        seeds: Sequence[int],
        label: str,
        callbacks: Sequence[Callback],
    ) -> list[NeuralPolicy]:
        network = StackedMLP.initialise(
            (n_inputs, *self.hidden, n_prompts), world_streams(seeds, label, "initial weights")
        )

        def policies() -> list[NeuralPolicy]:
            return [NeuralPolicy(mlp, name) for mlp, name in zip(network.unstack(), catalogues, strict=True)]

        def on_step(step: int) -> bool:
            answers = [callback.on_step(step, policies()) for callback in callbacks if step % callback.every == 0]
            return True in answers

        def loss(logits: Tensor, batch: BatchT) -> Tensor:
            return surrogate(ActionDistribution(logits), batch)

        watch = on_step if callbacks else None
        train(network, feed, differentiate(loss), self._schedule(), label=label, on_step=watch)
        return policies()


@dataclass(frozen=True, eq=False)
class Worlds:
    """What an offline learner or estimator is given, for W worlds.

    Attributes:
        stack: the logs.
        generators: one a log, where given.
        logging_policies: one a log, where given.
        seeds: one a log.
    """

    stack: StackedLogs
    generators: tuple[OutputModel, ...] | None
    logging_policies: tuple[Policy, ...] | None
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        logs = self.stack.logs
        for name, parts in (("generators", self.generators), ("logging_policies", self.logging_policies)):
            if parts is not None and len(parts) != len(logs):
                raise ConfigError(f"{name}: expected {len(logs)}, one a log, got {len(parts)}")
        for log, policy in zip(logs, self.logging_policies or (), strict=bool(self.logging_policies)):
            check_policy(policy, log.prompts, "the log")
        for generator in self.generators or ():
            check_kind("generator", generator, OutputModel, "of a simulator pass simulator.outputs")
        if self.generators:
            self.stack.require_outputs("a method with a generator")
        for log, generator in zip(logs, self.generators or (), strict=bool(self.generators)):
            check_catalogue("generator", generator.prompts.fingerprint, log.prompts)
            if generator.output_dim != log.output.shape[1]:
                raise DimensionError(
                    f"generator: expected outputs of dimension {log.output.shape[1]} as in the log, "
                    f"got {generator.output_dim}; use the generator and encoder that the log was recorded with"
                )

    def require_generators(self, label: str) -> tuple[OutputModel, ...]:
        """Return the generators, or raise :class:`ConfigError` if there are none."""
        if self.generators is None:
            raise ConfigError(
                f"{label} asks the frozen generator for sentences of prompts that were not logged: pass generator=, "
                "for instance env.unwrapped.simulator.outputs"
            )
        return self.generators

    def propensities(self, label: str) -> Tensor:
        """Return π₀ of the logged prompts, (Σn,): as recorded, or of the logging policy where a log has none.

        Raises:
            PropensityError: unknown, and no logging policy; or the logging policy never chooses a logged prompt.
        """
        columns = []
        for world, log in enumerate(self.stack.logs):
            if self.logging_policies is not None and np.isnan(log.propensity).any():
                columns.append(estimated_propensities(self.logging_policies[world], log))
            else:
                columns.append(log.require_propensities(label))
        return StackedLogs.join(columns).to(torch.float32)


def estimated_propensities(logging_policy: Policy, log: LoggedDataset) -> FloatArray:
    """Return π₀ of the logged prompts under a `logging_policy` that is said to have recorded them, (n,).

    Raises:
        PropensityError: it gives a logged prompt probability 0.
    """
    found = chosen_probabilities(logging_policy, log.contexts, log.action)
    if not (found > 0).all():
        row = int(np.argmin(found > 0))
        raise PropensityError(
            f"logging_policy: gives the logged prompt {log.action[row]} of row {row} probability {found[row]}, so it "
            "did not record this log; pass the policy that did, or clone one with agents.BehaviorCloning"
        )
    return found


Loss = Callable[[ActionDistribution, BatchT], Tensor]
"""``(policy, batch) -> losses (W,)``: a surrogate of :mod:`agents.gradients` with its arguments filled in."""


class _Offline(PolicyGradient):
    """Learns from logs. A method is its configuration and its :meth:`_learn`."""

    def fit(
        self,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> NeuralPolicy:
        """Learn a policy from `log`.

        Args:
            log: logged rounds.
            generator: the frozen generator, for methods that ask it for sentences.
            logging_policy: what recorded the log, for methods that use it; where needed and not given, cloned from the
                log.
            seed: names the run: initial weights, batches, draws.
            callback: looks at the policy while it is trained.

        Raises:
            ConfigError: a generator is needed and not given.
            DataError: a generator is given, and the log has no outputs.
            DimensionError: generator or logging policy do not fit the log.
            PropensityError: propensities are needed and unknown.
            NumericalError: training diverged, or the generator gave NaN.
        """
        return self.fit_many(
            [log],
            generators=None if generator is None else [generator],
            logging_policies=None if logging_policy is None else [logging_policy],
            seeds=[seed],
            callback=callback,
        )[0]

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        generators: Sequence[OutputModel] | None = None,
        logging_policies: Sequence[Policy] | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> list[NeuralPolicy]:
        """Learn a policy from each log as one batched problem; the same policies as :meth:`fit` gives one by one.

        See :mod:`agents.training` for how same they are.
        """
        stack = StackedLogs(logs)
        worlds = Worlds(
            stack,
            None if generators is None else tuple(generators),
            None if logging_policies is None else tuple(logging_policies),
            tuple(check_seeds(logs, seeds)),
        )
        return self._learn(worlds, () if callback is None else (callback,))

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        raise NotImplementedError

    def _on_logs(
        self, worlds: Worlds, feed: Feed[BatchT], loss: Loss[BatchT], label: str, callbacks: Sequence[Callback]
    ) -> list[NeuralPolicy]:
        stack = worlds.stack
        catalogues = [log.prompts.fingerprint for log in stack.logs]
        n_inputs = stack.inputs.shape[1] - 1
        return self._optimise(n_inputs, catalogues, stack.n_prompts, feed, loss, worlds.seeds, label, callbacks)


@dataclass(frozen=True)
class RegressionPG(_Offline):
    """Policy gradient on a reward model of prompts, :func:`agents.gradients.regression`.

    Attributes:
        rewards: the regression, or :class:`agents.FittedRewards`.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        label, stack = "regression PG", worlds.stack
        models = self.rewards.fit_many(stack.logs, seeds=worlds.seeds)
        network = StackedMLP.of([model.network for model in models])

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            actions = policy.sample(batch.uniforms)
            embeddings = stack.embeddings[stack.prompt_rows(actions)]
            inputs = torch.cat([batch.inputs[..., :-1], embeddings, batch.inputs[..., -1:]], dim=-1)
            return gradients.regression(policy, actions, network.forward(inputs)[..., 0])

        return self._on_logs(worlds, LoggedRounds(stack, worlds.seeds, label, self.batch_size), loss, label, callbacks)


@dataclass(frozen=True)
class ImportanceSamplingPG(_Offline):
    """Importance-sampling policy gradient, :func:`agents.gradients.importance_sampling`.

    Needs propensities, or the logging policy.

    Attributes:
        clip: upper bound of the weight π(a) / π₀(a).
    """

    clip: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        label, stack = "IS PG", worlds.stack
        propensity = worlds.propensities("agents.ImportanceSamplingPG")

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            rows = batch.rows
            return gradients.importance_sampling(
                policy, stack.action[rows], propensity[rows], stack.reward[rows], self.clip
            )

        return self._on_logs(worlds, LoggedRounds(stack, worlds.seeds, label, self.batch_size), loss, label, callbacks)


@dataclass(frozen=True)
class BehaviorCloning(_Offline):
    """Maximum likelihood of the logged prompts, :func:`agents.gradients.cloning`: an estimate of the logging policy.

    With many prompts and few rounds the likelihood is soon fitted to the rounds themselves, so the policy is the one of
    all those looked at under which held-out rounds are likeliest.

    Attributes:
        train_fraction: share of the rounds that is trained on; 1 holds nothing out and gives the last policy.
        look_every: steps between two looks at the held-out rounds.
        patience: looks without improvement after which a world is done.
    """

    train_fraction: float = 0.8
    look_every: int = 200
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("train_fraction", self.train_fraction, 0, strict=True)
        if self.train_fraction > 1:
            raise ConfigError(f"train_fraction: expected a share in (0, 1], got {self.train_fraction}")
        check_integer("look_every", self.look_every, 1)
        check_integer("patience", self.patience, 1)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        label, stack = "behaviour cloning", worlds.stack
        parts, held_out = stack.split(world_streams(worlds.seeds, label, "split"), self.train_fraction)
        feed = LoggedRounds(stack, worlds.seeds, label, self.batch_size, parts)

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            return gradients.cloning(policy, stack.action[batch.rows])

        if not all(len(rows) for rows in held_out):
            return self._on_logs(worlds, feed, loss, label, callbacks)
        rounds = [
            (log.contexts.take(rows), log.action[rows])
            for log, rows in zip(stack.logs, stack.local(held_out), strict=True)
        ]
        best = _Likeliest(rounds, self.patience)
        last = self._on_logs(worlds, feed, loss, label, (Callback(self.look_every, best.look), *callbacks))
        best.look(self.steps, last)
        return best.policies


class _Likeliest:
    """Keeps the policy of each world under which the prompts of its held-out `rounds` are likeliest."""

    def __init__(self, rounds: Sequence[tuple[Contexts, IntArray]], patience: int) -> None:
        self._rounds, self._patience = rounds, patience
        self._likelihood, self._idle = [-np.inf] * len(rounds), [0] * len(rounds)
        self.policies: list[NeuralPolicy] = []

    def look(self, step: int, policies: list[NeuralPolicy]) -> bool:
        self.policies = self.policies or list(policies)
        for world, (policy, rounds) in enumerate(zip(policies, self._rounds, strict=True)):
            # A world that is done stays as it is, as it would alone, while others of the stack go on.
            if self._idle[world] >= self._patience:
                continue
            chances = np.maximum(chosen_probabilities(policy, *rounds), np.finfo(np.float32).tiny)
            likelihood = float(np.log(chances).mean())
            self._idle[world] += 1
            if likelihood > self._likelihood[world]:
                self._likelihood[world], self.policies[world], self._idle[world] = likelihood, policy, 0
        return min(self._idle) >= self._patience


@dataclass(frozen=True)
class DSO(_Offline):
    """Direct Sentence Off-policy gradient, :func:`agents.gradients.kernel_importance_sampling`.

    Needs the generator. The logging policy is cloned from the log where it is not given.

    A vector generator answers every step afresh. With a language model a sentence costs milliseconds and a call more,
    so two settings bound the cost. With `refresh` = k the prompts of k steps are drawn at once from the policy at the
    first of them and answered in one call; each step weights them by ``π(a) / π_first(a)``, so that its gradient has
    the same expectation (where the clip does not bite) and more variance. With `max_sentences` below ``steps ·
    batch_size`` a block gets its share of sentences and its batches are drawn from them with replacement: its first
    step is unbiased, later ones follow the block's empirical objective and so fit its sampling error a little.

    What a budget costs, on ``paper_code`` with 8,000 rounds (optimality, mean of four worlds, standard errors 0.03 to
    0.09): 640,000 fresh sentences 0.47; as many with ``refresh=100`` 0.46; 20,000 with ``steps=2500, batch_size=128,
    learning_rate=1e-3, refresh=50`` 0.35; 20,000 with ``refresh=100`` and the other defaults 0.23.

    Attributes:
        tau: bandwidth of the Gaussian kernel; ignored where `kernel` is given.
        kernel: similarity of sentences; None is ``GaussianKernel(tau)``.
        density: estimate of the logging marginal density.
        clip: upper bound of the weight K / π₀.
        refresh: steps for which sentences are asked for at once, unless the generator is Gaussian.
        max_sentences: ask the generator for at most about this many sentences during the gradient steps, unless it is
            Gaussian; the density has a budget of its own.
        cloning: how a missing logging policy is estimated.
    """

    tau: float = 1.0
    kernel: Kernel | None = None
    density: LoggingDensity = field(default_factory=NetworkDensity)
    clip: float = 200.0
    refresh: int = 1
    max_sentences: int | None = None
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianKernel(self.tau)
        check_number("clip", self.clip, 0, strict=True)
        check_integer("refresh", self.refresh, 1)
        if self.max_sentences is not None:
            check_integer("max_sentences", self.max_sentences, 1)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        label, stack = "DSO", worlds.stack
        kernel: Kernel = GaussianKernel(self.tau) if self.kernel is None else self.kernel
        generators = worlds.require_generators("agents.DSO")
        policies = worlds.logging_policies or self.cloning.fit_many(stack.logs, seeds=worlds.seeds)
        density = StackedLogs.join(
            self.density.fit_many(
                stack.logs, kernel=kernel, generators=generators, logging_policies=policies, seeds=worlds.seeds
            )
        )

        def loss(policy: ActionDistribution, batch: SentenceBatch) -> Tensor:
            rows = batch.rows
            actions, sentences, ratio = batch.draw(policy)
            similarity = blurred(kernel, stack.output[rows], sentences, batch.blur)
            return gradients.kernel_importance_sampling(
                policy, actions, similarity, density[rows], stack.reward[rows], self.clip, ratio
            )

        gaussian = [generator for generator in generators if isinstance(generator, GaussianOutputs)]
        feed: Feed[SentenceBatch]
        if len(gaussian) == len(generators):
            feed = FreshFeed(stack, worlds.seeds, gaussian, label, self.batch_size)
        else:
            asked = self.steps * self.batch_size
            feed = PreparedFeed(
                stack,
                worlds.seeds,
                generators,
                label,
                batch_size=self.batch_size,
                refresh=self.refresh,
                share=1.0 if self.max_sentences is None else min(1.0, self.max_sentences / asked),
            )
        return self._on_logs(worlds, feed, loss, label, callbacks)


@dataclass(frozen=True)
class OnlinePG(PolicyGradient):
    """REINFORCE on the true environment, :func:`agents.gradients.online`: a skyline, and a way to a logging policy.

    Attributes:
        refresh: steps whose rounds are played at once with the policy at the first of them, and weighted by π / π_first
            later, unless the simulator is linear and Gaussian; for generators with a high cost a call.
    """

    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("refresh", self.refresh, 1)

    def fit(self, simulator: Simulator, *, seed: int = 0, callback: Callback | None = None) -> NeuralPolicy:
        """Learn a policy by playing ``steps · batch_size`` rounds of `simulator`.

        Raises:
            NumericalError: training diverged.
        """
        return self.fit_many([simulator], seeds=[seed], callback=callback)[0]

    def fit_many(
        self, simulators: Sequence[Simulator], *, seeds: Sequence[int] | None = None, callback: Callback | None = None
    ) -> list[NeuralPolicy]:
        """Learn a policy in each simulator as one batched problem."""
        check_simulators(simulators)
        label, chosen = "online PG", check_seeds(simulators, seeds)
        shapes = [(s.contexts.context_dim, s.contexts.query_dim, s.n_prompts) for s in simulators]
        if len(set(shapes)) != 1:
            raise DimensionError(f"simulators: expected the same d_x, d_q and number of prompts in all, got {shapes}")
        linear = all(simulator.exact and simulator.rewards.kind == "continuous" for simulator in simulators)
        feed: Feed[OnlineBatch]
        if linear:
            feed = LinearFeed(simulators, chosen, label, self.batch_size)
        else:
            feed = PlayedFeed(simulators, chosen, label, self.batch_size, self.refresh)

        def loss(policy: ActionDistribution, batch: OnlineBatch) -> Tensor:
            return gradients.online(policy, *batch.play(policy))

        catalogues = [simulator.prompts.fingerprint for simulator in simulators]
        d_x, d_q, n_prompts = shapes[0]
        return self._optimise(
            d_x + d_q, catalogues, n_prompts, feed, loss, chosen, label, () if callback is None else (callback,)
        )
