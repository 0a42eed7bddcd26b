"""Session: one timeline of tokens with its KV cache. Syncs to a prompt, steps, rewinds, is saved and loaded.

Knows tokens, not text; holds no weights. The cache is only ever touched here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from localmimo.decode.cuda_graphs import Graphs
from localmimo.decode.mtp import Choose, Drafter, DraftHead
from localmimo.errors import BadRequest, BadSession, ContextFull
from localmimo.hardware.device import broke_down, out_of_memory
from localmimo.kv.block_table import RowPieces, SlotPool
from localmimo.kv.cache import KVCache, Snapshot, WindowKV
from localmimo.kv.hidden_states import HiddenStates
from localmimo.kv.session_file import SavedSession, SessionIdentity, write
from localmimo.limits import N_SNAPSHOTS, PREFILL_CHUNK, SLACK
from localmimo.model.protocols import Experts, nothing_to_check, nothing_to_report
from localmimo.model.transformer import Transformer
from quant import kernels

SHARED = (
    256  # tokens that must be read again before a mark is left behind them: a mark costs a stretch of its own
)

Progress = Callable[[int, int], None]  # tokens read, tokens to read


def nothing_to_give() -> bool:
    """The default where memory runs out: nobody has any to spare."""
    return False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place to come back to: the windows there, and the hidden states [n, hidden] of the tokens before it."""

    snapshot: Snapshot
    hidden: Tensor


class Session:
    """One sequence of at most `context` tokens."""

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        context: int,
        kv_dtype: torch.dtype,
        stretch: int = PREFILL_CHUNK,
        identity: SessionIdentity | None = None,
        heads: Sequence[DraftHead] = (),
        give_way: Callable[[], bool] = nothing_to_give,
        lender: SlotPool | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """give_way: gives memory of the device back where a step ran out of it; False where there is none to give.

        lender: of slots for keys and values, on a GPU. graphs: runs steps there from records.
        """
        self.context = context
        self.tokens: list[int] = []
        self.n_reused = 0  # tokens that the last sync did not have to read
        self._model = model
        self._passes = graphs or model
        self._experts = experts
        self._give_way = give_way
        self._identity = identity  # None: cannot be saved
        self._cache = KVCache(model.config.layers, context, kv_dtype, device=model.device, lender=lender)
        self._marks: list[Checkpoint] = []
        self._stretch = stretch  # tokens of a prompt that are read layer by layer: a matter of memory alone
        # Draft heads look back over a window of hidden states; without them one gives the logits again.
        self._looks_back = (model.config.mtp_layer.window or 1) if heads else 1
        self._trail = HiddenStates(self._looks_back + SLACK, model.config.hidden, model.device)
        self._drafter = Drafter(heads, kv_dtype)

    @property
    def position(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    def common(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are held."""
        return _common_prefix(self.tokens, tokens)

    @property
    def places(self) -> list[int]:
        """Positions that can be come back to without reading, besides the last few."""
        return [mark.snapshot.length for mark in self._marks]

    @kernels.alone()
    def sync(
        self,
        tokens: Sequence[int],
        progress: Progress | None = None,
        check: Callable[[], None] = nothing_to_check,
    ) -> Tensor:
        """Become exactly `tokens`, keeping the longest prefix that is already held; logits [vocab] after the last.

        Raises ContextFull where they are too many, and whatever `check` raises, at a whole chunk.
        """
        if not tokens:
            raise BadRequest("The prompt is empty: give at least one token.")
        if len(tokens) > self.context:
            raise ContextFull(_too_long(len(tokens), self.context))
        common = self.common(tokens)
        self._come_back(tokens)
        self.n_reused = self.position
        if self.position < len(tokens):
            self.mark()  # where a question that is taken back began
            again = common - self.position  # was held, and no mark was near
            shared = again if again >= SHARED and 2 * again >= len(tokens) - self.position else 0
            self._read(tokens[self.position :], progress, check, shared)
        self.mark()
        hidden = self._trail.last(self.position)
        assert hidden is not None
        return self._model.logits(hidden[None])[0]

    def step(self, token: int, check: Callable[[], None] = nothing_to_check) -> Tensor:
        """Append one token; logits [vocab] after it."""
        return self.extend([token], check)[0]

    @kernels.alone()
    def extend(self, tokens: Sequence[int], check: Callable[[], None] = nothing_to_check) -> Tensor:
        """Append a few tokens (as many as `rewind` can take back cheaply); logits [n, vocab] after each."""
        self._demand_room(len(tokens))
        return self._model.logits(self._forward(tokens, check))

    @property
    def n_heads(self) -> int:
        """Draft heads: as many tokens can be drafted at a time."""
        return len(self._drafter.heads)

    @kernels.alone()
    def draft(self, token: int, n: int, choose: Choose) -> list[int]:
        """n tokens that may come after what is held and `token`; nothing is appended."""
        return self._drafter.propose(
            [*self.tokens[-self._looks_back - SLACK :], token], self._trail, n, choose
        )

    def logits(self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """Start over with `tokens`; logits float32 [m, vocab] after each, `chunk` tokens at a time."""
        self._restore(None)
        for start in range(0, len(tokens), chunk):
            yield self._model.logits(self._forward(tokens[start : start + chunk], nothing_to_check))

    def rewind(self, n: int) -> None:
        """Take back the last n tokens: at once within the rings' slack or to a mark, else by reading again."""
        length = max(0, self.position - n)
        kept = self.tokens[:length]
        if self._cache.rewind(length):
            self._truncate(length)
        else:
            self._restore(self._mark_before(length))
            self._read(kept[self.position :], None, nothing_to_check)

    def mark(self) -> None:
        """Remember this place: coming back to it reads nothing.

        Of a few such places the first stays, which many texts may share, and of the others the last ones.
        """
        known = self._trail.last(self.position) is not None
        if known and all(mark.snapshot.length != self.position for mark in self._marks):
            self._marks.append(Checkpoint(self._cache.snapshot(), self._trail.tail(self._looks_back)))
            del self._marks[1 : 1 + len(self._marks) - N_SNAPSHOTS]

    # ---- files ----

    def save(self, path: str | Path) -> int:
        """Write the session to a file that `load` takes; its bytes. Raises BadSession where that fails."""
        if self._identity is None or not self.tokens:
            raise BadSession("There is nothing to save: the session holds no tokens.")
        facts = {"tokens": str(self.position), "marks": str(len(self._marks))}
        return write(Path(path).expanduser(), self._identity, facts, self._contents())

    @property
    def saved_bytes(self) -> int:
        """Bytes that a file of the session would have, but for some thousands of its header."""
        return sum(tensor.nbytes for tensor in self._contents().values())

    def load(self, path: str | Path) -> None:
        """Become the session that was saved at `path`, without reading its tokens through the model.

        Raises BadSession where the file is damaged or of another pack, context or KV type; the session is then
        empty if the damage was found late, else as it was.
        """
        if self._identity is None:
            raise BadSession("This session belongs to no pack, so that no file can be of the same.")
        with SavedSession(Path(path).expanduser(), self._identity) as saved:
            n = saved.count("tokens")
            if not 1 <= n <= self.context:
                raise BadSession(
                    f"{path} holds {n:,} tokens and the context has {self.context:,}: raise --context."
                )
            self._restore(None)
            try:
                self._fill(saved, n)
            except BaseException:
                self._restore(None)
                raise

    def _contents(self) -> dict[str, Tensor | RowPieces]:
        """What a file holds, by name; the keys and values in position order."""
        out: dict[str, Tensor | RowPieces] = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "hidden": self._trail.tail(self._trail.rows),
            "marks": torch.tensor([mark.snapshot.length for mark in self._marks], dtype=torch.int32),
        }
        for i, layer in enumerate(self._cache.layers):
            out[f"layers.{i}.keys"], out[f"layers.{i}.values"] = layer.held()
        for m, mark in enumerate(self._marks):
            out[f"marks.{m}.hidden"] = mark.hidden
            for (i, _), (keys, values) in zip(self._windows(), mark.snapshot.windows, strict=True):
                out[f"marks.{m}.layers.{i}.keys"], out[f"marks.{m}.layers.{i}.values"] = keys, values
        return out

    def _fill(self, saved: SavedSession, n: int) -> None:
        """Take in the contents of a file of n tokens: check every shape first, then read."""
        targets = self._targets(saved, n)
        saved.expect({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in targets.items()})
        saved.read(targets)
        tokens, lengths = targets["tokens"].tolist(), targets["marks"].tolist()
        if not all(0 <= token < self._model.config.vocab_size for token in tokens):
            raise BadSession(f"{saved.path} holds tokens that the model does not have.")
        if lengths != sorted(set(lengths)) or not all(0 < length <= n for length in lengths):
            raise BadSession(
                f"{saved.path} holds marks at {lengths}, which are no places of its {n:,} tokens."
            )
        for i, window in self._windows():
            window.restore(n, targets[f"layers.{i}.keys"], targets[f"layers.{i}.values"])
        self._cache.length = n
        self._trail.restart(n, targets["hidden"])
        self._drafter.restart()
        self.tokens = tokens
        self._marks = [self._loaded_mark(m, length, targets) for m, length in enumerate(lengths)]

    def _targets(self, saved: SavedSession, n: int) -> dict[str, Any]:
        """A place for each tensor of the file: in the cache itself where it can be, else fresh and small."""
        n_marks = saved.count("marks")
        most = (self._model.config.mtp_layer.window or 1) + SLACK  # whether or not drafts are on here
        if n_marks > N_SNAPSHOTS:
            raise BadSession(f"{saved.path} holds {n_marks} marks; a session has at most {N_SNAPSHOTS}.")
        out: dict[str, Any] = {
            "tokens": torch.empty(n, dtype=torch.int32),
            "marks": torch.empty(n_marks, dtype=torch.int32),
            "hidden": self._hidden(_rows(saved, "hidden", 0, min(n, most), least=0)),
        }
        for i, layer in enumerate(self._cache.layers):
            if not isinstance(layer, WindowKV):
                out[f"layers.{i}.keys"], out[f"layers.{i}.values"] = layer.make_room(n)
        for i, window in self._windows():
            self._add_window(out, saved, f"layers.{i}", window, window.rows)
        for m in range(n_marks):
            name = f"marks.{m}.hidden"
            out[name] = self._hidden(_rows(saved, name, 0, most))
            for i, window in self._windows():
                self._add_window(out, saved, f"marks.{m}.layers.{i}", window, window.window)
        return out

    def _hidden(self, rows: int) -> Tensor:
        return torch.empty(rows, self._model.config.hidden, device=self._model.device)

    def _add_window(
        self, out: dict[str, Any], saved: SavedSession, name: str, window: WindowKV, most: int
    ) -> None:
        rows = _rows(saved, f"{name}.keys", 1, most)
        out[f"{name}.keys"], out[f"{name}.values"] = window.empty(rows)

    def _loaded_mark(self, m: int, length: int, found: dict[str, Any]) -> Checkpoint:
        windows = tuple(
            (found[f"marks.{m}.layers.{i}.keys"], found[f"marks.{m}.layers.{i}.values"])
            for i, _ in self._windows()
        )
        return Checkpoint(Snapshot(length, windows), found[f"marks.{m}.hidden"])

    # ---- inside ----

    def _windows(self) -> list[tuple[int, WindowKV]]:
        """The window layers with their places."""
        return [(i, layer) for i, layer in enumerate(self._cache.layers) if isinstance(layer, WindowKV)]

    def _come_back(self, tokens: Sequence[int]) -> None:
        """Go back to the longest prefix of `tokens` that can be had with the logits behind it, if it is all."""
        self._forget_lost()
        common = _common_prefix(self.tokens, tokens)
        mark = self._mark_before(common)
        known = common < len(tokens) or self._trail.last(common) is not None
        if mark is not None and mark.snapshot.length == len(tokens) and not known:
            self._restore(mark)
        elif self._cache.rewind(common if known else common - 1):
            self._truncate(self._cache.length)
        else:
            self._restore(mark)

    def _forget_lost(self) -> None:
        """Become empty where the device has lost what was read."""
        if not self._cache.is_whole:
            self._restore(None)

    def _mark_before(self, length: int) -> Checkpoint | None:
        """The last mark at `length` or before it."""
        return next((mark for mark in reversed(self._marks) if mark.snapshot.length <= length), None)

    def _demand_room(self, n: int) -> None:
        if self.position + n > self.context:
            raise ContextFull(_too_long(self.position + n, self.context))

    def _restore(self, mark: Checkpoint | None) -> None:
        if mark is None:
            self._cache.clear()
        else:
            self._cache.restore(mark.snapshot)
        self._trail.restart(self._cache.length, None if mark is None else mark.hidden)
        self._drafter.restart()
        self._truncate(self._cache.length)

    def _truncate(self, length: int) -> None:
        del self.tokens[length:]
        self._trail.truncate(length)
        self._drafter.truncate(length)
        self._marks = [mark for mark in self._marks if mark.snapshot.length <= length]

    def _read(
        self, tokens: Sequence[int], progress: Progress | None, check: Callable[[], None], shared: int = 0
    ) -> None:
        """Prefill in stretches; behind the first `shared` tokens a mark is left: others may begin like this too."""
        start = 0
        while start < len(tokens):
            end = min(start + self._stretch, len(tokens), shared if start < shared else len(tokens))
            share = None if progress is None else _share(progress, start, end - start, len(tokens))
            self._forward(tokens[start:end], check, share)
            if end == shared:
                self.mark()
            start = end

    def _forward(
        self,
        tokens: Sequence[int],
        check: Callable[[], None],
        report: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Run tokens through the model; a stop or an error leaves the session as it was before them.

        Where the device has no memory left, experts give way and the step is repeated.
        """
        try:
            return self._pass(tokens, check, report or nothing_to_report)
        except torch.OutOfMemoryError as error:
            clear_frames(error.__traceback__)  # what they hold could not be given back
            if not self._give_way():
                self._forget_lost()
                raise out_of_memory(error) from error
        except RuntimeError as error:
            if (said := broke_down(error)) is None:
                raise
            raise said from error
        return self._forward(tokens, check, report)

    def _pass(
        self, tokens: Sequence[int], check: Callable[[], None], report: Callable[[float], None]
    ) -> Tensor:
        before = self._cache.snapshot() if len(tokens) > SLACK else None  # fewer: the rings reach back
        try:
            hidden = self._passes.forward(torch.tensor(tokens), self._cache, self._experts, check, report)
        except BaseException:
            if not self._cache.rewind(self._cache.length):
                assert before is not None
                self._cache.restore(before)
            raise
        self._trail.append(hidden)
        self.tokens.extend(tokens)
        return hidden


def _share(progress: Progress, start: int, n: int, total: int) -> Callable[[float], None]:
    """Progress of a stretch by the share of its layers that are done."""
    return lambda done: progress(start + int(n * done), total)


@kernels.alone()
def step_together(
    sessions: Sequence[Session], tokens: Sequence[int], check: Callable[[], None] = nothing_to_check
) -> Tensor:
    """Append one token to each of several sessions of one model, in one pass; logits [n, vocab] after them.

    They share what the pass reads: projections, and the experts that several of them want.
    """
    first = sessions[0]
    timelines = [(torch.tensor([token]), one._cache) for one, token in zip(sessions, tokens, strict=True)]
    for one in sessions:
        one._demand_room(1)
    try:
        hidden = first._model.forward_many(timelines, first._experts, check)
    except torch.OutOfMemoryError as error:
        _rewind(sessions)
        clear_frames(error.__traceback__)
        if not first._give_way():
            for one in sessions:
                one._forget_lost()
            raise out_of_memory(error) from error
        hidden = None
    except RuntimeError as error:
        _rewind(sessions)
        if (said := broke_down(error)) is None:
            raise
        raise said from error
    except BaseException:
        _rewind(sessions)
        raise
    if hidden is None:
        return step_together(sessions, tokens, check)
    for one, token, row in zip(sessions, tokens, hidden, strict=True):
        one._trail.append(row)
        one.tokens.append(token)
    return first._model.logits(torch.cat(hidden))


def _rewind(sessions: Sequence[Session]) -> None:
    """Forget a step that was stopped."""
    for one in sessions:
        one._cache.rewind(one._cache.length)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _rows(saved: SavedSession, name: str, axis: int, most: int, least: int = 1) -> int:
    """How many rows a tensor of the file has, at most `most`."""
    shape = saved.shape(name)
    rows = shape[axis] if axis < len(shape) else -1
    if not least <= rows <= most:
        raise BadSession(f"{saved.path}: {name} has {rows:,} rows, and there is room for {most:,}.")
    return rows


def _too_long(needed: int, context: int) -> str:
    return (
        f"The prompt needs {needed:,} positions and the context has {context:,}: "
        "raise --context (up to the model's own limit) or shorten the conversation."
    )
