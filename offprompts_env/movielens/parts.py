"""The MovieLens world: its contexts, and the configuration that puts its parts together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from offprompts_env.config import Config, check_integer, check_number, identity
from offprompts_env.errors import ConfigError, DimensionError, unknown_name
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.cosine import CosineLikes, EchoedPrompts, PromptCosineReward, TasteSpace
from offprompts_env.movielens.rewards import (
    CollaborativeLikes,
    LikeModel,
    LikeReward,
    SimulatedLikes,
    UnpromptedSentences,
)
from offprompts_env.simulator import ContextSource, OutputModel, RewardKind, RewardModel, Simulator, check_parts
from offprompts_env.text.cache import SampleTable
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import Encoder, PCAEncoder, Pooling, TextEncoder
from offprompts_env.text.frozen import FrozenSentences, FrozenStates, FrozenTable, Unwritten, checksum_of
from offprompts_env.text.language_model import CausalLM, LanguageModel
from offprompts_env.text.loading import DTYPES, check_model_kwargs
from offprompts_env.text.prompted import PromptedLM, PromptFormatter, text_column
from offprompts_env.text.served import ServedLM, Server, is_url
from offprompts_env.text.store import SentenceStore
from offprompts_env.text.vllm import VLLMModel
from offprompts_env.types import Contexts, FloatArray, IntArray, PromptSet, check_prompt_texts

SimulatorName = Literal["distilbert", "collaborative", "sentence-cosine", "prompt-cosine"]

# What a language model other than the bundle's is asked, where the caller has no template of their own.
INSTRUCTION = PromptFormatter(
    'Describe the movie "{query}" in one sentence for somebody who considers watching it, without naming it. '
    'Focus on this keyword: "{prompt}". Description:',
    'Describe the movie "{query}" in one sentence for somebody who considers watching it, without naming it. '
    "Description:",
)


# How a language model in vLLM's offline engine is named.
_VLLM = "vllm:"

# Settings of how sentences are written, and of what they are about and how all is embedded: frozen ones leave no room
# for either.
_WRITING = (
    "language_model", "server", "vllm", "template", "template_without_prompt", "chat_template", "pad_token", "decoding",
    "model_kwargs", "sentence_encoder", "output_dim", "cache_slots", "sentence_store",
)  # fmt: skip
_EMBEDDED = ("keywords", "query_encoder", "prompt_encoder", "query_dim", "prompt_dim")


class MovieLensContexts:
    """Users and movies, drawn uniformly and independently.

    Args:
        user_ids: (n_users,).
        user_vectors: taste, (n_users, d_x).
        item_ids: (n_items,).
        titles: query texts, n_items of them.
        item_vectors: encodings of the titles, (n_items, d_q).
        features: names of the taste's dimensions, for showing a user.

    Raises:
        DimensionError: numbers of rows differ, or there are none.
    """

    def __init__(
        self,
        user_ids: IntArray,
        user_vectors: FloatArray,
        item_ids: IntArray,
        titles: Sequence[str],
        item_vectors: FloatArray,
        features: Sequence[str] = (),
    ) -> None:
        lengths = (len(user_ids), len(user_vectors)), (len(item_ids), len(titles), len(item_vectors))
        if len(set(lengths[0])) > 1 or len(set(lengths[1])) > 1 or 0 in (*lengths[0], *lengths[1]):
            raise DimensionError(
                f"contexts: expected as many user ids as vectors and as many item ids as titles and vectors, at least "
                f"one each, got {lengths[0]} and {lengths[1]}"
            )
        self._users = np.asarray(user_ids, dtype=np.int64), np.asarray(user_vectors, dtype=np.float32)
        self._items = np.asarray(item_ids, dtype=np.int64), np.asarray(item_vectors, dtype=np.float32)
        self._titles = text_column(titles)
        self.features = tuple(features)

    @property
    def context_dim(self) -> int:
        """``d_x``."""
        return int(self._users[1].shape[1])

    @property
    def query_dim(self) -> int:
        """``d_q``."""
        return int(self._items[1].shape[1])

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self._users[0])

    @property
    def n_items(self) -> int:
        """Number of movies."""
        return len(self._items[0])

    def sample(self, n: int, rng: np.random.Generator) -> Contexts:
        """Draw n rounds."""
        return self.rounds(rng.integers(self.n_users, size=n), rng.integers(self.n_items, size=n))

    def rounds(self, users: IntArray, items: IntArray) -> Contexts:
        """Return the rounds of given users and movies, by their positions, (n,) each."""
        return Contexts(
            self._users[1][users], self._items[1][items], self._users[0][users], self._items[0][items],
            self._titles[items],
        )  # fmt: skip

    def describe(self, contexts: Contexts, row: int) -> str:
        """Say in words what a user likes most and least."""
        taste = contexts.context[row]
        if len(self.features) != len(taste):
            return " ".join(f"{value:+.2f}" for value in taste)
        order = np.argsort(-taste, kind="stable")
        liked = ", ".join(f"{self.features[i]} {taste[i]:+.2f}" for i in order[:3])
        disliked = ", ".join(f"{self.features[i]} {taste[i]:+.2f}" for i in order[:-4:-1])
        return f"likes {liked}; dislikes {disliked}"


@dataclass(frozen=True)
class MovieLensConfig(Config):
    """Settings of the MovieLens benchmark; all are JSON-able and are keyword arguments of the environment.

    Attributes:
        bundle: directory of an asset bundle; None for the embedded one.
        n_prompts: the first this many keywords are the prompts; None for all.
        keywords: your own prompts in place of the bundle's keywords.
        language_model: directory or hub id of a causal LM in place of the bundle's; the published choice is
            "mistralai/Mistral-7B-Instruct-v0.2". Or the address of a server that speaks the OpenAI protocol, such as
            "http://127.0.0.1:8000/v1". Or "vllm:" and a directory or hub id, for vLLM's offline engine.
        server: settings of :class:`~offprompts_env.text.served.Server`, at least the model's name there:
            ``{"model": name}``. Without an address in `language_model` it is that in the environment variable
            ``OPENAI_BASE_URL``, which a log does not record, so that the server may move.
        vllm: arguments of ``vllm.LLM`` for such a model; see :class:`~offprompts_env.text.vllm.VLLMModel`.
        template: what it is asked, with ``{query}`` and ``{prompt}``; None for the bundle's, or for another language
            model :data:`INSTRUCTION`.
        template_without_prompt: the same with ``{query}`` only.
        chat_template: whether another language model is asked in the form of its chat template; a server then gets
            the prompt as a chat, and as plain text otherwise.
        pad_token: see :class:`~offprompts_env.text.language_model.CausalLM`.
        decoding: settings of :class:`~offprompts_env.text.decoding.Decoding` on top of the bundle's, or for another
            language model on top of the defaults.
        sentence_encoder: directory or hub id of an encoder whose components, fitted on the bundle's sentences, embed
            outputs; None for the bundle's. The published choice is "distilbert-base-uncased".
        query_encoder: the same for queries, fitted on the titles.
        prompt_encoder: the same for prompts, fitted on the keywords.
        pooling: of these encoders: "mean", "cls" or "last".
        output_dim: ``d_o``; None for as many components as the bundle has.
        query_dim: ``d_q``; the same.
        prompt_dim: ``d_e``; the same.
        simulator: "distilbert"; "collaborative" for collaborative filtering; "sentence-cosine" for the cosine between a
            user's taste and what a sentence says; or "prompt-cosine" for that between the taste and the prompt, which
            is then the output: no language model writes, and every expectation is exact. See
            :mod:`offprompts_env.movielens.cosine`.
        reward_type: "continuous" or "binary".
        reward_scale: factor of a continuous reward; the published one is 10.
        reward_std: standard deviation of the noise of a continuous reward; the published one is 0.05.
        baseline_samples: sentences without a prompt that a continuous reward compares with.
        cache_slots: K of a :class:`~offprompts_env.text.cache.SampleTable` around the output model; None for fresh
            sentences in every round.
        sentences: folder of a :class:`~offprompts_env.text.frozen.FrozenTable`: its sentences are replayed, no
            language model is loaded, and expectations are exact. Queries are those of the table that the bundle knows.
        replacement: whether they are drawn with replacement; see :class:`~offprompts_env.text.frozen.FrozenSentences`.
        sentences_sha256: checksum of the table, filled in from it: a log names the sentences by it, not by a path.
        sentence_store: file of a :class:`~offprompts_env.text.store.SentenceStore` in which sentences are kept, those
            of the sample table and those without a prompt; None for the one that the environment variable
            ``OFFPROMPTS_SENTENCES`` names, and none without it. It changes no round, so a log goes on with another. One
            that cannot be written is read.
        device: "cpu", "cuda" or "auto".
        dtype: what models other than the bundle's compute in.
        batch_size: sentences generated at once.
        max_batch_tokens: see :class:`~offprompts_env.text.language_model.CausalLM`.
        device_map: spreads a `language_model` over devices; see the same class.
        model_kwargs: further arguments of ``from_pretrained`` for a `language_model` in process; see the same class.
    """

    bundle: str | None = None
    n_prompts: int | None = None
    keywords: tuple[str, ...] | None = None
    language_model: str | None = None
    server: Mapping[str, Any] | None = None
    vllm: Mapping[str, Any] | None = None
    template: str | None = None
    template_without_prompt: str | None = None
    chat_template: bool = False
    pad_token: str | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    sentence_encoder: str | None = None
    query_encoder: str | None = None
    prompt_encoder: str | None = None
    pooling: Pooling = "mean"
    output_dim: int | None = None
    query_dim: int | None = None
    prompt_dim: int | None = None
    simulator: SimulatorName = "distilbert"
    reward_type: RewardKind = "continuous"
    reward_scale: float = 10.0
    reward_std: float = 0.05
    baseline_samples: int = 4
    cache_slots: int | None = None
    sentences: str | None = None
    replacement: bool = True
    sentences_sha256: str | None = None
    sentence_store: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int = 256
    max_batch_tokens: int = 1 << 16
    device_map: str | Mapping[str, Any] | None = None
    model_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in (
            "bundle",
            "language_model",
            "sentences",
            "sentence_store",
            "sentence_encoder",
            "query_encoder",
            "prompt_encoder",
        ):
            value = getattr(self, name)
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif not isinstance(value, str | None):
                raise ConfigError(f"{name}: expected a path as text or None, got {value!r}; pass the path")
        if self.keywords is not None:
            if isinstance(self.keywords, str):
                raise ConfigError(f"keywords: expected a list of prompts, got one text {self.keywords!r}; pass a list")
            object.__setattr__(self, "keywords", tuple(self.keywords))
            check_prompt_texts(self.keywords)
            if twice := [text for text, count in Counter(self.keywords).items() if count > 1]:
                raise ConfigError(
                    f"keywords: expected each prompt once, got {twice[0]!r} twice or more; remove the copies"
                )
        for name in ("n_prompts", "output_dim", "query_dim", "prompt_dim", "cache_slots"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("baseline_samples", "batch_size", "max_batch_tokens"):
            check_integer(name, getattr(self, name), 1)
        check_number("reward_std", self.reward_std, 0)
        check_number("reward_scale", self.reward_scale, 0, strict=True)
        for name, valid in (("simulator", SimulatorName), ("reward_type", RewardKind), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(valid):
                raise unknown_name(name, getattr(self, name), get_args(valid))
        Decoding.from_mapping(self.decoding)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        for name in ("template", "template_without_prompt", "pad_token"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: expected text or None, got {getattr(self, name)!r}")
        if self.vllm is not None and not (self.language_model or "").startswith(_VLLM):
            raise ConfigError(
                "vllm: expected language_model='vllm:' and a directory or hub id beside it, got "
                f"{self.language_model!r}; set it, or leave vllm out"
            )
        if self.model_kwargs is not None:
            check_model_kwargs(self.model_kwargs, spread=self.device_map is not None)
            if self.language_model is None or is_url(self.language_model) or self.language_model.startswith(_VLLM):
                raise ConfigError(
                    "model_kwargs: expected a directory or hub id as language_model beside it, got "
                    f"{self.language_model!r}; set it, or leave model_kwargs out"
                )
        self._check_frozen()
        if self.simulator == "prompt-cosine":
            self._check_left_out(("sentences", *_WRITING), "simulator='prompt-cosine', which writes no sentences")
        own = self._server() is not None or self.language_model is not None
        if not own and (self.chat_template or self.pad_token is not None):
            raise ConfigError("chat_template, pad_token: the bundle's model needs neither; set language_model too")

    def _check_frozen(self) -> None:
        if self.sentences is None:
            if not self.replacement or self.sentences_sha256 is not None:
                raise ConfigError(
                    "replacement, sentences_sha256: they say something about frozen sentences; set sentences too"
                )
            return
        self._check_left_out((*_WRITING, *_EMBEDDED), "frozen sentences, which are written already")
        found = checksum_of(self.sentences)
        if self.sentences_sha256 not in (None, found):
            raise ConfigError(
                f"sentences: expected the table with the checksum {self.sentences_sha256}, got one with {found} in "
                f"{self.sentences}; pass the folder of the first one"
            )
        object.__setattr__(self, "sentences_sha256", found)

    def _check_left_out(self, names: Sequence[str], beside: str) -> None:
        default = {f.name: f.default for f in fields(self)} | {"decoding": {}}
        for name in names:
            if getattr(self, name) != default[name]:
                raise ConfigError(
                    f"{name}: expected nothing beside {beside}, got {getattr(self, name)!r}; leave out either"
                )

    def _server(self) -> Server | None:
        """Return the server that is asked, None for a model in process."""
        if self.language_model is not None and not is_url(self.language_model):
            if self.server is not None:
                raise ConfigError(
                    "server: expected none beside a model in process, got one and "
                    f"language_model={self.language_model!r}; leave out either, or pass the server's address"
                )
            return None
        if self.language_model is None and self.server is None:
            return None
        settings = {} if self.server is None else self.server
        return Server.from_mapping(self.language_model, settings, chat=self.chat_template)

    def build(
        self,
        *,
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
    ) -> Simulator:
        """Return the simulator of this world; a part that is given takes the place of the built-in one.

        Where a part is given, one round is played, so that parts that do not fit are found here.

        Raises:
            BundleError: the bundle is missing or damaged.
            ModelError: a model cannot be loaded or used.
            DimensionError: parts disagree about a dimension.
            ConfigError: more prompts than there are keywords, a setting that does not fit, or a part without a method.
        """
        check_parts(contexts=contexts, prompts=prompts, outputs=outputs, rewards=rewards)
        bundle = Bundle.open(self.bundle, device=self.device)
        if self.sentences is not None and (prompts is not None or outputs is not None):
            raise ConfigError("prompts, outputs: frozen sentences bring their own; leave out sentences or those")
        table = None if self.sentences is None else FrozenTable.load(self.sentences)
        if table is not None and self.n_prompts is not None:
            table = table.leading(self.n_prompts)
        source = self._contexts(bundle, table) if contexts is None else contexts
        model = outputs
        if model is None and table is not None:
            model = FrozenSentences(table, replacement=self.replacement)
        if model is None:
            model = self._outputs(bundle, prompts)
        reward = self._rewards(bundle, model, table) if rewards is None else rewards
        if isinstance(reward, LikeReward | PromptCosineReward) and reward.context_dim != source.context_dim:
            raise DimensionError(
                f"rewards: the reward model reads users of dimension {reward.context_dim}, but the context source has "
                f"{source.context_dim}; pass a reward model for these users with rewards="
            )
        simulator = Simulator(source, model, reward, reward_std=self.reward_std)
        if contexts is not None or outputs is not None or rewards is not None:
            rng = np.random.default_rng(0)
            simulator.play(source.sample(1, rng), np.zeros(1, dtype=np.int64), rng, rng)
        return simulator

    def _contexts(self, bundle: Bundle, table: FrozenTable | None) -> MovieLensContexts:
        users, items = bundle.users, bundle.items
        features = bundle.info.user_features
        if table is None:
            vectors = self._encoder(bundle, "query", items.titles).encode(items.titles)
            return MovieLensContexts(users.ids, users.vectors, items.ids, items.titles, vectors, features)
        place = {query: row for row, query in enumerate(table.queries)}
        known = [row for row, title in enumerate(items.titles) if title in place]
        titles = [items.titles[row] for row in known]
        vectors = table.query_vectors[[place[title] for title in titles]]
        return MovieLensContexts(users.ids, users.vectors, items.ids[known], titles, vectors, features)

    def _outputs(self, bundle: Bundle, prompts: PromptSet | None) -> OutputModel:
        if self.simulator == "prompt-cosine":
            return EchoedPrompts(self._prompts(bundle) if prompts is None else prompts)
        sentences = [text for texts in bundle.no_prompt_sentences.values() for text in texts]
        encoder = self._encoder(bundle, "sentence", sentences)
        catalogue = self._prompts(bundle) if prompts is None else prompts
        model = PromptedLM(self._language_model(bundle), encoder, catalogue, self._formatter(bundle))
        if self.cache_slots is None:
            return model
        return SampleTable(model, slots=self.cache_slots, store=self._store(model.language_model))

    def _store(self, language_model: LanguageModel) -> SentenceStore | None:
        """Return the sentences on disk, told what `language_model` is."""
        path = self.sentence_store or os.environ.get("OFFPROMPTS_SENTENCES")
        if path is None:
            return None
        store = SentenceStore.shared(path)
        if store.read_only:
            return store
        server = {} if self.server is None else identity(self.server)
        named = server.get("model") or self.language_model or "the bundle's model"
        store.describe(language_model.fingerprint, {"model": named, "decoding": dict(self.decoding)})
        return store

    def _prompts(self, bundle: Bundle) -> PromptSet:
        own = self.keywords
        catalogue = tuple(entry.text for entry in bundle.keywords)
        texts = catalogue if own is None else own
        if self.n_prompts is not None and self.n_prompts > len(texts):
            raise ConfigError(
                f"n_prompts: expected at most {len(texts)}, the number of keywords, got {self.n_prompts}; "
                "ask for fewer or pass keywords="
            )
        texts = texts[: self.n_prompts]
        encoder = self._encoder(bundle, "prompt", tuple(dict.fromkeys((*catalogue, *texts))))
        return PromptSet(encoder.encode(texts), texts)

    def _language_model(self, bundle: Bundle) -> LanguageModel:
        server = self._server()
        if server is not None:
            return ServedLM(server, Decoding.from_mapping(self.decoding))
        if self.language_model is not None and self.language_model.startswith(_VLLM):
            return VLLMModel(
                self.language_model.removeprefix(_VLLM),
                Decoding.from_mapping(self.decoding),
                chat_template=self.chat_template,
                engine=self.vllm,
            )
        if self.language_model is not None:
            return CausalLM.from_pretrained(
                self.language_model,
                decoding=Decoding.from_mapping(self.decoding),
                device=self.device,
                dtype=self.dtype,
                chat_template=self.chat_template,
                pad_token=self.pad_token,
                batch_size=self.batch_size,
                max_batch_tokens=self.max_batch_tokens,
                device_map=self.device_map,
                model_kwargs=self.model_kwargs,
            )
        decoding = replace(bundle.decoding, **self.decoding)
        if bundle.server is not None:
            return ServedLM(bundle.server, decoding)
        shipped = bundle.language_model
        return CausalLM(
            shipped.model,
            shipped.tokenizer,
            decoding=decoding,
            chat_template=shipped.chat_template,
            pad_token=bundle.info.language_model.get("pad_token"),
            batch_size=self.batch_size,
            max_batch_tokens=self.max_batch_tokens,
        )

    def _formatter(self, bundle: Bundle) -> PromptFormatter:
        own = self.language_model is not None or self.server is not None
        usual = INSTRUCTION if own and bundle.info.domain == "movies" else bundle.formatter
        return PromptFormatter(
            usual.template if self.template is None else self.template,
            usual.template_without_prompt if self.template_without_prompt is None else self.template_without_prompt,
        )

    def _encoder(self, bundle: Bundle, name: str, texts: Sequence[str]) -> PCAEncoder:
        """Return the encoder called `name`: the bundle's, or one of the configured model fitted on `texts`."""
        source = getattr(self, f"{name}_encoder")
        setting = f"{'output' if name == 'sentence' else name}_dim"
        dim = getattr(self, setting)
        shipped = bundle.encoder(name)
        if source is None:
            if dim is not None and dim > shipped.dim:
                raise ConfigError(
                    f"{setting}: expected at most {shipped.dim}, what the bundle's encoder has, got {dim}; ask for "
                    f"fewer, or set {name}_encoder to one of your own"
                )
            return shipped if dim is None else shipped.leading(dim)
        encoder = TextEncoder.from_pretrained(
            source, pooling=self.pooling, device=self.device, dtype=self.dtype, pad_token=self.pad_token
        )
        return PCAEncoder.fit(encoder, texts, shipped.dim if dim is None else dim)

    def _rewards(self, bundle: Bundle, outputs: OutputModel, table: FrozenTable | None) -> RewardModel:
        if self.simulator == "prompt-cosine":
            return PromptCosineReward(
                TasteSpace.of_bundle(bundle),
                bundle.users.vectors.shape[1],
                bundle.reward_encoder,
                carrier=bundle.encoder("prompt").text_format,
                catalogue=[entry.text for entry in bundle.keywords],
                kind=self.reward_type,
                scale=self.reward_scale,
            )
        if table is not None:
            likes = self._likes(bundle, FrozenStates(bundle.reward_encoder, table))
            model = Unwritten(table.checksum)
            frozen = UnpromptedSentences(table.no_prompt, model, INSTRUCTION, self.baseline_samples)
            return LikeReward(likes, frozen, kind=self.reward_type, scale=self.reward_scale)
        writer = outputs.outputs if isinstance(outputs, SampleTable) else outputs
        language_model = getattr(writer, "language_model", None) or self._language_model(bundle)
        formatter = getattr(writer, "formatter", None) or self._formatter(bundle)
        # The bundle's sentences are the reference only where the same model is asked the same way.
        shipped = language_model.fingerprint == bundle.writer.fingerprint and formatter == bundle.formatter
        unprompted = UnpromptedSentences(
            bundle.no_prompt_sentences if shipped else {},
            language_model,
            formatter,
            self.baseline_samples,
            store=None if shipped else self._store(language_model),
        )
        return LikeReward(
            self._likes(bundle, bundle.reward_encoder), unprompted, kind=self.reward_type, scale=self.reward_scale
        )

    def _likes(self, bundle: Bundle, encoder: Encoder) -> LikeModel:
        if self.simulator == "collaborative":
            return CollaborativeLikes(bundle.collaborative, encoder)
        if self.simulator == "sentence-cosine":
            return CosineLikes(TasteSpace.of_bundle(bundle), bundle.users.vectors.shape[1], encoder)
        return SimulatedLikes(bundle.simulator, encoder)
