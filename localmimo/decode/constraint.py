"""Constraints: what is asked of an answer's form, as the state that follows the answer token by token.

Knows options, grammars and the tags of thinking and calls; nothing of sessions or models.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from localmimo.chat.tokenizer import Tokenizer
from localmimo.chat.tool_call import OPEN
from localmimo.chat.tool_choice import rules_of_calls
from localmimo.decode.grammar import Grammar, Grammars, GrammarState, grammar_of
from localmimo.decode.options import GenerationOptions, Sampling


class Constraints:
    """For one tokenizer. Raises BadRequest where a grammar is needed and llguidance is missing or refuses it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def sampling(self, options: GenerationOptions) -> Sampling:
        """How tokens are drawn: where no tool is to be called, never the one that begins a call."""
        token = self._tokenizer.token_id(OPEN)
        if options.tools is None or options.callable is not None or token is None:
            return options.sampling
        return replace(options.sampling, bans=(*options.sampling.bans, token))

    def follow(
        self, options: GenerationOptions, prompt: Sequence[int], *, chat: bool, thinking: bool
    ) -> GrammarState | None:
        """The grammar's state at the beginning of an answer, None where its form is free."""
        grammar = self._grammar(options) if chat else grammar_of(options.grammar, options.response_format)
        if grammar is None:
            return None
        closed = prompt[-1] == self._tokenizer.token_id("</think>")
        return self._grammars.follow(grammar, thinking=thinking, may_think=chat and not closed)

    def _grammar(self, options: GenerationOptions) -> Grammar | None:
        """What an answer with tools must look like: calls alone, what was asked for, or either."""
        requested = grammar_of(options.grammar, options.response_format)
        forced = options.choice.mode == "required"
        if not options.callable or not (forced or (requested and requested.form == "json_schema")):
            return requested
        value = None if forced or requested is None else requested.text
        return Grammar("lark", rules_of_calls(options.callable, options.choice, self._grammars.spell, value))

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._tokenizer, self._vocab_size)
