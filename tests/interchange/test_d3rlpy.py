import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offprompts_env.errors import ActionError, DataError, DimensionError, MissingDependencyError
from offprompts_env.interchange.d3rlpy import from_d3rlpy, to_d3rlpy
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, make_log

d3rlpy = pytest.importorskip("d3rlpy")


def plain_log(n: int = 60, n_prompts: int = 4) -> LoggedDataset:
    """A log that the format holds whole, but for the prompts' embeddings; prompt 2 is the best."""
    log = make_log(n, n_prompts=n_prompts, text=False, dims=(3, 2, 0))
    unknown = np.full(n, np.nan)
    return replace(
        log, reward=(log.action == 2).astype(np.float32), propensity=unknown, oracle=None, metadata=LogMetadata()
    )


@pytest.mark.filterwarnings("ignore:d3rlpy's MDPDataset cannot hold")
def test_round_trip() -> None:
    log = plain_log()
    dataset = to_d3rlpy(log)
    assert isinstance(dataset, d3rlpy.dataset.MDPDataset)
    assert len(dataset.episodes) == len(log)
    assert dataset.dataset_info.action_size == 4
    assert dataset.dataset_info.action_space == d3rlpy.ActionSpace.DISCRETE
    assert dataset.dataset_info.observation_signature.shape[0] == (5,)
    assert dataset.transition_count == len(log)
    assert all(episode.terminated for episode in dataset.episodes)
    assert_same(from_d3rlpy(dataset, log.prompts, context_dim=3), log)
    merged = from_d3rlpy(dataset, log.prompts, metadata=LogMetadata(notes="mine"))
    np.testing.assert_array_equal(merged.context, np.hstack([log.context, log.query]))
    assert merged.query.shape == (60, 0)
    assert merged.metadata.notes == "mine"


def test_what_is_dropped_is_said_once() -> None:
    with pytest.warns(UserWarning, match="d3rlpy's MDPDataset cannot hold") as caught:
        to_d3rlpy(make_log(9))
    assert len(caught) == 1
    said = str(caught[0].message)
    for words in (
        "propensities", "output embeddings", "sentences", "user ids", "item ids", "query texts", "expected rewards",
        "prompt embeddings", "prompt texts", "provenance",
    ):  # fmt: skip
        assert words in said, words
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="cannot hold prompt embeddings: dropped"):
        to_d3rlpy(plain_log())


@pytest.mark.filterwarnings("ignore:d3rlpy's MDPDataset cannot hold")
def test_d3rlpy_learns_from_it() -> None:
    log = plain_log(400)
    learner = d3rlpy.algos.DiscreteCQLConfig(gamma=0.0, alpha=0.1, batch_size=64, learning_rate=3e-3).create(
        device=False
    )
    quiet = d3rlpy.logging.NoopAdapterFactory()
    learner.fit(to_d3rlpy(log), n_steps=150, n_steps_per_epoch=150, show_progress=False, logger_adapter=quiet)
    chosen = learner.predict(np.hstack([log.context, log.query]))
    assert (chosen == 2).mean() > 0.9


def buffer(steps: int = 1, actions: Any = None, observations: Any = None) -> Any:
    n = 6
    return d3rlpy.dataset.MDPDataset(
        observations=np.ones((n, 4), np.float32) if observations is None else observations,
        actions=np.arange(n)[:, None] % 3 if actions is None else actions,
        rewards=np.ones((n, 1), np.float32),
        terminals=(np.arange(n) % steps == steps - 1).astype(np.float32),
    )


PROMPTS = PromptSet(np.eye(3))
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "long": (lambda: from_d3rlpy(buffer(2), PROMPTS), DataError, "one of 2 steps at position 0"),
    "continuous": (
        lambda: from_d3rlpy(buffer(actions=np.ones((6, 1), np.float32)), PROMPTS),
        ActionError,
        "actions: expected discrete ones",
    ),
    "two actions": (
        lambda: from_d3rlpy(buffer(actions=np.ones((6, 2), np.float32)), PROMPTS),
        DataError,
        "actions: expected one number a round",
    ),
    "few prompts": (lambda: from_d3rlpy(buffer(), PromptSet(np.eye(2))), ActionError, r"\[0, 2\), got 2 in row 2"),
    "image": (
        lambda: from_d3rlpy(buffer(observations=np.ones((6, 1, 8, 8), np.uint8)), PROMPTS),
        DataError,
        r"observations: expected vectors, got shape \(1, 8, 8\)",
    ),
    "nan": (
        lambda: from_d3rlpy(buffer(observations=np.full((6, 2), np.nan, np.float32)), PROMPTS),
        DataError,
        "context: expected finite numbers",
    ),
    "split": (lambda: from_d3rlpy(buffer(), PROMPTS, context_dim=5), DimensionError, "from 0 to 4.* got 5"),
    "other": (lambda: from_d3rlpy(np.eye(2), PROMPTS), DataError, "expected an MDPDataset .* got ndarray"),  # type: ignore[arg-type]
    "nothing to see": (lambda: to_d3rlpy(make_log(3, dims=(0, 0, 1))), DataError, "expected a context or query"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case: str) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "d3rlpy.dataset", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'offprompts-env\[d3rlpy\]'"):
        to_d3rlpy(plain_log())
