"""The conversion of a whole model, unit by unit, without its files: a generated source, a discarded output.

    python -m benchmarks.whole_model mimo-v2-flash|mimo-v2.5|mimo-v2.5-pro|mimo-v2.6-flash|... [--experts-per-layer 1]

Every stored tensor is listed from the published config.json. Of every unit of the pack it is checked that its parts
tile the file without holes, and of every stored tensor of the text model that it is read exactly once, by the canonical
matrices (except that a scale row may serve K and V). Really converted, from pseudo-random bytes: in every MoE layer the
given number of experts, and the first four million weights of every dense matrix. The time for the whole model is
that of its bytes at the speed of those parts.
"""

import argparse
import bisect
import resource
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.generated import Pools
from benchmarks.report import write_result
from localmimo.model.members import MEMBERS, find_member
from quant import Recipe, Source
from quant.checkpoint.pieces import Matrix
from quant.conversion.listing import FilePlan, Listing, make_listing
from quant.conversion.packing import make_page, pack_bands
from quant.errors import BadCheckpoint
from quant.files.safetensors import Shard
from quant.formats.page import PageLayout
from quant.formats.qtensor import row_bands

HEAD = 1 << 22  # weights of a dense matrix that are really converted


class Generated(Shard):
    """A file of a described checkpoint whose tensors are made up when they are read, the same each time."""

    def __init__(self, described: Shard) -> None:
        self.path, self.error_class, self._fd = described.path, BadCheckpoint, -1
        self.tensors, self.n_bytes, self.digest = described.tensors, described.n_bytes, described.digest
        self._by_offset = sorted(self.tensors.values(), key=lambda t: t.offset)
        self._starts = [t.offset for t in self._by_offset]
        self._pools = Pools()
        self.n_read = 0

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        stored = self._by_offset[bisect.bisect_right(self._starts, offset) - 1]
        assert stored.offset <= offset and offset + nbytes <= stored.offset + stored.nbytes, stored.name
        self.n_read += nbytes
        return self._pools.take(stored.name, stored.dtype, offset - stored.offset, nbytes)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.read(offset, len(view)).numpy().data


def generated_source(name: str) -> tuple[Source, Generated]:
    member = find_member(name)
    if member is None:
        raise SystemExit(f"{name} is none of {', '.join(m.name for m in MEMBERS)}")
    described = Source.described(member.config, member.title)
    (shard,) = described._shards.values()
    made = Generated(shard)
    return Source(described.path, described.config_text, {made.path.name: made}), made


def check_source(source: Source, shard: Generated) -> int:
    """Every stored byte of the text model belongs to exactly one canonical matrix; the number of tensors."""
    rows: dict[str, list[tuple[int, int]]] = {}
    scales: set[str] = set()
    for matrix in source.matrices.values():
        for piece in matrix.pieces:
            span = (piece.first_row, piece.first_row + piece.n_rows)
            rows.setdefault(piece.weight.stored.name, []).append(span)
            scales |= {p.stored.name for p in (piece.grid and piece.grid.scales, piece.exponents) if p}
    for name, spans in rows.items():
        ends = [0, *(stop for _, stop in sorted(spans))]
        assert [start for start, _ in sorted(spans)] == ends[:-1], f"{name} is not read exactly once"
        assert ends[-1] == shard.tensors[name].shape[0], f"{name} is not read to its end"
    n_skipped = sum(source.skipped.values())
    assert len(rows) + len(scales) + n_skipped == len(shard.tensors), "a tensor is neither read nor skipped"
    return len(rows) + len(scales)


def check_file(file: FilePlan) -> None:
    """The parts of a unit tile its file: no hole, no overlap, the size that was announced."""
    if file.layer is None:
        sizes = {name: spec.nbytes for entry in file.entries for name, spec in entry.parts.items()}
    else:
        n_bytes = (file.shard.n_bytes - file.shard.data_offset) // len(file.codecs)
        sizes = dict.fromkeys(file.shard.offsets, n_bytes)
        assert file.shard.data_offset % 4096 == 0 and n_bytes % 4096 == 0
    end = file.shard.data_offset
    for name, offset in sorted(file.shard.offsets.items(), key=lambda item: item[1]):
        assert offset == end, f"{name} of {file.name} leaves a hole"
        end += sizes[name]
    assert end == file.shard.n_bytes, f"{file.name} has another size than was announced"


def convert_expert(source: Source, slot: PageLayout, layer: int, expert: int) -> float:
    """One page, made and read back; its relative error."""
    name = f"layers.{layer}.experts.{expert}"
    buffer, distortion = make_page(source, name, slot)
    page = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)
    gate = slot.expert(page).gate.dequantize()
    stored = source.read(f"{name}.gate").float()
    assert (gate - stored).norm() < 0.2 * stored.norm(), name
    return distortion.rms


def convert_head(matrix: Matrix, chosen: str) -> int:
    """The first band of a dense matrix; its stored weights."""
    first, stop = row_bands((matrix.shape[0], matrix.shape[1]), 128, HEAD)[0]
    band = replace(matrix, shape=(stop - first, matrix.shape[1]), pieces=_cut(matrix, stop))
    for _ in pack_bands(band, chosen):
        pass
    return (stop - first) * matrix.shape[1]


def _cut(matrix: Matrix, n_rows: int) -> tuple[Any, ...]:
    pieces, left = [], n_rows
    for piece in matrix.pieces:
        take = min(left, piece.n_rows)
        if take:
            pieces.append(replace(piece, n_rows=take))
        left -= take
    return tuple(pieces)


def check_model(name: str, n_experts: int, recipe: Recipe) -> dict[str, Any]:
    began = time.perf_counter()
    source, shard = generated_source(name)
    listing: Listing = make_listing(source, recipe)
    facts: dict[str, Any] = {"model": source.name, "tensors": check_source(source, shard)}
    assert listing.page is not None
    converted = pages = weights = 0
    spent, errors = 0.0, []
    for file in listing.files:
        check_file(file)
        for entry in file.entries if file.layer is None else ():
            if len(entry.shape) == 2:
                weights += convert_head(source.matrices[entry.name], entry.codec)
        for k in range(n_experts if file.layer is not None else 0):
            expert = (file.layer * 37 + k * 101) % len(file.codecs)  # type: ignore[operator]
            before, at = shard.n_read, time.perf_counter()
            errors.append(convert_expert(source, listing.page, file.layer, expert))  # type: ignore[arg-type]
            spent += time.perf_counter() - at
            converted += (shard.n_read - before) * 3 // 4  # the gate is read twice: once to compare
            pages += 1
    return facts | {
        "units": len(listing.files),
        "pack_bytes": listing.total_bytes,
        "source_bytes": shard.n_bytes,
        "pages_converted": pages,
        "pages_checked_on_paper": sum(len(f.codecs) for f in listing.files if f.layer is not None),
        "dense_weights_converted": weights,
        "rms_error": sum(errors) / max(1, len(errors)),
        "expert_mb_per_s": converted / max(1e-9, spent) / 1e6,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--experts-per-layer", type=int, default=1)
    parser.add_argument("--experts", default="nf4")
    parser.add_argument("--dense", default="int8")
    options = parser.parse_args()
    facts = check_model(options.model, options.experts_per_layer, Recipe(options.experts, options.dense))
    for key, value in facts.items():
        print(f"{key:24} {value}")
    write_result("whole_model", facts)


if __name__ == "__main__":
    main()
