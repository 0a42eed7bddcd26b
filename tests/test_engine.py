"""The Python API: what it refuses, and the sentences it refuses with."""

import copy
import inspect
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import localmimo
import quant
from localmimo import BadPack, BadRequest, DoesNotFit, Engine, LocalMimoError, NoDevice, Sampling, load
from localmimo.errors import with_flags
from tests.packs import make_pack

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("engine"), seed=5)


@pytest.fixture
def engine(pack: Path) -> Iterator[Engine]:
    with load(pack, context=64, profile=None) as engine:
        yield engine


# ---- names ----


def test_every_public_name_is_listed_and_can_be_had() -> None:
    assert set(localmimo.__all__) <= set(dir(localmimo))
    for name in localmimo.__all__:
        assert getattr(localmimo, name).__name__ == name


@pytest.mark.parametrize("package", [localmimo, quant])
def test_type_checkers_see_the_annotations(package: object) -> None:
    assert Path(inspect.getfile(package)).with_name("py.typed").is_file()  # type: ignore[arg-type]


def test_repr_says_what_is_open(pack: Path, engine: Engine) -> None:
    said = repr(engine)
    for part in (engine.pack.name, str(pack), "on cpu", "context 64", f"{engine.n_slots:,} expert slots"):
        assert part in said
    engine.close()
    assert "closed" in repr(engine)


# ---- errors ----


def test_every_error_has_one_root(tmp_path: Path) -> None:
    for kind in (BadPack, NoDevice, DoesNotFit, BadRequest):
        assert issubclass(kind, LocalMimoError)
    with pytest.raises(LocalMimoError, match="/nope is no pack"):
        load("/nope")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadPack, match="is not JSON") as error:
        load(tmp_path)
    assert isinstance(error.value, quant.QuantError)  # who catches the error of quant still does


def test_a_budget_that_is_too_small_says_its_numbers_in_keywords(pack: Path) -> None:
    with pytest.raises(DoesNotFit) as error:
        load(pack, ram="1MiB")
    refused = error.value
    assert refused.what == "RAM" and refused.budget_bytes == 1 << 20
    assert refused.needed_bytes is not None and refused.needed_bytes > refused.budget_bytes
    assert "Give ram=" in str(refused) and "--" not in str(refused)
    named = str(refused).split("Give ram=")[1].split()[0].rstrip(".")
    load(pack, ram=named, profile=None).close()
    with pytest.raises(DoesNotFit) as error:
        load(pack, ram=1 << 60)
    assert error.value.needed_bytes == 1 << 60


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        (
            "Give ram=12MiB or a shorter context=.",
            "Give --ram 12MiB or a shorter --context.",
        ),
        ('a smaller vram=, or device="cuda:1".', "a smaller --vram, or --device cuda:1."),
        ("a longer context= (this model: up to 9)", "a longer --context (this model: up to 9)"),
        ("diagram=3 and rams are no keywords", "diagram=3 and rams are no keywords"),
    ],
)
def test_the_command_line_says_flags(sentence: str, shown: str) -> None:
    assert with_flags(BadRequest(sentence)) == shown


@pytest.mark.parametrize("tokens", [[5, -1, 7], [159, 5, -1], [-1]])
def test_the_token_at_fault_is_named(engine: Engine, tokens: list[int]) -> None:
    with pytest.raises(BadRequest, match="Token -1 is outside"):
        engine.logits(tokens)
    with pytest.raises(BadRequest, match="Token 160 is outside the model's vocabulary of 160"):
        engine.logits([5, 160, 159])


def test_a_prompt_that_is_too_long_is_told_of_keywords(engine: Engine) -> None:
    for answer in (lambda: engine.logits([5] * 65), lambda: engine.generate("x" * 65)):
        with pytest.raises(
            localmimo.ContextFull, match="65 tokens and the context 64: give a longer context="
        ):
            answer()
    with engine.session() as session, pytest.raises(localmimo.ContextFull, match="raise context="):
        session.sync([5] * 65)


# ---- sampling ----


def test_sampling_may_be_a_mapping(engine: Engine) -> None:
    expected = engine.generate("hello", max_tokens=4, sampling=GREEDY).tokens
    assert engine.generate("hello", max_tokens=4, sampling={"temperature": 0}).tokens == expected
    (only,) = engine.generate(["hello"], max_tokens=4, sampling={"temperature": 0})
    assert only.tokens == expected


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"temprature": 0}, "no 'temprature'; its fields are temperature, top_k"),
        ({"temperature": "hot"}, "a value of a wrong type"),
        ({"temperature": -1}, "temperature -1 is negative"),
        (0.7, "give a Sampling, or a mapping"),
    ],
)
def test_sampling_that_is_none_is_refused(engine: Engine, sampling: object, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        engine.generate("hello", sampling=sampling)
    with pytest.raises(BadRequest, match=says):
        engine.generate(["hello"], sampling=sampling)


# ---- who may use a session ----


def test_a_session_of_another_engine_is_refused(pack: Path, engine: Engine) -> None:
    with load(pack, context=64, profile=None) as other, other.session() as session:
        session.sync([5, 6, 7])
        with pytest.raises(BadRequest, match="belongs to another engine"):
            next(engine.stream("hello", session=session))
        assert session.tokens == [5, 6, 7]
        next(other.stream("hello", session=session)).token  # noqa: B018


def test_a_session_is_of_no_use_after_its_block(engine: Engine) -> None:
    with engine.session() as kept:
        kept.sync([5, 6, 7])
    answering, go_on = threading.Event(), threading.Event()

    def answer() -> None:
        with engine.session() as session:
            session.sync([8, 9])
            answering.set()
            go_on.wait(20)
            session.step(10)
            assert session.tokens == [8, 9, 10]

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        assert answering.wait(20)
        with pytest.raises(BadRequest, match="block has ended"):
            next(engine.stream("hello", session=kept))
        for use in (
            lambda: kept.step(5),
            lambda: kept.sync([5]),
            lambda: kept.rewind(1),
            lambda: kept.draft(5, 1, lambda logits, drafts: 0),
            lambda: next(kept.logits([5])),
            lambda: kept.save("/tmp/never"),
            lambda: kept.load("/tmp/never"),
        ):
            with pytest.raises(BadRequest, match="block has ended"):
                use()
    finally:
        go_on.set()
        thread.join()


def test_the_next_block_finds_what_the_last_one_held(engine: Engine) -> None:
    with engine.session() as first:
        first.sync([5, 6, 7])
    with engine.session() as second:
        assert second is not first and second.tokens == [5, 6, 7]
        second.sync([5, 6, 7, 8])
        assert second.n_reused == 3


# ---- the end of an engine ----


def test_a_closed_engine_says_so_at_once(engine: Engine) -> None:
    with engine.session() as session:
        session.sync([5, 6])
        engine.close()
        with pytest.raises(BadRequest, match="engine was closed"):
            session.step(7)
    engine.close()
    began = time.monotonic()
    for use in (
        lambda: engine.generate("hello"),
        lambda: engine.generate(["hello", "you"]),
        lambda: engine.chat([{"role": "user", "content": "hello"}]),
        lambda: next(engine.stream("hello")),
        lambda: engine.logits([5]),
        lambda: engine.session().__enter__(),
    ):
        with pytest.raises(BadRequest, match="engine was closed: load the pack again"):
            use()
    assert time.monotonic() - began < 5


def test_closing_stops_an_answer_in_another_thread(engine: Engine) -> None:
    began, errors = threading.Event(), []

    def answer() -> None:
        try:
            while True:
                for _ in engine.stream("hello", sampling={"temperature": 0, "logit_bias": {2: -100.0}}):
                    began.set()
        except BadRequest as error:
            errors.append(str(error))

    thread = threading.Thread(target=answer)
    thread.start()
    assert began.wait(20)
    engine.close()
    thread.join(20)
    assert errors == ["The engine was closed: load the pack again."]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(engine: Engine, duplicate: object) -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        duplicate(engine)  # type: ignore[operator]
    assert engine.generate("hello", max_tokens=2).tokens
