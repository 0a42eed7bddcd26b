"""A helper process: answers, losses, and that nothing of it is left running."""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from localmimo.system.helper_process import HelperLost, HelperProcess

# Answers each request as it says: with its own process id, never, with no JSON, or not at all.
PROGRAM = """
import json, os, subprocess, sys, time
count = 0
for line in sys.stdin:
    request, count = json.loads(line), count + 1
    if request.get("start"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if request.get("hang"):
        open(request["hang"], "w").write(str(child.pid) if request.get("start") else "")
        time.sleep(600)
    if request.get("end"):
        sys.exit()
    if request.get("noise"):
        print("no JSON", flush=True)
        continue
    print(json.dumps({"pid": os.getpid(), "count": count, "echo": request}), flush=True)
"""
LIMIT_S = 60.0


@pytest.fixture
def helper() -> HelperProcess:
    return HelperProcess([sys.executable, "-c", PROGRAM])


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within some seconds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_gone(pid: int) -> bool:
    """Whether a process has ended. (A dead one whose parent has not collected it has ended too.)"""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_of(helper: HelperProcess) -> int:
    return int(helper.request({}, LIMIT_S)["pid"])


def test_one_process_answers_all_requests(helper: HelperProcess) -> None:
    answers = [helper.request({"n": n, "text": "ü" * 100_000}, LIMIT_S) for n in range(3)]
    assert [answer["count"] for answer in answers] == [1, 2, 3]
    assert answers[2]["echo"] == {"n": 2, "text": "ü" * 100_000}
    assert len({answer["pid"] for answer in answers}) == 1
    helper.close()


def test_a_process_that_is_too_slow_is_killed_with_its_children(
    helper: HelperProcess, tmp_path: Path
) -> None:
    pid, started = pid_of(helper), tmp_path / "pid"
    with pytest.raises(HelperLost, match="it took too long") as lost:
        helper.request({"start": True, "hang": str(started)}, 1.0)
    assert lost.value.timed_out
    assert is_gone(pid)
    assert not started.exists() or wait_until(lambda: is_gone(int(started.read_text())))
    assert pid_of(helper) != pid  # the next request has a process of its own, not the late answer
    helper.close()


@pytest.mark.parametrize("request_", [{"end": True}, {"noise": True}])
def test_a_process_that_does_not_answer_is_replaced(helper: HelperProcess, request_: dict[str, bool]) -> None:
    pid = pid_of(helper)
    with pytest.raises(HelperLost, match="it ended without an answer") as lost:
        helper.request(request_, LIMIT_S)
    assert not lost.value.timed_out and is_gone(pid)
    assert helper.request({}, LIMIT_S)["count"] == 1
    helper.close()


def test_a_message_that_is_no_json_costs_no_process(helper: HelperProcess) -> None:
    pid = pid_of(helper)
    with pytest.raises(TypeError):
        helper.request({"x": object()}, LIMIT_S)
    assert pid_of(helper) == pid
    helper.close()


def test_close_ends_the_process_and_the_next_request_starts_another(helper: HelperProcess) -> None:
    pid = pid_of(helper)
    helper.close()
    helper.close()
    assert is_gone(pid) and pid_of(helper) != pid
    helper.close()


def test_a_helper_that_nobody_refers_to_ends_its_process() -> None:
    helper = HelperProcess([sys.executable, "-c", PROGRAM])
    pid = pid_of(helper)
    del helper
    gc.collect()
    assert wait_until(lambda: is_gone(pid))


def test_the_environment_is_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMIMO_SECRET", "x")
    program = "import json, os, sys\nfor line in sys.stdin: print(json.dumps(sorted(os.environ)), flush=True)"
    alone, ordinary = (
        HelperProcess([sys.executable, "-c", program], environment) for environment in ({"A": "b"}, None)
    )
    seen = alone.request({}, LIMIT_S)
    assert "A" in seen and "LOCALMIMO_SECRET" not in seen
    assert "LOCALMIMO_SECRET" in ordinary.request({}, LIMIT_S)
    alone.close()
    ordinary.close()
