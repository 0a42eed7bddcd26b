"""Several clients' conversations share one timeline: the others wait on disk, where that is quicker than reading."""

from pathlib import Path

import numpy as np
import pytest

from localmimo.chat.turn_cache import TurnCache
from localmimo.decode.steps import Stats
from localmimo.engine import Engine
from localmimo.serve.session_store import SessionStore, reach
from tests.serve import conversations as talks
from tests.serve.running import Running, Scripted

PLENTY = 1 << 30


def tokens(*values: int) -> "np.ndarray":
    return np.asarray(values, np.int32)


def test_reach_is_what_the_windows_and_places_allow() -> None:
    held = np.arange(100, dtype=np.int32)
    assert reach(held, [], np.arange(200, dtype=np.int32)) == 100
    branch = np.concatenate([held[:95], tokens(7, 7)])
    assert reach(held, [], branch) == 95  # within the rings' slack
    branch = np.concatenate([held[:50], tokens(7, 7)])
    assert reach(held, [], branch) == 0 and reach(held, [20, 40, 60], branch) == 40
    assert reach(tokens(), [], held) == 0 and reach(held, [], tokens()) == 0


@pytest.fixture
def empty(engine: Engine) -> None:
    """Nothing of the tests before is left in the timeline."""
    with engine.session() as session:
        session.rewind(session.position)


@pytest.fixture
def slow_reading(empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read at a token per second, as by a model far larger than this one."""
    monkeypatch.setattr(
        SessionStore, "prefill_tps", property(lambda self: 1.0, lambda self, value: None), raising=False
    )


def alternate(server: Running, script: Scripted, clients: list[talks.Client], n_rounds: int) -> list[int]:
    """Tokens that were read twice, of every turn but the first of each client."""
    held: dict[int, int] = {}
    again = []
    texts = {n: talks.turns() for n in range(len(clients))}
    for _ in range(n_rounds):
        for n, client in enumerate(clients):
            script.say(next(texts[n]))
            prompt, cached, said = client.request(server)
            if n in held:
                again.append(held[n] - cached)
            held[n] = prompt + said - 1
    return again


def clients(n: int) -> list[talks.Client]:
    made = []
    for number in range(n):
        client = talks.ChatClient()
        client.messages[0]["content"] = f"Client {number}: {talks.QUESTION}"
        made.append(client)
    return made


def test_clients_take_turns_and_nothing_is_read_twice(
    engine: Engine, script: Scripted, tmp_path: Path, slow_reading: None
) -> None:
    with Running(engine, sessions_dir=tmp_path, sessions_bytes=PLENTY) as server:
        talkers = clients(3)
        assert set(alternate(server, script, talkers, 3)) == {0}
        session_store = server.service.worker.session_store
        assert session_store is not None and session_store.n_loaded == 6
        assert len(session_store) == 3  # what a conversation grew out of is gone
        files = list(tmp_path.rglob("*.*"))
        assert len(files) == 9 and all(path.stat().st_mode & 0o77 == 0 for path in files)
        assert "localmimo_sessions 3" in server.http.get("/metrics").text


@pytest.mark.parametrize("keeps", [True, False])
def test_a_later_server_goes_on_where_it_was(
    engine: Engine, script: Scripted, tmp_path: Path, slow_reading: None, keeps: bool
) -> None:
    """Tokens as they were sampled and thinking that the client drops, for the conversation held last too."""
    talkers = [talks.ChatClient(keep_thinking=keeps), *clients(1)]
    texts, held = [talks.turns(), talks.turns()], [0, 0]
    for _ in range(3):
        engine.prompts.turn_cache = TurnCache()  # another process
        with engine.session() as session:
            session.rewind(session.position)
        with Running(engine, sessions_dir=tmp_path, sessions_bytes=PLENTY) as server:
            for n, talker in enumerate(talkers):
                script.say(next(texts[n]))
                prompt, cached, said = talker.request(server)
                assert cached == held[n]
                held[n] = prompt + said - 1


def test_rates_are_kept_for_a_later_server(
    engine: Engine, script: Scripted, tmp_path: Path, empty: None
) -> None:
    with Running(engine, sessions_dir=tmp_path, sessions_bytes=PLENTY) as server:
        session_store = server.service.worker.session_store
        assert session_store is not None and session_store.prefill_tps is None
        script.say("One.")
        talks.ChatClient().request(server)
        session_store.prefill_tps = 0.5
    (folder,) = tmp_path.iterdir()
    assert SessionStore(folder, PLENTY, TurnCache()).prefill_tps == 0.5
    (notes,) = folder.glob("*.json")
    for damaged in (
        "{",
        "[]",
        '{"prefill_tps": "x"}',
        '{"prefill_tps": 1, "bytes_per_s": 1, "turns": [{"said": 7}]}',
    ):
        notes.write_text(damaged)
        assert SessionStore(folder, PLENTY, TurnCache()).prefill_tps is None


def test_the_budget_holds(engine: Engine, script: Scripted, tmp_path: Path, slow_reading: None) -> None:
    with Running(engine, sessions_dir=tmp_path, sessions_bytes=200_000) as server:
        alternate(server, script, clients(4), 2)
        session_store = server.service.worker.session_store
        assert session_store is not None and 0 < len(session_store) < 4
        on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))
        assert on_disk == session_store.n_bytes <= 200_000


def test_what_is_quicker_to_read_is_not_saved(
    engine: Engine, script: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SessionStore, "prefill_tps", property(lambda self: 1e9, lambda self, value: None), raising=False
    )
    with Running(engine, sessions_dir=tmp_path, sessions_bytes=PLENTY) as server:
        assert min(alternate(server, script, clients(2), 2)) > 0
        assert not list(tmp_path.rglob("*.kv"))


def test_rates_are_learned(tmp_path: Path) -> None:
    session_store = SessionStore(tmp_path, PLENTY, TurnCache())
    session_store.learn(Stats(prompt_tokens=10, prefill_s=1.0))
    assert session_store.prefill_tps is None
    session_store.learn(Stats(prompt_tokens=300, reused_tokens=100, prefill_s=2.0))
    assert session_store.prefill_tps == 100
    session_store.learn(Stats(prompt_tokens=200, prefill_s=1.0))
    assert 100 < session_store.prefill_tps < 200


def test_damaged_files_are_left_out(
    engine: Engine, script: Scripted, tmp_path: Path, slow_reading: None
) -> None:
    (talker,), other = clients(1), talks.ChatClient()
    with Running(engine, sessions_dir=tmp_path, sessions_bytes=PLENTY) as server:
        script.say("One.", "Two.", "Three.")
        talker.request(server)
        other.request(server)
        (path,) = tmp_path.rglob("*.kv")
        path.write_bytes(path.read_bytes()[:-1000])
        talker.messages.append({"role": "user", "content": "Go on."})
        prompt, cached, _ = talker.request(server)
        assert cached < prompt and not path.exists()
    (tmp_path / "x.kv").write_bytes(b"nonsense")
    (tmp_path / "x.tokens").write_bytes(b"nonsense")
    assert len(SessionStore(tmp_path, PLENTY, TurnCache())) == 0
