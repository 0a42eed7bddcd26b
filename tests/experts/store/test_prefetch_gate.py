"""The gate keeps guesses where they pay, drops them where they don't, and never costs much to find out."""

from localmimo.experts.store.prefetch_gate import BLOCK, RATIOS, PrefetchGate
from localmimo.hardware.ab_timing import ABTiming


def run(
    seconds: dict[bool, float], n_steps: int, right: float = 0.8, missing: bool = True
) -> tuple[float, list[bool]]:
    """Drive a gate with steps of three layers that take `seconds` with guesses and without; wall time and choices."""
    now = [0.0]
    gate, choices = PrefetchGate(lambda: now[0]), []
    for _ in range(n_steps):
        for layer in (1, 2, 3):
            gate.step(layer, missing)
            if layer == 2:
                choices.append(gate.open)
                if gate.open:
                    gate.judge(round(10 * right), 10 - round(10 * right))
        now[0] += seconds[choices[-1]]
    return now[0], choices


def test_guesses_stay_where_they_pay() -> None:
    wall, choices = run({True: 0.07, False: 0.1}, 4000)
    assert wall <= 4000 * 0.07 * 1.02
    assert choices[-1]


def test_guesses_go_where_they_cost() -> None:
    wall, choices = run({True: 0.13, False: 0.1}, 4000)
    assert wall <= 4000 * 0.1 * 1.02
    assert not choices[-1]


def test_wrong_guesses_stop_at_once() -> None:
    _, choices = run({True: 0.07, False: 0.1}, 200, right=0.2)
    assert sum(choices) <= 2 * BLOCK


def test_no_guess_without_a_miss() -> None:
    _, choices = run({True: 0.1, False: 0.1}, 100, missing=False)
    assert not any(choices)


def test_a_pause_between_answers_is_not_measured() -> None:
    now = [0.0]
    gate = PrefetchGate(lambda: now[0])
    for step in range(3 * BLOCK * (RATIOS + 3)):
        gate.step(1, True)
        guessing = gate._guessing
        now[0] += 0.05 if guessing else 0.1
        if step % 5 == 4:
            now[0] += 1000.0  # somebody thinks
    assert gate._wanted


def test_no_ratio_contains_a_pause() -> None:
    """The median would not notice one: every ratio is looked at."""
    now, ratios = [0.0], set()
    gate = PrefetchGate(lambda: now[0])
    for step in range(3 * BLOCK * (RATIOS + 3)):
        gate.step(1, True)
        now[0] += 0.05 if gate._guessing else 0.1
        if step % 7 == 6:
            now[0] += 1000.0
        if gate._paired is not None:
            ratios.update(gate._paired.ratios)
    assert len(ratios) > 1 and 0.1 < min(ratios) <= max(ratios) < 3


def test_ratios_of_neighbours_know_no_drift() -> None:
    """The second way takes 1.3 times as long, on a machine that grows slower all the time and stalls once."""
    paired = ABTiming()
    for turn in range(21):
        assert paired.second == bool(turn % 2)
        paired.note(1.05**turn * (1.3 if turn % 2 else 1.0) * (9 if turn == 8 else 1))
    assert len(paired.ratios) == 19 and abs(paired.ratio - 1.3) < 1e-9


def test_steps_that_grow_longer_meanwhile_decide_nothing() -> None:
    """More timelines, a colder cache, a slower machine: guesses still take seven tenths of a step's time."""
    now = [0.0]
    gate = PrefetchGate(lambda: now[0])
    for step in range(BLOCK * (RATIOS + 4)):
        gate.step(1, True)
        guessing = gate._guessing
        now[0] += (0.1 if step < BLOCK * RATIOS // 2 else 0.4) * (0.7 if guessing else 1.0)
    assert gate._paired is None and gate._wanted
