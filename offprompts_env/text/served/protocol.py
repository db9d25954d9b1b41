"""The OpenAI protocol without the network: what a request says, and what can be read out of an answer.

How servers differ (vLLM and SGLang by their source, ``transformers serve`` 5.23 by trying):

- *seed*: vLLM has one generator a request; SGLang uses it where deterministic inference is switched on; ``transformers
  serve`` seeds the whole process, so it repeats a request only while no other is under way.
- *temperature, top_p*: where a request leaves them out, vLLM and SGLang take the model's ``generation_config.json``. So
  both are always sent. ``transformers serve`` samples only if that file says ``do_sample``.
- *top_k, min_p*: extensions of vLLM and SGLang; others answer 422. So they are sent only where they do something.
- *stop*: ``transformers serve`` answers 500 to a request that has one. It is cut here in any case, so there
  ``extra={"stop": None}`` does the same at the price of some tokens.
- *n*: ignored by ``transformers serve``; here always one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from offprompts_env.text.decoding import Decoding
from offprompts_env.text.served.settings import Server
from offprompts_env.text.tokens import TokenCount

# Another attempt may fare better: too slow, in conflict, too early, too many; and every 5xx but "not implemented".
_PASSING = frozenset({408, 409, 425, 429})
# A server ended the sentence itself: it is no sample of the model.
_ABORTED = frozenset({"abort", "error", "content_filter"})
# What tells one model of `GET /models` from another. Not `created`: vLLM and SGLang put the time of the request there.
_LISTED = ("id", "root", "parent", "owned_by", "max_model_len")
_COUNTS = ("prompt_tokens", "completion_tokens")
_LONGEST_QUOTE = 300


class Fault(Exception):  # noqa: N818  (not an error yet: another attempt is made)
    """An attempt failed, and another one may not.

    Attributes:
        reason: a few words, the same for all faults of a kind.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Refusal(Exception):  # noqa: N818  (becomes a ServerError, with what was done so far)
    """The server will not answer, however often it is asked; the text says why and what to do.

    Attributes:
        status: of the answer that says so; None where there is none.
    """

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """A sentence, and what the server says of who wrote it: its model, and its system's fingerprint."""

    text: str
    writer: Mapping[str, str]


def fixed_fields(server: Server, decoding: Decoding) -> dict[str, Any]:
    """Return the fields that all requests share."""
    asked: dict[str, Any] = {
        "model": server.model,
        "max_tokens": decoding.max_new_tokens,
        "temperature": 0.0 if decoding.greedy else decoding.temperature,
        "top_p": 1.0 if decoding.greedy else decoding.top_p,
    }
    if decoding.stop:
        asked["stop"] = list(decoding.stop)
    if decoding.top_k and not decoding.greedy:
        asked["top_k"] = decoding.top_k
    if decoding.min_p and not decoding.greedy:
        asked["min_p"] = decoding.min_p
    return {name: value for name, value in (asked | dict(server.extra)).items() if value is not None}


def request_body(fixed: Mapping[str, Any], chat: bool, prompt: str, seed: int | None) -> bytes:
    """Return a request as ASCII JSON: whatever is in `prompt`, it is the text of the user's turn."""
    prompt = mended(prompt)
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    seeded = {} if seed is None else {"seed": seed}
    return json.dumps({**fixed, **asked, **seeded}).encode("ascii")


def read_answer(
    raw: bytes, chat: bool, decoding: Decoding, spent: Callable[[TokenCount], None] = lambda _: None
) -> Answer:
    """Return the sentence of a completion.

    Args:
        raw: the body of the answer.
        chat: whether it was asked for as a chat.
        decoding: says where a sentence ends.
        spent: is told the tokens, where the answer counts them; also of one that is a fault.

    Raises:
        Fault: it is no JSON, has no sentence, or the sentence is blank or was aborted.
    """
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise Fault("invalid JSON") from None
    if isinstance(answer, dict) and (usage := _usage(answer.get("usage"))) is not None:
        spent(usage)
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        ended = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Fault("answer without a sentence") from None
    if not isinstance(text, str | None):
        raise Fault("answer without a sentence")
    if isinstance(ended, str) and ended in _ABORTED:
        raise Fault(f"sentence ended by {ended}")
    text = mended(decoding.cut(text or "")).strip()
    if not text:
        raise Fault("empty sentence")
    said = {name: answer.get(name) for name in ("model", "system_fingerprint")}
    return Answer(text, {name: value for name, value in said.items() if isinstance(value, str)})


def read_listing(raw: bytes, model: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what ``GET /models`` says of `model`, None where it says nothing, and the names of all models.

    Raises:
        Fault: it is no JSON.
    """
    try:
        listing = json.loads(raw)
    except (ValueError, RecursionError):
        raise Fault("invalid JSON") from None
    cards = listing.get("data") if isinstance(listing, dict) else None
    cards = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    names = [card["id"] for card in cards if isinstance(card.get("id"), str)]
    for card in cards:
        if card.get("id") == model:
            return {name: card[name] for name in _LISTED if isinstance(card.get(name), str | int)}, names
    return None, names


def check_status(status: int, headers: Mapping[str, str], raw: bytes, server: Server) -> None:
    """Raise unless the answer is one.

    Raises:
        Fault: it may be one next time.
        Refusal: it will not.
    """
    if status == 200:
        return
    if status in _PASSING or (status >= 500 and status != 501):
        raise Fault(f"status {status}", retry_after(headers.get("Retry-After")))
    said = _said(raw)
    if status in (401, 403):
        remedy = f"put a valid key into the environment variable {server.api_key_env}"
    elif status == 404:
        remedy = f"check that {server.url} is the base address and that it serves the model {server.model!r}"
    elif 300 <= status < 400:
        said = f", to {headers.get('Location', 'nowhere')!r:.{_LONGEST_QUOTE}}"
        remedy = "keys and prompts do not follow redirects; set the address to where the server is"
    else:
        remedy = "change the decoding, the prompt or extra= to what this server takes"
    raise Refusal(f"status {status}{said}; {remedy}", status)


def retry_after(value: str | None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> float:
    """Return the seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3: seconds or a date); 0 for none."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now()).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0.0


def mended(text: str) -> str:
    """Return `text` as Unicode can hold it: surrogate pairs joined, and for a lone surrogate the mark U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _usage(usage: Any) -> TokenCount | None:
    read, written = (usage.get(name) if isinstance(usage, dict) else None for name in _COUNTS)
    # Neither true nor 1.0 is a count, and no request is read in no tokens.
    if type(read) is not int or type(written) is not int or read < 1 or written < 0:
        return None
    return TokenCount(read, written, sentences=1)


def _said(raw: bytes) -> str:
    """Return the server's own words in a refusal, shortened and on one line."""
    text = raw[: 1 << 14].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError, AttributeError):
        pass
    text = "".join(character if character.isprintable() else " " for character in mended(text)).strip()
    shown = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"
    return f" ({shown})" if shown else ""
