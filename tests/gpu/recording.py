"""Pretended CUDA graphs: while one records, nothing runs; replayed, it does the same to the same tensors.

As on a GPU, an operation that is recorded only has a shape: what it computes is there after a replay, and is garbage
before. Whatever asks the device for a value, copies from or to pageable memory, or waits for another stream fails while
a graph records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor
Job = Callable[[], Any]


class Graph:
    """What was recorded."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._made: list[Tensor] = []

    def replay(self) -> None:
        assert NOW.graph is None
        for job in self._jobs:
            job()

    def add_write(self, job: Job) -> None:
        """Something that changes tensors that are there."""
        self._jobs.append(job)

    def add(self, job: Job, shaped: Any, sources: list[Tensor]) -> Any:
        """Something that makes tensors like `shaped`; those that are views of the sources are there already."""
        known = {x.untyped_storage().data_ptr() for x in sources}
        new = [x for x in tree_leaves(shaped) if isinstance(x, Tensor)]
        if not all(x.untyped_storage().data_ptr() in known for x in new):
            self._made += new

            def run() -> None:
                found = [x for x in tree_leaves(job()) if isinstance(x, Tensor)]
                for there, x in zip(new, found, strict=True):
                    there.copy_(x)

            self._jobs.append(run)
        return shaped

    def spoil(self) -> None:
        """Nothing has been computed yet."""
        for x in self._made:
            x.view(-1).view(torch.uint8).fill_(255) if x.is_contiguous() else x.fill_(-1)


class Now(threading.local):
    """What this thread records."""

    graph: Graph | None = None


NOW = Now()


def recording() -> bool:
    return NOW.graph is not None


def demand_running(what: str) -> None:
    """Fail as CUDA does where a graph cannot hold something."""
    if NOW.graph is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


@contextmanager
def record(graph: Graph, pool: object = None, capture_error_mode: str = "global") -> Iterator[None]:
    """`torch.cuda.graph`."""
    demand_running("another graph")
    assert pool is not None and capture_error_mode == "thread_local"
    NOW.graph = graph
    try:
        yield
    finally:
        NOW.graph = None
    graph.spoil()
