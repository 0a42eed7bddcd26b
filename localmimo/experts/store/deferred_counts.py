"""Resident: steps whose experts all lay on the GPU, so that the host did not look: counted later, in one transfer.

Knows layers and the experts that were chosen; not where anything lies.
"""

import torch
from torch import Tensor

from localmimo.experts.policy.baselines import Policy
from localmimo.experts.store.counters import PageCounters


class DeferredCounts:
    """What is not counted yet, for the statistics and the counters."""

    def __init__(self, policy: Policy, traffic: PageCounters) -> None:
        self._policy = policy
        self._traffic = traffic
        self._steps: list[tuple[int, Tensor]] = []

    @property
    def waiting(self) -> bool:
        """Whether anything is to be counted."""
        return bool(self._steps)

    def note(self, layer: int, chosen: Tensor) -> None:
        """A step's experts [n, k] of a layer, on the device; steps of another n are counted apart."""
        if self._steps and self._steps[-1][1].shape != chosen.shape:
            self.count()
        self._steps.append((layer, chosen))

    def count(self) -> None:
        """Wait for the device, and count."""
        if not self._steps:
            return
        rows = torch.stack([chosen.reshape(-1) for _, chosen in self._steps]).tolist()
        for (layer, _), row in zip(self._steps, rows, strict=True):
            experts = sorted(set(row))
            self._policy.request(layer, experts)
            self._traffic.gpu_pages += len(experts)
        self._steps.clear()
