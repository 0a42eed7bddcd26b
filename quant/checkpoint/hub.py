"""A checkpoint on the Hugging Face hub: its files' sizes and headers at once, the files themselves one by one.

Headers are read by range requests, so that the size of a pack of a terabyte is known after a few megabytes. A file is
fetched through huggingface_hub (its cache, its resumption, its token), then compared with the size and the SHA-256 of
the hub's listing. Files in a folder of the conversion can be discarded again. It must not know tensors, recipes or
packs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from quant.errors import BadCheckpoint, NoSpace, Unreachable
from quant.files.atomic import written_aside

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, perhaps @revision
MAX_SMALL_BYTES = 64 << 20  # larger files that are no safetensors files are not fetched
FIRST_READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
N_TRIES = 5
PAUSE_S = 2.0
LISTING = "listing.json"
SKIPPED = (".md", ".png", ".jpg", ".jpeg", ".svg", ".pdf", ".py", ".gitattributes")


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file as the hub lists it. `sha256`: of large files."""

    name: str
    n_bytes: int
    sha256: str | None


class Hub:
    """One repository at one commit."""

    def __init__(
        self,
        repository: str,
        *,
        folder: Path | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        cache: Path | None = None,
        pause_s: float = PAUSE_S,
    ) -> None:
        """List the repository. With a `folder` files go there and may be discarded, else into the hub's cache.

        `repository` is owner/name, with @revision for another than the newest. Raises Unreachable, BadCheckpoint.
        """
        self.repository, _, revision = repository.partition("@")
        self.folder = folder
        self._endpoint, self._token, self._cache, self._pause_s = endpoint, token, cache, pause_s
        self._fetching: dict[str, Future[Path]] = {}
        self.commit, self.files = self._listing(revision or None)

    # ---- listing and headers ----

    def _listing(self, revision: str | None) -> tuple[str, dict[str, HubFile]]:
        """Commit and files. A folder that was begun keeps its commit: a newer one would be another checkpoint."""
        begun = self.folder / LISTING if self.folder else None
        if begun and begun.is_file() and (had := _read_listing(begun, self.repository)):
            return had
        commit, files = self._with_retries(lambda: self._request_listing(revision), "The list of files")
        if begun:
            begun.parent.mkdir(parents=True, exist_ok=True)
            facts = {"repository": self.repository, "commit": commit, "files": [*map(asdict, files.values())]}
            with written_aside(begun) as file:
                file.write(json.dumps(facts).encode())
        return commit, files

    def _request_listing(self, revision: str | None) -> tuple[str, dict[str, HubFile]]:
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint, token=self._token).model_info(
            self.repository, revision=revision, files_metadata=True
        )
        files = {
            entry.rfilename: HubFile(
                entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None
            )
            for entry in info.siblings or []
            if _plain(entry.rfilename)
        }
        if info.sha is None or not files:
            raise BadCheckpoint(f"{self.repository} is empty on the hub.")
        return info.sha, files

    def header(self, name: str) -> bytes:
        """The header of a safetensors file, read by a range request or two; without its length."""
        head = self._range(name, 0, min(FIRST_READ_BYTES, self.files[name].n_bytes))
        length = int.from_bytes(head[:8], "little")
        if 8 + length > self.files[name].n_bytes:
            raise BadCheckpoint(f"{name} of {self.repository} has a header length larger than the file.")
        if length > MAX_HEADER_BYTES:
            raise BadCheckpoint(
                f"{name} of {self.repository} has a header of {length:,} bytes; "
                f"at most {MAX_HEADER_BYTES:,} are allowed."
            )
        if len(head) < 8 + length:
            head += self._range(name, len(head), 8 + length)
        return head[8 : 8 + length]

    def _range(self, name: str, start: int, stop: int) -> bytes:
        return self._with_retries(lambda: self._get(name, start, stop), f"The header of {name}")

    def _get(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore

        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=self._endpoint)
        headers = build_hf_headers(token=self._token) | {
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and start:
                raise OSError(f"the server ignores ranges of {name}")
            return _take(response.iter_bytes(), stop - start)

    # ---- the files ----

    def fetch(self, name: str) -> Path:
        """The file, downloaded and checked. Raises Unreachable, NoSpace, or BadCheckpoint if it arrives wrong twice."""
        fetching = self._fetching.pop(name, None)
        return fetching.result() if fetching else self._fetch(name)

    def expect(self, names: Iterable[str]) -> None:
        """Begin to fetch the files that are needed next, one after the other, in a thread."""
        wanted = [name for name in names if name not in self._fetching and not self.has(name)]
        for name in wanted:
            self._fetching[name] = Future()
        if wanted:
            fetching = {name: self._fetching[name] for name in wanted}
            # A daemon: a stopped conversion must not wait for a download that it will take up again.
            threading.Thread(target=self._fetch_all, args=(fetching,), daemon=True).start()

    def _fetch_all(self, fetching: dict[str, Future[Path]]) -> None:
        for name, future in fetching.items():
            try:
                future.set_result(self._fetch(name))
            except BaseException as error:
                future.set_exception(error)

    def has(self, name: str) -> bool:
        """Whether the whole file is in the conversion's folder."""
        return self.folder is not None and (self.folder / name).is_file()

    def discard(self, name: str) -> None:
        """Delete a file from the conversion's folder; the hub's cache is never touched."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)

    def path(self) -> Path:
        """The folder in which the files appear."""
        if self.folder is not None:
            return self.folder
        return self.fetch("config.json").parent

    def fetch_small(self) -> None:
        """Everything a pack copies: configuration, index, tokenizer, templates."""
        for file in self.files.values():
            if (
                not file.name.endswith((".safetensors", *SKIPPED))
                and file.n_bytes <= MAX_SMALL_BYTES
                and not self.has(file.name)
            ):
                self.fetch(file.name)

    def _fetch(self, name: str) -> Path:
        expected = self.files.get(name)
        if expected is None:
            raise BadCheckpoint(f"{self.repository} has no file {name} at {self.commit[:12]}.")
        for last in (False, True):
            path = self._with_retries(lambda: self._download(name), name)
            problem = _wrong(path, expected)
            if problem is None:
                return path
            _forget(path)
            if last:
                raise BadCheckpoint(f"{name} of {self.repository} arrived wrong twice: {problem}.")
        raise AssertionError

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars  # type: ignore

        disable_progress_bars()
        return Path(
            hf_hub_download(
                self.repository,
                name,
                revision=self.commit,
                endpoint=self._endpoint,
                token=self._token,
                cache_dir=self._cache,
                local_dir=self.folder,
            )
        )

    def _with_retries(self, request: Callable[[], T], what: str) -> T:
        """Try again after a dropped connection: five attempts in all, each pause twice as long."""
        for attempt in range(N_TRIES):
            try:
                return request()
            except Exception as error:
                final = _sentence(error, self.repository, what)
                if final is not None:
                    raise final from error
                if attempt == N_TRIES - 1:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise Unreachable(
                        f"{what} of {self.repository} could not be fetched in {N_TRIES} attempts: {reason}. "
                        "Run the same command again: what has arrived is kept."
                    ) from error
            time.sleep(self._pause_s * 2**attempt)
        raise AssertionError


def _sentence(error: Exception, repository: str, what: str) -> Exception | None:
    """An error that another attempt would not change, as one of this package's; else None."""
    import errno

    from huggingface_hub import errors

    if isinstance(error, BadCheckpoint):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"The disk is full while fetching {what}: free some space and run the command again.")
    if isinstance(error, errors.GatedRepoError):
        return Unreachable(f"{repository} is gated: accept its terms on the hub and set HF_TOKEN.")
    if isinstance(error, errors.EntryNotFoundError):
        return BadCheckpoint(f"{repository} does not have {what}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return Unreachable(f"{repository} has no such revision.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return Unreachable(
            f"There is no {repository} on the hub, or it is private: check the name, or set HF_TOKEN."
        )
    return None


def _take(chunks: Iterable[bytes], n_bytes: int) -> bytes:
    out = bytearray()
    for chunk in chunks:
        out += chunk
        if len(out) >= n_bytes:
            return bytes(out[:n_bytes])
    raise OSError(f"{len(out):,} of {n_bytes:,} bytes arrived")


def _wrong(path: Path, expected: HubFile) -> str | None:
    """What is wrong with a file that has arrived."""
    n_bytes = path.stat().st_size
    if n_bytes != expected.n_bytes:
        return f"it has {n_bytes:,} bytes, the hub lists {expected.n_bytes:,}"
    if expected.sha256 is None:
        return None
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return (
        None
        if found == expected.sha256
        else f"its SHA-256 is {found[:12]}…, the hub lists {expected.sha256[:12]}…"
    )


def _forget(path: Path) -> None:
    """Delete a bad file, and what it points to in the hub's cache."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _plain(name: object) -> bool:
    """Whether a name stays in the folder that it is put in."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {"/", "\\", "\0"}


def _read_listing(file: Path, repository: str) -> tuple[str, dict[str, HubFile]] | None:
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
        files = [HubFile(**entry) for entry in facts["files"]]
        commit = facts["commit"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(_plain(entry.name) and type(entry.n_bytes) is int for entry in files):
        return None
    if facts.get("repository") != repository:
        raise BadCheckpoint(
            f"{file.parent} holds a download of {facts.get('repository')}, not of {repository}: delete it, "
            "or choose another --out."
        )
    return str(commit), {entry.name: entry for entry in files}
