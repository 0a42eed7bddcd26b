"""Random models under random budgets, beside a process that takes memory and releases it (benchmarks/budget.py)."""

import pytest

from benchmarks.budget import pair


@pytest.mark.slow  # .ci/run asks the benchmark for three such pairs
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_budget_holds_and_changes_no_token(number: int) -> None:
    found = pair(number, seed=0)
    assert not found["broken"], found
