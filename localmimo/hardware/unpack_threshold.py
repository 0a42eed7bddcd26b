"""Unpack threshold: the number of tokens from which a packed matrix on a GPU is unpacked for the library's product.

Measured on one matrix of each codec, once per GPU and version, and kept without end: the same machine goes on giving
the same bits. Knows matrices and seconds; nothing of models.
"""

import time
from collections.abc import Iterable, Sequence
from math import inf

import torch

from localmimo.hardware.measurements import keep, kept
from quant import QTensor, gpu

COUNTS = (16, 32, 64, 128, 256, 512, 1024)  # of tokens, ascending
N_RUNS = 3
MOST_S = 0.2  # that may be spent on one codec, after kernels have been compiled


def settle(matrices: Iterable[QTensor], device: torch.device, title: str) -> dict[str, int]:
    """Have products of bfloat16 on `device` change over where it pays; the first number of tokens, by codec."""
    largest: dict[str, QTensor] = {}
    for q in matrices:
        if q.codec in gpu.FORMATS and q.shape[0] >= largest.get(q.codec, q).shape[0]:
            largest[q.codec] = q
    return {codec: _settle(q, device, title) for codec, q in largest.items()}


def _settle(q: QTensor, device: torch.device, title: str) -> int:
    key = f"crossover {title} torch {torch.__version__} kernels {gpu.VERSION} {q.codec} {q.shape[0]}x{q.shape[1]}"
    had = kept(key, "tokens", fresh_s=inf)
    tokens = int(had["tokens"]) if had else _measured(q, device)
    if had is None:
        keep(key, {"tokens": tokens})
    gpu.unpack_from(device, q.codec, tokens)
    return tokens


def _measured(q: QTensor, device: torch.device) -> int:
    """Time both ways, from few tokens to many, for as long as there is time."""
    took: list[tuple[float, float]] = []
    left_s = MOST_S
    for n in COUNTS:
        x = torch.ones(n, q.shape[1], dtype=torch.bfloat16, device=device)
        took.append((_seconds(x, q, unpacked=False), _seconds(x, q, unpacked=True)))
        left_s -= N_RUNS * sum(took[-1])
        if left_s < 0:
            break
    return crossing(took)


def crossing(took: Sequence[tuple[float, float]]) -> int:
    """The first of COUNTS from which on unpacking was quicker, given (packed, unpacked) seconds of the first ones.

    Where it never was, the number that is built in stands, or if even more were measured, none.
    """
    first = len(took)
    while first and took[first - 1][1] < took[first - 1][0]:
        first -= 1
    if first < len(took):
        return COUNTS[first]
    return max(gpu.UNPACK_FROM, COUNTS[first - 1] + 1 if first else 0)


def _seconds(x: torch.Tensor, q: QTensor, *, unpacked: bool) -> float:
    """The fastest of a few products, after one that does not count."""
    took = []
    for _ in range(1 + N_RUNS):
        torch.cuda.synchronize(x.device)
        began = time.perf_counter()
        gpu.product(x, q, unpacked=unpacked)
        torch.cuda.synchronize(x.device)
        took.append(time.perf_counter() - began)
    return min(took[1:])
