"""Servers for tests, on loopback: a fake language model whose sentence is a function of the request, and a proxy that
puts faults between a client and any OpenAI-compatible server. Only the standard library."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

WORDS = 40


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def prompt(self) -> str:
        asked = self.json
        return asked["messages"][0]["content"] if "messages" in asked else asked["prompt"]


@dataclass(frozen=True)
class Response:
    """What comes back; `hang` never does, `drop` closes the connection, `cut` closes it after half of the body."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: bool = False
    drop: bool = False
    cut: bool = False
    chunked: bool = False

    @classmethod
    def of(cls, value: object, status: int = 200, **headers: str) -> Response:
        return cls(json.dumps(value).encode(), status, headers)


def sentence_of(prompt: str, seed: int | None) -> str:
    """What the fake model says: words that a tiny tokenizer knows, and digests of what it was asked."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    numbers = random.Random(f"{digest} {seed}")
    words = " ".join(f"w{numbers.randrange(WORDS)}" for _ in range(4))
    return f"{words} q{digest[:12]} s{seed}"


def completion(text: str | None, path: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    """An answer in the form of the protocol."""
    choice = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": "stop", **choice}], **more}


class LoopbackServer:
    """An HTTP server in a thread of its own; `answer` says what comes of a request."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.requests: list[Request] = []
        self.connections = 0
        self.under_way = 0
        self.most_under_way = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._run(self._listen())

    def down(self) -> None:
        """Refuse connections, and close those that are open."""
        self._run(self._deafen())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def answer(self, request: Request) -> Response:
        raise NotImplementedError

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _deafen(self) -> None:
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        method, path, headers, body = await read_message(reader)
        request = Request(method, path, headers, body)
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            response = await self.answer(request)
            if response.hang:
                await reader.read(1)  # until the client gives up
        finally:
            self.under_way -= 1
        if response.hang or response.drop:
            return False
        head = {"Content-Type": "application/json", **response.headers}
        head |= {"Transfer-Encoding": "chunked"} if response.chunked else {"Content-Length": str(len(response.body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        sent = response.body[: len(response.body) // 2] if response.cut else response.body
        if response.chunked:
            pieces = [sent[at : at + 1000] for at in range(0, len(sent), 1000)]
            sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))
        writer.write(f"HTTP/1.1 {response.status} Said\r\n{lines}\r\n".encode() + sent)
        await writer.drain()
        if response.cut:
            writer.close()
        return not response.cut


async def read_message(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes]:
    """Read a request or response: the first two words of its first line, its headers, its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    first, second = head[0].split(" ")[:2]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return first, second, headers, body
    return first, second, headers, await reader.readexactly(int(headers.get("content-length", 0)))


class FakeModel(LoopbackServer):
    """A fast server whose sentence is :func:`sentence_of` the prompt and seed.

    Args:
        model: its name for its model.
        system: its ``system_fingerprint``.
        root: where it says the weights are.
        say: what it answers to the n-th completion, n from 0, in place of the usual; None for the usual.
    """

    def __init__(
        self,
        *,
        model: str = "fake",
        system: str | None = None,
        root: str = "/weights/a",
        say: Callable[[int, Request], Response | None] = lambda n, request: None,
        port: int = 0,
    ) -> None:
        self.model, self.system, self.root, self.say = model, system, root, say
        self.asked = 0
        self.listed = 0
        super().__init__(port)

    @property
    def completions(self) -> list[Request]:
        return [request for request in self.requests if request.method == "POST"]

    async def answer(self, request: Request) -> Response:
        if request.method == "GET":
            self.listed += 1
            # As vLLM does it, `created` is the time of the request.
            card = {"id": "fake", "object": "model", "created": self.listed, "owned_by": "tests", "root": self.root}
            return Response.of({"object": "list", "data": [card]})
        self.asked += 1
        if (said := self.say(self.asked - 1, request)) is not None:
            return said
        await asyncio.sleep(0)
        more = {"model": self.model, "system_fingerprint": self.system}
        return Response.of(completion(sentence_of(request.prompt, request.json.get("seed")), request.path, **more))


class FaultProxy(LoopbackServer):
    """Stands before `upstream` (the base address of a server) and spoils some of what passes.

    Args:
        upstream: address.
        share: of requests that are spoiled.
        kinds: in which ways; see :data:`KINDS`.
        seed: of the choice.
    """

    def __init__(self, upstream: str, share: float = 0.2, kinds: tuple[str, ...] = (), seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self.upstream = parts.hostname, parts.port
        self.share, self.kinds = share, kinds or tuple(KINDS)
        self.faults: Counter[str] = Counter()
        self._chance = random.Random(seed)
        super().__init__()

    async def answer(self, request: Request) -> Response:
        spoiled = self._chance.random() < self.share
        kind = self._chance.choice(self.kinds)
        if not spoiled:
            return await self._pass_on(request)
        self.faults[kind] += 1
        before, after = KINDS[kind]
        return before if before is not None else after(await self._pass_on(request))

    async def _pass_on(self, request: Request) -> Response:
        try:
            reader, writer = await asyncio.open_connection(*self.upstream, limit=1 << 24)
        except OSError:
            return Response.of({"error": "bad gateway"}, 502)
        try:
            head = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(request.body))}
            for name in ("content-type", "authorization"):
                head |= {name: request.headers[name]} if name in request.headers else {}
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            writer.write(f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n".encode() + request.body)
            _, status, headers, body = await read_message(reader)
            kept = {name: headers[name] for name in ("retry-after",) if name in headers}
            return Response(body, int(status), kept)
        except (asyncio.IncompleteReadError, ConnectionError):
            return Response.of({"error": "bad gateway"}, 502)
        finally:
            writer.close()


def _emptied(response: Response) -> Response:
    answer = json.loads(response.body)
    for choice in answer.get("choices", ()):
        choice |= {"text": ""} if "text" in choice else {"message": {"role": "assistant", "content": None}}
    return Response.of(answer)


# Fault to what is answered in place of asking upstream, or what becomes of its answer.
KINDS: dict[str, tuple[Response | None, Callable[[Response], Response]]] = {
    "429": (Response.of({"error": "slow down"}, 429, **{"Retry-After": "0.01"}), lambda r: r),
    "500": (Response.of({"error": "oops"}, 500), lambda r: r),
    "drop": (Response(drop=True), lambda r: r),
    "hang": (Response(hang=True), lambda r: r),
    "cut": (None, lambda response: replace(response, cut=True)),
    "garbled": (None, lambda response: replace(response, body=response.body[:-3] + b"<p>")),
    "no choices": (None, lambda _: Response.of({"choices": []})),
    "empty": (None, _emptied),
}
