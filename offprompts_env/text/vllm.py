"""vLLM's offline engine, for whoever needs a ``LanguageModel``.

vLLM is not installed with any extra of this package: it brings a CUDA build of torch of its own, so install it as its
manual says, and then this package. What is here was written against vLLM's documented interface (``LLM.generate``,
``LLM.chat``, ``SamplingParams``) and is tested against a stand-in with the same names; it has not run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from offprompts_env.errors import ConfigError, MissingDependencyError, ModelError
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import Randomness, checked_prompts, row_seeds
from offprompts_env.text.tokens import TokenCount

# Settings of the engine that say where and how fast it computes, and not what.
_INCIDENTAL = frozenset(
    {"gpu_memory_utilization", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "download_dir"}
)

# Empty answers to one prompt before the run is stopped.
_ATTEMPTS = 4


class VLLMModel:
    """A frozen language model in vLLM's offline engine.

    Each continuation has a seed of its own, drawn from the caller's generator. vLLM keeps to seeds, but its rounding
    depends on what else is in a batch, so the same seeds may give other sentences in another run; `reproducible` is
    the caller's word that they do not (batch-invariant kernels). Empty continuations are asked for again with other
    seeds, as from a server.

    Args:
        source: directory or hub id.
        decoding: how tokens are chosen.
        chat_template: ask in the form of the tokenizer's chat template.
        reproducible: see above.
        engine: further arguments of ``vllm.LLM``, such as ``{"dtype": "bfloat16", "tensor_parallel_size": 2}``.

    Attributes:
        tokens: read and written so far, empty continuations included.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ModelError: vLLM cannot load the model.
        ConfigError: `engine` is no mapping of names that JSON can hold, or names what is set here.
    """

    def __init__(
        self,
        source: str,
        decoding: Decoding | None = None,
        *,
        chat_template: bool = False,
        reproducible: bool = False,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.chat_template, self.reproducible = source, chat_template, reproducible
        self.decoding = decoding if decoding is not None else Decoding()
        self.engine = _checked(engine or {})
        self.tokens = TokenCount()
        try:
            import vllm
        except ImportError as error:
            raise MissingDependencyError(
                "a language model in vLLM needs the package 'vllm', which is not installed; install it as its manual "
                "says for your accelerator, or ask a vLLM server: language_model='http://…/v1'"
            ) from error
        self._params = vllm.SamplingParams
        try:
            # What the checkpoint's generation_config.json says of sampling must not mix with the decoding asked for.
            self._llm = vllm.LLM(model=source, generation_config="vllm", **self.engine)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"model: vLLM cannot load {source!r}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Digest of the model's name, the settings that shape its answers, decoding, chat or plain."""
        shaping = {name: value for name, value in self.engine.items() if name not in _INCIDENTAL}
        shape = {
            "vllm": self.source, "engine": shaping, "chat": self.chat_template, "decoding": asdict(self.decoding)
        }  # fmt: skip
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    @property
    def deterministic(self) -> bool:
        """True under greedy decoding, if the caller says that the engine is reproducible."""
        return self.decoding.greedy and self.reproducible

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Return one continuation a prompt, without surrounding blanks and from the first stop string on.

        Raises:
            DataError: a prompt is blank, or the generators are not as many as the prompts.
            ModelError: a prompt has no continuation but blanks.
        """
        prompts = checked_prompts(prompts)
        seeds = row_seeds(rng, len(prompts))
        texts = [""] * len(prompts)
        left = list(range(len(prompts)))
        for attempt in range(_ATTEMPTS):
            if not left:
                break
            written = self._ask([prompts[row] for row in left], [seeds[row] + attempt for row in left])
            for row, text in zip(left, written, strict=True):
                texts[row] = self.decoding.cut(text).strip()
            left = [row for row in left if not texts[row]]
        if left:
            raise ModelError(
                f"model: expected a continuation of {prompts[left[0]]!r:.200}, got blanks {_ATTEMPTS} times; check the "
                "template, chat_template and stop strings"
            )
        return texts

    def _ask(self, prompts: list[str], seeds: list[int]) -> list[str]:
        params = [self._sampling(seed) for seed in seeds]
        if self.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            answers = self._llm.chat(turns, params, use_tqdm=False)
        else:
            answers = self._llm.generate(prompts, params, use_tqdm=False)
        if len(answers) != len(prompts):
            raise ModelError(f"model: expected {len(prompts)} answers of vLLM, got {len(answers)}")
        read, written = (sum(map(len, ids)) for ids in zip(*map(_token_ids, answers), strict=True))
        self.tokens += TokenCount(read, written, len(answers))
        return [str(answer.outputs[0].text) for answer in answers]

    def _sampling(self, seed: int) -> Any:
        chosen = self.decoding
        # The names of vLLM: no temperature is greedy, and -1 keeps all tokens.
        return self._params(
            n=1,
            temperature=0.0 if chosen.greedy else chosen.temperature,
            top_k=chosen.top_k if chosen.top_k and not chosen.greedy else -1,
            top_p=1.0 if chosen.greedy else chosen.top_p,
            min_p=0.0 if chosen.greedy else chosen.min_p,
            max_tokens=chosen.max_new_tokens,
            stop=list(chosen.stop) or None,
            seed=seed,
        )


def _token_ids(answer: Any) -> tuple[Sequence[int], Sequence[int]]:
    return answer.prompt_token_ids or (), answer.outputs[0].token_ids


def _checked(engine: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(engine, Mapping):
        raise ConfigError(f"engine: expected names and values, such as {{'dtype': 'bfloat16'}}, got {engine!r}")
    for name in ("model", "generation_config", "seed"):
        if name in engine:
            raise ConfigError(f"engine: expected settings that are not set already, got {name!r}; leave it out")
    try:
        json.dumps(dict(engine), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine: expected values that JSON can hold, got {engine!r}") from error
    return dict(engine)
