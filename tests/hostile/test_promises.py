"""The documents that promise something point at tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["SECURITY.md", "RELIABILITY.md"])
def test_every_test_that_is_named_exists(document: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / document).read_text())
    assert len(named) > 10
    for file, name in named:
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
