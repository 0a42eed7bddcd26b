"""Metrics: every tier of expert pages is counted."""

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")

from localmimo.chat.prompt import Prompt
from localmimo.decode.steps import Stats, Step
from localmimo.serve.api.parameters import Request
from localmimo.serve.metrics import Metrics
from localmimo.serve.worker import Job


def test_pages_are_counted_by_tier() -> None:
    job, metrics = Job(Request(), Prompt("", [])), Metrics()
    job.add(Step("", None, "answer", Stats(pages_gpu=5, pages_ram=3, pages_disk=2), finish_reason="stop"))
    metrics.finished(job)
    lines = metrics.text(None, {}).splitlines()
    for tier, n in (("gpu", 5), ("ram", 3), ("disk", 2)):
        assert f'localmimo_expert_pages_total{{tier="{tier}"}} {n}' in lines
