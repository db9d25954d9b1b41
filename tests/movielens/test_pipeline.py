"""The asset pipeline on a made-up MovieLens with tiny models, and the exact parts of it on worlds one can enumerate."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import cli
from offprompts_env.errors import BundleError, ConfigError, DataError, DimensionError, StorageError
from offprompts_env.movielens import build
from offprompts_env.movielens.build import BuildConfig, build_assets, catalogue, small
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.collaborative import CollaborativeConfig, CollaborativeModel, fit_collaborative
from offprompts_env.movielens.grammar import parse
from offprompts_env.movielens.lexicon import GENRES, lexicon
from offprompts_env.movielens.pipeline import evaluation
from offprompts_env.movielens.pipeline.data import Benchmark, FilterConfig, prepare, user_vectors
from offprompts_env.movielens.pipeline.language import (
    LanguageModelConfig,
    SentenceSampler,
    collate,
    make_tokenizer,
    train_language_model,
)
from offprompts_env.movielens.pipeline.reward import (
    SimulatorConfig,
    area_under_curve,
    calibration_error,
    crossfitted_vectors,
    make_small_simulator,
    split_reactions,
)
from offprompts_env.movielens.raw import read_movielens
from offprompts_env.movielens.simulator import LikeSimulator
from offprompts_env.rng import stream
from offprompts_env.text.prompted import PromptFormatter
from tests.tiny_movielens import made_up, write_csv

FILTER = FilterConfig(min_user=3, min_item=3)
CONFIG = small(BuildConfig(filter=FILTER))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_csv(folder, *made_up())
    return folder


@pytest.fixture(scope="module")
def benchmark(raw: Path) -> Benchmark:
    return prepare(read_movielens(raw), FILTER, stream(0, "filter"))


@pytest.fixture(scope="module")
def built(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("built")
    return build_assets(raw, folder / "bundle", CONFIG, folder / "work", quiet=True), folder / "work"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The whole build


def test_the_bundle_has_all_parts_and_they_work_together(built: tuple[Path, Path], benchmark: Benchmark) -> None:
    bundle = Bundle.open(built[0])
    bundle.verify()
    assert bundle.users.ids.tolist() == benchmark.user_ids.tolist()
    assert bundle.users.vectors.shape == (len(benchmark.user_ids), len(bundle.info.user_features))
    assert list(bundle.items.titles) == [movie.title for movie in benchmark.movies]
    assert {word.text for word in bundle.keywords} == {word.text for word in lexicon()}
    sentences = bundle.no_prompt_sentences
    assert {len(texts) for texts in sentences.values()} == {4}
    assert set(sentences) == set(bundle.items.titles)
    request = bundle.formatter.ask(bundle.items.titles[0], "eerie")
    said = bundle.language_model.generate([request] * 3, np.random.default_rng(0))
    likes = bundle.simulator.probability(bundle.users.vectors[:3], bundle.simulator.encode(said))
    assert likes.shape == (3,)
    assert ((likes > 0) & (likes < 1)).all()
    for name in ("sentence", "query", "prompt"):
        assert bundle.encoder(name).encode(["eerie", "ghosts"]).shape == (2, 4)
    model = CollaborativeModel.load(bundle.file("collaborative.safetensors"))
    chance = model.probability(bundle.users.vectors[:3], bundle.items.ids[:3], bundle.simulator.encode(said))
    assert ((chance > 0) & (chance < 1)).all()


def test_the_card_states_what_the_metrics_say_and_no_path(built: tuple[Path, Path], raw: Path) -> None:
    card = (built[0] / "MODEL_CARD.md").read_text()
    metrics = json.loads((built[0] / "metrics.json").read_text())
    auc = np.mean([row["user"]["auc"] for row in metrics["held_out"]])
    assert f"| held-out AUC, one sentence | {auc:.4f} |" in card
    assert f"| {metrics['prompts']['personalisation']:.3f} |" in card
    assert f"| {metrics['language']['malformed']:.2%} /" in card
    for text in (card, (built[0] / "bundle.json").read_text()):
        assert str(raw) not in text
        assert str(built[1]) not in text
    assert "may not use this information for any commercial" in (built[0] / "LICENSE-MOVIELENS.txt").read_text()


def test_one_seed_gives_the_same_bundle_and_another_seed_another(
    built: tuple[Path, Path], raw: Path, tmp_path: Path
) -> None:
    again = build_assets(raw, tmp_path / "again", CONFIG, quiet=True)
    other = build_assets(raw, tmp_path / "other", replace(CONFIG, seed=1), quiet=True)
    # These state how long sentences took; everything else must agree to the byte.
    timed = {"metrics.json", "MODEL_CARD.md", "bundle.json"}
    first, second, third = (contents(folder) for folder in (built[0], again, other))
    assert set(first) == set(second)
    assert [name for name in first if name not in timed and first[name] != second[name]] == []
    assert first["lm/model.safetensors"] != third["lm/model.safetensors"]
    assert first["no_prompt.csv"] != third["no_prompt.csv"]


def test_an_interrupted_build_leaves_the_old_bundle_and_goes_on_where_it_stopped(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "bundle", tmp_path / "work"
    shutil.copytree(built[0], out)
    before = contents(out)
    config = replace(CONFIG, seed=2)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure_prompts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_assets(raw, out, config, work, quiet=True)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "work"}

    # What was finished is not made again: training the language model now would raise.
    monkeypatch.setattr(build, "train_language_model", interrupt)
    build_assets(raw, out, config, work, quiet=True)
    assert contents(out) != before
    Bundle.open(out).verify()
    assert not any(path.name.endswith(".new") and path.name.startswith(".figures") for path in work.iterdir())


def test_a_build_that_fails_while_writing_leaves_the_old_bundle(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built[0], out)
    before = contents(out)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_manifest", full_disk)
    with pytest.raises(OSError, match="No space"):
        build_assets(raw, out, CONFIG, built[1], quiet=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_any_sentence_survives_the_bundle(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = ["a\rb", "\0 \x0b\x0c\x1c\x85\u2028", 'say "hi", or\nnot', "\r\n"]
    sentences = build._Build.sentences
    monkeypatch.setattr(build._Build, "sentences", lambda self: [nasty, *sentences(self)[1:]])
    out = build_assets(raw, tmp_path / "bundle", CONFIG, built[1], quiet=True)
    found = Bundle.open(out)
    assert list(found.no_prompt_sentences[found.items.titles[0]]) == nasty
    others = [Bundle.open(folder).no_prompt_sentences[found.items.titles[1]] for folder in (out, built[0])]
    assert others[0] == others[1]


def test_a_bundle_that_cannot_be_opened_does_not_replace_the_old_one(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built[0], out)
    before = contents(out)
    monkeypatch.setattr(build, "write_csv", lambda path, header, rows: path.write_text(",".join(header)))
    with pytest.raises(BundleError, match=r"items\.csv, row 0"):
        build_assets(raw, out, CONFIG, built[1], quiet=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_swap_that_fails_puts_the_old_bundle_back(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(built[0], out)
    before = contents(out)
    rename = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".new") and target == out:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        build_assets(raw, out, CONFIG, built[1], quiet=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_changed_setting_redoes_only_what_depends_on_it(built: tuple[Path, Path], raw: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(built[1], work)
    had = {path.name for path in work.iterdir()}
    changed = replace(CONFIG, simulator=replace(CONFIG.simulator, epochs=1))
    build_assets(raw, tmp_path / "bundle", changed, work, quiet=True)
    new = {path.name.rsplit("-", 1)[0] for path in work.iterdir() if path.name not in had}
    assert new == {"simulator", "encoders", "figures", "held-out"}


def test_existing_models_take_the_place_of_trained_ones(
    built: tuple[Path, Path], raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        CONFIG,
        lm=str(built[0] / "lm"),
        encoder=str(built[0] / "simulator"),
        template="About {query}:",
        template_with_keyword="{prompt} {query}:",
    )
    out = build_assets(raw, tmp_path / "bundle", config, quiet=True)
    # Neither stages nor models show bars.
    assert "it/s]" not in capsys.readouterr().err
    bundle = Bundle.open(out)
    bundle.verify()
    assert bundle.formatter.ask("X") == "About X:"
    assert bundle.info.config["lm"] == "lm"
    assert json.loads((out / "metrics.json").read_text())["language"] is None
    assert not any(
        path.name.startswith(("language-model", "encoder-")) for path in (tmp_path / "bundle.work").iterdir()
    )
    weights = bundle.language_model.model.state_dict()
    for name, value in Bundle.open(built[0]).language_model.model.state_dict().items():
        assert torch.equal(weights[name], value)


def test_a_folder_that_is_no_bundle_is_not_overwritten(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="choose another path"):
        build_assets(raw, tmp_path, CONFIG, quiet=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_two_builds_cannot_share_a_work_folder(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(*_: Any, **__: Any) -> None:
        build_assets(raw, tmp_path / "second", CONFIG, tmp_path / "work", quiet=True)

    monkeypatch.setattr(build, "prepare", nested)
    with pytest.raises(StorageError, match="another build"):
        build_assets(raw, tmp_path / "first", CONFIG, tmp_path / "work", quiet=True)


@pytest.mark.parametrize("change", [{"figure_sentences": 3}, {"splits": 0}, {"sentences_per_movie": 3}])
def test_impossible_settings_are_refused(change: dict[str, int], raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected an even figure_sentences"):
        build_assets(raw, tmp_path / "out", replace(CONFIG, **change), quiet=True)  # type: ignore[arg-type]


def test_the_command_line_prints_a_card_and_reports_errors(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["card", "--bundle", str(built[0])]) == 0
    assert "# MovieLens bundle" in capsys.readouterr().out
    assert cli.main(["build-assets", "--raw", str(tmp_path), "--out", str(tmp_path / "out"), "--tiny"]) == 1
    assert "no table of ratings" in capsys.readouterr().err


def test_the_command_line_ends_quietly_when_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offprompts_env.movielens.cli.build_assets", interrupt)
    assert cli.main(["build-assets", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err


# The data


def test_reactions_are_balanced_and_large_enough(benchmark: Benchmark) -> None:
    users, liked = benchmark.reactions.users, benchmark.reactions.liked
    likes = np.bincount(users, weights=liked)
    assert (2 * likes == np.bincount(users)).all()
    assert likes.min() >= FILTER.min_user


def test_facts_of_movies_do_not_depend_on_the_reactions(raw: Path, benchmark: Benchmark) -> None:
    # Turn every reaction around: reception and popularity, which sentences state, must not move.
    tables = read_movielens(raw)
    users, items = benchmark.user_ids[benchmark.reactions.users], benchmark.item_ids[benchmark.reactions.items]
    reacted = set(zip(users.tolist(), items.tolist(), strict=True))
    turned = tables.ratings.copy()
    here = np.array([(u, i) in reacted for u, i in zip(turned["user"], turned["item"], strict=True)])
    assert here.sum() == len(benchmark.reactions)
    turned.loc[here, "rating"] = np.where(turned.loc[here, "rating"] == 5, 2, 5)
    background = turned[~here]
    assert len(background) > 50
    from offprompts_env.movielens.pipeline.data import _reception

    original = _reception(tables.ratings[~here], benchmark.item_ids)
    again = _reception(background, benchmark.item_ids)
    assert np.array_equal(original[0], again[0])
    order = np.argsort(original[0])
    levels = np.array([movie.reception for movie in benchmark.movies])[order]
    assert (np.diff(levels) >= 0).all()


def test_user_vectors_leave_out_what_is_excluded(benchmark: Benchmark) -> None:
    nothing = np.zeros(len(benchmark.reactions), dtype=bool)
    one = nothing.copy()
    one[7] = True
    user = benchmark.reactions.users[7]
    changed = replace(
        benchmark,
        taste=replace(benchmark.taste, rating=np.where(benchmark.taste.reaction == 7, 99.0, benchmark.taste.rating)),
    )
    assert np.array_equal(user_vectors(benchmark, one), user_vectors(changed, one))
    assert not np.allclose(user_vectors(benchmark, nothing)[user], user_vectors(changed, nothing)[user])


def test_user_vectors_recover_planted_tastes(benchmark: Benchmark) -> None:
    rng = np.random.default_rng(0)
    width = benchmark.features.shape[1]
    planted = rng.normal(size=(len(benchmark.user_ids), width)) * 0.5
    taste = benchmark.taste
    rating = np.einsum("nk,nk->n", planted[taste.users], benchmark.features[taste.features])
    found = user_vectors(
        replace(benchmark, taste=replace(taste, rating=rating + 0.05 * rng.normal(size=len(rating)))),
        np.zeros(len(benchmark.reactions), dtype=bool),
    )
    true, fitted = planted @ benchmark.features.T, found @ benchmark.features.T
    assert np.corrcoef(true.ravel(), fitted.ravel())[0, 1] > 0.97


def test_crossfitted_vectors_never_saw_their_reaction_nor_held_out_ones(benchmark: Benchmark) -> None:
    config = SimulatorConfig(folds=4)
    split = split_reactions(len(benchmark.reactions), config, 0.2, seed=3)
    assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(len(benchmark.reactions)))
    before = crossfitted_vectors(benchmark, split, config, np.random.default_rng(0))
    for position in (int(split.train[0]), int(split.validation[0]), int(split.test[0])):
        rating = np.where(benchmark.taste.reaction == position, 99.0, benchmark.taste.rating)
        changed = replace(benchmark, taste=replace(benchmark.taste, rating=rating))
        after = crossfitted_vectors(changed, split, config, np.random.default_rng(0))
        rows = split.train == position if position == split.train[0] else np.ones(len(split.train), dtype=bool)
        assert np.array_equal(before[rows], after[rows])
    assert not np.array_equal(before, crossfitted_vectors(benchmark, split, config, np.random.default_rng(1)))


def test_a_filter_that_leaves_nothing_says_what_to_do(raw: Path) -> None:
    with pytest.raises(DataError, match="lower min_user or min_item"):
        prepare(read_movielens(raw), FilterConfig(min_user=999), stream(0, "filter"))


# The language model


def test_pieces_are_single_tokens_in_prompts_and_sentences() -> None:
    tokenizer = make_tokenizer(["The Matrix (1999)"], 400)
    ids = tokenizer("Movie: The Matrix (1999)\nKeyword: haunted houses\nDescription:").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "Movie:"
    assert tokens[-3:] == ["\nKeyword:", " haunted houses", "\nDescription:"]
    sentence = "A famous eerie horror film full of haunted houses, liked by most."
    assert len(tokenizer(sentence).input_ids) == 8
    assert tokenizer.decode(tokenizer(sentence).input_ids) == sentence


def test_training_examples_are_what_inference_asks_for(benchmark: Benchmark) -> None:
    config = LanguageModelConfig(title_vocabulary=400)
    tokenizer = make_tokenizer([movie.title for movie in benchmark.movies], 400)
    sampler = SentenceSampler(benchmark.movies, tokenizer, config)
    formatter = BuildConfig().formatter()
    kinds: Counter[bool] = Counter()
    for prompt, sentence in sampler.draw(np.arange(len(benchmark.movies)).repeat(20), np.random.default_rng(0)):
        text = str(tokenizer.decode(sentence, skip_special_tokens=True))
        assert parse(text) is not None
        asked = str(tokenizer.decode(prompt))
        title = asked.removeprefix("Movie: ").split("\n")[0]
        keyword = asked.split("\nKeyword: ")[1].removesuffix("\nDescription:") if "Keyword" in asked else None
        assert asked == formatter.ask(title, keyword)
        assert tokenizer(asked).input_ids == prompt
        kinds[keyword is None] += 1
    assert 0.3 < kinds[True] / kinds.total() < 0.5


def test_the_loss_counts_the_sentence_only() -> None:
    tokens, targets = collate([([5, 6, 7], [8, 9]), ([5], [8])], pad=0)
    assert tokens.tolist() == [[5, 6, 7, 8, 9], [5, 8, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, 8, 9, -100], [8, -100, -100, -100, -100]]


def test_a_tiny_language_model_learns_the_grammar_of_two_movies(benchmark: Benchmark) -> None:
    config = LanguageModelConfig(
        width=48,
        layers=2,
        heads=2,
        feed_forward=96,
        steps=120,
        batch_size=32,
        warmup=10,
        echo_steps=0,
        title_vocabulary=300,
    )
    losses: list[float] = []
    train_language_model(benchmark.movies[:2], config, 0, losses.append)
    assert len(losses) == 120
    assert losses[0] > 6
    assert np.mean(losses[-10:]) < 3


# Figures


def test_area_under_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    score = rng.integers(0, 6, 60).astype(float)
    positive = rng.random(60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(pairs))


def test_calibration_error_of_a_known_gap() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.2, 0.8, 40_000)
    outcome = rng.random(40_000) < chance
    assert calibration_error(chance, outcome) < 0.012
    assert calibration_error(chance + 0.15, outcome) == pytest.approx(0.15, abs=0.012)


class Echo:
    """A language model that says the request and a random digit."""

    fingerprint, deterministic = "echo", False

    def generate(self, prompts: Sequence[str], rng: Any) -> list[str]:
        return [f"{prompt}|{rng.integers(10)}" for prompt in prompts]


class Planted:
    """P(like) = 0.5 + 0.01 effect(user, movie, prompt) + noise by the digit; movies and prompts are numbers."""

    def __init__(self, effect: np.ndarray, noise: float) -> None:
        self.effect, self.noise = effect, noise

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:
            request, digit = text.split("|")
            movie, prompt = request.split(":")
            rows.append((int(movie), int(prompt) if prompt else -1, int(digit)))
        return np.array(rows, dtype=float)

    def probability(self, users: np.ndarray, states: np.ndarray) -> np.ndarray:
        user, movie, prompt, digit = users[:, 0].astype(int), *states.T.astype(int)
        known = np.where(prompt < 0, 0.0, self.effect[user, movie, prompt])
        return 0.5 + 0.01 * known + np.where(prompt < 0, 0.0, self.noise * (digit - 4.5))


def measured(effect: np.ndarray, noise: float = 0.0, n_sentences: int = 4) -> evaluation.PromptFigures:
    users, movies, prompts = effect.shape
    return evaluation.measure_prompts(
        Echo(),
        PromptFormatter("{query}:{prompt}", "{query}:"),
        Planted(effect, noise),  # type: ignore[arg-type]
        np.arange(users, dtype=float)[:, None],
        [str(movie) for movie in range(movies)],
        [[f"{movie}:|0"] for movie in range(movies)],
        [str(prompt) for prompt in range(prompts)],
        np.random.default_rng(0),
        n_users=users,
        n_movies=movies,
        n_sentences=n_sentences,
    )


def test_prompt_figures_of_planted_effects() -> None:
    rng = np.random.default_rng(1)
    user_prompt = np.broadcast_to(rng.normal(size=(8, 1, 5)), (8, 6, 5))
    figures = measured(user_prompt - user_prompt.mean(axis=(0, 2), keepdims=True))
    assert figures.user_prompt_share + figures.prompt_share == pytest.approx(1, abs=1e-6)
    assert figures.three_way_share == pytest.approx(0, abs=1e-6)

    effect = rng.normal(size=(8, 6, 5))
    figures = measured(effect)
    assert figures.best_per_user_and_movie == pytest.approx(0.1 * effect.max(axis=2).mean(), rel=1e-4)
    assert figures.best_single == pytest.approx(0.1 * effect.mean(axis=(0, 1)).max(), rel=1e-4)
    assert figures.uniform == pytest.approx(0.1 * effect.mean(), rel=1e-3, abs=1e-5)
    assert figures.best_per_user == pytest.approx(0.1 * effect.mean(axis=1).max(axis=1).mean(), rel=1e-4)
    assert figures.best_per_movie == pytest.approx(0.1 * effect.mean(axis=0).max(axis=1).mean(), rel=1e-4)


def test_noise_alone_is_worth_nothing_under_cross_fitting() -> None:
    figures = measured(np.zeros((30, 20, 20)), noise=0.05, n_sentences=2)
    assert figures.noise_variance > 1
    assert abs(figures.personalisation) < 0.25 * np.sqrt(figures.noise_variance)
    assert abs(figures.prompt_variance) < 0.2 * figures.noise_variance


def test_language_figures_of_the_grammar_are_perfect_and_of_another_movie_are_not(benchmark: Benchmark) -> None:
    from offprompts_env.movielens.grammar import describe

    by_title = {movie.title: movie for movie in benchmark.movies}
    by_text = {word.text: word for word in lexicon()}

    class Perfect:
        fingerprint, deterministic = "perfect", False

        def __init__(self, shift: int = 0) -> None:
            titles = list(by_title)
            self.told = {title: by_title[titles[(i + shift) % len(titles)]] for i, title in enumerate(titles)}

        def generate(self, prompts: Sequence[str], rng: Any) -> list[str]:
            said = []
            for prompt in prompts:
                title, _, keyword = prompt.partition("#")
                said.append("".join(describe(self.told[title], by_text[keyword] if keyword else None, rng)))
            return said

    formatter = PromptFormatter("{query}#{prompt}", "{query}")
    right, wrong = (
        evaluation.measure_language(lm, formatter, benchmark.movies, np.random.default_rng(0), 2, 200)
        for lm in (Perfect(), Perfect(shift=1))
    )
    for name in (
        "genre_recall",
        "genre_precision",
        "era_right",
        "reception_right",
        "keyword_literal",
        "keyword_genre_named",
    ):
        assert getattr(right, name) == 1, name
    assert right.malformed == right.malformed_with_keyword == right.unsuitable_genre_named == 0
    assert wrong.genre_recall < 0.8
    assert wrong.genre_precision < 0.8
    assert wrong.keyword_genre_named < 0.8


# The parts that are shipped


def test_the_catalogue_is_balanced_in_every_beginning() -> None:
    words = catalogue(0)
    assert len(words) == len(lexicon())
    assert words != catalogue(1)
    for n in (54, 100, 300):
        counts = Counter(word.group for word in words[:n])
        shares = [counts[genre] for genre in GENRES]
        assert max(shares) - min(shares) <= 1


def test_a_simulator_survives_saving_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    simulator = make_small_simulator(CONFIG.simulator, 5, seed=0).eval()
    texts = ["A famous horror film full of ghosts, liked by most.", "A familiar war movie about tanks, liked by most."]
    simulator.save(tmp_path / "simulator")
    loaded = LikeSimulator.load(tmp_path / "simulator")
    users = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    states = simulator.encode(texts)
    np.testing.assert_allclose(loaded.encode(texts), states, atol=0.02)
    np.testing.assert_allclose(loaded.probability(users, states), simulator.probability(users, states), atol=1e-6)
    with pytest.raises(DimensionError, match=r"user vectors \(n, 5\)"):
        loaded.probability(users[:, :4], states)
    (tmp_path / "simulator" / "head.safetensors").write_bytes(b"junk")
    with pytest.raises(BundleError, match="expected a reward simulator"):
        LikeSimulator.load(tmp_path / "simulator")


def test_the_collaborative_model_learns_planted_preferences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(4000, 3)), rng.integers(0, 20, 4000)
    states = rng.normal(size=(20, 1, 4)).repeat(2, axis=1)
    means = rng.normal(size=20)
    logits = means[items] + 2 * users[:, 0] * states[items, 0, 1]
    liked = rng.random(4000) < 1 / (1 + np.exp(-logits))
    ids = np.arange(100, 120)
    model = fit_collaborative(
        users, ids, items, states, liked, CollaborativeConfig(epochs=40, learning_rate=1e-2), seed=0
    )
    fitted = model.probability(users, ids[items], states[items, 0])
    assert np.corrcoef(np.log(fitted / (1 - fitted)), logits)[0, 1] > 0.95
    unknown = model.probability(users[:1], [999], states[:1, 0])
    assert np.isfinite(unknown).all()
    model.save(tmp_path / "model.safetensors")
    loaded = CollaborativeModel.load(tmp_path / "model.safetensors")
    assert np.array_equal(loaded.probability(users, ids[items], states[items, 0]), fitted)
    with pytest.raises(DimensionError):
        model.probability(users[:, :2], ids[items], states[items, 0])
    with pytest.raises(BundleError, match="cannot be read"):
        CollaborativeModel.load(tmp_path / "nothing.safetensors")


# The embedded bundle: limits that any replacement must keep


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return Bundle.open()


def test_the_embedded_bundle_is_small_and_has_no_stray_file(embedded: Bundle) -> None:
    embedded.verify()
    files = contents(embedded.directory)
    assert set(files) == {*embedded.files, "bundle.json"}
    assert sum(map(len, files.values())) <= 6_000_000


def test_the_embedded_bundle_was_measured_within_its_limits(embedded: Bundle) -> None:
    metrics = json.loads(embedded.file("metrics.json").read_text())
    language, prompts, held_out = metrics["language"], metrics["prompts"], metrics["held_out"]
    assert language["genre_recall"] >= 0.97
    assert language["genre_precision"] >= 0.95
    assert max(language["malformed"], language["malformed_with_keyword"]) <= 0.015
    assert language["keyword_genre_named"] >= 0.98
    assert language["keyword_literal"] >= 0.80
    assert len(held_out) == 3
    auc, no_user = (np.mean([row[model]["auc"] for row in held_out]) for model in ("user", "no_user"))
    assert auc >= 0.675
    assert auc - no_user >= 0.04
    assert np.mean([row["user"]["calibration_error"] for row in held_out]) <= 0.05
    assert (prompts["n_users"], prompts["n_movies"], prompts["n_prompts"]) == (200, 20, 100)
    assert prompts["personalisation"] >= 0.5
    assert prompts["user_prompt_share"] >= 0.30


def test_the_embedded_language_model_still_says_what_is_true(embedded: Bundle) -> None:
    rng = np.random.default_rng(0)
    genres = dict(zip(embedded.items.titles, embedded.items.genres, strict=True))
    titles = [str(title) for title in rng.permutation(embedded.items.titles)[:300]]
    said = embedded.language_model.generate([embedded.formatter.ask(title) for title in titles], rng)
    facts = [(parse(text), set(genres[title])) for text, title in zip(said, titles, strict=True)]
    assert sum(found is None for found, _ in facts) <= 6
    recall = [len({*found.genres} & true) / min(3, len(true)) for found, true in facts if found]
    assert np.mean(recall) >= 0.97
    suited = [
        (title, word)
        for title, word in zip(titles, rng.permutation(np.array(embedded.keywords, dtype=object))[:300], strict=True)
        if word.group in genres[title]
    ]
    assert len(suited) > 20
    said = embedded.language_model.generate([embedded.formatter.ask(title, word.text) for title, word in suited], rng)
    assert np.mean([word.text in text for text, (_, word) in zip(said, suited, strict=True)]) >= 0.9
