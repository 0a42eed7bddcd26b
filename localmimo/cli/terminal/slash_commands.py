"""The slash commands of a conversation: a table of names, help texts and functions.

Knows the Conversation they act on; nothing of keys or models.
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
from localmimo.hardware.units import format_bytes

if TYPE_CHECKING:
    from localmimo.cli.terminal.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command; `run` gets the text after its name and returns False to end the conversation."""

    name: str
    usage: str
    help: str
    run: Callable[[Conversation, str], bool | None]
    choices: tuple[str, ...] | Literal["paths", "sessions"] = ()  # what Tab offers after its name


ALIASES = {"quit": "exit", "bye": "exit", "?": "help"}


def run_command(conversation: Conversation, entry: str) -> bool:
    """Run an entry that starts with a slash; False if it ends the conversation."""
    name, _, argument = entry[1:].strip().partition(" ")
    name = ALIASES.get(name, name)
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        conversation.ui.note(_unknown(name))
        return True
    try:
        return command.run(conversation, argument.strip()) is not False
    except (LocalMimoError, OSError) as error:
        conversation.ui.note(f"error: {with_flags(error)}", style="red")
        return True


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [command.name for command in COMMANDS], n=1, cutoff=0.5)
    hint = f" Did you mean /{close[0]}?" if close else " /help lists the commands."
    return f"Unknown command /{name}.{hint} To send it as text, start with //."


def _help(conversation: Conversation, _argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    for command in COMMANDS:
        conversation.ui.note(f"  {command.usage:<{width}}  {command.help}")
    keys = (
        "Enter sends",
        "Alt-Enter starts a new line",
        "Ctrl-C stops an answer",
        "// sends a leading slash",
    )
    conversation.ui.parts(keys, style=None)


def _exit(_repl: Conversation, _argument: str) -> bool:
    return False


def _clear(conversation: Conversation, _argument: str) -> None:
    conversation.messages.clear()
    conversation.attached.clear()
    conversation.last_question, conversation.name, conversation.last = "", "", None
    conversation.ui.note(
        "  The conversation is empty" + (", the system prompt stays." if conversation.system else "."),
        style="dim",
    )


def _system(conversation: Conversation, text: str) -> None:
    if not text:
        conversation.ui.note(
            f"  {conversation.system}"
            if conversation.system
            else "  No system prompt: the model's own is used.",
            style="dim",
        )
    elif text == "off":
        conversation.system = None
        conversation.ui.note("  No system prompt: the model's own is used.", style="dim")
    else:
        conversation.system = text
        conversation.ui.note("  The system prompt holds from the next message on.", style="dim")


# What /set may change: name -> option.
SETTINGS = {name: option for option in OPTIONS.values() for name in option.set_names}


def _set(conversation: Conversation, argument: str) -> None:
    for pair in argument.split():
        _set_one(conversation, pair)
    sampling = conversation.settings.stream_options()["sampling"]
    shown = {
        option.set_names[0]: getattr(sampling if name in SAMPLING_OPTIONS else conversation.settings, name)
        for name, option in OPTIONS.items()
        if option.set_names
    }
    conversation.ui.parts(f"{name} {'off' if value is None else value}" for name, value in shown.items())


def _set_one(conversation: Conversation, pair: str) -> None:
    key, equals, text = pair.partition("=")
    name = key.strip().lower().replace("_", "-")
    if not equals or name not in SETTINGS:
        raise BadRequest(f"/set {pair}: write name=value, the name one of {', '.join(SETTINGS)}.")
    option = SETTINGS[name]
    kind = float if option.kind == "number" else int
    try:
        value = None if text.lower() in ("", "off", "none") else kind(text)
    except ValueError:
        needed = "a whole number" if kind is int else "a number"
        raise BadRequest(f'/set {name}: "{text}" is not {needed}.') from None
    if option.name not in SAMPLING_OPTIONS:
        if value is not None and option.least is not None and value < option.least:
            raise BadRequest(f"/set {name}: {value} {option.refusal}, or off.")
        setattr(conversation.settings, option.name, value)
        return
    before = conversation.settings.sampling.get(option.name)
    conversation.settings.sampling[option.name] = value
    try:
        conversation.settings.stream_options()
    except BadRequest:
        conversation.settings.sampling[option.name] = before
        raise


def _think(conversation: Conversation, argument: str) -> None:
    match argument:
        case "on":
            conversation.settings.think, conversation.settings.think_budget = True, None
        case "off":
            conversation.settings.think, conversation.settings.think_budget = False, None
        case "":
            pass
        case _:
            conversation.settings.think, conversation.settings.think_budget = (
                True,
                parse_count(argument, "/think"),
            )
    budget = conversation.settings.think_budget
    conversation.ui.note(
        f"  thinking {'on' if thinks(conversation) else 'off'}"
        + ("" if budget is None else f", at most {budget:,} tokens"),
        style="dim",
    )


def thinks(conversation: Conversation) -> bool:
    """Whether the next answer starts with thinking."""
    return (
        conversation.engine.template.think_default
        if conversation.settings.think is None
        else conversation.settings.think
    )


def _thoughts(conversation: Conversation, _argument: str) -> None:
    thoughts: list[str] = []  # since the last question, calls in between
    for message in reversed(conversation.messages):
        if message["role"] == "user":
            break
        thoughts.insert(0, str(message.get("reasoning_content", "")).strip())
    said = "\n\n".join(filter(None, thoughts))
    conversation.ui.note(said or "  The last answer came without thinking.", style="dim")


def _stats(conversation: Conversation, _argument: str) -> None:
    if conversation.last is not None and conversation.last.stats is not None:
        conversation.ui.parts(figures(conversation.last.stats, conversation.engine.context))
    conversation.ui.configuration(conversation.engine, always=True)


def _retry(conversation: Conversation, _argument: str) -> None:
    if not conversation.last_question:
        raise BadRequest("There is nothing to ask again.")
    if conversation.messages and conversation.messages[-1]["role"] != "user":
        conversation.take_back()
    conversation.ask(conversation.last_question)


def _undo(conversation: Conversation, _argument: str) -> None:
    if conversation.take_back() is None:
        raise BadRequest("There is nothing to take back.")
    conversation.last = None
    n_left = sum(message["role"] == "user" for message in conversation.messages)
    conversation.ui.note(f"  The last question and its answer are gone; {n_left} left.", style="dim")


def _edit(conversation: Conversation, _argument: str) -> None:
    question = conversation.take_back() or conversation.last_question
    if not question:
        raise BadRequest("There is no question to edit.")
    conversation.draft, conversation.last = question, None
    conversation.ui.note(
        "  The last question is back at the prompt; Ctrl-X Ctrl-E opens it in an editor.", style="dim"
    )


def _save(conversation: Conversation, name: str) -> None:
    from localmimo.cli.terminal.saved_chats import folder_of, save, saved_names

    name = name or conversation.name or f"{datetime.now():%Y-%m-%d %H.%M}"
    folder = folder_of(name)
    if (
        name != conversation.name
        and name in saved_names()
        and not _agrees(conversation, f"{name} exists; write over it?")
    ):
        return
    sizes = save(
        conversation.engine,
        name,
        conversation.messages,
        conversation.system,
        conversation.tool_approval.schemas,
    )
    n_tokens, n_bytes = next(sizes)
    conversation.ui.note(f"  {format_bytes(n_bytes)} for {n_tokens:,} tokens to {folder} ...", style="dim")
    n_tokens, n_bytes = list(sizes)[-1]
    conversation.name = name
    conversation.ui.note(f"  saved, {format_bytes(n_bytes)}: /load {name}", style="dim")


def _agrees(conversation: Conversation, question: str) -> bool:
    return (conversation.reader.ask(f"  {question} [y/N] ") or "").strip().lower() in ("y", "yes")


def _load(conversation: Conversation, name: str) -> None:
    from localmimo.cli.terminal.saved_chats import load, saved_names

    if not name:
        names = saved_names()
        conversation.ui.note(
            "  " + "\n  ".join(names) if names else "  Nothing is saved yet; /save keeps this conversation."
        )
        return
    found, n_held, why = load(conversation.engine, name, conversation.tool_approval.schemas)
    conversation.messages, conversation.system, conversation.name = found.messages, found.system, name
    conversation.attached.clear()
    questions = [message["content"] for message in found.messages if message["role"] == "user"]
    conversation.last_question, conversation.last = str(questions[-1]) if questions else "", None
    if questions:
        conversation.ui.note(
            f"  the last question: {fit(conversation.last_question, max(20, conversation.ui.err.width - 22))}",
            style="dim",
        )
    if why:
        conversation.ui.note(f"  {why} It is read again with your next message.", style="yellow")
    counted = f"{len(questions)} question{'s' * (len(questions) != 1)}"
    conversation.ui.parts([counted, f"{n_held:,} tokens held", f"{len(found.tokens) - n_held:,} to read"])


def _tools(conversation: Conversation, path: str) -> None:
    if path == "off":
        conversation.tool_approval.clear()
    elif path:
        conversation.tool_approval.open(path)
    if not conversation.tool_approval.tools:
        conversation.ui.note("  No tools; /tools FILE.py takes the functions of a Python file.", style="dim")
    for tool in conversation.tool_approval.tools.values():
        parameters = ", ".join(tool.parameters["properties"])
        unasked = "  (runs unasked)" if tool.name in conversation.tool_approval.always else ""
        conversation.ui.note(
            f"  {tool.name}({parameters})  {tool.description}{unasked}",
            style="dim",
        )


def _read(conversation: Conversation, argument: str) -> None:
    try:
        names = shlex.split(argument)
    except ValueError as error:
        raise BadRequest(f"/read: {error}.") from None
    if not names:
        raise BadRequest("/read: name at least one file.")
    for path in [Path(name).expanduser() for name in names]:
        text = _text_of(path)
        n_tokens = len(conversation.engine.encode(text))
        if n_tokens >= conversation.engine.context:
            raise BadRequest(
                f"{path} has {n_tokens:,} tokens and the context {conversation.engine.context:,}; read a part of it."
            )
        conversation.attached.append(f"File {path.name}:\n{text}")
        conversation.ui.note(f"  {path.name}: {n_tokens:,} tokens, goes with your next message", style="dim")


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
