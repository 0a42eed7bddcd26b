"""How fast are the CPU kernels, beside the memory they read and beside other kernels that pip installs?

    python -m benchmarks.kernels [--threads N] [--rounds N] [--only decode,dense,few,rate,versus,batch] [--json]

All candidates take turns, and so does a plain read of memory; figures are medians over the rounds of ratios
taken within a round, because the speed of a shared machine changes by the second. Matrices and pages cycle
through more memory than the caches hold; they, and what the plain read reads, lie in huge pages, as a pack's
do (quant/files/hugepages.py). The last line is JSON:
    read_gbps            the memory read with the same threads
    decode_fraction      packed bytes per second of a layer's experts (hidden 4096, inner 2048, 8 of many,
                         nf4, one token) as a part of read_gbps
    dense_fraction       the same for a packed matrix [16384 x 4096], by format
    versus               our time / theirs for one token, by their name (below 1: we are faster)
    versus_4_tokens      the same for four tokens
    few                  tokens -> time of a matrix [8192 x 4096] and of 8 experts over that for one token
    rate                 tokens -> 10^9 multiplications a second in an nf4 matrix that the caches hold
    batch                tokens per expert -> our rate / the rate of torch's bf16 matmuls of the same shapes
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod

import torch

from benchmarks.other_kernels import Rival, expert_rivals, matrix_rivals
from benchmarks.report import write_result
from quant import kernels
from quant.files.hugepages import allocate
from quant.formats.codec import codec
from quant.formats.page import PageLayout
from quant.formats.qtensor import DTYPES, QTensor

HIDDEN, INNER, TOP_K = 4096, 2048, 8
POOL_BYTES = 256 << 20  # what each candidate cycles through
PAUSE_S = 0.02
Run = Callable[[], object]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """Something to be timed; `nbytes` is what one run reads."""

    run: Run
    nbytes: int = 0


def filled(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Codes of any value and scales that keep results finite."""
    out = allocate(prod(shape) * DTYPES[dtype].itemsize).view(DTYPES[dtype]).view(shape)
    match dtype:
        case "u8":
            return out.random_(40, 64)
        case "i8":
            return out.random_(-127, 128)
    return out.copy_(torch.rand(shape).mul_(0.01))


def random_matrix(format: str, rows: int, cols: int) -> QTensor:
    parts = {name: filled(spec.shape, spec.dtype) for name, spec in codec(format).parts((rows, cols)).items()}
    return QTensor(format, (rows, cols), parts)


def matrices(format: str, rows: int, cols: int) -> Iterator[QTensor]:
    """An endless tour of equal matrices, more than the caches hold."""
    first = random_matrix(format, rows, cols)
    n = max(2, POOL_BYTES // first.nbytes)
    return cycle([first, *(random_matrix(format, rows, cols) for _ in range(n - 1))])


def dense_case(tour: Iterator[QTensor], n: int = 1) -> Case:
    """One matrix of the tour for n tokens. Cases to be compared share a tour: memory differs in speed, too."""
    first = next(tour)
    x = torch.randn(n, first.shape[1])
    return Case(lambda: kernels.linear(x, next(tour)), first.nbytes)


def expert_case(slab: torch.Tensor, experts: int, tokens: int = 1) -> Case:
    """`experts` experts of a layer, each for the same `tokens` tokens; the nf4 pages tour the slab."""
    layout = PageLayout("nf4", HIDDEN, INNER)
    x, out = torch.randn(tokens, HIDDEN), torch.zeros(tokens, HIDDEN)
    tour = cycle(range(slab.shape[0]))
    every, weights = [torch.arange(tokens)] * experts, [torch.full((tokens,), 0.1)] * experts

    def run() -> None:
        kernels.experts(x, layout, [slab[next(tour)] for _ in range(experts)], every, weights, out)

    return Case(run, experts * layout.bytes)


def read_case() -> Case:
    data = allocate(POOL_BYTES).fill_(1)
    return Case(lambda: kernels.read_all(data), POOL_BYTES)


clock = time.perf_counter


def measure(cases: dict[str, Case], rounds: int, repeat: int = 1, pause_s: float = 0.0) -> Times:
    """Seconds of each case in each round, the mean of `repeat` runs; one untimed round first. Each round begins with
    another case.

    OpenMP's threads, which most rivals use, go on spinning for milliseconds after their work and would take
    the cores from whoever comes next: the pause lets them fall asleep.
    """
    times: Times = {name: [] for name in cases}
    order = deque(cases.items())
    for round_ in range(-1, rounds):
        order.rotate(1)
        for name, case in order:
            time.sleep(pause_s)
            start = clock()
            for _ in range(repeat):
                case.run()
            if round_ >= 0:
                times[name].append((clock() - start) / repeat)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def fraction_of_read(times: Times, cases: dict[str, Case], name: str) -> float:
    """Bytes per second of a case / bytes per second of the plain read."""
    return cases[name].nbytes / cases["read"].nbytes / ratio(times[name], times["read"])


def gbps(times: Times, cases: dict[str, Case], name: str) -> float:
    return cases[name].nbytes / statistics.median(times[name]) / 1e9


def page_slab() -> torch.Tensor:
    n_bytes = PageLayout("nf4", HIDDEN, INNER).bytes
    return filled((max(2 * TOP_K, POOL_BYTES // n_bytes), n_bytes), "u8")


def measure_decode(rounds: int) -> dict[str, object]:
    cases = {"read": read_case(), "experts": expert_case(page_slab(), TOP_K)}
    times = measure(cases, rounds)
    say(f"read {gbps(times, cases, 'read'):.1f} GB/s, experts {gbps(times, cases, 'experts'):.1f} GB/s")
    return {
        "read_gbps": gbps(times, cases, "read"),
        "expert_gbps": gbps(times, cases, "experts"),
        "decode_fraction": fraction_of_read(times, cases, "experts"),
    }


def measure_dense(rounds: int) -> dict[str, object]:
    cases = {"read": read_case()} | {f: dense_case(matrices(f, 16384, HIDDEN)) for f in ("nf4", "int8")}
    times = measure(cases, rounds)
    by_format = {f: fraction_of_read(times, cases, f) for f in ("nf4", "int8")}
    say(f"one matrix [16384 x 4096]: {by_format} of the read speed")
    return {"dense_fraction": min(by_format.values()), "dense_fraction_by_format": by_format}


def measure_versus(rounds: int, tokens: int) -> dict[str, float]:
    """Our nf4 matrix [4096 x 4096] beside theirs, and our experts beside theirs."""
    out: dict[str, float] = {}
    sets: list[tuple[str, Case, Iterator[Rival]]] = [
        (
            "matrix",
            dense_case(matrices("nf4", HIDDEN, HIDDEN), tokens),
            matrix_rivals(HIDDEN, HIDDEN, tokens, POOL_BYTES),
        ),
        (
            "experts",
            expert_case(page_slab(), TOP_K, tokens),
            expert_rivals(HIDDEN, INNER, 4 * TOP_K, TOP_K, tokens),
        ),
    ]
    for what, ours, rivals in sets:
        repeat = 16 if what == "matrix" else 2
        for rival in rivals:
            times = measure({"ours": ours, "theirs": Case(rival.run)}, rounds, repeat, PAUSE_S)
            out[rival.name] = ratio(times["ours"], times["theirs"])
            mine, other = (statistics.median(times[name]) * 1e3 for name in ("ours", "theirs"))
            say(f"{tokens} token(s): {mine:.2f} ms, {rival.name} ({rival.bits:.2f} bits) {other:.2f} ms")
    return out


def bf16_experts(tokens: int, experts: int) -> Case:
    """The three matmuls of each expert with unpacked bf16 weights, without SiLU and sum."""
    weights = [
        [torch.randn(*shape).bfloat16() for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))]
        for _ in range(experts)
    ]
    x, h = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, INNER).bfloat16()

    def run() -> None:
        for gate, up, down in weights:
            torch.nn.functional.linear(x, gate)
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(h, down)

    return Case(run)


def measure_few(rounds: int) -> dict[str, dict[str, float]]:
    """What the few tokens of a draft cost, by what is computed."""
    counts, out = (1, 2, 3, 4, 8), {}
    kinds: dict[str, Callable[[int], Case]] = {
        "nf4": partial(dense_case, matrices("nf4", 8192, HIDDEN)),
        "int8": partial(dense_case, matrices("int8", 8192, HIDDEN)),
        "experts": partial(expert_case, page_slab(), TOP_K),
    }
    for kind, make in kinds.items():
        times = measure({str(n): make(n) for n in counts}, rounds)
        out[kind] = {str(n): ratio(times[str(n)], times["1"]) for n in counts}
        say(f"{kind}: " + ", ".join(f"{n} tokens {value:.2f}" for n, value in out[kind].items()))
    return out


def measure_rate(rounds: int) -> dict[str, float]:
    """Multiplications of a second in a matrix that the caches hold: the best of many short runs, in 10^9."""
    out = {}
    for n in (1, 2, 4, 8, 16, 32, 64, 192):
        q, x = random_matrix("nf4", 512, HIDDEN), torch.randn(n, HIDDEN)
        times = measure({"ours": Case(partial(kernels.linear, x, q))}, 40 * rounds)
        out[str(n)] = q.shape[0] * q.shape[1] * n / min(times["ours"]) / 1e9
        say(f"{n} tokens: {out[str(n)]:.0f} x 10^9 multiplications a second")
    return out


def measure_batch(rounds: int) -> dict[str, float]:
    out = {}
    slab = page_slab()
    for tokens, experts in ((16, 4), (64, 4), (512, 2)):
        cases = {"ours": expert_case(slab, experts, tokens), "theirs": bf16_experts(tokens, experts)}
        times = measure(cases, max(3, rounds // 4), pause_s=PAUSE_S)
        out[str(tokens)] = ratio(times["theirs"], times["ours"])
        say(f"{tokens} tokens per expert: {out[str(tokens)]:.2f} of the rate of torch's bf16 matmuls")
    return out


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU kernels.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="decode,dense,few,rate,versus,batch")
    parser.add_argument("--isa", default=None, help="force an instruction set")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, its processor time: for a machine that others use meanwhile",
    )
    args = parser.parse_args()
    if args.cpu_time:
        args.threads, globals()["clock"] = 1, time.process_time
    torch.set_num_threads(args.threads)
    kernels.set_threads(args.threads)
    kernels.force(args.isa)
    if args.json:
        globals()["say"] = lambda line: None
    result: dict[str, object] = {"isa": kernels.isa(), "threads": args.threads, "rounds": args.rounds}
    result["clock"] = "cpu" if args.cpu_time else "wall"
    parts = args.only.split(",")
    if "decode" in parts:
        result |= measure_decode(args.rounds)
    if "dense" in parts:
        result |= measure_dense(args.rounds)
    if "versus" in parts:
        result["versus"] = measure_versus(args.rounds, 1)
        result["versus_4_tokens"] = measure_versus(max(3, args.rounds // 4), 4)
    if "few" in parts:
        result["few"] = measure_few(max(3, args.rounds // 2))
    if "rate" in parts:
        result["rate"] = measure_rate(args.rounds)
    if "batch" in parts:
        result["batch"] = measure_batch(args.rounds)
    write_result("kernels", result)


if __name__ == "__main__":
    main()
