"""Engines on a pretended GPU that has room for a share of the experts."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from unittest.mock import patch

from localmimo import Engine, load
from localmimo.planning.memory import Plan
from tests.gpu import pretended

PLAIN = {"profile": None, "context": 1024, "dtype": "float32"}


@lru_cache
def plan_of(asked: tuple[tuple[str, object], ...]) -> Plan:
    """The plan where nothing is short."""
    with load(**dict(asked)) as engine:  # type: ignore[arg-type]
        return engine.plan


@contextmanager
def on_gpu(share: float = 0.4, **options: object) -> Iterator[Engine]:
    """The engine with room for a share of the experts on the GPU beside a full context, taken from the first token on.

    With none, none ever come there, not even for as long as the context leaves them room.
    """
    asked = PLAIN | {"device": "cuda", "draft": 0} | options
    with pretended.device():
        plan = plan_of(tuple(asked.items()))
        n_pages, vram = plan.n_pages, plan.vram
        assert vram is not None and vram.n_slots == n_pages + vram.kv_slots
        budget = vram.used_bytes - round((1 - share) * n_pages) * plan.page_bytes
        stay = nullcontext() if share else patch("localmimo.experts.tiers.gpu_slots.choose", return_value=[])
        with stay, load(**asked, vram=budget) as engine:  # type: ignore[arg-type]
            pages = [(layer, e) for layer in engine.config.moe_layers for e in range(engine.config.n_experts)]
            for at in range(0, engine.plan.gpu_slots if share else 0, 16):
                engine._store.promote(pages[at : at + 16])
            assert engine.plan.gpu_slots_at(engine.context) == round(share * n_pages)
            yield engine
