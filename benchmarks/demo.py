"""The whole idea once: record a log, learn from it alone, and look at what changed.

    python -m benchmarks.demo [--synthetic] [--out demo] [--rounds 10000] [--prompts N] [--seed 0]

The log and the learned policies are kept under `out`, in a folder named after the settings: a second run reads them,
and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np

import agents
import offprompts_env as op
from benchmarks.pages.stories import stories, write_page
from offprompts_env.errors import OffPromptsError, missing_dependency
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the policy.
        value: its true value.
        gain: its paired improvement over the logging policy.
        learned: whether it was learned from the log.
    """

    name: str
    value: Estimate
    gain: Estimate
    learned: bool = False


@dataclass(frozen=True)
class Setting:
    """What the two demos differ in.

    Attributes:
        env_id: registered id.
        n_prompts: number of prompts.
        warm_up: uniform rounds behind the logging policy.
        regression: on those rounds, which the logging policy is a softmax of.
        beta: inverse temperature of the logging policy.
        learners: by name.
        generator: what DSO asks for sentences, made from the simulator.
        truth: true values, made from the simulator.
    """

    env_id: str
    n_prompts: int
    warm_up: int
    regression: agents.PromptRewardRegression
    beta: float
    learners: dict[str, agents.Learner]
    generator: Callable[[Simulator], OutputModel]
    truth: Callable[[Simulator], op.Truth]


def synthetic(n_prompts: int | None) -> Setting:
    """Vectors: the published process and the published schedules."""
    return Setting(
        env_id="OffPrompts-Synthetic-v0",
        n_prompts=n_prompts or 1000,
        warm_up=10_000,
        regression=agents.PromptRewardRegression(),
        beta=1.0,
        learners={
            "regression PG": agents.RegressionPG(),
            "IS PG": agents.ImportanceSamplingPG(),
            "DSO": agents.DSO(tau=1.0),
            "sentence greedy": agents.SentenceGreedy(),
        },
        generator=lambda simulator: simulator.outputs,
        truth=op.Truth.exact,
    )


def movielens(n_prompts: int | None) -> Setting:
    """Text: the same learners. DSO asks one frozen sentence of each (movie, prompt) it comes by, sentence greedy none.

    The schedules are shorter than the published ones, which overfit logs of this size (regression) or ask for 640,000
    sentences (DSO). The bandwidth is about the distance of two sentences of the same (movie, prompt).
    """
    from offprompts_env.text.cache import SampleTable

    def table(simulator: Simulator) -> OutputModel:
        return SampleTable(simulator.outputs, slots=1)  # type: ignore[arg-type]

    return Setting(
        env_id="OffPrompts-MovieLens-v0",
        n_prompts=n_prompts or 100,
        warm_up=2000,
        regression=agents.PromptRewardRegression(steps=10_000),
        beta=1.0,
        learners={
            "regression PG": agents.RegressionPG(rewards=agents.PromptRewardRegression(steps=20_000)),
            "IS PG": agents.ImportanceSamplingPG(),
            "DSO": agents.DSO(
                kernel=agents.GaussianKernel(tau=0.13, output_noise=0.0),
                density=agents.NetworkDensity(max_sentences=10_000),
                steps=10_000,
                learning_rate=1e-3,
                refresh=100,
            ),
            "sentence greedy": agents.SentenceGreedy(),
        },
        generator=table,
        truth=op.Truth.drawn,
    )


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is going on, how long it took, and below that what there was to warn of."""
    print(f"{title} ... ", end="", flush=True)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", agents.TrainingWarning)
        # A second run finds its log complete, as it should.
        warnings.filterwarnings("ignore", message=".*nothing was recorded")
        yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    for warning in caught:
        print(f"  note: {warning.message}", flush=True)


def kept(path: Path, prompts: op.PromptSet, make: Callable[[], Policy]) -> Policy:
    """Return the policy saved at `path`, or make it and save it there."""
    if (path / "policy.json").exists():
        return agents.load_policy(path, prompts)
    policy = make()
    agents.save_policy(policy, path)
    return policy


def compare(truth: op.Truth, simulator: Simulator, logging: Policy, learned: dict[str, Policy]) -> list[Row]:
    """Return the table's rows, from the worst reference to the oracle."""
    base = truth.value(logging)
    single, single_value = truth.best_single()
    texts = simulator.prompts.texts
    named = f'"{texts[single]}"' if texts is not None else f"{single}"
    owned = truth.references()
    rows = [(name, value, False) for name, value in owned.items() if name in {"no prompt", "uniform"}]
    rows.append(("logging policy", base, False))
    rows += [(name, truth.value(policy), True) for name, policy in learned.items()]
    rows += [(f"best single prompt, {named}", single_value, False), ("oracle", owned["oracle"], False)]
    return [Row(name, value, value.minus(base), is_learned) for name, value, is_learned in rows]


def as_text(rows: Sequence[Row]) -> str:
    """Return the table as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'policy':<{width}}   value ± s.e.      over logging ± s.e."]
    for row in rows:
        mark = "*" if row.learned else " "
        lines.append(
            f"{row.name:<{width}} {mark} {row.value.value:+.3f} ± {row.value.standard_error:.3f}   "
            f"{row.gain.value:+.3f} ± {row.gain.standard_error:.3f}"
        )
    return "\n".join([*lines, "* learned from the log alone"])


def as_html(rows: Sequence[Row]) -> str:
    """Return the table as HTML."""
    cells = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.value.value:+.3f} ± {row.value.standard_error:.3f}</td>"
        f"<td>{row.gain.value:+.3f} ± {row.gain.standard_error:.3f}</td></tr>"
        for row in rows
    )
    return f"<table><tr><th>policy</th><th>value ± s.e.</th><th>over logging ± s.e.</th></tr>{cells}</table>"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw values with standard errors."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing_dependency("matplotlib", "plots", "the demo's figure") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.2))
    places = np.arange(len(rows))[::-1]
    axes.barh(
        places,
        [row.value.value for row in rows],
        xerr=[row.value.standard_error for row in rows],
        color=["#2a78b8" if row.learned else "#b9c2cc" for row in rows],
        error_kw={"ecolor": "#333", "capsize": 3},
    )
    axes.set_yticks(places, [row.name for row in rows])
    axes.axvline(next(row.value.value for row in rows if row.name == "logging policy"), color="#333", lw=1, ls=":")
    axes.set_xlabel("true value ± s.e.; blue: learned from the log", fontsize=9)
    axes.set_title(title, fontsize=10, loc="right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(setting: Setting, *, rounds: int, out: Path, seed: int) -> list[Row]:
    """Record, learn, compare, and write the results under `out`."""
    env = gym.make(setting.env_id, n_prompts=setting.n_prompts)
    simulator: Simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
    prompts = simulator.prompts
    with stage(f"logging policy: softmax on a regression from {setting.warm_up:,} uniform rounds"):
        logging = kept(
            out / "policies" / "logging",
            prompts,
            lambda: agents.logging_policy(
                simulator, n=setting.warm_up, beta=setting.beta, regression=setting.regression, seed=seed
            ),
        )
    with stage(f"recording {rounds:,} rounds"):
        op.collect(env, logging, n=rounds, path=out / "log", seed=seed, mode="append")
    log = LoggedDataset.load(out / "log")
    learned: dict[str, Policy] = {}
    for name, learner in setting.learners.items():
        with stage(f"learning from the log: {name}"):

            def learn(learner: agents.Learner = learner) -> Policy:
                return learner.fit(log, generator=setting.generator(simulator), logging_policy=logging, seed=seed)

            learned[name] = kept(out / "policies" / name.replace(" ", "-"), prompts, learn)
    with stage("true values of all prompts"):
        truth = setting.truth(simulator)
        rows = compare(truth, simulator, logging, learned)
    title = f"{setting.env_id}: {len(prompts):,} prompts, {rounds:,} logged rounds"
    print(f"\n{title}\n\n{as_text(rows)}\n")
    draw(rows, title, out / "values.png")
    best = max(learned, key=lambda name: next(row.value.value for row in rows if row.name == name))
    if prompts.texts is not None:
        note = (
            f"What users saw under the logging policy and under {best}, learned from {rounds:,} logged rounds. Users "
            "and movies are drawn at random, not picked; the reward is ten times the change of the probability of a "
            "like against unprompted sentences."
        )
        told = stories(simulator, logging, learned[best], seed=seed)
        write_page(
            out / "sentences.html",
            "Before and after learning",
            note,
            told,
            names=("before", "after"),
            table=as_html(rows),
            figure=out / "values.png",
        )
    report = [
        {"policy": row.name, "value": row.value.value, "standard_error": row.value.standard_error,
         "over_logging": row.gain.value, "over_logging_standard_error": row.gain.standard_error}
        for row in rows
    ]  # fmt: skip
    (out / "table.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("written:", *(f"  {path}" for path in sorted(out.iterdir())), sep="\n")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", action="store_true", help="on vectors instead of text")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where results are kept (default: demo)")
    parser.add_argument("--rounds", type=int, default=10_000, help="rounds to record (default: 10000)")
    parser.add_argument("--prompts", type=int, default=None, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        setting = synthetic(chosen.prompts) if chosen.synthetic else movielens(chosen.prompts)
        kind = "synthetic" if chosen.synthetic else "movielens"
        out = chosen.out / f"{kind}-{setting.n_prompts}-prompts-{chosen.rounds}-rounds-seed-{chosen.seed}"
        run(setting, rounds=chosen.rounds, out=out, seed=chosen.seed)
    except OffPromptsError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what was recorded and learned is kept, the same command goes on from there", file=sys.stderr
        )
        return 130
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
