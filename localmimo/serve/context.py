"""Server context: what dialects need to read a request: the model's name, its tokenizer, earlier responses.

Knows no dialect and no engine.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localmimo.chat.tokenizer import Tokenizer

ARCHIVE_BYTES = 64 << 20


class ResponseArchive:
    """Conversations by the id of the response that ends them, for clients that send only what is new.

    In memory only: a restarted server has none. The oldest are dropped.
    """

    def __init__(self, limit_bytes: int = ARCHIVE_BYTES) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[str, tuple[list[dict[str, Any]], int]] = OrderedDict()
        self._n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, name: str) -> list[dict[str, Any]] | None:
        """The messages up to and with the response, or None where it is not known."""
        found = self._kept.get(name)
        return None if found is None else list(found[0])

    def keep(self, name: str, earlier: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        """Keep a conversation; the messages it shares with an earlier one count once."""
        n_bytes = 8 * len(earlier) + len(json.dumps(new))
        self._kept[name] = ([*earlier, *new], n_bytes)
        self._n_bytes += n_bytes
        while self._n_bytes > self._limit:
            self._n_bytes -= self._kept.popitem(last=False)[1][1]


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Shared by all requests of a server."""

    model: str
    tokenizer: Tokenizer
    archive: ResponseArchive = field(default_factory=ResponseArchive)
