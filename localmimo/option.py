"""Option: what is known of a keyword, declared once for Python, the command line, the chat's /set and HTTP.

A dataclass declares its options as fields (`option`); `options_of` reads them back. Imports no torch. Must not know any
particular option, nor how a command line or a request's body is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from localmimo.errors import BadRequest

Kind = Literal["number", "count", "tokens", "switch", "text", "texts", "file", "mapping", "structure"]
Dialect = Literal["chat", "completions", "responses", "messages"]

DIALECTS: tuple[Dialect, ...] = ("chat", "completions", "responses", "messages")
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A keyword: its kind, range and help, and the names that it has elsewhere (none where it cannot be given).

    A "tokens" is a count that people may write as 32k. least and most hold for Python and the command line; http_range
    is what a client may send.
    """

    kind: Kind
    name: str = ""  # the keyword
    default: Any = None
    help: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    above_least: bool = False  # `least` itself is refused
    choices: tuple[str, ...] = ()
    refusal: str = ""  # what is said of a value out of range, after its name and value
    default_help: str = ""  # what happens where the option is not given
    flags: tuple[str, ...] = ()
    set_names: tuple[str, ...] = ()
    http: Mapping[Dialect, tuple[str, ...]] = field(default_factory=dict)
    http_range: tuple[float, float] = (0, INT64_MAX)

    @property
    def words(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", "-" if self.name.startswith(("top_", "min_")) else " ")

    def check(self, value: Any) -> None:
        """Raises BadRequest where a number is out of range."""
        if self.kind not in ("number", "count") or value is None:
            return
        low = self.least is None or (value > self.least if self.above_least else value >= self.least)
        if not (low and (self.most is None or value <= self.most)):
            raise BadRequest(f"{self.words} {value} {self.refusal}.")


def option(kind: Kind, default: Any = None, **facts: Any) -> Any:
    """A dataclass field that declares an option. A dict as default is made anew for each object."""
    declared = Option(kind=kind, default=default, **facts)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"option": declared})
    return field(default=default, metadata={"option": declared})


def options_of(declaration: type[Any]) -> dict[str, Option]:
    """Keyword -> option, in the order of a dataclass that declares them."""
    return {
        each.name: replace(each.metadata["option"], name=each.name)
        for each in fields(declaration)
        if "option" in each.metadata
    }


def check_options(values: Any) -> None:
    """Check every option of an object against its range. Raises BadRequest."""
    for name, declared in options_of(type(values)).items():
        declared.check(getattr(values, name))


def check_names(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raises TypeError, with the nearest name, where a keyword is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}."
            raise TypeError(f"{function} has no keyword {name}: {hint}")
