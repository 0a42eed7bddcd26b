"""The text mix: seeded, well formed, and exactly what the chat template renders."""

import re
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from mini_corpus import build, dialogues, stories, topics
from mini_corpus.conversation import Conversation, assistant, render, user

from localmimo.chat.stream_parser import parse_message
from localmimo.chat.template import ChatTemplate

KINDS = build.templates(seed=3, scale=0.004)
TALKS = [talk for talks in KINDS.values() for talk in talks]


def text(talk: Conversation) -> str:
    return "".join(span for span, _ in render(talk))


def test_the_same_seed_gives_the_same_text() -> None:
    again = build.templates(seed=3, scale=0.004)
    assert [text(t) for t in TALKS] == [text(t) for talks in again.values() for t in talks]
    assert [text(t) for t in TALKS] != [
        text(t) for talks in build.templates(4, 0.004).values() for t in talks
    ]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rendering_equals_the_built_in_template(kind: str) -> None:
    template = ChatTemplate.builtin("mimo-v2-flash")
    for talk in KINDS[kind]:
        rendered = template.render(
            talk.messages, tools=talk.tools, think=talk.think, add_generation_prompt=False
        )
        assert rendered == text(talk)


def test_every_assistant_turn_parses_back() -> None:
    for talk in TALKS:
        turns = [m for m in talk.messages if m["role"] == "assistant"]
        found = re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text(talk), re.S)
        assert len(found) == len(turns)
        for message, body in zip(turns, found, strict=True):
            content, reasoning, calls = parse_message(body, talk.tools, True)
            assert (content or "") == message["content"]
            assert (reasoning or "") == message.get("reasoning_content", "")
            wanted = [
                (c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])
            ]
            assert [(c.name, c.arguments) for c in calls] == wanted


def test_arithmetic_is_right() -> None:
    rng, checked = Random(5), 0
    for _ in range(600):
        ask, why, answer = dialogues.sum_parts(rng)
        for a, sign, b, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", why + " " + answer):
            assert eval(f"{a} {sign} {b}") == int(result), (ask, why, answer)
            checked += 1
    assert checked > 300


def test_full_loss_is_on_what_the_assistant_says() -> None:
    talk = Conversation([user("Hi"), assistant("Hello!")])
    assert [span for span, full in render(talk) if full] == ["Hello!<|im_end|>"]
    thinking = Conversation([user("Hi"), assistant("Hello!", "A greeting.")])
    assert [span for span, full in render(thinking) if full] == [
        "<think>A greeting.</think>",
        "Hello!<|im_end|>",
    ]


def test_topics_are_complete() -> None:
    table = topics.load_topics()
    assert len(table) >= 150 and len({t.about for t in table}) == len(table)
    for topic in table:
        assert len(topic.facts) >= 2 and topic.pairs, topic.about
        assert all(fact.endswith(".") for fact in topic.facts), topic.about


def test_stories_are_long_enough_and_name_their_hero() -> None:
    rng = Random(1)
    for _ in range(200):
        told, _ = stories.story(rng)
        assert 50 <= len(told.split()) <= 180 and "{" not in told


def test_the_card_prompts_are_twenty() -> None:
    path = Path(build.__file__).with_name("card_prompts.txt")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 20
