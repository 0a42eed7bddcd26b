"""Sizes of keys and values, from a config alone: per token, per sequence, per slot of a GPU. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from localmimo.errors import DoesNotFit
from localmimo.limits import KV_ROWS, N_SNAPSHOTS
from localmimo.model.config import LayerSpec, ModelConfig
from quant.formats.codec import ROW_SCALE_BYTES


def kv_bytes(config: ModelConfig, context: int, item_bytes: int, slack: int) -> int:
    """KV of `context` tokens: global layers whole, window layers as rings, and the snapshots of the rings."""
    total = 0
    for spec in config.layers:
        row = kv_row_bytes(spec, item_bytes)
        total += row * (context if spec.window is None else spec.window + slack + N_SNAPSHOTS * spec.window)
    return total


def kv_row_bytes(spec: LayerSpec, item_bytes: int) -> int:
    """Keys and values of one position of one layer."""
    scales = 2 * ROW_SCALE_BYTES if item_bytes == 1 else 0
    return spec.n_kv_heads * ((spec.head_dim + spec.v_head_dim) * item_bytes + scales)


@dataclass(frozen=True, slots=True)
class DeviceKv:
    """What a GPU needs for keys and values: bytes for the windows, and slots when every context is full."""

    fixed_bytes: int
    n_slots: int
    slot_tokens: int  # positions of a sequence in each slot; 0 where no layer is global


def device_kv(
    config: ModelConfig, context: int, item_bytes: int, slack: int, page_bytes: int, max_batch: int = 1
) -> DeviceKv:
    """The KV of `max_batch` sequences. Raises DoesNotFit where a slot is too small for a token."""
    windows = kv_bytes(config, 0, item_bytes, slack)
    row_bytes = kv_bytes(config, 1, item_bytes, slack) - windows
    if not row_bytes:
        return DeviceKv(max_batch * windows, 0, 0)
    tokens = positions_per_slot(page_bytes, row_bytes)
    return DeviceKv(max_batch * windows, max_batch * -(-context // tokens), tokens)


def positions_per_slot(slot_bytes: int, row_bytes: int) -> int:
    """Positions of a sequence whose rows of `row_bytes` fit in a slot: a multiple of 16 where it is large enough.

    Raises DoesNotFit where not even one fits.
    """
    if slot_bytes < row_bytes:
        raise DoesNotFit(
            f"An expert of this model takes {slot_bytes:,} bytes and a token's keys and values {row_bytes:,}: on a GPU "
            'they share equal slots, which would be too small. Give device="cpu".',
            what="a slot of the GPU",
            needed_bytes=row_bytes,
            budget_bytes=slot_bytes,
        )
    n = slot_bytes // row_bytes
    return n - n % KV_ROWS if n >= KV_ROWS else n


def draft_bytes(config: ModelConfig, item_bytes: int, slack: int, n_drafts: int) -> int:
    """What a sequence keeps for its draft heads: a ring each, and hidden states in float32, the checkpoints' too."""
    if not n_drafts:
        return 0
    spec = config.mtp_layer
    window = spec.window or 1
    ring = (window + slack) * kv_row_bytes(spec, item_bytes)
    return n_drafts * ring + 4 * config.hidden * (2 * (window + slack) + N_SNAPSHOTS * window)
