"""Hidden states of the last tokens of a sequence. They give logits again, and are the input of the draft heads.

Knows rows and lengths. Must not know tokens, weights or what a hidden state means.
"""

import torch
from torch import Tensor


class HiddenStates:
    """Rows [hidden] of the last tokens of a sequence of `length` tokens: at least `rows` of them, if it has so many.

    Rows are appended to a buffer of twice the size, so that earlier rows are seldom moved.
    """

    def __init__(self, rows: int, hidden: int, device: torch.device | None = None) -> None:
        self.rows = rows
        self.length = 0
        self._buffer = torch.zeros(2 * rows, hidden, device=device)
        self._end = 0  # rows of the buffer in use
        self._n_known = 0  # of these rows, the last that belong to the sequence

    def append(self, hidden: Tensor) -> None:
        """The hidden states [n, hidden] of the next n tokens."""
        self.length += len(hidden)
        new = hidden[-self.rows :]
        if (
            len(hidden) > self.rows
        ):  # some are left out: the rows before them are not those of the next positions
            self._end = self._n_known = 0
        if self._end + len(new) > len(self._buffer):
            kept = self.tail(self.rows - len(new))
            self._buffer[: len(kept)] = kept
            self._end = self._n_known = len(kept)
        self._buffer[self._end : self._end + len(new)] = new
        self._end += len(new)
        self._n_known += len(new)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        dropped = min(self._n_known, self.length - length)
        self._end -= dropped
        self._n_known -= dropped
        self.length = length

    def restart(self, length: int, hidden: Tensor | None = None) -> None:
        """Become a sequence of `length` tokens of which only the last rows, `hidden`, are known."""
        self._end = self._n_known = 0
        self.length = length
        if hidden is not None:
            self.append(hidden)
            self.length = length

    def empty(self, n: int) -> Tensor:
        """Unset rows [n, hidden], for `restart`."""
        return self._buffer.new_empty(n, self._buffer.shape[1])

    @property
    def first(self) -> int:
        """The first position whose row is known."""
        return self.length - self._n_known

    def rows_from(self, position: int) -> Tensor:
        """The rows [n, hidden] from a known position on; a view that is valid until the next change."""
        return self._buffer[self._end - (self.length - position) : self._end]

    def tail(self, n: int) -> Tensor:
        """A copy of the last n known rows [at most n, hidden]."""
        return self._buffer[self._end - min(n, self._n_known) : self._end].clone()

    def last(self, length: int) -> Tensor | None:
        """The row [hidden] of the last token when the sequence had `length` tokens; None where it is not known."""
        back = self.length - length
        return self._buffer[self._end - 1 - back] if 0 <= back < self._n_known else None
