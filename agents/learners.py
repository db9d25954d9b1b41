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
from agents.gradients import ActionDistribution
from agents.kernels import GaussianKernel, Kernel, LoggingDensity, NetworkDensity, blurred, generate
from agents.networks import StackedMLP, homogeneous
from agents.policies import NeuralPolicy, SoftmaxPolicy, UniformPolicy, check_catalogue, check_policy
from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.training import (
    BLOCK,
    Feed,
    HasInputs,
    Schedule,
    StackedLogs,
    check_seeds,
    differentiate,
    normals,
    stack_draws,
    train,
    uniforms,
    world_streams,
)
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, DimensionError, PropensityError
from offprompts_env.rng import stream
from offprompts_env.sampling import sample_actions
from offprompts_env.simulator import GaussianOutputs, LinearReward, OutputModel, Simulator
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, Policy

# Numbers of a pmf that are held at once: 8 MiB of float32.
_PMF_AT_ONCE = 1 << 21

BatchT = TypeVar("BatchT", bound=HasInputs)

OnStep = Callable[[int, list[NeuralPolicy]], bool | None]


@dataclass(frozen=True, slots=True)
class Callback:
    """Look at the policies while they are trained, for instance to track their true values.

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


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of logged rounds.

    Attributes:
        inputs: ``[x, q, 1]``, (W, B, d + 1).
        rows: where the rounds are in the stacked columns, (W, B).
        uniforms: to draw prompts with, (W, B).
    """

    inputs: Tensor
    rows: Tensor
    uniforms: Tensor


class _LoggedRounds:
    """Feed of logged rounds drawn with replacement."""

    def __init__(self, stack: StackedLogs, seeds: Sequence[int], label: str, batch_size: int) -> None:
        self._stack, self._batch_size = stack, batch_size
        self._rows = world_streams(seeds, label, "batches")
        self._uniforms = world_streams(seeds, label, "actions")

    def block(self, steps: int, network: StackedMLP) -> list[Batch]:
        steps = min(steps, BLOCK)
        rows = self._stack.rows(self._rows, steps, self._batch_size)
        drawn = uniforms(self._uniforms, steps, self._batch_size)
        return [Batch(*batch) for batch in zip(self._stack.inputs[rows], rows, drawn, strict=True)]


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
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for size in self.hidden:
            check_integer("hidden", size, 1)
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
        callback: Callback | None,
    ) -> list[NeuralPolicy]:
        network = StackedMLP.initialise(
            (n_inputs, *self.hidden, n_prompts), world_streams(seeds, label, "initial weights")
        )

        def policies() -> list[NeuralPolicy]:
            return [NeuralPolicy(mlp, name) for mlp, name in zip(network.unstack(), catalogues, strict=True)]

        def on_step(step: int) -> bool:
            return callback is not None and step % callback.every == 0 and callback.on_step(step, policies()) is True

        def loss(logits: Tensor, batch: BatchT) -> Tensor:
            return surrogate(ActionDistribution(logits), batch)

        watch = None if callback is None else on_step
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
            check_policy(policy, log)
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


def chosen_probabilities(policy: Policy, log: LoggedDataset) -> FloatArray:
    """Return ``π(a_i | x_i, q_i)`` of the logged prompts under `policy`, (n,)."""
    found = np.empty(len(log))
    size = max(1, _PMF_AT_ONCE // log.n_prompts)
    for start in range(0, len(log), size):
        part = slice(start, start + size)
        pmf = policy.probabilities(log.contexts.take(part))
        found[part] = pmf[np.arange(len(pmf)), log.action[part]]
    return found


def estimated_propensities(logging_policy: Policy, log: LoggedDataset) -> FloatArray:
    """Return π₀ of the logged prompts under a `logging_policy` that is said to have recorded them, (n,).

    Raises:
        PropensityError: it gives a logged prompt probability 0.
    """
    found = chosen_probabilities(logging_policy, log)
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
    """Learns from logs. A method is its configuration and what :meth:`_method` returns."""

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
        """Learn a policy from each log as one batched problem; the same policies as :meth:`fit` gives one by one."""
        stack = StackedLogs(logs)
        worlds = Worlds(
            stack,
            None if generators is None else tuple(generators),
            None if logging_policies is None else tuple(logging_policies),
            tuple(check_seeds(logs, seeds)),
        )
        return self._learn(worlds, callback)

    def _learn(self, worlds: Worlds, callback: Callback | None) -> list[NeuralPolicy]:
        raise NotImplementedError

    def _on_logs(
        self, worlds: Worlds, feed: Feed[BatchT], loss: Loss[BatchT], label: str, callback: Callback | None
    ) -> list[NeuralPolicy]:
        stack = worlds.stack
        catalogues = [log.prompts.fingerprint for log in stack.logs]
        n_inputs = stack.inputs.shape[1] - 1
        return self._optimise(n_inputs, catalogues, stack.n_prompts, feed, loss, worlds.seeds, label, callback)


@dataclass(frozen=True)
class RegressionPG(_Offline):
    """Policy gradient on a reward model of prompts, :func:`agents.gradients.regression`.

    Attributes:
        rewards: the regression, or :class:`agents.FittedRewards`.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)

    def _learn(self, worlds: Worlds, callback: Callback | None) -> list[NeuralPolicy]:
        label, stack = "regression PG", worlds.stack
        models = self.rewards.fit_many(stack.logs, seeds=worlds.seeds)
        network = StackedMLP.of([model.network for model in models])

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            actions = policy.sample(batch.uniforms)
            embeddings = stack.embeddings[stack.prompt_rows(actions)]
            inputs = torch.cat([batch.inputs[..., :-1], embeddings, batch.inputs[..., -1:]], dim=-1)
            return gradients.regression(policy, actions, network.forward(inputs)[..., 0])

        return self._on_logs(worlds, _LoggedRounds(stack, worlds.seeds, label, self.batch_size), loss, label, callback)


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

    def _learn(self, worlds: Worlds, callback: Callback | None) -> list[NeuralPolicy]:
        label, stack = "IS PG", worlds.stack
        propensity = worlds.propensities("agents.ImportanceSamplingPG")

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            rows = batch.rows
            return gradients.importance_sampling(
                policy, stack.action[rows], propensity[rows], stack.reward[rows], self.clip
            )

        return self._on_logs(worlds, _LoggedRounds(stack, worlds.seeds, label, self.batch_size), loss, label, callback)


@dataclass(frozen=True)
class BehaviorCloning(_Offline):
    """Maximum likelihood of the logged prompts, :func:`agents.gradients.cloning`: an estimate of the logging policy."""

    def _learn(self, worlds: Worlds, callback: Callback | None) -> list[NeuralPolicy]:
        label, stack = "behaviour cloning", worlds.stack

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            return gradients.cloning(policy, stack.action[batch.rows])

        return self._on_logs(worlds, _LoggedRounds(stack, worlds.seeds, label, self.batch_size), loss, label, callback)


class SentenceBatch(Protocol):
    """Logged rounds with sentences of prompts that the policy would choose."""

    @property
    def inputs(self) -> Tensor:
        """``[x, q, 1]``, (W, B, d + 1)."""
        ...

    @property
    def rows(self) -> Tensor:
        """Where the rounds are in the stacked columns, (W, B)."""
        ...

    @property
    def blur(self) -> Tensor:
        """Standard normals for the kernel, (W, B, d_o)."""
        ...

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return prompts (W, B), their sentences (W, B, d_o), and π over the policy the prompts were drawn from."""
        ...


class _GaussianWorlds:
    """Generators with ``s = base(q) + effects[a] + noise``, for the logged rounds of W worlds."""

    def __init__(self, stack: StackedLogs, generators: Sequence[GaussianOutputs]) -> None:
        self._stack = stack
        pairs = list(zip(generators, stack.logs, strict=True))
        self.base = StackedLogs.join([generator.base(log.contexts) for generator, log in pairs])
        self.effects = StackedLogs.join([generator.effects for generator in generators])
        self.std = torch.from_numpy(np.stack([generator.noise_std for generator in generators]))[:, None]

    def mean(self, rows: Tensor, actions: Tensor) -> Tensor:
        return self.base[rows] + self.effects[self._stack.prompt_rows(actions)]


@dataclass(frozen=True, slots=True)
class _FreshSentences:
    """A batch whose prompts are drawn from the policy of its own step."""

    inputs: Tensor
    rows: Tensor
    uniforms: Tensor
    noise: Tensor
    blur: Tensor
    worlds: _GaussianWorlds

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        actions = policy.sample(self.uniforms)
        return actions, self.worlds.mean(self.rows, actions) + self.noise, 1.0


class _FreshFeed:
    """Feed of batches for Gaussian generators: sentences cost next to nothing, so each step has its own."""

    def __init__(self, worlds: Worlds, generators: Sequence[GaussianOutputs], label: str, batch_size: int) -> None:
        self._rounds = _LoggedRounds(worlds.stack, worlds.seeds, label, batch_size)
        self._gaussian = _GaussianWorlds(worlds.stack, generators)
        self._noise = world_streams(worlds.seeds, label, "outputs")
        self._blur = world_streams(worlds.seeds, label, "blur")

    def block(self, steps: int, network: StackedMLP) -> list[SentenceBatch]:
        rounds = self._rounds.block(steps, network)
        shape = (len(rounds), rounds[0].rows.shape[1], self._gaussian.base.shape[1])
        noise = normals(self._noise, *shape) * self._gaussian.std
        blur = normals(self._blur, *shape)
        return [
            _FreshSentences(batch.inputs, batch.rows, batch.uniforms, own, other, self._gaussian)
            for batch, own, other in zip(rounds, noise, blur, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _PreparedSentences:
    """A batch whose prompts were drawn, with probability `proposal`, from the policy of an earlier step."""

    inputs: Tensor
    rows: Tensor
    actions: Tensor
    sentences: Tensor
    proposal: Tensor
    blur: Tensor

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.actions, self.sentences, policy.probability(self.actions) / self.proposal


class _PreparedFeed:
    """Feed of batches for any generator: sentences for a block of steps are asked for at once."""

    def __init__(self, worlds: Worlds, generators: Sequence[OutputModel], label: str, config: DSO) -> None:
        self._stack, self._generators = worlds.stack, generators
        self._refresh, self._batch_size = config.refresh, config.batch_size
        wanted = config.steps * config.batch_size
        self._share = 1.0 if config.max_sentences is None else min(1.0, config.max_sentences / wanted)
        names = ("batches", "actions", "outputs", "blur", "reuse")
        self._rows, self._uniforms, self._outputs, self._blur, self._reuse = (
            world_streams(worlds.seeds, label, name) for name in names
        )

    def block(self, steps: int, network: StackedMLP) -> list[SentenceBatch]:
        steps = min(steps, self._refresh)
        slots = steps * self._batch_size
        asked = max(1, round(self._share * slots))
        rows = self._stack.rows(self._rows, 1, asked)[0]
        actions, proposal = propose(network, self._stack.inputs[rows], uniforms(self._uniforms, 1, asked)[0])
        local = (rows - self._stack.offsets[:, None]).numpy()
        sentences = torch.from_numpy(
            np.stack(
                [
                    generate(generator, log.contexts, own, chosen, rng)
                    for generator, log, own, chosen, rng in zip(
                        self._generators, self._stack.logs, local, actions.numpy(), self._outputs, strict=True
                    )
                ]
            )
        )
        if asked == slots:
            index = torch.arange(slots).expand(len(rows), slots)
        else:
            index = stack_draws(lambda rng: rng.integers(asked, size=(1, slots)), self._reuse)[0]
        blur = normals(self._blur, steps, self._batch_size, sentences.shape[-1])
        world = torch.arange(len(rows))[:, None]
        batches: list[SentenceBatch] = []
        for step in range(steps):
            pick = (world, index[:, step * self._batch_size : (step + 1) * self._batch_size])
            own = rows[pick]
            batches.append(
                _PreparedSentences(
                    self._stack.inputs[own], own, actions[pick], sentences[pick], proposal[pick], blur[step]
                )
            )
        return batches


def propose(network: StackedMLP, inputs: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Draw prompts from the policies as they are now.

    Args:
        network: the policies.
        inputs: (W, m, d + 1).
        drawn: uniforms (W, m).

    Returns:
        prompts and their probabilities, (W, m) each.
    """
    size = max(1, _PMF_AT_ONCE // (network.worlds * network.sizes[-1]))
    actions, proposal = [], []
    for part, uniform in zip(torch.split(inputs, size, dim=1), torch.split(drawn, size, dim=1), strict=True):
        policy = ActionDistribution(network.forward(part))
        actions.append(policy.sample(uniform))
        proposal.append(policy.probability(actions[-1]))
    return torch.cat(actions, dim=1), torch.cat(proposal, dim=1)


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

    def _learn(self, worlds: Worlds, callback: Callback | None) -> list[NeuralPolicy]:
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
            feed = _FreshFeed(worlds, gaussian, label, self.batch_size)
        else:
            feed = _PreparedFeed(worlds, generators, label, self)
        return self._on_logs(worlds, feed, loss, label, callback)


class OnlineBatch(Protocol):
    """Rounds of the environment."""

    @property
    def inputs(self) -> Tensor:
        """``[x, q, 1]``, (W, B, d + 1)."""
        ...

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return prompts (W, B), their rewards (W, B), and π over the policy the prompts were drawn from."""
        ...


@dataclass(frozen=True, slots=True)
class _LinearRounds:
    """Rounds whose reward is ``intercept + weights · effects[a]``, noise included."""

    inputs: Tensor
    uniforms: Tensor
    weights: Tensor
    intercept: Tensor
    effects: Tensor
    first_prompt: Tensor

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        actions = policy.sample(self.uniforms)
        moved = (self.weights * self.effects[actions + self.first_prompt]).sum(-1)
        return actions, self.intercept + moved, 1.0


@dataclass(frozen=True, slots=True)
class _PlayedRounds:
    """Rounds that were played with prompts drawn, with probability `proposal`, from the policy of an earlier step."""

    inputs: Tensor
    actions: Tensor
    reward: Tensor
    proposal: Tensor

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.actions, self.reward, policy.probability(self.actions) / self.proposal


class _OnlineFeed:
    """What the two feeds of online rounds share: fresh contexts."""

    def __init__(self, simulators: Sequence[Simulator], seeds: Sequence[int], label: str, batch_size: int) -> None:
        self._simulators, self._batch_size = simulators, batch_size
        names = ("contexts", "actions", "outputs", "rewards")
        self._contexts, self._uniforms, self._outputs, self._rewards = (
            world_streams(seeds, label, name) for name in names
        )

    def _fresh(self, n: int) -> tuple[list[Contexts], Tensor]:
        contexts = [
            simulator.contexts.sample(n, rng) for simulator, rng in zip(self._simulators, self._contexts, strict=True)
        ]
        return contexts, torch.from_numpy(np.stack([homogeneous([part.context, part.query]) for part in contexts]))


class _LinearFeed(_OnlineFeed):
    """Feed of rounds of simulators that are linear in Gaussian outputs: played without leaving PyTorch."""

    def block(self, steps: int, network: StackedMLP) -> list[OnlineBatch]:
        steps = min(steps, BLOCK)
        contexts, inputs = self._fresh(steps * self._batch_size)
        effects, weights, intercept = [], [], []
        for simulator, part, output_rng, reward_rng in zip(
            self._simulators, contexts, self._outputs, self._rewards, strict=True
        ):
            generator, reward = simulator.outputs, simulator.rewards
            if not (isinstance(generator, GaussianOutputs) and isinstance(reward, LinearReward)):
                raise TypeError("linear rounds: expected a GaussianOutputs and a LinearReward")
            own = np.asarray(reward.weights(part), dtype=np.float32)
            noise = output_rng.standard_normal(own.shape, dtype=np.float32) * generator.noise_std
            mean = np.einsum("nd,nd->n", own, generator.base(part) + noise)
            effects.append(generator.effects)
            weights.append(own)
            intercept.append(simulator.noise.draw(mean, reward_rng))
        n_prompts = len(effects[0])
        first_prompt = torch.arange(0, len(effects) * n_prompts, n_prompts)[:, None]
        stacked = StackedLogs.join(effects)
        drawn = uniforms(self._uniforms, steps, self._batch_size)
        columns = [inputs, torch.from_numpy(np.stack(weights)), torch.from_numpy(np.stack(intercept))]
        split = [torch.split(column, self._batch_size, dim=1) for column in columns]
        return [
            _LinearRounds(own, drawn[step], weight, fixed, stacked, first_prompt)
            for step, (own, weight, fixed) in enumerate(zip(*split, strict=True))
        ]


class _PlayedFeed(_OnlineFeed):
    """Feed of rounds of any simulator, played for a block of steps at once."""

    def __init__(
        self, simulators: Sequence[Simulator], seeds: Sequence[int], label: str, batch_size: int, refresh: int
    ) -> None:
        super().__init__(simulators, seeds, label, batch_size)
        self._refresh = refresh

    def block(self, steps: int, network: StackedMLP) -> list[OnlineBatch]:
        n = min(steps, self._refresh) * self._batch_size
        contexts, inputs = self._fresh(n)
        actions, proposal = propose(network, inputs, uniforms(self._uniforms, 1, n)[0])
        reward = torch.from_numpy(
            np.stack(
                [
                    simulator.play(part, chosen, output_rng, reward_rng).reward
                    for simulator, part, chosen, output_rng, reward_rng in zip(
                        self._simulators, contexts, actions.numpy(), self._outputs, self._rewards, strict=True
                    )
                ]
            )
        )
        split = [torch.split(column, self._batch_size, dim=1) for column in (inputs, actions, reward, proposal)]
        return [_PlayedRounds(*batch) for batch in zip(*split, strict=True)]


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
        label, chosen = "online PG", check_seeds(simulators, seeds)
        shapes = [(s.contexts.context_dim, s.contexts.query_dim, s.n_prompts) for s in simulators]
        if len(set(shapes)) != 1:
            raise DimensionError(f"simulators: expected the same d_x, d_q and number of prompts in all, got {shapes}")
        linear = all(simulator.exact and simulator.rewards.kind == "continuous" for simulator in simulators)
        feed: Feed[OnlineBatch]
        if linear:
            feed = _LinearFeed(simulators, chosen, label, self.batch_size)
        else:
            feed = _PlayedFeed(simulators, chosen, label, self.batch_size, self.refresh)

        def loss(policy: ActionDistribution, batch: OnlineBatch) -> Tensor:
            return gradients.online(policy, *batch.play(policy))

        catalogues = [simulator.prompts.fingerprint for simulator in simulators]
        d_x, d_q, n_prompts = shapes[0]
        return self._optimise(d_x + d_q, catalogues, n_prompts, feed, loss, chosen, label, callback)


def record_rounds(simulator: Simulator, policy: Policy, n: int, seed: int = 0) -> LoggedDataset:
    """Record `n` rounds of `policy` straight from a simulator, without an environment or a file around it."""
    contexts = simulator.contexts.sample(n, stream(seed, "record", "contexts"))
    actions, propensities = sample_actions(policy, contexts, stream(seed, "record", "actions"))
    rounds = simulator.play(contexts, actions, stream(seed, "record", "outputs"), stream(seed, "record", "rewards"))
    return LoggedDataset(
        context=contexts.context,
        query=contexts.query,
        action=actions,
        propensity=propensities,
        reward=rounds.reward,
        output=rounds.outputs.embedding,
        prompts=simulator.prompts,
        sentence=rounds.outputs.text,
        user_id=contexts.user_id,
        item_id=contexts.item_id,
        query_text=contexts.query_text,
    )


def logging_policies(
    simulators: Sequence[Simulator],
    *,
    n: int = 10_000,
    beta: float = 1.0,
    regression: PromptRewardRegression | None = None,
    seeds: Sequence[int] | None = None,
) -> list[SoftmaxPolicy]:
    """Make the published kind of logging policy for each simulator.

    Softmax with β = `beta` over a prompt-reward regression fitted on `n` rounds of uniform prompts.

    Args:
        simulators: the worlds.
        n: uniform rounds.
        beta: inverse temperature.
        regression: settings of the regression.
        seeds: one a simulator.
    """
    chosen = check_seeds(simulators, seeds)
    logs = [
        record_rounds(simulator, UniformPolicy(simulator.n_prompts), n, seed)
        for simulator, seed in zip(simulators, chosen, strict=True)
    ]
    models = (PromptRewardRegression() if regression is None else regression).fit_many(logs, seeds=chosen)
    return [SoftmaxPolicy(model, model.n_prompts, beta, model.catalogue) for model in models]


def logging_policy(
    simulator: Simulator,
    *,
    n: int = 10_000,
    beta: float = 1.0,
    regression: PromptRewardRegression | None = None,
    seed: int = 0,
) -> SoftmaxPolicy:
    """Make the published kind of logging policy; see :func:`logging_policies`."""
    return logging_policies([simulator], n=n, beta=beta, regression=regression, seeds=[seed])[0]
