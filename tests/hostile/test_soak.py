"""Mixed use of one engine leaves nothing behind (benchmarks/soak.py, which can run for hours)."""

from benchmarks.soak import soak


def test_nothing_grows() -> None:
    found = soak(6.0)
    assert found["probe_texts"] == 1 and sum(found["done"].values()) >= 6
    early, late = found["early"], found["late"]
    assert (late["threads"], late["files"]) == (early["threads"], early["files"])
    assert late["rss_bytes"] < early["rss_bytes"] + (64 << 20)
    assert not [name for name in found["files_left"] if "partial" in name]
