from dataclasses import replace

import numpy as np
import pytest

from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError, PropensityError
from offprompts_env.types import Contexts, Estimate, LoggedDataset, Oracle, Outputs, PromptSet


def make_log(n: int = 5) -> LoggedDataset:
    rng = np.random.default_rng(0)
    return LoggedDataset(
        context=rng.normal(size=(n, 2)),
        query=rng.normal(size=(n, 3)),
        action=np.arange(n) % 4,
        propensity=np.full(n, 0.25),
        reward=rng.normal(size=n),
        output=rng.normal(size=(n, 2)),
        prompts=PromptSet(rng.normal(size=(4, 2))),
        sentence=np.array([f"sentence {i}" for i in range(n)]),
        user_id=np.arange(n),
        oracle=Oracle(np.zeros(n)),
    )


@pytest.mark.parametrize(
    ("column", "value", "error", "words"),
    [
        ("context", np.zeros((4, 2)), DataError, ("query", "4", "5")),
        ("context", np.zeros(5), DataError, ("context", "(5,)")),
        ("query", np.full((5, 3), np.nan), DataError, ("query", "row 0")),
        ("output", np.array([[0, 0]] * 4 + [[0, np.inf]]), DataError, ("output", "row 4")),
        ("action", [0, 1, 2, 3, 4], ActionError, ("[0, 4)", "4 in row 4")),
        ("action", [0, -1, 2, 3, 0], ActionError, ("-1 in row 1",)),
        ("action", [0.0, 1.0, 2.0, 3.0, 0.0], ActionError, ("float64", "integers")),
        ("action", [0, 1], ActionError, ("expected 5", "(2,)")),
        ("propensity", [0.1, 0.2, 0.0, 0.3, 0.4], PropensityError, ("0.0 in row 2",)),
        ("propensity", [0.1, 0.2, 1.5, 0.3, 0.4], PropensityError, ("1.5 in row 2",)),
        ("reward", [0, 0, np.nan, 0, 0], DataError, ("reward", "row 2", "nan")),
        ("reward", ["a"] * 5, DataError, ("reward", "float32")),
        ("sentence", ["only one"], DataError, ("sentence", "expected 5")),
        ("user_id", [1, 2], DataError, ("user_id", "expected 5")),
    ],
)
def test_invalid_column_is_named(column: str, value: object, error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        replace(make_log(), **{column: value})
    for word in words:
        assert word in str(caught.value)


def test_empty_log_is_refused() -> None:
    with pytest.raises(DataError, match="at least one round"):
        make_log().take(slice(0, 0))


def test_take_keeps_rows_together() -> None:
    log = make_log()
    part = log.take(np.array([3, 1]))
    assert (part.context == log.context[[3, 1]]).all()
    assert list(part.sentence) == ["sentence 3", "sentence 1"]
    assert list(part.user_id) == [3, 1]
    assert part.item_id is None
    assert part.contexts.user_id is part.user_id


def test_unknown_propensities_are_allowed_until_needed() -> None:
    log = replace(make_log(), propensity=[0.5, np.nan, 0.5, 0.5, 0.5])
    with pytest.raises(PropensityError, match=r"SNIPS needs the column 'propensity'.*1 of 5.*row 1"):
        log.require_propensities("SNIPS")
    assert make_log().require_propensities("SNIPS").shape == (5,)


@pytest.mark.parametrize(
    ("texts", "words"), [((), "empty"), (("a", "  ", "b", "c"), "position 1"), (("a", "b", 3, "c"), "position 2")]
)
def test_prompt_texts(texts: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptSet(np.zeros((4, 2)), texts)


def test_prompt_set_counts_and_fingerprint() -> None:
    with pytest.raises(DimensionError, match="expected 2 texts"):
        PromptSet(np.zeros((2, 2)), ("a",))
    with pytest.raises(ConfigError, match="at least one prompt"):
        PromptSet(np.zeros((0, 2)))
    one, same, other = (
        PromptSet(np.eye(2), ("a", "b")),
        PromptSet(np.eye(2), ("a", "b")),
        PromptSet(np.eye(2), ("a", "c")),
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_contexts_and_outputs_check_lengths() -> None:
    with pytest.raises(DataError, match="expected 3 rows"):
        Contexts(np.zeros((3, 2)), np.zeros((2, 2)))
    with pytest.raises(DataError, match="output text"):
        Outputs(np.zeros((3, 2)), np.array(["a"]))
    repeated = Contexts(np.arange(2).reshape(2, 1), np.zeros((2, 1))).repeat(3)
    assert repeated.context[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_estimate_of_mean_and_paired_difference() -> None:
    terms = np.array([1.0, 2.0, 4.0])
    estimate = Estimate.of_mean(terms)
    assert estimate.value == pytest.approx(7 / 3)
    assert estimate.standard_error == pytest.approx(terms.std(ddof=1) / np.sqrt(3))
    assert estimate.interval[1] - estimate.interval[0] == pytest.approx(
        2 * 1.959964 * estimate.standard_error, rel=1e-6
    )
    assert "warning: small" in str(Estimate.of_mean(terms, warnings=("small",)))
    difference = estimate.minus(Estimate.of_mean(terms - 1))
    assert (difference.value, difference.standard_error) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(DimensionError, match="3 and 2"):
        estimate.minus(Estimate.of_mean(terms[:2]))
    with pytest.raises(DataError, match="at least one round"):
        Estimate.of_mean(np.array([]))


def test_an_observation_becomes_contexts() -> None:
    observation = {"context": np.arange(2.0), "query": np.arange(3.0)}
    one = Contexts.of(observation, {"user_id": 7, "query_text": "Heat (1995)", "output": np.zeros(4)})
    assert (one.context.shape, one.query.shape, one.context.dtype) == ((1, 2), (1, 3), np.float32)
    assert (one.user_id.tolist(), one.query_text.tolist(), one.item_id) == ([7], ["Heat (1995)"], None)
    batch = Contexts.of(
        {"context": np.zeros((4, 2)), "query": np.zeros((4, 3))},
        {"item_id": np.arange(4), "query_text": np.array(["a", "b", "c", "d"])},
    )
    assert (len(batch), batch.item_id.tolist(), batch.query_text.tolist()) == (4, [0, 1, 2, 3], ["a", "b", "c", "d"])
    assert len(Contexts.of({"context": np.zeros((4, 2)), "query": np.zeros((4, 3))})) == 4


@pytest.mark.parametrize(
    "observation", [np.zeros(5), {"context": np.zeros(2)}, None, {"context": "x", "query": np.zeros(2)}]
)
def test_what_is_no_observation_is_told(observation: object) -> None:
    with pytest.raises(DataError, match="'context' and 'query'"):
        Contexts.of(observation)  # type: ignore[arg-type]
