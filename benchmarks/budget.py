"""Does a RAM budget hold, and does it change the answer? Peak memory of an opened pack under several budgets.

    python -m benchmarks.budget PACK [--budgets 100MiB,200MiB] [--context 1024] [--json]

Each budget runs in a process of its own: it reads a prompt of 600 tokens and writes 64, greedily. `over` is the peak
resident memory, less what interpreter and libraries take before the pack is opened, divided by the budget: at most
1.03 is the promise. The tokens must be the same under every budget.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import json, sys
import torch
from localmimo import Sampling, load
from localmimo.engine import Engine
from localmimo.machine import parse_bytes

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

pack, budget, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.randn(256, 256) @ torch.randn(256, 256)  # the maths library takes its own memory at the first product
libraries = memory("VmRSS")
with load(pack, ram=budget, context=context) as engine:
    opened = memory("VmRSS") - libraries
    done = engine.generate(" water" * 600, max_tokens=64, sampling=Sampling(temperature=0))
    print(json.dumps({
        "budget": budget, "budget_bytes": parse_bytes(budget), "libraries_bytes": libraries, "opened_bytes": opened,
        "peak_bytes": memory("VmHWM") - libraries, "over": (memory("VmHWM") - libraries) / parse_bytes(budget),
        "slots": engine.plan.n_slots, "planned_bytes": engine.plan.used_bytes, "tokens": done.tokens,
        "prefill_tps": done.stats.prefill_tps, "decode_tps": done.stats.decode_tps, "hits": done.stats.hits,
    }))
"""


def measure(pack: Path, budget: str, context: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(pack), budget, str(context)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"budget": budget, "refused": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", default="128MiB,192MiB,256MiB,512MiB")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    runs = [measure(options.pack, budget, options.context) for budget in options.budgets.split(",")]
    ran = [run for run in runs if "tokens" in run]
    same = len({tuple(run.pop("tokens")) for run in ran}) <= 1
    if not options.json:
        for run in runs:
            print(run)
    print(
        json.dumps(
            {"runs": runs, "same_tokens": same, "worst": max((run["over"] for run in ran), default=None)}
        )
    )


if __name__ == "__main__":
    main()
