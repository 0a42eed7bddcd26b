"""Several sequences in one batch against one alone: tokens per second where the disk is the limit.

    python -m benchmarks.batch PACK --ram 2GiB [--batch 4] [--tokens 24]

PACK: `benchmarks.make_checkpoint DIR --shape mid`, converted; --ram: so little that most experts come from the disk.
A disk that is never idle gives no more than the ratio of the bytes that a token reads alone and together.
Each sequence must give the tokens that it gives alone.
"""

import argparse
from typing import Any

from benchmarks.report import timed, write_result
from localmimo import Completion, Sampling, load

PROMPTS = (
    "The harbour in the morning", "A list of numbers: 3, 1, 4", "Dear Sir or Madam", "def main():",
    "Once upon a time", "In 1905 a clerk", "The recipe needs", "Error: no such file",
)  # fmt: skip


def speed(done: list[Completion], seconds: float) -> dict[str, float]:
    tokens = sum(len(one.tokens) for one in done)
    return {"tps": tokens / seconds, "tokens": tokens, "seconds": seconds}


def measure(pack: str, ram: str | None, batch: int, n_tokens: int) -> dict[str, Any]:
    """Speeds together and alone. Both begin with prompts that are read already, so that only decoding counts."""
    sampling = Sampling(temperature=1.0, seed=1, logit_bias=dict.fromkeys((8166, 8168), -100.0))
    prompts = list(PROMPTS[:batch])
    with load(pack, ram=ram, context=512, draft=0, max_batch=batch, profile=None) as engine:

        def say(texts: list[str], n: int) -> tuple[list[Completion], float]:
            engine.generate(texts, max_tokens=1, sampling=sampling)  # read
            return timed(lambda: engine.generate(texts, max_tokens=n, sampling=sampling))

        say(prompts, n_tokens)  # the store as it is in the long run
        alone, rounds = [], []
        for prompt in prompts:
            done, seconds = say([prompt], n_tokens)
            alone += done
            rounds.append(seconds)
        one, together = speed(alone, sum(rounds)), say(prompts, n_tokens)
        one |= {"token_bytes": sum(a.stats.bytes_read for a in alone) / one["tokens"]}
        shared = speed(*together)
        shared |= {"token_bytes": max(b.stats.bytes_read for b in together[0]) / shared["tokens"]}
        return {
            "config": engine.effective(),
            "batch": batch,
            "one": one,
            "together": shared,
            "aggregate": shared["tps"] / one["tps"],
            "aggregate_by_bytes": one["token_bytes"] / shared["token_bytes"],
            "same_tokens": [a.tokens for a in alone] == [b.tokens for b in together[0]],
            "read_share_one": sum(a.stats.read_s for a in alone) / sum(rounds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack")
    parser.add_argument("--ram")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    found = measure(options.pack, options.ram, options.batch, options.tokens)
    print(
        f"one {found['one']['tps']:.2f} tokens/s, {options.batch} together {found['together']['tps']:.2f}: "
        f"{found['aggregate']:.2f} x, {found['aggregate_by_bytes']:.2f} x by the bytes that each token reads; "
        f"the disk was being read {found['read_share_one']:.0%} of the time"
    )
    write_result("batch", found)


if __name__ == "__main__":
    main()
