"""Saved sessions: what is loaded goes on as what was saved would have; a file that does not fit is refused."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localmimo import BadSession, load
from localmimo.decode.session import Session
from localmimo.engine import Engine
from tests.packs import make_pack

pytestmark = pytest.mark.engine("bf16_pack", context=160)

W = 8


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def follow(session: Session, n: int = 12) -> list[torch.Tensor]:
    """Greedy steps after what is held; the logits."""
    logits = [session.sync(session.tokens)]
    for _ in range(n):
        logits.append(session.step(int(logits[-1].argmax())))
    return logits


def count_forwards(session: Session) -> list[int]:
    read: list[int] = []
    forward = session._forward

    def counted(tokens, check):  # type: ignore[no-untyped-def]
        read.append(len(tokens))
        return forward(tokens, check)

    session._forward = counted  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("n", [1, W - 1, 3 * W, 100])
def test_a_loaded_session_goes_on_bit_for_bit(
    bf16_pack: Path, engine: Engine, tmp_path: Path, n: int
) -> None:
    path = tmp_path / "story.kv"
    with engine.session() as session:
        session.sync(tokens(n))
        for token in tokens(20, seed=1):
            session.step(token)
        n_bytes = session.save(path)
        expected, held = follow(session), session.tokens[: n + 20]
    assert n_bytes == path.stat().st_size and path.stat().st_mode & 0o077 == 0
    with load(bf16_pack, context=160) as other, other.session() as session:
        read = count_forwards(session)
        session.load(path)
        assert session.tokens == held
        got = follow(session)
        assert read == [1] * 12  # the logits behind the last token came at once
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_marks_and_the_rings_slack_come_along(bf16_pack: Path, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "story.kv"
    with engine.session() as session:
        session.sync(tokens(60))
        for token in tokens(30, seed=1):
            session.step(token)
        session.save(path)
    with load(bf16_pack, context=160) as other, other.session() as session:
        session.load(path)
        session.rewind(5)
        assert session.position == 85
        read = count_forwards(session)
        session.sync(tokens(60))
        assert session.n_reused == 60 and read == []


def test_files_are_ordinary_safetensors(engine: Engine, tmp_path: Path) -> None:
    from safetensors import safe_open

    with engine.session() as session:
        session.sync(tokens(40))
        session.save(tmp_path / "s")
        assert abs(session.saved_bytes - (tmp_path / "s").stat().st_size) < 8192
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.get_tensor("tokens").tolist() == tokens(40)
        assert file.metadata()["format"] == "localmimo-session"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_another_pack_context_or_kv_type_is_refused(
    bf16_pack: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with engine.session() as session:
        session.sync(tokens(40))
        session.save(path)
    stranger = make_pack(tmp_path_factory.mktemp("stranger"), seed=9)
    for engine_of, sentence in (
        (lambda: load(stranger, context=160), "pack .* read again"),
        (lambda: load(bf16_pack, context=160, dtype="float32"), "KV type bfloat16"),
        (lambda: load(bf16_pack, context=160, dtype="bfloat16"), "dtype float32, .* is bfloat16"),
        (lambda: load(bf16_pack, context=160, window_keys=5), "configuration"),
        (lambda: load(bf16_pack, context=32), "40 tokens .* 32"),
    ):
        with engine_of() as other, other.session() as session:
            session.sync(tokens(5, seed=4))
            with pytest.raises(BadSession, match=sentence):
                session.load(path)
            assert session.tokens == tokens(5, seed=4)


def test_nothing_to_save_and_nowhere_to_save(engine: Engine, tmp_path: Path) -> None:
    with engine.session() as session:
        session.rewind(10**6)
        with pytest.raises(BadSession, match="nothing to save"):
            session.save(tmp_path / "s")
        session.sync(tokens(5))
        (tmp_path / "file").write_text("")
        with pytest.raises(BadSession, match="cannot be written"):
            session.save(tmp_path / "file" / "s")
        with pytest.raises(BadSession, match="can not be opened"):
            session.load(tmp_path / "missing")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def changed_header(raw: bytes, change: Callable[[dict], None]) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def test_hostile_files_are_refused_with_a_sentence(engine: Engine, tmp_path: Path) -> None:
    """Thousands of broken files: each is a BadSession and leaves a session that still works."""
    path, broken = tmp_path / "s", tmp_path / "broken"
    with engine.session() as session:
        session.sync(tokens(40))
        session.save(path)
    raw = path.read_bytes()

    def bigger(header: dict) -> None:
        header["__metadata__"]["tokens"] = "100"

    def many_marks(header: dict) -> None:
        header["__metadata__"]["marks"] = "99999999"

    def no_marks(header: dict) -> None:
        del header["marks"]

    def strange(header: dict) -> None:
        header["__metadata__"] = {"format": 7}

    cases = [changed_header(raw, change) for change in (bigger, many_marks, no_marks, strange)]
    cases += [b"", raw[:7], raw[:100], raw[:-1], raw + b"x", (1 << 62).to_bytes(8, "little") + raw[8:]]
    cases += [b"\xff" * 8 + raw[8:], b"[" * 100_000]
    rng = random.Random(0)
    for _ in range(150):
        spoiled = bytearray(raw)
        spoiled[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        cases.append(bytes(spoiled))
    with engine.session() as session:
        for case in cases:
            broken.write_bytes(case)
            try:
                session.load(broken)
            except BadSession as error:
                assert str(error).endswith(".")
            else:  # a flipped bit in the model's name, or in the padding of the header
                assert session.tokens == tokens(40)
        session.load(path)
        assert session.tokens == tokens(40)


def test_an_interrupted_save_leaves_the_old_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with engine.session() as session:
        session.sync(tokens(40))
        session.save(path)
        before = path.read_bytes()
        session.step(5)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BadSession, match="No space left"):
            session.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("n", range(1, 14))
def test_a_loaded_session_is_rewound_to_what_it_was(engine: Engine, tmp_path: Path, n: int) -> None:
    """However few rows the rings of the file have: what is not there any more is read again."""
    path = tmp_path / "s"
    with engine.session() as session:
        session.rewind(10**6)
        session.sync(tokens(40))
        for token in tokens(20, seed=1):
            session.step(token)
        session.sync(tokens(40))  # restored from a checkpoint: rings of one window
        session.save(path)
        session.rewind(10**6)
        session.load(path)
        session.rewind(n)
        found = session.step(7)
    expected = engine.logits([*tokens(40)[:-n], 7])[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
