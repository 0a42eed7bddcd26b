"""The store gives the right pages whatever its size, never more than its slots, and refuses bad ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo import BadModel, load
from localmimo.experts.run import ExpertRunner
from localmimo.experts.store import ExpertStore
from quant import Pack, Recipe
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


requests = st.lists(
    st.tuples(st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1)), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(1, 40))
def test_any_number_of_slots_gives_the_right_pages(
    pack: Pack, requests: list[tuple[int, set[int]]], n_slots: int
) -> None:
    store = ExpertStore(pack, pack.page.bytes, n_slots)
    asked = 0
    for layer, experts in requests:
        got = fetched(store, layer, sorted(experts))
        asked += len(experts)
        assert got.keys() == experts
        assert all(torch.equal(got[expert], gate_of(pack, layer, expert)) for expert in experts)
        assert len(store._slots) + len(store._free) == n_slots
    assert store.traffic.ram_pages + store.traffic.disk_pages == asked
    assert store.traffic.disk_bytes <= store.traffic.disk_pages * pack.page.bytes
    store.close()


def test_an_unfinished_fetch_loses_no_slot(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 5)
    for _ in range(20):
        for _ in store.fetch(1, range(8)):
            break
    assert len(store._slots) + len(store._free) == 5
    assert not store._pinned
    store.close()


def test_everything_resident_reads_once(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 32)
    for _ in range(3):
        for layer in (1, 2, 3, 4):
            assert len(fetched(store, layer, range(8))) == 8
    assert (store.traffic.disk_pages, store.traffic.ram_pages) == (32, 64)
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
    store = ExpertStore(broken, broken.page.bytes, 8)
    with pytest.raises(BadModel, match=rf"{page.offset:,} of .*{page.file.name}.*checksum"):
        list(store.fetch(2, [3]))
    assert torch.equal(fetched(store, 2, [4])[4], gate_of(pack, 2, 4))
    store.close()


def test_a_file_cut_while_open(pack: Pack, tmp_path: Path) -> None:
    cut = Pack.open(copy_of(pack, tmp_path))
    page = cut.page_at(2, 7)
    store = ExpertStore(cut, cut.page.bytes, 8)
    list(store.fetch(2, [0]))
    with page.file.open("r+b") as file:
        file.truncate(page.offset + 1000)
    with pytest.raises(BadModel, match="ends after"):
        list(store.fetch(2, [7]))
    store.close()


def test_a_file_that_is_gone(pack: Pack, tmp_path: Path) -> None:
    gone = Pack.open(copy_of(pack, tmp_path))
    gone.page_at(3, 0).file.unlink()
    store = ExpertStore(gone, gone.page.bytes, 8)
    with pytest.raises(BadModel, match="gone"):
        list(store.fetch(3, [0]))
    store.close()


def test_run_equals_the_dense_sum(pack: Pack) -> None:
    store = ExpertStore(pack, pack.page.bytes, 4)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    chosen = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(i))[:2].sort().values for i in range(9)]
    )
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(2))
    got = ExpertRunner(store).run(1, x, chosen, weights)
    expected = torch.zeros(9, 64, dtype=torch.float64)
    for expert in range(8):
        arrival = next(store.fetch(1, [expert]))[0]
        page = arrival.layout.expert(arrival.page)
        gate, up, down = (part.dequantize().double() for part in (page.gate, page.up, page.down))
        y = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        expected += y * (weights * (chosen == expert)).sum(-1, keepdim=True)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    store.close()


def test_same_tokens_whatever_the_budget(pack: Pack) -> None:
    """Greedy answers with every expert in RAM and with room for one token's experts only."""
    answers = []
    for n_slots in (None, 8, 1):
        with load(pack.path, context=256) as engine:
            if n_slots:
                engine._experts._store = ExpertStore(pack, pack.page.bytes, n_slots)
            answers.append(engine.logits([5, 9, 13, 40, 41, 42, 99, 7] * 6))
    assert all(torch.equal(answers[0], answer) for answer in answers)
