"""Attention of MiMo-V2: grouped heads, keys wider than values, a causal window, and a sink.

Pure functions over tensors. Knows nothing of caches, layers or positions: who may see whom arrives as a mask.
"""

import torch
from torch import Tensor

WORKSPACE_BYTES = (
    8 << 20
)  # of logits at a time: long prompts are cut into blocks of queries (plan.py counts it)


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, by absolute position: causal, and at most `window` keys with itself.

    queries [n], keys [m] (positions; a negative key position is an empty place) -> bool [n, m].
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
    kf, vf = k.float(), v.float()
    rows = max(1, WORKSPACE_BYTES // (4 * q.shape[0] * k.shape[1]))
    blocks = [
        _attend(q[:, i : i + rows], kf, vf, visible[i : i + rows], sink, scale)
        for i in range(0, q.shape[1], rows)
    ]
    return torch.cat(blocks).to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None, scale: float) -> Tensor:
    heads, n, d_k = q.shape
    kv_heads, m, d_v = v.shape
    grouped = q.float().reshape(kv_heads, heads // kv_heads * n, d_k)
    logits = (grouped @ k.transpose(1, 2)).mul_(scale).view(heads, n, m).masked_fill_(~visible, float("-inf"))
    mixed = sink_softmax(logits, sink).view(kv_heads, heads // kv_heads * n, m) @ v
    return mixed.view(heads, n, d_v).transpose(0, 1).reshape(n, heads * d_v)


def sink_softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last axis of logits [heads, n, m], with sink [heads] as one extra column that is dropped."""
    if sink is None:
        return torch.softmax(logits, dim=-1)
    column = sink.float()[:, None, None].expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat((logits, column), dim=-1), dim=-1)[..., :-1]
