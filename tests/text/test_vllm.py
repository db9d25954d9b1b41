"""The adapter to vLLM's offline engine, against a stand-in with vLLM's names."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offprompts_env.errors import ConfigError, DataError, MissingDependencyError, ModelError
from offprompts_env.movielens.parts import MovieLensConfig
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import LanguageModel
from offprompts_env.text.tokens import TokenCount
from offprompts_env.text.vllm import VLLMModel
from tests.tiny_bundle import make_tiny_bundle


@dataclass(frozen=True)
class SamplingParams:
    """The arguments of vLLM's class that are used; others are errors, as there."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    stop: list[str] | None
    seed: int


class LLM:
    """Answers with prompt, seed and a marker of how it was asked."""

    made: dict[str, Any]

    def __init__(self, model: str, generation_config: str, **engine: Any) -> None:
        if model == "broken":
            raise ValueError("no such architecture")
        type(self).made = {"model": model, "generation_config": generation_config, **engine}
        self.asked: list[SamplingParams] = []

    def generate(self, prompts: list[str], params: list[SamplingParams], use_tqdm: bool) -> list[SimpleNamespace]:
        assert len(prompts) == len(params)
        self.asked += params
        # "w1 …" is blank for odd seeds, "w2 …" always.
        return [
            SimpleNamespace(
                prompt_token_ids=[0] * len(prompt),
                outputs=[SimpleNamespace(text=self._text(prompt, p), token_ids=(1, 2))],
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]

    def _text(self, prompt: str, p: SamplingParams) -> str:
        blank = prompt.startswith("blank") or (prompt.startswith("shy") and p.seed % 2)
        return "  " if blank else f" {prompt}#{p.seed} "

    def chat(self, turns: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[SimpleNamespace]:
        assert all(turn == [{"role": "user", "content": turn[0]["content"]}] for turn in turns)
        return self.generate([f"chat:{turn[0]['content']}" for turn in turns], params, use_tqdm)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_tokens_are_counted_empty_continuations_included() -> None:
    lm = VLLMModel("m")
    lm.generate(["a", "bc"], rng())
    assert lm.tokens == TokenCount(3, 4, 2)
    with pytest.raises(ModelError, match="blanks 4 times"):
        lm.generate(["blank"], rng())
    assert lm.tokens == TokenCount(3 + 4 * 5, 4 + 4 * 2, 6)


def test_row_i_depends_on_prompt_i_and_the_generator() -> None:
    lm = VLLMModel("m")
    assert isinstance(lm, LanguageModel)
    first = lm.generate(["a", "b", "c"], rng())
    assert lm.generate(["a", "x", "c"], rng())[::2] == first[::2]
    assert lm.generate(["c", "a"], [rng(7), rng(8)]) == lm.generate(["a", "c"], [rng(8), rng(7)])[::-1]
    assert len({text.split("#")[1] for text in first}) == 3
    assert lm.generate([], rng()) == []


def test_decoding_in_the_names_of_vllm() -> None:
    lm = VLLMModel("m", Decoding(max_new_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, stop=("\n",)))
    lm.generate(["a"], rng())
    (asked,) = lm._llm.asked
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p) == (0.7, 5, 0.9, 0.1)
    assert (asked.max_tokens, asked.stop) == (9, ["\n"])
    greedy = VLLMModel("m", Decoding(greedy=True, top_p=0.5), chat_template=True, reproducible=True)
    assert greedy.generate(["a"], rng())[0].startswith("chat:a#")
    (asked,) = greedy._llm.asked
    assert (asked.temperature, asked.top_k, asked.top_p, asked.stop) == (0.0, -1, 1.0, None)
    assert LLM.made["generation_config"] == "vllm"


def test_what_it_declares() -> None:
    assert not VLLMModel("m").reproducible
    assert not VLLMModel("m", Decoding(greedy=True)).deterministic
    assert VLLMModel("m", Decoding(greedy=True), reproducible=True).deterministic
    prints = {
        VLLMModel("m").fingerprint,
        VLLMModel("n").fingerprint,
        VLLMModel("m", chat_template=True).fingerprint,
        VLLMModel("m", Decoding(top_p=0.5)).fingerprint,
        VLLMModel("m", engine={"dtype": "float16"}).fingerprint,
    }
    assert len(prints) == 5
    assert VLLMModel("m", engine={"tensor_parallel_size": 2}).fingerprint in prints


def test_empty_answers_are_asked_for_again() -> None:
    lm = VLLMModel("m")
    prompts = [f"shy {i}" for i in range(20)]
    texts = lm.generate(prompts, rng())
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert 20 < len(lm._llm.asked) < 40
    with pytest.raises(ModelError, match="expected a continuation of 'blank', got blanks 4 times"):
        lm.generate(["a", "blank"], rng())


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="non-blank text, got ' ' at position 1"):
        VLLMModel("m").generate(["a", " "], rng())
    with pytest.raises(ModelError, match="vLLM cannot load 'broken': no such architecture"):
        VLLMModel("broken")
    for engine, words in (({"seed": 1}, "got 'seed'"), ({"x": object()}, "JSON"), (3, "names and values")):
        with pytest.raises(ConfigError, match=words):
            VLLMModel("m", engine=engine)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match="needs the package 'vllm'"):
        VLLMModel("m")


def test_the_environment_takes_it_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = str(make_tiny_bundle(tmp_path_factory.mktemp("vllm") / "bundle"))
    config = MovieLensConfig(
        bundle=bundle, language_model="vllm:some/model", chat_template=True, vllm={"dtype": "bfloat16"}
    )
    simulator = config.build()
    assert not simulator.reproducible
    assert LLM.made == {"model": "some/model", "generation_config": "vllm", "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="vllm: expected"):
        MovieLensConfig(bundle=bundle, vllm={"dtype": "bfloat16"})
