"""The chat site under load: many websockets open, some of them generating, and HTTP requests meanwhile.

    python -m bench.web [--sockets 200] [--streams 20] [--rounds 3] [--seconds 10] [--delay 0.05]
    python -m bench.web --url http://127.0.0.1:5000 [--sockets 200] [--streams 1]

Without `--url` a site under the real gunicorn is started whose model computes nothing and sends the time of day as its
tokens, one every `--delay` seconds for each stream, so that what a token takes from the model to a client is seen. Two
cases take turns: one stream alone, and the streams among all sockets. With `--url` a running site is measured, such as
the demo's, whose tokens carry no time: the time between two of them is compared instead.

Client and site share the machine. `HTTP` is `GET /readyz` ten times a second. Memory is that of the site's process.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench.machine import describe_machine

SETTLE_S = 2.0
HTTP_EVERY_S = 0.1
MANY_TOKENS = 100_000
QUESTION = "Tell a long story about umbels, in many chapters."


@dataclass(slots=True)
class Load:
    """What was seen while it lasted, in seconds."""

    latencies: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    http: list[float] = field(default_factory=list)
    rss: int = 0
    num_tokens: int = 0


@contextlib.contextmanager
def scripted_site(num_sockets: int, delay_s: float) -> Iterator[str]:
    """Yield the address of a site that computes nothing."""
    command = [sys.executable, "-m", "bench.web_site", "--sockets", str(num_sockets), "--delay", str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("ready: ").strip()
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def opened_sockets(url: str, number: int) -> AsyncIterator[list[ClientConnection]]:
    """Yield so many websockets that are open in protocol 3."""
    address = url.replace("http", "ws", 1) + "/api/v2/generate"
    async with contextlib.AsyncExitStack() as stack:
        sockets = []
        for _ in range(number):
            socket = await stack.enter_async_context(connect(address, origin=url, compression=None, max_queue=None))  # type: ignore[arg-type]
            await socket.send(json.dumps({"type": "open", "protocol": 3}))
            answer = json.loads(await socket.recv())
            assert answer["type"] == "opened", answer
            sockets.append(socket)
        yield sockets


async def stream(socket: ClientConnection, load: Load, begin_s: float) -> None:
    """Generate until cancelled, and note what comes after `begin_s`."""
    messages = [{"role": "user", "content": QUESTION}]
    last_s: float | None = None
    while True:
        await socket.send(json.dumps({"type": "generate", "id": "a", "messages": messages, "params": {}}))
        async for frame in socket:
            event: dict[str, Any] = json.loads(frame)
            now_s = time.monotonic()
            if event["type"] == "done":
                last_s = None
                break
            assert event["type"] != "error", event
            if event["type"] != "delta" or not event["tokens"]:
                continue
            if now_s >= begin_s:
                load.num_tokens += event["tokens"]
                with contextlib.suppress(ValueError):  # a real model's token is no time
                    load.latencies.append(now_s - float(event["text"]))
                if last_s is not None:
                    load.intervals.append((now_s - last_s) / event["tokens"])
            last_s = now_s


async def ask_http(url: str, load: Load) -> None:
    """Ask for the probe again and again."""
    async with httpx.AsyncClient(timeout=30.0) as client:
        while True:
            began_s = time.monotonic()
            (await client.get(f"{url}/readyz")).raise_for_status()
            load.http.append(time.monotonic() - began_s)
            await asyncio.sleep(HTTP_EVERY_S)


async def measure(url: str, num_sockets: int, num_streams: int, duration_s: float, pid: int | None) -> Load:
    """Return what is seen with so many sockets, of which so many generate."""
    load = Load()
    async with opened_sockets(url, num_sockets) as sockets:
        if pid is not None:
            load.rss = resident_bytes(pid)
        begin_s = time.monotonic() + SETTLE_S
        tasks = [asyncio.create_task(stream(socket, load, begin_s)) for socket in sockets[:num_streams]]
        tasks.append(asyncio.create_task(ask_http(url, load)))
        done, _ = await asyncio.wait(tasks, timeout=SETTLE_S + duration_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
    return load


def resident_bytes(pid: int) -> int:
    """Return the memory of a process that is in RAM."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile in milliseconds; 0 of nothing."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def print_row(name: str, loads: Sequence[Load], duration_s: float) -> None:
    """Print a case over all rounds."""
    latencies, intervals = ([v for load in loads for v in getattr(load, kind)] for kind in ("latencies", "intervals"))
    http = [value for load in loads for value in load.http]
    rate = sum(load.num_tokens for load in loads) / (duration_s * len(loads))
    shown = [(latencies, 0.5), (latencies, 0.99), (intervals, 0.5), (intervals, 0.99), (http, 0.5), (http, 0.99)]
    cells = [f"{quantile(values, share):.1f}" if values else "–" for values, share in shown]
    print(f"| {name} | {rate:.0f} | " + " | ".join(cells) + " |")


async def run(options: argparse.Namespace, url: str, pid: int | None) -> None:
    """Measure both cases in turn and print the tables."""
    cases = [(1, 1), (options.sockets, options.streams)]
    found: list[list[Load]] = [[], []]
    for number in range(options.rounds):
        for loads, (num_sockets, num_streams) in zip(found, cases, strict=True):
            loads.append(await measure(url, num_sockets, num_streams, options.seconds, pid))
            print(f"round {number + 1}: {num_streams} of {num_sockets} sockets done", file=sys.stderr, flush=True)
    print("| case | tokens/s | to the client, ms, median | 99 % | between tokens, ms | 99 % | HTTP, ms | 99 % |")
    print("|---" * 8 + "|")
    for loads, (num_sockets, num_streams) in zip(found, cases, strict=True):
        print_row(f"{num_streams} streams, {num_sockets} sockets", loads, options.seconds)
    if pid is not None:
        few, many = (loads[0].rss for loads in found)
        each = (many - few) / (options.sockets - 1)
        print(
            f"\nmemory of an open socket: {each / 1000:.0f} kB ({few / 1e6:.0f} MB with one, {many / 1e6:.0f} with all)"
        )


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running site; else a scripted one is started")
    parser.add_argument("--sockets", type=int, default=200)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--delay", type=float, default=0.05, help="between two tokens of a stream")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    site = contextlib.nullcontext(options.url) if options.url else scripted_site(options.sockets, options.delay)
    with site as url:
        pid = None if options.url else int(httpx.get(f"{url}/test/counts").json()["pid"])
        asyncio.run(run(options, url.rstrip("/"), pid))


if __name__ == "__main__":
    main()
