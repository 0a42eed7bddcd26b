"""The loop: stop rules, reasons, cancelling, and that streams, texts and lists say the same."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmimo import BadModel, BadRequest, ContextFull, DoesNotFit, Sampling, load
from localmimo.decode.stopping import StopStrings
from localmimo.engine import Engine
from quant import convert
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.engine("nf4_pack", context=96)

GREEDY = Sampling(temperature=0)


def test_length_and_stats(engine: Engine) -> None:
    done = engine.generate("Hello", max_tokens=7, sampling=GREEDY)
    assert done.finish_reason == "length" and len(done.tokens) == 7 == done.stats.generated_tokens
    assert done.stats.prompt_tokens == 5
    assert done.stats.pages_ram + done.stats.pages_disk > 0
    assert done.stats.as_dict()["decode_tps"] > 0


def test_context_is_the_last_limit(engine: Engine) -> None:
    done = engine.generate("Hello", sampling=GREEDY)
    assert done.finish_reason in ("context", "stop")
    assert len(done.tokens) + 5 <= engine.context + 1


@pytest.mark.parametrize("n_prompt", [1, 90, 95, 96])
def test_an_answer_fills_the_context_to_its_last_token(engine: Engine, n_prompt: int) -> None:
    """And one token more, which nothing has to be read after."""
    forced = Sampling(temperature=0, logit_bias={97: 1e9})
    done = engine.generate("a" * n_prompt, sampling=forced)
    assert done.finish_reason == "context" and len(done.tokens) == engine.context + 1 - n_prompt


def test_stats_are_those_of_the_session_and_of_the_store(engine: Engine) -> None:
    for n_reused in (0, 5):
        before = engine.counters
        with engine.session() as session:
            if not n_reused:
                session.rewind(session.position)
            stats = engine.generate("Hello", max_tokens=3, sampling=GREEDY, session=session).stats
        after = engine.counters.since(before)
        assert stats.reused_tokens == n_reused
        assert (stats.pages_ram, stats.pages_disk) == (after.ram_pages, after.disk_pages)
        assert stats.pages_ram != stats.pages_disk and stats.bytes_read == after.disk_bytes


def test_stream_and_list_say_the_same(engine: Engine) -> None:
    texts = [engine.generate(prompt, max_tokens=9, sampling=GREEDY).text for prompt in ("abc", "xyz")]
    assert [done.text for done in engine.generate(["abc", "xyz"], max_tokens=9, sampling=GREEDY)] == texts
    steps = list(engine.stream("abc", max_tokens=9, sampling=GREEDY))
    assert "".join(step.text for step in steps) == texts[0]
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.generate("abc", max_tokens=30, sampling=GREEDY).text
    stop = whole[6:9]
    cut = engine.generate("abc", max_tokens=30, sampling=GREEDY, stop=[stop])
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_what_may_have_begun_a_stop_string_is_said_in_the_end(engine: Engine) -> None:
    whole = engine.generate("abc", max_tokens=12, sampling=GREEDY).text
    never = whole[-2:] + "\x00"
    assert engine.generate("abc", max_tokens=12, sampling=GREEDY, stop=[never]).text == whole


@pytest.mark.engine(None, context=64, profile=None)
def test_a_character_that_was_cut_off_is_shown(engine: Engine) -> None:
    """The first byte of a letter alone, as a limit of tokens leaves it."""
    (half, *rest) = (
        next(
            t for t in range(engine.tokenizer.vocab_size) if engine.tokenizer.token_bytes(t) == bytes([byte])
        )
        for byte in "é".encode()
    )
    forced = Sampling(temperature=0, logit_bias={half: 1e9})
    done = engine.generate("Caf", max_tokens=1, sampling=forced)
    assert (done.tokens, done.text, done.finish_reason) == ([half], "\ufffd", "length")
    assert engine.generate("Caf", max_tokens=1, sampling=forced, stop=["\ufffd"]).text == ""
    assert engine.decode([half, *rest]) == "é"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_for_every_way_of_cutting(text: str, stops: Sequence[str], data: st.DataObject) -> None:
    stream, out, at = StopStrings(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        out += stream.push(text[at : at + size])
        at += size
    out += stream.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert out == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("pieces", [["aba"], ["ab", "a"], ["a", "b", "a"]])
def test_the_stop_string_that_is_complete_first_counts(pieces: list[str]) -> None:
    stream = StopStrings(["b", "aba"])
    assert "".join(map(stream.push, pieces)) == "a" and stream.found


def test_an_eos_token_stops(engine: Engine) -> None:
    forced = Sampling(temperature=0, logit_bias={2: 1e9})
    done = engine.generate("abc", max_tokens=9, sampling=forced)
    assert (done.finish_reason, done.text, done.tokens) == ("stop", "", [])


def test_seeds(engine: Engine) -> None:
    def say(seed: int) -> list[int]:
        return engine.generate("abc", max_tokens=20, sampling=Sampling(temperature=1.5, seed=seed)).tokens

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_cancel_from_another_thread(engine: Engine) -> None:
    cancel, steps = threading.Event(), []
    for step in engine.stream("abc", max_tokens=80, sampling=GREEDY, cancel=cancel):
        steps.append(step)
        if len(steps) == 4:
            threading.Thread(target=cancel.set).start()
            cancel.wait()
    assert steps[-1].finish_reason == "cancelled"
    again = engine.generate("abc", max_tokens=80, sampling=GREEDY)
    assert again.text.startswith("".join(step.text for step in steps))


def test_closing_the_stream_frees_the_engine(engine: Engine) -> None:
    stream = engine.stream("abc", max_tokens=80)
    next(stream)
    with pytest.raises(BadRequest, match="already"):
        engine.generate("abc")
    stream.close()
    assert engine.generate("abc", max_tokens=2).finish_reason == "length"


def test_two_threads_wait_for_each_other(engine: Engine) -> None:
    said: dict[int, str] = {}

    def say(n: int) -> None:
        said[n] = engine.generate("abc", max_tokens=20, sampling=GREEDY).text

    threads = [threading.Thread(target=say, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(said.values())) == 1 and len(said) == 3


def test_logprobs_travel_with_the_steps(engine: Engine) -> None:
    for step in list(engine.stream("abc", max_tokens=4, sampling=GREEDY, logprobs=3))[:-1]:
        if step.token is not None:
            assert step.logprob == pytest.approx(step.top_logprobs[0][1])
            assert step.top_logprobs[0][0] == step.token


def test_bad_requests(engine: Engine) -> None:
    for prompt in ("", "   "):
        with pytest.raises(BadRequest, match="empty"):
            engine.generate(prompt)
    with pytest.raises(ContextFull, match=r"200 .*96"):
        engine.generate("a" * 200)
    with pytest.raises(BadRequest, match="max tokens"):
        engine.generate("abc", max_tokens=0)
    with pytest.raises(BadRequest, match="stop string"):
        engine.generate("abc", stop=[""])
    with pytest.raises(BadRequest, match="list of messages"):
        engine.chat("abc")  # type: ignore[arg-type]


def test_a_budget_too_small_for_one_token_is_refused(engine: Engine) -> None:
    with pytest.raises(DoesNotFit, match="one token's 8 experts"):
        load(engine.pack.path, context=96, ram="1MiB")
    with pytest.raises(DoesNotFit, match="this machine has"):
        load(engine.pack.path, context=96, ram="1e15")
    with pytest.raises(BadRequest, match="4,096"):
        load(engine.pack.path, context=5000)


def test_a_pack_without_a_tokenizer_still_has_logits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    for _ in convert(tmp_path / "hf", tmp_path / "pack"):
        pass
    with load(tmp_path / "pack", context=64) as bare:
        assert bare.logits([3, 4, 5]).shape == (3, 160)
        with pytest.raises(BadModel, match=r"tokenizer\.json"):
            bare.generate("abc")
