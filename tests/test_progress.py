"""The rate and the time left that people are told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from rkd import progress as progress_module
from rkd.progress import Bar, stage_lines


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_time_left_follows_the_present_rate_not_a_slow_start(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Bar("work", 1000, None)
    for step in range(1, 11):  # ten steps of 20 s
        clock.now += 20
        bar.update(step, unit="img", unit_per_step=4)
    assert lines(capsys)[-1] == "work: 10/1000, 0 img/s, 5h30m left"
    for step in range(11, 71):  # then one a second
        clock.now += 1
        bar.update(step, unit="img", unit_per_step=4)
    assert lines(capsys)[-1] == "work: 70/1000, 4 img/s, 15m30s left"


def test_a_resumed_bar_does_not_count_what_was_done_before(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("work", 1000, None, 500)
    for step in range(501, 513):
        clock.now += 1
        bar.update(step, unit="img")
    assert lines(capsys)[-1] == "work: 510/1000, 1 img/s, 8m10s left"


def test_the_last_line_says_how_long_all_of_it_took(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("work", 3, None)
    for step in range(1, 4):
        clock.now += 2
        bar.update(step)
    assert lines(capsys) == ["work: 3/3, 0m06s in all"]


def test_work_that_is_done_in_one_piece_has_the_rate_of_all_of_it(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Bar("work", 120, None)
    clock.now += 2
    bar.update(120, unit="img")
    assert lines(capsys) == ["work: 120/120, 60 img/s, 0m02s in all"]


def test_no_rate_is_told_of_no_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    Bar("work", 120, None, 120).update(120, unit="img")
    assert lines(capsys) == ["work: 120/120, 0m00s in all"]


def test_without_a_terminal_a_stage_is_a_line_and_a_long_one_a_line_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage_lines() as tell:
        for step in range(1001):  # 100 s
            tell("engine: Timing", step, 1000)
            clock.now += 0.1
        for step in range(1001):  # at once
            tell("engine: Linking", step, 1000)
            tell("engine: Timing", step, 1000)
    said = lines(capsys)
    assert said[0] == "engine: Timing ..."
    assert said[-1] == "engine: Linking ..."
    assert 9 <= len(said[1:-1]) <= 10
    assert all(line.startswith("engine: Timing: ") and line.endswith(" of 1,000") for line in said[1:-1])


def test_on_a_terminal_a_stage_is_a_bar_that_is_drawn_ten_times_a_second_at_most(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress_module, "console", screen)
    drawn = []
    monkeypatch.setattr(Progress, "refresh", lambda self: drawn.append([task.completed for task in self.tasks]))
    with stage_lines() as tell:
        for step in range(1001):  # 1 s
            tell("engine: Timing", step, 1000)
            clock.now += 0.001
        steps = len(drawn)
    assert drawn[steps - 1] == [1000]
    assert 10 <= steps <= 13
