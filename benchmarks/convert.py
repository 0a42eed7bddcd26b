"""How fast is a conversion, how much memory does it take, and does it survive being killed?

    python -m benchmarks.convert CHECKPOINT [--experts nf4] [--kills 20] [--json]

Converts once in a process of its own (peak resident memory over what interpreter and libraries take, bytes of source
per second), then again with a kill -9 at random moments, starting the same command each time until it is done: the
two packs must be the same byte for byte.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import write_result

START_S = 1.8  # until Python has loaded what it needs and the conversion begins

CHILD = """
import json, sys, time
import torch
from quant import convert
from quant.ops.quantize import quantize

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

quantize(torch.randn(64, 64))
libraries, began = memory("VmRSS"), time.perf_counter()
for progress in convert(sys.argv[1], sys.argv[2], experts=sys.argv[3]):
    pass
print(json.dumps({"seconds": time.perf_counter() - began, "libraries_bytes": libraries,
                  "peak_bytes": memory("VmHWM") - libraries, "pack_bytes": progress.total_bytes,
                  "rms_error": progress.rms_error}))
"""


def command(source: Path, out: Path, experts: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(source), str(out), experts]


def digest(folder: Path) -> str:
    """Names and contents of every file."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def convert_with_kills(source: Path, out: Path, experts: str, kills: int, seconds: float) -> bool:
    """Kill running conversions `kills` times, going on after each; whether each finished pack equals the first."""
    hit, same, moments = 0, True, random.Random(0)
    once = digest(out.with_name("once"))
    while True:
        process = subprocess.Popen(
            command(source, out, experts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            limit = START_S + moments.random() * seconds / 3 if hit < kills else None
            finished = process.wait(timeout=limit) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hit, finished = hit + 1, False
        if finished:
            same = same and digest(out) == once
            if hit >= kills:
                return same
            shutil.rmtree(out)


def measure(source: Path, experts: str, kills: int, folder: Path) -> dict[str, Any]:
    source_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    done = subprocess.run(
        command(source, folder / "once", experts), check=True, capture_output=True, text=True
    )
    facts = json.loads(done.stdout.splitlines()[-1]) | {"source_bytes": source_bytes}
    facts["source_mb_per_s"] = source_bytes / facts["seconds"] / 1e6
    if kills:
        facts["kills"] = kills
        facts["same_bytes"] = convert_with_kills(source, folder / "killed", experts, kills, facts["seconds"])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--experts", default="nf4")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.source.parent) as folder:
        facts = measure(options.source, options.experts, options.kills, Path(folder))
    if not options.json:
        for name, value in facts.items():
            print(f"{name:16} {value}")
    write_result("convert", facts)


if __name__ == "__main__":
    main()
