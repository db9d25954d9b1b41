"""A language model in a build: how it is loaded, asked so that nothing is asked twice, and put into the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from offprompts_env.config import not_placing
from offprompts_env.text.cache import sample_generator
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import CausalLM, LanguageModel
from offprompts_env.text.loading import pin
from offprompts_env.text.store import SentenceStore


@dataclass(frozen=True)
class ExistingModel:
    """Where a language model is and how it is used; see :class:`~offprompts_env.text.language_model.CausalLM`.

    Attributes:
        source: directory or hub id.
        copy_lm: whether the bundle holds a copy, or only names it.
    """

    source: str
    decoding: Decoding
    device: str = "cpu"
    dtype: str = "auto"
    chat_template: bool = False
    pad_token: str | None = None
    device_map: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    batch_size: int = 256
    max_batch_tokens: int = 1 << 16
    copy_lm: bool = True

    @classmethod
    def of(cls, config: Any, source: str) -> ExistingModel:
        """Return the model at `source`, used as the settings of these names in a build's configuration say."""
        said = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        return cls(**{**said, "source": source})

    def load(self) -> CausalLM:
        """Load it; of the hub, the commit that is the newest now."""
        return CausalLM.from_pretrained(
            self.source,
            decoding=self.decoding,
            device=self.device,
            dtype=self.dtype,
            chat_template=self.chat_template,
            pad_token=self.pad_token,
            device_map=self.device_map,
            model_kwargs=self.model_kwargs,
            batch_size=self.batch_size,
            max_batch_tokens=self.max_batch_tokens,
            revision=pin(self.source).get("revision"),
        )

    def described(self) -> dict[str, Any]:
        """Return what a bundle says of it: how it is asked, and without a copy where and which one it is."""
        said = {
            "source": None,
            "chat_template": self.chat_template,
            "pad_token": self.pad_token,
            "dtype": self.dtype,
        }
        if self.copy_lm:
            # Wherever the copy is loaded, its layers are placed anew.
            return said | _given(model_kwargs=not_placing(self.model_kwargs))
        local = Path(self.source).expanduser()
        source = str(local.resolve()) if local.is_dir() else self.source
        loaded = _given(device_map=self.device_map, model_kwargs=dict(self.model_kwargs or {}))
        return {**said, "source": source, **pin(self.source), **loaded}


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value}


def save_copy(lm: CausalLM, folder: Path) -> None:
    """Write weights and tokenizer of `lm` into `folder`."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def written(
    lm: LanguageModel, store: SentenceStore, requests: Sequence[str], samples: Sequence[int], seed: int
) -> list[str]:
    """Return sentence number `samples[i]` of each request; what `store` holds is not asked for again."""

    def write(rows: Sequence[int]) -> list[str]:
        rngs = [sample_generator(lm.fingerprint, seed, samples[row], requests[row]) for row in rows]
        return lm.generate([requests[row] for row in rows], rngs)

    return store.complete(lm.fingerprint, f"build {seed}", requests, samples, write)
