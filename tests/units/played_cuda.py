"""CUDA, played on a machine that has none: it shows whether every tensor is where it has to be.

Inside `with played():` there seems to be one GPU. The tensors on it are ordinary CPU tensors whose storage carries a mark. An
operation that mixes marked and unmarked tensors raises the error that CUDA would raise, in forward and in backward. All other
operations run, and mark what they make.

Played are:

- where tensors are and go: `.device`, `.is_cuda`, `.to`, `.cuda`, `.cpu`, every factory with `device=`, generators;
- what CUDA refuses: tensors on two devices in one operation, `.numpy()` of a tensor on the GPU, a generator of another device;
- what CUDA lets pass: a CPU tensor without dimensions in arithmetic, CPU indices in `x[index]`, copies between devices;
- the caching allocator: the requested bytes, now and at the peak, of `torch.cuda.memory_stats`;
- the questions about the device in `torch.cuda`, such as its name and its compute capability.

It shows nothing about CUDA's kernels: which dtypes they accept, how they round, how long they take, what they allocate for
themselves. A gradient that `backward` of an `autograd.Function` returns on the wrong device is found at its next use only.
Streams, events, more than one GPU and `torch.load(..., map_location="cuda")` are not played: they raise PyTorch's error about a
build without CUDA. What `torch.compile` makes raises an error when it is called. A library that looks for CUDA when it is
imported has to be imported before the block.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._C import DisableTorchFunction, TensorBase
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
TOTAL_MEMORY = 16 * 10**9
"""Bytes that the played GPU has. Nothing runs out of them."""


@contextmanager
def played(capability: tuple[int, int] = (8, 0)) -> Iterator[None]:
    """Play a GPU of this compute capability until the block ends; tensors on it are ordinary CPU tensors afterwards."""
    allocator = _Allocator()
    calls = _Calls(allocator)
    hooks, parser = torch.autograd.graph.saved_tensors_hooks, torch._C._nn
    with ExitStack() as undone_at_the_end:
        for place, name, played_object in (
            *((torch.cuda, name, function) for name, function in _answers(allocator, capability).items()),
            (torch, "Generator", _Generator),
            (torch, "compile", _compile),
            (hooks, "__init__", _hooks_with_mode_on(hooks.__init__, calls)),
            (parser, "_parse_to", _parse_to(parser._parse_to, allocator)),
        ):
            undone_at_the_end.enter_context(mock.patch.object(place, name, played_object))
        undone_at_the_end.enter_context(_Operations(allocator, calls))
        undone_at_the_end.enter_context(calls)
        yield


def _answers(allocator: "_Allocator", capability: tuple[int, int]) -> dict[str, Callable]:
    """Return the functions of `torch.cuda` that are played, by name."""
    properties = SimpleNamespace(
        name="a played GPU", major=capability[0], minor=capability[1], total_memory=TOTAL_MEMORY, multi_processor_count=40
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "mem_get_info": lambda device=None: (TOTAL_MEMORY - allocator.current, TOTAL_MEMORY),
        "memory_stats": lambda device=None: allocator.statistics(),
        "memory_allocated": lambda device=None: allocator.current,
        "max_memory_allocated": lambda device=None: allocator.peak,
        "reset_peak_memory_stats": lambda device=None: allocator.reset_peak(),
    }


class _Generator(torch.Generator):
    """A random number generator that can say that it is on the GPU; its numbers are the CPU's."""

    def __new__(cls, device: torch.device | str = CPU):
        generator = super().__new__(cls, CPU)
        generator.place = CUDA if _names_cuda(device) else CPU
        return generator

    @property
    def device(self) -> torch.device:
        return self.place


def _compile(function: Callable | None = None, **options: object) -> Callable:
    """Return a function that raises an error when it is called, as `torch.compile` does where a compiler is missing."""
    if function is None:  # used as a decorator with options
        return _compile

    def not_compiled(*args: object, **kwargs: object) -> None:
        raise RuntimeError("torch.compile has no compiler for a played GPU")

    return not_compiled


# ---- Where tensors are ----


class _Allocator:
    """Knows which storages are on the GPU, and counts their bytes.

    The mark of a storage is an attribute of the storage, and is deleted with it. So bytes are counted down at once when a
    storage is freed, and an address that is used again carries no old mark.
    """

    def __init__(self):
        self.current = self.peak = 0

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the played GPU."""
        return self._has_storage(_storage(tensor))

    def take(self, tensor: Tensor) -> None:
        """Put the tensor's storage on the played GPU, unless it has no numbers (it is fake, or on "meta")."""
        storage = _storage(tensor)
        if self._has_storage(storage) or storage is None or isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
            return
        storage.played_cuda = _Mark(self, storage.nbytes())
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.current

    def statistics(self) -> dict[str, int]:
        """Return the figures of `torch.cuda.memory_stats` that are played."""
        return {"requested_bytes.all.current": self.current, "requested_bytes.all.peak": self.peak}

    def _has_storage(self, storage: torch.UntypedStorage | None) -> bool:
        mark = getattr(storage, "played_cuda", None)
        return mark is not None and mark.allocator is self


@dataclass(eq=False)
class _Mark:
    """Marks a storage as one on the played GPU."""

    allocator: _Allocator
    size: int

    def __del__(self):
        self.allocator.current -= self.size


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the tensor's storage, or None if it has none of its own (a sparse tensor, one inside `torch.func`)."""
    try:
        return TensorBase.untyped_storage(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def _names_cuda(device: torch.device | str | int) -> bool:
    """Whether this names the GPU, as every number does."""
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _tensors(*values: object) -> list[Tensor]:
    """Return the tensors among the values, and in lists, tuples and dictionaries among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


# ---- What Python asks for ----


class _Calls(TorchFunctionMode):
    """Sees every call of a PyTorch function: it answers questions about devices, and moves tensors.

    A call runs one or more operations, and `_Operations` sees those. It finds here which call they belong to.

    Attributes:
        asked: True if the running call names the GPU as its device, False if it names another, None if it names none.
        arguments: the positional and the keyword arguments of the running call.
    """

    def __init__(self, allocator: _Allocator):
        super().__init__()
        self.allocator = allocator
        self.asked: bool | None = None
        self.arguments: tuple = ()
        self.own_answers = {
            Tensor.device.__get__: self._device,
            Tensor.is_cuda.__get__: lambda call, tensor, *_: allocator.has(tensor),
            Tensor.is_cpu.__get__: lambda call, tensor, *_: call(tensor) and not allocator.has(tensor),
            Tensor.get_device: lambda call, tensor: 0 if allocator.has(tensor) else call(tensor),
            Tensor.to: self._to,
            Tensor.cpu: lambda call, tensor, **kwargs: self._moved(tensor, device=CPU, **kwargs),
            Tensor.cuda: lambda call, tensor, *_, **kwargs: self._moved(tensor, **kwargs | {"device": CUDA}),
            Tensor.numpy: self._array,
            Tensor.__array__: self._array,
            Tensor.__deepcopy__: self._deepcopy,
            Tensor.new_tensor: self._new_tensor,
            torch.as_tensor: self._as_tensor,
            Tensor.backward: self._backward,
            torch.autograd.backward: self._differentiated,
            torch.autograd.grad: self._differentiated,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own_answer = self.own_answers.get(func)
        if own_answer:
            return own_answer(func, *args, **kwargs)
        return self._called(func, args, kwargs)

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Return what a function returns; it is on the GPU if the keyword `device` names it."""
        before = self.asked, self.arguments
        device = kwargs.get("device")
        self.asked, self.arguments = None if device is None else _names_cuda(device), (args, kwargs)
        try:
            if kwargs.get("generator") is not None:
                self._refuse_another_generator(kwargs["generator"])
            if not self.asked:
                return func(*args, **kwargs)
            made = func(*args, **kwargs | {"device": CPU})
            for tensor in _tensors(made):
                self.allocator.take(tensor)
            return made
        finally:
            self.asked, self.arguments = before

    def has_tensor_on_cuda(self) -> bool:
        """Whether an argument of the running call is on the GPU; then so are the tensors that PyTorch makes during the call."""
        return any(self.allocator.has(tensor) for tensor in _tensors(*self.arguments))

    def _refuse_another_generator(self, generator: torch.Generator) -> None:
        """Raise CUDA's error if the generator is not on the device that the running call fills with random numbers."""
        wanted = "cuda" if (self.has_tensor_on_cuda() if self.asked is None else self.asked) else "cpu"
        if generator.device.type != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")

    def _device(self, call: Callable, tensor: Tensor, *_: object) -> torch.device:
        return CUDA if self.allocator.has(tensor) else call(tensor)

    def _to(self, call: Callable, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Play `tensor.to`: its positional arguments are a device, a dtype or another tensor, then two flags."""
        flags = iter(("non_blocking", "copy"))
        for value in (*args, kwargs.pop("other", None)):
            if isinstance(value, Tensor):
                kwargs |= {"device": self._device(Tensor.device.__get__, value), "dtype": value.dtype}
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, bool):
                kwargs[next(flags)] = value
            elif value is not None:
                kwargs["device"] = value
        return self._moved(tensor, **kwargs)

    def _moved(self, tensor: Tensor, **kwargs: object) -> Tensor:
        """Return what `tensor.to` returns: a copy if the tensor changes sides, and then its gradient is moved back."""
        device, here = kwargs.get("device"), self.allocator.has(tensor)
        changes_sides = device is not None and _names_cuda(device) != here
        made = self._called(Tensor.to, (tensor,), kwargs | ({"copy": True} if changes_sides else {}))
        if changes_sides and made.requires_grad:
            made.register_hook(lambda gradient: self._moved(gradient, device=CUDA if here else CPU))
        return made

    def _array(self, call: Callable, tensor: Tensor, *args: object, **kwargs: object) -> object:
        if self.allocator.has(tensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return call(tensor, *args, **kwargs)

    def _deepcopy(self, call: Callable, tensor: Tensor, memo: dict) -> Tensor:
        """Return a copy in the same place: PyTorch copies the storage, and no operation tells."""
        made = call(tensor, memo)
        if self.allocator.has(tensor):
            self.allocator.take(made)
        return made

    def _new_tensor(self, call: Callable, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return a tensor of the given values, by default on the device of `tensor`."""
        here = CUDA if self.allocator.has(tensor) else None
        return self._called(call, (tensor, *args), {"device": here} | kwargs)

    def _as_tensor(self, call: Callable, data: object, *args: object, **kwargs: object) -> Tensor:
        if isinstance(data, Tensor):
            return self._to(call, data, *args, **kwargs)
        return self._called(call, (data, *args), kwargs)

    def _backward(self, call: Callable, tensor: Tensor, gradient: Tensor | None = None, **kwargs: object) -> None:
        return self._differentiated(torch.autograd.backward, tensor, gradient, **kwargs)

    def _differentiated(self, call: Callable, *args: object, **kwargs: object) -> object:
        """Run backward with this mode on: hooks, and `backward` of an `autograd.Function`, ask for devices, too.

        PyTorch turns a mode off during the call that it handles. When the mode is on again, `torch.autograd` would hand it the
        same call again, for ever; so it is told that there is no mode.
        """
        with self, mock.patch.object(torch.autograd, "has_torch_function", lambda arguments: False):
            return self._called(call, args, kwargs)


def _hooks_with_mode_on(init: Callable, mode: _Calls) -> Callable:
    """Return `saved_tensors_hooks.__init__` for hooks that run with the mode on; PyTorch calls them while it is off."""

    def with_mode_on(hook: Callable) -> Callable:
        def hook_with_mode_on(value: object) -> object:
            with nullcontext() if mode in _get_current_function_mode_stack() else mode:
                return hook(value)

        return hook_with_mode_on

    return lambda hooks, pack, unpack: init(hooks, with_mode_on(pack), with_mode_on(unpack))


def _parse_to(parse: Callable, allocator: _Allocator) -> Callable:
    """Return the parser of the arguments of `module.to`; a tensor among them stands for its device. No mode sees this call."""

    def parsed(*args: object, **kwargs: object) -> tuple:
        device, *others = parse(*args, **kwargs)
        return (CUDA if any(map(allocator.has, _tensors(*args, *kwargs.values()))) else device, *others)

    return parsed


# ---- What runs ----


@dataclass(frozen=True)
class _Traits:
    """What an operation accepts on CUDA.

    Attributes:
        mixes: whether its tensors may be on different devices, as those of a copy.
        indexes: whether its second argument is a list of indices, which may be on the CPU.
        takes_numbers: whether it takes a CPU tensor without dimensions as a number.
        writes: the positions of the arguments that it writes to.
    """

    mixes: bool
    indexes: bool
    takes_numbers: bool
    writes: tuple[int, ...]


@cache
def _traits(operation: torch._ops.OpOverload) -> _Traits:
    name = operation._schema.name.removeprefix("aten::").removesuffix("_")
    arguments = enumerate(operation._schema.arguments)
    return _Traits(
        mixes=name in ("copy", "_foreach_copy", "_to_copy", "is_same_size"),
        indexes=name in ("index", "index_put", "_index_put_impl", "_unsafe_index"),
        takes_numbers=torch.Tag.pointwise in operation.tags or name in ("masked_fill", "fill", "index_put"),
        writes=tuple(position for position, argument in arguments if argument.is_write),
    )


class _Operations(TorchDispatchMode):
    """Sees every operation, also those in backward and inside PyTorch's functions: it compares places, and marks results."""

    def __init__(self, allocator: _Allocator, calls: _Calls):
        super().__init__()
        self.allocator, self.calls = allocator, calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with DisableTorchFunction():
            given = _tensors(*args, *kwargs.values())
            on_cpu = [tensor for tensor in given if not self.allocator.has(tensor)]
            any_on_cuda = len(on_cpu) < len(given)
            if on_cpu and any_on_cuda:
                self._refuse(func, args, on_cpu)
            made = func(*args, **kwargs)
            # The result of a call that names a device is marked by `_Calls`.
            if self.calls.asked is None and (any_on_cuda or (not given and self.calls.has_tensor_on_cuda())):
                written = {id(tensor) for tensor in given} if _traits(func).writes else ()
                for tensor in _tensors(made):
                    if id(tensor) not in written:
                        self.allocator.take(tensor)
            return made

    def _refuse(self, operation: torch._ops.OpOverload, args: tuple, on_cpu: list[Tensor]) -> None:
        """Raise CUDA's error if the operation, which has tensors on the GPU, does not accept one of those on the CPU."""
        traits = _traits(operation)
        if traits.mixes:
            return
        excused = {id(index) for index in _tensors(args[1])} if traits.indexes and self.allocator.has(args[0]) else set()
        written = {id(tensor) for position in traits.writes if position < len(args) for tensor in _tensors(args[position])}
        for tensor in on_cpu:
            number = traits.takes_numbers and tensor.dim() == 0 and id(tensor) not in written
            if not number and id(tensor) not in excused:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                    f"{tensor.device}! (a tensor of shape {tuple(tensor.shape)} on {tensor.device}, in {operation})"
                )
