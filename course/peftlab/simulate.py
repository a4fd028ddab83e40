"""Bytes of a training step of a model that fits on no machine at hand, measured with fake tensors.

A fake tensor has a shape, a dtype and a device, but no numbers: the same training step runs, operation by operation, and the
same tracker follows every allocation, while nothing is allocated. A 65B model is measured on a laptop. So is a model that
several GPUs share: to the one whose bytes are followed, collectives that send nothing stand for the others.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from peftlab import results
from peftlab.distributed import Traffic, run_apart
from peftlab.llama import ALL_LINEAR, Llama, LlamaConfig, LlamaDecoderLayer, set_gradient_checkpointing
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
    _validate(dtype, batch_size, sequence_length)

    def measured(layers: int) -> _Measured:
        shallower = replace(config, num_hidden_layers=layers)
        model = _on_paper(shallower, prepare, DTYPES[dtype], checkpointing)
        return _measure(model, optimizer_class, batch_size, sequence_length)

    if whole_model or config.num_hidden_layers <= 3:
        return measured(config.num_hidden_layers).memory
    return _extrapolated(measured(2), measured(3), config.num_hidden_layers)


@dataclass(frozen=True)
class ShardedStep:
    """One training step as one of several ranks sees it.

    Attributes:
        memory: the rank's bytes.
        sent: bytes that it sends, by collective, as `peftlab.distributed.bytes_sent` counts them.
    """

    memory: StepMemory
    sent: dict[str, float]


RANK_BYTES = "rank_bytes.jsonl"
"""The file in which unit 14 keeps rows of `RankBytes`."""


@dataclass(frozen=True)
class RankBytes:
    """A row of results: the simulated bytes of one of several ranks in a step.

    Attributes:
        model: a name in `peftlab.llama.PRESETS`.
        method: a name in `RECIPES`, or "full".
        world_size: number of ranks.
        sequence_length: tokens of the one row that each rank trains on.
        parameters, gradients, optimizer_state, peak: of one rank.
        sent: by one rank, all collectives together.
        versions: of the packages.
    """

    model: str
    method: str
    world_size: int
    sequence_length: int
    parameters: int
    gradients: int
    optimizer_state: int
    peak: int
    sent: float
    versions: dict = field(default_factory=results.package_versions)


def simulate_sharded_step(
    config: LlamaConfig,
    prepare: Callable[[Llama], object],
    shard: Callable[[Llama, DeviceMesh], object],
    *,
    world_size: int,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: str = "bf16",
    batch_size: int = 1,
    sequence_length: int = 512,
    checkpointing: bool = True,
    whole_model: bool = False,
) -> ShardedStep:
    """Return the bytes of one rank in a training step of a LLaMA that is sharded over so many, without allocating them.

    As in `simulate_training_step`, a line is followed to the full number of layers: here that through three and four of them.

    Args:
        prepare: makes of the model what is to be trained.
        shard: is called with the prepared model and a mesh of `world_size` ranks, and calls FSDP2's `fully_shard`. All
            decoder layers are to be treated alike.
        batch_size: of one rank.

    Raises:
        ValueError: if a size is not positive, or the dtype is not known.
        RankError: if `prepare` or `shard` raises an error. They are called in a process of their own.
    """
    _validate(dtype, batch_size, sequence_length)
    if world_size < 1:
        raise ValueError(f"world_size must be positive, got {world_size}")

    def measured(layers: int, mesh: DeviceMesh) -> _Measured:
        shallower = replace(config, num_hidden_layers=layers)
        model = _on_paper(shallower, prepare, DTYPES[dtype], checkpointing)
        return _measure(model, optimizer_class, batch_size, sequence_length, lambda model: shard(model, mesh))

    def all_measured(*counts: int) -> list[_Measured]:
        with _ranks_on_paper(world_size) as mesh:
            return [measured(count, mesh) for count in counts]

    layers = config.num_hidden_layers
    if whole_model or layers <= 4:
        (whole,) = run_apart(all_measured, layers)
        return ShardedStep(whole.memory, whole.sent)
    three, four = run_apart(all_measured, 3, 4)
    sent = {name: three.sent[name] + (layers - 3) * (four.sent[name] - three.sent[name]) for name in three.sent}
    return ShardedStep(_extrapolated(three, four, layers), sent)


@contextlib.contextmanager
def _ranks_on_paper(world_size: int) -> Iterator[DeviceMesh]:
    """Make this process the first of so many ranks, the others of which are not there: what is sent to them is lost."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def _validate(dtype: str, batch_size: int, sequence_length: int) -> None:
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if sequence_length < 2:
        raise ValueError("sequence_length must be at least 2: the first token is predicted from nothing")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")


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


@dataclass(frozen=True)
class _Measured:
    """What a step takes and sends, and the peak bytes in each of its stages: between one layer and the next, and so on."""

    memory: StepMemory
    stages: list[int]
    sent: dict[str, float]


def _measure(
    model: Llama,
    optimizer_class: Callable,
    batch_size: int,
    sequence_length: int,
    shard: Callable[[Llama], object] | None = None,
) -> _Measured:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peftlab.tracker import PeftMemTracker

    with FakeTensorMode(allow_non_fake_inputs=shard is not None):  # a mesh has a real tensor of its ranks
        fake_parameters(model)
        if shard is not None:
            shard(model)
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
            with Traffic() as traffic:
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
    return _Measured(memory, stages, traffic.sent())


def _extrapolated(small: _Measured, large: _Measured, layers: int) -> StepMemory:
    """Follow the line through two numbers of layers that differ by one.

    The peak of a step is no line but the largest of several, one for each stage: the first and the last layer's forward, the
    head, the first layer's backward, the last one's and that before it, the optimizer. (The last one's is special: below it
    there may be nothing that wants a gradient.) The stages in between lie on the line between their neighbours, so that
    the largest is among these. In a sharded model the second layer's backward is special as well: it is there that the first
    one's gradients are let go.

    Raises:
        ValueError: if the layers are not treated alike.
    """
    fewer = len(small.stages) // 2 - 1

    def at(small: int, large: int) -> int:
        return small + (layers - fewer) * (large - small)

    def landmarks(stages: Sequence[int], count: int) -> list[int]:
        if len(stages) != 2 * count + 2:
            raise ValueError("some layers train and others do not: measure them all, with whole_model=True")
        second = [count + 2] if fewer > 2 else []
        return [stages[index] for index in (0, count - 1, count, count + 1, *second, 2 * count - 1, 2 * count, 2 * count + 1)]

    peaks = map(at, landmarks(small.stages, fewer), landmarks(large.stages, fewer + 1))
    values = map(at, astuple(small.memory)[:-1], astuple(large.memory)[:-1])
    return StepMemory(*values, peak=max(peaks))


# ---- ways to train, as they weigh --------------------------------------------------------------------------------------
# These run with fake tensors only. They have the tensors that the real thing has, and compute nothing: unit 08 builds LoRA,
# unit 10 the 4-bit layer, and `bitsandbytes` has the 8-bit optimizer.
ABSMAX_BLOCK, NF4_BLOCK, NESTED_BLOCK = 256, 64, 256
"""Values that share a scale: in 8-bit optimizer state, in 4-bit weights, and in the 8-bit scales of those."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        dtype: of weights and gradients, by the name in `DTYPES`.
        optimizer_class: takes parameters and `lr`.
        prepare: makes of the model what is trained.
    """

    dtype: str = "bf16"
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    prepare: Callable[[Llama], object] = lambda model: None

    def measure(self, config: LlamaConfig, **settings: object) -> StepMemory:
        """Return the bytes of a training step; the settings are those of `simulate_training_step`."""
        return simulate_training_step(config, self.prepare, dtype=self.dtype, optimizer_class=self.optimizer_class, **settings)


class AdamOnPaper(torch.optim.Optimizer):
    """Adam's state in any precision, updated as a fused kernel does it: without a temporary.

    Args:
        moments: dtype of the two moments; uint8 comes with an fp32 scale for every 256 values.
        master_weights: keep an fp32 copy of each parameter.
    """

    def __init__(self, parameters, lr: float, moments: torch.dtype = torch.float32, master_weights: bool = False):
        super().__init__(parameters, {"lr": lr})
        self.moments, self.master_weights = moments, master_weights

    def step(self) -> None:
        """Allocate the state if it is not there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is None or state:
                    continue
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.empty_like(parameter, dtype=self.moments)
                    if self.moments is torch.uint8:
                        state[f"{name}_absmax"] = torch.empty(-(-parameter.numel() // ABSMAX_BLOCK))
                if self.master_weights:
                    state["master_weight"] = torch.empty_like(parameter, dtype=torch.float32)


class _WithFactors(nn.Module):
    """A frozen linear layer and the two factors that LoRA trains beside it."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def _frozen(count: int, dtype: torch.dtype) -> nn.Parameter:
    """Return numbers as a parameter, which FSDP shards, and not as a buffer, which it leaves whole on every rank."""
    return nn.Parameter(torch.empty(count, dtype=dtype), requires_grad=False)


class _FourBitOnPaper(nn.Module):
    """A frozen linear layer in NF4 with double quantization: packed bytes, 8-bit scales, and the scales of those."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape, self.dtype = linear.weight.shape, linear.weight.dtype
        count = linear.weight.numel()
        blocks = -(-count // NF4_BLOCK)
        self.packed = _frozen(-(-count // 2), torch.uint8)
        self.absmax = _frozen(blocks, torch.uint8)
        self.nested_absmax = _frozen(-(-blocks // NESTED_BLOCK), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return _MultiplyDequantized.apply(x, self.packed, self.shape, self.dtype)


class _MultiplyDequantized(torch.autograd.Function):
    """x W^T with a W that is there only while it is needed, in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, packed, shape, dtype):
        ctx.shape, ctx.dtype = shape, dtype
        return x @ torch.empty(shape, dtype=dtype, device=x.device).T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device), None, None, None


def with_factors(model: Llama, rank: int = 16, four_bits: bool = False) -> None:
    """Freeze the model and put LoRA's factors beside all its linear layers, which may be in 4 bits."""
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name in ALL_LINEAR:
            base = _FourBitOnPaper(linear) if four_bits else linear
            adapted = _WithFactors(base, linear.in_features, linear.out_features, rank, linear.weight.dtype)
            setattr(model.get_submodule(parent), own_name, adapted)


RECIPES = {
    "fp16": Recipe(dtype="fp16"),
    "8-bit Adam": Recipe(optimizer_class=partial(AdamOnPaper, moments=torch.uint8)),
    "bf16, fp32 moments": Recipe(optimizer_class=AdamOnPaper),
    "mixed precision": Recipe(optimizer_class=partial(AdamOnPaper, master_weights=True)),
    "LoRA": Recipe(prepare=with_factors),
    "QLoRA": Recipe(prepare=partial(with_factors, four_bits=True)),
}
"""Full fine-tuning in four precisions, and two methods that freeze the model. Ranks are 16."""


def recipe_with(name: str, rank: int) -> Recipe:
    """Return a recipe with another rank, where it has one."""
    recipe = RECIPES[name]
    if name in ("LoRA", "QLoRA"):
        recipe = replace(recipe, prepare=partial(with_factors, rank=rank, four_bits=name == "QLoRA"))
    return recipe
