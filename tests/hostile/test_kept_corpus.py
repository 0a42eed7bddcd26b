"""Every reader of bytes from outside, under mutations of the kept corpus, in a process of bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
N_READERS = 20
MORE_BYTES = 128 << 20  # of resident memory, for the largest input that was read


@pytest.mark.parametrize(
    ("n", "seed"), [(60, 0), pytest.param(3000, 1, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_every_reader_takes_or_refuses(tmp_path: Path, n: int, seed: int) -> None:
    """What a line of stdout names belongs into the corpus, beside its repair."""
    command = [sys.executable, "-m", "tests.hostile.fuzz", str(tmp_path), str(n), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    *broken, last = done.stdout.splitlines()
    assert not broken
    figures = json.loads(last)
    assert figures["more_bytes"] < MORE_BYTES
    assert len(figures["seeds_and_taken"]) == N_READERS
    assert all(n_seeds > 0 for n_seeds, _ in figures["seeds_and_taken"].values())
