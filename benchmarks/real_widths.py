"""A checkpoint of real widths and few layers through quantize, verify and chat: memory, speed, and what it says of all.

    python -m benchmarks.make_checkpoint DIR --shape flash|v2.5|pro --layers 2
    python -m benchmarks.real_widths DIR [--ram 6GiB] [--keep]
    python -m benchmarks.real_widths DIR --generated mimo-v2.5-pro [--layers 4]

Runs the commands as a user would, each in a process of its own, and prints its wall time and peak resident memory (of
the whole process). The time for the whole model is that of its bytes at the measured speed. With `--generated` nothing
need lie in DIR: a hub on loopback makes up the files of the first layers of that member, and `quantize
--discard-source` fetches them one by one and deletes them again.
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

from benchmarks.generated import REPOSITORY, first_layers, serving
from benchmarks.report import write_result
from localmimo.model.members import MEMBERS, find_member
from quant.checkpoint.published import published_tensors


def run(*arguments: str) -> dict[str, Any]:
    """One command with --json: its object, its wall and CPU time and its peak resident memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "localmimo", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"localmimo {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    spent = {"seconds": time.perf_counter() - began, "cpu_s": usage.ru_utime + usage.ru_stime}
    return facts | spent | {"peak_rss_bytes": usage.ru_maxrss * 1024}


def whole_model_bytes(config: dict[str, Any]) -> tuple[str, int] | None:
    """The member with these widths and its stored bytes."""
    keys = ("hidden_size", "n_routed_experts", "attention_projection_layout")
    for member in MEMBERS:
        if all(member.config.get(key) == config.get(key) for key in keys):
            return member.title, sum(t.nbytes for t in published_tensors(member.config))
    return None


def convert(source: Path, pack: Path) -> dict[str, Any]:
    """quantize a folder."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    made = run("quantize", str(source), "-o", str(pack), "-y", "-q")
    return made | {"source_bytes": size, "config": json.loads((source / "config.json").read_text())}


def convert_generated(name: str, n_layers: int, pack: Path) -> dict[str, Any]:
    """quantize the first layers of a member, whose files a hub makes up."""
    member = find_member(name)
    if member is None:
        raise SystemExit(f"{name} is none of {', '.join(m.name for m in MEMBERS)}")
    config = first_layers(member.config, n_layers)
    text = (t for t in published_tensors(config) if t.name.startswith(("model.", "lm_head.")))
    with serving(config) as hub:
        made = run(
            "quantize", REPOSITORY, "-o", str(pack), "-y", "-q", "--discard-source", "--endpoint", hub.url
        )
    return made | {"source_bytes": sum(t.nbytes for t in text), "config": config}


def measure(made: dict[str, Any], pack: Path, ram: str) -> dict[str, Any]:
    """verify and chat; everything that was found."""
    print(f"converted in {made['elapsed_s']:.0f} s, peak {made['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    verified = run("verify", str(pack), "-q")
    said = run("chat", str(pack), "Hello", "-n", "16", "--temp", "0", "-c", "4k", "--ram", ram, "-q")
    speed = made["source_bytes"] / made["elapsed_s"]
    facts = {
        "source_bytes": made["source_bytes"],
        "pack_bytes": made["total_bytes"],
        "convert_s": made["elapsed_s"],
        "convert_cpu_s": made["cpu_s"],
        "convert_mb_per_s": speed / 1e6,
        "convert_peak_rss_bytes": made["peak_rss_bytes"],
        "verify_s": verified["seconds"],
        "verify_peak_rss_bytes": verified["peak_rss_bytes"],
        "chat_s": said["seconds"],
        "chat_peak_rss_bytes": said["peak_rss_bytes"],
        "chat_stats": said.get("stats"),
        "load": os.getloadavg()[2],
    }
    if whole := whole_model_bytes(made["config"]):
        facts |= {"whole_model": whole[0], "whole_bytes": whole[1], "whole_hours": whole[1] / speed / 3600}
        facts["whole_cpu_hours"] = whole[1] / made["source_bytes"] * made["cpu_s"] / 3600
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--generated", metavar="MEMBER", help="make the checkpoint up while it is fetched")
    parser.add_argument("--layers", type=int, default=4, help="of --generated: the first is dense")
    parser.add_argument("--ram", default="6GiB", help="budget of the chat")
    parser.add_argument("--keep", action="store_true", help="do not delete the pack")
    options = parser.parse_args()
    pack = options.source.with_name(options.source.name + "-pack")
    try:
        made = (
            convert_generated(options.generated, options.layers, pack)
            if options.generated
            else convert(options.source, pack)
        )
        facts = measure(made, pack, options.ram)
    finally:
        if not options.keep:
            shutil.rmtree(pack, ignore_errors=True)
    for name, value in facts.items():
        print(f"{name:24} {value}")
    write_result("real_widths", facts)


if __name__ == "__main__":
    main()
