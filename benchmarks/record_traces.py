"""Records router traces of the embedded model, for benchmarks.policy: chat, stories, code, sums, and all in turn.

    python -m benchmarks.record_traces DIR [--tokens 400] [--split tune|report]

Every token is read as a decode step, those of the prompts too; answers are sampled. The policy was made by looking at
`tune`; `report` has other prompts and other seeds. Takes one to five minutes.
"""

import argparse
from pathlib import Path

from localmimo import Engine, Sampling, load
from localmimo.bench.runs import TraceRecorder
from localmimo.experts.policy.trace import TraceWriter

PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "tune": {
        "chat": (
            "Tell me about rivers.", "What is a lighthouse?", "Why do people sleep?", "What can I cook with eggs?",
            "Who are you?", "What is a bridge?",
        ),
        "story": (
            "Tell me a story about a fox.", "Tell me a story about a boy and a boat.",
            "Once upon a time, a little girl",
        ),
        "code": (
            "def add(a, b):\n    return a + b\n\ndef mul(", "for i in range(10):\n    print(i)\n\nwhile True:\n",
            "import json\n\nclass Reader:\n    def __init__(self, path):\n",
        ),
        "arithmetic": (
            "What is 12 + 7?", "What is 30 - 4?", "What is 6 * 7?", "What is 9 + 15?", "How much is 81 + 9?",
            "What is 100 - 45?",
        ),
    },
    "report": {
        "chat": (
            "What is a volcano?", "Tell me about the moon.", "How do birds fly?", "What is tea?",
            "Hello, how are you?", "What is a library?",
        ),
        "story": (
            "Tell me a story about a dragon.", "Tell me a story about two friends.", "There was an old man who",
        ),
        "code": (
            "class Stack:\n    def push(self, item):\n", "#include <stdio.h>\nint main() {\n    int i;\n",
            "SELECT name, age FROM people WHERE\n",
        ),
        "arithmetic": (
            "What is 5 + 8?", "What is 44 - 11?", "What is 3 * 9?", "What is 27 + 14?", "How much is 60 - 7?",
            "What is 8 * 8?",
        ),
    },
}  # fmt: skip


def record(folder: Path, split: str, n_tokens: int) -> list[Path]:
    """Record every kind of a split; the files, in order."""
    kinds = PROMPTS[split]
    in_turn = tuple(prompt for turn in zip(*kinds.values(), strict=False) for prompt in turn)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with load("mimo-mini", profile=None) as engine:
        for place, (kind, prompts) in enumerate({**kinds, "switching": in_turn}.items()):
            paths.append(folder / f"{split}-{kind}.jsonl")
            with TraceWriter(paths[-1]) as writer:
                record_one(
                    engine, prompts, TraceRecorder(writer.write), n_tokens, 100 * place + (split == "report")
                )
    return paths


def record_one(
    engine: Engine, prompts: tuple[str, ...], recorder: TraceRecorder, n_tokens: int, seed: int
) -> None:
    """An answer to each prompt, then all of it token by token."""
    each = n_tokens // len(prompts)
    for number, prompt in enumerate(prompts):
        text = prompt if "\n" in prompt else engine.render([{"role": "user", "content": prompt}])
        sampling = Sampling(temperature=0.8, seed=seed + number)
        done = engine.generate(text, max_tokens=each, sampling=sampling)
        tokens = [*engine.encode(text), *done.tokens][: max(each, 20)]
        with engine.session() as session:
            session.sync(tokens[:1])
            engine.record(recorder.add)
            for token in tokens[1:]:
                session.step(token)
                recorder.write()
            engine.record(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--split", choices=PROMPTS, default="report")
    options = parser.parse_args()
    for path in record(options.folder, options.split, options.tokens):
        print(path)


if __name__ == "__main__":
    main()
