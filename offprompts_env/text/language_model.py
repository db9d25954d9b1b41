"""Frozen language models: the protocol, and any Hugging Face causal LM behind a lean batched sampler.

Where the time goes, for the embedded Llama (d = 128, 4 layers, 1.25M parameters; 10 prompt and 13 new tokens) on one
core: 51% in the steps after the prompt, 24% in choosing tokens (nearly all of it the nucleus), 20% in the prompt. That
made 520 sentences a second of processor time on a loaded machine, 620 to 710 where 8 to 16 samples of a prompt are
asked: 18% to 25% of what matrix products alone would take (57 MFLOP a sentence at 161 GFLOP/s). A single sentence at
a time is bound by Python and memory traffic instead: 25 ms each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, ModelError
from offprompts_env.text.decoding import Decoding, choose
from offprompts_env.text.loading import fingerprint_of, freeze, input_device, load_frozen, pad_id
from offprompts_env.types import FloatArray, IntArray

Randomness = np.random.Generator | Sequence[np.random.Generator]

#: Seeds are below this: they fit into 31 bits, which every server takes, and every JSON reader on the way.
SEEDS = 2**31 - 1

# A batch is compacted when at most this share of its rows still runs: copying the cache costs about half a step.
_COMPACT_BELOW = 0.75


@runtime_checkable
class LanguageModel(Protocol):
    """A frozen model that continues prompts."""

    @property
    def fingerprint(self) -> str:
        """Names everything that shapes the distribution of a continuation: weights, tokenizer, decoding."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether a prompt has only one continuation."""
        ...

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Return one continuation a prompt.

        The randomness of continuation i depends on the state of `rng` and on i only, never on any prompt. Given a
        sequence of generators, one a prompt, continuation i is a function of prompt i and generator i.
        """
        ...


def row_uniforms(rng: Randomness, n: int, width: int) -> FloatArray:
    """Return the uniforms behind n continuations, (n, width) float32: row i depends on `rng` and i only.

    Raises:
        DataError: a sequence of generators of another length than n.
    """
    if isinstance(rng, np.random.Generator):
        return rng.random((n, width), dtype=np.float32)
    if len(rng) != n:
        raise DataError(f"rng: expected one generator, or {n}, one a prompt, got {len(rng)}")
    uniforms = np.empty((n, width), dtype=np.float32)
    for row, generator in enumerate(rng):
        generator.random(out=uniforms[row], dtype=np.float32)
    return uniforms


def row_seeds(rng: Randomness, n: int) -> list[int]:
    """Return the seeds of n requests: number i depends on `rng` and i only.

    Raises:
        DataError: a sequence of generators of another length than n.
    """
    if isinstance(rng, np.random.Generator):
        seeds: list[int] = rng.integers(SEEDS, size=n).tolist()
        return seeds
    if len(rng) != n:
        raise DataError(f"rng: expected one generator, or {n}, one a prompt, got {len(rng)}")
    return [int(generator.integers(SEEDS)) for generator in rng]


class CausalLM:
    """Any frozen ``AutoModelForCausalLM``.

    Continuation i uses row i of ``rng.random((n, max_new_tokens))``, one uniform a token, by inverse CDF. So it is a
    function of prompt i and row i: other prompts, their order and `batch_size` do not matter, but for one caveat. A
    matrix product rounds differently in batches of another shape, by about 1e-7 relative in float32; a uniform that
    close to the edge of a token then picks its neighbour. (None did in 400,000 tokens of the embedded model,
    shuffled and in batches of 7, 37 and 128; in half precision it is common.) The same call on the same machine with
    the same number of threads is bit-identical: batches are formed from lengths and texts alone.

    Args:
        model: a causal LM of ``transformers``; it is frozen in place.
        tokenizer: its tokenizer.
        decoding: how tokens are chosen.
        chat_template: wrap every prompt as the user's turn of the tokenizer's own chat template.
        pad_token: what fills short prompts where the tokenizer names nothing. It is masked, so any token will do; the
            end-of-sentence token is usual.
        batch_size: rows decoded at once, at most.
        max_batch_tokens: tokens of a batch at most, padding and continuations included; a single row may have more. It
            bounds memory where prompts are long: a cache of 65,536 tokens is 8.6 GB for Mistral-7B in half precision.
            Where an accelerator runs out of memory nevertheless, a batch is done in halves.

    Raises:
        ModelError: no pad token, or no chat template where one is asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        decoding: Decoding | None = None,
        chat_template: bool = False,
        pad_token: str | None = None,
        batch_size: int = 128,
        max_batch_tokens: int = 1 << 16,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("max_batch_tokens", max_batch_tokens, 1)
        if chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise ModelError("chat_template: this tokenizer has none; use chat_template=False or an instruction model")
        self.model, self.tokenizer = freeze(model), tokenizer
        self.decoding = decoding if decoding is not None else Decoding()
        self.chat_template = chat_template
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        self._pad_id = pad_id(tokenizer, pad_token)
        self._end_ids = _end_ids(model, tokenizer)
        self._longest_stop = max((len(stop.encode()) for stop in self.decoding.stop), default=0)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        decoding: Decoding | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        chat_template: bool = False,
        pad_token: str | None = None,
        batch_size: int = 128,
        max_batch_tokens: int = 1 << 16,
        device_map: str | None = None,
    ) -> CausalLM:
        """Load a directory or a hub id, such as the published ``mistralai/Mistral-7B-Instruct-v0.2``.

        Args:
            source: directory or hub id.
            decoding: how tokens are chosen.
            device: ``"cpu"``, ``"cuda"``, ``"auto"``.
            dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            chat_template: see the class.
            pad_token: see the class.
            batch_size: see the class.
            max_batch_tokens: see the class.
            device_map: how a model too large for one device is spread, as in ``transformers``: ``"auto"``,
                ``"balanced"``, ``"sequential"``; takes the place of `device`.

        Raises:
            MissingDependencyError: `device_map` needs accelerate, which is not installed.
            ModelError: it cannot be loaded or used; the message says what to do.
        """
        from transformers import AutoModelForCausalLM

        model, tokenizer = load_frozen(AutoModelForCausalLM, source, device=device, dtype=dtype, device_map=device_map)
        return cls(
            model,
            tokenizer,
            decoding=decoding,
            chat_template=chat_template,
            pad_token=pad_token,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer, decoding and chat template."""
        template = self.tokenizer.chat_template if self.chat_template else None
        return fingerprint_of(self.model, self.tokenizer, self.decoding, template)

    @property
    def deterministic(self) -> bool:
        """True under greedy decoding."""
        return self.decoding.greedy

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Return one continuation a prompt, without special tokens and surrounding blanks.

        Raises:
            DataError: a prompt is blank.
            ModelError: a prompt with its continuation does not fit into the model.
            NumericalError: the model gives NaN.
        """
        prompts = list(prompts)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"prompt: expected non-blank text, got {prompt!r} at position {index}; fill it")
        uniforms = torch.from_numpy(row_uniforms(rng, len(prompts), self.decoding.max_new_tokens))
        if not prompts:
            return []
        # Equal prompts are tokenized once and, inside a batch, read by the model once.
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        which = np.array([unique[prompt] for prompt in prompts])
        encoded = self._encode(list(unique))
        lengths = np.array([len(ids) for ids in encoded])
        order = np.lexsort((which, lengths[which]))
        sentences = [""] * len(prompts)
        left = self._batches(order, lengths[which])[::-1]
        while left:
            rows = left.pop()
            # Equal prompts are neighbours in this order.
            fresh = np.diff(which[rows], prepend=-1) != 0
            distinct = [encoded[prompt] for prompt in which[rows][fresh]]
            try:
                tokens = self._continue(distinct, np.cumsum(fresh) - 1, uniforms[torch.from_numpy(rows)])
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                left += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
                continue
            for row, text in zip(rows, self._decode(tokens), strict=True):
                sentences[row] = text
        return sentences

    def _batches(self, order: IntArray, lengths: IntArray) -> list[IntArray]:
        """Cut `order`, rows by rising length of their prompts, into batches within both bounds."""
        batches, start = [], 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            # Every row is padded to the longest, which is the last.
            tokens = (lengths[rows] + self.decoding.max_new_tokens) * np.arange(1, len(rows) + 1)
            fitting = max(1, int(np.searchsorted(tokens, self.max_batch_tokens, side="right")))
            batches.append(rows[:fitting])
            start += fitting
        return batches

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if self.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        encoded: list[list[int]] = self.tokenizer(prompts, add_special_tokens=not self.chat_template)["input_ids"]
        room = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
        needed = len(encoded[longest]) + self.decoding.max_new_tokens
        if room is not None and needed > room:
            raise ModelError(
                f"prompt: expected at most {room} tokens with the continuation, but {prompts[longest]!r} has "
                f"{len(encoded[longest])} and max_new_tokens={self.decoding.max_new_tokens}; shorten either"
            )
        if min(len(ids) for ids in encoded) == 0:
            raise ModelError("prompt: the tokenizer returned no token for a prompt; check the tokenizer")
        return encoded

    @torch.inference_mode()
    def _continue(self, prompts: list[list[int]], which: IntArray, uniforms: torch.Tensor) -> list[list[int]]:
        """Return the new tokens of each row, without the end token.

        Args:
            prompts: token ids of the distinct prompts of this batch.
            which: prompt of each row, (b,).
            uniforms: (b, max_new_tokens).
        """
        from transformers import DynamicCache

        device = input_device(self.model)
        steps = self.decoding.max_new_tokens
        uniforms = uniforms.to(device)
        end_ids = torch.tensor(self._end_ids, device=device)
        cache: Any = DynamicCache(config=self.model.config)
        # Padding goes to the left, so that every row's last token is in the last column.
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        width = int(lengths.max())
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()
        logits = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp_(min=0), cache)
        if len(prompts) < len(which):
            picked = torch.as_tensor(which, device=device)
            cache.reorder_cache(picked)
            logits, mask, lengths = logits[picked], mask[picked], lengths[picked]
        mask = torch.cat([mask, mask.new_ones(len(which), steps)], dim=1)

        new = torch.zeros(len(which), steps, dtype=torch.long, device=device)
        count = torch.full((len(which),), steps, device=device)
        rows = torch.arange(len(which), device=device)
        running = torch.ones(len(which), dtype=torch.bool, device=device)
        for step in range(steps):
            token = choose(logits, uniforms[rows, step], self.decoding)
            new[rows, step] = token
            ended = running & torch.isin(token, end_ids)
            count[rows[ended]] = step
            running &= ~ended
            if self.decoding.stop:
                running &= ~self._hit_stop(new[rows, : step + 1], running)
            left = int(running.sum())
            if left == 0 or step == steps - 1:
                break
            if left <= _COMPACT_BELOW * len(rows):
                keep = running.nonzero()[:, 0]
                cache.reorder_cache(keep)
                rows, token, mask, lengths, running = rows[keep], token[keep], mask[keep], lengths[keep], running[keep]
            logits = self._forward(token[:, None], mask[:, : width + step + 1], (lengths + step)[:, None], cache)
        return [row[:n] for row, n in zip(new.tolist(), count.tolist(), strict=True)]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the logits after the last token of each row, (b, V)."""
        where = {"position_ids": positions} if self._takes_positions else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **self._keep_last
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _hit_stop(self, new: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
        """Return which running rows contain a stop string; text is needed for that, as tokens may straddle it.

        Rows are looked at after each token, so a stop string ends in the last one: only as many tokens are decoded as
        it can have, one for each byte at most.
        """
        tail = new[running][:, -(self._longest_stop + 4) :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        hit = torch.zeros_like(running)
        hit[running] = torch.tensor(
            [any(stop in text for stop in self.decoding.stop) for text in texts], device=hit.device
        )
        return hit

    def _decode(self, tokens: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for stop in self.decoding.stop:
            texts = [text.split(stop, 1)[0] for text in texts]
        return [text.strip() for text in texts]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a continuation: those of the model's generation settings, else the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])]
