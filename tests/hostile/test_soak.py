"""Mixed use of one engine leaves nothing behind (benchmarks/soak.py, which can run for hours)."""

from benchmarks.soak import soak


def test_nothing_grows() -> None:
    found = soak(8.0)
    assert found["probe_texts"] == 1 and sum(found["done"].values()) >= 6
    assert {*found["grown"]} <= {"probe_cost"}  # eight seconds say little about speed
    assert not [name for name in found["files_left"] if "partial" in name]
