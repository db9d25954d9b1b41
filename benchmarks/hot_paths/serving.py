"""What our side of a served language model costs, beside a client that does nothing but post and parse."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.hot_paths.timing import Figure
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.served import ServedLM, Server

# The least a server can do: one fixed answer to every request, in a process of its own. It says its port.
_SERVER = """
import asyncio, json
said = {"message": {"role": "assistant", "content": "a quiet film about a family that moves to the sea"}}
body = json.dumps({"model": "m", "choices": [{"index": 0, "finish_reason": "stop", **said}]}).encode()
answer = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body

class Fixed(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.held = transport, b""
    def data_received(self, data):
        self.held += data
        while (end := self.held.find(b"\\r\\n\\r\\n")) >= 0:
            head = self.held[:end].lower()
            at = head.find(b"content-length:")
            size = end + 4 + (int(head[at + 15 :].split(b"\\r\\n", 1)[0]) if at >= 0 else 0)
            if len(self.held) < size:
                return
            self.held = self.held[size:]
            self.transport.write(answer)

async def main():
    server = await asyncio.get_running_loop().create_server(Fixed, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


async def _bare(url: str, prompts: list[str], concurrency: int) -> float:
    """Return the seconds that a bare client takes for all `prompts`, its connections being open."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def worker(queue: Any) -> None:
            for prompt in queue:
                turns = [{"role": "user", "content": prompt}]
                asked = {"model": "m", "max_tokens": 48, "temperature": 1.0, "top_p": 1.0, "seed": 1, "messages": turns}
                async with session.post(f"{url}/chat/completions", json=asked) as response:
                    (await response.json())["choices"][0]["message"]["content"]

        async def everything(some: list[str]) -> None:
            queue = iter(some)
            await asyncio.gather(*(worker(queue) for _ in range(concurrency)))

        await everything(prompts[: 4 * concurrency])
        started = time.perf_counter()
        await everything(prompts)
        return time.perf_counter() - started


def serving(n: int = 4000, repeat: int = 5, concurrency: int = 64) -> list[Figure]:
    """Sentences a second over HTTP from a server that answers at once."""
    prompts = [f'Describe the movie "w{i} (1999)" in one sentence. Focus on this keyword: "sea".' for i in range(n)]
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        lm = ServedLM(Server(url, "m", concurrency=concurrency), Decoding())
        lm.generate(prompts[: 4 * concurrency], np.random.default_rng(0))
        ours = bare = float("inf")
        # Turn by turn: on a shared machine both must meet the same weather.
        for seed in range(repeat):
            bare = min(bare, asyncio.run(_bare(url, prompts, concurrency)))
            started = time.perf_counter()
            lm.generate(prompts, np.random.default_rng(seed))
            ours = min(ours, time.perf_counter() - started)
        lm.close()
    finally:
        process.kill()
        process.wait()
    return [
        Figure(
            "sentences from a server", n / ours, "sentences/s", "higher", 0.9 * n / bare, n / bare,
            "a bare aiohttp client, same server and connections",
        )
    ]  # fmt: skip
