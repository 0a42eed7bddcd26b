"""Prompts: messages become tokens, and what the model said becomes the same tokens again in the next prompt.

Knows templates and tokenizers, and the turns that were answered; no model and no session.
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
    """What a conversation becomes; `text` may contain marks (see marks)."""

    text: str
    tokens: list[int]
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Prompts:
    """One model's way from messages to tokens."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self.marker = SpecialTokenEscaper(tokenizer.added, tokenizer.control)
        self.turns = TurnCache()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> str:
        """The prompt as text, for people to read: what merely spells a special token looks like one."""
        return self._template.render(messages, tools=tools, think=think)

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
    ) -> Prompt:
        """The prompt as tokens; answers that were kept come back as they were sampled. Raises BadRequest."""
        mark, text = self._marked(messages, tools, think=think)
        known, tokens = self.turns.longest(text)
        return Prompt(text, tokens + self._tokenizer.encode(text[known:], mark), messages, tools)

    def keep(
        self, prompt: Prompt, message: Mapping[str, Any], sampled: Sequence[int], *, whole: bool
    ) -> None:
        """Remember the tokens that an answer was sampled as; whole: it ended with an end-of-text token."""
        if not sampled:
            return
        try:
            mark, text = self._marked([*prompt.messages, message], prompt.tools, add_generation_prompt=False)
        except LocalMimoError:
            return  # a template that can't write it will say so when it is asked to
        end = len(text.rstrip())
        tail = self._tail(prompt, text[:end], mark, sampled, whole)
        if tail is None:
            self.turns.keep(prompt.messages, message)
        else:
            self.turns.keep(prompt.messages, message, text[:end], [*prompt.tokens, *sampled, *tail])

    def held(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, list[int], list[int]]:
        """(digest of the conversation's text, its tokens, how many there are at the end of each answer, 0: unknown)."""
        mark, text = self._marked(messages, tools, add_generation_prompt=False)
        known, tokens = self.turns.longest(text)
        tokens += self._tokenizer.encode(text[known:], mark)
        ends = []
        for _, part in self._beginnings(messages, tools):
            n_chars, kept = self.turns.longest(part)
            ends.append(len(kept) if n_chars == len(part) and tokens[: len(kept)] == kept else 0)
        return _digest(text), tokens, ends

    def restore(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        digest: str,
        tokens: Sequence[int],
        ends: Sequence[int],
    ) -> bool:
        """Take up again what `held` gave; False where the conversation's text is another one now."""
        _, text = self._marked(messages, tools, add_generation_prompt=False)
        beginnings = self._beginnings(messages, tools)
        if _digest(text) != digest or len(ends) != len(beginnings):
            return False
        for (number, part), end in zip(beginnings, ends, strict=True):
            if end:
                self.turns.keep(messages[:number], messages[number], part, tokens[:end])
        return True

    def _beginnings(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[tuple[int, str]]:
        """Each answer's place, and the conversation's text up to its end."""
        return [
            (number, self._marked(messages[: number + 1], tools, add_generation_prompt=False)[1].rstrip())
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[str, str]:
        marked = self.marker.mark(check_messages(messages), check_tools(tools))
        text = self._template.render(
            marked.messages, tools=marked.tools, think=think, add_generation_prompt=add_generation_prompt
        )
        return marked.mark, text

    def _tail(
        self, prompt: Prompt, text: str, mark: str, tokens: Sequence[int], whole: bool
    ) -> list[int] | None:
        """What the template puts behind the sampled tokens, up to the end of the turn; None where they don't fit.

        A call, say, that the template writes in another way than the model did, has only its end in common.
        """
        endings = [self._tokenizer.decode([token]) for token in self._tokenizer.eos_ids]
        ending = next((ending for ending in endings if text.endswith(ending)), None)
        if ending is None:
            return None
        if text.startswith(prompt.text):
            turn, said = text[len(prompt.text) :], self._tokenizer.decode(tokens)
            rest = turn.replace(mark, "").removeprefix(said)
            if turn.replace(mark, "") == said + rest and turn.endswith(rest):
                return self._tokenizer.encode(rest)
        fits = whole and text.startswith(
            self._marked(prompt.messages, prompt.tools, add_generation_prompt=False)[1]
        )
        return self._tokenizer.encode(ending) if fits else None
