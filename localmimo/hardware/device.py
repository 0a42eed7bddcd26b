"""Device: where dense weights, KV and the hottest experts are kept: main memory, or one GPU.

A GPU is looked at before anything is read, and what is wrong with it is a sentence. Knows what torch and the driver
say; no model and no budget. Imports torch only to look.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localmimo.errors import BadRequest, DoesNotFit, NoDevice

if TYPE_CHECKING:
    import torch

INSTEAD = 'or give device="cpu"'
RESERVE_SHARE = 32  # one part in so many of what is free stays free when the budget is automatic


@dataclass(frozen=True, slots=True)
class Device:
    """Main memory ("cpu"), or one GPU with the memory that it has and that is free."""

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0
    title: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    note: str = ""  # why the CPU computes although there is a GPU

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def automatic_bytes(self) -> int:
        """The VRAM budget where none is given."""
        return self.free_bytes - self.free_bytes // RESERVE_SHARE

    def torch(self) -> torch.device:
        """As torch names it."""
        import torch

        return torch.device(self.kind, self.index) if self.is_gpu else torch.device("cpu")

    def peak_bytes(self) -> int:
        """The most of a GPU's memory that this process has held."""
        import torch

        return torch.cuda.max_memory_allocated(self.index) if self.is_gpu else 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.is_gpu else "cpu"


CPU = Device()


def check_device(text: str) -> str:
    """`text`, where it names a device: auto, cpu, cuda or cuda:N. Raises BadRequest."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text) is None:
        raise BadRequest(f'device is "{text}"; it is one of auto, cpu, cuda and cuda:N.')
    return text


def find_device(asked: str) -> Device:
    """The device that was asked for; "auto" is the first GPU where one can be used, else the CPU.

    Raises NoDevice where a GPU was asked for and cannot be used.
    """
    if asked == "cpu":
        return CPU
    try:
        return _gpu(int(asked.partition(":")[2] or 0))
    except NoDevice as error:
        if asked != "auto":
            raise
        return Device(note=str(error) if _driver_is_there() else "")


def out_of_memory(error: BaseException) -> DoesNotFit:
    """What is left to say where the GPU has no memory, and no expert there that could give way."""
    return DoesNotFit(
        "The GPU has no memory left: end other programs that use it, or give a shorter context=, a smaller vram=, "
        f"{INSTEAD}. ({_first_line(error)})",
        what="VRAM",
    )


def no_kernels(error: BaseException) -> NoDevice:
    """What is left to say where the first kernel cannot be compiled or run."""
    return NoDevice(
        f"The GPU's kernels cannot be built or run: {type(error).__name__}: {_first_line(error)} Triton needs a "
        f"working C compiler and a folder that it may write to (~/.triton, or TRITON_CACHE_DIR): mend that, {INSTEAD}."
    )


def broke_down(error: BaseException) -> NoDevice | None:
    """What is left to say where the GPU or its driver failed in mid-answer; None for any other error."""
    if "CUDA error" not in str(error):
        return None
    return NoDevice(
        f"The GPU has failed, and what this process had there is lost: {_first_line(error)} Start again; if it happens "
        f"again look at the driver's messages (dmesg), {INSTEAD}."
    )


def _driver_is_there() -> bool:
    """Whether somebody installed an NVIDIA driver: then it is worth a line that it is not used."""
    return Path("/proc/driver/nvidia/version").exists()


def _gpu(index: int) -> Device:
    import torch

    if torch.version.cuda is None:
        other = "for ROCm" if torch.version.hip else "without CUDA"
        raise NoDevice(
            f"torch {torch.__version__} is built {other}: install its CUDA build (pytorch.org/get-started), {INSTEAD}."
        )
    _start(torch.cuda)
    n = torch.cuda.device_count()
    if index >= n:
        raise NoDevice(f"There is no cuda:{index}: this machine has {n} (cuda:0 to cuda:{n - 1}).")
    facts = torch.cuda.get_device_properties(index)
    _check_capability(facts.name, (facts.major, facts.minor))
    _check_triton()
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        raise NoDevice(
            f"cuda:{index} ({facts.name}) cannot be used: {_first_line(error)} {INSTEAD}."
        ) from error
    return Device("cuda", index, facts.name, total, free)


def _start(cuda: Any) -> None:
    """Raise NoDevice with the driver's own words where CUDA does not start."""
    try:
        cuda.init()
        found = cuda.device_count() > 0
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no driver, one that is too old, one that was updated meanwhile
        raise NoDevice(
            f"CUDA does not start: {_first_line(error)} Install or update the NVIDIA driver (reboot after an update), "
            f"{INSTEAD}."
        ) from error
    if not found:
        raise NoDevice(f"This machine has no GPU that CUDA can see (CUDA_VISIBLE_DEVICES?): {INSTEAD[3:]}.")


def _check_capability(title: str, found: tuple[int, int]) -> None:
    from quant.gpu import MIN_CAPABILITY

    if found < MIN_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (found, MIN_CAPABILITY))
        raise NoDevice(
            f"The {title} has compute capability {has}, and the kernels need {needs} or more (from 2020 on): "
            f"{INSTEAD[3:]}."
        )


def _check_triton() -> None:
    """Raise NoDevice where the kernels cannot be built: Triton, and a C compiler with Python's headers for it."""
    if find_spec("triton") is None:
        raise NoDevice(f"The GPU kernels need triton, which is not installed: pip install triton, {INSTEAD}.")
    _check_triton_version(_triton_version())
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        raise NoDevice(
            f"Triton needs a C compiler, and there is neither gcc nor clang: apt install gcc, {INSTEAD}."
        )
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        raise NoDevice(
            f"Triton needs Python's headers, and there is no Python.h: apt install python3-dev, {INSTEAD}."
        )


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton"):  # the latter comes with nightly builds of torch
        with suppress(PackageNotFoundError):
            return version(name)
    return "of unknown version"


def _check_triton_version(found: str) -> None:
    from quant.gpu import MIN_TRITON

    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < MIN_TRITON:
        raise NoDevice(
            f"triton {found} is installed and the GPU kernels need {'.'.join(map(str, MIN_TRITON))} or more, which "
            f"comes with torch 2.7: pip install -U torch, {INSTEAD}."
        )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
    return line if line.endswith((".", "!")) else f"{line}."
