"""Turns: what was answered here, to be found again in the conversations that come back.

A conversation is rendered anew each turn, and encoding its text would often give other tokens than those that were
sampled: another cut of a word, a call written with other white space. Clients change it too: they trim, write
arguments anew, drop the thinking. The KV cache would be lost from there on, and the model would miss its own thoughts.
So of each answer two things are kept: the message that the engine made, found by the ids of its calls or else by the
conversation up to it, and the tokens held at its end, found by the conversation's rendered text up to there. A turn
that somebody changed stays as it came.

Knows messages, texts and tokens; nothing of templates, models or requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmimo.chat.messages import check_messages

LIMIT_BYTES = 64 << 20
TURN_BYTES = 1000  # of keys and objects around a turn's text
ENDING = 16  # tokens at most that the template puts behind a turn

Message = Mapping[str, Any]
Key = bytes | tuple[int, bytes]  # of a conversation or a call; of a text of so many characters


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One answer; `tokens` reach from the beginning of the conversation to its end. A bare text says nothing."""

    said: dict[str, Any]
    tokens: array[int]
    keys: tuple[Key, ...]

    @property
    def n_bytes(self) -> int:
        return TURN_BYTES + len(json.dumps(self.said)) + self.tokens.itemsize * len(self.tokens)

    def belongs(self, held: array[int]) -> bool:
        """Whether a session that holds these tokens holds this turn, but for the end that the template writes."""
        common = min(len(held), len(self.tokens))
        return common > 0 and self.tokens[:common] == held[:common] and len(self.tokens) - common <= ENDING

    def as_dict(self, n_held: int) -> dict[str, Any]:
        """The turn beside the tokens of its session, for a file."""
        keys = [[key[0], key[1].hex()] if isinstance(key, tuple) else key.hex() for key in self.keys]
        n_held = min(n_held, len(self.tokens))
        return {"said": self.said, "keys": keys, "held": n_held, "ending": list(self.tokens[n_held:])}

    @classmethod
    def of_dict(cls, value: Mapping[str, Any], held: Sequence[int]) -> Turn:
        """What `as_dict` gave; raises BadRequest, KeyError, TypeError or ValueError where it is no such thing."""
        said = check_messages([value["said"]])[0] if value["said"] else {}
        tokens = array("I", [*held[: value["held"]], *value["ending"]])
        keys = [bytes.fromhex(key) if isinstance(key, str) else _pair(*key) for key in value["keys"]]
        return cls(said, tokens, tuple(keys))


class TurnCache:
    """The answers of this process, the least recently used forgotten first. Thread-safe."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._turns: OrderedDict[Turn, int] = OrderedDict()  # and their bytes
        self._known: dict[Key, Turn] = {}
        self._n_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    def keep(
        self, messages: Sequence[Message], said: Message, text: str | None = None, tokens: Sequence[int] = ()
    ) -> None:
        """Keep the message that answered a conversation, and the tokens of its text where they are known."""
        (clean,) = check_messages([said])
        keys: list[Key] = [_id_key(call["id"]) for call in clean.get("tool_calls", ()) if call["id"]]
        keys = keys or [list(_chain([*check_messages(messages), clean]))[-1]]
        keys += [] if text is None else [_text_key(text)]
        self.take(Turn(clean, array("I", tokens), tuple(keys)))

    def keep_text(self, text: str, tokens: Sequence[int]) -> None:
        """Keep the tokens of a bare text that was continued: its own and those that were sampled."""
        self.take(Turn({}, array("I", tokens), (_text_key(text),)))

    def take(self, turn: Turn) -> None:
        """Keep a turn, in place of what was known under its keys."""
        with self._lock:
            self._turns[turn] = turn.n_bytes
            self._n_bytes += turn.n_bytes
            for key in turn.keys:
                before, self._known[key] = self._known.get(key), turn
                if before is not None and not self._names(before):
                    self._forget(before)
            while self._n_bytes > self._limit:
                self._forget(next(iter(self._turns)))

    def of_session(self, held: Sequence[int]) -> list[Turn]:
        """The turns that a session with these tokens holds."""
        tokens = array("I", held)
        with self._lock:
            return [turn for turn in self._turns if turn.belongs(tokens)]

    def recognise(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The conversation, turns that are known as they were said. Raises BadRequest."""
        checked = check_messages(messages)
        return [
            self._said(message, key) or message for message, key in zip(checked, _chain(checked), strict=True)
        ]

    def longest(self, text: str) -> tuple[int, list[int]]:
        """(characters, their tokens) of the longest known beginning of a rendered conversation."""
        with self._lock:
            lengths = {key[0] for key in self._known if isinstance(key, tuple) and key[0] <= len(text)}
            found, digest, at = None, _new_digest(), 0
            for n_chars in sorted(lengths):  # the text is gone through once, however many lengths there are
                digest.update(_bytes(text[at:n_chars]))
                at = n_chars
                found = self._known.get((n_chars, digest.digest())) or found
            if found is None:
                return 0, []
            self._turns.move_to_end(found)
            return next(key[0] for key in found.keys if isinstance(key, tuple)), list(found.tokens)

    def _said(self, message: Message, key: bytes) -> dict[str, Any] | None:
        if message["role"] != "assistant":
            return None
        keys = [_id_key(call["id"]) for call in message.get("tool_calls", ()) if call["id"]] or [key]
        with self._lock:
            turn = next((self._known[key] for key in keys if key in self._known), None)
            if turn is None or not _same(turn.said, message):
                return None
            self._turns.move_to_end(turn)
            return turn.said

    def _names(self, turn: Turn) -> list[Key]:
        """The keys that lead to this turn, and not to a later one."""
        return [key for key in turn.keys if self._known.get(key) is turn]

    def _forget(self, turn: Turn) -> None:
        for key in self._names(turn):
            del self._known[key]
        self._n_bytes -= self._turns.pop(turn)


def _chain(messages: Sequence[Message]) -> Iterator[bytes]:
    """For each message, a digest of the conversation up to it; thinking and the ids of calls do not count."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(json.dumps([message["role"], message["content"].strip(), _calls(message)]).encode())
        yield digest.digest()


def _same(turn: Message, message: Message) -> bool:
    """Whether the message says what the turn said; its thinking may be missing."""
    reasoning = message.get("reasoning_content", "").strip()
    return (
        turn["content"].strip() == message["content"].strip()
        and reasoning in ("", turn.get("reasoning_content", "").strip())
        and _calls(turn) == _calls(message)
    )


def _calls(message: Message) -> list[list[str]]:
    """Names and arguments, however these are written."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [[function["name"], json.dumps(function["arguments"], sort_keys=True)] for function in functions]


def _id_key(name: str) -> bytes:
    return b"id:" + name.encode("utf-8", "replace")


def _text_key(text: str) -> tuple[int, bytes]:
    digest = _new_digest()
    digest.update(_bytes(text))
    return len(text), digest.digest()


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _pair(n_chars: int, digest: str) -> tuple[int, bytes]:
    return int(n_chars), bytes.fromhex(digest)
