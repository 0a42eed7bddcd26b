"""Session: one timeline of tokens with its KV cache. Syncs to a prompt, steps, rewinds.

Knows tokens, not text; holds no weights. The cache is only ever touched here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmimo.errors import BadRequest, ContextFull
from localmimo.kv import KVCache, Snapshot
from localmimo.model import Experts, Transformer, nothing_to_check, nothing_to_report
from localmimo.plan import N_SNAPSHOTS, PREFILL_CHUNK

Progress = Callable[[int, int], None]  # tokens read, tokens to read


@dataclass(frozen=True, slots=True)
class Mark:
    """A place to come back to: the windows there, and the last hidden state [hidden], which gives the logits."""

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
    ) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.n_reused = 0  # tokens that the last sync did not have to read
        self._model = model
        self._experts = experts
        self._cache = KVCache(model.config.layers, context, kv_dtype)
        self._marks: list[Mark] = []
        self._stretch = stretch  # tokens of a prompt that are read layer by layer: a matter of memory alone

    @property
    def position(self) -> int:
        """Tokens held."""
        return len(self.tokens)

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
        mark = self._come_back(tokens)
        self.n_reused = self.position
        if mark is not None and self.position == len(tokens):
            return self._model.logits(mark.hidden[None])[0]
        hidden = self._read(tokens[self.position :], progress, check)
        self._keep_mark(hidden)
        return self._model.logits(hidden[None])[0]

    def step(self, token: int, check: Callable[[], None] = nothing_to_check) -> Tensor:
        """Append one token; logits [vocab] after it."""
        if self.position >= self.context:
            raise ContextFull(_too_long(self.position + 1, self.context))
        return self._model.logits(self._forward([token], check))[0]

    def logits(self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """Start over with `tokens`; logits float32 [m, vocab] after each, `chunk` tokens at a time."""
        self._restore(None)
        for start in range(0, len(tokens), chunk):
            yield self._model.logits(self._forward(tokens[start : start + chunk], nothing_to_check))

    def rewind(self, n: int) -> None:
        """Take back the last n tokens."""
        kept = self.tokens[: max(0, self.position - n)]
        self._come_back(kept, whole=True)
        if self.position < len(kept):  # the window there is gone: read again from where it is not
            self._read(kept[self.position :], None, nothing_to_check)

    def _come_back(self, tokens: Sequence[int], whole: bool = False) -> Mark | None:
        """Go back to the longest prefix of `tokens` that can be had; the mark used, if it is all of them.

        At least one token is left to read, so that there are logits, unless `whole` or a mark has them.
        """
        common = _common_prefix(self.tokens, tokens)
        mark = next((mark for mark in reversed(self._marks) if mark.snapshot.length <= common), None)
        if mark is not None and mark.snapshot.length == len(tokens):
            self._restore(mark)
            return mark
        reach = common if whole else min(common, len(tokens) - 1)
        if not self._cache.rewind(reach):
            self._restore(mark)
        self._truncate(self._cache.length)
        return None

    def _restore(self, mark: Mark | None) -> None:
        if mark is None:
            self._cache.clear()
        else:
            self._cache.restore(mark.snapshot)
        self._truncate(self._cache.length)

    def _truncate(self, length: int) -> None:
        del self.tokens[length:]
        self._marks = [mark for mark in self._marks if mark.snapshot.length <= length]

    def _read(self, tokens: Sequence[int], progress: Progress | None, check: Callable[[], None]) -> Tensor:
        """Prefill in stretches; the hidden state [hidden] after the last token."""
        hidden = torch.empty(0)
        for start in range(0, len(tokens), self._stretch):
            stretch = tokens[start : start + self._stretch]
            share = None if progress is None else _share(progress, start, len(stretch), len(tokens))
            hidden = self._forward(stretch, check, share)[-1].clone()
        return hidden

    def _forward(
        self,
        tokens: Sequence[int],
        check: Callable[[], None],
        report: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Run tokens through the model; a stop or an error leaves the session as it was before them."""
        before = self._cache.snapshot() if len(tokens) > 1 else None
        try:
            hidden = self._model.forward(
                torch.tensor(tokens), self._cache, self._experts, check, report or nothing_to_report
            )
        except BaseException:
            if not self._cache.rewind(self._cache.length):
                assert before is not None
                self._cache.restore(before)
            raise
        self.tokens.extend(tokens)
        return hidden

    def _keep_mark(self, hidden: Tensor) -> None:
        self._marks.append(Mark(self._cache.snapshot(), hidden.clone()))
        del self._marks[:-N_SNAPSHOTS]


def _share(progress: Progress, start: int, n: int, total: int) -> Callable[[float], None]:
    """Progress of a stretch by the share of its layers that are done."""
    return lambda done: progress(start + int(n * done), total)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _too_long(needed: int, context: int) -> str:
    return (
        f"The prompt needs {needed:,} positions and the context has {context:,}: "
        "raise --context (up to the model's own limit) or shorten the conversation."
    )
