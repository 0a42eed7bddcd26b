"""Triton's interpreter for these tests: asked for before triton is imported, and taught bfloat16.

The interpreter (3.7) truncates instead of rounding to bfloat16, loses the carry where it does round, and
multiplies the bit patterns of bfloat16 operands of `tl.dot`. The replacements below let torch convert and
numpy multiply float32 values, so that a kernel computes what the hardware would.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from types import FunctionType, ModuleType

import numpy as np
import torch

VARIABLE = "TRITON_INTERPRET"


def start() -> None:
    """Import triton and the kernels in interpreting mode, leaving the environment as it was."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        from triton.runtime import interpreter

        with suppress(ImportError):  # a launch imports it, and it looks at the mode too
            import triton.experimental.gluon  # noqa: F401
        import quant.gpu.attention_launch
        import quant.gpu.launch  # noqa: F401  the decorators look at the mode
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    _teach_bfloat16(interpreter)
    _patch_once(interpreter)


def running() -> bool:
    """Whether this process interprets the kernels."""
    launch = sys.modules.get("quant.gpu.launch")
    return launch is not None and launch.interpreted()


def _teach_bfloat16(interpreter: ModuleType) -> None:
    import triton.language as tl

    original = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if target == tl.bfloat16 and source == tl.float32:
            return _bits(torch.from_numpy(np.array(data, np.float32)).bfloat16())
        if source == tl.bfloat16 and target == tl.float32:
            return _floats(data).view(np.uint32)
        return original(data, source, target, rounding)

    def dot(builder, a, b, d, precision, imprecise):  # type: ignore[no-untyped-def]
        left, right = (_floats(h.data) if h.dtype.scalar == tl.bfloat16 else h.data for h in (a, b))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _patch_once(interpreter: ModuleType) -> None:
    """A call between jitted functions patches triton.language again each time, which takes most of the time:
    only do so for modules that are not patched yet, until the kernel ends.
    """
    original = interpreter._patch_lang
    scopes: dict[frozenset[str], object] = {}

    class Everything:
        def restore(self) -> None:
            for scope in reversed(scopes.values()):
                scope.restore()  # type: ignore[attr-defined]
            scopes.clear()

    def patch(fn: FunctionType) -> Everything:
        values = fn.__globals__.values()
        modules = frozenset(
            v.__name__ for v in values if isinstance(v, ModuleType) and "triton.language" in v.__name__
        )
        if modules not in scopes:
            scopes[modules] = original(fn)
        return Everything()

    interpreter._patch_lang = patch


def _bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
