"""What is said of a GPU before anything is read: that it is not there, too old, too small, or lacks something."""

import os
from unittest.mock import patch

import pytest
import torch

from localmimo import load
from localmimo.errors import BadRequest, DoesNotFit, NoDevice
from localmimo.hardware.device import check_device, find_device
from localmimo.loading.options import LoadOptions
from tests.gpu import pretended


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cuda:0 "])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(BadRequest, match="one of auto, cpu, cuda and cuda:N"):
        check_device(name)
    with pytest.raises(BadRequest, match="one of auto"):
        load(device=name)


def test_the_first_gpu_that_can_be_used_is_taken() -> None:
    with pretended.device(total_bytes=24 << 30, free_bytes=23 << 30):
        found = find_device("auto")
        assert (str(found), found.title, found.total_bytes >> 30) == ("cuda:0", "Pretended GPU", 24)
        assert 22 << 30 < found.automatic_bytes < 23 << 30
        assert find_device("cuda") == find_device("cuda:0") == found
        assert str(find_device("cpu")) == "cpu"


def refused(words: str, name: str = "cuda") -> None:
    """Asked for it is an error; "auto" takes the CPU, and says why where somebody installed a driver."""
    with pytest.raises(NoDevice, match=words) as error:
        find_device(name)
    with patch("localmimo.hardware.device._driver_is_there", return_value=True):
        found = find_device("auto") if name == "cuda" else None
    assert found is None or (not found.is_gpu and found.note == str(error.value))


def test_a_torch_without_cuda() -> None:
    with patch.object(torch.version, "cuda", None):
        refused('built without CUDA: install its CUDA build .*device="cpu"')
        assert find_device("auto").note == ""
        with patch.object(torch.version, "hip", "6.2"):
            refused("built for ROCm")


def test_what_is_wrong_with_a_gpu_is_a_sentence() -> None:
    with pretended.device(capability=(7, 5)):
        refused("Pretended GPU has compute capability 7.5, and the kernels need 8.0 or more")
    with pretended.device():
        refused("There is no cuda:3: this machine has 1 ", "cuda:3")
        with patch("localmimo.hardware.device.find_spec", return_value=None):
            refused("need triton, which is not installed: pip install triton")
        with patch("localmimo.hardware.device.version", return_value="3.2.0"):
            refused(
                "triton 3.2.0 is installed and the GPU kernels need 3.3 or more, which comes with torch 2.7"
            )
        with patch("localmimo.hardware.device.shutil.which", return_value=None), patch.dict("os.environ"):
            os.environ.pop("CC", None)
            refused("neither gcc nor clang: apt install gcc")
        with patch("localmimo.hardware.device.sysconfig.get_path", return_value="/nowhere"):
            refused("no Python.h: apt install python3-dev")
        with patch.object(torch.cuda, "device_count", return_value=0):
            refused("no GPU that CUDA can see")
        too_old = RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
        )
        with patch.object(torch.cuda, "init", side_effect=too_old):
            refused(
                r"CUDA does not start: The NVIDIA driver .* too old \(found version 11040\). Install or update"
            )
        with patch.object(torch.cuda, "mem_get_info", side_effect=RuntimeError("CUDA error: out of memory")):
            refused("cuda:0 .* cannot be used: CUDA error: out of memory")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vram": "9GiB"}, "VRAM budget is 9.7 GB and cuda:0 .* has 8.6 GB"),
        ({"vram": "5GiB"}, "VRAM budget is 5.4 GB and cuda:0 .* has free 4.3 GB"),
        ({"vram": "1GiB"}, r"needs 1.\d GB of VRAM at the least and the budget is 1.1 GB: .*vram=\d+MiB"),
        ({"vram": "2GiB", "ram": "16MiB"}, "of RAM at the least"),
    ],
)
def test_budgets_that_do_not_fit(options: dict[str, str], words: str) -> None:
    with pretended.device(total_bytes=8 << 30, free_bytes=4 << 30), pytest.raises(DoesNotFit, match=words):
        load(device="cuda", context=256, **options)  # type: ignore[arg-type]


def test_the_smallest_budget_that_is_named_works() -> None:
    with pretended.device():
        with pytest.raises(DoesNotFit) as error:
            load(device="cuda", context=256, vram="1GiB")
        named = str(error.value).split("vram=")[1].split(",")[0]
        load(device="cuda", context=256, vram=named, profile=None).close()


def test_a_card_that_is_too_small_leaves_it_to_the_cpu_and_says_so() -> None:
    with pretended.device(free_bytes=1 << 30), load(context=256, profile=None) as engine:
        found = engine.effective()
        assert (
            found["device"] == "cpu"
            and "of VRAM at the least" in found["note"]
            and found["dtype"] == "float32"
        )


def test_vram_wants_a_gpu() -> None:
    with pytest.raises(BadRequest, match="vram is 2GiB and the device cpu"):
        LoadOptions(vram="2GiB", device="cpu")
    with pytest.raises(BadRequest, match="not a size"):
        LoadOptions(vram="much")
    if torch.version.cuda is None:
        with pytest.raises(NoDevice, match="vram was given and CUDA sees no GPU"):
            load(vram="2GiB")


def test_bench_says_what_the_gpu_held() -> None:
    import json

    from localmimo.cli.commands.bench import BenchOptions, run_bench
    from tests.scripted import Capture

    shown = Capture()
    loading = LoadOptions(profile=None, device="cuda", context=64, vram="2GiB")
    with pretended.device():
        assert (
            run_bench(
                BenchOptions(prompt_tokens=8, max_tokens=2, repeat=1, loading=loading, as_json=True), shown.ui
            )
            == 0
        )
    found = json.loads(shown.out.splitlines()[-1])
    assert found["peak_vram_bytes"] == 4 << 30 and found["effective"]["device"] == "cuda:0"
    assert "peak VRAM 4.3 GB; the budget: 2.1 GB" in shown.err and "(Pretended GPU)" in shown.err
