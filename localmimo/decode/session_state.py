"""Session state: what a sequence's future depends on, its checkpoints, and its form in a saved file.

Knows tensors and their names in a file. Must not know the model, how tokens are computed, or who asks.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from localmimo.errors import BadSession
from localmimo.kv.block_table import RowPieces
from localmimo.kv.cache import KVCache, Snapshot, WindowKV
from localmimo.kv.hidden_states import HiddenStates
from localmimo.kv.session_file import SavedSession
from localmimo.limits import N_SNAPSHOTS, SLACK

Contents = dict[str, Tensor | RowPieces]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A length to return to: the windows at that length, and the hidden states [n, hidden] of the tokens before it."""

    snapshot: Snapshot
    hidden: Tensor

    @property
    def length(self) -> int:
        return self.snapshot.length


@dataclass(slots=True)
class SessionState:
    """One sequence: its tokens, its KV cache, the hidden states of its last tokens, and its checkpoints in order."""

    cache: KVCache
    hidden_states: HiddenStates
    tokens: list[int] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    n_reused: int = 0  # tokens that the last sync did not have to read

    def append(self, tokens: list[int], hidden: Tensor) -> None:
        """Tokens that the cache has taken in already, and their hidden states [n, hidden]."""
        self.hidden_states.append(hidden)
        self.tokens.extend(tokens)

    # ---- checkpoints ----

    def add_checkpoint(self, n_hidden: int) -> None:
        """Make it possible to return to this length without reading; n_hidden: rows to keep of the hidden states.

        Of N_SNAPSHOTS checkpoints the first stays, which many texts may share, and of the others the last ones.
        """
        length = len(self.tokens)
        known = self.hidden_states.last(length) is not None
        if known and all(checkpoint.length != length for checkpoint in self.checkpoints):
            self.checkpoints.append(Checkpoint(self.cache.snapshot(), self.hidden_states.tail(n_hidden)))
            del self.checkpoints[1 : 1 + len(self.checkpoints) - N_SNAPSHOTS]

    def checkpoint_before(self, length: int) -> Checkpoint | None:
        """The last checkpoint at `length` or before it."""
        return next((c for c in reversed(self.checkpoints) if c.length <= length), None)

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Return to a checkpoint; None: to the empty sequence."""
        if checkpoint is None:
            self.cache.clear()
        else:
            self.cache.restore(checkpoint.snapshot)
        self.hidden_states.restart(self.cache.length, None if checkpoint is None else checkpoint.hidden)
        self.truncate(self.cache.length)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on; the cache has been cut already."""
        del self.tokens[length:]
        self.hidden_states.truncate(length)
        self.checkpoints = [c for c in self.checkpoints if c.length <= length]

    # ---- files ----

    def facts(self) -> dict[str, str]:
        """What a file says of the state beside its tensors."""
        return {"tokens": str(len(self.tokens)), "marks": str(len(self.checkpoints))}

    def contents(self) -> Contents:
        """What a file holds, by name; the keys and values in position order."""
        lengths = [checkpoint.length for checkpoint in self.checkpoints]
        out: Contents = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "hidden": self.hidden_states.tail(self.hidden_states.rows),
            "marks": torch.tensor(lengths, dtype=torch.int32),
        }
        for i, layer in enumerate(self.cache.layers):
            out[f"layers.{i}.keys"], out[f"layers.{i}.values"] = layer.stored_rows()
        for c, checkpoint in enumerate(self.checkpoints):
            out[f"marks.{c}.hidden"] = checkpoint.hidden
            for (i, _), (keys, values) in zip(self.cache.windows(), checkpoint.snapshot.windows, strict=True):
                out[f"marks.{c}.layers.{i}.keys"], out[f"marks.{c}.layers.{i}.values"] = keys, values
        return out

    def fill(self, saved: SavedSession, n: int, vocab_size: int, window: int) -> None:
        """Become the state in a file of n tokens, every shape checked before anything is read.

        window: positions that a draft head looks back over, whether or not there are heads. Raises BadSession; the
        state is then undefined.
        """
        targets = self._targets(saved, n, window + SLACK)
        saved.expect({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in targets.items()})
        saved.read(targets)
        tokens, lengths = _tensor(targets, "tokens").tolist(), _tensor(targets, "marks").tolist()
        _check(saved, n, tokens, lengths, vocab_size)
        for i, ring in self.cache.windows():
            ring.restore(n, _tensor(targets, f"layers.{i}.keys"), _tensor(targets, f"layers.{i}.values"))
        self.cache.length = n
        self.hidden_states.restart(n, _tensor(targets, "hidden"))
        self.tokens = tokens
        self.checkpoints = [self._checkpoint(c, length, targets) for c, length in enumerate(lengths)]

    def _targets(self, saved: SavedSession, n: int, max_hidden: int) -> Contents:
        """Memory for each tensor of the file: the cache itself where that can be filled, else fresh and small."""
        n_checkpoints = saved.count("marks")
        if n_checkpoints > N_SNAPSHOTS:
            raise BadSession(
                f"{saved.path} holds {n_checkpoints} marks; a session has at most {N_SNAPSHOTS}."
            )
        out: Contents = {
            "tokens": torch.empty(n, dtype=torch.int32),
            "marks": torch.empty(n_checkpoints, dtype=torch.int32),
            "hidden": self._hidden(_n_rows(saved, "hidden", 0, min(n, max_hidden), at_least=0)),
        }
        for i, layer in enumerate(self.cache.layers):
            if not isinstance(layer, WindowKV):
                out[f"layers.{i}.keys"], out[f"layers.{i}.values"] = layer.reserve(n)
        for i, ring in self.cache.windows():
            _add_window(out, saved, f"layers.{i}", ring, ring.rows)
        for c in range(n_checkpoints):
            name = f"marks.{c}.hidden"
            out[name] = self._hidden(_n_rows(saved, name, 0, max_hidden))
            for i, ring in self.cache.windows():
                _add_window(out, saved, f"marks.{c}.layers.{i}", ring, ring.window)
        return out

    def _hidden(self, rows: int) -> Tensor:
        return self.hidden_states.empty(rows)

    def _checkpoint(self, c: int, length: int, found: Contents) -> Checkpoint:
        windows = tuple(
            (_tensor(found, f"marks.{c}.layers.{i}.keys"), _tensor(found, f"marks.{c}.layers.{i}.values"))
            for i, _ in self.cache.windows()
        )
        return Checkpoint(Snapshot(length, windows), _tensor(found, f"marks.{c}.hidden"))


def _add_window(out: Contents, saved: SavedSession, name: str, ring: WindowKV, max_rows: int) -> None:
    rows = _n_rows(saved, f"{name}.keys", 1, max_rows)
    out[f"{name}.keys"], out[f"{name}.values"] = ring.empty(rows)


def _tensor(contents: Contents, name: str) -> Tensor:
    tensor = contents[name]
    assert isinstance(tensor, Tensor), name
    return tensor


def _n_rows(saved: SavedSession, name: str, axis: int, at_most: int, at_least: int = 1) -> int:
    """The rows of a tensor in the file. Raises BadSession where they are too few or too many."""
    shape = saved.shape(name)
    rows = shape[axis] if axis < len(shape) else -1
    if not at_least <= rows <= at_most:
        raise BadSession(f"{saved.path}: {name} has {rows:,} rows, and there is room for {at_most:,}.")
    return rows


def _check(saved: SavedSession, n: int, tokens: list[int], lengths: list[int], vocab_size: int) -> None:
    if not all(0 <= token < vocab_size for token in tokens):
        raise BadSession(f"{saved.path} holds tokens that the model does not have.")
    if lengths != sorted(set(lengths)) or not all(0 < length <= n for length in lengths):
        raise BadSession(f"{saved.path} holds marks at {lengths}, which are no places of its {n:,} tokens.")
