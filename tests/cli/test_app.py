"""The command line from outside: help, exit codes, sentences, and no torch where none is needed."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from localmimo.cli import app
from localmimo.errors import BadModel, BadRequest, Cancelled, ContextFull, DoesNotFit, LocalMimoError
from quant.errors import BadCheckpoint, BadPack, BadRecipe, NoSpace, NotWritable, QuantError
from tests.cli.program import localmimo

ROOT = Path(__file__).parents[2]
COMMANDS = ("quantize", "plan", "doctor", "verify", "perplexity", "bench", "replay", "stats", "chat", "serve")


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("-h",), *((command, "--help") for command in COMMANDS)]
)
def test_help_needs_no_torch(arguments: tuple[str, ...]) -> None:
    code, out, err = localmimo(*arguments)
    assert (code, err) == (0, "heavy: []\n")
    assert out.startswith("Usage: localmimo")
    assert max(map(len, out.splitlines())) <= 100


def test_help_names_every_command() -> None:
    out = localmimo("--help")[1]
    assert [line.split()[0] for line in out.split("Commands:\n")[1].split("\n\n")[0].splitlines()] == list(
        COMMANDS
    )


def test_the_defaults_in_the_help_are_the_defaults() -> None:
    from localmimo.decode.options import Sampling

    out = " ".join(localmimo("chat", "--help")[1].split())
    for flag, key in (
        ("--temp", "temperature"),
        ("--top-p", "top_p"),
        ("--top-k", "top_k"),
        ("--min-p", "min_p"),
    ):
        shown = re.search(rf"{flag} [XN] .*?\[default: (.*?)\]", out)
        assert shown is not None and float(shown[1]) == getattr(Sampling(), key), flag


def test_version() -> None:
    from localmimo import __version__

    assert localmimo("--version") == (0, f"localmimo {__version__}\n", "heavy: []\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("frobnicate",), 2, "error: No such command 'frobnicate'. See localmimo --help."),
        (("quantize",), 2, "error: Missing argument 'SRC'. See localmimo quantize --help."),
        (("chat", "--bogus"), 2, "error: No such option: --bogus"),
        (("chat", "q", "--top-p", "1.5"), 2, "error: Invalid value for '--top-p': "),
        (("chat", "q", "--temp", "-1"), 2, "error: Invalid value for '--temperature' / '--temp': "),
        (("chat", "q", "-n", "0"), 2, "error: Invalid value for '-n' / '--max-tokens': "),
        (("chat", "a", "b", "c"), 2, "error: Got unexpected extra argument"),
        (("chat", ""), 2, "error: The prompt is empty: say something."),
        (("chat",), 2, "error: The prompt is empty: say something."),
        (("chat", "q", "-c", "lots"), 2, 'error: --context is "lots"; write a number such as 4096 or 32k.'),
        (("chat", "/no/such/pack", "q"), 4, "error: There is no folder /no/such/pack."),
        (("chat", "./no-such-pack"), 2, "error: The prompt is empty: say something."),
        (("serve", "--host", "0.0.0.0"), 2, "error: Everybody who reaches 0.0.0.0 could use this server: "),
        (("verify", "/no/such/pack"), 4, "error: There is no folder /no/such/pack."),
        (("quantize", "/no/such/model"), 4, "error: /no/such/model is not a folder with a checkpoint."),
        (("perplexity", "/no/such/pack", "pyproject.toml"), 4, "error: There is no folder /no/such/pack."),
        (("perplexity", "/no/such/pack", "/no/such/file"), 2, "error: There is no file /no/such/file."),
        (("perplexity", "/no/such/pack", "-"), 2, "error: - is empty: there is nothing to predict."),
    ],
)
def test_mistakes_are_one_sentence_and_need_no_torch(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    got, out, err = localmimo(*arguments)
    assert (got, out) == (code, "")
    sentence, heavy = err.splitlines()
    assert sentence.startswith(says) and sentence.endswith(".")
    assert heavy == "heavy: []"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LocalMimoError("x"), 1), (DoesNotFit("x"), 3), (BadModel("x"), 4), (BadRequest("x"), 2),
        (ContextFull("x"), 2), (Cancelled("x"), 130), (QuantError("x"), 1), (BadCheckpoint("x"), 4),
        (BadPack("x"), 4), (BadRecipe("x"), 2), (NoSpace("x"), 3), (NotWritable("x"), 1),
        (ValueError("x"), None),
    ],
)  # fmt: skip
def test_exit_codes(error: Exception, code: int | None) -> None:
    assert app.exit_code(error) == code


FAILING = """
import sys
import localmimo.cli.commands.verify as verify
from localmimo.cli.app import run
def fail(*_, **__):
    raise {error}
verify.run_verify = fail
sys.exit(run(["verify", "x", *sys.argv[1:]]))
"""


def test_an_unexpected_failure_is_one_sentence_too() -> None:
    script = FAILING.format(error="ZeroDivisionError('division\\nby zero')")
    expected = "error: ZeroDivisionError: division by zero. Run with -v for the traceback.\n"
    assert localmimo(script=script) == (1, "", expected)
    code, _, err = localmimo("-v", script=script)
    assert code == 1 and err.startswith("Traceback (most recent call last):")
    assert err.endswith("error: ZeroDivisionError: division by zero.\n")


def test_system_errors_and_interrupts_are_sentences() -> None:
    script = FAILING.format(error="PermissionError(13, 'Permission denied', '/x')")
    assert localmimo(script=script) == (1, "", "error: Permission denied: /x.\n")
    assert localmimo(script=FAILING.format(error="KeyboardInterrupt")) == (130, "", "error: interrupted.\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = (
        "import sys, os; import localmimo.cli.commands.verify as verify; from localmimo.cli.app import run\n"
        "def talk(pack, ui, as_json):\n"
        "    for _ in range(100_000): ui.data('line')\n"
        "verify.run_verify = talk\nsys.exit(run(['verify', 'x']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, cwd=ROOT) as talking:
        assert talking.stdout and talking.stderr
        talking.stdout.readline()
        talking.stdout.close()
        assert talking.stderr.read() == b""
    assert talking.returncode == 1


def test_structured_output_and_drafts_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}')
    common = ["--no-think", "--temp", "0", "-n", "60", "-q"]
    assert app.run(["chat", "Is it?", "--grammar", 'start: "yes" | "no"', "--draft", "2", *common]) == 0
    assert capfd.readouterr().out.strip() in ("yes", "no")
    assert app.run(["chat", "Is it?", "--schema", str(schema), *common]) == 0
    assert capfd.readouterr().out.lstrip().startswith("{")
    for wrong, sentence in (
        (["--draft", "4"], "none of auto, 0, 1, 2 and 3"),
        (["--schema", str(schema), "--grammar", "start: /a/"], "not both"),
        (["--schema", str(tmp_path / "missing")], "there is no file"),
    ):
        assert app.run(["chat", "Is it?", *wrong]) == 2
        assert sentence in capfd.readouterr().err
