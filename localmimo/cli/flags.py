"""Flags made from declared options: a command names a group of options, and gets a dict of what was given.

Knows typer's parameters; no particular option, and nothing of what a command does. Imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from localmimo.decode.options import OPTIONS
from localmimo.loading.options import LOAD_OPTIONS, LoadOptions
from localmimo.option import Option

Flags = Mapping[str, Option]  # keyword -> option, of those that have a flag
Given = dict[str, Any]  # keyword -> value, as it was typed
Command = Callable[..., int]

TYPES: dict[str, type] = {
    "number": float, "count": int, "tokens": str, "text": str, "texts": list, "switch": bool, "file": Path
}  # fmt: skip


def _flagged(options: Mapping[str, Option]) -> dict[str, Option]:
    return {name: option for name, option in options.items() if option.flags}


# An option of a generation that is not given is None, so that the engine's default holds.
GENERATION_FLAGS: Flags = {
    name: replace(
        option,
        default=None,
        default_help=option.default_help or ("" if option.default in (None, ()) else f"{option.default:g}"),
    )
    for name, option in _flagged(OPTIONS).items()
}
LOAD_FLAGS: Flags = _flagged(LOAD_OPTIONS)


def with_defaults(flags: Flags, **defaults: tuple[Any, str]) -> Flags:
    """The same flags, where a command has other defaults: keyword -> (value, what the help says of it)."""
    changed = {
        name: replace(flags[name], default=value, default_help=text)
        for name, (value, text) in defaults.items()
    }
    return {**flags, **changed}


def without(flags: Flags, *names: str) -> Flags:
    """The flags but for some."""
    return {name: option for name, option in flags.items() if name not in names}


def declared(**groups: Flags) -> Callable[[Command], Command]:
    """Replace each parameter that is named with the flags of a group; the command gets them as one dict."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name in groups:
                parameters += [_parameter(option) for option in groups[name].values()]
            else:
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(parameter.replace(annotation=hints[name], kind=kind))

        def run(**typed: Any) -> int:
            for group, flags in groups.items():
                typed[group] = {name: _value(option, typed) for name, option in flags.items()}
            return command(**typed)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def parameter_name(option: Option) -> str:
    """The function parameter of a flag: max_tokens of --max-tokens, think of --think/--no-think."""
    long = next(flag for flag in option.flags if flag.startswith("--"))
    return long.partition("/")[0].removeprefix("--").replace("-", "_")


def _value(option: Option, typed: Given) -> Any:
    value = typed.pop(parameter_name(option))
    return not value if _turns_off(option) else value


def _turns_off(option: Option) -> bool:
    """A switch that is on, with a flag that turns it off."""
    return option.kind == "switch" and option.default is True


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = list[str] if option.kind == "texts" else TYPES[option.kind]
    default = not option.default if _turns_off(option) else option.default
    shown = f"  [default: {option.default_help}]" if option.default_help else ""
    facts: dict[str, Any] = {"help": option.help + shown, "show_default": not shown}
    if option.kind in ("number", "count"):
        facts |= {"min": option.least, "max": option.most}
    if option.metavar is not None:
        facts["metavar"] = option.metavar
    if option.choices:
        facts["callback"] = _checker(option.choices)
    value_type: Any = kind if default is not None else kind | None
    annotation = Annotated[value_type, typer.Option(*option.flags, **facts)]
    return inspect.Parameter(
        parameter_name(option), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _checker(choices: tuple[str, ...]) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            *first, last = choices
            raise typer.BadParameter(f"{value} is none of {', '.join(first)} and {last}.")
        return value

    return check


def load_options(given: Given) -> LoadOptions:
    """How a pack is to be opened. Raises BadRequest where a flag makes no sense."""
    from localmimo.cli.ui import parse_count

    values = dict(given)
    for name, option in LOAD_FLAGS.items():
        if option.kind == "tokens" and values.get(name) is not None:
            values[name] = parse_count(values[name], option.flags[-1])
    if values.get("profile") == "none":
        values["profile"] = None
    return LoadOptions(**values)
