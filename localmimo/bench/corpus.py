"""Corpus: tokens to measure with, the same in every run and on every machine.

Real text, since routing follows what is said: mimo-mini's held-out conversations, in another order each time they have
been used up. A pack whose tokenizer is not its own (a random checkpoint's) gets a seeded draw of its vocabulary. Knows
tokenizers; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from localmimo.chat.tokenizer import Tokenizer
from localmimo.errors import BadModel
from localmimo.mini import HELD_OUT

_BEGINNING = "<|im_start|>system"
_OWN_SHARE = 0.9  # of the vocabulary that a tokenizer must have words for, to be taken for the pack's own


class Corpus:
    """Endless text, as tokens."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._documents = documents  # none: tokens are drawn
        self._vocab_size = vocab_size

    @classmethod
    def open(cls, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> Corpus:
        """The corpus of a model with this vocabulary; `tokenizer` may raise BadModel where there is none."""
        try:
            found = tokenizer()
        except BadModel:
            return cls([], vocab_size)
        if not _OWN_SHARE * vocab_size <= found.vocab_size <= vocab_size:
            return cls([], vocab_size)
        head, *others = HELD_OUT.read_text("utf-8").split("\n" + _BEGINNING)
        return cls([found.encode(text) for text in (head, *(_BEGINNING + it for it in others))], vocab_size)

    @property
    def is_text(self) -> bool:
        """Whether the tokens are words; else they are drawn."""
        return bool(self._documents)

    def __str__(self) -> str:
        if self.is_text:
            return "mimo-mini's held-out conversations"
        return "tokens drawn at random: the pack has no tokenizer of its own"

    def stretch(self, seed: int, n: int) -> list[int]:
        """n tokens; another seed gives others."""
        random, out = Random(seed), list[int]()
        if not self._documents:
            return [random.randrange(self._vocab_size) for _ in range(n)]
        while len(out) < n:
            for document in random.sample(self._documents, len(self._documents)):
                out += document
        return out[:n]
