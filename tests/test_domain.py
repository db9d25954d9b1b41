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
from offprompts_env.domain.envs import DomainEnv
from offprompts_env.domain.tables import ReactionRule, read_domain
from offprompts_env.errors import ConfigError, DataError, ServerError
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.pipeline.reward import SimulatorConfig
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import CausalLM
from tests import tiny_models
from tests.text.fault_proxy import FakeModel, Response

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
        ("keywords.txt", "one\none\n", "each prompt once"),
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


# ---- files of a new user


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.csv", "item_id;title\n1;soup\n", r"separated by commas, got ';' between them in 'item_id;title'"),
        ("items.csv", "item_id,title,title\n1,soup,pie\n", "expected each column once, got 'title' twice"),
        ("items.csv", "item_id,title\n1,soup\n".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("items.csv", "item_id,title\n1,soup\n2,pur\xe9e\n".encode("latin-1"), r"in line 3; .* -f latin1 -t utf-8"),
        ("interactions.csv", "user_id,item_id,rating\na,00001,3\nb,00002,3\n", "expected ratings that differ, got 3"),
        ("interactions.csv", "user_id,item_id,rating\na,00001,1\na,00002,5\n", "two or more users, got 'a' only"),
        ("keywords.txt", "chilli\nhoney\nchilli\n", "expected each prompt once, got 'chilli' 2 times"),
        ("keywords.txt", "chilli\n", "expected two or more prompts, got 1"),
        ("keywords.txt", "\n \n", "expected two or more prompts, got 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write_domain(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_an_empty_keyword_is_named_by_its_row(tmp_path: Path) -> None:
    write_domain(tmp_path)
    (tmp_path / "keywords.csv").write_text('keyword,kind\nchilli,hot\n" ",none\nhoney,sweet\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"keywords\.csv, row 3: expected a prompt, got nothing"):
        read_domain(tmp_path / FILES[0], tmp_path / FILES[1], tmp_path / "keywords.csv", ReactionRule())


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path: Path, end: str) -> None:
    """What str.splitlines() takes for one cut titles and prompts in two."""
    write_domain(tmp_path)
    items = (tmp_path / "items.csv").read_text(encoding="utf-8")
    (tmp_path / "items.csv").write_text(items.replace("w3 w4", f"w3{end}w4"), encoding="utf-8")
    (tmp_path / "keywords.txt").write_bytes(f"w20{end}w21\r\nw22\rw23\n".encode())
    tables = read(tmp_path)
    assert tables.texts[3] == f"w3{end}w4"
    assert tables.prompts == (f"w20{end}w21", "w22", "w23")


# ---- other language models


def quick_build(folder: Path, config: DomainConfig) -> Path:
    files = write_domain(folder)
    with pytest.warns(UserWarning, match="rests on .* reactions only"):
        return build_domain(*(files / name for name in FILES), folder / "bundle", config)


def play(bundle: Path) -> list[str]:
    """What is said in three rounds."""
    env = DomainEnv(bundle=str(bundle))
    said = []
    for seed in range(3):
        env.reset(seed=seed)
        said.append(env.step(seed)[4]["sentence"])
    return said


def test_a_model_behind_a_server_writes_the_sentences(
    tmp_path: Path, settings: DomainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-canary-0123")
    with FakeModel() as server:
        ask = {"model": "fake", "api_key_env": "MY_KEY"}
        bundle = quick_build(tmp_path, replace(settings, lm=server.url, server=ask, chat_template=True))
        assert {request.path for request in server.completions} == {"/v1/chat/completions"}
        before = len(server.completions)
        said = play(bundle)
        asked = server.completions[before:]
    assert {sentence[0] for sentence in said} == {"w"}
    # The reference sentences are those of the bundle: only the three rounds are asked for.
    assert all(f" w2 w{20 + k} w3" in request.prompt for k, request in enumerate(asked))
    assert len(asked) == 3
    assert not (bundle / "lm").exists()
    assert Bundle.open(bundle).info.language_model["server"] == {"url": server.url, **ask}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-canary" not in path.read_bytes()


def test_a_build_that_a_server_stopped_asks_for_the_rest_only(tmp_path: Path, settings: DomainConfig) -> None:
    files = [write_domain(tmp_path) / name for name in FILES]
    with FakeModel(say=lambda n, request: Response(status=401) if n == 60 else None) as server:
        config = replace(settings, lm=server.url, server={"model": "fake", "concurrency": 1})
        monkey = pytest.MonkeyPatch()
        monkey.setattr("offprompts_env.domain.build._CHUNK", 3)
        with monkey.context(), pytest.raises(ServerError, match="status 401"):
            build_domain(*files, tmp_path / "bundle", config)
        first = len(server.completions)
        with monkey.context(), pytest.warns(UserWarning, match="rests on"):
            build_domain(*files, tmp_path / "bundle", config)
        monkey.undo()
        # Two chunks of 3 items were whole, 24 sentences each, and the third had begun.
        asked = [(request.prompt, request.json["seed"]) for request in server.completions]
    assert first == 61
    assert set(asked[:48]).isdisjoint(asked[first:])
    assert set(asked[60:first]) <= set(asked[first:])
    with FakeModel() as server:
        config = replace(settings, lm=server.url, server={"model": "fake"})
        whole = quick_build(tmp_path / "whole", config)
    assert (whole / "no_prompt.csv").read_bytes() == (tmp_path / "bundle" / "no_prompt.csv").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lm": "http://127.0.0.1:1/v1"}, "expected the name of a model on the server, got none"),
        ({"lm": "http://127.0.0.1:1/v1", "server": {"model": "m", "modle": 1}}, "modle"),
        ({"server": {"model": "m"}}, "expected none beside a model in process"),
        ({"lm": "http://127.0.0.1:1/v1", "model_kwargs": {"a": 1}}, "expected a model in process beside it"),
        ({"model_kwargs": {"revision": "x"}}, "pass revision="),
    ],
)
def test_servers_that_do_not_fit_are_refused(settings: DomainConfig, changed: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(settings, **changed).asked_server()


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (None, "expected the name of a model on the server"),
        ("model", "--server: expected a JSON object"),
        ('["model"]', "--server: expected a JSON object"),
        ('{"model": "fake", "attempts": 0}', "attempts"),
        ('{"model": "fake", "attempts": 1}', "127.0.0.1:1"),
    ],
)
def test_the_command_takes_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: str | None, message: str
) -> None:
    files = [str(write_domain(tmp_path) / name) for name in FILES]
    words = [word for pair in zip(("--items", "--interactions", "--keywords"), files, strict=True) for word in pair]
    words += ["--out", str(tmp_path / "bundle"), "--lm", "http://127.0.0.1:1/v1", "--template", "{query} {prompt}"]
    words += ["--template-without-prompt", "{query}", *([] if server is None else ["--server", server])]
    assert main(["build-domain", *words]) in (1, 2)
    assert message in capsys.readouterr().err
