"""`localmimo serve` as a process: it loads, answers, and finishes what came in when it is told to stop."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from localmimo import load
from localmimo.cli.app import run
from tests.packs import make_pack
from tests.serve.running import wait_for
from tests.serve.samples import HELLO, PATH

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it serves."""
    command = [sys.executable, "-m", "localmimo", "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise AssertionError("it never served")
        try:
            yield process, found[0]
        finally:
            process.kill()


def test_a_second_signal_does_not_wait(pack: Path) -> None:
    with serving(str(pack), "-c", "4096") as (process, url):
        body = {"messages": HELLO, "stream": True, "logit_bias": {}}
        with httpx2.stream("POST", url + PATH, json=body, timeout=60) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: process.stderr and "stopping" in process.stderr.readline())
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_it_serves_and_drains(pack: Path) -> None:
    with serving(str(pack), "-c", "512", LOCALMIMO_API_KEY="k") as (process, url):
        client = httpx2.Client(base_url=url, timeout=60, headers={"authorization": "Bearer k"})
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        body = {"messages": HELLO, "max_tokens": 100, "temperature": 1.0}
        answers: list[httpx2.Response] = []
        asking = [
            threading.Thread(target=lambda: answers.append(client.post(PATH, json=body))) for _ in range(2)
        ]
        for thread in asking:
            thread.start()
        wait_for(lambda: "queue_waiting 1" in client.get("/metrics").text or len(answers) == 2)
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "0.0.0.0"], 2, "set LOCALMIMO_API_KEY or give --api-key"),
        (["--host", "203.0.113.7", "--api-key", "k"], 2, "cannot listen on 203.0.113.7"),
        (["--sessions-disk", "lots"], 2, "lots"),
        (["/no/such/pack", "--port", "0"], 4, "There is no folder /no/such/pack."),
    ],
)
def test_what_can_be_refused_early(
    arguments: list[str],
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCALMIMO_API_KEY", raising=False)
    assert run(["serve", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and says in said.err


def test_a_port_in_use_is_a_sentence() -> None:
    from localmimo.errors import BadRequest
    from localmimo.serve.http.listen import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(BadRequest, match="in use.*give another --host or --port"):
            listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("draft", [0, 2])
def test_loading_tells_how_far_it_is(draft: int, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    with load(
        make_pack(tmp_path, seed=3), context=64, draft=draft, on_progress=lambda *far: heard.append(far)
    ):
        pass
    assert heard == sorted(heard) and len({total for _, total in heard}) == 1
    assert heard[0][0] > 0 and heard[-1][0] == heard[-1][1]
