"""First come, first served, and no more than may wait."""

import asyncio
import random

import pytest

from localmimo.serve.queue import QueueFull, RequestQueue, Ticket


def test_turns_come_in_order_and_the_full_line_refuses() -> None:
    async def scenario() -> None:
        line = RequestQueue(2)
        places = [line.join() for _ in range(3)]
        assert [ticket.n_before for ticket in places] == [0, 1, 2] and line.n_waiting == 2
        with pytest.raises(QueueFull) as refused:
            line.join()
        assert refused.value.n_waiting == 2 and refused.value.retry_s == 1
        await places[0].turn()
        places[0].leave()
        places[0].leave()
        await places[1].turn()
        assert places[2].n_before == 1
        line.join().leave()
        places[2].leave()  # gave up while waiting
        places[1].leave()
        assert not line.busy
        line.join().leave()

    asyncio.run(asyncio.wait_for(scenario(), 5))


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_leaving_serves_everybody_once(seed: int) -> None:
    rng = random.Random(seed)

    async def visit(line: RequestQueue, number: int, ticket: Ticket, served: list[int]) -> None:
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.01)
            ticket.leave()
            return
        await ticket.turn()
        assert ticket.n_before == 0
        served.append(number)
        await asyncio.sleep(rng.random() * 0.002)
        ticket.leave()

    async def scenario() -> None:
        line, served = RequestQueue(40), []
        await asyncio.gather(*[visit(line, n, line.join(), served) for n in range(40)])
        assert served == sorted(served) and not line.busy and line.mean_s > 0

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_the_time_to_come_back_is_about_one_answer() -> None:
    async def scenario() -> None:
        line = RequestQueue(3)

        def answer(seconds: float) -> int:
            line.remove(line.join(), seconds)
            return line.retry_s()

        assert line.retry_s() == 1  # nothing is known
        assert answer(10.0) == 10 and answer(20.0) == 12  # the last one weighs a fifth
        assert answer(0.0) == 10  # 9.6, rounded up
        assert answer(10_000.0) == 600  # nobody is told to wait for longer

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_only_the_first_one_calls_the_next() -> None:
    async def scenario() -> None:
        line = RequestQueue(3)
        first, second, third = (line.join() for _ in range(3))
        assert line.n_waiting == 2
        second.leave()  # gave up: the first one is still being served
        waiting = asyncio.create_task(third.turn())
        await asyncio.sleep(0.01)
        assert not waiting.done() and third.n_before == 1 and line.n_waiting == 1
        second.leave()
        assert line.mean_s == 0
        first.leave()
        await waiting
        first.leave()
        assert third.n_before == 0 and line.n_waiting == 0 and line.busy

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_an_answers_time_runs_from_its_own_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        now = [100.0]
        monkeypatch.setattr("localmimo.serve.queue.time.monotonic", lambda: now[0])
        line = RequestQueue(3)
        first, second, third = (line.join() for _ in range(3))
        now[0] += 40
        second.leave()  # while the first one is being served
        now[0] += 2
        first.leave()
        assert line.mean_s == 42
        now[0] += 10
        third.leave()
        assert line.mean_s == pytest.approx(0.8 * 42 + 0.2 * 10)

    asyncio.run(scenario())


def test_a_ticket_that_was_given_back_has_nobody_before_it() -> None:
    async def scenario() -> None:
        line = RequestQueue(3)
        first, second = line.join(), line.join()
        second.leave()
        assert (first.n_before, second.n_before) == (0, 0)

    asyncio.run(scenario())
