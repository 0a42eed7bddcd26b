"""The house keeps its order: imports point one way, and the light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room imports only rooms of its own line or of lines above it.
QUANT = """errors aside geometry distortion schedule hugepages smallfile
hub
codec
kernels
fourbit eightbit
qtensor
page
gpu
matmul
ffn
shard
pieces
names published
source
recipe listing
pack
manifest packing writer report
conversion"""
LOCALMIMO = """errors home child sandbox toolcall family paired
callpart
files lines marks messages schema
tools
toolfile
config machine device speeds attend sample text template
grammar toolchoice
chat
crossover
blocks kv plan structure saved trail shapes
estimate
model experts.profile experts.prefetch experts.pressure experts.readers experts.traffic
graphs experts.stats experts.recall experts.trace
experts.placement
experts.ages
experts.adaptive
experts.policy
experts.replay
hits
experts.pinning experts.uploads experts.bridge experts.conveyor experts.resident
experts.tiers
experts.slots
experts.guesses experts.gpu
experts.store
experts.pager
experts.run
experts.share
mtp
session
draft
generate
opening options batch answer watched constraint
agent turns prompt conversation
mini
corpus embedded
engine
measure overhead
serve
cli"""


def rows(order: str) -> dict[str, int]:
    return {room: row for row, line in enumerate(order.splitlines()) for room in line.split()}


def rooms(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path, package: str) -> str:
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports anywhere, lazily too; names under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str, order: dict[str, int]) -> str | None:
    """The room of the order that a dotted name (without its package) belongs to."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in order), None)


@pytest.mark.parametrize(("package", "order"), [("quant", QUANT), ("localmimo", LOCALMIMO)])
def test_imports_point_one_way(package: str, order: str) -> None:
    row = rows(order)
    for path in rooms(package):
        here = room(name_of(path, package), row)
        if here is None:
            assert path.name in ("__init__.py", "__main__.py"), f"{path} is in no room: add it to the order"
            continue
        for module in imports(path):
            if module.startswith(f"{package}."):
                there = room(module.removeprefix(f"{package}."), row)
                assert there is None or row[there] <= row[here], f"{path} imports {module}"


def test_quant_never_imports_localmimo() -> None:
    assert not [path for path in rooms("quant") if any(m.split(".")[0] == "localmimo" for m in imports(path))]


def test_only_the_quantize_face_and_the_embedded_model_convert() -> None:
    users = {
        name_of(p, "localmimo")
        for p in rooms("localmimo")
        if {"quant.convert", "quant.conversion.conversion"} & imports(p)
    }
    assert users <= {"cli.quantize", "embedded"}


@pytest.mark.parametrize(
    "module",
    [
        "localmimo",
        "localmimo.cli.app",
        "localmimo.planning.memory",
        "localmimo.chat.stream_parser",
        "quant",
        "quant.conversion.recipe",
    ],
)
def test_light_rooms_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
