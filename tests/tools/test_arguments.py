"""The check of arguments against a schema: what each type takes, what it converts, and what it refuses."""

import json
from typing import Any, Literal

import pytest

from localmimo.tools.arguments import Mismatch, fit_arguments, fit_value
from localmimo.tools.tool import schema_of

VALUES: dict[str, list[Any]] = {
    "null": [None],
    "boolean": [True, False],
    "integer": [0, 1, -7, 10**30],
    "number": [0.0, 1.5, -7.25],
    "string": ["", "a", "null", "7"],
    "array": [[], [1, "a"]],
    "object": [{}, {"a": 1}],
}
TAKES = {kind: {kind} for kind in VALUES} | {"number": {"number", "integer"}}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("other", VALUES)
def test_each_type_takes_its_own_values_only(kind: str, other: str) -> None:
    """Text is left out where it is no text: what it is converted to is tested below."""
    for value in VALUES[other]:
        if other in TAKES[kind]:
            found = fit_value(value, {"type": kind}, "x")
            assert found == value and type(found) is type(value)
        elif kind == "integer" and type(value) is float and value.is_integer():
            assert type(fit_value(value, {"type": kind}, "x")) is int
        elif other != "string":
            with pytest.raises(Mismatch, match=rf"^x is .*; it must be of type {kind}\.$"):
                fit_value(value, {"type": kind}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(Mismatch, match="must be of type number"):
        fit_value(value, {"type": "number"}, "x")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("7", int, 7),
        ("7", float, 7),
        ("7.5", float, 7.5),
        (2.0, int, 2),
        ("true", bool, True),
        ("null", int | None, None),
        ("[1, 2]", list[int], [1, 2]),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        (["1", 2.0], list[int], [1, 2]),
        ({"a": "1"}, dict[str, int], {"a": 1}),
        ([{"a": ["1"]}], list[dict[str, list[int]]], [{"a": [1]}]),
        ("7", list[int] | int, 7),
        ("7", str, "7"),
        ("null", str | None, "null"),  # text is text
        (None, str | None, None),
        (1, Literal[1, "a"], 1),
        ("a", Literal[1, "a"], "a"),
        ({"any": [1]}, Any, {"any": [1]}),
    ],
)
def test_values_are_converted(value: Any, annotation: Any, expected: Any) -> None:
    found = fit_value(value, schema_of(annotation), "x")
    assert found == expected and type(found) is type(expected)
    assert json.dumps(found) == json.dumps(expected)  # 1, 1.0 and True are equal; their JSON is not


@pytest.mark.parametrize(
    ("value", "annotation", "says"),
    [
        ("7.5", int, "x is '7.5'; it must be of type integer."),
        ("yes", bool, "x is 'yes'; it must be of type boolean."),
        (1, bool, "x is 1; it must be of type boolean."),
        ("b", Literal[1, "a"], "x is 'b'; it must be one of 1, 'a'."),
        ("1", Literal[1, "a"], "x is '1'; it must be one of 1, 'a'."),
        ([1, "a"], list[int], "x[1] is 'a'; it must be of type integer."),
        ({"k": [True]}, dict[str, list[int]], "x.k[0] is True; it must be of type integer."),
        ("a", list[int] | int, "x is 'a', which fits none of the types that it may have."),
    ],
)
def test_other_values_are_refused(value: Any, annotation: Any, says: str) -> None:
    with pytest.raises(Mismatch) as raised:
        fit_value(value, schema_of(annotation), "x")
    assert str(raised.value) == says


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}


def test_all_arguments_of_a_call() -> None:
    assert fit_arguments({"a": "1", "b": "1"}, SCHEMA, "f") == {"a": 1, "b": "1"}
    for given, says in (
        ({"b": 1}, "f needs a; it was given b."),
        ({}, "f needs a; it was given nothing."),
        ({"a": 1, "c": 2}, "f has no parameter c; it has a, b."),
        ({"a": "x"}, "a is 'x'; it must be of type integer."),
    ):
        with pytest.raises(Mismatch) as raised:
            fit_arguments(given, SCHEMA, "f")
        assert str(raised.value) == says


def test_a_schema_may_allow_more_arguments() -> None:
    assert fit_arguments({"a": 1, "c": "2"}, SCHEMA | {"additionalProperties": True}, "f") == {
        "a": 1,
        "c": "2",
    }
    with pytest.raises(Mismatch, match="f has no parameter c"):
        fit_arguments({"a": 1, "c": "2"}, SCHEMA | {"additionalProperties": False}, "f")
