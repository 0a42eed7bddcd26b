"""CUDA graphs: a step's layers, recorded once and replayed without the host between them.

A range of layers ends at one whose experts need the host; where all experts of all layers are on the GPU a step is
one range. What changes from step to step is in tensors whose addresses stay: the rows, their positions, the
table of blocks, the slots of each layer's experts. Knows layers and rows; not where an expert's bytes are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from localmimo.kv.cache import KVCache
from localmimo.model.attention import Rows
from localmimo.model.protocols import Experts, nothing_to_check, nothing_to_report
from localmimo.model.transformer import PromptChunk, Transformer, rope_rows

MAX_TOKENS = 8  # of a step: longer ones are prompts, which are few
MAX_GRAPHS = 256  # of one shape: where placement changes often, old ranges are forgotten

LayerRange = tuple[
    int, int, bool
]  # its first layer, its last, and whether the last one's experts need the host


class DeviceExperts(Experts, Protocol):
    """Experts of which those on the device can be run without the host."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """While it is held no page moves but in `begin_step`."""

    @property
    def generation(self) -> int:
        """A number that changes when what is on the device has other addresses."""

    def shrink(self) -> bool:
        """Free some of the device's memory; False where there is none to free."""

    @property
    def has_observer(self) -> bool:
        """Whether an observer receives every choice of experts."""

    def begin_step(self) -> None:
        """Let pages move, and count the noted choices."""

    def is_resident(self, layer: int) -> bool:
        """Whether every expert of a layer is on the device, and a kernel finds it there."""

    def run_resident(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`run` where all are on the device; the host does nothing but launch."""

    def note(self, layer: int, chosen: Tensor) -> None:
        """A step's choice [n, k] of a layer run so, good until the next step."""


class Graphs:
    """Runs a model's steps; those of one sequence and a few tokens from records, made at the second step of a shape."""

    def __init__(self, model: Transformer, experts: DeviceExperts) -> None:
        self._model = model
        self._experts = experts
        self._steps: WeakKeyDictionary[KVCache, dict[int, GraphStep | None]] = WeakKeyDictionary()
        self._pool: object = None  # one for all records: they never run side by side
        self.refused = ""  # why nothing is recorded any more

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: KVCache,
        experts: Experts,
        check: Callable[[], None] = nothing_to_check,
        report: Callable[[float], None] = nothing_to_report,
    ) -> Tensor:
        """As `Transformer.forward`, to the last bit."""
        with self._experts.lock:
            step = self._step(len(tokens), cache)
            if step is not None:
                cache.reserve(len(tokens))
                self._experts.begin_step()
                ranges = list(self._ranges())
                if self._record(step, ranges):
                    return self._replay(step, ranges, tokens, cache, check, report)
        return self._model.forward(tokens, cache, experts, check, report)

    def shrink(self) -> bool:
        """Have the experts free memory of the device. Records are dropped first: they would keep it."""
        self._steps.clear()
        return self._experts.shrink()

    def _step(self, n: int, cache: KVCache) -> "GraphStep | None":
        """The records of a shape; none at its first step, which gets kernels compiled and libraries started."""
        if n > MAX_TOKENS or self.refused or self._experts.has_observer:
            return None
        steps = self._steps.setdefault(cache, {})
        if n not in steps:
            steps[n] = None
            return None
        step = steps[n]
        if step is None or step.generation != self._experts.generation:
            self._pool = self._pool or torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            step = steps[n] = GraphStep(self._model, self._experts, cache, n, self._pool)
        return step

    def _ranges(self) -> Iterator[LayerRange]:
        first, last = 0, len(self._model.config.layers) - 1
        for layer in self._model.config.moe_layers:
            if not self._experts.is_resident(layer):
                yield first, layer, True
                first = layer + 1
        if first <= last:
            yield first, last, False

    def _record(self, step: "GraphStep", ranges: list[LayerRange]) -> bool:
        """Record what is not yet; False, from now on, where the device or a kernel refuses."""
        try:
            step.drop_old_graphs(len(ranges))
            for layers in ranges:
                step.record(layers)
        except torch.OutOfMemoryError:
            raise  # the experts shrink
        except Exception as error:
            self.refused = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._steps.clear()
            return False
        return True

    def _replay(
        self,
        step: "GraphStep",
        ranges: list[LayerRange],
        tokens: Tensor,
        cache: KVCache,
        check: Callable[[], None],
        report: Callable[[float], None],
    ) -> Tensor:
        step.begin(self._model.embed(tokens), cache.length)
        for layers in ranges:
            check()
            step.replay(layers)
            report((layers[1] + 1) / len(cache.layers))
        for layer in cache.layers:
            layer.commit(layer.next_rows(len(tokens)), len(tokens))
        cache.advance(len(tokens))
        return step.x.clone()


class GraphStep:
    """One shape of a step over one cache: the tensors that stay, and the records over them."""

    def __init__(
        self, model: Transformer, experts: DeviceExperts, cache: KVCache, n: int, pool: object
    ) -> None:
        config, device = model.config, model.device
        self.generation = experts.generation
        self._model, self._experts, self._n = model, experts, n
        self.x = torch.empty(n, config.hidden, device=device)
        self._positions = torch.empty(n, dtype=torch.int64, device=device)
        self._ropes = {
            rope: (torch.empty(n, rope[0] // 2, device=device), torch.empty(n, rope[0] // 2, device=device))
            for rope in {spec.rope for spec in config.layers}
        }
        self._normed = torch.empty(n, config.hidden, dtype=model.dtype, device=device)
        self._chosen = torch.empty(len(config.layers), n, config.top_k, dtype=torch.int64, device=device)
        self._weights = torch.empty(n, config.top_k, device=device)
        still = StaticCache(cache.length, [StaticKV(layer.next_rows(n)) for layer in cache.layers])
        self._piece = PromptChunk(still, 0, n, None, self._positions, self._ropes)
        self._pool = pool
        self._graphs: dict[LayerRange, torch.cuda.CUDAGraph] = {}

    def drop_old_graphs(self, n: int) -> None:
        """Forget what was recorded where n more could be too much."""
        if len(self._graphs) + n > MAX_GRAPHS:
            self._graphs.clear()

    def record(self, layers: LayerRange) -> None:
        """Record a range of layers; nothing of it runs."""
        if layers in self._graphs:
            return
        first, last, ends_at_host = layers
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device for memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            for layer in range(first, last + 1):
                self._layer(layer, to_host=ends_at_host and layer == last)
        self._graphs[layers] = graph

    def _layer(self, layer: int, *, to_host: bool) -> None:
        choice = self._model.attend_and_choose(layer, self.x, [self._piece])
        if choice is None:
            return
        normed, chosen, weights = choice
        self._chosen[layer].copy_(chosen)
        if to_host:
            self._normed.copy_(normed)
            self._weights.copy_(weights)
        else:
            self.x += self._experts.run_resident(layer, normed, chosen, weights)

    def begin(self, x: Tensor, position: int) -> None:
        """Put the step's rows x [n, hidden], the first of them at `position`, where the records read them."""
        self.x.copy_(x)
        self._positions.copy_(torch.arange(position, position + self._n, device=x.device))
        for rope, tables in self._ropes.items():
            for buffer, table in zip(tables, rope_rows(position, self._n, *rope, x.device), strict=True):
                buffer.copy_(table)

    def replay(self, layers: LayerRange) -> None:
        """Run a range of layers, and then its last layer's experts where the host is needed."""
        first, last, ends_at_host = layers
        self._graphs[layers].replay()
        for layer in range(first, last + (not ends_at_host)):
            if layer in self._model.config.moe_layers:
                self._experts.note(layer, self._chosen[layer])
        if ends_at_host:
            predict_next = self._model.predict_next(last, self.x)
            self.x += self._experts.run(last, self._normed, self._chosen[last], self._weights, predict_next)


@dataclass(frozen=True, slots=True)
class StaticKV:
    """A layer's keys and values while a record is made: where rows go is known, and none has come."""

    rows: Rows

    def next_rows(self, n: int) -> Rows:
        return self.rows

    def commit(self, rows: Rows, n: int) -> None:
        """Nothing was written."""


@dataclass(slots=True)
class StaticCache:
    """A cache that does not grow."""

    length: int
    layers: list[StaticKV]

    def reserve(self, n: int) -> None:
        raise AssertionError("memory is reserved before a record")

    def advance(self, n: int) -> None:
        raise AssertionError("a record runs nothing")
