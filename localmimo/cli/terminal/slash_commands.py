"""The slash commands of a conversation: a table of names, what they say of themselves, and what they do.

Knows the Repl they act on; nothing of keys or models.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localmimo.cli.terminal.screen import figures
from localmimo.cli.ui import fit, parse_count
from localmimo.decode.options import OPTIONS, SAMPLING_OPTIONS
from localmimo.errors import BadRequest, LocalMimoError, with_flags
from localmimo.hardware.host import format_bytes

if TYPE_CHECKING:
    from localmimo.cli.terminal.repl import Repl


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command; `run` gets the text after its name and returns False to end the conversation."""

    name: str
    usage: str
    help: str
    run: Callable[[Repl, str], bool | None]
    choices: tuple[str, ...] | Literal["paths", "sessions"] = ()  # what Tab offers after its name


ALIASES = {"quit": "exit", "bye": "exit", "?": "help"}


def run_command(repl: Repl, entry: str) -> bool:
    """Carry out an entry that starts with a slash; False if it ends the conversation."""
    name, _, argument = entry[1:].strip().partition(" ")
    name = ALIASES.get(name, name)
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        repl.ui.note(_unknown(name))
        return True
    try:
        return command.run(repl, argument.strip()) is not False
    except (LocalMimoError, OSError) as error:
        repl.ui.note(f"error: {with_flags(error)}", style="red")
        return True


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [command.name for command in COMMANDS], n=1, cutoff=0.5)
    guess = f" Did you mean /{close[0]}?" if close else " /help lists the commands."
    return f"Unknown command /{name}.{guess} To send it as text, start with //."


def _help(repl: Repl, _argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    for command in COMMANDS:
        repl.ui.note(f"  {command.usage:<{width}}  {command.help}")
    keys = (
        "Enter sends",
        "Alt-Enter starts a new line",
        "Ctrl-C stops an answer",
        "// sends a leading slash",
    )
    repl.ui.parts(keys, style=None)


def _exit(_repl: Repl, _argument: str) -> bool:
    return False


def _clear(repl: Repl, _argument: str) -> None:
    repl.messages.clear()
    repl.attached.clear()
    repl.asked, repl.name, repl.last = "", "", None
    repl.ui.note(
        "  The conversation is empty" + (", the system prompt stays." if repl.system else "."), style="dim"
    )


def _system(repl: Repl, text: str) -> None:
    if not text:
        repl.ui.note(
            f"  {repl.system}" if repl.system else "  No system prompt: the model's own is used.", style="dim"
        )
    elif text == "off":
        repl.system = None
        repl.ui.note("  No system prompt: the model's own is used.", style="dim")
    else:
        repl.system = text
        repl.ui.note("  The system prompt holds from the next message on.", style="dim")


# What /set may change: name -> option.
SETTINGS = {name: option for option in OPTIONS.values() for name in option.set_names}


def _set(repl: Repl, argument: str) -> None:
    for pair in argument.split():
        _set_one(repl, pair)
    sampling = repl.settings.stream_options()["sampling"]
    shown = {
        option.set_names[0]: getattr(sampling if name in SAMPLING_OPTIONS else repl.settings, name)
        for name, option in OPTIONS.items()
        if option.set_names
    }
    repl.ui.parts(f"{name} {'off' if value is None else value}" for name, value in shown.items())


def _set_one(repl: Repl, pair: str) -> None:
    key, equals, text = pair.partition("=")
    name = key.strip().lower().replace("_", "-")
    if not equals or name not in SETTINGS:
        raise BadRequest(f"/set {pair}: write name=value, the name one of {', '.join(SETTINGS)}.")
    option = SETTINGS[name]
    kind = float if option.kind == "number" else int
    try:
        value = None if text.lower() in ("", "off", "none") else kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise BadRequest(f'/set {name}: "{text}" is not {wanted}.') from None
    if option.name not in SAMPLING_OPTIONS:
        if value is not None and option.least is not None and value < option.least:
            raise BadRequest(f"/set {name}: {value} {option.refusal}, or off.")
        setattr(repl.settings, option.name, value)
        return
    before = repl.settings.sampling.get(option.name)
    repl.settings.sampling[option.name] = value
    try:
        repl.settings.stream_options()
    except BadRequest:
        repl.settings.sampling[option.name] = before
        raise


def _think(repl: Repl, argument: str) -> None:
    match argument:
        case "on":
            repl.settings.think, repl.settings.think_budget = True, None
        case "off":
            repl.settings.think, repl.settings.think_budget = False, None
        case "":
            pass
        case _:
            repl.settings.think, repl.settings.think_budget = True, parse_count(argument, "/think")
    budget = repl.settings.think_budget
    repl.ui.note(
        f"  thinking {'on' if thinks(repl) else 'off'}"
        + ("" if budget is None else f", at most {budget:,} tokens"),
        style="dim",
    )


def thinks(repl: Repl) -> bool:
    """Whether the next answer starts with thinking."""
    return repl.engine.template.think_default if repl.settings.think is None else repl.settings.think


def _thoughts(repl: Repl, _argument: str) -> None:
    thoughts: list[str] = []  # since the last question, calls in between
    for message in reversed(repl.messages):
        if message["role"] == "user":
            break
        thoughts.insert(0, str(message.get("reasoning_content", "")).strip())
    said = "\n\n".join(filter(None, thoughts))
    repl.ui.note(said or "  The last answer came without thinking.", style="dim")


def _stats(repl: Repl, _argument: str) -> None:
    if repl.last is not None and repl.last.stats is not None:
        repl.ui.parts(figures(repl.last.stats, repl.engine.context))
    repl.ui.configuration(repl.engine, always=True)


def _retry(repl: Repl, _argument: str) -> None:
    if not repl.asked:
        raise BadRequest("There is nothing to ask again.")
    if repl.messages and repl.messages[-1]["role"] != "user":
        repl.take_back()
    repl.ask(repl.asked)


def _undo(repl: Repl, _argument: str) -> None:
    if repl.take_back() is None:
        raise BadRequest("There is nothing to take back.")
    repl.last = None
    n_left = sum(message["role"] == "user" for message in repl.messages)
    repl.ui.note(f"  The last question and its answer are gone; {n_left} left.", style="dim")


def _edit(repl: Repl, _argument: str) -> None:
    question = repl.take_back() or repl.asked
    if not question:
        raise BadRequest("There is no question to edit.")
    repl.draft, repl.last = question, None
    repl.ui.note(
        "  The last question is back at the prompt; Ctrl-X Ctrl-E opens it in an editor.", style="dim"
    )


def _save(repl: Repl, name: str) -> None:
    from localmimo.cli.terminal.saved_chats import folder_of, save, saved_names

    name = name or repl.name or f"{datetime.now():%Y-%m-%d %H.%M}"
    folder = folder_of(name)
    if name != repl.name and name in saved_names() and not _agrees(repl, f"{name} exists; write over it?"):
        return
    sizes = save(repl.engine, name, repl.messages, repl.system, repl.tool_approval.schemas)
    n_tokens, n_bytes = next(sizes)
    repl.ui.note(f"  {format_bytes(n_bytes)} for {n_tokens:,} tokens to {folder} ...", style="dim")
    n_tokens, n_bytes = list(sizes)[-1]
    repl.name = name
    repl.ui.note(f"  saved, {format_bytes(n_bytes)}: /load {name}", style="dim")


def _agrees(repl: Repl, question: str) -> bool:
    return (repl.reader.ask(f"  {question} [y/N] ") or "").strip().lower() in ("y", "yes")


def _load(repl: Repl, name: str) -> None:
    from localmimo.cli.terminal.saved_chats import load, saved_names

    if not name:
        names = saved_names()
        repl.ui.note(
            "  " + "\n  ".join(names) if names else "  Nothing is saved yet; /save keeps this conversation."
        )
        return
    found, n_held, why = load(repl.engine, name, repl.tool_approval.schemas)
    repl.messages, repl.system, repl.name = found.messages, found.system, name
    repl.attached.clear()
    questions = [message["content"] for message in found.messages if message["role"] == "user"]
    repl.asked, repl.last = str(questions[-1]) if questions else "", None
    if questions:
        repl.ui.note(f"  the last question: {fit(repl.asked, max(20, repl.ui.err.width - 22))}", style="dim")
    if why:
        repl.ui.note(f"  {why} It is read again with your next message.", style="yellow")
    counted = f"{len(questions)} question{'s' * (len(questions) != 1)}"
    repl.ui.parts([counted, f"{n_held:,} tokens held", f"{len(found.tokens) - n_held:,} to read"])


def _tools(repl: Repl, path: str) -> None:
    if path == "off":
        repl.tool_approval.clear()
    elif path:
        repl.tool_approval.open(path)
    if not repl.tool_approval.tools:
        repl.ui.note("  No tools; /tools FILE.py takes the functions of a Python file.", style="dim")
    for tool in repl.tool_approval.tools.values():
        parameters = ", ".join(tool.parameters["properties"])
        unasked = "  (runs unasked)" if tool.name in repl.tool_approval.always else ""
        repl.ui.note(
            f"  {tool.name}({parameters})  {tool.description}{unasked}",
            style="dim",
        )


def _read(repl: Repl, argument: str) -> None:
    try:
        names = shlex.split(argument)
    except ValueError as error:
        raise BadRequest(f"/read: {error}.") from None
    if not names:
        raise BadRequest("/read: name at least one file.")
    for path in [Path(name).expanduser() for name in names]:
        text = _text_of(path)
        n_tokens = len(repl.engine.encode(text))
        if n_tokens >= repl.engine.context:
            raise BadRequest(
                f"{path} has {n_tokens:,} tokens and the context {repl.engine.context:,}; read a part of it."
            )
        repl.attached.append(f"File {path.name}:\n{text}")
        repl.ui.note(f"  {path.name}: {n_tokens:,} tokens, goes with your next message", style="dim")


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise BadRequest(f"There is no file {path}.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"{path} is no UTF-8 text.") from None


COMMANDS = (
    Command("help", "/help", "this list", _help),
    Command("exit", "/exit", "leave (so does Ctrl-D)", _exit),
    Command("clear", "/clear", "begin anew", _clear),
    Command("system", "/system [TEXT|off]", "show or change the system text", _system),
    Command(
        "set",
        "/set [NAME=VALUE ...]",
        "show or change sampling",
        _set,
        choices=tuple(f"{name}=" for name in SETTINGS),
    ),
    Command("think", "/think [on|off|N]", "think first? N: tokens at most", _think, choices=("on", "off")),
    Command("thoughts", "/thoughts", "show the last thinking", _thoughts),
    Command("stats", "/stats", "figures and configuration", _stats),
    Command("retry", "/retry", "ask the last question again", _retry),
    Command("undo", "/undo", "take the last question back", _undo),
    Command("edit", "/edit", "change the last question", _edit),
    Command("read", "/read FILE ...", "put files into the next message", _read, choices="paths"),
    Command("save", "/save [NAME]", "keep this conversation, with what was read", _save, choices="sessions"),
    Command("load", "/load [NAME]", "go on with a saved one; list them", _load, choices="sessions"),
    Command("tools", "/tools [FILE.py|off]", "functions that the model may ask for", _tools, choices="paths"),
)
