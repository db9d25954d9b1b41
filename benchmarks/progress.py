"""How far a sweep is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0
"""Least time between two lines where no terminal shows a bar."""


class Forecast:
    """The time left, by what a run of each learner took so far.

    Args:
        waiting: number of runs by learner.
        before: seconds that a run of a learner took in earlier sweeps; used until it is known from this one.
        workers: processes, used until the speed of this sweep shows.
    """

    def __init__(self, waiting: Mapping[str, int], before: Mapping[str, float], workers: int) -> None:
        self._waiting = Counter(waiting)
        self._before = dict(before)
        self._workers = workers
        self._runs: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def ended(self, learner: str, runs: int, seconds: float | None) -> None:
        """Take note of a task that is over.

        Args:
            learner: of the task.
            runs: of the task.
            seconds: it took; None where that says nothing of the next one (failed, or found in the store).
        """
        self._waiting[learner] -= runs
        if seconds is not None:
            self._runs[learner] += runs
            self._seconds[learner] = self._seconds.get(learner, 0.0) + seconds

    def work(self) -> float | None:
        """Return the seconds of one process that are left; None where nothing is known."""
        known = self._before | {name: seconds / self._runs[name] for name, seconds in self._seconds.items()}
        if not known:
            return None
        usual = sum(known.values()) / len(known)
        return sum(runs * known.get(name, usual) for name, runs in self._waiting.items())

    def left(self, elapsed: float) -> float | None:
        """Return the seconds that are left after `elapsed`; None where nothing is known."""
        work, done = self.work(), sum(self._seconds.values())
        if work is None:
            return None
        # Seconds of work a second: less than the number of processes where these wait for one another.
        speed = min(done / elapsed, self._workers) if done > 0 and elapsed > 0 else self._workers
        return work / speed


class Progress:
    """A bar on a terminal, a line now and then elsewhere.

    Args:
        stream: where it is shown.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._bar: Any = None
        self._done = self._total = 0
        self._started = self._shown = clock()
        self._forecast = Forecast({}, {}, 1)

    def start(self, waiting: Mapping[str, int], before: Mapping[str, float], workers: int) -> None:
        """Begin; see :class:`Forecast`."""
        self._total = sum(waiting.values())
        self._forecast = Forecast(waiting, before, workers)
        self._started = self._shown = self._clock()
        if self._stream.isatty() and self._total:
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs, {elapsed}{postfix}"
            self._bar = tqdm(total=self._total, file=self._stream, bar_format=shape)

    def ended(self, label: str, learner: str, runs: int, seconds: float | None) -> None:
        """Take note of a task that is over; see :meth:`Forecast.ended`."""
        self._forecast.ended(learner, runs, seconds)
        self._done += runs
        now = self._clock()
        left = self._forecast.left(now - self._started)
        words = f"about {duration(left)} left" if left is not None and self._done < self._total else ""
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(runs)
        elif now - self._shown >= LINE_SECONDS and self._done < self._total:
            self._shown = now
            since = duration(now - self._started)
            print(f"{self._done}/{self._total} runs in {since}, {words}: {label}", file=self._stream, flush=True)

    def close(self) -> None:
        """End."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return a time in words of two digits or so."""
    if seconds < 120:
        return f"{seconds:.1f} s" if 0.05 <= seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
