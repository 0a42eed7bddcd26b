"""Drafts: tokens per second with the model's own draft heads against none, on the embedded model or a pack.

    python -m benchmarks.drafts [PACK] [--ram 2GiB] [--tokens 256] [--rounds 3]

Rounds alternate between the settings, since one machine is now faster, now slower; figures are medians of ratios
within a round. Greedy, over questions that the embedded model knows; every setting must say the same tokens.
"""

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.report import write_result
from localmimo import Sampling, load
from localmimo.decode.draft_depth import Draft
from localmimo.decode.steps import DraftStats
from localmimo.engine import Engine

PROMPTS = (
    "Tell me a story about a bear and a friend.",
    "Write a haiku about the sea.",
    "How do I make tea?",
    "What is a lighthouse?",
    "Tell me a story about a fox.",
)
SETTINGS: tuple[Draft, ...] = (0, 1, 2, 3, "auto")


def answer(engine: Engine, n_tokens: int) -> tuple[list[int], float, list[DraftStats]]:
    """Tokens, decode seconds per token, and the drafts of each answer."""
    tokens: list[int] = []
    seconds, drafts = 0.0, []
    for prompt in PROMPTS:
        reply = engine.chat(
            [{"role": "user", "content": prompt}],
            think=False,
            max_tokens=n_tokens,
            sampling=Sampling(temperature=0),
        )
        tokens += reply.tokens
        seconds += reply.stats.decode_s
        drafts.append(reply.stats.drafts)
    return tokens, seconds / (len(tokens) - len(PROMPTS)), drafts


def total(drafts: Sequence[DraftStats]) -> DraftStats:
    """All answers' drafts together."""
    out = DraftStats()
    for one in drafts:
        out.passes += one.passes
        for name in ("drafted", "accepted", "pages", "passes_at"):
            setattr(out, name, [a + b for a, b in zip(getattr(out, name), getattr(one, name), strict=True)])
    return out


def measure(pack: str | None, ram: str | None, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Speeds over that without drafts, acceptance and growth of the experts by setting."""
    with ExitStack() as stack:
        engines = {
            draft: stack.enter_context(load(pack, ram=ram, context=2048, draft=draft, profile=None))
            for draft in SETTINGS
        }
        said = {draft: answer(engine, n_tokens)[0] for draft, engine in engines.items()}
        times: dict[Draft, list[float]] = {draft: [] for draft in SETTINGS}
        drafts: dict[Draft, list[DraftStats]] = {draft: [] for draft in SETTINGS}
        for _ in range(rounds):
            for draft, engine in engines.items():
                _, seconds, done = answer(engine, n_tokens)
                times[draft].append(seconds)
                drafts[draft] += done
        return {
            "benchmark": "drafts",
            "config": engines["auto"].effective(),
            "tokens": len(said[0]),
            "same_tokens": all(tokens == said[0] for tokens in said.values()),
            "tps_without": 1 / statistics.median(times[0]),
            "settings": {
                str(draft): {
                    "speed": statistics.median(
                        none / own for none, own in zip(times[0], times[draft], strict=True)
                    ),
                    **total(drafts[draft]).as_dict(),
                }
                for draft in SETTINGS
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", nargs="?")
    parser.add_argument("--ram")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = measure(options.pack, options.ram, options.tokens, options.rounds)
    for draft, figures in found["settings"].items():
        shares = " ".join(f"{share:.0%}" for share in figures["acceptance"])
        print(
            f"draft {draft:>4}: {figures['speed']:.2f} x, accepted by head {shares}, passes {figures['passes_at']}"
        )
    write_result("drafts", found)


if __name__ == "__main__":
    main()
