"""The sample table keeps randomness, does not depend on visiting order, and forgets without changing."""

from __future__ import annotations

import numpy as np
import pytest

from offprompts_env.errors import ActionError, ConfigError, DataError
from offprompts_env.simulator import OutputModel
from offprompts_env.text.cache import SampleTable
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import TextEncoder
from offprompts_env.text.language_model import CausalLM, row_uniforms
from offprompts_env.text.prompted import PromptedLM, PromptFormatter, TextOutputModel
from offprompts_env.types import Contexts, PromptSet
from tests import tiny_models

FORMATTER = PromptFormatter("w1 {query} w2 {prompt} w3", "w1 {query} w3")


class CoinModel:
    """Says "w0" or "w1" with the probabilities 0.7 and 0.3, whatever it is asked."""

    fingerprint = "coin"
    deterministic = False

    def __init__(self):
        self.written = 0

    def generate(self, prompts, rng):
        self.written += len(prompts)
        return ["w0" if u < 0.7 else "w1" for u in row_uniforms(rng, len(prompts), 1)[:, 0]]


class Letters:
    """Embeds "wI" as I."""

    dim = 1

    def encode(self, texts):
        return np.array([[float(text.split()[0][1:])] for text in texts], dtype=np.float32).reshape(-1, 1)


def prompts(n=4):
    return PromptSet(np.eye(n), texts=tuple(f"w{20 + i}" for i in range(n)))


def contexts(*queries):
    n = len(queries)
    return Contexts(np.zeros((n, 2)), np.zeros((n, 1)), query_text=np.array(queries, dtype=object))


def coins(**settings):
    return SampleTable(PromptedLM(CoinModel(), Letters(), prompts(), FORMATTER), **settings)


@pytest.fixture(scope="module")
def prompted():
    tokens = tiny_models.tokenizer()
    lm = CausalLM(tiny_models.llama(), tokens, decoding=Decoding(max_new_tokens=8))
    return PromptedLM(lm, TextEncoder(tiny_models.distilbert(), tokens), prompts(), FORMATTER)


def test_formatter():
    formatter = PromptFormatter("{query} as {prompt} {x}", "{query}: {y}")
    assert formatter.ask("{prompt} {0}", "{query}") == "{prompt} {0} as {query} {x}"
    assert formatter.ask("a\\1b") == "a\\1b: {y}"
    for wrong in (("{query}", "{query}"), ("{query} {prompt}", "{query} {prompt}"), ("{prompt}", "{query}"), ("x", "")):
        with pytest.raises(ConfigError, match="expected exactly the slots"):
            PromptFormatter(*wrong)


def test_prompted_lm(prompted):
    assert isinstance(prompted, TextOutputModel)
    drawn = prompted.sample(contexts("w5", "w6", "w6"), np.array([0, 3, 3]), np.random.default_rng(0))
    asked = ["w1 w5 w2 w20 w3", "w1 w6 w2 w23 w3", "w1 w6 w2 w23 w3"]
    sentences = prompted.language_model.generate(asked, np.random.default_rng(0))
    assert drawn.text.tolist() == sentences
    np.testing.assert_array_equal(drawn.embedding, prompted.encoder.encode(sentences))


def test_prompted_lm_wrong_input(prompted):
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="query_text"):
        prompted.sample(Contexts(np.zeros((1, 2)), np.zeros((1, 1))), np.array([0]), rng)
    with pytest.raises(ActionError):
        prompted.sample(contexts("w5"), np.array([4]), rng)
    with pytest.raises(ConfigError, match="prompt texts"):
        PromptedLM(prompted.language_model, prompted.encoder, PromptSet(np.eye(2)), FORMATTER)


def test_table_is_an_output_model_that_stays_random():
    table = coins(slots=64)
    assert isinstance(table, OutputModel)
    drawn = table.sample(contexts(*["w5"] * 4000), np.zeros(4000, dtype=int), np.random.default_rng(0))
    share = float(drawn.embedding.mean())
    # Within five standard errors of 64 frozen samples, and neither of the two constants.
    assert abs(share - 0.3) < 5 * np.sqrt(0.21 / 64)
    assert table.generated == len(table) == 64
    assert table.requested == 4000
    assert drawn.text.tolist() == [f"w{int(e)}" for e in drawn.embedding[:, 0]]


def test_over_tables_a_draw_has_the_models_distribution():
    first = [
        coins(slots=2, seed=seed).sample(contexts("w5"), np.array([0]), np.random.default_rng(7)).embedding[0, 0]
        for seed in range(1000)
    ]
    assert abs(np.mean(first) - 0.3) < 5 * np.sqrt(0.21 / 1000)


def test_two_requests_are_independent_of_each_other():
    table = coins(slots=1)
    queries = [f"w{i}" for i in range(400)]
    drawn = table.sample(contexts(*queries), np.zeros(400, dtype=int), np.random.default_rng(0))
    assert 60 < drawn.embedding.sum() < 180


def test_content_does_not_depend_on_visiting_order_or_capacity(prompted):
    queries = contexts(*[f"w{i % 9}" for i in range(60)])
    actions = np.arange(60) % 4
    whole = SampleTable(prompted, slots=3).sample(queries, actions, np.random.default_rng(0))
    visited = SampleTable(prompted, slots=3)
    for order in range(3):
        visited.sample(queries.take(slice(None, None, -1)), actions[::-1], np.random.default_rng(order))
    again = visited.sample(queries, actions, np.random.default_rng(0))
    tight = SampleTable(prompted, slots=3, capacity=5)
    tight.sample(queries, actions, np.random.default_rng(1))
    forgetful = tight.sample(queries, actions, np.random.default_rng(0))
    assert len(tight) == 5
    assert whole.text.tolist() == again.text.tolist() == forgetful.text.tolist()
    np.testing.assert_allclose(whole.embedding, again.embedding, atol=1e-5)
    np.testing.assert_allclose(whole.embedding, forgetful.embedding, atol=1e-5)


def test_same_row_same_slot_whatever_the_actions():
    # Common random numbers: with every action the i-th uniform picks the slot.
    table = coins(slots=1000)
    queries = contexts(*["w5"] * 50)
    table.sample(queries, np.zeros(50, dtype=int), np.random.default_rng(3))
    before = table.generated
    mixed = np.where(np.arange(50) == 7, 1, 0)
    table.sample(queries, mixed, np.random.default_rng(3))
    assert table.generated == before + 1


def test_deterministic_model_has_one_slot(prompted):
    greedy = CausalLM(
        prompted.language_model.model,
        prompted.language_model.tokenizer,
        decoding=Decoding(max_new_tokens=4, greedy=True),
    )
    table = SampleTable(PromptedLM(greedy, prompted.encoder, prompts(), FORMATTER), slots=8)
    table.sample(contexts(*["w5"] * 20), np.zeros(20, dtype=int), np.random.default_rng(0))
    assert table.generated == 1


def test_other_models_and_seeds_give_other_sentences(prompted):
    queries, actions = contexts(*["w5"] * 20), np.arange(20) % 4

    def texts(outputs, **settings):
        table = SampleTable(outputs, **settings)
        return table.sample(queries, actions, np.random.default_rng(0)).text.tolist()

    assert texts(prompted) == texts(prompted) != texts(prompted, seed=1)


def test_wrong_settings():
    with pytest.raises(ConfigError, match="slots"):
        coins(slots=0)
    with pytest.raises(ConfigError, match="capacity"):
        coins(capacity=0)
    with pytest.raises(ConfigError, match="wrap a PromptedLM"):
        SampleTable(CoinModel())
