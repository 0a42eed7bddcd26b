"""`localmimo plan`: what a model needs, where its experts go and how fast it should answer, before a download.

Knows flags and how a plan is shown; the arithmetic is in `localmimo.planning`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from localmimo.cli.options import Context, Json, Quiet, Ram, Verbose, run_interruptible, ui_of
from localmimo.cli.plots.plan_report import PlanReport, report_lines, tps
from localmimo.cli.ui import Ui, parse_count
from localmimo.errors import BadRequest, DoesNotFit, with_flags
from localmimo.experts.policy.trace import Trace, read_trace
from localmimo.hardware.bandwidth import Speeds, file_spots, measured_speeds
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes, parse_bytes
from localmimo.kv.sizes import device_kv, kv_bytes
from localmimo.limits import DEFAULT_CONTEXT, PREFILL_CHUNK, SLACK
from localmimo.planning.footprint import Footprint, footprint_of
from localmimo.planning.memory import (
    Plan,
    device_workspace_bytes,
    host_workspace_bytes,
    make_plan,
    workspace_bytes,
)
from localmimo.planning.throughput import Estimate, Range, Tiers, estimate

KV_ITEM_BYTES = {"bf16": 2, "int8": 1, "float32": 4}
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The command line of `localmimo plan`."""

    model: str
    context: int | None = None
    max_context: bool = False
    kv: str = "bf16"
    ram: str | None = None
    vram: str | None = None
    disk_read: str | None = None
    ram_read: str | None = None
    pcie: str | None = None
    experts: str = "nf4"
    dense: str = "int8"
    recipe: str | None = None
    trace: Path | None = None
    remeasure: bool = False
    as_json: bool = False

    def check(self) -> None:
        """Raise BadRequest where a flag would do nothing."""
        if self.max_context and self.context is not None:
            raise BadRequest("--max-context finds the context itself: leave out --context.")
        if self.pcie and not self.vram:
            raise BadRequest("--pcie is about a GPU: give --vram too.")
        if self.remeasure and self.disk_read and self.ram_read:
            raise BadRequest("--remeasure has nothing to measure: disk and memory are given.")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pack, a checkpoint folder, a config.json, or a name such as mimo-v2-flash.",
        ),
    ],
    context: Context = None,
    max_context: Annotated[
        bool, typer.Option("--max-context", help="Find the longest context that fits.")
    ] = False,
    kv: Annotated[str, typer.Option(metavar="TYPE", help="Of the KV cache: bf16, int8, float32.")] = "bf16",
    ram: Ram = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a GPU, such as 24GiB.  [default: no GPU]")
    ] = None,
    disk_read: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Of the disk, such as 7GB/s.  [default: measured]")
    ] = None,
    ram_read: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Of the memory, such as 80GB/s.  [default: measured]")
    ] = None,
    pcie: Annotated[
        str | None, typer.Option(metavar="SPEED", help="From memory to that GPU.  [default: 25GB/s]")
    ] = None,
    experts: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of the experts, where MODEL is no pack.")
    ] = "nf4",
    dense: Annotated[
        str, typer.Option(metavar="CODEC", help="Codec of the dense layers, where MODEL is no pack.")
    ] = "int8",
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="A recipe, in place of --experts and --dense.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A router trace to replay for the hit rate.  [default: a profile]"),
    ] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure disk and memory again.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Say what a model needs and how fast it should answer: here, or on a machine that you describe.

    Works before anything is downloaded. Exits with 3 where the model does not fit, saying what would help.
    """
    question = PlanOptions(
        model=model,
        context=None if context is None else parse_count(context, "--context"),
        max_context=max_context,
        kv=kv,
        ram=ram,
        vram=vram,
        disk_read=disk_read,
        ram_read=ram_read,
        pcie=pcie,
        experts=experts,
        dense=dense,
        recipe=recipe,
        trace=trace,
        remeasure=remeasure,
        as_json=as_json,
    )
    return run_interruptible(lambda: run_plan(question, ui_of(verbose, quiet)))


def run_plan(question: PlanOptions, ui: Ui) -> int:
    """Run the command; the exit code."""
    from quant import Recipe

    question.check()
    recipe = Recipe.of(question.recipe, experts=question.experts, dense=question.dense)
    model = footprint_of(question.model, recipe)
    machine, speeds = _machine(question, model)
    planner = Planner(model, machine, speeds, question)
    try:
        answer = planner.answer()
    except DoesNotFit as error:
        if question.as_json:
            ui.json({"model": model.name, "fits": False, "error": with_flags(error), **planner.needs()})
        raise
    if question.as_json:
        ui.json(answer.as_dict())
    else:
        lines = report_lines(
            answer, question.model, with_gpu=question.vram is not None, measured_anew=question.remeasure
        )
        ui.data("\n".join(lines))
    return 0


def _machine(question: PlanOptions, model: Footprint) -> tuple[Machine, Speeds]:
    """The machine and its speeds, measured, or as described on the command line."""
    machine = Machine.probe()
    given: dict[str, Any] = {}
    if question.disk_read:
        rate = float(_rate(question.disk_read, "--disk-read"))
        given |= {"disk_read": rate, "disk_read_alone": rate / 2, "disk_again": rate, "disk_origin": "given"}
    if question.ram_read:
        rate = float(_rate(question.ram_read, "--ram-read"))
        given |= {"ram_read": rate, "ram_origin": "given", "products": None, "layer_s": None}
    if question.pcie:
        given["pcie"] = float(_rate(question.pcie, "--pcie"))
    if question.disk_read and question.ram_read:
        from localmimo.hardware.bandwidth import ASSUMED

        return machine, replace(ASSUMED, **given)
    spots = file_spots(model.files, model.page_bytes)
    folder = model.files[0].parent if model.files else Path.cwd()
    speeds = measured_speeds(
        spots,
        model.page_bytes,
        folder,
        machine.n_cores,
        anew=question.remeasure,
        disk=question.disk_read is None,
    )
    return machine, replace(speeds, **given)


def _rate(text: str, flag: str) -> int:
    try:
        rate = parse_bytes(text.strip().removesuffix("/s"))
    except BadRequest:
        rate = 0
    if rate <= 0:
        raise BadRequest(f'{flag} is "{text}"; write a speed such as 7GB/s.')
    return rate


def _trace(path: Path) -> Trace:
    try:
        return read_trace(path)
    except OSError as error:
        raise BadRequest(f"--trace: {path} cannot be read ({error.strerror}).") from None


class Planner:
    """One model on one machine: plans for any budget and context, and what they should give."""

    def __init__(self, model: Footprint, machine: Machine, speeds: Speeds, question: PlanOptions) -> None:
        if question.kv not in KV_ITEM_BYTES:
            raise BadRequest(f'--kv is "{question.kv}"; it is one of {", ".join(KV_ITEM_BYTES)}.')
        self.model = model
        self.speeds = speeds
        self.n_cores = machine.n_cores
        self.kv_item_bytes = KV_ITEM_BYTES[question.kv]
        self.ram = machine.automatic_ram_bytes if question.ram is None else parse_bytes(question.ram)
        self.vram = 0 if question.vram is None else parse_bytes(question.vram)
        max_positions = model.config.max_context
        self.context = min(DEFAULT_CONTEXT, max_positions) if question.context is None else question.context
        self.longest = question.max_context
        self.trace = None if question.trace is None else _trace(question.trace)
        if not 1 <= self.context <= max_positions:
            raise BadRequest(
                f"The context is {self.context:,}; this model has from 1 to {max_positions:,} positions."
            )

    def answer(self) -> PlanReport:
        """The plan that was asked for. Raises DoesNotFit with the smallest change that helps."""
        if self.longest:
            self.context = max(1, self._longest_context())
        plan = self._plan(self.ram, self.context)
        tiers, figures = self._judge(plan)
        better = tuple(self._better(plan, figures))
        longest = self._longest_context()
        return PlanReport(
            self.model, plan, tiers, self.speeds, figures, self.vram, self.n_cores, better, longest
        )

    def needs(self) -> dict[str, int]:
        """The least memory that this context can be run with."""
        return {
            "context": self.context,
            "needed_bytes": self._least(self.context),
            "ram_bytes": self.ram,
            "longest_context": self._longest_context(),
        }

    # ---- plans ----

    def _plan(self, ram: int, context: int) -> Plan:
        """As `load` plans: with the draft heads, and without them where they do not fit."""
        try:
            return self._plan_with(len(self.model.head_bytes), ram, context)
        except DoesNotFit:
            pass
        try:
            return self._plan_with(0, ram, context)
        except DoesNotFit as error:
            raise DoesNotFit(
                f"{with_flags(error)} {self._smallest_change()}".strip(),
                what=error.what,
                needed_bytes=error.needed_bytes,
                budget_bytes=error.budget_bytes,
            ) from None

    def _plan_with(self, n_drafts: int, ram: int, context: int) -> Plan:
        return make_plan(
            self.model.config,
            dense_bytes=self.model.dense_bytes + sum(self.model.head_bytes[:n_drafts]),
            page_bytes=self.model.page_bytes,
            context=context,
            ram_bytes=ram,
            kv_item_bytes=self.kv_item_bytes,
            slack=SLACK,
            n_drafts=n_drafts,
            vram_bytes=self.vram if self._gpu_takes(context) else None,
            lookup_bytes=self.model.lookup_bytes,
        )

    def _kv(self, context: int) -> int:
        return kv_bytes(self.model.config, context, self.kv_item_bytes, SLACK)

    def _gpu_takes(self, context: int) -> bool:
        """Whether the dense weights, the KV and the workspace fit on a GPU: `load` uses no other."""
        model = self.model
        workspace = device_workspace_bytes(model.config, context, PREFILL_CHUNK, model.page_bytes)
        kv = device_kv(model.config, context, self.kv_item_bytes, SLACK, model.page_bytes)
        kv_on_gpu = kv.fixed_bytes + kv.n_slots * model.page_bytes
        return self.vram >= model.dense_bytes - model.lookup_bytes + kv_on_gpu + workspace

    def _least(self, context: int) -> int:
        """The least RAM."""
        model = self.model
        fixed = model.dense_bytes + self._kv(context) + workspace_bytes(model.config, context, PREFILL_CHUNK)
        if self._gpu_takes(context):
            fixed = model.lookup_bytes + host_workspace_bytes(model.config)
        return fixed + model.config.pages_per_token * model.page_bytes

    def _longest_context(self) -> int:
        """The longest context that fits, by bisection: needs grow with it; 0 where none does."""
        low, high = 0, self.model.config.max_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._least(middle) <= self.ram else (low, middle - 1)
        return low

    def _smallest_change(self) -> str:
        """A sentence on the context that would fit; the memory that is missing is named already."""
        longest = self._longest_context()
        if longest:
            return f"The longest context that fits is {longest:,}: --context {longest}."
        saved = self._least(self.context) - self._least(1)
        if saved <= 0:
            return "No shorter context helps: its KV is on the GPU."
        return f"No context is short enough: even a single position would save only {format_bytes(saved)}."

    # ---- what it gives ----

    def _judge(self, plan: Plan) -> tuple[Tiers, Estimate]:
        held, on_gpu = plan.held_slots_at(plan.context // 2), plan.gpu_slots_at(plan.context // 2)
        tiers = Tiers(on_gpu, held - on_gpu, plan.n_pages, *self._hits(plan))
        figures = estimate(
            self.model,
            plan,
            self.speeds,
            tiers,
            n_cores=self.n_cores,
            kv_item_bytes=self.kv_item_bytes,
        )
        return tiers, figures

    def _hits(self, plan: Plan) -> tuple[Range, str]:
        held = plan.held_slots_at(plan.context // 2)
        if held >= plan.n_pages:
            return (1.0, 1.0), "every expert is in memory"
        from localmimo.planning.hit_rates import assumed_hits, profile_hits, replayed_hits

        if self.trace is not None:
            rates = replayed_hits(self.trace, self.model.config, held)
            return rates, "replayed: LRU and the adaptive policy"
        cycle = self.model.config.pages_per_token / plan.n_pages
        low, high = assumed_hits(held / plan.n_pages, cycle)
        known = profile_hits(*self.model.pack, self.model.config, held) if self.model.pack else None
        if known is not None:
            return (min(known, high), max(known, high)), "from this pack's profile to published caches"
        return (low, high), "assumed from published caches, no trace"

    def _better(self, plan: Plan, figures: Estimate) -> Iterator[str]:
        """Changes that matter, with what they would give."""
        for more in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            if plan.held_slots >= plan.n_pages:
                break
            _, then = self._judge(self._plan(self.ram + more * GIB, plan.context))
            if then.decode_tps[0] > 1.25 * figures.decode_tps[0]:
                yield f"+{more} GiB RAM → {tps(then.decode_tps)}"
                break
        if figures.bound == "disk":
            twice = replace(
                self.speeds,
                disk_read=2 * self.speeds.disk_read,
                disk_read_alone=2 * self.speeds.disk_read_alone,
                disk_again=2 * self.speeds.disk_again,
            )
            own_speeds, self.speeds = self.speeds, twice
            _, then = self._judge(plan)
            self.speeds = own_speeds
            yield f"a disk twice as fast → {tps(then.decode_tps)}"
        shorter = plan.context // 4
        if shorter >= 1024 and plan.held_slots < plan.n_pages:
            more_slots = self._plan(self.ram, shorter).held_slots - plan.held_slots
            if more_slots:
                yield f"context {shorter:,} → +{more_slots:,} expert slots"
