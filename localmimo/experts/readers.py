"""Readers: a few threads that run jobs of reading, what is needed now before what is only guessed.

Knows jobs; nothing of pages, files or why one is guessed. `concurrent.futures` would do, at twice the cost to the
asking thread (benchmarks.paging --only bookkeeping): a token may ask for a hundred.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from enum import Enum

Job = Callable[[], None]


class State(Enum):
    WAITING = 0
    RUNNING = 1
    OVER = 2
    CANCELLED = 3


class Task:
    """One job: waiting its turn, running, over, or taken back before it began."""

    __slots__ = ("demanded", "error", "job", "on_end", "state")

    def __init__(self, job: Job, demanded: bool, on_end: Job | None) -> None:
        self.job = job
        self.demanded = demanded
        self.on_end = on_end  # called by the reader's thread
        self.state = State.WAITING
        self.error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is over, or was cancelled."""
        return self.state in (State.OVER, State.CANCELLED)

    def cancelled(self) -> bool:
        return self.state is State.CANCELLED

    def result(self) -> None:
        """Raise what the job raised."""
        if self.error is not None:
            raise self.error


class Readers:
    """`n` threads. A guessed job starts only while no demanded one waits or runs, on half of the threads at most."""

    def __init__(self, n: int) -> None:
        self._demanded: deque[Task] = deque()
        self._guessed: deque[Task] = deque()
        self._running_demanded = 0
        self._running_guessed = 0
        self._most_guessed = max(1, n // 2)
        self._open = True
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # there may be something to do
        self._end = threading.Condition(lock)  # something is over
        self._threads = [
            threading.Thread(target=self._serve, name=f"page-reader-{i}", daemon=True) for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, job: Job) -> Task:
        """Run `job` as soon as a thread is free."""
        return self._put(self._demanded, Task(job, True, None))

    def guess(self, job: Job, on_end: Job | None = None) -> Task:
        """Run `job` when nothing that is needed waits, then `on_end`; `cancel` takes it back until it begins."""
        return self._put(self._guessed, Task(job, False, on_end))

    def cancel(self, task: Task) -> bool:
        """Take a task back; False where it has begun."""
        with self._work:
            if task.state is State.WAITING:
                task.state = State.CANCELLED
            return task.cancelled()

    def wait(self, tasks: Collection[Task], timeout_s: float | None, *, every: bool = False) -> bool:
        """Wait until one of the tasks, or every one, is over; False when the time is."""
        enough = all if every else any
        with self._end:
            return self._end.wait_for(lambda: not tasks or enough(task.done() for task in tasks), timeout_s)

    def _put(self, queue: deque[Task], task: Task) -> Task:
        with self._work:
            queue.append(task)
            self._work.notify()
        return task

    def _serve(self) -> None:
        while (task := self._next()) is not None:
            try:
                task.job()
            except BaseException as error:  # the one who asked is told
                task.error = error
            self._over(task)
            if task.on_end is not None:
                task.on_end()

    def _next(self) -> Task | None:
        """Wait for a job that may run now; None when closed."""
        with self._work:
            while self._open:
                task = self._take(self._demanded)
                if task is None and self._guess_may_run():
                    task = self._take(self._guessed)
                if task is not None:
                    self._count(task, 1)
                    return task
                self._work.wait()
            return None

    def _guess_may_run(self) -> bool:
        return not self._running_demanded and self._running_guessed < self._most_guessed

    @staticmethod
    def _take(queue: deque[Task]) -> Task | None:
        while queue:
            task = queue.popleft()
            if task.state is State.WAITING:
                task.state = State.RUNNING
                return task
        return None

    def _over(self, task: Task) -> None:
        with self._work:
            task.state = State.OVER
            self._count(task, -1)
            if self._guessed and self._guess_may_run():
                self._work.notify_all()
            self._end.notify_all()

    def _count(self, task: Task, change: int) -> None:
        if task.demanded:
            self._running_demanded += change
        else:
            self._running_guessed += change

    def close(self, patience_s: float = 5.0) -> bool:
        """Take back what has not begun and wait for the rest; False where a thread is still stuck in a read."""
        with self._work:
            self._open = False
            for task in (*self._demanded, *self._guessed):
                if task.state is State.WAITING:
                    task.state = State.CANCELLED
            self._work.notify_all()
            self._end.notify_all()
        ends = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
