"""The README's examples are executed, in order, as a reader would; each second-level section starts afresh."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> dict[str, list[str]]:
    """Blocks of `language` of each second-level section that has any."""
    found = {}
    for part in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        own = re.findall(rf"^```{language}\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
        if own:
            found[part.splitlines()[0].strip()] = own
    return found


def named(block: str) -> str | None:
    """The file that a block is said to be the content of."""
    found = re.match(r"# (\w+\.py)\n", block)
    return found[1] if found else None


def sections() -> dict[str, str]:
    """Python blocks of each second-level section, joined, but for those that are files."""
    joined = {title: "\n".join(b for b in own if not named(b)) for title, own in blocks("python").items()}
    return {title: source for title, source in joined.items() if source}


def test_readme_has_examples() -> None:
    assert len(sections()) >= 3


@pytest.mark.parametrize("title", sections())
def test_examples_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(sections()[title], f"README.md, {title}", "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("title", blocks("bash"))
def test_commands_run(title: str, tmp_path: Path) -> None:
    for block in blocks("python").get(title, []):
        if name := named(block):
            (tmp_path / name).write_text(block, encoding="utf-8")
    for line in "".join(blocks("bash")[title]).splitlines():
        command = [sys.executable if word == "python" else word for word in shlex.split(line)]
        paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300)
    assert (tmp_path / "runs" / "quick" / "report.html").stat().st_size > 10_000


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^    |^|`)make ([a-z]+)\b", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = re.findall(r"^make [a-z]+$", script, flags=re.MULTILINE)
    assert "make test" in commands
    assert all(command in README for command in commands)


def test_versions_agree() -> None:
    import offprompts_env

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == offprompts_env.__version__
    assert f"version: {offprompts_env.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {offprompts_env.__version__}" in changelog
