"""Frozen text encoders: pooled hidden states of any Hugging Face model, and their principal components.

Queries, prompts and sentences are all encoded by these classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch

from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError, DataError, ModelError, NumericalError, StorageError, unknown_name
from offprompts_env.text.loading import fingerprint_of, freeze, input_device, load_frozen, pad_id
from offprompts_env.types import FloatArray, IntArray

Pooling = Literal["mean", "cls", "last"]

FORMAT_VERSION = 1

# Padding that a batch may hold before it is cut: one more call costs a processor about as much as some tens of tokens
# of a small encoder, an accelerator thousands.
_PADDING_ON_CPU, _PADDING_ELSEWHERE = 1 << 9, 1 << 15


@runtime_checkable
class Encoder(Protocol):
    """Maps texts to vectors."""

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return one vector a text, (n, dim) float32."""
        ...


class TextEncoder:
    """Pooled hidden states of a frozen ``AutoModel``, encoder or causal LM.

    Rows are padded on the right and padding is masked, so that pooling sees real tokens only. Equal texts are
    encoded once. Texts of like length share a batch, which ends where padding would become a quarter of it: few long
    texts among many short ones cost what their own tokens cost. The last batch is remembered: encoding the same texts
    again at once, as an embedding and a reward model that share this encoder do, costs nothing and gives the same
    numbers.

    Args:
        model: a model of ``transformers`` that returns hidden states; it is frozen in place.
        tokenizer: its tokenizer.
        pooling: ``"mean"`` over tokens, ``"cls"`` the first token, ``"last"`` the last token (for causal LMs).
        layer: which hidden states: −1 the last layer, 0 the embeddings.
        max_tokens: texts are cut there; by default at the model's own limit.
        pad_token: what fills short rows where the tokenizer names nothing; it is masked.
        batch_size: texts encoded at once, at most.
        max_batch_tokens: tokens of a batch at most, padding included; a single text may have more. Where an accelerator
            runs out of memory nevertheless, a batch is done in halves.

    Raises:
        ConfigError: unknown pooling, no such layer, or a number that is not positive.
        ModelError: no pad token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        max_tokens: int | None = None,
        pad_token: str | None = None,
        batch_size: int = 64,
        max_batch_tokens: int = 1 << 16,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise unknown_name("pooling", pooling, get_args(Pooling))
        depth = model.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ConfigError(f"layer: expected an integer from {-depth - 1} to {depth} for this model, got {layer}")
        for name, value in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
            check_integer(name, value, 1)
        self.model, self.tokenizer = freeze(model), tokenizer
        self.pooling, self.layer = pooling, layer
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        # The tokenizer's limit may be the smaller one: RoBERTa's positions begin at 2, so 2 of its 514 are no room.
        room = min(getattr(model.config, "max_position_embeddings", None) or 512, tokenizer.model_max_length)
        self.max_tokens = room if max_tokens is None else min(max_tokens, room)
        self._pad_id = pad_id(tokenizer, pad_token)
        self._last: tuple[list[str], FloatArray] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        device: str = "cpu",
        dtype: str = "auto",
        max_tokens: int | None = None,
        pad_token: str | None = None,
        batch_size: int = 64,
        max_batch_tokens: int = 1 << 16,
        device_map: str | None = None,
    ) -> TextEncoder:
        """Load a directory or a hub id, such as the published ``distilbert-base-uncased``.

        Args:
            source: directory or hub id.
            pooling: see the class.
            layer: see the class.
            device: ``"cpu"``, ``"cuda"``, ``"auto"``.
            dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            max_tokens: see the class.
            pad_token: see the class.
            batch_size: see the class.
            max_batch_tokens: see the class.
            device_map: spreads its layers over devices, in place of `device`; needs accelerate.

        Raises:
            MissingDependencyError: accelerate is needed and not installed.
            ModelError: it cannot be loaded or used; the message says what to do.
        """
        from transformers import AutoModel

        model, tokenizer = load_frozen(AutoModel, source, device=device, dtype=dtype, device_map=device_map)
        return cls(
            model,
            tokenizer,
            pooling=pooling,
            layer=layer,
            max_tokens=max_tokens,
            pad_token=pad_token,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
        )

    @property
    def dim(self) -> int:
        """Width ``h`` of the hidden states."""
        return int(self.model.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and pooling."""
        return fingerprint_of(self.model, self.tokenizer, self.pooling, self.layer, self.max_tokens)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return the pooled states of `texts`, (n, h) float32. A text without any token counts as one pad token.

        Raises:
            DataError: something is not text.
            NumericalError: the model gives NaN.
        """
        texts = list(texts)
        if self._last is None or self._last[0] != texts:
            self._last = (texts, self._encode(texts))
        return self._last[1].copy()

    def _encode(self, texts: list[str]) -> FloatArray:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"encode: expected text, got {type(text).__name__} at position {index}")
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        unique = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        ids = self.tokenizer(list(unique), truncation=True, max_length=self.max_tokens)["input_ids"]
        ids = [row or [self._pad_id] for row in ids]
        lengths = np.array([len(row) for row in ids])
        states = np.empty((len(ids), self.dim), dtype=np.float32)
        left = self._batches(np.argsort(lengths, kind="stable"), lengths)[::-1]
        while left:
            rows = left.pop()
            try:
                states[rows] = self._pooled([ids[row] for row in rows]).cpu().numpy()
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                left += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
        if not np.isfinite(states).all():
            raise NumericalError("encode: expected finite hidden states, got NaN; compute in dtype='float32'")
        return states if len(unique) == len(texts) else states[[unique[text] for text in texts]]

    def _batches(self, order: IntArray, lengths: IntArray) -> list[IntArray]:
        """Cut `order`, rows by rising length, into batches within the bounds on rows, tokens and padding."""
        idle = _PADDING_ON_CPU if input_device(self.model).type == "cpu" else _PADDING_ELSEWHERE
        batches, start = [], 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            # Every row is padded to the longest, which is the last.
            tokens = lengths[rows] * np.arange(1, len(rows) + 1)
            padding = tokens - np.cumsum(lengths[rows])
            within = (tokens <= self.max_batch_tokens) & (padding <= np.maximum(idle, tokens // 4))
            fitting = len(rows) if within.all() else max(1, int(np.argmin(within)))
            batches.append(rows[:fitting])
            start += fitting
        return batches

    @torch.inference_mode()
    def _pooled(self, ids: list[list[int]]) -> torch.Tensor:
        device = input_device(self.model)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        width = int(lengths.max())
        padded = torch.tensor([row + [self._pad_id] * (width - len(row)) for row in ids], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        inner = self.layer not in (-1, self.model.config.num_hidden_layers)
        output = self.model(input_ids=padded, attention_mask=mask, output_hidden_states=inner)
        hidden: torch.Tensor = output.hidden_states[self.layer] if inner else output.last_hidden_state
        # Where layers are spread over devices, the last ones are not where the first ones are.
        mask, lengths = mask.to(hidden.device), lengths.to(hidden.device)
        if self.pooling == "cls":
            return hidden[:, 0].float()
        if self.pooling == "last":
            return hidden[torch.arange(len(ids), device=hidden.device), lengths - 1].float()
        total = (hidden.float() * mask[..., None]).sum(dim=1)
        return total / lengths[:, None]


class PCAEncoder:
    """Principal components of an encoder's states: ``z = (h − mean) C``.

    Columns of `components` are orthonormal, in order of falling variance, each with its largest entry (in absolute
    value) positive, so that fitting twice gives the same signs.

    Args:
        encoder: gives the states, (n, h).
        mean: of the states it was fitted on, (h,).
        components: ``C``, (h, d).
        text_format: what is encoded, with ``{text}`` in place of the text.

    Raises:
        ConfigError: shapes do not fit, or `text_format` lacks ``{text}``.
    """

    def __init__(
        self, encoder: Encoder, mean: FloatArray, components: FloatArray, *, text_format: str = "{text}"
    ) -> None:
        if mean.shape != (encoder.dim,) or components.shape[:1] != (encoder.dim,) or components.ndim != 2:
            raise ConfigError(
                f"PCA: expected a mean ({encoder.dim},) and components ({encoder.dim}, d) for this encoder, "
                f"got {mean.shape} and {components.shape}; fit it on this encoder"
            )
        if "{text}" not in text_format:
            raise ConfigError(f"text_format: expected a string with '{{text}}' in it, got {text_format!r}")
        self.encoder, self.text_format = encoder, text_format
        self.mean = np.asarray(mean, dtype=np.float32)
        self.components = np.asarray(components, dtype=np.float32)

    @classmethod
    def fit(
        cls, encoder: Encoder, texts: Sequence[str], n_components: int, *, text_format: str = "{text}"
    ) -> PCAEncoder:
        """Fit the components with the largest variance over `texts`.

        Raises:
            ConfigError: more components than texts or state dimensions.
        """
        most = min(len(texts), encoder.dim)
        if not 1 <= n_components <= most:
            raise ConfigError(
                f"n_components: expected 1 to {most} for {len(texts)} texts and states of dimension {encoder.dim}, "
                f"got {n_components}"
            )
        states = encoder.encode(_formatted(texts, text_format)).astype(np.float64)
        mean = states.mean(axis=0)
        centred = states - mean
        _, vectors = np.linalg.eigh(centred.T @ centred)
        components = vectors[:, ::-1][:, :n_components]
        peak = components[np.abs(components).argmax(axis=0), np.arange(n_components)]
        return cls(encoder, mean, components * np.where(peak < 0, -1.0, 1.0), text_format=text_format)

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the inner encoder's fingerprint, mean, components and format; None where it has no fingerprint."""
        inner = getattr(self.encoder, "fingerprint", None)
        if inner is None:
            return None
        digest = hashlib.sha256(f"{inner}\0{self.text_format}\0{self.components.shape}".encode())
        for part in (self.mean, self.components):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]

    @property
    def dim(self) -> int:
        """Number of components ``d``."""
        return int(self.components.shape[1])

    def leading(self, n_components: int) -> PCAEncoder:
        """Return the encoder of the first `n_components` components only.

        Raises:
            ConfigError: there are fewer.
        """
        if not 1 <= n_components <= self.dim:
            raise ConfigError(f"n_components: expected 1 to {self.dim} as fitted, got {n_components}")
        return PCAEncoder(self.encoder, self.mean, self.components[:, :n_components], text_format=self.text_format)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return the components of `texts`, (n, d) float32."""
        return self.project(self.encoder.encode(_formatted(texts, self.text_format)))

    def project(self, states: FloatArray) -> FloatArray:
        """Return the components of `states` (n, h), (n, d) float32."""
        return np.asarray((states - self.mean) @ self.components, dtype=np.float32)

    def save(self, directory: str | Path, name: str, *, model: str) -> None:
        """Write ``<name>.safetensors`` (mean, components) and ``<name>.json`` (what they belong to).

        Args:
            directory: where; it is made if needed.
            name: of the encoder, e.g. ``"sentence"``.
            model: where the model lies: a directory relative to `directory`, or a hub id.
        """
        from safetensors.numpy import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "components": np.ascontiguousarray(self.components)}
        save_file(tensors, folder / f"{name}.safetensors")
        described = {
            "format_version": FORMAT_VERSION,
            "model": model,
            "pooling": getattr(self.encoder, "pooling", None),
            "layer": getattr(self.encoder, "layer", None),
            "max_tokens": getattr(self.encoder, "max_tokens", None),
            "text_format": self.text_format,
            "dim": self.dim,
        }
        (folder / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, directory: str | Path, name: str, *, encoder: Encoder | None = None, device: str = "cpu"
    ) -> PCAEncoder:
        """Read what :meth:`save` wrote.

        Args:
            directory: where it was saved.
            name: of the encoder.
            encoder: the encoder it belongs to; loaded from the recorded model where not given.
            device: where a loaded model computes.

        Raises:
            StorageError: a file is missing, damaged, or of a newer format.
            ModelError: the model it belongs to cannot be loaded.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(directory)
        try:
            described = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            version = described["format_version"]
            tensors = load_file(folder / f"{name}.safetensors") if version <= FORMAT_VERSION else {}
            mean, components = tensors.get("mean"), tensors.get("components")
            source, settings = described["model"], {k: described[k] for k in ("pooling", "layer", "max_tokens")}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StorageError(f"encoder: cannot read {name!r} in {str(folder)!r}: {error!r}; fit it again") from error
        if version > FORMAT_VERSION:
            raise StorageError(
                f"encoder: {name!r} in {str(folder)!r} has format version {version}, this package reads up to "
                f"{FORMAT_VERSION}; update offprompts-env"
            )
        if mean is None or components is None:
            raise StorageError(f"encoder: {name}.safetensors lacks 'mean' or 'components'; fit it again")
        if encoder is None:
            if settings["pooling"] is None:
                raise ModelError(f"encoder: {name!r} belongs to an encoder of your own; pass encoder=")
            local = folder / source
            encoder = TextEncoder.from_pretrained(local if local.is_dir() else source, device=device, **settings)
        return cls(encoder, mean, components, text_format=described["text_format"])


def _formatted(texts: Sequence[str], text_format: str) -> Sequence[str]:
    # Replacing is safe for texts with braces, unlike str.format; the plain format passes the very same list on.
    return texts if text_format == "{text}" else [text_format.replace("{text}", text) for text in texts]
