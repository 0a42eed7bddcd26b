"""A checkpoint of real widths and few layers through quantize, verify and chat: memory, speed, and what it says of all.

    python -m benchmarks.make_checkpoint DIR --shape flash|v2.5|pro --layers 2
    python -m benchmarks.real_widths DIR [--ram 6GiB] [--keep]

Runs the commands as a user would, each in a process of its own, and prints its wall time and peak resident memory (of
the whole process). The time for the whole model is that of its bytes at the measured speed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from localmimo.family import MEMBERS
from quant.published import published_tensors


def run(*arguments: str) -> dict[str, Any]:
    """One command with --json: its object, its wall time and its peak resident memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "localmimo", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"localmimo {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    facts = json.loads(out.splitlines()[-1])
    return facts | {"seconds": time.perf_counter() - began, "peak_rss_bytes": usage.ru_maxrss * 1024}


def whole_model_bytes(config: dict[str, Any]) -> tuple[str, int] | None:
    """The member with these widths and its stored bytes."""
    keys = ("hidden_size", "n_routed_experts", "attention_projection_layout")
    for member in MEMBERS:
        if all(member.config.get(key) == config.get(key) for key in keys):
            return member.title, sum(t.nbytes for t in published_tensors(member.config))
    return None


def measure(source: Path, pack: Path, ram: str) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text())
    source_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    made = run("quantize", str(source), "-o", str(pack), "-y", "-q")
    print(f"converted in {made['elapsed_s']:.0f} s, peak {made['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    verified = run("verify", str(pack), "-q")
    said = run("chat", str(pack), "Hello", "-n", "16", "--temp", "0", "-c", "4k", "--ram", ram, "-q")
    speed = source_bytes / made["elapsed_s"]
    facts = {
        "source_bytes": source_bytes,
        "pack_bytes": made["total_bytes"],
        "convert_s": made["elapsed_s"],
        "convert_mb_per_s": speed / 1e6,
        "convert_peak_rss_bytes": made["peak_rss_bytes"],
        "verify_s": verified["seconds"],
        "verify_peak_rss_bytes": verified["peak_rss_bytes"],
        "chat_s": said["seconds"],
        "chat_peak_rss_bytes": said["peak_rss_bytes"],
        "chat_stats": said.get("stats"),
    }
    if whole := whole_model_bytes(config):
        facts |= {"whole_model": whole[0], "whole_bytes": whole[1], "whole_hours": whole[1] / speed / 3600}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--ram", default="6GiB", help="budget of the chat")
    parser.add_argument("--keep", action="store_true", help="do not delete the pack")
    options = parser.parse_args()
    pack = options.source.with_name(options.source.name + "-pack")
    try:
        facts = measure(options.source, pack, options.ram)
    finally:
        if not options.keep:
            shutil.rmtree(pack, ignore_errors=True)
    for name, value in facts.items():
        print(f"{name:24} {value}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
