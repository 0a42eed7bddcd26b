"""Native attention with rope and cache, norms and the router on the CPU, with their arguments checked.

A result depends on its own row alone, to the last bit: not on how many rows, threads or which instruction set.
Sizes are compared here before an address reaches C++. It must not know layers, sequences or models.
"""

from __future__ import annotations

import torch

from quant import kernels
from quant.formats.codec import ROW_SCALE_BYTES

Tensor = torch.Tensor

STORES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
EVERYTHING = 1 << 40  # a window wider than any context
MAX_HEAD_DIM = 1024
WEIGHT_DTYPES = (torch.float32,)


def serves(*tensors: Tensor) -> bool:
    """Whether these kernels can compute with the tensors: float32 in main memory, nothing to differentiate."""
    return kernels.available() and all(
        t.dtype == torch.float32 and not t.requires_grad and t.device.type == "cpu" for t in tensors
    )


def attend(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    head_dims: tuple[int, int],
    position: int,
    first: int,
    window: int | None,
    sink: Tensor | None,
    scale: float,
    value_scale: float,
) -> Tensor:
    """Rotate, append to the cache, attend: joined float32 [n, queries | keys | values] -> float32 [n, heads * d_v].

    keys [kv_heads, rows, d_k] and values [kv_heads, rows, d_v] are the cache in float32, bfloat16, or int8 with a
    float32 scale behind each row; position p is in row (p - first) mod rows. cos and sin [n, rotated / 2] turn the
    first dimensions in pairs (i, i + half). Token i, at `position` + i, sees `window` keys with itself, or all; `sink`
    [heads] is one more logit per head. Query head h reads KV head h // (heads / kv_heads).
    """
    n, width = joined.shape
    kv_heads, rows, d_k_stored = keys.shape
    d_k, d_v = head_dims
    extra = ROW_SCALE_BYTES if keys.dtype == torch.int8 else 0
    fits = (
        keys.dtype in STORES
        and values.dtype == keys.dtype
        and values.shape == (kv_heads, rows, d_v + extra)
        and d_k_stored == d_k + extra
        and width == heads * d_k + kv_heads * (d_k + d_v)
        and heads % kv_heads == 0
        and cos.shape == sin.shape == (n, cos.shape[-1])
        and 2 * cos.shape[1] <= d_k <= MAX_HEAD_DIM
        and d_v <= MAX_HEAD_DIM
        and in_rows(n, position, window or EVERYTHING, first, rows)
        and (sink is None or sink.numel() == heads)
    )
    if not (fits and _plain(keys, values) and floats(joined, cos, sin, joined if sink is None else sink)):
        raise ValueError(
            f"{n} rows of {width} for {heads} heads of {d_k} and {d_v} do not go with keys {list(keys.shape)} and "
            f"values {list(values.shape)} in {keys.dtype}, cos and sin {list(cos.shape)} at position {position}."
        )
    out = torch.empty(n, heads * d_v)
    kernels._native.attend(
        [n, heads, kv_heads, d_k, d_v, 2 * cos.shape[1], position, window or EVERYTHING],
        joined.data_ptr(), cos.data_ptr(), sin.data_ptr(), value_scale, scale, STORES[keys.dtype],
        keys.data_ptr(), values.data_ptr(), [rows, first, rows], 0 if sink is None else sink.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def in_rows(n: int, position: int, window: int, first: int, rows: int) -> bool:
    """Whether every position that n tokens at `position` see has a row of its own among `rows`, from `first` on."""
    lowest = max(0, position - window + 1)
    return n > 0 and first <= lowest <= position <= lowest + rows - n


def rms_norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """x [..., hidden] / rms(x) * weight [hidden], all float32; with `add`, of the same shape, x += add comes first."""
    hidden = x.shape[-1]
    add = add if add is None else add.contiguous()
    fits = weight.numel() == hidden and (add is None or (add.shape == x.shape and floats(add)))
    if not (fits and floats(x, weight)):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, its norm's weight {list(weight.shape)}.")
    out = torch.empty_like(x)
    kernels._native.rms_norm(
        x.data_ptr(), 0 if add is None else add.data_ptr(), weight.data_ptr(), eps, x.numel() // hidden, hidden,
        out.data_ptr(),
    )  # fmt: skip
    return out


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Experts int64 [n, k], ascending, and weights float32 [n, k] for x [n, hidden], by sigmoid(x weight^T) + bias.

    Of equal experts the lower one is taken. The weights are without the bias, divided by their sum if `normalise`.
    """
    n_experts, hidden = weight.shape
    if x.shape[1:] != (hidden,) or bias.shape != (n_experts,) or not 0 < top_k <= n_experts:
        raise ValueError(
            f"x {list(x.shape)} and {top_k} experts of a router {list(weight.shape)} do not fit."
        )
    if not floats(x, weight, bias):
        raise ValueError("The router wants contiguous float32 in main memory.")
    chosen = torch.empty(len(x), top_k, dtype=torch.int64)
    weights = torch.empty(len(x), top_k)
    kernels._native.route(
        len(x), hidden, n_experts, top_k, x.data_ptr(), weight.data_ptr(), bias.data_ptr(), scale, normalise,
        chosen.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return chosen, weights


def floats(*tensors: Tensor) -> bool:
    """Whether all are plain float32."""
    return _plain(*tensors) and all(t.dtype is torch.float32 for t in tensors)


def _plain(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
