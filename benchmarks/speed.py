"""The speed table: every hot path beside its limit, both measured in the same run.

    python -m benchmarks.speed [--only NAME ...] [--json FILE]

A figure is the best of several repetitions, on one core (`torch` and BLAS are held to one thread), because noise on a
shared machine only ever adds time. `of limit` is how much of the reachable speed is used: 100% is the limit itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

import agents
import offprompts_env as op


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: what was measured.
        value: how fast, in `unit`.
        unit: of value, target and limit.
        better: whether a higher or a lower value is better.
        target: what the project promises.
        limit: what the machine could reach, measured in the same run.
        limit_is: what that limit is.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    target: float
    limit: float
    limit_is: str

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    @property
    def share(self) -> float:
        """Share of the limit reached."""
        return self.value / self.limit if self.better == "higher" else self.limit / self.value


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Return the shortest wall time of `repeat` runs of `work`, after one run that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops() -> float:
    """Return float32 FLOP/s of a large matrix product on one core."""
    import torch

    torch.set_num_threads(1)
    a = torch.rand(1024, 1024)
    return 2 * 1024**3 / seconds(lambda: a @ a, 9)


class _Trivial(gym.Env[Any, Any]):
    """The least a one-step environment with this observation can do: what Gymnasium itself costs."""

    observation_space = gym.spaces.Dict(
        {k: gym.spaces.Box(-np.inf, np.inf, (5,), np.float32) for k in ("context", "query")}
    )
    action_space = gym.spaces.Discrete(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"context": np.zeros(5, np.float32), "query": np.zeros(5, np.float32)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = {"context": np.zeros(5, np.float32), "query": np.zeros(5, np.float32)}
        return observation, 0.0, True, False, {"expected_reward": 0.0}


def single_environment() -> Figure:
    """Steps a second of one synthetic environment, reset included."""
    gym.register("SpeedTrivial-v0", entry_point=lambda **_: _Trivial())

    def rate(env_id: str) -> float:
        env = gym.make(env_id)
        env.reset(seed=0)

        def play() -> None:
            for _ in range(5000):
                env.reset()
                env.step(7)

        return 5000 / seconds(play)

    return Figure(
        "single synthetic environment", rate("OffPrompts-Synthetic-v0"), "steps/s", "higher", 60e3,
        rate("SpeedTrivial-v0"), "an environment that does nothing, through gym.make",
    )  # fmt: skip


def vector_environment(n: int = 4096) -> Figure:
    """Rounds a second of the native vector environment."""
    envs = gym.make_vec("OffPrompts-Synthetic-v0", num_envs=n)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(1000, size=n)
    rng = np.random.default_rng(0)

    def play() -> None:
        for _ in range(50):
            envs.step(actions)

    def numbers() -> None:
        for _ in range(50):
            rng.standard_normal((n, 16), dtype=np.float32)

    return Figure(
        f"vector environment, {n:,} rounds", 50 * n / seconds(play), "rounds/s", "higher", 4e6,
        50 * n / seconds(numbers), "drawing the 16 normals of a round",
    )  # fmt: skip


def closed_form() -> Figure:
    """Expected rewards of 1,000 contexts and 1,000 prompts."""
    simulator = op.SyntheticConfig().build()
    contexts = simulator.evaluation_contexts(1000)
    left, right = np.random.default_rng(0).random((1000, 6)), np.random.default_rng(1).random((6, 1000))
    return Figure(
        "closed-form expected rewards, 1,000 × 1,000", 1e3 * seconds(lambda: simulator.expected_rewards(contexts), 20),
        "ms", "lower", 5, 1e3 * seconds(lambda: left @ right, 20), "the float64 matrix product alone",
    )  # fmt: skip


def import_time() -> Figure:
    """Wall time of the import in a fresh interpreter, less that of starting the interpreter."""

    def run(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), 5)

    start = run("pass")
    return Figure(
        "import offprompts_env", run("import offprompts_env") - start, "s", "lower", 0.5,
        run("import gymnasium, gymnasium.vector") - start, "importing gymnasium",
    )  # fmt: skip


def recording(n: int = 1 << 20) -> list[Figure]:
    """Rows a second and bytes a row of collect() with the uniform policy, in a synthetic world, read-back included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    simulator = op.SyntheticConfig().build()
    policy = agents.UniformPolicy(simulator.n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        path, bare = Path(folder) / "log", Path(folder) / "bare.parquet"
        took = seconds(lambda: op.collect(simulator, policy, n, path, mode="overwrite", progress=False), 3)
        log = op.LoggedDataset.load(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / n
        floats = np.column_stack([log.context, log.query, log.output, log.reward])
        columns = {f"c{i}": pa.array(np.ascontiguousarray(column)) for i, column in enumerate(floats.T)}
        table = pa.table({**columns, "action": pa.array(log.action.astype(np.int16))})

        def write() -> None:
            split = list(columns)
            pq.write_table(table, bare, compression="zstd", use_dictionary=False, use_byte_stream_split=split)

        written = seconds(write, 3)
        bare_size = bare.stat().st_size / n
    return [
        Figure(
            "recording synthetic rows", n / took, "rows/s", "higher", 1e6, n / written,
            "writing the same numbers, already drawn, with pyarrow alone",
        ),
        Figure("a recorded row", size, "bytes", "lower", 70, bare_size, "its 16 floats and action alone"),
    ]  # fmt: skip


def text(n: int = 2048) -> list[Figure]:
    """Sentences a second that the embedded language model writes and the embedded encoder reads."""
    from offprompts_env.movielens.bundle import Bundle

    simulator = gym.make("OffPrompts-MovieLens-v0").unwrapped.simulator  # type: ignore[attr-defined]
    outputs, bundle = simulator.outputs, Bundle.open()
    contexts = simulator.evaluation_contexts(n)
    actions = np.random.default_rng(0).integers(simulator.n_prompts, size=n)
    requests = outputs.requests(contexts, actions)
    rng = np.random.default_rng(0)
    sentences = outputs.write(requests, rng)
    # The encoder remembers the last texts it was asked for, so it is asked for others in turn.
    halves = sentences[: n // 2], sentences[n // 2 :]
    reader = bundle.reward_encoder
    written = n / seconds(lambda: outputs.write(requests, rng), 5)
    read = n / seconds(lambda: [reader.encode(half) for half in halves], 5)

    def bound(model: Any, tokens: float, output_layer: bool) -> float:
        """Sentences a second if matrix products were all: 2 FLOPs a weight and token, embedding look-ups free."""
        embedding = model.get_input_embeddings().weight.numel()
        weights = sum(p.numel() for p in model.parameters()) - (0 if output_layer else embedding)
        return float(matmul_flops() / (2 * weights * tokens))

    language_model = outputs.language_model
    lm_tokens = count(language_model.tokenizer, requests) + count(language_model.tokenizer, sentences)
    what = "its matrix products at the FLOP/s of a large one"
    return [
        Figure(
            "writing sentences", written, "sentences/s", "higher", 400,
            bound(language_model.model, lm_tokens, output_layer=True), what,
        ),
        Figure(
            "encoding sentences", read, "sentences/s", "higher", 3000,
            bound(reader.model, count(reader.tokenizer, sentences), output_layer=False), what,
        ),
    ]  # fmt: skip


def count(tokenizer: Any, texts: list[str]) -> float:
    """Return the mean number of tokens of `texts`."""
    return float(np.mean([len(row) for row in tokenizer(texts)["input_ids"]]))


def learning(worlds: int = 4) -> list[Figure]:
    """Seconds a world of what is learned with the published schedules, 8,000 rounds, several worlds as one problem.

    Policy gradients and regressions run a quarter of their steps, and four times that is given.
    """
    import torch

    simulators = [op.SyntheticConfig.preset("paper_code", seed=seed).build() for seed in range(worlds)]
    policies = [agents.UniformPolicy(s.n_prompts, s.prompts.fingerprint) for s in simulators]
    logs = [op.collect(s, p, 8000, progress=False) for s, p in zip(simulators, policies, strict=True)]
    generators = [s.outputs for s in simulators]
    flops = matmul_flops()
    batch, inputs, hidden, prompts = 32, 10, 100, 1000

    def adam(parameters: int, steps: int) -> float:
        updates = torch.zeros(parameters).requires_grad_()
        updates.grad = torch.ones(parameters)
        optimiser = torch.optim.Adam([updates], fused=True)
        return steps / 200 * seconds(lambda: [optimiser.step() for _ in range(200)], 3)

    # Forward, and the two products of the backward pass; the input layer needs only one of them.
    gradient = 2 * batch * (3 * hidden * prompts + 2 * inputs * hidden) * 20_000 / flops
    gradient += adam(inputs * hidden + hidden * prompts + hidden + prompts, 20_000)
    regression = 2 * batch * (2 * 15 * hidden + 3 * hidden) * 100_000 / flops + adam(16 * hidden + hidden, 100_000)
    clusters = 2 * batch * 10 * (2 * 15 * hidden + 3 * hidden) * 20_000 / flops + adam(16 * hidden + hidden, 20_000)
    density_flops = 2 * batch * (2 * 15 * hidden + 3 * hidden) * 10_000
    what = "its matrix products, and fused Adam alone"
    kernel, density = agents.GaussianKernel(1.0), agents.NetworkDensity()

    def fit_density() -> list[Any]:
        return density.fit_many(logs, kernel=kernel, generators=generators, logging_policies=policies)

    known = agents.KnownDensity(tuple(fit_density()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", agents.TrainingWarning)
        models = agents.FittedRewards(tuple(agents.PromptRewardRegression(steps=1000).fit_many(logs)))
        prompt = seconds(lambda: agents.PromptRewardRegression(steps=25_000).fit_many(logs), 1) * 4 / worlds
        sentence = seconds(lambda: agents.SentenceRewardRegression(steps=25_000).fit_many(logs), 1) * 4 / worlds

        def fit(learner: agents.Learner, share: float, repeat: int = 1) -> float:
            def work() -> None:
                learner.fit_many(logs, generators=generators, logging_policies=policies)

            return seconds(work, repeat) / share / worlds

        took = {
            "IS PG": fit(agents.ImportanceSamplingPG(steps=5_000), 0.25),
            "regression PG": fit(agents.RegressionPG(rewards=models, steps=5_000), 0.25),
            "DR PG": fit(agents.DoublyRobustPG(rewards=models, steps=5_000), 0.25),
            "DSO": fit(agents.DSO(density=known, steps=5_000), 0.25),
        }
        potec = fit(agents.POTEC(rewards=models, steps=5_000), 0.25)
        greedy = fit(agents.SentenceGreedy(), 1, 2)
        exact = fit(agents.ExactDSO(), 1)
    polynomial = seconds(lambda: agents.PolynomialRidge(2).fit_many(logs[:1]), 3)
    dense = seconds(fit_density, 2) / worlds
    figures = [
        Figure("marginal density, 10,000 steps", dense, "s a world", "lower", 5, density_flops / flops,
               "its matrix products at the FLOP/s of a large one"),
        Figure("prompt-reward regression, 100,000 steps", prompt, "s a world", "lower", 3, regression, what),
        Figure("sentence-reward regression, 100,000 steps", sentence, "s a world", "lower", 4, regression, what),
        *(
            Figure(f"{name}, 20,000 steps, 1,000 prompts", value, "s a world", "lower", 10, gradient, what)
            for name, value in took.items()
        ),
        Figure("POTEC, 20,000 steps, 10 clusters", potec, "s a world", "lower", 8, clusters, what),
        Figure("exact DSO, 2,000 steps of 64", exact, "s a world", "lower", 10, gradient / 5, what),
        Figure("SentenceGreedy, models and their choice", greedy, "s a world", "lower", 2, polynomial,
               "fitting the polynomial that it chooses"),
    ]  # fmt: skip
    whole = figures[1].value + sum(figure.value for figure in figures)
    least = figures[1].limit + sum(figure.limit for figure in figures)
    return [
        *figures,
        Figure("all of these and a logging policy", whole, "s a world", "lower", 60, least, "their limits"),
    ]


def estimating(n: int = 10_000) -> list[Figure]:
    """Milliseconds of a value estimate of a network over 1,000 prompts, models fitted before."""
    from agents.networks import MLP

    simulator = op.SyntheticConfig.preset("paper_code").build()
    uniform = agents.UniformPolicy(simulator.n_prompts)
    log = op.collect(simulator, uniform, n, progress=False)
    rng = np.random.default_rng(0)
    sizes = (10, 100, simulator.n_prompts)
    layers = tuple(
        rng.standard_normal((low + 1, high)).astype(np.float32) / np.float32(low**0.5)
        for low, high in itertools.pairwise(sizes)
    )
    policy = agents.NeuralPolicy(MLP(layers), simulator.prompts.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", agents.TrainingWarning)
        models = agents.FittedRewards((agents.PromptRewardRegression(steps=1000).fit(log),))
    parts = np.array_split(np.arange(n), 100)

    def look() -> None:
        for rows in parts:
            policy.probabilities(log.contexts.take(rows))

    def milliseconds(estimator: agents.Estimator) -> float:
        return 1e3 * seconds(lambda: estimator.estimate(policy, log), 5)

    limit = 1e3 * seconds(look, 5)
    judges: list[agents.Estimator] = [
        agents.IS(), agents.SNIPS(), agents.DM(rewards=models), agents.DR(rewards=models), agents.DRos(rewards=models)
    ]  # fmt: skip
    return [
        Figure(
            f"{type(judge).__name__} of 10,000 rounds", milliseconds(judge), "ms", "lower", 50,
            limit, "the policy's probabilities alone",
        )
        for judge in judges
    ]  # fmt: skip


def large_catalogue(prompts: int = 100_000, steps: int = 200) -> Figure:
    """Milliseconds a step of importance-sampling PG over 100,000 prompts, with a policy in two levels."""
    import torch

    simulator = op.SyntheticConfig.preset("paper_code", n_prompts=prompts).build()
    log = op.collect(simulator, agents.UniformPolicy(prompts), 10_000, progress=False)

    def train(steps: int) -> float:
        return seconds(lambda: agents.ImportanceSamplingPG(steps=steps, tree=agents.TreeSoftmax()).fit(log), 2)

    batch, groups, members, dimensions = 32, 316, 317, 5
    left, centres = torch.rand(1, batch, dimensions), torch.rand(1, dimensions, groups)
    own, inside = torch.rand(1, batch, dimensions, 1), torch.rand(1, batch, members, dimensions)

    def products() -> None:
        # Of the two levels, forward and backward; the perceptron's are smaller still.
        for _ in range(3):
            torch.bmm(left, centres)
            inside @ own

    return Figure(
        "a step over 100,000 prompts, in two levels", 1e3 * (train(2 * steps) - train(steps)) / steps, "ms", "lower", 4,
        1e3 * seconds(products, 50), "the products of its two levels",
    )  # fmt: skip


def streaming(rows: int = 1 << 21) -> Figure:
    """Rows a second of reading a log in windows."""
    import pyarrow.parquet as pq

    simulator = op.SyntheticConfig().build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        op.collect(simulator, agents.UniformPolicy(simulator.n_prompts), rows, path, progress=False)
        stream = op.LogStream.open(path, window=1 << 19)
        took = seconds(lambda: sum(len(window) for window in stream.windows(seed=0)), 3)
        files = sorted(path.glob("*.parquet"))
        bare = seconds(lambda: [pq.read_table(file, use_threads=False) for file in files], 3)
    return Figure(
        "reading a log in windows", rows / took, "rows/s", "higher", 1e6, rows / bare,
        "reading its files with pyarrow alone, unchecked",
    )  # fmt: skip


FIGURES: dict[str, Callable[[], Figure | list[Figure]]] = {
    "single": single_environment,
    "vector": vector_environment,
    "recording": recording,
    "text": text,
    "closed_form": closed_form,
    "learning": learning,
    "estimating": estimating,
    "large_catalogue": large_catalogue,
    "streaming": streaming,
    "import": import_time,
}


def as_table(figures: list[Figure]) -> str:
    """Return the table as Markdown."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    lines = ["| figure | measured | target | met | of limit | the limit |", "|---|---|---|---|---|---|"]
    for figure in figures:
        sign = "≥" if figure.better == "higher" else "≤"
        lines.append(
            f"| {figure.name} | {number(figure.value)} {figure.unit} | {sign} {number(figure.target)} "
            f"| {'yes' if figure.met else 'no'} | {figure.share:.0%} | {number(figure.limit)} {figure.unit}: "
            f"{figure.limit_is} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    chosen = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        print("note: set OMP_NUM_THREADS=1, or BLAS uses several cores for the limits", file=sys.stderr)
    figures: list[Figure] = []
    for name in chosen.only:
        found = FIGURES[name]()
        figures += found if isinstance(found, list) else [found]
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one core\n")
    print(as_table(figures))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
