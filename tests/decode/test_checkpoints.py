"""Checkpoints: which positions a session can return to, and that a return gives what was there."""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from localmimo import BadSession, Cancelled, ContextFull
from localmimo.decode.session import Session, step_together
from localmimo.engine import Engine
from localmimo.kv.block_table import BlockTable
from localmimo.limits import N_SNAPSHOTS, SLACK

pytestmark = pytest.mark.engine("bf16_pack", context=128, dtype="float32")


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with engine.session() as session:
        session.rewind(session.position)
        yield session


def same(got: torch.Tensor, session: Session) -> None:
    """The logits are those of the session's tokens read at once, from an empty session."""
    expected = list(session.logits(list(session.tokens)))[-1][-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def step(session: Session, n: int) -> None:
    for token in tokens(n, seed=1):
        session.step(token)


def test_the_first_checkpoint_stays_and_of_the_others_the_last(session: Session) -> None:
    session.sync(tokens(5))
    assert session.checkpoints == [5]
    for _ in range(N_SNAPSHOTS + 2):
        step(session, 10)
        session.checkpoint()
        session.checkpoint()  # again: once is enough
    last = [5 + 10 * (i + 1) for i in range(N_SNAPSHOTS + 2)][-(N_SNAPSHOTS - 1) :]
    assert session.checkpoints == [5, *last]


@pytest.mark.parametrize(("length", "left"), [(29, [10]), (30, [10, 30]), (31, [10, 30]), (9, [])])
def test_a_rewind_keeps_the_checkpoints_up_to_its_position(
    session: Session, length: int, left: list[int]
) -> None:
    session.sync(tokens(10))
    step(session, 20)
    session.checkpoint()
    step(session, 10)
    session.checkpoint()
    session.rewind(session.position - length)
    assert session.checkpoints == left and session.position == length
    same(session.step(7), session)


def test_a_return_goes_to_the_last_checkpoint_that_fits(session: Session) -> None:
    prompt = tokens(100)
    for n in (20, 40, 60):
        session.sync(prompt[:n])
    step(session, 2 * SLACK)
    branch = [*prompt[:50], 5, 6]
    got = session.sync(branch)
    assert session.n_reused == 40 and session.tokens == branch
    same(got, session)


def test_a_prompt_that_is_held_as_a_beginning_reads_one_token_at_most(session: Session) -> None:
    prompt = tokens(60)
    session.sync(prompt)
    for back in (1, SLACK - 1, SLACK, SLACK + 1, SLACK + 2):
        session.sync(prompt)
        got = session.sync(prompt[:-back])
        assert session.tokens == prompt[:-back]
        assert session.n_reused >= len(prompt) - back - 1 or back > SLACK
        same(got, session)


def damaged(raw: bytes, at: int, value: bytes) -> bytes:
    """A saved session with other bytes at a place of its data, and the checksum that fits them."""
    start = 8 + int.from_bytes(raw[:8], "little")
    data = raw[start : start + at] + value + raw[start + at + len(value) :]
    old, new = (f"{zlib.crc32(part):08x}".encode() for part in (raw[start:], data))
    assert raw[:start].count(old) == 1
    return raw[:start].replace(old, new) + data


def offset_of(raw: bytes, name: str) -> int:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize("token", [-1, 160, 1 << 30])
def test_a_file_with_impossible_tokens_is_refused_and_leaves_an_empty_session(
    session: Session, tmp_path: Path, token: int
) -> None:
    session.sync(tokens(40))
    session.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(damaged(raw, offset_of(raw, "tokens"), struct.pack("<i", token)))
    with pytest.raises(BadSession, match="tokens that the model does not have"):
        session.load(tmp_path / "s")
    assert session.tokens == [] and session.checkpoints == []
    same(session.sync(tokens(20, seed=3)), session)


@pytest.mark.parametrize("places", [(30, 30), (40, 30), (0, 40), (30, 41), (-1, 40)])
def test_a_file_with_impossible_checkpoints_is_refused(
    session: Session, tmp_path: Path, places: tuple[int, int]
) -> None:
    session.sync(tokens(30))
    session.sync(tokens(40))
    session.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    at = offset_of(raw, "marks")
    (tmp_path / "same").write_bytes(damaged(raw, at, struct.pack("<2i", 30, 40)))
    session.load(tmp_path / "same")
    assert session.checkpoints == [30, 40]
    (tmp_path / "s").write_bytes(damaged(raw, at, struct.pack("<2i", *places)))
    with pytest.raises(BadSession, match="places"):
        session.load(tmp_path / "s")


def test_a_file_that_is_damaged_leaves_an_empty_session(session: Session, tmp_path: Path) -> None:
    session.sync(tokens(40))
    session.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BadSession, match="damaged"):
        session.load(tmp_path / "s")
    assert session.tokens == [] and session.checkpoints == []
    same(session.sync(tokens(40)), session)


@pytest.mark.parametrize("n", [SLACK, SLACK + 1, 2 * SLACK])
def test_a_stop_in_a_pass_of_any_length_leaves_the_session_as_it_was(session: Session, n: int) -> None:
    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Cancelled("enough")

    calls = 0
    session.sync(tokens(60))
    with pytest.raises(Cancelled):
        session.extend(tokens(n, seed=5), stop)
    assert session.tokens == tokens(60)
    same(session.step(9), session)


@pytest.mark.engine("bf16_pack", context=40, dtype="float32", max_batch=2)
def test_steps_together_happen_for_all_or_for_none(engine: Engine) -> None:
    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Cancelled("enough")

    with engine._sessions.use(2) as (first, second):
        first.sync(tokens(39))
        second.sync(tokens(40, seed=2))
        with pytest.raises(ContextFull):
            step_together([first, second], [5, 6])
        assert first.position == 39 and second.position == 40
        second.rewind(20)
        calls = 0
        with pytest.raises(Cancelled):
            step_together([first, second], [5, 6], stop)
        assert first.position == 39 and second.position == 20
        got = step_together([first, second], [5, 6])
        same(got[0], first)
        same(got[1], second)


@pytest.mark.engine("bf16_pack", context=40, dtype="float32", max_batch=2)
@pytest.mark.parametrize("call", range(1, 6))
def test_steps_together_that_are_stopped_at_any_layer_leave_no_rows(engine: Engine, call: int) -> None:
    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Cancelled("enough")

    with engine._sessions.use(2) as pair:
        pair[0].sync(tokens(20))
        pair[1].sync(tokens(25, seed=2))
        calls = 0
        with pytest.raises(Cancelled):
            step_together(pair, [5, 6], stop)
        for session, n in zip(pair, (20, 25), strict=True):
            cache = session._state.cache
            assert session.position == n
            assert [layer.length for layer in cache.layers] == [n] * len(cache.layers)


@pytest.mark.engine("bf16_pack", context=1024, dtype="float32")
@pytest.mark.parametrize(("n_shared", "kept"), [(400, True), (200, False)])
def test_a_long_beginning_that_is_read_again_gets_a_checkpoint(
    session: Session, n_shared: int, kept: bool
) -> None:
    session.sync(tokens(600))
    branch = [*tokens(n_shared), *tokens(100, seed=4)]
    session.sync(branch)
    assert session.n_reused == 0
    assert session.checkpoints == [*([n_shared] if kept else []), len(branch)]


def test_a_return_within_the_slack_keeps_what_is_before_it(session: Session) -> None:
    """The windows are cut, not replaced by the checkpoint's: a rewind from there reads nothing."""
    session.sync(tokens(60))
    step(session, 3)
    session.sync(tokens(60))
    calls: list[int] = []
    session._read = lambda *arguments: calls.append(1)  # type: ignore[method-assign]
    session.rewind(5)
    assert session.position == 55 and not calls
    same(session.step(7), session)


@pytest.mark.parametrize(("n", "refused"), [(39, False), (40, False), (41, True)])
def test_a_file_may_fill_the_context_and_no_more(
    session: Session, engine: Engine, tmp_path: Path, n: int, refused: bool
) -> None:
    session.sync(tokens(n))
    session.save(tmp_path / "s")
    small = Session(session._model, session._experts, 40, torch.float32, identity=session._identity)
    if refused:
        with pytest.raises(BadSession, match="41 tokens and the context has 40"):
            small.load(tmp_path / "s")
        assert small.tokens == []
    else:
        small.load(tmp_path / "s")
        assert small.tokens == tokens(n)


class Pool:
    """Slots of a pretended GPU for keys and values."""

    def __init__(self) -> None:
        self.slab = torch.zeros(60, 1 << 16, dtype=torch.uint8)
        self.unused = list(range(60))

    def allocate(self, table: BlockTable, n: int) -> list[int]:
        taken, self.unused = self.unused[:n], self.unused[n:]
        return taken

    def free(self, slots: Sequence[int]) -> None:
        self.unused += slots


@pytest.fixture
def pooled(session: Session) -> Session:
    """A session whose global layers are in slots of a pool."""
    return Session(
        session._model, session._experts, 1024, torch.float32, identity=session._identity, pool=Pool()
    )


@pytest.mark.engine("bf16_pack", context=1024, dtype="float32")
def test_a_damaged_file_takes_no_slots(session: Session, pooled: Session, tmp_path: Path) -> None:
    session.sync(tokens(1000))
    session.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    pooled.load(tmp_path / "s")
    n_free = len(pooled._state.cache._blocks.pool.unused)
    assert pooled.tokens == tokens(1000) and n_free < 58
    (tmp_path / "s").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BadSession, match="damaged"):
        pooled.load(tmp_path / "s")
    assert pooled.tokens == [] and len(pooled._state.cache._blocks.pool.unused) >= 59


@pytest.mark.engine("bf16_pack", context=1024, dtype="float32")
def test_a_sequence_whose_slots_were_lost_is_read_from_its_beginning(
    session: Session, pooled: Session, tmp_path: Path
) -> None:
    session.sync(tokens(1000))
    session.save(tmp_path / "s")
    pooled.load(tmp_path / "s")
    blocks = pooled._state.cache._blocks
    assert pooled._state.cache.is_whole
    blocks.relocate({blocks.slots[0]: 7})  # all others are lost
    assert not pooled._state.cache.is_whole
    read: list[int] = []

    def forward(tokens, check, report=None):  # type: ignore[no-untyped-def]
        read.append(pooled.position)
        raise Cancelled("enough")

    pooled._forward = forward  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        pooled.sync([*tokens(1000), 5])
    assert read == [0] and pooled.tokens == [] and pooled.checkpoints == []
