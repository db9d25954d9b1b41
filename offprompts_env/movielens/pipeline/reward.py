"""Training of the reward simulator on sentences of the language model, and its held-out figures.

The simulator never sees a title: all it knows about a movie is the sentence. Every epoch shows each reaction with a
fresh one of the movie's sampled sentences, in batches of movies, so that a sentence is encoded once for all its users.

User vectors are *cross-fitted*: a training reaction is paired with a vector that was fitted without its fold. A
vector that had seen the reaction would teach the simulator to trust vectors more than they deserve on new sentences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from offprompts_env.errors import DataError
from offprompts_env.movielens.grammar import Facts, Movie, describe, parse
from offprompts_env.movielens.lexicon import ERAS, GENRES, lexicon
from offprompts_env.movielens.pipeline.data import Benchmark, Reactions, user_vectors
from offprompts_env.movielens.simulator import HeadConfig, LikeSimulator, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SimulatorConfig:
    """Size and training of the reward simulator.

    ``encoder_*`` size the small DistilBERT; they are ignored where an existing encoder is used. ``pretraining_steps``
    teach the small encoder to read the grammar's facts. ``token_dropout`` hides tokens of sentences in training, so
    that the head listens to every part of a sentence. ``folds`` is the number of folds of the cross-fitting of user
    vectors. Early stopping keeps the epoch with the lowest log-loss on a share ``validation`` of the reactions;
    ``patience`` epochs without improvement end the training.
    """

    encoder_width: int = 128
    encoder_layers: int = 2
    encoder_heads: int = 4
    pooling: Pooling = "mean"
    pretraining_steps: int = 800
    epochs: int = 60
    patience: int = 10
    items_per_batch: int = 32
    learning_rate: float = 1.5e-3
    encoder_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    token_dropout: float = 0.3
    folds: int = 8
    validation: float = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Figures on reactions that training never saw: log-loss, area under the ROC curve, expected calibration error."""

    log_loss: float
    auc: float
    calibration_error: float


def make_small_simulator(
    config: SimulatorConfig, d_x: int, seed: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> LikeSimulator:
    """Return an untrained simulator on a small DistilBERT that reads by `tokenizer` (the grammar's pieces)."""
    from transformers import DistilBertConfig, DistilBertModel

    from offprompts_env.movielens.pipeline.language import make_tokenizer

    tokenizer = make_tokenizer([], 0) if tokenizer is None else tokenizer
    tokenizer.padding_side = "right"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = DistilBertModel(
            DistilBertConfig(
                vocab_size=len(tokenizer),
                dim=config.encoder_width,
                hidden_dim=3 * config.encoder_width,
                n_layers=config.encoder_layers,
                n_heads=config.encoder_heads,
                max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        return LikeSimulator(encoder, tokenizer, HeadConfig(d_x, config.encoder_width, pooling=config.pooling))


def pretrain_encoder(
    simulator: LikeSimulator,
    movies: Sequence[Movie],
    steps: int,
    seed: int,
    progress: Callable[[float], None] | None = None,
    batch_size: int = 96,
) -> None:
    """Teach the encoder of `simulator` (in place) what sentences of the grammar say.

    A linear layer reads from the pooled state which genres and eras are named or evoked by a keyword of theirs,
    popularity and reception; the loss is binary cross-entropy over all of them. A keyword of a genre thus comes to
    stand for its genre, as its name does. The layer is thrown away. ``progress(loss)`` is called after every step.
    """
    rng = np.random.default_rng(seed)
    keywords = lexicon()
    place = {group: index for index, group in enumerate((*GENRES, *ERAS))}
    group_of = {word.text: word.group for word in keywords}

    def target(facts: Facts) -> np.ndarray:
        row = np.zeros(len(place) + 7, dtype=np.float32)
        said = {*facts.genres, facts.era, *(group_of[word] for word in facts.keywords)}
        row[[place[group] for group in said if group in place]] = 1.0
        row[len(place) + facts.popularity] = 1.0
        row[len(place) + 3 + facts.reception] = 1.0
        return row

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = torch.nn.Linear(simulator.config.d_b, len(place) + 7)
        parameters = [*simulator.encoder.parameters(), *probe.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        attention = _fast_attention(simulator)
        simulator.encoder.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - step / steps)
            texts: list[str] = []
            targets: list[np.ndarray] = []
            while len(texts) < batch_size:
                movie = movies[int(rng.integers(len(movies)))]
                word = keywords[rng.integers(len(keywords))] if rng.random() < 0.5 else None
                text = "".join(describe(movie, word, rng)).strip()
                facts = parse(text)
                if facts is not None:
                    texts.append(text)
                    targets.append(target(facts))
            logits = probe(simulator.pooled(texts))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(np.stack(targets)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if progress is not None:
                progress(float(loss.detach()))
        simulator.encoder.set_attn_implementation(attention)
        simulator.encoder.eval()


@dataclass(frozen=True)
class Split:
    """Disjoint positions into the reactions: ``train``, ``validation`` and (perhaps empty) ``test``."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_reactions(n: int, config: SimulatorConfig, test: float, seed: int) -> Split:
    """Split `n` reactions at random: a share `test`, a share ``config.validation`` of the rest, and the rest."""
    order = np.random.default_rng(seed).permutation(n)
    n_test = round(test * n)
    n_validation = max(1, round(config.validation * (n - n_test)))
    return Split(
        train=order[n_test + n_validation :], validation=order[n_test : n_test + n_validation], test=order[:n_test]
    )


def train_simulator(
    simulator: LikeSimulator,
    benchmark: Benchmark,
    sentences: Sequence[Sequence[str]],
    split: Split,
    config: SimulatorConfig,
    seed: int,
    *,
    with_users: bool = True,
    progress: Callable[[float], None] | None = None,
) -> int:
    """Train `simulator` in place on ``split.train`` and return the epoch that was kept.

    ``sentences[item]`` are sampled sentences of each movie. ``with_users=False`` gives every user the zero vector, the
    reference that shows what knowing the user is worth. ``progress(validation log-loss)`` is called after every epoch.

    Raises `DataError` if a movie has no sentence.
    """
    if any(not samples for samples in sentences):
        raise DataError("expected at least one sentence for every movie, found none for some; generate them first")
    rng = np.random.default_rng(seed)
    reactions = benchmark.reactions
    train = reactions.take(split.train)
    vectors = (
        crossfitted_vectors(benchmark, split, config, rng) if with_users else np.zeros((len(train), _dim(benchmark)))
    )
    judging = held_out_vectors(benchmark, split, with_users=with_users)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if with_users:
            simulator.head.user_mean.copy_(torch.from_numpy(vectors.mean(axis=0)))
            simulator.head.user_scale.copy_(torch.from_numpy(vectors.std(axis=0) + 1e-6))
        device = simulator.head.user_mean.device
        user_tensor = torch.as_tensor(vectors, dtype=torch.float32, device=device)
        label_tensor = torch.as_tensor(train.liked, dtype=torch.float32, device=device)
        by_item = _group(train.items, len(benchmark.item_ids))
        optimizer = torch.optim.AdamW(
            [
                {"params": simulator.encoder.parameters(), "lr": config.encoder_learning_rate},
                {"params": simulator.head.parameters(), "lr": config.learning_rate},
            ],
            weight_decay=config.weight_decay,
        )
        items = np.unique(train.items)
        attention = _fast_attention(simulator)
        best, best_epoch, best_state = np.inf, -1, copy.deepcopy(simulator.state_dict())
        for epoch in range(config.epochs):
            simulator.train()
            for batch in np.array_split(rng.permutation(items), max(1, round(len(items) / config.items_per_batch))):
                texts = [sentences[item][int(rng.integers(len(sentences[item])))] for item in batch]
                rows = [by_item[item] for item in batch]
                which = torch.from_numpy(np.repeat(np.arange(len(batch)), [len(r) for r in rows])).to(device)
                index = torch.from_numpy(np.concatenate(rows)).to(device)
                logits = simulator(user_tensor[index], simulator.pooled(texts, config.token_dropout)[which])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label_tensor[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            figures = held_out(simulator, benchmark, sentences, split.validation, vectors=judging)
            if progress is not None:
                progress(figures.log_loss)
            if figures.log_loss < best:
                best, best_epoch, best_state = figures.log_loss, epoch, copy.deepcopy(simulator.state_dict())
            elif epoch - best_epoch >= config.patience:
                break
        simulator.load_state_dict(best_state)
    simulator.encoder.set_attn_implementation(attention)
    simulator.eval()
    return best_epoch


def crossfitted_vectors(
    benchmark: Benchmark, split: Split, config: SimulatorConfig, rng: np.random.Generator
) -> np.ndarray:
    """Return (n_train, d_x): for every training reaction its user's vector, fitted without the reaction's fold.

    Validation and test reactions are left out throughout.
    """
    n = len(benchmark.reactions)
    fold = rng.integers(config.folds, size=len(split.train))
    users = benchmark.reactions.users[split.train]
    vectors = np.zeros((len(split.train), _dim(benchmark)))
    for index in range(config.folds):
        excluded = np.zeros(n, dtype=bool)
        excluded[split.validation] = excluded[split.test] = True
        excluded[split.train[fold == index]] = True
        here = fold == index
        vectors[here] = user_vectors(benchmark, excluded)[users[here]]
    return vectors


def held_out_vectors(benchmark: Benchmark, split: Split, *, with_users: bool = True) -> np.ndarray:
    """Return user vectors fitted without validation and test reactions, (n_users, d_x); zeros without users."""
    if not with_users:
        return np.zeros((len(benchmark.user_ids), _dim(benchmark)))
    excluded = np.zeros(len(benchmark.reactions), dtype=bool)
    excluded[split.validation] = excluded[split.test] = True
    return user_vectors(benchmark, excluded)


def held_out(
    simulator: LikeSimulator,
    benchmark: Benchmark,
    sentences: Sequence[Sequence[str]],
    which: np.ndarray,
    *,
    vectors: np.ndarray,
    n_sentences: int = 1,
) -> HeldOut:
    """Return the figures on the reactions at `which`, from the mean probability over `n_sentences` sentences each.

    `vectors` are those of :func:`held_out_vectors`. One sentence: every reaction gets one of its movie's sentences
    (sentence number = position of the reaction modulo their number).
    """
    reactions: Reactions = benchmark.reactions.take(which)
    probability = np.zeros(len(reactions))
    for offset in range(n_sentences):
        texts = [
            sentences[item][(position + offset) % len(sentences[item])]
            for item, position in zip(reactions.items, which, strict=True)
        ]
        distinct, inverse = np.unique(texts, return_inverse=True)
        states = simulator.encode([str(text) for text in distinct])
        probability += simulator.probability(vectors[reactions.users], states[inverse])
    probability /= n_sentences
    return figures(probability, reactions.liked)


def figures(probability: np.ndarray, liked: np.ndarray) -> HeldOut:
    """Return log-loss, AUC and calibration error of `probability` (n,) for outcomes `liked` (n,)."""
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    log_loss = -np.mean(np.where(liked, np.log(clipped), np.log1p(-clipped)))
    return HeldOut(float(log_loss), area_under_curve(probability, liked), calibration_error(probability, liked))


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """Return P(score of a positive > score of a negative), ties counting one half (the Mann-Whitney statistic)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    total = float(rank[inverse][positive].sum())
    return (total - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def calibration_error(probability: np.ndarray, positive: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error: the mean over equal-count bins of |mean probability - share positive|."""
    order = np.argsort(probability, kind="stable")
    gaps = [
        abs(probability[index].mean() - positive[index].mean()) * len(index)
        for index in np.array_split(order, bins)
        if len(index)
    ]
    return float(np.sum(gaps) / len(probability))


def _fast_attention(simulator: LikeSimulator) -> str:
    """Switch the encoder to plain attention, and return what it had.

    On short sentences the backward pass of the fused CPU kernel takes several times as long.
    """
    before = str(simulator.encoder.config._attn_implementation)
    simulator.encoder.set_attn_implementation("eager")
    return before


def _dim(benchmark: Benchmark) -> int:
    return int(benchmark.features.shape[1])


def _group(values: np.ndarray, n: int) -> list[np.ndarray]:
    """Return for every value 0..n-1 the positions where it occurs."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.cumsum(np.bincount(values, minlength=n))[:-1])
