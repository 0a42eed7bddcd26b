"""No foreign code: the sources contain none of the calls that would run what was read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.loads",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "torch.load",
    "torch.jit.load", "torch.package.PackageImporter", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "runpy.run_path", "runpy.run_module", "importlib.import_module", "ctypes.CDLL", "tempfile.mktemp",
    "shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile",
}  # fmt: skip
# file -> calls that it may make
ALLOWED = {
    # the user's own file of tools, named on the command line; it runs in a process of its own
    "localmimo/tools/tool_file.py": {"importlib.util.spec_from_file_location"},
    # names written in the source, imported late
    "localmimo/__init__.py": {"importlib.import_module"},
    "localmimo/decode/grammar.py": {"importlib.import_module"},
    "quant/__init__.py": {"importlib.import_module"},
}
SOURCES = sorted(path for package in ("localmimo", "quant") for path in (ROOT / package).rglob("*.py"))


def found_in(path: Path) -> set[str]:
    """Calls and keywords of one source file that are forbidden."""
    tree = ast.parse(path.read_text())
    names = aliases(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {name for call in calls for name in forbidden_in(call, names)}


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> what was imported under it."""
    out: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            out |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return out


def forbidden_in(call: ast.Call, names: dict[str, str]) -> set[str]:
    first, _, rest = ast.unparse(call.func).partition(".")
    name = names.get(first, first) + (f".{rest}" if rest else "")
    bad = {name} & (FORBIDDEN | {"importlib.util.spec_from_file_location"})
    for keyword in call.keywords:
        value = ast.unparse(keyword.value)
        if (keyword.arg, value) in (
            ("shell", "True"),
            ("allow_pickle", "True"),
            ("trust_remote_code", "True"),
        ):
            bad.add(f"{keyword.arg}={value}")
    if name in ("np.load", "numpy.load") and not any(
        keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "False" for keyword in call.keywords
    ):
        bad.add("numpy.load without allow_pickle=False")
    return bad


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_was_read(path: Path) -> None:
    assert found_in(path) <= ALLOWED.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "import pickle as p\np.loads(x)", "from torch import load\nload(x)", "import torch\ntorch.load(x)",
     "import numpy as np\nnp.load(x)", "f(x, shell=True)", "from os import system as s\ns(x)"],
)  # fmt: skip
def test_the_search_finds_them(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.py").write_text(source)
    assert found_in(tmp_path / "a.py")
