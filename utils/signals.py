"""Signals that ask a long job to stop, obeyed where it can be stopped without loss."""

import signal
from types import FrameType

from utils import processes
from utils.errors import TrainingStoppedError

STOPS = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes, which nohup has a job ignore; on Windows Ctrl-Break, and a console that closes.
SIGNALS = [*STOPS, *(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))]


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

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise TrainingStoppedError where a signal came; for work that is simply done again."""
        if self.received:
            raise TrainingStoppedError(f"Stopped by {self.received}. The same command goes on from here.")
