"""`localmimo chat` as a command: what is a model and what a prompt, pipes, JSON, exit codes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from localmimo.cli.commands.chat import ChatOptions, model_and_prompt, run_chat
from localmimo.cli.flags import load_options
from localmimo.errors import BadModel, BadRequest
from tests.scripted import INTERRUPT, Capture, ScriptedEngine


class Piped(io.StringIO):
    def isatty(self) -> bool:
        return False


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat(
    engine: ScriptedEngine, *arguments: str, stdin: Any = None, capture: Any = None, **options: Any
) -> Any:
    shown = capture or Capture()
    chosen = ChatOptions(arguments=arguments, sampling={"temperature": None, "seed": None}, **options)
    code = run_chat(chosen, shown.ui, stdin=stdin or Terminal(), opener=lambda *_: engine)  # type: ignore[arg-type,return-value]
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ((), (None, None)),
        (("mimo-mini",), (None, None)),
        (("Tell me about rivers.",), (None, "Tell me about rivers.")),
        (("hello",), (None, "hello")),
        (("",), (None, "")),
        (("x" * 9999,), (None, "x" * 9999)),
        (("~/packs/flash",), ("~/packs/flash", None)),
        (("./flash",), ("./flash", None)),
        (("/packs/flash",), ("/packs/flash", None)),
        (("/ is root, why?",), (None, "/ is root, why?")),
        (("mimo-mini", "hi"), (None, "hi")),
        (("flash", "hi"), ("flash", "hi")),
    ],
)
def test_model_or_prompt(arguments: tuple[str, ...], meaning: tuple[str | None, str | None]) -> None:
    assert model_and_prompt(arguments) == meaning


def test_a_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_and_prompt(("flash",)) == ("flash", None)


def test_one_shot() -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "Deep", " water."])
    assert chat(engine, "rivers?") == (0, "Deep water.\n", "thinking: hm\n")
    assert engine.closed


def test_one_shot_with_figures() -> None:
    code, out, err = chat(ScriptedEngine(["a", "b"]), "q", stats=True)
    assert (code, out) == (0, "ab\n")
    assert (
        err == "  1+2 tokens · 4.0 tok/s · first token 9.2 s · experts ram 71% disk 29%\n  context 3/32,768\n"
    )


def test_a_pipe_is_the_prompt() -> None:
    engine = ScriptedEngine(["x"], ["y"])
    chat(engine, stdin=Piped("what is this?\n"))
    assert engine.asked[0][0] == [{"role": "user", "content": "what is this?\n"}]
    chat(engine, "-", stdin=Piped("and this?"))
    assert engine.asked[1][0] == [{"role": "user", "content": "and this?"}]


def test_a_pipe_goes_below_the_prompt() -> None:
    engine = ScriptedEngine(["x"], ["y"])
    chat(engine, "Sum this up:", stdin=Piped("long text"))
    chat(engine, "Just this", stdin=Piped(""))
    assert [asked[0][0]["content"] for asked in engine.asked] == ["Sum this up:\n\nlong text", "Just this"]


def test_a_system_prompt_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Be brief.\n")
    engine = ScriptedEngine(["x"])
    chat(engine, "q", system=f"@{tmp_path}/s.txt")
    assert engine.asked[0][0][0] == {"role": "system", "content": "Be brief."}


def test_json_is_one_line() -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "Deep"])
    code, out, err = chat(engine, "rivers?", as_json=True, max_tokens=9, think=True)
    answer = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert answer["text"] == "Deep" and answer["reasoning_content"] == "hm" and answer["tool_calls"] == []
    assert answer["finish_reason"] == "stop" and answer["tokens"] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    assert answer["stats"]["hits"] == {"ram": 0.71, "disk": 0.29}
    assert answer["config"]["experts"] == "nf4" and answer["config"]["sampling"]["temperature"] == 0.7
    assert answer["config"]["max_tokens"] == 9 and answer["config"]["think"] is True


def test_ctrl_c_keeps_what_was_said_and_exits_130() -> None:
    assert chat(ScriptedEngine(["one", INTERRUPT, "two"]), "count") == (130, "one\n", "  stopped\n")


@pytest.mark.parametrize(
    ("arguments", "options", "stdin", "says"),
    [
        (("",), {}, None, "The prompt is empty: say something."),
        ((" \n",), {}, None, "The prompt is empty: say something."),
        ((), {}, Piped(""), "The prompt is empty: say something."),
        ((), {"as_json": True}, None, "--json answers one prompt: give a PROMPT, or pipe it in."),
        (("q",), {"system": "@/no/such"}, None, "--system: there is no file /no/such."),
    ],
)
def test_senseless_requests_are_sentences(arguments: Any, options: Any, stdin: Any, says: str) -> None:
    with pytest.raises(BadRequest) as raised:
        chat(ScriptedEngine(), *arguments, stdin=stdin, **options)
    assert str(raised.value) == says


def test_a_context_that_is_no_number_is_a_sentence() -> None:
    with pytest.raises(BadRequest) as raised:
        load_options({"context": "many"})
    assert str(raised.value) == '--context is "many"; write a number such as 4096 or 32k.'


def test_folders_that_are_no_packs(tmp_path: Path) -> None:
    from localmimo.cli.packs import pack_folder

    for folder, file in (("hf", "config.json"), ("empty", ""), ("half", ""), ("half.partial", "")):
        (tmp_path / folder).mkdir()
        if file:
            (tmp_path / folder / file).touch()
    for name, says in {
        "none": f"There is no folder {tmp_path}/none.",
        "hf": f"{tmp_path}/hf is a checkpoint, not a pack. "
        f"Convert it first: localmimo quantize {tmp_path}/hf",
        "empty": f"{tmp_path}/empty is no pack: it has no manifest.json.",
        "half": f"{tmp_path}/half is no pack: it has no manifest.json. A conversion to it was begun: "
        f"run its quantize command again ({tmp_path}/half.partial).",
    }.items():
        with pytest.raises(BadModel) as raised:
            pack_folder(tmp_path / name)
        assert str(raised.value) == says


def test_greeting() -> None:
    from localmimo.cli.commands.chat import greet
    from localmimo.cli.terminal.conversation import ChatSettings

    shown = Capture()
    greet(ScriptedEngine(think=True), ChatSettings(), shown.ui)  # type: ignore[arg-type]
    assert shown.err == (
        "scripted · nf4 · 171 GB pack · context 32,768 · thinking on\n"
        "  RAM 92.0 GB of 96.0 GB: dense 7.9 GB · kv 0.8 GB\n"
        "  experts 83.3 GB (6,170 of 12,032, 51%)\n"
        "  /help for commands, Ctrl-D to leave\n"
    )


# ---- tools and the log of steps ----

CALL = "<tool_call><function=clock></function></tool_call>"


@pytest.fixture
def tools(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text("def clock() -> str:\n    return 'noon'\n")
    return str(tmp_path / "mine.py")


def test_without_a_terminal_no_call_is_run(tools: str) -> None:
    engine = ScriptedEngine([CALL])
    code, out, err = chat(engine, "time?", stdin=Piped(""), tools=(tools,))
    assert (code, out) == (0, "")
    assert err == "  calls clock()\n  not run: there is no terminal to ask at\n"
    assert engine.closed


def test_json_names_the_calls(tools: str) -> None:
    _, out, _ = chat(ScriptedEngine(["so ", CALL]), "time?", stdin=Piped(""), tools=(tools,), as_json=True)
    said = json.loads(out)
    assert (said["text"], said["finish_reason"]) == ("so ", "tool_calls")
    assert said["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}


@pytest.mark.parametrize("path", ["/no/such.py", "/tmp"])
def test_a_missing_file_of_tools_is_said_before_the_model_is_opened(path: str) -> None:
    with pytest.raises(BadRequest, match=f"--tools: there is no file {path}."):
        chat(ScriptedEngine(), "time?", tools=(path,))


def test_a_log_of_one_answer(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    chat(ScriptedEngine(["a", "b"]), "q", stats_json=str(log))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
