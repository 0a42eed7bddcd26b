"""The engine's logits against transformers 5.23 on random checkpoints in every layout, chunked in every way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import localmimo.model.transformer
from localmimo import load
from localmimo.engine import Engine
from tests.model.oracle import load_oracle
from tests.packs import make_pack

W = 8  # the window of the tiny checkpoints
LAYOUTS = {
    "split-bf16": {},
    "split-fp8": {},
    "fused-fp8": {},
    "seven-to-one": {"num_hidden_layers": 9, "hybrid_layer_pattern": [0, 1, 1, 1, 1, 1, 1, 0, 1]},
    "pro": {
        "num_key_value_heads": 4,
        "num_attention_heads": 8,
        "swa_num_attention_heads": 8,
        "attention_value_scale": 0.612,
    },
    "odd": {
        "hidden_size": 72,
        "vocab_size": 131,
        "n_routed_experts": 7,
        "moe_intermediate_size": 40,
        "num_experts_per_tok": 3,
    },
}
STORED = {"seven-to-one": "fused-fp8", "pro": "fused-fp8", "odd": "split-bf16"}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, torch.Tensor, list[int]]:
    """An engine in float32, the oracle's log-probabilities, and the tokens they are of."""
    folder = tmp_path_factory.mktemp(request.param)
    stored = STORED.get(request.param, request.param)
    engine = load(
        make_pack(folder, layout=stored, seed=3, **LAYOUTS[request.param]), context=256, dtype="float32"
    )
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, engine.config.vocab_size, (5 * W + 3,), generator=generator).tolist()
    with torch.no_grad():
        expected = load_oracle(folder / "hf")(torch.tensor([tokens])).logits[0]
    return engine, expected.float().log_softmax(-1), tokens


def worst(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits.log_softmax(-1) - expected).abs().max())


@pytest.mark.parametrize("chunk", [1, 7, W - 1, W, W + 1, 1000])
def test_prefill_in_chunks(pair: tuple[Engine, torch.Tensor, list[int]], chunk: int) -> None:
    engine, expected, tokens = pair
    assert worst(engine.logits(tokens, chunk=chunk), expected) < 2e-3


@pytest.mark.parametrize("prompt", [1, W, 3 * W + 1])
def test_decode_token_by_token(pair: tuple[Engine, torch.Tensor, list[int]], prompt: int) -> None:
    engine, expected, tokens = pair
    with engine.session() as session:
        rows = [session.sync(tokens[:prompt])]
        rows += [session.step(token) for token in tokens[prompt:]]
    assert worst(torch.stack(rows), expected[prompt - 1 :]) < 2e-3


def break_route(change: Callable[..., object]) -> Callable[..., object]:
    true = localmimo.model.transformer.route
    return lambda *arguments: change(true, *arguments)


def with_bias_in_weights(true: Callable, x, weight, bias, top_k, scale, normalise):  # type: ignore[no-untyped-def]
    chosen, _ = true(x, weight, bias, top_k, scale, normalise)
    picked = (torch.sigmoid(x.float() @ weight.float().T) + bias).gather(-1, chosen)
    return chosen, picked / picked.sum(-1, keepdim=True)


def without_bias(true: Callable, x, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return true(x, weight, torch.zeros_like(bias), *rest)


def in_bf16(true: Callable, x, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return true(x.bfloat16(), weight.bfloat16(), bias, *rest)


@pytest.mark.parametrize("wrong", [with_bias_in_weights, without_bias, in_bf16])
def test_a_wrong_router_shows(
    pair: tuple[Engine, torch.Tensor, list[int]], wrong: Callable, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    engine, expected, tokens = pair
    monkeypatch.setattr(localmimo.model.transformer, "route", break_route(wrong))
    assert worst(engine.logits(tokens), expected) > 2e-3


BROKEN_LAYERS = {
    "window one wider": lambda spec: replace(spec, window=spec.window + 1) if spec.window else spec,
    "no window": lambda spec: replace(spec, window=1000) if spec.window else spec,
    "no sink": lambda spec: replace(spec, sink=False),
    "theta of the other kind": lambda spec: replace(spec, rope_theta=1e4 if spec.window is None else 5e6),
    "rope over more dimensions": lambda spec: replace(spec, rotary_dim=spec.rotary_dim + 2),
}
BROKEN_MODELS = {
    "no value scale": lambda config: replace(config, value_scale=1.0),
    "another eps": lambda config: replace(config, eps=1e-2),
    "one expert less": lambda config: replace(config, top_k=config.top_k - 1),
}


@pytest.mark.parametrize("name", [*BROKEN_LAYERS, *BROKEN_MODELS])
def test_one_wrong_constant_shows(pair: tuple[Engine, torch.Tensor, list[int]], name: str) -> None:
    """Each fact of the configuration matters: with one of them wrong the comparison fails."""
    engine, expected, tokens = pair
    right = engine.config
    if name in BROKEN_MODELS:
        wrong = BROKEN_MODELS[name](right)
    else:
        wrong = replace(right, layers=tuple(BROKEN_LAYERS[name](spec) for spec in right.layers))
    assert worst(logits_with(engine, wrong, tokens), expected) > 2e-3


def logits_with(
    engine: Engine, config: localmimo.model.config.ModelConfig, tokens: list[int]
) -> torch.Tensor:
    """Logits of the engine's weights under another configuration."""
    from localmimo.decode.session import Session
    from localmimo.model.transformer import Transformer
    from localmimo.model.weights import load_weights

    model = Transformer(config, load_weights(engine.pack, config), torch.float32)
    return torch.cat(list(Session(model, engine._experts, 256, torch.float32).logits(tokens)))


def test_sinks_are_on_window_layers_alone(pair: tuple[Engine, torch.Tensor, list[int]]) -> None:
    engine, _, _ = pair
    assert {spec.attention for spec in engine.config.layers if spec.sink} == {"window"}
    assert all(
        engine.pack.has(f"layers.{i}.attn.sink") == spec.sink for i, spec in enumerate(engine.config.layers)
    )
