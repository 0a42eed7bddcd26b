"""Budgets: what fits, what is refused, and sizes written by people."""

from pathlib import Path

import pytest
import torch

from localmimo.errors import BadRequest, DoesNotFit
from localmimo.hardware.host import Machine, _cgroup
from localmimo.hardware.units import format_bytes, parse_bytes
from localmimo.kv.cache import GlobalKV, WindowKV
from localmimo.kv.sizes import draft_bytes, kv_row_bytes
from localmimo.limits import N_SNAPSHOTS, PREFILL_CHUNK, SLACK
from localmimo.planning.memory import Plan, make_plan, stretch_tokens
from tests.model.published import FLASH, parse

PAGE = 13_369_344


def flash_plan(ram_bytes: int, context: int = 32_768) -> Plan:
    return make_plan(
        parse(FLASH),
        dense_bytes=6_400_000_000,
        page_bytes=PAGE,
        context=context,
        ram_bytes=ram_bytes,
        slack=16,
    )


def test_slots_take_what_is_left() -> None:
    plan = flash_plan(96 << 30)
    assert plan.used_bytes <= plan.ram_bytes < plan.used_bytes + PAGE
    assert plan.n_pages == 12_032


def test_no_more_slots_than_pages() -> None:
    assert flash_plan(1 << 40).n_slots == 12_032


def test_kv_bytes_of_flash() -> None:
    """23,040 bytes per token and 25.6 MB of windows, plus slack and snapshots of the windows."""
    grows = flash_plan(96 << 30, 20_000).kv_bytes - flash_plan(96 << 30, 10_000).kv_bytes
    assert grows == 10_000 * 23_040
    windows = flash_plan(96 << 30, 1).kv_bytes - 23_040
    assert windows == 25_559_040 * (1 + N_SNAPSHOTS) + 39 * 16 * 5_120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_plan_counts_what_the_cache_takes(dtype: torch.dtype) -> None:
    for spec in parse(FLASH).layers:
        held = GlobalKV(spec, 64, dtype) if spec.window is None else WindowKV(spec, dtype)
        rows = 64 if spec.window is None else spec.window + SLACK
        assert sum(part.nbytes for part in (held._keys, held._values)) == rows * kv_row_bytes(
            spec, dtype.itemsize
        )


def test_too_small_is_refused_with_a_budget_that_works() -> None:
    with pytest.raises(DoesNotFit, match="one token's 376 experts 5.0 GB") as refused:
        flash_plan(8 << 30)
    needed = parse_bytes(str(refused.value).split("ram=")[1].split(" ")[0])
    assert flash_plan(needed).n_slots >= 376
    with pytest.raises(DoesNotFit):
        flash_plan(needed - (2 << 20))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("22GiB", 22 << 30),
        ("96GB", 96 * 10**9),
        ("512MiB", 512 << 20),
        ("1e9", 10**9),
        ("2G", 2 << 30),
        (" 1.5 kib ", 1536),
        (7, 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "3 XB", "1,5GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadRequest, match="size"):
        parse_bytes(text)


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (13_369_344, 160_900_000_000, 999_999, 1_000_000, 912e6)] == [
        "13.4 MB",
        "161 GB",
        "1.0 MB",
        "1.0 MB",
        "912 MB",
    ]


def test_this_machine() -> None:
    machine = Machine.probe()
    assert 0 < machine.free_ram_bytes <= machine.ram_bytes and machine.n_cores >= 1
    assert machine.automatic_ram_bytes < machine.free_ram_bytes


def test_a_control_group_limits(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert _cgroup(tmp_path) == (1 << 30, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup(tmp_path)[0] == 1 << 62


def gpu_plan(
    vram_bytes: int, *, ram_bytes: int = 1 << 40, context: int = 32_768, max_batch: int = 1, n_drafts: int = 0
) -> Plan:
    return make_plan(
        parse(FLASH), dense_bytes=6_400_000_000, page_bytes=PAGE, context=context, ram_bytes=ram_bytes,
        slack=16, vram_bytes=vram_bytes, lookup_bytes=1_000_000_000, max_batch=max_batch, n_drafts=n_drafts,
    )  # fmt: skip


def test_embeddings_are_in_ram_and_the_other_weights_on_the_gpu() -> None:
    plan = gpu_plan(32 << 30)
    assert plan.vram is not None
    assert (plan.dense_bytes, plan.vram.dense_bytes) == (1_000_000_000, 5_400_000_000)
    assert plan.vram.used_bytes <= 32 << 30 < plan.vram.used_bytes + PAGE


@pytest.mark.parametrize("max_batch", [1, 4])
def test_experts_leave_the_gpu_as_all_sequences_grow(max_batch: int) -> None:
    plan = gpu_plan(32 << 30, max_batch=max_batch)
    assert plan.vram is not None
    first, tokens = plan.gpu_slots, plan.vram.slot_tokens
    assert first == plan.vram.n_slots
    assert [first - plan.gpu_slots_at(n) for n in (1, tokens, tokens + 1)] == [
        max_batch, max_batch, 2 * max_batch
    ]  # fmt: skip
    assert first - plan.gpu_slots_at(plan.context) == plan.vram.kv_slots > 0


def test_ram_has_room_for_the_experts_that_leave_the_gpu() -> None:
    plan = gpu_plan(32 << 30)
    assert plan.n_slots == plan.n_pages - plan.gpu_slots_at(plan.context)
    assert plan.held_slots_at(plan.context) == plan.n_pages


def test_ram_has_room_for_one_token_though_the_gpu_holds_all_experts() -> None:
    config = parse(FLASH)
    plan = gpu_plan(1 << 40)
    assert plan.gpu_slots_at(plan.context) == plan.n_pages
    assert plan.n_slots == config.pages_per_token


@pytest.mark.parametrize("max_batch", [1, 3])
def test_every_sequence_keeps_rows_for_its_drafts(max_batch: int) -> None:
    config = parse(FLASH)
    for_drafts = max_batch * draft_bytes(config, 2, 16, 2)
    on_gpu = [gpu_plan(64 << 30, max_batch=max_batch, n_drafts=n).vram for n in (0, 2)]
    assert on_gpu[0] is not None and on_gpu[1] is not None
    assert on_gpu[1].kv_bytes - on_gpu[0].kv_bytes == for_drafts
    in_ram = [
        make_plan(
            config, dense_bytes=1, page_bytes=PAGE, context=1000, ram_bytes=1 << 40, slack=16,
            n_drafts=n, max_batch=max_batch,
        ).kv_bytes
        for n in (0, 2)
    ]  # fmt: skip
    assert in_ram[1] - in_ram[0] == for_drafts


@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (PREFILL_CHUNK, 1), (PREFILL_CHUNK + 1, 2)])
def test_a_segment_has_no_more_chunks_than_the_context(context: int, tokens: int) -> None:
    assert stretch_tokens(parse(FLASH), context, 1 << 50) == tokens * PREFILL_CHUNK
    assert stretch_tokens(parse(FLASH), context, 0) == PREFILL_CHUNK


def group(folder: Path, limit: int, used: int, cached: tuple[int, int] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    if cached is not None:
        lines = ("anon 7", f"active_file {cached[0]}", f"inactive_file {cached[1]}")
        (folder / "memory.stat").write_text("\n".join(lines))


def test_the_page_cache_of_a_control_group_counts_as_free(tmp_path: Path) -> None:
    group(tmp_path, 1000, 600, (200, 100))
    assert _cgroup(tmp_path) == (1000, 300)
    group(tmp_path, 1000, 600, (500, 300))
    assert _cgroup(tmp_path) == (1000, 0)


def test_the_control_group_with_the_least_room_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slice/service\n")
    group(tmp_path / "slice", 5000, 4000)
    group(tmp_path / "slice" / "service", 3000, 100)
    assert _cgroup(tmp_path, own) == (5000, 4000)
    group(tmp_path / "slice" / "service", 3000, 2500)
    assert _cgroup(tmp_path, own) == (3000, 2500)


def test_what_a_control_group_uses_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmimo.hardware.host._cgroup", lambda: (1000, 400))
    machine = Machine.probe()
    assert (machine.ram_bytes, machine.free_ram_bytes) == (1000, 600)
    monkeypatch.setattr("localmimo.hardware.host._cgroup", lambda: (1000, 1400))
    assert Machine.probe().free_ram_bytes == 0


@pytest.mark.parametrize(("free", "budget"), [(1, 0), (10, 8), (20, 18), (40, 36)])
def test_two_gibibytes_or_a_tenth_are_left_to_the_system(free: int, budget: int) -> None:
    assert Machine(64 << 30, free << 30, 8).automatic_ram_bytes == budget << 30
