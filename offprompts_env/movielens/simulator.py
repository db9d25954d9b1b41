"""The reward simulator: how likely a user likes a movie that is described by a sentence.

    b = pooled encoder state of the sentence          (any `AutoModel` encoder; DistilBERT in the published work)
    a = A (x - mean) / scale,   c = B b               (user and sentence in one space)
    P(like | x, s) = sigmoid(MLP([a, c, a * c]))

Encoding a sentence is the expensive part and does not depend on the user, so `LikeSimulator.encode` and
`LikeSimulator.probability` are separate: one encoding serves many users.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offprompts_env.errors import BundleError, DimensionError
from offprompts_env.text.loading import resolve_device

Pooling = Literal["mean", "cls"]

HEAD_CONFIG = "head.json"
HEAD_WEIGHTS = "head.safetensors"


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the head: user dimension ``d_x``, encoder width ``d_b``, common ``width``, MLP ``hidden`` units.

    ``pooling`` is how token states become ``b``; ``max_tokens`` is where sentences are cut; ``dropout`` acts in
    training.
    """

    d_x: int
    d_b: int
    width: int = 48
    hidden: int = 64
    dropout: float = 0.2
    pooling: Pooling = "mean"
    max_tokens: int = 64


class LikeSimulator(nn.Module):
    """Sentence encoder and head; maps (user vector, sentence) to P(like)."""

    def __init__(self, encoder: Any, tokenizer: Any, config: HeadConfig) -> None:
        """Join `encoder` (an `AutoModel`) and its `tokenizer` with a new head of shape `config`."""
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.config = config
        self.head = _Head(config)

    def forward(self, users: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (n,) of P(like) for user vectors (n, d_x) and sentence states (n, d_b)."""
        return self.head(users, states)  # type: ignore[no-any-return]

    def pooled(self, texts: Sequence[str], token_dropout: float = 0.0) -> torch.Tensor:
        """Return the sentence states (n, d_b) of one batch of `texts`, with gradients.

        Each token but the first is hidden with probability `token_dropout`: an augmentation for training.
        """
        device = self.head.user_mean.device
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            return_tensors="pt",
            padding_side="right",
        )
        mask = batch["attention_mask"]
        if token_dropout > 0:
            shown = torch.rand(mask.shape) >= token_dropout
            shown[:, 0] = True
            mask = mask * shown
        mask = mask.to(device)
        hidden = self.encoder(input_ids=batch["input_ids"].to(device), attention_mask=mask).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]  # type: ignore[no-any-return]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Return the sentence states (n, d_b) float32 of `texts`, in evaluation mode."""
        was_training = self.training
        self.eval()
        order = np.argsort([len(text) for text in texts], kind="stable")
        states = np.zeros((len(texts), self.config.d_b), dtype=np.float32)
        for start in range(0, len(texts), batch_size):
            index = order[start : start + batch_size]
            states[index] = self.pooled([texts[i] for i in index]).float().cpu().numpy()
        self.train(was_training)
        return states

    @torch.no_grad()
    def probability(self, user_vectors: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return P(like) (n,) float32 for user vectors (n, d_x) and sentence states (n, d_b).

        Raises `DimensionError` if the two do not fit the head or each other.
        """
        expected = (self.config.d_x, self.config.d_b)
        actual = (user_vectors.shape[-1], states.shape[-1])
        if actual != expected or len(user_vectors) != len(states):
            raise DimensionError(
                f"the simulator expects user vectors (n, {expected[0]}) and states (n, {expected[1]}), "
                f"got {user_vectors.shape} and {states.shape}; use the user vectors and the encoder of the same bundle"
            )
        was_training = self.training
        self.eval()
        device = self.head.user_mean.device
        users = torch.as_tensor(user_vectors, dtype=torch.float32, device=device)
        logits = self(users, torch.as_tensor(states, dtype=torch.float32, device=device))
        self.train(was_training)
        return torch.sigmoid(logits).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write the encoder and its tokenizer as a Hugging Face directory, and the head beside them.

        Encoder weights are stored as float16.
        """
        import copy

        path.mkdir(parents=True, exist_ok=True)
        copy.deepcopy(self.encoder).half().save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}, path / HEAD_WEIGHTS)
        (path / HEAD_CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> LikeSimulator:
        """Read what `save` wrote, in float32 on `device` ("cpu", "cuda" or "auto").

        Raises `BundleError` if a file is missing or damaged.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            config = HeadConfig(**json.loads((path / HEAD_CONFIG).read_text(encoding="utf-8")))
            weights = load_file(path / HEAD_WEIGHTS)
            encoder = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            simulator = cls(encoder, tokenizer, config)
            simulator.head.load_state_dict(weights)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"expected a reward simulator in {path} (encoder, tokenizer, {HEAD_CONFIG}, {HEAD_WEIGHTS}), "
                f"but it cannot be read: {error}; build it again with 'offprompts build-assets'"
            ) from error
        return simulator.to(resolve_device(device)).eval()


class _Head(nn.Module):
    """MLP([a, c, a * c]) with standardised user vectors."""

    user_mean: torch.Tensor
    user_scale: torch.Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.register_buffer("user_mean", torch.zeros(config.d_x))
        self.register_buffer("user_scale", torch.ones(config.d_x))
        self.user = nn.Linear(config.d_x, config.width)
        self.sentence = nn.Linear(config.d_b, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(3 * config.width, config.hidden)
        self.out = nn.Linear(config.hidden, 1)

    def forward(self, users: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        a = self.user((users - self.user_mean) / self.user_scale)
        c = self.sentence(self.drop(states))
        joint = self.drop(torch.cat([a, c, a * c], dim=-1))
        return self.out(nn.functional.gelu(self.hidden(joint))).squeeze(-1)  # type: ignore[no-any-return]
