"""A frozen language model as an output model: a template around query and prompt, and an encoder for the sentence."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from offprompts_env.errors import ConfigError, DataError
from offprompts_env.simulator import OutputModel
from offprompts_env.text.encoder import Encoder
from offprompts_env.text.language_model import LanguageModel, Randomness
from offprompts_env.text.tokens import TokenCount, counted_by
from offprompts_env.types import Array, Contexts, FloatArray, IntArray, Outputs, PromptSet, check_actions

_SLOT = re.compile(r"\{(query|prompt)\}")


@dataclass(frozen=True, slots=True)
class PromptFormatter:
    """What the language model is asked.

    Only ``{query}`` and ``{prompt}`` are slots; other braces, in the templates or in what fills them, are text. So are
    control tokens of a language model, such as ``</s>`` or ``<|im_start|>``, in what fills a slot of a :meth:`guarded`
    formatter: a title cannot end the prompt or take another part in a chat. In the templates they control.

    Attributes:
        template: with ``{query}`` and ``{prompt}``.
        template_without_prompt: with ``{query}`` only.
        control: texts that a tokenizer reads as control tokens.
    """

    template: str
    template_without_prompt: str
    control: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, needed in (("template", {"query", "prompt"}), ("template_without_prompt", {"query"})):
            value = getattr(self, name)
            if set(_SLOT.findall(value)) != needed:
                slots = " and ".join(f"{{{slot}}}" for slot in sorted(needed, reverse=True))
                raise ConfigError(f"{name}: expected exactly the slots {slots}, got {value!r}")

    def ask(self, query: str, prompt: str | None = None) -> str:
        """Return the request about `query`, steered by `prompt` where there is one."""
        if self.control:
            query, prompt = _as_text(query, self.control), None if prompt is None else _as_text(prompt, self.control)
        if prompt is None:
            return _SLOT.sub(lambda _: query, self.template_without_prompt)
        return _SLOT.sub(lambda slot: query if slot[1] == "query" else prompt, self.template)

    def guarded(self, language_model: LanguageModel) -> PromptFormatter:
        """Return the formatter that keeps control tokens of `language_model`, where it tells them, out of slots."""
        return replace(self, control=tuple(getattr(language_model, "control_tokens", ())))


@functools.lru_cache(maxsize=1 << 14)
def _as_text(text: str, control: tuple[str, ...]) -> str:
    """Return `text` with a blank behind the first character of whatever would be read as a control token."""
    pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    # Taking one token apart may leave another one: one within it, say.
    for _ in control:
        broken = re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", text)
        if broken == text:
            break
        text = broken
    return text


@runtime_checkable
class TextOutputModel(OutputModel, Protocol):
    """An output model in three steps: ask, write, embed."""

    @property
    def fingerprint(self) -> str:
        """Names everything but the request that shapes the distribution of a sentence."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether a request has only one answer."""
        ...

    def requests(self, contexts: Contexts, actions: IntArray) -> list[str]:
        """Return the full request of each round."""
        ...

    def write(self, requests: Sequence[str], rng: Randomness) -> list[str]:
        """Return one sentence a request; see :meth:`LanguageModel.generate`."""
        ...

    def embed(self, sentences: Sequence[str]) -> FloatArray:
        """Return one embedding a sentence, (n, d_o)."""
        ...


class PromptedLM:
    """The frozen generator: request → sentence → embedding. It never sees the user.

    Args:
        language_model: writes the sentences.
        encoder: embeds them.
        prompts: catalogue, with texts.
        formatter: makes the requests.

    Raises:
        ConfigError: the prompts have no texts.
    """

    def __init__(
        self, language_model: LanguageModel, encoder: Encoder, prompts: PromptSet, formatter: PromptFormatter
    ) -> None:
        if prompts.texts is None:
            raise ConfigError("prompts: a language model needs prompt texts, got embeddings only; pass texts=")
        self.language_model, self.encoder = language_model, encoder
        self.prompts, self.formatter = prompts, formatter.guarded(language_model)
        self._texts = prompts.texts

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return self.encoder.dim

    @property
    def fingerprint(self) -> str:
        """That of the language model."""
        return self.language_model.fingerprint

    @property
    def encoder_fingerprint(self) -> str | None:
        """That of the encoder; None where it has none, and embeddings cannot be kept under its name."""
        return getattr(self.encoder, "fingerprint", None)

    @property
    def tokens(self) -> TokenCount | None:
        """Those that the language model has read and written so far; None where it does not count."""
        return counted_by(self.language_model)

    @property
    def deterministic(self) -> bool:
        """As the language model."""
        return self.language_model.deterministic

    @property
    def reproducible(self) -> bool:
        """Whether the same random numbers give the same sentences, as a model says that cannot promise it."""
        return bool(getattr(self.language_model, "reproducible", True))

    @property
    def served_by(self) -> Mapping[str, Any]:
        """What a server says of the model that answers there; empty for a model in process."""
        identify = getattr(self.language_model, "identify", None)
        return {} if identify is None else identify()

    def requests(self, contexts: Contexts, actions: IntArray) -> list[str]:
        """Return the full request of each round.

        Raises:
            DataError: contexts have no query text.
            ActionError: an action is not a prompt.
        """
        queries = query_texts(contexts)
        actions = check_actions(actions, len(self.prompts), len(contexts))
        return [self.formatter.ask(query, self._texts[action]) for query, action in zip(queries, actions, strict=True)]

    def write(self, requests: Sequence[str], rng: Randomness) -> list[str]:
        """Return one sentence a request."""
        return self.language_model.generate(requests, rng)

    def embed(self, sentences: Sequence[str]) -> FloatArray:
        """Return one embedding a sentence, (n, d_o)."""
        return self.encoder.encode(sentences)

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one sentence a round.

        Raises:
            DataError: contexts have no query text.
        """
        sentences = self.write(self.requests(contexts, actions), rng)
        return Outputs(self.embed(sentences), text_column(sentences))


def query_texts(contexts: Contexts) -> list[str]:
    """Return the query text of each round.

    Raises:
        DataError: there is none.
    """
    if contexts.query_text is None:
        raise DataError("query_text: a language model needs the text of the query, got none; set Contexts.query_text")
    texts: list[str] = contexts.query_text.tolist()
    return texts


def text_column(texts: Sequence[str]) -> Array:
    """Return `texts` as a column of Python strings, (n,)."""
    column = np.empty(len(texts), dtype=object)
    column[:] = texts
    return column
