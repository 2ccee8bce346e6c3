"""The server under 200 clients, one with large requests, and 120 that never read; side by side with another checkout.

    python -m benchmarks.server                                   # this checkout
    python -m benchmarks.server --other ../before --rounds 3      # in turn with another checkout, and ratios

Each round starts `python -m tinygpt serve` of each checkout anew, with random weights: 4 layers of 128, context 128.
While clients are at work, /health is polled 20 times a second. The table has medians over the rounds.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.export_matrix import random_model
from benchmarks.generation import pairs_tokenizer
from tinygpt.model.config import GPTConfig
from tinygpt.model.weights import model_tensors, save_model

CONFIG = GPTConfig(vocab_size=2048, block_size=128)
N_CLIENT, N_NEW = 200, 32
SMALL = {"prompt": "the file returns an error", "max_tokens": N_NEW, "ignore_eos": True, "top_p": 0.95}
LARGE = json.dumps({"prompt": [7] * 1000, "n": 32, "echo": True, "logprobs": 5, "max_tokens": 2}).encode()
UNREAD = json.dumps({"prompt": [[7] * 5000], "n": 6, "echo": True, "logprobs": 5, "max_tokens": 2}).encode()
N_UNREAD = 120
MEASURES = {
    "tokens a second, 200 clients": "tokens",
    "CPU seconds for 1000 tokens": "cpu",
    "/health, 200 clients: median, ms": "median",
    "/health, 200 clients: 99th percentile, ms": "p99",
    "/health, large requests: 99th percentile, ms": "large p99",
    "/health, clients that never read: 99th percentile, ms": "unread p99",
    "memory at the start, MB": "memory",
    "memory at its most, MB": "peak",
    "memory 10 s after all have gone, MB": "left",
}


class Client:
    """Sends requests to a server, each on its own connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def send(self, path: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    async def ask(self, path: str, body: bytes = b"") -> int:
        """Send a request and read the whole answer -> its status."""
        reader, writer = await self.send(path, body)
        raw = await reader.read()
        writer.close()
        return int(raw[9:12])


async def write_small(client: Client, seconds: float, seed: int) -> int:
    """Ask for one text after another -> tokens of those that arrived."""
    n, ends = 0, time.monotonic() + seconds
    while time.monotonic() < ends:
        status = await client.ask(
            "/v1/completions", json.dumps(SMALL | {"seed": seed, "stream": seed % 2 == 0}).encode()
        )
        n += N_NEW * (status == 200)
        await asyncio.sleep(1 if status == 429 else 0)
    return n


async def never_read(client: Client, seconds: float, body: bytes) -> None:
    """Send a request and never read the answer."""
    _, writer = await client.send("/v1/completions", body)
    await asyncio.sleep(seconds)
    writer.close()


async def health_while(client: Client, work: Awaitable[Any]) -> tuple[Any, list[float]]:
    """The result of some work, and the milliseconds of each request to /health meanwhile, at least one."""
    working, found = asyncio.ensure_future(work), list[float]()
    while not working.done() or not found:
        began = time.perf_counter()
        await client.ask("/health")
        found.append(1000 * (time.perf_counter() - began))
        await asyncio.sleep(0.05)
    return await working, found


def percentile(values: list[float], percent: int) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


async def measure(port: int, process: psutil.Process, seconds: float) -> dict[str, float]:
    """Measure what MEASURES names, on one server."""
    client = Client(port)
    await client.ask("/v1/completions", json.dumps(SMALL).encode())
    found = {"memory": process.memory_info().rss / 1e6}

    def cpu() -> float:
        times = process.cpu_times()
        return times.user + times.system

    begun, began = cpu(), time.perf_counter()
    small = asyncio.gather(*(write_small(client, seconds, i) for i in range(N_CLIENT)))
    counts, health = await health_while(client, small)
    found |= {"tokens": sum(counts) / (time.perf_counter() - began), "cpu": 1000 * (cpu() - begun) / sum(counts)}
    found |= {"median": percentile(health, 50), "p99": percentile(health, 99)}

    async def ask_large() -> None:
        for body in [LARGE] * 8 + [UNREAD]:  # UNREAD to see that it is not refused
            status = await client.ask("/v1/completions", body)
            assert status == 200, status

    found["large p99"] = percentile((await health_while(client, ask_large()))[1], 99)
    peak = process.memory_info().rss

    async def watched() -> None:
        nonlocal peak
        unread = asyncio.gather(*(never_read(client, 2 * seconds, UNREAD) for _ in range(N_UNREAD)))
        while not unread.done():
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.1)

    found["unread p99"] = percentile((await health_while(client, watched()))[1], 99)
    await asyncio.sleep(10)
    await client.ask("/health")
    return found | {"peak": max(peak, process.memory_info().rss) / 1e6, "left": process.memory_info().rss / 1e6}


def serve_and(tree: Path, model: Path, act: Callable[[int, psutil.Process], Awaitable[dict[str, float]]]) -> Any:
    """Start a checkout's server and call `act` on it."""
    command = [sys.executable, "-m", "tinygpt", "serve", "--model", f"m={model / 'model'}", "--port", "0"]
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(":", 1)[1])

            async def run() -> dict[str, float]:
                return await act(port, psutil.Process(process.pid))

            return asyncio.run(run())
        finally:
            process.terminate()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of each part (default: %(default)s)")
    args = parser.parse_args()
    trees = [Path(), *([args.other] if args.other else [])]
    found: list[list[dict[str, float]]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(CONFIG)
        save_model(Path(folder) / "model", model.config, model_tensors(model))
        pairs_tokenizer().save(Path(folder) / "tokenizer")
        for _ in range(args.rounds):
            for i, tree in enumerate(trees):
                found[i].append(
                    serve_and(tree, Path(folder), lambda port, process: measure(port, process, args.seconds))
                )
                print(tree, {name: round(value, 1) for name, value in found[i][-1].items()}, file=sys.stderr)
    print("| | this |" + (" other | ratio |\n|---|---|---|---|" if args.other else "\n|---|---|"))
    for title, name in MEASURES.items():
        values = [statistics.median(each[name] for each in of_tree) for of_tree in found]
        ratio = [values[0] / values[1]] if args.other else []
        print(f"| {title} | " + " | ".join([*(f"{v:,.1f}" for v in values), *(f"{r:.2f}" for r in ratio)]) + " |")


if __name__ == "__main__":
    main()
