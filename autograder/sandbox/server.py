"""Runs in the sandbox, as a script: starts the notebook's kernel, and makes each call of a check in a new process.

The new process is a fork of this one, which has torch and the unit's set-up cell in memory and runs no student code. So
every call finds modules as they were installed, whatever the notebook's cells, or an earlier call, did to theirs. What is
said of a call from here, how much memory it took above all, is what the operating system says of a process that has ended.

Requests and replies are frames, a length and then that many bytes, on standard input and output. A request is a JSON
object with an id that is new and secret; a reply repeats it. No process that runs student code has either pipe: the one
that makes a call can send one thing, and then it ends.
"""

import ast
import base64
import contextlib
import ctypes
import gc
import io
import json
import linecache
import os
import platform
import random
import resource
import selectors
import signal
import struct
import sys
import traceback
import types

import torch

PRINTED_BYTES = 2**16
CHUNK = 2**16
POLL_SECONDS = 0.05
REPLY, ERROR, WAITS = b"r", b"e", b"w"
"""How what a call sends begins: with what its driver returned, or what was raised; and that it waits while its size is read."""
CONFINED_FILE_BYTES = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, APART_BYTES = -1, -3, 2**17

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
ALLOW, FAIL, NOT_PERMITTED, NO_SUCH_CALL = 0x7FFF0000, 0x00050000, 1, 38
CLONE_THREAD = 0x10000
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, {"clone": 56, "clone3": 435, "others": [29, 57, 58, 59, 101, 310, 311, 322]}),
    "aarch64": (0xC00000B7, {"clone": 220, "clone3": 435, "others": [117, 194, 221, 270, 271, 281]}),
}
"""By machine: how it is called in a filter, and the numbers of the calls that make or change processes, or hide memory:
shmget, fork, vfork, execve, ptrace, process_vm_readv, process_vm_writev and execveat."""


def receive(pipe: int) -> bytes | None:
    """Return the next frame; None if the other side has closed the pipe."""
    size = _exactly(pipe, 8)
    return None if size is None else _exactly(pipe, struct.unpack(">Q", size)[0])


def _exactly(pipe: int, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        part = os.read(pipe, min(size - len(content), 2**20))
        if not part:
            return None
        content += part
    return bytes(content)


def send(pipe: int, content: bytes) -> None:
    """Write one frame."""
    write(pipe, struct.pack(">Q", len(content)) + content)


def write(pipe: int, content: bytes) -> None:
    """Write all of the bytes."""
    view = memoryview(content)
    while view:
        view = view[os.write(pipe, view) :]


def serve(alone: bool) -> None:
    """Answer requests until the other side closes the pipe.

    Args:
        alone: whether every process that this one may kill belongs to the submission.
    """
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # so that a call's process cannot look into this one
    torch.set_num_threads(1)
    names: dict[str, object] = {"__name__": "__main__"}
    while (frame := receive(requests)) is not None:
        request, content = json.loads(frame), b""
        collect()
        if request["kind"] == "prepare":
            said = prepare(request, names)
        elif request["kind"] == "kernel":
            said = start_kernel(request, (requests, replies))
        elif request["kind"] == "call":
            said, content = call(request, names, (requests, replies), alone)
        else:
            said = {}
        send(replies, json.dumps({"id": request["id"], **said}).encode())
        send(replies, content)


def prepare(request: dict, names: dict[str, object]) -> dict:
    """Run the unit's own cells, import what its drivers will, and have torch set up what it sets up on first use.

    What is done here is in every call's process from the start, and does not count as memory that the call took.
    """
    try:
        for module in request["modules"]:
            __import__(module)
        for source in request["setup"]:
            exec(compile(source, "<set-up cell>", "exec"), names)
        exec(request["describe"], names.setdefault("__tools__", {}))
        warm_up(1024)
        gc.collect()
        gc.freeze()  # a new process's garbage collector need not look at what is here, which would copy it
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # or what has been freed would serve a call, which then would not grow
    except Exception:
        return {"error": traceback.format_exc()}
    return {"error": ""}


def warm_up(size: int) -> None:
    """Do a little of what calls do, so that its code is in memory and torch has set up what it sets up on first use."""
    for dtype, rows in ((torch.float32, size), (torch.float64, size // 2), (torch.bfloat16, 64)):
        x = torch.ones(rows, rows, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    layer, reply = torch.nn.Linear(3, 3), io.BytesIO()
    layer(torch.ones(2, 3)).sum().backward()
    if "torch._dynamo" in sys.modules:
        torch.optim.AdamW(layer.parameters()).step()
    torch.save({"x": torch.ones(3)}, reply)
    torch.load(io.BytesIO(reply.getvalue()), weights_only=True)


def start_kernel(request: dict, private: tuple[int, int]) -> dict:
    """Start a kernel for the notebook's cells in a new process."""
    if os.fork() == 0:
        for pipe in private:
            os.close(pipe)
        os.setsid()
        may_be_looked_at()
        from ipykernel.kernelapp import IPKernelApp

        kernel = IPKernelApp.instance()
        kernel.initialize(["-f", request["connection_file"], "--HistoryManager.hist_file=:memory:"])
        if "matplotlib_inline.backend_inline" in sys.modules:  # it has been imported where there was no notebook
            sys.modules["matplotlib_inline.backend_inline"]._enable_matplotlib_integration()
        kernel.start()
        os._exit(0)
    return {"error": ""}


def call(request: dict, names: dict[str, object], private: tuple[int, int], alone: bool) -> tuple[dict, bytes]:
    """Have a new process make one call; return what is known of it, and what it sent.

    `grown` is by how many bytes that process had grown at its peak, since it began; `defined` by how many when the
    student's cells had run. None where the system does not say so.
    """
    (go_out, go_in), (sent_out, sent_in), (print_out, print_in) = (os.pipe() for _ in range(3))
    process = os.fork()
    if process == 0:
        for pipe in (*private, go_in, sent_out, print_out):
            os.close(pipe)
        be_called(request, names, go_out, sent_in, print_in)
    for pipe in (go_out, sent_in, print_in):
        os.close(pipe)
    os.read(sent_out, 1)  # so far nothing of the student's has run
    born = resident(process)
    write(go_in, b"!")
    sent, printed, defined, usage = follow(process, sent_out, print_out, go_in, request["reply_bytes"], alone)
    for pipe in (go_in, sent_out, print_out):
        os.close(pipe)
    grown = usage.ru_maxrss * 1024 - born if born is not None else None
    kind, content = sent[:1], sent[1:]
    if len(content) > request["reply_bytes"]:
        error, content = f"the code returned more than {request['reply_bytes'] / 2**20:g} MiB", b""
    elif kind == ERROR:
        error, content = content.decode(errors="replace"), b""
    else:
        error = "" if kind == REPLY else "the code ended its own process"
    said = {"error": error, "printed": printed.decode(errors="replace"), "grown": grown}
    return said | {"defined": defined - born if defined is not None and born is not None else None}, content


def follow(process: int, sent_out: int, print_out: int, go_in: int, limit: int, alone: bool) -> tuple:
    """Read what a process sends and prints until it ends; return both, its size when its cells had run, and its usage.

    What it has started ends with it.
    """
    sent, printed, told, defined, usage = bytearray(), bytearray(), False, None, None
    with selectors.DefaultSelector() as selector:
        for pipe in (sent_out, print_out):
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        while usage is None or selector.get_map():
            ready = selector.select(POLL_SECONDS)
            for key, _ in ready:
                part = os.read(key.fd, CHUNK)
                if not part:
                    selector.unregister(key.fd)
                elif key.fd == print_out:
                    printed += part[: PRINTED_BYTES - len(printed)]
                elif told:
                    sent += part[: limit + 2 - len(sent)]
                else:  # its cells have run, if what it sends is what it should
                    told, defined = True, resident(process)
                    sent += part.removeprefix(WAITS)
                    with contextlib.suppress(OSError):
                        write(go_in, b"!")
            if usage is None:
                ended, _, used = os.wait4(process, os.WNOHANG)
                if ended:
                    usage = used
                    end_what_is_left(process, alone)
            elif not ready:
                break
    return bytes(sent), bytes(printed), defined, usage


def end_what_is_left(process: int, alone: bool) -> None:
    """Kill what a call has left running, and collect it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(-1, signal.SIGKILL) if alone else os.killpg(process, signal.SIGKILL)
    collect()


def collect() -> None:
    """Let go of processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def resident(process: int) -> int | None:
    """Return how much memory a process holds, in bytes; None where the system does not say so."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


# ---- in the new process ------------------------------------------------------------------------------------------------
def be_called(request: dict, names: dict[str, object], go: int, send_to: int, print_to: int) -> None:
    """Run the student's cells and the driver in this process, send what comes of it, and end."""
    os.setsid()
    os.dup2(print_to, 1)
    os.dup2(print_to, 2)
    os.close(print_to)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(stream, "w", closefd=False), errors="replace") for stream in (1, 2))
    if request["confined"]:
        warm_up(64)
        keep_large_tensors_apart()
        confine()
    write(send_to, WAITS)
    os.read(go, 1)
    may_be_looked_at()
    torch.seed()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    installed = [place for place, path in enumerate(sys.path) if path.endswith(("site-packages", "dist-packages"))]
    sys.path.insert(installed[0] if installed else len(sys.path), "")  # the student's own modules
    describe = names["__tools__"]["describe_error"]
    try:
        student = run_again(request["cells"], names) if request["again"] else define(request["cells"], names)
        write(send_to, WAITS)
        os.read(go, 1)
        content = REPLY + drive(request, student)
    except BaseException as raised:  # SystemExit among them: whatever it is, it is the answer's
        content = ERROR + (describe(raised) or "an error").encode(errors="replace")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    write(send_to, content)
    os._exit(0)


def keep_large_tensors_apart() -> None:
    """Have every large tensor lie in pages of its own, where the C library can (glibc); see `autograder.checking.drive`."""
    with contextlib.suppress(AttributeError, OSError):
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, APART_BYTES)


def may_be_looked_at() -> None:
    """Allow debuggers and the grader to look into this process, as into any other."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def define(cells: list[dict], names: dict[str, object]) -> dict[str, object]:
    """Run those statements of the student's cells that an answer needs, in a module `__main__` of its own; return its names.

    A cell ends at its first error, and the next one goes on, as in a notebook.
    """
    module = types.ModuleType("__main__")
    vars(module).update({name: value for name, value in names.items() if name != "__tools__"}, __name__="__main__")
    sys.modules["__main__"] = module
    for number, cell in enumerate(cells):
        file = f"<ipykernel cell {number}>"
        linecache.cache[file] = (len(cell["source"]), None, cell["source"].splitlines(keepends=True), file)
        with contextlib.suppress(Exception, SystemExit):
            body = ast.parse(cell["source"]).body
            tree = ast.Module([body[place] for place in cell["needed"]], [])
            exec(compile(tree, file, "exec", dont_inherit=True), vars(module))
    return vars(module)


def run_again(cells: list[dict], names: dict[str, object]) -> dict[str, object]:
    """Run all of the student's cells, whole and in order, in IPython; return its names."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance(history_load_length=0)
    shell.history_manager.enabled = False
    shell.showtraceback = shell.showsyntaxerror = lambda *details, **more: None
    shell.enable_gui = lambda gui=None: None  # for %matplotlib
    shell.push({name: value for name, value in names.items() if not name.startswith("__")})
    for cell in cells:
        shell.run_cell(cell["source"])
    return shell.user_ns


def drive(request: dict, student: dict[str, object]) -> bytes:
    """Call `driver(*answers, **arguments)`; return what `torch.save` makes of what comes back."""
    missing = [name for name in request["answers"] if name not in student]
    if missing:
        raise NameError(f"`{'` and `'.join(missing)}` not defined: is the cell missing, or did it raise an error?")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    scope = {"__name__": "driver"}
    exec(request["source"], scope)
    arguments = torch.load(io.BytesIO(base64.b64decode(request["arguments"])), weights_only=True)
    reply = io.BytesIO()
    torch.save(scope[request["driver"]](*[student[name] for name in request["answers"]], **arguments), reply)
    return reply.getvalue()


def confine() -> bool:
    """Take from this process what it could keep memory in that is not its own: other processes, large files, shared memory.

    It is measured afterwards. Threads may be started. Returns whether the system has such a filter (Linux, seccomp).
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (CONFINED_FILE_BYTES, CONFINED_FILE_BYTES))
    if platform.machine() not in SYSTEM_CALLS or not sys.platform.startswith("linux"):
        return False
    machine, numbers = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, unknown = FAIL | NOT_PERMITTED, FAIL | NO_SUCH_CALL  # at "no such call" the C library turns to `clone`
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, refuse)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]
    program += [(equal, 0, 1, numbers["clone3"]), (end, 0, 0, unknown)]
    for number in numbers["others"]:
        program += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    program += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (end, 0, 0, refuse)]
    program += [(end, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filters = Program(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return library.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filters), 0, 0) == 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it before anything is imported
    serve(alone="--alone" in sys.argv)
