"""Host transfer: copies between the device and main memory, through pinned memory. Knows no tensor's meaning.

A buffer is used again in the next layer. That is safe because every use of one begins with a wait for the device, which
has then done all that it was given before.
"""

import torch
from torch import Tensor


class HostTransfer:
    """Buffers in main memory, one for each number, shape and type that was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def down(self, *tensors: Tensor) -> list[Tensor]:
        """Copies in main memory, after one wait for all of them; good until the next call."""
        copies = [self.buffer(i, tensor.shape, tensor.dtype) for i, tensor in enumerate(tensors)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def buffer(self, number: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Pinned memory, its content undefined."""
        key = number, shape, dtype
        if key not in self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return self._buffers[key]

    def up(self, tensor: Tensor) -> Tensor:
        """A copy on the device; what is launched from now on sees it."""
        return tensor.to(self._device, non_blocking=True)
