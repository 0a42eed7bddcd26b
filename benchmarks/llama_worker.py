"""llama.cpp, through llama-cpp-python, as a process that does timed work on demand: a rival's half of a benchmark.

    python benchmarks/llama_worker.py MODEL.gguf THREADS CONTEXT

Reads lines from stdin: `decode DEPTH N` or `prefill N`; answers each with the seconds that it took. Runs in any Python
that has llama-cpp-python; imports nothing of this repository.
"""

import ctypes
import sys
import time

import llama_cpp as lc


class Worker:
    """A model in memory, and its one sequence."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        lc.llama_backend_init()
        lc.llama_log_set(_quiet, ctypes.c_void_p(0))
        self.model = lc.llama_model_load_from_file(file.encode(), lc.llama_model_default_params())
        assert self.model, f"{file} cannot be loaded"
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = lc.llama_init_from_model(self.model, params)
        assert self.context, "no context"
        self.depth = 0

    def eval(self, n: int) -> None:
        """Take n tokens, 512 at a time."""
        for start in range(0, n, 512):
            count = min(512, n - start)
            tokens = (ctypes.c_int32 * count)(*((7 * i + self.depth) % 1000 + 3 for i in range(count)))
            assert lc.llama_decode(self.context, lc.llama_batch_get_one(tokens, count)) == 0
            self.depth += count
        lc.llama_synchronize(self.context)

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        self.depth = 0

    def decode(self, depth: int, n: int) -> float:
        """Seconds for n tokens one by one behind at least `depth` others."""
        if self.depth < depth or self.depth > depth + 512:
            self.clear()
            self.eval(max(1, depth))
        began = time.perf_counter()
        for _ in range(n):
            self.eval(1)
        return time.perf_counter() - began

    def prefill(self, n: int) -> float:
        """Seconds for a prompt of n tokens."""
        self.clear()
        began = time.perf_counter()
        self.eval(n)
        return time.perf_counter() - began


@lc.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    worker = Worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(getattr(worker, what)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
