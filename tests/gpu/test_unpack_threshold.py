"""From how many tokens on a packed matrix is unpacked: measured once per GPU, kept, and followed."""

import time
from unittest.mock import patch

import pytest
import torch

from localmimo import load
from localmimo.hardware import unpack_threshold as crossover
from localmimo.hardware.unpack_threshold import crossing
from quant import gpu
from tests.gpu import pretended
from tests.gpu.engines import PLAIN
from tests.gpu.pages import random_matrix


@pytest.mark.parametrize(
    ("took", "tokens"),
    [
        ([(1, 9), (2, 9), (4, 9), (8, 9), (16, 10), (32, 12), (64, 14)], 256),
        ([(1, 9), (2, 1), (4, 9), (8, 7), (16, 10), (32, 12), (64, 14)], 128),  # what was an accident is none
        ([(9, 1)] * 7, 16),
        ([(1, 9)] * 7, 1025),
        ([(1, 9), (2, 9)], 257),  # no time for more: as it is built in
        ([(9, 1)], 16),
        ([], 257),
    ],
)
def test_crossing(took: list[tuple[float, float]], tokens: int) -> None:
    assert crossing(took) == tokens


def test_measured_once_and_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    asked: list[int] = []

    def product(x, q, *, unpacked):  # type: ignore[no-untyped-def]
        asked.append(len(x))
        time.sleep(1e-3 if unpacked == (len(x) < 64) else 1e-5)

    with pretended.device(), patch.object(gpu, "product", product), patch.object(crossover, "MOST_S", 9.0):
        for _ in range(2):
            with load(**PLAIN | {"dtype": "bfloat16"}, device="cuda") as engine:
                assert engine.effective()["unpacked_from"] == {"int8": 64}
            assert sorted(set(asked)) == list(crossover.COUNTS) and len(asked) == 7 * 2 * 4
        assert gpu._unpacked_from.pop((torch.device("cuda", 0), "int8")) == 64
    with load(**PLAIN, device="cpu") as engine:
        assert engine.effective()["unpacked_from"] is None


def test_both_ways_on_either_side(device: str) -> None:
    q = random_matrix("nf4", 40, 96, seed=2).to(device)
    gpu.unpack_from(q.device, "nf4", 6)
    try:
        for n, unpacked in ((5, False), (6, True)):
            x = torch.randn(n, 96).bfloat16().to(device)
            assert torch.equal(gpu.linear(x, q), gpu.product(x, q, unpacked=unpacked))
        assert not torch.equal(*(gpu.product(x, q, unpacked=way) for way in (True, False)))
    finally:
        del gpu._unpacked_from[q.device, "nf4"]
    with pytest.raises(ValueError, match="x is torch.float32"):
        gpu.product(x.float(), q, unpacked=True)
