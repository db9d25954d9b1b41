"""A domain of one's own: bad files are refused with advice, and a bundle becomes an environment like the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import offprompts_env as op
from agents import UniformPolicy
from agents.cli import main
from offprompts_env.domain import original_ids, register_domain
from offprompts_env.domain.build import DomainConfig, build_domain, latent_words, mean_auc
from offprompts_env.domain.tables import ReactionRule, read_domain
from offprompts_env.errors import BundleError, ConfigError, DataError
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.pipeline.reward import SimulatorConfig
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import CausalLM
from tests import tiny_models
from tests.text.fault_proxy import FakeModel, sentence_of

ITEMS, USERS = 12, 10
FILES = ("items.csv", "interactions.csv", "keywords.txt")


def write_domain(folder: Path, features: bool = True) -> Path:
    """Write three files whose users like one of two kinds of items."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "item_id,title" + (",features" if features else "")
    rows = [f"{i:05d},w{i} w{i + 1}" + (f",kind {i % 2}|all" if features else "") for i in range(ITEMS)]
    (folder / FILES[0]).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    said = [
        f"u{user},{item:05d},{5 - 3 * ((user + item) % 2)}" for user in range(USERS) for item in rng.permutation(12)[:9]
    ]
    (folder / FILES[1]).write_text("\n".join(["user_id,item_id,rating", *said]) + "\n", encoding="utf-8")
    (folder / FILES[2]).write_text("w20\nw21\nw22\n", encoding="utf-8")
    return folder


def read(folder: Path, rule: ReactionRule | None = None):
    return read_domain(*(folder / name for name in FILES), rule or ReactionRule())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DomainConfig:
    folder = tmp_path_factory.mktemp("lm") / "lm"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return DomainConfig(
        lm=str(folder),
        template="w1 {query} w2 {prompt} w3",
        template_without_prompt="w1 {query} w3",
        simulator=SimulatorConfig(encoder_width=16, encoder_layers=1, encoder_heads=2, epochs=2, folds=2),
        decoding=Decoding(max_new_tokens=4),
        sentences_per_item=4,
        splits=1,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, settings: DomainConfig) -> Path:
    folder = write_domain(tmp_path_factory.mktemp("domain"))
    with pytest.warns(UserWarning, match="rests on .* reactions only"):
        return build_domain(*(folder / name for name in FILES), folder / "bundle", settings)


@pytest.fixture
def registered(bundle: Path) -> Iterator[str]:
    register_domain("Tiny-v0", bundle)
    yield "Tiny-v0"
    del gym.registry["Tiny-v0"]


def test_ids_stay_text(tmp_path: Path) -> None:
    tables = read(write_domain(tmp_path))
    assert tables.item_ids[7] == "00007"
    assert tables.features[3] == ("kind 1", "all")
    assert len(tables.user_ids) == USERS
    assert (tables.like, tables.dislike) == (5, 2)
    assert ((tables.verdict > 0) == (tables.rating == 5)).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.csv", "id,title\n1,a\n", "expected a column 'item_id'"),
        ("items.csv", "item_id,blurb\n1,a\n", "expected a column 'text' or 'title' or 'name'"),
        ("items.csv", "item_id,title\n1,a\n1,b\n", "expected each item_id once, got '1' 2 times"),
        ("items.csv", "item_id,title\n1,a\n2,a\n", "expected each title once"),
        ("items.csv", "item_id,title\n1,\n", "row 2: expected title, got nothing"),
        ("items.csv", "item_id,title\n1,a,b\n", "expected 2 fields, got 3"),
        ("items.csv", "item_id,title\n", "expected a header and rows"),
        (
            "interactions.csv",
            "user_id,item_id,stars\nu,00001,1\n",
            "column 'rating' or 'liked' or 'clicked'",
        ),
        ("interactions.csv", "user_id,item_id,liked\nu,7,1\n", "got 'u' and '7'"),
        ("interactions.csv", "user_id,item_id,liked\nu,00007,1\nu,00007,0\n", "one row for each user and item"),
        ("interactions.csv", "user_id,item_id,liked\nu,00007,maybe\n", "expected 0 or 1 in liked"),
        ("interactions.csv", "user_id,item_id,rating\nu,00007,nan\n", "expected a number in rating"),
        ("interactions.csv", "user_id,item_id,clicked\nu,00007,1\nv,00001,1\n", "what was never shown is no dislike"),
        ("interactions.csv", "user_id,item_id,liked\nu,00007,1\nv,00001,0\n", "two or more users"),
        ("keywords.txt", "one\none\n", "two or more prompts"),
    ],
)
def test_bad_files_are_refused_with_advice(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_domain(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_other_encodings_and_missing_files_are_refused(tmp_path: Path) -> None:
    write_domain(tmp_path)
    (tmp_path / "items.csv").write_bytes("item_id,title\n1,café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"expected UTF-8, got the byte 0xe9"):
        read(tmp_path)
    (tmp_path / "items.csv").unlink()
    with pytest.raises(DataError, match="check the path"):
        read(tmp_path)


def test_thresholds_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected like > dislike"):
        read(write_domain(tmp_path), ReactionRule(like=2, dislike=4))


def test_users_without_both_reactions_are_left_out(tmp_path: Path) -> None:
    write_domain(tmp_path)
    with (tmp_path / "interactions.csv").open("a", encoding="utf-8") as file:
        file.write("happy,00001,5\n")
    tables = read(tmp_path)
    assert tables.dropped_users == 1
    assert "happy" not in tables.user_ids


def test_words_that_go_together_share_a_direction() -> None:
    found = latent_words(["sweet honey", "sweet vanilla", "hot pepper", "hot curry"], 2)
    assert found.shape == (4, 2)
    first = found[:, 0] * np.sign(found[0, 0])
    assert (first[:2] > 0).all()
    assert (first[2:] < 0).all()


def test_environment_passes_for_one_of_ours(registered: str, bundle: Path) -> None:
    env = gym.make(registered)
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).id == registered
    rounds = []
    for _ in range(2):
        env.reset(seed=3)
        rounds.append(env.step(1)[1])
    assert rounds[0] == rounds[1]
    vector = gym.make_vec(registered, num_envs=3)
    vector.reset(seed=0)
    info = vector.step(np.zeros(3, dtype=np.int64))[-1]["final_info"]
    users, items = original_ids(bundle)
    assert {items[int(item)] for item in info["item_id"]} <= {f"{i:05d}" for i in range(ITEMS)}
    assert {users[int(user)] for user in info["user_id"]} <= {f"u{i}" for i in range(USERS)}
    log = op.collect(env, UniformPolicy(3), 8, seed=0)
    assert log.metadata.env_id == registered


def test_card_and_requests_speak_of_no_movies(bundle: Path, settings: DomainConfig) -> None:
    env = gym.make("OffPrompts-MovieLens-v0", bundle=str(bundle), language_model=settings.lm)
    assert env.unwrapped.simulator.outputs.formatter.template == settings.template
    for name in ("MODEL_CARD.md", "items.csv", "bundle.json"):
        text = (bundle / name).read_text(encoding="utf-8").lower()
        assert not [word for word in ("movie", "film", "genre", "year") if word in text], name
    assert Bundle.open(bundle).items.genres[1] == ("kind 1", "all")


def test_without_features_words_take_their_place(tmp_path: Path, settings: DomainConfig) -> None:
    write_domain(tmp_path, features=False)
    with pytest.warns(UserWarning, match="rests on"):
        made = build_domain(*(tmp_path / name for name in FILES), tmp_path / "bundle", settings)
    assert Bundle.open(made).info.user_features[0] == "text 1"


def test_a_chat_model_that_stays_where_it_is(
    tmp_path: Path, settings: DomainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked as a chat, named with a checksum; a build that is stopped asks for no sentence again."""
    model = tmp_path / "chat"
    shutil.copytree(settings.lm, model)
    tokens = tiny_models.tokenizer(pad=False)
    tokens.chat_template = "{% for m in messages %}w7 {{ m['content'] }} w8{% endfor %}"
    tokens.save_pretrained(model)
    chat = replace(settings, lm=str(model), chat_template=True, pad_token="[eos]", copy_lm=False)
    folder = write_domain(tmp_path / "files")
    files = [folder / name for name in FILES]
    asked: list[int] = []
    generate = CausalLM.generate

    def stopped(lm: CausalLM, prompts: list[str], rng: object) -> list[str]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(lm, prompts, rng)

    monkeypatch.setattr("offprompts_env.domain.build._CHUNK", 2)
    monkeypatch.setattr(CausalLM, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_domain(*files, tmp_path / "bundle", chat)
    wanted: list[int] = []
    monkeypatch.setattr(CausalLM, "generate", lambda lm, p, rng: (wanted.append(len(p)), generate(lm, p, rng))[1])
    with pytest.warns(UserWarning, match="rests on"):
        out = build_domain(*files, tmp_path / "bundle", chat)
    # Two items a chunk: four sentences of each without a prompt, then four under prompts.
    assert asked == [8, 8, 8]
    assert wanted[0] == 8
    assert wanted[: ITEMS - 3] == [8] * (ITEMS - 3)
    assert not (out / "lm").exists()
    said = Bundle.open(out).info.language_model
    assert (said["source"], said["chat_template"], said["pad_token"]) == (str(model), True, "[eos]")
    assert Bundle.open(out).language_model.chat_template
    env = gym.make("OffPrompts-MovieLens-v0", bundle=str(out))
    env.reset(seed=0)
    assert env.step(0)[4]["sentence"]


@pytest.mark.filterwarnings("ignore:.*rests on")
def test_a_domain_whose_sentences_a_server_writes(tmp_path: Path, settings: DomainConfig) -> None:
    """Built and played with nothing of the model here; the bundle knows where it is asked, and as what."""
    files = [write_domain(tmp_path / "files") / name for name in FILES]
    with FakeModel() as server:
        config = replace(settings, lm=server.url, served_model="fake", chat_template=True)
        bundle = Bundle.open(build_domain(*files, tmp_path / "bundle", config))
        assert not (bundle.directory / "lm").exists()
        assert (bundle.server.url, bundle.server.model, bundle.server.chat) == (server.url, "fake", True)
        with pytest.raises(BundleError, match=r"a server writes its sentences; ask bundle\.writer"):
            _ = bundle.language_model
        asked = len(server.completions)
        assert asked >= ITEMS * (4 + 4)
        env = gym.make("OffPrompts-MovieLens-v0", bundle=str(bundle.directory))
        log = op.collect(env, UniformPolicy(3), 8, tmp_path / "log", seed=0, progress=False)
        assert set(log.sentence) <= {sentence_of(r.prompt, r.json.get("seed")) for r in server.completions}
        assert env.spec.nondeterministic
        assert "fake" in log.metadata.notes
        # References are those of the bundle: nothing is asked for but the eight sentences and the probe.
        assert len(server.completions) - asked <= 8 + 2
    with pytest.raises(ConfigError, match="served_model: expected the name of the model"):
        replace(settings, lm="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="and none otherwise"):
        replace(settings, served_model="fake")


def test_new_process_finds_it_by_module(bundle: Path, tmp_path: Path) -> None:
    line = f"from offprompts_env.domain import register_domain\nregister_domain('Shop-v0', {str(bundle)!r})\n"
    (tmp_path / "own_shop.py").write_text(line, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    words = ["-m", "agents.cli", "record", "own_shop:Shop-v0", "--n", "6", "--out", str(tmp_path / "log")]
    subprocess.run([sys.executable, *words], env={**os.environ, "PYTHONPATH": paths}, check=True, capture_output=True)
    assert op.LoggedDataset.load(tmp_path / "log").metadata.env_id == "Shop-v0"


def test_command_names_what_it_does_not_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "no_such_module:Shop-v0", "--out", str(tmp_path / "log")]) == 1
    assert "no_such_module" in capsys.readouterr().err


def test_mean_auc_is_over_splits() -> None:
    assert mean_auc([{"user": {"auc": 0.6}}, {"user": {"auc": 0.8}}]) == pytest.approx(0.7)
