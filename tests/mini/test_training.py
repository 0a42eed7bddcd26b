"""The trainer: its fast forward pass against localmimo's pure maths, its gradients, a few steps, and the
export."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from mini_training.experts import Experts
from mini_training.export import config, export, from_fp8, load_exported, to_fp8
from mini_training.muon import Optimizer, orthogonal, shares
from mini_training.network import Network, Params, Shape, WeightedLoss, init_biases, init_params, make_frame
from train_mini import draft_loss, schedule, trunk_loss

from localmimo.model.attention import attend, rope_table, rotate, window_mask
from localmimo.model.config import ModelConfig
from localmimo.model.transformer import rms_norm, route

TINY = Shape(
    vocab=96, hidden=32, n_layers=3, global_layers=(0, 2), window=16, heads=4, head_dim=12, v_head_dim=8,
    global_kv=2, window_kv=4, dense_inner=48, n_experts=6, expert_inner=16, top_k=2,
)  # fmt: skip


def lively(shape: Shape) -> tuple[Params, dict[str, Tensor]]:
    """Parameters without the zeros of the real initialisation."""
    rng = torch.Generator().manual_seed(2)
    p = {n: v + 0.1 * torch.randn(v.shape, generator=rng) for n, v in init_params(shape).items()}
    return p, {n: torch.randn(v.shape, generator=rng) * 0.1 for n, v in init_biases(shape).items()}


def attention(shape: Shape, p: Params, name: str, h: Tensor, full: bool) -> Tensor:
    n = len(h)
    x = rms_norm(h, p[f"{name}.attn_norm"], shape.eps)
    q, k, v = (x @ p[f"{name}.attn.{part}"].T for part in "qkv")
    q, k = (y.view(n, -1, shape.head_dim).transpose(0, 1) for y in (q, k))
    v = v.view(n, -1, shape.v_head_dim).transpose(0, 1) * shape.value_scale
    cos, sin = rope_table(
        torch.arange(n), shape.rotary_dim, shape.global_theta if full else shape.window_theta
    )
    visible = window_mask(torch.arange(n), torch.arange(n), None if full else shape.window)
    mixed = attend(
        rotate(q, cos, sin), rotate(k, cos, sin), v, visible, p.get(f"{name}.attn.sink"), shape.head_dim**-0.5
    )
    return h + mixed @ p[f"{name}.attn.o"].T


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def reference(shape: Shape, p: Params, biases: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The hidden states [T, H] by localmimo's maths, token by token through the experts."""
    h = p["embed"][tokens]
    for layer in range(shape.n_layers):
        name = f"layers.{layer}"
        h = attention(shape, p, name, h, layer in shape.global_layers)
        x = rms_norm(h, p[f"{name}.mlp_norm"], shape.eps)
        if layer == 0:
            h = h + mlp(x, p[f"{name}.mlp.gate_up"], p[f"{name}.mlp.down"])
            continue
        experts, weights = route(x, p[f"{name}.router.weight"], biases[f"{name}.router.bias"], shape.top_k)
        gate_up, down = p[f"{name}.experts.gate_up"], p[f"{name}.experts.down"]
        rows = [
            sum(w * mlp(x[t], gate_up[e], down[e]) for e, w in zip(experts[t], weights[t], strict=True))
            for t in range(len(x))
        ]
        h = h + torch.stack(rows)
    return h


def test_forward_equals_the_pure_maths() -> None:
    p, biases = lively(TINY)
    tokens = torch.randint(0, TINY.vocab, (1, 64), generator=torch.Generator().manual_seed(1))
    hidden, picks = Network(TINY).hidden(p, biases, tokens, make_frame(TINY, torch.zeros_like(tokens)))
    torch.testing.assert_close(hidden[0], reference(TINY, p, biases, tokens[0]), atol=2e-4, rtol=1e-4)
    assert all(count.sum() == 64 * TINY.top_k for count in picks.values())


def test_documents_in_one_row_do_not_see_each_other() -> None:
    p, biases = lively(TINY)
    tokens = torch.randint(0, TINY.vocab, (1, 64), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(64) >= 32).long()[None]
    hidden, _ = Network(TINY).hidden(p, biases, tokens, make_frame(TINY, documents))
    torch.testing.assert_close(
        hidden[0, :32], reference(TINY, p, biases, tokens[0, :32]), atol=2e-4, rtol=1e-4
    )
    # positions are relative, so the second conversation is as if it stood alone
    torch.testing.assert_close(
        hidden[0, 32:], reference(TINY, p, biases, tokens[0, 32:]), atol=2e-3, rtol=1e-3
    )


def test_draft_block_equals_the_pure_maths() -> None:
    p, biases = lively(TINY)
    tokens = torch.randint(0, TINY.vocab, (33,), generator=torch.Generator().manual_seed(3))
    hidden = reference(TINY, p, biases, tokens[:32])
    e = rms_norm(p["embed"][tokens[1:]], p["mtp.0.embed_norm"], TINY.eps)
    h = torch.cat((e, rms_norm(hidden, p["mtp.0.hidden_norm"], TINY.eps)), -1) @ p["mtp.0.proj"].T
    h = attention(TINY, p, "mtp.0", h, False)
    h = h + mlp(rms_norm(h, p["mtp.0.mlp_norm"], TINY.eps), p["mtp.0.mlp.gate_up"], p["mtp.0.mlp.down"])
    frame = make_frame(TINY, torch.zeros(1, 32, dtype=torch.int64))
    drafted = Network(TINY).draft(p, 0, hidden[None], tokens[None, 1:], frame)
    torch.testing.assert_close(drafted[0], rms_norm(h, p["mtp.0.final_norm"], TINY.eps), atol=2e-4, rtol=1e-4)


def test_expert_gradients_are_right() -> None:
    rng = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(*s, generator=rng, dtype=torch.float64, requires_grad=True)
        for s in ((5, 4), (3, 6, 4), (3, 4, 3))
    )
    experts = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1], [0, 2]])
    weights = torch.rand(5, 2, generator=rng, requires_grad=True)

    def plain() -> Tensor:
        rows = [
            sum(w * mlp(x[t], gate_up[e], down[e]) for e, w in zip(experts[t], weights[t], strict=True))
            for t in range(5)
        ]
        return torch.stack(rows)

    leaves = (x, weights, gate_up, down)
    ours = torch.autograd.grad(Experts.apply(x, experts, weights, gate_up, down).square().sum(), leaves)
    theirs = torch.autograd.grad(plain().square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_weighted_loss_equals_cross_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    x, head = (
        torch.randn(7, 8, generator=rng, requires_grad=True),
        torch.randn(11, 8, generator=rng, requires_grad=True),
    )
    targets, weights = torch.randint(0, 11, (7,), generator=rng), torch.rand(7, generator=rng)
    plain = (
        torch.nn.functional.cross_entropy(x @ head.T, targets, reduction="none") * weights
    ).sum() / weights.sum()
    ours = WeightedLoss.apply(x, head, targets, weights)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (x, head)), torch.autograd.grad(plain, (x, head)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def tiny_batch() -> object:
    from mini_training.batches import Batch

    tokens = (torch.arange(67) * 7 % 23)[None].repeat(4, 1) + torch.arange(4)[:, None]
    return Batch(tokens, torch.zeros_like(tokens), torch.ones(tokens.shape))


def test_twenty_steps_lower_the_loss() -> None:
    p, biases = init_params(TINY), init_biases(TINY)
    optimizer = Optimizer(p, list(p))
    leaves = {n: v.requires_grad_() for n, v in p.items()}
    losses = []
    for _ in range(20):
        trunk, _ = trunk_loss(Network(TINY), leaves, biases, tiny_batch(), 64)
        drafts = draft_loss(Network(TINY), leaves, biases, tiny_batch(), 64, (0, 1, 2))
        grads = torch.autograd.grad(trunk + drafts, list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            full = {
                n: torch.zeros_like(v) if g is None else g
                for (n, v), g in zip(leaves.items(), grads, strict=True)
            }
            optimizer.step(full, 1.0)
        losses.append(trunk.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_muon_makes_singular_values_alike() -> None:
    update = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(orthogonal(update).float())
    assert values.min() > 0.5 and values.max() < 1.4


def test_work_is_divided_once() -> None:
    p = init_params(TINY)
    parts = shares(p, 2)
    assert sorted(parts[0] + parts[1]) == sorted(p)


def test_schedule_rises_stays_and_falls() -> None:
    assert schedule(0.0, 0) < 0.1 < schedule(0.5, 1000) == 1.0
    assert schedule(0.9, 1000) == pytest.approx(0.4) and schedule(1.0, 1000) == pytest.approx(0.01)


def test_fp8_blocks_are_partial_at_the_edge() -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(5))
    codes, scale = to_fp8(weight)
    assert codes.shape == (192, 256) and scale.shape == (2, 2) and codes.dtype == torch.float8_e4m3fn
    assert (from_fp8(codes, scale) - weight).norm() / weight.norm() < 0.03


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("export")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    export(TINY, *lively(TINY), folder, folder / "out")
    return folder / "out"


def test_export_writes_the_released_layout(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    kinds = {}
    for file in sorted(exported.glob("*.safetensors")):
        with safe_open(str(file), "pt") as f:
            for name in f.keys():  # noqa: SIM118
                assert index[name] == file.name
                kinds[name] = (f.get_slice(name).get_dtype(), tuple(f.get_slice(name).get_shape()))
    assert kinds.keys() == index.keys()
    layer = "model.layers.1"
    assert kinds["model.embed_tokens.weight"] == ("BF16", (96, 32))
    assert kinds[f"{layer}.self_attn.q_proj.weight"] == ("F8_E4M3", (48, 32))
    assert kinds[f"{layer}.self_attn.q_proj.weight_scale_inv"] == ("F32", (1, 1))
    assert kinds[f"{layer}.self_attn.o_proj.weight"] == ("BF16", (32, 32))
    assert kinds[f"{layer}.self_attn.attention_sink_bias"] == ("BF16", (4,))
    assert f"{layer[:-1]}2.self_attn.attention_sink_bias" not in kinds
    assert kinds[f"{layer}.mlp.gate.weight"] == ("F32", (6, 32))
    assert kinds[f"{layer}.mlp.gate.e_score_correction_bias"] == ("F32", (6,))
    assert kinds[f"{layer}.mlp.experts.5.down_proj.weight"] == ("F8_E4M3", (32, 16))
    assert kinds["model.mtp.layers.2.eh_proj.weight"] == ("BF16", (32, 64))
    assert index["model.mtp.layers.0.pre_mlp_layernorm.weight"] == "model_mtp.safetensors"


def test_exported_values_come_back(exported: Path) -> None:
    params, biases = lively(TINY)
    loaded, loaded_biases = load_exported(TINY, exported)
    for name, value in (params | biases).items():
        error = ((loaded | loaded_biases)[name] - value).norm() / value.norm()
        assert error < 0.05, name


def test_config_is_accepted() -> None:
    parsed = ModelConfig.parse(config(Shape(), 1, 0))
    assert [layer.attention for layer in parsed.layers].count("global") == 3
    assert parsed.n_experts == 32 and parsed.top_k == 4 and parsed.n_mtp == 3
    assert parsed.layers[1].rotary_dim == 32 and parsed.layers[1].window == 128


def test_acceptance_counts_drafts_in_a_row() -> None:
    from mini_training.card import acceptance

    one_answer = [[True, True, False, True], [True, False, True], [True, True]]
    rates, accepted = acceptance([one_answer])
    assert rates == [0.75, pytest.approx(2 / 3), 1.0]
    assert accepted == 2.0  # step 0: all three; step 1: only the first


def test_the_card_is_complete() -> None:
    from mini_training import card

    figures = {
        "perplexity": {"topic": (3.0, 2.0)},
        "held_tokens": {"topic": 9},
        "top_quarter": {"topic": 0.4, "all together": 0.3},
        "agreement": [0.9, 0.8, 0.7],
        "accepted_of_three": 2.1,
        "curve": [("trunk", 1000, 2.5)],
        "tokens": 1_000_000,
        "draft_tokens": 100_000,
        "steps": 3,
        "hours": 1.5,
        "machine": "2 cores",
        "note": "",
        "sha256": {"config.json": (12, "abc")},
        "answers": [{"prompt": "Hi", "reply": "Hello!\nHow are you?"}],
    }
    text = card.text(figures)
    assert "> Hello!" in text and "**1. Hi**" in text and "abc" in text and "{" not in text
