"""The same seed gives the same tokens and the same bits, on any number of threads and in a new engine.

Budgets: tests/experts/test_store.py; prefill pieces: test_stretch.py; drafts: test_draft.py; company: test_batch.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from localmimo import load
from localmimo.decode.options import Sampling
from quant import kernels

PROMPT = "abc def ghi " * 20
Said = tuple[tuple[int, ...], torch.Tensor]


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    ours, torchs = kernels.threads(), torch.get_num_threads()
    yield
    kernels.set_threads(ours)
    torch.set_num_threads(torchs)


def said(pack: Path, threads: int) -> Said:
    """Tokens drawn with a seed, and the logits of a prompt, by a new engine."""
    with load(pack, context=512, ram="256MiB", profile=None) as engine:
        kernels.set_threads(threads)
        torch.set_num_threads(threads)
        steps = engine.stream(PROMPT, max_tokens=24, sampling=Sampling(temperature=1.0, seed=7))
        tokens = [step.token for step in steps if step.token is not None]
        return tuple(tokens), engine.logits(engine.tokenizer.encode(PROMPT))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_a_new_engine_change_no_bit(nf4_pack: Path, threads: int) -> None:
    (tokens, logits), (same, again) = said(nf4_pack, 1), said(nf4_pack, threads)
    assert tokens == same and len(tokens) > 4
    assert torch.equal(logits, again)
