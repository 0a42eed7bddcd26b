"""Prompts of one model: messages to tokens, with each earlier answer as the tokens that were sampled.

Knows the template, the tokenizer and the cache of answered turns; no model and no session.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from localmimo.chat.messages import check_messages, check_tools
from localmimo.chat.special_tokens import SpecialTokenEscaper
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tokenizer import Tokenizer
from localmimo.chat.turn_cache import TurnCache
from localmimo.errors import LocalMimoError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as text and as tokens. The text may contain escapes (see special_tokens)."""

    text: str
    tokens: list[int]
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Prompts:
    """Makes the prompts of one model."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._escaper = SpecialTokenEscaper(tokenizer.added, tokenizer.control)
        self.turn_cache = TurnCache()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> str:
        """The prompt as text, for people to read. Text that merely spells a special token looks like one."""
        return self._template.render(messages, tools=tools, think=think)

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> Prompt:
        """The prompt as tokens, remembered answers as they were sampled. Raises BadRequest."""
        escape, text = self._render_escaped(messages, tools, think=think)
        n_known, tokens = self.turn_cache.longest_prefix(text)
        return Prompt(text, tokens + self._tokenizer.encode(text[n_known:], escape), messages, tools)

    def remember(
        self, prompt: Prompt, message: Mapping[str, Any], sampled: Sequence[int], *, whole: bool
    ) -> None:
        """Keep the tokens that an answer was sampled as. whole: it ended with an end-of-text token."""
        if not sampled:
            return
        try:
            conversation = [*prompt.messages, message]
            escape, text = self._render_escaped(conversation, prompt.tools, add_generation_prompt=False)
        except LocalMimoError:
            return  # the next prompt with this message will raise the same error to its caller
        end = len(text.rstrip())
        ending = self._ending(prompt, text[:end], escape, sampled, whole)
        if ending is None:
            self.turn_cache.add(prompt.messages, message)
        else:
            tokens = [*prompt.tokens, *sampled, *ending]
            self.turn_cache.add(prompt.messages, message, text[:end], tokens)

    def snapshot(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, list[int], list[int]]:
        """(digest of the conversation's text, its tokens, how many there are at each answer's end or 0 if unknown)."""
        escape, text = self._render_escaped(messages, tools, add_generation_prompt=False)
        n_known, tokens = self.turn_cache.longest_prefix(text)
        tokens += self._tokenizer.encode(text[n_known:], escape)
        ends = []
        for _, prefix in self._prefixes(messages, tools):
            n_chars, known = self.turn_cache.longest_prefix(prefix)
            ends.append(len(known) if n_chars == len(prefix) and tokens[: len(known)] == known else 0)
        return _digest(text), tokens, ends

    def restore(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        digest: str,
        tokens: Sequence[int],
        ends: Sequence[int],
    ) -> bool:
        """Fill the cache from a `snapshot`. False where the conversation has another text now."""
        _, text = self._render_escaped(messages, tools, add_generation_prompt=False)
        prefixes = self._prefixes(messages, tools)
        if _digest(text) != digest or len(ends) != len(prefixes):
            return False
        for (number, prefix), end in zip(prefixes, ends, strict=True):
            if end:
                self.turn_cache.add(messages[:number], messages[number], prefix, tokens[:end])
        return True

    def _prefixes(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[tuple[int, str]]:
        """The index of each answer, and the conversation's text up to its end."""
        return [
            (
                number,
                self._render_escaped(messages[: number + 1], tools, add_generation_prompt=False)[1].rstrip(),
            )
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _render_escaped(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[str, str]:
        """(the escape, the conversation's text with it)."""
        escaped = self._escaper.escape(check_messages(messages), check_tools(tools))
        text = self._template.render(
            escaped.messages, tools=escaped.tools, think=think, add_generation_prompt=add_generation_prompt
        )
        return escaped.escape, text

    def _ending(
        self, prompt: Prompt, text: str, escape: str, sampled: Sequence[int], whole: bool
    ) -> list[int] | None:
        """The tokens that the template puts behind the sampled ones, up to the end of the turn.

        None where the sampled tokens are no part of the text. Where the template writes the answer in another way
        than the model did (a call, say), they have only the end-of-text token in common.
        """
        endings = [self._tokenizer.decode([token]) for token in self._tokenizer.eos_ids]
        ending = next((ending for ending in endings if text.endswith(ending)), None)
        if ending is None:
            return None
        if text.startswith(prompt.text):
            turn, answer = text[len(prompt.text) :], self._tokenizer.decode(sampled)
            rest = turn.replace(escape, "").removeprefix(answer)
            if turn.replace(escape, "") == answer + rest and turn.endswith(rest):
                return self._tokenizer.encode(rest)
        if not whole:
            return None
        _, before = self._render_escaped(prompt.messages, prompt.tools, add_generation_prompt=False)
        return self._tokenizer.encode(ending) if text.startswith(before) else None
