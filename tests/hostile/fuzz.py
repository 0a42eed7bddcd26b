"""Mutations of a kept corpus for everything that reads bytes from outside, run in a process whose memory is bounded.

    python -m tests.hostile.fuzz FOLDER N_PER_READER SEED

`corpus/READER/*` are the seeds: whole files, and every input that once broke a reader. Each reader must take an input
or refuse it by one of our errors. What does not goes to FOLDER, and its name to stdout; the last line is JSON.
"""

import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from localmimo import load
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tokenizer import Tokenizer
from localmimo.chat.turn_cache import TurnCache
from localmimo.cli.terminal.saved_chats import _read as read_conversation
from localmimo.errors import LocalMimoError
from localmimo.experts.policy.profile import BadProfile, Profile, read_profile, write_profile
from localmimo.experts.policy.trace import read_trace
from localmimo.experts.store.placement import _read as read_placement
from localmimo.hardware import measurements
from localmimo.model.config import ModelConfig
from localmimo.serve.api.anthropic_messages import read_messages
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.openai_chat import read_chat
from localmimo.serve.api.openai_responses import _read_ask, _read_input
from localmimo.serve.errors import ApiError
from localmimo.serve.session_store import SessionStore, _write_index
from quant import Recipe
from quant.checkpoint.source import INDEX, Source
from quant.conversion.writer import JOURNAL, read_journal
from quant.errors import BadCheckpoint, QuantError
from quant.files.safetensors import Shard
from quant.pack.pack import Pack
from tests.packs import make_pack

CORPUS = Path(__file__).with_name("corpus")
OURS = (LocalMimoError, QuantError, BadProfile, ApiError)
MORE_BYTES = 256 << 20  # of address space while inputs are read, beyond what the process has before
ODD = (
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"null",
    b"[[",
    b'"\\ud800"',
    b"NaN",
    b"0.5",
    b"../../x",
    b"\0",
    b"{}",
)

EntryReader = Callable[[bytes], object]


class FuzzTarget:
    """A folder with a pack, its checkpoint and an open session, and the readers over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pack = make_pack(folder, vocab_size=128)
        self.checkpoint = folder / "hf"
        self.engine = load(self.pack, context=64, ram="256MiB", profile=None)
        with self.engine.session() as session:
            session.sync([3, 4, 5])
            session.save(folder / "session")
            self.held = session.tokens.copy()
        write_profile(folder / "profile", Profile.empty(2, 6))
        self.sessions = folder / "sessions"
        self.sessions.mkdir()
        import numpy as np

        shutil.copy(folder / "session", self.sessions / f"{0:032x}.kv")
        _write_index(self.sessions / f"{0:032x}.kv", np.asarray(self.held, np.int32), [2])

    def live(self) -> dict[str, bytes]:
        """Seeds that only this target's own files can be."""
        some = {
            "index": self.checkpoint / INDEX,
            "manifest": self.pack / "manifest.json",
            "session": self.folder / "session",
            "profile": self.folder / "profile",
            "tokenizer": self.pack / "tokenizer.json",
            "session_tokens": self.sessions / f"{0:032x}.tokens",
        }
        return {name: path.read_bytes() for name, path in some.items()}

    def readers(self) -> dict[str, EntryReader]:
        at = self._at
        return {
            "shard": lambda raw: Shard(at(raw), BadCheckpoint).close(),
            "index": lambda raw: self._swapped(
                self.checkpoint / INDEX, raw, lambda: Source.open(self.checkpoint)
            ),
            "config": lambda raw: ModelConfig.open(at(raw)),
            "checkpoint": lambda raw: Source.described(raw, "x"),
            "manifest": lambda raw: self._swapped(self.pack / "manifest.json", raw, self._open_pack),
            "journal": lambda raw: self._swapped(
                self.folder / JOURNAL, raw, lambda: read_journal(self.folder)
            ),
            "session": self._session,
            "profile": lambda raw: read_profile(at(raw), 2, 6),
            "trace": lambda raw: read_trace(at(raw)),
            "tokenizer": lambda raw: self._swapped(
                self.pack / "tokenizer.json", raw, lambda: Tokenizer.open(self.pack).encode("a b")
            ),
            "template": self._template,
            "recipe": lambda raw: Recipe.load(at(raw)),
            "chat": lambda raw: read_chat(Fields.of_body(raw)),
            "messages": lambda raw: read_messages(Fields.of_body(raw)),
            "responses": lambda raw: (lambda f: _read_ask(f, _read_input(f)))(Fields.of_body(raw)),
            "conversation": lambda raw: read_conversation(at(raw), "x"),
            "placement": lambda raw: read_placement(at(raw), {1: 8}),
            "speeds": lambda raw: self._swapped(
                self.folder / "speeds.json", raw, lambda: measurements.kept("ram", "read")
            ),
            "session_tokens": lambda raw: self._stored(".tokens", raw),
            "notes": lambda raw: self._stored(".notes.json", raw),
        }

    def _at(self, raw: bytes) -> Path:
        path = self.folder / "input"
        path.write_bytes(raw)
        return path

    def _swapped(self, path: Path, raw: bytes, read: Callable[[], object]) -> None:
        had = path.read_bytes() if path.exists() else None
        path.write_bytes(raw)
        try:
            read()
        finally:
            path.unlink() if had is None else path.write_bytes(had)

    def _open_pack(self) -> None:
        with Pack.open(self.pack) as pack:
            pack.tensor("norm")

    def _session(self, raw: bytes) -> None:
        with self.engine.session() as session:
            session.load(self._at(raw))

    def _template(self, raw: bytes) -> None:
        folder = self.folder / "template"
        folder.mkdir(exist_ok=True)
        (folder / "chat_template.jinja").write_bytes(raw)
        template = ChatTemplate.open(folder, {})
        try:
            template.render([{"role": "user", "content": "a"}])
        finally:
            template.close()

    def _stored(self, end: str, raw: bytes) -> None:
        self._swapped(
            self.sessions / f"{0:032x}{end}", raw, lambda: SessionStore(self.sessions, 1 << 20, TurnCache())
        )
        if not (self.sessions / f"{0:032x}.kv").exists():  # dropped, as it should be
            shutil.copy(self.folder / "session", self.sessions / f"{0:032x}.kv")


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds with a few things done to it."""
    raw = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(raw) + 1)
        match draw.randrange(6):
            case 0 if raw:
                raw[at - 1] ^= 1 << draw.randrange(8)
            case 1:
                del raw[at:]
            case 2:
                raw[at:at] = draw.choice(ODD)
            case 3:
                raw[at : at + draw.randrange(1, 9)] = draw.choice(ODD)
            case 4:
                other = draw.choice(seeds)
                raw[at:] = other[draw.randrange(len(other) + 1) :]
            case _:
                raw[at:at] = raw[at : at + draw.randrange(64)] * draw.choice((1, 2, 500))
    return bytes(raw)


def limit_memory() -> int:
    """No more address space than now and MORE_BYTES; resident bytes now."""
    pages, resident = (int(word) for word in Path("/proc/self/statm").read_text().split()[:2])
    size = os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (pages * size + MORE_BYTES,) * 2)
    return resident * size


def peak_bytes() -> int:
    """Most resident bytes of this program; getrusage would count what its parent had when it began."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    folder, n, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    os.environ["LOCALMIMO_HOME"] = str(folder)
    target = FuzzTarget(folder)
    live, before, counts = target.live(), limit_memory(), {}
    for name, read in target.readers().items():
        kept = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
        seeds = [path.read_bytes() for path in kept] + ([live[name]] if name in live else [])
        some = n if name != "template" else n // 20  # each is a process
        taken = 0
        for raw in [*seeds, *(mutated(draw, seeds) for _ in range(some))]:
            try:
                read(raw)
                taken += 1
            except OURS:
                pass
            except BaseException as error:
                at = folder / f"{name}-{len(raw)}-{draw.randrange(1 << 20)}"
                at.write_bytes(raw)
                print(f"{name}: {type(error).__name__}: {error} ({at})", flush=True)
        counts[name] = [len(seeds), taken]
    print(json.dumps({"more_bytes": peak_bytes() - before, "seeds_and_taken": counts}))
    target.engine.close()


if __name__ == "__main__":
    main()
