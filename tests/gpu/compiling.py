"""Run as a program: every kernel, compiled for a GPU that is not there, with the launches' own arguments.

The interpreter accepts code that the compiler refuses, and can not see what a GPU would run. Prints one line
per kernel: its name, the capability, spilled bytes per thread and shared memory in bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant.formats.page import PageLayout
from quant.ops.quantize import quantize

TYPES = {
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


def compile_instead(capability: int) -> Callable[..., None]:
    """A replacement for JITFunction.run."""

    def run(kernel, *args, grid, warmup, **named):  # type: ignore[no-untyped-def]
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        constant = {p.name for p in kernel.params if p.is_constexpr or is_one(given[p.name])}
        source = ASTSource(
            kernel,
            {name: "constexpr" if name in constant else type_of(given[name]) for name in kernel.arg_names},
            {(i,): given[name] for i, name in enumerate(kernel.arg_names) if name in constant},
            {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(kernel.arg_names)
                if name not in constant and aligned(given[name])
            },
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        spills, shared = spilled(compiled.asm["cubin"]), compiled.metadata.shared
        print(kernel.__name__, capability, spills, shared, flush=True)

    return run


def is_one(value: object) -> bool:
    """A launch makes a constant of the integer 1."""
    return isinstance(value, int) and value == 1


def type_of(value: torch.Tensor | float) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def aligned(value: torch.Tensor | int) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def spilled(cubin: bytes) -> int:
    """Bytes of stack per thread, which is where registers spill to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", run.stdout + run.stderr))


def launch_all(name: str) -> None:
    """Every launch once, for shapes as real as a CPU can hold."""
    from quant.gpu import launch

    layout = PageLayout(name, 512, 256)
    slab, slots = torch.zeros(2, layout.bytes, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)
    q = quantize(torch.randn(256, 512), name)
    launch.dequantize(q, torch.bfloat16)
    launch.gemv(torch.zeros(1, 512), q)
    for n in (8, 128):
        launch.tensor_cores(torch.zeros(n, 512).bfloat16(), q)
    for n, run in ((1, launch.few_tokens), (16, launch.many_tokens), (512, launch.many_tokens)):
        chosen = torch.zeros(n, 2, dtype=torch.int64)
        rows = run(torch.zeros(n, 512).bfloat16(), layout, slab, slots, chosen, torch.ones(n, 2))
    launch.combine(rows)
    attend_all(2 if name == "nf4" else 5)


def attend_all(n_cases: int = 5) -> None:
    """V2's attention: a step in a long context and in a window's ring, a chunk of a prompt, in each type of cache."""
    from quant.gpu import attention_launch

    cases = (
        (100, 3000, 64, 4, None, torch.bfloat16, torch.bfloat16),
        (1, 5000, 64, 4, None, torch.bfloat16, torch.int8),
        (4, 700, 64, 8, 128, torch.bfloat16, torch.int8),
        (1, 5000, 64, 4, None, torch.bfloat16, torch.bfloat16),
        (40, 100, 64, 8, 128, torch.float32, torch.float32),
    )
    for n, position, heads, kv_heads, window, dtype, kv in cases[:n_cases]:
        extra = 4 if kv == torch.int8 else 0
        shape = (kv_heads, position + n) if window else (9, kv_heads, 640)  # a ring, or slots of a slab
        keys, values = (torch.zeros(*shape, d + extra, dtype=kv) for d in (192, 128))
        blocks = None if window else torch.zeros(9, dtype=torch.int32)
        table = torch.zeros(n, 32)
        attention_launch.attend(
            torch.zeros(n, heads * 192 + kv_heads * 320, dtype=dtype), table, table, keys, values,
            positions=torch.arange(position, position + n), table=blocks, heads=heads, head_dims=(192, 128), first=0,
            window=window, sink=torch.zeros(heads), scale=0.07, value_scale=0.7,
        )  # fmt: skip


if __name__ == "__main__":
    triton.JITFunction.run = compile_instead(capability=int(sys.argv[2]))
    torch.set_num_threads(1)
    launch_all(sys.argv[1])
