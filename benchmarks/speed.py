"""The speed table: every hot path beside its limit, both measured in the same run.

    python -m benchmarks.speed [--only NAME ...] [--json FILE]

A figure is the best of several repetitions, on one core (`torch` and BLAS are held to one thread), because noise on a
shared machine only ever adds time. `of limit` is how much of the reachable speed is used: 100% is the limit itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import agents
import offprompts_env as op
from benchmarks.hot_paths.adapters import sb3
from benchmarks.hot_paths.bandits import bandits
from benchmarks.hot_paths.experiments import experiments
from benchmarks.hot_paths.exports import exports
from benchmarks.hot_paths.interchange import interchange
from benchmarks.hot_paths.learning import estimating, large_catalogue, learning, streaming
from benchmarks.hot_paths.sentences import around_the_model, bulk_generation, sentences
from benchmarks.hot_paths.serving import serving
from benchmarks.hot_paths.sweeping import sweeping
from benchmarks.hot_paths.timing import Figure, matmul_flops, seconds


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


FIGURES: dict[str, Callable[[], Figure | list[Figure]]] = {
    "single": single_environment,
    "vector": vector_environment,
    "recording": recording,
    "text": text,
    "sentences": sentences,
    "around_the_model": around_the_model,
    "bulk_generation": bulk_generation,
    "closed_form": closed_form,
    "learning": learning,
    "estimating": estimating,
    "large_catalogue": large_catalogue,
    "streaming": streaming,
    "sweeping": sweeping,
    "sb3": sb3,
    "bandits": bandits,
    "experiments": experiments,
    "interchange": interchange,
    "exports": exports,
    "serving": serving,
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
