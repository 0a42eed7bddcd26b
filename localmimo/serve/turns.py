"""Turns: what was answered here, to be found again in the history that a client sends, and put back as it was said.

A client sends a turn back as its parser saw it: white space trimmed, arguments written anew, often without the
thinking. The prompt would then differ from what the KV cache holds, and the model would miss its own thoughts. So a
turn that is recognised, by the ids of its calls or else by the whole conversation before it, is replaced by the
message that the engine made; the engine knows the tokens of that. A turn that the client changed stays as it came.

Knows messages; nothing of templates, tokens or requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localmimo.messages import check_messages

LIMIT_BYTES = 64 << 20
TURN_BYTES = 1000  # of keys and objects around a turn's text

Message = Mapping[str, Any]


class Turns:
    """The answers of this process, the least recently used forgotten first. Thread-safe."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._turns: OrderedDict[bytes, tuple[dict[str, Any], int]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    def restore(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The conversation, turns that are known as they were said. Raises BadRequest."""
        checked = check_messages(messages)
        return [
            self._known(message, key) or message
            for message, key in zip(checked, _chain(checked), strict=True)
        ]

    def remember(self, messages: Sequence[Message], said: dict[str, Any]) -> None:
        """Keep the message that answered a conversation."""
        (turn,) = check_messages([said])
        keys = [_id_key(call["id"]) for call in turn.get("tool_calls", ())]
        keys = keys or [list(_chain([*check_messages(messages), turn]))[-1]]
        n_bytes = TURN_BYTES + len(json.dumps(turn))
        with self._lock:
            for key in keys:
                self._forget(key)
                self._turns[key] = (turn, n_bytes)
                self._n_bytes += n_bytes
            while self._n_bytes > self._limit:
                self._forget(next(iter(self._turns)))

    def _known(self, message: Message, key: bytes) -> dict[str, Any] | None:
        if message["role"] != "assistant":
            return None
        keys = [_id_key(call["id"]) for call in message.get("tool_calls", ()) if call["id"]] or [key]
        with self._lock:
            key = next((key for key in keys if key in self._turns), b"")
            if not key:
                return None
            self._turns.move_to_end(key)
            turn, _ = self._turns[key]
        return turn if _same(turn, message) else None

    def _forget(self, key: bytes) -> None:
        self._n_bytes -= self._turns.pop(key, ({}, 0))[1]


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
