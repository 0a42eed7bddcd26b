"""The card of a measurement: the machine, the pack, the requested and the effective settings.

Knows facts and their texts; measures nothing.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo import __version__
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes

if TYPE_CHECKING:
    from localmimo.bench.corpus import Corpus
    from localmimo.engine import Engine


def card(requested: dict[str, Any], engine: Engine, corpus: Corpus) -> dict[str, Any]:
    """Under what conditions the figures were found."""
    machine = Machine.probe()
    return {
        "version": __version__,
        "commit": commit(),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": processor(),
            **asdict(machine),
        },
        "pack_bytes": engine.pack.n_bytes,
        "text": {"from": str(corpus), "answer": "greedy" if corpus.is_text else "drawn"},
        "requested": requested,
        "effective": engine.effective(),
    }


def card_lines(facts: dict[str, Any], engine: Engine) -> Iterator[str]:
    """The card for people."""
    machine, requested, effective = facts["machine"], facts["requested"], facts["effective"]
    commit = f" ({facts['commit']})" if facts["commit"] else ""
    yield " · ".join(
        [
            f"localmimo {facts['version']}{commit}",
            machine["processor"],
            f"{machine['n_cores']} cores",
            f"{format_bytes(machine['ram_bytes'])} RAM",
            machine["system"],
        ]
    )
    yield " · ".join(
        [
            str(effective["model"]),
            str(effective["experts"]),
            f"{format_bytes(facts['pack_bytes'])} pack {str(effective['pack_id'])[:12]}",
            f"context {effective['context']:,}",
        ]
    )
    yield str(engine.plan)
    yield "asked: " + " · ".join(_requested(requested))
    yield "in force: " + " · ".join(_in_force(effective))
    yield f"text: {facts['text']['from']}; the answer is " + (
        "the likeliest token each time" if facts["text"]["answer"] == "greedy" else "drawn likewise"
    )


def _requested(requested: dict[str, Any]) -> Iterator[str]:
    yield f"prompt {requested['prompt_tokens']:,}"
    yield f"answer {requested['max_tokens']:,}"
    yield f"{requested['repeat']} {'run' if requested['repeat'] == 1 else 'runs'}"
    yield f"RAM {requested['ram'] or 'what is free'}"
    if requested["device"] != "auto":
        yield f"device {requested['device']}"
    if requested["vram"]:
        yield f"VRAM {requested['vram']}"
    if requested["cold"]:
        yield "cold: each run opens the pack anew, no expert in memory, no profile, depth and prompt read together"
    else:
        yield "warm: after a prompt and answer that do not count"
        yield f"profile {requested['profile'] or 'none'}"


def _in_force(effective: dict[str, Any]) -> Iterator[str]:
    gpu = f" ({effective['gpu']})" if effective["gpu"] else ""
    yield f"{effective['device']}{gpu}, {effective['threads']} threads"
    yield f"kernels {effective['kernels']}"
    yield f"activations {effective['dtype']}, KV {effective['kv_dtype']}"
    gpu = f", {effective['gpu_slots_now']:,} on the GPU" if effective["gpu"] else ""
    yield f"{effective['slots_now']:,} slots{gpu}"
    if effective["pinned"] is False:
        yield "RAM not pinned"
    if effective["graphs"] not in (None, "on"):
        yield f"no graphs: {effective['graphs']}"
    heads = effective["draft"]["heads"]
    yield f"drafts {effective['draft']['setting']} of {heads} heads" if heads else "no drafts"
    yield f"prefetch {'on' if effective['prefetch'] else 'off'}"
    yield "checksums checked" if not effective["trust"] else "checksums trusted"


def commit() -> str | None:
    """The commit of a source tree that this runs from."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
