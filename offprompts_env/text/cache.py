"""A bounded table of sentences that makes repeated questions to a language model cheap and keeps them random."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.text.prompted import TextOutputModel, text_column
from offprompts_env.text.store import SentenceStore
from offprompts_env.types import Contexts, FloatArray, IntArray, Outputs, PromptSet

_Key = tuple[str, int]


def table_series(seed: int) -> str:
    """Return the name of the random numbers of the table `seed` in a store."""
    return f"table {seed}"


def sample_generator(fingerprint: str, seed: int, sample: int, request: str) -> np.random.Generator:
    """Return the generator that sentence `sample` of `request` is written with.

    Args:
        fingerprint: of the language model.
        seed: of the table.
        sample: k.
        request: full request.
    """
    name = "\0".join((fingerprint, str(seed), str(sample), request))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()))


def stored_embeddings(store: SentenceStore, outputs: TextOutputModel, sentences: Sequence[str]) -> FloatArray:
    """Return the embeddings of `sentences`, (n, d_o): those of the store, and the others computed and put there.

    An output model that does not say which encoder it has (``encoder_fingerprint``) embeds them all itself.

    Raises:
        DimensionError: the store has embeddings of another dimension under the name of this encoder.
        StorageError: the store cannot be read or written.
    """
    name = getattr(outputs, "encoder_fingerprint", None)
    if name is None:
        return outputs.embed(sentences)
    known, held = store.embeddings(name, sentences)
    if held.any() and known.shape[1] != outputs.output_dim:
        raise DimensionError(
            f"embeddings: expected dimension {outputs.output_dim}, that of encoder {name!r}, found {known.shape[1]} in "
            f"{store.path}; give each encoder its own fingerprint, or choose another store"
        )
    if held.all() and len(sentences) > 0:
        return known
    new = [sentence for sentence, there in zip(sentences, held, strict=True) if not there]
    unique = list(dict.fromkeys(new))
    computed = outputs.embed(unique)
    if not store.read_only:
        store.put_embeddings(name, unique, computed)
    row_of = {sentence: row for row, sentence in enumerate(unique)}
    embeddings = np.empty((len(sentences), outputs.output_dim), dtype=np.float32)
    if held.any():
        embeddings[held] = known[held]
    embeddings[~held] = computed[[row_of[sentence] for sentence in new]]
    return embeddings


class SampleTable:
    """K frozen samples of every request, each written when first drawn.

    For a request (template, query and prompt, under one model and its decoding) the table stands for K sentences
    ``s_1 … s_K``, drawn independently from the language model; a call draws one of them uniformly with the caller's
    generator. Sentence k is written with randomness derived from (model fingerprint, seed, request, k), so that its
    content depends neither on when it is first asked for nor on what was dropped in between: a dropped sentence comes
    back as it was (up to the rounding caveat of :class:`~offprompts_env.text.language_model.CausalLM`).

    What distribution that is: over tables (seeds), every draw has exactly the model's distribution, but two draws of
    one request are the same sentence with probability 1/K, and are independent otherwise. Given the table, a request's
    answers follow the empirical distribution of its K sentences: an expectation over the model becomes a mean of K
    samples, with variance ``Var / K`` around the truth that no number of calls removes. As K → ∞ the model itself
    comes back; where the model is deterministic, K is 1.

    With a `store`, sentences that are not in memory are looked up there before the model is asked, and what it writes
    is put there, with embeddings. As a sentence is a function of its name, the store changes nothing but who writes it.

    Args:
        outputs: what writes and embeds sentences.
        slots: K.
        capacity: sentences kept in memory; the oldest make room for new ones.
        seed: names the table.
        store: sentences on disk, shared with other processes.

    Raises:
        ConfigError: `outputs` is no text output model, a number is out of range, or `store` may drop sentences that
            `outputs` could not write again.
    """

    def __init__(
        self,
        outputs: TextOutputModel,
        *,
        slots: int = 16,
        capacity: int = 1 << 18,
        seed: int = 0,
        store: SentenceStore | None = None,
    ) -> None:
        if not isinstance(outputs, TextOutputModel):
            raise ConfigError(
                f"outputs: a sample table needs requests(), write(), embed() and a fingerprint, but "
                f"{type(outputs).__name__} lacks some; wrap a PromptedLM or an object like it"
            )
        for name, value in (("slots", slots), ("capacity", capacity)):
            check_integer(name, value, 1)
        check_integer("seed", seed, 0)
        if store is not None and store.max_sentences is not None and not getattr(outputs, "reproducible", True):
            # Two draws of one of K sentences are equal with probability 1/K, unless it is written anew in between.
            raise ConfigError(
                f"store: expected one without max_sentences, got {store.max_sentences:,}: what it drops, a model that "
                "is not reproducible would replace by something else; leave out max_sentences"
            )
        self.outputs, self.capacity, self.seed, self.store = outputs, capacity, seed, store
        self.slots = 1 if outputs.deterministic else slots
        self.requested = 0
        self.generated = 0
        self._place: dict[_Key, int] = {}
        self._keys: list[_Key] = []
        self._sentences: list[str] = []
        self._embeddings = np.empty((0, outputs.output_dim), dtype=np.float32)
        self._next = 0

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return self.outputs.output_dim

    @property
    def prompts(self) -> PromptSet:
        """The catalogue that actions index."""
        return self.outputs.prompts

    @property
    def reproducible(self) -> bool:
        """As what writes the sentences."""
        return bool(getattr(self.outputs, "reproducible", True))

    @property
    def served_by(self) -> Mapping[str, Any]:
        """As what writes the sentences."""
        found: Mapping[str, Any] = getattr(self.outputs, "served_by", {})
        return found

    def __len__(self) -> int:
        """Number of sentences kept."""
        return len(self._place)

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one of the K sentences of each round's request.

        Row i uses the i-th uniform of `rng`, whatever the actions and whatever the table already holds.
        """
        requests = self.outputs.requests(contexts, actions)
        slots = (rng.random(len(requests)) * self.slots).astype(np.int64).tolist()
        keys = list(zip(requests, slots, strict=True))
        self.requested += len(keys)
        held = {key: self._place[key] for key in dict.fromkeys(keys) if key in self._place}
        missing = [key for key in dict.fromkeys(keys) if key not in held]
        sentences = [self._sentences[place] for place in held.values()]
        embeddings = self._embeddings[list(held.values())]
        if missing:
            # Storing what is new may drop what this very batch holds, so both are gathered first.
            new_sentences, new_embeddings = self._write(missing)
            self._store(missing, new_sentences, new_embeddings)
            sentences += new_sentences
            embeddings = np.concatenate([embeddings, new_embeddings])
        row_of = {key: row for row, key in enumerate((*held, *missing))}
        rows = [row_of[key] for key in keys]
        return Outputs(embeddings[rows], text_column([sentences[row] for row in rows]))

    def _write(self, keys: list[_Key]) -> tuple[list[str], FloatArray]:
        """Return sentences and embeddings of `keys`: those of the store, and what is missing there from the model."""
        if self.store is None:
            sentences = self._ask(keys)
            return sentences, self.outputs.embed(sentences)
        sentences = self.store.complete(
            self.outputs.fingerprint,
            table_series(self.seed),
            [request for request, _ in keys],
            [slot for _, slot in keys],
            lambda rows: self._ask([keys[row] for row in rows]),
        )
        return sentences, stored_embeddings(self.store, self.outputs, sentences)

    def _ask(self, keys: list[_Key]) -> list[str]:
        """Have the model write the sentences of `keys`."""
        name = self.outputs.fingerprint
        generators = [sample_generator(name, self.seed, slot, request) for request, slot in keys]
        sentences = self.outputs.write([request for request, _ in keys], generators)
        self.generated += len(keys)
        return sentences

    def _store(self, keys: list[_Key], sentences: list[str], embeddings: FloatArray) -> None:
        rows: Iterable[int] = range(max(0, len(keys) - self.capacity), len(keys))
        for row in rows:
            if len(self._keys) < self.capacity:
                place = len(self._keys)
                self._keys.append(keys[row])
                self._sentences.append(sentences[row])
                self._grow(place)
            else:
                place = self._next
                self._next = (place + 1) % self.capacity
                del self._place[self._keys[place]]
                self._keys[place], self._sentences[place] = keys[row], sentences[row]
            self._place[keys[row]] = place
            self._embeddings[place] = embeddings[row]

    def _grow(self, place: int) -> None:
        if place >= len(self._embeddings):
            size = min(self.capacity, max(1024, 2 * len(self._embeddings)))
            larger = np.empty((size, self.output_dim), dtype=np.float32)
            larger[: len(self._embeddings)] = self._embeddings
            self._embeddings = larger
