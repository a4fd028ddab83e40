"""Run a student's answer where it lives: in this process, or in another one that only tensors enter and leave.

A check never looks at a student's objects. It hands a *driver* over, a plain function that builds the answer's objects,
uses them and returns tensors; what is judged is what comes back. In a notebook the driver is simply called. When a class
is graded, the student's kernel is another process, the answers are `RemoteAnswer`s, and the driver travels as source.
"""

import inspect
import io
import linecache
import os
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Observation = dict[str, object]
"""What a driver returns: tensors, strings, numbers, and lists or dicts of these."""


class RemoteAnswer(ABC):
    """A student's function or class, by its name in another process."""

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def run(self, source: str, driver: str, answers: Sequence[str], arguments: bytes) -> bytes:
        """Define `source` over there, call `driver(*answers, **arguments)`, and return what `torch.save` makes of the result.

        Raises:
            StudentError: if the call raised.
        """

    @abstractmethod
    def process(self) -> int:
        """Return the process id, as seen from here, of the process that the answer lives in."""


class StudentError(Exception):
    """Student code in another process raised; the message is `TypeName: message` and the student's line."""


def drive(driver: Callable[..., Observation], answers: Sequence[object], case: dict) -> Observation:
    """Return `driver(*answers, **case)`, run where the answers live.

    The driver must stand alone: it imports what it uses, from torch, peftlab and the standard library only.
    """
    if not isinstance(answers[0], RemoteAnswer):
        return driver(*answers, **case)
    arguments, names = io.BytesIO(), [answer.name for answer in answers]
    torch.save(case, arguments)
    source = textwrap.dedent(inspect.getsource(driver))
    reply = answers[0].run(source, driver.__name__, names, arguments.getvalue())
    return torch.load(io.BytesIO(reply), weights_only=True)


def drive_and_measure(
    driver: Callable[..., Observation], answers: Sequence[object], case: dict
) -> tuple[Observation, int | None]:
    """Return what `drive` returns, and by how many bytes the process grew at its peak.

    The kernel's own high-water mark is read from outside Python, so code that is measured cannot misreport it. It is
    noisy by a few MiB: use it for effects of 64 MiB and more. None where the kernel keeps no such mark (not Linux).

    The driver runs once before it is measured, for a process also grows by what it imports and sets up on first use.
    """
    remote = isinstance(answers[0], RemoteAnswer)
    process = answers[0].process() if remote else os.getpid()
    drive(driver, answers, case)
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    except OSError:
        return drive(driver, answers, case), None
    before = _status(process, "VmRSS")
    observation = drive(driver, answers, case)
    return observation, _status(process, "VmHWM") - before


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message`, and the line of the student's cell that raised it, if there is one."""
    if isinstance(error, StudentError):
        return str(error)
    described = f"{type(error).__name__}: {error}".rstrip(": ")
    frame, place = error.__traceback__, ""
    while frame:
        file = frame.tb_frame.f_code.co_filename
        if "ipykernel" in file and not Path(file).is_file():  # how IPython names the cells that it compiles
            place = f" (line {frame.tb_lineno} of your cell: {linecache.getline(file, frame.tb_lineno).strip()})"
        frame = frame.tb_next
    return described + place


def _status(process: int, key: str) -> int:
    """Return a size from /proc/<process>/status, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {key}")
