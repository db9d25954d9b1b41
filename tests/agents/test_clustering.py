from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.clustering import kmeans
from offprompts_env.errors import ConfigError, DataError, DimensionError, MissingDependencyError
from offprompts_env.types import Outputs, PromptSet

CORNERS = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.float32)


def blobs(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    truth = np.arange(n) % 3
    return CORNERS[truth] + np.random.default_rng(0).normal(scale=0.1, size=(n, 2)), truth


def same_partition(left, right) -> bool:
    return np.array_equal(left[:, None] == left[None], right[:, None] == right[None])


def test_kmeans_finds_blobs_and_a_seed_names_a_run():
    points, truth = blobs()
    found = kmeans(points, 3, seed=4)
    assert same_partition(found.labels, truth)
    for cluster, members in enumerate(found.members):
        np.testing.assert_allclose(points[members].mean(axis=0), found.centres[cluster], rtol=1e-5, atol=1e-6)
    rough = np.random.default_rng(1).normal(size=(200, 5))
    runs = [kmeans(rough, 10, seed=seed).labels for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_fewer_distinct_points_than_clusters():
    found = kmeans(np.repeat(CORNERS, 2, axis=0), 10, seed=0)
    assert found.n_clusters == 3
    assert same_partition(found.labels, np.repeat(np.arange(3), 2))
    assert kmeans(CORNERS[:1], 10, seed=0).labels.tolist() == [0]


def test_marginal_is_the_sum_over_members():
    clusters = agents.PromptClusters(np.array([1, 0, 1]), np.zeros((2, 1)))
    np.testing.assert_allclose(clusters.marginal(np.array([[0.2, 0.5, 0.3]])), [[0.5, 0.5]])
    assert [members.tolist() for members in clusters.members] == [[1], [0, 2]]


class Spoken:
    """Outputs that depend on the prompt's blob only, up to noise; its closed form is hidden."""

    def __init__(self, log, truth):
        self.output_dim, self.prompts, self.truth, self.asked = 2, log.prompts, truth, 0

    def sample(self, contexts, actions, rng):
        self.asked += len(actions)
        noise = rng.normal(scale=0.1, size=(len(actions), 2))
        return Outputs(CORNERS[self.truth[actions]] + contexts.query[:, :2] + noise)


def test_outputs_are_clustered_rather_than_embeddings(simulator, log):
    truth = np.arange(12) // 4
    generator = Spoken(log, truth)
    (found,) = agents.OutputClusters(3, n_samples=8).fit_many([log], generators=[generator])
    assert same_partition(found.labels, truth)
    assert generator.asked == 12 * 8
    (closed,) = agents.OutputClusters(3).fit_many([log], generators=[simulator.outputs])
    assert np.array_equal(closed.labels, kmeans(simulator.outputs.effects, 3, 0).labels)
    (embedded,) = agents.EmbeddingClusters(3).fit_many([log])
    assert np.array_equal(embedded.labels, kmeans(log.prompts.embeddings, 3, 0).labels)


def test_without_a_generator_unlogged_prompts_follow_their_nearest_logged_neighbour(log):
    truth = np.arange(12) // 4
    embeddings = np.arange(12, dtype=np.float32)[:, None]
    rows = ~np.isin(log.action, [5, 8])
    spoken = replace(log, output=CORNERS[truth[log.action]], prompts=PromptSet(embeddings)).take(rows)
    (found,) = agents.OutputClusters(3).fit_many([spoken])
    # 5 lies between 4 and 6; 8 is as far from 7 as from 9, and the first wins.
    truth[8] = truth[7]
    assert same_partition(found.labels, truth)


def test_scikit_learn_is_asked_for_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingDependencyError, match=r"offprompts-env\[clustering\]"):
        kmeans(CORNERS, 2, seed=0)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda log: agents.PromptClusters(np.array([0, 2]), np.zeros((3, 1))), DataError, "each of 0 to 2"),
        (lambda log: agents.PromptClusters(np.array([0, 1]), np.zeros((1, 1))), DataError, "each of 0 to 0"),
        (lambda log: agents.PromptClusters(np.array([-1, 0]), np.zeros((1, 1))), DataError, "got [-1, 0]"),
        (lambda log: agents.PromptClusters(np.array([0.0]), np.zeros((1, 1))), DataError, "float64"),
        (lambda log: agents.PromptClusters(np.zeros((0,), dtype=int), np.zeros((0, 1))), DataError, "labels"),
        (lambda log: agents.PromptClusters(np.array([0]), np.array([[np.nan]])), DataError, "centres"),
        (lambda log: kmeans(np.full((3, 2), np.nan), 2, 0), DataError, "points"),
        (lambda log: kmeans(CORNERS, 0, 0), ConfigError, "n_clusters"),
        (lambda log: agents.EmbeddingClusters(0), ConfigError, "n_clusters"),
        (lambda log: agents.OutputClusters(n_samples=0), ConfigError, "n_samples"),
        (
            lambda log: agents.OutputClusters().fit_many([replace(log, output=log.output[:, :0])]),
            DataError,
            "EmbeddingClusters",
        ),
        (lambda log: agents.KnownClusters(()).fit_many([log]), ConfigError, "expected 1"),
        (
            lambda log: agents.KnownClusters((kmeans(CORNERS, 2, 0),)).fit_many([log]),
            DimensionError,
            "12 prompts, got 3",
        ),
        (
            lambda log: agents.KnownClusters((kmeans(log.prompts.embeddings, 2, 0, "0" * 64),)).fit_many([log]),
            DimensionError,
            "fingerprint",
        ),
    ],
)
def test_wrong_input(act, error, words, log):
    with pytest.raises(error) as caught:
        act(log)
    assert words in str(caught.value)
