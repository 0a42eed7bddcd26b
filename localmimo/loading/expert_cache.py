"""Expert cache: the expert store with its router statistics, the watch over free memory, and the GPU's slots.

Opened and closed with an engine; knows neither tokens nor weights.
"""

import math
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from localmimo.experts.compute.gpu_experts import measured_costs
from localmimo.experts.policy.baselines import Adaptive, Page
from localmimo.experts.policy.profile import profile_path
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.store import placement
from localmimo.experts.store.memory_pressure import MemoryPressure, low_bytes
from localmimo.experts.store.store import ExpertStore
from localmimo.experts.tiers.gpu_slots import GpuSlots
from localmimo.experts.tiers.pinning import Pinning
from localmimo.experts.tiers.tiers import GpuTier
from localmimo.hardware.device import no_kernels
from localmimo.hardware.host import Machine
from localmimo.model.config import ModelConfig
from localmimo.planning.memory import Plan, Vram
from quant import Pack
from quant.pack.pack import MANIFEST, experts_of

PUBLISH_S = 1.0  # between two looks at where the pages lie, at least
LIFT = 16  # pages that go to the GPU at a time: while they do, no step begins


class ExpertCache:
    """The store of a pack; its hottest pages are read in the background from the start."""

    def __init__(
        self,
        pack: Pack,
        config: ModelConfig,
        plan: Plan,
        *,
        profile: str | None = None,
        prefetch: bool = True,
        trust: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """device: a GPU, and the type of its activations."""
        self._pack = pack.path
        self.profile = None if profile is None else profile_path(pack.path, pack.id, profile)
        self._stats = _statistics(self.profile, config)
        policy = Adaptive(self._stats, room_for_all=plan.held_slots_at(plan.context) >= plan.n_pages)
        self._pinning = None if device is None else Pinning(device)
        vram = plan.vram if device is not None else None
        self._over = threading.Event()
        self._filling: threading.Thread | None = None
        self._n_experts = experts_of(pack)
        self._published_s = -math.inf
        with ExitStack() as opened:  # what is closed, last first, where a later step fails
            if self._pinning is not None:
                opened.callback(self._pinning.close)
            gpu_slots = (
                self._gpu_slots(pack, vram, device, dtype) if device and vram and vram.n_slots else None
            )
            self.store = ExpertStore(
                pack, plan.page_bytes, plan.n_slots, policy,
                prefetch=prefetch, trust=trust, gpu=gpu_slots, pinning=self._pinning,
            )  # fmt: skip
            opened.callback(self.store.close)
            opened.callback(self._stop_filling)
            self._fill(self._first_pages(pack, plan), plan.gpu_slots)
            low = low_bytes(Machine.probe().ram_bytes)
            pressure = MemoryPressure(self.store, plan.page_bytes, low, _free_ram_bytes)
            opened.callback(pressure.close)
            self._stop = opened.pop_all().close

    def _gpu_slots(self, pack: Pack, vram: Vram, device: torch.device, dtype: torch.dtype) -> GpuSlots:
        """Slots for pages of the largest layout; pages of others stay in RAM."""
        layout = pack.page
        assert layout is not None
        tier = GpuTier(vram.n_slots, layout.bytes, device)
        try:
            costs = measured_costs(tier, layout, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may come up with
            raise no_kernels(error) from error
        gpu_slots = GpuSlots(tier, layout, experts_of(pack), self._chances, costs)
        if len(pack.layouts) > 1:
            gpu_slots.fits = lambda page: pack.page_at(*page).codec == layout.codec
        return gpu_slots

    def _chances(self, pages: Sequence[Page]) -> Mapping[Page, float]:
        chances, row = self._stats.chances(), self._stats.row
        return {page: float(chances[row[page[0]], page[1]]) for page in pages}

    def _fill(self, pages: Sequence[Page], n_gpu: int) -> None:
        """Read pages in the background, the hottest ones to the GPU."""
        if not n_gpu:
            self.store.warm(pages)
            return

        def fill() -> None:
            for at in range(0, min(n_gpu, len(pages)), LIFT):
                if self._over.is_set():
                    return
                self.store.promote(pages[at : min(n_gpu, at + LIFT)])
            self.store.warm(pages)  # those that are not there yet

        self._filling = threading.Thread(target=fill, name="gpu-fill", daemon=True)
        self._filling.start()

    def _stop_filling(self) -> None:
        self._over.set()
        if self._filling is not None:
            self._filling.join()

    def wait_until_warm(self) -> None:
        """Wait for the pages that are being read before anybody asked for them."""
        if self._filling is not None:
            self._filling.join()
        self.store.wait_until_warm()

    def facts(self) -> dict[str, Any]:
        """What is in force now. pinned: whether slots of RAM are locked for the GPU; None without one."""
        return {
            "direct_reads": self.store.direct,
            "slots_now": self.store.n_slots,
            "gpu_slots_now": 0 if self.store.gpu is None else self.store.gpu.n_slots,
            "pinned": None if self._pinning is None else not self._pinning.refused,
            "profile": None if self.profile is None else str(self.profile),
        }

    def _first_pages(self, pack: Pack, plan: Plan) -> list[Page]:
        """What to read before it is asked for: a profile's hottest pages, and where all fit then all others."""
        hottest = self._stats.hottest(plan.held_slots)
        if self.profile is None or plan.held_slots < plan.n_pages:
            return hottest
        known = set(hottest)
        every = ((layer, expert) for layer, n in experts_of(pack).items() for expert in range(n))
        return hottest + [page for page in every if page not in known]

    def publish(self) -> None:
        """Let `stats` see where the pages lie now, if it has been a while."""
        if self.profile is None or time.monotonic() - self._published_s < PUBLISH_S or self._gone():
            return
        with suppress(OSError):  # a full disk is no reason to fail: nobody may be looking
            placement.publish(self.profile, self.store.where(), self._n_experts)
        self._published_s = time.monotonic()

    def close(self) -> None:
        """Stop reading, and add what was seen to the profile; a warning says where that cannot be saved."""
        self._stop()
        if self.profile is None:
            return
        placement.withdraw(self.profile)
        if self._gone():
            warnings.warn(f"{self._pack} is gone: what was seen of its experts is not kept.", stacklevel=3)
        elif not self._stats.save(self.profile):
            warnings.warn(str(self._stats.warning), stacklevel=3)

    def _gone(self) -> bool:
        """Whether the pack was deleted: nothing of it is written again."""
        return not (self._pack / MANIFEST).is_file()


def _statistics(profile: Path | None, config: ModelConfig) -> RouterStats:
    if profile is None:
        return RouterStats(config.moe_layers, config.n_experts)
    return RouterStats.open(profile, config.moe_layers, config.n_experts)


def _free_ram_bytes() -> int:
    return Machine.probe().free_ram_bytes
