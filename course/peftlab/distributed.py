"""Several processes that train one model together, started from a notebook: ranks, collectives, and what they send.

`run` starts the ranks on this machine, on the CPU, by forking the notebook's process: they begin with everything that
has been defined so far, within a tenth of a second. On several GPUs, `torchrun` starts them instead, each in a Python of its
own; what they run is the same.
"""

import contextlib
import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.llama import IGNORE

BACKEND = "gloo"
"""The library that carries messages between processes on CPUs; between GPUs it is "nccl"."""

RING = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1}
"""How often (world size - 1) / world size of a tensor leaves each rank, if the ranks stand in a ring; see `bytes_sent`."""

FORKED_ADVICE = (
    " On a machine with a GPU a rank cannot call backward if the notebook's own process has done so before: restart the "
    "notebook, and call backward in ranks only (or in `peftlab.distributed.run_apart`)."
)

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # their names from torch 2.13 on, and before
_reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class RankError(RuntimeError):
    """A rank raised an error, was killed, or did not end in time. The others have been ended as well."""


# ---- collectives: every rank of the world has to call them, in the same order ------------------------------------------
def all_gather(shard: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "world_rows ..."]:
    """Return the shards of all ranks, one below the other, on every rank. All shards have one shape."""
    whole = shard.new_empty(dist.get_world_size() * shard.shape[0], *shard.shape[1:])
    _gather(whole, shard.contiguous())
    return whole


def reduce_scatter(whole: Shaped[Tensor, "world_rows ..."]) -> Shaped[Tensor, "rows ..."]:
    """Return this rank's rows of the sum over all ranks. The number of rows is a multiple of the world size.

    Raises:
        ValueError: if it is not.
    """
    rows, rest = divmod(whole.shape[0], dist.get_world_size())
    if rest:
        raise ValueError(f"{whole.shape[0]} rows cannot be dealt evenly to {dist.get_world_size()} ranks")
    shard = whole.new_empty(rows, *whole.shape[1:])
    _reduce(shard, whole.contiguous())
    return shard


def all_reduce(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Return the sum over all ranks, on every rank; the given tensor stays as it is."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def bytes_sent(collective: str, size: int, world_size: int) -> float:
    """Return the bytes that each rank sends in a collective, where `size` is the bytes of the whole tensor.

    In a ring, a rank passes on what it has received, a piece of size / world_size at a time. After world_size - 1 rounds every
    rank has seen every piece: that is an all-gather; and a reduce-scatter, where each piece is added to on its way. An
    all-reduce is one after the other (Patarasuk and Yuan 2009).

    Raises:
        ValueError: if the collective is not known.
    """
    if collective not in RING:
        raise ValueError(f"unknown collective {collective!r}: choose one of {', '.join(RING)}")
    return RING[collective] * size * (world_size - 1) / world_size


_COLLECTIVES = {
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
}
"""By the names under which torch dispatches them: those that end in `_` for `torch.distributed`, the others for a DTensor."""


@dataclass(frozen=True)
class Message:
    """One collective that was called: its name, the dtype, and the bytes of the whole tensor."""

    collective: str
    dtype: torch.dtype
    size: int


class Traffic(TorchDispatchMode):
    """Notes the collectives that are called in its context, by whomever; those of FSDP are among them.

    Attributes:
        messages: what was called, in order.
    """

    def __init__(self):
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        name = function._schema.name.rpartition("::")[2]
        if function.namespace in ("c10d", "_c10d_functional") and name in _COLLECTIVES:
            tensors = list(_tensors((args, outcome if function.namespace == "_c10d_functional" else ())))
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            in_parts = name in ("allgather_", "reduce_scatter_")  # lists of shards, and a shard that is as large as each
            size = sum(sizes) - max(sizes) if in_parts else max(sizes)
            self.messages.append(Message(_COLLECTIVES[name], tensors[0].dtype, size))
        return outcome

    def calls(self) -> dict[str, int]:
        """Return how often each collective was called."""
        return dict(Counter(message.collective for message in self.messages))

    def sent(self) -> dict[str, float]:
        """Return the bytes that this rank has sent, by collective, as `bytes_sent` counts them."""
        sent: Counter[str] = Counter()
        for message in self.messages:
            sent[message.collective] += bytes_sent(message.collective, message.size, dist.get_world_size())
        return dict(sent)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def loss_and_count(
    model: nn.Module, input_ids: Int[Tensor, "batch seq"], labels: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, ""], int]:
    """Return the summed cross-entropy of the tokens that have a label, in nats, and how many these are.

    It calls the whole model, and not parts of it as `peftlab.llama.causal_loss` does: FSDP gathers a group's weights when the
    group is called.

    Args:
        labels: `input_ids` where the token is to be learned, `IGNORE` elsewhere; position t is predicted from t - 1.
    """
    logits, targets = model(input_ids)[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, int((targets != IGNORE).sum())


# ---- starting ranks ----------------------------------------------------------------------------------------------------
def run(function: Callable, world_size: int, *arguments: object, seconds: float = 60) -> list:
    """Call a function in several processes at once, which form a process group; return what each returned, by rank.

    In the function, `torch.distributed.get_rank()` tells who one is. What it is given and what is defined so far is there, as
    copies: what a rank changes stays in that rank. Random generators stand where the notebook's did, in all ranks alike. What
    a rank prints appears when all have ended. No process is left when this returns or raises, and if the notebook's own
    process dies, its ranks end within a second.

    Args:
        function: is called with `arguments` in each rank, on one thread, without a GPU.
        world_size: how many ranks.
        seconds: to wait for, at most, for all of them.

    Raises:
        RankError: if a rank raises an error, is killed or does not end in time. It says which one; of those that wait for
            others, in which line.
        NotImplementedError: if a rank raises that.
        RuntimeError: on a system that cannot fork (Windows; its WSL can).
    """
    if not hasattr(os, "fork"):
        raise RuntimeError("ranks are started by forking, which Windows cannot: use WSL, Colab, or any Linux or macOS")
    importlib.import_module("torch._dynamo")  # FSDP wants it, and it takes a second: once here, instead of in every rank
    return _started(function, arguments, world_size, seconds)


def run_apart(function: Callable, *arguments: object, seconds: float = 600) -> object:
    """Call a function in one forked process that belongs to no group, and return what it returns.

    For what calls backward in a notebook that starts ranks: on a machine with a GPU, PyTorch refuses a backward in a process
    that was forked from one in which a backward has run. Where nothing can be forked, the function is called in this process.

    Raises:
        RankError: as `run` does.
    """
    if not hasattr(os, "fork"):
        return function(*arguments)
    return _started(function, arguments, 1, seconds, grouped=False)[0]


def _started(function: Callable, arguments: tuple, world_size: int, seconds: float, grouped: bool = True) -> list:
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(_Rank(rank, world_size, seconds, Path(folder), grouped))
                ranks[rank].start(function, arguments)
            return _collect(ranks, seconds)
        finally:
            for rank in ranks:
                rank.end()


class _Rank:
    """One process, seen from the notebook's.

    Attributes:
        ended: None while it runs; then "returned", "raised", "waited" (for a rank that had ended) or "died".
        value: what it returned, or the words in which it says how it ended.
    """

    def __init__(self, rank: int, world_size: int, seconds: float, folder: Path, grouped: bool):
        self.rank, self.world_size, self.seconds, self.folder, self.grouped = rank, world_size, seconds, folder, grouped
        self.printed, self.stack = folder / f"printed_{rank}", folder / f"stack_{rank}"
        self.parent = os.getpid()
        self.answer, self._send_to = multiprocessing.Pipe(duplex=False)
        self.ended: str | None = None
        self.value: object = None

    def start(self, function: Callable, arguments: tuple) -> None:
        sys.stdout.flush()
        self.process = multiprocessing.get_context("fork").Process(target=self._be, args=(function, arguments), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: the notebook's process has threads
            self.process.start()
        self._send_to.close()

    def read(self) -> None:
        """Take in how the rank has ended."""
        try:
            self.ended, content = pickle.loads(self.answer.recv_bytes())
            self.value = torch.load(io.BytesIO(content), weights_only=False) if self.ended == "returned" else content
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.ended = "died"
            self.value = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended itself with exit code {code}"

    def waits_in(self) -> str:
        """Return what a rank that runs is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        for _ in range(20):
            frames = _FRAME.findall(self.stack.read_text(errors="replace")) if self.stack.exists() else []
            if frames:
                return f"is still in {_place([(file, int(line), name) for file, line, name in reversed(frames)])}"
            time.sleep(0.05)
        return "is still running"

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.answer.close()
        if self.printed.exists():
            for line in self.printed.read_text(errors="replace").splitlines():
                print(f"rank {self.rank}: {line}")

    def _be(self, function: Callable, arguments: tuple) -> None:
        """What the new process does."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook ends its ranks itself
        faulthandler.register(signal.SIGUSR1, file=self.stack.open("w"), all_threads=False)
        threading.Thread(target=self._end_with_the_notebook, daemon=True).start()
        printed = self.printed.open("w", errors="replace", buffering=1)
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        sys.stdout = sys.stderr = printed
        torch.set_num_threads(1)
        torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)  # nothing here may use a GPU
        try:
            if self.grouped:
                store = dist.FileStore(str(self.folder / "store"), self.world_size)
                patience = timedelta(seconds=self.seconds + 60)  # `run` is the first to lose it
                dist.init_process_group(BACKEND, store=store, rank=self.rank, world_size=self.world_size, timeout=patience)
            value = io.BytesIO()
            torch.save(function(*arguments), value)
            reply = ("returned", value.getvalue())
        except NotImplementedError as error:
            reply = ("unwritten", str(error))
        except BaseException as error:
            frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
            if "Connection closed by peer" in str(error) or "Connection reset" in str(error):
                reply = ("waited", f"waited in {_place(frames)} for a rank that had ended")
            else:
                advice = FORKED_ADVICE if "fork-based multiprocessing" in str(error) else ""
                reply = ("raised", f"raised {type(error).__name__}: {error}{advice}{_line(frames)}")
        self._send_to.send_bytes(pickle.dumps(reply))
        printed.flush()
        os._exit(0)

    def _end_with_the_notebook(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(0.5)
        os._exit(1)


_FRAME = re.compile(r'File "(.*)", line (\d+) in (\S+)')


def _place(frames: list[tuple[str, int, str]]) -> str:
    """Say where a process is: the last frame that is nobody's library, and before it what that frame has called."""
    libraries = (os.sep + "torch" + os.sep, os.sep + "jaxtyping" + os.sep, os.sep + "multiprocessing" + os.sep, __file__)
    own = [number for number, (file, _, _) in enumerate(frames) if not any(part in file for part in libraries)]
    if not own:
        return f"`{frames[-1][2]}`" if frames else "torch"
    _, line, name = frames[own[-1]]
    called = frames[own[-1] + 1][2] if own[-1] + 1 < len(frames) else None
    return f"line {line} of `{name}`" if called is None else f"`{called}` (line {line} of `{name}`)"


def _line(frames: list[tuple[str, int, str]]) -> str:
    """Return the line that an error comes from, in parentheses; nothing if there is none outside of libraries."""
    found = re.search(r"line \d+ of `.*`", _place(frames))
    return f" ({found[0]})" if found else ""


def _collect(ranks: list[_Rank], seconds: float) -> list:
    """Return what the ranks return, in their order; raise as soon as one of them has ended otherwise."""
    until = time.monotonic() + seconds
    while running := [rank for rank in ranks if rank.ended is None]:
        ready = wait([rank.answer for rank in running], timeout=max(0, until - time.monotonic()))
        if not ready:
            said = [f"rank {r.rank} {'has ended' if r.ended else r.waits_in()}" for r in ranks]
            raise RankError(f"not all ranks have ended after {seconds:g} seconds: {'; '.join(said)}")
        for rank in running:
            if rank.answer in ready:
                rank.read()
        if any(rank.ended not in (None, "returned") for rank in ranks):
            _complain(ranks)
    return [rank.value for rank in ranks]


def _complain(ranks: list[_Rank]) -> NoReturn:
    """Raise the error of the rank that was the first to go wrong, not of those that its end took along."""
    time.sleep(0.2)  # the first to be heard may be one that waited for the first to fail
    for rank in ranks:
        if rank.ended is None and rank.answer.poll():
            rank.read()
    for kind in ("unwritten", "died", "raised", "waited"):
        for rank in ranks:
            if rank.ended != kind:
                continue
            if kind == "unwritten":
                raise NotImplementedError(rank.value)
            over = ", ".join(str(other.rank) for other in ranks if other.ended == "returned")
            others = f": {over} (does every rank call the same collectives?)" if kind == "waited" and over else ""
            raise RankError(f"rank {rank.rank} of {len(ranks)} {rank.value}{others}")
    raise AssertionError("no rank has failed")
