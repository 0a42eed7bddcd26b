"""Retries: a pass that runs out of memory is run again while there is memory to give back, then given up."""

import pytest
import torch

from localmimo.decode.retries import run_with_retries
from localmimo.errors import DoesNotFit, NoDevice


class Pass:
    """A pass that fails with each of `errors` in turn, and what is called around it."""

    def __init__(self, errors: list[BaseException], n_shrinks: int = 0) -> None:
        self.errors = errors
        self.n_shrinks = n_shrinks
        self.calls: list[str] = []

    def run(self) -> str:
        self.calls.append("run")
        if self.errors:
            raise self.errors.pop(0)
        return "result"

    def shrink(self) -> bool:
        self.calls.append("shrink")
        self.n_shrinks -= 1
        return self.n_shrinks >= 0

    def go(self) -> str:
        undo, give_up = (lambda name=name: self.calls.append(name) for name in ("undo", "give up"))
        return run_with_retries(self.run, undo, self.shrink, give_up)


def out_of_memory(n: int) -> list[BaseException]:
    return [torch.OutOfMemoryError("CUDA out of memory.") for _ in range(n)]


def test_a_pass_that_succeeds_is_run_once() -> None:
    done = Pass([])
    assert done.go() == "result" and done.calls == ["run"]


def test_it_is_run_again_while_memory_is_given_back() -> None:
    done = Pass(out_of_memory(2), n_shrinks=2)
    assert done.go() == "result"
    assert done.calls == ["run", "undo", "shrink", "run", "undo", "shrink", "run"]


def test_it_is_given_up_once_there_is_none_to_give_back() -> None:
    done = Pass(out_of_memory(2), n_shrinks=1)
    with pytest.raises(DoesNotFit):
        done.go()
    assert done.calls == ["run", "undo", "shrink", "run", "undo", "shrink", "give up"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), NoDevice),
        (RuntimeError("of another kind"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_any_other_error_is_undone_and_not_repeated(
    error: BaseException, raised: type[BaseException]
) -> None:
    done = Pass([error], n_shrinks=9)
    with pytest.raises(raised):
        done.go()
    assert done.calls == ["run", "undo"]
