"""Run a student's answer where it lives: in this process, or in another one that only tensors enter and leave.

A check never looks at a student's objects. It hands a *driver* over, a plain function that builds the answer's objects,
uses them and returns tensors; what is judged is what comes back. In a notebook the driver is simply called. When a class
is graded, the student's kernel is another process, the answers are `RemoteAnswer`s, and the driver travels as source.
"""

import inspect
import io
import os
import textwrap
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

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


def drive(
    driver: Callable[..., Observation], answers: Sequence[object], case: dict, helpers: Iterable[Callable] = ()
) -> Observation:
    """Return `driver(*answers, **case)`, run where the answers live.

    The driver must stand alone, but for helpers, which travel with it and stand alone as well: each imports what it uses, from
    torch, peftlab and the standard library only.
    """
    if not isinstance(answers[0], RemoteAnswer):
        return driver(*answers, **case)
    arguments, names = io.BytesIO(), [answer.name for answer in answers]
    torch.save(case, arguments)
    return read_reply(answers[0].run(travelling(driver, helpers), driver.__name__, names, arguments.getvalue()))


def travelling(driver: Callable, helpers: Iterable[Callable] = ()) -> str:
    """Return the source that defines a driver and what it calls."""
    return "\n\n".join(textwrap.dedent(inspect.getsource(function)) for function in (*helpers, driver))


def read_reply(reply: bytes) -> Observation:
    """Return the observation in what another process sent, which may be anything.

    Nothing in it is executed, and it takes no more memory than it has bytes. Admitted are dicts, lists and tuples of
    tensors on the CPU, strings and numbers.

    Raises:
        StudentError: if it is anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(reply)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(reply):  # compressed: torch.save never does
                raise StudentError("the code sent back an archive that would unpack to more than it is")
        observation = torch.load(io.BytesIO(reply), weights_only=True, map_location="cpu")
        if not isinstance(observation, dict):
            raise StudentError("the code sent back no observation")
        _admit(observation)
    except StudentError:
        raise
    except Exception as error:  # a forged reply can fail in any way
        raise StudentError(f"the code sent back what a check cannot read ({type(error).__name__})") from error
    return observation


def _admit(value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(type(key))
            _admit(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _admit(item)
    elif isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            raise TypeError(type(value))
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(type(value))


def drive_and_measure(
    driver: Callable[..., Observation], answers: Sequence[object], case: dict, helpers: Iterable[Callable] = ()
) -> tuple[Observation, int | None]:
    """Return what `drive` returns, and by how many bytes the process grew at its peak.

    The kernel's own high-water mark is read from outside Python, so code that is measured cannot misreport it. It is
    noisy by a few MiB: use it for effects of 64 MiB and more. None where the kernel keeps no such mark (not Linux).

    The driver runs once before it is measured, for a process also grows by what it imports and sets up on first use.
    Then freed memory goes back to the system, or an allocation that fits into it would not show.
    """
    remote = isinstance(answers[0], RemoteAnswer)
    process = answers[0].process() if remote else os.getpid()
    drive(driver, answers, case, helpers)
    drive(_return_freed_memory, answers, {})
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    except OSError:
        return drive(driver, answers, case, helpers), None
    before = _status(process, "VmRSS")
    observation = drive(driver, answers, case, helpers)
    return observation, _status(process, "VmHWM") - before


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message`, and the line of the student's cell that raised it, if there is one.

    Where the driver failed on what the answer returned, it says so: nothing in the student's code has raised.

    It stands alone, for it also travels to the student's kernel as source.
    """
    import linecache
    import os

    if type(error).__name__ == "StudentError":  # described where it was raised
        return str(error)
    described = f"{type(error).__name__}: {error}".rstrip(": ")
    frame, place, innermost = error.__traceback__, "", ""
    while frame:
        file = frame.tb_frame.f_code.co_filename
        line = linecache.getline(file, frame.tb_lineno).strip()
        ours = frame.tb_frame.f_code.co_name == "_call_driver" or line.startswith("_call_driver(")
        if "ipykernel" in file and not os.path.isfile(file) and not ours:  # how IPython names the cells that it compiles
            place = f" (line {frame.tb_lineno} of your cell: {line})"
        innermost, frame = frame.tb_frame.f_code.co_name, frame.tb_next
    if innermost.startswith("drive_") and ("NoneType" in described or "unpack" in described):
        return f"what came back cannot be used: {described}"  # the driver's own line raised, not the student's code
    return described + place


def _return_freed_memory(*answers):
    """Hand the heap's free pages back to the system, where the C library can (glibc)."""
    import ctypes
    import gc

    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows raises TypeError at the None
        return {}
    trim(0)
    return {}


def _status(process: int, key: str) -> int:
    """Return a size from /proc/<process>/status, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {key}")
