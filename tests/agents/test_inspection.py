"""The report of a log: what it says of sound logs, and of logs with one thing wrong."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields, is_dataclass, replace

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.inspection import inspect_log
from agents.inspection.needs import ESTIMATORS, LEARNERS, Given, judge
from agents.policies import softmax
from agents.sentence_rewards import PolynomialRidge, SentenceRewardSearch
from offprompts_env.errors import ConfigError, OffPromptsError
from offprompts_env.types import LoggedDataset, Outputs, PromptSet

QUICK = SentenceRewardSearch((PolynomialRidge(degree=1, members=2),))
TEXTS = ("be brief", "be warm", "be precise", "be funny", "be calm")


def made(n=3_000, seed=0, n_prompts=5, d=3, **changes) -> LoggedDataset:
    """A sound log of a softmax policy, with any column replaced."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, d)).astype(np.float32)
    pmf = softmax(context @ np.random.default_rng(7).normal(size=(d, n_prompts)))
    action = (np.cumsum(pmf, axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=n_prompts - 1)
    columns = {
        "context": context,
        "query": rng.normal(size=(n, 2)),
        "action": action,
        "propensity": pmf[np.arange(n), action],
        "reward": rng.normal(size=n) + (action == 2),
        "output": rng.normal(size=(n, 2)),
        "prompts": PromptSet(np.eye(n_prompts), TEXTS if n_prompts == len(TEXTS) else None),
        "sentence": np.array([f"sentence {i}" for i in range(n)], dtype=object),
    }
    return LoggedDataset(**{**columns, **changes})


def about(log: LoggedDataset) -> dict[str, str]:
    """Messages of findings by level and column."""
    found: dict[str, str] = {}
    for finding in inspect_log(log).findings:
        key = f"{finding.level} {finding.about}"
        found[key] = f"{found.get(key, '')} {finding.message}"
    return found


def test_sound_log_has_no_findings() -> None:
    report = inspect_log(made())
    assert report.findings == ()
    assert (report.shape.rounds, report.shape.prompts, report.shape.context) == (3_000, 5, 3)
    assert "nothing odd was found" in str(report)
    assert max(map(len, str(report).splitlines())) <= 100


@pytest.mark.parametrize(("n", "n_prompts", "scale"), [(2_000, 5, 1.0), (4_000, 40, 1.0), (4_000, 40, 2.5)])
def test_right_propensities_are_believed(n: int, n_prompts: int, scale: float) -> None:
    """No false alarm in 30 worlds, with skewed features and rare prompts too."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        context = rng.lognormal(sigma=1.5, size=(n, 3))
        spread = np.clip((context - context.mean(0)) / context.std(0), -3, 3)
        pmf = softmax(spread @ rng.normal(size=(3, n_prompts)) * scale)
        action = (np.cumsum(pmf, axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=n_prompts - 1)
        log = made(n, n_prompts=n_prompts, context=context, action=action, propensity=pmf[np.arange(n), action])
        found = inspect_log(log).propensities
        assert found.counts is not None
        assert found.balance is not None
        assert found.counts.p_value > 1e-4
        assert found.balance.p_value > 1e-4


def test_weight_of_uniform_policy_averages_one_within_its_error() -> None:
    z = [inspect_log(made(2_000, seed)).propensities.mean_weight_z for seed in range(40)]
    assert abs(np.mean(z)) < 0.6
    assert 0.6 < np.std(z) < 1.4


SOUND = made()
N = len(SOUND)
DUPLICATED = SOUND.take(np.r_[np.arange(N), np.arange(500)])
WRONG = {
    "of a uniform policy": (made(propensity=np.full(N, 0.2)), "problem propensity", "importance weights are wrong"),
    "shuffled": (
        made(propensity=np.random.default_rng(1).permutation(SOUND.propensity)), "problem propensity", "shuffled",
    ),
    "shares of prompts, whatever the context": (
        made(propensity=(np.bincount(SOUND.action) / N)[SOUND.action]), "problem propensity", "depended on the context",
    ),
    "all 1": (made(propensity=np.ones(N)), "problem propensity", "all are 1 though prompts vary"),
    "constant, not 1/A": (made(propensity=np.full(N, 0.5)), "problem propensity", "all are 0.5, but 1/A is 0.2"),
    "halved": (made(propensity=SOUND.propensity / 2), "problem propensity", "they are too small; no logging policy"),
    "doubled": (made(propensity=np.minimum(SOUND.propensity * 2, 1)), "problem propensity", "too large"),
    "unknown": (made(propensity=np.full(N, np.nan)), "note propensity", "unknown in 3,000 of 3,000"),
    "unknown in part": (
        made(propensity=np.where(np.arange(N) < 10, np.nan, SOUND.propensity)), "note propensity", "unknown in 10 of",
    ),
    "constant reward": (made(reward=np.full(N, 2.0)), "problem reward", "all are 2"),
    "reward is the propensity": (
        made(reward=SOUND.propensity), "problem reward", "the same as propensity in every round",
    ),
    "reward is a feature": (made(reward=SOUND.context[:, 1]), "problem reward", "the same as context_1"),
    "heavy tails": (
        made(reward=np.where(np.arange(N) % 1_500 == 0, 1e4, SOUND.reward)), "note reward", "one round in a thousand",
    ),
    "drift": (made(reward=SOUND.reward + (np.arange(N) > N // 2)), "note reward", "second half pays +"),
    "one prompt": (made(action=np.zeros(N, int)), "problem action", "always prompt 0 ('be brief')"),
    "never logged": (made(action=SOUND.action % 3), "note action", "2 of 5 prompts were never logged"),
    "sorted by prompt": (SOUND.take(np.argsort(SOUND.action)), "note action", "prompts differ between the halves"),
    "prompts come in runs": (
        made(action=np.repeat(SOUND.action[::10], 10)), "note action", "the prompt of the row before comes again",
    ),
    "constant feature": (
        made(context=np.c_[SOUND.context, np.ones(N)]), "note context", "context_3 never vary",
    ),
    "raw features": (
        made(context=np.c_[SOUND.context, 40 + 12 * SOUND.context[:, 0]]), "problem context", "context_3 (39.9 ± 12)",
    ),
    "no features": (made(context=np.zeros((N, 2)), query=np.zeros((N, 0))), "problem context", "neither context nor"),
    "no outputs but zeros": (made(output=np.zeros((N, 2))), "note output", "the same zeros in every round"),
    "empty sentences": (
        made(sentence=np.array([""] * 7 + [f"s {i}" for i in range(N - 7)], dtype=object)),
        "note sentence", "7 are empty",
    ),
    "one sentence": (
        made(sentence=np.array(["A film."] * N, dtype=object)),
        "problem sentence", "100% are 'A film.', under 5 prompts",
    ),
    "prompts change nothing": (
        made(sentence=np.array([f"Film {i % 50}." for i in range(N)], dtype=object)),
        "note sentence", "several prompts gave",
    ),
    "logged twice": (DUPLICATED, "note rows", "500 repeat another one"),
    "few users": (made(user_id=np.arange(N) % 100), "note user_id", "100 users make 3,000 rounds, the busiest one 30"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str) -> None:
    log, where, said = WRONG[case]
    assert said in about(log)[where], about(log)


def test_what_is_as_intended_is_no_finding() -> None:
    n = 2_000
    rng = np.random.default_rng(0)
    discrete = made(n, context=rng.integers(2, size=(n, 3)), query=np.zeros((n, 0)), output=np.zeros((n, 0)),
                    reward=rng.integers(2, size=n), action=rng.integers(5, size=n),
                    propensity=np.full(n, 0.2), sentence=None)  # fmt: skip
    assert about(discrete) == {}
    assert inspect_log(discrete).rewards.kind == "binary"


def test_numbers_are_those_of_the_log() -> None:
    log = made()
    report = inspect_log(log)
    weight = 1 / log.propensity
    assert report.propensities.effective_uniform == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    paid = [np.average(log.reward[log.action == a], weights=weight[log.action == a]) for a in range(5)]
    assert report.propensities.best == np.argmax(paid)
    own = weight[log.action == np.argmax(paid)]
    assert report.propensities.effective_best == pytest.approx(own.sum() ** 2 / (own**2).sum())
    assert report.rewards.mean == pytest.approx(log.reward.mean(), rel=1e-5)
    assert report.rewards.quantiles[3] == pytest.approx(np.median(log.reward))
    counts = np.bincount(log.action)
    assert report.support.fewest == counts.min()
    assert report.support.top[0].rounds == counts.max()
    shares = counts / counts.sum()
    assert report.support.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_json_is_plain() -> None:
    for log in (made(), made(propensity=np.full(N, 0.5)), made(3, reward=np.ones(3))):
        again = json.loads(json.dumps(inspect_log(log).to_json(), allow_nan=False))
        assert again["shape"]["rounds"] == len(log)
        assert set(again["learners"]) == set(LEARNERS)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_tiny_logs(n: int) -> None:
    assert str(inspect_log(made(n)))


def test_not_a_log() -> None:
    with pytest.raises(ConfigError, match=r"LoggedDataset\.load"):
        inspect_log("log")  # type: ignore[arg-type]


class Generator:
    """Sentences around the number of the prompt."""

    output_dim = 2
    prompts = PromptSet(np.eye(5), TEXTS)

    def sample(self, contexts, actions, rng):
        noise = rng.normal(size=(len(contexts), 2))
        return Outputs(np.asarray(actions)[:, None] + noise)


GIVEN = {
    "everything": Given(True, True, True, True),
    "a log alone": Given(True, True),
    "no propensities": Given(False, True),
    "no outputs": Given(True, False),
    "neither": Given(False, False),
    "a generator": Given(True, True, generator=True),
    "a generator, no propensities": Given(False, True, generator=True),
    "a logging policy, no propensities": Given(False, True, logging_policy=True),
    "a logging policy alone": Given(False, False, logging_policy=True),
}


def arguments(given: Given) -> tuple[LoggedDataset, dict[str, object]]:
    log = made(80, sentence=None)
    if not given.propensities:
        log = replace(log, propensity=np.full(len(log), np.nan))
    if not given.outputs:
        log = replace(log, output=np.empty((len(log), 0)))
    return log, {
        "generator": Generator() if given.generator else None,
        "logging_policy": agents.UniformPolicy(5) if given.logging_policy else None,
    }


def tiny(configuration):
    """The configuration with a single step, and no choice of models, wherever there is one."""
    changed = {}
    for own in fields(configuration):
        value = getattr(configuration, own.name)
        if isinstance(value, SentenceRewardSearch):
            changed[own.name] = QUICK
        elif is_dataclass(value):
            changed[own.name] = tiny(value)
        elif own.name == "steps":
            changed[own.name] = 1
    return replace(configuration, **changed)


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("kind", ["learner", "estimator"])
def test_the_table_of_needs_is_true(kind: str, case: str) -> None:
    """Every method is run: it raises exactly where the table says that something lacks, and clones where it says so."""
    given = GIVEN[case]
    log, beside = arguments(given)
    for name, method in (LEARNERS if kind == "learner" else ESTIMATORS).items():
        configured = tiny(getattr(agents, method.class_name)())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if kind == "learner":
                    configured.fit(log, **beside)
                    said = [str(warning.message) for warning in caught]
                else:
                    said = list(configured.estimate(agents.UniformPolicy(5), log, **beside).warnings)
                actual = "clones" if any("was cloned from the log" in message for message in said) else "yes"
            except OffPromptsError as error:
                actual, said = "no", [str(error)]
        assert actual == judge(method, given).verdict, (name, said)


def test_every_learner_and_estimator_is_in_the_table() -> None:
    listed = {method.class_name for method in (*LEARNERS.values(), *ESTIMATORS.values())}
    offered = {
        name
        for name in agents.__all__
        if isinstance(getattr(agents, name), type)
        and (
            issubclass(getattr(agents, name), agents.OfflineLearner) or hasattr(getattr(agents, name), "asks_generator")
        )
    }
    assert offered - listed == {"OfflineLearner", "OfflinePolicyGradient"}


def test_recorded_log_names_its_environment() -> None:
    log = op.collect(gym.make("OffPrompts-Synthetic-v0", n_prompts=4), agents.UniformPolicy(4), 50, seed=3)
    report = inspect_log(log)
    assert (report.env_id, report.seed) == ("OffPrompts-Synthetic-v0", 3)
    assert "OffPrompts-Synthetic-v0, seed 3" in str(report)
