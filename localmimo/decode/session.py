"""Session: one sequence of tokens with its KV cache. Syncs to a prompt, steps, rewinds, is saved and loaded.

Knows tokens. Holds no weights, and must not know text. Nothing else changes the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from localmimo.decode.cuda_graphs import Graphs
from localmimo.decode.mtp import Choose, Drafter, DraftHead
from localmimo.decode.retries import nothing_to_shrink, run_with_retries
from localmimo.decode.session_state import Checkpoint, SessionState
from localmimo.errors import BadRequest, BadSession, ContextFull
from localmimo.kv.block_table import SlotPool
from localmimo.kv.cache import KVCache
from localmimo.kv.hidden_states import HiddenStates
from localmimo.kv.session_file import SavedSession, SessionIdentity, write
from localmimo.limits import PREFILL_CHUNK, SLACK
from localmimo.model.protocols import Experts, nothing_to_check, nothing_to_report
from localmimo.model.transformer import Transformer
from quant import kernels

# Tokens that must be read again before a checkpoint is left behind them: it costs a prefill segment of its own.
SHARED_TOKENS = 256

Progress = Callable[[int, int], None]  # tokens read, tokens to read


class Session:
    """One sequence of at most `context` tokens."""

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        context: int,
        kv_dtype: torch.dtype,
        segment_tokens: int = PREFILL_CHUNK,
        identity: SessionIdentity | None = None,
        heads: Sequence[DraftHead] = (),
        shrink: Callable[[], bool] = nothing_to_shrink,
        pool: SlotPool | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """segment_tokens: of a prompt, that go through the model layer by layer; this decides memory alone.

        identity: what a file must agree with; None: the session cannot be saved. shrink: frees some of the device's
        memory where a pass ran out of it; False where there is none to free. pool: of slots for keys and values, on a
        GPU. graphs: runs steps there from recorded graphs.
        """
        self.context = context
        self._model = model
        self._passes = graphs or model
        self._experts = experts
        self._shrink = shrink
        self._identity = identity
        self._segment_tokens = segment_tokens
        # Draft heads look back over a window of hidden states; without them one row gives the logits again.
        self._window = model.config.mtp_layer.window or 1
        self._n_look_back = self._window if heads else 1
        self._state = SessionState(
            KVCache(model.config.layers, context, kv_dtype, device=model.device, pool=pool),
            HiddenStates(self._n_look_back + SLACK, model.config.hidden, model.device),
        )
        self._drafter = Drafter(heads, kv_dtype)
        self.ended = ""  # why this handle may not be used any more

    # ---- what it holds ----

    @property
    def tokens(self) -> list[int]:
        """The tokens held; not to be changed."""
        return self._state.tokens

    @property
    def position(self) -> int:
        """Number of tokens held."""
        return len(self._state.tokens)

    @property
    def n_reused(self) -> int:
        """Tokens that the last sync did not have to read."""
        return self._state.n_reused

    @property
    def n_heads(self) -> int:
        """Draft heads: as many tokens can be drafted at a time."""
        return len(self._drafter.heads)

    @property
    def checkpoints(self) -> list[int]:
        """Positions that the session can return to without reading, besides the last few."""
        return [checkpoint.length for checkpoint in self._state.checkpoints]

    def common(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are held."""
        return _common_prefix(self.tokens, tokens)

    # ---- who may use it ----

    def handle(self) -> "Session":
        """Another handle to the same sequence, which stays usable until its own `end`."""
        return copy(self)

    def end(self, why: str) -> None:
        """Refuse every change through this handle from now on, with `why` as the sentence; a pass ends too."""
        self.ended = self.ended or why

    def _demand_open(self) -> None:
        if self.ended:
            raise BadRequest(self.ended)

    # ---- reading and stepping ----

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
        self._demand_open()
        if not tokens:
            raise BadRequest("The prompt is empty: give at least one token.")
        self._demand_room(len(tokens))
        common = self.common(tokens)
        self._return_to_prefix(tokens)
        self._state.n_reused = self.position
        if self.position < len(tokens):
            self.checkpoint()  # a client that takes its question back returns to it
            n_again = common - self.position  # were held, and no checkpoint was near
            worth_it = n_again >= SHARED_TOKENS and 2 * n_again >= len(tokens) - self.position
            self._read(tokens[self.position :], progress, check, n_again if worth_it else 0)
        self.checkpoint()
        hidden = self._state.hidden_states.last(self.position)
        assert hidden is not None
        return self._model.logits(hidden[None])[0]

    def step(self, token: int, check: Callable[[], None] = nothing_to_check) -> Tensor:
        """Append one token; logits [vocab] after it."""
        return self.extend([token], check)[0]

    @kernels.alone()
    def extend(self, tokens: Sequence[int], check: Callable[[], None] = nothing_to_check) -> Tensor:
        """Append a few tokens (as many as `rewind` can take back cheaply); logits [n, vocab] after each."""
        self._demand_open()
        self._demand_room(self.position + len(tokens))
        return self._model.logits(self._forward(tokens, check))

    @kernels.alone()
    def draft(self, token: int, n: int, choose: Choose) -> list[int]:
        """n tokens that may come after what is held and `token`; nothing is appended."""
        self._demand_open()
        known = [*self.tokens[-self._n_look_back - SLACK :], token]
        return self._drafter.propose(known, self._state.hidden_states, n, choose)

    def logits(self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """Start over with `tokens`; logits float32 [m, vocab] after each, `chunk` tokens at a time."""
        self._demand_open()
        self._restore(None)
        for start in range(0, len(tokens), chunk):
            yield self._model.logits(self._forward(tokens[start : start + chunk], nothing_to_check))

    def rewind(self, n: int) -> None:
        """Take back the last n tokens: at once within the rings' slack or to a checkpoint, else by reading again."""
        self._demand_open()
        length = max(0, self.position - n)
        kept = self.tokens[:length]
        if self._state.cache.rewind(length):
            self._truncate(length)
        else:
            self._restore(self._state.checkpoint_before(length))
            self._read(kept[self.position :], None, nothing_to_check)

    def checkpoint(self) -> None:
        """Remember this position: a return to it reads nothing. A session keeps a few (see SessionState)."""
        self._state.add_checkpoint(self._n_look_back)

    # ---- files ----

    def save(self, path: str | Path) -> int:
        """Write the session to a file that `load` takes; its bytes. Raises BadSession where that fails."""
        self._demand_open()
        if self._identity is None or not self.tokens:
            raise BadSession("There is nothing to save: the session holds no tokens.")
        return write(Path(path).expanduser(), self._identity, self._state.facts(), self._state.contents())

    @property
    def saved_bytes(self) -> int:
        """Bytes that a file of the session would have, but for some thousands of its header."""
        return sum(tensor.nbytes for tensor in self._state.contents().values())

    def load(self, path: str | Path) -> None:
        """Become the session that was saved at `path`, without reading its tokens through the model.

        Raises BadSession where the file is damaged or of another pack, context or KV type; the session is then
        empty if the damage was found late, else as it was.
        """
        self._demand_open()
        if self._identity is None:
            raise BadSession("This session belongs to no pack, so that no file can be of the same.")
        with SavedSession(Path(path).expanduser(), self._identity) as saved:
            n = saved.count("tokens")
            if not 1 <= n <= self.context:
                raise BadSession(
                    f"{path} holds {n:,} tokens and the context has {self.context:,}: raise context=."
                )
            self._restore(None)
            try:
                self._state.fill(saved, n, self._model.config.vocab_size, self._window)
            except BaseException:
                self._restore(None)
                raise
            self._drafter.restart()

    # ---- inside ----

    def _return_to_prefix(self, tokens: Sequence[int]) -> None:
        """Return to the longest prefix of `tokens` that needs no reading and, if it is all, whose logits are known."""
        self._forget_lost()
        state = self._state
        common = self.common(tokens)
        checkpoint = state.checkpoint_before(common)
        known = common < len(tokens) or state.hidden_states.last(common) is not None
        if checkpoint is not None and checkpoint.length == len(tokens) and not known:
            self._restore(checkpoint)
        elif state.cache.rewind(common if known else common - 1):
            self._truncate(state.cache.length)
        else:
            self._restore(checkpoint)

    def _forget_lost(self) -> None:
        """Become empty where the device has lost what was read."""
        if not self._state.cache.is_whole:
            self._restore(None)

    def _demand_room(self, n: int) -> None:
        if n > self.context:
            raise ContextFull(
                f"The prompt needs {n:,} positions and the context has {self.context:,}: "
                "raise context= (up to the model's own limit) or shorten the conversation."
            )

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        self._drafter.restart()
        self._state.restore(checkpoint)
        self._drafter.truncate(self.position)

    def _truncate(self, length: int) -> None:
        self._state.truncate(length)
        self._drafter.truncate(length)

    def _read(
        self,
        tokens: Sequence[int],
        progress: Progress | None,
        check: Callable[[], None],
        n_shared: int = 0,
    ) -> None:
        """Prefill segment by segment; leave a checkpoint behind the first `n_shared` tokens."""
        start = 0
        while start < len(tokens):
            end = min(
                start + self._segment_tokens, len(tokens), n_shared if start < n_shared else len(tokens)
            )
            report = None if progress is None else _report(progress, start, end - start, len(tokens))
            self._forward(tokens[start:end], check, report)
            if end == n_shared:
                self.checkpoint()
            start = end

    def _forward(
        self,
        tokens: Sequence[int],
        check: Callable[[], None],
        report: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Run tokens through the model; after a stop or an error the session is as it was before them."""
        cache = self._state.cache
        before = None

        def check_both() -> None:
            self._demand_open()
            check()

        def run() -> Tensor:
            nonlocal before
            before = cache.snapshot() if len(tokens) > SLACK else None  # fewer: the rings can be rewound
            return self._passes.forward(
                torch.tensor(tokens), cache, self._experts, check_both, report or nothing_to_report
            )

        def undo() -> None:
            if not cache.rewind(cache.length):
                assert before is not None
                cache.restore(before)

        hidden = run_with_retries(run, undo, self._shrink, self._forget_lost)
        self._state.append(list(tokens), hidden)
        return hidden


def _report(progress: Progress, start: int, n: int, total: int) -> Callable[[float], None]:
    """Progress of a segment by the share of its layers that are done."""
    return lambda done: progress(start + int(n * done), total)


@kernels.alone()
def step_together(
    sessions: Sequence[Session], tokens: Sequence[int], check: Callable[[], None] = nothing_to_check
) -> Tensor:
    """Append one token to each of several sessions of one model, in one pass; logits [n, vocab] after them.

    The sessions share what the pass reads: projections, and the experts that several of them use.
    """
    first = sessions[0]
    states = [session._state for session in sessions]
    for session in sessions:
        session._demand_open()
        session._demand_room(session.position + 1)
    rows = [(torch.tensor([token]), state.cache) for token, state in zip(tokens, states, strict=True)]

    def check_both() -> None:
        first._demand_open()
        check()

    def undo() -> None:
        for state in states:
            state.cache.rewind(state.cache.length)

    def give_up() -> None:
        for session in sessions:
            session._forget_lost()

    hidden = run_with_retries(
        lambda: first._model.forward_many(rows, first._experts, check_both), undo, first._shrink, give_up
    )
    for state, token, row in zip(states, tokens, hidden, strict=True):
        state.append([token], row)
    return first._model.logits(torch.cat(hidden))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
