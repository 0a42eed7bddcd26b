"""Does the GPU path work, and how fast is it? One run on a machine with a GPU, in under eight minutes.

    python -m benchmarks.gpu [--device cuda:0] [--only PART,...] [--minutes 8]
    python -m benchmarks.gpu --interpret        the checks alone, tiny, on a CPU (Triton's interpreter, a pretended GPU)

Needs no network and no checkpoint. Each part is guarded: one that fails says so, and the others go on. The parts:
    kernels   products, experts and attention against float64 or the torch reference
    engine    mimo-mini on the GPU against the CPU, with all, half and none of its experts there
    copies    host to device in one piece, and page by page on a stream of its own; the GPU's own memory
    products  packed products and experts of V2-Flash's widths over the bytes that they read; bitsandbytes beside them
    attention steps and prompts of V2-Flash's heads
    resident  V2-Flash's widths, as many layers as fit with every expert on the GPU: decode against the memory's bound
    whole     all 48 layers, experts on the GPU, in RAM and in a file in memory: prefill, decode, tiers, bounds
The last line is JSON. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.report import write_result
from localmimo.errors import NoDevice
from localmimo.hardware.device import Device, find_device
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes
from localmimo.model.config import ModelConfig
from quant import gpu
from quant.formats.codec import codec
from quant.formats.page import PageLayout
from quant.formats.qtensor import DTYPES, QTensor

Tensor = torch.Tensor
Facts = dict[str, Any]
HIDDEN, INNER, TOP_K = 4096, 2048, 8
BIG = 1 << 30
FORMATS = gpu.FORMATS


class Bench:
    """One device, and a clock that knows it."""

    def __init__(self, device: Device, deadline_s: float, *, interpret: bool) -> None:
        self.facts = device
        self.device = device.torch()
        self.interpret = interpret
        self._deadline = time.perf_counter() + deadline_s
        self.hbm = self.h2d = 0.0  # bytes per second, measured by `copies`

    @property
    def left_s(self) -> float:
        return self._deadline - time.perf_counter()

    def seconds(self, job: Callable[[], object], n: int = 20) -> float:
        """The median of n runs, the device waited for, after two that do not count (kernels are compiled)."""
        took = []
        for _ in range(n + 2):
            torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            job()
            torch.cuda.synchronize(self.device)
            took.append(time.perf_counter() - began)
        return median(took[2:])

    def queued_s(self, job: Callable[[], object], n: int = 50) -> float:
        """Seconds of one of n runs that are given to the device at once: without the host's part where that is less."""
        for _ in range(2):
            job()
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(n):
            job()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / n


# ---- is it right? ----


def kernels(bench: Bench) -> Facts:
    """Relative errors of every kernel."""
    from localmimo.model.attention import Rows, extend_reference, rope_table
    from localmimo.model.config import LayerSpec
    from tests.gpu.pages import random_matrix, random_routing, random_slab, relative, true_rows

    small = bench.interpret
    shape, counts = ((24, 64), (1, 9)) if small else ((4096, 1024), (1, 2, 8, 64, 300))
    errors: Facts = {}
    for name in FORMATS:
        q = random_matrix(name, *shape, seed=1)
        whole = q.dequantize().double()
        for n in counts:
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(n, shape[1]).to(dtype)
                y = gpu.linear(x.to(bench.device), q.to(bench.device))
                assert y is not None
                errors[f"linear {name} {n} {dtype}"] = relative(y, x.double() @ whole.T)
        layout = PageLayout(name, 64, 32) if small else PageLayout(name, 1024, 512)
        slab, slots = random_slab(layout, 3), torch.tensor([-1, 2, 0, -1, 1, -1], dtype=torch.int32)
        for n in (2, 9) if small else (1, 8, 40):
            chosen, weights = random_routing(n, 3, 6, seed=n)
            x = torch.randn(n, layout.hidden).bfloat16()
            there = _there(bench, slab, slots, chosen, weights)
            rows = gpu.experts(x.to(bench.device), layout, *there)
            errors[f"experts {name} {n}"] = relative(rows, true_rows(x, layout, slab, slots, chosen, weights))
    specs = [LayerSpec("global", "moe", 4, 1, 192, 128, 64, 5e6, None, True)]
    if not small:
        specs.append(LayerSpec("window", "moe", 64, 8, 192, 128, 64, 1e4, 128, True))
    for spec in specs:
        for kv in (torch.bfloat16, torch.int8):
            n = 3 if small else 200
            extra = 4 if kv == torch.int8 else 0
            caches = [torch.zeros(spec.n_kv_heads, n, d + extra, dtype=kv) for d in (192, 128)]
            joined, tables = (
                torch.randn(n, sum(spec.qkv_rows)).bfloat16(),
                rope_table(torch.arange(n), *spec.rope),
            )
            sink = torch.randn(spec.n_heads)
            wanted = extend_reference(joined.float(), tables, Rows(*caches), 0, spec, sink, 0.7)
            there = _there(bench, joined, *tables, *(torch.zeros_like(cache) for cache in caches))
            got = gpu.attend(
                *there, positions=torch.arange(n, device=bench.device), heads=spec.n_heads, head_dims=(192, 128),
                first=0, window=spec.window,
                sink=sink.to(bench.device), scale=192**-0.5, value_scale=0.7,
            )  # fmt: skip
            errors[f"attention {spec.attention} {kv}"] = relative(got, wanted)
    worst = max(errors, key=errors.__getitem__)
    right = all(
        found < (1e-5 if "float32" in name and "linear" in name else 2e-2) for name, found in errors.items()
    )
    return {"ok": right, "checked": len(errors), "worst": worst, "worst_error": errors[worst]}


def _there(bench: Bench, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(bench.device) for tensor in tensors]


def engine(bench: Bench) -> Facts:
    """The embedded model on the GPU beside the CPU, wherever the experts lie: its likeliest token after each token that
    the CPU said, and how often an answer of its own, with drafts, begins like the CPU's."""
    from localmimo import Sampling, load

    greedy, n = Sampling(temperature=0), 8 if bench.interpret else 48
    prompts = ["Once upon a time, there was a little", "The history of the world is long. " * 40]
    plain: Facts = {"profile": None, "context": 1024, "dtype": "float32"}
    with load(**plain, device="cpu") as one:
        wanted = [one.generate(prompt, max_tokens=n, sampling=greedy).tokens for prompt in prompts]
    out: Facts = {"ok": True}
    with load(**plain, device=str(bench.facts)) as one:
        full = one.plan.vram
    assert full is not None
    for name, share in (("all", 1.0), ("half", 0.5), ("none", 0.0)):
        budget = full.used_bytes - round((1 - share) * full.n_slots) * (full.slots_bytes // full.n_slots)
        with load(**plain, device=str(bench.facts), vram=budget) as one:
            same = sum(sum(_followed(one, *pair)) for pair in zip(prompts, wanted, strict=True))
            own = one.generate(prompts[0], max_tokens=n, sampling=greedy).tokens
            counters = one.counters
            out[name] = {
                "same": same, "of": sum(map(len, wanted)), "own_answer_same": own == wanted[0],
                "gpu_slots": one.plan.gpu_slots, "pinned": one.effective()["pinned"],
                "gpu_pages": counters.gpu_pages, "ram_pages": counters.ram_pages, "disk_pages": counters.disk_pages,
            }  # fmt: skip
        out["ok"] &= same >= 0.95 * out[name]["of"]
    return out


def _followed(engine: Any, prompt: str, tokens: list[int]) -> Iterator[bool]:
    """Whether each token is the likeliest after those before it."""
    with engine.session() as session:
        logits = session.sync(engine.encode(prompt))
        for token in tokens:
            yield int(logits.argmax()) == token
            logits = session.step(token)


# ---- how fast is it? ----


def copies(bench: Bench) -> Facts:
    """Bytes per second: pinned host to device, pages on a side stream, device to host, the device's own memory."""
    from localmimo.experts.tiers.tiers import GpuTier

    layout = PageLayout("nf4", HIDDEN, INNER)
    here = torch.empty(BIG // 4, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device=bench.device)
    bench.h2d = here.numel() / bench.seconds(lambda: there.copy_(here, non_blocking=True), 5)
    d2h = here.numel() / bench.seconds(lambda: here.copy_(there, non_blocking=True), 5)
    n = here.numel() // layout.bytes
    tier, pages = (
        GpuTier(n, layout.bytes, bench.device),
        here[: n * layout.bytes].view(n, layout.bytes).unbind(),
    )

    def fill() -> None:
        for slot, page in enumerate(pages):
            tier.fill(slot, page)
        tier.settle()

    paged = n * layout.bytes / bench.seconds(fill, 5)
    a = torch.empty(BIG, dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    bench.hbm = 2 * BIG / bench.queued_s(lambda: a.copy_(b), 10)
    return {"h2d": bench.h2d, "d2h": d2h, "pages": paged, "pages_share": paged / bench.h2d, "hbm": bench.hbm}


def _random_q(bench: Bench, name: str, rows: int, cols: int) -> QTensor:
    parts = {}
    for part, spec in codec(name).parts((rows, cols)).items():
        kind = DTYPES[spec.dtype]
        whole = kind in (torch.uint8, torch.int8)
        parts[part] = (
            torch.randint(0, 120, spec.shape, dtype=kind, device=bench.device)
            if whole
            else torch.full(spec.shape, 0.01, dtype=kind, device=bench.device)
        )
    return QTensor(name, (rows, cols), parts)


def products(bench: Bench) -> Facts:
    """Bytes of weights per second, as a share of the memory's speed, cycling through more than the caches hold."""
    out: Facts = {}
    for name in ("nf4", "int8"):
        pool = [_random_q(bench, name, 16384, HIDDEN) for _ in range(8)]
        for n in (1, 2, 4, 64, 256, 1024):
            x, turn = torch.randn(n, HIDDEN, device=bench.device).bfloat16(), iter(range(1 << 30))
            took = bench.queued_s(lambda x=x, pool=pool, turn=turn: gpu.linear(x, pool[next(turn) % 8]))
            out[f"linear {name} {n}"] = {"us": 1e6 * took, "of_hbm": pool[0].nbytes / took / bench.hbm}
            for way, unpacked in (("tiles", False), ("unpacked", True)) if n > 2 else ():
                took = bench.queued_s(
                    lambda x=x, pool=pool, turn=turn, u=unpacked: gpu.product(
                        x, pool[next(turn) % 8], unpacked=u
                    )
                )
                out[f"linear {name} {n}"][f"{way}_us"] = 1e6 * took
    layout = PageLayout("nf4", HIDDEN, INNER)
    slab = torch.randint(0, 120, (64, layout.bytes), dtype=torch.uint8, device=bench.device)
    slots = torch.arange(64, dtype=torch.int32, device=bench.device)
    for n in (1, 4, 8):
        routes = [
            (torch.stack([torch.randperm(64, device=bench.device)[:TOP_K].sort().values for _ in range(n)]),
             torch.rand(n, TOP_K, device=bench.device)) for _ in range(16)
        ]  # fmt: skip
        x, turn = torch.randn(n, HIDDEN, device=bench.device).bfloat16(), iter(range(1 << 30))
        took = bench.queued_s(
            lambda x=x, r=routes, t=turn: gpu.experts(x, layout, slab, slots, *r[next(t) % 16])
        )
        different = sum(len(chosen.unique()) for chosen, _ in routes) / 16
        out[f"experts {n}"] = {"us": 1e6 * took, "of_hbm": different * layout.bytes / took / bench.hbm}
    try:
        return out | _bitsandbytes(bench)
    except Exception as error:  # not installed, or without a library for this CUDA
        return out | {"bitsandbytes": f"{type(error).__name__}: {error}"}


def _bitsandbytes(bench: Bench) -> Facts:
    """The same matrix by bitsandbytes, where it is installed: NF4 with blocks of 64."""
    import bitsandbytes.functional as bnb

    out: Facts = {}
    plain = (torch.randn(16384, HIDDEN, device=bench.device).bfloat16() for _ in range(8))
    made = [bnb.quantize_4bit(matrix, quant_type="nf4") for matrix in plain]
    n_bytes = made[0][0].numel() + 4 * made[0][1].absmax.numel()
    from bitsandbytes import matmul_4bit

    for n in (1, 4, 64, 1024):
        x, turn = torch.randn(n, HIDDEN, device=bench.device).bfloat16(), iter(range(1 << 30))

        def run(x: Tensor = x, turn: Iterator[int] = turn) -> Tensor:
            packed, state = made[next(turn) % 8]
            return matmul_4bit(x, packed.t(), quant_state=state)

        took = bench.queued_s(run)
        out[f"bitsandbytes {n}"] = {"us": 1e6 * took, "of_hbm": n_bytes / took / bench.hbm}
    return out


def attention(bench: Bench) -> Facts:
    """A global layer of V2-Flash: bytes of keys and values per second for a step, products per second for a prompt."""
    out: Facts = {}
    for kv, bits in ((torch.bfloat16, "bf16"), (torch.int8, "int8")):
        extra = 4 if kv == torch.int8 else 0
        for n, depth in ((1, 8192), (1, 262_000), (4, 32_000), (1024, 8192)):
            caches = [torch.zeros(4, depth + n, d + extra, dtype=kv, device=bench.device) for d in (192, 128)]
            positions = torch.arange(depth, depth + n, device=bench.device)
            joined = torch.randn(n, 64 * 192 + 4 * 320, device=bench.device).bfloat16()
            tables = [torch.ones(n, 32, device=bench.device) for _ in range(2)]

            def run(
                joined: Tensor = joined, tables: Any = tables, caches: Any = caches, at: Tensor = positions
            ) -> Tensor:
                return gpu.attend(
                    joined, *tables, *caches, positions=at, heads=64, head_dims=(192, 128), first=0, window=None,
                    sink=None, scale=192**-0.5, value_scale=0.7,
                )  # fmt: skip

            took = bench.queued_s(run, 20)
            n_bytes = sum(cache.nbytes for cache in caches)
            flops = 2 * n * (depth + n / 2) * 64 * 320
            out[f"{bits} {n} at {depth}"] = {
                "us": 1e6 * took, "of_hbm": n_bytes / took / bench.hbm, "tflops": flops / took / 1e12
            }  # fmt: skip
    return out


def _config(bench: Bench, n_layers: int | None = None) -> ModelConfig:
    from localmimo.mini import CHECKPOINT
    from localmimo.model.members import find_member

    if bench.interpret:
        return ModelConfig.parse(json.loads((CHECKPOINT / "config.json").read_text()), None)
    member = find_member("mimo-v2-flash")
    assert member is not None
    config = ModelConfig.parse(member.config, None)
    return config if n_layers is None else replace(config, layers=config.layers[:n_layers])


def _run(bench: Bench, config: ModelConfig, ram: int, prompt: int, steps: int) -> Facts:
    """Prefill and decode of one model with random weights, and what bounds them."""
    from benchmarks.random_engine import opened
    from localmimo.hardware.bandwidth import measure_ram

    machine = Machine.probe()
    free = find_device(str(bench.facts)).automatic_bytes
    began = time.perf_counter()
    if not bench.interpret:
        torch.cuda.reset_peak_memory_stats(bench.device)
    with opened(config, bench.device, vram=free, ram=ram, context=prompt + 8 * steps) as model:
        made_s = time.perf_counter() - began
        model.prefill(min(512, prompt))  # compiles
        prefill_s = model.prefill(prompt)
        model.decode(steps)
        before, took = model.store.counters.copy(), model.decode(steps)
        seen = model.store.counters.copy().since(before)
        dense, experts = model.token_bytes
        n_passed = model.plan.n_pages - model.plan.gpu_slots  # over the bus, once per stretch of the prompt
        moved = n_passed * model.layout.bytes * -(-prompt // model.plan.stretch_tokens)
        there = seen.gpu_pages / max(1, seen.n_pages)
        token_s = median(took)
        recorded = model.graphs.refused or "on"
        model.graphs.refused = "for comparison"
        plain_s = median(model.decode(steps))
        out: Facts = {
            "layers": len(config.layers), "made_s": made_s, "plan": str(model.plan), "gpu_slots": model.plan.gpu_slots,
            "ram_slots": model.plan.n_slots, "prefill_tps": prompt / prefill_s, "prompt": prompt,
            "prefill_pages_bps": moved / prefill_s,
            "decode_tps": 1 / token_s, "graphs": recorded, "decode_tps_without_graphs": 1 / plain_s,
            "token_bytes": dense + experts,
            "pages": {"gpu": seen.gpu_pages, "ram": seen.ram_pages, "disk": seen.disk_pages},
        }  # fmt: skip
        if bench.hbm:
            ram_bps = measure_ram(machine.n_cores)
            gpu_s, cpu_s = (dense + there * experts) / bench.hbm, (1 - there) * experts / ram_bps
            out |= {
                "bound_tps": 1 / max(gpu_s, cpu_s),
                "of_bound": max(gpu_s, cpu_s) / token_s,
                "ram_bps": ram_bps,
            }
            out |= {"prefill_of_h2d": out["prefill_pages_bps"] / bench.h2d}
            out["peak_vram"] = torch.cuda.max_memory_allocated(bench.device)
    return out


def resident(bench: Bench) -> Facts:
    """As many layers as fit with all their experts on the GPU."""
    page = PageLayout("nf4", HIDDEN, INNER).bytes
    n = max(2, min(48, int((bench.facts.free_bytes - 11 * BIG) // (256 * page)) + 1))
    return _run(bench, _config(bench, n), 8 * BIG, 2048, 48)


def whole(bench: Bench) -> Facts:
    """All layers, over both budgets."""
    if bench.interpret:
        return _run(bench, _config(bench), 100 << 20, 24, 2)
    ram = Machine.probe().automatic_ram_bytes - 6 * BIG  # the pages' file lies in memory too
    return _run(bench, _config(bench), ram, 8192, 32)


# ---- the run ----

PARTS: dict[str, Callable[[Bench], Facts]] = {
    "kernels": kernels, "engine": engine, "copies": copies, "products": products, "attention": attention,
    "resident": resident, "whole": whole,
}  # fmt: skip
CHECKS = ("kernels", "engine", "whole")  # what --interpret runs
# Held against the speeds that `copies` measures.
AGAINST_COPIES = ("products", "attention", "resident", "whole")
MIN_S = {"resident": 60, "whole": 150}  # a part is left out where less is left


def carry_out(bench: Bench, names: list[str]) -> dict[str, Facts]:
    """Run the parts; each shows its figures as soon as it is done."""
    found: dict[str, Facts] = {}
    for name in names:
        began = time.perf_counter()
        if bench.left_s < MIN_S.get(name, 5):
            found[name] = {"left_out": f"{bench.left_s:.0f} s were left"}
        else:
            try:
                if name in AGAINST_COPIES and not bench.hbm and not bench.interpret:
                    copies(bench)
                with simulated(bench, name):
                    found[name] = PARTS[name](bench)
            except Exception as error:  # the other parts are worth having
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            if not bench.interpret:
                torch.cuda.empty_cache()
        found[name]["seconds"] = round(time.perf_counter() - began, 1)
        show(name, found[name])
    return found


@contextmanager
def simulated(bench: Bench, name: str) -> Iterator[None]:
    """With --interpret, the engine's parts find a pretended GPU; the kernels run on the CPU's tensors."""
    with ExitStack() as stack:
        if bench.interpret and name != "kernels":
            from tests.gpu import pretended

            bench.device = stack.enter_context(pretended.device())
        yield


def show(part: str, facts: Facts, indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, dict):
            shown = " · ".join(f"{k} {_figure(k, v)}" for k, v in value.items())
        else:
            shown = _figure(key, value)
        print(f"{indent}{part:<10} {key:<24} {shown}", flush=True)


def _figure(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name in ("h2d", "d2h", "pages", "hbm") or name.endswith("_bps"):
        return f"{format_bytes(value)}/s"
    if name.startswith("of_") or name.endswith(("_share", "_of_h2d")):
        return f"{value:.0%}"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--interpret", action="store_true", help="the checks alone, on a CPU")
    asked = parser.parse_args(arguments)
    names = [name for name in (asked.only.split(",") if asked.only else PARTS) if name]
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if asked.interpret:
        from tests.gpu import interpreter

        interpreter.start()
        bench, names = Bench(Device(), 60 * asked.minutes, interpret=True), [n for n in names if n in CHECKS]
        bench.facts = Device("cuda", 0, "pretended")
        bench.device = torch.device("cpu")
    else:
        try:
            device = find_device(asked.device)
        except NoDevice as error:
            print(
                f"There is no GPU to measure. {error} The checks run without one: --interpret.",
                file=sys.stderr,
            )
            return 2
        bench = Bench(device, 60 * asked.minutes, interpret=False)
        print(f"{device.title}, {format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}, "
              f"torch {torch.__version__}")  # fmt: skip
    found = carry_out(bench, names)
    card = {"device": bench.facts.title, "torch": torch.__version__, "cuda": torch.version.cuda}
    ok = all(facts.get("ok", True) and "error" not in facts for facts in found.values())
    write_result("gpu", card | {"interpret": asked.interpret, "ok": ok, "parts": found})
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
