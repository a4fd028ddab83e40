"""Measured bytes of one training step: parameters, gradients, optimizer state, activations and the peak.

Nothing here is computed from a formula. On the CPU every allocation of the step is followed, on CUDA the caching
allocator is asked for the bytes that were requested of it.
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MEBIBYTE = 2**20
BYTES_IN = {"MiB": MEBIBYTE, "GB": 10**9}
"""Bytes in the units that tables and pictures use: MiB as computers count, GB as papers do."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        parameters: weights and buffers, trainable or not.
        gradients: what `.grad` holds after backward.
        optimizer_state: what the optimizer keeps from one step to the next.
        activations: what forward leaves for backward: everything alive after it that was not there before.
        peak: the largest sum of all at any moment of the step.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive after one operation of a training step.

    Attributes:
        phase: "forward", "backward" or "optimizer".
        parameters, gradients, optimizer_state: as in `StepMemory`; the optimizer's temporary tensors count as its state.
        activations: what forward has left so far and backward has not freed yet, and other temporary tensors.
    """

    phase: str
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int


def step_table(steps: Mapping[str, StepMemory], unit: str = "MiB", digits: int = 1) -> str:
    """Return, as text, the bytes of each training step by category, in a unit of `BYTES_IN`."""
    names = max(map(len, [unit, *steps])) + 1
    lines = [f"{unit:<{names}}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'peak':>10}"]
    for name, step in steps.items():
        sizes = (step.parameters, step.gradients, step.optimizer_state, step.activations, step.peak)
        figures = (
            f"{size / BYTES_IN[unit]:>{width},.{digits}f}" for size, width in zip(sizes, (10, 11, 11, 13, 10), strict=True)
        )
        lines.append(f"{name:<{names}}" + "".join(figures))
    return "\n".join(lines)


def measure_training_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> StepMemory:
    """Return the bytes that one step of forward, backward and optimizer takes.

    Two steps are taken: the optimizer allocates its state in the first, and the second is measured. Their learning
    rate is zero: the model's weights stay as they are, to the bit, and its gradients are cleared.

    The same step has other figures on CUDA where PyTorch runs other kernels there. In fp32 with grouped-query attention,
    attention is written out and keeps its scores; AdamW updates all parameters at once (`foreach`), with a temporary
    copy of all that is trained; and the 4 bytes a tensor in which AdamW counts its steps stay on the CPU. With
    `sdpa_kernel(SDPBackend.MATH)` and `foreach=False` on both, the figures are equal (`autograder.measuring.gpu`).

    Args:
        model: on the device to be measured (CPU or CUDA).
        loss: runs the forward pass and returns the scalar to differentiate.
        optimizer_class: takes the trainable parameters and `lr`.

    Raises:
        ValueError: if nothing is trainable, or the model is on a device that cannot be measured.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing to measure: no parameter of the model requires a gradient")
    device = trainable[0].device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"memory on {device.type} cannot be measured by category; move the model to the CPU or to CUDA")
    model.zero_grad()
    optimizer = optimizer_class(trainable, lr=0.0)
    measure = _measure_on_cuda if device.type == "cuda" else _measure_on_cpu
    try:
        return measure(model, loss, optimizer)
    finally:
        model.zero_grad()


def _measure_on_cpu(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> StepMemory:
    from peftlab.tracker import PeftMemTracker  # what it is made of takes half a second to import

    tracker = PeftMemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        _step(loss, optimizer)
        tracker.reset_mod_stats()
        start = tracker.bytes_by_category("current")
        value = loss()
        after_forward = tracker.bytes_by_category("current")
        value.backward()
        del value
        after_backward = tracker.bytes_by_category("current")
        optimizer.step()
        peak = tracker.bytes_by_category("peak")["Total"]
        optimizer.zero_grad()
    parameters, optimizer_state = start["Parameter"] + start["Buffer"], start["Optstate"]
    return StepMemory(
        parameters=parameters,
        gradients=after_backward["Gradient"],
        optimizer_state=optimizer_state,
        activations=after_forward["Total"] - start["Total"],
        # What else the tracker has seen, the batch, was there before the step.
        peak=peak - (start["Total"] - parameters - optimizer_state),
    )


def memory_over_time(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> list[Moment]:
    """Return the bytes that are alive after each operation of a training step, on the CPU.

    As in `measure_training_step`, the second step is followed, the model's weights stay as they are, and its gradients
    are cleared.

    Args:
        model: on the CPU; something in it requires a gradient.
        loss: runs the forward pass and returns the scalar to differentiate.
        optimizer_class: takes the trainable parameters and `lr`.
    """
    from peftlab.tracker import PeftMemTracker  # what it is made of takes half a second to import

    optimizer = optimizer_class([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    tracker, phases = PeftMemTracker(), {}
    tracker.track_external(model, optimizer)
    with tracker:
        _step(loss, optimizer)
        tracker.reset_mod_stats()
        start = tracker.bytes_by_category("current")
        tracker.moments = phases["forward"] = []
        value = loss()
        tracker.moments = phases["backward"] = []
        value.backward()
        del value
        tracker.moments = phases["optimizer"] = []
        optimizer.step()
        tracker.moments = None
        optimizer.zero_grad()
    there_before = start["Total"] - start["Parameter"] - start["Buffer"] - start["Optstate"]  # the batch
    return [
        Moment(
            phase=phase,
            parameters=now["Parameter"] + now["Buffer"],
            gradients=now["Gradient"],
            optimizer_state=now["Optstate"],
            activations=now["Total"] - now["Parameter"] - now["Buffer"] - now["Gradient"] - now["Optstate"] - there_before,
        )
        for phase, moments in phases.items()
        for now in moments
    ]


def _measure_on_cuda(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> StepMemory:
    """Ask CUDA's caching allocator between the phases for the bytes that were requested of it.

    Requested bytes are those of the tensors. Allocated bytes are rounded up, to 512 a tensor and more for large ones, and
    reserved bytes hold what the allocator keeps for later; neither would equal the CPU's figures, nor a simulation's.
    """
    device = next(model.parameters()).device

    def requested(which: str) -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.memory_stats(device)[f"requested_bytes.all.{which}"]

    # The first product of each thread allocates cuBLAS's workspace, which stays; backward runs in a thread of its own.
    loss().backward()
    model.zero_grad()
    gc.collect()  # cyclic garbage that is freed in the middle of a step would be missing from its figures
    before_state = requested("current")
    _step(loss, optimizer)
    start = requested("current")
    torch.cuda.reset_peak_memory_stats(device)
    value = loss()
    after_forward = requested("current")
    value.backward()
    del value
    after_backward = requested("current")
    optimizer.step()
    peak = requested("peak")
    optimizer.zero_grad()
    parameters = tensor_bytes([*model.parameters(), *model.buffers()])
    return StepMemory(
        parameters=parameters,
        gradients=after_backward - start,
        optimizer_state=start - before_state,
        activations=after_forward - start,
        # Whatever else lives on the device is not part of this step.
        peak=peak - (before_state - parameters),
    )


def tensors_of_step(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    not_counted: Iterable[Tensor] = (),
) -> dict[str, list[Tensor]]:
    """Take a training step, and return the very tensors that make up its bytes.

    Args:
        loss: runs the forward pass and returns the scalar to differentiate.
        parameters: all of the model's, frozen or not; what forward saves of these costs nothing.
        not_counted: other tensors that are there anyway, such as the input.

    Returns:
        "gradients", "optimizer state" and "saved", what forward leaves for backward, each storage once.
    """
    parameters, saved = list(parameters), {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    value.backward()
    optimizer.step()
    for tensor in (*parameters, *not_counted):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    state = [held for slots in optimizer.state.values() for held in slots.values() if torch.is_tensor(held)]
    return {"gradients": gradients, "optimizer state": state, "saved": [whole_storage(tensor) for tensor in saved.values()]}


def whole_storage(tensor: Tensor) -> Tensor:
    """Return all the bytes that a tensor keeps alive; it may show a part of them, or show some several times."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each storage once: a tied weight is not counted twice."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
