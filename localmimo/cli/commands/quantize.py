"""`localmimo quantize`: shows what a conversion takes, runs it under a progress line, says what to do next.

The only command that calls `quant.convert`; knows nothing of models that run.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmimo.cli.commands.verify import read_back
from localmimo.cli.disk_space import DiskSpace
from localmimo.cli.options import Json, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.ui import Ui, bar, seconds
from localmimo.errors import BadRequest
from localmimo.hardware.units import format_bytes
from localmimo.model.config import ModelConfig
from localmimo.model.members import find_member

if TYPE_CHECKING:
    from quant import Progress, Source
    from quant.conversion.listing import Listing

ASK_BYTES = 20_000_000_000  # conversions beyond this ask first, in a terminal
STOPPED = "Run the same command to continue; --restart to begin again."


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """The command line of `localmimo quantize`."""

    source: str | Path
    out: Path | None = None
    experts: str = "nf4"
    dense: str = "int8"
    recipe: str | None = None
    dry_run: bool = False
    restart: bool = False
    yes: bool = False
    as_json: bool = False
    discard_source: bool = False
    endpoint: str | None = None


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of a MiMo-V2 checkpoint, or its name on the hub: owner/name[@revision].",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="The pack's folder  [default: ./NAME-EXPERTS]"),
    ] = None,
    experts: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of the experts: nf4, nf4-16, mxfp4, int8, bf16.")
    ] = "nf4",
    dense: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of attention and dense layers: int8, bf16, nf4.")
    ] = "int8",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A .toml file with codecs by tensor, in place of --experts and --dense."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes and checks; write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an earlier run began.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask before a long conversion.")] = False,
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source", help="Delete each downloaded file when nothing more is read from it."
        ),
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the hub.  [default: huggingface.co]")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Convert a checkpoint into a pack. Ctrl-C stops it; the same command goes on where it stopped."""

    job = QuantizeOptions(
        source,
        out and out.expanduser(),
        experts,
        dense,
        recipe,
        dry_run,
        restart,
        yes,
        as_json,
        discard_source,
        endpoint,
    )
    return run_interruptible(lambda: run_quantize(job, ui_of(verbose, quiet)))


def run_quantize(job: QuantizeOptions, ui: Ui) -> int:
    """Run the command; the exit code."""
    from quant import Recipe, make_listing

    with open_source(job, ui) as source:
        ModelConfig.parse(source.config)  # an hour's conversion must not end in a refusal to run
        listing = make_listing(source, Recipe.of(job.recipe, experts=job.experts, dense=job.dense))
        out = job.out or Path(f"{listing.model}-{listing.recipe.experts}")
        space = DiskSpace.of(out, listing, source, restart=job.restart)
        return _offer(job, ui, source, listing, out, space)


def open_source(job: QuantizeOptions, ui: Ui) -> Source:
    """A folder, or a repository on the hub: by its name, or by that of the member of the family."""
    from quant import Source
    from quant.checkpoint.hub import REPOSITORY, Hub
    from quant.errors import Unreachable

    folder = Path(job.source).expanduser()
    name = str(job.source)
    member = find_member(name)
    if member is not None and member.repository is None:
        raise BadRequest(f"{member.title} can not be converted: {member.note}")
    repository = member.repository if member else name
    if folder.is_dir() or repository is None or not REPOSITORY.fullmatch(repository):
        if job.discard_source:
            raise BadRequest(
                f"--discard-source deletes only what quantize downloads itself; {folder} is a folder of yours: "
                "delete it when the pack is verified."
            )
        return Source.open(folder)
    ui.note(f" Reading the headers of {repository} ...")
    keep = Path(f"{job.out or repository.partition('@')[0].rpartition('/')[2]}.download").absolute()
    try:
        hub = Hub(repository, folder=keep if job.discard_source else None, endpoint=job.endpoint)
        return Source.on_hub(hub)
    except Unreachable as error:
        cached = cached_folder(repository)
        if cached is None or job.discard_source:
            raise
        ui.note(f" {error} Going on with the copy in the hub's cache: {cached}")
        return Source.open(cached)


def cached_folder(repository: str) -> Path | None:
    """The newest snapshot of a repository in the hub's cache, or the one of its @revision."""
    from huggingface_hub import constants

    name, _, revision = repository.partition("@")
    root = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = root / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = sorted((root / "snapshots").glob(commit or "*"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1] if snapshots else None


def _offer(
    job: QuantizeOptions, ui: Ui, source: Source, listing: Listing, out: Path, space: DiskSpace
) -> int:
    if job.dry_run:
        return _dry_run(job, ui, listing, out, space)
    for line in (listing.table(), space.text(out), *listing.notes):
        ui.note(_indented(line))
    if job.out is None:
        ui.note(f" No --out was given: the pack goes to ./{out}.")
    if not _agreed(job, space):
        ui.note(" Nothing was written.")
        return 1
    return _convert(job, ui, source, listing, out)


def _indented(text: str) -> str:
    return "\n".join(f" {line}" if line else "" for line in text.split("\n"))


def _dry_run(job: QuantizeOptions, ui: Ui, listing: Listing, out: Path, space: DiskSpace) -> int:
    if job.as_json:
        ui.json(
            listing.as_dict() | space.as_dict() | {"out": str(out), "status": "dry run", "fits": space.fits}
        )
    else:
        ui.data("\n".join(map(_indented, (listing.table(), space.text(out), *listing.notes))))
    if not space.fits:
        from quant.errors import NoSpace

        needed = space.needed + (space.download_peak if space.discards else 0)
        short = format_bytes(needed - space.free)
        raise NoSpace(
            f"{out} needs {format_bytes(needed)} and {format_bytes(space.free)} are free: "
            f"free {short}, or choose another --out."
        )
    ui.note(" Nothing was written. Run again without --dry-run.")
    return 0


def _agreed(job: QuantizeOptions, space: DiskSpace) -> bool:
    if job.yes or space.finished or space.needed < ASK_BYTES or not sys.stdin.isatty():
        return True
    import typer

    return typer.confirm(f" Write {format_bytes(space.needed)}?", default=True, err=True)


def _convert(job: QuantizeOptions, ui: Ui, source: Source, listing: Listing, out: Path) -> int:
    from quant import convert

    steps = convert(source, out, recipe=listing.recipe, restart=job.restart)
    last: Progress | None = None
    try:
        for step in _shown(steps, ui, listing):
            last = step
    except KeyboardInterrupt:
        _close(steps)
        ui.status.clear()
        ui.note(f" Stopped {_reached(last, source, listing)}. {STOPPED}")
        if job.as_json:
            ui.json(_facts(listing, out, last) | {"status": "interrupted"})
        return 130
    assert last is not None
    read_back(out, ui).raise_for_problems()
    if source.hub is not None and source.hub.folder is not None:
        shutil.rmtree(source.hub.folder)
    _finish(job, ui, listing, out, last)
    return 0


def _close(steps: Iterator[Progress]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()


def _finish(job: QuantizeOptions, ui: Ui, listing: Listing, out: Path, last: Progress) -> None:
    facts = _facts(listing, out, last) | {"status": last.note or "done", "verified": True}
    if job.as_json:
        ui.json(facts)
        return
    error = f", error {last.rms_error:.4f} rms" if last.rms_error else ""
    took = "already done" if last.note else f"done in {seconds(last.elapsed_s)}"
    ui.data(
        f" ✓ {out.name}: {format_bytes(listing.total_bytes)}, {took}, checksums ok{error}.\n"
        f"   Next: localmimo chat {_shell(out)}"
    )


def _facts(listing: Listing, out: Path, last: Progress | None) -> dict[str, Any]:
    facts = listing.as_dict() | {"out": str(out)}
    if last is not None:
        facts |= {
            "rms_error": last.rms_error,
            "worst_error": last.worst_error,
            "worst_name": last.worst_name,
            "done_bytes": last.done_bytes,
            "elapsed_s": round(last.elapsed_s, 3),
        }
    return facts


def _shell(path: Path) -> str:
    import shlex

    text = str(path)
    return shlex.quote(text if path.is_absolute() or "/" in text else f"./{text}")


def _shown(steps: Iterator[Progress], ui: Ui, listing: Listing) -> Iterator[Progress]:
    """The same steps, shown: a line that is written over, or one line for every tenth where it cannot be."""
    n_layers = max((file.layer for file in listing.files if file.layer is not None), default=0)
    tenth, n_done = -1, 0
    for step in steps:
        if step.note.startswith("fetching"):
            ui.status.show(f" {_share(step)}  {step.note} ...", now=True)
            if ui.verbose or not ui.status.enabled:
                ui.note(f" {step.note}")
        elif ui.verbose and step.done_units > n_done:
            ui.note(progress_line(step, n_layers))
        elif ui.status.enabled:
            ui.status.show(progress_line(step, n_layers, ui.err.width))
        elif (reached := 10 * step.done_bytes // max(1, step.total_bytes)) > tenth:
            tenth = reached
            ui.note(progress_line(step, n_layers))
        n_done = step.done_units
        yield step
    ui.status.clear()


def _share(step: Progress) -> str:
    return f"{step.done_bytes / max(1, step.total_bytes):4.0%}"


def progress_line(step: Progress, n_layers: int, width: int = 200) -> str:
    """Layer, bar, percent, bytes, speed, time left and error: the last of them go where there is no space."""
    share = step.done_bytes / max(1, step.total_bytes)
    speed = (step.done_bytes - step.resumed_bytes) / step.elapsed_s if step.elapsed_s > 0 else 0.0
    facts = [f"{share:4.0%}", _of(step.done_bytes, step.total_bytes)]
    if speed:
        facts.append(f"{format_bytes(speed)}/s")
        facts.append(f"left {seconds((step.total_bytes - step.done_bytes) / speed)}")
    if step.rms_error:
        facts.append(f"rms error {step.rms_error:.4f}")
        facts.append(f"(worst {step.worst_error:.4f} {_short(step.worst_name)})")
    head = f" {_unit(step, n_layers):<11} {bar(share, 10 if width < 90 else 20)}"
    while len("  ".join([head, *facts])) > width - 1:
        facts.pop()
    return "  ".join([head, *facts])


def _of(part: int, whole: int) -> str:
    """61.8/170.3 GB: both in the unit of the whole."""
    text, unit = format_bytes(whole).split()
    scale = {"TB": 1e12, "GB": 1e9, "MB": 1e6}.get(unit, 1e3)
    digits = len(text.partition(".")[2])
    return f"{part / scale:.{digits}f}/{text} {unit}"


def _unit(step: Progress, n_layers: int) -> str:
    layer = re.fullmatch(r"experts-(\d+)\.safetensors", step.unit)
    if layer:
        return f"layer {int(layer[1])}/{n_layers}"
    return "dense" if step.unit.startswith("dense") else "manifest"


def _short(name: str) -> str:
    """layers.3.experts.17 -> L3 E17."""
    return name.replace("layers.", "L").replace(".experts.", " E")


def _reached(last: Progress | None, source: Source, listing: Listing) -> str:
    """Where a stopped run is: after its last finished unit."""
    if last is None or last.done_units == 0:
        return "before the first unit was finished"
    if source.hub is not None:  # units come in the order of the source's files
        return f"after {last.done_units} of {last.total_units} units"
    file = listing.files[last.done_units - 1]
    return f"after {file.name}" if file.layer is None else f"after layer {file.layer}"
