"""The whole engine on a pretended GPU says what it says on the CPU, wherever its experts lie."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from localmimo import Engine, Sampling, load
from localmimo.errors import DoesNotFit, NoDevice
from localmimo.experts.compute.hybrid_runner import HybridRunner
from localmimo.experts.tiers.tiers import GpuTier
from quant import Recipe
from tests.gpu import pretended
from tests.gpu.engines import PLAIN, on_gpu
from tests.gpu.pages import relative
from tests.packs import make_pack

GREEDY = Sampling(temperature=0)
SHORT = "Once upon a time, there was a little"
LONG = "The history of the world is a long one. " * 28  # longer than what is shared between GPU and CPU
N = 8  # tokens of an answer
SHARES = {"all": 1.0, "some": 0.4, "none": 0.0}  # of the experts that lie on the GPU when the context is full


@pytest.fixture(scope="module")
def said() -> dict[str, list[int]]:
    with load(**PLAIN, device="cpu", draft=0) as engine:
        return {text: engine.generate(text, max_tokens=N, sampling=GREEDY).tokens for text in (SHORT, LONG)}


def taken(engine: Engine) -> int:
    """Slots of the GPU that hold keys and values."""
    return sum(len(timeline._state.cache._blocks.slots) for timeline in engine._sessions)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_answers_are_the_same(share: float, said: dict[str, list[int]]) -> None:
    with on_gpu(share) as engine:
        for text, tokens in said.items():
            assert engine.generate(text, max_tokens=N, sampling=GREEDY).tokens == tokens
        found = engine.counters
        assert (found.gpu_pages > 0) == (share > 0)
        assert (found.ram_pages + found.disk_pages > 0) == (share < 1)


@pytest.mark.slow  # half a minute each in the interpreter
@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [
        ("float32", Recipe("nf4", "int8")),
        ("bfloat16", Recipe("mxfp4", "nf4")),
        ("float32", Recipe("bf16", "bf16")),
    ],
    ids=["nf4", "mxfp4", "unpacked"],
)
def test_the_kernels_of_the_gpu_in_their_place(dtype: str, recipe: Recipe, tmp_path: Path) -> None:
    """A tiny model on Triton's interpreter, experts of one layer and a half on the GPU: the logits of the CPU."""
    pack, tokens = make_pack(tmp_path, recipe=recipe, seed=3), [3, 4, 5]
    found = []
    for on in (nullcontext(), pretended.device(triton=True)):
        with (
            on as device,
            load(
                pack, context=64, profile=None, dtype=dtype, device="cuda" if device else "cpu", draft=0
            ) as engine,
            engine.session() as session,
        ):
            if device:
                engine._store.promote([(1, e) for e in range(8)] + [(2, e) for e in range(4)])
            first = session.sync(tokens)
            found.append(torch.stack([first, *map(session.step, (12, 7))]))  # the last one from records
            assert engine.effective()["graphs"] == (None if device is None else "on")
    assert relative(found[1], found[0]) < (3e-2 if dtype == "bfloat16" else 1e-2)
    assert torch.equal(found[1].argmax(-1), found[0].argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_answers_on_a_gpu_that_is_there(share: float, said: dict[str, list[int]]) -> None:
    """Other last bits, and nearly the same answers."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    asked = PLAIN | {"device": "cuda", "draft": 0}
    with load(**asked) as engine:  # type: ignore[arg-type]
        vram, page = engine.plan.vram, engine.plan.page_bytes
    assert vram is not None
    with load(**asked, vram=vram.used_bytes - round((1 - share) * vram.n_slots) * page) as engine:  # type: ignore[arg-type]
        for text, tokens in said.items():
            with engine.session() as session:
                logits, same = session.sync(engine.encode(text)), 0
                for token in tokens:
                    same += int(logits.argmax()) == token
                    logits = session.step(token)
            assert same >= N - 1


def test_drafts_rewinds_and_batches(said: dict[str, list[int]]) -> None:
    with on_gpu(draft=3, max_batch=2) as engine:
        answer = engine.generate(SHORT, max_tokens=N, sampling=GREEDY)
        assert answer.tokens == said[SHORT] and sum(answer.stats.drafts.accepted) > 0
        both = engine.generate([SHORT, SHORT], max_tokens=3, sampling=GREEDY)
        assert [one.tokens for one in both] == [said[SHORT][:3]] * 2
        with engine.session() as session:
            tokens = engine.encode(LONG)
            before = session.sync(tokens)
            after = [session.step(token) for token in said[LONG][:3]]
            session.rewind(3)
            assert torch.equal(session.step(said[LONG][0]), after[0])
            assert torch.equal(session.sync(tokens), before)


def test_sessions_go_from_gpu_to_cpu_and_back(tmp_path: Path, said: dict[str, list[int]]) -> None:
    file = tmp_path / "session"
    with on_gpu(kv="int8") as engine, engine.session() as session:
        tokens = engine.encode(LONG)
        session.sync(tokens)
        session.save(file)
        following = session.step(5).argmax()
    with load(**PLAIN, kv="int8", device="cpu", draft=0) as engine, engine.session() as session:
        session.load(file)
        assert session.tokens == tokens and session.step(5).argmax() == following
    with on_gpu(kv="int8") as engine, engine.session() as session:
        session.load(file)
        assert session.step(5).argmax() == following


def test_what_is_in_force_is_said() -> None:
    with on_gpu() as engine:
        found = engine.effective()
        assert found["device"] == "cuda:0" and found["gpu"] == "Pretended GPU" and found["pinned"] is True
        vram = found["plan"]["vram"]
        assert found["gpu_slots_now"] == engine.plan.gpu_slots == vram["n_slots"]
        assert engine.plan.gpu_slots_at(engine.context) == vram["n_slots"] - vram["kv_slots"]
        assert f"{vram['n_slots']} of 224" in str(engine.plan) and " then 90 at 1,024 tokens" in str(
            engine.plan
        )
        assert str(engine.plan).startswith("VRAM ") and " · RAM " in str(engine.plan)
    with pretended.device(), load(**PLAIN | {"dtype": "auto"}) as engine:
        assert engine.effective()["device"] == "cuda:0" and engine.effective()["dtype"] == "bfloat16"


def test_memory_that_cannot_be_pinned_is_a_line_and_no_end(said: dict[str, list[int]]) -> None:
    with pretended.device(most_locked=3), load(**PLAIN, device="cuda", draft=0) as engine:
        assert engine.generate(SHORT, max_tokens=N, sampling=GREEDY).tokens == said[SHORT]
        assert engine.effective()["pinned"] is False


def test_a_gpu_that_runs_out_of_memory_gives_experts_up_and_goes_on(said: dict[str, list[int]]) -> None:
    fails = [7, 30, 31]  # layers that find no memory, counted over all steps

    def run(self, layer, x, *rest):  # type: ignore[no-untyped-def]
        fails[:] = [n - 1 for n in fails]
        if 0 in fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(self, layer, x, *rest)

    original, resize = HybridRunner.run, GpuTier.resize

    def resized(self, *given):  # type: ignore[no-untyped-def]
        """Nobody else has the old slab, so that its memory is there for the new one."""
        storage = self.slab.here.untyped_storage()
        assert torch._C._storage_Use_Count(storage._cdata) <= 2, "somebody keeps it"  # the slab and `storage`
        return resize(self, *given)

    with (
        on_gpu(1.0) as engine,
        patch.object(GpuTier, "resize", resized),
        patch.object(HybridRunner, "run", run),
    ):
        assert engine.plan.vram is not None
        n = engine.plan.vram.n_slots * 3 // 4 * 3 // 4 * 3 // 4
        assert engine.generate(SHORT, max_tokens=N, sampling=GREEDY).tokens == said[SHORT]
        assert taken(engine) > 0 and engine.effective()["gpu_slots_now"] == n - taken(engine)


def test_experts_give_way_as_the_context_grows_and_come_back(said: dict[str, list[int]]) -> None:
    with on_gpu(0.4) as engine:
        slab, full = engine._store.gpu.slab, engine.plan.vram.n_slots

        def now() -> int:
            n = engine.effective()["gpu_slots_now"]
            assert n == full - taken(engine) and engine._store.gpu.slab is slab  # one slab, and all of it
            return n

        with engine.session() as session:
            before = now()
            for text in (LONG, SHORT, LONG):  # grows, is another one, grows again
                logits, n = session.sync(engine.encode(text)), now()
                for token in said[text]:
                    assert int(logits.argmax()) == token
                    logits = session.step(token)
                if text == LONG:
                    assert n == before - -(-len(engine.encode(LONG)) // engine.plan.vram.slot_tokens)
            assert now() <= n < before
            session.sync((engine.encode(LONG) * 9)[: engine.context])
            assert now() == engine.plan.gpu_slots_at(engine.context) == 90
            session.rewind(engine.context - 20)
            assert now() >= before - 3
        held = list(engine._store.gpu)
        assert (
            len(held) <= now() and engine.generate(SHORT, max_tokens=N, sampling=GREEDY).tokens == said[SHORT]
        )


def test_what_a_gpu_loses_altogether_is_read_again(said: dict[str, list[int]]) -> None:
    """Another process takes all that was given back: the answer fails in a sentence, the next one goes on."""
    real = torch.Tensor.new_empty

    def none_left(self, n: int, *rest):  # type: ignore[no-untyped-def]
        if n and rest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, n, *rest)

    def run(self, *_):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with on_gpu(0.4) as engine, engine.session() as session:
        session.sync(engine.encode(SHORT))
        with (
            patch.object(HybridRunner, "run", run), patch.object(torch.Tensor, "new_empty", none_left),
            pytest.raises(DoesNotFit, match="no memory left"),
        ):  # fmt: skip
            session.step(5)
        assert session.tokens == [] and taken(engine) == engine.effective()["gpu_slots_now"] == 0
        assert engine.generate(SHORT, max_tokens=N, sampling=GREEDY, session=session).tokens == said[SHORT]
        assert taken(engine) > 0 and engine.effective()["gpu_slots_now"] > 100


def test_a_gpu_that_fails_and_kernels_that_cannot_be_built_are_sentences() -> None:
    def run(self, *_):  # type: ignore[no-untyped-def]
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronous")

    with (
        on_gpu(1.0) as engine, patch.object(HybridRunner, "run", run),
        pytest.raises(NoDevice, match="GPU has failed, .*: CUDA error: unspecified launch failure. Start again"),
    ):  # fmt: skip
        engine.generate(SHORT, max_tokens=2)
    denied = PermissionError(13, "Permission denied", "/root/.triton")
    with (
        pretended.device(), patch.object(pretended.gpu, "experts", side_effect=denied),
        pytest.raises(NoDevice, match=r"cannot be built or run: PermissionError: .*/root/.triton.*TRITON_CACHE_DIR"),
    ):  # fmt: skip
        load(**PLAIN, device="cuda")


def test_where_nothing_can_give_way_it_says_so() -> None:
    def run(self, *_):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with on_gpu(0.0) as engine:
        with patch.object(HybridRunner, "run", run), pytest.raises(DoesNotFit, match="no memory left"):
            engine.generate(SHORT, max_tokens=2)
        assert engine.generate(SHORT, max_tokens=2, sampling=GREEDY).tokens  # the session is usable
