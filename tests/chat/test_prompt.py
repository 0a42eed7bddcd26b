"""Prompts: text that merely spells a special token stays text, and answers return as they were sampled."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.chat.prompt import Prompts
from localmimo.chat.special_tokens import ESCAPES
from localmimo.chat.stream_parser import parse_message
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tokenizer import Tokenizer
from localmimo.decode.answer import Answer
from localmimo.errors import BadRequest
from tests.chat import bpe

SPELLINGS = [*bpe.CONTROL[:3], *bpe.WRITTEN[:2], *bpe.WRITTEN[-4:], "<think", "im_end|>", "a", " ", "\n", "ü"]
SPELLED = st.lists(st.sampled_from(SPELLINGS), max_size=8).map("".join)
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}


template = cache(ChatTemplate.builtin)


def prompts(tokenizer: Tokenizer, name: str = "mimo-v2.5") -> Prompts:
    return Prompts(template(name), tokenizer)


def special(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in tokens if tokenizer.decode([token]) in tokenizer.added]


@settings(max_examples=50)
@given(text=SPELLED, system=SPELLED)
def test_a_users_spelling_is_text(tokenizer: Tokenizer, text: str, system: str) -> None:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    plain = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    tokens = prompts(tokenizer).build(messages, think=False).tokens
    expected = prompts(tokenizer).build(plain, think=False).tokens
    assert special(tokenizer, tokens) == special(tokenizer, expected)
    assert tokenizer.decode(tokens) == prompts(tokenizer).render(messages, think=False)


@settings(max_examples=40)
@given(text=SPELLED)
def test_so_is_a_tools_result_and_a_tools_description(tokenizer: Tokenizer, text: str) -> None:
    def write(text: str) -> list[int]:
        call = {"function": {"name": "clock", "arguments": {"k": text}}}
        messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": text}]
        tools = [CLOCK | {"description": text, "k": [text, {"k" + text: 1}, None]}]
        return prompts(tokenizer).build(messages, tools).tokens

    # An argument is the model's own text: only the tokens that end and begin turns are kept out of it.
    allowed = [
        token for token in special(tokenizer, tokenizer.encode(text)) if token not in tokenizer.control
    ]
    assert sorted(special(tokenizer, write(text))) == sorted(special(tokenizer, write("x")) + allowed)


@pytest.mark.parametrize("token", [bpe.CONTROL[1], bpe.CONTROL[2], "<think>", "</think>", "<tool_call>"])
@pytest.mark.parametrize("pattern", ["{}", "{}{}", "{}a", "a{}", "a\n{}", "{}\na", " {}", "{} "])
def test_spellings_at_both_ends_of_every_field_stay_text(
    tokenizer: Tokenizer, token: str, pattern: str
) -> None:
    """Each field is a text of its own: a spelling at its start or end is escaped, and none of its bytes is lost."""
    text = pattern.replace("{}", token)
    tool = {"name": "clock", "description": text, "parameters": {"type": "object", "properties": {text: {}}}}
    call = {"id": "c", "function": {"name": "clock", "arguments": {"k": "x"}}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": "x", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": text},
        {"role": "user", "content": text},
    ]
    plain = json.loads(json.dumps([messages, [tool]]).replace(json.dumps(text)[1:-1], "x"))
    made = prompts(tokenizer)
    tokens = made.build(messages, [tool], think=False).tokens
    assert special(tokenizer, tokens) == special(tokenizer, made.build(*plain, think=False).tokens)
    assert tokenizer.decode(tokens) == made.render(messages, [tool], think=False)


def test_an_assistants_own_tags_are_tokens(tokenizer: Tokenizer) -> None:
    messages = [{"role": "assistant", "content": "<think>a</think>b<tool_call><|im_end|>"}]
    tokens = prompts(tokenizer).build(messages, think=True).tokens
    assert special(tokenizer, tokens)[2:] == [
        "<|im_start|>", "<think>", "</think>", "<tool_call>", "<|im_end|>", "<|im_start|>"
    ]  # fmt: skip


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["\n", "a\n b"]), max_size=6
    )
)
def test_text_around_an_escape_is_encoded_as_without_it(tokenizer: Tokenizer, texts: list[str]) -> None:
    escape = next(escape for escape in ESCAPES if escape not in "".join(texts))
    assert tokenizer.encode(escape.join(["", *texts]), escape) == tokenizer.encode("".join(texts))


def test_an_escape_in_the_text_stays(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": f"{ESCAPES[0]}<think>{ESCAPES[1]}"}]
    assert f"user\n{ESCAPES[0]}<think>{ESCAPES[1]}" in tokenizer.decode(
        prompts(tokenizer).build(messages).tokens
    )
    with pytest.raises(BadRequest, match="all of Unicode's 32 noncharacters"):
        prompts(tokenizer).build([{"role": "user", "content": "".join(ESCAPES)}])


def test_values_that_are_no_json_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="must be JSON values"):
        prompts(tokenizer).build([{"role": "user", "content": "x"}], [CLOCK | {"default": object()}])


# ---- what was sampled ----


def answer(tokens: list[int], text: str, tools: Any = None) -> Answer:
    content, reasoning, calls = parse_message(text, tools)
    return Answer(content, reasoning, calls, tokens, "tool_calls" if calls else "stop")


def in_letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that encode() would not give: a letter each."""
    parts = tokenizer._split.split(text)
    return [token for part in parts for piece in ([part] if part in tokenizer.added else part)
            for token in tokenizer.encode(piece)]  # fmt: skip


CALL = "<tool_call><function=clock>\n</function>\n\n</tool_call>"


@pytest.mark.parametrize("name", ["mimo-v2-flash", "mimo-v2.5", "mimo-v2.6"])
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ("the river runs", True),
        ("the river <|im_start|> runs", True),
        ("<think>the river</think>the sea", True),
        ("<think>the river</think>the sea" + CALL, True),
        ("<think>the river" + CALL + "\n" + CALL, True),
        ("\n\nthe river", True),
        ("<think>the river", False),  # cut by a limit within the thinking
        ("<think>the river</think>the s", False),
    ],
)
def test_what_was_sampled_comes_back(
    tokenizer: Tokenizer, name: str, think: bool, said: str, whole: bool
) -> None:
    made = prompts(tokenizer, name)
    messages = [{"role": "user", "content": "<think> is a tag"}]
    prompt = made.build(messages, [CLOCK], think)
    sampled = in_letters(tokenizer, said.replace("<|im_start|>", "<|im_\N{ZERO WIDTH SPACE}start|>"))
    turn = answer(sampled, tokenizer.decode(sampled), [CLOCK])
    made.remember(prompt, turn.message().as_dict(), turn.tokens, whole=whole)
    messages = [*messages, turn.message().as_dict()]
    results = [{"role": "tool", "content": "12:00"} for _ in turn.tool_calls]
    again = made.build([*messages, *results, {"role": "user", "content": "and"}], [CLOCK], think)
    held = [*prompt.tokens, *sampled]
    if not think and said.startswith("<think>") and not whole:
        return  # it thinks although it was told not to, and is cut: nothing can be matched
    assert again.tokens[: len(held)] == held
    cut_in_thinking = not whole and "</think>" not in said
    assert special(tokenizer, again.tokens[len(held) :])[0] == (
        "</think>" if cut_in_thinking else "<|im_end|>"
    )


def test_a_snapshot_of_a_conversation_brings_its_answers_back(tokenizer: Tokenizer) -> None:
    """Two answers as they were sampled, a letter each; another process reads them from what was saved."""
    first, second = prompts(tokenizer), prompts(tokenizer)
    messages: list[dict[str, Any]] = []
    for number in range(2):
        messages.append({"role": "user", "content": f"question {number}"})
        prompt = first.build(messages, think=False)
        turn = answer(in_letters(tokenizer, "the river"), "the river")
        first.remember(prompt, turn.message().as_dict(), turn.tokens, whole=True)
        messages.append(turn.message().as_dict())
    digest, tokens, ends = first.snapshot(messages, None)
    assert len(ends) == 2 and 0 < ends[0] < ends[1] <= len(tokens)
    following = [*messages, {"role": "user", "content": "and"}]
    expected = first.build(following, think=False).tokens
    assert second.build(following, think=False).tokens != expected
    assert not second.restore(messages[:-1], None, digest, tokens, ends)
    assert not second.restore(messages, None, digest, tokens, ends[:1])
    assert second.build(following, think=False).tokens != expected
    assert second.restore(messages, None, digest, tokens, ends)
    assert second.build(following, think=False).tokens == expected
    assert second.build(messages[:3], think=False).tokens == first.build(messages[:3], think=False).tokens
    assert second.snapshot(messages, None) == (digest, tokens, ends)


def test_the_published_prompt_gives_the_published_ids() -> None:
    real = prompts(Tokenizer(bpe.real(bpe.ranks_of_the_prompt())))
    assert real.build([{"role": "user", "content": "Hello"}], think=False).tokens == [
        int(token) for token in bpe.PROMPT_IDS.split()
    ]
