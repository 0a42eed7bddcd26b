"""An agent with tools that can do no harm: it searches and reads one folder, and runs Python programs with limits.

    python examples/agent.py "Please calculate 45 - 17."    # mimo-mini shows the steps; its numbers are often wrong
    python examples/agent.py --model ~/packs/flash --folder ~/src "Where is the ring buffer, and how large is it?"

A tool is a Python function. The model reads its name, annotations and docstring, and calls it with arguments that were
checked against the annotations. `main` below is all that an agent needs.

The tools only read, and only inside the folder: links that lead out of it are not followed. A Python program runs in a
separate process, in an empty folder, with limits on time, memory and files. It does not get this process's environment,
and no network where the system allows that (Linux with user namespaces; elsewhere the result says so).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import localmimo

MAX_FILE_BYTES, MAX_MATCHES, MAX_LINES = 1 << 20, 50, 200
CPU_S, WALL_S, MEMORY_BYTES, OUTPUT_BYTES = 5, 10, 512 << 20, 64 << 10
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of linux/sched.h


class Folder:
    """Read-only tools over one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve(strict=True)

    def tools(self) -> list[Callable[..., str]]:
        """Functions for the model."""

        def search(pattern: str, glob: str = "**/*") -> str:
            """Finds lines in the folder's text files.

            Args:
                pattern: a regular expression
                glob: which files, such as **/*.py
            """
            return "\n".join(self._matching_lines(re.compile(pattern), glob)) or "nothing found"

        def read_file(path: str, first_line: int = 1) -> str:
            """Shows up to 200 lines of a text file of the folder.

            Args:
                path: relative to the folder
                first_line: where to begin
            """
            lines = self._text(self._inside(path)).splitlines()
            shown = lines[max(0, first_line - 1) :][:MAX_LINES]
            return "\n".join(shown) + f"\n[{len(shown)} of {len(lines)} lines]"

        return [search, read_file]

    def _inside(self, path: str) -> Path:
        """The file, if it is in the folder once every link and .. is resolved. Raises PermissionError."""
        found = (self.root / path).resolve()
        if not found.is_relative_to(self.root):
            raise PermissionError(f"{path} is outside the folder.")
        return found

    def _text(self, path: Path) -> str:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path.name} is larger than 1 MiB.")
        return path.read_text("utf-8", "replace")

    def _matching_lines(self, pattern: re.Pattern[str], glob: str) -> Iterator[str]:
        n_found = 0
        for path in sorted(self.root.glob(glob)):
            if not path.is_file() or not path.resolve().is_relative_to(self.root):
                continue
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            for number, line in enumerate(self._text(path).splitlines(), 1):
                if pattern.search(line):
                    yield f"{path.relative_to(self.root)}:{number}: {line.strip()[:200]}"
                    n_found += 1
                    if n_found == MAX_MATCHES:
                        return


def python(code: str) -> str:
    """Runs a Python program and returns what it prints.

    Args:
        code: the program, with print
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env={"PATH": os.defpath}, start_new_session=True, preexec_fn=_limit_process,
        )  # fmt: skip
        try:
            exit_code = process.wait(WALL_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _kill_group(process)
        output.seek(0)
        printed = output.read(OUTPUT_BYTES).decode("utf-8", "replace")
    ending = "took too long" if exit_code is None else f"exit code {exit_code}"
    return printed if exit_code == 0 else f"{printed}\n[{ending}]"


def calculator(expression: str) -> str:
    """Works out an arithmetic expression, such as 2 + 3 * 4."""
    if not re.fullmatch(r"[\d\s+*/().%-]{1,200}", expression):
        raise ValueError("only numbers, + - * / % and brackets")
    return python(f"print({expression})").strip()


def _limit_process() -> None:
    """In the new process, before Python starts: set limits that the process cannot raise again."""
    for resource_kind, maximum in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, OUTPUT_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(resource_kind, (maximum, maximum))
    if ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK) != 0:
        os.write(1, b"[this system does not let us take the network away]\n")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask an agent that can only read a folder and calculate.")
    parser.add_argument("question", nargs="?", default="Please calculate 45 - 17.")
    parser.add_argument("--model", help="a pack's folder; without it mimo-mini answers")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="what may be read (default: the current one)"
    )
    parser.add_argument("--steps", type=int, default=8, help="the most answers before it stops (default: 8)")
    options = parser.parse_args()

    def approve(call: localmimo.ToolCall) -> bool:
        """Show each call and allow it. A program whose tools can do harm would ask the user first."""
        print(f"  {call.name}({call.arguments})", file=sys.stderr)
        return True

    # mimo-mini was trained with calculators only. A real model gets the folder and Python too.
    tools = [calculator, *([*Folder(options.folder).tools(), python] if options.model else [])]
    with localmimo.load(options.model) as engine:
        run = engine.agent(
            [{"role": "user", "content": options.question}],
            tools,
            max_steps=options.steps,
            approve=approve,
            sampling=localmimo.Sampling(temperature=0),
            max_tokens=1000,
        )
    print(run.answer.content)
    print(f"  [{run.n_steps} answers, {run.finish_reason}]", file=sys.stderr)


if __name__ == "__main__":
    main()
