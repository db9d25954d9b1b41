"""One server, asked many things at once: connections, pace, retries."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import numpy as np

from offprompts_env.errors import ConfigError, missing_dependency
from offprompts_env.text.served.protocol import Fault, Refusal, check_status
from offprompts_env.text.served.report import Report
from offprompts_env.text.served.settings import Server

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

_CERTIFICATE = "the server's certificate is not trusted; install it on this machine, or correct the address"
# Who is wrong about an address learns it soon: attempts at first contact, some 8 s with the usual waits.
FIRST_ATTEMPTS = 6
# aiohttp sends longer bodies in pieces if they come as a file.
_ONE_PIECE = 1 << 20


class Connection:
    """A pool of connections to a server. Lives in one event loop.

    The client is aiohttp: a short request costs it 0.2 ms of processor time, where httpx2 takes 1.6 ms, and the openai
    package, which checks every answer with pydantic, 3.8 ms.

    Args:
        server: where and how patiently.
        report: what is counted is counted here.

    Attributes:
        renewed: a connection was opened since this was last set to False: another process may answer now.

    Raises:
        MissingDependencyError: aiohttp is not installed.
        ConfigError: the API key cannot be sent.
    """

    def __init__(self, server: Server, report: Report) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise missing_dependency("aiohttp", "served", "a language model behind a server") from error
        self.server, self.report = server, report
        self.renewed = False
        self._key = _api_key(server.api_key_env)
        # As it is, and as an address spells it.
        self._forms = {form.encode() for form in (self._key, quote(self._key, safe="")) if form}
        self._next = 0.0
        # Jitter must differ between clients that were started alike, so no seed names it; it shapes no sentence.
        self._jitter = np.random.default_rng()
        self._session: aiohttp.ClientSession | None = None
        # What an error of the client means; the first that fits counts.
        self._meanings: tuple[tuple[type[BaseException], str], ...] = (
            (aiohttp.ClientConnectorCertificateError, _CERTIFICATE),
            (aiohttp.ClientConnectorDNSError, "unknown host"),
            (aiohttp.ClientConnectorError, "no connection"),
            (TimeoutError, "timeout"),
            (aiohttp.ClientPayloadError, "cut answer"),
            (aiohttp.ClientError, "lost connection"),
            (OSError, "lost connection"),
        )

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        # Plain bytes, so that the limit on their number means something.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.server.concurrency, socket_factory=self._socket),
            timeout=aiohttp.ClientTimeout(total=self.server.request_timeout),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    def _socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        # The way to learn of new connections that costs nothing a request; a trace costs 10% of the speed.
        self.renewed = True
        return socket.socket(*address[:3])

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def ask(
        self,
        path: str,
        body: Callable[[int], bytes] | None,
        read: Callable[[bytes], T],
        *,
        attempts: int,
    ) -> T:
        """Return what `read` makes of the answer, after as many attempts as it takes.

        Args:
            path: below the base address.
            body: from the number of answers without a sentence so far, what is posted; None to get.
            read: raises :class:`Fault` for an answer that is none.
            attempts: the most there are.

        Raises:
            Refusal: the server will not answer, or did not in the last attempt.
        """
        blank = 0
        for attempt in range(attempts):
            try:
                return read(await self._exchange(path, None if body is None else body(blank)))
            except Fault as fault:
                if attempt == attempts - 1:
                    raise Refusal(
                        f"{attempts} attempts failed, the last one with: {fault.reason}; {_remedy(fault.reason)}"
                    ) from None
                if fault.wait >= self.server.deadline:
                    raise Refusal(
                        f"{fault.reason}, and the server asks to wait {fault.wait:g} s, past the deadline of "
                        f"{self.server.deadline:g} s for one call; come back then, or raise deadline"
                    ) from None
                self.report.retries[fault.reason] += 1
                # The server is well: waiting would not change its answer, another seed may.
                empty = fault.reason == "empty sentence"
                blank += empty
                await self._wait(max(0.0 if empty else self._back_off(attempt), fault.wait))
        raise AssertionError  # attempts ≥ 1

    def _back_off(self, attempt: int) -> float:
        """Full jitter: uniform below a bound that doubles (Brooker, Exponential Backoff And Jitter, 2015)."""
        return float(self._jitter.random()) * min(self.server.longest_wait, self.server.first_wait * 2.0**attempt)

    async def _wait(self, seconds: float) -> None:
        self.report.waited += seconds
        await asyncio.sleep(seconds)

    async def _pace(self) -> None:
        if self.server.requests_per_second is not None:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 1 / self.server.requests_per_second
            await asyncio.sleep(start - now)

    async def _exchange(self, path: str, body: bytes | None) -> bytes:
        await self._pace()
        self.report.requests += 1
        try:
            status, headers, raw = await self._send(path, body)
        except Exception as error:
            # It must not be the cause of what is raised: the client's errors hold the request, and with it the key.
            meaning = next((meaning for kind, meaning in self._meanings if isinstance(error, kind)), None)
            if meaning is None:
                raise
        else:
            check_status(status, headers, raw, self.server)
            return raw
        raise Refusal(meaning) if meaning == _CERTIFICATE else Fault(meaning)

    async def _send(self, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            self._session = self._open()
        data = body if body is None or len(body) < _ONE_PIECE else io.BytesIO(body)
        async with self._session.request(
            "GET" if body is None else "POST", f"{self.server.url}/{path}", data=data, allow_redirects=False
        ) as response:
            # A redirect may lead to an address with the key.
            headers = response.headers.copy()
            if "Location" in headers:
                headers["Location"] = self._without_key(headers["Location"].encode(errors="replace")).decode()
            return response.status, headers, await self._read(response)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self.server.max_bytes
        if (length := response.content_length) is not None and length <= limit:
            return self._without_key(await response.read())
        if length is None:
            parts, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
            else:
                return self._without_key(b"".join(parts))
        raise Refusal(
            f"an answer is longer than max_bytes={limit}; this is no sentence of {self.server.model!r}: check the "
            "address, or raise max_bytes"
        )

    def _without_key(self, raw: bytes) -> bytes:
        """A server that repeats the key, in an error or in a sentence, must not get it into a log."""
        for form in self._forms:
            raw = raw.replace(form, b"***")
        return raw


def _remedy(reason: str) -> str:
    """Return what to do about a fault that does not go away."""
    if reason in ("no connection", "unknown host"):
        return "start the server, or correct its address"
    if reason == "empty sentence":
        return (
            "the model has nothing to say to a prompt: check chat=, the stop strings, and that max_new_tokens leaves "
            "room after its reasoning"
        )
    if reason in ("invalid JSON", "answer without a sentence"):
        return "check that the address is that of an OpenAI-compatible server"
    if reason == "timeout":
        return "ask for fewer sentences at once (concurrency), or raise request_timeout"
    return "see the server's own log; attempts and longest_wait say how long to go on trying"


def _api_key(variable: str) -> str:
    """Return the key, empty where there is none.

    Raises:
        ConfigError: it has characters that no header can hold; the message does not show them.
    """
    key = os.environ.get(variable, "").strip()
    if all("!" <= character <= "~" for character in key):
        return key
    # What prints the variables of a traceback must not find it.
    del key
    raise ConfigError(
        f"{variable}: expected a key of printable ASCII without blanks, got other characters in it; set it again"
    )
