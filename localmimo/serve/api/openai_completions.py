"""Completions: POST /v1/completions, OpenAI's older dialect, which continues a text as it is.

Knows the dialect's fields and chunks; nothing of HTTP, of threads or of the other dialects.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from localmimo.decode.steps import Step
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.openai_chat import finish_reason, openai_error, usage
from localmimo.serve.api.parameters import Request, read_options, refuse_several, refuse_unknown
from localmimo.serve.api.schema import COMMON, FLAG, TEXT, either, list_of, object_of, option_fields
from localmimo.serve.context import ServerContext
from localmimo.serve.errors import ApiError
from localmimo.serve.response import Event
from localmimo.serve.worker import Job

DEFAULT_TOKENS = 16  # as OpenAI has it

# The body, as /openapi.json describes it.
COMPLETION = object_of(
    COMMON
    | option_fields("completions")
    | {
        "prompt": either(TEXT, list_of({"type": "integer", "minimum": 0}, minItems=1)),
        "n": {"const": 1},
        "echo": FLAG,
        "stream_options": object_of({"include_usage": FLAG}),
    },
    "prompt",
)


class Completions:
    """One text to continue, and its continuation."""

    path = "/v1/completions"
    summary = "Continue a text (OpenAI's completions)."
    body = COMPLETION
    error_schema = "OpenAiError"

    def __init__(self, fields: Fields, context: ServerContext) -> None:
        refuse_unknown(fields)
        text, tokens = _read_prompt(fields)
        options = read_options(fields, "completions")
        options = replace(options, max_tokens=options.max_tokens or DEFAULT_TOKENS)
        self.request = Request(text=text, tokens=tokens, options=options, stream=bool(fields.flag("stream")))
        refuse_several(fields, "n", "best_of")
        if fields.text("suffix"):
            fields.wrong("suffix", "empty: this model continues a text, it does not fill gaps")
        stream_options = fields.object("stream_options")
        self._usage_wanted = bool(stream_options and stream_options.flag("include_usage"))
        self._tokenizer = context.tokenizer
        self._echo = _echo(fields, self.request, context)
        self._steps: list[Step] = []
        self._offset = len(self._echo)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model,
        }

    def first_events(self, job: Job) -> Iterable[Event]:
        if self._echo:
            yield self._chunk(self._echo)

    def push(self, step: Step) -> Iterable[Event]:
        if not self.request.stream:
            self._steps.append(step)
            return
        logprobs = self._logprobs([step])
        if step.text or logprobs:
            yield self._chunk(step.text, logprobs)

    def last_events(self, job: Job) -> Iterable[Event]:
        timings = {"timings": job.stats.as_dict()}
        yield Event(self._object("", None, finish_reason(job)) | timings)
        if self._usage_wanted:
            yield Event(self._head | {"choices": [], "usage": usage(job)})
        yield Event("[DONE]")

    def broken(self, api_error: ApiError) -> Iterable[Event]:
        yield Event(self.error_body(api_error))

    def pause(self, note: str) -> Event | None:
        return None

    def whole(self, job: Job) -> dict[str, Any]:
        text = self._echo + job.answer.content
        whole = self._object(text, self._logprobs(self._steps), finish_reason(job))
        return whole | {"usage": usage(job), "timings": job.stats.as_dict()}

    def _chunk(self, text: str, logprobs: dict[str, Any] | None = None) -> Event:
        return Event(self._object(text, logprobs, None))

    def _object(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._head | {"choices": [choice]}

    def _logprobs(self, steps: list[Step]) -> dict[str, Any] | None:
        listed: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for step in steps:
            if step.token is not None and step.logprob is not None:
                listed["tokens"].append(self._text_of(step.token))
                listed["token_logprobs"].append(max(step.logprob, -9999.0))
                listed["top_logprobs"].append(
                    {self._text_of(token): max(value, -9999.0) for token, value in step.top_logprobs}
                )
                listed["text_offset"].append(self._offset)
            self._offset += len(step.text)
        return listed if listed["tokens"] else None

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token])

    @staticmethod
    def error_body(api_error: ApiError) -> dict[str, Any]:
        return openai_error(api_error)


def _read_prompt(fields: Fields) -> tuple[str | None, list[int] | None]:
    """One prompt, as text or as tokens; a list of one prompt is that prompt."""
    prompt = fields.values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    match prompt:
        case str():
            return prompt, None
        case [*tokens] if tokens and all(type(token) is int for token in tokens):
            return None, tokens
    fields.needed("prompt")
    return fields.wrong(
        "prompt", "one text or one list of tokens: this server continues one prompt per request"
    )


def _echo(fields: Fields, request: Request, context: ServerContext) -> str:
    """What the prompt said, where it is wanted again before its continuation."""
    if not fields.flag("echo"):
        return ""
    if request.options.logprobs is not None:
        fields.wrong("echo", "false where logprobs are wanted: those of the prompt are not computed")
    return request.text if request.text is not None else context.tokenizer.decode(request.tokens or ())
