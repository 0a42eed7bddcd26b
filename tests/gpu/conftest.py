"""The same tests twice: on the CPU through Triton's interpreter, and on a GPU with `pytest -m gpu`.

Triton decides at import whether it interprets, so one process runs one of the two.
"""

import sys

import pytest
import torch

from tests.gpu import interpreter

pytest.importorskip("triton", reason="triton is not installed (Linux x86-64 only)")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("markexpr", "")
    if "gpu" in wanted and "not gpu" not in wanted:
        return
    if "triton" not in sys.modules:
        interpreter.start()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test lie: "cpu" (interpreted) or "cuda" (compiled)."""
    if request.param == "cpu":
        reason = "triton was imported before its interpreter was asked for: run `pytest tests/gpu` by itself"
        assert interpreter.running(), reason
    elif interpreter.running() or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and `pytest -m gpu`")
    return request.param
