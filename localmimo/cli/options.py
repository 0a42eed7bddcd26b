"""What commands share: -v, -q, --json and other flags, the exit codes, and how an error is shown.

Knows no command and imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from localmimo.loading.options import LOAD_OPTIONS

OK, FAILED, USAGE, DOES_NOT_FIT, BAD_PACK, INTERRUPTED = 0, 1, 2, 3, 4, 130


@dataclass(slots=True)
class Settings:
    """What -v and -q set; read when a command fails."""

    verbose: int = 0
    quiet: bool = False


def _set_verbose(context: typer.Context, value: int) -> int:
    context.ensure_object(Settings).verbose = value
    return value


def _set_quiet(context: typer.Context, value: bool) -> bool:
    context.ensure_object(Settings).quiet = value
    return value


Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        callback=_set_verbose,
        show_default=False,
        help="Say more; tracebacks of failures.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="Say nothing but results and errors.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A pack's folder, or mimo-mini.  [default: mimo-mini]", show_default=False
    ),
]
Context = Annotated[
    str | None,
    typer.Option(*LOAD_OPTIONS["context"].flags, metavar="N", help=LOAD_OPTIONS["context"].help),
]
Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help=f"{LOAD_OPTIONS['ram'].help}  [default: what is free]"),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Also draw it, .svg or .png, where matplotlib is installed (the extra: plot).",
    ),
]


def ui_of(verbose: int, quiet: bool) -> Any:
    from localmimo.cli.ui import Ui

    return Ui.of_process(quiet=quiet, verbose=verbose)


def run_interruptible(work: Callable[[], int]) -> int:
    # In each command and not around everything: typer turns a KeyboardInterrupt into a silent exit.
    try:
        return work()
    except KeyboardInterrupt:
        return complain("interrupted.", INTERRUPTED)


def complain(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
