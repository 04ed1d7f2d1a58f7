"""Signals that ask a long job to stop, obeyed where it can be stopped without loss."""

import signal
import sys
from threading import Timer
from types import FrameType

from utils import processes
from utils.errors import TrainingStoppedError

STOPS = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes, which nohup has a job ignore; on Windows Ctrl-Break, and a console that closes.
SIGNALS = [*STOPS, *(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))]
# Seconds after which a signal that came at an awkward moment comes again.
AGAIN = 0.2


def end_by_words() -> None:
    """Have signals end this process as Ctrl-C does, so that it says why: torchrun sends one where another is gone."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if sys.exc_info()[0] is None:
        raise KeyboardInterrupt(signal.Signals(number).name)
    # It may end already, and have still to say so.
    again = Timer(AGAIN, signal.raise_signal, [number])
    again.daemon = True
    again.start()


def ignore_signals() -> None:
    """For a process that has said all it has to say."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stopped_by(name: str) -> str:
    """How a process says which signal stopped it."""
    told = processes.count() > 1 and name == "SIGTERM"
    return f"Stopped by {name}" + (", which torchrun sends to all where one process is gone" if told else "")


class StopSignal:
    """Notes SIGINT, SIGTERM and the like, so that the job ends at its next check; a second one stops it at once.

    Under torchrun it does not: a terminal sends the first one to all processes, and torchrun another after it.
    """

    received: str | None = None

    def __enter__(self) -> "StopSignal":
        ignored = [number for number in SIGNALS if number not in STOPS and signal.getsignal(number) == signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS if number not in ignored}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and processes.count() == 1:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        if kind and processes.count() > 1:
            return  # this process has still to say why it ends
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise TrainingStoppedError where a signal came; for work that is simply done again."""
        if self.received:
            raise TrainingStoppedError(f"{stopped_by(self.received)}. The same command goes on from here.")
