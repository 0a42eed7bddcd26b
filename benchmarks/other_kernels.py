"""CPU kernels of other libraries over low-bit weights, as far as they are installed, to compare with.

Each rival gets random weights of its own format and cycles through several copies, so that no cache helps it.
What is not installed, or does not run on this CPU, is left out with a line on stderr.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rival:
    """A named kernel; `run` does one product, or one layer of experts."""

    name: str
    bits: float  # per weight, scales included
    run: Callable[[], object]


def matrix_rivals(rows: int, cols: int, tokens: int, pool_bytes: int) -> Iterator[Rival]:
    """Kernels for one matrix [rows, cols]."""
    for make in (torch_int4, torch_bf16, bitsandbytes_nf4):
        yield from attempt(make, rows, cols, tokens, pool_bytes)
    for kind in ("Q4_0", "Q4_K", "MXFP4"):
        yield from attempt(llama_cpp, rows, cols, tokens, pool_bytes, kind)


def expert_rivals(hidden: int, inner: int, n_experts: int, top_k: int, tokens: int) -> Iterator[Rival]:
    """Kernels for top_k experts of a layer."""
    yield from attempt(kt_kernel, hidden, inner, n_experts, top_k, tokens)


def attempt(make: Callable[..., Rival], *arguments: object) -> Iterator[Rival]:
    try:
        yield make(*arguments)
    except Exception as error:  # a rival that fails in any way is no reason to measure nothing
        print(f"left out: {make.__name__} ({type(error).__name__}: {error})", file=sys.stderr)


def copies(nbytes: int, pool_bytes: int) -> range:
    return range(max(2, pool_bytes // nbytes))


def torch_int4(rows: int, cols: int, tokens: int, pool_bytes: int) -> Rival:
    """torch's packed int4 with groups of 128 and a bf16 scale and zero each: 4.25 bits."""
    group = 128

    def pack() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
        scales = torch.rand(cols // group, rows, 2).bfloat16()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), scales

    tour = cycle([pack() for _ in copies(rows * cols // 2, pool_bytes)])
    x = torch.randn(tokens, cols).bfloat16()

    def run() -> Tensor:
        codes, scales = next(tour)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

    run()
    return Rival("torch int4", 4 + 32 / group, run)


def torch_bf16(rows: int, cols: int, tokens: int, pool_bytes: int) -> Rival:
    tour = cycle([torch.randn(rows, cols).bfloat16() for _ in copies(rows * cols * 2, pool_bytes)])
    x = torch.randn(tokens, cols).bfloat16()
    return Rival("torch bf16", 16, lambda: F.linear(x, next(tour)))


def bitsandbytes_nf4(rows: int, cols: int, tokens: int, pool_bytes: int) -> Rival:
    """bitsandbytes' nf4 with blocks of 64 and float32 maxima: 4.5 bits."""
    import bitsandbytes as bnb

    def pack() -> tuple[Tensor, object]:
        weight = torch.randn(rows, cols).bfloat16()
        return bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    tour = cycle([pack() for _ in copies(rows * cols // 2, pool_bytes // 4)])
    x = torch.randn(tokens, cols).bfloat16()

    def run() -> Tensor:
        packed, state = next(tour)
        return bnb.matmul_4bit(x, packed.t(), state)

    run()
    return Rival("bitsandbytes nf4", 4.5, run)


def kt_kernel(hidden: int, inner: int, n_experts: int, top_k: int, tokens: int) -> Rival:
    """kt-kernel's int4 experts (one scale per row). It quantises bf16 weights itself."""
    from kt_kernel import kt_kernel_ext as ext

    threads = torch.get_num_threads()
    pool = ext.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [threads]
    cpu = ext.CPUInfer(pool)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    gate, up, down = (torch.randn(n_experts, *shape).mul_(0.02).bfloat16() for shape in shapes)
    on_gpu, order = torch.zeros(n_experts, dtype=torch.bool), torch.arange(n_experts)
    config = ext.moe.MOEConfig(n_experts, top_k, hidden, inner, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 32 * ceil(tokens / 32)
    config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
    moe = ext.moe.AMXInt4_MOE(config)
    cpu.submit(moe.load_weights_task(order.data_ptr()))
    cpu.sync()
    x, out = torch.randn(tokens, hidden).bfloat16(), torch.zeros(tokens, hidden).bfloat16()
    weights, n = torch.full((tokens, top_k), 0.1), torch.tensor([tokens], dtype=torch.int32)
    tour = cycle([torch.arange(i, i + top_k).repeat(tokens, 1) for i in range(0, n_experts, top_k)])
    kept = (gate, up, down, on_gpu, order, pool)

    def run() -> object:
        chosen = next(tour)
        task = moe.forward_task(
            n.data_ptr(), top_k, chosen.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), False
        )
        cpu.submit(task)
        cpu.sync()
        return kept

    run()
    if not out.any():
        raise RuntimeError("it computed nothing")
    return Rival("kt-kernel int4 experts", 4 + 32 / hidden, run)


def llama_cpp(rows: int, cols: int, tokens: int, pool_bytes: int, kind: str) -> Rival:
    """llama.cpp's product through the libraries that llama-cpp-python brings, weights repacked where it can."""
    ggml = Ggml(torch.get_num_threads())
    run = ggml.product(kind, rows, cols, tokens, pool_bytes)
    run()
    return Rival(f"llama.cpp {kind}", GGML_TYPES[kind][1], run)


GGML_TYPES = {"Q4_0": (2, 4.5), "Q4_K": (12, 4.5), "MXFP4": (39, 4.25)}  # ggml's number, bits per weight
GGML_F32 = 0
OVERHEAD = 1 << 20  # of a ggml context that holds no data


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SILENT = LogCallback(lambda level, text, data: None)


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """Just enough of ggml's C interface (ggml.h, ggml-backend.h, ggml-cpu.h) for one matrix product."""

    def __init__(self, threads: int) -> None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        self.call("ggml_log_set", SILENT, None)
        self._backend = self.call("ggml_backend_cpu_init")
        self.call("ggml_backend_cpu_set_n_threads", self._backend, ctypes.c_int(threads))

    def call(self, name: str, *arguments: object, result: object = ctypes.c_void_p) -> object:
        """A function of any of the libraries; Python integers are passed as 64-bit ones or pointers."""
        found = next(getattr(lib, name) for lib in self._libraries if hasattr(lib, name))
        found.restype = result
        return found(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))

    def product(self, kind: str, rows: int, cols: int, tokens: int, pool_bytes: int) -> Callable[[], object]:
        number, bits = GGML_TYPES[kind]
        nbytes = int(rows * cols * bits / 8)
        packed = (ctypes.c_char * nbytes)()
        source = torch.randn(rows, cols)
        self.call(
            "ggml_quantize_chunk",
            ctypes.c_int(number),
            source.data_ptr(),
            ctypes.addressof(packed),
            0,
            rows,
            cols,
            0,
        )
        n = len(copies(nbytes, pool_bytes))
        weights = self._context()
        matrices = [self._matrix(weights, number, cols, rows) for _ in range(n)]
        self._allocate(weights, self._packed_buffers())
        for matrix in matrices:
            self.call("ggml_backend_tensor_set", matrix, ctypes.addressof(packed), 0, nbytes)
        work = self._context()
        x = self._matrix(work, GGML_F32, cols, tokens)
        outputs = [self.call("ggml_mul_mat", work, matrix, x) for matrix in matrices]
        graphs = [self.call("ggml_new_graph", work) for _ in matrices]
        for graph, output in zip(graphs, outputs, strict=True):
            self.call("ggml_build_forward_expand", graph, output)
        self._allocate(work, self.call("ggml_backend_get_default_buffer_type", self._backend))
        values = torch.randn(tokens, cols)
        self.call("ggml_backend_tensor_set", x, values.data_ptr(), 0, values.nbytes)
        self._check(graphs[0], outputs[0], values @ source.T)
        tour = cycle(graphs)
        return lambda: self.call("ggml_backend_graph_compute", self._backend, next(tour))

    def _check(self, graph: object, output: object, expected: Tensor) -> None:
        self.call("ggml_backend_graph_compute", self._backend, graph)
        found = torch.empty_like(expected)
        self.call("ggml_backend_tensor_get", output, found.data_ptr(), 0, found.nbytes)
        error = float((found - expected).norm() / expected.norm())
        if not error < 0.3:
            raise RuntimeError(f"its result is {error:.0%} off")

    def _context(self) -> object:
        return self.call("ggml_init", InitParams(64 * OVERHEAD, None, True))

    def _matrix(self, context: object, number: int, cols: int, rows: int) -> object:
        return self.call("ggml_new_tensor_2d", context, ctypes.c_int(number), cols, rows)

    def _allocate(self, context: object, buffers: object) -> None:
        if not self.call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffers):
            raise RuntimeError("ggml has no memory for the weights")

    def _packed_buffers(self) -> object:
        """The kind of buffer in which ggml repacks weights for this CPU (interleaved rows), or the plain one."""
        device = self.call("ggml_backend_get_device", self._backend)
        registry = self.call("ggml_backend_dev_backend_reg", device)
        address = self.call(
            "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
            for buffers in iter_until_null(extra):
                if self.call("ggml_backend_buft_name", buffers, result=ctypes.c_char_p) == b"CPU_REPACK":
                    return buffers
        return self.call("ggml_backend_get_default_buffer_type", self._backend)


def iter_until_null(pointers: object) -> Iterator[int]:
    i = 0
    while pointers[i]:
        yield pointers[i]
        i += 1
