"""Router statistics: what they count, how they are saved, shared and defended."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.errors import BadRequest
from localmimo.experts.policy import router_stats
from localmimo.experts.policy.profile import PROFILE_TOKENS, SESSION_TOKENS, profile_path, read_profile
from localmimo.experts.policy.router_stats import RouterStats

LAYERS = (1, 3)


def used(n_tokens: int, experts: tuple[list[int], list[int]] = ([0, 1], [2, 3])) -> RouterStats:
    stats = RouterStats(LAYERS, 6)
    use(stats, n_tokens, experts)
    return stats


def use(stats: RouterStats, n_tokens: int, experts: tuple[list[int], list[int]] = ([0, 1], [2, 3])) -> None:
    for _ in range(n_tokens):
        for layer, chosen in zip(LAYERS, experts, strict=True):
            stats.request(layer, chosen)


def test_counts_fade_with_their_half_lives() -> None:
    stats = used(8)
    use(stats, 8, ([5], [5]))
    stats.settle()
    assert stats.use[1, 0, 0] == pytest.approx(1 / 3, rel=1e-4)  # after one half-life: 1 part to 2
    assert stats.use[1, 0, 5] == pytest.approx(2 / 3, rel=1e-4)
    assert stats.use[3, 0, 0] == pytest.approx(0.5, abs=0.02)
    assert stats.last_used[0].tolist() == [7, 7, -1, -1, -1, 15]
    assert stats.hottest(2) == [(1, 5), (3, 5)]
    assert stats.hottest(100) == [(1, 5), (3, 5), (1, 0), (1, 1), (3, 2), (3, 3)]


def test_a_profile_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "stats" / "code.safetensors"
    assert used(30).save(path)
    again = RouterStats.open(path, LAYERS, 6)
    assert again.warning is None
    assert set(again.hottest(9)) == {(1, 0), (1, 1), (3, 2), (3, 3)}
    again.save(path)  # nothing new: nothing changes
    assert read_profile(path, 2, 6).tokens == 30
    assert [file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")] == [path.name]


def test_a_profile_of_version_1_is_read_and_becomes_one_of_version_2(tmp_path: Path) -> None:
    """It was written by the code before version 2: 30 tokens of one routing, 10 of another."""
    path = tmp_path / "old.safetensors"
    path.write_bytes(Path(__file__).with_name("profile-version-1.safetensors").read_bytes())
    old = read_profile(path, 2, 6)
    assert old.tokens == 40
    assert old.uses.tolist() == [[30, 30, 0, 0, 10, 0], [0, 0, 30, 30, 0, 10]]
    assert old.recent[0, 4] > old.recent[0, 2] == 0
    stats = RouterStats.open(path, LAYERS, 6)
    use(stats, 1)
    n_before = path.stat().st_size
    assert stats.warning is None and stats.save(path)
    assert path.stat().st_size < n_before - 4 * 2 * 6 * 6  # without the cube
    assert read_profile(path, 2, 6).tokens == 41


def test_stock_tools_open_a_profile(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    used(3).save(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["uses"].sum() == 12


def test_one_long_session_does_not_own_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    for _ in range(6):
        used(SESSION_TOKENS).save(path)
    long_prompt = RouterStats.open(path, LAYERS, 6)
    use(long_prompt, 20 * SESSION_TOKENS, ([4, 5], [4, 5]))
    long_prompt.save(path)
    profile = read_profile(path, 2, 6)
    assert profile.tokens == PROFILE_TOKENS
    assert profile.uses[0, 4] == pytest.approx(PROFILE_TOKENS * 0.2, rel=0.01)
    assert profile.uses[0, 0] == pytest.approx(PROFILE_TOKENS * 0.8, rel=0.01)


def test_two_sessions_of_one_profile_are_both_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    one, other = RouterStats.open(path, LAYERS, 6), RouterStats.open(path, LAYERS, 6)
    use(one, 10)
    use(other, 20, ([4, 5], [4, 5]))
    assert one.save(path) and other.save(path) and one.save(path)
    profile = read_profile(path, 2, 6)
    assert profile.tokens == 30
    assert profile.uses[0].tolist() == [10, 10, 0, 0, 20, 20]


def test_processes_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    import multiprocessing

    path = tmp_path / "p.safetensors"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_add_one_token, [str(path)] * 12)
    assert read_profile(path, 2, 6).tokens == 12


def test_a_profile_is_read_and_written_with_its_lock_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, seen = tmp_path / "p.safetensors", []

    def watched(name: str) -> None:
        function = getattr(router_stats, name)

        def call(*arguments: object) -> object:
            with (tmp_path / ".p.safetensors.lock").open("a") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(name)
            return function(*arguments)

        monkeypatch.setattr(router_stats, name, call)

    watched("read_profile")
    watched("write_profile")
    assert used(1).save(path)
    assert seen == ["read_profile", "write_profile"]
    with (tmp_path / ".p.safetensors.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is given back


def _add_one_token(path: str) -> None:
    assert used(1).save(Path(path))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_profile_is_a_sentence_and_an_empty_start(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("bad") / "p.safetensors"
    used(5).save(path)
    raw = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "grow", "noise", "header"])):
        case "flip":
            place = data.draw(st.integers(0, len(raw) - 1))
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        case "grow":
            raw += bytes(data.draw(st.integers(1, 9000)))
        case "noise":
            raw = bytearray(data.draw(st.binary(max_size=2000)))
        case "header":
            header = data.draw(
                st.sampled_from([b"[" * 3000, b"{}", b"null", b'{"__metadata__": 3}', b"\xff" * 9])
            )
            raw[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
    path.write_bytes(raw)
    stats = RouterStats.open(path, LAYERS, 6)
    if stats.warning is None:  # a flipped bit in the padding, or one that changes no number
        assert set(stats.hottest(9)) == {(1, 0), (1, 1), (3, 2), (3, 3)}
    else:
        assert stats.warning.startswith(f"The statistics in {path} are not used: the file ")
        assert not stats.hottest(9)
        use(stats, 2)
        assert stats.save(path)
        assert read_profile(path, 2, 6).tokens == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 1e30])
def test_numbers_that_nobody_counted_are_refused(tmp_path: Path, bad: float) -> None:
    from localmimo.experts.policy.profile import Profile, write_profile

    profile = Profile.empty(2, 6)
    profile.uses[1, 1] = bad
    write_profile(tmp_path / "p.safetensors", profile)
    assert "no session can have counted" in str(
        RouterStats.open(tmp_path / "p.safetensors", LAYERS, 6).warning
    )


def test_another_model_is_refused(tmp_path: Path) -> None:
    used(5).save(tmp_path / "p.safetensors")
    stats = RouterStats.open(tmp_path / "p.safetensors", (1, 2, 3), 6)
    assert "bytes where 2 layers of 32 experts need" in str(
        RouterStats.open(tmp_path / "p.safetensors", LAYERS, 32).warning
    )
    assert "not about 3 layers of 6 experts" in str(stats.warning)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stats = used(2)
    assert not stats.save(tmp_path / "file" / "p.safetensors")
    assert "could not be saved" in str(stats.warning)


def test_where_profiles_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path / "home"))
    assert profile_path(tmp_path, "abc") == tmp_path / "stats" / "default.safetensors"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert (
        profile_path(tmp_path, "a" * 64, "code") == tmp_path / "home/stats" / ("a" * 16) / "code.safetensors"
    )
    for name in ("", "a/b", "..", ".hidden", "x" * 65, "ü"):
        with pytest.raises(BadRequest, match="name has up to 64"):
            profile_path(tmp_path, "abc", name)
