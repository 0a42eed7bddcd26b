"""The commands, their flags, and what every failure becomes: one sentence on stderr and an exit code.

Imports no torch: each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from localmimo import __version__
from localmimo.cli.commands._hardware import doctor, plan
from localmimo.cli.commands._measuring import bench
from localmimo.cli.commands._routing import replay, stats
from localmimo.cli.commands._talking import chat, serve
from localmimo.cli.options import (
    BAD_PACK,
    FAILED,
    INTERRUPTED,
    NO_ROOM,
    OK,
    USAGE,
    Json,
    Quiet,
    Ram,
    Settings,
    Verbose,
    carry_out,
    complain,
    ui_of,
)
from localmimo.errors import (
    BadModel,
    BadPack,
    BadRequest,
    Cancelled,
    DoesNotFit,
    LocalMimoError,
    with_flags,
)

# Public name of nothing in typer: BadParameter's parent is the usage error, and its parent every shown error.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
ShownError: type[Exception] = UsageError.__bases__[0]


app = typer.Typer(
    name="localmimo",
    help="Runs Xiaomi's MiMo-V2 mixture-of-experts models on one workstation: experts that do not fit in "
    "memory are paged in from disk.",
    epilog="Start with: localmimo chat  (talks to the small model that comes along).",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"localmimo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
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
    from localmimo.cli.commands.quantize import QuantizeOptions, run_quantize

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
    return carry_out(lambda: run_quantize(job, ui_of(verbose, quiet)))


app.command()(plan)
app.command()(doctor)


@app.command()
def verify(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")],
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Read a pack from end to end and compare every checksum."""
    from localmimo.cli.commands.verify import run_verify

    return carry_out(lambda: run_verify(pack.expanduser(), ui_of(verbose, quiet), as_json=as_json))


@app.command()
def perplexity(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="Folder of a pack, or mimo-mini.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text file (UTF-8), or - for stdin.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PACK", help="Also compare, position by position, with this pack of the same model."
        ),
    ] = None,
    context: Annotated[
        str, typer.Option("-c", "--context", metavar="N", help="Tokens in a window.")
    ] = "2048",
    ram: Ram = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how well a pack predicts a text, and how far it strays from another pack.

    The text is cut into windows of N tokens that do not overlap. Each window is read from an empty context,
    and every token but its first is predicted from those before it in the window.
    """
    from localmimo.cli.commands.perplexity import PerplexityOptions, run_perplexity
    from localmimo.cli.ui import parse_count

    job = PerplexityOptions(pack, file, against, parse_count(context, "--context"), ram, as_json)
    return carry_out(lambda: run_perplexity(job, ui_of(verbose, quiet)))


app.command()(bench)
app.command()(replay)
app.command()(stats)


app.command()(chat)
app.command()(serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; the exit code."""
    settings = Settings()
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, prog_name="localmimo", standalone_mode=False, obj=settings)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted.", INTERRUPTED)
    except ShownError as error:
        return _usage(error)
    except Exception as error:  # the last resort of the command line
        return _fail(error, settings)
    return code if isinstance(code, int) else OK


def _fail(error: Exception, settings: Settings) -> int:
    if settings.verbose:
        traceback.print_exc()
    code = exit_code(error)
    if code is not None:
        return complain(with_flags(error), code)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return complain(f"{error.strerror}{where}.", FAILED)
    hint = "" if settings.verbose else " Run with -v for the traceback."
    return complain(f"{type(error).__name__}: {' '.join(str(error).split())}.{hint}", FAILED)


def exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose, None for any other."""
    if isinstance(error, LocalMimoError):
        known: list[tuple[type[Exception], int]] = [
            (DoesNotFit, NO_ROOM), (BadModel, BAD_PACK), (BadPack, BAD_PACK), (BadRequest, USAGE),
            (Cancelled, INTERRUPTED),
        ]  # fmt: skip
    else:
        from quant.errors import BadCheckpoint, BadRecipe, NoSpace, QuantError
        from quant.errors import BadPack as QuantBadPack

        if not isinstance(error, QuantError):
            return None
        known = [(NoSpace, NO_ROOM), (QuantBadPack, BAD_PACK), (BadCheckpoint, BAD_PACK), (BadRecipe, USAGE)]
    return next((code for kind, code in known if isinstance(error, kind)), FAILED)


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(context.get_help())
        return OK
    command = context.command_path if context else "localmimo"
    return complain(f"{error.format_message().rstrip('.')}. See {command} --help.", USAGE)
