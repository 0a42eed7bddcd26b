"""Tool file: the functions of a Python file as tools, in a helper process that can be killed.

Knows files and processes; nothing of models. The process has the user's rights, so the caller asks the user first.
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

OPEN_LIMIT_S = 60.0  # for the file's own imports
GRACE_S = 5.0  # beyond a call's limit: a process that starts again has to import the file first
_PROGRAM = "import sys; sys.path[:] = {path!r}; from localmimo.tools.tool_file import serve; serve({file!r})"


class ToolFile:
    """One file. Its public functions are the tools. Their state stays in memory until the process is killed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_file():
            raise BadRequest(f"There is no file {self.path}.")
        program = _PROGRAM.format(path=[entry or str(Path.cwd()) for entry in sys.path], file=str(self.path))
        self._helper = HelperProcess([sys.executable, "-c", program])
        self.tools = [self._tool(**entry) for entry in self._listed()]

    def close(self) -> None:
        """End the process."""
        self._helper.close()

    def _listed(self) -> list[dict[str, Any]]:
        try:
            answer = self._helper.request({}, OPEN_LIMIT_S)
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
                answer = self._helper.request(
                    {"name": name, "arguments": arguments, "limit_s": limit_s}, limit_s + GRACE_S
                )
            except HelperLost as lost:
                raise ToolFailed(
                    f"{name} took longer than {limit_s:g} s."
                    if lost.timed_out
                    else f"{name} ended its process."
                ) from None
            if "error" in answer:
                raise ToolFailed(answer["error"])
            return answer["result"]

        return Tool(name, description, parameters, run)


# ---- in the helper process ----


def serve(file: str) -> None:
    """Open the file, then answer lines of JSON: {} lists the tools, {name, arguments, limit_s} calls one."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the functions print must not be taken for an answer
    tools: dict[str, Tool] | str = _open(file)
    for line in sys.stdin:
        print(json.dumps(_answer(tools, json.loads(line))), file=out, flush=True)


def _open(file: str) -> dict[str, Tool] | str:
    """The tools of the file by name, or a sentence that says why there are none."""
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
    """The functions that __all__ names; without it, the public functions that the file itself defines."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return [getattr(module, name) for name in names]
    return [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _answer(tools: dict[str, Tool] | str, request: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tools, str):
        return {"error": tools}
    if "name" not in request:
        return {
            "tools": [
                {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
                for tool in tools.values()
            ]
        }
    try:
        # The caller's limit is shorter: it kills this process.
        result = tools[request["name"]].runner(request["arguments"], 2 * request["limit_s"] + 60)
        return {"result": json.loads(json.dumps(result, default=str))}
    except ToolFailed as error:
        return {"error": str(error)}
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": f"its result is no JSON ({error})."}
