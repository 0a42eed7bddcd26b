"""`localmimo chat`: reads its arguments, opens the engine, then answers once or starts the Repl.

Knows flags, stdin and folders; nothing of keys or of how an answer looks.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from localmimo.cli.flags import GENERATION_FLAGS, LOAD_FLAGS, Given, declared, load_options
from localmimo.cli.open_engine import open_engine
from localmimo.cli.options import Json, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.packs import EMBEDDED, pack_folder
from localmimo.cli.terminal.tool_approval import Ask, ToolApproval
from localmimo.cli.ui import Ui
from localmimo.decode.options import SAMPLING_OPTIONS
from localmimo.errors import BadRequest
from localmimo.hardware.units import format_bytes
from localmimo.loading.options import LoadOptions

if TYPE_CHECKING:
    from localmimo.cli.terminal.conversation import ChatSettings
    from localmimo.cli.terminal.keys import Choices
    from localmimo.cli.terminal.slash_commands import Command
    from localmimo.decode.answer import Answer
    from localmimo.decode.grammar import Grammar
    from localmimo.engine import Engine

STDIN = "-"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The command line of `localmimo chat`."""

    arguments: tuple[str, ...] = ()
    loading: LoadOptions = field(default_factory=LoadOptions)
    schema: Path | None = None
    grammar: str | None = None
    system: str | None = None
    think: bool | None = None
    think_budget: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    hide_thinking: bool = False
    stats: bool | None = None
    plain: bool = False
    as_json: bool = False
    tools: tuple[str, ...] = ()
    stats_json: str | None = None


Opener = Callable[[str | None, LoadOptions, Ui], "Engine"]


@declared(generation=GENERATION_FLAGS, loading=LOAD_FLAGS)
def chat(
    first: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A pack's folder, or mimo-mini.", show_default=False)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="Answer this and exit; - reads it from stdin.", show_default=False
        ),
    ] = None,
    generation: Given = {},  # noqa: B006  (replaced with flags)
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT|@FILE", help="System prompt.")
    ] = None,
    hide_thinking: Annotated[bool, typer.Option("--hide-thinking", help="Do not show thinking.")] = False,
    stats: Annotated[
        bool | None,
        typer.Option("--stats/--no-stats", help="Figures after an answer.  [default: in a terminal]"),
    ] = None,
    loading: Given = {},  # noqa: B006
    stats_json: Annotated[
        str | None,
        typer.Option(
            "--stats-json",
            metavar="FILE",
            help="Append a JSON line per token: pages by tier, bytes, time.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No Markdown, no redrawing.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Talk with a model: localmimo chat [MODEL] [PROMPT].

    Without a PROMPT it opens a conversation (/help lists its commands). With one, or with text piped in, it
    prints the answer on stdout and exits. A single word or text that is neither a folder nor "mimo-mini" is
    taken as the PROMPT for the small model that is included.
    """
    options = ChatOptions(
        arguments=tuple(text for text in (first, second) if text is not None),
        loading=load_options(loading),
        schema=generation["response_format"],
        grammar=generation["grammar"],
        system=system,
        think=generation["think"],
        think_budget=generation["think_budget"],
        max_tokens=generation["max_tokens"],
        stop=tuple(generation["stop"] or ()),
        sampling={name: value for name, value in generation.items() if name in SAMPLING_OPTIONS},
        hide_thinking=hide_thinking,
        stats=stats,
        plain=plain,
        as_json=as_json,
        tools=tuple(generation["tools"] or ()),
        stats_json=stats_json,
    )
    return run_interruptible(lambda: run_chat(options, ui_of(verbose, quiet)))


def run_chat(
    options: ChatOptions, ui: Ui, *, stdin: IO[str] | None = None, opener: Opener | None = None
) -> int:
    """Run the command; the exit code."""
    stdin = stdin or sys.stdin
    model, prompt = model_and_prompt(options.arguments)
    prompt = _given_prompt(prompt, stdin)
    if options.as_json and prompt is None:
        raise BadRequest("--json answers one prompt: give a PROMPT, or pipe it in.")
    system = _system_text(options.system)
    _check_early(options)
    if opener is None and model is not None:
        pack_folder(model)  # before anything heavy is imported
    settings, tool_approval = _settings(options, ui), ToolApproval(ui)
    try:
        for path in options.tools:
            tool_approval.open(path)
        with (opener or open_engine)(model, options.loading, ui) as engine:
            if prompt is None:
                return _converse(engine, options, ui, system, settings, tool_approval)
            tool_approval.ask = _asker(stdin, ui)
            prompt = _with_stdin(prompt, stdin, ui)
            return _answer_once(engine, options, ui, system, settings, tool_approval, prompt)
    finally:
        tool_approval.clear()


def model_and_prompt(arguments: tuple[str, ...]) -> tuple[str | None, str | None]:
    """(model or None for the embedded one, prompt or None) of the positional arguments."""
    match arguments:
        case (model, prompt):
            return _model(model), prompt
        case (argument,) if argument == EMBEDDED or _looks_like_path(argument):
            return _model(argument), None
        case (prompt,):
            return None, prompt
    return None, None


def _model(name: str) -> str | None:
    return None if name == EMBEDDED else name


def _looks_like_path(text: str) -> bool:
    """An existing folder, or a single word that can only be meant as one."""
    if text.strip() and len(text) < 4096 and "\0" not in text and Path(text).expanduser().is_dir():
        return True
    return len(text.split()) == 1 and text.startswith(("/", "./", "../", "~"))


def _check_early(options: ChatOptions) -> None:
    """What can be refused before the slow imports."""
    for path in options.tools:
        if not Path(path).expanduser().is_file():
            raise BadRequest(f"--tools: there is no file {path}.")


def _given_prompt(prompt: str | None, stdin: IO[str]) -> str | None:
    if prompt == STDIN or (prompt is None and not stdin.isatty()):
        prompt = stdin.read()
    if prompt is not None and not prompt.strip():
        raise BadRequest("The prompt is empty: say something.")
    return prompt


def _with_stdin(prompt: str, stdin: IO[str], ui: Ui) -> str:
    """The prompt, and below it what was piped in along with it."""
    if stdin.isatty() or stdin.closed:
        return prompt
    try:
        ready = bool(select.select([stdin], [], [], 0)[0])
    except (OSError, ValueError):  # no real file
        ready = True
    if not ready:
        ui.note(
            "Nothing came in on stdin yet, so it is not read; give - as the PROMPT to wait for it.",
            style="dim",
        )
        return prompt
    piped = stdin.read()
    return f"{prompt}\n\n{piped}" if piped.strip() else prompt


def _system_text(system: str | None, flag: str = "--system") -> str | None:
    if system is None or not system.startswith("@"):
        return system
    path = Path(system[1:]).expanduser()
    if not path.is_file():
        raise BadRequest(f"{flag}: there is no file {path}.")
    try:
        return path.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise BadRequest(f"{flag}: {path} is no UTF-8 text.") from None


def _settings(options: ChatOptions, ui: Ui) -> ChatSettings:
    from localmimo.cli.terminal.conversation import ChatSettings
    from localmimo.cli.terminal.step_log import StepLog

    stats = ui.err.is_terminal if options.stats is None else options.stats
    return ChatSettings(
        sampling=dict(options.sampling),
        max_tokens=options.max_tokens,
        stop=options.stop,
        think=options.think,
        think_budget=options.think_budget,
        stats=stats,
        grammar=_grammar(options),
        log=None if options.stats_json is None else StepLog(options.stats_json),
    )


def _grammar(options: ChatOptions) -> Grammar | None:
    """What the answer must look like. Raises BadRequest where a file is missing or no JSON."""
    from localmimo.decode.grammar import Grammar, grammar_of

    if options.schema is None:
        return grammar_of(_system_text(options.grammar, "--grammar"), None)
    if options.grammar is not None:
        raise BadRequest("Give either --schema or --grammar, not both.")
    text = _system_text(f"@{options.schema}", "--schema")
    try:
        return Grammar.json_schema(json.loads(text or ""))
    except ValueError as error:
        raise BadRequest(f"--schema: {options.schema} is no JSON: {error}.") from None


def _converse(
    engine: Engine,
    options: ChatOptions,
    ui: Ui,
    system: str | None,
    settings: ChatSettings,
    tool_approval: ToolApproval,
) -> int:
    from localmimo.cli.terminal.keys import KeyReader
    from localmimo.cli.terminal.repl import Repl
    from localmimo.cli.terminal.screen import Screen
    from localmimo.cli.terminal.slash_commands import COMMANDS

    settings.stream_options()
    reader = KeyReader({command.name: _choices(command) for command in COMMANDS})
    screen = Screen(ui, plain=options.plain, hide_thinking=options.hide_thinking, hint="/thoughts shows it")
    repl = Repl(
        reader, ui, engine, settings=settings, screen=screen, system=system, tool_approval=tool_approval
    )
    greet(engine, settings, ui)
    repl.run()
    return 0


def _choices(command: Command) -> Choices:
    """What Tab offers after a command's name."""
    match command.choices:
        case "paths":
            return "paths"
        case "sessions":
            from localmimo.cli.terminal.saved_chats import saved_names

            return saved_names
        case words:
            return lambda: words


def greet(engine: Engine, settings: ChatSettings, ui: Ui) -> None:
    """Show the model and how it was placed in memory."""
    facts = engine.effective()
    think = engine.template.think_default if settings.think is None else settings.think
    ui.parts(
        [
            str(facts["model"]),
            str(facts["experts"]),
            f"{format_bytes(engine.pack.n_bytes)} pack",
            f"context {engine.context:,}",
            f"thinking {'on' if think else 'off'}",
        ],
        indent=0,
        style="bold",
    )
    ui.show_placement(engine)
    ui.configuration(engine)
    ui.note("  /help for commands, Ctrl-D to leave", style="dim")


def _answer_once(
    engine: Engine,
    options: ChatOptions,
    ui: Ui,
    system: str | None,
    settings: ChatSettings,
    tool_approval: ToolApproval,
    prompt: str,
) -> int:
    from localmimo.cli.terminal.conversation import run_turns, show_summary
    from localmimo.cli.terminal.screen import Screen

    ui.configuration(engine)
    screen: Any = (
        SilentScreen()
        if options.as_json
        else Screen(ui, plain=options.plain, hide_thinking=options.hide_thinking)
    )
    messages = [{"role": "user", "content": prompt}]
    for turn in run_turns(engine, messages, settings, screen, tool_approval, system):
        show_summary(turn, engine.context, settings, ui)
    if options.as_json:
        ui.json(as_object(turn, engine, settings))
    return 130 if turn.finish_reason == "cancelled" else 0


def _asker(stdin: IO[str], ui: Ui) -> Ask | None:
    """Asks at the terminal; None where stdin or stderr is no terminal."""
    if not (stdin.isatty() and ui.err.is_terminal):
        return None
    from localmimo.cli.terminal.keys import KeyReader

    return KeyReader({}, remember=False).ask


class SilentScreen:
    """A screen that shows nothing."""

    def begin(self) -> None: ...

    def reading(self, done: int, total: int) -> None: ...

    def show(self, step: Any) -> None: ...

    def end(self) -> None: ...


def as_object(turn: Answer, engine: Engine, settings: ChatSettings) -> dict[str, Any]:
    """An answer for machines: what was said, what it took, and the configuration in force."""
    from dataclasses import asdict

    chosen = settings.stream_options()
    n_prompt = turn.stats.prompt_tokens if turn.stats else 0
    n_said = turn.stats.generated_tokens if turn.stats else 0
    think = engine.template.think_default if settings.think is None else settings.think
    return {
        "text": turn.content,
        "reasoning_content": turn.reasoning,
        "tool_calls": [call.as_dict() for call in turn.tool_calls],
        "tokens": turn.tokens,
        "finish_reason": turn.finish_reason,
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_said, "total_tokens": n_prompt + n_said},
        "stats": turn.stats.as_dict() if turn.stats else {},
        "config": engine.effective()
        | {
            "sampling": asdict(chosen["sampling"]),
            "max_tokens": settings.max_tokens,
            "think": think,
            "think_budget": settings.think_budget,
        },
    }
