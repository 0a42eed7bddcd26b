"""ToolFile: the functions of a Python file as tools, in a process of their own that can be ended.

Knows files and processes; nothing of models. The process has the user's rights: who calls asks the user first.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from localmimo.errors import BadRequest
from localmimo.system.helper_process import HelperLost, HelperProcess
from localmimo.tools.tool import Tool, ToolFailed

OPENING_S = 60.0  # for the file's own imports
GRACE_S = 5.0  # a process that starts again imports them again
_PROGRAM = "import sys; sys.path[:] = {path!r}; from localmimo.tools.tool_file import serve; serve({file!r})"


class ToolFile:
    """One file. Its public functions are the tools; what they keep in memory stays until one has to be ended."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_file():
            raise BadRequest(f"There is no file {self.path}.")
        program = _PROGRAM.format(path=[entry or str(Path.cwd()) for entry in sys.path], file=str(self.path))
        self._child = HelperProcess([sys.executable, "-c", program])
        self.tools = [self._tool(**entry) for entry in self._listed()]

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _listed(self) -> list[dict[str, Any]]:
        try:
            answer = self._child.ask({}, OPENING_S)
        except HelperLost as lost:
            raise BadRequest(f"{self.path} cannot be opened as tools: {lost}.") from None
        if "error" in answer:
            self.close()
            raise BadRequest(f"{self.path}: {answer['error']}")
        listed: list[dict[str, Any]] = answer["tools"]
        return listed

    def _tool(self, name: str, description: str, parameters: dict[str, Any]) -> Tool:
        def run(arguments: dict[str, Any], limit_s: float) -> Any:
            try:
                answer = self._child.ask(
                    {"name": name, "arguments": arguments, "limit_s": limit_s}, limit_s + GRACE_S
                )
            except HelperLost as lost:
                raise ToolFailed(
                    f"{name} ended its process."
                    if lost.in_time
                    else f"{name} took longer than {limit_s:g} s."
                ) from None
            if "error" in answer:
                raise ToolFailed(answer["error"])
            return answer["result"]

        return Tool(name, description, parameters, run)


# ---- in the process ----


def serve(file: str) -> None:
    """Open the file; then a line in, a line out: {} lists the tools, {name, arguments} calls one."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the functions print is no answer
    opened: dict[str, Tool] | str = _open(file)
    for line in sys.stdin:
        print(json.dumps(_answer(opened, json.loads(line))), file=out, flush=True)


def _open(file: str) -> dict[str, Tool] | str:
    try:
        spec = importlib.util.spec_from_file_location("tools_of_the_user", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(Path(file).parent))
        spec.loader.exec_module(module)
        found = {tool.name: tool for tool in map(Tool.of, _functions(module))}
    except BadRequest as error:
        return str(error)
    except BaseException as error:
        return f"it does not run ({type(error).__name__}: {error})."
    return found or "it has no function to call; a public function with annotations is a tool."


def _functions(module: ModuleType) -> list[Any]:
    """Public functions that the file itself defines, or those that __all__ names."""
    named = getattr(module, "__all__", None)
    if named is not None:
        return [getattr(module, name) for name in named]
    return [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _answer(opened: dict[str, Tool] | str, request: dict[str, Any]) -> dict[str, Any]:
    if isinstance(opened, str):
        return {"error": opened}
    if "name" not in request:
        return {
            "tools": [
                {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
                for tool in opened.values()
            ]
        }
    try:
        # The owner's limit comes first, and ends this process.
        result = opened[request["name"]].runner(request["arguments"], 2 * request["limit_s"] + 60)
        return {"result": json.loads(json.dumps(result, default=str))}
    except ToolFailed as error:
        return {"error": str(error)}
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": f"its result is no JSON ({error})."}
