"""Signals that ask a long job to stop, obeyed where it can be stopped without loss."""

import signal
import sys
from types import FrameType

from utils import processes
from utils.errors import TrainingStoppedError

STOPS = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes, which nohup has a job ignore; on Windows Ctrl-Break, and a console that closes.
SIGNALS = [*STOPS, *(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))]


def end_by_words() -> None:
    """Have signals end this process as Ctrl-C does, so that it says why: torchrun sends one where another is gone."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if sys.exc_info()[0] is None:  # else it ends already, and has still to say so
        raise KeyboardInterrupt(signal.Signals(number).name)


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
            raise TrainingStoppedError(f"Stopped by {self.received}. The same command goes on from here.")
