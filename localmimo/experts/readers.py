"""Readers: a few threads that run jobs of reading, what is needed now before what is only guessed.

Knows jobs; nothing of pages, files or why one is guessed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

Job = Callable[[], None]
Queue = deque[tuple["Future[None]", Job]]


class Readers:
    """`n` threads. A guessed job starts only while no demanded one waits or runs, on half of the threads at most."""

    def __init__(self, n: int) -> None:
        self._demanded: Queue = deque()
        self._guessed: Queue = deque()
        self._running_demanded = 0
        self._running_guessed = 0
        self._most_guessed = max(1, n // 2)
        self._open = True
        self._change = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"page-reader-{i}", daemon=True) for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, job: Job) -> "Future[None]":
        """Run `job` as soon as a thread is free."""
        return self._put(self._demanded, job)

    def guess(self, job: Job) -> "Future[None]":
        """Run `job` when nothing that is needed waits; the future's `cancel` takes it back until then."""
        return self._put(self._guessed, job)

    def _put(self, queue: Queue, job: Job) -> "Future[None]":
        future: Future[None] = Future()
        with self._change:
            queue.append((future, job))
            self._change.notify()
        return future

    def _serve(self) -> None:
        while (task := self._next()) is not None:
            future, job, demanded = task
            try:
                job()
            except BaseException as error:  # the one who asked is told
                future.set_exception(error)
            else:
                future.set_result(None)
            del future, job
            self._finished(demanded)

    def _next(self) -> tuple["Future[None]", Job, bool] | None:
        """Wait for a job that may run now; None when closed."""
        with self._change:
            while self._open:
                if (task := self._take(self._demanded)) is not None:
                    self._running_demanded += 1
                    return *task, True
                if self._guess_may_run() and (task := self._take(self._guessed)) is not None:
                    self._running_guessed += 1
                    return *task, False
                self._change.wait()
            return None

    def _guess_may_run(self) -> bool:
        return not self._running_demanded and self._running_guessed < self._most_guessed

    @staticmethod
    def _take(queue: Queue) -> tuple["Future[None]", Job] | None:
        while queue:
            future, job = queue.popleft()
            if future.set_running_or_notify_cancel():
                return future, job
        return None

    def _finished(self, demanded: bool) -> None:
        with self._change:
            if demanded:
                self._running_demanded -= 1
            else:
                self._running_guessed -= 1
            if self._guessed and self._guess_may_run():
                self._change.notify_all()

    def close(self, patience_s: float = 5.0) -> bool:
        """Take back what has not begun and wait for the rest; False where a thread is still stuck in a read."""
        with self._change:
            self._open = False
            for future, _ in (*self._demanded, *self._guessed):
                future.cancel()
            self._change.notify_all()
        ends = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
