"""Tokenizer: text to token ids, and token ids to text, at once or one token at a time.

Knows nothing of messages, templates or models.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import tokenizers

from localmimo.errors import BadModel, BadRequest
from localmimo.system.json_files import read_json
from quant.files.bounded import LIST_BYTES, read_small

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()  # for ids of a padded vocabulary that have no token
_LINE_START = re.compile(r"(?<=\n)(?=\S)")  # no token of a byte-level BPE spans this position


class Tokenizer:
    """A byte-level BPE (tokenizer.json) with the ids that end a text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_ids: Iterable[int] = ()) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        decoder = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(decoder)  # of tags, which are not ordinary text
        added = decoder.values()
        self.added = frozenset(token.content for token in added)  # the spellings of these ids
        self.control = frozenset(
            token.content for token in added if token.special
        )  # only the template writes them
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self.added, key=len, reverse=True)))})")

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a pack or checkpoint folder; raises BadModel."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadModel(f"{folder} has no tokenizer.json; copy it there from the checkpoint.")
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(read_small(path, LIST_BYTES))
        except Exception as error:  # the package raises nothing more precise
            raise BadModel(f"{path} cannot be read ({error}); copy it again from the checkpoint.") from None
        if not _is_byte_level(tokenizer):
            raise BadModel(f"{path} is no byte-level BPE, the only kind that MiMo models use.")
        return cls(tokenizer, _eos_ids(folder, tokenizer))

    def encode(self, text: str, escape: str = "") -> list[int]:
        """Token ids. Special tokens in the text are recognised; none are added. Raises BadRequest.

        escape: a character within spellings that are to stay plain text (see special_tokens); it is removed.
        """
        try:
            if escape and escape in text:
                parts = self._parts(text, escape)
                return [token for part in parts for token in self._encode_part(part, escape)]
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise BadRequest(f"The text cannot be encoded: {error}.") from None

    def _parts(self, text: str, escape: str) -> Iterator[str]:
        """Parts that can be encoded separately: the text is cut at special tokens and around lines with escapes."""
        plain = ""
        for number, part in enumerate(self._split.split(text) if self.added else [text]):
            if number % 2 or escape not in part:
                plain += part
                continue
            for line in _LINE_START.split(part):
                if escape in line:
                    yield from (plain, line)
                    plain = ""
                else:
                    plain += line
        yield plain

    def _encode_part(self, text: str, escape: str) -> list[int]:
        if escape not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        text = text.replace(escape, "")
        text = self._tokenizer.normalizer.normalize_str(text) if self._tokenizer.normalizer else text
        pieces = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for piece, _ in pieces for token in self._tokenizer.model.tokenize(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its text, such as <|im_end|>."""
        return self._tokenizer.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which may be a part of a character."""
        text = self._tokenizer.id_to_token(token) if 0 <= token < self.vocab_size else None
        return UNKNOWN if text is None else _bytes_of(text)


class Decoder:
    """Turns a stream of tokens into text. A character is returned once all its bytes have come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest at the end of a text: U+FFFD where a character was cut off. The next token begins a new text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of bytes: each printable byte is its own character, the others are U+0100 and up."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _bytes_of(token: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()  # an added token is stored as plain text


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(bytes(tokenizer.decoder.__getstate__()))
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _eos_ids(folder: Path, tokenizer: tokenizers.Tokenizer) -> set[int]:
    """Every end-of-text id that generation_config.json, tokenizer_config.json and config.json name."""
    found: set[int] = set()
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        settings = read_json(folder / name)
        ids = settings.get("eos_token_id")
        found.update(entry for entry in (ids if isinstance(ids, list) else [ids]) if type(entry) is int)
        token = settings.get("eos_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and (known := tokenizer.token_to_id(token)) is not None:
            found.add(known)
    return found
