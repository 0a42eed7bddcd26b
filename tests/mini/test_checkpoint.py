"""The shipped checkpoint: size, layout, what its card says of it, and that it has learned something."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from mini_training.export import listing, load_exported, sha256
from mini_training.network import Network, Shape, init_biases, init_params, make_frame
from mini_training.sampling import answer, chat_prompt

from localmimo import load
from localmimo.chat.tokenizer import Tokenizer
from localmimo.mini import CHECKPOINT, HELD_OUT
from localmimo.model.config import ModelConfig

CARD = CHECKPOINT.parent / "CARD.md"


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) <= 40_000_000
    assert 50_000 <= HELD_OUT.stat().st_size <= 100_000


def test_every_tensor_has_its_released_name_and_dtype() -> None:
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text(encoding="utf-8"))[
        "weight_map"
    ]
    dtypes = {}
    for file in set(index.values()):
        with safe_open(str(CHECKPOINT / file), "pt") as f:
            dtypes |= {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
    assert dtypes.keys() == index.keys()
    stored = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32"}
    for entry in listing(Shape(), init_params(Shape()), init_biases(Shape())):
        assert dtypes.pop(entry.name) == stored[entry.dtype]
        if entry.dtype == "fp8":
            assert dtypes.pop(f"{entry.name}_scale_inv") == "F32"
    assert not dtypes


def test_config_and_tokenizer_agree() -> None:
    config = ModelConfig.open(CHECKPOINT / "config.json")
    tokenizer = Tokenizer.open(CHECKPOINT)
    assert config.vocab_size == 8192 and tokenizer.vocab_size == 8192
    assert tokenizer.token_id("<|im_end|>") in tokenizer.eos_ids
    text = "Naïve café: 12 + 30 = 42, 你好!\n  <think>a</think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_card_names_every_file() -> None:
    card = CARD.read_text(encoding="utf-8")
    for file in CHECKPOINT.iterdir():
        assert sha256(file) in card, f"{file.name} is not the file that the card describes"


@pytest.fixture(scope="module")
def trained() -> tuple[Network, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return Network(Shape()), *load_exported(Shape(), CHECKPOINT)


@torch.no_grad()
def test_held_out_text_is_predicted(trained) -> None:  # type: ignore[no-untyped-def]
    net, p, biases = trained
    text = HELD_OUT.read_text(encoding="utf-8").split("\n<|im_start|>system")[0]
    ids = torch.tensor([Tokenizer.open(CHECKPOINT).encode(text)[:256]])
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 128))
    n = ids.shape[1]
    hidden, _ = net.hidden(p, biases, ids, make_frame(net.shape, torch.zeros(1, n, dtype=torch.int64)))
    loss = torch.nn.functional.cross_entropy(net.logits(p, hidden[0, :-1]), ids[0, 1:])
    assert loss < 4.0, "an untrained model has about 9"


def test_it_answers(trained) -> None:  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer as Fast

    net, p, biases = trained
    reply = answer(
        net,
        p,
        biases,
        Fast.from_file(str(CHECKPOINT / "tokenizer.json")),
        chat_prompt("What is the moon?"),
        n=12,
    )
    assert "moon" in reply.lower()


def test_it_opens_by_its_name_as_by_none() -> None:
    with load("mimo-mini", context=64, profile=None) as named, load(context=64, profile=None) as unnamed:
        assert named.pack.path == unnamed.pack.path
