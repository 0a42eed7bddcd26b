"""How fast tokens come: fixed cost, attention, long contexts, drafts, sessions, and a model beside llama.cpp.

    python -m benchmarks.generation [--only fixed,attention,kv,long,needle,drafts,sessions,batch,mid] [--json]
        [--long-pack DIR] [--mid PACK --gguf FILE --rival-python PYTHON]

fixed      a decode step of the embedded model, whose arithmetic is next to nothing, per layer
attention  one token over the global cache: packed bytes per second over the read speed, measured in turns
kv         what keys and values in int8 change in the embedded model's predictions
long       a narrow model with V2-Flash's 48 layers at up to 1,048,576 positions (made at DIR when it is not there)
needle     how often the embedded model finds a word again that its windows do not reach
drafts     the embedded model's draft heads against none (benchmarks.drafts)
sessions   a saved session of 8,192 tokens against reading them again (benchmarks.sessions)
batch      four sequences in a batch against one after the other, on the pack --mid with a third of its experts in RAM
           (benchmarks.batch)
mid        decode and prefill in turns with llama.cpp; PACK and FILE as benchmarks.make_checkpoint and rival_model
           make them of the shape `mid`; PYTHON has llama-cpp-python
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import batch, drafts, sessions
from benchmarks.make_checkpoint import SHAPES, Shape, make_checkpoint
from benchmarks.report import timed, write_result
from localmimo import load
from localmimo.decode.session import Session
from localmimo.engine import Engine
from localmimo.kv.cache import GlobalKV, WindowKV, row_width
from localmimo.mini import CHECKPOINT as MINI
from quant import convert, kernels
from quant.formats.codec import ROW_SCALE_BYTES
from quant.kernels import attention

LONG = Shape(256, 48, 4, 1, 2, 512, 16, 128, 4, 8192)
MILLION = 1 << 20
Figures = dict[str, Any]


def seconds(work: Callable[[], object]) -> float:
    return timed(work)[1]


# ---- fixed cost ----


def fixed() -> Figures:
    """Milliseconds per layer and token of the embedded model behind 200 tokens, all experts resident."""
    with load(context=2048, ram="1GiB", profile=None) as engine, engine.session() as session:
        session.sync(list(range(100, 300)))
        for token in range(100, 150):
            session.step(token)
        rounds = [seconds(lambda: [session.step(t) for t in range(300, 350)]) / 50 for _ in range(12)]
        layers = len(engine.config.layers)
    return {
        "ms_per_layer": 1000 * min(rounds) / layers,
        "median_ms_per_layer": 1000 * statistics.median(rounds) / layers,
        "tokens_per_s": 1 / min(rounds),
    }


# ---- attention over the global cache ----

ATTENTION_BYTES = 768 << 20  # of keys and values: far more than any cache holds
HEADS = {"narrow 4/1": (4, 1), "mid 32/4": (32, 4), "flash 64/4": (64, 4)}


def attention_speed() -> Figures:
    out: Figures = {}
    for name, (heads, kv_heads) in HEADS.items():
        for dtype in (torch.bfloat16, torch.int8):
            out[f"{name} {str(dtype).removeprefix('torch.')}"] = _one_attention(heads, kv_heads, dtype)
    return out


def _one_attention(heads: int, kv_heads: int, dtype: torch.dtype) -> Figures:
    widths = row_width(192, dtype), row_width(128, dtype)
    rows = ATTENTION_BYTES // (kv_heads * sum(widths) * dtype.itemsize)
    keys, values = (_filled(kv_heads, rows, width, dtype) for width in widths)
    joined = torch.randn(1, heads * 192 + kv_heads * 320)
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)

    def attend() -> None:
        attention.attend(
            joined, cos, sin, keys, values, heads=heads, head_dims=(192, 128), position=rows - 1, first=0,
            window=None, sink=None, scale=192**-0.5, value_scale=1.0,
        )  # fmt: skip

    def read() -> None:
        kernels.read_all(keys), kernels.read_all(values)

    attend(), read()
    times = [(seconds(attend), seconds(read)) for _ in range(12)]
    nbytes = keys.nbytes + values.nbytes
    return {
        "positions": rows,
        "share_of_read": statistics.median(ours and read / ours for ours, read in times),
        "gb_per_s": nbytes / min(ours for ours, _ in times) / 1e9,
        "read_gb_per_s": nbytes / min(read for _, read in times) / 1e9,
    }


def _filled(heads: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that repeat 4,096 random ones: drawing them all would take minutes."""
    some = torch.randn(heads, 4096, width) * 0.5
    if dtype == torch.int8:
        some = (some * 60).clamp(-127, 127)
    out = some.to(dtype).repeat(1, -(-rows // 4096), 1)[:, :rows].contiguous()
    if dtype == torch.int8:
        out[..., -ROW_SCALE_BYTES:] = torch.tensor([0.008]).view(torch.int8)
    return out


# ---- int8 keys and values ----


def kv() -> Figures:
    """Predictions on held-out text with keys and values in int8 and bf16, against float32, in windows of 1,024."""
    out: Figures = {}
    with load(context=1024, dtype="float32", profile=None) as engine:
        tokens = engine.encode((MINI.parent / "heldout.txt").read_text())[: 8 * 1024]
        windows = [tokens[i : i + 1024] for i in range(0, len(tokens), 1024)]
        exact = [engine.logits(window).log_softmax(-1) for window in windows]
    for name in ("bf16", "int8"):
        with load(context=1024, kv=name, profile=None) as engine:  # type: ignore[arg-type]
            found = [engine.logits(window).log_softmax(-1) for window in windows]
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, found, strict=True)]
        same = [(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(exact, found, strict=True)]
        out[name] = {"mean_kl": float(torch.cat(kl).mean()), "same_likeliest": float(torch.cat(same).mean())}
    return out


# ---- long contexts ----


def long(folder: Path) -> Figures:
    """Decode at depths up to 1,048,576, a chunk of prompt at depth, and the memory that both take."""
    pack = _pack(folder, LONG)
    out: Figures = {"depths": {}}
    with load(pack, context=MILLION, ram=psutil.virtual_memory().available, profile=None) as engine:
        with engine.session() as session:
            for depth in (1024, 65_536, 262_144, MILLION - 200):
                _jump(engine, session, depth)
                session.step(5)
                before = _rss()
                times = [seconds(lambda: session.step(7)) for _ in range(8)]
                out["depths"][depth] = {"s_per_token": min(times), "grown_bytes": _rss() - before}
            _jump(engine, session, MILLION - 200)
            before = _rss()
            tokens = [*session.tokens, *range(5, 69)]
            out["prompt_64_at_million_s"] = seconds(lambda: session.sync(tokens))
            out["prompt_64_grown_bytes"] = _rss() - before
        n_global = sum(spec.window is None for spec in engine.config.layers)
        spec = engine.config.layers[0]
    row_bytes = n_global * GlobalKV.nbytes(spec, 1)
    near, far = out["depths"][1024]["s_per_token"], out["depths"][MILLION - 200]["s_per_token"]
    out |= {"kv_bytes_per_token": row_bytes, "kv_gb_per_s": row_bytes * (MILLION - 1224) / (far - near) / 1e9}
    return out | {"read_gb_per_s": _read_speed()}


def _pack(folder: Path, shape: Shape) -> Path:
    """A random model of a shape, with a million positions, made where it is not there yet."""
    if not (folder / "pack" / "manifest.json").exists():
        source = make_checkpoint(folder / "hf", shape)
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": MILLION}
        (source / "config.json").write_text(json.dumps(config))
        for _ in convert(source, folder / "pack", experts="nf4", dense="int8"):
            pass
    return folder / "pack"


def _jump(engine: Engine, session: Session, depth: int) -> None:
    """Let the session hold `depth` tokens whose keys and values are random: reading them would take days here."""
    session.rewind(session.position)
    for layer in session._state.cache.layers:
        if isinstance(layer, GlobalKV):
            for tensor in layer.reserve(depth):
                some = torch.randn(tensor.shape[0], 4096, tensor.shape[2], dtype=torch.bfloat16) * 0.5
                for start in range(0, depth, 4096):
                    here = tensor[:, start : start + 4096]
                    here.copy_(some[:, : here.shape[1]])
        else:
            assert isinstance(layer, WindowKV)
            layer.restore(depth, *(part.normal_() for part in layer.empty(min(depth, layer.window))))
    session._state.cache.length = depth
    session.tokens[:] = [9] * depth
    session._state.hidden_states.restart(depth)


def _rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _read_speed() -> float:
    block = torch.ones(1 << 30, dtype=torch.uint8)
    return (1 << 30) / min(seconds(lambda: kernels.read_all(block)) for _ in range(5)) / 1e9


# ---- needle ----

WORDS = "river stone apple house green table water night music paper bread horse garden window summer".split()


def needle() -> Figures:
    """A word at the beginning, named again at the end: is it the likeliest of fifteen, and of all tokens?"""
    text = (MINI.parent / "heldout.txt").read_text()
    found: dict[int, list[tuple[bool, bool]]] = {}
    with load(context=1024, profile=None) as engine:
        filler = engine.encode(text)
        firsts = [engine.encode(f" {word}")[0] for word in WORDS]
        assert len(set(firsts)) == len(WORDS)
        for distance in (60, 200, 400):
            tries = [_try(engine, filler, firsts, i, distance) for i in range(60)]
            found[distance] = tries
    return {
        f"distance {d}": {
            "among_15": sum(a for a, _ in t) / len(t),
            "of_all_tokens": sum(b for _, b in t) / len(t),
        }
        for d, t in found.items()
    }


def _try(engine: Engine, filler: list[int], firsts: list[int], i: int, distance: int) -> tuple[bool, bool]:
    word = i % len(WORDS)
    before = engine.encode(f"The secret word is {WORDS[word]}. Remember: the secret word is {WORDS[word]}.\n")
    start = 137 * i % (len(filler) - distance)
    prompt = [*before, *filler[start : start + distance], *engine.encode("\nThe secret word is")]
    logits = engine.logits(prompt)[-1]
    return int(logits[firsts].argmax()) == word, int(logits.argmax()) == firsts[word]


# ---- several sequences ----


def _third(pack: Path) -> str:
    """A budget that holds a third of a pack's experts beside four sequences."""
    with load(pack, context=512, draft=0, max_batch=4, profile=None) as engine:
        plan = engine.plan
        return str(plan.used_bytes - plan.slots_bytes + plan.n_pages // 3 * plan.page_bytes)


# ---- beside llama.cpp ----


class Rival:
    """llama.cpp in a process of its own: see llama_worker.py."""

    def __init__(self, python: str, gguf: Path, threads: int, context: int) -> None:
        worker = str(Path(__file__).with_name("llama_worker.py"))
        self.process = subprocess.Popen(
            [python, worker, str(gguf), str(threads), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready", "llama.cpp does not start"

    def do(self, *what: object) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(*what, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def mid(pack: Path, gguf: Path | None, python: str, tasks: list[str], rounds: int) -> Figures:
    """Tokens per second of both, in turns: decode near the start and at a depth of 4,096, and prompts of 512."""
    rival = None if gguf is None else Rival(python, gguf, kernels.threads(), 6144)
    with load(pack, context=6144, profile=None) as engine, engine.session() as session:
        work: dict[str, tuple[int, Callable[[], float], tuple[object, ...]]] = {
            "decode": (24, lambda: _decode(session, 64, 24), ("decode", 64, 24)),
            "prefill_512": (512, lambda: _prefill(session, 512), ("prefill", 512)),
            "decode_4096": (24, lambda: _decode(session, 4096, 24), ("decode", 4096, 24)),
        }
        out: Figures = {"resident": engine.plan.n_slots / engine.plan.n_pages, "threads": kernels.threads()}
        engine._store.warm(
            [(layer, e) for layer in engine.config.moe_layers for e in range(engine.config.n_experts)]
        )
        engine._store.wait_until_warm()
        for name in tasks:
            n, ours, theirs = work[name]
            ours(), rival.do(*theirs) if rival else None
            times = [(ours(), rival.do(*theirs) if rival else 0.0) for _ in range(rounds)]
            print(name, [(n / a, n / b) for a, b in times if b], file=sys.stderr)
            out[name] = {"ours_tps": n / min(t for t, _ in times)}
            if rival is not None:
                out[name]["llama_cpp_tps"] = n / min(t for _, t in times)
                out[name]["median_ratio"] = statistics.median(b / a for a, b in times)
    if rival is not None:
        rival.close()
    return out


def _decode(session: Session, depth: int, n: int) -> float:
    if not depth <= session.position <= depth + 512:
        session.sync([(7 * i) % 1000 + 3 for i in range(depth)])
    return seconds(lambda: [session.step((11 * i) % 1000 + 3) for i in range(n)])


def _prefill(session: Session, n: int) -> float:
    session.rewind(session.position)
    return seconds(lambda: session.sync([(7 * i) % 1000 + 3 for i in range(n)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="fixed,attention,kv,long,needle")
    parser.add_argument("--long-pack", type=Path, help="where the narrow model is kept between runs")
    parser.add_argument("--mid", type=Path, metavar="PACK")
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--tasks", default="decode,prefill_512,decode_4096", help="of mid")
    parser.add_argument("--rounds", type=int, default=5, help="of mid")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], Figures]] = {
            "fixed": fixed,
            "attention": attention_speed,
            "kv": kv,
            "long": lambda: long(options.long_pack or Path(folder)),
            "needle": needle,
            "drafts": lambda: drafts.measure(None, None, 256, 3),
            "sessions": lambda: sessions.measure(
                str(_pack(Path(folder) / "small", SHAPES["small"])), 8192, None
            ),
            "batch": lambda: batch.measure(str(options.mid), _third(options.mid), 4, 24),
            "mid": lambda: mid(
                options.mid, options.gguf, options.rival_python, options.tasks.split(","), options.rounds
            ),
        }
        found = {}
        for name in options.only.split(","):
            found[name] = parts[name]()
            if not options.json:
                print(name, json.dumps(found[name], indent=2))
    write_result("generation", found)


if __name__ == "__main__":
    main()
