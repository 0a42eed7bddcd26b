"""Small packs for tests: a random checkpoint, the smallest tokenizer, converted."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from quant import Recipe, convert
from tests.tiny import make_checkpoint

PACKS: dict[str, dict[str, Any]] = {  # what the fixture `packs` makes
    "nf4": {"experts": "nf4", "dense": "int8", "seed": 12},
    "bf16": {"seed": 0},
    "nf4-experts": {"experts": "nf4", "dense": "bf16", "seed": 8},
}


def make_pack(
    folder: Path, *, experts: str = "bf16", dense: str = "bf16", recipe: Recipe | None = None, **shape: object
) -> Path:
    """Make a checkpoint at folder/hf and convert it to folder/pack; returns the pack's folder."""
    source = make_checkpoint(folder / "hf", **shape)  # type: ignore[arg-type]
    add_tokenizer(source)
    for _ in convert(source, folder / "pack", experts=experts, dense=dense, recipe=recipe):
        pass
    return folder / "pack"


def add_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with one token per printable ASCII character and an end token, id 2."""
    config = json.loads((folder / "config.json").read_text())
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {"<unk>": 0, "<pad>": 1, "<|im_end|>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(characters)}
    assert len(vocabulary) <= config["vocab_size"], "the vocabulary must hold printable ASCII"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw = json.loads(tokenizer.to_str())
    raw["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    raw["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    raw["added_tokens"] = [
        {"id": 2, "content": "<|im_end|>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
