"""Page staging: a prompt's pages pass through a few slots of the device, some copied while others are computed with.

Knows bytes and streams; not whose pages they are.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from localmimo.limits import STAGES


class PageStaging:
    """Slots that go round."""

    def __init__(self, page_bytes: int, device: torch.device, n_stages: int = STAGES) -> None:
        self._device = device
        self._slots = list(torch.empty(n_stages, page_bytes, dtype=torch.uint8, device=device).unbind())
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = [torch.cuda.Event() for _ in self._slots]  # type: ignore[no-untyped-call]
            self._used = [torch.cuda.Event() for _ in self._slots]  # type: ignore[no-untyped-call]
        self._next = 0

    def through(self, pages: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield every page on the device; those that lie there already as they are.

        What is launched before the next page is asked for may use it; the host never waits for that. When the iterator
        ends the pages have been copied: they may be overwritten.
        """
        for page in pages:
            if page.device == self._device:
                yield page
                continue
            slot = self._next
            self._next = (slot + 1) % len(self._slots)
            self._fill(slot, page)
            yield self._slots[slot]
            if self._on_gpu:
                self._used[slot].record(torch.cuda.current_stream(self._device))
        if self._on_gpu:
            self._stream.synchronize()

    def _fill(self, slot: int, page: Tensor) -> None:
        if not self._on_gpu:
            self._slots[slot].copy_(page)
            return
        self._stream.wait_event(self._used[slot])
        with torch.cuda.stream(self._stream):
            self._slots[slot].copy_(page, non_blocking=True)
            self._copied[slot].record(self._stream)
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])
