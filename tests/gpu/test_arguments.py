"""The arguments that `quant.gpu` refuses, and what importing it does not import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant import gpu
from quant.formats.page import PageLayout
from quant.formats.qtensor import QTensor
from tests.gpu.pages import random_matrix, random_routing, random_slab

ROOT = Path(__file__).parents[2]
LAYOUT = PageLayout("nf4", 64, 32)


def arguments(device: str) -> dict[str, object]:
    chosen, weights = random_routing(2, 2, 4)
    tensors = {
        "x": torch.randn(2, 64), "slab": random_slab(LAYOUT, 2), "slots": torch.tensor([0, 1, -1, -1]).int(),
        "chosen": chosen, "weights": weights,
    }  # fmt: skip
    return {"layout": LAYOUT} | {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x", lambda x: x[:, :63], r"x is torch.float32 \[2, 63\].*\[any, 64\]"),
        ("x", lambda x: x.double(), "x is torch.float64"),
        ("x", lambda x: x.expand(2, 2, 64)[0].T.contiguous().T, "x is .*contiguous"),
        ("slab", lambda s: s[:, :-64], r"slab is torch.uint8 \[2, 4032\].*\[any, 4096\]"),
        ("slots", lambda s: s.long(), "slots is torch.int64.*torch.int32"),
        ("chosen", lambda c: c[:1], r"chosen is torch.int64 \[1, 2\].*\[2, any\]"),
        ("chosen", lambda c: c.float(), "chosen is torch.float32"),
        ("weights", lambda w: w[:, :1], r"weights is torch.float32 \[2, 1\].*\[2, 2\]"),
        ("layout", lambda _: PageLayout("bf16", 64, 32), "No GPU kernel computes bf16"),
        ("layout", lambda _: PageLayout("int8", 64, 32), r"slab is .*\[2, 4096\].*\[any, 12288\]"),
    ],
)
def test_wrong_arguments_are_named(name: str, change, words: str, device: str) -> None:  # type: ignore[no-untyped-def]
    given = arguments(device)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=words):
        gpu.experts(**given)


def test_no_tokens_no_experts_no_slots(device: str) -> None:
    given = arguments(device)
    for name, stop in (("slots", 0), ("slab", 0)):
        assert not gpu.experts(**{**given, name: given[name][:stop]}).any()
    nobody = {name: given[name][:0] for name in ("x", "chosen", "weights")}
    rows = gpu.experts(**{**given, **nobody})
    assert rows.shape == (0, 2, 64) and gpu.combine(rows).shape == (0, 64)


def test_wrong_matrices_are_named(device: str) -> None:
    q = random_matrix("nf4", 20, 40, seed=0).to(device)
    x = torch.randn(1, 40).to(device)
    with pytest.raises(ValueError, match="39 columns, the nf4 matrix 40"):
        gpu.linear(x[:, :39], q)
    with pytest.raises(ValueError, match="no part 'scale'"):
        gpu.linear(x, QTensor("nf4", q.shape, {k: v for k, v in q.parts.items() if k != "scale"}))
    with pytest.raises(ValueError, match=r"with 1024 bytes .*with 1536 bytes"):
        gpu.linear(x, QTensor("nf4", (40, 40), q.parts))
    with pytest.raises(ValueError, match="No GPU kernel computes f32"):
        gpu.dequantize(QTensor("f32", (1, 1), {"weight": torch.ones(1, 1).to(device)}))
    with pytest.raises(ValueError, match=r"not to torch\.int8"):
        gpu.dequantize(q, torch.int8)


def test_what_is_not_served_is_left_to_others(device: str) -> None:
    q = random_matrix("nf4", 20, 40, seed=0).to(device)
    assert gpu.linear(torch.randn(1, 40, dtype=torch.float64).to(device), q) is None
    assert gpu.linear(torch.randn(1, 40).to(device).requires_grad_(), q) is None
    assert gpu.linear(torch.randn(1, 40, device="meta"), q) is None


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8, 9, 400])
def test_the_workspace_is_an_upper_bound(n: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout = PageLayout("int8", 520, 264)
    chosen, weights = random_routing(n, 2, 4)
    x, slab, slots = torch.randn(n, 520), random_slab(layout, 2), torch.tensor([0, -1, -1, 1]).int()
    given = [t.to("cuda") for t in (slab, slots, chosen, weights)]
    x = x.to("cuda")
    gpu.experts(x, layout, *given)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gpu.experts(x, layout, *given)
    rounding = 20 * 512  # of the allocator, per tensor
    assert (
        torch.cuda.max_memory_allocated() - before <= gpu.workspace_bytes(layout, n, 2, x_bytes=4) + rounding
    )


def test_triton_is_neither_loaded_early_nor_needed() -> None:
    code = (
        "import sys, quant.gpu as g; g.available(); assert 'triton' not in sys.modules; "
        "sys.modules['triton'] = None; sys.exit(g.available())"
    )
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0
    )
