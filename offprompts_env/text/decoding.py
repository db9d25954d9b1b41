"""How the next token is chosen: settings, truncation, and inverse-CDF sampling from given uniforms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, NumericalError, unknown_name

# A nucleus is searched among tokens at least so probable, relative to the best one, and among all where these have not
# mass enough: sorting all costs thirty times as much.
_NUCLEUS_GUESS = 1 / 256


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoding parameters.

    Truncations apply in the order top-k, top-p, min-p to ``softmax(logits / temperature)``, and each renormalises.
    Tokens tied with the last one kept are kept too.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        temperature: of the softmax, > 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose mass reaches `top_p`; 1 keeps all.
        min_p: keep tokens at least `min_p` times as probable as the most probable one; 0 keeps all. It costs no sort.
        greedy: always take the most probable token; the other settings but `max_new_tokens` and `stop` do nothing.
        stop: strings before which a continuation is cut, besides the model's own end token.
        stop_patterns: regular expressions (of :mod:`re`) before which it is cut, looked for after each token in what is
            written so far; of a match, the last 64 tokens must be enough to see it. A server, which knows strings only,
            gets its answers cut when they are there.
    """

    max_new_tokens: int = 48
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    stop_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "stop_patterns"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("top_k", self.top_k, 0)
        for name in ("temperature", "top_p", "min_p"):
            check_number(name, getattr(self, name), 0)
        checks = (
            ("temperature", self.temperature > 0, "a finite number > 0 (greedy=True for the limit 0)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", self.min_p <= 1, "a number in [0, 1]"),
            ("greedy", isinstance(self.greedy, bool), "True or False"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "non-empty strings"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for pattern in self.stop_patterns:
            try:
                nothing = re.compile(pattern).match("")
            except (re.error, TypeError) as error:
                raise ConfigError(f"stop_patterns: expected regular expressions, got {pattern!r}: {error}") from error
            if nothing:
                raise ConfigError(
                    f"stop_patterns: expected a pattern that matches something, got {pattern!r}, which matches the "
                    "empty text and would cut everything"
                )

    def __repr__(self) -> str:
        # Part of every fingerprint: a setting that came later is named only where it is used.
        return f"Decoding({', '.join(f'{name}={value!r}' for name, value in self._used().items())})"

    def _used(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in settings.items() if name != "stop_patterns" or value}

    @property
    def stops(self) -> bool:
        """Whether there is anything but an end token to stop at."""
        return bool(self.stop or self.stop_patterns)

    def cut(self, text: str) -> str:
        """Return `text` up to the first stop string or pattern."""
        for stop in self.stop:
            text = text.split(stop, 1)[0]
        for pattern in self.stop_patterns:
            if (found := re.search(pattern, text)) is not None:
                text = text[: found.start()]
        return text

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Decoding:
        """Make it from a JSON-able mapping; unknown names are answered with the nearest valid one."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"decoding: expected names and values, such as {{'temperature': 0.7}}, got {settings!r}")
        valid = [f.name for f in fields(cls)]
        for name in settings:
            if name not in valid:
                raise unknown_name("decoding parameter", name, valid)
        return cls(**settings)

    def to_mapping(self) -> dict[str, Any]:
        """Return all settings, JSON-able."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._used().items()}


def choose(logits: torch.Tensor, uniforms: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return the next token of each row.

    Sampling takes the first token, in vocabulary order, whose cumulative weight exceeds the uniform's share of the
    total. So a row's token is a function of its own logits and its own uniform.

    Args:
        logits: (n, V).
        uniforms: in [0, 1), (n,).
        decoding: settings.

    Returns:
        token ids (n,).

    Raises:
        NumericalError: logits are NaN, or a row has no finite maximum.
    """
    logits = logits.float()
    if decoding.greedy:
        top = logits.max(dim=-1)
        _check(top.values)
        return top.indices
    weights = truncated_weights(logits, decoding)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    _check(total)
    # Rounding must not push the target to the total, past the last token with positive weight.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def truncated_weights(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return unnormalised probabilities of the next token, (n, V), at most 1, 0 for tokens that are cut off."""
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(decoding.temperature).exp_()
    if 0 < decoding.top_k < weights.shape[-1]:
        _cut(weights, weights.topk(decoding.top_k, dim=-1).values[:, -1:])
    if decoding.top_p < 1:
        _cut(weights, _nucleus_edge(weights, decoding.top_p))
    if decoding.min_p > 0:
        _cut(weights, weights.new_full((1, 1), decoding.min_p))
    return weights


def _cut(weights: torch.Tensor, edge: torch.Tensor) -> None:
    weights.masked_fill_(weights < edge, 0.0)


def _nucleus_edge(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the smallest weight inside each row's nucleus, (n, 1)."""
    need = top_p * weights.sum(dim=-1, keepdim=True)
    ordered = _largest_first(weights, _NUCLEUS_GUESS)
    edge = _edge_of_sorted(ordered, need)
    short = (ordered.cumsum(dim=-1)[:, -1] < need[:, 0]).nonzero()[:, 0]
    if len(short):
        edge[short] = _edge_of_sorted(weights[short].sort(dim=-1, descending=True).values, need[short])
    return edge


def _largest_first(weights: torch.Tensor, least: float) -> torch.Tensor:
    """Return what is at least `least` of each row, by size, then zeros: (n, k), k the most that a row has."""
    seen = weights >= least
    # NumPy finds the few among the many four times as fast on a CPU.
    flat = torch.from_numpy(np.flatnonzero(seen.numpy())) if not seen.is_cuda else seen.flatten().nonzero()[:, 0]
    row = flat // weights.shape[-1]
    counts = torch.bincount(row, minlength=len(weights))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]
    largest = weights.new_zeros(len(weights), int(counts.max()))
    largest[row, place] = weights.flatten()[flat]
    return largest.sort(dim=-1, descending=True).values


def _edge_of_sorted(ordered: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    # A token is in the nucleus while the mass before it is short of the need; the first one always is.
    before = ordered.cumsum(dim=-1) - ordered
    inside = (before < need).sum(dim=-1, keepdim=True).clamp_(min=1)
    return ordered.gather(-1, inside - 1)


def _check(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        row = int(torch.nonzero(~torch.isfinite(values))[0, 0])
        raise NumericalError(
            f"language model: expected finite logits, got NaN or infinity in row {row} of a batch; "
            "compute in another type (dtype='float32' or 'bfloat16') or check the weights"
        )
