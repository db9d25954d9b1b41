"""The command line as a user meets it: what is printed where, exit codes, messages, interrupts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import agents
import offprompts_env as op
from agents.cli import main
from agents.cli.main import COMMANDS
from agents.cli.settings import read_settings, with_settings
from offprompts_env.errors import ConfigError
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet

ROOT = Path(__file__).parents[2]
ENV = "OffPrompts-Synthetic-v0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recorded log, a policy learned from half of it, and one learned from all."""
    folder = tmp_path_factory.mktemp("made")
    log = str(folder / "log")
    assert main(["record", ENV, "--n", "600", "--out", log, "--env", "n_prompts=6", "seed=2", "--quiet"]) == 0
    learn = ["learn", log, "--learner", "is", "--set", "steps=20"]
    assert main([*learn, "--hold-out", "0.5", "--out", str(folder / "policy")]) == 0
    assert main([*learn, "--out", str(folder / "fitted")]) == 0
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "agents.cli", *words.split()], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": paths}, timeout=120, check=False,
    )  # fmt: skip


def test_help_lists_every_command(capsys) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}  " in shown for name in COMMANDS)
    assert "examples:" in shown


def test_help_loads_nothing_heavy() -> None:
    """Of the command line itself: the package `agents` is stood in for, as it loads torch when it is imported."""
    code = (
        "import sys, types; package = types.ModuleType('agents'); package.__path__ = ['agents']; "
        "sys.modules['agents'] = package; from agents.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'pyarrow', 'tyro') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("card", "build-assets")])
def test_help_of_commands_has_examples(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"offprompts {command} " in capsys.readouterr().out.split("In use:")[1]


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"offprompts {op.__version__}"


def test_record_is_collect(here: Path) -> None:
    log = LoggedDataset.load("log")
    env = agents_env(n_prompts=6, seed=2)
    same = op.collect(env, agents.UniformPolicy(6), 600, seed=0, progress=False)
    np.testing.assert_array_equal(log.reward, same.reward)
    assert log.metadata.env_id == ENV


def agents_env(**settings):
    import gymnasium as gym

    return gym.make(ENV, **settings)


def test_learn_is_fit_and_evaluate_is_estimate(here: Path, capsys) -> None:
    log = LoggedDataset.load("log")
    policy = agents.ImportanceSamplingPG(steps=20).fit(log, seed=0)
    fitted = agents.load_policy("fitted", log.prompts)
    np.testing.assert_array_equal(policy.probabilities(log.contexts), fitted.probabilities(log.contexts))
    assert main(["evaluate", "fitted", "log", "--estimator", "is", "--set", "clip=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    estimate = agents.IS(clip=3).estimate(policy, log)
    assert found["estimates"]["is"]["value"] == pytest.approx(estimate.value)
    assert found["estimates"]["is"]["interval"] == pytest.approx(estimate.interval)
    assert found["logging_policy"]["value"] == pytest.approx(log.reward.mean(), rel=1e-5)
    assert "flatter" in found["warnings"][0]


def test_evaluation_uses_the_rounds_that_were_held_out(here: Path, capsys) -> None:
    assert main(["evaluate", "policy", "log", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["rounds"] == 300
    assert found["warnings"] == []
    assert "300 of 600 rounds, those held out" in printed.err
    # Whoever learned from the other half, with the same seed, gets the same policy; no round is in both.
    log = LoggedDataset.load("log")
    from agents.cli.logs import split

    train, rest = split(log, 0.5, 0)
    assert rest is not None
    again = agents.ImportanceSamplingPG(steps=20).fit(train, seed=0)
    policy = agents.load_policy("policy")
    np.testing.assert_array_equal(again.probabilities(log.contexts), policy.probabilities(log.contexts))
    assert not set(map(bytes, train.context)) & set(map(bytes, rest.context))


def test_evaluation_on_another_log_uses_all_of_it(here: Path, capsys, tmp_path: Path) -> None:
    LoggedDataset.load("log").take(slice(0, 100)).save(tmp_path / "other")
    assert main(["evaluate", "policy", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 100


def test_all_estimators_and_the_truth(here: Path, capsys) -> None:
    quick = ["rewards.steps=5", "cloning.steps=5", "n_samples=1"]
    assert main(["evaluate", "uniform", "log", "--all", "--truth", "--set", *quick]) == 0
    printed = capsys.readouterr()
    for name in ("is", "dr", "offcem", "kernel-dr", "truth", "logging policy"):
        assert f"\n{name} " in printed.out
    assert main(["evaluate", "uniform", "log", "--all", "--no-generator", "--json", "--set", *quick[:2]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refused"]["kernel-is"] == "lacks generator"
    assert "dr" in found["estimates"]


def test_generator_comes_from_the_environment_of_the_log(here: Path, tmp_path: Path, capsys) -> None:
    quick = ["--set", "steps=2", "density.steps=2", "cloning.steps=2"]
    assert main(["learn", "log", "--learner", "dso", "--out", str(tmp_path / "a"), *quick]) == 0
    assert main(["learn", "log", "--learner", "dso", "--out", str(tmp_path / "b"), "--no-generator", *quick]) == 2
    assert "asks the frozen generator" in capsys.readouterr().err


def test_an_environment_id_from_a_file_runs_no_code(here: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    log = replace(LoggedDataset.load("log"), metadata=LogMetadata(env_id="evil:OffPrompts-Synthetic-v0"))
    log.save(tmp_path / "evil-log")
    assert main(["learn", str(tmp_path / "evil-log"), "--learner", "dso", "--out", str(tmp_path / "p")]) == 1
    assert "--no-generator" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_tables_are_logs(ending: str, here: Path, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    n = 60
    prompts = PromptSet(np.eye(3), ("brief", "precise", "warm"))
    log = LoggedDataset(
        context=rng.normal(size=(n, 2)), query=np.zeros((n, 0)), action=np.arange(n) % 3,
        reward=rng.integers(2, size=n), propensity=np.full(n, 1 / 3), output=np.zeros((n, 0)), prompts=prompts,
    )  # fmt: skip
    frame = log.to_dataframe().drop(columns="action").rename(columns={"context_0": "age", "reward": "clicked"})
    file = tmp_path / f"service.{ending}"
    {"csv": lambda: frame.to_csv(file, index=False), "parquet": lambda: frame.to_parquet(file),
     "jsonl": lambda: frame.to_json(file, orient="records", lines=True)}[ending]()  # fmt: skip
    columns = ["--context", "age", "context_1", "--action", "prompt", "--reward", "clicked"]
    assert main(["inspect", str(file), "--json", *columns]) == 0
    shape = json.loads(capsys.readouterr().out)["shape"]
    assert (shape["rounds"], shape["prompts"], shape["context"], shape["query"]) == (n, 3, 2, 0)
    (tmp_path / "prompts.txt").write_text("brief\nprecise\nwarm\nnever shown\n")
    given = [*columns, "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["import", str(file), "--out", str(tmp_path / "log"), *given]) == 0
    again = LoggedDataset.load(tmp_path / "log")
    np.testing.assert_array_equal(again.action, log.action)
    np.testing.assert_allclose(again.context, log.context, rtol=1e-6)
    assert again.n_prompts == 4


def test_render_shows_rounds(here: Path, capsys) -> None:
    assert main(["render", "log", "--rows", "2", "--first", "3"]) == 0
    shown = capsys.readouterr().out
    log = LoggedDataset.load("log")
    assert shown.count("round ") == 2
    assert f"round   4\nuser    ({log.context[4, 0]:+.2f}" in shown
    assert f"reward  {log.reward[4]:+.3f}" in shown
    assert main(["render", "log", "--rows", "2", "--json"]) == 0
    assert [one["prompt"] for one in json.loads(capsys.readouterr().out)["rounds"]] == log.action[:2].tolist()


def test_methods_lists_and_describes(capsys) -> None:
    assert main(["methods"]) == 0
    assert "sentence-greedy" in capsys.readouterr().out
    assert main(["methods", "dso"]) == 0
    shown = capsys.readouterr().out
    assert "tau = 1.0: bandwidth" in shown
    assert "density.steps = 10000: gradient steps." in shown
    assert ":class:" not in shown


WRONG = [
    ("lern", 2, "did you mean 'learn'?"),
    ("inspect nosuch", 1, "nosuch: expected a log or a file, there is none"),
    ("inspect log --context a", 2, "names of columns are for files"),
    ("record OffPrompts-Synth-v0 --out x", 2, "did you mean 'OffPrompts-Synthetic-v0'?"),
    (f"record {ENV} --out x --env n_promts=5", 2, "did you mean 'n_prompts'?"),
    (f"record {ENV} --out x --env n_prompts", 2, "expected name=value"),
    (f"record {ENV} --out x --n 0", 2, "expected an integer ≥ 1, got 0"),
    (f"record {ENV} --out x --policy nosuch", 1, "the directory of a saved policy"),
    (f"record {ENV} --out log --env n_prompts=6", 1, "found one of 600 rows"),
    ("learn log --learner dos --out x", 2, "did you mean 'dso'?"),
    ("learn log --learner is --out x --set step=5", 2, "did you mean 'steps'?"),
    ("learn log --learner is --out x --set steps=abc", 2, "steps: expected an integer ≥ 1, got 'abc'"),
    ("learn log --learner is --out x --set steps=1 steps=2", 2, "steps is given twice"),
    ("learn log --learner is --out x --set hidden.steps=1", 2, "has no setting 'steps'"),
    ("learn log --learner regression --out x --set rewards=5", 2, "rewards.steps"),
    ("learn log --learner is --out x --hold-out 1", 2, "expected a share in [0, 1)"),
    ("learn log --learner is --out policy", 1, "pass --overwrite"),
    ("evaluate policy log --estimator snip", 2, "did you mean 'snips'?"),
    ("evaluate policy log --set clp=4", 2, "did you mean 'clip'?"),
    ("evaluate policy log --estimator snips is --set clp=4", 2, "did you mean 'clip'?"),
    ("evaluate log log", 1, "expected a directory that save wrote"),
    ("evaluate nosuch log", 1, "there is no directory 'nosuch'"),
    ("render log --rows 0", 2, "--rows: expected an integer ≥ 1"),
    ("methods dsoo", 2, "did you mean 'dso'?"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "said"), WRONG)
def test_what_is_wrong_is_said_in_one_line(words: str, code: int, said: str, here: Path, capsys) -> None:
    assert main(words.split()) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("offprompts: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert not Path("x").exists()


@pytest.mark.parametrize("words", ["learn log", "inspect log --contxt a", "record --n x", "evaluate"])
def test_wrong_options_are_bad_usage(words: str, here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_no_command_is_bad_usage(capsys) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


class Interrupted(agents.UniformPolicy):
    """Ctrl-C in the third batch."""

    def __init__(self, n_prompts: int) -> None:
        super().__init__(n_prompts)
        object.__setattr__(self, "left", [2])

    def sample(self, contexts, rng):
        if not self.left[0]:
            raise KeyboardInterrupt
        self.left[0] -= 1
        return super().sample(contexts, rng)


def test_interrupted_recording_keeps_its_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    record = ["record", ENV, "--n", "10000", "--env", "n_prompts=4", "--quiet", "--out"]
    with monkeypatch.context() as patched:
        patched.setattr("agents.cli.record.open_policy", lambda name, prompts: Interrupted(len(prompts)))
        assert main([*record, "log"]) == 130
    said = capsys.readouterr().err
    assert (
        "offprompts: interrupted: log has 8,192 of 10,000 rows; go on with the same command and --mode append" in said
    )
    assert main([*record, "log", "--mode", "append"]) == 0
    assert main([*record, "whole"]) == 0
    first, second = (LoggedDataset.load(name) for name in ("log", "whole"))
    np.testing.assert_array_equal(first.reward, second.reward)


def test_in_a_process_of_its_own(here: Path) -> None:
    """JSON is alone on standard output, warnings are on the other; a closed pipe ends quietly."""
    found = run("inspect log --json", here)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["shape"]["rounds"] == 600
    closed = subprocess.run(
        f"{sys.executable} -m agents.cli render log --rows 600 | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=here, text=True, capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert closed.stdout.splitlines() == ["round   0", "0"]
    assert closed.stderr == ""


def test_damaged_provenance_of_a_policy(here: Path, tmp_path: Path, capsys) -> None:
    import shutil

    shutil.copytree("policy", tmp_path / "policy")
    for content in ("{", "{}", '{"learner": "is", "settings": {}, "log": "x", "rounds": 1, "hold_out": 7, "seed": 0}'):
        (tmp_path / "policy" / "learned.json").write_text(content)
        assert main(["evaluate", str(tmp_path / "policy"), "log"]) == 1
        assert "learned.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "value"),
    [("a=1", 1), ("a=1e-3", 1e-3), ("a=true", True), ("a=None", None), ("a=50,20", (50, 20)), ("a=exact", "exact"),
     ("a=x=y", "x=y"), ("a= 3 ", 3), ('a={"b": true}', {"b": True}), ("a={'b': 1}", {"b": 1}), ("a={x}", "{x}"),
     ("a=NaN", "NaN")],
)  # fmt: skip
def test_settings_are_read(word: str, value: object) -> None:
    assert read_settings([word], "--set") == {"a": value}


def test_settings_reach_inner_records() -> None:
    changed = with_settings(agents.DSO(), {"density.steps": 7, "tau": 0.5, "hidden": 30})
    assert changed == agents.DSO(tau=0.5, hidden=(30,), density=agents.NetworkDensity(steps=7))
    with pytest.raises(ConfigError, match="density"):
        with_settings(agents.DSO(), {"density": 3})


def csv_of(folder: Path, **columns: object) -> Path:
    n = 40
    given = {"x": np.arange(n) % 3, "prompt": ["a", "b"] * (n // 2), "reward": [0, 1] * (n // 2)} | columns
    pd.DataFrame(given).to_csv(folder / "service.csv", index=False)
    return folder / "service.csv"


NAMED = ["--context", "x", "--action", "prompt"]


def test_a_column_that_is_found_by_its_name_can_be_left_out(tmp_path: Path, capsys) -> None:
    file = csv_of(tmp_path, user_id=[f"9f-{i}" for i in range(40)])
    assert main(["import", str(file), "--out", str(tmp_path / "log"), *NAMED]) == 1
    assert "user_id: expected" in capsys.readouterr().err
    assert main(["import", str(file), "--out", str(tmp_path / "log"), *NAMED, "--user-id", "none"]) == 0
    assert LoggedDataset.load(tmp_path / "log").user_id is None


def test_the_row_of_a_cell_that_is_no_number_is_named(tmp_path: Path, capsys) -> None:
    file = csv_of(tmp_path, propensity=["0.5"] * 37 + ["33%"] + ["0.5"] * 2)
    assert main(["inspect", str(file), *NAMED]) == 1
    assert "expected a number, got '33%' in row 37" in capsys.readouterr().err


def test_appending_counts_all_rows_and_ends_the_split(tmp_path: Path, capsys) -> None:
    file, log, policy = csv_of(tmp_path, propensity=0.5), str(tmp_path / "log"), str(tmp_path / "policy")
    assert main(["import", str(file), "--out", log, *NAMED]) == 0
    learn = ["learn", log, "--learner", "is", "--set", "steps=5", "--hold-out", "0.5", "--out", policy]
    assert main(learn) == 0
    assert main(["import", str(file), "--out", log, *NAMED, "--mode", "append"]) == 0
    assert "80 rounds of 2 prompts, 40 of them new" in capsys.readouterr().out
    assert main(["evaluate", policy, log]) == 0
    assert "is not, row for row, the log that the policy was learned from" in capsys.readouterr().err


def test_a_blank_line_among_prompts_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("\nbe brief\nbe warm\n")
    words = ["inspect", str(csv_of(tmp_path)), *NAMED, "--prompts", str(tmp_path / "prompts.txt")]
    assert main(words) == 1
    assert "line 1 of" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m agents.cli --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("usage: offprompts")
    assert done.stderr == ""
