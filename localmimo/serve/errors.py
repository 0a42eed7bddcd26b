"""API errors: what a request gets instead of an answer; each dialect writes it in its own form.

Knows the errors of the engine and HTTP's numbers; nothing of bodies or streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from localmimo.errors import BadRequest, Cancelled, ContextFull, LocalMimoError, with_flags

Kind = Literal[
    "invalid",
    "context",
    "key",
    "forbidden",
    "missing",
    "method",
    "late",
    "large",
    "full",
    "loading",
    "broken",
]

STATUS: dict[Kind, int] = {
    "invalid": 400,
    "context": 400,
    "key": 401,
    "forbidden": 403,
    "missing": 404,
    "method": 405,
    "late": 408,
    "large": 413,
    "full": 429,
    "loading": 503,
    "broken": 500,
}


class ApiError(Exception):
    """One sentence for the client. `param` names the field that is wrong, `retry_s` says when to come back.

    code: the word by which OpenAI's clients know the error. overflow: (tokens of the prompt, of the context), where it
    is too long; each dialect says it in the words that its clients look for.
    """

    def __init__(
        self,
        kind: Kind,
        sentence: str,
        *,
        param: str | None = None,
        retry_s: int | None = None,
        code: str | None = None,
        overflow: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.kind: Kind = kind
        self.sentence = sentence
        self.param = param
        self.retry_s = retry_s
        self.code = code
        self.overflow = overflow

    @property
    def status(self) -> int:
        return STATUS[self.kind]

    @property
    def headers(self) -> Mapping[str, str]:
        found = {} if self.retry_s is None else {"retry-after": str(self.retry_s)}
        if self.kind == "key":
            found["www-authenticate"] = "Bearer"
        return found


def api_error_of(error: BaseException) -> ApiError:
    """The API error for an error; an unexpected one is "broken", without its details."""
    match error:
        case ApiError():
            return error
        case ContextFull(n_tokens=int(n_tokens), context=int(context)):
            return ApiError("context", with_flags(error), overflow=(n_tokens, context))
        case ContextFull():
            return ApiError("context", with_flags(error))
        case BadRequest():
            return ApiError("invalid", with_flags(error))
        case Cancelled():
            return ApiError("loading", "The server is stopping; ask again when it is back.", retry_s=30)
        case RecursionError():
            return ApiError("invalid", "The request is nested too deeply.")
        case LocalMimoError():
            return ApiError("broken", with_flags(error))
    return ApiError(
        "broken", f"The server failed over this request ({type(error).__name__}); its log has the details."
    )
