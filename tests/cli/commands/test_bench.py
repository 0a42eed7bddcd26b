"""`localmimo bench`: what it prints, what it counts, what it refuses."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from localmimo.bench.corpus import Corpus
from localmimo.bench.runs import BenchRun, StepCost, TraceRecorder, figures
from localmimo.chat.tokenizer import Tokenizer
from localmimo.cli import app
from localmimo.cli.commands import bench
from localmimo.cli.commands.bench import BenchOptions, parse_depths, run_bench
from localmimo.decode.steps import DraftStats
from localmimo.errors import BadRequest, DoesNotFit
from localmimo.experts.policy.trace import read_trace
from localmimo.experts.store.counters import PageCounters, hit_shares
from localmimo.loading.options import LoadOptions
from localmimo.mini import CHECKPOINT
from quant import convert
from tests.cli.program import localmimo
from tests.scripted import Capture
from tests.tiny import make_checkpoint

SMALL: dict[str, Any] = {
    "prompt_tokens": 24,
    "max_tokens": 5,
    "repeat": 2,
    "depths": (0, 64),
}


def small(**given: Any) -> BenchOptions:
    """A small run, but for what is given."""
    flags = {"context": 256, "ram": "96MiB", "profile": None}
    loading = flags | {name: given.pop(name) for name in ("profile", "ram", "kv") if name in given}
    return BenchOptions(**SMALL | given, loading=LoadOptions(**loading))


def run(request: BenchOptions, **settings: Any) -> tuple[int, Capture]:
    shown = Capture(width=200, **settings)
    return run_bench(request, shown.ui), shown


TABLE = r"""localmimo \S+( \(\S+\))? · .+ · \d+ cores · .+ RAM · Linux \S+
mimo-mini · nf4 · 25\.4 MB pack [0-9a-f]{12} · context 256
RAM .+ of 101 MB: dense .+ · kv .+ · workspace .+ · experts .+ \(224 of 224, 100%\)
asked: prompt 24 · answer 5 · 2 runs · RAM 96MiB · warm: after a prompt and answer that do not count · profile none
in force: cpu, .+ · activations float32, KV bfloat16 · 224 slots · drafts auto of 3 heads · prefetch .+
text: mimo-mini's held-out conversations; the answer is the likeliest token each time

  depth    prefill tok/s   decode tok/s  first token  read/token  disk GB/s  drafts  experts found in
 +0 +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +\d+\.\d s +\d+ kB +\S+ +(–|\d+%) +ram \d+% disk \d+%
 +64 +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +\d+\.\d s +\d+ kB +\S+ +(–|\d+%) +ram \d+% disk \d+%

 read/token, disk and experts: of the answers; --json has those of the prompts too
 peak memory \S+ [MG]B, \S+ MB of it over Python and its libraries; the budget: 101 MB
( experts read ahead: \d+ were then needed, \d+ were not
)?"""


def test_the_table() -> None:
    code, shown = run(small())
    assert code == 0 and shown.err == ""
    assert re.fullmatch(TABLE, shown.out), shown.out


def test_json_and_a_line_per_step(nf4_pack: Path, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_text("{}\n")  # lines are appended
    request = small(model=str(nf4_pack), stats_json=log, as_json=True, form="md")
    code, shown = run(request)
    (line,) = shown.out.splitlines()
    facts = json.loads(line)
    assert code == 0 and facts["finished"] and "\n| depth | prefill tok/s |" in shown.err
    assert facts["requested"]["context"] == 256 == facts["effective"]["context"]
    assert facts["text"]["answer"] == "drawn" and facts["machine"]["n_cores"] >= 1
    assert facts["peak_rss_bytes"] >= facts["library_bytes"] > 1 << 25
    assert [(it["depth"], it["n_runs"], it["prompt_tokens"]) for it in facts["results"]] == [
        (0, 2, 24),
        (64, 2, 24),
    ]
    lines = [json.loads(text) for text in log.read_text().splitlines()[1:]]
    assert [(it["depth"], it["run"], it["step"]) for it in lines] == [
        (depth, number, step) for depth in (0, 64) for number in range(2) for step in range(5)
    ]
    assert [it["phase"] for it in lines[:5]] == ["prefill"] + ["decode"] * 4
    assert [it["tokens"] for it in lines[:5]] == [24, 1, 1, 1, 1]
    n_pages = facts["effective"]["plan"]["n_pages"]
    for found in facts["results"]:
        mine = [it for it in lines if it["depth"] == found["depth"] and it["phase"] == "decode"]
        assert found["decode"]["ram_pages"] == sum(it["ram_pages"] for it in mine)
        assert found["decode"]["disk_bytes"] == sum(it["disk_bytes"] for it in mine)
        assert found["decode"]["n_tokens"] == 8 and sum(found["decode"]["hits"].values()) == pytest.approx(1)
        assert len(found["decode_tps_runs"]) == 2 and found["decode_tps"] > 0 and found["decode_tps_sd"] >= 0
    assert sum(it["disk_pages"] for it in lines) <= n_pages  # everything fits: no page is read twice


def test_a_profile_only_where_one_is_named(nf4_pack: Path) -> None:
    for profile in (None, "mine"):
        request = small(model=str(nf4_pack), profile=profile, as_json=True)
        assert json.loads(run(request)[1].out)["requested"]["profile"] == profile
        assert (nf4_pack / "stats").exists() == (profile is not None)
    assert (nf4_pack / "stats" / "mine.safetensors").is_file()


def test_what_changed_meanwhile_is_said(nf4_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_step = bench.BenchReport.on_step

    def squeeze(report: bench.BenchReport, run: BenchRun, taken: StepCost) -> None:
        on_step(report, run, taken)
        report._engine._store.resize(12)
        report._engine._store._disk.direct = False

    monkeypatch.setattr(bench.BenchReport, "on_step", squeeze)
    shown = run(small(model=str(nf4_pack), as_json=True))[1]
    facts = json.loads(shown.out)
    assert facts["effective"]["slots_now"] == facts["results"][0]["n_slots"] == 12
    assert facts["effective"]["direct_reads"] is False and "pages came through the page cache" in shown.err
    assert " the system was short of memory: down to 12 of 32 slots\n" in shown.err


def test_a_trace_of_the_answers(nf4_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    facts = json.loads(run(small(model=str(nf4_pack), record=path, as_json=True))[1].out)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    layers = [1, 2, 3, 4]
    assert [(it["step"], it["layer"]) for it in lines] == [(s, layer) for s in range(16) for layer in layers]
    asked = sum(found["decode"][f"{tier}_pages"] for found in facts["results"] for tier in ("ram", "disk"))
    assert read_trace(path).n_requests == asked == 16 * 4 * 2
    assert all(it["experts"] == sorted(set(it["experts"])) for it in lines)
    assert app.run(["replay", str(path), "--slots", "8,32", "--json"]) == 0
    played = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(it["slots"], it["requests"]) for it in played] == [(8, asked), (32, asked)]


def test_drafts_are_counted(nf4_pack: Path) -> None:
    facts = json.loads(run(small(model=str(nf4_pack), draft="2", as_json=True))[1].out)
    assert facts["effective"]["draft"] == {"setting": 2, "heads": 2}
    for found in facts["results"]:  # 4 tokens after the first one, the last pass without room for a draft
        assert found["drafts"]["drafted"] > 0 and found["decode"]["n_tokens"] == 8
        assert found["drafts"]["passes"] + found["drafts"]["accepted"] == 8


def test_cold_runs_start_from_nothing(nf4_pack: Path) -> None:
    request = small(model=str(nf4_pack), as_json=True, cold=True)
    facts = json.loads(run(request)[1].out)
    for found in facts["results"]:
        assert found["prompt_tokens"] == found["depth"] + 24 and found["prefill"]["hits"]["disk"] == 1.0


def test_no_words_for_the_vocabulary(tmp_path: Path) -> None:
    """A pack without a tokenizer is measured with drawn tokens, and says so."""
    for _ in convert(make_checkpoint(tmp_path / "hf"), tmp_path / "pack"):
        pass
    request = small(model=str(tmp_path / "pack"), as_json=True, repeat=1)
    facts = json.loads(run(request)[1].out)
    assert facts["text"] == {
        "from": "tokens drawn at random: the pack has no tokenizer of its own",
        "answer": "drawn",
    }
    assert facts["results"][0]["decode_tps_sd"] is None


def test_ctrl_c_shows_what_there_is(nf4_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_step, calls = bench.BenchReport.on_step, []

    def press(report: bench.BenchReport, run: BenchRun, taken: StepCost) -> None:
        on_step(report, run, taken)
        calls.append(run)
        if len(calls) == 13:  # in the first answer at the second depth
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench.BenchReport, "on_step", press)
    code, shown = run(small(model=str(nf4_pack), as_json=True))
    facts = json.loads(shown.out)
    assert code == 130 and not facts["finished"] and " Interrupted after 2 whole runs of 4.\n" in shown.err
    assert [(it["depth"], it["n_runs"], it["decode"]["n_tokens"]) for it in facts["results"]] == [
        (0, 2, 8),
        (64, 1, 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--depths", "0,deep"), 2, 'error: --depths is "deep"; write a number such as 4096 or 32k.'),
        (("--depths", "1k,1024"), 2, 'error: --depths is "1k,1024"; it names a depth twice.'),
        (("-p", "0"), 2, "error: --prompt-tokens is 0; a prompt has at least one token."),
        (("-n", "1"), 2, "error: --max-tokens is 1; the first token comes with the prompt, so at least 2."),
        (("-r", "0"), 2, "error: Invalid value for '-r' / '--repeat': "),
        (("-o", "html"), 2, 'error: --output is "html"; it is one of text, md.'),
        (("--draft", "4"), 2, "error: Invalid value for '--draft': 4 is none of auto, 0, 1, 2 and 3."),
        (
            ("--draft", "1", "--record", "x"),
            2,
            "error: --record is about one token at a time: leave out --draft",
        ),
        (("--draft", "auto", "--check-plan"), 2, "error: --check-plan is about one token at a time: leave"),
        (("--ram", "much"), 2, 'error: "much" is not a size'),
        (("--cold", "--profile", "x"), 2, "error: --cold starts from nothing: leave out --profile."),
        (
            ("--depths", "8k"),
            2,
            "error: A depth of 8,192 with 512 tokens of prompt and 64 of answer needs 8,768 positions, and this model",
        ),
        (("-c", "600", "--depths", "100"), 2, "error: A depth of 100 with 512 tokens of prompt and 64"),
        (
            ("--stats-json", "/no/such/x"),
            2,
            "error: --stats-json: /no/such/x cannot be written (No such file",
        ),
        (("--record", "/no/such/x"), 2, "error: --record: /no/such/x cannot be written (No such file"),
        (("--plot", "x.pdf"), 2, 'error: --plot is "x.pdf"; its name must end in .svg or .png.'),
        (("--plot", "/no/such/folder/x.svg"), 2, "error: --plot: there is no folder /no/such/folder."),
        (("/no/such/pack",), 4, "error: There is no folder /no/such/pack."),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(says) and err.count("\n") == 1


def test_mistakes_need_no_torch() -> None:
    code, out, err = localmimo("bench", "--depths", "8k")
    assert (code, out) == (2, "") and err.endswith("heavy: []\n")


def test_a_budget_that_is_too_small(nf4_pack: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"Give ram=\d+MiB"):
        run(small(model=str(nf4_pack), ram="1MiB"))


def test_depths() -> None:
    assert parse_depths("0,2k,8k") == (0, 2048, 8192)
    with pytest.raises(BadRequest):
        parse_depths("")


# ---- the plan, pictures ----


def test_the_plan_is_held_against_what_was_measured(
    nf4_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    request = small(model=str(nf4_pack), check_plan=True, as_json=True, kv="int8")
    shown = run(request)[1]
    facts = json.loads(shown.out)
    assert facts["effective"]["kv_dtype"] == "int8"
    assert len(facts["speeds"]) == 2  # before and after
    for speeds in facts["speeds"]:
        assert speeds["ram_origin"] == speeds["disk_origin"] == "measured"
        assert (
            speeds["products"] > 0 and speeds["layer_s"] > 0 and speeds["disk_again"] >= speeds["disk_read"]
        )
    for found in facts["results"]:
        check = found["plan_check"]
        low, high = check["predicted_tps"]
        assert 0 < low <= high <= 2.0001 * low and check["measured_tps"] == found["decode_tps"]
        assert check["inside"] == (low <= found["decode_tps"] <= high)
        assert check["hit_rate"] == pytest.approx(found["decode"]["hits"]["ram"])
    said = re.findall(
        r" plan at depth (\d+): \S+ to \S+ tok/s at a hit rate of \d+%; measured \S+: \w+", shown.err
    )
    assert said == ["0", "64"]


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture(nf4_pack: Path, tmp_path: Path, ending: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed.{ending}"
    code, shown = run(small(model=str(nf4_pack), plot=path))
    assert code == 0 and shown.err == f" The picture is in {path}.\n"
    assert path.read_bytes().startswith(begins)


def test_a_picture_in_text_where_matplotlib_is_missing(
    nf4_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "speed.png"
    code, shown = run(small(model=str(nf4_pack), plot=path))
    assert code == 0 and not path.exists()
    assert shown.err == (
        f" matplotlib is not installed (pip install 'localmimo[plot]'), so {path} is not written:\n"
    )
    chart = shown.out.split(" decode tok/s by depth\n")[1].splitlines()
    assert [line.split()[0] for line in chart[:2]] == ["0", "64"] and chart[2].startswith(" experts found")
    assert [line.split()[0] for line in chart[3:]] == [f"{n}–{n + 1}" for n in range(1, 16, 2)]


def test_a_line_that_lives_while_it_runs(nf4_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmimo.cli.ui.REDRAW_S", 0.0)
    shown = run(small(model=str(nf4_pack)), terminal=True)[1]
    assert re.search(r"\r depth 0 · run 1/2 · token \d/5 · [\d.]+ tok/s · experts ram \d+%", shown.err)
    assert " depth 64 · reading 24 of 24 tokens ━" in shown.err
    assert "reading" not in run(small(model=str(nf4_pack)), terminal=True, quiet=True)[1].err


# ---- corpus ----


def test_the_corpus_is_real_text_in_another_order_each_time() -> None:
    tokenizer = Tokenizer.open(CHECKPOINT)
    corpus = Corpus.open(lambda: tokenizer, tokenizer.vocab_size)
    assert corpus.is_text
    first, again, other = corpus.tokens(0, 40_000), corpus.tokens(0, 100), corpus.tokens(1, 100)
    assert len(first) == 40_000 and first[:100] == again != other
    assert "<|im_start|>system" in tokenizer.decode(first[:200])
    half = len(corpus.tokens(0, 1)) and sum(map(len, corpus._documents))
    assert first[:half] != first[half : 2 * half]


def test_a_strange_vocabulary_is_drawn_from() -> None:
    tokenizer = Tokenizer.open(CHECKPOINT)
    corpus = Corpus.open(lambda: tokenizer, 2 * tokenizer.vocab_size)
    drawn = corpus.tokens(3, 1000)
    assert not corpus.is_text and drawn == corpus.tokens(3, 1000)
    assert 0 <= min(drawn) < max(drawn) < 2 * tokenizer.vocab_size and len(set(drawn)) > 800


# ---- figures ----


def test_figures_of_known_runs() -> None:
    prompt = StepCost(100, 2.0, PageCounters(disk_pages=10, disk_bytes=1000, read_s=0.5))
    step = StepCost(
        1, 0.25, PageCounters(ram_pages=3, disk_pages=1, disk_bytes=100, read_s=0.1, prefetch_useful=1)
    )
    drafts = DraftStats(passes=2, drafted=[2, 1, 1], accepted=[2, 1, 0])
    slow = StepCost(1, 0.5, PageCounters(ram_pages=4))
    found = figures(
        0,
        [
            BenchRun(0, 0, prompt, 2.0, drafts, [step, step], 5),
            BenchRun(0, 1, prompt, 2.0, DraftStats(), [slow], 7),
        ],
    )
    assert (found["prefill_tps"], found["prefill_tps_sd"]) == (50.0, 0.0)
    assert (found["decode_tps"], found["decode_tps_runs"]) == (3.0, [4.0, 2.0])
    assert found["decode_tps_sd"] == pytest.approx(2**0.5)
    assert (found["step_s_median"], found["step_s_max"], found["peak_rss_bytes"]) == (0.25, 0.5, 7)
    assert found["prefill"]["disk_read"] == 2000.0 and found["prefill"]["hits"] == {"ram": 0.0, "disk": 1.0}
    decode = found["decode"]
    assert decode["hits"] == {"ram": 10 / 12, "disk": 2 / 12} and decode["prefetch_useful"] == 2
    assert decode["disk_bytes_per_token"] == pytest.approx(200 / 3)
    assert decode["disk_read"] == pytest.approx(1000.0)
    assert found["drafts"] == {"passes": 2, "drafted": 4, "accepted": 3, "acceptance": 0.75}
    assert hit_shares({"gpu": 1, "ram": 1, "disk": 2}) == {"gpu": 0.25, "ram": 0.25, "disk": 0.5}
    assert hit_shares({"gpu": 0, "ram": 0, "disk": 0}) == {} and hit_shares({"gpu": 0, "ram": 1}) == {
        "ram": 1.0
    }
    nothing = figures(0, [BenchRun(0, 0, prompt, 2.0, DraftStats())])
    assert nothing["decode_tps"] is None and nothing["step_s_max"] is None
    assert "–" in bench.row(nothing, "text")


def test_a_recorder_turns_layers_into_tokens() -> None:
    import torch

    lines: list[tuple[int, int, list[int]]] = []
    recorder = TraceRecorder(lambda *line: lines.append(line))  # type: ignore[arg-type]
    for chosen in ([[1, 2]], [[3, 4], [5, 6]]):
        for layer in (1, 2):
            recorder.add(layer, torch.tensor(chosen) + layer)
        recorder.write()
    assert [(step, layer) for step, layer, _ in lines] == [(s, layer) for s in range(3) for layer in (1, 2)]
    assert lines[-1][2] == [7, 8]
