"""Ten turns with tools: what the session holds is never read again, thinking included."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from localmimo import load
from localmimo.engine import Engine
from quant import convert
from tests.tiny import make_checkpoint

from . import bpe

CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}}}
CALL = "<tool_call>\n<function=clock>\n\n<parameter=at> 0{}</parameter></function></tool_call>"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = make_checkpoint(tmp_path_factory.mktemp("retention") / "hf", layout="fused-fp8", vocab_size=512)
    bpe.small().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    for _ in convert(folder, folder.parent / "pack"):
        pass
    with load(folder.parent / "pack", context=4096) as engine:
        assert engine.template.name == "mimo-v2.5" and engine.template.think_default
        yield engine


class Script:
    """Stands in for the drawing of tokens: the model says these texts, cut as encode() would not."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = engine.tokenizer
        self.tokens: list[int] = []
        monkeypatch.setattr("localmimo.generate.pick", lambda *_: self.tokens.pop(0))

    def says(self, text: str) -> None:
        parts = self._tokenizer._split.split(text)
        pieces = [
            piece
            for part in parts
            for piece in ([part] if part in self._tokenizer.added else re.findall(r"(?s).{1,5}", part))
        ]
        self.tokens = [token for piece in pieces for token in self._tokenizer.encode(piece)]
        self.tokens += self._tokenizer.encode("<|im_end|>")


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
    assert "hm" not in engine.decode(engine._prompts.write(again).tokens)


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
