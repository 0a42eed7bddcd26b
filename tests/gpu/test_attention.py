"""Attention on the GPU against the torch reference: rings, windows, sinks, drafts, prompts, every type of cache."""

import pytest
import torch

from localmimo.kv.cache import row_width
from localmimo.model.attention import Rows, extend_reference, rope_table
from localmimo.model.config import LayerSpec
from quant import gpu
from tests.gpu.pages import relative

GLOBAL = LayerSpec("global", "moe", 8, 2, 24, 16, 8, 1e4, None, False)
WINDOW = LayerSpec("window", "moe", 6, 2, 48, 32, 16, 1e4, 12, True)  # three heads share keys
WIDE = LayerSpec("global", "moe", 4, 1, 192, 128, 64, 5e6, None, True)  # V2's own
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def check(
    spec: LayerSpec, position: int, n: int, rows: int, dtype: torch.dtype, kv: torch.dtype, device: str,
    block: int = 0,
) -> None:  # fmt: skip
    """One call against the reference in float32, and what it left in the cache; with rows in blocks of `block`."""
    draw = torch.Generator().manual_seed(position + n)
    first = (
        0 if spec.window is None else max(0, position - spec.window + 1) if rows >= n + spec.window - 1 else 0
    )
    shapes = [(spec.n_kv_heads, rows, row_width(d, kv)) for d in (spec.head_dim, spec.v_head_dim)]
    wanted = Rows(*(torch.zeros(shape, dtype=kv) for shape in shapes), first)
    found = Rows(*(torch.zeros(shape, dtype=kv, device=device) for shape in shapes), first)
    if block:
        found = in_blocks(found, block, -(-rows // block))
    sink = torch.randn(spec.n_heads, generator=draw) if spec.sink else None
    joined = torch.randn(position + n, sum(spec.qkv_rows), generator=draw).to(dtype)
    cos, sin = rope_table(torch.arange(position + n), *spec.rope)
    for at, end in ((first, position), (position, position + n)):
        if at == end:
            continue
        part, table = joined[at:end], (cos[at:end], sin[at:end])
        expected = extend_reference(part.float(), table, wanted, at, spec, sink, 0.7)
        if at < position and position > 100:  # a minute in the interpreter
            found.put(at, *(x.to(device) for x in wanted.get(at, end)))
            continue
        there = [x if x is None else x.to(device) for x in (part, *table, sink)]
        got = gpu.attend(
            there[0], there[1], there[2], found.keys, found.values, positions=torch.arange(at, end, device=device),
            table=found.table, heads=spec.n_heads, head_dims=(spec.head_dim, spec.v_head_dim), first=first,
            window=spec.window,
            sink=there[3], scale=spec.head_dim**-0.5, value_scale=0.7,
        )  # fmt: skip
    assert got.dtype == dtype and relative(got, expected) < BOUNDS[dtype]
    held = first, position + n
    for ours, theirs in zip(found.get(*held), wanted.get(*held), strict=True):
        if kv == torch.int8:
            assert (ours.cpu().int() - theirs.int())[..., :-4].abs().max() <= 1
        else:
            assert relative(ours, theirs) < (1e-6 if kv == torch.float32 else 4e-3)


def in_blocks(rows: Rows, positions: int, n_blocks: int) -> Rows:
    """Room for as many rows in a slab of which every second slot is another's."""
    heads, device = len(rows.keys), rows.keys.device
    widths = [x.shape[-1] * x.element_size() for x in (rows.keys, rows.values)]
    edge, part = 64, [heads * positions * width for width in widths]
    slab = torch.full((2 * n_blocks, edge + sum(part)), 255, dtype=torch.uint8, device=device)
    views = [
        slab[:, at : at + size].view(rows.keys.dtype).unflatten(1, (heads, positions, x.shape[-1]))
        for at, size, x in zip((edge, edge + part[0]), part, (rows.keys, rows.values), strict=True)
    ]
    order = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(5))
    return Rows(*views, table=(2 * order + 1).int().to(device))


@pytest.mark.parametrize(
    ("n", "dtype", "kv"),
    [
        (1, torch.bfloat16, torch.int8),
        (4, torch.float32, torch.float32),
        (9, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_keys_in_blocks_of_a_slab(n: int, dtype: torch.dtype, kv: torch.dtype, device: str) -> None:
    check(GLOBAL, 20, n, 48, dtype, kv, device, block=16)


def test_blocks_that_are_no_multiple_of_anything(device: str) -> None:
    check(GLOBAL, 600, 1, 640, torch.bfloat16, torch.int8, device, block=13)


@pytest.mark.parametrize("spec", [GLOBAL, WINDOW], ids=["global", "window"])
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_after_a_prompt(spec: LayerSpec, dtype: torch.dtype, kv: torch.dtype, device: str) -> None:
    check(spec, 13, 1, 28 if spec.window else 32, dtype, kv, device)


@pytest.mark.parametrize("n", [1, 4])
def test_drafts_in_a_ring_that_has_gone_round(n: int, device: str) -> None:
    check(WINDOW, 101 + 30, n, 28, torch.float32, torch.float32, device)


def test_the_beginning(device: str) -> None:
    check(GLOBAL, 0, 20, 24, torch.bfloat16, torch.bfloat16, device)


def test_a_chunk_behind_a_window(device: str) -> None:
    check(WINDOW, 20, 38, 49, torch.float32, torch.float32, device)


def test_many_keys_are_split(device: str) -> None:
    from quant.gpu import attention_launch

    assert attention_launch.max_splits(2, 600) == 2
    check(GLOBAL, 600, 2, 640, torch.float32, torch.float32, device)
    check(GLOBAL, 600, 1, 640, torch.bfloat16, torch.int8, device)


def test_the_widths_of_the_real_models(device: str) -> None:
    check(WIDE, 0, 3, 32, torch.bfloat16, torch.bfloat16, device)
    check(WIDE, 0, 1, 32, torch.float32, torch.int8, device)


def test_wrong_rows_are_named(device: str) -> None:
    keys, values = torch.zeros(2, 8, 24, device=device), torch.zeros(2, 8, 16, device=device)
    table, joined = torch.ones(9, 4, device=device), torch.zeros(9, 8 * 24 + 2 * 40, device=device)
    facts = {"positions": torch.arange(9, device=device), "heads": 8, "head_dims": (24, 16)}
    facts |= {"first": 0, "window": None, "sink": None}
    facts |= {"scale": 1.0, "value_scale": 1.0}
    with pytest.raises(ValueError, match="9 rows .* do not go with keys"):
        gpu.attend(joined, table, table, keys, values, **facts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"joined is .*\[9, 271\].*\[9, 272\]"):
        gpu.attend(joined[:, 1:].contiguous(), table, table, keys, values, **facts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="values is torch.float32"):
        gpu.attend(joined, table, table, keys.bfloat16(), values, **facts)  # type: ignore[arg-type]
    assert not gpu.attends(joined, torch.zeros(2, 8, 10, dtype=torch.int8), (6, 6))
