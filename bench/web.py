"""The chat site under load: many websockets open, some of them generating, and HTTP requests meanwhile.

    python -m bench.web [--sockets 200] [--streams 20] [--rounds 3] [--seconds 10] [--delay 0.05]
    python -m bench.web --url http://127.0.0.1:5000 [--sockets 200] [--streams 1]

Without `--url` a site under the real gunicorn is started whose model computes nothing and sends the time of day as its
tokens, one every `--delay` seconds for each stream, so that what a token takes from the model to a client is seen. The
cases take turns: sessions called directly by as many threads, without a site; one stream alone; the streams alone; and
the streams among all sockets. With `--url` a running site is measured, such as the demo's, whose tokens carry no time:
the time between two of them at the client, less what the session itself reports per token (`times`), is what the site
adds.

Client and site share the machine. `HTTP` is `GET /readyz` ten times a second. Memory is that of the site's process.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench.machine import describe_machine
from bench.web_site import StampingModel
from swarm_client.generation.text_session import SamplingParams

SETTLE_S = 2.0
HTTP_EVERY_S = 0.1
ANSWER_TOKENS = 24  # of a running site's answers, which are measured one by one
SHOWN = ("to the client, ms", "between tokens, ms", "added by the site, ms", "HTTP, ms")
QUESTION = "Tell a long story about umbels, in many chapters."


@dataclass(slots=True)
class Load:
    """What was seen while it lasted, in seconds."""

    latencies: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
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


def call_directly(num_streams: int, delay_s: float, duration_s: float) -> Load:
    """Return what threads see that call sessions of the scripted model themselves."""
    load, model = Load(), StampingModel(delay_s=delay_s, max_length=1_000_000)
    begin_s = time.monotonic() + SETTLE_S

    def generate() -> None:
        session = model.open_session(model.max_length)
        session.append_text("hi")
        last_s: float | None = None
        for delta in session.generate(SamplingParams(max_new_tokens=100_000)):
            now_s = time.monotonic()
            if now_s >= begin_s + duration_s:
                return
            if now_s >= begin_s and last_s is not None:
                load.num_tokens += 1
                load.latencies.append(now_s - float(delta.text))
                load.intervals.append(now_s - last_s)
            last_s = now_s

    threads = [threading.Thread(target=generate) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


async def stream(socket: ClientConnection, load: Load, begin_s: float, request: dict[str, Any]) -> None:
    """Generate until cancelled, and note what comes after `begin_s`. Without fields in `request`, tokens are times."""
    messages = [{"role": "user", "content": QUESTION}]
    last_s: float | None = None
    answer: list[float] = []
    while True:
        await socket.send(json.dumps({"type": "generate", "id": "a", "messages": messages, **request}))
        async for frame in socket:
            event: dict[str, Any] = json.loads(frame)
            now_s = time.monotonic()
            if event["type"] == "done":
                if "times" in event and answer:
                    load.added.append(statistics.median(answer) - event["times"]["per_token"]["total_s"])
                last_s, answer = None, []
                break
            assert event["type"] != "error", event
            if event["type"] != "delta" or not event["tokens"]:
                continue
            if now_s >= begin_s:
                load.num_tokens += event["tokens"]
                if not request:
                    load.latencies.append(now_s - float(event["text"]))
                if last_s is not None:
                    load.intervals.append((now_s - last_s) / event["tokens"])
                    answer.append(load.intervals[-1])
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
    request = {} if pid is not None else {"params": {"max_new_tokens": ANSWER_TOKENS}, "times": True}
    async with opened_sockets(url, num_sockets) as sockets:
        if pid is not None:
            load.rss = resident_bytes(pid)
        begin_s = time.monotonic() + SETTLE_S
        tasks = [asyncio.create_task(stream(socket, load, begin_s, request)) for socket in sockets[:num_streams]]
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
    kinds = ("latencies", "intervals", "added", "http")
    seen = {kind: [value for load in loads for value in getattr(load, kind)] for kind in kinds}
    rate = sum(load.num_tokens for load in loads) / (duration_s * len(loads))
    shown = [(seen[kind], share) for kind in kinds for share in (0.5, 0.99)]
    cells = [f"{quantile(values, share):.1f}" if values else "–" for values, share in shown]
    print(f"| {name} | {rate:.0f} | " + " | ".join(cells) + " |")


async def run(options: argparse.Namespace, url: str, pid: int | None) -> None:
    """Measure the cases in turn and print the tables."""
    cases = [(1, 1), (options.streams, options.streams), (options.sockets, options.streams)]
    found: list[list[Load]] = [[] for _ in cases]
    direct = []
    for number in range(options.rounds):
        if pid is not None:
            direct.append(await asyncio.to_thread(call_directly, options.streams, options.delay, options.seconds))
        for loads, (num_sockets, num_streams) in zip(found, cases, strict=True):
            loads.append(await measure(url, num_sockets, num_streams, options.seconds, pid))
        print(f"round {number + 1} done", file=sys.stderr, flush=True)
    print("| case | tokens/s | " + " | ".join(f"{kind} | 99 %" for kind in SHOWN) + " |")
    print("|---" * 10 + "|")
    if direct:
        print_row(f"{options.streams} sessions, no site", direct, options.seconds)
    for loads, (num_sockets, num_streams) in zip(found, cases, strict=True):
        print_row(f"{num_streams} streams, {num_sockets} sockets", loads, options.seconds)
    if pid is not None:
        few, many = found[0][0].rss, found[-1][0].rss
        each = (many - few) / (options.sockets - 1) / 1000
        print(f"\nmemory of an open socket: {each:.0f} kB ({few / 1e6:.0f} MB with one, {many / 1e6:.0f} with all)")


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
