"""The guides in docs/ are executed, block by block, in the order in which a reader meets them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest

from agents.cli import main

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ("your-own-log.md", "your-own-domain.md", "your-own-model.md", "learned-distances.md")


def blocks(guide: str) -> list[tuple[str, str]]:
    """Language and content of each block."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    return re.findall(r"^```(python|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def forgotten(tmp_path: Path) -> Iterator[None]:
    """Afterwards, environments and modules that a guide added are gone: other tests see none of them."""
    ids, modules = set(gym.registry), set(sys.modules)
    yield
    for name in gym.registry.keys() - ids:
        del gym.registry[name]
    for name in sys.modules.keys() - modules:
        # Modules of the reader's own, not those of packages that happened to be imported first here.
        if tmp_path in Path(getattr(sys.modules[name], "__file__", None) or "/").resolve().parents:
            del sys.modules[name]


@pytest.mark.parametrize("guide", GUIDES)
def test_guide_runs(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, forgotten: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, object] = {"__name__": "__guide__"}
    for number, (language, content) in enumerate(blocks(guide)):
        if language == "python":
            exec(compile(content, f"{guide}, block {number}", "exec"), names)
            continue
        for line in content.splitlines():
            program, *words = shlex.split(line)
            assert program == "offprompts"
            assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("guide", GUIDES)
def test_guide_has_both_languages(guide: str) -> None:
    assert {language for language, _ in blocks(guide)} == {"python", "bash"}


def test_no_propensities_are_said_to_be_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What the guide says of a log without them is what the commands say."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, content in blocks("your-own-log.md"):
        if language == "python" and ("to_csv" in content):
            exec(compile(content, "guide", "exec"), names)
    columns = ["--context", "age", "visits", "--action", "prompt", "--reward", "clicked"]
    assert main(["import", "unknown.csv", "--out", "log", *columns]) == 0
    assert main(["learn", "log", "--learner", "is", "--out", "policy"]) == 1
    assert "needs the column 'propensity'" in capsys.readouterr().err


def test_a_guide_leaves_no_environment_behind() -> None:
    """Runs after the guides, in the order of the file."""
    assert "Recipes-v0" not in gym.registry
    assert "recipe_shop" not in sys.modules
