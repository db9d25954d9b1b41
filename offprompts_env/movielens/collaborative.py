"""The collaborative-filtering reward model: latent factors of users and sentences, and a mean per movie.

    P(like | x, q, s) = sigmoid(c + m_q + w . b(s) + (U x) . (V b(s)))

with x the standardised user vector, b(s) the standardised sentence state of the reward simulator's encoder, m_q the
movie's own mean (0 for a movie that is not known), and U, V factor matrices of rank k. A linear sibling of
`LikeSimulator`, and a check of it: it knows the movie by id, and its preferences are bilinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offprompts_env.errors import BundleError, DimensionError
from offprompts_env.rng import integer_seed, stream


@dataclass(frozen=True)
class CollaborativeConfig:
    """Training: rank ``factors``, penalty on movie means and factors, and passes over the reactions."""

    factors: int = 12
    weight_decay: float = 0.1
    learning_rate: float = 3e-3
    epochs: int = 12
    batch_size: int = 256


@dataclass(frozen=True, eq=False)
class CollaborativeModel:
    """Parameters of the model (see the module).

    ``item_ids`` (n_items,) sorted; ``item_means`` (n_items,); ``user_factors`` (d_x, k) and ``sentence_factors``
    (d_b, k) act on raw inputs after subtracting ``user_centre`` (d_x,) and ``sentence_centre`` (d_b,);
    ``sentence_weights`` (d_b,); ``offset`` (1,).
    """

    item_ids: np.ndarray
    item_means: np.ndarray
    user_centre: np.ndarray
    user_factors: np.ndarray
    sentence_centre: np.ndarray
    sentence_factors: np.ndarray
    sentence_weights: np.ndarray
    offset: np.ndarray

    @property
    def d_x(self) -> int:
        """Dimension of user vectors."""
        return len(self.user_centre)

    def probability(
        self, user_vectors: np.ndarray, item_ids: Sequence[int] | np.ndarray, states: np.ndarray
    ) -> np.ndarray:
        """Return P(like) (n,) float32 for user vectors (n, d_x), MovieLens ids (n,) and sentence states (n, d_b).

        Raises `DimensionError` if they do not fit the model.
        """
        expected = (self.d_x, len(self.sentence_centre))
        if (user_vectors.shape[-1], states.shape[-1]) != expected:
            raise DimensionError(
                f"the collaborative model expects user vectors (n, {expected[0]}) and states (n, {expected[1]}), got "
                f"{user_vectors.shape} and {states.shape}; use the user vectors and the encoder of the same bundle"
            )
        ids = np.asarray(item_ids)
        place = np.minimum(np.searchsorted(self.item_ids, ids), len(self.item_ids) - 1)
        mean = np.where(self.item_ids[place] == ids, self.item_means[place], 0.0)
        sentence = states - self.sentence_centre
        taste = (user_vectors - self.user_centre) @ self.user_factors
        match = np.einsum("nk,nk->n", taste, sentence @ self.sentence_factors)
        logits = self.offset[0] + mean + sentence @ self.sentence_weights + match
        return np.asarray(1.0 / (1.0 + np.exp(-logits)), dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write the parameters as safetensors."""
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> CollaborativeModel:
        """Read what `save` wrote.

        Raises `BundleError` if the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(**load_file(path))
        except (OSError, TypeError, SafetensorError) as error:
            raise BundleError(
                f"expected a collaborative model in {path}, but it cannot be read: {error}; "
                "build it again with 'offprompts build-assets'"
            ) from error


def fit_collaborative(
    user_vectors: np.ndarray,
    item_ids: np.ndarray,
    items: np.ndarray,
    states: np.ndarray,
    liked: np.ndarray,
    config: CollaborativeConfig,
    seed: int,
) -> CollaborativeModel:
    """Fit by AdamW on the log-loss of reactions.

    ``user_vectors`` (n, d_x) one row per reaction (cross-fitted, if they come from the same ratings), ``items`` (n,)
    positions in ``item_ids`` (n_items,), ``states`` (n_items, n_sentences, d_b) sentence states of each movie; every
    pass draws one sentence per reaction. ``liked`` (n,) bool.
    """
    import torch

    rng = stream(seed, "collaborative")
    d_x, d_b = user_vectors.shape[1], states.shape[2]
    user_centre, user_scale = user_vectors.mean(axis=0), user_vectors.std(axis=0) + 1e-6
    flat = states.reshape(-1, d_b)
    sentence_centre, sentence_scale = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    x = torch.tensor((user_vectors - user_centre) / user_scale, dtype=torch.float32)
    b = torch.tensor((states - sentence_centre) / sentence_scale, dtype=torch.float32)
    y = torch.tensor(liked, dtype=torch.float32)
    index = torch.tensor(items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "collaborative"))
        means = torch.zeros(len(item_ids), requires_grad=True)
        u = (0.1 * torch.randn(d_x, config.factors)).requires_grad_()
        v = (0.1 * torch.randn(d_b, config.factors)).requires_grad_()
        w = torch.zeros(d_b, requires_grad=True)
        c = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.AdamW([means, u, v, w, c], lr=config.learning_rate, weight_decay=config.weight_decay)
        for _ in range(config.epochs):
            order = torch.from_numpy(rng.permutation(len(y)))
            for batch in torch.split(order, config.batch_size):
                sample = torch.from_numpy(rng.integers(states.shape[1], size=len(batch)))
                sentence = b[index[batch], sample]
                logits = c + means[index[batch]] + sentence @ w + ((x[batch] @ u) * (sentence @ v)).sum(dim=1)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return CollaborativeModel(
        item_ids=np.asarray(item_ids, dtype=np.int64),
        item_means=means.detach().numpy(),
        user_centre=user_centre.astype(np.float32),
        user_factors=(u.detach().numpy() / user_scale[:, None]).astype(np.float32),
        sentence_centre=sentence_centre.astype(np.float32),
        sentence_factors=(v.detach().numpy() / sentence_scale[:, None]).astype(np.float32),
        sentence_weights=(w.detach().numpy() / sentence_scale).astype(np.float32),
        offset=c.detach().numpy(),
    )
