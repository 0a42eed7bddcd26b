"""Imports point one way, no files import each other in a loop, and the light packages stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package imports only itself and those before it.
ORDER = {
    "quant": "errors formats files kernels gpu ops checkpoint pack conversion",
    "localmimo": "errors limits option mini system hardware model kv chat tools experts.policy experts.tiers "
    "experts.store experts.compute planning decode loading agent engine bench serve cli",
}
ENTRY_POINTS = {"quant", "localmimo", "localmimo.__main__"}
MOST_FILES = 8  # directly in localmimo/


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module below a package."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, lazily or for its types too: modules, and names in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports."""
    known = modules(package)
    graph = {}
    for name, path in known.items():
        found = {module for module in imports(path) if module in known and module != name}
        # `from a.b import c` loads a.b.c where c is a module: a.b itself is then only on the way.
        graph[name] = {module for module in found if not any(f.startswith(f"{module}.") for f in found)}
    return graph


def rank(package: str, module: str) -> int:
    """The place of a module's package in the order."""
    rest = module.removeprefix(f"{package}.")
    for place, name in enumerate(ORDER[package].split()):
        if rest == name or rest.startswith(f"{name}."):
            return place
    raise AssertionError(f"{module} is in no package of the order: add it to ORDER")


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, found in import_graph(package).items()
        for imported in found
        if not {module, imported} & ENTRY_POINTS and rank(package, imported) > rank(package, module)
    ]
    assert not wrong


@pytest.mark.parametrize("package", ORDER)
def test_no_files_import_each_other_in_a_loop(package: str) -> None:
    graph = {name: set(found) for name, found in import_graph(package).items()}
    while leaves := {name for name, found in graph.items() if not found & graph.keys()}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert not graph, f"in or behind a loop: {sorted(graph)}"


def test_quant_never_imports_localmimo() -> None:
    assert not [
        path
        for path in modules("quant").values()
        if any(module.split(".")[0] == "localmimo" for module in imports(path))
    ]


def test_only_quantize_and_the_embedded_model_convert() -> None:
    users = {
        name
        for name, path in modules("localmimo").items()
        if {"quant.convert", "quant.conversion.conversion"} & set(imports(path))
    }
    assert users <= {"localmimo.cli.commands.quantize", "localmimo.loading.embedded"}


def test_few_files_lie_directly_in_localmimo() -> None:
    files = [path.name for path in (ROOT / "localmimo").glob("*.py") if not path.name.startswith("__")]
    assert len(files) <= MOST_FILES, files


def test_no_test_module_is_imported() -> None:
    """Helpers are in modules of their own: a test's name may change, and importing it runs all of its file."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports(path)
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert not found


@pytest.mark.parametrize(
    "module",
    [
        "localmimo",
        "localmimo.cli.app",
        "localmimo.limits",
        "localmimo.kv.sizes",
        "localmimo.planning.memory",
        "localmimo.chat.stream_parser",
        "quant",
        "quant.conversion.recipe",
        "quant.conversion.listing",
    ],
)
def test_light_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
