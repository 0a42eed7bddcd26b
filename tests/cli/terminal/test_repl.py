"""Conversations, to the letter: entries and a scripted engine in, stdout and stderr out."""

import json
from pathlib import Path
from typing import Any

import pytest

from localmimo.cli.terminal.conversation import ChatSettings
from localmimo.cli.terminal.repl import Repl
from localmimo.cli.terminal.screen import Screen
from localmimo.decode.options import OPTIONS, SAMPLING_OPTIONS
from localmimo.errors import BadRequest
from tests.scripted import INTERRUPT, Capture, ScriptedEngine, ScriptedReader, full


def converse(
    engine: ScriptedEngine, *entries: Any, stats: bool = False, **settings: Any
) -> tuple[Repl, Capture]:
    shown = Capture(**settings)
    screen = Screen(shown.ui)
    repl = Repl(ScriptedReader(*entries), shown.ui, engine, settings=ChatSettings(stats=stats), screen=screen)  # type: ignore[arg-type]
    repl.run()
    return repl, shown


def test_a_question_and_its_answer() -> None:
    engine = ScriptedEngine(["A ring", " buffer is", " a ring."])
    repl, shown = converse(engine, "explain ring buffers", stats=True)
    assert shown.out == "A ring buffer is a ring.\n"
    assert shown.err == (
        "  3+3 tokens · 4.0 tok/s · first token 9.2 s · experts ram 71% disk 29%\n  context 6/32,768\n"
    )
    assert repl.messages == [
        {"role": "user", "content": "explain ring buffers"},
        {"role": "assistant", "content": "A ring buffer is a ring."},
    ]


def test_the_conversation_travels_along() -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "one"], ["two"])
    converse(engine, "a", "/system Be brief.", "b")
    messages, options = engine.asked[1]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one", "reasoning_content": "hm"},
        {"role": "user", "content": "b"},
    ]
    assert options["sampling"].temperature == 0.7 and options["think"] is None


def test_thinking_goes_to_stderr() -> None:
    engine = ScriptedEngine(["<think>", "hm ", "so", "</think>", "one", "\ntwo"])
    _, shown = converse(engine, "a", "/thoughts")
    assert shown.out == "one\ntwo\n"
    assert shown.err == "thinking: hm so\nhm so\n"


def test_ctrl_c_keeps_the_partial_answer() -> None:
    engine = ScriptedEngine(["one ", "two ", INTERRUPT, "three"], ["four"])
    repl, shown = converse(engine, "count", "go on", stats=True)
    assert shown.out == "one two \nfour\n"
    assert shown.err.startswith("  stopped · 1+2 tokens · 4.0 tok/s · ")
    assert engine.asked[1][0][1] == {"role": "assistant", "content": "one two "}
    assert len(repl.messages) == 4


def test_ctrl_c_before_the_first_word_takes_the_question_back() -> None:
    engine = ScriptedEngine([INTERRUPT, "x"], ["y"])
    repl, shown = converse(engine, "count", "/retry")
    assert shown.err == "  stopped before the first word; /retry asks again\n"
    assert [message["content"] for message in repl.messages] == ["count", "y"]


def test_ctrl_c_at_the_prompt_hints_the_second_time() -> None:
    _, shown = converse(ScriptedEngine(), INTERRUPT, INTERRUPT)
    assert shown.err == "Ctrl-D or /exit leaves.\n"


def test_errors_are_sentences_and_the_conversation_goes_on() -> None:
    engine = ScriptedEngine(full(40_000, 32_768), ["fine"])
    repl, shown = converse(engine, "long", "short")
    assert shown.err == "error: The prompt has 40,000 tokens and the context 32,768.\n"
    assert [message["content"] for message in repl.messages] == ["short", "fine"]


def test_an_answer_cut_short_says_so() -> None:
    _, shown = converse(ScriptedEngine(["a", "b"]), "/set max-tokens=2", "go")
    assert shown.err.splitlines()[-1] == "  cut at --max-tokens"


def test_retry_and_undo() -> None:
    engine = ScriptedEngine(["one"], ["two"], ["three"])
    repl, shown = converse(engine, "a", "b", "/retry", "/undo", "/undo", "/undo", "/clear", "/retry")
    assert shown.out == "one\ntwo\nthree\n"
    assert [message["content"] for message in engine.asked[2][0]] == ["a", "one", "b"]
    assert shown.err.splitlines() == [
        "  The last question and its answer are gone; 1 left.",
        "  The last question and its answer are gone; 0 left.",
        "error: There is nothing to take back.",
        "  The conversation is empty.",
        "error: There is nothing to ask again.",
    ]
    assert repl.messages == []


def test_clear_keeps_the_system_prompt() -> None:
    engine = ScriptedEngine(["one"], ["two"])
    _, shown = converse(engine, "/system S", "a", "/clear", "b")
    assert engine.asked[1][0] == [{"role": "system", "content": "S"}, {"role": "user", "content": "b"}]
    assert shown.err == (
        "  The system prompt holds from the next message on.\n"
        "  The conversation is empty, the system prompt stays.\n"
    )


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("/hlep", "Unknown command /hlep. Did you mean /help? To send it as text, start with //."),
        (
            "/etc/passwd",
            "Unknown command /etc/passwd. /help lists the commands. To send it as text, start with //.",
        ),
        ("/set temp=hot", 'error: /set temp: "hot" is not a number.'),
        ("/set temp=-1", "error: temperature -1.0 is negative; 0 takes the likeliest token."),
        ("/set max-tokens=0", "error: /set max-tokens: 0 is too few; it must be at least 1, or off."),
        ("/set speed=9", "error: /set speed=9: write name=value, the name one of temperature, "),
        ("/think maybe", 'error: /think is "maybe"; write a number such as 4096 or 32k.'),
        ("/read", "error: /read: name at least one file."),
        ("/read /no/such/file", "error: There is no file /no/such/file."),
        ('/read "', "error: /read: No closing quotation."),
        ("/undo", "error: There is nothing to take back."),
        ("/retry", "error: There is nothing to ask again."),
        ("/thoughts", "  The last answer came without thinking."),
        ("/system", "  No system prompt: the model's own is used."),
        ("/think 64", "  thinking on, at most 64 tokens"),
        ("/think", "  thinking off"),
    ],
)
def test_commands_answer(entry: str, says: str) -> None:
    engine = ScriptedEngine()
    _, shown = converse(engine, entry)
    assert shown.err.startswith(says)
    assert not engine.asked


def test_set_and_think_reach_the_engine() -> None:
    engine = ScriptedEngine(["x"], ["y"])
    converse(engine, "/set temp=0 top-p=0.5 seed=7", "/think 64", "a", "/think off", "/set seed=off", "b")
    first, second = (options for _, options in engine.asked)
    assert (first["sampling"].temperature, first["sampling"].top_p, first["sampling"].seed) == (0, 0.5, 7)
    assert (first["think"], first["think_budget"]) == (True, 64)
    assert (second["think"], second["think_budget"], second["sampling"].seed) == (False, None, None)


def test_set_alone_shows_what_holds() -> None:
    shown = " · ".join(converse(ScriptedEngine(), "/set")[1].err.split("\n")).replace("  ", "").strip(" ·")
    declared = {**SAMPLING_OPTIONS, "max_tokens": OPTIONS["max_tokens"]}
    assert shown.split(" · ") == [
        f"{option.set_names[0]} {'off' if option.default is None else option.default}"
        for option in declared.values()
        if option.set_names
    ]
    assert (
        "temperature 0.7 · top-k 0 · top-p 0.95 · min-p 0.0" in shown and "seed off · max-tokens off" in shown
    )


def test_files_go_with_the_next_message(tmp_path: Path) -> None:
    (tmp_path / "my notes.txt").write_text("one two three")
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe")
    engine = ScriptedEngine(["ok"], ["ok"])
    entries = (f'/read "{tmp_path}/my notes.txt"', f"/read {tmp_path}/bad.bin", "sum up", "and?")
    _, shown = converse(engine, *entries)
    assert shown.err == (
        "  my notes.txt: 3 tokens, goes with your next message\n"
        f"error: {tmp_path}/bad.bin is no UTF-8 text.\n"
    )
    assert engine.asked[0][0][0]["content"] == "File my notes.txt:\none two three\n\nsum up"
    assert engine.asked[1][0][-1]["content"] == "and?"


def test_a_file_beyond_the_context_is_refused(tmp_path: Path) -> None:
    (tmp_path / "big").write_text("x " * 50)
    _, shown = converse(ScriptedEngine(context=40), f"/read {tmp_path}/big")
    assert shown.err == f"error: {tmp_path}/big has 50 tokens and the context 40; read a part of it.\n"


def test_two_slashes_send_one() -> None:
    engine = ScriptedEngine(["x"])
    converse(engine, "//etc is what?", "   ", "/exit", "never")
    assert [asked[0][0]["content"] for asked in engine.asked] == ["/etc is what?"]


def test_help_lists_every_command() -> None:
    _, shown = converse(ScriptedEngine(), "/help")
    lines = shown.err.splitlines()
    assert lines[0] == "  /help                  this list"
    assert [line.split()[0] for line in lines[:15]] == [
        "/help", "/exit", "/clear", "/system", "/set", "/think", "/thoughts", "/stats", "/retry", "/undo",
        "/edit", "/read", "/save", "/load", "/tools",
    ]  # fmt: skip


def test_stats_shows_the_configuration() -> None:
    _, shown = converse(ScriptedEngine(), "/stats")
    assert shown.err == "  model          scripted\n  experts        nf4\n  context        32768\n"


def test_quiet_says_only_the_answer() -> None:
    _, shown = converse(ScriptedEngine(["<think>a</think>", "b"]), "q", stats=True, quiet=True)
    assert (shown.out, shown.err) == ("b\n", "")


# ---- edit ----


def test_edit_brings_the_question_back() -> None:
    engine = ScriptedEngine(["one"], ["two"])
    repl, shown = converse(engine, "a", "/edit", "b")
    assert repl.reader.drafts == ["", "", "a", ""]  # type: ignore[attr-defined]
    assert [message["content"] for message in engine.asked[1][0]] == ["b"]
    assert "The last question is back at the prompt" in shown.err


# ---- tools ----

TOOLS = """
def clock(at: int, note: str = "") -> str:
    "The time."
    return f"{at}:00" + "\\n." * 20 * bool(note)

def wipe(path: str) -> str:
    raise SystemExit(path)
"""
CALL = "<tool_call><function=clock><parameter=at>7</parameter></function></tool_call>"
WIPE = "<tool_call><function=wipe><parameter=path>/\u202etxt</parameter></function></tool_call>"


@pytest.fixture
def tools(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(TOOLS)
    return str(tmp_path / "mine.py")


def test_a_call_is_shown_asked_about_and_answered(tools: str) -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "Well. ", CALL], ["<think>so</think>It is seven."])
    repl, shown = converse(engine, f"/tools {tools}", "time?", "y", "/tools off", "/thoughts")
    assert shown.out == "Well. \nIt is seven.\n"
    assert shown.err == (
        "  clock(at, note)  The time.\n  wipe(path)  \nthinking: hm\n  calls clock(at=7)\n  │ 7:00\nthinking: so\n"
        "  No tools; /tools FILE.py takes the functions of a Python file.\nhm\n\nso\n"
    )
    assert repl.reader.questions == ["  run clock? [y/N/always] "]  # type: ignore[attr-defined]
    said, result = engine.asked[1][0][-2:]
    assert said["reasoning_content"] == "hm" and said["content"] == "Well. "
    assert result == {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "7:00"}
    assert [message["role"] for message in repl.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("answer", ["", "n", "no", "yess", None])
def test_nothing_runs_without_a_yes(tools: str, answer: str | None) -> None:
    engine = ScriptedEngine([WIPE], ["As you like."])
    _, shown = converse(engine, f"/tools {tools}", "clean up", *([answer] if answer is not None else []))
    assert '  calls wipe(path="/\\u202etxt")\n  not run\n' in shown.err
    assert engine.asked[1][0][-1]["content"] == "error: the user declined this call."


def test_always_holds_for_one_function(tools: str) -> None:
    engine = ScriptedEngine([CALL + CALL], [CALL, WIPE], ["done"])
    repl, _ = converse(engine, f"/tools {tools}", "go", "always", "n", "/tools")
    assert len(repl.reader.questions) == 2  # type: ignore[attr-defined]
    assert [m["content"] for m in repl.messages if m["role"] == "tool"] == [
        "7:00", "7:00", "7:00", "error: the user declined this call."
    ]  # fmt: skip


def test_ctrl_c_at_the_question_ends_the_round(tools: str) -> None:
    engine = ScriptedEngine([CALL + CALL], ["fine"])
    repl, _ = converse(engine, f"/tools {tools}", "go", INTERRUPT, "next")
    assert [m["content"] for m in repl.messages if m["role"] == "tool"] == [
        "error: the user stopped this call.", "error: the user declined this call."
    ]  # fmt: skip
    assert repl.messages[-1]["content"] == "fine" and len(engine.asked) == 2


def test_undo_takes_the_calls_along(tools: str) -> None:
    engine = ScriptedEngine([CALL], ["seven"], ["again"])
    repl, _ = converse(engine, f"/tools {tools}", "time?", "y", "/retry", "/undo")
    assert [m["role"] for m in engine.asked[2][0]] == ["user"] and repl.messages == []


def test_a_long_result_is_shown_in_part(tools: str) -> None:
    call = CALL.replace("</function>", "<parameter=note>x\ny</parameter></function>")
    engine = ScriptedEngine([call], ["seven"])
    _, shown = converse(engine, f"/tools {tools}", "time?", "y")
    assert '  calls clock(at=7, note="""\n    x\n    y""")\n' in shown.err
    assert "  │ … 9 more lines, all of them for the model\n" in shown.err
    assert engine.asked[1][0][-1]["content"].count("\n") == 20


def test_a_call_of_no_tool_is_text(tools: str) -> None:
    engine = ScriptedEngine([CALL.replace("clock", "other")])
    repl, shown = converse(engine, f"/tools {tools}", "time?")
    assert "<function=other>" in shown.out and len(repl.messages) == 2


def test_a_file_that_is_no_tools_is_a_sentence(tmp_path: Path) -> None:
    _, shown = converse(ScriptedEngine(), f"/tools {tmp_path}/none.py")
    assert shown.err == f"error: There is no file {tmp_path}/none.py.\n"


# ---- the log of steps ----


def test_a_line_of_json_per_token(tmp_path: Path) -> None:
    from localmimo.cli.terminal.step_log import StepLog

    settings = ChatSettings(stats=False, log=StepLog(tmp_path / "steps.jsonl"))
    shown = Capture()
    repl = Repl(
        ScriptedReader("a", "b"), shown.ui, ScriptedEngine(["x", "y"], ["z"]),  # type: ignore[arg-type]
        settings=settings, screen=Screen(shown.ui),
    )  # fmt: skip
    repl.run()
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["step"], line["token"]) for line in lines] == [
        (1, 1, 0),
        (1, 2, 1),
        (2, 1, 0),
    ]
    assert [line["generated_tokens"] for line in lines] == [1, 1, 1]
    assert [line["pages_ram"] for line in lines] == [71, 71, 71]
    assert sum(lines[1]["drafts"]["drafted"]) == 0
    assert lines[0]["prompt_tokens"] == 1 and lines[1]["prompt_tokens"] == 0 and lines[0]["s"] >= 0


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    from localmimo.cli.terminal.step_log import StepLog

    with pytest.raises(BadRequest, match="--stats-json: .* cannot be written"):
        StepLog(tmp_path)
