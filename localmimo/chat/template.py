"""Chat template of one model: messages become the text of a prompt.

Knows text only; nothing of token ids, the model or the terminal.
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
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ")  # all that the helper process gets to see
LIMIT_S = 10.0  # for one prompt; the longest conversations take a tenth of a second


class ChatTemplate:
    """One template.

    A built-in template is rendered in this process. Any other is somebody else's code: it is rendered in a helper
    process with limits (see template_sandbox).
    """

    def __init__(self, source: str, *, name: str, tokens: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.source = source
        self._tokens = dict(tokens or {})
        self._builtin: jinja2.Template | None = None
        self._helper: HelperProcess | None = None
        if _is_builtin(source):
            self._builtin = sandbox.compile_template(source)
        else:
            environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
            self._helper = HelperProcess([sys.executable, "-I", sandbox.__file__], environment)
            self._check_syntax()
        self.think_default = self._thinks_by_default()

    @classmethod
    def open(cls, folder: str | Path, config: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The checkpoint's own template (chat_template.jinja or tokenizer_config.json), else the family's."""
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        own = folder / "chat_template.jinja"
        if own.is_file():
            return cls(_read(own), name=own.name, tokens=_special_tokens(settings))
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
        """The prompt. think: None leaves the choice to the template. Raises BadRequest."""
        switches: dict[str, Any] = {} if think is None else {"enable_thinking": think}
        values = switches | {
            "messages": check_messages(messages),
            "tools": check_tools(tools),
            "keep_all_reasoning": keep_reasoning,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._render(values)

    def close(self) -> None:
        """End the template's helper process, if it has one. The next use starts another."""
        if self._helper is not None:
            self._helper.close()

    def _render(self, values: dict[str, Any]) -> str:
        try:
            if self._builtin is not None:
                return sandbox.render(self._builtin, self._tokens | values)
            return str(self._request({"source": self.source, "values": self._tokens | values})["text"])
        except sandbox.Refused as error:
            raise BadRequest(f"The chat template {self.name} refused the conversation: {error}.") from error

    def _request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._helper is not None
        try:
            answer: dict[str, Any] = self._helper.request(message, LIMIT_S)
        except HelperLost as lost:
            raise sandbox.Refused(
                f"it took longer than {LIMIT_S:g} s" if lost.timed_out else "its process ended"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise sandbox.Refused(f"its arguments are no JSON ({error})") from None
        if "refused" in answer:
            raise sandbox.Refused(answer["refused"])
        return answer

    def _check_syntax(self) -> None:
        try:
            answer = self._request({"source": self.source})
        except sandbox.Refused as error:
            raise BadModel(f"The chat template {self.name} cannot be used: {error}.") from None
        if "broken" in answer:
            raise BadModel(
                f"The chat template {self.name} is broken at line {answer['line']}: {answer['broken']}."
            )

    def _thinks_by_default(self) -> bool:
        # Found out from the template itself, not from the model's name.
        values: dict[str, Any] = {
            "messages": [{"role": "user", "content": "?"}],
            "tools": None,
            "add_generation_prompt": True,
        }
        try:
            thinking, plain = (self._render(values | {"enable_thinking": think}) for think in (True, False))
            return thinking != plain and self._render(values) == thinking
        except BadRequest:
            return False


def _read(path: Path) -> str:
    try:
        return read_small(path, CONFIG_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise BadModel(
            f"The chat template {path} cannot be read ({error}); copy it again from the checkpoint."
        ) from None


def family(config: Mapping[str, Any]) -> str:
    """The built-in template for a config.json."""
    if config.get("model_type") != "mimo_v2":
        return "mimo-v2-flash"
    stored = config.get("quantization_config") or {}
    return "mimo-v2.6" if stored.get("store_dtype") == "mxfp4" else "mimo-v2.5"


def _is_builtin(source: str) -> bool:
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
