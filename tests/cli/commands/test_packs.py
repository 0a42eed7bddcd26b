"""quantize, verify and perplexity on real, tiny packs."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localmimo.cli.commands.perplexity import PerplexityOptions, run_perplexity, windows
from localmimo.cli.commands.quantize import QuantizeOptions, progress_line, run_quantize
from localmimo.cli.commands.verify import run_verify
from localmimo.errors import BadRequest
from quant import Progress
from quant.errors import BadPack, NoSpace
from tests.packs import add_tokenizer
from tests.scripted import Capture
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, tiny-hf, and its packs tiny-hf-nf4 and tiny-hf-bf16."""
    folder = tmp_path_factory.mktemp("packs")
    add_tokenizer(make_checkpoint(folder / "tiny-hf"))
    for experts, dense in (("nf4", "int8"), ("bf16", "bf16")):
        out = folder / f"tiny-hf-{experts}"
        run_quantize(QuantizeOptions(folder / "tiny-hf", out, experts, dense), Capture(quiet=True).ui)
    return folder


def test_a_dry_run_shows_sizes_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    shown = Capture()
    assert run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "out", dry_run=True), shown.ui) == 0
    lines = shown.out.splitlines()
    assert lines[0].split() == ["group", "tensors", "from", "to", "size", "was"]
    assert lines[-3] == f" to    {tmp_path}/out"
    assert lines[-2].startswith(" disk  467 kB needed, ") and lines[-2].endswith(" free ✓")
    assert lines[-1].startswith(" RAM   ")
    assert shown.err == " Nothing was written. Run again without --dry-run.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json(folder: Path, tmp_path: Path) -> None:
    shown = Capture()
    run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "out", dry_run=True, as_json=True), shown.ui)
    facts = json.loads(shown.out)
    files = [file.stat().st_size for file in (folder / "tiny-hf-nf4").glob("*.safetensors")]
    assert facts["status"] == "dry run" and facts["total_bytes"] == facts["needed_bytes"] == sum(files)


def test_too_little_disk_is_said_with_both_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    shown = Capture()
    with pytest.raises(NoSpace, match="needs 467 kB and 1 kB are free: free 466 kB, or choose another --out"):
        run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "out", dry_run=True), shown.ui)
    assert "free ✗" in shown.out


def test_a_conversion_ends_with_the_next_command(folder: Path, tmp_path: Path) -> None:
    shown = Capture()
    assert run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "my pack"), shown.ui) == 0
    first, second = shown.out.splitlines()
    assert first.startswith(" ✓ my pack: 467 kB, done in ") and ", checksums ok, error 0.0" in first
    assert second == f"   Next: localmimo chat '{tmp_path}/my pack'"
    again = Capture()
    assert run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "my pack"), again.ui) == 0
    assert " ✓ my pack: 467 kB, already done, checksums ok" in again.out


def test_the_default_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = Capture()
    run_quantize(QuantizeOptions(folder / "tiny-hf", experts="mxfp4", as_json=True), shown.ui)
    assert " No --out was given: the pack goes to ./tiny-hf-mxfp4.\n" in shown.err
    facts = json.loads(shown.out)
    assert facts["status"] == "done" and facts["verified"] and facts["rms_error"] > 0
    assert (tmp_path / "tiny-hf-mxfp4" / "manifest.json").is_file()


SLOW = """
import sys, time
import quant.conversion.conversion as conversion
make_page = conversion.make_page
def slowly(source, name, page):
    time.sleep(0.3 if name.startswith("layers.2.") else 0)
    return make_page(source, name, page)
conversion.make_page = slowly
from localmimo.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_ctrl_c_stops_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(folder / "tiny-hf"), "-o", str(tmp_path / "out")]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    first = tmp_path / "out.partial" / "experts-01.safetensors"
    for _ in range(600):
        if first.exists() and list(first.parent.glob("experts-02*")):
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1] == (
        " Stopped after layer 1. Run the same command to continue; --restart to begin again."
    )
    shown = Capture()
    assert run_quantize(QuantizeOptions(folder / "tiny-hf", tmp_path / "out"), shown.ui) == 0
    assert "\n       an earlier run left " in shown.err
    whole = {file.name: file.read_bytes() for file in (folder / "tiny-hf-nf4").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == whole


def step(**changes: Any) -> Progress:
    facts: dict[str, Any] = {
        "unit": "experts-17.safetensors", "done_units": 20, "total_units": 50, "done_bytes": 61_800_000_000,
        "total_bytes": 170_300_000_000, "resumed_bytes": 0, "rms_error": 0.0722, "worst_error": 0.0794,
        "worst_name": "layers.3.experts.17", "elapsed_s": 870.0,
    }  # fmt: skip
    return Progress(**(facts | changes))


def test_the_progress_line() -> None:
    assert progress_line(step(), 47, 120) == (
        " layer 17/47 ━━━━━━━╸────────────   36%"
        "  62/170 GB  71.0 MB/s  left 25 min  rms error 0.0722  (worst 0.0794 L3 E17)"
    )
    assert progress_line(step(), 47, 60) == " layer 17/47 ━━━╸──────   36%  62/170 GB  71.0 MB/s"
    started = step(unit="dense-00001.safetensors", done_bytes=0, rms_error=0.0, elapsed_s=0.0)
    assert progress_line(started, 47) == " dense       ────────────────────    0%  0/170 GB"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_the_progress_line_fits(width: int) -> None:
    assert len(progress_line(step(), 47, width)) < width


def test_verify(folder: Path) -> None:
    shown = Capture()
    assert run_verify(folder / "tiny-hf-nf4", shown.ui, as_json=False) == 0
    assert shown.out.startswith(" ✓ tiny-hf: checksums ok (") and shown.err == ""


def test_verify_names_the_damaged_expert(folder: Path, tmp_path: Path) -> None:
    import shutil

    pack = shutil.copytree(folder / "tiny-hf-nf4", tmp_path / "pack")
    with (pack / "experts-02.safetensors").open("r+b") as file:
        file.seek(4096 + 3 * 4096 + 5)
        file.write(b"\xff\x00\xff")
    shown = Capture()
    with pytest.raises(BadPack, match="the pages of experts 3 of layer 2 do not match their checksums"):
        run_verify(pack, shown.ui, as_json=True)
    facts = json.loads(shown.out)
    assert not facts["ok"] and len(facts["problems"]) == 1


TEXT = "The river runs to the sea, and the sea is wide; the river is long."


def measured(folder: Path, tmp_path: Path, text: str = TEXT, **settings: Any) -> dict[str, Any]:
    (tmp_path / "text").write_text(text)
    shown = Capture()
    run_perplexity(
        PerplexityOptions(str(folder / "tiny-hf-nf4"), tmp_path / "text", as_json=True, **settings), shown.ui
    )
    return json.loads(shown.out)  # type: ignore[no-any-return]


def test_perplexity_is_what_the_logits_say(folder: Path, tmp_path: Path) -> None:
    from localmimo import load

    facts = measured(folder, tmp_path, context=16)
    nll, n_predicted = 0.0, 0
    with load(folder / "tiny-hf-nf4", context=16) as engine:
        tokens = engine.encode(TEXT)
        for start in range(0, len(tokens), 16):
            window = tokens[start : start + 16]
            scores = engine.logits(window).double().log_softmax(-1)
            nll -= sum(float(scores[i, token]) for i, token in enumerate(window[1:]))
            n_predicted += len(window) - 1
    assert facts["n_predicted"] == n_predicted and facts["n_tokens"] == len(tokens)
    assert math.isclose(facts["perplexity"], math.exp(nll / n_predicted), rel_tol=1e-5)
    assert math.isclose(
        facts["bits_per_byte"], nll / math.log(2) / n_predicted, rel_tol=1e-5
    )  # 1 byte a token
    assert facts["window"] == 16 and facts["n_windows"] == math.ceil(len(tokens) / 16)


def test_a_pack_against_itself_does_not_stray(folder: Path, tmp_path: Path) -> None:
    other = measured(folder, tmp_path, against=str(folder / "tiny-hf-nf4"))["against"]
    assert abs(other["mean_kl"]) < 1e-9 and other["top1_agreement"] == 1


def test_a_pack_against_a_finer_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    shown = Capture()
    job = PerplexityOptions(
        str(folder / "tiny-hf-nf4"), tmp_path / "text", str(folder / "tiny-hf-bf16"), context=32
    )
    assert run_perplexity(job, shown.ui) == 0
    lines = shown.out.splitlines()
    assert lines[0].startswith("tiny-hf-nf4: perplexity ") and lines[1].startswith(
        "tiny-hf-bf16: perplexity "
    )
    assert lines[2].startswith("divergence from tiny-hf-bf16: mean KL 0.")
    assert (
        " tokens predicted, in 3 windows of 32 that do not overlap, each from an empty context; " in lines[3]
    )


@pytest.mark.parametrize(
    ("text", "says"), [("", "is empty: there is nothing"), ("a", "has 1 token; at least 2")]
)
def test_nothing_to_predict(folder: Path, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        measured(folder, tmp_path, text)


def test_windows() -> None:
    assert list(windows([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4]]
    assert list(windows([1, 2, 3], 9)) == [[1, 2, 3]]
