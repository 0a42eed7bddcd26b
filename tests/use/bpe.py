"""Byte-level tokenizers for the tests: a small one trained on the spot, and the real Qwen2-type one, rebuilt
from the ranks that the PyPI package dashscope ships (a development aid, not installed by default)."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CONTROL = [
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
]
WRITTEN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]


def _with_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in WRITTEN])
    return tokenizer


def small(*texts: str) -> Tokenizer:
    """400 entries, so that most characters beyond ASCII take several tokens; `texts` take few."""
    tokenizer = _with_pipeline(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the river runs to the sea, the sea is wide and the river is long", *texts] * 8, trainer
    )
    return _with_added(tokenizer)


def real_ranks() -> Path | None:
    """Where dashscope's qwen.tiktoken lies, if the package is installed."""
    found = importlib.util.find_spec("dashscope")
    path = Path(found.origin).parent / "resources" / "qwen.tiktoken" if found and found.origin else None
    return path if path and path.is_file() else None


def real(ranks_file: Path) -> Tokenizer:
    """The 151,643-entry byte BPE with the added tokens 151643 to 151668."""
    ranks = {}
    for line in ranks_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    written = {byte: character for character, byte in _alphabet().items()}
    vocab = {"".join(written[byte] for byte in token): rank for token, rank in ranks.items()}
    pairs = [_parts(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda entry: entry[1])]
    merges = [tuple("".join(written[byte] for byte in half) for half in pair) for pair in pairs if pair]
    return _with_added(_with_pipeline(Tokenizer(models.BPE(vocab=vocab, merges=merges))))


def _alphabet() -> dict[str, int]:
    from localmimo.text import _byte_alphabet

    return _byte_alphabet()


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that this token was merged from: its bytes merged by every lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
