"""What a user brings goes through sweeps as the project's own does."""

from __future__ import annotations

from pathlib import Path

import pytest

import agents
from benchmarks.methods import Effort, Own
from benchmarks.settings.estimation import EstimationSetting
from benchmarks.settings.vectors import VectorSetting
from benchmarks.store import Store
from offprompts_env.errors import ConfigError
from tests.benchmarks import own_methods

pytestmark = pytest.mark.filterwarnings("ignore::agents.TrainingWarning")

VECTORS = VectorSetting(n=60, prompts=5, effort=Effort(steps=1e-3), contexts=100, curve_contexts=50)
ESTIMATION = EstimationSetting(VECTORS, logs=3, resamples=5)
UNITS = [(3, 0), (4, 0)]


def own(name: str) -> Own:
    return Own.of(f"tests.benchmarks.own_methods:{name}")


@pytest.mark.parametrize("name", ["learner", "bound"])
def test_an_own_learner_gives_what_the_same_built_in_one_gives(name: str, tmp_path: Path) -> None:
    # Effort is that of the project's own learners: of 3,000 steps it leaves three.
    found = [
        [result.value for result in VECTORS.perform(method, UNITS, Store(tmp_path))]
        for method in (agents.ImportanceSamplingPG(steps=3_000), own(name))
    ]
    # Alone or in a stack, a world learns the same bits.
    assert found[0] == found[1]


def test_an_own_estimator_gives_what_the_same_built_in_one_gives(tmp_path: Path) -> None:
    built_in, mine = (ESTIMATION.perform(method, UNITS, Store(tmp_path)) for method in (agents.IS(), own("estimator")))
    assert [result.measures for result in mine] == [result.measures for result in built_in]


def test_an_adapter_learns_by_playing_and_is_valued_by_its_pmf(tmp_path: Path) -> None:
    (fixed,) = VECTORS.perform(own("uniform"), UNITS[:1], Store(tmp_path))
    (found,) = VECTORS.perform(own("adapter"), UNITS[:1], Store(tmp_path))
    assert fixed.value == pytest.approx(fixed.references["uniform"], abs=1e-6)
    # It counts its rounds from one a prompt; what it settles on is not uniform.
    assert own_methods.counts.sum() == 5 + VECTORS.n
    assert abs(found.value - fixed.value) > 1e-3


@pytest.mark.parametrize(
    ("setting", "name", "message"),
    [
        (VECTORS, "estimator", "got an estimator; run it through estimators_n"),
        (ESTIMATION, "learner", "expected an estimator .* data_size"),
        (VECTORS, "nothing", "got object"),
        (ESTIMATION, "nothing", "got object"),
    ],
)
def test_what_does_not_fit_is_refused(
    setting: VectorSetting | EstimationSetting, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        setting.perform(own(name), UNITS, Store(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine", "expected MODULE:FUNCTION"),
        ("no_such_module:make", "No module named"),
        ("tests.benchmarks.own_methods:no_such_function", "no attribute"),
        ("tests.benchmarks.own_methods:agents", "expected a function, got module"),
    ],
)
def test_a_function_that_is_not_there_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Own.of(spec)
