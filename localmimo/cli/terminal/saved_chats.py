"""A conversation on disk: a folder with its messages, and beside them the session's KV cache.

messages.json has the messages and the tokens that the session holds for them; kv.safetensors is the session's own file.
Knows engines by their prompts and their session; nothing of terminals.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo.chat.messages import check_messages
from localmimo.errors import BadRequest, BadSession, with_flags
from localmimo.system.paths import home
from quant.files.atomic import written_aside
from quant.files.bounded import read_small

if TYPE_CHECKING:
    from localmimo.engine import Engine

VERSION = 1
MESSAGES, KV = "messages.json", "kv.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
MAX_BYTES = 256 << 20  # of messages.json

Messages = list[dict[str, Any]]
Schemas = Sequence[Mapping[str, Any]] | None


def folder_of(name: str) -> Path:
    """The folder of a conversation of this name. Raises BadRequest where the name cannot be used, such as a path."""
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        raise BadRequest(
            f'"{name}" cannot be a session\'s name: use letters, digits, spaces, dots, - and _, 64 at most.'
        )
    return home() / "sessions" / name


def saved_names() -> list[str]:
    """The saved conversations, the latest last."""
    found = [path for path in (home() / "sessions").glob(f"*/{MESSAGES}") if NAME.fullmatch(path.parent.name)]
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]


@dataclass(frozen=True, slots=True)
class SavedChat:
    """What messages.json holds. turns: for each answer, how many of `tokens` the conversation had at its end."""

    messages: Messages
    system: str | None = None
    model: str = ""
    digest: str = ""  # of the rendered text: the tokens belong to that text alone
    tokens: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()

    def with_system(self) -> Messages:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]


def save(
    engine: "Engine", name: str, messages: Messages, system: str | None, tools: Schemas
) -> Iterator[tuple[int, int]]:
    """Write a conversation; yields (tokens held, bytes of their file), then, once written, all bytes."""
    folder = folder_of(name)
    if not messages:
        raise BadRequest("The conversation is empty: there is nothing to save.")
    plain = SavedChat(messages, system, str(engine.pack.name))
    digest, tokens, turns = engine.prompts.snapshot(plain.with_system(), tools)
    whole = SavedChat(messages, system, plain.model, digest, tuple(tokens), tuple(turns))
    with engine.session() as session:
        n_tokens = session.position
        yield n_tokens, session.saved_bytes
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        n_bytes = session.save(folder / KV)
    yield n_tokens, n_bytes + _write(folder / MESSAGES, whole)


def load(engine: "Engine", name: str, tools: Schemas) -> tuple[SavedChat, int, str]:
    """(the conversation, how many of its tokens the session holds now, why it does not hold them or nothing).

    Raises BadSession where the messages themselves cannot be read.
    """
    folder = folder_of(name)
    found = _read(folder / MESSAGES, name)
    try:
        if not engine.prompts.restore(found.with_system(), tools, found.digest, found.tokens, found.turns):
            return found, 0, "Its prompt is written differently now (other tools or another template)."
        with engine.session() as session:
            session.load(folder / KV)
            alike = [held == saved for held, saved in zip(session.tokens, found.tokens, strict=False)]
    except BadSession as error:
        return found, 0, with_flags(error)
    return found, [*alike, False].index(False), ""


def _write(path: Path, conversation: SavedChat) -> int:
    value = {"version": VERSION, "saved": datetime.now().astimezone().isoformat(timespec="seconds")}
    value |= {name: getattr(conversation, name) for name in SavedChat.__slots__}
    text = json.dumps(value, ensure_ascii=False)
    try:
        with written_aside(path, 0o600) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise BadSession(f"The session cannot be written to {path}: {error.strerror or error}.") from error
    return path.stat().st_size


def _read(path: Path, name: str) -> SavedChat:
    if not path.is_file():
        known = ", ".join(saved_names()[-10:])
        raise BadSession(f"There is no saved session {name}" + (f"; there are {known}." if known else "."))
    try:
        value = json.loads(read_small(path, MAX_BYTES).decode("utf-8", "surrogatepass"))
        if value["version"] != VERSION:
            raise ValueError(f"its version is {value['version']}; this program reads {VERSION}")
        system = value["system"]
        check_messages(value["messages"])
        return SavedChat(
            [dict(message) for message in value["messages"]],
            None if system is None else str(system),
            str(value["model"]),
            str(value["digest"]),
            tuple(map(int, value["tokens"])),
            tuple(map(int, value["turns"])),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, BadRequest) as error:
        raise BadSession(f"{path} cannot be read as a session: {error}") from None
