"""The options of a generation agree: the declaration, what each dialect reads, and the OpenAPI document."""

from typing import Any

import pytest

from localmimo.decode.options import OPTIONS, GenerationOptions, Sampling
from localmimo.option import DIALECTS, Dialect, Option
from localmimo.serve.api.json_fields import Fields
from localmimo.serve.api.parameters import read_options
from localmimo.serve.endpoints import description
from localmimo.serve.errors import ApiError

PATHS: dict[Dialect, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
# Fields that carry no option of a generation: the conversation, and how the answer is sent.
OTHER: dict[Dialect, set[str]] = {
    "chat": {"model", "stream", "messages", "n", "stream_options"},
    "completions": {"model", "stream", "prompt", "n", "echo", "stream_options"},
    "responses": {"model", "stream", "input", "instructions", "previous_response_id", "store"},
    "messages": {"model", "stream", "messages", "system"},
}


def properties(dialect: Dialect) -> dict[str, Any]:
    post = description()["paths"][PATHS[dialect]]["post"]
    return post["requestBody"]["content"]["application/json"]["schema"]["properties"]  # type: ignore[no-any-return]


def sample(option: Option) -> Any:
    """A value that is not the default."""
    match option.kind:
        case "number":
            return 0.5
        case "count":
            return 3
        case "mapping":
            return {"7": 1.5}
    return ["end"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_document_has_the_declared_fields_and_no_others(dialect: Dialect) -> None:
    declared = {name for option in OPTIONS.values() for name in option.http.get(dialect, ())}
    assert set(properties(dialect)) == declared | OTHER[dialect]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ranges_in_the_document_are_those_that_are_read(dialect: Dialect) -> None:
    found = properties(dialect)
    for option in OPTIONS.values():
        if option.kind != "number":
            continue
        (name,) = option.http[dialect]
        least, most = option.http_range
        assert (found[name]["minimum"], found[name]["maximum"]) == (least, most)
        for value, fits in ((least, True), (most, True), (least - 1, False), (most + 1, False)):
            if fits:
                read_options(Fields({name: value}), dialect)
            else:
                with pytest.raises(ApiError, match=name):
                    read_options(Fields({name: value}), dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_declared_field_reaches_the_engine(dialect: Dialect) -> None:
    plain = read_options(Fields({}), dialect)
    for name, option in OPTIONS.items():
        if option.kind not in ("number", "count", "mapping", "texts") or name in (
            "think_budget",
            "tools",
            "logprobs",
        ):
            continue
        for field in option.http.get(dialect, ()):
            read = read_options(Fields({field: sample(option)}), dialect)
            before, after = (
                (plain.sampling, read.sampling) if hasattr(plain.sampling, name) else (plain, read)
            )
            assert getattr(after, name) != getattr(before, name), field
    assert plain.sampling == Sampling() and plain.max_tokens == GenerationOptions().max_tokens


def test_what_clients_write_for_all_tokens_and_for_the_likeliest_one() -> None:
    assert read_options(Fields({"top_k": -1}), "chat").sampling == Sampling(top_k=0)
    assert read_options(Fields({"top_p": 0}), "chat").sampling == Sampling(temperature=0)
    assert read_options(Fields({"temperature": 1e-9}), "chat").sampling == Sampling(temperature=0)
    both = Fields({"max_completion_tokens": 5, "max_tokens": 7})
    assert read_options(both, "chat").max_tokens == 5
