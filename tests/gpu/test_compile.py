"""Every kernel goes through the real compiler, for GPUs that are not there; see `compiling.py`."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from quant.gpu import MIN_TRITON

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {"80": 166_912, "89": 101_376, "90": 232_448}  # bytes of one program

SPILL_LIMIT = 256  # bytes per thread; 0 where attention is in bfloat16, up to 216 in float32 for 8.9
FOUND = tuple(int(part) for part in version("triton").split(".")[:2])


@pytest.mark.skipif(FOUND < MIN_TRITON, reason="no GPU is used with a triton as old as this")
@pytest.mark.parametrize(
    ("codec", "capability"),
    [
        ("nf4", "90"),
        pytest.param("int8", "89", marks=pytest.mark.slow),
        pytest.param("nf4-16", "80", marks=pytest.mark.slow),
        pytest.param("mxfp4", "89", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit(codec: str, capability: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.compiling", codec, capability]
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len({name for name, *_ in lines}) == 11
    for name, _, spilled, shared in lines:
        assert int(spilled) <= SPILL_LIMIT, f"{name} spills {spilled} bytes"
        assert int(shared) <= SHARED_LIMIT[capability], f"{name} wants {shared} bytes of shared memory"
