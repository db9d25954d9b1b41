"""Where a server is, what it is asked for, and how patiently."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self
from urllib.parse import urlsplit

from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, unknown_name

# Fields of a request that are ours to set: from the prompt, the seed, the decoding and the name of the model.
_RESERVED = frozenset({"model", "messages", "prompt", "seed", "n", "best_of", "stream", "echo"})


@dataclass(frozen=True)
class Server:
    """A server that speaks the OpenAI protocol, and how it is asked.

    Attributes:
        url: base address, as any OpenAI client wants it: ``"http://127.0.0.1:8000/v1"``. Proxies named in the
            environment are not used.
        model: name of the model there; ``GET {url}/models`` lists them.
        chat: ask for a chat completion, the prompt being the user's only turn; else for a plain completion.
        api_key_env: environment variable with the API key, read when a connection is opened and kept nowhere else;
            without that variable no key is sent.
        extra: further JSON fields of every request, such as ``{"repetition_penalty": 1.1}``, or, to be free of the
            ``generation_config.json`` that vLLM and SGLang take defaults from, ``{"top_k": -1}``. None takes a field
            of ours away.
        deterministic: your word that the server answers the same request with the same seed always alike. Most do
            not, nor under greedy decoding: rounding depends on what else is in a batch.
        check_identity: stop when the server says that it answers with another model than at first. Without it a
            model that is swapped under its name goes unnoticed; services that move a request between several
            installations need that.
        concurrency: requests under way at once, and connections held open.
        requests_per_second: at most so many are begun; None for no limit.
        request_timeout: seconds after which a request is given up and sent again.
        deadline: seconds after which a call of ``generate`` stops, whatever is still to do.
        attempts: times that a sentence is asked for before a call stops.
        first_wait: seconds waited before the second attempt at most; twice as many before each further one. The wait
            is drawn uniformly below that, so that clients do not come back all at once.
        longest_wait: the most that this grows to. What a server asks for (``Retry-After``) is waited out in any case.
        max_bytes: the longest answer that is read.

    Raises:
        ConfigError: a value out of range, or an address with a password or a query.
    """

    url: str
    model: str
    chat: bool = True
    api_key_env: str = "OPENAI_API_KEY"
    extra: Mapping[str, Any] = field(default_factory=dict)
    deterministic: bool = False
    check_identity: bool = True
    concurrency: int = 64
    requests_per_second: float | None = None
    request_timeout: float = 120.0
    deadline: float = 3600.0
    attempts: int = 12
    first_wait: float = 0.5
    longest_wait: float = 60.0
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked_url(self.url))
        for name in ("model", "api_key_env"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ConfigError(f"{name}: expected a name, got {getattr(self, name)!r}; {self.url}/models lists them")
        for name in ("chat", "deterministic", "check_identity"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("concurrency", "attempts", "max_bytes"):
            check_integer(name, getattr(self, name), 1)
        for name in ("request_timeout", "deadline", "first_wait", "longest_wait", "requests_per_second"):
            if name != "requests_per_second" or self.requests_per_second is not None:
                check_number(name, getattr(self, name), 0, strict=True)
        self._check_extra()

    def _check_extra(self) -> None:
        try:
            json.dumps(self.extra, allow_nan=False)
            taken = sorted(_RESERVED & dict(self.extra).keys())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra: expected names and values that JSON can hold, got {self.extra!r}") from error
        if taken:
            raise ConfigError(f"extra: expected fields that are not set already, got {taken[0]!r}; leave it out")

    @classmethod
    def from_mapping(cls, url: str | None, settings: Mapping[str, Any], *, chat: bool) -> Self:
        """Make it from a JSON-able mapping of everything but `url` and `chat`.

        Args:
            url: None for the environment variable ``OPENAI_BASE_URL``, so that a server can move between two parts
                of a recording.
            settings: at least ``{"model": name}``.
            chat: see the class.

        Raises:
            ConfigError: a setting is unknown, missing or out of range.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"server: expected names and values, such as {{'model': 'my-model'}}, got {settings!r}")
        valid = [f.name for f in fields(cls) if f.name not in ("url", "chat")]
        for name in settings:
            if name not in valid:
                raise unknown_name("setting of server", name, valid)
        if "model" not in settings:
            raise ConfigError(
                "server: expected the name of a model on the server, got none; pass server={'model': name}, with one "
                "of the names that GET /models lists"
            )
        if url is None and not (url := os.environ.get("OPENAI_BASE_URL")):
            raise ConfigError(
                "server: expected the server's address, got none; pass language_model='http://127.0.0.1:8000/v1', or "
                "set the environment variable OPENAI_BASE_URL"
            )
        return cls(url=url, chat=chat, **settings)


def is_url(source: str) -> bool:
    """Return whether a language model is named by the address of a server, and not by a directory or hub id."""
    return source.lower().startswith(("http://", "https://"))


def _checked_url(url: object) -> str:
    """Return the base address without a slash at the end; what may be secret in it is in no message."""
    if not isinstance(url, str) or not is_url(url):
        raise ConfigError("url: expected an address such as http://127.0.0.1:8000/v1, got something else")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or any(character.isspace() or not character.isprintable() for character in url):
        raise ConfigError("url: expected an address such as http://127.0.0.1:8000/v1, got one that cannot be read")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"url: expected an address without user, password, query or fragment, got one for {host} with some; "
            "put a key into the environment variable that api_key_env names: an address is written into logs"
        )
    return url.rstrip("/")
