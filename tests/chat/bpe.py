"""Byte-level tokenizers for the tests: a small one trained at once, and the real one of Qwen2, rebuilt from the
ranks that the PyPI package dashscope ships, or from those among them that occur in one prompt."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Ranks = dict[bytes, int]

GOLDEN = Path(__file__).with_name("golden")
N_RANKS = 151_643
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
# The published prompt of a greeting, and its published token ids.
PROMPT = (
    "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
    "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n<think></think>"
)
PROMPT_IDS = """151644 8948 198 2610 525 20740 25612 11 264 10950 15235 17847 44936 553 71449 13 151645 151644
    872 198 9707 151645 151644 77091 198 151667 151668"""


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


def all_ranks() -> Ranks | None:
    """The real vocabulary, if the package dashscope is installed, which ships it."""
    found = importlib.util.find_spec("dashscope")
    path = Path(found.origin).parent / "resources" / "qwen.tiktoken" if found and found.origin else None
    if path is None or not path.is_file():
        return None
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def ranks_of_the_prompt() -> Ranks:
    """Of the real vocabulary all that occurs in the published prompt: for that prompt it is as good as the whole."""
    listed = json.loads((GOLDEN / "qwen-ranks-of-a-prompt.json").read_text())
    return {token.encode(): rank for token, rank in listed.items()}


def real(ranks: Ranks) -> Tokenizer:
    """The 151,643-entry byte BPE, as far as it is given, with the added tokens 151643 to 151668."""
    written = {byte: character for character, byte in _alphabet().items()}
    vocab = {"".join(written[byte] for byte in token): rank for token, rank in ranks.items()}
    vocab |= {f"no token {rank}": rank for rank in set(range(N_RANKS)) - set(ranks.values())}
    pairs = [_parts(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda entry: entry[1])]
    merges = [tuple("".join(written[byte] for byte in half) for half in pair) for pair in pairs if pair]
    return _with_added(_with_pipeline(Tokenizer(models.BPE(vocab=vocab, merges=merges))))


def _alphabet() -> dict[str, int]:
    from localmimo.chat.tokenizer import _byte_alphabet

    return _byte_alphabet()


def _parts(token: bytes, rank: int, ranks: Ranks) -> tuple[bytes, bytes] | None:
    """The two parts that this token was merged from: its bytes merged by every lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
