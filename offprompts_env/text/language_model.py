"""Frozen language models: the protocol, and any Hugging Face causal LM behind a lean batched sampler.

Where the time goes, for the embedded Llama (d = 128, 4 layers, 1.25M parameters; 10 prompt and 13 new tokens) on one
core: 53% in the steps after the prompt, 28% in the prompt, 14% in choosing tokens. That makes 510 to 650 sentences a
second of processor time on a loaded machine, 820 where 8 samples of a prompt are asked and 920 where all prompts are
about one movie, whose tokens are then read once: 18% to 33% of what matrix products alone would take (57 MFLOP a
sentence at 161 GFLOP/s). Products with 256 rows of this size are slower than a large one, and the rest is the model's
own small operations; of 64 to 512 rows at once, 192 to 256 were the fastest. A single sentence at a time is bound by
Python and memory traffic instead: 25 ms each. Writing new keys and values into one allocation, rather than copying all
at each step, made it 12% slower.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, ModelError
from offprompts_env.text.decoding import Decoding, choose
from offprompts_env.text.loading import fingerprint_of, freeze, input_device, load_frozen, pad_id
from offprompts_env.text.tokens import TokenCount
from offprompts_env.types import FloatArray, IntArray

Randomness = np.random.Generator | Sequence[np.random.Generator]

#: Seeds are below this: they fit into 31 bits, which every server takes, and every JSON reader on the way.
SEEDS = 2**31 - 1

# A prefix is read on its own if that saves so many tokens: a pass of its own costs about as much as a hundred tokens of
# the embedded model.
_WORTH_SHARING = 128

# Tokens in which a stop pattern is looked for after each new one.
_PATTERN_TAIL = 64

# Marks such as [INST] or <|user|>.
_BRACKETED = re.compile(r"\[[^\s\[\]]+\]|<[^\s<>]+>")

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


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """Return `prompts` as a list.

    Raises:
        DataError: one is no text, is blank, or holds half of a surrogate pair, which no tokenizer reads.
    """
    checked = list(prompts)
    for index, prompt in enumerate(checked):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"prompt: expected non-blank text, got {prompt!r} at position {index}; fill it")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"prompt: expected Unicode text, got the lone surrogate {prompt[error.start]!r} at character "
                f"{error.start} of the prompt at position {index}; correct it, or put U+FFFD in its place"
            ) from None
    return checked


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
            Where an accelerator runs out of memory nevertheless, it is halved until batches fit, and stays there.

    Attributes:
        tokens: read and written so far; the token that ends a continuation is not counted.

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
        batch_size: int = 256,
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
        self._budget = max_batch_tokens
        self.tokens = TokenCount()
        # A stop string has a token for each byte at most; a pattern is looked for in so many tokens.
        longest = max((len(stop.encode()) for stop in self.decoding.stop), default=0)
        self._tail = max(longest + 4, _PATTERN_TAIL if self.decoding.stop_patterns else 0)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._shares = self._takes_positions and _attends_to_all(model)

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
        batch_size: int = 256,
        max_batch_tokens: int = 1 << 16,
        device_map: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
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
                ``"balanced"``, ``"sequential"``, or modules and their devices; takes the place of `device`.
            revision: commit of a model on the hub; None for the newest.
            model_kwargs: further arguments of ``from_pretrained``, JSON-able: ``{"attn_implementation": "eager"}``;
                beside a `device_map` ``{"max_memory": {"0": "20GiB"}, "offload_folder": "aside"}``; or
                ``{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}``. Quantized products
                may round by what else is in a batch, more than those of the class do.

        Raises:
            ConfigError: `model_kwargs` names what is set here, or what needs a `device_map`.
            MissingDependencyError: `device_map` or a quantized model needs accelerate, which is not installed.
            ModelError: it cannot be loaded or used; the message says what to do.
        """
        from transformers import AutoModelForCausalLM

        model, tokenizer = load_frozen(
            AutoModelForCausalLM,
            source,
            device=device,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            model_kwargs=model_kwargs,
        )
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

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that control: special tokens, and marks in brackets that a chat template sets around a turn.

        Those of one character are left out; they cannot be taken apart.
        """
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        found = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        if self.chat_template:
            found.update(_BRACKETED.findall(" ".join(self._in_chat(["x"]))))
        return tuple(sorted(token for token in found if len(token) > 1))

    @property
    def deterministic(self) -> bool:
        """True under greedy decoding."""
        return self.decoding.greedy

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Return one continuation a prompt, without special tokens and surrounding blanks.

        Raises:
            DataError: a prompt is blank or no Unicode text.
            ModelError: a prompt with its continuation does not fit into the model.
            NumericalError: the model gives NaN.
        """
        prompts = checked_prompts(prompts)
        uniforms = torch.from_numpy(row_uniforms(rng, len(prompts), self.decoding.max_new_tokens))
        if not prompts:
            return []
        # Equal prompts are tokenized once and, inside a batch, read by the model once.
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        which = np.array([unique[prompt] for prompt in prompts])
        encoded = self._encode(list(unique))
        lengths = np.array([len(ids) for ids in encoded])[which]
        sentences = [""] * len(prompts)
        left = self._planned(encoded, which, lengths)
        while left:
            rows = left.pop(0)
            distinct, of_row = _distinct(encoded, which[rows])
            try:
                tokens = self._continue(distinct, of_row, uniforms[torch.from_numpy(rows)])
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                # What did not fit once is not tried again: neither in this call nor in later ones.
                self._budget = len(rows) * int(lengths[rows].max() + self.decoding.max_new_tokens) // 2
                left = self._batches(np.concatenate([rows, *left]), lengths)
                continue
            self.tokens += TokenCount(int(lengths[rows].sum()), sum(map(len, tokens)), len(rows))
            for row, text in zip(rows, self._decode(tokens), strict=True):
                sentences[row] = text
        return sentences

    def _planned(self, encoded: list[list[int]], which: IntArray, lengths: IntArray) -> list[IntArray]:
        """Return the rows of each batch, in the one of two orders in which the model reads fewer tokens of prompts.

        By length rows need the least padding; in the order of their tokens neighbours share the most. Equal prompts are
        neighbours in both.

        Args:
            encoded: token ids of the distinct prompts.
            which: prompt of each row, (n,).
            lengths: tokens of each row's prompt, (n,).
        """
        by_length = self._batches(np.lexsort((which, lengths)), lengths)
        if not self._shares:
            return by_length
        rank = np.empty(len(encoded), dtype=np.int64)
        rank[sorted(range(len(encoded)), key=encoded.__getitem__)] = np.arange(len(encoded))
        by_tokens = self._batches(np.argsort(rank[which], kind="stable"), lengths)

        def reads(batches: list[IntArray]) -> int:
            return sum(_tokens_read(_distinct(encoded, which[rows])[0]) for rows in batches)

        return min(by_length, by_tokens, key=reads)

    def _batches(self, order: IntArray, lengths: IntArray) -> list[IntArray]:
        """Cut the rows in `order` into batches within both bounds."""
        batches, start = [], 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            # Every row is padded to the longest.
            longest = np.maximum.accumulate(lengths[rows]) + self.decoding.max_new_tokens
            tokens = longest * np.arange(1, len(rows) + 1)
            fitting = max(1, int(np.searchsorted(tokens, self._budget, side="right")))
            batches.append(rows[:fitting])
            start += fitting
        return batches

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        prompts = self._in_chat(prompts) if self.chat_template else prompts
        encoded: list[list[int]] = self.tokenizer(prompts, add_special_tokens=not self.chat_template)["input_ids"]
        room = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
        needed = len(encoded[longest]) + self.decoding.max_new_tokens
        if room is not None and needed > room:
            raise ModelError(
                f"prompt: expected at most {room} tokens with the continuation, but {prompts[longest]!r:.200} has "
                f"{len(encoded[longest])} and max_new_tokens={self.decoding.max_new_tokens}; shorten either"
            )
        if min(len(ids) for ids in encoded) == 0:
            raise ModelError("prompt: the tokenizer returned no token for a prompt; check the tokenizer")
        return encoded

    def _in_chat(self, prompts: list[str]) -> list[str]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        framed: list[str] = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return framed

    @torch.inference_mode()
    def _continue(self, prompts: list[list[int]], which: IntArray, uniforms: torch.Tensor) -> list[list[int]]:
        """Return the new tokens of each row, without the end token.

        Tokens with which all prompts begin are read once, then what each has beyond them, then a token at a time:

            shared · [padding] · own · new

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
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        width, shared = int(lengths.max()), _shared_tokens(prompts) if self._shares else 0
        cache: Any = DynamicCache(config=self.model.config)
        # Padding is to the left of what a row has of its own, so that every row's last token is in the last column.
        column = torch.arange(width, device=device)
        mask = ((column < shared) | (column >= (width - lengths)[:, None] + shared)).long()
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        if shared:
            head = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(head, mask[:1, :shared], positions[:1, :shared], cache)
            cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=device))
        own = torch.tensor([[self._pad_id] * (width - len(p)) + p[shared:] for p in prompts], device=device)
        logits = self._forward(own, mask, positions[:, shared:], cache)
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
            if self.decoding.stops:
                stopped = self._hit_stop(new[rows, : step + 1], running)
                count[rows[stopped]] = step + 1
                running &= ~stopped
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
        """Return which running rows are to stop; text is needed for that, as tokens may straddle what stops them.

        Rows are looked at after each token, so what stops one ends in the last one: only as many tokens are decoded as
        it can have. Where that hits, the whole row decides: a pattern may ask for what is before it.
        """
        tokens = new[running]
        cut = self.decoding.cut
        texts = self.tokenizer.batch_decode(tokens[:, -self._tail :], skip_special_tokens=True)
        found = [row for row, text in enumerate(texts) if cut(text) != text]
        if found and tokens.shape[1] > self._tail:
            whole = self.tokenizer.batch_decode(tokens[found], skip_special_tokens=True)
            found = [row for row, text in zip(found, whole, strict=True) if cut(text) != text]
        hit = torch.zeros_like(running)
        hit[running.nonzero()[found, 0]] = True
        return hit

    def _decode(self, tokens: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [self.decoding.cut(text).strip() for text in texts]


def _distinct(encoded: list[list[int]], which: IntArray) -> tuple[list[list[int]], IntArray]:
    """Return the distinct prompts of a batch in which equal ones are neighbours, and which of them each row has."""
    fresh = np.diff(which, prepend=-1) != 0
    return [encoded[prompt] for prompt in which[fresh]], np.cumsum(fresh) - 1


def _shared_tokens(prompts: list[list[int]]) -> int:
    """Return with how many tokens all `prompts` begin, 0 where reading them once is not worth a pass of its own."""
    first, last = min(prompts), max(prompts)
    # A row's last token must be its own, since its logits are needed.
    most = min(len(ids) for ids in prompts) - 1
    same = next((place for place in range(most) if first[place] != last[place]), most)
    return same if same * (len(prompts) - 1) >= _WORTH_SHARING else 0


def _tokens_read(prompts: list[list[int]]) -> int:
    """Return how many tokens a batch of distinct prompts reads, padding included."""
    shared = _shared_tokens(prompts)
    return shared + len(prompts) * (max(len(ids) for ids in prompts) - shared)


def _attends_to_all(model: Any) -> bool:
    """Whether every layer attends to all that was read, wherever it is in the cache.

    A window counts columns: padding between what rows share and what they have of their own would take room in it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache: Any = DynamicCache(config=model.config)
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a continuation: those of the model's generation settings, else the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])]
