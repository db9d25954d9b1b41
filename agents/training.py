"""The one optimisation loop: many worlds or seeds are trained as one batched problem.

A learner gives three things: a stack of networks, a feed of batches, and a pure surrogate whose derivative drives the
network's outputs. Stacking is a property of this loop. Each world draws its initial weights, batches and actions from
its own named streams, so a world learns the same alone or in a stack: bit for bit where the batch size is a multiple of
16, otherwise up to the rounding of products that are aligned differently in memory.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``T`` steps of a block.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from tqdm import tqdm

from agents.networks import StackedMLP, homogeneous
from offprompts_env.config import check_integer, check_kind, check_number
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError
from offprompts_env.rng import stream
from offprompts_env.simulator import Simulator
from offprompts_env.types import Array, IntArray, LoggedDataset

# Steps for which batches are gathered and random numbers are drawn at once, to spread the cost of each call.
BLOCK = 250

# The smallest number above zero, made of its bits: where subnormals are flushed it cannot be written as one.
_SUBNORMAL = torch.ones((), dtype=torch.int32).view(torch.float32)


class TrainingWarning(UserWarning):
    """Training ended, but what it gave should not be trusted blindly; the message says why and what to change."""


class AssumptionWarning(TrainingWarning):
    """Something that the log does not say was assumed or estimated; the message names it. One a fit and assumption."""


class HasInputs(Protocol):
    """A batch, as far as the loop looks into it."""

    @property
    def inputs(self) -> Tensor:
        """Network inputs, (W, B, d + 1)."""
        ...


BatchT = TypeVar("BatchT", bound=HasInputs)
FeedBatch = TypeVar("FeedBatch", bound=HasInputs, covariant=True)


class Feed(Protocol[FeedBatch]):
    """Where batches come from."""

    def block(self, steps: int, network: StackedMLP) -> Sequence[FeedBatch]:
        """Return the batches of the next `steps` steps; `network` is the one being trained."""
        ...


Surrogate = Callable[[Tensor, BatchT], Tensor]
"""``(outputs (W, B, d_out), batch) -> losses (W,)``: pure, and differentiable in `outputs`."""

Gradient = Callable[[Tensor, BatchT], tuple[Tensor, Tensor]]
"""``(outputs, batch) -> losses (W,), derivative of their sum with respect to outputs``."""


def differentiate(surrogate: Surrogate[BatchT]) -> Gradient[BatchT]:
    """Return the function that gives losses and, by autograd, their derivative with respect to the outputs."""

    def gradient(outputs: Tensor, batch: BatchT) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            losses = surrogate(leaf, batch)
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), slope

    return gradient


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train, with Adam.

    Attributes:
        steps: gradient steps.
        batch_size: ``B``.
        learning_rate: of Adam; its other settings are PyTorch's defaults.
        weight_decay: of AdamW: each step shrinks the parameters by ``learning_rate · weight_decay``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_number("learning_rate", self.learning_rate, 0, strict=True)
        check_number("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True, eq=False)
class Phase(Generic[BatchT]):
    """A part of training with batches of its own, such as a window of a log that is larger than memory.

    Attributes:
        steps: gradient steps.
        feed: the batches.
        gradient: from :func:`differentiate`, or written by hand.
    """

    steps: int
    feed: Feed[BatchT]
    gradient: Gradient[BatchT]


def train(
    network: StackedMLP,
    feed: Feed[BatchT],
    gradient: Gradient[BatchT],
    schedule: Schedule,
    *,
    label: str,
    on_step: Callable[[int], bool] | None = None,
) -> Tensor:
    """Train `network` in place.

    Args:
        network: W networks.
        feed: the batches.
        gradient: from :func:`differentiate`, or written by hand.
        schedule: of Adam.
        label: what the progress bar and error messages call it.
        on_step: called with the number of steps done after each; True ends training.

    Returns:
        Mean loss of each block of steps, (blocks, W).

    Raises:
        NumericalError: a loss became NaN or infinite.
    """
    return train_in_phases(network, [Phase(schedule.steps, feed, gradient)], schedule, label=label, on_step=on_step)


def train_in_phases(
    network: StackedMLP,
    phases: Iterable[Phase[Any]],
    schedule: Schedule,
    *,
    label: str,
    on_step: Callable[[int], bool] | None = None,
) -> Tensor:
    """Train `network` in place, with one Adam through all `phases`, as :func:`train` otherwise.

    A phase is asked for when the one before is done, and let go of before the next one is asked for.
    """
    optimiser = Adam(network.parameters, network.gradient, schedule.learning_rate, schedule.weight_decay)
    curve: list[Tensor] = []
    done = 0

    def run(phase: Phase[Any], bar: tqdm[Any]) -> bool:
        """Do the steps of `phase`; say whether training is to end."""
        nonlocal done
        end, stop = done + phase.steps, False
        while done < end and not stop:
            total = torch.zeros(network.worlds)
            batches, begun = phase.feed.block(min(BLOCK, end - done), network), done
            for batch in batches:
                with no_subnormals():
                    losses, slope = phase.gradient(network.forward(batch.inputs), batch)
                    network.backward(slope)
                    optimiser.step()
                    total += losses
                done += 1
                if on_step is not None and on_step(done):
                    stop = True
                    break
            bar.update(done - begun)
            curve.append(total / (done - begun))
            _check_losses(curve[-1], label, done)
        return stop

    with tqdm(total=schedule.steps, desc=label, disable=not sys.stderr.isatty(), leave=False) as bar:
        for phase in phases:
            with one_thread(), torch.no_grad():
                stop = run(phase, bar)
            if stop:
                break
            del phase
    return torch.stack(curve)


class Adam:
    """Adam (Kingma and Ba, 2015) on one flat tensor, in place.

    PyTorch's fused kernel with its default settings, without the optimiser class around it: at this size the
    bookkeeping takes as long as the step.

    Args:
        parameters: what is moved.
        gradient: read at each step.
        learning_rate: step size.
        weight_decay: decoupled from the gradient, as in AdamW (Loshchilov and Hutter, 2019).
    """

    def __init__(self, parameters: Tensor, gradient: Tensor, learning_rate: float, weight_decay: float = 0.0) -> None:
        self._parameters, self._gradient, self._learning_rate = [parameters], [gradient], learning_rate
        self._shrink = 1 - learning_rate * weight_decay
        self._mean, self._square = [torch.zeros_like(parameters)], [torch.zeros_like(parameters)]
        self._steps = [torch.zeros(())]

    def step(self) -> None:
        """Move the parameters against the gradient."""
        if self._shrink != 1:
            self._parameters[0].mul_(self._shrink)
        adam(
            self._parameters,
            self._gradient,
            self._mean,
            self._square,
            [],
            self._steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to one thread, and give the caller's number back.

    Products this small lose more to the synchronisation of threads than a second core gives; on a busy machine threads
    that wait for one another make a run many times slower. Several cores are for several worlds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class no_subnormals:  # noqa: N801  (a context manager, written as a class: it is entered at every step)
    """Let this thread take numbers below 1.2e-38 for zero, and go back to what the caller had.

    A policy of many prompts comes to give most of them next to no probability. Their gradients, squared, are subnormal
    in Adam's second moment and stay so, and many processors compute with those a hundred times slower.
    """

    def __enter__(self) -> None:
        self._before = float(_SUBNORMAL * 1.0) == 0.0
        torch.set_flush_denormal(True)

    def __exit__(self, *_: object) -> None:
        torch.set_flush_denormal(self._before)


def _check_losses(losses: Tensor, label: str, step: int) -> None:
    if not bool(torch.isfinite(losses).all()):
        world = int(torch.isfinite(losses).int().argmin())
        raise NumericalError(
            f"{label}: the loss of world {world} became {losses[world].item()} before step {step}; "
            "lower learning_rate, and check the log for extreme rewards or inputs (scale them to order one)"
        )


def warn_if_useless(label: str, error: float, baseline: float) -> None:
    """Warn if a fit's held-out error (mean square) is above that of predicting a constant."""
    if error > baseline:
        warnings.warn(
            f"{label}: held-out error {error:.4g} is above {baseline:.4g}, that of predicting the mean; what is "
            "learned from it follows noise. Record more rounds, or train for fewer steps",
            TrainingWarning,
            stacklevel=3,
        )


def world_streams(seeds: Sequence[int], *names: str) -> list[np.random.Generator]:
    """Return the generator called `names` of every world's seed."""
    return [stream(seed, *names) for seed in seeds]


def stack_draws(draw: Callable[[np.random.Generator], Array], rngs: Sequence[np.random.Generator]) -> Tensor:
    """Return draws (T, ...) of every world as one tensor (T, W, ...)."""
    return torch.from_numpy(np.stack([draw(rng) for rng in rngs], axis=1))


def normals(rngs: Sequence[np.random.Generator], *shape: int) -> Tensor:
    """Return standard normals (T, W, ...) for `shape` (T, ...)."""
    return stack_draws(lambda rng: rng.standard_normal(shape, dtype=np.float32), rngs)


def uniforms(rngs: Sequence[np.random.Generator], *shape: int) -> Tensor:
    """Return uniforms on [0, 1), (T, W, ...) for `shape` (T, ...)."""
    return stack_draws(lambda rng: rng.random(shape, dtype=np.float32), rngs)


class StackedLogs:
    """The rounds of W logs one after the other, as tensors.

    Attributes:
        logs: the logs.
        inputs: ``[x, q, 1]``, (Σn, d_x + d_q + 1).
        action: (Σn,) int64.
        reward: (Σn,).
        output: (Σn, d_o).
        embeddings: prompt embeddings of every world, (W · A, d_e).

    Raises:
        ConfigError: something else than a log.
        DataError: no log.
        DimensionError: logs of different dimensions or numbers of prompts.
    """

    def __init__(self, logs: Sequence[LoggedDataset]) -> None:
        if len(logs) == 0:
            raise DataError("logs: expected at least one log, got none")
        for log in logs:
            check_kind("log", log, LoggedDataset, "read a recorded one with LoggedDataset.load(path)")
        shapes = [
            (log.context.shape[1], log.query.shape[1], log.output.shape[1], log.prompts.embeddings.shape)
            for log in logs
        ]
        for world, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise DimensionError(
                    f"logs: expected d_x, d_q, d_o and prompts {shapes[0]} as in the first log, got {shape} in log "
                    f"{world}; fit logs of different shapes one by one"
                )
        self.logs = tuple(logs)
        self.sizes = [len(log) for log in logs]
        self.offsets = torch.tensor(np.cumsum([0, *self.sizes[:-1]]), dtype=torch.int64)
        self.inputs = self.join([homogeneous([log.context, log.query]) for log in logs])
        self.action = self.join([log.action for log in logs])
        self.reward = self.join([log.reward for log in logs])
        self.output = self.join([log.output for log in logs])
        self.embeddings = self.join([log.prompts.embeddings for log in logs])

    def require_outputs(self, label: str) -> None:
        """Raise :class:`DataError` if the logs have no outputs, which `label` needs."""
        if self.output.shape[1] == 0:
            raise DataError(
                f"{label}: the log has no outputs; use agents.PromptRewardRegression, agents.RegressionPG or "
                "agents.ImportanceSamplingPG without a generator, which need none, or record a log with outputs"
            )

    @staticmethod
    def join(columns: Sequence[Array]) -> Tensor:
        """Return one column of every log as one tensor."""
        return torch.from_numpy(np.concatenate(columns))

    @property
    def worlds(self) -> int:
        """``W``."""
        return len(self.logs)

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.logs[0].n_prompts

    def split(self, rngs: Sequence[np.random.Generator], fraction: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return the rows of each log to train on, a random `fraction`, and the held-out others."""
        kept, held_out = [], []
        for rng, size, offset in zip(rngs, self.sizes, self.offsets, strict=True):
            rows = torch.from_numpy(rng.permutation(size)) + offset
            cut = max(1, round(fraction * size))
            kept.append(rows[:cut])
            held_out.append(rows[cut:])
        return kept, held_out

    def local(self, rows: Sequence[Tensor]) -> list[IntArray]:
        """Return stacked `rows` of each log as rows of that log."""
        return [(own - offset).numpy() for own, offset in zip(rows, self.offsets, strict=True)]

    def rows(
        self,
        rngs: Sequence[np.random.Generator],
        steps: int,
        batch_size: int,
        parts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Draw rounds with replacement: rows of the stacked columns, (T, W, B); of `parts` only where given."""
        shape = (steps, batch_size)
        if parts is not None:
            worlds = zip(parts, rngs, strict=True)
            return torch.stack([part[torch.from_numpy(rng.integers(len(part), size=shape))] for part, rng in worlds], 1)
        drawn = [rng.integers(size, size=shape) for rng, size in zip(rngs, self.sizes, strict=True)]
        return torch.from_numpy(np.stack(drawn, axis=1)) + self.offsets[:, None]

    def prompt_rows(self, actions: Tensor) -> Tensor:
        """Return the rows of :attr:`embeddings` that `actions` (W, B) of every world index."""
        return actions + torch.arange(0, self.worlds * self.n_prompts, self.n_prompts)[:, None]


def check_hidden(hidden: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of hidden units as a tuple.

    Raises:
        ConfigError: no layer, or one without units.
    """
    if len(hidden) == 0:
        raise ConfigError("hidden: expected at least one layer, got none; (100,) is the published default")
    for size in hidden:
        check_integer("hidden", size, 1)
    return tuple(hidden)


def check_simulators(simulators: Sequence[Simulator]) -> None:
    """Raise :class:`ConfigError` for something else than simulators."""
    for simulator in simulators:
        check_kind("simulator", simulator, Simulator, "of an environment pass env.unwrapped.simulator")


def check_one_each(name: str, given: Sequence[object] | None, logs: Sequence[object]) -> None:
    """Raise :class:`ConfigError` unless `given`, which error messages call `name`, is None or has one entry a log."""
    if given is not None and len(given) != len(logs):
        raise ConfigError(f"{name}: expected {len(logs)}, one a log, got {len(given)}")


def check_seeds(logs: Sequence[object], seeds: Sequence[int] | None) -> list[int]:
    """Return one seed a log: `seeds`, or 0, 1, 2, ... by default.

    Raises:
        ConfigError: not as many seeds as logs.
    """
    chosen = list(range(len(logs))) if seeds is None else list(seeds)
    check_one_each("seeds", chosen, logs)
    return chosen
