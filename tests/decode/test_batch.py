"""Several timelines in step say what each says alone, and share what a pass reads."""

import threading
from pathlib import Path

import pytest

from localmimo import BadRequest, Sampling, load
from localmimo.engine import Engine
from localmimo.kv.sizes import kv_bytes

pytestmark = pytest.mark.engine("nf4_pack", context=96, max_batch=3)

PROMPTS = ["abc", "Hello", "x" * 30, "The sea", "abc", "q"]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.1, seed=4)])
def test_together_as_alone(engine: Engine, sampling: Sampling) -> None:
    alone = [engine.generate(prompt, max_tokens=16, sampling=sampling) for prompt in PROMPTS]
    together = engine.generate(PROMPTS, max_tokens=16, sampling=sampling)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.finish_reason for one in together] == [one.finish_reason for one in alone]
    again = engine.generate(PROMPTS[::-1], max_tokens=16, sampling=sampling)
    assert [one.text for one in again] == [one.text for one in alone][::-1]


def test_answers_of_different_lengths(engine: Engine) -> None:
    some = Sampling(temperature=1.0, seed=6, logit_bias={2: -100.0})
    whole = [engine.generate(prompt, max_tokens=30, sampling=some).text for prompt in PROMPTS]
    stop = [whole[0][5:7], whole[3][2:4]]
    alone = [engine.generate(prompt, max_tokens=30, sampling=some, stop=stop) for prompt in PROMPTS]
    together = engine.generate(PROMPTS, max_tokens=30, sampling=some, stop=stop)
    assert [(one.text, one.finish_reason) for one in together] == [
        (one.text, one.finish_reason) for one in alone
    ]
    assert len({len(one.tokens) for one in together}) > 1


def test_cancel_stops_all(engine: Engine) -> None:
    cancel, seen = threading.Event(), 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:  # the second prompt is being read
            threading.Thread(target=cancel.set).start()
            cancel.wait()

    done = engine.generate(PROMPTS, max_tokens=16, cancel=cancel, progress=progress)
    assert {one.finish_reason for one in done} == {"cancelled"}
    assert engine.generate("abc", max_tokens=2, sampling=Sampling(temperature=0)).tokens


def test_the_plan_counts_every_timeline(nf4_pack: Path, engine: Engine) -> None:
    with load(nf4_pack, context=96, draft=0) as one, load(nf4_pack, context=96, draft=0, max_batch=4) as four:
        assert four.plan.kv_bytes == 4 * one.plan.kv_bytes == 4 * kv_bytes(one.config, 96, 2, 16)
    for max_batch in (0, 65):
        with pytest.raises(BadRequest, match="from 1 to 64"):
            load(nf4_pack, context=96, max_batch=max_batch)


def test_a_bad_prompt_is_refused_before_anything_is_said(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="empty"):
        engine.generate(["abc", "  "])
    assert engine.generate([]) == []
