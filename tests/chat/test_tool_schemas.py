"""The schemas of a tool's parameters: references are followed as far as the type needs, and no further."""

from typing import Any

import pytest

from localmimo.chat.tool_call import functions_of


def schema_of(value: Any, **root: Any) -> Any:
    """What is found of a tool's only parameter."""
    tool = {"name": "clock", "parameters": {"properties": {"k": value}} | root}
    found = functions_of([tool])
    assert functions_of([{"type": "function", "function": tool}]) == found
    return found["clock"]["k"]


def test_a_reference_is_resolved() -> None:
    defs = {"a": {"type": "string"}, "b": {"$ref": "#/$defs/a"}}
    assert schema_of({"$ref": "#/$defs/b"}, **{"$defs": defs}) == {"type": "string"}
    assert schema_of({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}, **{"$defs": defs}) == {
        "anyOf": [{"type": "string"}, {"type": "null"}]
    }


@pytest.mark.parametrize("reference", ["#/$defs/missing", "#/$defs/a/type/x", "#/properties/k/nothing"])
def test_a_reference_to_nothing_is_no_schema(reference: str) -> None:
    assert schema_of({"$ref": reference}, **{"$defs": {"a": {"type": "string"}}}) is None


@pytest.mark.parametrize("reference", ["http://example.org/a", "$defs/a", 7])
def test_another_reference_stays(reference: object) -> None:
    assert schema_of({"$ref": reference}) == {"$ref": reference}


@pytest.mark.parametrize(
    "loop",
    [
        {"$ref": "#/$defs/a"},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]},
        {"oneOf": [{"$ref": "#/$defs/a"}] * 2},
    ],
)
def test_a_schema_that_names_itself_ends(loop: dict[str, Any]) -> None:
    assert schema_of({"$ref": "#/$defs/a"}, **{"$defs": {"a": loop}}) is not None


@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": None}, {"properties": []}, {"type": "object"}]
)
def test_a_tool_without_parameters(parameters: Any) -> None:
    assert functions_of([{"name": "clock", "parameters": parameters}, {"name": "b"}]) == {
        "clock": {},
        "b": {},
    }
    assert functions_of(None) == {}
