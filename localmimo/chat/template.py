"""ChatTemplate: how one model wants its conversations written; messages become a prompt.

Pure text: knows nothing of token ids, of the model or of the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from localmimo.chat import template_sandbox as sandbox
from localmimo.chat.messages import Message, check_messages, check_tools
from localmimo.errors import BadModel, BadRequest
from localmimo.system.helper_process import HelperLost, HelperProcess
from localmimo.system.json_files import read_json
from quant.files.bounded import CONFIG_BYTES, read_small

TEMPLATES = Path(__file__).with_name("templates")
LIMIT_S = 10.0  # for a prompt; the longest conversations take a tenth of a second


class ChatTemplate:
    """One template. Our own run here; any other runs in a process of its own, with limits (see sandbox)."""

    def __init__(self, source: str, *, name: str, tokens: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.source = source
        self._tokens = dict(tokens or {})
        self._known: jinja2.Template | None = None
        self._child: HelperProcess | None = None
        if _is_ours(source):
            self._known = sandbox.compile_template(source)
        else:
            needed = {
                name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ
            }
            self._child = HelperProcess([sys.executable, "-I", sandbox.__file__], needed)
            self._check_syntax()
        self.think_default = self._thinks_by_itself()

    @classmethod
    def open(cls, folder: str | Path, config: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The checkpoint's own template (chat_template.jinja or tokenizer_config.json), else the family's."""
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        own = folder / "chat_template.jinja"
        if own.is_file():
            return cls(_text(own), name=own.name, tokens=_special_tokens(settings))
        if source := _embedded(settings.get("chat_template")):
            return cls(source, name="tokenizer_config.json", tokens=_special_tokens(settings))
        return cls.builtin(family(config or {}))

    @classmethod
    def builtin(cls, name: str) -> ChatTemplate:
        """One of the family's templates: mimo-v2-flash, mimo-v2.5, mimo-v2.6."""
        path = TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            known = ", ".join(sorted(entry.stem for entry in TEMPLATES.glob("*.jinja")))
            raise BadRequest(f"There is no built-in chat template {name!r}; there are {known}.")
        return cls(path.read_text("utf-8"), name=name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | None = None,
        keep_reasoning: bool = True,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt; think None leaves the choice to the template. Raises BadRequest."""
        switches: dict[str, Any] = {} if think is None else {"enable_thinking": think}
        values = switches | {
            "messages": check_messages(messages),
            "tools": check_tools(tools),
            "keep_all_reasoning": keep_reasoning,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._write(values)

    def close(self) -> None:
        """End the template's process, if it has one; the next use starts another."""
        if self._child is not None:
            self._child.close()

    def _write(self, values: dict[str, Any]) -> str:
        try:
            if self._known is not None:
                return sandbox.write(self._known, self._tokens | values)
            return str(self._ask({"source": self.source, "values": self._tokens | values})["text"])
        except sandbox.Refused as error:
            raise BadRequest(f"The chat template {self.name} refused the conversation: {error}.") from error

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child is not None
        try:
            answer: dict[str, Any] = self._child.ask(request, LIMIT_S)
        except HelperLost as lost:
            raise sandbox.Refused(
                "its process ended" if lost.in_time else f"it took longer than {LIMIT_S:g} s"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise sandbox.Refused(f"its arguments are no JSON ({error})") from None
        if "refused" in answer:
            raise sandbox.Refused(answer["refused"])
        return answer

    def _check_syntax(self) -> None:
        try:
            answer = self._ask({"source": self.source})
        except sandbox.Refused as error:
            raise BadModel(f"The chat template {self.name} cannot be used: {error}.") from None
        if "broken" in answer:
            raise BadModel(
                f"The chat template {self.name} is broken at line {answer['line']}: {answer['broken']}."
            )

    def _thinks_by_itself(self) -> bool:
        # Asked of the template, not of the model's name: does it do unasked what it does when told to think?
        values: dict[str, Any] = {
            "messages": [{"role": "user", "content": "?"}],
            "tools": None,
            "add_generation_prompt": True,
        }
        try:
            told = [self._write(values | {"enable_thinking": think}) for think in (True, False)]
            return told[0] != told[1] and self._write(values) == told[0]
        except BadRequest:
            return False


def _text(path: Path) -> str:
    try:
        return read_small(path, CONFIG_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise BadModel(
            f"The chat template {path} cannot be read ({error}); copy it again from the checkpoint."
        ) from None


def family(config: Mapping[str, Any]) -> str:
    """Which built-in template a config.json calls for."""
    if config.get("model_type") != "mimo_v2":
        return "mimo-v2-flash"
    stored = config.get("quantization_config") or {}
    return "mimo-v2.6" if stored.get("store_dtype") == "mxfp4" else "mimo-v2.5"


def _is_ours(source: str) -> bool:
    return any(path.read_text("utf-8") == source for path in TEMPLATES.glob("*.jinja"))


def _embedded(value: object) -> str | None:
    if isinstance(value, list):  # several named templates: the one called default, else the first
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[key] = value
    return found
