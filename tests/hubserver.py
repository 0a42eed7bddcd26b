"""A small server that speaks the hub's protocol over a folder, and misbehaves when told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `folder` as repository "test/model". `faults[file]`: what goes wrong with its next GETs, in order.

    drop: the connection ends halfway; corrupt: one byte is another; busy: 503; short: half a file that says it is
    whole. `gets` counts answered GETs of whole files, `token` is what clients must show, where it is set.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.listed_sizes: dict[str, int] = {}
        self.gets: dict[str, int] = defaultdict(int)
        self.token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def listing(self) -> dict:
        entries = []
        for file in sorted(self.folder.iterdir()):
            size = self.listed_sizes.get(file.name, file.stat().st_size)
            entry: dict = {"rfilename": file.name, "size": size, "blobId": "0" * 40}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"sha256": _sha256(file), "size": size, "pointerSize": 134}
            entries.append(entry)
        return {"id": "test/model", "modelId": "test/model", "sha": COMMIT, "siblings": entries, "tags": []}


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    server = HubServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        if self.server.token and self.headers.get("authorization") != f"Bearer {self.server.token}":
            self._fail(401, "RepoNotFound")
            return
        path = self.path.partition("?")[0]
        match = re.fullmatch(rf"/test/model/resolve/({COMMIT}|main)/([\w.-]+)", path)
        if re.fullmatch(r"/api/models/test/model(/revision/\w+)?", path):
            self._send(200, json.dumps(self.server.listing()).encode(), {}, head)
        elif match is None:
            self._fail(404, "RepoNotFound")
        elif not (self.server.folder / match[2]).is_file():
            self._fail(404, "EntryNotFound")
        else:
            self._file(self.server.folder / match[2], head)

    def _file(self, file: Path, head: bool) -> None:
        content = file.read_bytes()
        etag = _sha256(file) if file.suffix == ".safetensors" else hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = wanted is None or not wanted[2]
        fault = (
            self.server.faults[file.name].pop(0)
            if not head and whole and self.server.faults[file.name]
            else ""
        )
        if fault == "busy":
            self._fail(503, None)
            return
        if not head and whole:
            self.server.gets[file.name] += 1
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if wanted and not head:
            start, stop = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(status, content, headers, head, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], head: bool, fault: str = "") -> None:
        length = len(body) // 2 if fault == "short" else len(body)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body[: len(body) // 2] if fault in ("drop", "short") else body)
        if fault == "drop":
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _fail(self, status: int, code: str | None) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {}, self.command == "HEAD")
