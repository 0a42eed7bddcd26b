"""Budgets: what fits, what is refused, and sizes written by people."""

from pathlib import Path

import pytest
import torch

from localmimo.errors import BadRequest, DoesNotFit
from localmimo.hardware.host import Machine, _cgroup, format_bytes, parse_bytes
from localmimo.kv.cache import GlobalKV, WindowKV
from localmimo.kv.sizes import kv_row_bytes
from localmimo.limits import N_SNAPSHOTS, SLACK
from localmimo.planning.memory import Plan, make_plan
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
