"""What the paper says in words, checked on rows."""

from __future__ import annotations

import pytest

from benchmarks.claims import BASELINES, claims, is_short
from benchmarks.methods import QUICK
from benchmarks.sweeps import SWEEPS
from tests.benchmarks.some_rows import SETTING, row

ALL = (*BASELINES, "dso")
NOISE = (-0.01, 0.0, 0.01)
"""What worlds add to a mean: standard errors of .006."""


def point(sweep, name, means, wobble=NOISE, **settings):
    return [
        row(learner, world, mean + add, sweep=sweep, point=name, **settings)
        for learner, mean in means.items()
        for world, add in enumerate(wobble)
    ]


def sizes(**leads):
    """DSO ahead by `leads`, at one size a size of that name, .1 elsewhere."""
    return [
        one
        for n in (500, 1000, 2000, 4000, 8000)
        for one in point("data_size", f"n={n}", {**dict.fromkeys(BASELINES, 0.3), "dso": 0.3 + leads.get(f"n{n}", 0.1)})
    ]


def over(sweep, easy, hard, falls):
    return [
        *point(sweep, easy, dict.fromkeys(ALL, 0.8)),
        *point(sweep, hard, {name: 0.8 - falls.get(name, 0.5) for name in ALL}, wobble=(0.02, 0.0, -0.02)),
    ]


def taus(kernel, density, means):
    return [
        one
        for tau, mean in zip((0.5, 1, 2, 4), means, strict=True)
        for one in point("kernel", f"tau={tau:g}/kernel={kernel}/density={density}", {"dso": mean})
    ]


def ten(**means):
    return point("prompts", "prompts=10", {**dict.fromkeys(ALL, 0.78), **means})


AHEAD, PROMPTS, NEAR, DR, NOISE_FALL, NO_NOISE, GAUSSIAN, UNIFORM, TEXT, PUBLISHED = range(10)


@pytest.mark.parametrize(
    ("which", "rows", "holds", "figures"),
    [
        (AHEAD, sizes(), True, "smallest lead 0.100 ± 0.000, over regression PG at n=500"),
        (AHEAD, sizes(n4000=-0.02), False, "smallest lead −0.020 ± 0.000, over regression PG at n=4000"),
        (AHEAD, sizes()[:-1], True, "0.100"),
        (AHEAD, sizes()[:-2], None, "data_size: n=8000/dso has 1 of at least 2 worlds"),
        (AHEAD, [], None, "data_size: n=500/dso has 0 of at least 2 worlds"),
        (PROMPTS, over("prompts", "prompts=10", "prompts=1000", {"dso": 0.3}), True, "DSO falls by 0.300"),
        (
            PROMPTS,
            over("prompts", "prompts=10", "prompts=1000", {"dso": 0.3, "is": 0.29}),
            False,
            "IS PG falls by 0.290",
        ),
        (PROMPTS, over("noise", "prompts=10", "prompts=1000", {"dso": 0.3}), None, "0 of at least 2"),
        (NEAR, ten(), True, "0.780 ± 0.006"),
        (NEAR, ten(dr=0.84), True, "DR PG 0.840"),
        (NEAR, ten(dr=0.85), False, "DR PG 0.850"),
        (NEAR, ten(dso=0.7), False, "DSO 0.700"),
        (DR, ten(dr=0.8), True, "DR PG − regression PG 0.020 ± 0.000"),
        (DR, ten(potec=0.8), False, "DR PG − POTEC −0.020 ± 0.000"),
        (NOISE_FALL, over("noise", "noise=0", "noise=3", {"dso": 0.3}), True, "DSO falls by 0.300"),
        (NOISE_FALL, over("noise", "noise=0", "noise=3", {}), False, "DSO falls by 0.500"),
        (NO_NOISE, point("noise", "noise=0", {**dict.fromkeys(ALL, 0.5), "potec": 0.6, "dr": 0.6}), True, "POTEC 0.6"),
        (NO_NOISE, point("noise", "noise=0", {**dict.fromkeys(ALL, 0.5), "potec": 0.6}), True, "POTEC 0.6"),
        (
            NO_NOISE,
            point("noise", "noise=0", {**dict.fromkeys(ALL, 0.5), "is": 0.6, "dr": 0.6}),
            False,
            "IS PG − POTEC",
        ),
        (GAUSSIAN, taus("gaussian", "network", (0.45, 0.46, 0.44, 0.2)), True, "τ = 4 0.200 ± 0.006"),
        (GAUSSIAN, taus("gaussian", "network", (0.3, 0.46, 0.44, 0.2)), False, "τ = 0.5 0.300"),
        (GAUSSIAN, taus("gaussian", "network", (0.45, 0.46, 0.44, 0.44)), False, "τ = 4 0.440"),
        (GAUSSIAN, taus("gaussian", "monte-carlo", (0.45, 0.46, 0.44, 0.2)), None, "0 of at least 2"),
        (UNIFORM, taus("uniform", "monte-carlo", (0.1, 0.1, 0.4, 0.1)), True, "τ = 2 0.400"),
        (UNIFORM, taus("uniform", "monte-carlo", (0.1, 0.4, 0.4, 0.1)), False, "τ = 1 0.400"),
        (TEXT, point("movielens", "prompts=all", {**dict.fromkeys(ALL, 0.3), "dso": 0.5}), True, "0.200 ± 0.000"),
        (TEXT, point("movielens", "prompts=all", {**dict.fromkeys(ALL, 0.3), "dso": 0.1}), False, "−0.200 ± 0.000"),
        (TEXT, point("movielens_published", "prompts=all", {**dict.fromkeys(ALL, 0.3), "dso": 0.5}), None, "0 of at"),
        (
            PUBLISHED,
            point("movielens_published", "prompts=all", {**dict.fromkeys(ALL, 0.3), "dso": 0.5}),
            True,
            "0.200",
        ),
    ],
)
def test_a_statement_holds_or_does_not_or_lacks_rows(which, rows, holds, figures):
    found = claims(rows)[which]
    assert (found.holds, figures in found.figures) == (holds, True), found


def test_learning_seeds_are_no_worlds():
    rows = point("movielens", "prompts=all", dict.fromkeys(ALL, 0.3), wobble=(0.0,))
    twice = [*rows, *point("movielens", "prompts=all", dict.fromkeys(ALL, 0.3), wobble=(0.0,), seed=1)]
    assert claims(twice)[TEXT].figures == "movielens: prompts=all/dso has 1 of at least 2 worlds"


def test_differences_are_paired():
    ahead = [row("dso", world, 0.31 + world, sweep="movielens", point="prompts=all") for world in range(3)]
    rest = [
        row(name, world, 0.3 + world, sweep="movielens", point="prompts=all") for name in BASELINES for world in (0, 2)
    ]
    assert claims([*ahead, *rest])[TEXT].holds
    assert claims([*ahead[:2], *rest])[TEXT].holds is None


def test_short_schedules_are_named():
    quick = SETTING.replace("Effort(steps=1.0, learning_rate=1.0)", repr(QUICK))
    assert [is_short(row(setting=one)) for one in (SETTING, quick, "Estimators(n=5)")] == [False, True, False]
    rows = ten()
    short = [*ten()[:-1], row("dso", 2, 0.78, sweep="prompts", point="prompts=10", setting=quick)]
    assert [claims(some)[NEAR].outcome for some in (rows, short, [])] == [
        "holds", "holds (short schedules)", "not enough rows",
    ]  # fmt: skip
    assert "Test: each mean is in that range" in str(claims(rows)[NEAR])


def test_what_is_checked_is_what_sweeps_run():
    points = {(sweep.name, point.name): set(point.methods) for sweep in SWEEPS.values() for point in sweep.points}
    for found in claims([]):
        sweep, missing = found.figures.split(": ", 1)
        name, learner = missing.split(" has ")[0].rsplit("/", 1)
        assert learner in points[sweep, name]
    for sweep, name in (("prompts", "prompts=1000"), ("noise", "noise=3"), ("data_size", "n=8000")):
        assert {*BASELINES, "dso"} <= points[sweep, name]
