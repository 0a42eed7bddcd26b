"""Load on the server: many clients on loopback, many short requests, none lost, memory flat.

    python -m benchmarks.serve                    # 64 clients, 2,000 requests, the embedded model
    python -m benchmarks.serve --pack ~/packs/x --clients 8 --requests 100

Starts `localmimo serve` on a free port and sends to it alone. The last line is one JSON object.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import httpx2
import psutil

from benchmarks.report import write_result

SAMPLE_S = 0.5
WARM_UP = 0.25  # of the requests, before memory counts as settled


@dataclass
class Tally:
    """What happened."""

    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0  # 429, asked again
    failures: list[str] = field(default_factory=list)
    rss: list[tuple[int, int]] = field(default_factory=list)  # requests answered, bytes of the server


async def ask(client: httpx2.AsyncClient, number: int, max_tokens: int, tally: Tally) -> None:
    """One request; a full line is asked again when it says so."""
    body = {
        "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": number % 2 == 0,
    }
    began = time.perf_counter()
    while True:
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 429:
            break
        tally.refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
    if answer.status_code != 200 or (body["stream"] and not answer.text.endswith("data: [DONE]\n\n")):
        tally.failures.append(f"{number}: {answer.status_code} {answer.text[-200:]}")
    tally.latencies_s.append(time.perf_counter() - began)


async def load(url: str, server: psutil.Process, arguments: argparse.Namespace) -> Tally:
    """All requests, by as many clients as wanted."""
    tally = Tally()
    numbers = iter(range(arguments.requests))

    async def visit() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
            for number in numbers:
                await ask(client, number, arguments.max_tokens, tally)

    async def watch() -> None:
        while True:
            tally.rss.append((len(tally.latencies_s), server.memory_info().rss))
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*[visit() for _ in range(arguments.clients)])
    watching.cancel()
    tally.rss.append((len(tally.latencies_s), server.memory_info().rss))
    return tally


def report(tally: Tally, seconds: float, arguments: argparse.Namespace) -> dict[str, object]:
    settled = [rss for done, rss in tally.rss if done >= WARM_UP * arguments.requests]
    ordered = sorted(tally.latencies_s)
    return {
        "clients": arguments.clients,
        "requests": arguments.requests,
        "queue": arguments.queue,
        "max_tokens": arguments.max_tokens,
        "answered": len(tally.latencies_s) - len(tally.failures),
        "lost": arguments.requests - len(tally.latencies_s) + len(tally.failures),
        "failures": tally.failures[:5],
        "refused_429": tally.refused,
        "seconds": round(seconds, 1),
        "requests_per_s": round(arguments.requests / seconds, 1),
        "latency_s": {
            "median": round(statistics.median(ordered), 3),
            "p95": round(ordered[int(0.95 * len(ordered))], 3),
            "worst": round(ordered[-1], 3),
        },
        "rss_mb": {
            "after_warm_up": round(settled[0] / 1e6, 1),
            "highest": round(max(settled) / 1e6, 1),
            "end": round(settled[-1] / 1e6, 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", help="a pack's folder (default: the embedded model)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "localmimo", "serve", *([arguments.pack] if arguments.pack else [])]
    command += ["--port", "0", "--queue", str(arguments.queue)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        try:
            began = time.perf_counter()
            tally = asyncio.run(load(url, psutil.Process(process.pid), arguments))
            write_result("serve", report(tally, time.perf_counter() - began, arguments))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
