"""An asset bundle of random models: five users, six movies, eight keywords. It has the form of a real one."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from offprompts_env.movielens.bundle import BundleInfo, write_manifest
from offprompts_env.movielens.collaborative import CollaborativeModel
from offprompts_env.movielens.simulator import HeadConfig, LikeSimulator
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import PCAEncoder, TextEncoder
from offprompts_env.text.language_model import CausalLM
from offprompts_env.text.prompted import PromptFormatter
from tests import tiny_models

TITLES = tuple(f"w{i} w{i + 1} (19{70 + i})" for i in range(6))
KEYWORDS = tuple(f"w{20 + i}" for i in range(8))
FORMATTER = PromptFormatter("w1 {query} w2 {prompt} w3", "w1 {query} w3")
DECODING = {"max_new_tokens": 8, "temperature": 0.9}
USERS, CONTEXT_DIM, OUTPUT_DIM, SAMPLES = 5, 3, 4, 4


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def make_tiny_bundle(directory: Path) -> Path:
    """Write the bundle into `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = tiny_models.tokenizer()
    lm_network, encoder_network = tiny_models.llama(), tiny_models.distilbert()
    lm_network.save_pretrained(directory / "lm")
    tokens.save_pretrained(directory / "lm")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        simulator = LikeSimulator(encoder_network, tokens, HeadConfig(d_x=CONTEXT_DIM, d_b=16, width=8, hidden=8))
        for parameter in simulator.head.parameters():
            parameter.data.mul_(3.0)
    simulator.save(directory / "simulator")

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(USERS, CONTEXT_DIM)).astype(np.float32)
    save_file({"ids": 100 + np.arange(USERS), "vectors": vectors}, directory / "users.safetensors")
    items = [(200 + i, title, "Drama|War", 1970 + i) for i, title in enumerate(TITLES)]
    write_csv(directory / "items.csv", ("item_id", "title", "genres", "year"), items)
    write_csv(directory / "keywords.csv", ("keyword", "kind", "group"), [(word, "noun", "war") for word in KEYWORDS])

    lm = CausalLM(lm_network, tokens, decoding=Decoding.from_mapping(DECODING))
    requests = [FORMATTER.ask(title) for title in TITLES for _ in range(SAMPLES)]
    sentences = lm.generate(requests, rng)
    rows = [(200 + i // SAMPLES, i % SAMPLES, sentence) for i, sentence in enumerate(sentences)]
    write_csv(directory / "no_prompt.csv", ("item_id", "sample", "sentence"), rows)

    states = TextEncoder(encoder_network, tokens)
    CollaborativeModel(
        item_ids=200 + np.arange(len(TITLES)),
        item_means=rng.normal(size=len(TITLES)).astype(np.float32),
        user_centre=np.zeros(CONTEXT_DIM, np.float32),
        user_factors=rng.normal(size=(CONTEXT_DIM, 2)).astype(np.float32),
        sentence_centre=states.encode(sentences).mean(axis=0),
        sentence_factors=rng.normal(size=(16, 2)).astype(np.float32),
        sentence_weights=rng.normal(size=16).astype(np.float32),
        offset=np.zeros(1, np.float32),
    ).save(directory / "collaborative.safetensors")
    language = TextEncoder(lm_network.base_model, tokens, pooling="last")
    fitted = {
        "sentence": (PCAEncoder.fit(states, sentences, OUTPUT_DIM), "../simulator"),
        "query": (PCAEncoder.fit(language, TITLES, 3, text_format="w1 {text}"), "../lm"),
        "prompt": (PCAEncoder.fit(language, KEYWORDS, 2), "../lm"),
    }
    for name, (encoder, model) in fitted.items():
        encoder.save(directory / "encoders", name, model=model)
    info = BundleInfo(
        name="tiny",
        template=FORMATTER.template,
        template_without_prompt=FORMATTER.template_without_prompt,
        decoding=DECODING,
        user_features=("Drama", "War", "1970s"),
    )
    write_manifest(directory, info)
    return directory
