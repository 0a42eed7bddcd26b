"""Mutation run: change one expression or statement of a module at a time and see whether its tests fail.

    python -m benchmarks.mutants [module ...] [--seed N] [--limit N] [--jobs N] [--json FILE]

A module is a path or a package below the root, such as `localmimo/chat` or `localmimo/kv/sizes.py`; without one, all
of PURE are taken: the modules that need no torch and whose tests are fast. Each mutant is written into a copy of the
tree, never into the tree itself, and runs only the test files that belong to the module (`tests_of`), in a forked
process with a time limit. The same seed and limit choose the same mutants.

Why not a kept library: mutmut 3 leaves everything outside functions as it is (limits, defaults of dataclasses), needs
one run of the whole suite to learn which test reaches which function, and takes no sample; cosmic-ray writes into the
work tree and has one test command for all modules.

This file knows the layout of the tree and of its tests, nothing of the code that it changes.
"""

import argparse
import ast
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PURE = (
    "localmimo/limits.py",
    "localmimo/system",
    "localmimo/hardware",
    "localmimo/model/config.py",
    "localmimo/model/members.py",
    "localmimo/kv/sizes.py",
    "localmimo/chat",
    "localmimo/tools",
    "localmimo/experts/policy",
    "localmimo/experts/store/prefetch_gate.py",
    "localmimo/experts/store/counters.py",
    "localmimo/planning",
    "localmimo/decode/answer.py",
    "localmimo/decode/options.py",
    "localmimo/serve/queue.py",
    "quant/checkpoint/geometry.py",
    "quant/checkpoint/names.py",
    "quant/checkpoint/pieces.py",
    "quant/conversion/listing.py",
    "quant/conversion/recipe.py",
    "quant/conversion/schedule.py",
    "quant/files",
    "quant/formats/codec.py",
    "quant/formats/page.py",
)

# Path prefix of a module -> tests beside those that `tests_of` finds. The longest prefix is taken.
EXTRA_TESTS = {
    "localmimo/chat/partial_call.py": ("tests/chat/test_stream_parser.py",),
    "localmimo/chat/template_sandbox.py": ("tests/chat/test_template.py",),
    "localmimo/chat/tool_choice.py": ("tests/serve/test_tool_choice.py",),
    "localmimo/decode/answer.py": ("tests/tools", "tests/chat"),
    "localmimo/decode/options.py": ("tests/decode/test_sampler.py", "tests/decode/test_generation.py"),
    "localmimo/experts/policy/promotion.py": ("tests/experts/tiers/test_gpu_slots.py",),
    "localmimo/experts/store/": ("tests/experts/store",),
    "localmimo/hardware/": ("tests/planning", "tests/cli/commands/test_plan.py"),
    "localmimo/kv/": ("tests/kv", "tests/planning"),
    "localmimo/limits.py": ("tests/planning", "tests/cli/commands/test_plan.py"),
    "localmimo/model/": ("tests/model/test_config.py", "tests/model/test_members.py"),
    "localmimo/planning/": ("tests/planning", "tests/cli/commands/test_plan.py"),
    "localmimo/system/": ("tests/hostile/test_nasty_files.py", "tests/hostile/test_full_disk.py"),
    "quant/checkpoint/": ("tests/quant/checkpoint", "tests/quant/conversion/test_real_sizes.py"),
    "quant/files/": ("tests/quant/files", "tests/quant/pack"),
    "quant/formats/": ("tests/quant/formats", "tests/quant/pack"),
}

PRELOADED = ("pytest", "hypothesis", "numpy", "torch", "tokenizers", "jinja2")  # once, not for every mutant
TREE = ("localmimo", "quant", "tests", "benchmarks", "examples")  # packages that come from the copy
MEMORY_BYTES = 12 << 30  # of one mutant: a loop that no longer ends must not take the machine's memory
SWAPS: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}
UNCHANGED_FIELDS = {"annotation", "returns", "decorator_list"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file: the bytes from `start` to `end` become `after`."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    result: str = ""  # killed, timeout, survived


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every change of a file, in the order of its lines, without those that are no valid Python."""
    raw = source.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node, kind, after in changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        mutant = Mutant(path, node.lineno, kind, raw[start:end].decode(), after, start, end)
        with suppress(SyntaxError):
            compile(apply(raw, mutant), path, "exec")
            found[start, end, after] = mutant
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.kind, m.after))


def apply(raw: bytes, mutant: Mutant) -> bytes:
    return raw[: mutant.start] + mutant.after.encode() + raw[mutant.end :]


def changes(tree: ast.AST, inside: str = "") -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """(node, kind, new text) of every change below a node.

    Left alone: annotations, decorators, the text of errors, what only a type checker reads, and f-strings (Python
    3.11 gives wrong positions inside them)."""
    if isinstance(tree, ast.JoinedStr | ast.Raise):
        return
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.FunctionDef):
        inside = tree.name
    if isinstance(tree, ast.stmt):
        yield from statement_changes(tree, inside)
    if isinstance(tree, ast.Slice):
        yield from slice_changes(tree)
    elif isinstance(tree, ast.expr):
        yield from ((tree, kind, f"({ast.unparse(new)})") for kind, new in expression_changes(tree))
    for field, value in ast.iter_fields(tree):
        if field not in UNCHANGED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from changes(child, inside)


def statement_changes(node: ast.stmt, inside: str) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    match node:
        case ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break():
            yield node, "removed", "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
            if inside != "__init__":
                yield node, "removed", "pass"
        case (
            ast.If(test=ast.Name() | ast.Attribute() | ast.Call())
            | ast.While(test=ast.Name() | ast.Attribute() | ast.Call())
        ):
            yield node.test, "negated", f"(not {ast.unparse(node.test)})"


def expression_changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [SWAPS[type(op)]() if i == k else other for k, other in enumerate(node.ops)]
                yield "compare", ast.Compare(node.left, ops, node.comparators)
        case ast.BoolOp():
            yield "and/or", ast.BoolOp(SWAPS[type(node.op)](), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node.operand
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            yield "+/-", ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
        case ast.Constant(value=bool() as flag):
            yield "constant", ast.Constant(not flag)
        case ast.Constant(value=int() | float() as number):
            yield "constant", ast.Constant(number + 1)
            yield "constant", ast.Constant(number - 1)
        case ast.Call():
            yield from call_changes(node)


def call_changes(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        other = ast.Name({"min": "max", "max": "min"}[node.func.id])
        yield "min/max", ast.Call(other, node.args, node.keywords)
        return  # the order of their arguments says nothing
    if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        yield "swapped", ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def slice_changes(node: ast.Slice) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """Bounds off by one; a constant bound is changed as a constant."""
    for bound in (node.lower, node.upper):
        if bound is not None and not isinstance(bound, ast.Constant):
            yield bound, "slice", f"({ast.unparse(bound)} + 1)"


def files_of(root: Path, names: list[str]) -> list[str]:
    """The Python files of modules or packages, relative to the root, sorted."""
    found: set[str] = set()
    for name in names:
        base = root / (name if name.endswith(".py") or "/" in name else name.replace(".", "/"))
        base = base if base.exists() else base.with_suffix(".py")
        paths = [base] if base.is_file() else list(base.rglob("*.py"))
        if not paths:
            raise SystemExit(f"{name}: no Python file of that name below {root}")
        found |= {str(path.relative_to(root)) for path in paths if path.stat().st_size}
    return sorted(found)


def tests_of(root: Path, module: str) -> list[str]:
    """The test files of a module: the one of its own name, those of the folder that mirrors its package and import
    it, and those of EXTRA_TESTS; where there are none, the whole folder."""
    parts = Path(module).with_suffix("").parts
    folder = root.joinpath("tests", *(parts[1:-1] if parts[0] == "localmimo" else parts[:-1]))
    beside, own = sorted(folder.glob("test_*.py")), folder / f"test_{parts[-1]}.py"
    found = [path for path in beside if path == own or f"from {'.'.join(parts)} import" in path.read_text()]
    found.sort(key=lambda path: path != own)
    prefix = max((p for p in EXTRA_TESTS if module.startswith(p)), key=len, default="")
    for path in (root / name for name in EXTRA_TESTS.get(prefix, ())):
        found += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    return list(dict.fromkeys(str(path.relative_to(root)) for path in found or beside))


def sample(root: Path, module: str, *, seed: int, limit: int | None) -> list[Mutant]:
    """At most `limit` mutants of a module, chosen by the seed and the module's name."""
    found = mutants_of(module, (root / module).read_text())
    if limit is not None and limit < len(found):
        found = random.Random(f"{seed}:{module}").sample(found, limit)
    return sorted(found, key=lambda m: (m.start, m.end, m.kind, m.after))


class Worker:
    """A copy of the tree, and runs of its tests."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.scratch = Path(tempfile.mkdtemp(dir=scratch))
        self.tree = self.scratch / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        names = (
            listed.stdout.split("\n")
            if listed.returncode == 0
            else [str(p.relative_to(root)) for p in root.rglob("*")]
        )
        names += [str(p.relative_to(root)) for p in root.glob("quant/kernels/*.so")]  # built, not tracked
        for name in filter(None, names):
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name)
        self.n_mutants = 0
        self.last_s = 0.0  # processor time of the last run
        self.took: dict[tuple[str, ...], float] = {}

    def baseline(self, tests: list[str]) -> float:
        """Seconds of processor time that the tests of unchanged code take, measured once; they must pass."""
        key = tuple(tests)
        if key not in self.took:
            result = self.run(tests, limit_s=1800, keep_bytecode=True)
            if result != "survived":
                raise SystemExit(
                    f"the tests fail without a mutant ({result}): {' '.join(tests)}\n{self.output()}"
                )
            self.took[key] = self.last_s
        return self.took[key]

    def try_mutant(self, mutant: Mutant, tests: list[str]) -> Mutant:
        """The mutant with its result; three times the tests' usual processor time is a timeout."""
        limit_s = 5 + 3 * self.baseline(tests)
        file = self.tree / mutant.path
        raw, stat = file.read_bytes(), file.stat()
        self.n_mutants += 1
        try:
            file.write_bytes(apply(raw, mutant))
            os.utime(file, (stat.st_atime, stat.st_mtime + 10 * self.n_mutants))  # else old bytecode is taken
            return replace(mutant, result=self.run(tests, limit_s))
        finally:
            file.write_bytes(raw)
            os.utime(file, (stat.st_atime, stat.st_mtime))

    def output(self) -> str:
        return (self.scratch / "output").read_text(errors="replace")[-3000:]

    def run(self, tests: list[str], limit_s: float, *, keep_bytecode: bool = False) -> str:
        """survived if all tests pass, killed if one fails, timeout if they do not end.

        limit_s: of processor time; ten times as long by the clock, for tests that wait on a busy machine.
        """
        if (pid := os.fork()) == 0:
            self._child(tests, limit_s, keep_bytecode)
        deadline, done, status = time.monotonic() + 10 * limit_s, 0, 0
        while not done and time.monotonic() < deadline:
            time.sleep(0.02)
            done, status, usage = os.wait4(pid, os.WNOHANG)
            self.last_s = usage.ru_utime + usage.ru_stime
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the tests left running, too
        if not done:
            os.waitpid(pid, 0)
        if not done or status == signal.SIGXCPU:
            return "timeout"
        return "survived" if status == 0 else "killed"

    def _child(self, tests: list[str], limit_s: float, keep_bytecode: bool) -> None:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s) + 1))
            out = os.open(self.scratch / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd in (1, 2):
                os.dup2(out, fd)
            sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in ("", str(Path.cwd())))]
            os.chdir(self.tree)
            os.environ["LOCALMIMO_HOME"] = str(self.scratch / "home")
            sys.dont_write_bytecode = not keep_bytecode
            for name in [n for n in sys.modules if n.split(".")[0] in TREE]:
                del sys.modules[name]
            seeded = ["--hypothesis-seed=0"] if "hypothesis" in sys.modules else []
            plain = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={self.scratch / 'tmp'}"]
            code = import_module("pytest").main([*plain, *seeded, *tests])
            sys.stdout.flush()
            os._exit(int(code))
        finally:
            os._exit(70)


worker: Worker  # of this process


def start_worker(root: Path, scratch: Path) -> None:
    global worker
    worker = Worker(root, scratch)


def try_mutant(mutant: Mutant, tests: list[str]) -> Mutant:
    return worker.try_mutant(mutant, tests)


def run(root: Path, modules: list[str], *, seed: int, limit: int | None, jobs: int) -> Iterator[Mutant]:
    """Try the mutants of every module; yields each with its result, in the order of files and lines."""
    chosen = [mutant for module in modules for mutant in sample(root, module, seed=seed, limit=limit)]
    tests = {module: tests_of(root, module) for module in {m.path for m in chosen}}
    if without := sorted(module for module, files in tests.items() if not files):
        raise SystemExit(f"no tests found for {', '.join(without)}: add them to EXTRA_TESTS")
    for name in PRELOADED:
        with suppress(ImportError):
            import_module(name)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as scratch,
        ProcessPoolExecutor(jobs, get_context("fork"), start_worker, (root, Path(scratch))) as pool,
    ):
        yield from pool.map(try_mutant, chosen, [tests[mutant.path] for mutant in chosen])


def one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) < 60 else f"{flat[:57]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description="Change one thing at a time and see whether the tests fail.")
    parser.add_argument(
        "modules", nargs="*", default=list(PURE), help="paths or packages; default: those without torch"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="at most so many mutants of each file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every mutant with its result")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.root.resolve()
    done = []
    for mutant in run(root, files_of(root, args.modules), seed=args.seed, limit=args.limit, jobs=args.jobs):
        done.append(mutant)
        place = f"{mutant.path}:{mutant.line}"
        print(
            f"{mutant.result:8}  {place}  {mutant.kind}: {one_line(mutant.before)} -> {one_line(mutant.after)}",
            flush=True,
        )
    counts = {result: sum(m.result == result for m in done) for result in ("killed", "timeout", "survived")}
    summary = {"seed": args.seed, "limit": args.limit, "mutants": len(done)} | counts
    if args.json:
        args.json.write_text(json.dumps(summary | {"results": [asdict(m) for m in done]}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
