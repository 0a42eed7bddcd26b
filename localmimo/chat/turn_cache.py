"""Cache of answered turns: gives a returning conversation the answers as they were sampled.

A conversation is rendered anew at each turn. Encoding its text would often give other tokens than those that were
sampled: a word cut elsewhere, a call written with other white space. Clients also change the text: they trim it, write
arguments anew, drop the thinking. The KV cache would be useless from there on, and the model would not see its own
thoughts. So two things are kept of each answer. The first is the message that the engine made, found by the ids of its
calls, or else by the conversation up to it. The second is the tokens at its end, found by the conversation's rendered
text up to there. A turn that a client changed stays as the client sent it.

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

MAX_BYTES = 64 << 20
TURN_BYTES = 1000  # of keys and objects around a turn's text
MAX_ENDING_TOKENS = 16  # that the template writes behind a turn

Message = Mapping[str, Any]
Key = bytes | tuple[int, bytes]  # digest of a conversation or of a call's id; (characters, digest) of a text


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One answer.

    message: empty where the answer continued a bare text. tokens: from the beginning of the conversation to the end
    of the answer; none where they are not known.
    """

    message: dict[str, Any]
    tokens: array[int]
    keys: tuple[Key, ...]

    @property
    def n_bytes(self) -> int:
        return TURN_BYTES + len(json.dumps(self.message)) + self.tokens.itemsize * len(self.tokens)

    def is_held_by(self, session: array[int]) -> bool:
        """Whether a session with these tokens holds this turn. The ending that the template writes may be missing."""
        common = min(len(session), len(self.tokens))
        n_missing = len(self.tokens) - common
        return common > 0 and self.tokens[:common] == session[:common] and n_missing <= MAX_ENDING_TOKENS

    def as_dict(self, n_held: int) -> dict[str, Any]:
        """The turn as JSON for a file beside its session, whose first `n_held` tokens are saved there."""
        keys = [[key[0], key[1].hex()] if isinstance(key, tuple) else key.hex() for key in self.keys]
        n_held = min(n_held, len(self.tokens))
        return {"said": self.message, "keys": keys, "held": n_held, "ending": list(self.tokens[n_held:])}

    @classmethod
    def of_dict(cls, value: Mapping[str, Any], held: Sequence[int]) -> Turn:
        """The turn of an `as_dict`. Raises BadRequest, KeyError, TypeError or ValueError for any other value."""
        message = check_messages([value["said"]])[0] if value["said"] else {}
        tokens = array("I", [*held[: value["held"]], *value["ending"]])
        keys = [bytes.fromhex(key) if isinstance(key, str) else _text_key_of(*key) for key in value["keys"]]
        return cls(message, tokens, tuple(keys))


class TurnCache:
    """The answers of this process. The least recently used one is dropped first. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes: OrderedDict[Turn, int] = OrderedDict()  # of each turn, the least recently used first
        self._by_key: dict[Key, Turn] = {}
        self._n_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._bytes)

    def add(
        self,
        messages: Sequence[Message],
        answer: Message,
        text: str | None = None,
        tokens: Sequence[int] = (),
    ) -> None:
        """Keep the message that answered a conversation, and the tokens of its text where they are known."""
        (checked,) = check_messages([answer])
        keys: list[Key] = [_id_key(call["id"]) for call in checked.get("tool_calls", ()) if call["id"]]
        keys = keys or [list(_digests([*check_messages(messages), checked]))[-1]]
        keys += [] if text is None else [_text_key(text)]
        self.put(Turn(checked, array("I", tokens), tuple(keys)))

    def add_text(self, text: str, tokens: Sequence[int]) -> None:
        """Keep a bare text that was continued: `tokens` are its own and those that were sampled."""
        self.put(Turn({}, array("I", tokens), (_text_key(text),)))

    def put(self, turn: Turn) -> None:
        """Keep a turn, in place of the turns that had its keys."""
        with self._lock:
            self._bytes[turn] = turn.n_bytes
            self._n_bytes += turn.n_bytes
            for key in turn.keys:
                before, self._by_key[key] = self._by_key.get(key), turn
                if before is not None and not self._keys_to(before):
                    self._drop(before)
            while self._n_bytes > self._max_bytes:
                self._drop(next(iter(self._bytes)))

    def held_by(self, session: Sequence[int]) -> list[Turn]:
        """The turns that a session with these tokens holds."""
        tokens = array("I", session)
        with self._lock:
            return [turn for turn in self._bytes if turn.is_held_by(tokens)]

    def restore(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The conversation, with each known turn as it was sampled. Raises BadRequest."""
        checked = check_messages(messages)
        return [
            self._known_message(message, key) or message
            for message, key in zip(checked, _digests(checked), strict=True)
        ]

    def longest_prefix(self, text: str) -> tuple[int, list[int]]:
        """(characters, their tokens) of the longest known beginning of a rendered conversation."""
        with self._lock:
            lengths = {key[0] for key in self._by_key if isinstance(key, tuple) and key[0] <= len(text)}
            found, digest, start = None, _new_digest(), 0
            for n_chars in sorted(lengths):  # the text is hashed once, however many lengths there are
                digest.update(_bytes(text[start:n_chars]))
                start = n_chars
                found = self._by_key.get((n_chars, digest.digest())) or found
            if found is None:
                return 0, []
            self._bytes.move_to_end(found)
            return next(key[0] for key in found.keys if isinstance(key, tuple)), list(found.tokens)

    def _known_message(self, message: Message, key: bytes) -> dict[str, Any] | None:
        if message["role"] != "assistant":
            return None
        keys = [_id_key(call["id"]) for call in message.get("tool_calls", ()) if call["id"]] or [key]
        with self._lock:
            turn = next((self._by_key[key] for key in keys if key in self._by_key), None)
            if turn is None or not _is_same(turn.message, message):
                return None
            self._bytes.move_to_end(turn)
            return turn.message

    def _keys_to(self, turn: Turn) -> list[Key]:
        """The keys that lead to this turn, and not to a later one."""
        return [key for key in turn.keys if self._by_key.get(key) is turn]

    def _drop(self, turn: Turn) -> None:
        for key in self._keys_to(turn):
            del self._by_key[key]
        self._n_bytes -= self._bytes.pop(turn)


def _digests(messages: Sequence[Message]) -> Iterator[bytes]:
    """For each message, a digest of the conversation up to it. Thinking and the ids of calls do not count."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(json.dumps([message["role"], message["content"].strip(), _calls(message)]).encode())
        yield digest.digest()


def _is_same(known: Message, message: Message) -> bool:
    """Whether the message is the known one. Its thinking may be missing."""
    reasoning = message.get("reasoning_content", "").strip()
    return (
        known["content"].strip() == message["content"].strip()
        and reasoning in ("", known.get("reasoning_content", "").strip())
        and _calls(known) == _calls(message)
    )


def _calls(message: Message) -> list[list[str]]:
    """Name and arguments of each call, the arguments in one notation."""
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


def _text_key_of(n_chars: int, digest: str) -> tuple[int, bytes]:
    return int(n_chars), bytes.fromhex(digest)
