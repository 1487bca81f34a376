"""SIGTERM and Ctrl-C: finish the step, save, say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal where there is nothing to finish first; like Ctrl-C, it passes every `except Exception`.

    Args:
        message: what to tell the user.
        signal_number: the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Whether the process was asked to stop, and by which signal.

    Attributes:
        signal_number: the signal, once it came.
        hint: how to go on with the work, for the message.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.hint = ""
        self._finishing = False

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """While inside, the first signal only sets the flag: the work looks at it after each step and saves."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def receive(self, number: int) -> None:
        """Take a signal: note it, or interrupt at once where no step is to be finished or it comes again.

        Raises:
            Interrupted: at once.
        """
        again = self.signal_number is not None
        self.signal_number = number
        if again or not self._finishing:
            raise Interrupted(f"stopped{'; ' + self.hint if self.hint else ''}", number)
        with suppress(OSError):  # no buffered stream: this may run in the middle of another write to it
            os.write(2, b"\nrkd: stopping as soon as this step is done and saved; once more stops at once\n")


@contextmanager
def held_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait: what is put back there is put back whole; the last one is delivered after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[-1])


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM go to the request; see `StopRequest.receive`."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.receive(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
