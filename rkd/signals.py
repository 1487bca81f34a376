"""SIGTERM, Ctrl-C and a terminal that hangs up (SIGHUP): finish the step, save, say how to go on."""

from __future__ import annotations

import os
import signal
import stat
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
        if number == signal.SIGHUP:
            _leave_terminal()
            if again:  # the kernel and the shell both say that the terminal is gone
                return
        self.signal_number = number
        if again or not self._finishing:
            raise Interrupted(f"stopped{'; ' + self.hint if self.hint else ''}", number)
        with suppress(OSError):  # no buffered stream: this may run in the middle of another write to it
            os.write(2, b"\nrkd: stopping as soon as this step is done and saved; once more stops at once\n")


def _leave_terminal() -> None:
    """Where the terminal is gone, what is still said goes nowhere: an error of it must not take the work away."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _stops() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop; under nohup a hang-up does not."""
    always = signal.SIGINT, signal.SIGTERM
    return always if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*always, signal.SIGHUP)


@contextmanager
def held_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP wait: what is put back there is put back whole; the last one is delivered after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _stops()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[-1])


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGINT, SIGTERM and SIGHUP go to the request; see `StopRequest.receive`."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.receive(number)

    before = {number: signal.signal(number, on_signal) for number in _stops()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
