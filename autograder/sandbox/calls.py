"""The answers of a notebook as a check sees them when a class is graded: by name, in the submission's sandbox."""

import re
from collections.abc import Callable

from autograder.checking.drive import RemoteAnswer, StudentError
from autograder.checking.judging import NOT_WRITTEN
from autograder.sandbox.process import Reply, SandboxProcess
from autograder.sandbox.watch import StoppedError


class Calls:
    """The calls of one attempt at a check, all with the same of the student's cells.

    Attributes:
        printed: what the student's code has printed.
        raised: whether it has raised an error, and not the one that says that nothing is written yet.
        stopped: why it was stopped; one crash a check is enough.
        trouble: what went wrong on the grader's side: then there is nothing to judge.
        baggage: of the measured calls, the most that was held before; in bytes.
    """

    def __init__(self, sandbox: Callable[[], SandboxProcess], cells: list[dict], again: bool = False):
        self._sandbox, self._cells, self._again = sandbox, cells, again
        self.printed: list[str] = []
        self.raised, self.baggage = False, 0
        self.stopped: StoppedError | None = None
        self.trouble: Exception | None = None

    def make(self, call: tuple, measured: bool) -> Reply:
        """Make a call.

        Raises:
            StudentError: if it raised, or was stopped.
        """
        try:
            if self.stopped is not None:
                raise self.stopped
            reply = self._sandbox().call(self._cells, *call, again=self._again, measured=measured)
        except StoppedError as stopped:
            self.stopped = stopped
            raise StudentError(f"Stopped: {stopped}") from stopped
        except Exception as trouble:
            self.trouble = trouble
            raise StudentError("the call could not be made") from trouble
        self.printed.append(reply.printed)
        if measured:
            self.baggage = max(self.baggage, reply.baggage or 0)
        if reply.error:
            self.raised |= not re.match(NOT_WRITTEN, reply.error)
            raise StudentError(reply.error[:1000])
        return reply


class Answer(RemoteAnswer):
    """What a student's cells define under a name."""

    def __init__(self, name: str, calls: Calls):
        super().__init__(name)
        self._calls = calls

    def run(self, *call: object) -> bytes:
        """Have the driver called in a new process."""
        return self._calls.make(call, measured=False).content

    def run_and_measure(self, *call: object) -> tuple[bytes, int | None]:
        """Have the driver called in a new process that is measured, from its parent."""
        reply = self._calls.make(call, measured=True)
        return reply.content, reply.grown
