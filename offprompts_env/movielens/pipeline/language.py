"""The small language model: its tokenizer, and its training on sentences of the grammar.

A Llama-architecture model with tied embeddings reads ``Movie: <title> [Keyword: <keyword>] Description:`` and writes
one sentence. Every piece of the grammar is a single token of its tokenizer, in the prompt and in the sentence alike,
so that writing the keyword is copying one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offprompts_env.movielens import grammar
from offprompts_env.movielens.grammar import Movie, describe, is_compatible
from offprompts_env.movielens.lexicon import Keyword, lexicon
from offprompts_env.rng import integer_seed, stream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TITLE_PIECE = "Movie:"
KEYWORD_PIECE = "\nKeyword:"
ANSWER_PIECE = "\nDescription:"
TEMPLATE = "Movie: {query}\nDescription:"
TEMPLATE_WITH_KEYWORD = "Movie: {query}\nKeyword: {prompt}\nDescription:"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_IGNORED = -100
_SORTED_BATCHES = 8


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size and training of the small language model.

    ``steps`` batches of ``batch_size`` sentences; ``learning_rate`` is the peak of a cosine schedule with linear
    warm-up over ``warmup`` steps. The first ``echo_steps`` steps favour keywords that suit the movie, from which
    copying is learned fast. ``no_keyword`` is the share of sentences without a keyword, ``suitable`` the share of
    keywords drawn among those that suit the movie (the rest are drawn from all).
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 384
    title_vocabulary: int = 2000
    steps: int = 10000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 200
    echo_steps: int = 600
    no_keyword: float = 0.4
    suitable: float = 0.5
    weight_decay: float = 0.01
    bfloat16: bool = True


def make_tokenizer(
    titles: Sequence[str], vocabulary: int, pieces: Sequence[str] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocabulary` pieces on `titles`, and add `pieces` (the grammar's) as tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # A year with its brackets is one word; otherwise words and runs of punctuation, each with its leading blank.
    words = pre_tokenizers.Split(Regex(r" \(\d{4}\)| ?\w+| ?[^\s\w]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((f" {title}" for title in titles), trainer)
    added = (TITLE_PIECE, KEYWORD_PIECE, ANSWER_PIECE, *grammar.pieces()) if pieces is None else pieces
    bpe.add_tokens([AddedToken(piece, normalized=False) for piece in added])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, config: LanguageModelConfig, seed: int) -> PreTrainedModel:
    """Return an untrained Llama of the configured size; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=math.ceil(len(tokenizer) / 16) * 16,
                hidden_size=config.width,
                intermediate_size=config.feed_forward,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


class SentenceSampler:
    """Draws training examples as token ids; `draw` gives one batch of (prompt, sentence) pairs."""

    def __init__(
        self, movies: Sequence[Movie], tokenizer: PreTrainedTokenizerFast, config: LanguageModelConfig
    ) -> None:
        self._movies = movies
        self._config = config
        self._keywords = lexicon()
        vocabulary = tokenizer.get_vocab()
        self._piece = {piece: vocabulary[piece] for piece in grammar.pieces()}
        self._eos = vocabulary[EOS]
        self._start = [vocabulary[TITLE_PIECE]]
        self._slot, self._answer = vocabulary[KEYWORD_PIECE], vocabulary[ANSWER_PIECE]
        self._titles = [tokenizer.encode(f" {movie.title}", add_special_tokens=False) for movie in movies]
        self.title_lengths = np.array([len(title) for title in self._titles])
        self._suitable = [
            np.array([i for i, word in enumerate(self._keywords) if is_compatible(word, movie)]) for movie in movies
        ]

    def draw(
        self, items: np.ndarray, rng: np.random.Generator, *, echo: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """Return one (prompt ids, sentence ids) pair for every movie index in `items`."""
        kinds = rng.random((len(items), 2))
        examples = []
        for item, (has, suits) in zip(items, kinds, strict=True):
            keyword: Keyword | None = None
            if has >= (0.1 if echo else self._config.no_keyword):
                suitable = self._suitable[item]
                fits = suits < (0.9 if echo else self._config.suitable)
                keyword = self._keywords[
                    suitable[rng.integers(len(suitable))] if fits else rng.integers(len(self._keywords))
                ]
            prompt = self._start + self._titles[item]
            if keyword is not None:
                prompt = [*prompt, self._slot, self._piece[f" {keyword.text}"]]
            sentence = [self._piece[piece] for piece in describe(self._movies[item], keyword, rng)]
            examples.append(([*prompt, self._answer], [*sentence, self._eos]))
        return examples


def collate(examples: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, targets), both (n, length): right-padded ids, and ids where the loss counts, else -100."""
    import torch

    length = max(len(prompt) + len(sentence) for prompt, sentence in examples)
    tokens = np.full((len(examples), length), pad)
    targets = np.full((len(examples), length), _IGNORED)
    for row, (prompt, sentence) in enumerate(examples):
        end = len(prompt) + len(sentence)
        tokens[row, :end] = prompt + sentence
        targets[row, len(prompt) - 1 : end - 1] = sentence
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def train_language_model(
    movies: Sequence[Movie],
    config: LanguageModelConfig,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train tokenizer and model on sentences of the grammar about `movies`.

    Minimises -log p(sentence | prompt) per sentence token. Movies come in random permutations, so each is seen equally
    often. ``progress(loss)`` is called after every step.
    """
    import torch

    tokenizer = make_tokenizer([movie.title for movie in movies], config.title_vocabulary)
    model = make_model(tokenizer, config, integer_seed(seed, "language-model"))
    sampler = SentenceSampler(movies, tokenizer, config)
    rng = stream(seed, "language-model")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.set_attn_implementation("eager")  # twice as fast as the fused CPU kernel at this size, backward included
    batches = _item_batches(sampler.title_lengths, config.batch_size, rng)
    model.train()
    for step in range(config.steps):
        examples = sampler.draw(next(batches), rng, echo=step < config.echo_steps)
        tokens, targets = collate(examples, tokenizer.pad_token_id)
        rate = config.learning_rate * learning_rate_factor(step, config.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, tokens, targets, config.bfloat16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(float(loss.detach()))
    model.set_attn_implementation("sdpa")
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def _item_batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of `size` item indices without end; titles of similar length share a batch, to save padding."""
    items = np.empty(0, dtype=np.int64)
    while True:
        while len(items) < size * _SORTED_BATCHES:
            items = np.concatenate([items, rng.permutation(len(lengths))])
        block, items = items[: size * _SORTED_BATCHES], items[size * _SORTED_BATCHES :]
        block = block[np.argsort(lengths[block], kind="stable")].reshape(_SORTED_BATCHES, size)
        yield from block[rng.permutation(_SORTED_BATCHES)]


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return linear warm-up from 0 to 1 over `warmup` steps, then a cosine from 1 to 0.02 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _loss(model: PreTrainedModel, tokens: torch.Tensor, targets: torch.Tensor, bfloat16: bool) -> torch.Tensor:
    """Return the mean cross-entropy over the sentence positions; the vocabulary matrix is applied at those only."""
    import torch

    use = targets != _IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[use])
    return torch.nn.functional.cross_entropy(logits.float(), targets[use])


def save_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write model (float16 safetensors) and tokenizer as a Hugging Face directory."""
    import copy

    stored = copy.deepcopy(model).half()  # type: ignore[no-untyped-call]
    stored.save_pretrained(path)
    tokenizer.save_pretrained(path)
