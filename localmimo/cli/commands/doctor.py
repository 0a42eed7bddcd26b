"""`localmimo doctor`: is this machine fit to run a model, and what to do where it is not. Each line ok, warn or fail.

Knows the machine and, where one is named, a pack; runs no model.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from localmimo.cli.options import Json, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.ui import Ui
from localmimo.errors import LocalMimoError, with_flags
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes

Verdict = Literal["ok", "warn", "fail"]
SYMBOLS = {"ok": "✓", "warn": "!", "fail": "✗"}
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub")
MIN_RAM_BYTES = 13 << 30  # what V2-Flash needs with a short context
SLOW_DISK = 1e9
DEFAULT_PAGE = 13_373_440  # of V2-Flash at 4.25 bits


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was checked, the result, and what would fix it."""

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""
    facts: dict[str, Any] | None = None


Findings = Iterator[Finding]


def doctor(
    pack: Annotated[
        str | None, typer.Argument(metavar="PACK", help="Also check this pack, and its disk.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Do not read the pack through; take measurements of the last week."),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Look at this machine: software, kernels, memory, disk, GPU, a pack; each with what would mend it.

    Exits with 1 where something fails; warnings do not.
    """
    return run_interruptible(lambda: run_doctor(pack, ui_of(verbose, quiet), as_json=as_json, quick=quick))


def run_doctor(pack: str | None, ui: Ui, *, as_json: bool, quick: bool) -> int:
    """Run the command; the exit code: 1 where something fails."""
    findings = []
    for check in (_versions, _kernels, _gpu, _memory, _huge_pages, _pinned, _home, _disks(pack, quick)):
        for finding in check():
            findings.append(finding)
            if not as_json:
                ui.data(_line(finding))
    if pack is not None:
        findings += _shown(_integrity(pack, ui, quick), ui, as_json)
    ui.status.clear()
    failed = any(finding.verdict == "fail" for finding in findings)
    if as_json:
        ui.json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    return 1 if failed else 0


def _shown(findings: Findings, ui: Ui, as_json: bool) -> list[Finding]:
    out = []
    for finding in findings:
        out.append(finding)
        if not as_json:
            ui.data(_line(finding))
    return out


def _line(finding: Finding) -> str:
    fix = f"\n   {'':<15} → {finding.fix}" if finding.fix else ""
    return f" {SYMBOLS[finding.verdict]} {finding.subject:<15} {finding.found}{fix}"


# ---- software ----


def _versions() -> Findings:
    from localmimo import __version__

    found = {"localmimo": __version__, "python": platform.python_version()}
    missing = []
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    if missing:
        fix = f"pip install {' '.join(missing)}"
        yield Finding("versions", "fail", f"{text}; missing: {', '.join(missing)}", fix, found)
    else:
        yield Finding("versions", "ok", text, facts=found)


OVERHEAD = (
    "import sys; from localmimo.bench.calibrate import layer_seconds; "
    "print(layer_seconds(float(sys.argv[1]), anew=sys.argv[2] == 'anew'))"
)


def _overhead(ram_read: float, quick: bool) -> Findings:
    """The embedded model answers, in a process of its own: shows that it runs, and what a layer costs."""
    command = [sys.executable, "-c", OVERHEAD, str(ram_read), "kept" if quick else "anew"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("engine", "fail", f"the embedded model does not run: {last}", "Reinstall localmimo.")
        return
    seconds = float(done.stdout.split()[-1])
    text = f"the embedded model answers; a layer takes {1e3 * seconds:.2f} ms beyond its bytes"
    yield Finding("engine", "ok", text, facts={"layer_s": seconds})


def _kernels() -> Findings:
    """In a process of their own: importing torch takes seconds, and a broken install should only cost a line."""
    code = (
        "import json, torch; from quant import kernels; "
        "print(json.dumps({'isa': kernels.isa(), 'supported': kernels.supported(), 'threads': kernels.threads()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("kernels", "fail", f"they cannot be loaded: {last}", "Reinstall localmimo.")
        return
    facts = json.loads(done.stdout)
    if facts["isa"] == "torch-reference":
        yield Finding(
            "kernels",
            "warn",
            "the torch reference, which is many times slower: no native module was built",
            "Install a C++17 compiler (apt install g++), then reinstall localmimo.",
            facts,
        )
        return
    why = f"the best of what this CPU runs ({', '.join(facts['supported'])})"
    slow = facts["isa"] in ("portable", "scalar", "generic")
    yield Finding(
        "kernels",
        "warn" if slow else "ok",
        f"{facts['isa']}, {why}, on {facts['threads']} threads",
        "A CPU with AVX2 or AVX-512 would be several times faster." if slow else "",
        facts,
    )


# ---- hardware ----


GPU = (
    "import json; from dataclasses import asdict; from localmimo.hardware.device import find_device; "
    "from localmimo.errors import NoDevice, with_flags\n"
    "try: print(json.dumps(asdict(find_device('cuda'))))\n"
    "except NoDevice as error: print(json.dumps({'error': with_flags(error)}))"
)


def _gpu() -> Findings:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("GPU", "ok", "no NVIDIA driver found: the CPU computes")
        return
    query = ["--query-gpu=name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current"]
    done = subprocess.run([tool, *query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        yield Finding("GPU", "warn", f"nvidia-smi fails: {reason[0]}", "Reinstall the driver, or reboot.")
        return
    for row in done.stdout.strip().splitlines():
        name, memory, driver, generation, width = (cell.strip() for cell in row.split(","))
        yield Finding("GPU", "ok", f"{name}, {memory}, driver {driver}, PCIe {generation} x{width}")
    yield from _gpu_kernels()


def _gpu_kernels() -> Findings:
    """Whether `--device auto` would compute on the GPU, in a process of its own, as `_kernels`."""
    done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("GPU kernels", "fail", f"they cannot be looked at: {last}", "Reinstall localmimo.")
        return
    facts = json.loads(done.stdout)
    if "error" in facts:
        yield Finding("GPU kernels", "warn", f"the CPU computes: {facts['error']}", facts=facts)
        return
    free = format_bytes(facts["free_bytes"])
    found = f"cuda:0 computes, with {free} free (not yet measured on a GPU; --device cpu leaves it out)"
    yield Finding("GPU kernels", "ok", found, facts=facts)


def _memory() -> Findings:
    import psutil

    machine, swap = Machine.probe(), psutil.swap_memory()
    limited = machine.ram_bytes < psutil.virtual_memory().total
    facts = {
        "ram_bytes": machine.ram_bytes,
        "free_ram_bytes": machine.free_ram_bytes,
        "automatic_ram_bytes": machine.automatic_ram_bytes,
        "swap_used_bytes": swap.used,
        "limited_by_cgroup": limited,
        "n_cores": machine.n_cores,
    }
    found = (
        f"{format_bytes(machine.free_ram_bytes)} free of {format_bytes(machine.ram_bytes)}, {machine.n_cores} cores; "
        f"a budget of {format_bytes(machine.automatic_ram_bytes)} would be taken"
    )
    if limited:
        found += "; the limit is that of a control group"
    small = machine.free_ram_bytes < MIN_RAM_BYTES
    yield Finding(
        "memory",
        "warn" if small else "ok",
        found,
        f"V2-Flash needs about {format_bytes(MIN_RAM_BYTES)}; smaller models run." if small else "",
        facts,
    )
    if swap.total:
        busy = swap.used > 1 << 30
        fix = (
            "Close other programs: pages that are swapped out are slower than pages on disk." if busy else ""
        )
        text = f"{format_bytes(swap.used)} in use of {format_bytes(swap.total)}"
        yield Finding("swap", "warn" if busy else "ok", text, fix)


def _huge_pages(root: Path = Path("/sys/kernel/mm/transparent_hugepage")) -> Findings:
    try:
        mode = (root / "enabled").read_text()
    except OSError:
        yield Finding(
            "huge pages", "warn", "this kernel has none", "Small pages cost some of the memory speed."
        )
        return
    chosen = mode.partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield Finding(
            "huge pages",
            "warn",
            "switched off: reading experts from memory will be slower",
            f"echo madvise | sudo tee {root / 'enabled'}",
        )
    else:
        yield Finding("huge pages", "ok", chosen)


def _pinned() -> Findings:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield Finding("pinned memory", "ok", "no limit")
    else:
        text = f"at most {format_bytes(limit)} (ulimit -l); a GPU copies faster from pinned memory"
        yield Finding("pinned memory", "ok", text, facts={"limit_bytes": limit})


def _home() -> Findings:
    from localmimo.system.paths import home

    try:
        folder = home()
    except OSError as error:
        fix = "Set LOCALMIMO_HOME to a folder of yours."
        yield Finding("home", "fail", f"LOCALMIMO_HOME cannot be made: {error.strerror}", fix)
        return
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding(
            "home", "fail", f"{folder} cannot be written", "Set LOCALMIMO_HOME to a folder of yours."
        )
    elif free < 1 << 30:
        text = f"{folder} has {format_bytes(free)} free"
        yield Finding("home", "warn", text, "Free some space: sessions and statistics are kept there.")
    else:
        yield Finding("home", "ok", f"{folder}, {format_bytes(free)} free")


def _disks(pack: str | None, quick: bool) -> Callable[[], Findings]:
    def disk() -> Findings:
        from localmimo.system.paths import home

        folder = Path(pack).expanduser() if pack else home()
        if folder.is_dir():
            yield from _disk(folder, quick)

    return disk


def _disk(folder: Path, quick: bool) -> Findings:
    from localmimo.hardware.bandwidth import disk_speed, file_spots, ram_speed

    files = sorted(folder.glob("experts-*.safetensors"))
    page = _page_bytes(folder)
    kind = disk_kind(folder)
    try:
        speed = disk_speed(file_spots(files, page), page, folder, anew=not quick)
    except OSError as error:
        yield Finding("disk", "fail", f"{folder} cannot be read: {error.strerror}", "Check the disk.")
        return
    facts = asdict(speed) | {"kind": kind, "page_bytes": page}
    found = (
        f"{kind}: {format_bytes(speed.together)}/s in reads of {format_bytes(page)} four at a time, "
        f"{format_bytes(speed.alone)}/s one at a time, {format_bytes(speed.again)}/s when read again"
    )
    if not speed.direct:
        yield Finding(
            "disk", "warn", f"{found}; direct reads are refused here", "Use ext4, xfs or btrfs.", facts
        )
    elif speed.together < SLOW_DISK:
        token = 376 * DEFAULT_PAGE / speed.together
        fix = f"V2-Flash with nothing in memory would take {token:.0f} s a token: prefer an NVMe drive."
        yield Finding("disk", "warn", found, fix, facts)
    else:
        yield Finding("disk", "ok", found, facts=facts)
    machine = Machine.probe()
    ram = ram_speed(machine.n_cores, anew=not quick)
    yield Finding("memory speed", "ok", f"{format_bytes(ram)}/s read by all cores", facts={"read": ram})
    yield from _overhead(ram, quick)


def _page_bytes(folder: Path) -> int:
    """Of the pack in that folder; of V2-Flash where there is none."""
    try:
        page = json.loads((folder / "manifest.json").read_text())["page"]
        return int(page["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_PAGE


def disk_kind(folder: Path, root: Path = Path("/sys/dev/block")) -> str:
    """The disk that a folder is on, as far as Linux tells."""
    device = folder.stat().st_dev
    link = root / f"{os.major(device)}:{os.minor(device)}"
    try:
        path = link.resolve(strict=True)
        disk = path if (path / "queue").is_dir() else path.parent
        spins = (disk / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return "a file system without a disk of its own"
    if disk.name.startswith("nvme"):
        return f"NVMe drive {disk.name}"
    if disk.name.startswith(("vd", "xvd")):
        return f"virtual disk {disk.name}"
    return f"{'spinning disk' if spins else 'solid-state disk'} {disk.name}"


# ---- the pack ----


def _integrity(pack: str, ui: Ui, quick: bool) -> Findings:
    from localmimo.cli.commands.verify import read_back
    from localmimo.cli.packs import pack_folder
    from quant import Pack
    from quant.errors import QuantError

    try:
        folder = pack_folder(pack)
        if quick:
            with Pack.open(folder) as opened:
                size = format_bytes(opened.n_bytes)
                yield Finding(
                    "pack", "ok", f"{opened.name}, {size}: sizes and headers agree; nothing was read"
                )
            return
        report = read_back(folder, ui)
    except (LocalMimoError, QuantError) as error:
        yield Finding("pack", "fail", with_flags(error), "Convert again, or give the folder of a pack.")
        return
    if report.ok:
        text = f"{report.name}, {format_bytes(report.n_bytes)}: every checksum holds"
        yield Finding("pack", "ok", text)
    else:
        more = f" and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
        yield Finding("pack", "fail", report.problems[0] + more, "Convert the checkpoint again.")
