"""A session's answers depend on its tokens alone: not on how it came to hold them."""

import pytest
import torch

from localmimo import BadRequest, Cancelled, ContextFull
from localmimo.engine import Engine

pytestmark = pytest.mark.engine("bf16_pack", context=128, dtype="float32")

W = 8


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def fresh(engine: Engine, prompt: list[int]) -> torch.Tensor:
    return engine.logits(prompt)[-1]


@pytest.mark.parametrize("common", [0, 1, W, 30, 49, 50])
def test_sync_keeps_the_common_prefix(engine: Engine, common: int) -> None:
    first, second = tokens(50), tokens(50)[:common] + tokens(20, seed=1)
    expected = fresh(engine, second)
    with engine.session() as session:
        session.sync(first)
        same(session.sync(second), expected)
        assert session.tokens == second
        assert session.n_reused <= common


def test_a_longer_prompt_reads_only_what_is_new(engine: Engine) -> None:
    with engine.session() as session:
        session.sync(tokens(50))
        session.sync(tokens(60))
        assert session.n_reused == 50


def test_the_same_prompt_again_reads_nothing(engine: Engine) -> None:
    expected = fresh(engine, tokens(50))
    with engine.session() as session:
        session.sync(tokens(50))
        for token in tokens(40, seed=2):
            session.step(token)
        same(session.sync(tokens(50)), expected)
        assert session.n_reused == 50


def test_rewind_within_and_beyond_the_slack(engine: Engine) -> None:
    for n in (1, 5, 40, 99):
        with engine.session() as session:
            session.sync(tokens(60))
            for token in tokens(20, seed=3):
                session.step(token)
            session.rewind(n)
            kept = (tokens(60) + tokens(20, seed=3))[: max(0, 80 - n)]
            assert session.tokens == kept
            after = session.step(7)
        same(after, fresh(engine, [*kept, 7]))


@pytest.mark.engine("bf16_pack", context=128, dtype="float32", draft=0)
@pytest.mark.parametrize("n", range(1, 13))
def test_a_restored_session_is_rewound_to_what_it_was(engine: Engine, n: int) -> None:
    """A checkpoint has one window of keys; a rewind behind its oldest one must read again."""
    with engine.session() as session:
        session.sync(tokens(50))
        for token in tokens(40, seed=2):
            session.step(token)
        session.sync(tokens(50))
        session.rewind(n)
        after = session.step(7)
    same(after, fresh(engine, [*tokens(50)[:-n], 7]))


@pytest.mark.engine("bf16_pack", context=128, dtype="float32", draft=0)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_prefix_without_a_hidden_state_gives_its_logits(engine: Engine, n: int) -> None:
    """After a checkpoint only the last hidden states are known; a shorter prompt is read from before its end."""
    shorter = tokens(50)[:-n]
    expected = fresh(engine, shorter)
    with engine.session() as session:
        session.sync(tokens(50))
        for token in tokens(40, seed=2):
            session.step(token)
        session.sync(tokens(50))
        same(session.sync(shorter), expected)
        assert session.tokens == shorter


@pytest.mark.engine("bf16_pack", context=128, dtype="float32", draft=0)
def test_a_rewind_to_an_unknown_hidden_state_leaves_no_checkpoint(engine: Engine) -> None:
    expected = fresh(engine, tokens(49))
    with engine.session() as session:
        session.rewind(10**6)
        session.sync(tokens(50))
        for token in tokens(40, seed=2):
            session.step(token)
        session.sync(tokens(50))
        session.rewind(1)
        before = session.checkpoints
        session.checkpoint()
        assert session.checkpoints == before and 49 not in before
        same(session.sync(tokens(49)), expected)


def test_the_first_checkpoint_and_the_last_ones_are_kept(engine: Engine) -> None:
    with engine.session() as session:
        session.rewind(session.position)
        for n in range(10, 70, 10):
            session.sync(tokens(n))
        assert session.checkpoints == [10, 40, 50, 60]
        session.rewind(10)  # to the very length of one: it stays
        assert session.checkpoints == [10, 40, 50]
        session.rewind(1)
        assert session.checkpoints == [10, 40]


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_a_stop_between_layers_leaves_whole_tokens(engine: Engine, layer: int) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == layer:
            raise Cancelled("enough")

    with engine.session() as session:
        session.sync(tokens(30))
        with pytest.raises(Cancelled):
            session.sync(tokens(30) + tokens(40, seed=4), check=stop)
        assert session.tokens == tokens(30)
        got = session.sync([*tokens(30), 9])
    same(got, fresh(engine, [*tokens(30), 9]))


def test_a_full_context_is_refused_with_the_numbers(engine: Engine) -> None:
    with engine.session() as session, pytest.raises(ContextFull, match=r"129 .*128"):
        session.sync(tokens(129))
    with engine.session() as session:
        session.sync(tokens(128))
        with pytest.raises(ContextFull, match="129"):
            session.step(5)


def test_empty_and_foreign_tokens_are_refused(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="empty"):
        engine.logits([])
    with pytest.raises(BadRequest, match="vocabulary of 160"):
        engine.logits([5, 160])
    with engine.session() as session, pytest.raises(BadRequest, match="empty"):
        session.sync([])


def test_the_timeline_is_lent_once(engine: Engine) -> None:
    with engine.session(), pytest.raises(BadRequest, match="already"):
        engine.logits([5])
