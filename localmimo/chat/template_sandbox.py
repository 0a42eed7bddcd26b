"""Sandbox for Jinja templates: renders prompts as a function, or as a separate program with limits.

A checkpoint's template is somebody else's code. In a separate program (lines of JSON in and out) it cannot use up the
memory or the time of the caller's process, and it cannot write files. Imports nothing of localmimo, so that the program
starts fast.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARS = 64 << 20  # far beyond any context
MAX_MEMORY_BYTES = 512 << 20
MAX_CPU_S = 60  # a request, for a program whose caller is gone; the caller's own limit is shorter


class Refused(Exception):
    """The template does not render these messages; the text says why."""


def compile_template(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """The prompt; raises Refused."""
    pieces: list[str] = []
    written = 0
    try:
        for piece in template.generate(**values):
            written += len(piece)
            if written > MAX_PROMPT_CHARS:
                raise SecurityError(f"it writes more than {MAX_PROMPT_CHARS:,} characters")
            pieces.append(piece)
    except (
        jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError
    ) as error:  # fmt: skip
        raise Refused(str(error).rstrip(".")) from error
    return "".join(pieces)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Chat templates expect plain JSON: jinja2's own filter escapes <, > and & for HTML.
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    # U+FDD0 to U+FDEF stay: they are the escapes of localmimo.chat.special_tokens, and no part of the text.
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", _escaped, text) if ensure_ascii else text


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def main() -> None:
    """Lines {"source", perhaps "values"} in; {"text"}, {"refused"}, {"line", "broken"} or {} out."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    source, template = None, compile_template("")
    for line in sys.stdin:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (round(time.process_time()) + MAX_CPU_S, hard))
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["source"] != source:
                template = compile_template(request["source"])
                source = request["source"]
            if "values" in request:
                answer = {"text": render(template, request["values"])}
        except jinja2.TemplateSyntaxError as error:
            answer = {"line": error.lineno, "broken": error.message}
        except MemoryError:
            answer = {"refused": f"it needs more than {MAX_MEMORY_BYTES >> 20:,} MiB of memory"}
        except (Refused, RecursionError, ArithmeticError, ValueError) as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
