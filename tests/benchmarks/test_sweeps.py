"""Ids, keys, and the choice of runs."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.sweeps import SWEEPS, select
from offprompts_env.errors import ConfigError

ONE_RUN = [
    "data_size/n=8000/world=3/learner=dso",
    "prompts/prompts=1000/world=3/learner=dso",
    "noise/noise=1/world=3/learner=dso",
    "kernel/tau=1/kernel=gaussian/density=network/world=3/learner=dso",
]


def test_ids_are_unique_and_stable() -> None:
    names = [run.id for sweep in SWEEPS.values() for run in sweep.runs()]
    assert len(set(names)) == len(names)
    assert {*ONE_RUN, "movielens/prompts=all/log=2/seed=3/learner=dso"} <= set(names)
    assert names == [run.id for sweep in SWEEPS.values() for run in sweep.runs()]


def test_one_run_of_several_sweeps_has_one_key() -> None:
    assert len({run.key for run in select(ONE_RUN)}) == 1


def test_different_runs_have_different_keys() -> None:
    runs = select(["data_size/n=500/world=1", "data_size/n=1000/world=1", "noise/noise=2/world=2"])
    assert len({run.key for run in runs}) == len(runs)
    assert not {run.key for run in runs} & {run.key for run in select(["data_size", "noise"], short=True)}


def test_assets_of_ones_own_are_other_runs_of_the_same_ids() -> None:
    own, usual = (select(["movielens/prompts=all/log=0/seed=0"], bundle=bundle) for bundle in ("/assets", None))
    assert [run.id for run in own] == [run.id for run in usual]
    assert not {run.key for run in own} & {run.key for run in usual}
    assert {run.point.setting.bundle for run in own} == {"/assets"}  # type: ignore[attr-defined]
    assert {run.key for run in select(ONE_RUN, bundle="/assets")} == {run.key for run in select(ONE_RUN)}


def test_a_number_of_prompts_is_for_sweeps_on_text() -> None:
    fewer = select(["movielens/prompts=50"], prompts=50)
    assert {run.point.setting.prompts for run in fewer} == {50}  # type: ignore[attr-defined]
    assert {run.point.x for run in fewer} == {50}
    assert len(fewer) == len(select(["movielens"]))
    for start in ("prompts=50", "*"):
        unbounded = select([f"movielens_published/{start}/sentences=unbounded"], prompts=50)
        assert len(unbounded) == 25
        assert {run.point.x for run in unbounded} == {50}
    assert {run.key for run in select(["movielens_budget"], prompts=50)}.isdisjoint(
        {run.key for run in select(["movielens_budget"])}
    )
    assert {run.key for run in select(ONE_RUN, prompts=50)} == {run.key for run in select(ONE_RUN)}
    with pytest.raises(SystemExit):
        main(["list", "movielens", "--prompts", "x"])
    assert main(["list", "movielens", "--prompts", "5000"]) == 2


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("data_size", 5 * 10 * 20),
        ("data_size/", 5 * 10 * 20),
        ("data_size/n=500", 10 * 20),
        ("data_size/n=500/world=1", 10),
        ("data_size/*/learner=dso", 5 * 20),
        ("data_size/n=500/world=[01]/learner=is", 2),
        ("data_size/n=500/world=1/learner=is", 1),
    ],
)
def test_patterns_choose(pattern: str, count: int) -> None:
    assert len(select([pattern])) == count


def test_two_patterns_choose_a_run_once() -> None:
    assert len(select(["data_size/n=500", "data_size/n=500/world=1"])) == 10 * 20


def test_fewer_worlds_and_quick_forms() -> None:
    assert {run.world for run in select(["noise"], worlds=3)} == {0, 1, 2}
    assert len(select(["noise"], short=True)) < len(select(["noise"]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data_siz", "did you mean 'data_size'"),
        ("data_size/n=50/world=1/learner=is", "the nearest id is 'data_size/n=500/world=1/learner=is'"),
        ("data_size/n=5", "no run matches"),
    ],
)
def test_a_pattern_without_runs_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select([pattern])
