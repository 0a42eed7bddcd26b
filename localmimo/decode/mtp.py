"""The draft heads of MiMo-V2 (multi-token prediction): each is one small block that proposes one token further on.

Holds the heads' weights, and per sequence a Drafter with their rings. Knows nothing of sampling, budgets or whether
drafting pays. All heads get the main model's hidden states as they are before its final norm. Head k reads them beside
the embedding of the token k + 1 positions on (embedding first), and shares embedding and output head with the main
model. Sources: arXiv 2601.02780, section 2.3; SGLang's mimo_v2_nextn.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localmimo.kv.cache import KVCache
from localmimo.kv.hidden_states import HiddenStates
from localmimo.limits import SLACK
from localmimo.model.protocols import PredictNext
from localmimo.model.transformer import Transformer, rms_norm
from localmimo.model.weights import DenseSource, Weights, load_block
from quant import QTensor, linear

# Rows that a head starts from after a pause. A whole window of them takes as long as some tokens, and no more of its
# drafts are accepted (benchmarks.drafts: 94, 74 and 58 % with 16, 32, 64 or 128).
RESTART_ROWS = 32

Choose = Callable[[Tensor, Sequence[int]], int]  # logits [vocab] and the drafts before -> the next draft


@dataclass(frozen=True, slots=True)
class DraftHead:
    """One head: two norms, a projection, and a window block with a dense MLP."""

    embed_norm: Tensor
    hidden_norm: Tensor
    proj: QTensor  # [hidden, 2 hidden]
    block: Transformer

    @torch.inference_mode()
    def run(self, tokens: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
        """Append rows for hidden states [n, hidden] and the tokens [n] further on; logits [vocab] of the last row.

        So many rows at a time as the ring takes without a copy: more would also start torch's threads, which wait
        for each other where the processor is busy.
        """
        for some_tokens, their_hidden in zip(tokens.split(SLACK), hidden.split(SLACK), strict=True):
            last = self._forward(some_tokens, their_hidden, cache)[-1:]
        return self.block.logits(last)[0]

    def _forward(self, tokens: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
        eps = self.block.config.eps
        parts = (
            rms_norm(self.block.embed(tokens), self.embed_norm, eps),
            rms_norm(hidden, self.hidden_norm, eps),
        )
        x = linear(torch.cat(parts, -1).to(self.block.dtype), self.proj).float()
        return self.block.through(x, [(len(tokens), cache)], _NoExperts())[0]


class _NoExperts:
    """A head has no routed experts."""

    def run(
        self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, predict_next: PredictNext | None = None
    ) -> Tensor:
        raise AssertionError("a draft head has a dense MLP")


def load_heads(source: DenseSource, main: Transformer, n: int) -> tuple[DraftHead, ...]:
    """The first n draft heads; embedding and output head are the main model's, not read again."""
    return tuple(_head(source, main, f"mtp.{k}") for k in range(n))


def _head(source: DenseSource, main: Transformer, prefix: str) -> DraftHead:
    config = replace(main.config, layers=(main.config.mtp_layer,))
    block = load_block(source, prefix, main.config.mtp_layer)
    weights = Weights(
        main.weights.embed, _vector(source, f"{prefix}.final_norm"), main.weights.head, (block,)
    )
    proj = source.tensor(f"{prefix}.proj")
    assert isinstance(proj, QTensor), prefix
    return DraftHead(
        _vector(source, f"{prefix}.embed_norm"),
        _vector(source, f"{prefix}.hidden_norm"),
        proj,
        Transformer(config, weights, main.dtype),
    )


def _vector(source: DenseSource, name: str) -> Tensor:
    tensor = source.tensor(name)
    assert isinstance(tensor, Tensor), name
    return tensor


@dataclass(slots=True)
class _Ring:
    """One head's keys and values, and what they were made of.

    Rows are at positions relative to `base`: rotations are relative, and a ring that starts in the middle of a text
    must not use positions that it never read. Only final rows stay between two rounds: row i of head k holds
    token i + 1 + k.
    """

    cache: KVCache
    base: int = 0

    @property
    def end(self) -> int:
        return self.base + self.cache.length

    def truncate(self, end: int) -> None:
        if end >= self.end:
            return
        if end < self.base or not self.cache.rewind(end - self.base):
            self.restart(max(0, end))

    def restart(self, base: int) -> None:
        self.cache.clear()
        self.base = base


class Drafter:
    """Proposes tokens for one sequence. Rows are read from its hidden states, when they are first needed."""

    def __init__(self, heads: Sequence[DraftHead], kv_dtype: torch.dtype) -> None:
        self.heads = heads
        self._rings = [
            _Ring(KVCache(head.block.config.layers, 0, kv_dtype, device=head.block.device)) for head in heads
        ]
        self._next: tuple[int, int] | None = None  # position and token that the last round started from

    def truncate(self, length: int) -> None:
        """The sequence has been cut: tokens from position `length` on may be others now."""
        self._next = None
        for k, ring in enumerate(self._rings):
            ring.truncate(length - 1 - k)

    def restart(self) -> None:
        """The sequence has become another one."""
        self._next = None
        for ring in self._rings:
            ring.restart(0)

    def propose(
        self, tokens: Sequence[int], hidden_states: HiddenStates, n: int, choose: Choose
    ) -> list[int]:
        """n tokens, at most one per head, that may follow `tokens`: the last so many of the sequence.

        The last of them has not been through the main model yet; `hidden_states` has the rows of those before it.
        """
        self._drop_changed(tokens, hidden_states.length)
        drafts: list[int] = []
        for k in range(n):
            logits = self._catch_up(k, [*tokens, *drafts], hidden_states)
            drafts.append(choose(logits, drafts))
        return drafts

    def _drop_changed(self, tokens: Sequence[int], position: int) -> None:
        """Cut where the last round was given another token than the sequence now has."""
        if self._next is not None:
            before, token = self._next
            if before > position or tokens[max(-len(tokens), before - position - 1)] != token:
                self.truncate(before)
        self._next = position, tokens[-1]

    def _catch_up(self, k: int, known: Sequence[int], hidden_states: HiddenStates) -> Tensor:
        """Run head k over the hidden states that it has not seen yet; logits [vocab] of the last row.

        known: the last tokens, the last of them k + 1 positions after the last row.
        """
        head, ring = self.heads[k], self._rings[k]
        ring.truncate(hidden_states.length - 1)  # a round that was stopped left nothing new to read
        oldest = max(hidden_states.first, hidden_states.length - min(RESTART_ROWS, hidden_states.rows))
        if ring.end < oldest or not ring.cache.length:
            ring.restart(oldest)
        first = ring.end
        rows = hidden_states.length - first
        following = torch.tensor(known[len(known) - rows :])
        logits = head.run(following, hidden_states.rows_from(first), ring.cache)
        ring.truncate(hidden_states.length - k)  # the rows after it are for drafted tokens
        return logits
