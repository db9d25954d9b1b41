"""`offprompts build-domain`: from a user's own items, reactions and prompts to an asset bundle.

The stages, each kept in the work folder under a key of its settings and inputs:

==========  ================================================================================================
read        items, reactions and prompts                                    (`tables`; seconds, not kept)
sentences   what the language model says of every item, without a prompt and under random ones
held-out    simulators on random splits, with and without the user, as for MovieLens   (`pipeline.reward`)
simulator   the simulator that is shipped, and its bilinear sibling
encoders    principal components for sentences, queries and prompts
prompts     what prompts are worth                                          (`pipeline.evaluation`)
bundle      all of it in one folder, with a card and checksums
==========  ================================================================================================

User vectors are ridge regressions of reactions on features of items: those of the file, or, without any, the leading
directions of a truncated SVD of the words in texts and sentences (latent semantic analysis). Features never come from
reactions, so held-out figures are honest.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from offprompts_env.domain.card import domain_card
from offprompts_env.domain.tables import DomainTables, ReactionRule, read_domain
from offprompts_env.errors import ConfigError
from offprompts_env.folders import check_replaceable, replaced
from offprompts_env.movielens.build import NO_PROMPT_SAMPLES, play_one_round, shipped_user_vectors, write_csv
from offprompts_env.movielens.bundle import MANIFEST, BundleInfo, write_manifest
from offprompts_env.movielens.collaborative import CollaborativeConfig, fit_collaborative
from offprompts_env.movielens.pipeline import evaluation, reward
from offprompts_env.movielens.pipeline.data import Benchmark, Reactions, TasteRatings
from offprompts_env.movielens.pipeline.existing import ExistingModel, save_copy, written
from offprompts_env.movielens.pipeline.language import make_tokenizer
from offprompts_env.movielens.pipeline.stages import Stages, digest, locked, one_thread
from offprompts_env.movielens.simulator import HeadConfig, LikeSimulator
from offprompts_env.rng import integer_seed, stream
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import PCAEncoder, TextEncoder
from offprompts_env.text.language_model import CausalLM, LanguageModel
from offprompts_env.text.loading import check_model_kwargs, quiet_loading
from offprompts_env.text.prompted import PromptFormatter
from offprompts_env.text.served import ServedLM, Server, is_url
from offprompts_env.text.store import SentenceStore

_CHUNK = 64  # items described between two signs of progress
_STEERED = 4  # sentences of each item under random prompts
_FEW = 100  # held-out reactions below which an AUC is little more than a guess


@dataclass(frozen=True)
class DomainConfig:
    """Settings of a domain.

    ``lm``: directory or hub id of a causal LM, or the address of a server that speaks the OpenAI protocol; then
    ``server`` has settings of :class:`~offprompts_env.text.served.Server`, at least ``{"model": name}``. ``dtype``,
    ``chat_template``, ``pad_token``, ``device_map`` and ``model_kwargs`` as of
    :class:`~offprompts_env.text.language_model.CausalLM`. ``copy_lm``: whether the bundle holds a copy of a model in
    process, or only names it, which is right for many gigabytes. ``template``: what it is asked, with ``{query}`` (the
    item's text) and ``{prompt}``; ``template_without_prompt`` the same with ``{query}`` only: the reference of the
    reward.
    ``encoder``: directory or hub id of an encoder that the simulator starts from; None trains a small one on the
    sentences. ``sentences_per_item`` are sampled for training. ``dim_*``: principal components kept, at most.
    ``text_features``: directions of the SVD where the file has no features. ``splits``: held-out splits.
    ``figure_prompts``: prompts whose worth is measured.
    """

    lm: str
    template: str
    template_without_prompt: str
    server: Mapping[str, Any] | None = None
    encoder: str | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    chat_template: bool = False
    pad_token: str | None = None
    device_map: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    copy_lm: bool = True
    reactions: ReactionRule = field(default_factory=ReactionRule)
    simulator: reward.SimulatorConfig = field(
        default_factory=lambda: reward.SimulatorConfig(encoder_width=64, encoder_layers=1, items_per_batch=8)
    )
    collaborative: CollaborativeConfig = field(default_factory=CollaborativeConfig)
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=32, temperature=0.8, top_p=0.95))
    vocabulary: int = 2000
    sentences_per_item: int = 8
    dim_sentence: int = 16
    dim_query: int = 16
    dim_prompt: int = 16
    text_features: int = 8
    splits: int = 3
    figure_prompts: int = 20

    def __post_init__(self) -> None:
        PromptFormatter(self.template, self.template_without_prompt)
        if self.model_kwargs is not None:
            check_model_kwargs(self.model_kwargs, spread=self.device_map is not None)
            if is_url(self.lm):
                raise ConfigError(
                    f"model_kwargs: expected a model in process beside it, got the server {self.lm!r}; leave out either"
                )
        least = min(self.dim_sentence, self.dim_query, self.dim_prompt, self.text_features, self.splits)
        if least < 1 or self.sentences_per_item < NO_PROMPT_SAMPLES or self.figure_prompts < 2:
            raise ConfigError(
                f"expected dimensions and splits >= 1, sentences_per_item >= {NO_PROMPT_SAMPLES} and figure_prompts "
                f">= 2, got {least}, {self.sentences_per_item} and {self.figure_prompts}"
            )

    def asked_server(self) -> Server | None:
        """Return the server that is asked, None for a language model in process.

        Raises:
            ConfigError: its settings lack the model's name, or do not fit; or there are some beside a model in process.
        """
        if is_url(self.lm):
            return Server.from_mapping(self.lm, self.server or {}, chat=self.chat_template)
        if self.server is not None:
            raise ConfigError(
                f"server: expected none beside a model in process, got one and lm={self.lm!r}; leave out either, or "
                "pass the server's address as lm"
            )
        return None


def build_domain(
    items: str | Path,
    interactions: str | Path,
    keywords: str | Path,
    out: str | Path,
    config: DomainConfig,
    work: str | Path | None = None,
    quiet: bool | None = None,
) -> Path:
    """Build the bundle of a domain, and return its path `out`.

    Args:
        items: CSV with ``item_id``, ``title`` (or ``text``), and perhaps ``features`` separated by ``|``.
        interactions: CSV with ``user_id``, ``item_id``, and ``rating`` or ``liked`` or ``clicked`` (0/1).
        keywords: the prompts: a text file, one a line, or a CSV with the column ``keyword``.
        out: folder of the bundle; one that is there is replaced when the new one is complete.
        config: settings.
        work: keeps finished stages; by default ``<out>.work``.
        quiet: hides progress; by default where standard error is no terminal.

    Raises:
        DataError: a file does not say what is needed.
        ConfigError: settings that do not fit.
        ModelError: a model that cannot be loaded or used.
        StorageError: `out` is something else than a bundle, or another build is writing it.
    """
    out = Path(out)
    check_replaceable(out, MANIFEST, "a bundle")
    config.asked_server()
    tables = read_domain(items, interactions, keywords, config.reactions)
    folder = Path(work) if work is not None else out.with_name(out.name + ".work")
    folder.mkdir(parents=True, exist_ok=True)
    silent = not sys.stderr.isatty() if quiet is None else quiet
    with locked(folder), one_thread(), quiet_loading():
        return _DomainBuild(tables, config, Stages(folder, silent, "build-domain")).bundle(out)


class _DomainBuild:
    """One build: each method is a stage, computed once and kept in the work folder."""

    def __init__(self, tables: DomainTables, config: DomainConfig, stages: Stages) -> None:
        self.tables, self.config, self.stages = tables, config, stages
        self.formatter = PromptFormatter(config.template, config.template_without_prompt)
        stages.keys["read"] = digest(tables)

    @cached_property
    def existing(self) -> ExistingModel:
        """Where the language model is, and how it is used."""
        return ExistingModel.of(self.config, self.config.lm)

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model."""
        server = self.config.asked_server()
        return self.existing.load() if server is None else ServedLM(server, self.config.decoding)

    @cached_property
    def sentences(self) -> tuple[list[list[str]], list[str]]:
        """What is said of each item without a prompt, and what is said under random prompts."""
        config, texts, prompts = self.config, self.tables.texts, self.tables.prompts
        self.stages.keys["lm"] = self.lm.fingerprint

        def make(folder: Path) -> None:
            rng, each = stream(config.seed, "sentences"), config.sentences_per_item
            told_of, steered = [], []
            store = SentenceStore(self.stages.work / "sentences.db")
            with self.stages.progress("sentences", -(-len(texts) // _CHUNK)) as step, store:
                for start in range(0, len(texts), _CHUNK):
                    chunk = texts[start : start + _CHUNK]
                    asked = [self.formatter.ask(text) for text in chunk for _ in range(each)]
                    said = written(self.lm, store, asked, list(range(each)) * len(chunk), config.seed)
                    told_of += [said[i : i + each] for i in range(0, len(said), each)]
                    drawn = rng.integers(len(prompts), size=(len(chunk), _STEERED))
                    under = [
                        self.formatter.ask(text, prompts[prompt])
                        for text, row in zip(chunk, drawn, strict=True)
                        for prompt in row
                    ]
                    steered += written(self.lm, store, under, list(range(_STEERED)) * len(chunk), config.seed)
                    step(None)
            (folder / "sentences.json").write_text(json.dumps([told_of, steered], ensure_ascii=False), encoding="utf-8")

        settings = (config.sentences_per_item, config.decoding, self.formatter, config.seed)
        path = self.stages.folder("sentences", ("read", "lm"), settings, make)
        told_of, steered = json.loads((path / "sentences.json").read_text(encoding="utf-8"))
        return told_of, steered

    @cached_property
    def features(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Centred features of the items, (n_items, d_x), and their names."""
        counts = Counter(name for names in self.tables.features for name in names)
        named = tuple(sorted(name for name, count in counts.items() if count < len(self.tables.texts)))
        if named:
            told = [set(names) for names in self.tables.features]
            found = np.array([[name in names for name in named] for names in told], dtype=np.float64)
        else:
            joined = [" ".join((text, *said)) for text, said in zip(self.tables.texts, self.sentences[0], strict=True)]
            found = latent_words(joined, self.config.text_features)
            named = tuple(f"text {number + 1}" for number in range(found.shape[1]))
        return found - found.mean(axis=0), named

    @cached_property
    def benchmark(self) -> Benchmark:
        """The reactions in the form of the pipeline."""
        tables = self.tables
        reactions = tables.verdict != 0
        position = np.where(reactions, np.cumsum(reactions) - 1, -1)
        return Benchmark(
            user_ids=np.arange(len(tables.user_ids)),
            item_ids=np.arange(len(tables.item_ids)),
            movies=(),
            years=np.zeros(len(tables.item_ids), dtype=np.int64),
            reactions=Reactions(tables.users[reactions], tables.items[reactions], tables.verdict[reactions] > 0),
            features=self.features[0],
            taste=TasteRatings(tables.users, tables.items, tables.rating, position),
        )

    def untrained(self) -> LikeSimulator:
        """Return a simulator with an untrained head, on the encoder of the settings or a small one."""
        config, d_x = self.config, self.features[0].shape[1]
        if config.encoder is not None:
            encoder = TextEncoder.from_pretrained(
                config.encoder, pooling=config.simulator.pooling, device=config.device, dtype="float32"
            )
            head = HeadConfig(d_x, encoder.dim, pooling=config.simulator.pooling)
            model = encoder.model.requires_grad_(True)
            return LikeSimulator(model, encoder.tokenizer, head).to(model.device)
        told, steered = self.sentences
        texts = [text for samples in told for text in samples] + steered + list(self.tables.prompts)
        tokenizer = make_tokenizer(texts, config.vocabulary, pieces=())
        return reward.make_small_simulator(config.simulator, d_x, integer_seed(config.seed, "encoder"), tokenizer)

    def _trained(self, folder: Path) -> LikeSimulator:
        """Load a simulator that was trained, where it is to compute."""
        return LikeSimulator.load(folder, device="cpu" if self.config.encoder is None else self.config.device)

    def held_out(self) -> list[dict[str, Any]]:
        """Train and test on random splits, with and without the user; one row per split."""
        config, told = self.config, self.sentences[0]

        def make(folder: Path) -> None:
            rows = []
            for number in range(config.splits):
                seed = integer_seed(config.seed, "split", number)
                split = reward.split_reactions(len(self.benchmark.reactions), config.simulator, 0.2, seed)
                row: dict[str, Any] = {"split": number, "reactions": len(split.test)}
                for name, with_users in (("user", True), ("no_user", False)):
                    simulator = self.untrained()
                    with self.stages.progress(f"split {number} {name}", config.simulator.epochs) as step:
                        reward.train_simulator(
                            simulator, self.benchmark, told, split, config.simulator, seed,
                            with_users=with_users, progress=step,
                        )  # fmt: skip
                    vectors = reward.held_out_vectors(self.benchmark, split, with_users=with_users)
                    figures = reward.held_out(
                        simulator, self.benchmark, told, split.test, vectors=vectors, n_sentences=4
                    )
                    row[name] = asdict(figures)
                rows.append(row)
            (folder / "held_out.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

        settings = (config.simulator, config.encoder, config.vocabulary, config.text_features, config.splits)
        path = self.stages.folder("held-out", ("sentences",), (*settings, config.seed), make)
        rows: list[dict[str, Any]] = json.loads((path / "held_out.json").read_text(encoding="utf-8"))
        return rows

    def simulator(self) -> Path:
        """Train the simulator that is shipped on all reactions but a validation split, and its bilinear sibling."""
        config, told = self.config, self.sentences[0]

        def make(folder: Path) -> None:
            simulator = self.untrained()
            seed = integer_seed(config.seed, "simulator")
            split = reward.split_reactions(len(self.benchmark.reactions), config.simulator, 0.0, seed)
            with self.stages.progress("simulator", config.simulator.epochs) as step:
                reward.train_simulator(simulator, self.benchmark, told, split, config.simulator, seed, progress=step)
            simulator.save(folder / "simulator")
            states = self._trained(folder / "simulator").encode([text for said in told for text in said])
            train = self.benchmark.reactions.take(split.train)
            fit_collaborative(
                reward.crossfitted_vectors(self.benchmark, split, config.simulator, stream(seed, "folds")),
                self.benchmark.item_ids,
                train.items,
                states.reshape(len(told), -1, states.shape[1]),
                train.liked,
                config.collaborative,
                config.seed,
            ).save(folder / "collaborative.safetensors")

        settings = (config.simulator, config.encoder, config.vocabulary, config.text_features, config.collaborative)
        return self.stages.folder("simulator", ("sentences",), (*settings, config.seed), make)

    def encoders(self, simulator_path: Path) -> Path:
        """Fit the principal components."""
        config, tables = self.config, self.tables
        told, steered = self.sentences
        said = [text for samples in told for text in samples] + steered

        def make(folder: Path) -> None:
            simulator = self._trained(simulator_path / "simulator")
            head = simulator.config
            spoken = TextEncoder(
                simulator.encoder, simulator.tokenizer, pooling=head.pooling, max_tokens=head.max_tokens
            )
            # Queries as the language model sees them; of a server's only the sentences are known.
            query, query_model, query_format = spoken, "simulator", "{text}"
            if isinstance(self.lm, CausalLM):
                query = TextEncoder(
                    self.lm.model.base_model, self.lm.tokenizer, pooling="last", pad_token=config.pad_token
                )
                query_model, query_format = "lm", self.formatter.template_without_prompt.replace("{query}", "{text}")
            for name, encoder, texts, dim, text_format, model in (
                ("sentence", spoken, said, config.dim_sentence, "{text}", "simulator"),
                ("query", query, tables.texts, config.dim_query, query_format, query_model),
                ("prompt", spoken, tables.prompts, config.dim_prompt, "{text}", "simulator"),
            ):
                dim = min(dim, len(texts), encoder.dim)
                fitted = PCAEncoder.fit(encoder, texts, dim, text_format=text_format)
                fitted.save(folder, name, model=f"../{model}")

        dims = (config.dim_sentence, config.dim_query, config.dim_prompt)
        return self.stages.folder("encoders", ("simulator", "sentences"), (dims, config.seed), make)

    def prompt_figures(self, simulator_path: Path) -> dict[str, Any]:
        """Measure what prompts are worth."""
        config, tables = self.config, self.tables

        def make(folder: Path) -> None:
            figures = evaluation.measure_prompts(
                self.lm,
                self.formatter,
                self._trained(simulator_path / "simulator"),
                shipped_user_vectors(self.benchmark),
                tables.texts,
                [samples[:NO_PROMPT_SAMPLES] for samples in self.sentences[0]],
                tables.prompts[: config.figure_prompts],
                stream(config.seed, "prompts"),
                n_users=100,
                n_movies=8,
                n_sentences=4,
            )
            (folder / "prompts.json").write_text(json.dumps(asdict(figures)), encoding="utf-8")

        path = self.stages.folder("prompts", ("simulator", "sentences"), (config.figure_prompts, config.seed), make)
        found: dict[str, Any] = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
        return found

    def bundle(self, out: Path) -> Path:
        """Put the bundle together beside `out`, then swap it in."""
        tables, held_out = self.tables, self.held_out()
        if (tested := held_out[0]["reactions"]) < _FEW:
            warnings.warn(
                f"each held-out figure rests on {tested} reactions only, fewer than {_FEW}: take the AUC of "
                f"{mean_auc(held_out):.2f} as a hint",
                stacklevel=3,
            )
        simulator = self.simulator()
        measured = {
            "held_out": held_out,
            "prompts": self.prompt_figures(simulator),
            "counts": {
                "users": len(tables.user_ids),
                "users_left_out": tables.dropped_users,
                "items": len(tables.item_ids),
                "interactions": len(tables.rating),
                "reactions": len(self.benchmark.reactions),
                "likes": int(self.benchmark.reactions.liked.sum()),
                "prompts": len(tables.prompts),
                "features": len(self.features[1]),
            },
            "thresholds": {"like": tables.like, "dislike": tables.dislike},
        }
        with replaced(out) as made:
            self._write(made, simulator, self.encoders(simulator), measured)
            play_one_round(made, self.config.device)
        self.stages.say(f"{out} is ready, held-out AUC {mean_auc(held_out):.3f}")
        return out

    def _described(self) -> dict[str, Any]:
        """Return what the bundle says of what writes the sentences."""
        config = self.config
        if config.server is None:
            return self.existing.described()
        return {"server": {"url": config.lm, **config.server}, "chat_template": config.chat_template}

    def _write(self, folder: Path, simulator: Path, encoders: Path, measured: dict[str, Any]) -> None:
        from safetensors.numpy import save_file

        tables, config = self.tables, self.config
        vectors = shipped_user_vectors(self.benchmark).astype(np.float32)
        save_file({"ids": self.benchmark.user_ids.astype(np.int64), "vectors": vectors}, folder / "users.safetensors")
        ids = {"users": tables.user_ids, "items": tables.item_ids}
        (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")
        rows = zip(range(len(tables.texts)), tables.texts, map("|".join, tables.features), strict=True)
        write_csv(folder / "items.csv", ("item_id", "title", "features"), rows)
        write_csv(folder / "keywords.csv", ("keyword", "kind", "group"), ((text, "", "") for text in tables.prompts))
        write_csv(
            folder / "no_prompt.csv",
            ("item_id", "sample", "sentence"),
            (
                (item, sample, text)
                for item, samples in enumerate(self.sentences[0])
                for sample, text in enumerate(samples[:NO_PROMPT_SAMPLES])
            ),
        )
        if config.copy_lm and isinstance(self.lm, CausalLM):
            save_copy(self.lm, folder / "lm")
        shutil.copytree(simulator / "simulator", folder / "simulator")
        shutil.copy(simulator / "collaborative.safetensors", folder)
        shutil.copytree(encoders, folder / "encoders")
        (folder / "metrics.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        settings = json.loads(json.dumps(asdict(config), default=list))
        (folder / "MODEL_CARD.md").write_text(domain_card(measured, settings), encoding="utf-8")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files that only their owner reads
        write_manifest(
            folder,
            BundleInfo(
                name="own domain",
                template=config.template,
                template_without_prompt=config.template_without_prompt,
                decoding=config.decoding.to_mapping(),
                language_model=self._described(),
                user_features=self.features[1],
                config=settings,
                domain="own",
            ),
        )


def latent_words(texts: Sequence[str], n: int) -> np.ndarray:
    """Return the leading `n` directions of the words in `texts`, (n_texts, n' <= n), by a truncated SVD of TF-IDF.

    Counts enter as log(1 + count), weighted by log(n_texts / texts with the word); rows have length 1 before the SVD
    and directions come in units of their root mean square.
    """
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    places = {word: column for column, word in enumerate(sorted(set().union(*words)))}
    counts = np.zeros((len(texts), len(places)))
    for row, found in enumerate(words):
        for word, count in found.items():
            counts[row, places[word]] = count
    weighted = np.log1p(counts) * np.log(len(texts) / np.maximum((counts > 0).sum(axis=0), 1))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    left, scale, _ = np.linalg.svd(weighted - weighted.mean(axis=0), full_matrices=False)
    kept = max(1, min(n, int((scale > 1e-9).sum())))
    return np.asarray(left[:, :kept] * np.sqrt(len(texts)))


def mean_auc(held_out: Sequence[dict[str, Any]], model: str = "user") -> float:
    """Return the mean over splits of the held-out area under the ROC curve."""
    return float(np.mean([row[model]["auc"] for row in held_out]))
