"""Corpus: tokens to measure with, the same in every run and on every machine.

The tokens are real text, because the choice of experts depends on it: mimo-mini's held-out conversations, shuffled anew
each time they have been used up. A pack without a tokenizer for its vocabulary (a random checkpoint, say) gets tokens
drawn at random from a seed. Knows tokenizers; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from localmimo.chat.tokenizer import Tokenizer
from localmimo.errors import BadModel
from localmimo.mini import HELD_OUT

_CONVERSATION_START = "<|im_start|>system"
_MIN_SHARE = 0.9  # of the vocabulary that a tokenizer must cover


class Corpus:
    """Endless text, as tokens."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._documents = documents  # none: tokens are drawn at random
        self._vocab_size = vocab_size

    @classmethod
    def open(cls, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> Corpus:
        """The corpus for a model with this vocabulary. `tokenizer` opens its tokenizer and may raise BadModel."""
        try:
            opened = tokenizer()
        except BadModel:
            return cls([], vocab_size)
        if not _MIN_SHARE * vocab_size <= opened.vocab_size <= vocab_size:
            return cls([], vocab_size)
        head, *others = HELD_OUT.read_text("utf-8").split("\n" + _CONVERSATION_START)
        texts = [head, *(_CONVERSATION_START + other for other in others)]
        return cls([opened.encode(text) for text in texts], vocab_size)

    @property
    def is_text(self) -> bool:
        """Whether the tokens are text; otherwise they are drawn at random."""
        return bool(self._documents)

    def __str__(self) -> str:
        if self.is_text:
            return "mimo-mini's held-out conversations"
        return "tokens drawn at random: the pack has no tokenizer of its own"

    def tokens(self, seed: int, n: int) -> list[int]:
        """n tokens, other ones for each seed."""
        random, out = Random(seed), list[int]()
        if not self._documents:
            return [random.randrange(self._vocab_size) for _ in range(n)]
        while len(out) < n:
            for document in random.sample(self._documents, len(self._documents)):
                out += document
        return out[:n]
