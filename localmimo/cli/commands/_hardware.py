"""The command lines of `plan` and `doctor`: what a machine can do, and what it lacks.

Flags and help only; imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmimo.cli.options import Context, Json, Quiet, Ram, Verbose, carry_out, ui_of


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pack, a checkpoint folder, a config.json, or a name such as mimo-v2-flash.",
        ),
    ],
    context: Context = None,
    max_context: Annotated[
        bool, typer.Option("--max-context", help="Find the longest context that fits.")
    ] = False,
    kv: Annotated[str, typer.Option(metavar="TYPE", help="Of the KV cache: bf16, int8, float32.")] = "bf16",
    ram: Ram = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a GPU, such as 24GiB.  [default: no GPU]")
    ] = None,
    disk_read: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Of the disk, such as 7GB/s.  [default: measured]")
    ] = None,
    ram_read: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Of the memory, such as 80GB/s.  [default: measured]")
    ] = None,
    pcie: Annotated[
        str | None, typer.Option(metavar="SPEED", help="From memory to that GPU.  [default: 25GB/s]")
    ] = None,
    experts: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of the experts, where MODEL is no pack.")
    ] = "nf4",
    dense: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of the dense layers, where MODEL is no pack.")
    ] = "int8",
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="A recipe, in place of --experts and --dense.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A router trace to replay for the hit rate.  [default: a profile]"),
    ] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure disk and memory again.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Say what a model needs and how fast it should answer: here, or on a machine that you describe.

    Works before anything is downloaded. Exits with 3 where the model does not fit, saying what would help.
    """
    from localmimo.cli.commands.plan import PlanOptions, run_plan
    from localmimo.cli.ui import parse_count

    question = PlanOptions(
        model=model,
        context=None if context is None else parse_count(context, "--context"),
        max_context=max_context,
        kv=kv,
        ram=ram,
        vram=vram,
        disk_read=disk_read,
        ram_read=ram_read,
        pcie=pcie,
        experts=experts,
        dense=dense,
        recipe=recipe,
        trace=trace,
        remeasure=remeasure,
        as_json=as_json,
    )
    return carry_out(lambda: run_plan(question, ui_of(verbose, quiet)))


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
    from localmimo.cli.commands.doctor import run_doctor

    return carry_out(lambda: run_doctor(pack, ui_of(verbose, quiet), as_json=as_json, quick=quick))
