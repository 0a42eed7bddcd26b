"""The ring equals a full cache with a mask, for any chunking and any rewind within its slack."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.kv.cache import GlobalKV, KVCache, WindowKV, row_width
from localmimo.kv.sizes import kv_row_bytes
from localmimo.model.attention import Rows, extend, rope_table
from localmimo.model.config import LayerSpec
from localmimo.model.transformer import ROPE_TABLE, rope_rows

WINDOW, SLACK = 8, 5
SPEC = LayerSpec("window", "dense", 4, 2, 6, 4, 2, 1e4, WINDOW, True)
GLOBAL = LayerSpec("global", "dense", 4, 2, 6, 4, 2, 1e4, None, False)
SINK = torch.linspace(-1, 1, 4)


def joined(start: int, n: int) -> torch.Tensor:
    """Queries, keys and values that depend on the position alone."""
    at = torch.arange(start, start + n, dtype=torch.float32)
    return torch.sin(at[:, None] * torch.arange(1, 1 + sum(SPEC.qkv_rows)) * 0.7)


def append(layer: GlobalKV | WindowKV, n: int, spec: LayerSpec = SPEC) -> torch.Tensor:
    start, rows = layer.length, layer.next_rows(n)
    rope = rope_table(torch.arange(start, start + n), *spec.rope)
    out = extend(joined(start, n), rope, rows, start, spec, SINK if spec.sink else None, 0.7)
    layer.commit(rows, n)
    return out


def whole(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Everything in one piece, in a cache without a ring."""
    rows = Rows(*(torch.zeros(2, length, row_width(d, dtype), dtype=dtype) for d in (6, 4)))
    rope = rope_table(torch.arange(length), *SPEC.rope)
    return extend(joined(0, length), rope, rows, 0, SPEC, SINK, 0.7)


moves = st.lists(st.tuples(st.sampled_from(["append", "rewind", "restore"]), st.integers(0, 40)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(moves)
def test_ring_equals_full_cache(moves: list[tuple[str, int]]) -> None:
    ring, length, kept = WindowKV(SPEC, torch.float32, SLACK), 0, None
    for move, n in moves:
        if move == "append" and n:
            got = append(ring, n)
            length += n
            torch.testing.assert_close(got, whole(length)[-n:], rtol=0, atol=1e-5)
            kept = kept if n % 2 else (length, ring.copy())
        elif move == "rewind" and ring.can_rewind(max(0, length - n)):
            length = max(0, length - n)
            ring.rewind(length)
            kept = kept if kept and kept[0] <= length else None
        elif move == "restore" and kept:
            length = kept[0]
            ring.restore(length, *kept[1])
        assert ring.length == length


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, SLACK + 1))
def test_slack_is_always_there(length: int, back: int) -> None:
    ring = WindowKV(SPEC, torch.float32, SLACK)
    for _ in range(length):
        append(ring, 1)
    assert ring.can_rewind(max(0, length - back))


def test_a_window_that_is_gone_cannot_be_rewound_to() -> None:
    ring = WindowKV(SPEC, torch.float32, SLACK)
    append(ring, 50)
    assert not ring.can_rewind(50 - SLACK - 2)


def rewindable(ring: WindowKV) -> list[int]:
    return [length for length in range(ring.length + 1) if ring.can_rewind(length)]


def test_a_rewound_ring_counts_the_rows_it_had_overwritten() -> None:
    """After 50 tokens the ring holds positions 37 to 49; going back and on again brings no older one back."""
    ring = WindowKV(SPEC, torch.float32, SLACK)
    for _ in range(50):
        append(ring, 1)
    assert rewindable(ring) == [44, 45, 46, 47, 48, 49, 50]
    ring.rewind(45)
    append(ring, 1)
    assert rewindable(ring) == [44, 45, 46]


def test_a_restored_ring_holds_one_window() -> None:
    ring = WindowKV(SPEC, torch.float32, SLACK)
    append(ring, 50)
    kept = ring.copy()
    append(ring, 3)
    ring.restore(50, *kept)
    assert kept[0].shape[1] == WINDOW
    assert all(map(torch.equal, ring.stored_rows(), kept))
    assert rewindable(ring) == [49, 50]


def test_published_bytes_per_token() -> None:
    """V2-Flash keeps 23,040 bytes per token in nine global layers and 25.6 MB in 39 windows, by its shapes."""
    global_layer = LayerSpec("global", "moe", 64, 4, 192, 128, 64, 5e6, None, False)
    window_layer = LayerSpec("window", "moe", 64, 8, 192, 128, 64, 1e4, 128, True)
    assert 9 * GlobalKV.nbytes(global_layer, 1) == 23_040
    assert 39 * WindowKV.nbytes(window_layer) == 39 * 128 * 5_120 == 25_559_040


def test_int8_rows_carry_their_scale() -> None:
    assert kv_row_bytes(GLOBAL, torch.int8.itemsize) == 2 * (6 + 4 + 2 * 4)
    ring = WindowKV(SPEC, torch.int8, SLACK)
    for n in (3, 40, 1, 7):
        got = append(ring, n)
    torch.testing.assert_close(got, whole(51)[-7:], rtol=0, atol=0.03)
    torch.testing.assert_close(got, whole(51, torch.int8)[-7:], rtol=0, atol=1e-5)


def test_a_global_layer_takes_memory_only_where_it_is_written() -> None:
    wide = LayerSpec("global", "dense", 4, 4, 192, 128, 64, 1e4, None, False)
    before = resident_bytes()
    layer = GlobalKV(wide, 1 << 20, torch.bfloat16)
    assert resident_bytes() - before < 8 << 20 < GlobalKV.nbytes(wide, 1 << 20)
    keys, values = layer.reserve(10_000)
    keys.zero_(), values.zero_()
    # Each head of the keys and of the values may begin and end within a page of two megabytes.
    assert resident_bytes() - before < GlobalKV.nbytes(wide, 10_000) + 8 * (4 << 20) + (8 << 20)


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_cache_snapshot_and_clear() -> None:
    cache = KVCache([GLOBAL, SPEC], 100, torch.float32, SLACK)

    def extended(n: int) -> torch.Tensor:
        seen = [append(layer, n, spec) for layer, spec in zip(cache.layers, (GLOBAL, SPEC), strict=True)]
        cache.advance(n)
        return torch.cat(seen)

    extended(20)
    here = cache.snapshot()
    first = extended(30)
    assert not cache.rewind(20)
    cache.restore(here)
    torch.testing.assert_close(extended(30), first, rtol=0, atol=1e-6)
    cache.clear()
    assert cache.length == 0 and cache.layers[0].length == 0 and cache.layers[1].length == 0


@pytest.mark.parametrize("position", [0, 5, ROPE_TABLE - 3, ROPE_TABLE - 4, ROPE_TABLE, 987_654_321])
def test_kept_rotations_are_those_worked_out(position: int) -> None:
    for n in (1, 4):
        expected = rope_table(torch.arange(position, position + n), 32, 10000.0)
        assert all(map(torch.equal, rope_rows(position, n, 32, 10000.0), expected))
