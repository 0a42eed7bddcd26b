"""Ten turns with tools: what the session holds is never read again, thinking included."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmimo import load
from localmimo.chat.template import TEMPLATES
from localmimo.chat.turn_cache import TurnCache
from localmimo.cli.terminal.conversation import ChatSettings
from localmimo.cli.terminal.repl import Repl
from localmimo.cli.terminal.screen import Screen
from localmimo.engine import Engine
from quant import convert
from tests.chat import bpe
from tests.decode.script import Script
from tests.scripted import Capture, ScriptedReader
from tests.tiny import make_checkpoint

CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}}}
CALL = "<tool_call>\n<function=clock>\n\n<parameter=at> 0{}</parameter></function></tool_call>"
V25 = (TEMPLATES / "mimo-v2.5.jinja").read_text("utf-8")  # whose words are most of a prompt here


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("retention") / "hf", layout="fused-fp8", vocab_size=512, num_hidden_layers=3
    )
    bpe.small(CALL, CALL, str(CLOCK), V25).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    for _ in convert(folder, folder.parent / "pack"):
        pass
    with load(folder.parent / "pack", context=4096) as engine:
        assert engine.template.name == "mimo-v2.5" and engine.template.think_default
        yield engine


@pytest.fixture
def script(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(engine, monkeypatch)


def turns() -> Iterator[tuple[list[dict[str, Any]], str]]:
    """(messages before it, what the model says) of ten turns."""
    for number in range(5):
        asked = [{"role": "user", "content": f"the <|im_end|> river {number}"}]
        yield asked, f"<think>\nthe river {number}</think>\n\nthe sea" + CALL.format(number)
        yield (
            [{"role": "tool", "content": f"<tool_response>\n{number}"}],
            f"<think>wide</think>the sea is {number}",
        )


def test_ten_turns_read_nothing_twice(engine: Engine, script: Script) -> None:
    messages: list[dict[str, Any]] = []
    held = 0
    for asked, said in turns():
        messages += asked
        script.says(said)
        reply = engine.chat(messages, tools=[CLOCK])
        assert reply.stats.reused_tokens == held
        assert reply.finish_reason == ("tool_calls" if reply.tool_calls else "stop")
        messages.append(reply.as_dict())
        held = reply.stats.prompt_tokens + reply.stats.generated_tokens - 1  # the end token is not read
    assert reply.stats.prompt_tokens - reply.stats.reused_tokens < 60 < held


def test_so_do_clients_that_send_json(engine: Engine, script: Script) -> None:
    """As through HTTP: new objects each time, the arguments as text, null for no content."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "the river"}]
    script.says("<think>hm</think>" + CALL.format(7))
    first = engine.chat(messages, tools=[CLOCK])
    said = json.loads(json.dumps(first.as_dict())) | {"content": None, "annotations": []}
    messages += [said, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "noon"}]
    script.says("<think>so</think>noon")
    second = engine.chat(messages, tools=[json.loads(json.dumps(CLOCK))])
    assert second.stats.reused_tokens == first.stats.prompt_tokens + len(first.tokens)


def test_a_dropped_thinking_is_another_conversation(engine: Engine, script: Script) -> None:
    messages = [{"role": "user", "content": "the river"}]
    script.says("<think>hm</think>the sea")
    first = engine.chat(messages)
    script.says("<think>so</think>wide")
    again = [*messages, {"role": "assistant", "content": "the sea"}, *messages]
    second = engine.chat(again)
    assert second.stats.reused_tokens <= first.stats.prompt_tokens + 1  # <think> opens both
    assert "hm" not in engine.decode(engine.prompts.build(again).tokens)


# ---- the same at the terminal ----

TOOLS = 'def clock(at: int) -> str:\n    "The time."\n    return f"{at}:00"\n'


class Talk:
    """A Repl over the real engine; how many tokens of each prompt were held already, and were not."""

    def __init__(self, engine: Engine, script: Script, folder: Path) -> None:
        (folder / "tools.py").write_text(TOOLS)
        self.shown = Capture()
        self.reader = ScriptedReader()
        self.repl = Repl(
            self.reader,
            self.shown.ui,
            engine,
            settings=ChatSettings(stats=False),
            screen=Screen(self.shown.ui),
        )
        self.script = script
        self.enter(f"/tools {folder / 'tools.py'}")

    def enter(self, *entries: str, says: str = "") -> tuple[int, int]:
        if says:
            self.script.says(says)
        self.reader.entries = list(entries)
        self.repl.run()
        stats = self.repl.last.stats if self.repl.last else None
        return (stats.reused_tokens, stats.prompt_tokens - stats.reused_tokens) if stats else (0, 0)


@pytest.fixture
def talk(engine: Engine, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path / "home"))
    talk = Talk(engine, script, tmp_path)
    yield talk
    talk.repl.tool_approval.clear()


def test_the_repl_reads_nothing_twice(talk: Talk, engine: Engine) -> None:
    script, held = talk.script, 0
    for number in range(5):
        script.says(
            f"<think>hm {number}</think>\n\n" + CALL.format(number), f"<think>so</think>it is {number}"
        )
        reused, _ = talk.enter(f"the <|im_end|> river {number}", "always" if not number else "")
        assert reused > held
        with engine.session() as session:
            held = session.position
    roles = [message["role"] for message in talk.repl.messages]
    assert roles == ["user", "assistant", "tool", "assistant"] * 5


def test_retry_and_undo_read_nothing(talk: Talk, engine: Engine) -> None:
    long = " the river runs to the sea, and the sea is wide" * 3  # longer than a window
    talk.enter("the river", says="<think>hm</think>" + long)
    with engine.session() as session:
        first = session.position
    talk.enter("the sea", says="<think>hm</think>" + long)
    assert talk.enter("/retry", says="<think>so</think>" + long)[1] == 0
    _, read = talk.enter("/undo", "the sky", says="<think>no</think>wide")
    with engine.session() as session:
        assert session.n_reused == first
    assert read < 30


def test_a_saved_conversation_is_not_read_again(talk: Talk, engine: Engine, tmp_path: Path) -> None:
    talk.enter("the river", says="<think>hm</think>the sea")
    talk.enter("and the sky", "/save my talk", says="<think>hm</think>wide")
    folder = tmp_path / "home" / "sessions" / "my talk"
    assert sorted(path.name for path in folder.iterdir()) == ["kv.safetensors", "messages.json"]
    assert "  saved, " in talk.shown.err and (folder / "messages.json").stat().st_mode & 0o077 == 0
    with engine.session() as session:
        held = list(session.tokens)
    engine.prompts.turn_cache = TurnCache()  # another process knows nothing
    talk.script.says("no")
    engine.chat([{"role": "user", "content": "something else"}])
    other = Talk(engine, talk.script, tmp_path)
    other.enter("/load", "/load my talk")
    assert other.shown.err.endswith(
        f"  my talk\n  the last question: and the sky\n  2 questions · {len(held)} tokens held · 1 to read\n"
    )
    reused, _ = other.enter("more", says="<think>hm</think>so")
    assert reused == len(held) and len(other.repl.messages) == 6
    other.repl.tool_approval.clear()


def test_what_keeps_a_saved_conversation_from_being_held(talk: Talk, tmp_path: Path) -> None:
    talk.enter("the river", "/save talk", says="<think>hm</think>the sea")
    talk.enter("/tools off", "/load talk")
    assert (
        "Its prompt is written differently now (other tools or another template). It is read"
        in talk.shown.err
    )
    kv = tmp_path / "home" / "sessions" / "talk" / "kv.safetensors"
    kv.write_bytes(kv.read_bytes()[:-9])
    talk.enter(f"/tools {tmp_path / 'tools.py'}", "/load talk")
    assert "It is read again with your next message." in talk.shown.err.splitlines()[-2]
    assert talk.enter("more", says="<think>hm</think>so")[1] > 0 and len(talk.repl.messages) == 4


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("/save ../out", 'error: "../out" cannot be a session\'s name: use letters, digits'),
        ("/save a/b", 'error: "a/b" cannot be a session'),
        ("/load .", 'error: "." cannot be a session'),
        ("/load none", "error: There is no saved session none."),
        ("/save x", "error: The conversation is empty: there is nothing to save."),
        ("/load", "  Nothing is saved yet; /save keeps this conversation."),
    ],
)
def test_sessions_that_cannot_be(talk: Talk, entry: str, says: str) -> None:
    talk.enter(entry)
    assert talk.shown.err.splitlines()[-1].startswith(says)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 7}', '{"version": 1, "system": null, "messages": [7]}']
)
def test_a_broken_file_is_a_sentence(talk: Talk, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "home" / "sessions" / "bad"
    folder.mkdir(parents=True)
    (folder / "messages.json").write_text(text)
    talk.enter("/load bad")
    assert "messages.json cannot be read as a session: " in talk.shown.err.splitlines()[-1]


def test_writing_over_another_conversation_is_asked(talk: Talk) -> None:
    talk.enter("the river", "/save one", says="<think>hm</think>the sea")
    talk.enter("/clear")
    talk.enter("the sea", "/save one", "n", "/save one", "y", "/save", says="<think>hm</think>the sea")
    assert talk.reader.questions == ["  one exists; write over it? [y/N] "] * 2
    assert talk.shown.err.count("  saved, ") == 3


# ---- agents ----


def test_an_agent_reads_nothing_twice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(engine, monkeypatch)
    asked: list[int] = []

    def clock(at: int) -> str:
        "The time."
        asked.append(at)
        script.says("<think>so</think>noon")
        return f"{at}:00"

    script.says("<think>hm</think>" + CALL.format(7))
    run = engine.agent([{"role": "user", "content": "the river"}], [clock])
    assert asked == [7] and run.n_steps == 2 and run.answer.content == "noon"
    assert [message["role"] for message in run.messages] == ["user", "assistant", "tool", "assistant"]
    assert run.answer.stats.prompt_tokens - run.answer.stats.reused_tokens < 40

    script.says(CALL.format(8))
    reply = engine.chat([{"role": "user", "content": "the sea"}], tools=[clock])
    assert [message["content"] for message in reply.run_tools()] == ["8:00"]
