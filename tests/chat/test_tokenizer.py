"""Text to tokens and back, whole and one token at a time."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmimo.chat.tokenizer import Decoder, Tokenizer
from localmimo.errors import BadModel, BadRequest
from tests.chat import bpe

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = Decoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.flush()


@given(text=ANY_TEXT)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    composed = tokenizer._tokenizer.normalizer.normalize_str(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == composed
    assert streamed(tokenizer, ids) == composed


@given(ids=st.lists(st.integers(0, 460), max_size=40))
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 425), max_size=40))
def test_decodes_as_the_tokenizers_package_does(tokenizer: Tokenizer, ids: list[int]) -> None:
    known = [token for token in ids if token < tokenizer.vocab_size]
    assert tokenizer.decode(known) == tokenizer._tokenizer.decode(known, skip_special_tokens=False)


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\N{ROCKET}b")
    decoder = Decoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert pieces == ["a", "", "", "", "\N{ROCKET}", "b"]


def test_a_cut_off_character_shows_as_replacement(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    assert "".join(map(decoder.push, tokenizer.encode("\N{ROCKET}")[:2])) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(tokenizer.encode("a")[0]) == "a"


def test_leading_spaces_stay(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the river")
    assert tokenizer.decode(ids) == " the river"
    assert streamed(tokenizer, ids) == " the river"


def test_special_tokens_are_one_token_and_are_not_added(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>the<think>")
    assert ids[0] == tokenizer.token_id("<|im_start|>")
    assert ids[-1] == tokenizer.token_id("<think>")
    assert tokenizer.token_id("<nothing>") is None


def test_eos_ids_are_all_that_the_files_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {400, 401, tokenizer.token_id("<|im_end|>")}


def test_rows_without_a_token_decode_to_a_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("token", [-1, -(1 << 40), 1 << 40])
def test_numbers_that_are_no_tokens_decode_to_a_replacement(tokenizer: Tokenizer, token: int) -> None:
    assert tokenizer.decode([token]) == "\N{REPLACEMENT CHARACTER}"


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match=r"^The text cannot be encoded: "):
        tokenizer.encode("\ud800")


def test_a_missing_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"has no tokenizer.json; copy it there from the checkpoint\.$"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("broken", ["", "{", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path, broken: str) -> None:
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(
        BadModel, match=r"tokenizer.json cannot be read .*; copy it again from the checkpoint\.$"
    ):
        Tokenizer.open(tmp_path)


def test_a_word_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel

    Raw(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadModel, match="is no byte-level BPE"):
        Tokenizer.open(tmp_path)


def test_the_published_prompt_has_the_published_ids() -> None:
    tokenizer = Tokenizer(bpe.real(bpe.ranks_of_the_prompt()))
    ids = [int(token) for token in bpe.PROMPT_IDS.split()]
    assert len(ids) == 27 and tokenizer.encode(bpe.PROMPT) == ids
    assert tokenizer.decode(ids) == bpe.PROMPT


@pytest.mark.skipif(
    bpe.all_ranks() is None, reason="pip install --no-deps dashscope==2.0.2 brings the vocabulary"
)
def test_the_whole_vocabulary_gives_the_published_ids() -> None:
    ranks = bpe.all_ranks()
    assert ranks is not None and len(ranks) == bpe.N_RANKS
    assert {
        token: rank for token, rank in ranks.items() if token in bpe.PROMPT.encode()
    } == bpe.ranks_of_the_prompt()
    tokenizer = Tokenizer(bpe.real(ranks))
    assert tokenizer.encode(bpe.PROMPT) == [int(token) for token in bpe.PROMPT_IDS.split()]
