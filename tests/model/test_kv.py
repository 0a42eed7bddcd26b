"""The ring equals a full cache with a mask, for any chunking and any rewind within its slack."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmimo.attend import attend, window_mask
from localmimo.config import LayerSpec
from localmimo.kv import GlobalKV, KVCache, WindowKV

WINDOW, SLACK = 8, 5
SPEC = LayerSpec("window", "dense", 4, 2, 6, 4, 2, 1e4, WINDOW, True)
GLOBAL = LayerSpec("global", "dense", 4, 2, 6, 4, 2, 1e4, None, False)


def rows(start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that depend on the position alone."""
    at = torch.arange(start, start + n, dtype=torch.float32)
    keys = torch.sin(at[None, :, None] * torch.arange(1, 13).view(2, 1, 6))
    return keys, torch.cos(at[None, :, None] * torch.arange(1, 9).view(2, 1, 4))


def look(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    q = torch.sin(queries[None, :, None] * torch.arange(1, 25).view(4, 1, 6) * 0.7)
    return attend(q, keys, values, window_mask(queries, positions, WINDOW), torch.linspace(-1, 1, 4), 0.4)


moves = st.lists(st.tuples(st.sampled_from(["append", "rewind", "restore"]), st.integers(0, 40)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(moves)
def test_ring_equals_full_cache(moves: list[tuple[str, int]]) -> None:
    ring, length, kept = WindowKV(SPEC, torch.float32, SLACK), 0, None
    for move, n in moves:
        if move == "append" and n:
            queries = torch.arange(length, length + n)
            got = look(queries, *ring.append(*rows(length, n)))
            length += n
            torch.testing.assert_close(
                got, look(queries, *rows(0, length), torch.arange(length)), rtol=0, atol=1e-5
            )
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
    for start in range(length):
        ring.append(*rows(start, 1))
    assert ring.can_rewind(max(0, length - back))


def test_a_window_that_is_gone_cannot_be_rewound_to() -> None:
    ring = WindowKV(SPEC, torch.float32, SLACK)
    ring.append(*rows(0, 50))
    assert not ring.can_rewind(50 - SLACK - 2)


def test_published_bytes_per_token() -> None:
    """V2-Flash keeps 23,040 bytes per token in nine global layers and 25.6 MB in 39 windows, by its shapes."""
    global_layer = LayerSpec("global", "moe", 64, 4, 192, 128, 64, 5e6, None, False)
    window_layer = LayerSpec("window", "moe", 64, 8, 192, 128, 64, 1e4, 128, True)
    assert 9 * GlobalKV.nbytes(global_layer, 1) == 23_040
    assert 39 * WindowKV.nbytes(window_layer) == 39 * 128 * 5_120 == 25_559_040


def test_cache_snapshot_and_clear() -> None:
    cache = KVCache([GLOBAL, SPEC], 100, torch.float32, SLACK)

    def append(start: int, n: int) -> torch.Tensor:
        seen = [layer.append(*rows(start, n)) for layer in cache.layers]
        cache.advance(n)
        return look(torch.arange(start, start + n), *seen[1])

    append(0, 20)
    here = cache.snapshot()
    first = append(20, 30)
    assert not cache.rewind(20)
    cache.restore(here)
    torch.testing.assert_close(append(20, 30), first, rtol=0, atol=1e-6)
    cache.clear()
    assert cache.length == 0 and cache.layers[0].length == 0 and cache.layers[1].length == 0
