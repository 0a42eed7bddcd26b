"""Structured output: what comes out satisfies what was asked for, with thinking before it and with drafts."""

import json
import re
import sys
from pathlib import Path

import pytest

from localmimo import BadRequest, Sampling, load
from localmimo.decode.grammar import Grammar, Grammars
from localmimo.engine import Engine
from tests.decode.drafts import drafting, prophecy

pytest.importorskip("llguidance")
pytestmark = pytest.mark.engine("nf4_pack", context=200, draft=3)

GREEDY = Sampling(temperature=0)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_satisfied_by_a_random_model(engine: Engine, seed: int) -> None:
    sampling = Sampling(temperature=1.0, seed=seed, logit_bias={71: 3.0})  # "d" would be liked
    done = engine.generate("abc", max_tokens=150, sampling=sampling, response_format=AS_SCHEMA)
    if done.finish_reason == "stop":
        said = json.loads(done.text)
        assert set(said) == {"name", "age"} and isinstance(said["age"], int) and len(said["name"]) <= 8
    else:
        assert done.text.lstrip().startswith("{")


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)])
def test_drafts_keep_the_grammar_exact(engine: Engine, depth: int, sampling: Sampling) -> None:
    grammar = Grammar.regex(r"[a-f]{3,9}-(yes|no)+![0-9]{2}")
    with drafting(engine, 0):
        plain = engine.generate("abc", max_tokens=40, sampling=sampling, grammar=grammar)
    with drafting(engine, depth):
        own = engine.generate("abc", max_tokens=40, sampling=sampling, grammar=grammar)
        with prophecy(plain.tokens, 3, 0.8, seed=depth):
            ahead = engine.generate("abc", max_tokens=40, sampling=sampling, grammar=grammar)
    assert own.tokens == plain.tokens == ahead.tokens
    assert plain.finish_reason != "stop" or re.fullmatch(grammar.text, plain.text)


def test_rules_in_both_notations_end_by_themselves(engine: Engine) -> None:
    for rules in ('start: "on" | "off"', 'root ::= "on" | "off"'):
        done = engine.generate("abc", max_tokens=9, sampling=GREEDY, grammar=rules)
        assert done.text in ("on", "off") and done.finish_reason == "stop"


def test_a_ban_and_a_grammar_together(engine: Engine) -> None:
    o_n = engine.encode("n")[0]
    done = engine.generate(
        "abc", max_tokens=9, sampling=Sampling(temperature=0, bans=(o_n,)), grammar='start: "on" | "off"'
    )
    assert done.text == "off"


def test_thinking_is_free_and_the_answer_is_not() -> None:
    with load(context=1024, draft=3) as mini:
        messages = [{"role": "user", "content": "What is 2 + 3?"}]
        for think in (True, False):
            reply = mini.chat(
                messages,
                think=think,
                think_budget=30,
                max_tokens=120,
                sampling=GREEDY,
                grammar=Grammar.regex("the answer is [0-9]+"),
            )
            assert re.fullmatch("the answer is [0-9]+", reply.content), (think, reply)
            assert think or not reply.reasoning_content
        free = mini.chat(messages, think=True, think_budget=30, max_tokens=60, sampling=GREEDY)
        assert reply.reasoning_content == "" and free.finish_reason in ("stop", "length")


def test_bad_grammars_are_sentences(engine: Engine) -> None:
    for bad, sentence in (
        ({"response_format": {"type": "xml"}}, "its type is one of"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "json schema",
        ),
        ({"grammar": Grammar.regex("(")}, "regex cannot be used"),
        ({"grammar": "start: missing"}, "lark cannot be used"),
        ({"grammar": "start: /a/", "response_format": AS_SCHEMA}, "not both"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {1: {2}}}}}, "no JSON"),
    ):
        with pytest.raises(BadRequest, match=sentence):
            engine.generate("abc", **bad)
    assert engine.generate("abc", max_tokens=1, response_format={"type": "text"}).tokens


def test_without_llguidance_the_command_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadRequest, match=re.escape("pip install 'localmimo[grammar]'")):
        Grammars(engine.tokenizer, engine.config.vocab_size)


def test_importing_needs_no_llguidance() -> None:
    source = Path(sys.modules["localmimo.decode.grammar"].__file__ or "").read_text()
    assert "import llguidance" not in source
