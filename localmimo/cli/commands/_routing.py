"""The command lines of `replay` and `stats`: what the routing of a model looks like, and how well it can be cached.

Flags and help only; imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmimo.cli.options import Json, Quiet, Verbose, carry_out, ui_of

Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Also draw it, .svg or .png, where matplotlib is installed (the extra: plot).",
    ),
]


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A router trace: JSON lines.")],
    slots: Annotated[
        str, typer.Option("--slots", metavar="N[,N...]", help="Numbers of slots to play it with.")
    ],
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Play a router trace through our policy, LRU, LFU and the best that is possible (Belady).

    A line of a trace is {"step": 0, "layer": 1, "experts": [3, 17]}: one per token and layer, in order. With
    --json the last line of stdout is a list: slots, requests and the hit rate of each policy.
    """
    from localmimo.cli.commands.replay import run_replay

    return carry_out(lambda: run_replay(trace, slots, plot, ui_of(verbose, quiet), as_json=as_json))


def stats(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="Folder of a pack, or mimo-mini.")],
    profile: Annotated[str, typer.Option(metavar="NAME", help="Whose statistics.")] = "default",
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Write a recipe that gives the hottest experts 4.5 bits."),
    ] = None,
    hot_share: Annotated[
        float,
        typer.Option("--hot-share", metavar="SHARE", help="The part of each layer's experts that it names."),
    ] = 0.1,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Show how often each expert of each layer was used, as earlier sessions counted it.

    And where it lies now, for every process that has the pack open with this profile."""
    from localmimo.cli.commands.stats import run_stats

    ui = ui_of(verbose, quiet)
    return carry_out(
        lambda: run_stats(pack, profile, plot, ui, as_json=as_json, recipe=recipe, hot_share=hot_share)
    )
