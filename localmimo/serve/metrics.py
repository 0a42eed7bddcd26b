"""Metrics: what the server has done so far, in Prometheus' text format.

Knows numbers and their names; nothing of how they are measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from localmimo.decode.steps import Stats
from localmimo.serve.worker import Job

Labels = tuple[tuple[str, str], ...]

HELP = {
    "localmimo_requests_total": "Requests by path and HTTP status.",
    "localmimo_cancelled_total": "Answers that nobody waited for to the end.",
    "localmimo_prompt_tokens_total": "Tokens of prompts.",
    "localmimo_cached_tokens_total": "Tokens of prompts that were in the KV cache already.",
    "localmimo_generated_tokens_total": "Tokens written.",
    "localmimo_thinking_tokens_total": "Tokens written as thinking.",
    "localmimo_prefill_seconds_total": "Time spent reading prompts.",
    "localmimo_decode_seconds_total": "Time spent writing.",
    "localmimo_expert_pages_total": "Expert pages used, by the tier they were found in.",
    "localmimo_read_bytes_total": "Bytes of expert pages read from disk.",
    "localmimo_read_seconds_total": "Time in which the disk was being read.",
    "localmimo_prefetched_pages_total": "Expert pages read on a guess, by what became of it.",
}


class Metrics:
    """Counters of everything finished; the answer being made is added when they are read."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Labels]] = Counter()

    def answered(self, path: str, status: int) -> None:
        self._counts["localmimo_requests_total", (("path", path), ("status", str(status)))] += 1

    def finished(self, job: Job) -> None:
        """Add what a job took, complete or not."""
        self._counts["localmimo_cancelled_total", ()] += job.answer.finish_reason == "cancelled"
        self._counts.update(_counts_of(job.stats, job.n_thought))

    def text(self, running: Job | None, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The exposition; gauges are name -> (its help text, its value)."""
        counts = self._counts.copy()
        if running is not None:
            counts.update(_counts_of(running.stats, running.n_thought))
        lines = [*_lines(counts)]
        for name, (help_text, value) in gauges.items():
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _counts_of(stats: Stats, n_thought: int) -> dict[tuple[str, Labels], float]:
    plain = {
        "localmimo_prompt_tokens_total": stats.prompt_tokens,
        "localmimo_cached_tokens_total": stats.reused_tokens,
        "localmimo_generated_tokens_total": stats.generated_tokens,
        "localmimo_thinking_tokens_total": n_thought,
        "localmimo_prefill_seconds_total": stats.prefill_s,
        "localmimo_decode_seconds_total": stats.decode_s,
        "localmimo_read_bytes_total": stats.bytes_read,
        "localmimo_read_seconds_total": stats.read_s,
    }
    found: dict[tuple[str, Labels], float] = {(name, ()): value for name, value in plain.items()}
    for tier, pages in stats.pages.items():
        found["localmimo_expert_pages_total", (("tier", tier),)] = pages
    for outcome, pages in (("useful", stats.prefetch_useful), ("wasted", stats.prefetch_wasted)):
        found["localmimo_prefetched_pages_total", (("outcome", outcome),)] = pages
    return found


def _lines(counts: Mapping[tuple[str, Labels], float]) -> Iterator[str]:
    for name, help_text in HELP.items():
        yield f"# HELP {name} {help_text}"
        yield f"# TYPE {name} counter"
        for (counted, labels), value in sorted(counts.items()):
            if counted == name:
                pairs = ",".join(f'{key}="{text}"' for key, text in labels)
                yield f"{name}{{{pairs}}} {value:.15g}" if pairs else f"{name} {value:.15g}"
