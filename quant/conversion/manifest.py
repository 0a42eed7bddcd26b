"""The small files of a pack: the manifest, the copied files, the model card.

They hold no time, host name or path: two conversions of a checkpoint by the same version give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quant.checkpoint.source import Source
from quant.conversion.listing import Listing, size_text
from quant.formats.distortion import Distortion
from quant.pack.pack import FORMAT, VERSION

PRODUCER = "1.1"  # of the bytes, not of the program: raised when the same input gives other bytes
CARD = "README.md"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

Record = Mapping[str, Any]


def settings_of(source: Source, listing: Listing) -> dict[str, object]:
    """What must be the same for a conversion to be resumed."""
    return {"source": source.fingerprint, "producer": PRODUCER, **listing.recipe.as_dict()}


def settings_in(manifest: Mapping[str, Any]) -> dict[str, object]:
    """The same, of a finished pack."""
    producer, fingerprint = manifest["producer"].get("version"), manifest["source"]["fingerprint"]
    return {"source": fingerprint, "producer": producer, **manifest["recipe"]}


def copied_files(source: Source) -> Iterator[tuple[str, bytes]]:
    """config.json verbatim and the tokenizer's files that exist."""
    yield "config.json", source.config_text
    for name in COPIED:
        file = source.path / name
        if file.is_file():
            yield name, file.read_bytes()


def make_manifest(
    source: Source, listing: Listing, done: Mapping[str, Record], small: Sequence[Record]
) -> bytes:
    """The manifest as JSON text. `done`: journal records of the weight files; `small`: of the other files."""
    records = [*(done[file.name] for file in listing.files), *small]
    page = listing.page
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "producer": {"version": PRODUCER},
        "model": {"name": source.name},
        "source": {"fingerprint": source.fingerprint},
        "recipe": listing.recipe.as_dict(),
        "recipe_hash": listing.recipe.hash,
        "page": {"codec": page.codec, "hidden": page.hidden, "inner": page.inner, "bytes": page.bytes}
        if page
        else None,
        "layers": {
            str(file.layer): {
                "file": file.name,
                "data_offset": file.shard.data_offset,
                "crc32": done[file.name]["crc32"],
                **({"codecs": file.codecs} if page and {*file.codecs} != {page.codec} else {}),
            }
            for file in listing.files
            if file.layer is not None
        },
        "tensors": {
            entry.name: {"codec": entry.codec, "shape": list(entry.shape), "file": entry.file}
            for file in listing.files
            if file.layer is None
            for entry in file.entries
        },
        "files": {r["file"]: {"bytes": r["bytes"], "sha256": r["sha256"]} for r in records},
        "error": group_errors(listing, done),
    }
    return (json.dumps(manifest, indent=1) + "\n").encode()


def group_errors(listing: Listing, done: Mapping[str, Record]) -> dict[str, dict[str, object]]:
    """Group -> relative RMS error, and the worst tensor or expert. Groups kept as stored are left out."""
    totals: dict[str, Distortion] = {}
    worst: dict[str, tuple[float, str]] = {}
    groups = {entry.name: entry.group for entry in listing.entries}
    for file in listing.files:
        for name, (error, norm) in done[file.name]["distortion"].items():
            distortion = Distortion(error, norm)
            group = groups.get(name, "experts")
            totals[group] = totals.get(group, Distortion()) + distortion
            worst[group] = max(worst.get(group, (0.0, "")), (distortion.rms, name))
    return {
        group: {"rms": _round(total.rms), "worst": _round(worst[group][0]), "worst_name": worst[group][1]}
        for group, total in totals.items()
        if total.squared_norm
    }


def _round(value: float) -> float:
    """Four digits: more would show the order of summation, which is not part of a pack's identity."""
    return float(f"{value:.4g}")


def make_card(source: Source, listing: Listing, done: Mapping[str, Record]) -> str:
    """The model card: what this is, how it was made, what it cost in accuracy."""
    errors = group_errors(listing, done)
    lines = [
        f"# {source.name}, packed for localmimo",
        "",
        f"Made from the checkpoint {source.name} (fingerprint {source.fingerprint[:16]}). "
        f"{size_text(listing.total_bytes)} of weights, from {size_text(listing.from_bytes)}. "
        "The licence of the checkpoint applies.",
        "",
        "| group | tensors | stored as | size | relative RMS error | worst |",
        "|---|---:|---|---:|---:|---|",
    ]
    for total in listing.groups:
        error = errors.get(total.group)
        cells = (f"{error['rms']:.4f}", f"{error['worst']:.4f} {error['worst_name']}") if error else ("0", "")
        lines.append(
            f"| {total.group} | {total.n_tensors:,} | {', '.join(total.codecs)} "
            f"| {size_text(total.nbytes)} | {cells[0]} | {cells[1]} |"
        )
    lines += ["", "The error is that of the weights against the checkpoint's own values, not of the answers."]
    lines += ["", *(f"* {note}" for note in listing.notes)]
    return "\n".join(lines).rstrip() + "\n"
