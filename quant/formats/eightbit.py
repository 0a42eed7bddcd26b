"""The eight-bit codecs in torch: int8 with one float16 scale per row and 64 columns, and FP8 in blocks of 128
x 128.

The reference; layouts are described in `codec.py`. It must not know files, names or models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quant.errors import QuantError
from quant.formats.codec import ROW_GROUP, Codec

Tensor = torch.Tensor

INT8_MAX = 127
E4M3_MAX = 448.0


def encode_int8(codec: Codec, weight: Tensor) -> dict[str, Tensor]:
    """Pack float32 [rows, cols]; each scale just covers its 64 weights."""
    n_rows, n_cols = weight.shape
    padded = F.pad(weight, (0, -n_cols % codec.block, 0, -n_rows % ROW_GROUP))
    split = padded.view(-1, ROW_GROUP, padded.shape[1] // codec.block, codec.block)  # g, r, b, column
    scale = _half_scale(split.abs().amax(-1))
    steps = split / torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    codes = steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    codes = codes.view(*codes.shape[:3], 16, 4).permute(0, 2, 3, 1, 4)  # g, b, v, r, j
    return {"codes": codes.reshape(*codes.shape[:3], 64), "scales": scale.permute(0, 2, 1).contiguous()}


def _half_scale(largest: Tensor) -> Tensor:
    """largest / 127 in float16, rounded up where rounding down would clip by more than half a step."""
    exact = largest / INT8_MAX
    scale = exact.half()
    if bool(scale.isinf().any()):
        raise QuantError(
            f"int8 can not hold a weight of {float(largest.max()):.3g}: its float16 scale ends at 8.3e6. "
            "Use bf16."
        )
    clips = scale.float() * (INT8_MAX + 0.5) < largest
    return torch.where(clips, (scale.view(torch.int16) + 1).view(torch.half), scale)


def decode_int8(codec: Codec, parts: dict[str, Tensor]) -> Tensor:
    """Parts of whole row groups -> float32 [groups * 16, padded columns]."""
    groups, blocks = parts["codes"].shape[:2]
    codes = parts["codes"].view(groups, blocks, 16, ROW_GROUP, 4).permute(0, 3, 1, 2, 4)  # g, r, b, v, j
    scale = parts["scales"].float().permute(0, 2, 1).unsqueeze(-1)  # g, r, b, 1
    values = codes.float().reshape(groups, ROW_GROUP, blocks, codec.block).mul_(scale)
    return values.view(groups * ROW_GROUP, blocks * codec.block)


def encode_fp8(codec: Codec, weight: Tensor) -> dict[str, Tensor]:
    """Pack float32 [rows, cols]; each scale puts the largest magnitude of its block at the end of the
    range."""
    n_rows, n_cols = weight.shape
    side = codec.block
    padded = F.pad(weight, (0, -n_cols % side, 0, -n_rows % side))
    split = padded.view(padded.shape[0] // side, side, padded.shape[1] // side, side)
    scales = split.abs().amax((1, 3)).div_(E4M3_MAX)
    scales = torch.where(scales == 0, 1.0, scales.clamp_(min=torch.finfo(torch.float32).tiny))
    codes = (split / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).view(padded.shape)
    return {"weight": codes[:n_rows, :n_cols].to(torch.float8_e4m3fn).contiguous(), "scales": scales}


def decode_fp8(codec: Codec, parts: dict[str, Tensor]) -> Tensor:
    """Parts -> float32 [rows, cols]; stored value times the scale of its block."""
    rows, cols = parts["weight"].shape
    scales = parts["scales"].repeat_interleave(codec.block, 0)[:rows]
    return parts["weight"].float().mul_(scales.repeat_interleave(codec.block, 1)[:, :cols])
