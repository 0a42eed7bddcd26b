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
from typing import TYPE_CHECKING

from localmimo.cli.open_engine import LoadFlags, open_engine
from localmimo.cli.ui import Ui
from localmimo.errors import BadRequest
from localmimo.hardware.host import parse_bytes
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
    opening: LoadFlags = field(default_factory=LoadFlags)


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
    job.opening.check()


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
    engine = await asyncio.to_thread(open_engine, job.model, job.opening, ui, service.load)
    service.ready(engine)
    ui.placing(engine)
    ui.configuration(engine)
    return engine


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_name(name: str | None) -> str | None:
    """The folder that was named; None for the embedded model."""
    from localmimo.cli.packs import EMBEDDED

    return None if name in (None, EMBEDDED) else str(Path(str(name)).expanduser())
