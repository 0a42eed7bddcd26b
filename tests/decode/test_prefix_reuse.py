"""How many tokens are read again when a conversation goes on: never more than what is new, and what stood behind it."""

from pathlib import Path

import pytest
import torch

from localmimo import Sampling, load
from localmimo.decode.session import Session
from localmimo.engine import Engine

pytestmark = pytest.mark.engine("bf16_pack", context=2048, draft=0)

GREEDY = Sampling(temperature=0)


def text(n: int, seed: int) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(session: Session, prompt: list[int], n: int = 40) -> tuple[list[int], int]:
    """Read a prompt, say n tokens; what was said and how many tokens of the prompt were read."""
    logits = session.sync(prompt)
    read = len(prompt) - session.n_reused
    said = []
    for _ in range(n):
        said.append(int(logits.argmax()))
        logits = session.step(said[-1])
    session.checkpoint()
    return said, read


def test_a_turn_reads_what_is_new(engine: Engine) -> None:
    with engine.session() as session:
        session.rewind(10**6)
        prompt = text(100, 1)
        for turn in range(6):
            said, read = answer(session, prompt)
            assert read == (100 if turn == 0 else 20)
            prompt = prompt + said + text(20, 2 + turn)


def test_stripped_thinking_reads_the_answer_and_what_is_new(engine: Engine) -> None:
    with engine.session() as session:
        session.rewind(10**6)
        prompt = text(100, 1)
        for turn in range(6):
            said, read = answer(session, prompt)
            assert read == (100 if turn == 0 else 10 + 20)
            prompt = prompt + said[-10:] + text(20, 2 + turn)  # the first 30 were thinking


def test_a_tool_result_in_between(engine: Engine) -> None:
    """The call was said and is followed by its result: nothing of the turn is read again."""
    with engine.session() as session:
        session.rewind(10**6)
        prompt = text(100, 3)
        for step in range(4):
            said, read = answer(session, prompt, n=30)
            assert read == (100 if step == 0 else 15)
            prompt = prompt + said + text(15, 20 + step)


def test_undo_and_another_question(engine: Engine) -> None:
    with engine.session() as session:
        session.rewind(10**6)
        prompt = text(100, 4)
        said, _ = answer(session, prompt)
        first = prompt + said
        answer(session, first + text(30, 5))
        _, read = answer(session, first + text(25, 6))
        assert read == 25


def test_conversations_that_begin_alike_share_the_beginning(engine: Engine) -> None:
    system = text(600, 7)
    reads = []
    with engine.session() as session:
        session.rewind(10**6)
        for n in range(5):
            _, read = answer(session, system + text(50, 30 + n))
            reads.append(read)
            _, more = answer(session, session.tokens + text(10, 40 + n))
            assert more == 10
            held = session.sync(session.tokens)
            fresh = Session(engine._model, engine._experts, 2048, torch.bfloat16).sync(session.tokens)
            torch.testing.assert_close(
                held, fresh, rtol=0, atol=0.1
            )  # logits up to 20; reading in pieces rounds
    assert reads == [650, 650, 50, 50, 50]  # the second one finds out that the beginning is shared


def test_a_shared_beginning_changes_no_token(bf16_pack: Path) -> None:
    system = text(400, 8)
    with load(bf16_pack, context=2048, draft=0) as engine, engine.session() as session:
        for n in (1, 2, 3):
            said, _ = answer(session, system + text(50, n), n=8)
            with load(bf16_pack, context=2048, draft=0) as fresh, fresh.session() as other:
                assert answer(other, system + text(50, n), n=8)[0] == said


@pytest.mark.engine(None, context=2048, profile=None)
def test_conversations_of_the_embedded_model(engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is a lighthouse?"}]
    first = engine.chat(messages, sampling=GREEDY, max_tokens=80)
    messages += [first.as_dict(), {"role": "user", "content": "How do I make tea?"}]
    second = engine.chat(messages, sampling=GREEDY, max_tokens=40)
    new = second.stats.prompt_tokens - second.stats.reused_tokens
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + first.stats.generated_tokens - 2
    assert new < 30
    thought = engine.chat(
        [{"role": "user", "content": "What is 2 + 3?"}], think=True, sampling=GREEDY, max_tokens=80
    )
    stripped = thought.as_dict() | {"reasoning_content": ""}
    again = [
        {"role": "user", "content": "What is 2 + 3?"},
        stripped,
        {"role": "user", "content": "And 3 + 3?"},
    ]
    third = engine.chat(again, think=True, sampling=GREEDY, max_tokens=10)
    assert third.stats.reused_tokens >= thought.stats.prompt_tokens
