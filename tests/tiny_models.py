"""Random text models and tokenizers, made on the spot and small enough for a test to load many of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = tuple(f"w{i}" for i in range(40))


def tokenizer(words: Iterable[str] = WORDS, *, pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a word."""
    vocabulary = {word: index for index, word in enumerate(("[pad]", "[eos]", "[unk]", *dict.fromkeys(words)))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    named = {"eos_token": "[eos]", "unk_token": "[unk]"} | ({"pad_token": "[pad]"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def _seeded(make: Any) -> Any:
    # Random weights without touching the generator that the tests and the library share.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        # Spread-out logits: with the usual initialisation every token is about as likely as any other.
        for parameter in model.parameters():
            parameter.data.mul_(4.0)
    return model.eval()


def llama(vocab_size: int = 43, room: int = 64) -> LlamaForCausalLM:
    """Return a Llama of 16 dimensions and 2 layers with grouped queries."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=room, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: LlamaForCausalLM(config))  # type: ignore[no-any-return]


def mistral(vocab_size: int = 43, window: int | None = None) -> MistralForCausalLM:
    """Return a Mistral of 2 layers that attend to all tokens, or to the last `window`."""
    config = MistralConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=window, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: MistralForCausalLM(config))  # type: ignore[no-any-return]


def mistral_with_window() -> MistralForCausalLM:
    """Return a Mistral whose layers attend to the last 12 tokens."""
    return mistral(window=12)


def qwen2(vocab_size: int = 43) -> Qwen2ForCausalLM:
    """Return a Qwen2 of 2 layers with grouped queries."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: Qwen2ForCausalLM(config))  # type: ignore[no-any-return]


def gpt2(vocab_size: int = 43, room: int = 64) -> GPT2LMHeadModel:
    """Return a GPT-2, whose positions are learned and absolute."""
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=room, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: GPT2LMHeadModel(config))  # type: ignore[no-any-return]


def distilbert(vocab_size: int = 43, dim: int = 16) -> DistilBertModel:
    """Return a DistilBERT of 2 layers."""
    config = DistilBertConfig(
        vocab_size=vocab_size, dim=dim, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=64, pad_token_id=0
    )
    return _seeded(lambda: DistilBertModel(config))  # type: ignore[no-any-return]
