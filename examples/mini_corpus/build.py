"""Builder of the training text: the whole mix, its tokenizer, and one flat token array per kind of text.

Knows the proportions and the file layout; it must not know the model. Arrays are uint16: the low 15 bits are
the token id, the top bit is set for tokens with full loss (those of the assistant). Conversations start at
`<name>.starts.npy` (int64 offsets, with the total at the end).
"""

import json
from pathlib import Path
from random import Random

import numpy as np

from . import dialogues, sources, tools, topics
from .conversation import Conversation, render

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
VOCAB = 8192
# share of training tokens per kind, early and in the last part of training
SHARES = {
    "topic": (0.36, 0.40),
    "mixed": (0.15, 0.16),
    "story": (0.11, 0.11),
    "think": (0.08, 0.08),
    "tools": (0.09, 0.09),
    "sums": (0.05, 0.05),
    "chitchat": (0.08, 0.04),
    "chatterbot": (0.01, 0.01),
    "wiki": (0.06, 0.05),
    "bfcl": (0.01, 0.01),
}
COUNTS = {"topic": 22000, "mixed": 14000, "story": 9000, "think": 10000, "tools": 6000, "sums": 6000}
HELD_OUT = 0.015
FREE_KINDS = ("topic", "mixed", "story", "think", "tools", "sums")  # our own text: goes into heldout.txt


def templates(seed: int = 0, scale: float = 1.0) -> dict[str, list[Conversation]]:
    """Our own conversations per kind; the same seed gives the same ones."""
    table = topics.load_topics()
    out: dict[str, list[Conversation]] = {}
    for kind, count in COUNTS.items():
        rng = Random(f"{seed}-{kind}")
        makers = {
            "topic": lambda r: dialogues.topic_talk(r, table),
            "mixed": lambda r: dialogues.mixed_talk(r, table),
            "story": dialogues.story_talk,
            "sums": dialogues.sums_talk,
            "think": lambda r: dialogues.thinking_talk(r, table),
            "tools": lambda r: tools.tool_talk(r, table),
        }
        out[kind] = [makers[kind](rng) for _ in range(int(count * scale))]
    return out


def collect(folder: Path, seed: int = 0) -> dict[str, list[Conversation]]:
    """Templates and fetched sources, each kind shuffled."""
    sources.fetch(folder)
    rng = Random(seed)
    kinds = templates(seed)
    kinds["chitchat"] = sources.chitchat(folder)
    kinds["chatterbot"] = sources.chatterbot(folder)
    kinds["wiki"] = sources.wiki(folder, rng)
    kinds["bfcl"] = sources.bfcl(folder)
    for talks in kinds.values():
        rng.shuffle(talks)
    return kinds


def train_tokenizer(kinds: dict[str, list[Conversation]], out: Path) -> None:
    """An 8,192-entry byte BPE with Qwen2's split, NFC, and Qwen's special strings."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_bpe_texts(kinds), trainer)
    control = [AddedToken(s, special=s.startswith("<|"), normalized=False) for s in SPECIAL]
    tokenizer.add_tokens(control)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(_tokenizer_config(tokenizer), indent=2) + "\n", encoding="utf-8"
    )


def _bpe_texts(kinds: dict[str, list[Conversation]]) -> list[str]:
    """What people and the assistant say, without the constant frame of the format."""
    texts = []
    for talks in kinds.values():
        for talk in talks[:9000]:
            texts += [m["content"] for m in talk.messages]
            texts += [m.get("reasoning_content", "") for m in talk.messages]
    frames = [s for talks in (kinds["tools"][:150], kinds["bfcl"][:200]) for t in talks for s, _ in render(t)]
    return texts + [f.replace("<|im_end|>", "").replace("<|im_start|>", "") for f in frames]


def _tokenizer_config(tokenizer: object) -> dict[str, object]:
    added = {
        str(tokenizer.token_to_id(s)): {
            "content": s,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": s.startswith("<|"),
        }  # type: ignore[attr-defined]
        for s in SPECIAL
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def tokenise(kinds: dict[str, list[Conversation]], folder: Path) -> dict[str, int]:
    """Write train and held-out arrays per kind; returns the number of training tokens per kind."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes: dict[str, int] = {}
    for kind, talks in kinds.items():
        cut = max(4, int(len(talks) * HELD_OUT))
        for name, part in ((f"{kind}.held", talks[:cut]), (kind, talks[cut:])):
            tokens, starts = _encode(tokenizer, part)
            np.save(folder / f"{name}.npy", tokens)
            np.save(folder / f"{name}.starts.npy", starts)
            if name == kind:
                sizes[kind] = len(tokens)
    return sizes


def _encode(tokenizer: object, talks: list[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    spans = [span for talk in talks for span in render(talk)]
    encoded = tokenizer.encode_batch([text for text, _ in spans], add_special_tokens=False)  # type: ignore[attr-defined]
    pieces, starts, at, n = [], [0], 0, 0
    for talk in talks:
        for _ in range(len(render(talk))):
            ids = np.array(encoded[n].ids, dtype=np.uint16)
            pieces.append(ids | (0x8000 if spans[n][1] else 0))
            at += len(ids)
            n += 1
        starts.append(at)
    return np.concatenate(pieces).astype(np.uint16), np.array(starts, dtype=np.int64)


def write_heldout(kinds: dict[str, list[Conversation]], path: Path, limit_bytes: int = 80_000) -> None:
    """Held-out text of our own making, in the mix's proportions, one rendered conversation after another."""
    total = sum(SHARES[k][1] for k in FREE_KINDS)
    out: list[str] = []
    for kind in FREE_KINDS:
        budget = limit_bytes * SHARES[kind][1] / total
        for talk in kinds[kind][: max(4, int(len(kinds[kind]) * HELD_OUT))]:
            text = "".join(s for s, _ in render(talk))
            if len(text) > budget:
                break
            budget -= len(text)
            out.append(text)
    path.write_text("\n".join(out) + "\n", encoding="utf-8")


def prepare(sources_folder: Path, folder: Path, seed: int = 0) -> dict[str, int]:
    """Everything before training: collect, train the tokenizer, tokenise. Does nothing twice."""
    done = folder / "sizes.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    kinds = collect(sources_folder, seed)
    train_tokenizer(kinds, folder)
    sizes = tokenise(kinds, folder)
    write_heldout(kinds, folder / "heldout.txt")
    done.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return sizes
