"""A script in place of the drawing of tokens."""

import re

import pytest

from localmimo.engine import Engine


class Script:
    """Stands in for the drawing of tokens: the model says these texts, cut as encode() would not.

    Draft heads draw too: a token is given by its place, so that every guess is right.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = engine.tokenizer
        self._queue: list[list[int]] = []
        self._now: list[int] = []
        self._start: int | None = None
        monkeypatch.setattr("localmimo.decode.generation.pick", self._pick)

    def says(self, *texts: str) -> None:
        """What the next answers will be."""
        self._queue, self._start = [self._tokens(text) for text in texts], None

    def _tokens(self, text: str) -> list[int]:
        parts = self._tokenizer._split.split(text)
        pieces = [
            piece
            for part in parts
            for piece in ([part] if part in self._tokenizer.added else re.findall(r"(?s).{1,11}", part))
        ]
        tokens = [token for piece in pieces for token in self._tokenizer.encode(piece)]
        return [*tokens, *self._tokenizer.encode("<|im_end|>")]

    def _pick(self, _logits: object, _sampling: object, _seen: object, _seed: int, place: int) -> int:
        beyond = 8  # guesses behind the end
        if self._start is None or not self._start <= place < self._start + len(self._now) + beyond:
            self._now, self._start = self._queue.pop(0), place
        return self._now[min(place - self._start, len(self._now) - 1)]
