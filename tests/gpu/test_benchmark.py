"""benchmarks/gpu.py: its checks run here, on a pretended GPU; without one it says that there is nothing to measure."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import gpu as benchmark
from benchmarks.gpu import Bench
from localmimo.hardware.device import Device

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert capsys.readouterr().err.startswith("There is no GPU to measure. ")


@pytest.mark.parametrize("parts", ["whole", pytest.param("kernels,engine", marks=pytest.mark.slow)])
def test_its_checks(parts: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--interpret", "--only", parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] and list(found["parts"]) == parts.split(",")


def test_a_part_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> dict[str, object]:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(benchmark, "PARTS", {"kernels": broken, "engine": lambda bench: {"same": 2}})
    monkeypatch.setattr(benchmark, "simulated", lambda bench, name: nullcontext())
    found = benchmark.carry_out(Bench(Device(), 60, interpret=True), ["kernels", "engine"])
    assert found["kernels"]["error"] == "RuntimeError: no such instruction" and found["engine"]["same"] == 2


def test_parts_are_left_out_when_the_time_is_up() -> None:
    found = benchmark.carry_out(Bench(Device(), 0, interpret=True), ["whole"])
    assert found["whole"]["left_out"]
