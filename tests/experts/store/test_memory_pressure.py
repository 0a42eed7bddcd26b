"""Slots go while memory is short and come back after; the answers stay the same."""

import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from localmimo import load
from localmimo.decode.options import Sampling
from localmimo.experts.store.memory_pressure import MemoryPressure, low_bytes, slots_wanted
from localmimo.hardware.host import _cgroup

GIB = 1 << 30


@given(
    n_full=st.integers(1, 20_000),
    n_now=st.integers(1, 20_000),
    free=st.integers(0, 64 * GIB),
    page=st.integers(4096, 1 << 24),
)
def test_wanted_slots(n_full: int, n_now: int, free: int, page: int) -> None:
    n_now, low = min(n_now, n_full), GIB
    wanted = slots_wanted(n_now, n_full, free, page, low)
    assert 1 <= wanted <= n_full
    if free < low:
        assert wanted < n_now or wanted == 1
        assert wanted == 1 or free + (n_now - wanted) * page >= low * 1.5
    elif free <= 2 * low:
        assert wanted == n_now
    else:
        assert wanted >= n_now
        assert free - (wanted - n_now) * page >= 2 * low or wanted == n_now


def test_a_small_machine_keeps_a_twentieth_free() -> None:
    assert low_bytes(64 * GIB) == GIB
    assert low_bytes(2 * GIB) == 2 * GIB // 20


def test_slots_go_and_come_back_in_mid_answer(bf16_pack: Path) -> None:
    """Tokens are the same while another program takes the memory and gives it back."""
    prompt, answers = [5, 9, 13, 40, 41, 42, 99, 7], []
    free = [64 * GIB]
    for squeezed in (False, True):
        with load(bf16_pack, context=256, profile=None) as engine:
            store = engine._store
            pressure = MemoryPressure(store, 4 * GIB, GIB, lambda: free[0], interval_s=0.002)
            seen = {store.n_slots}
            with engine.session() as session:
                logits, tokens = session.sync(prompt), []
                for i in range(40):
                    tokens.append(int(logits.argmax()))
                    if squeezed:
                        free[0] = 64 * GIB if i // 10 % 2 else GIB // 2
                        time.sleep(0.01)
                    logits = session.step(tokens[-1])
                    seen.add(store.n_slots)
            pressure.close()
            answers.append(tokens)
    assert answers[0] == answers[1]
    assert len(seen) > 2
    assert min(seen) < max(seen)


def test_a_step_and_a_resize_at_once(bf16_pack: Path) -> None:
    """Resizing from another thread waits for the layer that is running."""
    with load(bf16_pack, context=256, profile=None) as engine:
        over = threading.Event()

        def shake() -> None:
            n = 0
            while not over.is_set():
                n = n % engine.plan.n_slots + 1
                engine._store.resize(n)

        thread = threading.Thread(target=shake)
        thread.start()
        shaken = engine.generate("3 5 7", max_tokens=30, sampling=Sampling(temperature=0)).tokens
        over.set()
        thread.join()
        engine._store.resize(engine.plan.n_slots)
        calm = engine.generate("3 5 7", max_tokens=30, sampling=Sampling(temperature=0)).tokens
    assert shaken == calm


def test_files_in_the_page_cache_count_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    assert _cgroup(tmp_path, tmp_path / "none") == (1_000_000, 900_000)
    (tmp_path / "memory.stat").write_text("anon 100000\nactive_file 300000\ninactive_file 400000\n")
    assert _cgroup(tmp_path, tmp_path / "none") == (1_000_000, 200_000)


def test_the_tightest_group_around_the_process_counts(tmp_path: Path) -> None:
    for path, limit in (("memory", 9_000_000), ("memory/box", 2_000_000), ("memory/box/inner", 5_000_000)):
        (tmp_path / path).mkdir()
        (tmp_path / path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (tmp_path / path / "memory.usage_in_bytes").write_text("1000000\n")
    own = tmp_path / "own"
    own.write_text("7:pids:/elsewhere\n4:memory:/box/inner\n0::/\n")
    assert _cgroup(tmp_path, own) == (2_000_000, 1_000_000)
    own.write_text("4:memory:/\n")
    assert _cgroup(tmp_path, own) == (9_000_000, 1_000_000)
    assert _cgroup(tmp_path, tmp_path / "nothing") == (9_000_000, 1_000_000)


def test_the_policy_forecasts_nothing_where_every_page_has_a_slot(bf16_pack: Path) -> None:
    """Forecasts cost more than such a step itself."""
    with load(bf16_pack, context=256, profile=None) as roomy:
        assert roomy.plan.n_slots == roomy.plan.n_pages and roomy._store._policy._only_count
        tight = roomy.plan.used_bytes - roomy.plan.page_bytes
    with load(bf16_pack, context=256, profile=None, ram=tight) as engine:
        assert engine.plan.n_slots < engine.plan.n_pages and not engine._store._policy._only_count
