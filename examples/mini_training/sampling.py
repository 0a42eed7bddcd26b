"""Sampling of answers from the weights in training, greedy or seeded, to follow the progress.

Knows the network and the tokenizer; slow, since it has no cache. localmimo itself runs the finished model.
"""

from pathlib import Path

import torch
from mini_corpus.conversation import Conversation, render, user
from tokenizers import Tokenizer
from torch import Tensor

from .network import Network, Params, Shape, make_frame

LOOK = (
    "Hello!",
    "Who are you?",
    "What is a lighthouse?",
    "Tell me about cats.",
    "why does it rain?",
    "What is 7 + 5?",
    "Tell me a story about a fox.",
    "Write a haiku about rain.",
    "What is a cache used for?",
    "Name three animals.",
    "What is the capital of France?",
    "Can you explain how bread is made?",
    "Do you like music?",
    "What is 34 + 28?",
)


@torch.no_grad()
def answer(
    net: Network, p: Params, biases: dict[str, Tensor], tokenizer: Tokenizer, prompt: str, n: int = 120
) -> str:
    """Greedy continuation of a rendered prompt up to <|im_end|>."""
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    begin, end = len(tokens), tokenizer.token_to_id("<|im_end|>")
    while len(tokens) < begin + n:
        length = -(-len(tokens) // 128) * 128
        padded = torch.tensor([tokens + [0] * (length - len(tokens))])
        hidden, _ = net.hidden(p, biases, padded, make_frame(net.shape, torch.zeros_like(padded)))
        token = int(net.logits(p, hidden[0, len(tokens) - 1]).argmax())
        if token == end:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[begin:], skip_special_tokens=False)


def chat_prompt(question: str) -> str:
    """A question with the default system text, thinking off."""
    return (
        "".join(s for s, _ in render(Conversation([user(question)])))
        + "<|im_start|>assistant\n<think></think>"
    )


def sample_answers(out: Path) -> None:
    """Print answers to some fixed questions."""
    torch.set_num_threads(1)
    saved = torch.load(out / "weights.pt")
    tokenizer = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    params = {n: v.float() for n, v in saved["params"].items()}
    print(saved["meta"])
    net = Network(Shape())
    for question in LOOK:
        print(
            f"> {question}\n  {answer(net, params, saved['biases'], tokenizer, chat_prompt(question))}\n",
            flush=True,
        )
