"""localmimo: runs MiMo-V2 language models on one workstation.

    from localmimo import load, Sampling

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmimo.agent import Run
    from localmimo.chat.tool_call import ToolCall
    from localmimo.decode.answer import Message
    from localmimo.decode.options import Sampling
    from localmimo.decode.session import Session
    from localmimo.decode.steps import Stats, Step
    from localmimo.engine import Completion, Engine, load
    from localmimo.errors import (
        BadModel,
        BadPack,
        BadRequest,
        BadSession,
        Cancelled,
        ContextFull,
        DoesNotFit,
        LocalMimoError,
        NoDevice,
    )
    from localmimo.tools.tool import Tool

__version__ = "0.1.0"

_MODULES = {
    "load": "engine",
    "Engine": "engine",
    "Completion": "engine",
    "Message": "decode.answer",
    "Run": "agent",
    "Tool": "tools.tool",
    "ToolCall": "chat.tool_call",
    "Sampling": "decode.options",
    "Session": "decode.session",
    "Step": "decode.steps",
    "Stats": "decode.steps",
    "LocalMimoError": "errors",
    "BadModel": "errors",
    "BadPack": "errors",
    "BadRequest": "errors",
    "BadSession": "errors",
    "Cancelled": "errors",
    "ContextFull": "errors",
    "DoesNotFit": "errors",
    "NoDevice": "errors",
}

__all__ = [
    "BadModel",
    "BadPack",
    "BadRequest",
    "BadSession",
    "Cancelled",
    "Completion",
    "ContextFull",
    "DoesNotFit",
    "Engine",
    "LocalMimoError",
    "Message",
    "NoDevice",
    "Run",
    "Sampling",
    "Session",
    "Stats",
    "Step",
    "Tool",
    "ToolCall",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'localmimo' has no attribute {name!r}")
    return getattr(import_module(f"localmimo.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
