"""Progress for people: a live bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rkd.errors import printable

console = Console(stderr=True, highlight=False)
"""What is not a result goes here: standard output is for results."""

_PLAIN_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1
_LEAST_S = 0.05  # a rate is told from
_RATE_OVER_S = 30.0  # what is left is told by the present rate: a slow start or a busy machine passes


class Bar:
    """One piece of long work.

    Args:
        name: what it is called.
        total: steps of it.
        live: the display of a terminal; None for plain lines.
        done: steps that were done before, which do not count for the rate.
    """

    def __init__(self, name: str, total: int, live: Progress | None, done: int = 0) -> None:
        self._name, self._total, self._live, self._first = name, total, live, done
        self._started = self._printed = time.monotonic()
        self._seen = deque([(self._started, done)])  # when, done; a window for the rate
        self._task = live.add_task(name, total=total, extra="") if live is not None else None

    def update(self, done: int, *, unit_per_step: int = 1, unit: str = "", **figures: float | str) -> None:
        """Show that `done` of the total are done.

        Args:
            done: so far.
            unit_per_step: units in one of them, for the rate.
            unit: what the rate counts, e.g. `img`.
            figures: what else to show, by name.
        """
        now = time.monotonic()
        rate = self._rate(now, done)
        parts = [
            f"{name.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{name.replace('_', ' ')} {v}"
            for name, v in figures.items()
        ]
        if done >= self._total:  # the last word is about all of it
            rate = self._rate_since(self._started, self._first, now, done)
        if unit and rate:
            parts.append(f"{rate * unit_per_step:,.0f} {unit}/s")
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, extra=", ".join(parts))
        elif now - self._printed >= _PLAIN_EVERY_S or done >= self._total:
            self._printed = now
            left = (self._total - done) / max(rate, 1e-9)
            parts.append(
                f"{_duration(left)} left" if done < self._total else f"{_duration(now - self._started)} in all"
            )
            console.print(f"{self._name}: {done}/{self._total}, {', '.join(parts)}", markup=False, soft_wrap=True)

    def _rate(self, now: float, done: int) -> float:
        """Steps a second, over the last half minute."""
        seen = self._seen
        while len(seen) > 1 and seen[1][0] <= now - _RATE_OVER_S:
            seen.popleft()
        since, first = seen[0]
        if now - seen[-1][0] >= 1:
            seen.append((now, done))
        return self._rate_since(since, first, now, done)

    @staticmethod
    def _rate_since(since: float, first: int, now: float, done: int) -> float:
        """Steps a second; 0 where there was hardly any time to tell."""
        return (done - first) / (now - since) if now - since >= _LEAST_S else 0.0


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of `total` steps of work called `name`, of which some may have been `done` before."""
    if not console.is_terminal:
        yield Bar(name, total, None, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("{task.fields[extra]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as live:
        yield Bar(name, total, live, done)


@contextmanager
def stage_lines() -> Iterator[Callable[[str, int, int], None]]:
    """Show stages of work, drawn only when told: no thread of the display disturbs what is being timed.

    Without a terminal: a line for each stage, and for one that takes long, at most a line every 10 s.
    """
    drawn = time.monotonic()
    if not console.is_terminal:
        shown: set[str] = set()

        def plain(name: str, done: int, total: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if name not in shown:
                shown.add(name)
                say(f"{name} ...")
            elif now - drawn >= _PLAIN_EVERY_S and done < total:
                say(f"{name}: {done:,} of {total:,}")
            else:
                return
            drawn = now

        yield plain
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, console=console, auto_refresh=False) as live:
        tasks: dict[str, TaskID] = {}

        def draw(name: str, done: int, total: int) -> None:
            nonlocal drawn
            now, new = time.monotonic(), name not in tasks
            if new:
                tasks[name] = live.add_task(name, total=total)
            live.update(tasks[name], completed=done, total=total)
            if new or done >= total or now - drawn >= _DRAW_EVERY_S:
                drawn = now
                live.refresh()

        yield draw


def say(message: str) -> None:
    """One line on standard error."""
    console.print(printable(message), markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
