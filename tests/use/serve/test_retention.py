"""Over ten turns of tools and thinking nothing is read twice, whatever the dialect and whatever the client drops."""

import pytest

from localmimo.engine import Engine

from . import conversations as talks
from .running import Running, Scripted

CLIENTS = {
    "chat": talks.ChatClient(),
    "chat that drops the thinking": talks.ChatClient(keep_thinking=False),
    "messages": talks.MessagesClient(),
    "responses": talks.ResponsesClient(by_id=False),
    "responses by id": talks.ResponsesClient(by_id=True),
    "completions": talks.CompletionsClient(),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_every_turn_continues_the_last(server: Running, engine: Engine, script: Scripted, name: str) -> None:
    held = 0
    for text in talks.turns():
        script.say(text)
        prompt, cached, said = CLIENTS[name].ask(server)
        if held:
            assert cached == held, f"{held - cached} tokens were read again"
        held = prompt + said - 1  # the end token was drawn, not held
    assert held > 400
