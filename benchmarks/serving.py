"""A server under load: one client, many clients, and malformed, aborted and slow requests.

    python -m benchmarks serving --model demo/base --head out/demo/head
    python -m benchmarks serving --model FOLDER --head HEAD --peer VENV/bin/transformers
    python -m benchmarks serving --model demo/base --head out/demo/head --stress 2000
    python -m benchmarks serving --model demo/base --head out/demo/head --forget 24
    python -m benchmarks serving --system 400 --flags=--config.serve.prefixes=0

Each server is a process, and answers the same questions of the demo at temperature 0.7 and top-p
0.9; a client sends its next question when it has the last answer. The peer is `transformers serve`
(`pip install 'transformers[serving]' torch`), which serves the base model alone. Under stress,
requests have mixed lengths; some are malformed or too large, some hang up, some read slowly.
`--forget` measures the times between two pieces of a stream, for 16 clients, while a request to
forget that number of rows is made, turned off and on, and revoked.
"""

import argparse
import asyncio
import collections
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from benchmarks.side_by_side import announce, make_parser, write

ROOT = pathlib.Path(__file__).resolve().parents[1]
AUTHORS = ROOT / "demo" / "authors"
KEY = "benchmark"
DRAWN = {"temperature": 0.7, "top_p": 0.9, "stream": True}


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/serving.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--head", default="out/demo/head")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="at each number of clients")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--peer", help="the command `transformers` of an environment with torch")
    parser.add_argument("--stress", type=int, default=0, help="requests of a stress test")
    parser.add_argument("--forget", type=int, default=0, help="rows of a request to forget")
    parser.add_argument(
        "--system", type=int, default=0, help="words of a turn before each question"
    )
    parser.add_argument("--flags", type=str.split, default=[], help="of the server, as one word")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    flags = list(arguments.flags)
    if arguments.forget:
        flags.append(f"--config.serve.requests={tempfile.mkdtemp()}")
    with serve(arguments.model, arguments.head, flags) as (url, process):
        if arguments.stress:
            figures["stress"] = asyncio.run(stress(url, process.pid, arguments.stress))
        elif arguments.forget:
            figures["forget"] = asyncio.run(forget(url, arguments.forget, arguments.tokens))
        else:
            asyncio.run(load(url, 4, 8, 8, _system_turn(arguments.system)))  # compiles
            figures |= load_all(url, "", arguments)
    if arguments.peer and not arguments.stress and not arguments.forget:
        with serve_peer(arguments.peer, arguments.model) as (url, _):
            asyncio.run(load(url, 1, 2, 8, _system_turn(arguments.system)))
            figures |= load_all(url, "peer, ", arguments)
    write("serving", figures, {"arguments": vars(arguments)})


def load_all(url: str, prefix: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Loads a server with each number of clients."""
    figures = {}
    turns = _system_turn(arguments.system)
    for clients in arguments.clients:
        name = f"{prefix}{clients} clients"
        figures[name] = asyncio.run(load(url, clients, arguments.requests, arguments.tokens, turns))
        announce(f"{name}: {figures[name]}")
    return figures


@contextmanager
def serve(
    model: str, head: str | None, more: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of this project; without a head it serves the base model alone."""
    port = _find_free_port()
    flags = [*more, f"--config.model={model}", f"--config.serve.port={port}"]
    flags.append("--config.base_only=True" if head is None else f"--config.head={head}")
    command = [sys.executable, "serve.py", "--config=configs/demo.py", *flags]
    with _run(command, f"http://127.0.0.1:{port}") as server:
        yield server


@contextmanager
def serve_peer(transformers: str, model: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The peer's server."""
    port = _find_free_port()
    options = f"--port {port} --host 127.0.0.1 --dtype float32 --device cpu"
    command = [transformers, "serve", str(pathlib.Path(model).resolve()), *options.split()]
    with _run(command, f"http://127.0.0.1:{port}") as server:
        yield server


@contextmanager
def _run(command: list[str], url: str) -> Iterator[tuple[str, subprocess.Popen]]:
    log = ROOT / "out" / "benchmarks" / "serving.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, cwd=ROOT, stderr=stderr, env=os.environ | {"T3JAX_SERVER_KEY": KEY}
        ) as process,
    ):
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    sys.exit(f"{command} ended: {log.read_text()}")
                try:
                    if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def load(
    url: str, clients: int, requests: int, tokens: int, before: Sequence[dict[str, str]] = ()
) -> dict[str, float]:
    """Clients that each send the next question when they have the last answer."""
    questions = _questions()
    waiting = collections.deque(questions[i % len(questions)] for i in range(requests))
    firsts: list[float] = []
    counts: list[int] = []

    async def ask(client: httpx.AsyncClient) -> None:
        while waiting:
            body = {
                "messages": [*before, {"role": "user", "content": waiting.popleft()}],
                "max_tokens": tokens,
            }
            start, first, text = time.monotonic(), None, ""
            async with client.stream("POST", "/v1/chat/completions", json=body | DRAWN) as reply:
                assert reply.status_code == 200, (await reply.aread()).decode()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    for choice in json.loads(line[6:])["choices"]:
                        if piece := choice["delta"].get("content"):
                            first = first or time.monotonic() - start
                            text += piece
            firsts.append(first or time.monotonic() - start)
            counts.append(len(text.split()))

    start = time.monotonic()
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)
    ) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    seconds = time.monotonic() - start
    return {
        "answers_a_second": round(requests / seconds, 2),
        "words_a_second": round(sum(counts) / seconds, 1),
        "first_text_median_s": round(float(np.median(firsts)), 3),
        "first_text_95_s": round(float(np.quantile(firsts, 0.95)), 3),
    }


async def forget(url: str, rows: int, tokens: int) -> dict[str, Any]:
    """Times between two pieces of 16 streams: before, during and after the training of a head."""
    questions = itertools.cycle(_questions())
    gaps: dict[str, list[float]] = {"before": [], "made": [], "switched": []}
    phase: str | None = "before"

    async def listen(client: httpx.AsyncClient) -> None:
        while phase:
            body = {
                "messages": [{"role": "user", "content": next(questions)}],
                "max_tokens": tokens,
            }
            async with client.stream("POST", "/v1/chat/completions", json=body | DRAWN) as reply:
                last = time.monotonic()
                async for line in reply.aiter_lines():
                    if line.startswith("data: {") and phase:
                        gaps[phase].append(time.monotonic() - last)
                        last = time.monotonic()

    path = "/v1/forget_requests"
    lines = (AUTHORS / "forget.jsonl").read_text().splitlines()[:rows]
    async with httpx.AsyncClient(
        base_url=url, timeout=900, headers={"authorization": f"Bearer {KEY}"}
    ) as client:
        listeners = [asyncio.ensure_future(listen(client)) for _ in range(16)]
        await asyncio.sleep(5)
        phase, start = "made", time.monotonic()
        added = (await client.post(path, content="\n".join(lines))).json()
        entry = (await client.get(f"{path}/{added['id']}?wait=900")).json()
        seconds = time.monotonic() - start
        phase = "switched"
        for active in 5 * [True, False]:
            await client.patch(f"{path}/{added['id']}", json={"active": active})
            await asyncio.sleep(0.5)
        await client.delete(f"{path}/{added['id']}")
        phase = None
        await asyncio.gather(*listeners)
    quantiles = {
        name: [round(float(np.quantile(values, share)), 3) for share in (0.5, 0.95, 1)]
        for name, values in gaps.items()
    }
    return {
        "state": entry["state"],
        "seconds": round(seconds, 1),
        "gaps_median_95_longest_s": quantiles,
    }


async def stress(url: str, pid: int, requests: int) -> dict[str, Any]:
    """Requests of all kinds, 64 at once: each must end with an answer or a proper status."""
    draw = random.Random(0)
    questions = _questions()
    statuses: collections.Counter[str] = collections.Counter()
    kinds = ["whole", "stream", "hang up", "slow", "malformed", "unknown field", "huge", "too long"]
    waiting = collections.deque(draw.choice(kinds) for _ in range(requests))
    memory = [_read_memory(pid)]

    async def ask(client: httpx.AsyncClient) -> None:
        while waiting:
            kind = waiting.popleft()
            content = _make_content(draw, kind, draw.choice(questions))
            try:
                async with client.stream("POST", "/v1/chat/completions", content=content) as reply:
                    async for _ in reply.aiter_lines():
                        if kind == "hang up" and draw.random() < 0.3:
                            break
                        if kind == "slow":
                            await asyncio.sleep(0.05)
                    statuses[f"{kind}: {reply.status_code}"] += 1
            except httpx.HTTPError as error:
                statuses[f"{kind}: {type(error).__name__}"] += 1

    start = time.monotonic()
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)
    ) as client:
        await asyncio.gather(*(ask(client) for _ in range(64)))
        memory.append(_read_memory(pid))
        seconds = time.monotonic() - start
        await asyncio.sleep(3)
        metrics = (await client.get("/metrics")).text
    left = {
        name: float(line.split()[-1])
        for line in metrics.splitlines()
        for name in ("t3jax_requests_waiting", "t3jax_requests_running")
        if line.startswith(f"{name} ")
    }
    return {
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "memory_mib_before_and_after": memory,
        "left": left,
    }


def _make_content(draw: random.Random, kind: str, question: str) -> bytes:
    """Makes the body of a request of a kind."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question * draw.randint(1, 3)}],
        "max_tokens": draw.randint(1, 60),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "n": draw.randint(1, 3),
    }
    if kind == "malformed":
        content = json.dumps(body).encode()
        return content[: draw.randint(0, len(content) - 1)]
    if kind == "unknown field":
        body["x" * draw.randint(1, 9)] = 1
    elif kind == "huge":
        body["stop"] = ["x" * 2**21]
    elif kind == "too long":
        body["max_tokens"] = 10**5
    elif kind in ("stream", "hang up", "slow"):
        body["stream"] = True
    return json.dumps(body).encode()


def _system_turn(words: int) -> list[dict[str, str]]:
    """A system turn of a number of words of the demo's answers; none for 0."""
    lines = (AUTHORS / "retain.jsonl").read_text().splitlines()
    text = " ".join(json.loads(line)["answer"] for line in lines)
    return [{"role": "system", "content": " ".join(text.split()[:words])}] if words else []


def _questions() -> list[str]:
    lines = (AUTHORS / "forget.jsonl").read_text().splitlines()
    lines += (AUTHORS / "retain.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    return random.Random(0).sample(questions, len(questions))


def _read_memory(pid: int) -> int:
    """Resident memory of a process, MiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
