"""Heavier clients (extra clients): the llm command line, and an agent of openai-agents that calls a tool."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.running import Running, Scripted
from tests.serve.samples import CALL

THOUGHT = "<think>Hm, rivers.</think>"


def test_the_llm_command_line(server: Running, script: Scripted, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="the extra clients is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mimo\n  model_name: mimo\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def llm(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            capture_output=True, text=True, env=environment, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    script.say(THOUGHT + "They flow.", THOUGHT + "To the sea.")
    assert llm("-m", "mimo", "Tell me about rivers.").strip() == "They flow."
    assert llm("-m", "mimo", "-c", "--no-stream", "Where to?").strip() == "To the sea."


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_an_agent_calls_a_tool(server: Running, script: Scripted, dialect: str) -> None:
    agents = pytest.importorskip("agents", reason="the extra clients is not installed")
    import openai

    asked: list[tuple[str, int]] = []

    @agents.function_tool
    def get_weather(city: str, days: int) -> str:
        """The weather in a city.

        Args:
            city: Where.
            days: How many days ahead.
        """
        asked.append((city, days))
        return "rain"

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
    model = kinds[dialect](model="random-tiny", openai_client=client)
    agents.set_tracing_disabled(True)
    agent = agents.Agent(name="weather", instructions="Use the tool.", model=model, tools=[get_weather])
    script.say(THOUGHT + CALL, THOUGHT + CALL.replace("Oslo", "Rome"), "Rain in both.")
    done = asyncio.run(agents.Runner.run(agent, "How is the weather in Oslo and in Rome?"))
    assert done.final_output == "Rain in both."
    assert asked == [("Oslo", 2), ("Rome", 2)]
