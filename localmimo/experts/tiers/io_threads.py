"""I/O threads: they run jobs of reading, what is needed now before what is only prefetched.

Knows jobs; nothing of pages, files or why one is guessed. `concurrent.futures` would do, at twice the cost to the
asking thread (benchmarks.paging --only bookkeeping): a token may ask for a hundred.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from enum import Enum

from localmimo.errors import BadModel

Job = Callable[[], None]
LOOK_S = 1.0  # how often one who waits looks whether the threads are alive


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


class IoThreads:
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
        self._held: dict[threading.Thread, Task] = {}  # what each thread is at
        self._threads = [self._started(f"page-reader-{i}") for i in range(n)]

    def demand(self, job: Job) -> Task:
        """Run `job` as soon as a thread is free."""
        return self._put(self._demanded, Task(job, True, None))

    def prefetch(self, job: Job, on_end: Job | None = None) -> Task:
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
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        with self._end:
            while tasks and not enough(task.done() for task in tasks):
                left = LOOK_S if ends is None else min(LOOK_S, ends - time.monotonic())
                if left <= 0:
                    return False
                if not self._end.wait(left):
                    self._mend()
        return True

    def _put(self, queue: deque[Task], task: Task) -> Task:
        with self._work:
            self._mend()
            queue.append(task)
            self._work.notify()
        return task

    def _started(self, name: str) -> threading.Thread:
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        thread.start()
        return thread

    def _serve(self) -> None:
        while (task := self._next()) is not None:
            try:
                task.job()
            except BaseException as error:  # the one who asked is told
                task.error = error if isinstance(error, Exception) else _ended(error)
            with self._work:
                self._over(threading.current_thread(), task)
            if task.on_end is not None:
                task.on_end()

    def _mend(self) -> None:
        """Put others in the place of threads that something has ended, and tell who asked for what they were at."""
        for i, thread in enumerate(self._threads):
            if self._open and not thread.is_alive():
                if (task := self._held.get(thread)) is not None:
                    task.error = _ended(SystemExit())
                    self._over(thread, task)
                self._threads[i] = self._started(thread.name)

    def _next(self) -> Task | None:
        """Wait for a job that may run now; None when closed."""
        with self._work:
            while self._open:
                task = self._take(self._demanded)
                if task is None and self._guess_may_run():
                    task = self._take(self._guessed)
                if task is not None:
                    self._held[threading.current_thread()] = task
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

    def _over(self, thread: threading.Thread, task: Task) -> None:
        task.state = State.OVER
        del self._held[thread]
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


def _ended(error: BaseException) -> BadModel:
    """What the one who asked hears: what ends a thread must not end theirs."""
    return BadModel(
        f"A thread that reads pages was ended in the middle of one ({type(error).__name__}): ask again."
    )
