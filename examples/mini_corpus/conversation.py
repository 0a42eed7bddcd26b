"""Conversation: messages, tools and the thinking flag, and how they become training text in MiMo's format.

Knows the chat format only; it must not know where the text comes from or how it is tokenised.
The text is cut into spans with a flag: True for the text of the assistant (full loss), False elsewhere.
"""
# ruff: noqa: E501 (the fixed texts of the format)

import json
from dataclasses import dataclass, field
from typing import Any

DEFAULT_SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."

TOOL_PREAMBLE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
    "\n\nYou have access to the following functions:\n\n<tools>"
)
TOOL_FORMAT = (
    "\n\nFor each function call, output the function name and arguments in the following format:\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>value_1</parameter>\n"
    "<parameter=example_parameter_2>This is the value for the second parameter\nthat can span\nmultiple lines"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\n- Function calls MUST follow the specified format: an inner "
    "<function=...></function> block must be nested within <tool_call></tool_call> XML tags\n- DO NOT use function calls "
    "inside <think></think> tags.\n- The value enclosed between parameter tags is preserved exactly as-is, including "
    "newlines and spaces.\n</IMPORTANT>"
)


@dataclass
class Conversation:
    """One training example; `messages` use the OpenAI keys (role, content, reasoning_content, tool_calls)."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    think: bool = False
    kind: str = "chat"
    spans: list[tuple[str, bool]] = field(default_factory=list)


def user(text: str) -> dict[str, Any]:
    """A user message."""
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": text}


def assistant(text: str, thought: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """An assistant message with optional reasoning and tool calls."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tool_block(tool: dict[str, Any]) -> str:
    schema = tool.get("function", tool)
    parameters = schema.get("parameters", {})
    out = f"\n<function>\n<name>{schema['name']}</name>"
    if schema.get("description"):
        out += f"\n<description>{schema['description']}</description>"
    out += "\n<parameters>"
    for name, spec in parameters.get("properties", {}).items():
        out += f"\n<parameter>\n<name>{name}</name>"
        for key in ("type", "description"):
            if key in spec:
                out += f"\n<{key}>{spec[key]}</{key}>"
        for key, value in spec.items():
            if key not in ("type", "description"):
                out += f"\n<{key}>{_plain(value)}</{key}>"
        out += "\n</parameter>"
    for key, value in parameters.items():
        if key not in ("type", "properties"):
            out += f"\n<{key}>{_plain(value)}</{key}>"
    return out + "\n</parameters>\n</function>"


def system_block(text: str, tools: list[dict[str, Any]] | None) -> str:
    """The first block of every prompt: the system text and the descriptions of the tools."""
    if tools:
        text += TOOL_PREAMBLE + "".join(map(_tool_block, tools)) + "\n</tools>" + TOOL_FORMAT
    return f"<|im_start|>system\n{text}<|im_end|>"


def _call(call: dict[str, Any]) -> str:
    body = "".join(f"<parameter={k}>{_plain(v)}</parameter>\n" for k, v in call["arguments"].items())
    return f"<tool_call>\n<function={call['name']}>\n{body}</function>\n</tool_call>"


def render(talk: Conversation) -> list[tuple[str, bool]]:
    """The spans of `talk`; joined they are exactly what the V2-Flash chat template renders for finished turns."""
    messages = list(talk.messages)
    first = messages.pop(0)["content"] if messages[0]["role"] == "system" else DEFAULT_SYSTEM
    spans: list[tuple[str, bool]] = [(system_block(first, talk.tools), False)]
    previous = ""
    for n, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            opening = "" if previous == "tool" else "<|im_start|>tool\n"
            last = n + 1 == len(messages) or messages[n + 1]["role"] != "tool"
            text = f"{opening}<tool_response>\n{message['content']}\n</tool_response>\n"
            spans.append((text + ("<|im_end|>" if last else ""), False))
        elif role == "assistant":
            spans.append(("<|im_start|>assistant\n", False))
            thought = message.get("reasoning_content", "")
            head = (f"<think>{thought}</think>", True) if thought else ("<think></think>", False)
            spans.append(head)
            calls = "".join(_call(c["function"]) for c in message.get("tool_calls", []))
            spans.append((f"{message['content']}{calls}<|im_end|>", True))
        else:
            spans.append((f"<|im_start|>{role}\n{message['content']}<|im_end|>", False))
        previous = role
    return spans
