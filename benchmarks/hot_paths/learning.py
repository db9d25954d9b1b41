"""The speed of what learns from logs, estimates from them, and reads them."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import agents
import offprompts_env as op
from benchmarks.hot_paths.timing import Figure, matmul_flops, seconds


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
            "online PG": seconds(lambda: agents.OnlinePG(steps=5_000).fit_many(simulators), 1) * 4 / worlds,
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
