"""Sizes of keys and values: what a plan counts, per slot of a GPU and per draft head."""

import pytest

from localmimo.errors import DoesNotFit
from localmimo.kv.sizes import device_kv, draft_bytes, kv_bytes, kv_row_bytes, positions_per_slot
from localmimo.limits import N_SNAPSHOTS
from tests.model.published import FLASH, parse

CONFIG = parse(FLASH)
SLACK = 16
ROW = sum(kv_row_bytes(spec, 2) for spec in CONFIG.layers if spec.window is None)


@pytest.mark.parametrize(("slot", "n"), [(100, 1), (199, 1), (1599, 15), (1600, 16), (3199, 16), (3200, 32)])
def test_positions_in_a_slot_come_in_sixteens_once_there_are_as_many(slot: int, n: int) -> None:
    assert positions_per_slot(slot, 100) == n


def test_a_slot_that_has_no_room_for_a_token_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="99 bytes .* 100:") as refused:
        positions_per_slot(99, 100)
    assert (refused.value.needed_bytes, refused.value.budget_bytes) == (100, 99)


@pytest.mark.parametrize(("context", "n"), [(31, 1), (32, 1), (33, 2), (64, 2)])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_every_sequence_has_slots_for_its_context(context: int, n: int, max_batch: int) -> None:
    found = device_kv(CONFIG, context, 2, SLACK, 32 * ROW, max_batch)
    assert (found.n_slots, found.slot_tokens) == (max_batch * n, 32)
    assert found.fixed_bytes == max_batch * kv_bytes(CONFIG, 0, 2, SLACK)


@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_each_draft_head_has_a_ring_and_all_share_the_hidden_states(item_bytes: int) -> None:
    spec = CONFIG.mtp_layer
    window = spec.window or 1
    none, one, three = (draft_bytes(CONFIG, item_bytes, SLACK, n) for n in (0, 1, 3))
    ring = (window + SLACK) * kv_row_bytes(spec, item_bytes)
    assert none == 0 and three - one == 2 * ring
    assert one - ring == 4 * CONFIG.hidden * (2 * (window + SLACK) + N_SNAPSHOTS * window)
