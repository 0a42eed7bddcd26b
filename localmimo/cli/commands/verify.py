"""`localmimo verify`: reads a pack back against its checksums, under a progress line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmimo.cli.options import Json, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.packs import pack_folder
from localmimo.cli.ui import Ui, bar, seconds
from localmimo.hardware.units import format_bytes

if TYPE_CHECKING:
    from quant.pack.verify import Report


def verify(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")],
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Read a pack from end to end and compare every checksum."""

    return run_interruptible(lambda: run_verify(pack.expanduser(), ui_of(verbose, quiet), as_json=as_json))


def run_verify(pack: Path, ui: Ui, *, as_json: bool) -> int:
    """Run the command; the exit code."""
    began = time.perf_counter()
    report = read_back(pack_folder(pack), ui)
    spent = time.perf_counter() - began
    if as_json:
        ui.json(
            {
                "pack": str(pack),
                "name": report.name,
                "ok": report.ok,
                "n_files": report.n_files,
                "n_bytes": report.n_bytes,
                "problems": list(report.problems),
                "elapsed_s": round(spent, 3),
            }
        )
    elif report.ok:
        facts = f"{report.n_files} files, {format_bytes(report.n_bytes)}, read in {seconds(spent)}"
        ui.data(f" ✓ {report.name}: checksums ok ({facts}).")
    report.raise_for_problems()
    return 0


def read_back(pack: Path, ui: Ui) -> Report:
    """Verify a pack file by file. Raises BadPack where the folder cannot even be opened."""
    from quant import Pack
    from quant.pack.verify import Report, verify_steps

    with Pack.open(pack) as opened:
        name, n_bytes = opened.name, opened.n_bytes
    problems, n_files = [], 0
    ui.status.show(f" verifying {name} {bar(0)}   0%", now=True)
    for step in verify_steps(pack):
        n_files += 1
        share = step.done_bytes / max(1, step.total_bytes)
        done = f"{format_bytes(step.done_bytes)} of {format_bytes(step.total_bytes)}"
        ui.status.show(f" verifying {name} {bar(share)} {share:4.0%}  {done}")
        if step.problem:
            problems.append(step.problem)
        if ui.verbose:
            ui.note(f" {step.file}: {step.problem or 'ok'}")
    ui.status.clear()
    return Report(name, n_files, n_bytes, tuple(problems))
