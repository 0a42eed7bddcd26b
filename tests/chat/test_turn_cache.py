"""An answered turn returns into the conversation as it was sampled, however the client sends it."""

from typing import Any

import pytest

from localmimo.chat.tool_call import ToolCall
from localmimo.chat.turn_cache import MAX_ENDING_TOKENS, Turn, TurnCache
from localmimo.decode.answer import Message
from localmimo.errors import BadRequest

USER = {"role": "user", "content": "Question?"}
CALL = ToolCall("f", {"a": 7, "b": "x"})
CALLING = Message("Let me see. \n", "\nHm.\n", (CALL,)).as_dict()
PLAIN = Message("\n\nPlain answer.\n", "Secret thought.").as_dict()


def cache_of(*said: dict[str, Any]) -> TurnCache:
    cache = TurnCache()
    for message in said:
        cache.add([USER], message)
    return cache


def sent(message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The message as a client sends it back that drops the thinking and trims."""
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": message["content"].strip()} | changes


def second(cache: TurnCache, message: dict[str, Any], first: dict[str, Any] = USER) -> dict[str, Any]:
    return cache.restore([first, message])[1]


@pytest.mark.parametrize("said", [CALLING, PLAIN])
def test_what_the_client_dropped_is_put_back(said: dict[str, Any]) -> None:
    cache = cache_of(said)
    for back in (sent(said), said, sent(said, reasoning=said["reasoning_content"].strip())):
        restored = second(cache, back)
        assert restored["reasoning_content"] == said["reasoning_content"]
        assert restored["content"] == said["content"]


def test_arguments_may_be_written_in_another_way() -> None:
    function = {"name": "f", "arguments": '{ "b":"x",\n"a":7 }'}
    restored = second(cache_of(CALLING), sent(CALLING, tool_calls=[{"id": CALL.id, "function": function}]))
    assert restored["content"] == CALLING["content"] and restored["tool_calls"][0]["id"] == CALL.id


def test_a_call_is_known_by_its_id_in_another_history_too() -> None:
    assert "reasoning_content" in second(
        cache_of(CALLING), sent(CALLING), {"role": "user", "content": "Shortened."}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"content": "Something else."},
        {"reasoning_content": "Another thought."},
        {"tool_calls": [{"id": CALL.id, "function": {"name": "f", "arguments": {"a": 8}}}]},
        {"tool_calls": [{"id": "other", "function": {"name": "f", "arguments": {"a": 7, "b": "x"}}}]},
    ],
)
def test_what_the_client_changed_stays(change: dict[str, Any]) -> None:
    restored = second(cache_of(CALLING), sent(CALLING, **change))
    assert restored.get("reasoning_content") == change.get("reasoning_content")


def test_a_turn_of_another_conversation_is_not_used() -> None:
    cache = cache_of(PLAIN)
    assert "reasoning_content" not in second(cache, sent(PLAIN), {"role": "user", "content": "Other?"})
    assert "reasoning_content" in second(cache, sent(PLAIN))


def test_the_least_recently_used_turn_is_dropped_first() -> None:
    """Each way of finding a turn counts as its use; being kept first does not."""
    answer = Message("word " * 100).as_dict()

    def question(number: int) -> dict[str, Any]:
        return {"role": "user", "content": str(number)}

    def held(cache: TurnCache) -> set[int]:
        return {number for number in range(9) if f"text {number}" in by_text(cache)}

    def by_text(cache: TurnCache) -> set[str]:
        texts = {f"text {number}" for number in range(9)}
        return {text for text in texts if cache.longest_prefix(text)[0] == len(text)}

    for use in ("longest_prefix", "restore"):
        cache = TurnCache(max_bytes=7000)  # four of these turns
        for number in range(4):
            cache.add([question(number)], answer, f"text {number}", [number])
        assert len(cache) == 4
        if use == "longest_prefix":
            assert cache.longest_prefix("text 0 and more") == (6, [0])
        else:
            assert cache.restore([question(0), answer])[1] is not answer
        cache.add([question(4)], answer, "text 4", [4])
        assert len(cache) == 4 and held(cache) == {0, 2, 3, 4}, use


def test_a_turn_that_does_not_match_is_not_used() -> None:
    cache = TurnCache(max_bytes=7000)
    answers = [Message(f"{number} " + "word " * 100).as_dict() for number in range(5)]
    for number in range(4):
        cache.add([{"role": "user", "content": str(number)}], answers[number], f"text {number}", [number])
    cache.restore([{"role": "user", "content": "0"}, {"role": "assistant", "content": "another answer"}])
    cache.longest_prefix("text 9")
    cache.add([USER], answers[4])
    assert cache.longest_prefix("text 0") == (0, []) and cache.longest_prefix("text 1") == (6, [1])


def test_memory_is_bounded() -> None:
    cache = TurnCache(max_bytes=20_000)
    for number in range(100):
        cache.add([{"role": "user", "content": str(number)}], Message("word " * 100).as_dict())
    assert 5 <= len(cache) <= 20


def test_tokens_are_found_by_the_text_they_belong_to() -> None:
    cache = TurnCache(max_bytes=8500)
    for text in ("ab", "abcd", "abcdef"):
        cache.add([{"role": "user", "content": text}], PLAIN, text, [len(text)] * 400)
    assert cache.longest_prefix("abcdefgh") == (6, [6] * 400)
    assert cache.longest_prefix("abcdx") == (4, [4] * 400)
    assert cache.longest_prefix("xab") == (0, [])
    cache.add([USER], PLAIN, "x", [1] * 400)  # too many bytes: the first was not used since
    assert cache.longest_prefix("abx") == (0, []) and cache.longest_prefix("xab") == (1, [1] * 400)


def test_the_same_conversation_takes_no_more_memory() -> None:
    cache = TurnCache()
    for number in range(3):
        cache.add([USER], PLAIN, "text", [number])
    assert len(cache) == 1 and cache.longest_prefix("text") == (4, [2])
    cache.add([USER], PLAIN | {"reasoning_content": "Another thought."}, "another text", [7])
    assert cache.longest_prefix("text") == (4, [2]) and cache.longest_prefix("another text") == (12, [7])
    assert second(cache, sent(PLAIN))["reasoning_content"] == "Another thought."  # the latest


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadRequest):
        TurnCache().restore([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("session", "held"),
    [
        (list(range(100, 150)), True),
        (list(range(100, 170)), True),
        (list(range(100, 150 - MAX_ENDING_TOKENS)), True),
        (list(range(100, 150 - MAX_ENDING_TOKENS - 1)), False),
        ([*range(100, 149), 7, 8], False),
        ([100], False),
        ([], False),
    ],
)
def test_a_session_holds_a_turn_but_for_its_ending(session: list[int], held: bool) -> None:
    cache = TurnCache()
    cache.add_text("a text", list(range(100, 150)))
    assert len(cache.held_by(session)) == held


def test_a_turn_of_few_tokens_is_not_held_by_an_empty_session() -> None:
    cache = TurnCache()
    cache.add_text("a", [5])
    assert cache.held_by([]) == [] and len(cache.held_by([5])) == 1


def test_a_continued_text_is_found_by_its_beginning() -> None:
    cache = TurnCache()
    cache.add_text("once upon a time", [7, 8, 9])
    assert cache.longest_prefix("once upon a time there") == (len("once upon a time"), [7, 8, 9])
    assert cache.longest_prefix("once upon") == (0, [])


@pytest.mark.parametrize("n_held", [0, 40, 50, 60])
def test_a_turn_is_the_same_after_it_was_written_beside_its_session(n_held: int) -> None:
    """The session's file has the first tokens; the turn brings its own ending."""
    tokens = list(range(100, 150))
    cache, other = TurnCache(), TurnCache()
    message = {"role": "assistant", "content": "Hello.", "reasoning_content": "They say hello."}
    cache.add([USER], message, "<user>Hi.<answer>Hello.", tokens)
    (turn,) = cache.held_by(tokens)
    held = [*tokens, *range(10)][:n_held]
    assert turn.as_dict(n_held)["ending"] == tokens[n_held:]
    other.put(Turn.of_dict(turn.as_dict(n_held), held))
    assert other.longest_prefix("<user>Hi.<answer>Hello.") == (len("<user>Hi.<answer>Hello."), tokens)
    dropped = [USER, {"role": "assistant", "content": "Hello."}]
    assert other.restore(dropped) == cache.restore(dropped)
    assert other.restore(dropped)[1]["reasoning_content"] == "They say hello."
