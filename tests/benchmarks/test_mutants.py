"""The mutation runner: what it changes, which tests it runs, and that it tells killed from survived."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mutants

ROOT = Path(__file__).parents[2]
GRADE = '''\
"""Grades: 3 of 5."""
def grade(points: int, limit: int = 3, table: dict[int, str] | None = None) -> str:
    if points >= limit and points > 0:
        return f"pass {points + 1}"
    return "fail"
'''
LOOP = """\
def count(limit: int) -> int:
    n = 0
    while n < limit:
        n += 1
    return n
"""


def texts(source: str) -> set[tuple[str, str]]:
    return {(m.before, m.after) for m in mutants.mutants_of("a.py", source)}


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("x = a < b", "a < b", "(a <= b)"),
        ("x = a < b < c", "a < b < c", "(a < b <= c)"),
        ("x = a is None", "a is None", "(a is not None)"),
        ("x = a and b", "a and b", "(a or b)"),
        ("x = not a or b", "not a", "(a)"),
        ("x = 3", "3", "(4)"),
        ("x = 3", "3", "(2)"),
        ("def f(a=True): ...", "True", "(False)"),
        ("x = f(a, b)", "f(a, b)", "(f(b, a))"),
        ("x = min(a, b)", "min(a, b)", "(max(a, b))"),
        ("x = a[n:]", "n", "(n + 1)"),
        ("x = a[:n]", "n", "(n + 1)"),
        ("x = a + b", "a + b", "(a - b)"),
        ("if f(a): g(b)", "f(a)", "(not f(a))"),
        ("f(a)", "f(a)", "pass"),
        ("for a in b: continue", "continue", "pass"),
        ("for a in b: break", "break", "pass"),
        ("def f(self): self.a = 1", "self.a = 1", "pass"),
        ("s = 'é'; x = 3", "3", "(4)"),  # positions are bytes
    ],
)
def test_what_is_changed(source: str, before: str, after: str) -> None:
    assert (before, after) in texts(source)


@pytest.mark.parametrize(
    "source",
    [
        "def f(a: Literal[1]) -> Literal[2]: ...",
        "@dataclass(frozen=True)\nclass A: ...",
        "raise ValueError(1 + 1)",
        "x = f'{1 + 1}'",
        "if TYPE_CHECKING:\n    x = 3",
        "def __init__(self): self.a = b",
        "x = min(a)[b]",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert texts(source) <= {("min(a)", "(max(a))")}


def test_every_mutant_of_this_program_is_python_and_differs() -> None:
    source = Path(mutants.__file__).read_text()
    found = mutants.mutants_of("mutants.py", source)
    assert len(found) > 100
    assert all(mutants.apply(source.encode(), mutant) != source.encode() for mutant in found)


def test_modules_have_tests() -> None:
    """The table of tests follows the tree: without it a new name would leave a module out of the run."""
    modules = mutants.files_of(ROOT, list(mutants.PURE))
    assert not [module for module in modules if not mutants.tests_of(ROOT, module)]
    named = [name for names in mutants.EXTRA_TESTS.values() for name in names]
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [prefix for prefix in mutants.EXTRA_TESTS if not (ROOT / prefix).exists()]


def test_the_seed_chooses() -> None:
    module = "localmimo/serve/queue.py"
    first, again, other = (mutants.sample(ROOT, module, seed=seed, limit=10) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 10 and len(mutants.sample(ROOT, module, seed=1, limit=None)) > 10


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree: of `grade` the tests never ask about no points at all; a mutant of `count` does not end."""
    for name, content in {
        "pkg/grade.py": GRADE,
        "tests/pkg/test_grade.py": "from pkg.grade import grade\n"
        "def test_grade():\n    assert (grade(3), grade(2)) == ('pass 4', 'fail')\n",
        "pkg/count.py": LOOP,
        "tests/pkg/test_count.py": "from pkg.count import count\n"
        "def test_count():\n    assert count(3) == 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def run(tree: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.mutants", "--root", str(tree), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_run(tree: Path) -> None:
    done = run(tree, "pkg/grade.py", "--json", str(tree / "out.json"), "--jobs", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((tree / "out.json").read_text())
    results = {(m["before"], m["after"]): m["result"] for m in report.pop("results")}
    assert results == {
        ("3", "(4)"): "killed",
        ("3", "(2)"): "killed",
        ("points >= limit", "(points > limit)"): "killed",
        ("points >= limit and points > 0", "(points >= limit or points > 0)"): "killed",
        ("points > 0", "(points >= 0)"): "survived",
        ("0", "(1)"): "survived",
        ("0", "(-1)"): "survived",
    }
    assert report == {"seed": 0, "limit": None, "mutants": 7, "killed": 4, "timeout": 0, "survived": 3}
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert (tree / "pkg/grade.py").read_text() == GRADE  # only the copy was changed


def test_a_mutant_that_does_not_end_is_ended(tree: Path) -> None:
    worker = mutants.Worker(tree, tree)
    tests = ["tests/pkg/test_count.py"]
    (loop,) = [m for m in mutants.mutants_of("pkg/count.py", LOOP) if m.after == "pass"]
    worker.took[tuple(tests)] = -1.0  # so that the limit is two seconds
    assert worker.try_mutant(loop, tests).result == "timeout"
    assert worker.run(tests, 60) == "survived"  # the copy is as it was


def test_tests_that_fail_without_a_mutant_are_named(tree: Path) -> None:
    (tree / "tests/pkg/test_grade.py").write_text("def test_grade():\n    assert False\n")
    done = run(tree, "pkg/grade.py")
    assert done.returncode != 0 and "tests/pkg/test_grade.py" in done.stderr
