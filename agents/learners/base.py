"""What every learner is made of: a frozen configuration, and an objective for the one training loop.

A learner looks at a log, and where the method is so defined at the generator and the logging policy; never at rewards
of sentences that were not logged. Several logs (worlds, seeds) are fitted as one batched problem, with the same result
as one by one.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from agents.feeds import LoggedRounds
from agents.gradients import ActionDistribution, by_scores
from agents.hierarchical import TreeHead, TreeSoftmax
from agents.networks import StackedMLP
from agents.policies import NeuralPolicy
from agents.streaming import Window, once, settled, training_windows
from agents.training import (
    Feed,
    Gradient,
    HasInputs,
    Phase,
    Schedule,
    StackedLogs,
    check_hidden,
    check_seeds,
    differentiate,
    train_in_phases,
    world_streams,
)
from agents.worlds import StreamedWorld, Worlds, check_one_a_log
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.simulator import OutputModel
from offprompts_env.streaming import LogStream
from offprompts_env.types import LoggedDataset, Policy

BatchT = TypeVar("BatchT", bound=HasInputs)
PolicyT = TypeVar("PolicyT", bound=Policy)


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
        log: LoggedDataset | LogStream,
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
        logs: Sequence[LoggedDataset | LogStream],
        *,
        generators: Sequence[OutputModel] | None = None,
        logging_policies: Sequence[Policy] | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Sequence[Policy]:
        """Learn a policy from each log, as one batched problem."""
        ...


@dataclass(frozen=True, eq=False)
class Objective(Generic[BatchT]):
    """What a learner minimises.

    Attributes:
        feed: the batches.
        gradient: of the loss of a batch with respect to the policy's logits; see :data:`agents.training.Gradient`.
        loss: ``(policy, batch)`` to one loss a world, (W,), where the gradient is made from it.
    """

    feed: Feed[BatchT]
    gradient: Gradient[BatchT]
    loss: Callable[[ActionDistribution, BatchT], Tensor] | None = None

    @classmethod
    def of(cls, feed: Feed[BatchT], loss: Callable[[ActionDistribution, BatchT], Tensor]) -> Objective[BatchT]:
        """Return the objective of a surrogate of :mod:`agents.gradients`, its arguments filled in, by autograd.

        `loss` maps ``(policy, batch)`` to one loss a world, (W,).
        """

        def of_logits(logits: Tensor, batch: BatchT) -> Tensor:
            return loss(ActionDistribution(logits), batch)

        return cls(feed, differentiate(of_logits), loss)

    @classmethod
    def by_scores(cls, feed: Feed[BatchT], loss: Callable[[ActionDistribution, BatchT], Tensor]) -> Objective[BatchT]:
        """Return the objective of a surrogate that is a sum of scores, by :func:`agents.gradients.by_scores`."""
        return cls(feed, by_scores(loss), loss)

    def phase(self, steps: int, head: TreeHead | None) -> Phase[BatchT]:
        """Return `steps` of training a softmax over all prompts, or the policy that `head` makes of the outputs.

        Raises:
            ConfigError: the gradient is written by hand, for a softmax over all prompts.
        """
        loss = self.loss
        if head is None:
            return Phase(steps, self.feed, self.gradient)
        if loss is None:
            raise ConfigError("tree: this method's gradient is for a softmax over all prompts; learn with tree=None")

        def of_outputs(outputs: Tensor, batch: BatchT) -> Tensor:
            return loss(head(outputs), batch)

        return Phase(steps, self.feed, differentiate(of_outputs))


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
        objective: Objective[Any],
        seeds: Sequence[int],
        label: str,
        callbacks: Sequence[Callback],
    ) -> list[NeuralPolicy]:
        phases = [objective.phase(self.steps, None)]
        return self._optimise_in_phases(n_inputs, catalogues, n_prompts, phases, seeds, label, callbacks)

    def _optimise_in_phases(
        self,
        n_inputs: int,
        catalogues: Sequence[str],
        n_prompts: int,
        phases: Iterable[Phase[Any]],
        seeds: Sequence[int],
        label: str,
        callbacks: Sequence[Callback],
        head: TreeHead | None = None,
    ) -> list[NeuralPolicy]:
        n_outputs = n_prompts if head is None else head.n_outputs
        network = StackedMLP.initialise(
            (n_inputs, *self.hidden, n_outputs), world_streams(seeds, label, "initial weights")
        )
        network.head = head

        def policies() -> list[NeuralPolicy]:
            if head is not None:
                return head.policies(network.unstack(), catalogues)
            return [NeuralPolicy(mlp, name) for mlp, name in zip(network.unstack(), catalogues, strict=True)]

        def on_step(step: int) -> bool:
            answers = [callback.on_step(step, policies()) for callback in callbacks if step % callback.every == 0]
            return True in answers

        watch = on_step if callbacks else None
        train_in_phases(network, phases, self._schedule(), label=label, on_step=watch)
        return policies()


class OfflineLearner(Generic[PolicyT]):
    """Learns from logs: what it is given is checked here, what it makes of it is its :meth:`_learn`."""

    def fit(
        self,
        log: LoggedDataset | LogStream,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> PolicyT:
        """Learn a policy from `log`.

        Args:
            log: logged rounds; a :class:`offprompts_env.streaming.LogStream` is learned from window by window.
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
        logs: Sequence[LoggedDataset | LogStream],
        *,
        generators: Sequence[OutputModel] | None = None,
        logging_policies: Sequence[Policy] | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Sequence[PolicyT]:
        """Learn a policy from each log as one batched problem; the same policies as :meth:`fit` gives one by one.

        See :mod:`agents.training` for how same they are. A log that is larger than a window is learned from by itself.
        """
        chosen, callbacks = check_seeds(logs, seeds), () if callback is None else (callback,)
        read = [log.load() if isinstance(log, LogStream) and log.n_windows <= 1 else log for log in logs]
        held = [log for log in read if not isinstance(log, LogStream)]
        if len(held) == len(read):
            worlds = Worlds(
                StackedLogs(held),
                None if generators is None else tuple(generators),
                None if logging_policies is None else tuple(logging_policies),
                tuple(chosen),
            )
            return self._learn(worlds, callbacks)
        check_one_a_log(logs, generators, logging_policies)
        policies = []
        for world, log in enumerate(read):
            generator = None if generators is None else generators[world]
            policy, seed = None if logging_policies is None else logging_policies[world], chosen[world]
            if isinstance(log, LogStream):
                policies.append(self._learn_stream(StreamedWorld(log, generator, policy, seed), callbacks))
            else:
                policies.append(self.fit(log, generator=generator, logging_policy=policy, seed=seed, callback=callback))
        return policies

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> Sequence[PolicyT]:
        raise NotImplementedError

    def _learn_stream(self, world: StreamedWorld, callbacks: Sequence[Callback]) -> PolicyT:
        raise ConfigError(
            f"{type(self).__name__}: learns from logs in memory only, got a stream of {len(world.log)} rows in "
            f"{world.log.n_windows} windows; pass stream.head(rows), or open it with a window that holds all rows"
        )


@dataclass(frozen=True)
class OfflinePolicyGradient(PolicyGradient, OfflineLearner[NeuralPolicy]):
    """Learns a neural softmax policy from logs by policy gradient.

    A method is its configuration, its :attr:`label` and its :meth:`_objective`.

    Attributes:
        tree: learn a policy in two levels, for large catalogues; None is one softmax over all prompts.
        label: what the method is called in messages, and in the names of its streams of random numbers.
    """

    tree: TreeSoftmax | None = None

    label: ClassVar[str] = "offline policy gradient"

    def _objective(self, worlds: Worlds) -> Objective[Any]:
        """Return what is minimised, after fitting whatever the method needs first."""
        raise NotImplementedError

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        return self._minimise(worlds, self._objective(worlds), callbacks)

    def _minimise(self, worlds: Worlds, objective: Objective[Any], callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        stack = worlds.stack
        catalogues = [log.prompts.fingerprint for log in stack.logs]
        head = None if self.tree is None else self.tree.head([log.prompts.embeddings for log in stack.logs])
        n_inputs, phases = stack.inputs.shape[1] - 1, [objective.phase(self.steps, head)]
        return self._optimise_in_phases(
            n_inputs, catalogues, stack.n_prompts, phases, worlds.seeds, self.label, callbacks, head
        )

    def _rounds(self, worlds: Worlds, parts: Sequence[Tensor] | None = None) -> LoggedRounds:
        """Return the feed of logged rounds, of `parts` of each log only where given."""
        return LoggedRounds(worlds.stack, worlds.seeds, self.label, self.batch_size, parts)

    def _learn_stream(self, world: StreamedWorld, callbacks: Sequence[Callback]) -> NeuralPolicy:
        # Without an objective for a window, as where policies are compared on held-out rounds.
        if type(self)._objective is OfflinePolicyGradient._objective:
            return super()._learn_stream(world, callbacks)
        return settled(self, world.log, world.seed)._minimise_stream(world, world.log, callbacks)

    def _minimise_stream(self, world: StreamedWorld, log: LogStream, callbacks: Sequence[Callback]) -> NeuralPolicy:
        """Minimise the objective of one window of `log`, which may be a part of the world's, after the other."""
        said: set[str] = set()
        head = None if self.tree is None else self.tree.head([log.prompts.embeddings])

        def phase(window: Window) -> Phase[Any]:
            with once(said):
                return self._objective(world.window(window)).phase(window.steps, head)

        def phases() -> Iterator[Phase[Any]]:
            for window in training_windows(log, self._schedule(), world.seed):
                yield phase(window)

        first = log.head(1)
        n_inputs, catalogue = first.context.shape[1] + first.query.shape[1], log.prompts.fingerprint
        (policy,) = self._optimise_in_phases(
            n_inputs, [catalogue], log.n_prompts, phases(), [world.seed], self.label, callbacks, head
        )
        return policy
