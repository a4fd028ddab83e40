"""Ways to train, as they weigh: what is stored in how many bits, for `peftlab.simulate`.

These run with fake tensors only. They have the tensors that the real thing has, and compute nothing: unit 08 builds LoRA,
unit 10 the 4-bit layer, and `bitsandbytes` has the 8-bit optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from peftlab.llama import ALL_LINEAR, Llama, LlamaConfig
from peftlab.memory import StepMemory
from peftlab.simulate import simulate_training_step

ABSMAX_BLOCK, NF4_BLOCK, NESTED_BLOCK = 256, 64, 256
"""Values that share a scale: in 8-bit optimizer state, in 4-bit weights, and in the 8-bit scales of those."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        dtype: of weights and gradients, by the name in `peftlab.simulate.DTYPES`.
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
