"""The same tests twice: on the CPU through Triton's interpreter, and on a GPU with `pytest -m gpu`.

Triton decides at import whether it interprets, so one process runs one of the two.
"""

import sys
from importlib.util import find_spec

import pytest
import torch

from tests.gpu import interpreter

HAS_TRITON = find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("markexpr", "")
    if "gpu" in wanted and "not gpu" not in wanted:
        return
    if HAS_TRITON and "triton" not in sys.modules:
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
