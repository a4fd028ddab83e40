"""What a submission's processes use, seen from outside, and where it ends."""

import contextlib
import signal
import time
from dataclasses import dataclass

import psutil

from autograder.sandbox.enclosure import Limits


class StoppedError(Exception):
    """The submission's process has ended or was ended; the message is a sentence that says why."""


@dataclass
class Moment:
    """When a cell or a call began: by processor time, and by the clock."""

    cpu_seconds: float
    wall_seconds: float


class Watch:
    """Follows some processes and all that they start, over several starts.

    Attributes:
        cpu_seconds, peak_bytes: what has been used so far, over all processes and starts.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.peak_bytes = 0
        self._of_earlier_starts = self._of_this_start = self._resident = 0.0
        self._first: tuple[int, ...] = ()
        self._count = 0

    @property
    def cpu_seconds(self) -> float:
        """Of all starts."""
        return self._of_earlier_starts + self._of_this_start

    def start(self, *processes: int) -> None:
        """Follow these processes from now on."""
        self._of_earlier_starts, self._of_this_start = self.cpu_seconds, 0.0
        self._first = processes

    def now(self) -> Moment:
        """Return this moment, for `stop_if_too_much`."""
        return Moment(self.cpu_seconds, time.monotonic())

    def processes(self) -> list[psutil.Process]:
        """Return the processes and what they have started, as far as they are still there."""
        found = []
        for number in self._first:
            with contextlib.suppress(psutil.Error):
                first = psutil.Process(number)
                found += [first, *first.children(recursive=True)]
        return found

    def look(self) -> None:
        """Read the processor time and the memory of all processes."""
        cpu = resident = 0.0
        processes = self.processes()
        self._count = len(processes)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu += times.user + times.system + times.children_user + times.children_system
                resident += process.memory_info().rss
        self._of_this_start = max(self._of_this_start, cpu)
        self._resident = resident
        self.peak_bytes = max(self.peak_bytes, int(resident))

    def stop_if_too_much(self, since: Moment) -> None:
        """Raise `StoppedError` if, since then, more has been used than one cell or call may use."""
        self.look()
        limits = self.limits
        if self._count > limits.processes:  # the system sees to that itself, but not for root
            raise StoppedError(f"it started more than {limits.processes} processes")
        if self.cpu_seconds - since.cpu_seconds > limits.cpu_seconds:
            raise StoppedError(f"it ran longer than {limits.cpu_seconds:g} s (of processor time): does a loop not end?")
        if time.monotonic() - since.wall_seconds > limits.wall_seconds:
            raise StoppedError(f"it did not end within {limits.wall_seconds:g} s: does it wait for something?")
        if self._resident > limits.memory_bytes:
            raise StoppedError(f"it used more than {limits.memory_bytes / 2**30:.3g} GiB of memory")

    def kill(self) -> None:
        """Kill the processes and all that they have started."""
        self.look()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self._first = ()
