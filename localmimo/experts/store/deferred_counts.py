"""Choices of experts that are counted later: a prompt's last tokens, and steps whose experts were all on the GPU.

Knows layers and the experts that were chosen; not where their pages are.
"""

import torch
from torch import Tensor

from localmimo.experts.policy.baselines import Policy
from localmimo.experts.store.counters import PageCounters


class DeferredCounts:
    """What is not counted yet, for the statistics and the counters."""

    def __init__(self, policy: Policy, counters: PageCounters) -> None:
        self._policy = policy
        self._counters = counters
        self._steps: list[tuple[int, Tensor]] = []
        self._tail: dict[
            int, list[list[int]]
        ] = {}  # layer -> experts of each of the last prompt's last tokens

    @property
    def waiting(self) -> bool:
        """Whether a step on the GPU is to be counted."""
        return bool(self._steps)

    def note_prompt(self, layer: int, tail: list[list[int]]) -> None:
        """The experts of a prompt's last tokens at a layer."""
        self._tail[layer] = tail

    def note(self, layer: int, chosen: Tensor) -> None:
        """A step's experts [n, k] of a layer, on the device; steps of another n are counted apart."""
        if self._steps and self._steps[-1][1].shape != chosen.shape:
            self.count_steps()
        self._steps.append((layer, chosen))

    def count(self) -> None:
        """Count the prompt, token by token, then the steps: wait for the device."""
        self._count_prompt()
        self.count_steps()

    def _count_prompt(self) -> None:
        for chosen in zip(*self._tail.values(), strict=False):
            for layer, experts in zip(self._tail, chosen, strict=True):
                self._policy.request(layer, experts)
        self._tail.clear()

    def count_steps(self) -> None:
        """Wait for the device, and count the steps alone."""
        if not self._steps:
            return
        rows = torch.stack([chosen.reshape(-1) for _, chosen in self._steps]).tolist()
        for (layer, _), row in zip(self._steps, rows, strict=True):
            experts = sorted(set(row))
            self._policy.request(layer, experts)
            self._counters.gpu_pages += len(experts)
        self._steps.clear()
