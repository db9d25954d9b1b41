"""The forecast, in numbers; what is shown where there is no terminal."""

import io

import pytest

from benchmarks.progress import Forecast, Progress, duration


def test_nothing_is_known_at_first() -> None:
    assert Forecast({"a": 2}, {}, 2).left(1.0) is None


def test_learners_are_weighed_by_what_they_took() -> None:
    forecast = Forecast({"slow": 3, "fast": 3}, {}, 1)
    forecast.ended("slow", 1, 100.0)
    forecast.ended("fast", 1, 10.0)
    assert forecast.work() == 220.0
    # Two processes did 110 seconds of work in 55.
    assert Forecast({"slow": 2}, {"slow": 100.0}, 2).left(0.0) == 100.0
    assert forecast.left(110.0) == pytest.approx(220.0)


def test_a_learner_that_was_never_seen_takes_what_is_usual() -> None:
    forecast = Forecast({"known": 1, "new": 2}, {"known": 5.0, "other": 15.0}, 1)
    assert forecast.work() == 5.0 + 2 * 10.0


def test_failures_and_finds_do_not_count_as_fast() -> None:
    forecast = Forecast({"a": 3}, {"a": 7.0}, 1)
    forecast.ended("a", 1, None)
    assert forecast.work() == 14.0


def test_a_line_a_minute_where_there_is_no_terminal() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, clock=lambda: now[0])
    progress.start({"a": 4}, {}, 1)
    for seconds in (30.0, 70.0, 80.0, 200.0):
        now[0] = seconds
        progress.ended("tiny/a", "a", 1, seconds=35.0)
    progress.close()
    assert stream.getvalue() == "2/4 runs in 70 s, about 70 s left: tiny/a\n"


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream)
    progress.start({"a": 2}, {}, 1)
    progress.ended("tiny/a", "a", 2, seconds=1.0)
    progress.close()
    assert "2/2 runs" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.26, "0.3 s"), (9.97, "10 s"), (70, "70 s"), (300, "5 min"), (9000, "2.5 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
