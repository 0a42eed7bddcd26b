"""`localmimo bench`: what is measured, under what conditions, and how the figures are shown.

Knows flags, files and tables; the measuring is in `localmimo.bench`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmimo.cli.flags import LOAD_FLAGS, Given, declared, load_options, with_defaults
from localmimo.cli.open_engine import open_engine
from localmimo.cli.options import INTERRUPTED, Json, Model, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.packs import EMBEDDED, folder_of, pack_folder
from localmimo.cli.plots.bench_card import card, card_lines
from localmimo.cli.plots.bench_plot import chart, draw
from localmimo.cli.plots.bench_table import head, live_line, plan_line, row
from localmimo.cli.plots.plot import check_plot, picture
from localmimo.cli.ui import Ui, bar, parse_count
from localmimo.decode.draft_depth import check_draft
from localmimo.errors import BadRequest
from localmimo.experts.policy.trace import TraceWriter
from localmimo.hardware.bandwidth import Speeds
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes
from localmimo.limits import DEFAULT_CONTEXT
from localmimo.loading.options import LoadOptions
from localmimo.model.config import ModelConfig
from localmimo.planning.footprint import Footprint, footprint_of
from localmimo.planning.throughput import decode_range
from localmimo.system.json_files import JsonLines

if TYPE_CHECKING:
    from localmimo.bench.corpus import Corpus
    from localmimo.bench.runs import Bench, BenchJob, BenchRun, StepCost
    from localmimo.engine import Engine

FORMATS = ("text", "md")
ITEM_BYTES = {"bfloat16": 2, "int8": 1, "float32": 4}  # of the KV cache


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command line of `localmimo bench`."""

    model: str = EMBEDDED
    depths: tuple[int, ...] = (0,)
    prompt_tokens: int = 512
    max_tokens: int = 64
    repeat: int = 3
    draft: str | None = None
    loading: LoadOptions = field(default_factory=lambda: LoadOptions(profile=None))  # its draft is `drafting`
    cold: bool = False
    check_plan: bool = False
    record: Path | None = None
    stats_json: Path | None = None
    plot: Path | None = None
    form: str = "text"
    as_json: bool = False

    @property
    def positions(self) -> int:
        """The context that is needed."""
        return max(self.depths) + self.prompt_tokens + self.max_tokens

    @property
    def context(self) -> int | None:
        """The context that was asked for."""
        return self.loading.context

    @property
    def drafting(self) -> str:
        """A trace and the plan's arithmetic know one token at a time; else drafts as they pay."""
        return self.draft or ("0" if self.record or self.check_plan else "auto")

    def as_dict(self) -> dict[str, Any]:
        requested = asdict(self)
        loading: dict[str, Any] = requested.pop("loading")
        return loading | requested | {"context": self.context}


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths such as 0,2k,8k. Raises BadRequest."""
    depths = tuple(parse_count(part, "--depths") for part in text.split(","))
    if len(set(depths)) < len(depths):
        raise BadRequest(f'--depths is "{text}"; it names a depth twice.')
    return depths


BENCH_FLAGS = with_defaults(
    LOAD_FLAGS,
    context=(None, "as chat, or what is needed"),
    profile=("none", ""),
    draft=(None, "auto; 0 with --record or --check-plan"),
)


@declared(loading=BENCH_FLAGS)
def bench(
    model: Model = None,
    depths: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Tokens of context before the prompt, such as 0,2k,8k.")
    ] = "0",
    prompt_tokens: Annotated[
        str, typer.Option("-p", "--prompt-tokens", metavar="N", help="Tokens of a prompt.")
    ] = "512",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", help="Tokens of an answer.")
    ] = 64,
    repeat: Annotated[
        int, typer.Option("-r", "--repeat", metavar="N", min=1, help="Prompts and answers at each depth.")
    ] = 3,
    loading: Given = {},  # noqa: B006  (replaced with flags)
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Open the pack anew for each run: no expert in memory, depth and prompt read together.",
        ),
    ] = False,
    check_plan: Annotated[
        bool,
        typer.Option(
            "--check-plan", help="Also measure disk and memory, and say whether `plan` predicts this speed."
        ),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write which experts each answered token used, for `replay`."),
    ] = None,
    stats_json: Annotated[
        Path | None,
        typer.Option("--stats-json", metavar="FILE", help="Append a JSON line for each prompt and step."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw speed by depth and tiers over time into FILE.svg or FILE.png."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FORMAT", help="Of the table: text or md.")
    ] = "text",
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how fast a model reads and answers here, and where its experts come from.

    Reads N tokens of real text at each depth of context, answers them greedily, and does so a few times with
    other text. Ctrl-C shows what was measured so far.
    """
    draft = loading.pop("draft")
    request = BenchOptions(
        model=model or EMBEDDED,
        depths=parse_depths(depths),
        prompt_tokens=parse_count(prompt_tokens, "--prompt-tokens"),
        max_tokens=max_tokens,
        repeat=repeat,
        draft=draft,
        loading=load_options(loading),
        cold=cold,
        check_plan=check_plan,
        record=record and record.expanduser(),
        stats_json=stats_json and stats_json.expanduser(),
        plot=plot and plot.expanduser(),
        form=output,
        as_json=as_json,
    )
    return run_interruptible(lambda: run_bench(request, ui_of(verbose, quiet)))


def run_bench(request: BenchOptions, ui: Ui) -> int:
    """Run the command; the exit code."""
    folder = _check_early(request)
    context = _context(request, folder)
    with ExitStack() as files:
        log = (
            None
            if request.stats_json is None
            else files.enter_context(JsonLines(request.stats_json, "--stats-json", append=True))
        )
        trace = None if request.record is None else files.enter_context(TraceWriter(request.record))
        report_writer = BenchReport(request, ui, log, trace)
        return report_writer.run(lambda: _open(request, context, ui))


def _check_early(request: BenchOptions) -> Path | None:
    """What can be refused before the slow imports; the pack's folder."""
    if request.form not in FORMATS:
        raise BadRequest(f'--output is "{request.form}"; it is one of {", ".join(FORMATS)}.')
    if request.prompt_tokens < 1:
        raise BadRequest("--prompt-tokens is 0; a prompt has at least one token.")
    if request.max_tokens < 2:
        raise BadRequest(
            f"--max-tokens is {request.max_tokens}; the first token comes with the prompt, so at least 2."
        )
    _check_drafting(request)
    if request.cold and request.loading.profile is not None:
        raise BadRequest("--cold starts from nothing: leave out --profile.")
    check_plot(request.plot)
    return None if request.model == EMBEDDED else pack_folder(request.model)


def _check_drafting(request: BenchOptions) -> None:
    if request.draft not in (None, "0") and (request.record or request.check_plan):
        flag = "--record" if request.record else "--check-plan"
        raise BadRequest(f"{flag} is about one token at a time: leave out --draft, or give --draft 0.")


def _context(request: BenchOptions, folder: Path | None) -> int:
    """A context long enough for the longest run: chat's default, or longer where that is too short."""
    from localmimo.mini import CHECKPOINT

    config = ModelConfig.parse(json.loads(((folder or CHECKPOINT) / "config.json").read_text()))
    needed, max_positions = request.positions, config.max_context
    if needed > (request.context or max_positions):
        limit = (
            f"--context is {request.context:,}" if request.context else f"this model has {max_positions:,}"
        )
        raise BadRequest(
            f"A depth of {max(request.depths):,} with {request.prompt_tokens:,} tokens of prompt and "
            f"{request.max_tokens:,} of answer needs {needed:,} positions, and {limit}."
        )
    return request.context or max(needed, min(DEFAULT_CONTEXT, max_positions))


def _open(request: BenchOptions, context: int, ui: Ui) -> Engine:
    draft = check_draft(request.drafting)
    options = replace(request.loading, context=context, draft=draft)
    return open_engine(None if request.model == EMBEDDED else request.model, options, ui)


class BenchReport:
    """Measures, and shows: the card when the pack is open, a row per depth, a status line in between."""

    def __init__(
        self, request: BenchOptions, ui: Ui, log: JsonLines | None, trace: TraceWriter | None
    ) -> None:
        self.request = request
        self.ui = ui
        self._log = log
        self._trace = trace
        self._facts: dict[str, Any] = {}  # the card, filled when the pack is open
        self._speeds: list[Speeds] = []  # before and after, for the plan
        self._engine: Engine  # the last one that was opened
        self._show: Callable[[str], None] = ui.note if request.as_json else ui.data

    def run(self, open_engine: Callable[[], Engine]) -> int:
        """Measure and show; the exit code."""
        from localmimo.bench.runs import Bench

        began, finished = time.perf_counter(), False
        self._measure_speeds()
        write = None if self._trace is None else self._trace.write
        bench = Bench(self._job(), open_engine, self, write)
        results: list[dict[str, Any]] = []
        try:
            for depth in bench.run():
                results.append(self._row(bench, depth))
            finished = True
        except KeyboardInterrupt:
            results += [self._row(bench, depth) for depth in _cut_short(bench, len(results))]
        self.ui.status.clear()
        if results:
            self._show_footer(bench, results)
        if finished:
            self._measure_speeds()
            self._check_plan(results)
        self._end(bench, results, finished, time.perf_counter() - began)
        return 0 if finished else INTERRUPTED

    def _job(self) -> BenchJob:
        from localmimo.bench.runs import BenchJob

        request = self.request
        return BenchJob(
            request.depths, request.prompt_tokens, request.max_tokens, request.repeat, request.cold
        )

    # ---- while it runs ----

    def on_open(self, engine: Engine, corpus: Corpus) -> None:
        """The card, once."""
        self._engine = engine
        if self._facts:
            return
        self._facts = card(self.request.as_dict(), engine, corpus)
        lines = list(card_lines(self._facts, engine))
        markdown = self.request.form == "md"
        self._show("\n".join([f"* {line}" for line in lines] + [""] if markdown else lines))
        self._show(head(self.request.form))

    def on_read(self, depth: int, done: int, total: int) -> None:
        self.ui.status.show(f" depth {depth:,} · reading {done:,} of {total:,} tokens {bar(done / total)}")

    def on_step(self, run: BenchRun, cost: StepCost) -> None:
        if self._log is not None:
            self._log.write(run.as_dict(cost))
        if run.steps:
            self.ui.status.show(live_line(run, self.request.repeat, self.request.max_tokens))

    def _row(self, bench: Bench, depth: int) -> dict[str, Any]:
        from localmimo.bench.runs import figures

        found = figures(depth, bench.runs_at(depth))
        self._facts["effective"] = self._engine.effective()  # the first reads show whether they can be direct
        self._show(row(found, self.request.form))
        return found

    # ---- at the end ----

    def _show_footer(self, bench: Bench, results: list[dict[str, Any]]) -> None:
        """The lines below the table."""
        self._show("\n read/token, disk and experts: of the answers; --json has those of the prompts too")
        peak = format_bytes(peak_bytes := max(found["peak_rss_bytes"] for found in results))
        over = format_bytes(max(0, peak_bytes - bench.library_bytes))
        budget = format_bytes(self._engine.plan.ram_bytes)
        self._show(f" peak memory {peak}, {over} of it over Python and its libraries; the budget: {budget}")
        if (device := self._engine.device).is_gpu:
            vram = self._engine.plan.vram
            budget = format_bytes(vram.budget_bytes if vram else 0)
            self._show(f" peak VRAM {format_bytes(device.peak_bytes())}; the budget: {budget}")
        useful, wasted = (
            sum(found["decode"][f"prefetch_{name}"] for found in results) for name in ("useful", "wasted")
        )
        if useful or wasted:
            self._show(f" experts read ahead: {useful:,} were then needed, {wasted:,} were not")
        if not self._facts["effective"]["direct_reads"]:
            self._show(
                " this file system knows no direct reads: pages came through the page cache, if not from it"
            )
        least = min(found["n_slots"] for found in results)
        if least < self._engine.plan.n_slots:
            self._show(
                f" the system was short of memory: down to {least:,} of {self._engine.plan.n_slots:,} slots"
            )
        if self.request.plot is not None:
            self._draw(self.request.plot, results, bench.runs)

    def _draw(self, path: Path, results: list[dict[str, Any]], runs: Sequence[BenchRun]) -> None:
        effective = self._facts["effective"]
        slots = f"{self._engine.plan.n_slots:,} of {self._engine.plan.n_pages:,} experts in memory"
        title = f"{effective['model']} · {effective['experts']} · {slots}"
        if not picture(path, lambda: draw(path, title, results, runs), self.ui):
            self._show("\n".join(chart(results, runs)))

    def _measure_speeds(self) -> None:
        """This machine's, with the pack closed: before the first run and after the last one."""
        if not self.request.check_plan:
            return
        from localmimo.bench.calibrate import speeds_now

        pack = folder_of(self.request.model)
        self.ui.status.show(" measuring disk, memory and products ...", now=True)
        self._speeds.append(speeds_now(pack, Machine.probe().n_cores))
        self.ui.status.clear()

    def _check_plan(self, results: list[dict[str, Any]]) -> None:
        """The plan's arithmetic, with this machine's speeds as they are now and the hit rates as they were."""
        if not self._speeds:
            return
        model = footprint_of(self._engine.pack.path)
        self._facts["speeds"] = [speeds.as_dict() for speeds in self._speeds]
        for found in results:
            found["plan_check"] = check = self._predict(found, model)
            self._show(plan_line(found["depth"], check))
        if any(speeds.disk_cached for speeds in self._speeds):
            first, again = (
                format_bytes(max(getattr(speeds, name) for speeds in self._speeds))
                for name in ("disk_read", "disk_again")
            )
            self._show(
                f" disk: {first}/s the first time, {again}/s when pages are read again: a cache answers"
            )

    def _predict(self, found: dict[str, Any], model: Footprint) -> dict[str, Any]:
        middle = found["depth"] + self.request.prompt_tokens + self.request.max_tokens // 2
        item_bytes = ITEM_BYTES[self._facts["effective"]["kv_dtype"]]
        hit_rate = 1.0 - found["decode"]["hits"].get("disk", 0.0)
        low, high = decode_range(
            model, self._engine.plan, self._speeds, hit_rate, depth=middle, kv_item_bytes=item_bytes
        )
        measured = found["decode_tps"]
        return {
            "hit_rate": hit_rate,
            "predicted_tps": [low, high],
            "measured_tps": measured,
            "inside": low <= measured <= high,
        }

    def _end(self, bench: Bench, results: list[dict[str, Any]], finished: bool, spent: float) -> None:
        if not finished:
            n_runs = len([run for run in bench.runs if len(run.steps) == self.request.max_tokens - 1])
            of = len(self.request.depths) * self.request.repeat
            self.ui.note(f" Interrupted after {n_runs} whole runs of {of}.")
        if self.request.as_json:
            peak = max((found["peak_rss_bytes"] for found in results), default=None)
            memory = {"peak_rss_bytes": peak, "library_bytes": bench.library_bytes}
            memory["peak_vram_bytes"] = self._engine.device.peak_bytes() if self._facts else 0
            end = {"results": results, **memory, "finished": finished, "elapsed_s": round(spent, 3)}
            self.ui.json(self._facts | end)


def _cut_short(bench: Bench, n_done: int) -> Sequence[int]:
    """The depth that was being measured, if anything of it was."""
    return [depth for depth in bench.job.depths[n_done : n_done + 1] if bench.runs_at(depth)]
