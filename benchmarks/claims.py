"""What the paper says of its figures in words, each as a check on rows.

A check compares means over worlds; differences are paired over the worlds that both sides have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.methods import TITLES, Effort
from benchmarks.pages.markup import number
from benchmarks.rows import Row
from benchmarks.summaries import grouped, over_worlds, standard_error

BASELINES = ("regression", "is", "dr", "potec", "greedy")
"""Published learners beside DSO that see a log only."""

_FULL = repr(Effort())
_TAUS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, checked.

    Attributes:
        says: the statement.
        test: when it is taken to hold.
        holds: whether it does; None where there are too few rows.
        figures: what that rests on, or what is missing.
        short: some rows are of a share of the published schedules (``--quick``).
    """

    says: str
    test: str
    holds: bool | None
    figures: str
    short: bool = False

    @property
    def outcome(self) -> str:
        """In words."""
        words = {True: "holds", False: "does not hold", None: "not enough rows"}[self.holds]
        return f"{words} (short schedules)" if self.short and self.holds is not None else words

    def __str__(self) -> str:
        return f"{self.says}: {self.outcome}. Test: {self.test}. {self.figures}."


def is_short(row: Row) -> bool:
    """Return whether a row is of a share of the published schedules: then it says nothing of the published numbers."""
    return "Effort(" in row.config and _FULL not in row.config


class _TooFewError(Exception):
    """Two worlds are needed, and fewer are there."""


@dataclass(frozen=True)
class _Cells:
    """Scores of a sweep, means over learning seeds: (point, learner) to world to score."""

    scores: Mapping[tuple[str, str], Mapping[int, float]]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> _Cells:
        groups = grouped(rows, lambda row: (row.point, row.learner))
        return cls({key: over_worlds(own) for key, own in groups.items()})

    def worlds(self, point: str, learner: str) -> Mapping[int, float]:
        found = self.scores.get((point, learner), {})
        if len(found) < 2:
            raise _TooFewError(f"{point}/{learner} has {len(found)} of at least 2 worlds")
        return found

    def mean(self, point: str, learner: str) -> tuple[float, float]:
        """Return mean and standard error."""
        return _mean(list(self.worlds(point, learner).values()))

    def lead(self, first: tuple[str, str], second: tuple[str, str]) -> tuple[float, float]:
        """Return the mean of first − second over common worlds, and its standard error."""
        left, right = self.worlds(*first), self.worlds(*second)
        common = sorted(set(left) & set(right))
        if len(common) < 2:
            raise _TooFewError(
                f"{'/'.join(first)} and {'/'.join(second)} have {len(common)} of at least 2 common worlds"
            )
        return _mean([left[world] - right[world] for world in common])

    def listed(self, point: str, learners: Sequence[str]) -> str:
        ranked = sorted(learners, key=lambda learner: -self.mean(point, learner)[0])
        return ", ".join(f"{TITLES[learner]} {_shown(self.mean(point, learner))}" for learner in ranked)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return sum(values) / len(values), standard_error(values)


def _shown(value: tuple[float, float]) -> str:
    return f"{number(value[0])} ± {number(value[1])}"


def _surely_positive(value: tuple[float, float]) -> bool:
    return value[0] > 2 * value[1]


_Check = Callable[[_Cells], tuple[bool, str]]


def _falls_less(easy: str, hard: str) -> _Check:
    def check(cells: _Cells) -> tuple[bool, str]:
        falls = {name: cells.lead((easy, name), (hard, name)) for name in (*BASELINES, "dso")}
        worlds = set.intersection(*(set(cells.worlds(point, name)) for point in (easy, hard) for name in falls))
        if len(worlds) < 2:
            raise _TooFewError(f"{easy} and {hard} have {len(worlds)} of at least 2 common worlds")

        def fall(name: str) -> list[float]:
            return [cells.worlds(easy, name)[world] - cells.worlds(hard, name)[world] for world in sorted(worlds)]

        less = [_mean([a - b for a, b in zip(fall(name), fall("dso"), strict=True)]) for name in BASELINES]
        return all(map(_surely_positive, less)), "; ".join(
            f"{TITLES[name]} falls by {_shown(value)}" for name, value in falls.items()
        )

    return check


def _near(point: str, low: float, high: float) -> _Check:
    def check(cells: _Cells) -> tuple[bool, str]:
        names = (*BASELINES, "dso")
        means = [cells.mean(point, name) for name in names]
        near = all(low - 2 * error <= mean <= high + 2 * error for mean, error in means)
        return near, cells.listed(point, names)

    return check


def _highest(point: str, first: str) -> _Check:
    def check(cells: _Cells) -> tuple[bool, str]:
        names = (*BASELINES, "dso")
        others = [name for name in names if name != first]
        next_one = max(others, key=lambda name: cells.mean(point, name)[0])
        lead = cells.lead((point, first), (point, next_one))
        holds = cells.mean(point, first)[0] > cells.mean(point, next_one)[0]
        return holds, f"{cells.listed(point, names)}; {TITLES[first]} − {TITLES[next_one]} {_shown(lead)}"

    return check


def _not_behind(point: str, leaders: Sequence[str]) -> _Check:
    def check(cells: _Cells) -> tuple[bool, str]:
        names = (*BASELINES, "dso")
        others = [name for name in names if name not in leaders]
        leads = {(b, a): cells.lead((point, b), (point, a)) for b in others for a in leaders}
        ahead = [
            f"{TITLES[b]} − {TITLES[a]} {_shown(lead)}" for (b, a), lead in leads.items() if _surely_positive(lead)
        ]
        return not ahead, "; ".join([cells.listed(point, names), *ahead])

    return check


def _leads(points: Sequence[str], first: str, others: Sequence[str]) -> _Check:
    def check(cells: _Cells) -> tuple[bool, str]:
        leads = {(p, b): cells.lead((p, first), (p, b)) for p in points for b in others}
        (point, other), least = min(leads.items(), key=lambda item: item[1][0])
        said = f"smallest lead {_shown(least)}, over {TITLES[other]} at {point}"
        return all(map(_surely_positive, leads.values())), said

    return check


def _taus(kernel: str, density: str) -> list[str]:
    return [f"tau={tau:g}/kernel={kernel}/density={density}" for tau in _TAUS]


def _over_tau(cells: _Cells, points: Sequence[str]) -> str:
    return ", ".join(
        f"τ = {tau:g} {_shown(cells.mean(point, 'dso'))}" for tau, point in zip(_TAUS, points, strict=True)
    )


def _flat_then_drops(cells: _Cells) -> tuple[bool, str]:
    points = _taus("gaussian", "network")
    means = [cells.mean(point, "dso")[0] for point in points[:3]]
    drops = [cells.lead((point, "dso"), (points[3], "dso")) for point in points[:3]]
    return max(means) - min(means) <= 0.05 and all(map(_surely_positive, drops)), _over_tau(cells, points)


def _only_near_two(cells: _Cells) -> tuple[bool, str]:
    points = _taus("uniform", "monte-carlo")
    leads = [cells.lead((points[2], "dso"), (point, "dso")) for point in points if point != points[2]]
    return all(map(_surely_positive, leads)), _over_tau(cells, points)


_SURELY = "by more than two paired standard errors"
_CHECKS: Sequence[tuple[str, str, str, _Check]] = (
    (
        "data_size",
        "DSO is ahead of the other offline learners at every data size",
        f"its mean is above each of theirs {_SURELY}",
        _leads([f"n={n}" for n in (500, 1000, 2000, 4000, 8000)], "dso", BASELINES),
    ),
    (
        "prompts",
        "the baselines fall steeply as prompts grow, DSO much less",
        f"from 10 to 1,000 prompts each baseline falls more than DSO {_SURELY}",
        _falls_less("prompts=10", "prompts=1000"),
    ),
    (
        "prompts",
        "with 10 prompts every method is near .75–.83",
        "each mean is in that range or within two of its standard errors of it",
        _near("prompts=10", 0.75, 0.83),
    ),
    ("prompts", "with 10 prompts DR is ahead", "its mean is the highest", _highest("prompts=10", "dr")),
    (
        "noise",
        "the baselines fall steeply as noise grows, DSO much less",
        f"from noise 0 to 3 each baseline falls more than DSO {_SURELY}",
        _falls_less("noise=0", "noise=3"),
    ),
    (
        "noise",
        "without noise POTEC and DR lead",
        f"no other method is ahead of either {_SURELY}",
        _not_behind("noise=0", ("potec", "dr")),
    ),
    (
        "kernel",
        "a Gaussian kernel with a network density is flat in τ up to 2 and drops at 4",
        f"means at τ = 0.5, 1, 2 within .05 of one another, each above that at 4 {_SURELY}",
        _flat_then_drops,
    ),
    (
        "kernel",
        "a uniform kernel with Monte Carlo works near τ = 2 only",
        f"the mean at τ = 2 is above that at 0.5, 1 and 4 {_SURELY}",
        _only_near_two,
    ),
    (
        "movielens",
        "on MovieLens DSO is ahead of regression PG, IS PG, DR PG and POTEC",
        f"its mean is above each of theirs {_SURELY}, over logs",
        _leads(["prompts=all"], "dso", ("regression", "is", "dr", "potec")),
    ),
    (
        "movielens_published",
        "on MovieLens, logged as in the paper, DSO with 30,000 sentences is ahead of those four",
        f"its mean is above each of theirs {_SURELY}, over logs",
        _leads(["prompts=all"], "dso", ("regression", "is", "dr", "potec")),
    ),
)


def claims(rows: Iterable[Row]) -> list[Claim]:
    """Return the statements of the paper, each checked on `rows`."""
    by_sweep = grouped(rows, lambda row: row.sweep)
    found = []
    for sweep, says, test, check in _CHECKS:
        own = by_sweep.get(sweep, [])
        try:
            holds, figures = check(_Cells.of(own))
        except _TooFewError as missing:
            found.append(Claim(says, test, None, f"{sweep}: {missing}"))
        else:
            found.append(Claim(says, test, holds, figures, any(map(is_short, own))))
    return found
