"""Does `localmimo plan` predict the speed? Ten budgets of one pack, each held against a run of `localmimo bench`.

    python -m benchmarks.plan_check PACK [--budgets 10] [--only 1,5,10] [--tokens 33] [--json]

PACK should be random and far bigger than the caches (`make_checkpoint --shape mid`, quantized). The budgets go from the
least that the pack accepts to one that holds every expert. Each run measures the machine just before and just after,
and predicts decode from that and from its own hit rate (`bench --check-plan`): `inside` says how many of the measured
speeds lie in the predicted range (target: all), `widest` how wide a range is at most (target: a factor of two).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import write_result
from localmimo import load

MIB = 1 << 20


def budgets(pack: Path, n: int) -> list[int]:
    """n RAM budgets in MiB, evenly from one token's experts to all of them, and a little over each end."""
    with load(pack, context=1024, profile=None, draft=0) as engine:
        plan = engine.plan
        fixed = plan.used_bytes - plan.slots_bytes
        least = fixed + engine.config.pages_per_token * plan.page_bytes
        most = fixed + plan.n_pages * plan.page_bytes
    return [round((1.01 * least + (most - least) * i / (n - 1)) / MIB) for i in range(n)]


def check(pack: Path, mib: int, n_tokens: int) -> dict[str, Any]:
    """One budget: the figures of `bench --check-plan`, or the least budget that the pack accepts."""
    command = [
        sys.executable, "-m", "localmimo", "bench", str(pack), "--ram", f"{mib}MiB", "-c", "1024", "-p", "16",
        "-n", str(n_tokens), "-r", "2", "--check-plan", "--json", "-q",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        least = re.search(r"Give --ram (\d+)MiB", done.stderr)
        if least is None:
            raise SystemExit(done.stderr)
        return check(pack, int(least[1]), n_tokens)
    facts = json.loads(done.stdout.splitlines()[-1])
    (found,) = facts["results"]
    return {"ram_mib": mib, "load": os.getloadavg()[0], "speeds": facts["speeds"]} | found["plan_check"]


def line(run: dict[str, Any]) -> str:
    """One budget for people."""
    low, high = run["predicted_tps"]
    disk, again, products = (
        "/".join(f"{speeds[name] / 1e9:.1f}" for speeds in run["speeds"])
        for name in ("disk_read", "disk_again", "products")
    )
    return (
        f"{run['ram_mib']:>6} MiB  found in RAM {run['hit_rate']:>4.0%}  predicted {low:.2f} to {high:.2f}  "
        f"measured {run['measured_tps']:.2f}{'' if run['inside'] else ' OUTSIDE'}  "
        f"(before/after: disk {disk}, again {again}, products {products} GB/s; load {run['load']:.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--only", help="numbers of budgets, such as 1,5,10")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    chosen = [int(n) - 1 for n in options.only.split(",")] if options.only else range(options.budgets)
    sizes = budgets(options.pack, options.budgets)
    runs = []
    for number in chosen:
        runs.append(check(options.pack, sizes[number], options.tokens))
        if not options.json:
            print(line(runs[-1]), flush=True)
    widest = max(run["predicted_tps"][1] / run["predicted_tps"][0] for run in runs)
    write_result(
        "plan_check",
        {"inside": sum(run["inside"] for run in runs), "of": len(runs), "widest": widest, "runs": runs},
    )


if __name__ == "__main__":
    main()
