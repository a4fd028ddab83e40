"""Runs outside of the sandbox, as a script: imports once what takes long; then, for each submission, a fork of it moves in.

It runs no student code and knows nothing but installed packages. The fork enters the namespaces of a sandbox that bubblewrap
has made, gives up every right that it has there, and becomes the program that serves the submission
(`autograder.sandbox.server`). The other end is `autograder.sandbox.warm`.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import struct
import sys

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
NEW_USER_NAMESPACE, GET_OWNER = 0x10000000, 0xB701
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION = 24, 38, 0x20080522
LARGEST_REQUEST, MOST_DESCRIPTORS = 2**16, 4
library = ctypes.CDLL(None, use_errno=True)


def main(control: socket.socket, server_path: str, modules: list[str]) -> None:
    """Import modules, and answer requests until the other end closes the socket.

    A request is a JSON object: `inside`, a process of the sandbox; `environment`, `folder` and `limits` (by the names of
    `resource`) of the program that is to run there. With it come three pipes: its standard input and output, and one that
    says "in", or what went wrong. The reply is the number of the process that waits for it, outside.
    """
    server = load(server_path)
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        content, pipes = receive(control)
        if not content:
            return
        process = os.fork()
        if process == 0:
            control.close()
            move_in(json.loads(content), pipes, server)
        for pipe in pipes:
            os.close(pipe)
        control.send(str(process).encode())


def load(path: str):
    """Import the sandbox's program from its file: the package that it belongs to must not be there."""
    spec = importlib.util.spec_from_file_location("sandbox_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Return a request, and the pipes that came with it; nothing if the other end is closed."""
    descriptors = array.array("i")
    content, extra, _, _ = control.recvmsg(LARGEST_REQUEST, socket.CMSG_LEN(MOST_DESCRIPTORS * descriptors.itemsize))
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return content, list(descriptors)


def move_in(request: dict, pipes: list[int], server) -> None:
    """Enter the sandbox with a new process, and wait until it has ended."""
    reads, writes, says = pipes
    try:
        enter(request["inside"])
        if os.fork() == 0:  # a process is in the namespace of processes in which it was born
            serve(request, reads, writes, says, server)
    except BaseException as error:
        os.write(says, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    for pipe in pipes:
        os.close(pipe)
    with contextlib.suppress(ChildProcessError):
        os.wait()
    os._exit(0)


def enter(process: int) -> None:
    """Enter the namespaces of a process: first that of the user who owns the others, last the one that the process has."""
    user = os.open(f"/proc/{process}/ns/user", os.O_RDONLY)
    others = [os.open(path, os.O_RDONLY) for kind in NAMESPACES if os.path.exists(path := f"/proc/{process}/ns/{kind}")]
    owner = fcntl.ioctl(others[0], GET_OWNER)
    call(library.setns, owner, NEW_USER_NAMESPACE)
    for namespace in others:
        call(library.setns, namespace, 0)
    if os.fstat(owner).st_ino != os.fstat(user).st_ino:
        call(library.setns, user, NEW_USER_NAMESPACE)
    for namespace in (user, owner, *others):
        os.close(namespace)


def serve(request: dict, reads: int, writes: int, says: int, server) -> None:
    """Become the sandbox's program."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        os.chdir(request["folder"])
        nothing = os.open(os.devnull, os.O_RDWR)
        said = os.dup(says)
        for standard, pipe in enumerate((reads, writes, nothing)):
            os.dup2(pipe, standard)
        os.dup2(said, 3)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        give_up_rights()
        os.environ.clear()
        os.environ.update(request["environment"])
        importlib.invalidate_caches()
        sys.path_importer_cache.clear()
        os.write(3, b"in")
        os.close(3)
        server.serve(alone=True)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(3, f"{type(error).__name__}: {error}".encode())
    os._exit(0)


def give_up_rights() -> None:
    """Give up every capability, in this user namespace too, and the way to get any back."""
    for capability in range(64):
        if library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            if ctypes.get_errno() != errno.EINVAL or capability == 0:
                raise OSError(ctypes.get_errno(), "a capability could not be given up")
            break  # there are no more
    call(library.capset, struct.pack("II", CAPABILITY_VERSION, 0), bytes(24))
    call(library.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def call(function, *arguments: object) -> None:
    """Call a function of the C library; raise its error."""
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
