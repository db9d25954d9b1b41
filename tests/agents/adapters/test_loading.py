"""Reading agents of any class, and policies of agents on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import agents
import offprompts_env as op
from agents import adapters
from agents.adapters import VowpalWabbit, load_agent
from agents.adapters.base import Adapter
from agents.adapters.loading import _OTHERS, _SAFE
from agents.cli.main import main
from offprompts_env.errors import StorageError
from tests.agents.adapters.conformance import N_PROMPTS, simulator

pytest.importorskip("vowpalwabbit")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An agent, and a log."""
    folder = tmp_path_factory.mktemp("agents")
    world = simulator()
    log = op.collect(world, agents.UniformPolicy(N_PROMPTS), 300, folder / "log", progress=False)
    agent = VowpalWabbit(world.prompts)
    agent.learn(log)
    return agent.save(folder / "agent"), folder / "log"


def test_the_command_line_evaluates_agents(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *map(str, saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimates"]["snips"]["value"]
    log = op.LoggedDataset.load(saved[1])
    agent = load_agent(saved[0])
    assert isinstance(agent, VowpalWabbit)
    assert found == pytest.approx(agents.SNIPS().estimate(agent, log).value)


def test_agents_of_every_class_can_be_read() -> None:
    # FunctionAgent is made of functions, and is not saved.
    kinds = {kind.__name__ for kind in vars(adapters).values() if isinstance(kind, type) and issubclass(kind, Adapter)}
    assert {*_SAFE, *_OTHERS} == kinds - {"Adapter", "FunctionAgent"}


def test_an_unknown_class_is_named(saved: tuple[Path, Path], tmp_path: Path) -> None:
    described = json.loads((saved[0] / "agent.json").read_text()) | {"kind": "Other"}
    (tmp_path / "agent.json").write_text(json.dumps(described))
    with pytest.raises(StorageError, match=r"expected one of Coba, .*got 'Other'"):
        load_agent(tmp_path)
    with pytest.raises(StorageError, match=r"agent\.json"):
        load_agent(tmp_path / "nothing")
