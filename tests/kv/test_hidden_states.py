"""Hidden states of the last tokens: a buffer that never mixes up rows, whatever is appended and forgotten."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmimo.kv.hidden_states import HiddenStates

ROWS, HIDDEN = 5, 2
moves = st.lists(
    st.tuples(st.sampled_from(["append", "truncate", "restart"]), st.integers(0, 12)), max_size=30
)


def rows(*positions: int) -> torch.Tensor:
    """A row that says its position."""
    return torch.tensor(positions, dtype=torch.float32)[:, None].expand(-1, HIDDEN)


@given(moves)
def test_rows_are_those_of_their_positions(moves: list[tuple[str, int]]) -> None:
    states, length, first = HiddenStates(ROWS, HIDDEN), 0, 0
    for move, n in moves:
        if move == "append":
            states.append(rows(*range(length, length + n)))
            length += n
        elif move == "truncate":
            length = max(0, length - n)
            states.truncate(length)
            first = min(first, length)
        else:
            known = min(n, ROWS, length)
            states.restart(length, rows(*range(length - known, length)))
            first = length - known
        assert states.length == length
        assert first <= states.first <= length  # nothing is known that never was
        for position in range(states.first, length):
            assert torch.equal(states.rows_from(position), rows(*range(position, length)))
            last = states.last(position + 1)
            assert last is not None and torch.equal(last, rows(position)[0])
        assert states.last(states.first) is None and states.last(length + 1) is None


def test_as_many_rows_are_known_as_were_asked_for() -> None:
    states = HiddenStates(ROWS, HIDDEN)
    for position in range(40):
        states.append(rows(position))
        assert position + 1 - states.first >= min(ROWS, position + 1)
    states.append(rows(*range(40, 60)))
    assert torch.equal(states.tail(ROWS), rows(*range(55, 60)))
    assert torch.equal(states.tail(100), rows(*range(states.first, 60)))


@pytest.mark.parametrize("length", [0, 3, 8])
def test_forgetting_more_than_is_known_leaves_nothing(length: int) -> None:
    states = HiddenStates(ROWS, HIDDEN)
    states.restart(20, rows(18, 19))
    states.truncate(length)
    assert (states.length, states.first) == (length, length) and states.last(length) is None
    states.append(rows(length))
    assert torch.equal(states.tail(ROWS), rows(length))


def test_what_is_kept_is_a_copy() -> None:
    states = HiddenStates(ROWS, HIDDEN)
    states.append(rows(0, 1, 2))
    kept = states.tail(2)
    states.truncate(1)
    states.append(rows(7, 8))
    assert torch.equal(kept, rows(1, 2))
