"""Bytes of a training step of a model that fits on no machine at hand, measured with fake tensors.

A fake tensor has a shape, a dtype and a device, but no numbers: the same training step runs, operation by operation, and the
same tracker follows every allocation, while nothing is allocated. A 65B model is measured on a laptop.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from peftlab.llama import Llama, LlamaConfig, LlamaDecoderLayer, set_gradient_checkpointing
from peftlab.memory import StepMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of weights by the names that papers use."""


def next_token_loss(model: Llama, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of every token given those before it, in nats; each position has a label.

    `peftlab.llama.causal_loss` picks the positions that have a label, and how many there are is a number, which a fake
    tensor does not have.
    """
    logits = model(input_ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def simulate_training_step(
    config: LlamaConfig,
    prepare: Callable[[Llama], object] = lambda model: None,
    *,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: str = "bf16",
    batch_size: int = 1,
    sequence_length: int = 512,
    checkpointing: bool = False,
    whole_model: bool = False,
) -> StepMemory:
    """Return the bytes of one training step of a LLaMA of this size, without allocating them.

    By default models of two and of three layers are measured, and the line through the two is followed to the full number of
    layers: all layers are equal. It takes a second or two for any size. With `whole_model` every layer is run.

    Args:
        prepare: makes of the model what is to be trained: freezes it, puts LoRA layers in, and so on. It is given the
            model on the device "meta", in `dtype`.
        optimizer_class: takes the trainable parameters and `lr`. By default AdamW updates one parameter after the other here,
            and all at once on a GPU: `partial(torch.optim.AdamW, foreach=True)` simulates that. And in fp32 with grouped-query
            attention a GPU has no fast kernel: call this within `sdpa_kernel(SDPBackend.MATH)` for its bytes.
        dtype: of the weights and of the computation: "fp32", "bf16" or "fp16".
        batch_size, sequence_length: of the token ids that are trained on; every token has a label.
        checkpointing: keep only each layer's input, and compute the rest again in backward.

    Raises:
        ValueError: if a size is not positive, or the dtype is not known.
    """
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if sequence_length < 2:
        raise ValueError("sequence_length must be at least 2: the first token is predicted from nothing")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")

    def measured(layers: int) -> tuple[StepMemory, list[int]]:
        shallower = replace(config, num_hidden_layers=layers)
        model = _on_paper(shallower, prepare, DTYPES[dtype], checkpointing)
        return _measure(model, optimizer_class, batch_size, sequence_length)

    if whole_model or config.num_hidden_layers <= 3:
        return measured(config.num_hidden_layers)[0]
    two, three = measured(2), measured(3)
    return _extrapolated(two, three, config.num_hidden_layers)


def _on_paper(config: LlamaConfig, prepare: Callable, dtype: torch.dtype, checkpointing: bool) -> Llama:
    """Return the model on the device "meta": shapes without numbers."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
        prepare(model)
    set_gradient_checkpointing(model, checkpointing)
    return model.train()


def fake_parameters(model: nn.Module, device: str = "cpu") -> None:
    """Replace every parameter and buffer of a model on "meta" by a fake one; to be called inside `FakeTensorMode`.

    What is shared stays shared: a tied weight is one tensor afterwards, too.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: fake(tensor) for name, tensor in held.items() if tensor is not None})


def _measure(model: Llama, optimizer_class: Callable, batch_size: int, sequence_length: int) -> tuple[StepMemory, list[int]]:
    """Return what a step takes, and the peak bytes in each of its stages: between one layer and the next, and so on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peftlab.tracker import PeftMemTracker

    with FakeTensorMode():
        fake_parameters(model)
        input_ids = torch.empty((batch_size, sequence_length), dtype=torch.long)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("nothing to measure: no parameter of the model requires a gradient")
        optimizer = optimizer_class(trained, lr=0.0)
        tracker = PeftMemTracker()
        tracker.track_external(model, optimizer)
        stages: list[int] = []

        def stage_ends(*_: object) -> None:
            stages.append(tracker.bytes_by_category("peak")["Total"])
            tracker.restart_peak()

        def layer_ends(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not torch._C._current_graph_task_id() > -1:  # not when a checkpoint runs it again in backward
                stage_ends()
                if output.requires_grad:
                    output.register_hook(stage_ends)

        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                module.register_forward_hook(layer_ends)
        with tracker:
            next_token_loss(model, input_ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
            stages.clear()
            start = tracker.bytes_by_category("current")
            value = next_token_loss(model, input_ids)
            after_forward = tracker.bytes_by_category("current")
            value.backward()
            del value
            stage_ends()
            after_backward = tracker.bytes_by_category("current")
            optimizer.step()
            stage_ends()
    parameters, optimizer_state = start["Parameter"] + start["Buffer"], start["Optstate"]
    batch = start["Total"] - parameters - optimizer_state
    stages = [peak - batch for peak in stages]
    memory = StepMemory(
        parameters=parameters,
        gradients=after_backward["Gradient"],
        optimizer_state=optimizer_state,
        activations=after_forward["Total"] - start["Total"],
        peak=max(stages),
    )
    return memory, stages


def _extrapolated(two: tuple[StepMemory, Sequence[int]], three: tuple[StepMemory, Sequence[int]], layers: int) -> StepMemory:
    """Follow the line through two and three layers.

    The peak of a step is no line but the largest of several, one for each stage: the first and the last layer's forward, the
    head, the first layer's backward, the last one's and that before it, the optimizer. (The last one's is special: below it
    there may be nothing that wants a gradient.) The stages in between lie on the line between their neighbours, so that
    the largest is among these.

    Raises:
        ValueError: if the layers are not treated alike.
    """

    def at(small: int, large: int) -> int:
        return small + (layers - 2) * (large - small)

    def landmarks(stages: Sequence[int], count: int) -> list[int]:
        if len(stages) != 2 * count + 2:
            raise ValueError("some layers train and others do not: measure them all, with whole_model=True")
        return [stages[index] for index in (0, count - 1, count, count + 1, 2 * count - 1, 2 * count, 2 * count + 1)]

    peaks = map(at, landmarks(two[1], 2), landmarks(three[1], 3))
    values = map(at, astuple(two[0])[:-1], astuple(three[0])[:-1])
    return StepMemory(*values, peak=max(peaks))
