"""Stop strings: where an answer ends does not depend on how its text is cut into tokens."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localmimo import BadRequest
from localmimo.decode.stopping import StopRules, StopStrings

texts = st.text("ab.", max_size=12)


def pushed(stops: StopStrings, pieces: list[str]) -> str:
    return "".join(map(stops.push, pieces))


def expected(text: str, strings: list[str]) -> tuple[str, bool]:
    """The text before the string that is complete first, the longer one of two that end together."""
    for end in range(len(text) + 1):
        found = [len(s) for s in strings if text[:end].endswith(s)]
        if found:
            return text[: end - max(found)], True
    return text, False


@given(st.lists(texts, max_size=8), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
@example(["ab", "a.b"], ["aba.", "b"])
@example(["a", "a", "b"], ["aab"])
def test_text_ends_before_the_string_that_is_complete_first(pieces: list[str], strings: list[str]) -> None:
    stops = StopStrings(strings)
    text, found = expected("".join(pieces), strings)
    assert pushed(stops, pieces) + stops.flush() == text
    assert stops.found == found


@pytest.mark.parametrize(
    ("pieces", "strings", "certain"),
    [
        (["abc"], ["x"], "abc"),
        (["abx"], ["xy"], "ab"),  # one character may begin it
        (["aaa"], ["aab"], "a"),  # as much as may begin it, and no more
        (["ab"], ["abc", "bd"], ""),  # the longer of two beginnings
    ],
)
def test_only_what_may_begin_a_string_is_held_back(
    pieces: list[str], strings: list[str], certain: str
) -> None:
    stops = StopStrings(strings)
    assert pushed(stops, pieces) == certain
    assert certain + stops.flush() == "".join(pieces)


def test_nothing_comes_after_a_stop_string() -> None:
    stops = StopStrings(["."])
    assert stops.push("one. two") == "one" and stops.found
    assert stops.push("three") == "" and stops.push(".") == "" and stops.flush() == ""


@pytest.mark.parametrize(
    "rules", [{"max_tokens": 0}, {"max_tokens": -1}, {"stop": ("a", "")}, {"stop": (7,)}]
)
def test_impossible_rules_are_refused(rules: dict) -> None:
    with pytest.raises(BadRequest):
        StopRules(**rules)


def test_one_token_is_a_limit() -> None:
    assert StopRules(max_tokens=1, think_budget=0, n_logprobs=0).max_tokens == 1
