"""A model of any shape with random weights made in place, on a GPU: no checkpoint, no pack, no download.

Every layer's pages are those of one file, which lies in memory (tmpfs) where that has room: "disk" here means that
file. The router's bias is skewed, so that some experts are asked for more often than others. What is measured is the
engine's own: the same Transformer, Session, store, shelf and runner that `localmimo.load` puts together.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localmimo.decode.cuda_graphs import Graphs
from localmimo.decode.session import Session
from localmimo.experts.compute.gpu_experts import measured_costs
from localmimo.experts.compute.hybrid_runner import HybridRunner
from localmimo.experts.policy.adaptive import Adaptive
from localmimo.experts.policy.baselines import Page
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.pinning import Pinning
from localmimo.experts.tiers.tiers import GpuTier
from localmimo.limits import SLACK
from localmimo.model.config import ModelConfig
from localmimo.model.transformer import Transformer
from localmimo.model.weight_shapes import _expected as expected_shapes
from localmimo.model.weights import OnDevice, load_weights
from localmimo.planning.memory import Plan, make_plan
from quant.formats.codec import codec
from quant.formats.page import PageLayout
from quant.formats.qtensor import DTYPES, QTensor
from quant.pack.pack import PageAt

Tensor = torch.Tensor
SKEW = 0.15  # of the router's bias: about what makes an eighth of the experts answer half of the requests
DENSE = "int8"


@dataclass(frozen=True)
class Pages:
    """What a store asks of a pack; all layers share the pages of one file."""

    file: Path
    layout: PageLayout
    layers: tuple[int, ...]
    n_experts: int

    @property
    def manifest(self) -> dict[str, Any]:
        return {"layers": {str(layer): {"crc32": [0] * self.n_experts} for layer in self.layers}}

    @property
    def layouts(self) -> dict[str, PageLayout]:
        return {self.layout.codec: self.layout}

    @property
    def n_pages(self) -> int:
        return self.n_experts * len(self.layers)

    def page_at(self, layer: int, expert: int) -> PageAt:
        return PageAt(self.file, expert * self.layout.bytes, self.layout.bytes, 0, self.layout.codec)


def random_page(layout: PageLayout) -> Tensor:
    """A page of random codes under scales that keep what goes through it at its size."""
    page = torch.randint(0, 256, (layout.bytes,), dtype=torch.uint8)
    for part in layout.slices:
        part_bytes = page[part.offset : part.offset + part.spec.nbytes]
        cols = layout.shape(part.matrix)[1]
        if part.part == "scales":
            part_bytes.fill_(0x38)  # 1 in e4m3
        elif part.part == "scale":
            part_bytes.copy_(torch.tensor([1.7 / cols**0.5]).view(torch.uint8))
    return page


class RandomSource:
    """Dense tensors of the shapes that a config asks for."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._shapes = dict(expected_shapes(config))
        self._device = device

    def tensor(self, name: str) -> QTensor | Tensor:
        shape = self._shapes[name]
        if name.endswith("router.bias"):
            return torch.randn(shape) * SKEW
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("sink") else torch.ones(shape)
        if name == "embed":
            return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        if name.endswith("router.weight"):
            return torch.randn(shape, device=self._device) / shape[1] ** 0.5
        parts = {}
        for part, spec in codec(DENSE).parts((shape[0], shape[1])).items():
            made = torch.randint(-127, 128, spec.shape, dtype=torch.int8, device=self._device)
            scales = torch.full(spec.shape, 1 / (73 * shape[1] ** 0.5), device=self._device)
            parts[part] = made if part == "codes" else scales.to(DTYPES[spec.dtype])
        return QTensor(DENSE, (shape[0], shape[1]), parts)


def dense_bytes(config: ModelConfig) -> tuple[int, int]:
    """(all dense bytes of the main model, embeddings among them)."""
    total, lookup = 0, 2 * config.vocab_size * config.hidden
    for name, shape in expected_shapes(config):
        if name.startswith("mtp.") or name == "embed":
            continue
        plain = len(shape) == 1 or "router" in name
        total += (
            4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
            if plain
            else sum(spec.nbytes for spec in codec(DENSE).parts((shape[0], shape[1])).values())
        )
    return total + lookup, lookup


@dataclass
class Flash:
    """The engine without its shell."""

    config: ModelConfig
    plan: Plan
    store: ExpertStore
    session: Session
    graphs: Graphs
    layout: PageLayout

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Bytes that a token reads: dense ones, and those of its experts."""
        total, lookup = dense_bytes(self.config)
        return total - lookup, self.config.pages_per_token * self.layout.bytes

    def prefill(self, n: int) -> float:
        """Seconds of a prompt of n random tokens, read from nothing."""
        tokens = torch.randint(0, self.config.vocab_size, (n,)).tolist()
        began = time.perf_counter()
        self.session.sync(tokens)
        return time.perf_counter() - began

    def decode(self, n: int) -> list[float]:
        """Seconds of each of n steps; the tokens are drawn, since random weights would repeat themselves."""
        took = []
        for token in torch.randint(0, self.config.vocab_size, (n,)).tolist():
            began = time.perf_counter()
            self.session.step(token)
            took.append(time.perf_counter() - began)
        return took


@contextmanager
def opened(
    config: ModelConfig, device: torch.device, *, vram: int, ram: int, context: int, codec_name: str = "nf4"
) -> Iterator[Flash]:
    """Make the weights, fill GPU and RAM with pages as far as the budgets go, and close everything at the end."""
    layout = PageLayout(codec_name, config.hidden, config.expert_inner)
    total, lookup = dense_bytes(config)
    plan = make_plan(
        config, dense_bytes=total, page_bytes=layout.bytes, context=context, ram_bytes=ram, slack=SLACK,
        vram_bytes=vram, lookup_bytes=lookup,
    )  # fmt: skip
    source = OnDevice(RandomSource(config, device), device)
    model = Transformer(config, load_weights(source, config), torch.bfloat16)
    with tempfile.NamedTemporaryFile(dir=_folder(config.n_experts * layout.bytes), suffix=".pages") as file:
        _write(Path(file.name), layout, config.n_experts)
        pages = Pages(Path(file.name), layout, config.moe_layers, config.n_experts)
        pinning = Pinning(device)
        store = _store(pages, plan, config, device, pinning)
        try:
            runner = HybridRunner(store, layout.bytes, device)
            graphs = Graphs(model, runner)
            session = Session(
                model,
                runner,
                context,
                torch.bfloat16,
                segment_tokens=plan.stretch_tokens,
                shrink=graphs.shrink,
                pool=store.gpu,
                graphs=graphs,
            )
            yield Flash(config, plan, store, session, graphs, layout)
        finally:
            store.close()
            pinning.close()


def _folder(n_bytes: int) -> str | None:
    """Memory where there is room for the pages' file, else the disk."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * n_bytes else None


def _write(file: Path, layout: PageLayout, n_experts: int) -> None:
    page = random_page(layout)
    codes = [part for part in layout.slices if part.part == "codes"]
    with file.open("wb") as out:
        for _ in range(n_experts):
            for part in codes:  # other codes in every page, at the price of a copy
                part_bytes = page[part.offset : part.offset + part.spec.nbytes]
                part_bytes.copy_(part_bytes.roll(4096 + 64))
            out.write(page.numpy().data)


def _store(
    pages: Pages, plan: Plan, config: ModelConfig, device: torch.device, pinning: Pinning
) -> ExpertStore:
    stats = RouterStats(config.moe_layers, config.n_experts)

    def chances(asked: Sequence[Page]) -> Mapping[Page, float]:
        known = stats.chances()
        return {page: float(known[stats.row[page[0]], page[1]]) for page in asked}

    gpu_slots = None
    n_experts = dict.fromkeys(config.moe_layers, config.n_experts)
    if plan.vram is not None and plan.vram.n_slots:
        tier = GpuTier(plan.vram.n_slots, pages.layout.bytes, device)
        costs = measured_costs(tier, pages.layout, torch.bfloat16)
        gpu_slots = GpuSlots(tier, pages.layout, n_experts, chances, costs)
    policy = Adaptive(stats, room_for_all=plan.held_slots >= plan.n_pages)
    store = ExpertStore(
        pages,
        pages.layout.bytes,
        plan.n_slots,
        policy,
        trust=True,
        gpu=gpu_slots,
        pinning=pinning,  # type: ignore[arg-type]
    )
    every = [(layer, expert) for layer in config.moe_layers for expert in range(config.n_experts)]
    while (
        gpu_slots is not None
        and gpu_slots.n_free
        and store.promote([page for page in every if page not in gpu_slots][:64])
    ):
        pass
    store.warm(every)
    store.wait_until_warm()
    return store
