"""The documents: their commands and Python blocks run or are checked, and what they name exists.

Fenced blocks marked `sh` are commands, those marked `python` are programs; `text`, `json` and `toml` are neither. A
document's blocks share a home folder with a small pack (`~/packs/flash`) and a random checkpoint
(`~/hf/MiMo-V2-Flash`), so that commands run as they are printed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from localmimo.cli import app as command_line
from localmimo.cli.commands import plan as plan_command
from localmimo.hardware.host import Machine
from localmimo.planning.footprint import footprint_of
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
SOURCES = ("localmimo", "quant", "benchmarks", "examples", "tests", ".ci")
HEAVY_FLAGS = {
    "--ram",
    "--vram",
    "-c",
    "--context",
}  # of answers: the machine that tests run on may not have it
DOES_NOT_FIT = 3  # exit code
FOREIGN_FLAGS = {
    "--no-deps",
    "--model",
    "--openai-api-base",
    "--openai-api-key",
    "--version",
    "--import-mode",
}


# ---- reading documents ----


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line on which it begins."""

    language: str
    text: str
    line: int


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL)
    text = text_of(document)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in found]


def prose(document: str) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)


def spans(document: str) -> list[str]:
    """What stands between backticks in the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def commands(document: str) -> Iterator[list[str]]:
    """The words of each command of the document's `sh` blocks, without comments and settings of the environment."""
    for block in blocks(document):
        if block.language == "sh":
            yield from commands_in(block.text)


def commands_in(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|")
        lexer.whitespace_split = True
        for word in [*lexer, "&&"]:
            if word in ("&&", "&", "|"):
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


# ---- checking flags ----


@cache
def options_of(command: str) -> frozenset[str]:
    """The flags of a command of localmimo."""
    group: Any = typer.main.get_command(command_line.app)
    found = group.commands[command]
    return frozenset(flag for p in found.params for flag in [*p.opts, *p.secondary_opts]) | {"-h", "--help"}


@cache
def all_options() -> frozenset[str]:
    group: Any = typer.main.get_command(command_line.app)
    return frozenset().union(*map(options_of, group.commands))


@cache
def benchmark_text(name: str) -> str:
    """A benchmark with what it imports from its own folder."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    imported = re.findall(r"benchmarks(?:\.| import )(\w+)", text)
    others = [path for other in imported if (path := ROOT / "benchmarks" / f"{other}.py").exists()]
    return text + "".join(path.read_text() for path in others)


def flags(words: list[str]) -> list[str]:
    found = [word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
    return [flag for flag in found if not re.fullmatch(r"-\d.*", flag)]


def check(words: list[str]) -> None:
    """A command that is not run: its program, its files and its flags exist."""
    match words:
        case ["localmimo", command, *rest] | ["python", "-m", "localmimo", command, *rest]:
            unknown = set(flags(rest)) - options_of(command)
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            text = benchmark_text(module.removeprefix("benchmarks."))
            unknown = {flag for flag in flags(rest) if f'"{flag}"' not in text}
        case ["python", file, *rest] if file.startswith("examples/"):
            text = (ROOT / file).read_text()
            unknown = {flag for flag in flags(rest) if f'"{flag}"' not in text}
        case ["pytest", *rest] | ["python", "-m", "pytest", *rest]:
            unknown = {word for word in rest if word.startswith("tests/") and not exists(word.split("::")[0])}
        case ["pip", "install", *rest]:
            extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
            named = re.findall(r"\[([\w,]+)\]", " ".join(rest))
            unknown = {extra for names in named for extra in names.split(",")} - set(extras)
        case ["curl", *rest]:
            from localmimo.serve.endpoints import PATHS

            urls = [word for word in rest if word.startswith("http://127.0.0.1:8080")]
            unknown = {url for url in urls if url.removeprefix("http://127.0.0.1:8080") not in PATHS}
        case [program, *rest] if program.startswith(".ci/"):
            unknown = set() if (ROOT / program).exists() else {program}
        case ["python", "-m", "venv", _] | [".", _] | ["ruff" | "mypy" | "aider", *_]:
            unknown = set(flags(words)) - FOREIGN_FLAGS if words[0] == "aider" else set()
        case _:
            raise AssertionError(f"a program that this test does not know: {shlex.join(words)}")
    assert not unknown, f"{shlex.join(words)}: {sorted(unknown)}"


def runs_now(words: list[str]) -> bool:
    """Whether a command can be run on any machine, without a network and in a few seconds."""
    match words:
        case ["localmimo", "plan" | "verify" | "stats" | "replay", *_]:
            return True
        case ["localmimo", "quantize", source, *rest]:
            return "--dry-run" in rest and source.startswith("~")
        case ["localmimo", "chat", *rest]:
            return any(" " in word for word in rest) and not HEAVY_FLAGS & set(rest)
        case ["localmimo", "bench", *rest]:
            return "-r" in rest and not HEAVY_FLAGS & set(rest)
        case ["localmimo", "perplexity", _, text, *_]:
            return (ROOT / text).exists()
    return False


def plans_this_machine(words: list[str]) -> bool:
    """Whether the outcome depends on the memory that is free."""
    return words[1] == "plan" and "--ram" not in words


# ---- running ----


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with what the documents speak of."""
    from localmimo.loading.embedded import embedded_pack

    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open() as nothing:
        patch.setenv("LOCALMIMO_HOME", str(folder / ".localmimo"))
        patch.setattr(sys, "stdin", nothing)
        (folder / "packs").mkdir()
        (folder / "packs/flash").symlink_to(embedded_pack())
        assert (
            command_line.run(["chat", "mimo-mini", "Tell me about rivers.", "-n", "24"]) == 0
        )  # it is counted
    make_checkpoint(folder / "hf/MiMo-V2-Flash")
    (folder / "localmimo/mini").mkdir(parents=True)
    held_out = (ROOT / "localmimo/mini/heldout.txt").read_text()
    (folder / "localmimo/mini/heldout.txt").write_text(held_out[:2000])
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOCALMIMO_HOME", str(home / ".localmimo"))
    monkeypatch.setattr(plan_command, "footprint_of", footprint)
    monkeypatch.chdir(home)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield home


footprint = cache(footprint_of)  # a whole model's listing takes seconds


def expanded(word: str, home: Path) -> str:
    return str(home / word[2:]) if word.startswith("~/") else word


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs_or_has_its_flags(
    document: str, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(document):
        check(words)
        if runs_now(words):
            code = command_line.run([expanded(word, at_home) for word in words[1:]])
            shown = capsys.readouterr()
            assert code == 0 or (code == DOES_NOT_FIT and plans_this_machine(words)), (
                f"{shlex.join(words)}: {code}\n{shown.out}{shown.err}"
            )


@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if "python" in {b.language for b in blocks(name)}]
)
def test_python_blocks_run(document: str, at_home: Path) -> None:
    names: dict[str, Any] = {"__name__": "document"}
    try:
        for block in blocks(document):
            if block.language == "python":
                code = compile(ast.parse("\n" * block.line + block.text), document, "exec")
                exec(code, names)
    finally:
        for value in names.values():
            if type(value).__name__ == "Engine":
                value.close()


# ---- what documents name ----


def test_blocks_say_what_they_are() -> None:
    known = {"sh", "python", "text", "json", "toml", "console"}
    assert not [
        f"{document}:{block.line}"
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language not in known
    ]


def exists(path: str) -> bool:
    """Whether a file, a folder or a pattern of them is in the tree, from its root or from a package's."""
    roots = (ROOT, ROOT / "localmimo", ROOT / "quant", ROOT / "tests", ROOT / "docs")
    return any(any(root.glob(path.rstrip("/"))) for root in roots if path.strip("/"))


IS_PATH = re.compile(r"(?:[\w.*-]+/)+[\w.*-]*|[\w*-]+\.(?:py|cpp|h|toml)")
NOT_OURS = re.compile(
    r"~|/|PACK|DIR|NAME|stats/|owner/|XiaomiMiMo/|openai/|\.venv|.*FILE|.*\.(json|jsonl|kv|svg|png)$|v1/"
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    named = [span.split("::")[0] for span in spans(document)]
    paths = [name for name in named if IS_PATH.fullmatch(name) and not NOT_OURS.match(name)]
    assert not [path for path in paths if not exists(path)]


@cache
def sources() -> str:
    return "\n".join(
        path.read_text()
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".js", "")
        and path.is_file()
        and path != Path(__file__)
        and "corpus" not in path.parts
    )


@cache
def identifiers() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", sources()))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_name_exists(document: str) -> None:
    """Dotted names, classes and snake_case names in backticks are in the sources."""
    unknown = []
    for span in spans(document):
        name = span.removesuffix("()")
        if (ROOT / name).is_file():
            continue
        if re.fullmatch(r"(localmimo|quant|benchmarks)(\.\w+)+", name):
            parts = name.split(".")
            whole = any(
                (ROOT / "/".join(parts[:n])).with_suffix(".py").exists() for n in range(1, len(parts) + 1)
            )
            unknown += (
                [] if whole or (ROOT / "/".join(parts)).is_dir() or parts[-1] in identifiers() else [span]
            )
        elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) and re.search(
            r"[a-z]_[a-z]|[a-z][A-Z]", name
        ):
            unknown += [span for part in name.split(".") if part not in identifiers()]
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_in_the_prose_exists(document: str) -> None:
    known = all_options() | FOREIGN_FLAGS
    text = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    named = {flag for span in spans(document) for flag in flags(span.split()) if flag.startswith("--")}
    assert not {flag for flag in named - known if f'"{flag}"' not in text}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", prose(document))
    assert not [link for link in links if ":" not in link and not (folder / link).exists()]


# ---- sizes and figures ----


def test_the_readme_and_the_architecture_are_short() -> None:
    assert len(text_of("README.md").split()) <= 900
    assert len(text_of("ARCHITECTURE.md").splitlines()) <= 200


def test_the_architecture_lists_the_packages_in_the_order_of_imports() -> None:
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    text = text_of("ARCHITECTURE.md")
    for package, names in ast.literal_eval(named["ORDER"]).items():
        places = [text.find(f"`{package}/{name.replace('.', '/')}") for name in names.split()]
        assert -1 not in places and places == sorted(places), dict(zip(names.split(), places, strict=True))


METAPHORS = re.compile(
    r"\b(house|rooms?|hears?|gives? way|lies?|lay|shelf|desk|trail|manner|stretch(es)?|timelines?|conveyor"
    r"|bridge|lends?|owes?|owed|guess(es)?|victims?|crossover)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_use_plain_words(document: str) -> None:
    text = re.sub(r"`[^`]*`|<[^>]*>", "", prose(document))
    found = [match[0] for match in METAPHORS.finditer(text)]
    assert not found


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs/decisions"
    files = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    index = (folder / "README.md").read_text()
    for name in files:
        text = (folder / name).read_text()
        assert f"({name})" in index, name
        assert re.search(r"^\d{4}-\d{2}-\d{2}$", text, re.MULTILINE), f"{name} has no date"
        for part in ("**Context.**", "**Decision.**", "**Consequence.**"):
            assert part in text, f"{name} has no {part}"


def plan_of(arguments: list[str], n_cores: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `localmimo plan` says on a machine with so many cores."""
    probe = Machine.probe
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(Machine, "probe", lambda: replace(probe(), n_cores=n_cores))
        assert command_line.run([*arguments, "--json", "-q"]) == 0
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found


def rounded(figure: float) -> str:
    return f"{figure:.1f}" if figure < 9.5 else f"{figure:.0f}"


def test_the_table_of_machines_is_what_plan_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """README's table is made by the commands of docs/planning.md, in the same order."""
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    monkeypatch.setattr(plan_command, "footprint_of", footprint)
    rows = re.findall(
        r"^\| (\d+ GB.*?) \| (.*?) \| (.*?) \| (\d+) GB \|$", text_of("README.md"), re.MULTILINE
    )
    described = [
        words[1:] for words in commands("docs/planning.md") if "--disk-read" in words and "32k" in words
    ]
    assert len(rows) == len(described) == 4
    for (machine, speed, first, disk), arguments in zip(rows, described, strict=True):
        n_cores = int(re.search(r"(\d+) cores", machine)[1])  # type: ignore[index]
        found = plan_of(arguments, n_cores, monkeypatch)
        low, high = found["estimate"]["decode_tps"]
        assert speed == f"{rounded(low)} to {rounded(high)}"
        short = plan_of([*arguments[:-1], "1k"], n_cores, monkeypatch)["estimate"]["prefill_tps"]
        assert arguments[-2] == "-c" and first == f"{1000 / short[1]:.0f} to {1000 / short[0]:.0f} s"
        assert int(disk) == round(found["pack_bytes"] / 1e9)


def test_the_benchmarks_table_is_whole() -> None:
    """Every row has a claim, a value, a target, a machine, a command that exists, and a commit."""
    text = text_of("BENCHMARKS.md")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, *figures = [[cell.strip() for cell in row] for row in rows]
    assert header == ["claim", "value", "target", "machine", "command", "commit"]
    for row in figures:
        if set(row[0]) <= set("-"):
            continue
        assert len(row) == 6, row
        assert re.fullmatch(r"`[0-9a-f]{7}`", row[5]), row
        for words in commands_in(row[4].strip("`")):
            check(words)
