"""Learning from a log that is larger than memory: a window of it at a time, with the same network and the same Adam.

A learner's objective is made anew for each window; what it fits first (a reward model, a clone of the logging policy)
is fitted to the whole log, by streaming as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from agents.training import Schedule
from offprompts_env.rng import integer_seed
from offprompts_env.streaming import LogStream
from offprompts_env.types import LoggedDataset

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

# Rounds of a held-out part that are looked at: enough for three digits of a mean squared error.
HELD_OUT_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a log, and its part of the training.

    Attributes:
        log: the rounds.
        steps: gradient steps to do with them.
        seed: of all that is drawn meanwhile.
    """

    log: LoggedDataset
    steps: int
    seed: int


def training_windows(log: LogStream, schedule: Schedule, seed: int) -> Iterator[Window]:
    """Yield windows of `log`, whose steps add up to those of the schedule and are in proportion to their rows.

    The log is read as often as the schedule draws it, ``steps · batch_size / n`` times, but at least once: a short
    schedule sees every part of a long log, though not every round.
    """
    passes = max(1, round(schedule.steps * schedule.batch_size / len(log)))
    seen = done = 0
    for number in range(passes):
        for index, window in enumerate(log.windows(seed=integer_seed(seed, "pass", number))):
            seen += len(window)
            steps = round(schedule.steps * seen / (passes * len(log))) - done
            done += steps
            if steps:
                yield Window(window, steps, integer_seed(seed, "window", number, index))


@runtime_checkable
class FitsStreams(Protocol):
    """A way to fit something to a log, such as a reward regression, that can do so by streaming."""

    def fit_stream(self, log: LogStream, *, seed: int = 0) -> Any:
        """Fit all of `log`; return what takes this object's place in a configuration and needs no fit any more."""
        ...


def settled(config: ConfigT, log: LogStream, seed: int) -> ConfigT:
    """Return `config` with those of its settings that fit something fitted to all of `log`."""
    settings = ((field.name, getattr(config, field.name)) for field in fields(config))
    fitted = {name: value.fit_stream(log, seed=seed) for name, value in settings if isinstance(value, FitsStreams)}
    return replace(config, **fitted)


def without_numbers(message: str) -> str:
    """Return `message` with its numbers blotted out: what messages of different windows have in common."""
    return re.sub(r"\d[\d.,]*", "#", message)


@contextmanager
def once(said: set[str]) -> Iterator[None]:
    """Let a warning through unless one of `said` differs from it in numbers only: windows would repeat it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if (key := without_numbers(str(warning.message))) not in said:
            said.add(key)
            warnings.warn(warning.message, warning.category, stacklevel=3)
