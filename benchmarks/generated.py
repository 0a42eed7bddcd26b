"""Checkpoints that nobody has: tensors made up when they are read, and a hub on loopback that serves them.

Every stored tensor of a config.json is described by `quant.checkpoint.published`; its bytes are pseudo-random, the same
each time, FP8 codes as of a Gaussian. `serving` gives such a checkpoint out file by file over loopback, so that
`localmimo quantize --discard-source` converts what would not fit on this disk.
"""

import json
import re
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from localmimo.mini import CHECKPOINT
from quant.checkpoint.published import PublishedTensor, published_tensors
from quant.files.safetensors import DTYPE_NAMES, ShardPlan, plan_shard
from quant.formats.codec import PartSpec

POOL_BYTES = 32 << 20
PIECE_BYTES = 8 << 20  # sent at a time
EXPERTS_PER_FILE = 64
REPOSITORY = "generated/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.")
LAYER = re.compile(r"(model\.(?:mtp\.)?layers\.\d+)\.")


class Pools:
    """Pseudo-random bytes for each kind of tensor; where a tensor begins in its pool depends on its name."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        draw = torch.randn(POOL_BYTES // 4, generator=random)
        codes = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=random)
        self._pools = {
            "F8_E4M3": (draw * 100).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
            "U8": codes,
            "BF16": (draw * 0.02).bfloat16().view(torch.uint8),
            "F32": (draw.abs() * 1e-3 + 1e-4).view(torch.uint8),
        }
        self._exponents = (codes & 3) + 118

    def take(self, name: str, dtype: str, first: int, nbytes: int) -> torch.Tensor:
        """nbytes of a tensor from its byte `first` on."""
        pool = self._exponents if name.endswith("weight_scale") else self._pools[dtype]
        phase = (zlib.crc32(name.encode()) // 64 * 64 + first) % len(pool)
        out = torch.empty(nbytes, dtype=torch.uint8)
        done = 0
        while done < nbytes:
            n = min(nbytes - done, len(pool) - phase)
            out[done : done + n] = pool[phase : phase + n]
            done, phase = done + n, 0
        return out


def first_layers(config: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The same model with its first n layers alone."""
    cut = {key: config[key][:n] for key in ("hybrid_layer_pattern", "moe_layer_freq")}
    return {**config, **cut, "num_hidden_layers": n}


@dataclass(frozen=True)
class Served:
    """A safetensors file that exists when it is asked for."""

    plan: ShardPlan
    tensors: Mapping[str, PublishedTensor]
    pools: Pools

    def __len__(self) -> int:
        return self.plan.n_bytes

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Its bytes from start to stop, in pieces."""
        if start < len(self.plan.header):
            yield self.plan.header[start:stop]
        for name, offset in self.plan.offsets.items():
            tensor = self.tensors[name]
            first, end = max(start, offset), min(stop, offset + tensor.nbytes)
            for at in range(first, end, PIECE_BYTES):
                n = min(PIECE_BYTES, end - at)
                yield self.pools.take(name, tensor.dtype, at - offset, n).numpy().tobytes()


@dataclass(frozen=True)
class Plain:
    """A small file."""

    content: bytes

    def __len__(self) -> int:
        return len(self.content)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        yield self.content[start:stop]


def checkpoint_files(config: Mapping[str, Any]) -> dict[str, Served | Plain]:
    """The files of a checkpoint with this config.json; the tokenizer is the embedded model's."""
    by_file: dict[str, dict[str, PublishedTensor]] = {}
    for tensor in published_tensors(config):
        by_file.setdefault(_file_of(tensor.name), {})[tensor.name] = tensor
    pools, specs = Pools(), {dtype: name for name, dtype in DTYPE_NAMES.items()}
    files: dict[str, Served | Plain] = {
        name: Plain((CHECKPOINT / name).read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    for file, tensors in by_file.items():
        parts = {t.name: PartSpec(specs[t.dtype], t.shape) for t in tensors.values()}
        files[file] = Served(plan_shard(file, parts), tensors, pools)
    weight_map = {name: file for file, tensors in by_file.items() for name in tensors}
    files[INDEX] = Plain(json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    files["config.json"] = Plain(json.dumps(config).encode())
    return files


def _file_of(tensor: str) -> str:
    """Experts by the dozen, the rest by layer."""
    if expert := EXPERT.match(tensor):
        return f"{expert[1]}.experts-{int(expert[2]) // EXPERTS_PER_FILE:02d}.safetensors"
    layer = LAYER.match(tensor)
    return f"{layer[1] if layer else 'model-rest'}.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves generated files as the repository REPOSITORY."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, Served | Plain]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def listing(self) -> dict[str, Any]:
        entries = [{"rfilename": name, "size": len(file)} for name, file in self.files.items()]
        return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": entries, "tags": []}


@contextmanager
def serving(config: Mapping[str, Any]) -> Iterator[Hub]:
    """A hub with a generated checkpoint, for as long as the block lasts."""
    hub = Hub(checkpoint_files(config))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = self.path.partition("?")[0]
        wanted = re.fullmatch(rf"/{REPOSITORY}/resolve/(?:{COMMIT}|main)/([\w.-]+)", path)
        if path.startswith(f"/api/models/{REPOSITORY}"):
            self._send(Plain(json.dumps(self.server.listing()).encode()), "listing", head)
        elif wanted and wanted[1] in self.server.files:
            self._send(self.server.files[wanted[1]], wanted[1], head)
        else:
            self.send_error(404)

    def _send(self, file: Served | Plain, name: str, head: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(len(file), int(asked[2]) + 1) if asked and asked[2] else len(file)
        self.send_response(206 if asked and not head else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(file)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{zlib.crc32(name.encode()):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        for piece in () if head else file.read(start, stop):
            self.wfile.write(piece)
