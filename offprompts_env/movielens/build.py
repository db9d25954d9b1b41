"""`offprompts build-assets`: from raw MovieLens files to an asset bundle.

The stages, each of which is kept in the work folder under a key of its settings and inputs, so that a build that was
interrupted goes on where it stopped and a changed setting redoes only what depends on it:

==============  ============================================================================================
filter          users, movies and reactions; facts for the sentences        (`pipeline.data`; seconds, not kept)
language-model  tokenizer and small causal LM, or an existing one           (`pipeline.language`)
sentences       what the language model says of every movie without a keyword
held-out        simulators on three train/validation/test splits, with and without the user   (`pipeline.reward`)
simulator       the simulator that is shipped, user vectors, the collaborative model
encoders        principal components for sentences, queries and prompts
figures         what sentences say, and what prompts are worth              (`pipeline.evaluation`)
bundle          all of it in one folder, with a model card and checksums
==============  ============================================================================================

Everything follows from ``BuildConfig.seed``. A stage is written to a temporary folder and renamed when it is complete,
and so is the bundle: a build that fails leaves the bundle that was there.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from offprompts_env.config import not_placing
from offprompts_env.errors import ConfigError
from offprompts_env.folders import check_replaceable, replaced
from offprompts_env.movielens.bundle import MANIFEST, Bundle, BundleInfo, write_manifest
from offprompts_env.movielens.collaborative import CollaborativeConfig, fit_collaborative
from offprompts_env.movielens.grammar import HEADS, NOUN_HINT, OPENERS
from offprompts_env.movielens.lexicon import Keyword, lexicon
from offprompts_env.movielens.pipeline import card, evaluation, existing, reward
from offprompts_env.movielens.pipeline.data import TASTE_NAMES, Benchmark, FilterConfig, prepare, user_vectors
from offprompts_env.movielens.pipeline.existing import ExistingModel
from offprompts_env.movielens.pipeline.language import (
    TEMPLATE,
    TEMPLATE_WITH_KEYWORD,
    LanguageModelConfig,
    save_language_model,
    train_language_model,
)
from offprompts_env.movielens.pipeline.preflight import Survey, free_disk, physical_memory, weights_in
from offprompts_env.movielens.pipeline.stages import Stages, digest, locked, one_thread
from offprompts_env.movielens.raw import read_movielens
from offprompts_env.movielens.simulator import HeadConfig, LikeSimulator
from offprompts_env.rng import integer_seed, stream
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import PCAEncoder, TextEncoder
from offprompts_env.text.language_model import CausalLM
from offprompts_env.text.loading import check_model_kwargs, pin, quiet_loading
from offprompts_env.text.prompted import PromptFormatter
from offprompts_env.text.store import SentenceStore

#: What an existing language model is asked by default.
FOREIGN_TEMPLATE = "Describe the movie '{query}' in one sentence without naming it.\nDescription:"
FOREIGN_TEMPLATE_WITH_KEYWORD = (
    "Describe the movie '{query}' in one sentence without naming it, associated with the word '{prompt}'.\nDescription:"
)
NO_PROMPT_SAMPLES = 4  # reference sentences of each movie that the bundle ships
NAME = "movielens"
_CHUNK = 64  # movies described between two signs of progress


@dataclass(frozen=True)
class BuildConfig:
    """Settings of a build.

    ``lm``, ``encoder``: directory or hub id of an existing causal LM and of an existing encoder for the simulator;
    None trains small ones. ``template``, ``template_with_keyword``: what the LM is asked; None means the small
    model's own or, for an existing LM, a sentence in English. ``sentences_per_movie`` are sampled for training the
    simulator. ``dim_sentence``, ``dim_query``, ``dim_prompt``: principal components kept. ``splits``: held-out splits.
    ``device``: where existing models compute; small ones train on the CPU, in one thread. ``dtype``, ``chat_template``,
    ``pad_token``, ``device_map``, ``model_kwargs``, ``batch_size``, ``max_batch_tokens``: of an existing LM, see
    :class:`~offprompts_env.text.language_model.CausalLM`. ``copy_lm``: whether the bundle holds a copy of an existing
    LM, or only names it, which is right for many gigabytes.
    """

    seed: int = 0
    lm: str | None = None
    encoder: str | None = None
    template: str | None = None
    template_with_keyword: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    chat_template: bool = False
    pad_token: str | None = None
    device_map: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    batch_size: int = 256
    max_batch_tokens: int = 1 << 16
    copy_lm: bool = True
    filter: FilterConfig = field(default_factory=FilterConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    simulator: reward.SimulatorConfig = field(default_factory=reward.SimulatorConfig)
    collaborative: CollaborativeConfig = field(default_factory=CollaborativeConfig)
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=28, temperature=0.8, top_p=0.95))
    sentences_per_movie: int = 16
    dim_sentence: int = 16
    dim_query: int = 20
    dim_prompt: int = 16
    splits: int = 3
    figure_users: int = 200
    figure_movies: int = 20
    figure_prompts: int = 100
    figure_sentences: int = 16
    figure_keywords: int = 4000

    def formatter(self) -> PromptFormatter:
        """Return how the language model is asked."""
        own = self.lm is None
        return PromptFormatter(
            self.template_with_keyword or (TEMPLATE_WITH_KEYWORD if own else FOREIGN_TEMPLATE_WITH_KEYWORD),
            self.template or (TEMPLATE if own else FOREIGN_TEMPLATE),
        )


def build_assets(
    raw: str | Path,
    out: str | Path,
    config: BuildConfig | None = None,
    work: str | Path | None = None,
    quiet: bool | None = None,
) -> Path:
    """Build a bundle from the raw MovieLens folder `raw`, and return its path `out`.

    `work` keeps finished stages (default: ``<out>.work`` beside the bundle). `quiet` hides progress (default: when
    standard error is not a terminal).

    Raises `DataError` for raw files that cannot be read, `ConfigError` for settings that do not fit, `StorageError`
    where `out` is something else than a bundle or another build is writing it.
    """
    config = config or BuildConfig()
    if config.figure_sentences % 2 or config.splits < 1 or config.sentences_per_movie < NO_PROMPT_SAMPLES:
        raise ConfigError(
            "expected an even figure_sentences, splits >= 1 and "
            f"sentences_per_movie >= {NO_PROMPT_SAMPLES}, got {config.figure_sentences}, {config.splits} and "
            f"{config.sentences_per_movie}"
        )
    out = Path(out)
    check_replaceable(out, MANIFEST, "a bundle")
    folder = Path(work) if work is not None else out.with_name(out.name + ".work")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), one_thread(), quiet_loading():
        build = _Build(Path(raw), config, folder, not sys.stderr.isatty() if quiet is None else quiet)
        build.survey().check()
        return build.bundle(out)


def survey(raw: str | Path, out: str | Path, config: BuildConfig | None = None) -> Survey:
    """Return what :func:`build_assets` would take; nothing is written, and no model is loaded.

    Raises:
        DataError: raw files cannot be read.
        ModelError: an existing model is not there.
    """
    return _Build(Path(raw), config or BuildConfig(), Path(out), quiet=True).survey()


class _Build:
    """One build: each method is a stage, computed once and kept in the work folder."""

    def __init__(self, raw: Path, config: BuildConfig, work: Path, quiet: bool) -> None:
        if config.model_kwargs is not None:
            check_model_kwargs(config.model_kwargs, spread=config.device_map is not None)
            if config.lm is None:
                raise ConfigError("model_kwargs: expected an existing language model beside it, got none; set lm too")
        self.config, self.stages = config, Stages(work, quiet)
        # Stages are kept by what existing models are, not by where they are: another one in their place is seen.
        self._pins = {source: sorted(pin(source).items()) for source in (config.lm, config.encoder) if source}
        self.stages.say("filter")
        self.benchmark: Benchmark = prepare(read_movielens(raw), config.filter, stream(config.seed, "filter"))
        self.stages.keys["filter"] = digest(self.benchmark)
        self.formatter = config.formatter()

    def survey(self) -> Survey:
        """Return what is ahead."""
        config, movies = self.config, len(self.benchmark.movies)
        judged = min(config.figure_movies, movies) * config.figure_prompts * config.figure_sentences
        described = 0 if config.lm is not None else movies + config.figure_keywords
        return Survey(
            users=len(self.benchmark.user_ids),
            movies=movies,
            reactions=len(self.benchmark.reactions),
            sentences={
                "about movies": movies * config.sentences_per_movie,
                "for components": 2 * movies,
                "for figures": judged + described,
            },
            lm_bytes=weights_in(config.lm),
            encoder_bytes=weights_in(config.encoder),
            copies_lm=config.copy_lm,
            lm_on_cpu=config.device == "cpu" and config.device_map is None,
            disk_free=free_disk(self.stages.work),
            memory=physical_memory(),
        )

    def language_model(self) -> Path | str:
        """Train the small language model, or name the existing one."""
        config = self.config
        if config.lm is not None:
            named = self._pins[config.lm] or config.lm
            self.stages.keys["language-model"] = digest(
                (
                    named,
                    config.decoding,
                    self.formatter,
                    config.dtype,
                    config.chat_template,
                    config.pad_token,
                    sorted(not_placing(config.model_kwargs).items()),
                )
            )
            return config.lm

        def make(folder: Path) -> None:
            with self.stages.progress("language model", config.language_model.steps) as step:
                model, tokenizer = train_language_model(self.benchmark.movies, config.language_model, config.seed, step)
            save_language_model(model, tokenizer, folder)

        return self.stages.folder("language-model", ("filter",), (config.language_model, config.seed), make)

    def lm(self) -> CausalLM:
        """Load the language model with the configured decoding."""
        return self._existing(str(self.language_model())).load()

    def _existing(self, source: str) -> ExistingModel:
        config = self.config
        return replace(ExistingModel.of(config, source), copy_lm=config.lm is None or config.copy_lm)

    def sentences(self) -> list[list[str]]:
        """Sample `sentences_per_movie` sentences about every movie; within the stage, what is written stays written."""
        config = self.config
        self.language_model()

        def make(folder: Path) -> None:
            lm = self.lm()
            told: list[list[str]] = []
            movies, each = self.benchmark.movies, config.sentences_per_movie
            starts = range(0, len(movies), _CHUNK)
            store = SentenceStore(self.stages.work / "sentences.db")
            with self.stages.progress("sentences", len(starts)) as step, store:
                for start in starts:
                    chunk = movies[start : start + _CHUNK]
                    # Two movies of one title are told the same.
                    asked = [self.formatter.ask(movie.title) for movie in chunk for _ in range(each)]
                    texts = existing.written(lm, store, asked, list(range(each)) * len(chunk), config.seed)
                    told += [texts[i : i + each] for i in range(0, len(texts), each)]
                    step(None)
            (folder / "sentences.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

        settings = (config.sentences_per_movie, config.decoding, self.formatter, config.seed)
        path = self.stages.folder("sentences", ("language-model", "filter"), settings, make)
        told: list[list[str]] = json.loads((path / "sentences.json").read_text(encoding="utf-8"))
        return told

    def pretrained(self) -> LikeSimulator:
        """Return a simulator with an untrained head on the small encoder after pretraining, or on the existing one."""
        config = self.config
        d_x = len(TASTE_NAMES)
        if config.encoder is not None:
            self.stages.keys["encoder"] = digest(self._pins[config.encoder])
            encoder = TextEncoder.from_pretrained(
                config.encoder, pooling=config.simulator.pooling, device=config.device, dtype="float32"
            )
            model = encoder.model.requires_grad_(True)
            head = HeadConfig(d_x, encoder.dim, pooling=config.simulator.pooling)
            return LikeSimulator(model, encoder.tokenizer, head).to(model.device)

        def make(folder: Path) -> None:
            with self.stages.progress("encoder", config.simulator.pretraining_steps) as step:
                simulator = reward.make_small_simulator(config.simulator, d_x, integer_seed(config.seed, "encoder"))
                reward.pretrain_encoder(
                    simulator,
                    self.benchmark.movies,
                    config.simulator.pretraining_steps,
                    integer_seed(config.seed, "encoder"),
                    step,
                )
            simulator.save(folder)

        size = config.simulator
        settings = (size.encoder_width, size.encoder_layers, size.encoder_heads, size.pooling, size.pretraining_steps)
        path = self.stages.folder("encoder", ("filter",), (*settings, config.seed), make)
        return LikeSimulator.load(path)

    def held_out(self) -> list[dict[str, Any]]:
        """Train and test simulators on `splits` splits, with and without the user; one row per split."""
        config = self.config
        sentences = self.sentences()
        self.pretrained()

        def make(folder: Path) -> None:
            rows = []
            for number in range(config.splits):
                seed = integer_seed(config.seed, "split", number)
                split = reward.split_reactions(len(self.benchmark.reactions), config.simulator, 0.2, seed)
                row: dict[str, Any] = {"split": number}
                for name, with_users in (("user", True), ("no_user", False)):
                    simulator = self.pretrained()
                    with self.stages.progress(f"split {number} {name}", config.simulator.epochs) as step:
                        row[f"epochs_{name}"] = reward.train_simulator(
                            simulator,
                            self.benchmark,
                            sentences,
                            split,
                            config.simulator,
                            seed,
                            with_users=with_users,
                            progress=step,
                        )
                    vectors = reward.held_out_vectors(self.benchmark, split, with_users=with_users)
                    for count, suffix in ((1, ""), (8, "_mean_of_8")):
                        figures = reward.held_out(
                            simulator, self.benchmark, sentences, split.test, vectors=vectors, n_sentences=count
                        )
                        row[f"{name}{suffix}"] = asdict(figures)
                rows.append(row)
            (folder / "held_out.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

        path = self.stages.folder(
            "held-out", ("sentences", "encoder"), (config.simulator, config.splits, config.seed), make
        )
        rows: list[dict[str, Any]] = json.loads((path / "held_out.json").read_text(encoding="utf-8"))
        return rows

    def simulator(self) -> Path:
        """Train the simulator that is shipped on all reactions but a validation split."""
        config = self.config
        sentences = self.sentences()
        self.pretrained()

        def make(folder: Path) -> None:
            simulator = self.pretrained()
            seed = integer_seed(config.seed, "simulator")
            split = reward.split_reactions(len(self.benchmark.reactions), config.simulator, 0.0, seed)
            with self.stages.progress("simulator", config.simulator.epochs) as step:
                reward.train_simulator(
                    simulator, self.benchmark, sentences, split, config.simulator, seed,
                    progress=step,
                )  # fmt: skip
            simulator.save(folder / "simulator")
            simulator = self._trained(folder / "simulator")
            flat = simulator.encode([text for samples in sentences for text in samples])
            vectors = reward.crossfitted_vectors(self.benchmark, split, config.simulator, stream(seed, "folds"))
            train = self.benchmark.reactions.take(split.train)
            fit_collaborative(
                vectors,
                self.benchmark.item_ids,
                train.items,
                flat.reshape(len(sentences), -1, flat.shape[1]),
                train.liked,
                config.collaborative,
                config.seed,
            ).save(folder / "collaborative.safetensors")

        return self.stages.folder(
            "simulator", ("sentences", "encoder"), (config.simulator, config.collaborative, config.seed), make
        )

    def _trained(self, folder: Path) -> LikeSimulator:
        """Load a simulator that was trained, where it is to compute."""
        return LikeSimulator.load(folder, device="cpu" if self.config.encoder is None else self.config.device)

    def encoders(self) -> Path:
        """Fit the principal components."""
        config = self.config
        sentences = self.sentences()
        simulator_path = self.simulator() / "simulator"
        # The small language model's state says most about a movie where it is about to say it: after the opener. What a
        # keyword means is known to the small simulator, from sentences that hint at it.
        query_format = self.formatter.template_without_prompt.replace("{query}", "{text}")
        query_format += OPENERS[1][0] if config.lm is None else ""
        prompt_format = f"{OPENERS[1][0]}{HEADS[0]}{NOUN_HINT} {{text}}." if config.encoder is None else "{text}"

        def make(folder: Path) -> None:
            lm = self.lm()
            simulator = self._trained(simulator_path)
            spoken = TextEncoder(
                simulator.encoder,
                simulator.tokenizer,
                pooling=simulator.config.pooling,
                max_tokens=simulator.config.max_tokens,
            )
            rng = stream(config.seed, "encoders")
            words = lexicon()
            movies = self.benchmark.movies
            steered = lm.generate(
                [
                    self.formatter.ask(movies[rng.integers(len(movies))].title, words[rng.integers(len(words))].text)
                    for _ in range(2 * len(movies))
                ],
                rng,
            )
            texts = [samples[0] for samples in sentences] + steered
            PCAEncoder.fit(spoken, texts, config.dim_sentence).save(folder, "sentence", model="../simulator")
            thought = TextEncoder(lm.model.base_model, lm.tokenizer, pooling="last", pad_token=config.pad_token)
            titles = [movie.title for movie in movies]
            PCAEncoder.fit(thought, titles, config.dim_query, text_format=query_format).save(
                folder, "query", model="../lm"
            )
            PCAEncoder.fit(spoken, [word.text for word in words], config.dim_prompt, text_format=prompt_format).save(
                folder, "prompt", model="../simulator"
            )

        dims = (config.dim_sentence, config.dim_query, config.dim_prompt)
        settings = (dims, query_format, prompt_format, self.formatter, config.seed)
        return self.stages.folder("encoders", ("simulator", "sentences"), settings, make)

    def figures(self) -> dict[str, Any]:
        """Measure what sentences say (small language model only), and what prompts are worth."""
        config = self.config
        sentences = self.sentences()
        simulator_path = self.simulator() / "simulator"

        def make(folder: Path) -> None:
            lm = self.lm()
            found: dict[str, Any] = {"language": None}
            if config.lm is None:
                found["language"] = asdict(
                    evaluation.measure_language(
                        lm,
                        self.formatter,
                        self.benchmark.movies,
                        stream(config.seed, "language"),
                        n_keywords=config.figure_keywords,
                    )
                )
            prompts = evaluation.measure_prompts(
                lm,
                self.formatter,
                self._trained(simulator_path),
                shipped_user_vectors(self.benchmark),
                [movie.title for movie in self.benchmark.movies],
                [samples[:NO_PROMPT_SAMPLES] for samples in sentences],
                [word.text for word in catalogue(config.seed)[: config.figure_prompts]],
                stream(config.seed, "prompts"),
                n_users=config.figure_users,
                n_movies=config.figure_movies,
                n_sentences=config.figure_sentences,
            )
            found["prompts"] = asdict(prompts)
            (folder / "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

        settings = (
            (config.figure_users, config.figure_movies, config.figure_prompts),
            (config.figure_sentences, config.figure_keywords, config.seed),
        )
        path = self.stages.folder("figures", ("simulator", "sentences"), settings, make)
        found: dict[str, Any] = json.loads((path / "figures.json").read_text(encoding="utf-8"))
        return found

    def bundle(self, out: Path) -> Path:
        """Put the bundle together beside `out`, then swap it in."""
        start, config = time.perf_counter(), self.config
        self.sentences()
        simulator, encoders = self.simulator(), self.encoders()
        figures, held_out = self.figures(), self.held_out()
        self.stages.say("bundle")
        with replaced(out) as made:
            self._write_bundle(made, simulator, encoders, figures, held_out)
            play_one_round(made, config.device)
        self.stages.say(f"{out} is ready ({time.perf_counter() - start:.0f} s)")
        return out

    def _write_bundle(
        self, folder: Path, simulator: Path, encoders: Path, figures: dict[str, Any], held_out: list[dict[str, Any]]
    ) -> None:
        from safetensors.numpy import save_file

        benchmark, config = self.benchmark, self.config
        vectors = shipped_user_vectors(benchmark).astype(np.float16).astype(np.float32)
        save_file({"ids": benchmark.user_ids.astype(np.int64), "vectors": vectors}, folder / "users.safetensors")
        write_csv(
            folder / "items.csv",
            ("item_id", "title", "genres", "year"),
            (
                (item, movie.title, "|".join(movie.genres), year)
                for item, movie, year in zip(benchmark.item_ids, benchmark.movies, benchmark.years, strict=True)
            ),
        )
        words = catalogue(config.seed)
        write_csv(folder / "keywords.csv", ("keyword", "kind", "group"), ((w.text, w.kind, w.group) for w in words))
        write_csv(
            folder / "no_prompt.csv",
            ("item_id", "sample", "sentence"),
            (
                (item, sample, text)
                for item, samples in zip(benchmark.item_ids, self.sentences(), strict=True)
                for sample, text in enumerate(samples[:NO_PROMPT_SAMPLES])
            ),
        )
        if config.lm is None:
            shutil.copytree(self.language_model(), folder / "lm")
        elif config.copy_lm:
            existing.save_copy(self.lm(), folder / "lm")
        shutil.copytree(simulator / "simulator", folder / "simulator")
        shutil.copy(simulator / "collaborative.safetensors", folder)
        shutil.copytree(encoders, folder / "encoders")
        measured = {"held_out": held_out, **figures, "counts": {
            "users": len(benchmark.user_ids), "movies": len(benchmark.item_ids), "reactions": len(benchmark.reactions),
            "ratings_of_these_users": len(benchmark.taste.rating), "keywords": len(words),
        }, "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}}  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        settings = json.loads(json.dumps(asdict(config), default=list))
        (folder / "MODEL_CARD.md").write_text(card.model_card(measured, settings), encoding="utf-8")
        (folder / "LICENSE-MOVIELENS.txt").write_text(card.MOVIELENS_NOTICE, encoding="utf-8")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files that only their owner reads
        settings["lm"], settings["encoder"] = (
            Path(name).name if name else None for name in (config.lm, config.encoder)
        )
        write_manifest(
            folder,
            BundleInfo(
                name=NAME,
                template=self.formatter.template,
                template_without_prompt=self.formatter.template_without_prompt,
                decoding=config.decoding.to_mapping(),
                language_model=self._existing(str(self.language_model())).described(),
                user_features=TASTE_NAMES,
                config=settings,
            ),
        )


def shipped_user_vectors(benchmark: Benchmark) -> np.ndarray:
    """Return the user vectors of the bundle, fitted on all ratings: (n_users, d_x)."""
    return user_vectors(benchmark, np.zeros(len(benchmark.reactions), dtype=bool))


def catalogue(seed: int) -> list[Keyword]:
    """Return all keywords in an order whose every beginning is balanced over groups.

    Groups take turns in a random order, and each gives its keywords in a random order; groups of fewer keywords (eras)
    drop out when they are used up.
    """
    rng = stream(seed, "catalogue")
    words = lexicon()
    left: dict[str, list[Keyword]] = {}
    for index in rng.permutation(len(words)):
        left.setdefault(words[index].group, []).append(words[index])
    groups = sorted(left)
    ordered: list[Keyword] = []
    while any(left.values()):
        turn = [groups[index] for index in rng.permutation(len(groups))]
        ordered.extend(left[group].pop() for group in turn if left[group])
    return ordered


def play_one_round(bundle: Path, device: str = "cpu") -> None:
    """Open a finished `bundle` as an environment would and play a round, so that one that cannot be used is found here.

    Raises `BundleError` or another `OffPromptsError` that says what is wrong with it.
    """
    from offprompts_env.movielens.parts import MovieLensConfig

    Bundle.open(bundle).verify()
    rng = np.random.default_rng(0)
    simulator = MovieLensConfig(bundle=str(bundle), device=device).build()
    simulator.play(simulator.contexts.sample(1, rng), np.zeros(1, dtype=np.int64), rng, rng)


def write_csv(path: Path, header: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    """Write a table that any reader of CSV takes apart as it was, line ends in fields included."""
    with path.open("w", encoding="utf-8", newline="") as file:
        for row in (header, *rows):
            # A field is quoted where it holds a character of the line terminator: with "\n" alone a "\r" would not be.
            line = io.StringIO()
            csv.writer(line, lineterminator="\r\n").writerow(row)
            file.write(line.getvalue().removesuffix("\r\n") + "\n")


def published(config: BuildConfig) -> BuildConfig:
    """Return `config` with the settings of the published full-LLM experiment, for MovieLens-10M.

    From the paper: Mistral-7B-Instruct-v0.2, asked as a chat; a simulator on distilbert-base-uncased; ten likes and ten
    dislikes of each user and movie. Published settings of decoding, template and training of the simulator are not
    known here. A sentence gets room for 64 tokens, since a cut one says less than the model would, and the pretrained
    encoder is fine-tuned at 3e-5, in the middle of what Devlin et al. (2019) found to work; both only where `config`
    has the defaults, which are for small models. Another ``lm`` or ``encoder`` in `config` stays too. The bundle names
    the language model, and holds no copy.
    """
    usual = BuildConfig()
    decoding, simulator = config.decoding, config.simulator
    if decoding.max_new_tokens == usual.decoding.max_new_tokens:
        decoding = replace(decoding, max_new_tokens=64)
    if simulator.encoder_learning_rate == usual.simulator.encoder_learning_rate:
        simulator = replace(simulator, encoder_learning_rate=3e-5)
    return replace(
        config,
        decoding=decoding,
        simulator=simulator,
        lm=config.lm or "mistralai/Mistral-7B-Instruct-v0.2",
        encoder=config.encoder or "distilbert-base-uncased",
        chat_template=True,
        copy_lm=False,
        filter=replace(config.filter, min_user=10, min_item=10),
    )


def small(config: BuildConfig) -> BuildConfig:
    """Return `config` with tiny models and few steps: a build of seconds, for trying out the pipeline."""
    return replace(
        config,
        language_model=replace(config.language_model, width=32, layers=2, heads=2, feed_forward=64, steps=20,
                               batch_size=16, warmup=5, echo_steps=5, title_vocabulary=300),
        simulator=replace(config.simulator, encoder_width=32, encoder_layers=1, encoder_heads=2, pretraining_steps=5,
                          epochs=2, folds=2),
        collaborative=replace(config.collaborative, factors=2, epochs=1),
        decoding=replace(config.decoding, max_new_tokens=8, top_p=1.0),
        sentences_per_movie=4, dim_sentence=4, dim_query=4, dim_prompt=4, splits=1,
        figure_users=6, figure_movies=3, figure_prompts=6, figure_sentences=2, figure_keywords=20,
    )  # fmt: skip
