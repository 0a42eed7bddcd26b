"""The same ten turns of tools and thinking through every interface, with drafts: the same tokens, nothing read twice.

The embedded model with three draft heads that often err, so that sessions are rewound all the time.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from localmimo.chat.turn_cache import TurnCache as Kept
from localmimo.cli.terminal.conversation import ChatSettings
from localmimo.cli.terminal.repl import Repl
from localmimo.cli.terminal.screen import Screen
from localmimo.decode.generation import Generation
from localmimo.engine import Engine
from localmimo.tools.tool import tools_of
from tests.decode.script import Script
from tests.scripted import Capture, ScriptedReader

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from tests.serve import conversations as talks
from tests.serve.running import Running

pytestmark = pytest.mark.engine(None, context=4096, draft=3, profile=None)

TOOLS = 'def get_weather(city: str, days: int) -> str:\n    return "rain"\n'


def get_weather(city: str, days: int) -> str:
    return "rain"


@dataclass
class AnswerRecord:
    """What was read, reused and said for each answer of a conversation."""

    prompts: list[list[int]] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    accepted: int = 0
    drafted: int = 0

    def restart(self, engine: Engine) -> None:
        """Forget all of it, and let the engine forget the answers and the session."""
        self.prompts, self.reused, self.said, self.accepted, self.drafted = [], [], [], 0, 0
        engine.prompts.turn_cache = Kept()
        with engine.session() as session:
            session.rewind(session.position)

    def check(self) -> None:
        """Each turn begins with all that was held after the one before."""
        assert len(self.prompts) == talks.N_TURNS and 0 < self.accepted < self.drafted
        for turn in range(1, talks.N_TURNS):
            before, now = self.prompts[turn - 1], self.prompts[turn]
            held = len(before) + self.said[turn - 1] - 1  # the end token was drawn, not held
            assert now[: len(before)] == before and self.reused[turn] == held
            assert len(now) - held < 40, f"turn {turn}: {len(now) - held} tokens were read"


@pytest.fixture
def turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AnswerRecord:
    """Filled as answers are made; one draft in four is wrong."""
    turns, rng = AnswerRecord(), random.Random(4)
    begin, guess, end = Generation.begin, Generation._draw_draft, Generation.end

    def begun(self: Generation, prompt: list[int]) -> Any:
        logits = begin(self, prompt)
        turns.prompts.append(list(prompt))
        turns.reused.append(self.session.n_reused)
        return logits

    def guessed(self: Generation, logits: Any, drafts: Any) -> int:
        token = guess(self, logits, drafts)
        return token if rng.random() < 0.75 else 7

    def ended(self: Generation) -> Any:
        turns.said.append(self.stats.generated_tokens)
        turns.accepted += sum(self.stats.drafts.accepted)
        turns.drafted += sum(self.stats.drafts.drafted)
        return end(self)

    monkeypatch.setattr(Generation, "begin", begun)
    monkeypatch.setattr(Generation, "_draw_draft", guessed)
    monkeypatch.setattr(Generation, "end", ended)
    engine.prompts.turn_cache = Kept()
    return turns


def by_python(engine: Engine, script: Script, folder: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": talks.QUESTION}]
    for text in talks.turns():
        script.says(text)
        reply = engine.chat(messages, tools=[get_weather])
        messages += [reply.as_dict(), *reply.run_tools()]


def by_repl(engine: Engine, script: Script, folder: Path) -> None:
    (folder / "tools.py").write_text(TOOLS)
    shown = Capture()
    reader = ScriptedReader(f"/tools {folder / 'tools.py'}", talks.QUESTION, "always")
    repl = Repl(reader, shown.ui, engine, settings=ChatSettings(stats=False), screen=Screen(shown.ui))
    script.says(*talks.turns())
    repl.run()
    repl.tool_approval.clear()


def by(client: Callable[[], talks.Client]) -> Callable[[Engine, Script, Path], None]:
    def talk(engine: Engine, script: Script, folder: Path) -> None:
        with Running(engine) as server:
            asking = client()
            for text in talks.turns():
                script.says(text)
                asking.request(server)

    return talk


INTERFACES: dict[str, Callable[[Engine, Script, Path], None]] = {
    "python": by_python,
    "repl": by_repl,
    "chat": by(talks.ChatClient),
    "chat that drops the thinking": by(lambda: talks.ChatClient(keep_thinking=False)),
    "messages": by(talks.MessagesClient),
    "responses": by(lambda: talks.ResponsesClient(by_id=False)),
    "responses by id": by(lambda: talks.ResponsesClient(by_id=True)),
    "completions": by(talks.CompletionsClient),
}


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_interface_holds_the_same_tokens(
    engine: Engine, turns: AnswerRecord, interface: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talks, "SCHEMA", tools_of([get_weather])[0][0]["function"]["parameters"])
    script = Script(engine, monkeypatch)
    INTERFACES["python"](engine, script, tmp_path)
    expected = turns.prompts
    turns.restart(engine)
    INTERFACES[interface](engine, script, tmp_path)
    turns.check()
    if interface != "completions":  # which sends text of its own
        assert turns.prompts == expected
