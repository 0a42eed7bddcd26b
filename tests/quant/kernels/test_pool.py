"""The pool and the switch of instruction sets: nothing here may change a result or hang."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from quant import kernels
from quant.ops.quantize import quantize
from tests.quant.kernels.isa import needs_native

pytestmark = needs_native


def test_unknown_names_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="portable"):
        kernels.force("mmx")
    with pytest.raises(ValueError, match="threads, not 0"):
        kernels.set_threads(0)


def test_the_switch_is_reported() -> None:
    kernels.force("portable")
    assert kernels.isa() == "portable"
    kernels.force(None)
    assert kernels.isa() == kernels.supported()[0]


def test_calls_from_several_threads_take_turns() -> None:
    kernels.set_threads(2)
    q, x = quantize(torch.randn(256, 256), "nf4"), torch.randn(3, 256)
    expected = kernels.linear(x, q)
    wrong = []

    def work() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(kernels.linear(x, q), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_starts_its_own_workers() -> None:
    kernels.set_threads(2)
    q, x = quantize(torch.randn(256, 256), "int8"), torch.randn(1, 256)
    expected = kernels.linear(x, q)
    child = os.fork()
    if child == 0:
        ok = all(torch.equal(kernels.linear(x, q), expected) for _ in range(20))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(kernels.linear(x, q), expected)


def test_pinned_workers_compute_the_same() -> None:
    q, x = quantize(torch.randn(256, 256), "nf4"), torch.randn(1, 256)
    kernels.set_threads(2)
    expected = kernels.linear(x, q)
    if kernels.pin([0]):
        assert torch.equal(kernels.linear(x, q), expected)
        kernels.pin([])
