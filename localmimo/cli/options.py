"""What every command's line shares: -v, -q and --json, the exit codes, and how a failure is said.

Knows no command and imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

OK, FAILED, USAGE, NO_ROOM, BAD_PACK, INTERRUPTED = 0, 1, 2, 3, 4, 130


@dataclass(slots=True)
class Settings:
    """What -v and -q said, kept for the moment when something fails."""

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


# How a pack is opened: the same words wherever one is.
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A pack's folder, or mimo-mini.  [default: mimo-mini]", show_default=False
    ),
]
Context = Annotated[
    str | None, typer.Option("-c", "--context", metavar="N", help="Positions of the context, such as 32k.")
]
Ram = Annotated[
    str | None, typer.Option(metavar="SIZE", help="RAM budget, such as 96GiB.  [default: what is free]")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="cpu, cuda or cuda:N; auto takes a GPU that can be used and is large enough."
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Of a GPU's memory, such as 22GiB.  [default: what is free]"),
]
Dtype = Annotated[str, typer.Option(metavar="TYPE", help="Of activations: auto, float32, bfloat16.")]
Kv = Annotated[
    str, typer.Option(metavar="TYPE", help="Of the KV cache: auto, bf16, int8 (half of it), float32.")
]

Profile = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help='Router statistics to start from and to add to, kept with the pack; "none" keeps none.',
    ),
]
NoPrefetch = Annotated[bool, typer.Option("--no-prefetch", help="Do not read experts ahead.")]
Trust = Annotated[bool, typer.Option("--trust", help="Do not check the pages' checksums.")]


def _check_draft(value: str) -> str:
    if value not in ("auto", "0", "1", "2", "3"):
        raise typer.BadParameter(f"{value} is none of auto, 0, 1, 2 and 3.")
    return value


Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="N",
        callback=_check_draft,
        help="Tokens that the model's draft heads propose at a time, 0 to 3, or auto: what pays. "
        "They change no answer.",
    ),
]


def ui_of(verbose: int, quiet: bool) -> Any:
    from localmimo.cli.ui import Ui

    return Ui.of_process(quiet=quiet, verbose=verbose)


def carry_out(face: Callable[[], int]) -> int:
    # Here and not around everything: typer turns a KeyboardInterrupt into a silent exit.
    try:
        return face()
    except KeyboardInterrupt:
        return complain("interrupted.", INTERRUPTED)


def complain(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
