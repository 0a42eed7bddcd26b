"""Fields: the keys of a JSON object that a client sent, read one by one with the types they must have.

Knows JSON; nothing of what the keys mean. A null counts as absent, an unknown key is never looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from localmimo.serve.errors import ApiError

INT64 = 2**63


class Fields:
    """One JSON object; every reader returns None where the key is absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    @classmethod
    def of_body(cls, body: bytes) -> Fields:
        """The object that a request's body holds."""
        try:
            values = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError("invalid", f"The body is not valid JSON: {reason}.") from None
        if not isinstance(values, dict):
            raise ApiError("invalid", f"The body is {named(values)}; it must be a JSON object.")
        return cls(values)

    def wrong(self, name: str, wanted: str) -> NoReturn:
        """Refuse a key's value: `wanted` says what it must be."""
        param = self._where + name
        raise ApiError(
            "invalid", f"{param} is {named(self.values.get(name))}; it must be {wanted}.", param=param
        )

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, "text")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false")
        return value

    def count(self, name: str, least: int = 0, most: int = INT64 - 1) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong(name, "a whole number")
        if not least <= value <= most:
            self.wrong(name, f"at least {least}" if value < least else f"at most {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.wrong(name, "a number")
        if not (math.isfinite(value) and least <= value <= most):
            self.wrong(name, f"between {least:g} and {most:g}")
        return float(value)

    def choice(self, name: str, *choices: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            self.wrong(name, "a list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Text or a list of texts; none where the key is absent."""
        value = self.values.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
            self.wrong(name, "text or a list of texts, none of them empty")
        return tuple(found)

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.wrong(name, "an object")
        return Fields(value, f"{self._where}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; none where the key is absent."""
        found = []
        for number, value in enumerate(self.items(name) or ()):
            if not isinstance(value, dict):
                self.wrong(name, f"a list of objects, and its item {number} is {named(value)}")
            found.append(Fields(value, f"{self._where}{name}[{number}]."))
        return found

    def needed(self, name: str) -> None:
        """Refuse the object where the key is absent."""
        if self.values.get(name) is None:
            param = self._where + name
            raise ApiError("invalid", f"{param} is missing.", param=param)


def named(value: object) -> str:
    """A JSON value in the words of a sentence; long ones cut short."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return _cut(json.dumps(value))
        case str():
            return _cut(json.dumps(value, ensure_ascii=True))
        case list():
            return "a list"
    return "an object"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
