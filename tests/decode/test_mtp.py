"""Draft heads against a literal reading of the published formulas, however the timeline came to be what it is."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from localmimo import load
from localmimo.decode.session import Session
from localmimo.engine import Engine
from tests.tiny import oracle_weights

pytestmark = pytest.mark.engine("bf16_pack", context=200, dtype="float32", draft=3)
W = 8


@pytest.fixture(scope="module")
def weights(packs: Callable[[str], Path]) -> dict[str, Tensor]:
    return oracle_weights(packs("bf16").parent / "hf")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turned(x: Tensor) -> Tensor:
    """x [heads, n, 24]: the first int(24 * 0.334) = 8 dimensions rotated, theta 10,000, pairs (i, i + 4)."""
    n = x.shape[1]
    angles = torch.arange(n)[:, None] * (10_000.0 ** (-torch.arange(0, 8, 2) / 8))[None]
    a, b = x[..., :4], x[..., 4:8]
    return torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., 8:]), -1
    )


def reference(w: dict[str, Tensor], k: int, tokens: list[int], hidden: Tensor) -> Tensor:
    """Logits of head k at the last row, from all rows at once; tokens [rows]: k + 1 places on from the rows."""
    m = f"mtp.{k}"
    both = (norm(w["embed"][tokens], w[f"{m}.embed_norm"]), norm(hidden, w[f"{m}.hidden_norm"]))
    x = torch.cat(both, -1) @ w[f"{m}.proj"].T
    n = len(x)
    q, key, v = (norm(x, w[f"{m}.attn_norm"]) @ w[f"{m}.attn.qkv"].T).split((4 * 24, 4 * 24, 4 * 16), -1)
    q, key = (turned(t.view(n, 4, 24).transpose(0, 1)) for t in (q, key))
    v = v.view(n, 4, 16).transpose(0, 1) * 0.707
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    scores = (q @ key.transpose(1, 2) * 24**-0.5).masked_fill((distance < 0) | (distance >= W), -torch.inf)
    sink = w[f"{m}.attn.sink"][:, None, None].expand(4, n, 1)
    shares = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    x = x + (shares @ v).transpose(0, 1).reshape(n, 64) @ w[f"{m}.attn.o"].T
    y = norm(x, w[f"{m}.mlp_norm"])
    x = x + (F.silu(y @ w[f"{m}.mlp.gate"].T) * (y @ w[f"{m}.mlp.up"].T)) @ w[f"{m}.mlp.down"].T
    return (norm(x, w[f"{m}.final_norm"]) @ w["head"].T)[-1]


def hidden_states(engine: Engine, tokens: list[int]) -> Tensor:
    """The main model's hidden states before its final norm, read in one go."""
    session = Session(engine._model, engine._experts, 200, torch.float32)
    return session._forward(tokens, lambda: None).clone()


def check_heads(engine: Engine, w: dict[str, Tensor], session: Session, token: int) -> list[int]:
    """Each head's logits are the reference's; what the heads choose."""
    seen: list[Tensor] = []

    def choose(logits: Tensor, drafts: list[int]) -> int:
        seen.append(logits)
        return int(logits.argmax())

    drafts = session.draft(token, 3, choose)
    tokens, hidden = [*session.tokens, token, *drafts], hidden_states(engine, session.tokens)
    for k in range(3):
        expected = reference(w, k, tokens[k + 1 : k + 1 + len(hidden)], hidden)
        torch.testing.assert_close(seen[k], expected, rtol=1e-3, atol=2e-3)
    return drafts


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("n", [1, 3, W, W + 1, 60])
def test_heads_after_a_prompt(engine: Engine, weights: dict[str, Tensor], n: int) -> None:
    with engine.session() as session:
        session.sync(text(n))
        check_heads(engine, weights, session, 7)


def test_heads_after_any_course_of_steps_and_rewinds(engine: Engine, weights: dict[str, Tensor]) -> None:
    rng = random.Random(4)
    with engine.session() as session:
        session.sync(text(20, seed=1))
        for _ in range(25):
            token = rng.randrange(3, 160)
            drafts = check_heads(engine, weights, session, token)
            if rng.random() < 0.2:
                continue  # the round was stopped; another token may come
            session.extend([token, *drafts[: rng.randrange(4)]])
            if rng.random() < 0.7:
                session.rewind(rng.randrange(4))
            if rng.random() < 0.1:
                session.sync(session.tokens[: rng.randrange(1, 20)] + text(5, seed=rng.randrange(99)))


def test_heads_after_a_mark_and_after_loading(
    engine: Engine, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    with engine.session() as session:
        session.sync(text(40))
        session.sync(text(90))
        session.sync(text(40))  # from the mark
        assert session.n_reused == 40
        check_heads(engine, weights, session, 9)
        session.save(tmp_path / "s")
        session.sync(text(3, seed=3))
        session.load(tmp_path / "s")
        check_heads(engine, weights, session, 9)


def test_without_drafts_no_head_is_loaded(engine: Engine) -> None:
    with load(engine.pack.path, context=200, draft=0) as plain, plain.session() as session:
        assert session.n_heads == 0 and plain.plan.n_drafts == 0
        assert engine.plan.dense_bytes - plain.plan.dense_bytes == sum(
            tensor.nbytes for name, tensor in engine.pack.tensors.items() if name.startswith("mtp.")
        )
        assert engine.plan.kv_bytes > plain.plan.kv_bytes
