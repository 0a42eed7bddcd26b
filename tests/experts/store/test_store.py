"""The store gives the right pages whatever its size, never more than its slots, and refuses bad ones."""

import errno
import fcntl
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo import BadModel, load
from localmimo.experts.compute.cpu_runner import ExpertRunner, grouped
from localmimo.experts.policy.baselines import Lru
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.tiers import DiskTier
from localmimo.limits import STEP_TOKENS
from quant import Pack, Recipe
from quant.ops.linear import backend
from tests.packs import make_pack


@pytest.fixture(scope="module", params=["uniform", "mixed"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Pages of one size, and pages of two (layer 2 and a few other experts at eight bits)."""
    rules = (
        (("layers.2.experts.*", "int8"), ("layers.*.experts.[15].*", "int8"))
        if request.param == "mixed"
        else ()
    )
    return Pack.open(make_pack(tmp_path_factory.mktemp("store"), recipe=Recipe("nf4", "bf16", rules), seed=8))


def gate_of(pack: Pack, layer: int, expert: int) -> torch.Tensor:
    page = pack.page_at(layer, expert)
    with page.file.open("rb") as file:
        file.seek(page.offset)
        raw = torch.frombuffer(bytearray(file.read(page.nbytes)), dtype=torch.uint8)
    return pack.layouts[page.codec].expert(raw).gate.dequantize()


def fetched(store: ExpertStore, layer: int, experts: Sequence[int]) -> dict[int, torch.Tensor]:
    """The gate matrix of each expert, taken while its page is valid."""
    lists = store.fetch(layer, experts)
    return {it.expert: it.layout.expert(it.page).gate.dequantize() for arrivals in lists for it in arrivals}


def owned(store: ExpertStore) -> int:
    """Slots that the store can account for."""
    return store._slots.n_accounted + len(store._prefetches)


requests = st.lists(
    st.tuples(st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1)), min_size=1, max_size=12
)


def streamed(store: ExpertStore, layer: int, experts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """The gate matrix of each expert in the order in which they came."""
    lists = store.stream(layer, experts)
    return [(it.expert, it.layout.expert(it.page).gate.dequantize()) for arrivals in lists for it in arrivals]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_streams_fetches_guesses_and_fewer_slots_in_any_order(
    pack: Pack, data: st.DataObject, n_slots: int
) -> None:
    """A long mixed life: every page right, every stream in order, no slot lost, never more pages than slots."""
    store = ExpertStore(pack, pack.page.bytes, n_slots, Lru(5, 8))
    for _ in range(data.draw(st.integers(1, 12))):
        layer = data.draw(st.integers(1, 4))
        experts = sorted(data.draw(st.sets(st.integers(0, 7), min_size=1)))
        match data.draw(st.sampled_from(["fetch", "stream", "prefetch", "warm", "resize", "break"])):
            case "fetch":
                got = list(fetched(store, layer, experts).items())
                assert sorted(expert for expert, _ in got) == experts
            case "stream":
                got = streamed(store, layer, experts)
                assert [expert for expert, _ in got] == experts
            case "prefetch":
                store.prefetch(layer, experts)
                continue
            case "warm":
                store.warm([(layer, expert) for expert in experts])
                continue
            case "resize":
                store.resize(data.draw(st.integers(0, 50)))
                assert 1 <= store.n_slots <= n_slots
                continue
            case _:
                next(iter(store.fetch(layer, experts)))
                continue
        assert all(torch.equal(gate, gate_of(pack, layer, expert)) for expert, gate in got)
        assert len(store._slots) <= store.n_slots
        assert owned(store) == n_slots
    store.close()


def test_a_right_guess_is_a_useful_read_and_a_wrong_one_a_wasted_one(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 16, Lru(5, 8))
    store.prefetch(2, [1, 2, 3])
    store.wait_until_warm()
    fetched(store, 2, [1, 2, 5])
    counters = store.counters
    assert (counters.prefetch_useful, counters.prefetch_wasted) == (2, 1)
    assert (counters.ram_pages, counters.disk_pages) == (0, 3)
    store.close()


def test_warm_pages_are_there_before_they_are_asked_for(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 12, Lru(5, 8))
    store.warm([(layer, expert) for layer in (1, 3) for expert in range(8)])
    store.wait_until_warm()
    fetched(store, 1, range(8))
    fetched(store, 3, range(4))
    assert (store.counters.ram_pages, store.counters.disk_pages) == (12, 0)
    store.close()


def test_a_prompt_leaves_what_decode_keeps(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 16, Lru(5, 8))
    for layer in (1, 2, 3, 4):
        fetched(store, layer, [0, 1, 2, 3])
    for layer in (1, 2, 3, 4):
        assert [expert for expert, _ in streamed(store, layer, range(8))] == list(range(8))
    before = store.counters.disk_pages
    for layer in (1, 2, 3, 4):
        fetched(store, layer, [0, 1, 2, 3])
    assert store.counters.disk_pages - before <= 2  # the ring has an eighth of the slots
    store.close()


def test_a_prompt_reads_every_page_once_and_ahead_of_the_next_layer(pack: Pack) -> None:
    """Four slots' worth of ring, layer after layer: each page is read once, and nothing is read for nothing."""
    store = ExpertStore(pack, pack.page.bytes, 24, Lru(5, 8))
    for layer in (1, 2, 3, 4):
        store.note_prompt(layer, [[0, 1]])
        got = streamed(store, layer, range(8))
        assert all(torch.equal(gate, gate_of(pack, layer, expert)) for expert, gate in got)
    assert (store.counters.disk_pages, store.counters.ram_pages) == (32, 0)
    assert store.counters.disk_bytes == sum(
        pack.page_at(layer, expert).nbytes for layer in (1, 2, 3, 4) for expert in range(8)
    )
    assert owned(store) == 24
    store.close()


def test_a_disk_that_stalls_is_named_and_the_store_goes_on(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore(pack, pack.page.bytes, 4, Lru(5, 8), stall_s=0.2)
    go_on = threading.Event()
    fill = DiskTier._fill
    monkeypatch.setattr(DiskTier, "_fill", lambda *args: (go_on.wait(), fill(*args))[1])
    with pytest.raises(BadModel, match=r"given nothing for 0 s: expert 3 of layer 2.*ask again"):
        list(store.fetch(2, [3, 4]))
    go_on.set()
    assert torch.equal(fetched(store, 2, [3])[3], gate_of(pack, 2, 3))
    fetched(store, 1, range(8))
    assert owned(store) == 4
    store.close()


def test_reads_are_buffered_where_direct_ones_are_refused(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems open for direct reads and refuse them later."""
    preadv = os.preadv

    def picky(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    store = ExpertStore(pack, pack.page.bytes, 4, Lru(5, 8))
    assert torch.equal(fetched(store, 2, [3])[3], gate_of(pack, 2, 3))
    assert not store.direct
    store.close()


def test_trust_skips_the_checksum(pack: Pack, tmp_path: Path) -> None:
    broken = Pack.open(copy_of(pack, tmp_path))
    page = broken.page_at(1, 0)
    with page.file.open("r+b") as file:
        file.seek(page.offset + 50)
        file.write(b"\x00\x01\x02")
    store = ExpertStore(broken, broken.page.bytes, 4, Lru(5, 8), trust=True)
    assert list(store.fetch(1, [0]))
    store.close()


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(1, 40))
def test_any_number_of_slots_gives_the_right_pages(
    pack: Pack, requests: list[tuple[int, set[int]]], n_slots: int
) -> None:
    store = ExpertStore(pack, pack.page.bytes, n_slots, Lru(5, 8))
    asked = 0
    for layer, experts in requests:
        got = fetched(store, layer, sorted(experts))
        asked += len(experts)
        assert got.keys() == experts
        assert all(torch.equal(got[expert], gate_of(pack, layer, expert)) for expert in experts)
        assert owned(store) == n_slots
    assert store.counters.ram_pages + store.counters.disk_pages == asked
    assert store.counters.disk_bytes <= store.counters.disk_pages * pack.page.bytes
    store.close()


def test_an_unfinished_fetch_loses_no_slot(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 5, Lru(5, 8))
    for _ in range(20):
        for _ in store.fetch(1, range(8)):
            break
    assert owned(store) == 5
    assert not store._supply.pinned
    store.close()


def test_everything_resident_reads_once(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 32, Lru(5, 8))
    for _ in range(3):
        for layer in (1, 2, 3, 4):
            assert len(fetched(store, layer, range(8))) == 8
    assert (store.counters.disk_pages, store.counters.ram_pages) == (32, 64)
    store.close()


def copy_of(pack: Pack, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(pack.path, folder / "copy"))


def test_a_flipped_byte_is_named_and_the_store_goes_on(pack: Pack, tmp_path: Path) -> None:
    broken = Pack.open(copy_of(pack, tmp_path))
    page = broken.page_at(2, 3)
    with page.file.open("r+b") as file:
        file.seek(page.offset + 100)
        byte = file.read(1)
        file.seek(page.offset + 100)
        file.write(bytes([byte[0] ^ 1]))
    store = ExpertStore(broken, broken.page.bytes, 8, Lru(5, 8))
    with pytest.raises(BadModel, match=rf"{page.offset:,} of .*{page.file.name}.*checksum"):
        list(store.fetch(2, [3]))
    assert torch.equal(fetched(store, 2, [4])[4], gate_of(pack, 2, 4))
    store.close()


def test_a_file_cut_while_open(pack: Pack, tmp_path: Path) -> None:
    cut = Pack.open(copy_of(pack, tmp_path))
    page = cut.page_at(2, 7)
    store = ExpertStore(cut, cut.page.bytes, 8, Lru(5, 8))
    list(store.fetch(2, [0]))
    with page.file.open("r+b") as file:
        file.truncate(page.offset + 1000)
    with pytest.raises(BadModel, match="ends after"):
        list(store.fetch(2, [7]))
    store.close()


def test_a_file_that_is_gone(pack: Pack, tmp_path: Path) -> None:
    gone = Pack.open(copy_of(pack, tmp_path))
    gone.page_at(3, 0).file.unlink()
    store = ExpertStore(gone, gone.page.bytes, 8, Lru(5, 8))
    with pytest.raises(BadModel, match="gone"):
        list(store.fetch(3, [0]))
    store.close()


@pytest.mark.parametrize("n", [1, 9, 40])
def test_run_equals_the_dense_sum(pack: Pack, n: int) -> None:
    """One token, a few, and a prompt, in four slots; a prompt's tokens come out to the bit as they do in steps."""
    store = ExpertStore(pack, pack.page.bytes, 4, Lru(5, 8))
    x, chosen, weights = routed(n)
    got = ExpertRunner(store).run(1, x, chosen, weights)
    expected = torch.zeros(n, 64, dtype=torch.float64)
    for expert in range(8):
        ((arrival,),) = [arrivals for arrivals in store.fetch(1, [expert]) if arrivals]
        page = arrival.layout.expert(arrival.page)
        gate, up, down = (part.dequantize().double() for part in (page.gate, page.up, page.down))
        y = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        expected += y * (weights * (chosen == expert)).sum(-1, keepdim=True)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    one_by_one = [
        ExpertRunner(store).run(1, *(part[i : i + 1] for part in (x, chosen, weights))) for i in range(n)
    ]
    if backend() != "torch-reference":
        assert torch.equal(got, torch.cat(one_by_one))
    store.close()


def routed(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2].sort().values for _ in range(n)])
    return torch.randn(n, 64, generator=generator), chosen, torch.rand(n, 2, generator=generator)


def test_few_tokens_are_grouped_as_many_are() -> None:
    chosen = routed(STEP_TOKENS)[1]
    places, spans = grouped(chosen)
    of_many, many = grouped(torch.cat((chosen, chosen)))
    assert torch.equal(places, of_many[of_many < chosen.numel()])
    assert list(spans) == list(many) and [2 * stop for _, stop in spans.values()] == [
        stop for _, stop in many.values()
    ]
    assert places[spans[3][0] : spans[3][1]].tolist() == (chosen.view(-1) == 3).nonzero().view(-1).tolist()


def test_same_tokens_whatever_the_budget(pack: Pack) -> None:
    """Greedy answers with every expert in RAM and with room for one token's experts only."""
    answers = []
    for n_slots in (None, 8, 1):
        with load(pack.path, context=256) as engine:
            if n_slots:
                engine._experts._store = ExpertStore(pack, pack.page.bytes, n_slots, Lru(5, 8))
            answers.append(engine.logits([5, 9, 13, 40, 41, 42, 99, 7] * 6))
    assert all(torch.equal(answers[0], answer) for answer in answers)
