"""Grammar: what an answer must look like, as a JSON schema, a regular expression or a context-free grammar.

llguidance (extra `grammar`) says which tokens may follow; it is imported when the first grammar is used. Knows token
ids and their bytes; nothing of models, sampling or conversations but the tags of thinking.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from localmimo.chat.tokenizer import Tokenizer
from localmimo.chat.tool_call import OPEN
from localmimo.errors import BadRequest

NEEDED = "Structured output needs llguidance: pip install 'localmimo[grammar]'."
Form = Literal["json_schema", "regex", "lark", "gbnf"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the answer's text, not compiled yet. `text` is the schema as JSON, the pattern or the rules."""

    form: Form
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """A value that satisfies a JSON schema."""
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise BadRequest(f"The JSON schema is no JSON: {error}.") from None

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """The whole answer matches a regular expression (the syntax of Rust's regex)."""
        return cls("regex", pattern)

    @classmethod
    def rules(cls, text: str) -> Grammar:
        """A context-free grammar: Lark (`start: ...`), or GBNF as llama.cpp writes it (`root ::= ...`)."""
        return cls("gbnf" if "::=" in text else "lark", text)

    @classmethod
    def of_response_format(cls, response_format: Mapping[str, Any]) -> Grammar | None:
        """OpenAI's response_format: text, json_object, or json_schema; also {"type": "regex", "pattern": ...}."""
        match response_format:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return cls.json_schema({"type": "object"})
            case {"type": "json_schema", "json_schema": {"schema": Mapping() | bool() as schema}}:
                return cls.json_schema(schema)
            case {"type": "regex", "pattern": str(pattern)}:
                return cls.regex(pattern)
            case {"type": "grammar", "grammar": str(text)}:
                return cls.rules(text)
        raise BadRequest(
            f"response_format is {str(dict(response_format))[:80]}; its type is one of text, json_object, "
            'json_schema (with json_schema: {"schema": ...}), regex (with pattern) and grammar (with grammar).'
        )


def grammar_of(grammar: Grammar | str | None, response_format: Mapping[str, Any] | None) -> Grammar | None:
    """What a request asks for; a text is the rules of a grammar."""
    if grammar is not None and response_format is not None:
        raise BadRequest("Give either grammar or response_format, not both.")
    if response_format is not None:
        return Grammar.of_response_format(response_format)
    return Grammar.rules(grammar) if isinstance(grammar, str) else grammar


class Grammars:
    """Compiles grammars for one tokenizer. Raises BadRequest where llguidance is missing or refuses one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._guide = _import_llguidance()
        wrapper = self._guide.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokens = self._guide.LLTokenizer(wrapper, eos_token=sorted(tokenizer.eos_ids) or None)

    def spell(self, tag: str) -> str:
        """A tag as rules write it: by its token, where it has one of its own."""
        token = self._tokenizer.token_id(tag)
        return json.dumps(tag) if token is None else f"<[{token}]>"

    def follow(self, grammar: Grammar, *, thinking: bool, may_think: bool) -> GrammarState:
        """The grammar's state at the beginning of an answer.

        thinking: the answer begins inside a thinking block. may_think: the model may open one first.
        """
        text = self._guide.grammar_from(grammar.form, grammar.text)
        matcher = self._guide.LLMatcher(self._tokens, text, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise BadRequest(f"The {grammar.form.replace('_', ' ')} cannot be used: {reason.rstrip('.')}.")
        open_tag, close_tag = (self._tokenizer.token_id(tag) for tag in ("<think>", "</think>"))
        tags = (open_tag, close_tag) if may_think and open_tag is not None else (None, close_tag)
        # Within thinking, an end of the text would leave the answer out, and a call would not follow the grammar.
        unthinkable = [*self._tokenizer.eos_ids, self._tokenizer.token_id(OPEN)]
        never = torch.tensor([token for token in unthinkable if token is not None], dtype=torch.int64)
        return GrammarState(matcher, tags, thinking and close_tag is not None, never)


def _import_llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError:
        raise BadRequest(NEEDED) from None


class _Vocabulary:
    """The interface that llguidance needs of a tokenizer: the bytes of every token, and an encoder."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.vocab_size
        special = tokenizer.special_ids
        self.eos_token_id = min(tokenizer.eos_ids, default=0)
        self.tokens = [
            tokenizer.token_bytes(token) if token < known and token not in special else b"\xff[%d]" % token
            for token in range(vocab_size)
        ]
        self.special_token_ids = sorted(special | set(range(known, vocab_size)))

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class GrammarState:
    """A grammar's state along one answer. Thinking is not constrained; the answer is."""

    def __init__(self, matcher: Any, tags: tuple[int | None, int | None], free: bool, never: Tensor) -> None:
        self._matcher = matcher
        self._open, self._close = tags  # _open: while a thinking block may still be opened
        self._free = free  # inside a thinking block
        self._unthinkable = never  # tokens int64 [n] that cannot come inside a thinking block
        self._over = False  # a token came that the grammar does not know

    @property
    def thinking(self) -> bool:
        """Whether the next token is one of thinking, or the tag that closes it."""
        return self._free

    def end_thinking(self) -> None:
        """The thinking is over, though no token of </think> was drawn: it was spelled, or a call ended it."""
        self._free = False

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [vocab] with minus infinity where a token cannot follow."""
        if self._over:
            return logits
        if self._free:
            return logits.index_fill(0, self._unthinkable, float("-inf"))
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._open is not None:
            allowed[self._open] = True
        if not allowed.any():  # the grammar reached its limits: no token can follow
            raise BadRequest(f"The grammar cannot go on: {self._matcher.get_error() or 'no token fits'}.")
        return logits.masked_fill(~allowed[: len(logits)], float("-inf"))

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        if self._free:
            self._free = token != self._close
        elif token == self._open:
            self._free = True
        else:
            self._over = not self._matcher.consume_token(token) or self._over
        self._open = None

    def allowed(self, logits: Tensor, drafts: Sequence[int]) -> Tensor:
        """`mask` as it would be after the token just drawn and the drafts; the state stays.

        Where a draft cannot follow, the logits are unchanged: what comes after it is never drawn.
        """
        if self._free or self._over or self._open is not None:
            return logits
        taken = self._matcher.try_consume_tokens(list(drafts))
        try:
            return self.mask(logits) if taken == len(drafts) and not self._matcher.is_stopped() else logits
        finally:
            self._matcher.rollback(taken)
