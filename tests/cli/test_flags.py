"""What is declared once is the same in Python, on the command line and in /set."""

import inspect
from typing import Any

import pytest
import typer

from localmimo.cli.app import app
from localmimo.cli.flags import LOAD_FLAGS, load_options, parameter_name
from localmimo.cli.terminal.slash_commands import COMMANDS
from localmimo.decode.options import OPTIONS, PLACES, GenerationOptions, Sampling
from localmimo.engine import Engine, load
from localmimo.errors import BadRequest
from localmimo.loading.options import LOAD_OPTIONS, LoadOptions

# What a command of those that open a pack leaves out: a window is perplexity's context, and it drafts nothing.
LEFT_OUT = {"chat": set(), "serve": set(), "bench": set(), "perplexity": {"context", "draft"}}
# Keywords that no flag sets: one conversation at a time, with the window that the model was trained with.
WITHOUT_FLAG = {"window_keys", "max_batch"}


def flags_of(command: str) -> dict[str, Any]:
    """Parameter name -> parameter of a command line."""
    program: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in program.commands[command].params}


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_stream_takes_the_declared_options() -> None:
    found = keywords(Engine.stream)
    assert set(found) == {*GenerationOptions.__dataclass_fields__, *PLACES}
    for name in set(found) & set(OPTIONS):
        assert found[name].default == OPTIONS[name].default, name


def test_load_takes_the_declared_options() -> None:
    found = keywords(load)
    assert len(set(found) - set(LOAD_OPTIONS)) == 1  # the observer of progress
    assert set(LOAD_OPTIONS) == set(LoadOptions.__dataclass_fields__)
    for name, option in LOAD_OPTIONS.items():
        assert found[name].default == option.default, name
    assert {name for name in LOAD_OPTIONS if name not in LOAD_FLAGS} == WITHOUT_FLAG


@pytest.mark.parametrize("command", LEFT_OUT)
def test_every_command_that_opens_a_pack_has_the_same_flags(command: str) -> None:
    found = flags_of(command)
    for name, option in LOAD_FLAGS.items():
        flag = found.get(parameter_name(option))
        if name in LEFT_OUT[command]:
            assert flag is None or flag.help != option.help, name
            continue
        assert flag is not None, name
        assert tuple(flag.opts) == option.flags
        assert flag.help.startswith(option.help)


def test_chat_has_a_flag_for_every_declared_one() -> None:
    found = flags_of("chat")
    for option in OPTIONS.values():
        if option.flags:
            flag = found[parameter_name(option)]
            assert "/".join((*flag.opts, *flag.secondary_opts)) == "/".join(option.flags), option.name
            assert flag.help.startswith(option.help) and flag.default is None
    numbers = {name for name, option in OPTIONS.items() if option.kind == "number"}
    assert numbers == {name for name in numbers if OPTIONS[name].flags and OPTIONS[name].set_names}


def test_set_offers_every_declared_name() -> None:
    command = next(command for command in COMMANDS if command.name == "set")
    names = [name for option in OPTIONS.values() for name in option.set_names]
    assert command.choices == tuple(f"{name}=" for name in names)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -1}, "temperature -1 is negative; 0 takes the likeliest token."),
        ({"temperature": float("nan")}, "temperature nan is negative; 0 takes the likeliest token."),
        ({"top_k": -1}, "top-k -1 is negative; 0 keeps every token."),
        ({"top_p": 0}, "top-p 0 is not above 0 and at most 1."),
        ({"top_p": 1.5}, "top-p 1.5 is not above 0 and at most 1."),
        ({"min_p": 1.1}, "min-p 1.1 is not between 0 and 1."),
        ({"repetition_penalty": 0}, "repetition penalty 0 is not above 0."),
    ],
)
def test_values_out_of_range_are_sentences(given: dict[str, float], says: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Sampling(**given)  # type: ignore[arg-type]
    assert str(raised.value) == says


def test_flags_become_load_options() -> None:
    given = {name: option.default for name, option in LOAD_FLAGS.items()}
    assert load_options(given) == LoadOptions()
    options = load_options(given | {"context": "32k", "profile": "none", "draft": "2", "prefetch": False})
    assert options == LoadOptions(context=32_768, profile=None, draft=2, prefetch=False)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": 0}, r"write sampling=Sampling\(temperature=...\)"),
        ({"max_token": 3}, "generate has no keyword max_token: did you mean max_tokens"),
        ({"speed": 3}, "generate has no keyword speed: it takes cancel, grammar, "),
    ],
)
def test_unknown_keywords_name_the_near_one(given: dict[str, Any], says: str) -> None:
    for prompt in ("x", ["x"]):
        with pytest.raises(TypeError, match=says):
            Engine.generate(None, prompt, **given)  # type: ignore[call-overload]
