"""`localmimo serve`: the address and the key are checked and the port is taken; then the model is loaded and served.

Knows flags; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmimo.cli.flags import LOAD_FLAGS, Given, declared, load_options
from localmimo.cli.open_engine import open_engine
from localmimo.cli.options import Model, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.ui import Ui
from localmimo.errors import BadRequest
from localmimo.hardware.units import parse_bytes
from localmimo.loading.options import LoadOptions
from localmimo.serve.http.listen import is_loopback, listen

if TYPE_CHECKING:
    import socket

    from localmimo.engine import Engine
    from localmimo.serve.service import Service

KEY_VARIABLE = "LOCALMIMO_API_KEY"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of `localmimo serve`."""

    model: str | None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    queue: int = 8
    sessions_dir: Path | None = None
    sessions_disk: str = "50GiB"
    loading: LoadOptions = field(default_factory=LoadOptions)


@declared(loading=LOAD_FLAGS)
def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", help="What clients must send.  [default: LOCALMIMO_API_KEY]"
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="A web page's origin that may call; repeat for more."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Requests that may wait; more get a 429.")
    ] = 8,
    sessions_dir: Annotated[
        Path | None,
        typer.Option(
            "--sessions-dir",
            metavar="DIR",
            help="Keep conversations that others push out, to take them up again.",
        ),
    ] = None,
    sessions_disk: Annotated[
        str, typer.Option("--sessions-disk", metavar="SIZE", help="Disk for them; the oldest are deleted.")
    ] = "50GiB",
    loading: Given = {},  # noqa: B006  (replaced with flags)
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page to talk with it.

    Requests are answered one at a time, first come, first served. SIGTERM or Ctrl-C finishes what came in.
    """
    job = ServeOptions(
        model_name(model),
        host=host,
        port=port,
        api_key=api_key,
        cors=tuple(cors or ()),
        queue=queue,
        sessions_dir=sessions_dir and sessions_dir.expanduser(),
        sessions_disk=sessions_disk,
        loading=load_options(loading),
    )
    return run_interruptible(lambda: run_serve(job, ui_of(verbose, quiet)))


def run_serve(job: ServeOptions, ui: Ui) -> int:
    """Serve until a signal; the exit code."""
    key = job.api_key or os.environ.get(KEY_VARIABLE) or None
    _check_early(job, key)
    _check_installed()
    with contextlib.closing(listen(job.host, job.port)) as sock:
        return asyncio.run(_serve(job, key, sock, ui))


def _check_installed() -> None:
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise BadRequest(
                f"The server needs {package}, which is not installed: pip install 'localmimo[serve]'"
            )


def _check_early(job: ServeOptions, key: str | None) -> None:
    """What can be refused before the slow imports."""
    if key is None and not is_loopback(job.host):
        raise BadRequest(
            f"Everybody who reaches {job.host} could use this server: set {KEY_VARIABLE} or give --api-key, "
            "or leave --host at 127.0.0.1."
        )
    parse_bytes(job.sessions_disk)


async def _serve(job: ServeOptions, key: str | None, sock: socket.socket, ui: Ui) -> int:
    from localmimo.serve.app import make_app
    from localmimo.serve.http.auth import AccessCheck
    from localmimo.serve.server import Server
    from localmimo.serve.service import Service

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    service = Service(
        job.queue,
        job.sessions_dir,
        parse_bytes(job.sessions_disk),
        note=ui.note if ui.verbose else lambda line: None,
    )

    def stopping() -> None:
        service.stopping = True
        ui.note("stopping: requests that came in are finished first; once more to stop at once")

    server = Server(make_app(service, AccessCheck(key, job.cors)), stopping=stopping)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        engine = await _load(job, service, ui)
        address = _address(sock)
        ui.note(
            f"Serving {service.model} on {address} · context {engine.context:,} · {'key' if key else 'no key'}"
        )
        await serving
    finally:
        server.should_exit = True
        await serving
        await service.close()
    engine.close()
    return 0


async def _load(job: ServeOptions, service: Service, ui: Ui) -> Engine:
    engine = await asyncio.to_thread(open_engine, job.model, job.loading, ui, service.load)
    service.ready(engine)
    ui.show_placement(engine)
    ui.configuration(engine)
    return engine


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_name(name: str | None) -> str | None:
    """The folder that was named; None for the embedded model."""
    from localmimo.cli.packs import EMBEDDED

    return None if name in (None, EMBEDDED) else str(Path(str(name)).expanduser())
