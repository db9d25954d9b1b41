"""The three engines: the same rows from each, one thread a worker, and what becomes of a task that fails."""

import importlib
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import agents
from benchmarks.clusters import Dask, Ray, _fresh_modules
from benchmarks.engines import DIED, Engine, Failure, Joblib, processes
from benchmarks.methods import Effort, Method, Own
from benchmarks.plan import Point, Sweep
from benchmarks.running import Done, Made, Task, perform, tasks_of
from benchmarks.settings.vectors import VectorSetting
from offprompts_env.errors import ConfigError, MissingDependencyError
from tests.benchmarks.probes import die_once, probe

ENGINES: dict[str, Engine] = {"joblib": Joblib(2), "ray": Ray(2), "dask": Dask(2)}
AGENT = """
import agents
def make(prompts, seed):
    return agents.UniformPolicy(len(prompts.embeddings))
"""
PROBES = ["ok", "raise", "die", "threads"]


def work(task: object) -> object:
    return perform(task) if isinstance(task, Task) else probe(str(task))


def tasks(store: Path) -> list[Task]:
    setting = VectorSetting(n=50, prompts=5, effort=Effort(steps=1e-3), contexts=100, curve_contexts=50)
    methods: dict[str, Method] = {"regression": agents.RegressionPG(), "dso": agents.DSO(), "own": Own.of("mine:make")}
    sweep = Sweep("tiny", "Tiny", "nothing", (Point("n=50", 50.0, setting, methods),), worlds=1)
    return [task for task, _ in tasks_of(sweep.runs(), store)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, object]]:
    """What became of the probes and of a small sweep, by engine."""
    here = tmp_path_factory.mktemp("engines")
    (here / "mine.py").write_text(AGENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        found = {}
        for name, engine in ENGINES.items():
            asked: list[object] = [*PROBES, *tasks(here / name)]
            found[name] = dict(engine.run(work, asked))
    sys.modules.pop("mine", None)
    return found


def bits(made: Made) -> object:
    return replace(made.result, seconds=0.0, shared_seconds=0.0, wall_seconds=0.0)


@pytest.mark.parametrize("name", ENGINES)
def test_every_task_ends_once(outcomes: dict[str, dict[int, object]], name: str) -> None:
    assert sorted(outcomes[name]) == list(range(len(PROBES) + 3))
    assert outcomes[name][0] == "ok"


@pytest.mark.parametrize("name", ENGINES)
def test_an_error_is_that_tasks_alone(outcomes: dict[str, dict[int, object]], name: str) -> None:
    raised = outcomes[name][1]
    assert isinstance(raised, Failure)
    assert (raised.message, raised.kind) == ("ValueError: as asked in two lines", "ValueError")
    assert "probes.py" in raised.trace


@pytest.mark.parametrize("name", ENGINES)
def test_a_task_that_kills_its_worker_twice_fails_and_the_others_go_on(
    outcomes: dict[str, dict[int, object]], name: str
) -> None:
    died = outcomes[name][2]
    assert isinstance(died, Failure)
    assert died.message == DIED
    assert not any(isinstance(outcomes[name][index], Failure) for index in (0, 3, 4, 5, 6))


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_has_one_thread(outcomes: dict[str, dict[int, object]], name: str) -> None:
    assert outcomes[name][3] == (1, "1", "1")


@pytest.mark.parametrize("name", ["ray", "dask"])
def test_results_are_the_same_to_the_bit(outcomes: dict[str, dict[int, object]], name: str) -> None:
    for index in (4, 5, 6):
        ours, theirs = outcomes["joblib"][index], outcomes[name][index]
        assert isinstance(ours, Done)
        assert isinstance(theirs, Done)
        assert [bits(made) for made in ours.made] == [bits(made) for made in theirs.made]
        assert ours.made[0].versions == theirs.made[0].versions


def test_a_task_whose_worker_dies_once_is_tried_again(tmp_path: Path) -> None:
    assert dict(Joblib(1).run(die_once, [tmp_path / "died", tmp_path / "also"])) == {0: "second", 1: "second"}


def test_tasks_that_a_dying_worker_held_are_not_to_blame() -> None:
    pytest.importorskip("distributed")
    found = dict(Dask(1).run(probe, ["die", "ok", "ok", "die", "ok"]))
    assert {index for index, what in found.items() if isinstance(what, Failure)} == {0, 3}
    assert [found[index] for index in (1, 2, 4)] == ["ok"] * 3


def test_closing_stops_the_workers() -> None:
    before = set(psutil.Process().children(recursive=True))
    with closing(Joblib(2).run(probe, ["ok", "sleep", "sleep"])) as endings:  # type: ignore[type-var]
        assert next(endings) == (0, "ok")
    deadline = time.monotonic() + 10
    while (left := _workers(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def _workers(before: set[psutil.Process]) -> list[str]:
    found = []
    for process in set(psutil.Process().children(recursive=True)) - before:
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "LokyProcess" in " ".join(process.cmdline()):
                found.append(str(process))
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("workers", [0, -2])
def test_no_workers_is_an_error(workers: int) -> None:
    with pytest.raises(ConfigError, match="--workers: expected a positive number"):
        processes(workers)


@pytest.mark.parametrize(("engine", "package"), [(Ray(), "ray"), (Dask(), "distributed")])
def test_what_is_not_installed_is_named(engine: Engine, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'offprompts-env\["):
        list(engine.run(probe, ["ok"]))


def test_workers_of_an_existing_cluster_forget_modules_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        monkeypatch.syspath_prepend(tmp_path)
        for form in ("first", "second"):
            (tmp_path / "changing.py").write_text(f"def work(task):\n    return '{form}'\n")
            importlib.invalidate_caches()
            changing = importlib.import_module("changing")
            found = dict(Dask(address=cluster.scheduler_address).run(changing.work, ["task"]))
            del sys.modules["changing"]
            assert found == {0: form}


def test_workers_never_forget_python_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "mine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("mine")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "path", list(sys.path))
    # A project such as a home folder, with the installation in it.
    _fresh_modules([], "/").setup(None)
    assert {"json", "numpy", "distributed"} <= set(sys.modules)
    assert "mine" not in sys.modules


@pytest.mark.parametrize("engine", [Ray(address="127.0.0.1:9"), Ray(address="nowhere")])
def test_an_address_where_nothing_listens_is_named(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="expected a running Ray cluster"):
        list(engine.run(probe, ["ok"]))
