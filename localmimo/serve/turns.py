"""Turns: the exact tokens of every turn that was sampled here, to be found again in the history that a client sends.

A client sends a turn back as its parser saw it: white space trimmed, arguments as JSON, often without the thinking.
Written anew by the template it would differ from what the KV cache holds, and everything after it would be read
again. So a turn that is recognised (by the ids of its calls, else by the whole conversation before it) goes into the
prompt token by token as it was sampled, its thinking included. Nothing is put into a turn that the client changed.

Knows messages, templates and tokens; nothing of requests or of the engine.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmimo.marks import Marker
from localmimo.messages import check_messages, check_tools
from localmimo.serve.reply import Reply
from localmimo.template import ChatTemplate

LIMIT_BYTES = 64 << 20
TURN_BYTES = 400  # of keys and objects around a turn's text and tokens
LONGEST_OPENING = 200  # characters that a template may write at the start of a turn

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model said, as it was parsed and as it was sampled."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]  # name and arguments as canonical JSON
    opening: str  # what the template wrote at the turn's start, such as <think></think>
    tokens: array[int]

    @property
    def n_bytes(self) -> int:
        return TURN_BYTES + 2 * (len(self.content) + len(self.reasoning)) + len(self.tokens) * 4


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around an assistant's turn."""

    head: str  # up to the turn: <|im_start|>assistant\n
    empty: str  # before the content of a turn without thinking: <think></think>
    end: str  # after the turn: <|im_end|>


class Turns:
    """The turns of this process, the least recently used forgotten first."""

    def __init__(
        self,
        template: ChatTemplate,
        encode: Callable[[str, str], list[int]],
        marker: Marker,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._template = template
        self._encode = encode  # text and the mark in it (see localmimo.marks)
        self._marker = marker
        self._limit = limit_bytes
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._n_bytes = 0
        self._mark = f"\u2603{os.urandom(8).hex()}:"  # nobody else can write it
        self._frame = self._find_frame()

    def __len__(self) -> int:
        return len(self._turns)

    # ---- into a prompt ----

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> list[int]:
        """The tokens of a conversation, turns that are known exactly as they were sampled. Raises BadRequest."""
        messages = check_messages(messages)
        known = self._known(messages)
        spelled = self._marker.mark(messages, check_tools(tools))
        if known and self._frame:
            marked = [
                self._marked(n, message) if n in known else message
                for n, message in enumerate(spelled.messages)
            ]
            text = self._template.render(marked, tools=spelled.tools, think=think)
            if (tokens := self._spliced(text, spelled.mark, known, self._frame)) is not None:
                return tokens
        text = self._template.render(spelled.messages, tools=spelled.tools, think=think)
        return self._encode(text, spelled.mark)

    def _known(self, messages: Sequence[Message]) -> dict[int, Turn]:
        found = {}
        for number, (message, key) in enumerate(zip(messages, _chain(messages), strict=True)):
            turn = self._find(message, key) if message["role"] == "assistant" else None
            if turn is not None and _same(turn, message):
                found[number] = turn
        return found

    def _find(self, message: Message, key: bytes) -> Turn | None:
        keys = [_id_key(call["id"]) for call in message.get("tool_calls", ()) if call["id"]] or [key]
        for key in keys:
            if key in self._turns:
                self._turns.move_to_end(key)
                return self._turns[key]
        return None

    def _marked(self, number: int, message: Message) -> dict[str, Any]:
        """The message with a mark for its content, and calls that have no arguments."""
        marked: dict[str, Any] = {"role": "assistant", "content": f"{self._mark}{number};"}
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [
                call | {"function": {"name": call["function"]["name"], "arguments": {}}} for call in calls
            ]
        return marked

    def _spliced(self, text: str, spelled: str, known: Mapping[int, Turn], frame: _Frame) -> list[int] | None:
        """The tokens of a rendered text with marks; None where the template did not write them as foreseen."""
        tokens: list[int] = []
        done = 0
        for number, turn in known.items():
            mark = f"{self._mark}{number};"
            at = text.find(mark, done)
            end = text.find(frame.end, at + len(mark))
            before = text[done:at].removesuffix(frame.empty)
            if at < 0 or end < 0 or not before.endswith(frame.head):
                return None
            tokens += self._encode(before + turn.opening, spelled)
            tokens += turn.tokens
            done = end
        return tokens + self._encode(text[done:], spelled) if self._mark not in text[done:] else None

    # ---- out of an answer ----

    def remember(
        self, messages: Sequence[Message], prompt_end: str, reply: Reply, parsed: tuple[str, str, list[Any]]
    ) -> None:
        """Keep an answer. prompt_end: how the prompt's text ended; parsed: what the sampled text says by itself.

        An answer that was cut within its text (a stop string) is not kept: the client knows less than the tokens say.
        """
        content, reasoning, calls = parsed
        said = [_call(call.as_dict()["function"]) for call in reply.calls]
        if (content, reasoning) != (reply.content, reply.reasoning) or said != [
            _call(call.as_dict()["function"]) for call in calls
        ]:
            return
        if self._frame is None or (opening := self._opening(prompt_end, self._frame)) is None:
            return
        turn = Turn(content, reasoning, tuple(said), opening, array("i", reply.tokens))
        ids = [_id_key(call.id) for call in reply.calls]
        for key in ids or [self._key_of(messages, reply)]:
            self._keep(key, turn)

    def _key_of(self, messages: Sequence[Message], reply: Reply) -> bytes:
        said = {"role": "assistant", "content": reply.content}
        return list(_chain(check_messages([*messages, said])))[-1]

    def _opening(self, prompt_end: str, frame: _Frame) -> str | None:
        at = prompt_end.rfind(frame.head)
        return prompt_end[at + len(frame.head) :] if at >= 0 else None

    def _keep(self, key: bytes, turn: Turn) -> None:
        self._forget(key)
        self._turns[key] = turn
        self._n_bytes += turn.n_bytes
        while self._n_bytes > self._limit:
            self._forget(next(iter(self._turns)))

    def _forget(self, key: bytes) -> None:
        if (turn := self._turns.pop(key, None)) is not None:
            self._n_bytes -= turn.n_bytes

    def _find_frame(self) -> _Frame | None:
        """What the template writes around a turn, found by having it write one; None where that is unclear."""
        asked = {"role": "user", "content": "?"}
        said = self._template.render(
            [asked, {"role": "assistant", "content": self._mark}], add_generation_prompt=False
        )
        openings = [self._template.render([asked], think=think) for think in (True, False)]
        before, mark, end = said.partition(self._mark)
        common = _common_start(before, *openings)
        head = common[common.rfind("?") + 1 :]
        if not (mark and end and head) or max(map(len, openings)) - len(common) > LONGEST_OPENING:
            return None
        return _Frame(head, before[len(common) :], end)


def _common_start(*texts: str) -> str:
    shortest = min(texts, key=len)
    alike = (n for n in range(len(shortest)) if len({text[n] for text in texts}) > 1)
    return shortest[: next(alike, len(shortest))]


def _chain(messages: Sequence[Message]) -> Iterator[bytes]:
    """For each message, a digest of the conversation up to it; thinking and the ids of calls do not count."""
    digest = hashlib.sha256()
    for message in messages:
        calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
        digest.update(json.dumps([message["role"], message["content"].strip(), calls]).encode())
        yield digest.digest()


def _same(turn: Turn, message: Message) -> bool:
    """Whether the message says what the turn said; thinking may be missing."""
    reasoning = message.get("reasoning_content", "").strip()
    return (
        turn.content.strip() == message["content"].strip()
        and reasoning in ("", turn.reasoning.strip())
        and turn.calls == tuple(_call(call["function"]) for call in message.get("tool_calls", ()))
    )


def _call(function: Mapping[str, Any]) -> tuple[str, str]:
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return function["name"], json.dumps(arguments, sort_keys=True)


def _id_key(name: str) -> bytes:
    return b"id:" + name.encode("utf-8", "replace")
