"""`localmimo perplexity`: how well a pack predicts a text, and how far it strays from another pack.

The text is cut into windows of N tokens that do not overlap. Each is read from an empty context, and every
token but its first is predicted from those before it in the window. Divergence is the Kullback-Leibler
divergence of the pack's distributions from the other pack's, KL(other || pack), in nats, averaged over the
same positions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmimo.cli.flags import LOAD_FLAGS, Given, declared, load_options, without
from localmimo.cli.open_engine import open_engine
from localmimo.cli.options import Json, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.packs import EMBEDDED, pack_folder
from localmimo.cli.ui import Ui, bar, parse_count, seconds
from localmimo.errors import BadRequest
from localmimo.loading.options import LoadOptions

if TYPE_CHECKING:
    from torch import Tensor

    from localmimo.engine import Engine

ROWS = 256  # tokens read together; only their distributions are in memory at a time


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """The command line of `localmimo perplexity`."""

    pack: str
    file: Path
    against: str | None = None
    context: int = 512
    loading: LoadOptions = field(default_factory=LoadOptions)
    as_json: bool = False


@dataclass(slots=True)
class Score:
    """Sums over the predicted tokens of one pack."""

    n_tokens: int = 0
    n_bytes: int = 0
    nll: float = 0.0  # negative log-likelihood, nats

    def as_dict(self) -> dict[str, float]:
        return {
            "perplexity": _exp(self.nll / self.n_tokens),
            "perplexity_per_byte": _exp(self.nll / self.n_bytes),
            "bits_per_byte": self.nll / math.log(2) / self.n_bytes,
        }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a hopeless model is no reason to overflow


@dataclass(slots=True)
class Comparison:
    """Sums over the positions where two packs were compared."""

    n_tokens: int = 0
    kl: float = 0.0
    same_top: int = 0

    def as_dict(self) -> dict[str, float]:
        return {"mean_kl": self.kl / self.n_tokens, "top1_agreement": self.same_top / self.n_tokens}


# A window is the context, and no token is drafted.
PERPLEXITY_FLAGS = without(LOAD_FLAGS, "context", "draft")


@declared(loading=PERPLEXITY_FLAGS)
def perplexity(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="Folder of a pack, or mimo-mini.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text file (UTF-8), or - for stdin.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PACK", help="Also compare, position by position, with this pack of the same model."
        ),
    ] = None,
    context: Annotated[
        str, typer.Option("-c", "--context", metavar="N", help="Tokens in a window.")
    ] = "2048",
    loading: Given = {},  # noqa: B006  (replaced with flags)
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how well a pack predicts a text, and how far it strays from another pack.

    The text is cut into windows of N tokens that do not overlap. Each window is read from an empty context,
    and every token but its first is predicted from those before it in the window.
    """
    job = PerplexityOptions(
        pack, file, against, parse_count(context, "--context"), load_options(loading), as_json
    )
    return run_interruptible(lambda: run_perplexity(job, ui_of(verbose, quiet)))


def run_perplexity(job: PerplexityOptions, ui: Ui) -> int:
    """Run the command; the exit code."""
    text = _text_of(job.file)
    if job.context < 2:
        raise BadRequest(f"--context is {job.context}; a window needs at least 2 tokens.")
    began = time.perf_counter()
    with ExitStack() as stack:
        engines = [stack.enter_context(engine) for engine in _engines(job, ui)]
        tokens = _tokens_of(engines, text, job.file)
        scores, comparison = measure(engines, windows(tokens, job.context), ui, total=len(tokens))
        facts = _facts(job, engines, tokens, scores, comparison)
    facts["elapsed_s"] = round(time.perf_counter() - began, 3)
    if job.as_json:
        ui.json(facts)
    else:
        ui.data(report(facts))
    return 0


def _text_of(file: Path) -> str:
    if str(file) == "-":
        text = sys.stdin.read()
    else:
        path = file.expanduser()
        if not path.is_file():
            raise BadRequest(f"There is no file {path}.")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise BadRequest(f"{path} is no UTF-8 text.") from None
    if not text.strip():
        raise BadRequest(f"{file} is empty: there is nothing to predict.")
    return text


def _engines(job: PerplexityOptions, ui: Ui) -> Iterator[Engine]:
    """The pack, then the other pack; two share the RAM budget in halves."""
    names = [job.pack, *([job.against] if job.against else [])]
    folders = [
        None if name == EMBEDDED else str(pack_folder(name)) for name in names
    ]  # before torch is loaded
    from localmimo.hardware.host import Machine
    from localmimo.hardware.units import parse_bytes

    ram = job.loading.ram
    budget = Machine.probe().automatic_ram_bytes if ram is None else parse_bytes(ram)
    options = replace(job.loading, context=job.context, ram=budget // len(names))
    for folder in folders:
        engine = open_engine(folder, options, ui)
        ui.configuration(engine)
        yield engine


def _tokens_of(engines: Sequence[Engine], text: str, file: Path) -> list[int]:
    first, *others = [engine.encode(text) for engine in engines]
    for engine, other in zip(engines[1:], others, strict=True):
        if other != first:
            raise BadRequest(
                f"{engines[0].pack.path.name} reads {file} as {len(first):,} tokens and "
                f"{engine.pack.path.name} as {len(other):,}, or as others: "
                "only packs with one tokenizer can be compared."
            )
    if len(first) < 2:
        raise BadRequest(
            f"{file} has {len(first)} token; at least 2 are needed, one to predict from, one to predict."
        )
    return first


def windows(tokens: Sequence[int], size: int) -> Iterator[list[int]]:
    """Windows that do not overlap; a last one of a single token, which predicts nothing, is left out."""
    for start in range(0, len(tokens), size):
        window = list(tokens[start : start + size])
        if len(window) > 1:
            yield window


def measure(
    engines: Sequence[Engine], parts: Iterator[list[int]], ui: Ui, *, total: int
) -> tuple[list[Score], Comparison | None]:
    """Read every window with every engine."""
    scores = [Score() for _ in engines]
    comparison = Comparison() if len(engines) > 1 else None
    began, read = time.perf_counter(), 0
    for window in parts:
        at = 1
        for rows in zip(*(engine.logit_rows(window, chunk=ROWS) for engine in engines), strict=True):
            targets = window[at : at + ROWS]
            for engine, score, logits in zip(engines, scores, rows, strict=True):
                _add(score, engine, targets, logits[: len(targets)])
            if comparison is not None:
                _compare(comparison, rows[0][: len(targets)], rows[1][: len(targets)])
            at += ROWS
        read += len(window)
        spent = time.perf_counter() - began
        left = seconds(spent * (total - read) / read)
        so_far = f"perplexity {scores[0].as_dict()['perplexity']:.3f}"
        ui.status.show(
            f" {bar(read / total)} {read / total:4.0%}  {read / spent:,.0f} tok/s  left {left}  {so_far}"
        )
    ui.status.clear()
    return scores, comparison


def _add(score: Score, engine: Engine, targets: list[int], logits: Tensor) -> None:
    import torch

    picked = logits.log_softmax(-1).gather(1, torch.tensor(targets, dtype=torch.int64)[:, None])
    score.nll -= float(picked.double().sum())
    score.n_tokens += len(targets)
    score.n_bytes += sum(len(engine.tokenizer.token_bytes(token)) for token in targets)


def _compare(comparison: Comparison, logits: Tensor, other: Tensor) -> None:
    """KL(other || logits), and how often both have the same likeliest token."""
    p, q = (rows.double().log_softmax(-1) for rows in (other, logits))
    comparison.kl += float((p.exp() * (p - q)).sum())
    comparison.same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
    comparison.n_tokens += len(p)


def _facts(
    job: PerplexityOptions,
    engines: Sequence[Engine],
    tokens: Sequence[int],
    scores: Sequence[Score],
    comparison: Comparison | None,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "pack": engines[0].pack.path.name,
        "file": str(job.file),
        "n_tokens": len(tokens),
        "n_predicted": scores[0].n_tokens,
        "n_bytes": scores[0].n_bytes,
        "window": job.context,
        "n_windows": math.ceil(len(tokens) / job.context) - (len(tokens) % job.context == 1),
        **scores[0].as_dict(),
        "config": engines[0].effective(),
    }
    if comparison is not None:
        other = {"pack": engines[1].pack.path.name, "config": engines[1].effective()}
        facts["against"] = other | scores[1].as_dict() | comparison.as_dict()
    return facts


def report(facts: dict[str, Any]) -> str:
    """The measurement for people."""
    lines = [_scores(facts)]
    if other := facts.get("against"):
        agreement = f"mean KL {other['mean_kl']:.5f} nats, same likeliest token {other['top1_agreement']:.2%}"
        lines += [_scores(other), f"divergence from {other['pack']}: {agreement}"]
    counts = f"{facts['n_predicted']:,} of {facts['n_tokens']:,} tokens predicted"
    windows = f"in {facts['n_windows']:,} windows of {facts['window']:,} that do not overlap"
    lines.append(f"{counts}, {windows}, each from an empty context; {seconds(facts['elapsed_s'])}")
    return "\n".join(lines)


def _scores(facts: dict[str, Any]) -> str:
    per_token = f"perplexity {facts['perplexity']:.4f} per token"
    per_byte = f"{facts['perplexity_per_byte']:.4f} per byte ({facts['bits_per_byte']:.4f} bits per byte)"
    return f"{facts['pack']}: {per_token}, {per_byte}"
