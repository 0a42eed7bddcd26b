"""The command line of `bench`. Flags and help only; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmimo.cli.options import (
    Device,
    Json,
    Kv,
    Model,
    NoPrefetch,
    Quiet,
    Ram,
    Trust,
    Verbose,
    Vram,
    carry_out,
    ui_of,
)


def bench(
    model: Model = None,
    depths: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Tokens of context before the prompt, such as 0,2k,8k.")
    ] = "0",
    prompt_tokens: Annotated[
        str, typer.Option("-p", "--prompt-tokens", metavar="N", help="Tokens of a prompt.")
    ] = "512",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", help="Tokens of an answer.")
    ] = 64,
    repeat: Annotated[
        int, typer.Option("-r", "--repeat", metavar="N", min=1, help="Prompts and answers at each depth.")
    ] = 3,
    context: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--context",
            metavar="N",
            help="Positions of the context.  [default: as chat, or what is needed]",
        ),
    ] = None,
    ram: Ram = None,
    vram: Vram = None,
    device: Device = "auto",
    kv: Kv = "auto",
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens drafted at a time: auto, 0 to 3.  [default: auto; 0 with --record or --check-plan]",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Router statistics to start from and to add to (chat's: default).  [default: none]",
        ),
    ] = None,
    no_prefetch: NoPrefetch = False,
    trust: Trust = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Open the pack anew for each run: no expert in memory, depth and prompt read together.",
        ),
    ] = False,
    check_plan: Annotated[
        bool,
        typer.Option(
            "--check-plan", help="Also measure disk and memory, and say whether `plan` predicts this speed."
        ),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write which experts each answered token used, for `replay`."),
    ] = None,
    stats_json: Annotated[
        Path | None,
        typer.Option("--stats-json", metavar="FILE", help="Append a JSON line for each prompt and step."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw speed by depth and tiers over time into FILE.svg or FILE.png."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FORMAT", help="Of the table: text or md.")
    ] = "text",
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how fast a model reads and answers here, and where its experts come from.

    Reads N tokens of real text at each depth of context, answers them greedily, and does so a few times with
    other text. Ctrl-C shows what was measured so far.
    """
    from localmimo.cli.commands.bench import BenchOptions, parse_depths, run_bench
    from localmimo.cli.open_engine import LoadFlags
    from localmimo.cli.packs import EMBEDDED
    from localmimo.cli.ui import parse_count

    request = BenchOptions(
        model=model or EMBEDDED,
        depths=parse_depths(depths),
        prompt_tokens=parse_count(prompt_tokens, "--prompt-tokens"),
        max_tokens=max_tokens,
        repeat=repeat,
        draft=draft,
        opening=LoadFlags(
            context=context,
            ram=ram,
            vram=vram,
            device=device,
            kv=kv,
            profile=profile,
            prefetch=not no_prefetch,
            trust=trust,
        ),
        cold=cold,
        check_plan=check_plan,
        record=record and record.expanduser(),
        stats_json=stats_json and stats_json.expanduser(),
        plot=plot and plot.expanduser(),
        form=output,
        as_json=as_json,
    )
    return carry_out(lambda: run_bench(request, ui_of(verbose, quiet)))
