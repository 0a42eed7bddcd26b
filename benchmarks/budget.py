"""Does a RAM budget hold, and does it change the answer? Peak memory of an opened pack under several budgets.

    python -m benchmarks.budget PACK [--budgets 100MiB,200MiB] [--context 1024] [--json]
    python -m benchmarks.budget --pairs 30 [--seed 0]

Each budget runs in a process of its own: it reads a prompt of 600 tokens and writes 64, greedily. `over` is the peak
resident memory, less what interpreter and libraries take before the pack is opened, divided by the budget: at most
1.03 is the promise. The tokens must be the same under every budget.

`--pairs`: so many models of random shapes, each under a budget drawn between the least that is accepted and all of it,
beside a process that takes memory and releases it. Where memory control groups can be made (as root, version 1), every
fifth model also runs with no budget given in a group of 2.5 GiB. Exits with 1 where a promise is broken.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.make_checkpoint import Shape, make_checkpoint
from benchmarks.mmap import GROUPS, capped
from benchmarks.report import write_result
from localmimo.hardware.units import parse_bytes
from quant import convert

OVER = 1.03  # of the budget, at most
GROUP_BYTES = 5 << 29  # the automatic budget leaves 2 GiB of it

CHILD = """
import json, sys
import torch
from localmimo import Sampling, load
from localmimo.engine import Engine
from localmimo.hardware.units import parse_bytes

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

pack, budget, context = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
torch.randn(256, 256) @ torch.randn(256, 256)  # the maths library takes its own memory at the first product
libraries = memory("VmRSS")
with load(pack, ram=budget, context=context, profile=None) as engine:
    opened = memory("VmRSS") - libraries
    done = engine.generate(" water" * 600, max_tokens=64, sampling=Sampling(temperature=0))
    print(json.dumps({
        "budget": budget, "budget_bytes": engine.plan.ram_bytes, "libraries_bytes": libraries,
        "opened_bytes": opened, "peak_bytes": memory("VmHWM") - libraries,
        "over": (memory("VmHWM") - libraries) / engine.plan.ram_bytes,
        "swapped_bytes": memory("VmSwap"),
        "slots": engine.plan.n_slots, "planned_bytes": engine.plan.used_bytes, "tokens": done.tokens,
        "prefill_tps": done.stats.prefill_tps, "decode_tps": done.stats.decode_tps, "hits": done.stats.hits,
    }))
"""


NEIGHBOUR = """
import random, time
while True:
    taken = bytearray(random.randrange(1 << 26, 1 << 29))
    taken[::4096] = b"x" * len(taken[::4096])
    time.sleep(0.1)
    del taken
    time.sleep(0.1)
"""


def measure(pack: Path, budget: str, context: int, group: Path | None = None) -> dict[str, Any]:
    """One run under a budget; "" leaves it to the program."""
    enter = f"echo $$ > {group}/cgroup.procs; " if group else ""
    done = subprocess.run(
        ["sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, "-c", CHILD, str(pack), budget, str(context)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"budget": budget, "refused": said[-1] if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---- pairs of shape and budget ----


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that takes up to half a gigabyte and releases it, over and over."""
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) as process:
        try:
            yield
        finally:
            process.kill()


def random_shape(draw: random.Random) -> Shape:
    """A small model in the proportions of the real ones."""
    kv, times = draw.choice((1, 2, 4)), draw.choice((2, 4))
    return Shape(
        hidden=64 * draw.randrange(2, 9), layers=draw.randrange(3, 10), heads=kv * times * 2, kv_global=kv,
        kv_window=2 * kv, dense_inner=128 * draw.randrange(2, 16), experts=8 * draw.randrange(2, 17),
        expert_inner=64 * draw.randrange(2, 9), top_k=draw.choice((2, 4, 8)), vocab=8192,
        head_dim=128, v_head_dim=128,
    )  # fmt: skip


def make(folder: Path, shape: Shape, seed: int) -> Path:
    source = make_checkpoint(folder / "hf", shape, 0.5, seed)
    for _ in convert(source, folder / "pack", experts="nf4", dense="int8"):
        pass
    return folder / "pack"


def least_bytes(pack: Path, context: int) -> int:
    """The smallest budget: what a refusal names."""
    said = str(measure(pack, "1MiB", context)["refused"])
    asked = re.search(r"Give ram=(\w+)", said)
    assert asked, said
    return parse_bytes(asked[1])


def pair(number: int, seed: int, context: int = 1024) -> dict[str, Any]:
    """One shape and one budget: what was measured, and which promises did not hold."""
    draw = random.Random(f"{seed} {number}")
    shape = random_shape(draw)
    with tempfile.TemporaryDirectory() as folder:
        pack = make(Path(folder), shape, number)
        roomy = measure(pack, "2GiB", context)
        least = least_bytes(pack, context)
        budget = draw.randint(least, max(least, roomy["planned_bytes"]))
        with neighbour():
            tight = measure(pack, str(budget), context)
        runs = {"roomy": roomy, "tight": tight}
        if number % 5 == 0 and os.access(GROUPS, os.W_OK):
            with capped(GROUP_BYTES) as group:
                runs["grouped"] = measure(pack, "", context, group)
    return {"shape": vars(shape), "runs": runs, "broken": broken(runs)}


def broken(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The promises that did not hold."""
    found = [f"{name}: {run['refused']}" for name, run in runs.items() if "refused" in run]
    ran = {name: run for name, run in runs.items() if "refused" not in run}
    found += [f"{name}: {run['over']:.3f} of the budget" for name, run in ran.items() if run["over"] > OVER]
    found += [f"{name}: swapped" for name, run in ran.items() if run["swapped_bytes"]]
    if "grouped" in ran and ran["grouped"]["budget_bytes"] > GROUP_BYTES:
        found.append("grouped: the budget is more than the group has")
    answers = {tuple(run.pop("tokens")) for run in ran.values()}
    return found + ["the tokens differ"] * (len(answers) > 1)


def pairs(n: int, seed: int) -> dict[str, Any]:
    """So many pairs; a line for each on stderr."""
    done = []
    for number in range(n):
        done.append(pair(number, seed))
        tight = done[-1]["runs"]["tight"]
        print(
            number,
            tight.get("budget_bytes"),
            tight.get("over"),
            done[-1]["broken"],
            file=sys.stderr,
            flush=True,
        )
    shares = [run["over"] for it in done for run in it["runs"].values() if "over" in run]
    return {
        "pairs": n,
        "grouped": sum("grouped" in it["runs"] for it in done),
        "tight": [round(it["runs"]["tight"].get("over", 0), 3) for it in done],
        "worst": max(shares, default=None),
        "broken": [line for it in done for line in it["broken"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path, nargs="?")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", default="128MiB,192MiB,256MiB,512MiB")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    if options.pairs:
        found = pairs(options.pairs, options.seed)
        write_result("budget", found)
        sys.exit(1 if found["broken"] else 0)
    if options.pack is None:
        parser.error("name a pack, or give --pairs")
    runs = [measure(options.pack, budget, options.context) for budget in options.budgets.split(",")]
    ran = [run for run in runs if "tokens" in run]
    same = len({tuple(run.pop("tokens")) for run in ran}) <= 1
    if not options.json:
        for run in runs:
            print(run)
    write_result(
        "budget",
        {"runs": runs, "same_tokens": same, "worst": max((run["over"] for run in ran), default=None)},
    )


if __name__ == "__main__":
    main()
