"""How long a stretch of prompt is, and with whom a timeline goes through the layers, never changes an answer."""

import pytest
import torch

import localmimo.model.transformer
from localmimo import Cancelled
from localmimo.decode.session import Session
from localmimo.engine import Engine
from localmimo.kv.cache import KVCache
from localmimo.model.protocols import PredictNext
from localmimo.model.transformer import MAX_PREDICTED_TOKENS, pieces_of
from quant import kernels

pytestmark = pytest.mark.engine("nf4_pack", context=4096, dtype="float32")

needs_native = pytest.mark.skipif(
    not kernels.available(), reason="products of other shapes round otherwise without the native kernels"
)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmimo.model.transformer, "PREFILL_CHUNK", 32)


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def session(engine: Engine, stretch: int) -> Session:
    return Session(engine._model, engine._experts, 512, torch.float32, segment_tokens=stretch)


@pytest.mark.parametrize("stretch", [64, 96, 4096])
def test_the_stretch_never_changes_an_answer(engine: Engine, stretch: int) -> None:
    one, other = session(engine, 32), session(engine, stretch)
    assert torch.equal(one.sync(tokens(300)), other.sync(tokens(300)))
    assert torch.equal(one.step(5), other.step(5))


def test_a_long_stretch_runs_each_layers_experts_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    true = engine._experts.run

    def run(layer: int, x: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append((layer, len(x)))
        return true(layer, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._experts, "run", run)
    session(engine, 4096).sync(tokens(300))
    assert calls == [(layer, 300) for layer in engine.config.moe_layers]


def test_progress_within_a_long_stretch(engine: Engine) -> None:
    heard: list[tuple[int, int]] = []
    session(engine, 128).sync(tokens(300), progress=lambda *at: heard.append(at))
    assert [at for at, _ in heard] == sorted(at for at, _ in heard) and heard[-1] == (300, 300)
    assert len(heard) == 3 * len(engine.config.layers)


def test_a_stop_within_a_layer_of_a_long_stretch(engine: Engine) -> None:
    timeline, calls = session(engine, 4096), 0
    timeline.sync(tokens(40))

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 17:  # nine pieces a layer: in the middle of the second one
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        timeline.sync(tokens(40) + tokens(280, seed=1), check=stop)
    assert timeline.tokens == tokens(40)
    fresh = session(engine, 32)
    fresh.sync(tokens(40))
    assert torch.equal(timeline.step(9), fresh.step(9))


@needs_native
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 40, 3), (33, 70)])
def test_timelines_in_step_equal_one_by_one(engine: Engine, lengths: tuple[int, ...]) -> None:
    model, experts = engine._model, engine._experts

    def begin(i: int) -> KVCache:
        cache = KVCache(engine.config.layers, 512, torch.float32)
        model.forward(torch.tensor(tokens(20 + 7 * i, seed=i)), cache, experts)
        return cache

    new = [torch.tensor(tokens(n, seed=50 + i)) for i, n in enumerate(lengths)]
    alone = [model.forward(each, begin(i), experts) for i, each in enumerate(new)]
    caches = [begin(i) for i in range(len(lengths))]
    for one, together in zip(
        alone, model.forward_many(list(zip(new, caches, strict=True)), experts), strict=True
    ):
        assert torch.equal(one, together)
    assert [cache.length for cache in caches] == [20 + 7 * i + n for i, n in enumerate(lengths)]


def test_pieces_never_exceed_a_chunk() -> None:
    caches = [KVCache([], 10, torch.float32) for _ in range(3)]
    groups = pieces_of(list(zip((70, 20, 12), caches, strict=True)), set())
    assert [[(piece.first, piece.n) for piece in group] for group in groups] == [
        [(0, 32)],
        [(32, 32)],
        [(64, 6), (70, 20)],
        [(90, 12)],
    ]


@pytest.mark.parametrize("n", [1, MAX_PREDICTED_TOKENS, MAX_PREDICTED_TOKENS + 1])
def test_a_guess_names_the_next_layer(engine: Engine, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    predictions: list[PredictNext | None] = []
    true = engine._experts.run

    def run(layer: int, x: torch.Tensor, *rest: object) -> torch.Tensor:
        predictions.append(rest[-1])  # type: ignore[arg-type]
        if rest[-1] is not None:
            following, chosen = rest[-1]()  # type: ignore[operator]
            assert chosen.shape == (n, engine.config.top_k)
            assert following == min(i for i in engine.config.moe_layers if i > layer)
        return true(layer, x, *rest)  # type: ignore[arg-type]

    plain = session(engine, 32).sync(tokens(n))
    monkeypatch.setattr(engine._experts, "run", run)
    assert torch.equal(session(engine, 32).sync(tokens(n)), plain)
    assert [predict_next is not None for predict_next in predictions[:-1]] == [n <= MAX_PREDICTED_TOKENS] * (
        len(predictions) - 1
    )
    assert predictions[-1] is None
