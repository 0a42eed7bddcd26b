"""Attention of MiMo-V2: grouped heads, keys wider than values, a causal window, and a sink.

Pure functions over tensors, and the reference of the native kernels in `quant.kernels.attention`. Knows rows of keys
and values by position; nothing of layers, caches or weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from localmimo.limits import ATTENTION_WORKSPACE_BYTES
from localmimo.model.config import LayerSpec
from quant import gpu
from quant.formats.codec import ROW_SCALE_BYTES
from quant.kernels import attention as native

Rope = tuple[Tensor, Tensor]  # cos and sin [n, rotary_dim / 2]


# ---- rope ----


def rope_table(positions: Tensor, rotary_dim: int, theta: float) -> Rope:
    """cos and sin [n, rotary_dim / 2] in float32 for positions [n]; frequency i is theta^(-2i / rotary_dim)."""
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x [..., n, d]; pairs are (i, i + half); the rest passes."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


# ---- attention over keys and values in contiguous rows ----


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, by absolute position: causal, and at most `window` keys with itself.

    queries [n], keys [m] (positions; a negative key position is an empty row) -> bool [n, m].
    """
    distance = queries[:, None] - keys[None, :]
    visible = (distance >= 0) & (keys >= 0)[None, :]
    return visible if window is None else visible & (distance < window)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None, scale: float) -> Tensor:
    """Softmax attention in float32; `sink` is one more logit per query head that carries no value.

    q [heads, n, d_k], k [kv_heads, m, d_k], v [kv_heads, m, d_v], visible bool [n, m], sink [heads] or None
    -> [n, heads * d_v] in v's dtype. Query head h reads KV head h // (heads / kv_heads).
    Source: arXiv 2601.02780, equations 1 to 4 (the sink joins the maximum and the denominator).
    """
    heads, n, d_k = q.shape
    kv_heads, m, d_v = v.shape
    grouped = q.float().reshape(kv_heads, heads // kv_heads * n, d_k)
    logits = (grouped @ k.float().transpose(1, 2)).mul_(scale).view(heads, n, m)
    softened = sink_softmax(logits.masked_fill_(~visible, float("-inf")), sink)
    mixed = softened.view(kv_heads, heads // kv_heads * n, m) @ v.float()
    return mixed.view(heads, n, d_v).transpose(0, 1).reshape(n, heads * d_v).to(v.dtype)


def sink_softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last axis of logits [heads, n, m], with sink [heads] as one extra column that is dropped."""
    if sink is None:
        return torch.softmax(logits, dim=-1)
    column = sink.float()[:, None, None].expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat((logits, column), dim=-1), dim=-1)[..., :-1]


# ---- attention over a cache ----


@dataclass(frozen=True, slots=True)
class Rows:
    """Keys and values in a cache: position p in row (p - first) mod rows.

    keys [kv_heads, rows, d_k], values [kv_heads, rows, d_v] in float32 or bfloat16; or in int8, where the last four
    bytes of each row are a float32 scale. With a table int32 [blocks] they are [slots, kv_heads, rows, d], and position
    p is in row p mod rows of slot table[p // rows].
    """

    keys: Tensor
    values: Tensor
    first: int = 0
    table: Tensor | None = None

    def put(self, begin: int, keys: Tensor, values: Tensor) -> None:
        """Write rows [kv_heads, n, d] of the positions from `begin` on."""
        at = self._at(begin, begin + keys.shape[1])
        for target, new in ((self.keys, keys), (self.values, values)):
            target[at] = new if self.table is None else new.transpose(0, 1)

    def get(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, n, d] of positions begin to end - 1."""
        at = self._at(begin, end)
        keys, values = self.keys[at], self.values[at]
        return (keys, values) if self.table is None else (keys.transpose(0, 1), values.transpose(0, 1))

    def _at(self, begin: int, end: int) -> tuple[slice | Tensor, ...]:
        """What picks the rows of positions begin to end - 1."""
        positions = torch.arange(begin, end, device=self.keys.device)
        rows = (positions - self.first) % self.keys.shape[-2]
        if self.table is None:
            return slice(None), rows
        return self.table[positions // self.keys.shape[-2]].long(), slice(None), rows


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., d] as rows of a cache in `dtype`: rounded, or int8 with the scale behind."""
    if dtype != torch.int8:
        return x.to(dtype)
    largest = x.float().abs().amax(-1, keepdim=True)
    codes = (x.float() * torch.where(largest > 1e-30, 127.0 / largest, 0.0)).round().to(torch.int8)
    return torch.cat((codes, (largest / 127.0).view(torch.int8)), dim=-1)


def loaded(rows: Tensor) -> Tensor:
    """The float32 values of rows of a cache."""
    if rows.dtype != torch.int8:
        return rows.float()
    scale = rows[..., -ROW_SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-ROW_SCALE_BYTES].float() * scale


def extend(
    joined: Tensor,
    rope: Rope,
    rows: Rows,
    position: int | None,
    spec: LayerSpec,
    sink: Tensor | None,
    value_scale: float,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate, write into the cache, attend: joined [n, queries | keys | values] -> [n, heads * d_v], both float32 but
    on a GPU, where they may be bfloat16.

    The first token is at `position`; `rows` already has everything before it that it sees. positions: of all
    tokens, int64 [n], where a GPU is to read them.
    """
    head_dims = spec.head_dim, spec.v_head_dim
    facts = {
        "heads": spec.n_heads, "head_dims": head_dims, "first": rows.first, "window": spec.window, "sink": sink,
        "scale": spec.head_dim**-0.5, "value_scale": value_scale,
    }  # fmt: skip
    if joined.is_cuda and gpu.attends(joined, rows.keys, head_dims):
        if positions is None:
            assert position is not None
            positions = torch.arange(position, position + len(joined), device=joined.device)
        return gpu.attend(
            joined, *rope, rows.keys, rows.values, positions=positions, table=rows.table, **facts
        )
    if position is None:
        raise ValueError("Only the kernels of the GPU can attend where the position is on the device.")
    if native.serves(joined):
        return native.attend(joined, *rope, rows.keys, rows.values, position=position, **facts)
    return extend_reference(joined, rope, rows, position, spec, sink, value_scale)


def extend_reference(
    joined: Tensor,
    rope: Rope,
    rows: Rows,
    position: int,
    spec: LayerSpec,
    sink: Tensor | None,
    value_scale: float,
) -> Tensor:
    """`extend` in torch, a block of queries at a time."""
    q, k, v = split_heads(joined, rope, spec, value_scale)
    end = position + len(joined)
    rows.put(position, stored(k, rows.keys.dtype), stored(v, rows.values.dtype))
    step = max(
        1, ATTENTION_WORKSPACE_BYTES // (4 * spec.n_heads * (end if spec.window is None else spec.window))
    )
    blocks = []
    for first in range(position, end, step):
        last = min(first + step, end)
        lowest = 0 if spec.window is None else max(0, first - spec.window + 1)
        positions = torch.arange(lowest, last, device=q.device)
        seen = window_mask(positions[first - lowest :], positions, spec.window)
        k, v = map(loaded, rows.get(lowest, last))
        blocks.append(attend(q[:, first - position : last - position], k, v, seen, sink, spec.head_dim**-0.5))
    return torch.cat(blocks)


def split_heads(
    joined: Tensor, rope: Rope, spec: LayerSpec, value_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """joined [n, queries | keys | values] -> q, k (rotated) and v (scaled), each [heads, n, d]."""
    q, k, v = joined.split(spec.qkv_rows, dim=-1)
    q = rotate(q.unflatten(-1, (spec.n_heads, spec.head_dim)).transpose(0, 1), *rope)
    k = rotate(k.unflatten(-1, (spec.n_kv_heads, spec.head_dim)).transpose(0, 1), *rope)
    return q, k, v.unflatten(-1, (spec.n_kv_heads, spec.v_head_dim)).transpose(0, 1) * value_scale
