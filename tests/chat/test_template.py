"""Messages to prompts: golden renders, the checkpoint's own template, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localmimo.chat.messages import check_messages
from localmimo.chat.template import ChatTemplate, family
from localmimo.errors import BadModel, BadRequest
from localmimo.system.helper_process import HelperLost, HelperProcess

GOLDEN = Path(__file__).with_name("golden")
FAMILY = ("mimo-v2-flash", "mimo-v2.5", "mimo-v2.6")
USER = {"role": "user", "content": "Hello"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": " The weather of a place. ",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town <or village>", "enum": ["Zürich", "Oslo"]},
                "days": {"type": "integer", "minimum": 1},
                "anything": {},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}


def call(name: str, arguments: Any, id: str = "") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather and time?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Two calls.",
        "tool_calls": [
            call("get_weather", '{"place": "Zürich", "days": 2, "anything": {"a": ["ü", null]}}', "a"),
            call("clock", {}, "b"),
        ],
    },
    {"role": "tool", "content": "sun", "tool_call_id": "b"},
    {"role": "tool", "content": [{"type": "text", "text": "12:"}, {"type": "text", "text": "00"}]},
    {"role": "assistant", "content": "<think>Both known.</think>Sunny, noon."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome.", "reasoning": "Polite."},
    {"role": "system", "content": "Now be long."},
    {"role": "user", "content": "Why?"},
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "thinking-on": {"messages": [USER], "think": True},
    "thinking-off": {"messages": [USER], "think": False},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    "tools": {"messages": [USER], "tools": [WEATHER, CLOCK]},
    "tools-and-system": {"messages": [{"role": "developer", "content": "Be brief."}, USER], "tools": [CLOCK]},
    "history-kept": {"messages": HISTORY},
    "history-dropped": {"messages": HISTORY, "keep_reasoning": False},
    "call-open": {"messages": HISTORY[:5], "keep_reasoning": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILY)
def test_golden(name: str, case: str) -> None:
    expected = (GOLDEN / f"{name}.{case}.txt").read_text("utf-8")
    assert ChatTemplate.builtin(name).render(**CASES[case]) == expected


def test_the_published_v25_prompt() -> None:
    assert ChatTemplate.builtin("mimo-v2.5").render([USER], think=False) == (
        "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
        "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n<think></think>"
    )


@pytest.mark.parametrize(("name", "default"), list(zip(FAMILY, (False, True, True), strict=True)))
def test_think_default(name: str, default: bool) -> None:
    template = ChatTemplate.builtin(name)
    assert template.think_default is default
    assert template.render([USER]) == template.render([USER], think=default)


def test_the_last_users_turn_keeps_its_reasoning() -> None:
    text = ChatTemplate.builtin("mimo-v2.5").render(HISTORY[:5], keep_reasoning=False)
    assert "<think>Two calls.</think>" in text


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "mimo-v2-flash"),
        ({"model_type": "mimo_v2_flash"}, "mimo-v2-flash"),
        ({"model_type": "mimo_v2", "quantization_config": {"store_dtype": "fp8"}}, "mimo-v2.5"),
        ({"model_type": "mimo_v2", "quantization_config": None}, "mimo-v2.5"),
        ({"model_type": "mimo_v2", "quantization_config": {"store_dtype": "mxfp4"}}, "mimo-v2.6"),
    ],
)
def test_family(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    assert family(config) == name
    assert ChatTemplate.open(tmp_path, config).name == name


def test_the_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    settings = {
        "chat_template": [
            {"name": "rag", "template": "R"},
            {"name": "default", "template": "D{{ eos_token }}"},
        ],
        "eos_token": {"content": "<|im_end|>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.open(tmp_path).render([USER]) == "D<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    own = ChatTemplate.open(tmp_path)
    assert own.render([USER]) == "own Hello"
    assert own.think_default is False  # it has no such switch


def test_what_hugging_face_templates_use(tmp_path: Path) -> None:
    source = (
        "{% for n in [1, 2, 3] %}\n    {% if n == 2 %}{% continue %}{% endif %}\n    {{- n }}\n{% endfor %}"
        "{{ {'k': '<ü&>'} | tojson }} {{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    assert ChatTemplate(source, name="t").render([USER]) == '1\n3\n{"k": "<ü&>"} 4True'


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate."),
        ("{{ nothing.at_all }}", "'nothing' is undefined."),
        ("{{ ().__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ (''|attr('__class__')).x }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ '{0.__class__.x}'.format(1) }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' .* is unsafe"),
        ("{{ raise_exception.__globals__.x }}", "access to attribute '__globals__' .* is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ 'x' * 10**12 }}", "it needs more than 512 MiB of memory."),
        ("{{ 'x' | center(10**12) }}", "it needs more than 512 MiB of memory."),
        ("{{ '%999999999999d' % messages|length }}", "it needs more than 512 MiB of memory."),
        (
            "{% set s = 'x' * 2**28 %}{{ (s ~ s) | length }}",
            "it needs more than 512 MiB of memory.",
        ),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ 10**10000 }}", "Exceeds the limit .* for integer string conversion"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion"),
        (
            "{% for a in range(9999) %}{% for b in range(99) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
            "it writes more than 67,108,864 characters",
        ),
    ],
)
def test_hostile_templates_are_sentences(source: str, says: str) -> None:
    with pytest.raises((BadRequest, BadModel), match=f"^The chat template t .*: .*{says}"):
        ChatTemplate(source, name="t").render([USER])


ENDLESS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4


@pytest.mark.parametrize(
    "source",
    [ENDLESS, "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(99) }}", "{{ 9**(9**9) }}"],
)
def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmimo.chat.template.LIMIT_S", 0.5)
    with pytest.raises((BadRequest, BadModel), match=r": it took longer than 0\.5 s\.$"):
        ChatTemplate("{{ messages[0].content }}" + source, name="t").render([USER])


def test_a_template_goes_on_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% if messages[0].content == 'Hello' %}" + ENDLESS + "{% endif %}ok", name="t")
    with monkeypatch.context() as hurried:
        hurried.setattr("localmimo.chat.template.LIMIT_S", 0.2)
        with pytest.raises(BadRequest, match="took longer"):
            template.render([USER])
    assert template.render([{"role": "user", "content": "?"}]) == "ok"
    template.close()
    assert template.render([{"role": "user", "content": "?"}]) == "ok"


def test_the_templates_program_needs_nothing_of_ours() -> None:
    import localmimo.chat.template_sandbox

    code = "import sys, localmimo.chat.template_sandbox; sys.exit('localmimo.errors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    child = HelperProcess([sys.executable, "-I", localmimo.chat.template_sandbox.__file__], {})
    assert child.request({"source": "{{ 1 + 1 }}", "values": {}}, 60) == {"text": "2"}
    assert child.request({"source": "{% if %}"}, 60)["line"] == 1
    child.close()


LIMITS = """
import sys
from localmimo.chat import template_sandbox as sandbox

sandbox.MAX_MEMORY_BYTES, sandbox.MAX_CPU_S, sandbox.MAX_PROMPT_CHARS = 300 << 20, 1, 1000
{before}
sandbox.main()
"""


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Callable[..., HelperProcess]]:
    """The sandbox's own program with small limits, and with a line that runs before it."""
    started: list[HelperProcess] = []

    def start(before: str = "") -> HelperProcess:
        started.append(HelperProcess([sys.executable, "-c", LIMITS.format(before=before)]))
        return started[-1]

    yield start
    for helper in started:
        helper.close()


def test_the_sandbox_limits_its_own_memory(limited: Callable[..., HelperProcess]) -> None:
    ask = {"source": "{{ 'x' * n }}", "values": {"n": 1 << 30}}
    assert limited().request(ask, 60) == {"refused": "it needs more than 300 MiB of memory"}


def test_the_sandbox_limits_the_text(limited: Callable[..., HelperProcess]) -> None:
    helper = limited()
    source = "{% for _ in range(n) %}{{ 'x' * 100 }}{% endfor %}"
    assert helper.request({"source": source, "values": {"n": 10}}, 60) == {"text": "x" * 1000}
    refused = helper.request({"source": source, "values": {"n": 11}}, 60)
    assert refused == {"refused": "it writes more than 1,000 characters"}


def test_the_sandbox_limits_the_processor_time_of_each_request(
    limited: Callable[..., HelperProcess],
) -> None:
    """Its owner may be gone, so that nobody would end it."""
    helper = limited()
    with pytest.raises(HelperLost) as lost:
        helper.request({"source": ENDLESS, "values": {}}, 60)
    assert not lost.value.timed_out
    busy = limited("import time\nwhile time.process_time() < 1.2: pass")  # more than a request may take
    some = "{% for a in range(20) %}{% for b in range(99999) %}{% endfor %}{% endfor %}ok"
    assert busy.request({"source": some, "values": {}}, 60) == {"text": "ok"}


WRITING = """
import signal
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
compile_template = sandbox.compile_template

def write(path):
    try:
        Path(path).write_text("x")
    except OSError as error:
        return error.strerror

def compile_with_write(source):
    template = compile_template(source)
    template.globals["strftime_now"] = write
    return template

sandbox.compile_template = compile_with_write
"""


def test_the_sandbox_cannot_write_files(limited: Callable[..., HelperProcess], tmp_path: Path) -> None:
    """Even where a template could call a function that does."""
    path = tmp_path / "written"
    values = {"source": "{{ strftime_now(path) }}", "values": {"path": str(path)}}
    assert limited(WRITING).request(values, 60) == {"text": "File too large"}
    assert path.read_bytes() == b""


def test_a_broken_template_is_a_bad_model() -> None:
    with pytest.raises(BadModel, match="The chat template t is broken at line 2: "):
        ChatTemplate("\n{% if %}", name="t")


def test_an_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"there are mimo-v2-flash, mimo-v2\.5, mimo-v2\.6"):
        ChatTemplate.builtin("gpt")


CALLING = {"role": "assistant", "tool_calls": [call("clock", {}, "a")]}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "The conversation is empty: give at least one message."),
        ("hello", "The messages must be a list of {role, content} objects."),
        ([7], "Message 1 is a number; it must be an object with role and content."),
        ([{"content": "x"}], "Message 1 has the role None; the roles are system, user, assistant, tool."),
        ([USER, {"role": "bot", "content": "x"}], "Message 2 has the role 'bot'; "),
        ([{"role": "user"}], "Message 1: the content is null; it must be text or a list of text parts."),
        ([{"role": "user", "content": {"a": 1}}], "Message 1: the content is an object; "),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "Message 1 has a content part of type 'image_url'; this runtime reads text parts only.",
        ),
        ([USER, {"role": "tool", "content": "x"}], "Message 2 is a tool result, but no tool call is waiting"),
        (
            [CALLING, {"role": "tool", "content": "x", "tool_call_id": "z"}],
            "Message 2 answers the tool call 'z', but",
        ),
        (
            [CALLING, {"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}],
            "Message 3 is a tool result, but no tool call is waiting",
        ),
        ([CALLING, USER, {"role": "tool", "content": "x"}], "Message 3 is a tool result, but no tool call"),
        ([{**USER, "tool_calls": [call("f", {})]}], "Message 1 has tool_calls but the role user; "),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            "Message 1 has a tool call without a function name.",
        ),
        ([{"role": "assistant", "content": "x", "reasoning_content": 3}], "reasoning_content is a number"),
    ],
)
def test_bad_messages_are_sentences(messages: Any, says: str) -> None:
    with pytest.raises(BadRequest) as raised:
        ChatTemplate.builtin("mimo-v2.5").render(messages)
    assert says in str(raised.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "arguments",
    ['{"path": "a.txt", "text": "one', "null", "[1]", '{"a": 1}{"a": 2}', '"{}"', "3", "not JSON"],
)
def test_arguments_that_are_no_object_are_text(
    name: str, arguments: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call("f", arguments)]},
        {"role": "tool", "content": "x"},
    ]
    text = ChatTemplate.builtin(name).render(messages)
    assert f"<parameter=arguments>{arguments}</parameter>" in text
    assert "'f' in the history are no JSON object" in caplog.text


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ({"name": "f"}, "The tools must be a list of function objects."),
        ([{"type": "function"}], "Tool 1 has no function name."),
        (["clock"], "Tool 1 has no function name."),
        ([CLOCK, {"name": "f", "parameters": 3}], "Tool 2 (f): parameters must be a JSON schema object."),
    ],
)
def test_bad_tools_are_sentences(tools: Any, says: str) -> None:
    with pytest.raises(BadRequest) as raised:
        ChatTemplate.builtin("mimo-v2.5").render([USER], tools=tools)
    assert str(raised.value) == says


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_renders_the_same(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = ChatTemplate.builtin(name)
    messages = check_messages(HISTORY)
    switches = {"enable_thinking": False, "keep_all_reasoning": False}
    rendered, _ = utils.render_jinja_template(
        conversations=[messages],
        tools=[WEATHER],
        chat_template=template.source,
        add_generation_prompt=True,
        **switches,
    )
    assert rendered == [template.render(HISTORY, tools=[WEATHER], think=False, keep_reasoning=False)]
