"""Steps from records give the bits of steps without, whatever grows, goes round or moves between them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

from localmimo import Engine, load
from localmimo.decode.cuda_graphs import Graphs, GraphStep
from localmimo.decode.session import Session
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.kv.block_table import BlockTable
from tests.gpu import pretended, recording
from tests.gpu.engines import PLAIN, on_gpu

STEPS = [17, 300, 5, 9, 1023, 44, 45, 8]


@contextmanager
def without_records() -> Iterator[None]:
    def forward(self, tokens, cache, experts, *rest):  # type: ignore[no-untyped-def]
        return self._model.forward(tokens, cache, experts, *rest)

    with patch.object(Graphs, "forward", forward):
        yield


def recorded(engine: Engine) -> list[GraphStep]:
    assert engine._graphs is not None
    return [step for steps in engine._graphs._steps.values() for step in steps.values() if step is not None]


def move(engine: Engine, session: Session, i: int) -> None:
    """What may come between two steps: experts go, come back, and go altogether."""
    gpu_slots = engine._store.gpu
    assert isinstance(gpu_slots, GpuSlots)
    if i == 3:
        other = BlockTable(gpu_slots, 1, 60)
        other.reserve(60)
        assert gpu_slots.n_slots + 60 == gpu_slots._tier.n_slots - len(session._state.cache._blocks.slots)  # type: ignore[union-attr]
        other.cut(0)
    elif i == 5:
        engine._store.promote([(layer, e) for layer in engine.config.moe_layers for e in range(28)][:40])
    elif i == 6:
        assert engine._experts.shrink()  # type: ignore[union-attr]


@pytest.mark.parametrize(("share", "kv"), [(1.0, "int8"), (0.4, "float32")])
def test_the_same_bits(share: float, kv: str) -> None:
    found, stretches = [], []
    for way in (nullcontext(), without_records()):
        few = patch("localmimo.decode.cuda_graphs.MAX_GRAPHS", 6)
        with way, few, on_gpu(share, kv=kv) as engine, engine.session() as session:
            rows = session._state.cache.layers[1].rows  # type: ignore[union-attr]
            n = rows - 4  # the rings go round, and blocks are added, while it steps
            session.sync([(7 * i) % 2000 for i in range(n)])
            taken = len(session._state.cache._blocks.slots)  # type: ignore[union-attr]
            logits = []
            for i, token in enumerate(STEPS):
                move(engine, session, i)
                logits.append(session.step(token))
                stretches += [len(step._graphs) for step in recorded(engine)]
            assert len(session._state.cache._blocks.slots) > taken or kv == "int8"  # type: ignore[union-attr]
            logits.append(session.extend([3, 4, 5]))
            session.rewind(2)
            logits.append(session.extend([6, 7, 8]))
            assert engine.effective()["graphs"] == "on"
            found.append([*logits[:-2], *logits[-2], *logits[-1]])
            counted = engine.counters
            assert counted.gpu_pages + counted.ram_pages + counted.disk_pages > len(STEPS) * 7 * 4
    assert max(stretches) > 1 and all(torch.equal(*both) for both in zip(*found, strict=True))


def test_everything_on_the_gpu_is_one_record() -> None:
    with on_gpu(1.0) as engine, engine.session() as session:
        session.sync([1, 2, 3])
        for token in STEPS[:4]:
            session.step(token)
        (step,) = recorded(engine)
        assert list(step._graphs) == [(0, len(engine.config.layers) - 1, False)]
        seen: list[int] = []
        engine.record(lambda layer, chosen: seen.append(layer))  # who wants to hear of choices is told
        session.step(5)
        engine.record(None)
        assert seen == list(engine.config.moe_layers)


def test_a_record_that_is_refused_is_a_line_and_no_end() -> None:
    def refuse(self, stretch):  # type: ignore[no-untyped-def]
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    with on_gpu(1.0) as engine, engine.session() as session:
        session.sync([1, 2, 3])
        with patch.object(GraphStep, "record", refuse):
            found = [session.step(token) for token in STEPS[:3]]
        assert engine.effective()["graphs"] == "CUDA error: operation not permitted"
    with load(**PLAIN, device="cpu", draft=0) as engine, engine.session() as session:
        assert engine.effective()["graphs"] is None
        session.sync([1, 2, 3])
        for logits, token in zip(found, STEPS, strict=False):
            assert torch.allclose(logits, session.step(token), atol=1e-3)


def test_what_is_pretended_of_graphs() -> None:
    """Nothing runs while one records, the host learns nothing, and a replay works on the same tensors."""
    with pretended.device() as device, torch.inference_mode():
        x, table = torch.ones(3, device=device), torch.tensor([2, 0, 1]).to(device)
        graph = recording.Graph()
        with torch.cuda.graph(graph, pool=(0, 1), capture_error_mode="thread_local"):
            x += 1
            y = (x * 2)[table]
            y[0] = 7.0
            for ask in (
                lambda: x.sum().item(), lambda: bool(x[0]), lambda: x.cpu(), lambda: x.tolist(), lambda: table.unique(),
                lambda: x.copy_(torch.ones(3)), lambda: x[table == 1], lambda: table.nonzero(),
                lambda: torch.ones(3).to(device), lambda: torch.cuda.current_stream().synchronize(),
            ):  # fmt: skip
                with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                    ask()
        assert x.tolist() == [1, 1, 1] and y.isnan().all()
        graph.replay()
        assert x.tolist() == [2, 2, 2] and y.tolist() == [7, 4, 4]
        x.copy_(torch.tensor([1.0, 2.0, 3.0]))
        graph.replay()
        assert x.tolist() == [2, 3, 4] and y.tolist() == [7, 4, 6]
