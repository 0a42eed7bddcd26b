"""Opening a pack: whichever step fails, nothing that was opened before it stays open."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from localmimo import BadPack, LocalMimoError, load
from localmimo.loading import parts
from tests.packs import make_pack

STEPS = (
    "check_shapes",
    "ExpertCache",
    "ReportedWeights",
    "load_weights",
    "Transformer",
    "runner_of",
    "load_heads",
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("parts"), seed=5)


def open_files(pack: Path) -> list[str]:
    """Files of the pack that this process has open."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder
            names.append(str(link.readlink()))
    return sorted(name for name in names if name.startswith(str(pack)))


class Broken(Exception):
    """What a step raises."""


def breaks(*arguments: object, **options: object) -> None:
    raise Broken


@contextmanager
def nothing_is_left(pack: Path) -> Iterator[None]:
    """After the block there are no more threads, and no more files of the pack open, than before it."""
    threads, files = set(threading.enumerate()), open_files(pack)
    yield
    assert not [thread.name for thread in set(threading.enumerate()) - threads]
    assert open_files(pack) == files


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_closes_what_was_opened_before_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(parts, step, breaks)
    with nothing_is_left(pack), pytest.raises(Broken):
        load(pack, context=64)


@pytest.mark.parametrize("step", ["MemoryPressure", "experts_of", "low_bytes"])
def test_a_step_of_the_expert_cache_that_fails_too(
    pack: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(f"localmimo.loading.expert_cache.{step}", breaks)
    with nothing_is_left(pack), pytest.raises(Broken):
        load(pack, context=64)


def test_an_observer_that_fails_closes_everything(pack: Path) -> None:
    with nothing_is_left(pack), pytest.raises(Broken):
        load(pack, context=64, on_progress=breaks)


def test_a_closed_engine_leaves_nothing(pack: Path) -> None:
    with nothing_is_left(pack), load(pack, context=64) as engine:
        assert open_files(pack) and any("page-reader" in thread.name for thread in threading.enumerate())
        engine.generate("hello", max_tokens=2)


def test_the_errors_of_quant_become_errors_of_localmimo(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalMimoError, match="is no pack"):
        load("/nope")
    with pytest.raises(BadPack, match="is no pack"):
        load(tmp_path)


def test_where_all_pages_fit_all_are_read_in_the_background(pack: Path) -> None:
    """Those that the profile knows nothing of, too."""
    with load(pack, context=64) as engine:
        assert engine._parts.expert_cache.profile is not None
        assert engine.plan.n_slots == engine.plan.n_pages
        engine._parts.expert_cache.wait_until_warm()
        engine.logits([3, 4, 5, 6, 7, 8])
        assert engine.counters.disk_pages == 0 < engine.counters.ram_pages
