"""Run a student's answer where it lives: in this process, or in another one that only tensors enter and leave.

A check never looks at a student's objects. It hands a *driver* over, a plain function that builds the answer's objects,
uses them and returns tensors; what is judged is what comes back. In a notebook the driver is simply called. When a class
is graded, the answers are `RemoteAnswer`s, which live in another process, and the driver travels there as source.
"""

import contextlib
import ctypes
import gc
import inspect
import io
import textwrap
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor, nn

Observation = dict[str, object]
"""What a driver returns: tensors, strings, numbers, and lists or dicts of these."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""
APART_BYTES = 2**17
HEAP_BYTES = 2**25, 2**26
"""To what glibc moves the two thresholds by itself, if large tensors come and go."""
REPLY_EXPANDED_BYTES = 256 * 2**20
REPLY_NESTED, REPLY_PARTS = 50, 1_000_000
"""How large a reply may be for whoever goes through it."""


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
    def run_and_measure(self, source: str, driver: str, answers: Sequence[str], arguments: bytes) -> tuple[bytes, int | None]:
        """Return what `run` returns, and by how many bytes the other process grew at its peak, measured from outside."""


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
    return read_reply(answers[0].run(*_parcel(driver, answers, case, helpers)))


def _parcel(
    driver: Callable[..., Observation], answers: Sequence[RemoteAnswer], case: dict, helpers: Iterable[Callable]
) -> tuple:
    """Return a call as it travels: the source of driver and helpers, the driver's name, the answers' names, the arguments."""
    arguments = io.BytesIO()
    torch.save(case, arguments)
    return travelling(driver, helpers), driver.__name__, [answer.name for answer in answers], arguments.getvalue()


def travelling(driver: Callable, helpers: Iterable[Callable] = ()) -> str:
    """Return the source that defines a driver and what it calls."""
    return "\n\n".join(textwrap.dedent(inspect.getsource(function)) for function in (*helpers, driver))


def read_reply(reply: bytes, most_bytes: int = REPLY_EXPANDED_BYTES) -> Observation:
    """Return the observation in what another process sent, which may be anything.

    Nothing in it is executed. Admitted are dicts, lists and tuples of tensors on the CPU, strings and numbers, as large as
    they were sent or a little larger: in a reply a list may stand in another one many times and is sent once, so may the
    numbers of a tensor, and lists can be nested without end.

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
        _admit(observation, most_bytes)
    except StudentError:
        raise
    except Exception as error:  # a forged reply can fail in any way
        raise StudentError(f"the code sent back what a check cannot read ({type(error).__name__})") from error
    return observation


def _admit(observation: Observation, most_bytes: int) -> None:
    """Raise an error at what is not admitted, without recursion and without going through more than is allowed."""
    waiting, parts, size = [(observation, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        parts += 1
        inside = []
        if isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError("a key")
            inside = [*value, *value.values()]
        elif isinstance(value, list | tuple):
            inside = list(value)
        elif isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
                raise TypeError(type(value))
            size += value.numel() * value.element_size()
        elif type(value) is str:
            size += len(value)
        elif type(value) is int:
            size += value.bit_length() // 8
        elif not (value is None or type(value) in (bool, float)):
            raise TypeError(type(value))
        if depth > REPLY_NESTED or parts + len(waiting) + len(inside) > REPLY_PARTS or size > most_bytes:
            raise StudentError("the code returned something that is far larger, or nested far deeper, than what was asked for")
        waiting += [(item, depth + 1) for item in inside]


def drive_and_measure(
    driver: Callable[..., Observation],
    answers: Sequence[object],
    case: dict,
    helpers: Iterable[Callable] = (),
) -> tuple[Observation, int | None]:
    """Return what `drive` returns, and by how many bytes the process grew at its peak.

    The system's own high-water mark is read, which is noisy by a few MiB: use it for effects of 64 MiB and more. None where
    the system keeps no such mark (not Linux).

    An answer in another process is measured from outside of it. In this one the driver runs once before it is measured, for
    a process also grows by what it imports and sets up on first use. Then freed memory goes back to the system, or an
    allocation that fits into it would not show.
    """
    if isinstance(answers[0], RemoteAnswer):
        reply, grown = answers[0].run_and_measure(*_parcel(driver, answers, case, helpers))
        return read_reply(reply), grown
    with _large_tensors_apart():
        _in_a_new_thread(driver, *answers, **case)
        _return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
        except OSError:
            return _in_a_new_thread(driver, *answers, **case), None
        before = _status("VmRSS")
        observation = _in_a_new_thread(driver, *answers, **case)
        return observation, _status("VmHWM") - before


@contextlib.contextmanager
def as_torch_starts() -> Iterator[None]:
    """Set torch's default dtype and device, and whether it keeps gradients, as in a new process; afterwards set them back."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device == torch.device("cpu") else device)
        torch.set_grad_enabled(gradients)


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message`, and the line of the student's cell that raised it, if there is one.

    Where the driver failed on what the answer returned, it says so: nothing in the student's code has raised.

    It stands alone, because it also travels to the student's kernel as source.
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
        if "ipykernel" in file and not os.path.isfile(file):  # how IPython names the cells that it compiles
            place = f" (line {frame.tb_lineno} of your cell: {line})"
        innermost, frame = frame.tb_frame.f_code.co_name, frame.tb_next
    if innermost.startswith("drive_") and ("NoneType" in described or "unpack" in described):
        return f"what came back cannot be used: {described}"  # the driver's own line raised, not the student's code
    return described + place


@contextlib.contextmanager
def _large_tensors_apart() -> Iterator[None]:
    """Have every large tensor lie in pages of its own, where the C library can (glibc); when it is freed, so are they.

    Otherwise what is small and kept comes to lie where something large was, which then fits nowhere but behind all the rest.
    """
    _set_heap(mapped_from=APART_BYTES, trimmed_from=APART_BYTES)
    try:
        yield
    finally:
        _set_heap(*HEAP_BYTES)


def _in_a_new_thread(driver: Callable[..., Observation], *answers: object, **case: object) -> Observation:
    """Call a driver in a thread, which has a heap of its own, without the gaps that are in the old one."""
    outcome: Future[Observation] = Future()

    def run() -> None:
        try:
            outcome.set_result(driver(*answers, **case))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()  # a loop without end can be interrupted here, and does not keep Python from ending
    return outcome.result()


def _set_heap(mapped_from: int, trimmed_from: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc; Windows raises TypeError at the None
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, mapped_from)
        library.mallopt(M_TRIM_THRESHOLD, trimmed_from)


def _return_freed_memory() -> None:
    """Hand the heap's free pages back to the system, where the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc; Windows raises TypeError at the None
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """Return a size of this process from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
