"""Request: checks a prompt before it is answered, and remembers the answer. The one place for CLI, Python and HTTP.

Knows prompts, tokens and answers. Must not know sessions, models or who asks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localmimo.chat.prompt import Prompt, Prompts
from localmimo.chat.tokenizer import Tokenizer
from localmimo.decode.answer import Answer
from localmimo.errors import BadRequest, ContextFull


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What a prompt must keep to: the vocabulary of a model, and the positions of a context."""

    vocab_size: int
    context: int
    max_context: int  # that the model itself allows

    def check(self, tokens: Sequence[int], n_new: int = 0) -> None:
        """Raise BadRequest or ContextFull where `tokens`, with n_new tokens of an answer, cannot be taken in."""
        if not tokens:
            raise BadRequest("The prompt is empty: give at least one token.")
        self.check_vocabulary(tokens)
        if len(tokens) + n_new > self.context:
            raise ContextFull(
                f"The prompt has {len(tokens):,} tokens and the context {self.context:,}: "
                f"give a longer context= (this model: up to {self.max_context:,}) or a shorter prompt."
            )

    def check_vocabulary(self, tokens: Iterable[int]) -> None:
        """Raise BadRequest naming the first token that the model does not have."""
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise BadRequest(f"Token {wrong[0]} is outside the model's vocabulary of {self.vocab_size:,}.")


def remember(
    prompt: Prompt, answer: Answer, stop: Sequence[str], prompts: Prompts, tokenizer: Tokenizer
) -> None:
    """Keep the tokens of an answer, so that a prompt that goes on from it has the same tokens again.

    A prompt that was given as tokens has no text to find it by: nothing is kept.
    """
    if prompt.messages:
        whole = answer.finish_reason in ("stop", "tool_calls") and not stop
        prompts.remember(prompt, answer.message().as_dict(), answer.tokens, whole=whole)
    elif prompt.text and tokenizer.decode(answer.tokens) == answer.content:
        prompts.turn_cache.add_text(prompt.text + answer.content, [*prompt.tokens, *answer.tokens])
