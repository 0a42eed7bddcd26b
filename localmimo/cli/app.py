"""The table of commands, and what an error becomes: one sentence on stderr and an exit code.

Knows no flag. Imports no torch: each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from localmimo import __version__
from localmimo.cli.commands.bench import bench
from localmimo.cli.commands.chat import chat
from localmimo.cli.commands.doctor import doctor
from localmimo.cli.commands.perplexity import perplexity
from localmimo.cli.commands.plan import plan
from localmimo.cli.commands.quantize import quantize
from localmimo.cli.commands.replay import replay
from localmimo.cli.commands.serve import serve
from localmimo.cli.commands.stats import stats
from localmimo.cli.commands.verify import verify
from localmimo.cli.options import (
    BAD_PACK,
    DOES_NOT_FIT,
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    Settings,
    complain,
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
    epilog="Start with: localmimo chat  (talks to the small model that is included).",
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


for command in (quantize, plan, doctor, verify, perplexity, bench, replay, stats, chat, serve):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
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
    except Exception as error:  # anything else becomes one sentence and an exit code
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
            (DoesNotFit, DOES_NOT_FIT), (BadModel, BAD_PACK), (BadPack, BAD_PACK), (BadRequest, USAGE),
            (Cancelled, INTERRUPTED),
        ]  # fmt: skip
    else:
        from quant.errors import BadCheckpoint, BadRecipe, NoSpace, QuantError
        from quant.errors import BadPack as QuantBadPack

        if not isinstance(error, QuantError):
            return None
        known = [
            (NoSpace, DOES_NOT_FIT),
            (QuantBadPack, BAD_PACK),
            (BadCheckpoint, BAD_PACK),
            (BadRecipe, USAGE),
        ]
    return next((code for kind, code in known if isinstance(error, kind)), FAILED)


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(context.get_help())
        return OK
    command = context.command_path if context else "localmimo"
    return complain(f"{error.format_message().rstrip('.')}. See {command} --help.", USAGE)
