"""What all benchmarks share: a timer, the facts of the machine, and the form of a result.

A result is one JSON object: the last line on stdout, and a file in benchmarks/results/. It must not know what is
measured, and imports nothing but the standard library.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work returns, and its seconds."""
    began = time.perf_counter()
    out = work()
    return out, time.perf_counter() - began


def machine_card() -> dict[str, object]:
    """The machine, its load, and the versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": _torch_version(),
        "commit": _commit(),
    }


def write_result(name: str, facts: Mapping[str, object], results: Path = RESULTS) -> None:
    """Print the result of a benchmark as one line of JSON, and keep it as NAME.json in `results`."""
    card = {"benchmark": name, "machine": machine_card()}
    text = json.dumps({**card, **facts}, default=str)
    try:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.json").write_text(text + "\n")
    except OSError as error:
        print(f"The result is not kept: {error}.", file=sys.stderr)
    print(text, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _torch_version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this working tree, with a + where files differ from it; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
