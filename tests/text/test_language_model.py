"""The sampler against Hugging Face's own, and the contract that row i depends on prompt i and uniforms i only."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.logits_process import TopPLogitsWarper

from offprompts_env.errors import ConfigError, DataError, MissingDependencyError, ModelError, NumericalError
from offprompts_env.text.decoding import Decoding, choose, truncated_weights
from offprompts_env.text.language_model import CausalLM, LanguageModel, row_uniforms
from offprompts_env.text.loading import check_model_kwargs
from offprompts_env.text.tokens import TokenCount
from tests import tiny_models

EQUAL_LENGTH = ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9"]
RAGGED = ["w1", "w4 w5 w6 w7 w8 w9 w10", "w7 w8 w9", "w1 w30", "w7 w8 w9"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return getattr(tiny_models, request.param)()


@pytest.fixture(scope="module")
def tokens():
    return tiny_models.tokenizer()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("prompts", [EQUAL_LENGTH, RAGGED], ids=["unpadded", "padded"])
def test_greedy_equals_hugging_face(model, tokens, prompts):
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=12, greedy=True))
    tokens.padding_side = "left"
    batch = tokens(prompts, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    reference = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    assert lm.generate(prompts, rng()) == tokens.batch_decode(reference, skip_special_tokens=True)


def test_tokens_are_counted(model, tokens):
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=12, greedy=True), batch_size=2)
    tokens.padding_side = "left"
    read = [len(ids) for ids in tokens(RAGGED)["input_ids"]]
    written = 0
    for prompt in RAGGED:
        batch = tokens([prompt], return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        new = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
        written += int((new != model.generation_config.eos_token_id).sum())
    lm.generate(RAGGED, rng())
    assert lm.tokens == TokenCount(sum(read), written, len(RAGGED))
    # Each sentence counts its prompt, also where equal ones are read once.
    lm.generate([RAGGED[0]] * 3, rng())
    assert lm.tokens.read == sum(read) + 3 * read[0]
    assert lm.tokens.sentences == len(RAGGED) + 3


def test_row_depends_on_its_own_prompt_and_uniforms_only(model, tokens):
    prompts = [f"w{i} w{(3 * i) % 40} w2"[: 6 + i % 3] for i in range(24)]
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16))
    together = lm.generate(prompts, [rng(i) for i in range(24)])
    alone = [lm.generate([prompt], [rng(i)])[0] for i, prompt in enumerate(prompts)]
    backwards = lm.generate(prompts[::-1], [rng(i) for i in range(24)][::-1])[::-1]
    small = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16), batch_size=5)
    assert together == alone == backwards == small.generate(prompts, [rng(i) for i in range(24)])
    assert len(set(together)) > 12

    # One generator for all: changing prompt 3 leaves every other sentence as it was.
    first = lm.generate(prompts, rng(5))
    changed = lm.generate([*prompts[:3], "w9 w9 w9 w9", *prompts[4:]], rng(5))
    assert [i for i in range(24) if first[i] != changed[i]] == [3]


def test_same_call_twice_is_identical_and_global_state_untouched(model, tokens):
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=8))

    def shared():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002

    before = shared()
    assert lm.generate(RAGGED, rng(1)) == lm.generate(RAGGED, rng(1)) != lm.generate(RAGGED, rng(2))
    assert shared() == before
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_equal_prompts_get_different_sentences(model, tokens):
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16))
    assert len(set(lm.generate(["w1 w2"] * 16, rng()))) > 8


def test_uniforms_of_a_row_do_not_depend_on_the_number_of_rows():
    assert np.array_equal(row_uniforms(rng(), 3, 7), row_uniforms(rng(), 9, 7)[:3])
    with pytest.raises(DataError, match="expected one generator, or 3"):
        row_uniforms([rng()], 3, 7)


def test_first_token_frequencies_are_the_models_probabilities(tokens):
    model = tiny_models.llama()
    ids = tokens("w1 w2", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        truth = model(input_ids=ids).logits[0, -1].softmax(-1).numpy()
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=1), batch_size=4096)
    drawn = [t[0] if t else 1 for t in (tokens.encode(s) for s in lm.generate(["w1 w2"] * 20_000, rng()))]
    found = np.bincount(drawn, minlength=43) / 20_000
    # Special tokens vanish from the text; all other frequencies are within five standard errors.
    error = np.sqrt(truth * (1 - truth) / 20_000)
    assert (np.abs(found - truth)[3:] < 5 * error[3:] + 1e-12).all()


@pytest.mark.parametrize(
    ("decoding", "warpers"),
    [
        (Decoding(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Decoding(top_k=5), [TopKLogitsWarper(5)]),
        (Decoding(top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Decoding(top_p=0.01), [TopPLogitsWarper(0.01)]),
        (Decoding(min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            Decoding(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=["temperature", "top_k", "top_p", "tiny top_p", "min_p", "all"],
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_truncation_equals_hugging_faces_warpers(decoding, warpers, spread):
    logits = torch.from_numpy(rng(3).normal(size=(50, 300)).astype(np.float32)) * spread
    expected = LogitsProcessorList(warpers)(torch.zeros(50, 1, dtype=torch.long), logits.clone()).softmax(-1)
    weights = truncated_weights(logits, decoding)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), expected, atol=1e-6)


def test_inverse_cdf_at_its_edges():
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.5, 0.0]])).expand(3, 4)
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert choose(logits, torch.tensor([0.0, 0.5, below_one]), Decoding()).tolist() == [1, 2, 2]


def test_stop_string_cuts_before_it(tokens):
    model = tiny_models.llama()
    free = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16)).generate(["w1 w2"] * 8, rng())
    stop = free[0].split()[3]
    cut = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16, stop=(stop,))).generate(["w1 w2"] * 8, rng())
    assert cut == [text.split(stop)[0].strip() for text in free]
    assert cut[0] != free[0]


@pytest.mark.parametrize("stop", [("w9 w3",), ("3", "w9"), ("w1w", "never"), (" w4 w5",)])
def test_stop_strings_that_straddle_tokens_stop_at_the_first(model, tokens, stop):
    free = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=24))
    stopped = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=24, stop=stop))
    prompts = [f"w{i} w{i + 1}" for i in range(40)]
    cut = free.generate(prompts, rng(3))
    for text in stop:
        cut = [sentence.split(text, 1)[0].strip() for sentence in cut]
    assert stopped.generate(prompts, rng(3)) == cut


def test_a_budget_of_tokens_changes_no_sentence(model, tokens):
    prompts = [" ".join(f"w{(i * j) % 40}" for j in range(1 + 5 * (i % 4))) for i in range(30)]
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=8))
    small = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=8), max_batch_tokens=60)
    widths: list[tuple[int, int]] = []
    carry_on = small._continue

    def watched(distinct, which, uniforms):
        widths.append((len(which), max(map(len, distinct)) + 8))
        return carry_on(distinct, which, uniforms)

    small._continue = watched
    assert small.generate(prompts, rng()) == lm.generate(prompts, rng())
    assert all(rows == 1 or rows * width <= 60 for rows, width in widths)
    assert max(rows for rows, _ in widths) > 3
    assert sum(rows for rows, _ in widths) == 30
    alone = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=8), max_batch_tokens=1)
    assert alone.generate(prompts, rng()) == lm.generate(prompts, rng())


def prefixed(queries: int = 3, each: int = 12) -> list[str]:
    """Prompts about some queries, in an order that mixes them; those of one query share 18 tokens, all share 8."""
    head = " ".join(f"w{i}" for i in range(8))
    about = [" ".join(f"w{(7 * i + query) % 40}" for i in range(10)) for query in range(queries)]
    tails = [" ".join(f"w{(3 * i + 5 * row) % 40}" for i in range(1 + row % 4)) for row in range(each)]
    return [f"{head} {about[query]} {tail} w{row}" for row, tail in enumerate(tails) for query in range(queries)]


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=9, greedy=True), Decoding(max_new_tokens=9, top_p=0.9)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen2"])
def test_what_prompts_share_is_read_once(name, tokens, decoding, monkeypatch):
    model = getattr(tiny_models, name)()
    apart, lm = (CausalLM(model, tokens, decoding=decoding, batch_size=12) for _ in range(2))
    apart._shares = False
    read: dict[CausalLM, int] = {apart: 0, lm: 0}

    def count(which):
        forward = which._forward

        def counted(ids, mask, positions, cache):
            read[which] += ids.numel() if ids.shape[1] > 1 or mask.shape[1] == 1 else 0
            return forward(ids, mask, positions, cache)

        which._forward = counted

    count(apart)
    count(lm)
    prompts = prefixed()
    assert lm.generate(prompts, rng()) == apart.generate(prompts, rng())
    # Three batches: by length, or one a query of 18 shared tokens and 12 rows of at most 5 tokens of their own.
    assert read == {apart: 12 * (21 + 22 + 23), lm: 3 * (18 + 12 * 5)}
    # Too little is not worth a pass of its own.
    read[lm] = 0
    lm.generate(prompts[:3], rng())
    assert read[lm] == 3 * 20


@pytest.mark.parametrize("name", ["mistral", "mistral_with_window"])
def test_windows_read_all_of_each_prompt(name, tokens):
    """A window of 12 tokens over prompts of 23: what is outside it must be what it is for Hugging Face."""
    model = getattr(tiny_models, name)()
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=9, greedy=True))
    assert lm._shares == (name == "mistral")
    written = [tokens(prompt, return_tensors="pt")["input_ids"] for prompt in prefixed()]
    reference = [model.generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :] for ids in written]
    assert lm.generate(prefixed(), rng()) == tokens.batch_decode(reference, skip_special_tokens=True)


def test_stop_patterns(tokens):
    prompts = [f"w{i} w{i + 1}" for i in range(30)]
    free = CausalLM(tiny_models.llama(), tokens, decoding=Decoding(max_new_tokens=24)).generate(prompts, rng(3))
    for pattern in (r"w1\d\b", r"\b(w\d+) \1\b", r"(?<=w3 )w", r"^w\d$"):
        decoding = Decoding(max_new_tokens=24, stop_patterns=pattern)
        lm = CausalLM(tiny_models.llama(), tokens, decoding=decoding)
        assert lm.generate(prompts, rng(3)) == [_first_cut(text, pattern) for text in free]
    # A digest names patterns where there are some, and is what it was before there were any otherwise.
    assert repr(Decoding()) == (
        "Decoding(max_new_tokens=48, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, greedy=False, stop=())"
    )
    assert "stop_patterns=('x',)" in repr(Decoding(stop_patterns="x"))
    assert Decoding.from_mapping(Decoding(stop_patterns="x").to_mapping()) == Decoding(stop_patterns="x")
    with pytest.raises(ConfigError, match=r"stop_patterns: expected regular expressions, got '\(': missing"):
        Decoding(stop_patterns="(")
    with pytest.raises(ConfigError, match="matches the empty text"):
        Decoding(stop_patterns="x*")


def _first_cut(text: str, pattern: str) -> str:
    """Cut `text` where `pattern` is first seen as it grows by a word."""
    words = text.split()
    for n in range(1, len(words) + 1):
        grown = " ".join(words[:n])
        if (found := re.search(pattern, grown)) is not None:
            return grown[: found.start()].strip()
    return text


def test_a_batch_that_does_not_fit_into_memory_is_done_in_halves(model, tokens, monkeypatch):
    prompts = [f"w{i} w{i % 7}" for i in range(20)]
    lm = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=8))
    expected = lm.generate(prompts, rng())
    carry_on, tried = lm._continue, []

    def tight(distinct, which, uniforms):
        tried.append(len(which))
        if len(which) > most:
            raise torch.OutOfMemoryError("no room")
        return carry_on(distinct, which, uniforms)

    monkeypatch.setattr(lm, "_continue", tight)
    most = 6
    assert lm.generate(prompts, rng()) == expected
    assert tried == [20, 10, 5, 5, 5, 5]
    # What did not fit is not tried again.
    assert lm.generate(prompts, rng()) == expected
    assert tried[6:] == [5, 5, 5, 5]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate(prompts, rng())


def test_device_map(tmp_path, tokens, monkeypatch):
    tiny_models.llama().save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    plain = CausalLM.from_pretrained(tmp_path)
    spread = CausalLM.from_pretrained(tmp_path, device_map="auto")
    assert spread.fingerprint == plain.fingerprint
    assert spread.generate(EQUAL_LENGTH, rng()) == plain.generate(EQUAL_LENGTH, rng())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"device_map or a quantized model needs .*offprompts-env\[accelerate\]"
    ):
        CausalLM.from_pretrained(tmp_path, device_map="auto")


@pytest.fixture
def folder(tmp_path, tokens):
    tiny_models.llama().save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    return tmp_path


def test_further_arguments_of_loading(folder):
    plain = CausalLM.from_pretrained(folder)
    eager = CausalLM.from_pretrained(folder, model_kwargs={"attn_implementation": "eager"})
    assert (plain.model.config._attn_implementation, eager.model.config._attn_implementation) == ("sdpa", "eager")
    assert eager.generate(RAGGED, rng()) == plain.generate(RAGGED, rng())
    assert eager.fingerprint == plain.fingerprint


@pytest.mark.parametrize("how", ["by name", "by size"])
def test_a_model_is_spread_by_the_callers_word(folder, how):
    aside = str(folder / "aside")
    if how == "by name":
        parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        given = {"device_map": {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}}
        more = {}
    else:
        # Room for the embedding and hardly more.
        given, more = {"device_map": "sequential"}, {"max_memory": {"cpu": 20_000}}
    spread = CausalLM.from_pretrained(folder, **given, model_kwargs={"offload_folder": aside, **more})
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    plain = CausalLM.from_pretrained(folder)
    assert spread.generate(RAGGED, rng()) == plain.generate(RAGGED, rng())
    assert spread.fingerprint == plain.fingerprint


def test_accelerators_are_numbers_that_json_has_as_texts():
    given = {"max_memory": {"0": "20GiB", 1: "8GiB", "cpu": "1GiB"}}
    assert check_model_kwargs(given) == {"max_memory": {0: "20GiB", 1: "8GiB", "cpu": "1GiB"}}


@pytest.mark.parametrize("where", ["argument", "checkpoint"])
def test_quantized_weights_are_loaded_to_where_they_compute(folder, monkeypatch, where):
    asked, quantized = [], {"quant_method": "x", "bits": 4}

    def loaded(name, **given):
        asked.append(given)
        model = tiny_models.llama()
        # Most of what is quantized cannot be moved.
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("moved"))
        return model

    if where == "checkpoint":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}))
    more = {"quantization_config": quantized} if where == "argument" else None
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    CausalLM.from_pretrained(folder, model_kwargs=more)
    CausalLM.from_pretrained(folder, model_kwargs=more, device_map="auto")
    assert [given["device_map"] for given in asked] == [{"": "cpu"}, "auto"]
    assert [given.get("quantization_config") for given in asked] == [more and quantized] * 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="a quantized model needs"):
        CausalLM.from_pretrained(folder, model_kwargs=more)


def test_how_weights_are_quantized_is_part_of_the_fingerprint(tokens):
    plain, found = tiny_models.llama(), set()
    for threshold in (None, 6.0, 3.0):
        if threshold is not None:
            plain.config.quantization_config = {"quant_method": "x", "threshold": threshold}
        found.add(CausalLM(plain, tokens).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([("a", 1)], ConfigError, "model_kwargs: expected names and values, such as"),
        ({3: 1}, ConfigError, "model_kwargs: expected names and values"),
        ({"torch_dtype": "float16"}, ConfigError, "got 'torch_dtype'; pass dtype="),
        ({"device_map": "auto"}, ConfigError, "pass device_map="),
        ({"trust_remote_code": True}, ConfigError, "no code that comes with a model is run"),
        ({"quantization_config": object()}, ConfigError, "expected values that JSON can hold"),
        ({"allow_all_kernels": True}, ConfigError, "no code that comes with a model is run"),
        ({"attn_implementation": "someone/kernel"}, ConfigError, "no code that comes from there is run"),
        ({"output_loading_info": True}, ConfigError, "leave it out"),
        ({"_from_auto": True}, ConfigError, "leave it out"),
        ({"max_memory": {"cpu": "1GiB"}}, ConfigError, "max_memory says how layers are spread; pass device_map too"),
        ({"attn_implementation": "nope"}, ModelError, r"with {'attn_implementation': 'nope'}: .*check these arguments"),
        ({"nonsense": 3}, ModelError, r"with {'nonsense': 3}: .*unexpected keyword argument 'nonsense'"),
        ({"quantization_config": {"load_in_9bit": True}}, ModelError, "quant_method"),
        ({"quantization_config": {"quant_method": "fp8"}}, ModelError, "check these arguments"),
    ],
)
def test_arguments_of_loading_that_do_not_fit(folder, given, error, message):
    with pytest.raises(error, match=message):
        CausalLM.from_pretrained(folder, model_kwargs=given)


@pytest.mark.parametrize("device_map", [{"": 0}, {"": "cuda:0"}])
def test_devices_that_are_not_there(folder, device_map):
    with pytest.raises(ModelError, match="check these arguments"):
        CausalLM.from_pretrained(folder, device_map=device_map)


def test_a_map_of_devices_is_text_or_a_mapping(folder):
    with pytest.raises(ConfigError, match=r"device_map: expected 'auto' or modules and their devices, got \['cpu'\]"):
        CausalLM.from_pretrained(folder, device_map=["cpu"])


@pytest.mark.parametrize("aside", [("model.layers.1",), ("model.embed_tokens", "model.layers.0", "lm_head")])
def test_layers_put_aside(tmp_path, tokens, aside):
    tiny_models.llama().save_pretrained(tmp_path / "lm")
    tokens.save_pretrained(tmp_path / "lm")
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {part: "disk" if part in aside else "cpu" for part in parts}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "lm", device_map=places, offload_folder=tmp_path / "aside")
    assert any(parameter.is_meta for parameter in model.parameters())
    decoding = Decoding(max_new_tokens=8)
    lm = CausalLM(model, tokens, decoding=decoding)
    plain = CausalLM.from_pretrained(tmp_path / "lm", decoding=decoding)
    assert lm.generate(RAGGED, rng()) == plain.generate(RAGGED, rng())
    assert lm.fingerprint == plain.fingerprint


def test_end_tokens_come_from_the_generation_settings(tokens):
    model = tiny_models.llama()
    free = CausalLM(model, tokens, decoding=Decoding(max_new_tokens=16)).generate(["w1 w2"] * 8, rng())
    end = free[0].split()[2]
    stopping = copy.deepcopy(model)
    stopping.generation_config.eos_token_id = [1, tokens.convert_tokens_to_ids(end)]
    cut = CausalLM(stopping, tokens, decoding=Decoding(max_new_tokens=16)).generate(["w1 w2"] * 8, rng())
    assert [c.split() for c in cut] == [
        f.split()[: f.split().index(end)] if end in f.split() else f.split() for f in free
    ]


def test_fingerprint_names_weights_and_decoding(tokens):
    model = tiny_models.llama()
    lm = CausalLM(model, tokens)
    assert isinstance(lm, LanguageModel)
    assert lm.fingerprint == CausalLM(tiny_models.llama(), tokens).fingerprint
    assert lm.fingerprint != CausalLM(model, tokens, decoding=Decoding(temperature=0.5)).fingerprint
    other = copy.deepcopy(model)
    other.lm_head.weight.data[0, 0] += 1
    assert lm.fingerprint != CausalLM(other, tokens).fingerprint
    assert CausalLM(model, tokens, decoding=Decoding(greedy=True)).deterministic
    assert not lm.deterministic


def test_chat_template_wraps_the_prompt(tokens):
    chatty = copy.deepcopy(tokens)
    chatty.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"
    settings = Decoding(max_new_tokens=6, greedy=True)
    chat = CausalLM(tiny_models.llama(), chatty, decoding=settings, chat_template=True)
    plain = CausalLM(tiny_models.llama(), tokens, decoding=settings)
    assert chat.generate(["w1"], rng()) == plain.generate(["w5 w1 w6"], rng())
    with pytest.raises(ModelError, match="chat_template"):
        CausalLM(tiny_models.llama(), tokens, chat_template=True)


def test_missing_pad_token_is_named_with_its_remedy():
    bare = tiny_models.tokenizer(pad=False)
    with pytest.raises(ModelError, match=r"no pad token.*pad_token='\[eos\]'"):
        CausalLM(tiny_models.llama(), bare)
    settings = Decoding(max_new_tokens=6)
    mended = CausalLM(tiny_models.llama(), bare, pad_token="[eos]", decoding=settings)
    padded = CausalLM(tiny_models.llama(), tiny_models.tokenizer(), decoding=settings)
    # "[pad]" is an ordinary word to the tokenizer that does not name it.
    words = [[word for word in text.split() if word != "[pad]"] for text in mended.generate(RAGGED, rng())]
    assert words == [text.split() for text in padded.generate(RAGGED, rng())]
    with pytest.raises(ModelError, match="not a token"):
        CausalLM(tiny_models.llama(), bare, pad_token="nonsense")


def test_from_pretrained_reads_a_directory(tmp_path, tokens):
    model = tiny_models.llama()
    model.half().save_pretrained(tmp_path / "lm")
    tokens.save_pretrained(tmp_path / "lm")
    lm = CausalLM.from_pretrained(tmp_path / "lm", decoding=Decoding(max_new_tokens=4))
    assert lm.model.dtype == torch.float32
    assert lm.generate(["w1 w2"], rng())[0]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all"])
def test_missing_directory(source):
    with pytest.raises(ModelError, match="expected a directory at"):
        CausalLM.from_pretrained(source)


def test_hub_id_without_hub(monkeypatch, tmp_path):
    import transformers

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match="hub has no such id or cannot be reached"):
        CausalLM.from_pretrained("someone/some-model")
    with pytest.raises(ModelError, match="not a complete model"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [" ", "", 3, ["w1"]])
def test_blank_prompts(tokens, wrong):
    with pytest.raises(DataError, match=r"expected non-blank text, got .* at position 1"):
        CausalLM(tiny_models.llama(), tokens).generate(["w1", wrong], rng())


def test_no_prompts_give_no_sentences(tokens):
    assert CausalLM(tiny_models.llama(), tokens).generate([], rng()) == []


def test_prompt_that_does_not_fit(tokens):
    lm = CausalLM(tiny_models.llama(room=16), tokens, decoding=Decoding(max_new_tokens=10))
    with pytest.raises(ModelError, match=r"at most 16 tokens.* has 7"):
        lm.generate(["w1", "w1 " * 7], rng())


@pytest.mark.parametrize("greedy", [False, True])
def test_nan_logits(tokens, greedy):
    broken = tiny_models.llama()
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NumericalError, match="finite logits"):
        CausalLM(broken, tokens, decoding=Decoding(greedy=greedy)).generate(["w1"], rng())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"stop": ("",)},
    ],
)
def test_decoding_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Decoding(**wrong)


def test_decoding_as_mapping():
    decoding = Decoding(top_k=3, stop=(".",))
    assert Decoding.from_mapping(decoding.to_mapping()) == decoding
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        Decoding.from_mapping({"temprature": 1.0})


@pytest.mark.parametrize(("name", "value"), [("device", "cuad"), ("dtype", "float31")])
def test_unknown_device_and_dtype(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name):
        CausalLM.from_pretrained(tmp_path, **{name: value})
