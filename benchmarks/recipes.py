"""What do more bits for hot experts, or a search weighed by importance, bring? Divergence on the embedded model.

    python -m benchmarks.recipes [--windows 24] [--json]

Calibrates on the first half of mimo-mini's held-out text (how often each expert is chosen; the mean square of each
input channel) and measures on the second half: mean KL divergence in nats from the bf16 pack, agreement of the
likeliest token, and bits per expert weight. Arms: every expert in nf4; in nf4-16; a quarter of each layer's experts
in nf4-16, the hottest ones or the coldest ones; nf4 with scales searched by the error that each input channel's mean
square weighs, per layer and per expert, beside the same search unweighed.
"""

import argparse
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.report import write_result
from localmimo import load
from localmimo.engine import Engine
from localmimo.experts.compute.cpu_runner import grouped
from localmimo.mini import CHECKPOINT, HELD_OUT
from quant import Pack, Recipe, convert
from quant.formats import fourbit
from quant.formats.codec import codec
from quant.formats.page import Expert

Key = tuple[int, int]  # layer, expert
WINDOW = 512


@dataclass
class Use:
    """How an expert was used: tokens, and sums of squares of what its matrices were given."""

    tokens: int
    outer: torch.Tensor  # [hidden], into gate and up
    inner: torch.Tensor  # [inner], into down


class Watcher:
    """Runs experts as the engine's own runner does, and keeps count."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine._experts
        self._pack = engine.pack
        self.uses: dict[Key, Use] = {}

    def run(self, layer: int, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        places, spans = grouped(chosen)
        for expert, (start, stop) in spans.items():
            rows = places[start:stop]
            gate, up, _ = matrices(self._pack, (layer, expert))
            given = x[rows // chosen.shape[1]]
            inner = F.silu(given @ gate.T) * (given @ up.T) * weights.reshape(-1)[rows, None]
            zero = Use(0, torch.zeros(given.shape[1]), torch.zeros(inner.shape[1]))
            use = self.uses.setdefault((layer, expert), zero)
            use.tokens += len(rows)
            use.outer += given.square().sum(0)
            use.inner += inner.square().sum(0)
        return self._runner.run(layer, x, chosen, weights)


def matrices(pack: Pack, key: Key) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    expert = expert_of(pack, key)
    return expert.gate.dequantize(), expert.up.dequantize(), expert.down.dequantize()


def expert_of(pack: Pack, key: Key) -> Expert:
    at = pack.page_at(*key)
    with at.file.open("rb") as file:
        file.seek(at.offset)
        raw = bytearray(file.read(at.nbytes))
    return pack.layouts[at.codec].expert(torch.frombuffer(raw, dtype=torch.uint8))


def keys(pack: Pack) -> Iterator[Key]:
    for layer, facts in pack.manifest["layers"].items():
        yield from ((int(layer), expert) for expert in range(len(facts["crc32"])))


def make(folder: Path, name: str, recipe: Recipe) -> Path:
    for _ in convert(CHECKPOINT, folder / name, recipe=recipe):
        pass
    return folder / name


def ranked(uses: dict[Key, Use], pack: Pack, quarter: Callable[[list[int]], list[int]]) -> Recipe:
    """nf4, and nf4-16 for the quarter of each layer's experts that `quarter` picks from coldest to hottest."""
    rules = []
    for layer in pack.manifest["layers"]:
        mine = [expert for at, expert in keys(pack) if at == int(layer)]
        order = sorted(mine, key=lambda e: uses[int(layer), e].tokens if (int(layer), e) in uses else 0)
        rules += [(f"layers.{layer}.experts.{expert}.*", "nf4-16") for expert in quarter(order)]
    return Recipe("nf4", "int8", tuple(rules))


def search_weighed(
    folder: Path,
    name: str,
    plain: Path,
    full: Pack,
    importance: Callable[[Key], tuple[torch.Tensor, torch.Tensor]],
) -> Path:
    """A copy of the plain nf4 pack whose scales were searched by weighed error."""
    shutil.copytree(plain, folder / name)
    pack = Pack.open(folder / name)
    assert pack.page is not None
    for key in keys(pack):
        outer, inner = importance(key)
        at, page = pack.page_at(*key), bytearray(pack.page_at(*key).nbytes)
        for matrix, weight, weighed in zip(
            ("gate", "up", "down"), matrices(full, key), (outer, outer, inner), strict=True
        ):
            parts = encode_weighed(weight, weighed + 0.05 * weighed.mean())
            for place in (place for place in pack.page.slices if place.matrix == matrix):
                data = parts[place.part].contiguous().view(torch.uint8).numpy().tobytes()
                page[place.offset : place.offset + len(data)] = data
        with at.file.open("r+b") as file:
            file.seek(at.offset)
            file.write(page)
        pack.manifest["layers"][str(key[0])]["crc32"][key[1]] = zlib.crc32(page)
    (folder / name / "manifest.json").write_text(json.dumps(pack.manifest))
    return folder / name


def encode_weighed(weight: torch.Tensor, importance: torch.Tensor) -> dict[str, torch.Tensor]:
    """nf4 of a matrix, each block's scale chosen by the exact error, weighed by column."""
    kind, scale = codec("nf4"), fourbit.tensor_scale("nf4", float(weight.abs().max()))
    blocks = fourbit._to_blocks(kind, weight).div_(scale)
    weighing = fourbit._to_blocks(kind, importance.expand(weight.shape).contiguous())
    largest = blocks.abs().amax(0)
    least, best = torch.full_like(largest, torch.inf), torch.zeros(largest.shape, dtype=torch.int32)
    for candidate in fourbit._nf4_candidates(largest):
        codes, _ = fourbit._nearest(kind, blocks, candidate.to(torch.uint8))
        table = fourbit.book("nf4")
        value = table.values[codes.long()] * table.scale_of_byte[candidate.long()]
        error = ((value - blocks).square() * weighing).sum(0)
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    scales = best.masked_fill_(largest == 0, 0).to(torch.uint8)
    codes, _ = fourbit._nearest(kind, blocks, scales)
    specs = kind.parts((weight.shape[0], weight.shape[1]))
    packed = fourbit._pack(kind, codes, torch.Size(specs["codes"].shape))
    return {"codes": packed, "scales": scales.view(specs["scales"].shape), "scale": torch.tensor([scale])}


def windows(engine: Engine, text: str, most: int) -> list[list[int]]:
    tokens = engine.encode(text)
    return [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW, WINDOW)][:most]


def divergence(path: Path, parts: Sequence[list[int]], truth: Sequence[torch.Tensor]) -> dict[str, float]:
    kl = same = 0.0
    with load(path, context=WINDOW) as engine:
        for tokens, expected in zip(parts, truth, strict=True):
            got = engine.logits(tokens).log_softmax(-1)
            kl += float((expected.exp() * (expected - got)).sum())
            same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        pages = [engine.pack.page_at(*key).nbytes for key in keys(engine.pack)]
        assert engine.pack.page is not None
        weights = 3 * engine.pack.page.hidden * engine.pack.page.inner
    n = sum(map(len, parts))
    return {"mean_kl": kl / n, "top1_agreement": same / n, "bits": 8 * sum(pages) / len(pages) / weights}


def measure(folder: Path, most: int) -> dict[str, dict[str, float]]:
    full, nf4 = make(folder, "bf16", Recipe("bf16", "bf16")), make(folder, "nf4", Recipe())
    text = HELD_OUT.read_text()
    with load(full, context=WINDOW) as engine:
        parts = windows(engine, text[len(text) // 2 :], most)
        truth = [engine.logits(tokens).log_softmax(-1) for tokens in parts]
        watcher = Watcher(engine)
        engine._experts = watcher  # type: ignore[assignment]
        engine._own = None
        for tokens in windows(engine, text[: len(text) // 2], most):
            engine.logits(tokens)
        pack, uses = engine.pack, watcher.uses
        arms = {"nf4": nf4, "nf4-16": make(folder, "nf4-16", Recipe("nf4-16"))}
        arms["hottest quarter nf4-16"] = make(
            folder, "hot", ranked(uses, pack, lambda order: order[-len(order) // 4 :])
        )
        arms["coldest quarter nf4-16"] = make(
            folder, "cold", ranked(uses, pack, lambda order: order[: len(order) // 4])
        )
        for name, importance in importances(uses, pack).items():
            arms[f"nf4, exact search, {name}"] = search_weighed(
                folder, name.replace(" ", "-"), nf4, pack, importance
            )
    return {name: divergence(path, parts, truth) for name, path in arms.items()}


def importances(
    uses: dict[Key, Use], pack: Pack
) -> dict[str, Callable[[Key], tuple[torch.Tensor, torch.Tensor]]]:
    assert pack.page is not None
    hidden, inner = pack.page.hidden, pack.page.inner

    def even(_: Key) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(hidden), torch.ones(inner)

    def by_layer(key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        mine = [use for (layer, _), use in uses.items() if layer == key[0]]
        return sum(use.outer for use in mine), sum(use.inner for use in mine)  # type: ignore[return-value]

    def by_expert(key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        use = uses.get(key)
        return (use.outer, use.inner) if use is not None and use.tokens >= 30 else by_layer(key)

    return {"unweighed": even, "weighed by layer": by_layer, "weighed by expert": by_expert}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, at most")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arms = measure(Path(folder), options.windows)
    if not options.json:
        for name, facts in arms.items():
            print(
                f"{name:36} KL {facts['mean_kl']:.5f}  top-1 {facts['top1_agreement']:.2%}  {facts['bits']:.3f} bits"
            )
    write_result("recipes", arms)


if __name__ == "__main__":
    main()
