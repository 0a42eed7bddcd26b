"""A layer in one native call equals its parts called one by one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from localmimo import load
from localmimo.engine import Engine
from localmimo.kv.cache import KVCache
from localmimo.model.transformer import Transformer, pieces_of
from quant import kernels
from tests.packs import make_pack
from tests.quant.kernels.isa import needs_native

pytestmark = needs_native


@pytest.fixture(scope="module", params=[{}, {"hidden_size": 72, "intermediate_size": 90, "vocab_size": 131}])
def odd_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    pack = make_pack(
        tmp_path_factory.mktemp("block"), experts="nf4", dense="int8", joint_kv=False, **request.param
    )
    with load(pack, context=256, dtype="float32") as engine:
        yield engine


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rounded", [False, True])
def test_fused_equals_parts(odd_engine: Engine, kv: torch.dtype, rounded: bool) -> None:
    config = replace(odd_engine.config, router_bf16=rounded)
    fused = Transformer(config, odd_engine._model.weights, torch.float32)
    parts = Transformer(config, odd_engine._model.weights, torch.float32)
    assert all(fused._fused)
    parts._fused = [None] * len(config.layers)
    for layer, spec in enumerate(config.layers):
        ours, theirs = (one_layer(model, layer, kv) for model in (fused, parts))
        for a, b in zip(ours, theirs, strict=True):
            if spec.mlp == "dense":  # SiLU rounds otherwise in torch
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(a, b)


def one_layer(model: Transformer, layer: int, kv: torch.dtype) -> list[torch.Tensor]:
    """What a layer makes of 30 rows, then of one more: the residual stream, and what its experts would get."""
    caches, seen = [KVCache(model.config.layers, 64, kv) for _ in range(2)], []
    generator = torch.Generator().manual_seed(layer)
    for n in (30, 1):
        x = torch.randn(2 * n, model.config.hidden, generator=generator)
        pieces = pieces_of([(n, cache) for cache in caches], {spec.rope for spec in model.config.layers})
        choice = model.attend_and_choose(layer, x, pieces[0])
        seen += [x, *(choice or ())]
        for cache in caches:
            cache.advance(n)
    return seen


@pytest.mark.engine("bf16_pack", context=64)
def test_matrices_without_kernels_are_not_fused(engine: Engine) -> None:
    assert not any(engine._model._fused) and kernels.available()
