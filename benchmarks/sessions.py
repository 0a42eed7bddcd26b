"""Saved sessions: the first token after loading a session against reading its tokens again.

    python -m benchmarks.sessions PACK [--tokens 8192] [--ram 4GiB]

PACK: any whose model has that many positions (`benchmarks.make_checkpoint DIR --shape small`, converted). The tokens
that follow must be the same either way.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import timed, write_result
from localmimo import Session, load


def follow(session: Session, logits: torch.Tensor, n: int = 16) -> list[int]:
    """The next greedy tokens."""
    out = [int(logits.argmax())]
    for _ in range(n - 1):
        out.append(int(session.step(out[-1]).argmax()))
    return out


def measure(pack: str, n_tokens: int, ram: str | None) -> dict[str, Any]:
    """Seconds to the first token, read and loaded, with the file's size."""
    draws = torch.Generator().manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        load(pack, context=n_tokens + 64, ram=ram, draft=0) as engine,
    ):
        path = Path(folder) / "session.safetensors"
        most = min(engine.config.vocab_size, 8000)
        tokens = torch.randint(3, most, (n_tokens,), generator=draws).tolist()
        with engine.session() as session:
            logits, read_s = timed(lambda: session.sync(tokens))
            n_bytes, save_s = timed(lambda: session.save(path))
            expected = follow(session, logits)
            session.rewind(10**9)
            with path.open("rb") as file:
                os.posix_fadvise(
                    file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
                )  # from the disk, not from memory
            began = time.perf_counter()
            session.load(path)
            logits = session.sync(tokens)
            load_s = time.perf_counter() - began
            same = follow(session, logits) == expected
        return {
            "benchmark": "sessions",
            "config": engine.effective(),
            "tokens": n_tokens,
            "read_s": read_s,
            "load_s": load_s,
            "times_sooner": read_s / load_s,
            "save_s": save_s,
            "file_bytes": n_bytes,
            "same_tokens": same,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ram")
    options = parser.parse_args()
    found = measure(options.pack, options.tokens, options.ram)
    print(
        f"{found['read_s']:.2f} s read, {found['load_s']:.3f} s loaded: {found['times_sooner']:.0f} x sooner"
    )
    write_result("sessions", found)


if __name__ == "__main__":
    main()
