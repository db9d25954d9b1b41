"""A bundle gives its pieces, shares its models, and names every file that is missing or differs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from offprompts_env.errors import BundleError, OffPromptsError
from offprompts_env.movielens.bundle import MANIFEST, Bundle, KeywordEntry, write_manifest
from tests import tiny_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_bundle.make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def test_pieces(made):
    bundle = Bundle.open(made)
    bundle.verify()
    assert bundle.info.name == "tiny"
    assert bundle.info.user_features == ("Drama", "War", "1970s")
    assert bundle.users.ids.tolist() == [100, 101, 102, 103, 104]
    assert bundle.users.vectors.shape == (5, 3)
    assert bundle.items.titles == tiny_bundle.TITLES
    assert bundle.items.genres[0] == ("Drama", "War")
    assert bundle.items.years.tolist() == [1970 + i for i in range(6)]
    assert bundle.keywords[0] == KeywordEntry("w20", "noun", "war")
    assert set(bundle.no_prompt_sentences) == set(tiny_bundle.TITLES)
    assert {len(sentences) for sentences in bundle.no_prompt_sentences.values()} == {4}
    assert bundle.formatter == tiny_bundle.FORMATTER
    assert bundle.decoding.max_new_tokens == 8
    assert bundle.encoder("query").encode(["w1 w2"]).shape == (1, 3)


def test_no_prompt_sentences_come_from_the_language_model(made):
    bundle = Bundle.open(made)
    requests = [bundle.formatter.ask(title) for title in bundle.items.titles for _ in range(4)]
    rng = np.random.default_rng(0)
    rng.normal(size=(5, 3))
    written = bundle.language_model.generate(requests, rng)
    assert [text for texts in bundle.no_prompt_sentences.values() for text in texts] == written


def test_models_are_shared(made):
    bundle = Bundle.open(made)
    assert bundle.encoder("sentence").encoder is bundle.reward_encoder
    assert bundle.encoder("query").encoder is bundle.encoder("prompt").encoder
    assert bundle.encoder("query").encoder.model is bundle.language_model.model.base_model
    sentences = ["w1 w2", "w3 w4 w5"]
    np.testing.assert_allclose(bundle.reward_encoder.encode(sentences), bundle.simulator.encode(sentences), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("users.safetensors", lambda bundle: bundle.users),
        ("items.csv", lambda bundle: bundle.items),
        ("keywords.csv", lambda bundle: bundle.keywords),
        ("no_prompt.csv", lambda bundle: bundle.no_prompt_sentences),
        ("lm/model.safetensors", lambda bundle: bundle.language_model),
        ("simulator/head.safetensors", lambda bundle: bundle.simulator),
        ("encoders/query.safetensors", lambda bundle: bundle.encoder("query")),
        ("encoders/prompt.json", lambda bundle: bundle.verify()),
    ],
)
def test_damaged_and_missing_files_are_named(copy, name, use):
    path = copy / name
    expected = json.loads((copy / MANIFEST).read_text())["files"][name]["sha256"]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}.*SHA-256 {expected}, found .* with SHA-256 (?!{expected}).*build"):
        use(Bundle.open(copy))
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name}.*expected {len(content)} bytes.*found {len(content) - 1} bytes"):
        use(Bundle.open(copy))
    path.unlink()
    with pytest.raises(BundleError, match=f"{name}.*SHA-256 {expected}, found no file"):
        use(Bundle.open(copy))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "items.csv",
            "item_id,title\n",
            r"items\.csv, row 0: expected item_id,title,genres,year and then rows, got \['item_id', ",
        ),
        ("items.csv", "item_id,title,genres,year\n1,A,B,x\n", r"row 1: .*got \['1', 'A', 'B', 'x'\].*build"),
        (
            "keywords.csv",
            "keyword,kind,group\na,b,c\na,b\n",
            r"keywords\.csv, row 2: expected keyword,.*got \['a', 'b'\]",
        ),
        ("keywords.csv", "keyword,kind,group\n", r"row 0: .* and then rows, got"),
        ("no_prompt.csv", "item_id,sample,sentence\n200,0,a\rb\n", r"no_prompt\.csv, row 2: .*got \['b'\]"),
        ("no_prompt.csv", "item_id,sample,sentence\n999,0,a\n", r"row 1: .*got \['999', '0', 'a'\] \(KeyError"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(copy, name, content, message):
    (copy / name).write_bytes(content.encode())
    write_manifest(copy, Bundle.open(copy).info)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=message):
        _ = bundle.items, bundle.keywords, bundle.no_prompt_sentences


def test_unknown_files(made):
    bundle = Bundle.open(made)
    with pytest.raises(BundleError, match="lists no file 'x'"):
        bundle.file("x")
    with pytest.raises(BundleError, match="lists no directory 'x'"):
        bundle.folder("x")


def test_missing_bundle(tmp_path, monkeypatch):
    with pytest.raises(BundleError, match=r"expected bundle.json in .*found none; build it again with .*build-assets"):
        Bundle.open(tmp_path)
    monkeypatch.setattr("offprompts_env.movielens.bundle._EMBEDDED", tmp_path)
    with pytest.raises(BundleError, match=r"found none; reinstall offprompts-env$"):
        Bundle.open()
    with pytest.raises(OffPromptsError, match=r"bundle\.json"):
        Bundle.open(tmp_path / "nowhere")


def test_newer_format(copy):
    described = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**described, "format_version": 2}))
    with pytest.raises(BundleError, match="format version 2, this package reads up to 1; update"):
        Bundle.open(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": "x"}'])
def test_damaged_manifest(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=r"cannot read .*bundle\.json"):
        Bundle.open(copy)


def test_embedded_bundle():
    bundle = Bundle.open()
    bundle.verify()
    assert sum(file["bytes"] for file in bundle.files.values()) <= 6e6
    # Embedding a sentence and judging it share one encoding.
    assert bundle.encoder("sentence").encoder is bundle.reward_encoder
    assert bundle.users.vectors.shape[1] == bundle.simulator.config.d_x == len(bundle.info.user_features)
    assert set(bundle.no_prompt_sentences) == set(bundle.items.titles)
    assert "LICENSE-MOVIELENS.txt" in bundle.files
    assert len({entry.text for entry in bundle.keywords}) == len(bundle.keywords)
