"""What a person sees while a suite runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rkd.errors import printable
from rkd.progress import console, say
from rkd.suite.estimate import Estimator
from rkd.suite.launch import Outcome
from rkd.suite.place import Place
from rkd.suite.plan import Job, Plan, Student

_TAIL_BYTES = 2048
_PLAIN_EVERY_S = 60.0


class Display:
    """Shows the progress of a suite; also what `rkd.suite.runner.Watcher` asks for.

    Args:
        plan, place: of the suite.
        estimator: for the time left; it learns from every job.
        slots: jobs at once.
        waiting: the jobs that are not done yet.
        live: where to draw; None for plain lines.
    """

    def __init__(
        self, plan: Plan, place: Place, estimator: Estimator, slots: int, waiting: Mapping[str, Job], live: Live | None
    ) -> None:
        self._place, self._estimator, self._slots, self._live = place, estimator, slots, live
        self._left = dict(waiting)
        self._total, self._failed = len(plan.jobs), 0
        self._running: dict[str, tuple[Job, float]] = {}
        self._printed = time.monotonic()
        self._stopping = False

    def started(self, job: Job) -> None:
        """See `Watcher`."""
        self._running[job.name] = (job, time.monotonic())
        if self._live is None:
            say(f"start {title(job)}")

    def ended(self, job: Job, outcome: Outcome) -> None:
        """See `Watcher`."""
        self._running.pop(job.name, None)
        self._left.pop(job.name, None)
        if outcome.code == 0:
            if outcome.seconds:
                self._estimator.learn(job, outcome.seconds)
            say(f"[{self._done()}/{self._total}] {title(job)}: {duration(outcome.seconds)}{self._figures(job)}")
        elif outcome.said:
            self._failed += 1
            say(f"[{self._done()}/{self._total}] {title(job)} FAILED: {outcome.said} (see {self._place.log_file(job)})")
        else:
            say(f"{title(job)}: stopped")
        self.tick()

    def blocked(self, job: Job, why: str) -> None:
        """See `Watcher`."""
        self._left.pop(job.name, None)
        self._failed += 1
        say(f"[{self._done()}/{self._total}] {title(job)} cannot be made: {why}")

    def say_stopping(self) -> None:
        """Tell once that the running jobs are saving."""
        if not self._stopping:
            self._stopping = True
            say(f"stopping: {len(self._running)} jobs finish their step and save; a second signal ends them at once")

    def tick(self) -> None:
        """See `Watcher`."""
        if self._live is not None:
            self._live.update(self._picture())
        elif time.monotonic() - self._printed > _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            for job, began in self._running.values():
                say(f"  {title(job)}, {duration(time.monotonic() - began)}: {self._last_line(job)}")
            say(self._summary())

    def _done(self) -> int:
        return self._total - len(self._left)

    def _summary(self) -> str:
        left = self._estimator.left(self._left.values(), self._slots)
        running = sum(
            min(time.monotonic() - began, self._estimator.seconds(job)) for job, began in self._running.values()
        )
        failed = f", {self._failed} failed" if self._failed else ""
        left = max(0.0, left - running / max(1, self._slots))
        return f"{self._done()} of {self._total} jobs done{failed}; about {duration(left)} left"

    def _picture(self) -> Group:
        rows = Table.grid(padding=(0, 2))
        for job, began in self._running.values():
            last = Text(printable(self._last_line(job)), style="dim", overflow="ellipsis", no_wrap=True)
            rows.add_row(Text(title(job)), Text(duration(time.monotonic() - began)), last)
        bar = ProgressBar(total=self._total, completed=self._done(), width=40)
        return Group(rows, bar, Text(self._summary()))

    def _last_line(self, job: Job) -> str:
        """The last that a running job printed."""
        try:
            with self._place.log_file(job).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def _figures(self, job: Job) -> str:
        """ACC, and ASR where there is one, of a student that was just finished."""
        if not isinstance(job.work, Student):
            return ""
        from rkd.run import models_of

        scores = models_of(self._place.student_run(job.work))[-1].scores
        under = "".join(f", ASR {t.asr}, RA {t.ra}" for t in scores.triggers[:1])
        return f"; ACC {scores.acc}{under}"


@contextmanager
def display(
    plan: Plan, place: Place, estimator: Estimator, slots: int, waiting: Mapping[str, Job] = MappingProxyType({})
) -> Iterator[Display]:
    """Show a suite's progress while inside."""
    if not console.is_terminal:
        yield Display(plan, place, estimator, slots, waiting, None)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield Display(plan, place, estimator, slots, waiting, live)


def title(job: Job) -> str:
    """A job's name to read."""
    kind, _, name = job.name.partition(":")
    return f"{kind} {name}"


def shown(path: Path) -> str:
    """A path below the working folder without that folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def duration(seconds: float) -> str:
    """Seconds to read."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
