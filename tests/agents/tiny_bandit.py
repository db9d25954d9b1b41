"""A world of two contexts and four prompts, enumerated: context x is the number x, prompt a's sentence the number a.

A log that holds every round in its exact proportion is the population, so on it an estimate is its own expectation.
"""

from __future__ import annotations

import numpy as np

from offprompts_env.types import LoggedDataset, Outputs, PromptSet

PROMPTS = PromptSet(np.eye(4))
LOGGING = np.array([[1, 2, 4, 1], [2, 2, 2, 2]]) / 8
TARGET = np.array([[4, 1, 1, 2], [1, 0, 6, 1]]) / 8
MEAN = np.array([[0.9, 0.2, 0.6, 0.3], [0.1, 0.8, 0.5, 0.7]])
MODEL = np.array([[0.5, 0.4, 0.1, 0.9], [0.3, 0.3, 0.8, 0.2]])
WEIGHT = TARGET / LOGGING
TRUTH = float((TARGET * MEAN).sum(axis=1).mean())


class Table:
    """A policy given by a table of pmfs, which is a fitted q̂ just as well."""

    catalogue = None

    def __init__(self, table):
        self.table = np.asarray(table)
        self.n_prompts = self.table.shape[1]

    def probabilities(self, contexts):
        return self.table[contexts.context[:, 0].astype(int)]

    __call__ = probabilities

    def chosen(self, contexts, actions):
        return self(contexts)[np.arange(len(contexts)), actions]


class Sentences:
    """A sentence-level model that reads the prompt off the sentence."""

    def __init__(self, table):
        self.table = np.asarray(table)

    def __call__(self, contexts, outputs):
        return self.table[contexts.context[:, 0].astype(int), outputs.embedding[:, 0].astype(int)]


class Generator:
    """The sentence of a prompt is its number."""

    output_dim = 1
    prompts = PROMPTS

    def sample(self, contexts, actions, rng):
        return Outputs(np.asarray(actions, dtype=np.float32)[:, None])


class Neighbours:
    """A kernel on numbers: 1 for the same sentence, `near` for neighbours."""

    output_noise = 0.0

    def __init__(self, near=0.0):
        self.near = near

    def __call__(self, difference):
        distance = difference.abs().sum(-1)
        return (distance < 0.5).float() + self.near * ((distance > 0.5) & (distance < 1.5)).float()


def rounds(x, a, reward=None, propensity=None, prompts=PROMPTS) -> LoggedDataset:
    """Return the log in which prompts `a` were chosen in contexts `x`."""
    x, a = np.asarray(x), np.asarray(a)
    return LoggedDataset(
        context=x[:, None],
        query=np.zeros((len(x), 1)),
        action=a,
        propensity=LOGGING[x, a] if propensity is None else propensity,
        reward=MEAN[x, a] if reward is None else reward,
        output=a[:, None],
        prompts=prompts,
    )


def population() -> LoggedDataset:
    """Return the log that holds every round in its exact proportion."""
    counts = np.round(LOGGING * 8).astype(int)
    cells = [(x, a) for x in range(2) for a in range(4) for _ in range(counts[x, a])]
    return rounds(*np.transpose(cells))


def draw(n: int, rng: np.random.Generator, noise: float = 0.0) -> LoggedDataset:
    """Return n random rounds; rewards have uniform noise of at most `noise`."""
    x = rng.integers(2, size=n)
    a = (np.cumsum(LOGGING, axis=1)[x] < rng.random(n)[:, None]).sum(axis=1)
    return rounds(x, a, MEAN[x, a] + rng.uniform(-noise, noise, n))
