# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · QLoRA: train on top of four bits
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 15 of experiments on two CPU cores | 4 of 5 | 13 | 08_lora and 09_quantization; what autograd saves |
#
# LoRA took away gradients and optimizer state, and left the weights in memory as they were. Unit 09 stored a weight in little
# more than four bits. QLoRA (Dettmers et al. 2023) puts the two together. The base is kept in NF4, every layer is dequantized
# only while it is used, and LoRA is trained on top. In this way a model of 65 billion parameters was fine-tuned on one GPU of
# 48 GB.
#
# **When you have finished, you can**
#
# 1. build a 4-bit linear layer that passes gradients on and keeps nothing but its codes, and prove it in bytes;
# 2. say where QLoRA's bytes go, from your own measurements of a small model, and of 7 and 65 billion parameters on paper;
# 3. choose: which layers to quantize, which dtype to store and which to compute in, what to do with the adapter afterwards.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in some seconds, on new
# random numbers every time, and says what is wrong. Each check lends what earlier exercises built: its own `dequantize_nf4`,
# base or layer. So go by the names in the docstrings, and not by `isinstance`.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from autograder.checks.qlora import (
    check_fast_dequantize,
    check_merged_weight,
    check_nf4_linear,
    check_nf4_memory,
    check_prepare,
    check_qlora,
    check_qlora_layer,
)
from peftlab import plots
from peftlab.dynamic_code import dynamic_code
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, causal_loss, set_gradient_checkpointing
from peftlab.memory import MEBIBYTE, StepMemory, measure_training_step, step_table, tensor_bytes, whole_storage
from peftlab.progress import predict

UNIT = "10_qlora"


def bitsandbytes_nf4(weight: Tensor, double: bool = True) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Quantize a weight with bitsandbytes; return the packed bytes, the statistics, and the sixteen levels of NF4.

    The statistics are (absmax,), or (codes of absmax, nested absmax, offset) with double quantization: unit 09 made them by hand.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach(), quant_type="nf4", compress_statistics=double)
    statistics = (state.absmax, state.state2.absmax, state.offset) if double else (state.absmax,)
    return packed, statistics, state.code


# %% [markdown]
# ## The idea
#
# A weight $W$ is stored as 4-bit codes $q$ and statistics $s$. What it stands for, $\hat W = \text{dequantize}(q, s)$, is close
# to $W$. A layer computes with $\hat W$, and LoRA is added as ever:
#
# $$ y = \hat W x + \frac{\alpha}{r} \, B A \, x, \qquad \frac{\partial L}{\partial x} = \hat W^\top g + \frac{\alpha}{r} \, A^\top B^\top g \quad\text{with}\quad g = \frac{\partial L}{\partial y} $$
#
# | | | |
# |---|---|---|
# | the weight, briefly | $\hat W = \text{dequantize}(q, s)$ | `weight = self.dequantized()` |
# | forward | $\hat W x$ | `x @ weight.T` |
# | backward | $\hat W^\top g$ | `gradient @ weight`, dequantized *again* |
# | the update | $\frac{\alpha}{r} B (A x)$ | `self.scaling * (x @ A.T @ B.T)` |
#
# The codes $q$ need no gradient. The gradient of $x$ must go on, to the layers below, and it needs $\hat W$ again. If autograd
# keeps $\hat W$ from forward, all layers have an unpacked weight in memory when backward begins. Then quantizing saved nothing.
#
# Here are the bytes of one query projection of SmolLM2, drawn to scale.

# %%
weights, factors = 576 * 576, 8 * (576 + 576)
boxes = {
    "fp32": (4 * weights, "#999999"),
    "bf16": (2 * weights, "#999999"),
    "NF4": (weights // 2 + weights // 64, "#0072B2"),
    "A and B, fp32": (4 * factors, "#D55E00"),
}
figure, axes = plt.subplots(figsize=(7, 2.8))
left = 0.0
for name, (size, colour) in boxes.items():
    side = size**0.5
    axes.add_patch(plt.Rectangle((left, 0), side, side, color=colour))
    axes.annotate(f"{name}\n{size / 1024:,.0f} KiB", (left + side / 2, -60), ha="center", va="top", fontsize=9)
    left += side + 420
axes.set(xlim=(-120, left), ylim=(-520, 1250), aspect="equal", title="Bytes of one projection, 576 × 576, as areas")
axes.axis("off")
plots.show(figure, alt="Four squares: fp32 large, bf16 half its area, NF4 an eighth and a little, LoRA's factors a small one.")

# %% [markdown]
# *What to see.* The blue square is kept, the orange one is trained. A grey one, fp32 on a CPU and bf16 on a GPU, is what a
# layer computes with. It should exist for one layer at a time.
#
# ### Predict
#
# How many bytes does a parameter of the quantized layers take, statistics included? And how long is a training step of QLoRA
# beside one of LoRA? Sections 4 and 5 measure both.

# %%
my_bytes = predict("bytes a quantized parameter", None)
my_seconds = predict("QLoRA's step over LoRA's, in time, one row", None)

# %% [markdown]
# ## 1. Dequantize, fast  ·  2 points, about 20 minutes, ●●○
#
# In unit 09 dequantizing had to be right. Now it happens twice in every layer and step, so it has to be fast and sparing as
# well. The obvious way unpacks the codes and looks each one up. But PyTorch's index is an integer of four or eight *bytes*: it
# takes as much as the fp32 weight itself, or twice as much.
#
# There are only 256 different bytes, and each stands for two weights. So:
#
# 1. a **table** of 256 rows: the two levels that a byte stands for, the high half first;
# 2. **one gather**: look up every byte, not every code; out come pairs of weights, in their order;
# 3. **one product**, in place: the values, viewed as blocks, times their absmax, in fp32; then cast to the dtype asked for.
#
# The check wants the values to the last bit. It follows every allocation: at once there may be 6 bytes a weight, 4 of them for
# the fp32 values. And your function has to run on the device "meta", whose tensors have shapes and no numbers: section 7 needs
# that. So read no number out, and make nothing on a device of its own.
#
# <details><summary>How do I make the table?</summary>
#
# Byte 58 is `0011 1010`: levels 3 and 10. Going through the bytes, the first level changes every 16 rows, the second in every
# row: `repeat_interleave(16)` and `repeat(16)`, side by side.
# </details>
# <details><summary>IndexError about a mask, or the check names int64</summary>
#
# A `uint8` index is taken for a mask. `packed.flatten().int()` is an index of four bytes for two weights; `.long()` has eight.
# </details>
# <details><summary>The check names int32 and float32, and more than 6 bytes</summary>
#
# `values * absmax[:, None]` makes a second tensor; `values *= absmax[:, None]` does not. And an index with a name lives until
# the function ends: `del` it, or give it none.
# </details>
# <details><summary>It is right, and I would like it faster still</summary>
#
# Numbers are gathered faster than rows. `table.view(torch.int64)` takes each row of two fp32 values for one number of eight
# bytes; `.view(torch.float32)` takes them apart again. And work on an eighth of the blocks at a time (`chunk`): it is still in
# the processor's cache when it is multiplied and cast.
# </details>


# %% nbgrader={"grade": false, "grade_id": "fast-dequantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dequantize_nf4(
    packed: UInt8[Tensor, "half 1"],
    absmax: Float[Tensor, "blocks"],
    levels: Float[Tensor, "16"],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int = 64,
) -> Float[Tensor, "..."]:
    """Return level times absmax, in this shape and dtype; the product is made in fp32 and rounded once, at the end.

    Args:
        packed: two codes to a byte, the first in the high half; not modified.
        absmax: of every `block_size` weights in a row, in fp32; not modified.
        levels: in fp32, on the device of `packed`.
    """
    ### BEGIN SOLUTION
    # A byte's two values, as one number of eight bytes: numbers are gathered faster than rows of two.
    table = torch.cartesian_prod(levels, levels).view(torch.int64).flatten()
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    blocks = weight.view(-1, block_size), packed.view(-1, block_size // 2), absmax[:, None]
    # A part at a time: what was gathered is still in the processor's cache when it is multiplied and cast.
    for some, codes, scale in zip(*(tensor.chunk(8) for tensor in blocks)):
        some.copy_(table.index_select(0, codes.flatten().int()).view(torch.float32).view(-1, block_size).mul_(scale))
    return weight
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-fast-dequantize", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_fast_dequantize(dequantize_nf4)

# %% [markdown]
# ## 2. A layer of codes  ·  4 points, about 35 minutes, ●●●
#
# `NF4Linear` takes the place of a frozen `nn.Linear`. It gets tensors that are quantized already. `statistics` is `(absmax,)`,
# in fp32. With double quantization it is `(codes, nested_absmax, offset)`, as in unit 09: `uint8` codes of `dynamic_code()`, an
# fp32 absmax for every 256 of these, and the mean that was subtracted.
#
# - **What it holds.** Buffers, under the names in the docstring, not parameters: nothing of it is trained. A buffer moves with
#   `layer.to(device)` and is in the state dict.
# - **`dequantized()`** returns the weight, in `compute_dtype`.
# - **`forward`** casts `x` to `compute_dtype`, multiplies, adds the bias in that dtype, and gives the result back in the dtype
#   of `x`. How a weight is stored and in which dtype it is multiplied are two decisions.
# - **What backward needs.** `NF4Product` is an operation with a backward of your own. `forward(ctx, x, layer)` returns $\hat W
#   x$ and may leave things on `ctx`; `backward(ctx, gradient)` returns one gradient for each argument of `forward`, `None` for
#   what has none. Leave the *layer* on `ctx`: a reference costs nothing. `NF4Product.apply(x, layer)` calls it.
# - **What must not be cast.** `model.to(torch.bfloat16)` casts every floating-point buffer. It would round absmax to 8
#   significant bits, and a block's weights would be off by up to 0.4%. `nn.Module` sends every tensor through its method
#   `_apply`; the one below keeps the dtype.
#
# <details><summary>The check says that no gradient reaches the layers below</summary>
#
# Give `apply` the `x` that came in: cast, but not detached. `backward` returns the gradient of `x` first.
# </details>
# <details><summary>The check says that the weight is kept</summary>
#
# `ctx.weight = ...`, `ctx.save_for_backward(weight)` and a plain `x @ weight.T` outside of `NF4Product` all keep it. Call
# `dequantized()` in forward and again in backward.
# </details>
# <details><summary>The check says that the nested absmax of the wrong block was taken</summary>
#
# Codes 0 to 255 share the first. `repeat_interleave(256)` repeats each number in its place; cut off what is too long.
# </details>
# <details><summary>The check says that something is not on the device</summary>
#
# `dynamic_code(device=...)` makes its table where you say. Buffers move with the layer.
# </details>


# %% nbgrader={"grade": false, "grade_id": "nf4-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
class NF4Product(torch.autograd.Function):
    """x W^T, for the weight W of an `NF4Linear`, which is there only while it is used."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "... in"], layer: "NF4Linear") -> Float[Tensor, "... out"]:
        """Return the product; `x` is in the layer's compute dtype."""
        ### BEGIN SOLUTION
        ctx.layer = layer
        return x @ layer.dequantized().T
        ### END SOLUTION

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "... out"]) -> tuple[Float[Tensor, "... in"], None]:
        """Return the gradient of `x`, and None for the layer."""
        ### BEGIN SOLUTION
        return gradient @ ctx.layer.dequantized(), None
        ### END SOLUTION


class NF4Linear(nn.Module):
    """A frozen linear layer that holds 4-bit codes and statistics, and nothing else.

    Args:
        packed: `uint8`, two codes to a byte.
        statistics: (absmax,) in fp32, or (codes of absmax in `uint8`, nested absmax, offset).
        levels: what the sixteen codes stand for, in fp32.
        shape: of the weight, (out_features, in_features), in blocks of 64.
        compute_dtype: in which the products are computed.
        bias: (out_features,), or None.

    Attributes (buffers; the cells below use these names):
        packed, levels: as given.
        absmax: in fp32; with double quantization, its codes.
        nested_absmax, offset: with double quantization; otherwise None.
        bias: as given, or None.
    """

    def __init__(
        self,
        packed: UInt8[Tensor, "half 1"],
        statistics: tuple[Tensor, ...],
        levels: Float[Tensor, "16"],
        shape: tuple[int, int],
        compute_dtype: torch.dtype,
        bias: Float[Tensor, "out"] | None = None,
    ):
        super().__init__()
        self.shape = shape
        self.compute_dtype = compute_dtype
        ### BEGIN SOLUTION
        absmax, *nested = statistics
        nested_absmax, offset = nested or (None, None)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)
        ### END SOLUTION

    def dequantized(self) -> Float[Tensor, "out in"]:
        """Return the weight that codes and statistics stand for, in the compute dtype."""
        ### BEGIN SOLUTION
        absmax = self.absmax
        if self.nested_absmax is not None:
            scale = self.nested_absmax.repeat_interleave(256)[: len(absmax)]
            absmax = dynamic_code(device=absmax.device)[absmax.int()] * scale + self.offset
        return dequantize_nf4(self.packed, absmax, self.levels, self.shape, self.compute_dtype)
        ### END SOLUTION

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Return W x + bias, computed in the compute dtype, in the dtype of x."""
        ### BEGIN SOLUTION
        output = NF4Product.apply(x.to(self.compute_dtype), self)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        return output.to(x.dtype)
        ### END SOLUTION

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Move the buffers as ever, but leave their dtype: `model.to(torch.bfloat16)` must not round statistics."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


# %% [markdown]
# The first check compares output and gradients in several dtypes, then loads, casts and moves the layer. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-nf4-linear", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_nf4_linear(NF4Product, NF4Linear)

# %% [markdown]
# The second *measures* what the layer keeps, what forward leaves for backward, and the peak. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-nf4-memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_nf4_memory(NF4Product, NF4Linear)

# %% [markdown]
# ### What dequantizing again is worth
#
# Eight layers of random codes, one after the other: once yours, once with a plain product, whose weight autograd keeps. A small
# layer at the bottom is trained, so the gradient has to pass through all of them.


# %%
class KeptByAutograd(NF4Linear):
    """The same layer with a plain product in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.compute_dtype), self.dequantized()).to(x.dtype)


def stack_of(kind: type[NF4Linear], width: int = 512) -> nn.Sequential:
    """Return eight layers of random codes above a trained one."""
    torch.manual_seed(0)
    count = width * width
    layers = [
        kind(
            torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8),
            (0.1 * torch.rand(count // 64),),
            torch.linspace(-1, 1, 16),
            (width, width),
            torch.float32,
        )
        for _ in range(8)
    ]
    return nn.Sequential(nn.Linear(16, width), *layers)


# %%
steps = {}
for name, kind in {"kept by autograd": KeptByAutograd, "dequantized again": NF4Linear}.items():
    stack = stack_of(kind)
    steps[name] = measure_training_step(stack, lambda: stack(torch.ones(4, 16)).pow(2).mean())
    step = steps[name]
    print(
        f"{name:<18} codes and statistics {step.parameters / MEBIBYTE:.1f} MiB, left by forward "
        f"{step.activations / MEBIBYTE:.1f} MiB, peak {step.peak / MEBIBYTE:.1f} MiB"
    )
plots.show(
    plots.memory_bars(steps, "A training step through eight 4-bit layers of 512 × 512, fp32"),
    alt="Two bars: with a plain product the activations are many times the codes; dequantized again, they are almost nothing.",
)

# %% [markdown]
# *What to see.* In the first bar the green part is eight unpacked weights, which wait for backward. The second bar has no green
# part: its peak is barely above the codes plus one layer's unpacked weight.
#
# ## 3. LoRA on it, in a whole model  ·  3 points, about 25 minutes, ●●○
#
# **The layer** *(1 point)*. `QLoRALinear` puts LoRA on an `NF4Linear`, as in unit 08: $A$ random (`kaiming_uniform_` with
# `a=math.sqrt(5)`), $B$ zero, scale $\alpha / r$. The dtype is new, twice:
#
# - The factors are **stored** in `dtype`, by default fp32. In bf16 an update of a thousandth of a number is rounded away; the
#   end of this section measures it.
# - They **compute** in the dtype of `x`. So cast the factors to it, not `x` to theirs. A copy of `x` in fp32 would be kept for
#   backward, twice the bytes of `x`, in every layer.
#
# Create them on the device of `base.packed`; `base.shape` is `(out_features, in_features)`.
#
# <details><summary>Does a cast pass the gradient on?</summary>
#
# Yes, and the gradient comes back in the dtype of `lora_A`.
# </details>
# <details><summary>The check says that an fp32 copy of x is kept</summary>
#
# `x @ self.lora_A.T` with different dtypes is an error; of the two ways out, cast the smaller tensor.
# </details>


# %% nbgrader={"grade": false, "grade_id": "qlora-layer", "locked": false, "schema_version": 3, "solution": true, "task": false}
class QLoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A x, on a frozen base.

    Attributes:
        base: the quantized layer.
        lora_A: parameter of shape (rank, in_features), random at the start, stored in `dtype`.
        lora_B: parameter of shape (out_features, rank), zero at the start, stored in `dtype`.
        scaling: alpha / rank.
    """

    def __init__(self, base: NF4Linear, rank: int, alpha: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        ### BEGIN SOLUTION
        out_features, in_features = base.shape
        device = base.packed.device
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        ### END SOLUTION

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Return the base's output plus the scaled update, computed in the dtype of x."""
        ### BEGIN SOLUTION
        update = x @ self.lora_A.to(x.dtype).T @ self.lora_B.to(x.dtype).T
        return self.base(x) + self.scaling * update
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-qlora-layer", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_qlora_layer(QLoRALinear)

# %% [markdown]
# **The model** *(2 points)*. All linear layers of the decoder layers are quantized: they hold nearly all weights of a large
# model. Two kinds of weights stay as they are:
#
# - **norms** are fewer than one in a thousand of the weights, and scale everything that passes;
# - the **embedding** is a table that is read a row at a time, and in many models the **head** is the same tensor. The head
#   decides between tens of thousands of words by small differences.
#
# `qlora(model, quantize, rank, alpha, dtype)` freezes the model and puts `QLoRALinear(quantize(linear), rank, alpha, dtype)` in
# the place of every `nn.Linear` below `model.model.layers`. It returns the full names of what it replaced. `quantize` is given,
# a function from `nn.Linear` to `NF4Linear`.
#
# While you go through a large model, its 16-bit weights should vanish one by one, or both copies are in memory at the end.
# Python frees a weight when nothing refers to it any more.
#
# <details><summary>The check says that weights stay in memory</summary>
#
# `list(model.named_modules())` refers to every module, and so to its weight, until the loop is over. Keep a list of *names*;
# `model.get_submodule(name)` gets a module when its turn has come.
# </details>
# <details><summary>How do I replace a module whose name has dots in it?</summary>
#
# `parent, _, own_name = name.rpartition(".")`, then `setattr(model.get_submodule(parent), own_name, new_layer)`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "qlora", "locked": false, "schema_version": 3, "solution": true, "task": false}
def qlora(
    model: Llama,
    quantize: Callable[[nn.Linear], NF4Linear],
    rank: int = 8,
    alpha: float = 16.0,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Freeze the model, and put LoRA on a quantized base in the place of every linear layer of its decoder layers.

    Args:
        quantize: makes the quantized base of a linear layer.
        rank, alpha, dtype: of the factors, as in `QLoRALinear`.

    Returns:
        The full names of the replaced layers.
    """
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    below = "model.layers."
    names = [name for name, module in model.named_modules() if name.startswith(below) and isinstance(module, nn.Linear)]
    for name in names:
        parent, _, own_name = name.rpartition(".")
        base = quantize(model.get_submodule(name))
        setattr(model.get_submodule(parent), own_name, QLoRALinear(base, rank, alpha, dtype))
    return names
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-qlora", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_qlora(qlora)

# %% [markdown]
# ### How much is trained?
#
# Count on the device "meta". `on_paper` stands in for a quantizer.


# %%
def on_paper(linear: nn.Linear, double: bool = True) -> NF4Linear:
    """Return an `NF4Linear` of the right sizes, without numbers, on the device of the linear layer."""
    count, device = linear.weight.numel(), linear.weight.device
    blocks = count // 64
    statistics = (
        (
            torch.empty(blocks, dtype=torch.uint8, device=device),
            torch.empty(-(-blocks // 256), device=device),
            torch.empty((), device=device),
        )
        if double
        else (torch.empty(blocks, device=device),)
    )
    packed = torch.empty(count // 2, 1, dtype=torch.uint8, device=device)
    return NF4Linear(packed, statistics, torch.empty(16, device=device), linear.weight.shape, linear.weight.dtype)


# %%
for name in ("SmolLM2-135M", "LLaMA-7B"):
    with torch.device("meta"):
        model = Llama(PRESETS[name])
        whole = sum(parameter.numel() for parameter in model.parameters())
        replaced = qlora(model, on_paper, rank=8)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    listed = sum(parameter.numel() for parameter in model.parameters())
    whole += trained  # as in the course's rows: the share is of all that there is in the end
    print(
        f"{name:<13} {len(replaced)} layers, {trained:,} trained, {trained / whole:.2%} of {whole:,}; "
        f"model.parameters() lists {listed:,}"
    )

# %% [markdown]
# The share is LoRA's: below one percent in a large model, more in a small one, whose matrices are small. And a trap:
# `model.parameters()` does not list the codes, which are buffers, so a share computed from it is wrong. (bitsandbytes keeps
# packed bytes as a parameter and counts each *byte* as one weight: also wrong.)
#
# ### Why the factors are stored in fp32
#
# A tiny LLaMA, with random codes below and factors in fp32 or bf16, is trained for ten steps at a low rate. How many numbers of
# $A$ does a step still move?


# %%
def random_codes(linear: nn.Linear) -> NF4Linear:
    """Return an `NF4Linear` of random codes, whose weights are about as large as the given ones."""
    count = linear.weight.numel()
    packed, absmax = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8), torch.full((count // 64,), 0.1)
    return NF4Linear(packed, (absmax,), torch.linspace(-1, 1, 16), linear.weight.shape, torch.float32)


for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    learner, sentences = Llama(PRESETS["tiny"]), torch.randint(0, 256, (8, 24))
    qlora(learner, random_codes, dtype=dtype)
    factors = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        before = [factor.detach().clone() for factor in factors[::2]]  # A stands before B
        optimizer.zero_grad()
        causal_loss(learner, sentences, sentences).backward()
        optimizer.step()
    stayed = torch.cat([(old == new).flatten() for old, new in zip(before, factors[::2])]).float().mean()
    print(f"factors in {str(dtype)[6:]:<9} numbers of A that the last step did not move: {stayed:.0%}")

# %% [markdown]
# *What to see.* In bf16 most of $A$ stands still: there the step is smaller than half the distance to the next number.
#
# ## 4. Measured: what is in memory
#
# Now a real model. First the weights of its 210 quantized layers, in five formats. `quantize` makes your layers from what
# bitsandbytes has quantized. Products are computed in bf16 on a GPU of compute capability 8.0 or more, and in fp32 on a CPU or
# an older card such as the T4.

# %% tags=["experiment"]
from peftlab import comparison, settings, tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import compute_dtype, find_device

device = find_device()
COMPUTE = compute_dtype(device)


def quantize(linear: nn.Linear, double: bool = True) -> NF4Linear:
    """Return the layer in NF4, quantized by bitsandbytes."""
    return NF4Linear(*bitsandbytes_nf4(linear.weight, double), linear.weight.shape, COMPUTE)


# %% tags=["experiment"]
from bitsandbytes.functional import quantize_blockwise

original, tokenizer = load_smollm2()
linears = [module for name, module in original.named_modules() if name.endswith("_proj")]
linears = linears[: settings.examples(len(linears))]
stored = dict.fromkeys(("fp32", "bf16", "8 bits", "NF4", "NF4, double"), 0)
for linear in linears:
    weight = linear.weight.detach()
    codes, state = quantize_blockwise(weight, blocksize=64)
    stored["fp32"] += tensor_bytes([weight])
    stored["bf16"] += tensor_bytes([weight.bfloat16()])
    stored["8 bits"] += tensor_bytes([codes, state.absmax])
    for name, double in (("NF4", False), ("NF4, double", True)):
        packed, statistics, _ = bitsandbytes_nf4(weight, double)
        stored[name] += tensor_bytes([packed, *statistics])

# %% tags=["experiment"]
count = sum(linear.weight.numel() for linear in linears)
for name, size in stored.items():
    print(f"{name:<12}{size / MEBIBYTE:8.1f} MiB, {size / count:.4f} bytes a parameter, {size / stored['bf16']:6.1%} of bf16")
my_bytes.compare(stored["NF4, double"] / count)
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.barh(list(stored), [size / MEBIBYTE for size in stored.values()], color=plots.COLOURS["parameters"])
axes.invert_yaxis()
axes.set(title=f"SmolLM2-135M: the weights of {len(linears)} linear layers", xlabel="MiB")
plots.show(
    figure,
    alt="Five bars, each about half of the one above it, from fp32 down to NF4; double quantization shortens it a little.",
)

# %% [markdown]
# Now a whole training step, by category. `qlora` makes plain LoRA as well, from a "quantizer" that does not quantize.


# %% tags=["experiment"]
class Unquantized(nn.Module):
    """A frozen linear layer that looks like a quantized one: with it, `qlora` is LoRA."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed, self.shape = linear.weight, tuple(linear.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed)


def prepared(method: str) -> Llama:
    """Return SmolLM2 on the device, ready to be trained with a method."""
    model, _ = load_smollm2()
    model.to(device, COMPUTE)
    if method != "full":
        qlora(model, quantize if method.startswith("QLoRA") else Unquantized)
    set_gradient_checkpointing(model.train(), "checkpointing" in method)
    return model


# %% tags=["experiment"]
reviews = tasks.movie_reviews(tokenizer)
batch = list(reviews.train.select(range(settings.rows(16))))
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(batch))
measured: dict[str, StepMemory] = {}
for method in ("full", "LoRA", "QLoRA", "QLoRA, checkpointing"):
    model = prepared(method)
    measured[method] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

# %% tags=["experiment"]
print(step_table(measured))
title = f"One training step of SmolLM2-135M, {input_ids.shape[0]} × {input_ids.shape[1]} tokens, computed in {str(COMPUTE)[6:]}"
plots.show(
    plots.memory_bars(measured, title),
    alt="Four stacked bars: LoRA drops gradients and optimizer state, QLoRA shrinks the weights, checkpointing the activations.",
)

# %% [markdown]
# *What to see.* Each method takes away one colour. LoRA: gradients and optimizer state. QLoRA: most of the weights; what is
# left of the blue is mostly the embedding, a fifth of this small model. Checkpointing: most of the green. It keeps each decoder
# layer's input and computes the layer again in backward, so your layers are dequantized three times in a step. (The frozen
# embedding does no harm with the kind of checkpoint that our LLaMA uses; unit 03 has the kind where it does.)
#
# The optimizer's state can be stored in eight bits as well. With LoRA it is small; unit 15 builds such an optimizer for those
# who train many parameters.
#
# ## 5. On a real model
#
# Quantizing changes the model before anything is learned. How much?

# %% tags=["experiment"]
general = tasks.general_text(tokenizer)
model, _ = load_smollm2()
model.to(device)
print(
    f"as it was:   reviews right {reviews.evaluate(model):.1%}, loss on newspaper sentences {tasks.mean_loss(model, general):.3f}"
)
qlora(model, quantize)
print(
    f"in four bits: reviews right {reviews.evaluate(model):.1%}, loss on newspaper sentences {tasks.mean_loss(model, general):.3f}"
)

# %% [markdown]
# LoRA started from the model as it was; QLoRA starts from here, and has something to make up for. Fine-tune it, with the
# learning rate that the shipped comparison chose. About two minutes on two CPU cores.

# %% tags=["experiment"]
from safetensors.torch import save_file

from peftlab.training import fine_tune, trainable, twenty_steps

known = comparison.rows("qlora", "movie_reviews")
learning_rate = comparison.chosen_rate(known) if known else 3e-4
torch.manual_seed(0)
model, tokenizer = load_smollm2()
model.to(device, COMPUTE)
total = sum(parameter.numel() for parameter in model.parameters())  # before the weights become bytes
qlora(model, quantize, rank=8, alpha=16.0)
total += sum(parameter.numel() for parameter in trainable(model).values())
row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="qlora",
    save=lambda path: save_file({name: tensor.detach().contiguous() for name, tensor in trainable(model).items()}, path),
    steps=40, learning_rate=learning_rate, rank=8, alpha=16.0, total_parameters=total,
)  # fmt: skip

# %% tags=["experiment"]
print(
    f"learning rate {learning_rate:g}: {row.score_before:.1%} -> {row.score_after:.1%} of {len(reviews.test)} reviews, "
    f"{row.trainable_parameters:,} trained, {row.adapter_bytes / 1e6:.1f} MB file,\n"
    f"{row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}, peak {row.memory.peak / MEBIBYTE:,.0f} MiB"
)
lora_rows = comparison.rows("lora", "movie_reviews")
curves = {"QLoRA, here": row.losses}
if lora_rows:
    curves["LoRA, shipped"] = comparison.summary(lora_rows).row.losses
plots.show(
    plots.loss_curves(curves, "Training loss on movie_reviews"),
    alt="Loss curves of QLoRA and of LoRA, which fall alike although one of them computes with weights of four bits.",
)

# %% [markdown]
# The rows that come with the course: both tasks, three seeds at the rate that was chosen for each method. ("Not measured yet"
# names what has no such rows.)

# %%
from peftlab import comparison

COMPARED = {"QLoRA, rank 8": ("qlora", ""), "LoRA, rank 8": ("lora", ""), "full": ("full", "")}
shipped = plots.show_comparison(COMPARED, "qlora")

# %%
for task in comparison.TASKS:
    if {(task, "QLoRA, rank 8"), (task, "LoRA, rank 8")} <= shipped.keys():
        ours, lora = (comparison.summary(shipped[task, name]) for name in ("QLoRA, rank 8", "LoRA, rank 8"))
        print(
            f"{task}: QLoRA's mean score less LoRA's {100 * (ours.score - lora.score):+.1f} points; "
            f"their spreads over seeds are {100 * ours.spread:.1f} and {100 * lora.spread:.1f}"
        )

# %% [markdown]
# *What to see.* Compare the difference of the means with the spreads beside it. Dettmers et al. find no loss against 16 bits
# (section 4). In these rows QLoRA ends a point below LoRA on reviews, and three below on tool calls, where LoRA's own three
# seeds lie ten points apart. Three seeds cannot tell such a difference from luck. (The copy of SmolLM2 that pip installs has
# been quantized once before; see unit 09.)
#
# Luck, or four bits, or too short a run? The last can be tried, on tool calls alone: 120 steps for both, twice as many as
# above, with a sweep and three seeds of their own.

# %%
longer = comparison.select({"QLoRA, 120 steps": ("qlora", "long"), "LoRA, 120 steps": ("lora", "long")})
print(comparison.sweep_table(longer))
print(comparison.score_table(longer))

# %% [markdown]
# *What to see.* With 120 steps both write nearly every call right, with every seed, and the three points are gone. These rows
# show that 4-bit weights do not stop the model from learning this task. They do not tell whether the three points were luck or
# a slower start.
#
# ### Slower or faster?
#
# QLoRA reads fewer bytes, and it has more to do. Time a step with both, on a batch of few tokens and on one of many.

# %% tags=["experiment"]
from peftlab.training import seconds_of


def seconds_a_step(model: nn.Module, rows: int) -> float:
    """Return the fastest of some steps of forward and backward on the first rows of the batch."""

    def step() -> None:
        causal_loss(model, input_ids[:rows], labels[:rows]).backward()

    taken = []
    for _ in range(settings.steps(4)):
        taken.append(seconds_of(step, device))
        model.zero_grad()
    return min(taken)


# %% tags=["experiment"]
timed = {method: prepared(method) for method in ("LoRA", "QLoRA")}
ratios = {}
for rows in sorted({1, settings.rows(4), len(input_ids)}):
    seconds = {method: seconds_a_step(model, rows) for method, model in timed.items()}
    more, ratios[rows] = seconds["QLoRA"] - seconds["LoRA"], seconds["QLoRA"] / seconds["LoRA"]
    print(
        f"{rows:>3} × {input_ids.shape[1]} tokens: LoRA {seconds['LoRA']:.2f} s, QLoRA {seconds['QLoRA']:.2f} s, "
        f"{ratios[rows]:.2f} times as long, {more:+.2f} s"
    )
my_seconds.compare(ratios[1])

# %% [markdown]
# *What to see.* On a CPU the ratio falls as the batch grows, and the seconds that are added change little. Dequantizing costs
# the same for one token as for a thousand. So QLoRA trades time for memory, and pays least when that memory is spent on a
# larger batch. (open-instruct issue 109 and qlora issue 249 ask about it.)
#
# On a large GPU it is different. These steps of forward and backward were timed there, with this unit's solution, in bf16:

# %%
from peftlab import gpu

for name, found in gpu.proofs("training steps").items():
    for batch in ("16 x 29", "4 x 512"):
        lora, qlora_step = (found[f"{kind}, {batch}"]["ours"]["seconds"] for kind in ("LoRA", "QLoRA"))
        print(f"{name}, {batch} tokens: LoRA {lora:.2f} s, QLoRA {qlora_step:.2f} s, {qlora_step / lora:.1f} times as long")

# %% [markdown]
# *What to see.* Four times as many tokens take no longer, with either method, and the ratio does not fall. This model is too
# small for the card: the GPU waits for Python, which launches one operation after the other. So what counts is how many
# operations there are.
#
# ### One kernel instead of many  ·  optional, about 15 minutes
#
# On a GPU each operation is a *kernel* that has to be launched; it reads its inputs from memory and writes its result back.
# Count those in your `dequantize_nf4`, without views.

# %% tags=["experiment"]
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch carries out in a block, without views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += not operation.is_view
        return operation(*arguments, **(keywords or {}))


side = 576 if settings.short() else 4096
packed, (absmax,), levels = bitsandbytes_nf4((0.02 * torch.randn(side, side)).to(device, COMPUTE), double=False)
given = (packed, absmax, levels, (side, side), COMPUTE)
with Operations() as operations:
    dequantize_nf4(*given)
print(f"your dequantize_nf4: {operations.count} operations")

# %% [markdown]
# `torch.compile` turns a whole function into one program: C++ for a CPU, Triton for a GPU. It works best on one expression of
# whole tensors. In section 1 that took too much memory; a compiled expression keeps nothing that is computed on the way.


# %% tags=["experiment"]
def one_expression(packed, absmax, levels, shape, dtype, block_size=64):
    """Return level times absmax, each operation on all weights at once."""
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return (table[packed.flatten().int()].view(-1, block_size) * absmax[:, None]).to(dtype).view(shape)


def compiled(function: Callable) -> Callable | None:
    """Return the function, compiled and tried; None where it cannot be compiled, which is said."""
    fast = torch.compile(function, dynamic=False)
    try:
        same = torch.equal(fast(*given), dequantize_nf4(*given))
    except Exception as error:  # what is missing differs from system to system
        print(f"not compiled here: {type(error).__name__}, {(str(error).splitlines() or [''])[0][:100]}")
        return None
    assert same, "the compiled function gives other weights"
    return fast


forms = {"yours": dequantize_nf4, "one expression": one_expression}
forms |= {f"{name}, compiled": compiled(form) for name, form in forms.items()}

# %% tags=["experiment"]
from torch._inductor.utils import run_and_get_code

if forms["one expression, compiled"] is not None:
    torch.compiler.reset()
    _, programs = run_and_get_code(torch.compile(one_expression, dynamic=False), *given)
    lines = programs[0].splitlines()
    heads = [number for number, line in enumerate(lines) if "void  kernel(" in line or line.startswith("def triton_")]
    print(f"{len(heads)} kernels. The end of the last one, which makes the weights:\n")
    ends = [number for number, line in enumerate(lines) if line.startswith("'" * 3) and number > heads[-1]]
    print("\n".join(lines[max(heads[-1], ends[0] - 24) : ends[0]]))

# %% [markdown]
# Read it: a loop over all weights. A byte, a level and an absmax are loaded, multiplied, cast and stored. Now the time, beside
# bitsandbytes' own kernel:

# %% tags=["experiment"]
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

_, state = quantize_4bit((0.02 * torch.randn(side, side)).to(device, COMPUTE), quant_type="nf4", compress_statistics=False)
works = {"bitsandbytes": lambda: dequantize_4bit(packed, state)}
works |= {name: lambda form=form: form(*given) for name, form in forms.items() if form is not None}
taken = {name: [] for name in works}
for _ in range(settings.steps(12)):
    for name, work in works.items():
        taken[name].append(seconds_of(work, device))
for name, seconds in taken.items():
    fastest = min(seconds)
    print(f"{name:<26}{1e3 * fastest:8.2f} ms, {fastest / min(taken['bitsandbytes']):6.2f} times bitsandbytes'")

# %% [markdown]
# The same on GPUs (`one table` is the expression above, `as written` this unit's solution), then a whole training step.

# %%
for name, found in gpu.proofs("dequantize").items():
    for side in ("576 x 576", "4096 x 4096", "11008 x 4096"):
        forms_there = ("bitsandbytes", "as written", "as written, compiled", "one table", "one table, compiled")
        times = ", ".join(f"{form} {found[f'{form}, {side}']['microseconds']:.0f}" for form in forms_there)
        print(f"{name}, {side}, microseconds: {times}")
for name, found in gpu.proofs("training steps").items():
    for kind in ("LoRA", "QLoRA", "QLoRA compiled"):
        for batch in ("16 x 29", "4 x 512"):
            if f"{kind}, {batch}" in found:
                print(f"{name}, {kind}, {batch}: a step takes {found[f'{kind}, {batch}: ours over peft']:.2f} of peft's time")

# %% [markdown]
# *What to see.* On the H200 the solution, which works in parts, takes fifteen times as long as bitsandbytes' kernel. Compiled
# as one expression it takes about 40 microseconds more, whether the weight is small or large. So its loop over the weights is
# as fast, and what remains is the way from Python to the launch. A compiled step of QLoRA takes no longer than peft's on
# bitsandbytes. On a CPU there is nothing to launch: compare your own lines above.
#
# ## 6. Merging, or not  ·  1 point, about 10 minutes, ●○○
#
# After training one would like a plain model again. `merged_weight` returns $\hat W + \frac{\alpha}{r} B A$ of a layer:
#
# - it takes $\hat W$ from `layer.base.dequantized()`, which has rounded it to the compute dtype already; it does not change
#   that tensor;
# - it adds in fp32, and rounds once more, to the dtype that is asked for.
#
# Note the hat. The factors were trained beside $\hat W$, not beside the original $W$, and made up for some of the difference.
# Merged into $W$, they would correct an error that is not there (peft issue 2105).


# %% nbgrader={"grade": false, "grade_id": "merged-weight", "locked": false, "schema_version": 3, "solution": true, "task": false}
def merged_weight(layer: QLoRALinear, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
    """Return the dequantized weight plus the scaled update, without a gradient; the layer is not changed."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        update = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
        return (layer.base.dequantized() + update).to(dtype)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-merged-weight", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_merged_weight(merged_weight)

# %% [markdown]
# Into how many bits? Merge the model of section 5 into 32 bits, into 16, and back into four. Predict the order, and where the
# gap will be.

# %%
# A list of "fp32", "bf16" and "NF4, again":
my_order = predict("the merges by change, the least first", None)

# %% tags=["experiment"]
few = reviews.test.select(range(settings.examples(240)))
layers = {name: module for name, module in model.named_modules() if isinstance(module, QLoRALinear)}


def back_to_four_bits(weight: Tensor) -> NF4Linear:
    """Return the layer of a weight that is quantized to NF4 again."""
    return NF4Linear(*bitsandbytes_nf4(weight), weight.shape, torch.float32)


MERGES = {
    "fp32": lambda weight: weight,
    "bf16": lambda weight: weight.bfloat16().float(),
    "NF4, again": lambda weight: back_to_four_bits(weight).dequantized(),
}

# %% tags=["experiment"]
print(f"{'adapter':<12} reviews right {reviews.score(model, few):.1%}, newspaper loss {tasks.mean_loss(model, general):.4f}")
changes = {}
for name, rounded in MERGES.items():
    plain, _ = load_smollm2()
    off = size = lost = 0.0
    for layer_name, layer in layers.items():
        merged = merged_weight(layer)
        used, update = rounded(merged), merged - layer.base.dequantized().float()
        plain.get_submodule(layer_name).weight = nn.Parameter(used, requires_grad=False)
        off, size = off + (used - merged).pow(2).sum().item(), size + update.pow(2).sum().item()
    plain.to(device)
    changes[name] = (off / size) ** 0.5 if size else 0.0
    print(
        f"{name:<12} reviews right {reviews.score(plain, few):.1%}, newspaper loss {tasks.mean_loss(plain, general):.4f}; "
        f"rounding is {changes[name]:.3f} times the update"
    )
my_order.compare(sorted(changes, key=changes.get))

# %% tags=["experiment"]
same = [(back_to_four_bits(merged_weight(layer)).packed == layer.base.packed).float().mean() for layer in layers.values()]
print(f"NF4, again: {torch.stack(same).mean():.2%} of the packed bytes are those from before training, in the mean over layers")

# %% [markdown]
# *What to see* (at full length; in a short run the update is too small for these ratios to mean anything). Training moved most
# weights by far less than half the distance between two levels of NF4. So rounding puts nearly every weight back on its old
# level, and what comes out is the model from before training. The grid of bf16 is finer: compare its line. peft warns of
# merging into a 4-bit layer (issue 2321). Either serve the 4-bit base *with* the adapter beside it, two thin products more in
# each layer, or merge into 16 bits and serve a 16-bit model.
#
# ## 7. Seven and sixty-five billion, on paper
#
# The paper's introduction says: full fine-tuning of the 65B model takes more than 780 GB, QLoRA less than 48. Its section 2 has
# numbers for 7B, batch size 1: the 4-bit base 5,048 MB, LoRA's weights 26 MB, "input gradients" 567 MB, and with gradient
# checkpointing 18 MB a sequence. Can *your* layers reproduce these? With fake tensors (unit 01) your own code runs at full
# size, and nothing is allocated.

# %% tags=["experiment"]
from peftlab.simulate import RECIPES, simulate_training_step

GB, MB = 1e9, 1e6


def simulated(name: str, rank: int = 16, double: bool = True, **settings: object) -> StepMemory:
    """Return the bytes of a step of QLoRA, with your layers; the factors, like the rest, in bf16."""

    def prepare(model: Llama) -> None:
        qlora(model, lambda linear: on_paper(linear, double), rank, dtype=torch.bfloat16)

    return simulate_training_step(PRESETS[name], prepare, **settings)


# %% tags=["experiment"]
tokens = round(18 * MB / (2 * 4096 * 32))
print(f"18 MB are the inputs of 32 layers, 4,096 numbers of 2 bytes for each token, for {tokens} tokens")
config = PRESETS["LLaMA-7B"]
embeddings = 2 * config.vocab_size * config.hidden_size  # embedding and head
for kind, double in (("with", True), ("without", False)):
    step = simulated("LLaMA-7B", double=double, sequence_length=tokens)
    base = step.parameters - step.gradients  # less the factors, which are as large as their gradients
    print(
        f"4-bit base {kind:<8}double quantization: {base / MB:,.0f} MB with embedding and head in bf16, "
        f"{(base + 2 * embeddings) / MB:,.0f} MB in fp32 (paper 5,048)"
    )

# %% tags=["experiment"]
print(f"0.2% of the weights in bf16: {2 * 0.002 * 6_738_415_616 / MB:.0f} MB (paper 26)")
each_rank = step.gradients // (2 * 16)  # bf16, and rank 16
for rank in (8, 16, 64):
    print(f"LoRA of rank {rank:>2} on all linear layers, in bf16: {2 * rank * each_rank / MB:.0f} MB")
for length in (tokens, 512):
    kept, again = (
        simulated("LLaMA-7B", sequence_length=length, checkpointing=checkpointing).activations
        for checkpointing in (False, True)
    )
    logits = 4 * length * config.vocab_size
    print(
        f"activations for {length:>3} tokens: {kept / MB:,.0f} MB (paper 567), with checkpointing {again / MB:.0f} MB (paper 18), "
        f"of which {logits / MB:.0f} MB are the logits in fp32"
    )

# %% [markdown]
# *What to see*, line by line.
#
# - **18 MB.** With checkpointing each layer's input remains. The paper's 18 MB fit a sequence of the length in the first line.
#   For that length your measurement gives as much, and the logits on top.
# - **567 MB.** For the same length we find less. The code of 2023 kept attention's $s \times s$ matrices, and fp32 copies in
#   norms and in LoRA's path. Ours has one operation for attention and casts the factors. What the paper calls input gradients
#   are these tensors.
# - **26 MB** is a nominal share, 0.2% of the weights; the ranks that are used with all linear layers take more.
# - **5,048 MB** is more than any of our four. The paper does not say what was counted besides codes and statistics, so we leave
#   it open.

# %% tags=["experiment"]
full = RECIPES["bf16, fp32 moments"].measure(PRESETS["LLaMA-65B"], checkpointing=True)
stays = full.parameters + full.gradients + full.optimizer_state
print(f"65B in full: {stays / GB:,.0f} GB for weights, gradients and moments (paper: more than 780)")
for checkpointing in (False, True):
    step = simulated("LLaMA-65B", 64, sequence_length=512, checkpointing=checkpointing)
    print(
        f"65B with QLoRA, rank 64, 512 tokens, checkpointing {checkpointing!s:<5}: weights {step.parameters / GB:.1f} GB, gradients "
        f"{step.gradients / GB:.1f}, optimizer {step.optimizer_state / GB:.1f}, activations {step.activations / GB:.1f}, peak {step.peak / GB:.1f}"
    )

# %% [markdown]
# *What to see.* 780 GB are 12 bytes a parameter: weights and gradients in 16 bits, Adam's moments in 32. QLoRA's peak is below
# 48 GB *with* checkpointing, and above without. The optimizer matters, too: the moments here are in bf16 like the factors, and
# in fp32 they would take twice as much. The paper pages them (unit 15).
#
# Does a real card agree? These steps were taken on real cards: this unit's solution, rank 64, 512 tokens, checkpointing, AdamW,
# with random codes, on which bytes do not depend.

# %% tags=["experiment"]
for name in ("LLaMA-7B", "LLaMA-13B", "LLaMA-65B"):
    for card, found in gpu.proofs(name).items():
        here, on_paper_bytes = found["here"], found["simulated"]
        print(
            f"{name:<10}{card:<22} weights {here['parameters'] / GB:6.2f} GB, activations {here['activations'] / GB:.2f}, peak "
            f"{here['peak'] / GB:6.2f} (simulated {on_paper_bytes['peak'] / GB:6.2f}), given out by the allocator {found['allocated at the peak'] / GB:6.2f}"
        )

# %% [markdown]
# *What to see.* The allocator gave out less than 48 GB for 65 billion parameters: the paper's claim, on a real card. The
# simulated peaks are off by less than 5,000 bytes.

# %% [markdown]
# ## 8. The same thing in peft and bitsandbytes
#
# Is it *QLoRA*, or something like it? Below, a small LLaMA exists twice with the same weights: as `transformers` model with
# bitsandbytes' `Linear4bit` and peft's LoRA, and as our `Llama` with your layers. `four_bits` holds a work-around. Where a CPU
# has AVX512-BF16, bitsandbytes 0.50.2 repacks a weight at its first forward pass in `eval` mode, for good. Training afterwards
# silently drops the gradient through the base, and dequantizing returns garbage. On such a CPU it also misreads a weight whose
# rows are not whole blocks, so all sizes here are multiples of 64.

# %% tags=["experiment"]
import warnings
from dataclasses import asdict, replace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM


# %% tags=["experiment"]
def four_bits(linear: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 4-bit layer with the weight of a linear layer."""
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=COMPUTE, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.support_avx512bf16_for_cpu = False  # the work-around: before the first forward pass
    return layer.to(device)


# %% tags=["experiment"]
def library_model(ours: Llama) -> nn.Module:
    """Return peft's LoRA on bitsandbytes' layers, on transformers' model with the weights of ours."""
    theirs = LlamaForCausalLM(HubConfig(**asdict(ours.config), use_cache=False))
    theirs.load_state_dict(ours.state_dict())
    theirs.tie_weights()
    for name, linear in list(theirs.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name in ALL_LINEAR:
            setattr(theirs.get_submodule(parent), own_name, four_bits(linear))
    theirs.is_loaded_in_4bit = True  # by which peft knows
    with warnings.catch_warnings():  # for a model in 4 bits peft asks transformers for something under an old name
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR))
    return theirs.to(device)


# %% tags=["experiment"]
def same_factors(ours: Llama, theirs: nn.Module) -> None:
    """Copy peft's factors into ours."""
    factors = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in theirs.state_dict().items()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in trainable(ours).items():
            parameter.copy_(factors[name])


# %% tags=["experiment"]
torch.manual_seed(0)
ours = Llama(replace(PRESETS["tiny"], intermediate_size=192))
theirs = library_model(ours)
qlora(ours.to(device), quantize)
same_factors(ours, theirs)
pair = (ours.model.layers[0].mlp.up_proj.base, theirs.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer"))
read_back = bitsandbytes.functional.dequantize_4bit(pair[1].weight.data, pair[1].weight.quant_state).to(COMPUTE)
print("dequantized weights equal in every bit:", torch.equal(pair[0].dequantized(), read_back))

# %% tags=["experiment"]
settings_of_both = {
    "learning_rate": 1e-2,
    "device": device,
    "batches": 1,
}  # one batch, learned by heart: the loss has a long way to go
our_losses = twenty_steps(trainable(ours).values(), lambda ids: causal_loss(ours, ids, ids), **settings_of_both)
their_losses = twenty_steps(trainable(theirs).values(), lambda ids: theirs(input_ids=ids, labels=ids).loss, **settings_of_both)

# %% [markdown]
# How far apart may they be? A model that learns nothing is apart by the whole way that the loss comes down, so measure the
# difference as a share of it. bf16 keeps 8 significant bits, fp32 24; so more is allowed in bf16.

# %% tags=["experiment"]
way = their_losses[0] - their_losses.min()
apart = ((our_losses - their_losses).abs().max() / way).item()
print(f"first losses {our_losses[0]:.6f} and {their_losses[0]:.6f}, last {our_losses[-1]:.6f} and {their_losses[-1]:.6f}")
print(f"largest difference of any loss: {apart:.1e} of the way that the loss came down")
allowed = 0.1 if COMPUTE is torch.bfloat16 else 1e-4
assert apart <= allowed, "your QLoRA and the library's have parted ways: run the checks above again"

# %% [markdown]
# Now the bytes: a step of SmolLM2 with each, on the same batch. bitsandbytes keeps its statistics outside of parameters and
# buffers, so they are counted apart and added.

# %% tags=["experiment"]
library_optimizer = bitsandbytes.optim.AdamW8bit
ours = load_smollm2()[0].to(device, COMPUTE)
theirs = library_model(ours).to(COMPUTE).train()
qlora(ours, quantize, dtype=COMPUTE)
same_factors(ours.train(), theirs)


def library_loss() -> Tensor:
    """Return the loss of the labels, with transformers' decoder."""
    inner = theirs.base_model.model
    hidden = inner.model(input_ids).last_hidden_state[:, :-1]
    counted = labels[:, 1:] != -100
    return nn.functional.cross_entropy(inner.lm_head(hidden[counted]).float(), labels[:, 1:][counted])


# %% tags=["experiment"]
from dataclasses import replace

states = [module.weight.quant_state for module in theirs.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
statistics = tensor_bytes([part for state in states for part in (state.absmax, state.state2.absmax, state.offset, state.code)])
side_by_side = {}
for optimizer_name, optimizer_class in (("AdamW", torch.optim.AdamW), (library_optimizer.__name__, library_optimizer)):
    side_by_side[f"yours, {optimizer_name}"] = measure_training_step(
        ours, lambda: causal_loss(ours, input_ids, labels), optimizer_class
    )
    step = measure_training_step(theirs, library_loss, optimizer_class)
    side_by_side[f"peft, {optimizer_name}"] = replace(
        step, parameters=step.parameters + statistics, peak=step.peak + statistics
    )
for name, step in side_by_side.items():
    print(
        f"{name:<22} weights {step.parameters / MEBIBYTE:6.1f}, optimizer {step.optimizer_state / MEBIBYTE:5.1f}, "
        f"activations {step.activations / MEBIBYTE:7.1f}, peak {step.peak / MEBIBYTE:7.1f} MiB"
    )
if device.type == "cpu" and not settings.short():  # with a few tokens, one index more or less decides
    assert side_by_side["yours, AdamW"].peak <= side_by_side["peft, AdamW"].peak

# %% tags=["experiment"]
plots.show(
    plots.memory_bars(side_by_side, f"QLoRA on SmolLM2-135M, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"),
    alt="Four stacked bars, nearly equal in pairs: blue weights, green activations, and an optimizer state that 8 bits shrink.",
)

# %% [markdown]
# *What to see.* The same weights, the same optimizer state, and no more activations. They differ in what they need for a
# moment. Yours needs an index and fp32 values while it dequantizes a layer, or some of its blocks. peft clones every layer's
# output, as a precaution.
#
# ### A larger model
#
# On a GPU your layers take a larger LLaMA from the Hub, one with plain rotary embeddings, such as `HuggingFaceTB/SmolLM2-1.7B`.
# Set `LARGER` below, or the environment variable `PEFTLAB_MODEL`. The weights are read in bf16 into main memory: a free Colab's
# 12.7 GB are enough for 1.7B, too little for 7B.

# %% tags=["experiment"]
import os

from peftlab.llama import LlamaConfig

LARGER = os.environ.get("PEFTLAB_MODEL", "")


# %% tags=["experiment"]
def load_llama(name: str) -> Llama:
    """Return a LLaMA from the Hub, or from a folder, in bf16.

    Raises:
        ValueError: if its rotary embedding is scaled, or its head's size is its own, which our LLaMA does not have.
    """
    theirs = LlamaForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    config = theirs.config
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    if rope.get("rope_type", "default") != "default" or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"{name} has a rotary embedding, or heads, that our LLaMA does not have")
    own = {name: getattr(config, name) for name in LlamaConfig.__dataclass_fields__ if name != "rope_theta"}
    with torch.device("meta"):
        model = Llama(LlamaConfig(**own, rope_theta=rope["rope_theta"]))
    model.load_state_dict(theirs.state_dict(), assign=True)
    model.tie_weights()
    return model


# %% tags=["experiment"]
if LARGER:
    larger = load_llama(LARGER)
    compute = compute_dtype(device)
    qlora(larger, lambda linear: NF4Linear(*bitsandbytes_nf4(linear.weight.to(device)), linear.weight.shape, compute))
    larger.to(device)
    set_gradient_checkpointing(larger.train(), True)
    ids = torch.randint(0, larger.config.vocab_size, (1, settings.examples(512)), device=device)
    step = measure_training_step(larger, lambda: causal_loss(larger, ids, ids), library_optimizer)
    print(
        f"{LARGER}: weights {step.parameters / GB:.2f} GB, activations {step.activations / GB:.2f}, peak {step.peak / GB:.2f} GB"
    )
else:
    print("No larger model was named.")

# %% [markdown]
# ## 9. Bug hunt  ·  1 point, about 10 minutes, ●●○
#
# *After bitsandbytes issue 1569, peft issues 816 and 1149, and TRL pull request 4457.* Somebody prepares a quantized model for
# training, and "the memory consumption is even higher than the bf16 counterpart". peft's function for this freezes the model
# and casts whatever is in 16 bits to fp32. In short:


# %%
def prepare_with_a_bug(model: nn.Module) -> None:
    """Make a model in 16 bits ready for stable training: everything that is not quantized goes to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


# %% [markdown]
# It casts few parameters beside the codes. Measure what that does: a LLaMA of SmolLM2's width with two layers, in bf16, on
# random codes, its factors in bf16 too. It is cast whole, or only a part of it.


# %%
def small_model_in_16_bits() -> Llama:
    """Return two layers of SmolLM2's width in bf16 with 4-bit linear layers of random codes, and LoRA on these."""
    from dataclasses import replace

    torch.manual_seed(0)
    model = Llama(replace(PRESETS["SmolLM2-135M"], num_hidden_layers=2, vocab_size=8_192)).to(torch.bfloat16)
    qlora(model, on_paper, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.packed.random_(256)
            module.absmax.random_(256)
            module.nested_absmax.fill_(0.01)
            module.offset.fill_(0.05)
            module.levels.copy_(torch.linspace(-1, 1, 16))
    return model


# %%
def bytes_after(prepare: Callable[[nn.Module], None]) -> str:
    """Return the bytes of the small model's weights, and of what forward keeps of 64 tokens, after it has been prepared."""
    model, ids, kept = small_model_in_16_bits(), torch.arange(64)[None], {}
    prepare(model)

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = causal_loss(model, ids, ids)  # as long as it lives, so does what is kept
    weights = [*model.parameters(), *model.buffers()]
    for tensor in (*weights, ids, loss):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    parts = {
        name: tensor_bytes([whole_storage(tensor) for tensor in kept.values() if tensor.dtype == dtype]) / MEBIBYTE
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    size = f"weights {tensor_bytes(weights) / MEBIBYTE:5.1f} MiB"
    return f"{size}, kept for backward {parts['fp32']:.2f} MiB in fp32 and {parts['bf16']:.2f} MiB in bf16"


# %%
def casting(*parts: str) -> Callable[[nn.Module], None]:
    """Return a function that casts to fp32 the parameters whose names contain one of these."""

    def prepare(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.data = parameter.data.float()

    return prepare


for name, prepare in {
    "nothing": lambda model: None,
    "everything": prepare_with_a_bug,
    "embedding, factors": casting("embed", "lora"),
    "factors": casting("lora"),
}.items():
    print(f"cast: {name:<19} {bytes_after(prepare)}")

# %% [markdown]
# *What to see.* The embedding has doubled. And what is kept for backward has grown, although no activation was cast. The
# embedding in fp32 makes the whole stream fp32: every layer returns the dtype of its `x`. The third line, which leaves the
# norms alone, shows the same as the second. It is not twice as much, because the logits and the norms' inputs were fp32 before.
# With the factors alone in fp32, their copies in bf16 are kept, which are small.
#
# One thing in that function is worth keeping. Write `prepare_for_training(model)`:
#
# - what receives small updates is in fp32 afterwards (section 3);
# - what receives none keeps its dtype, buffers included, and names do not tell which is which;
# - it works in place: an optimizer that holds the parameters already goes on with them.
#
# <details><summary>The check says that the parameters are new ones</summary>
#
# `parameter.data = ...` changes what is in a parameter; `setattr(module, name, nn.Parameter(...))` makes another.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prepare", "locked": false, "schema_version": 3, "solution": true, "task": false}
def prepare_for_training(model: nn.Module) -> None:
    """Make a model in 16 bits ready for training, in place: no update is rounded away, and nothing grows without need."""
    ### BEGIN SOLUTION
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prepare", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prepare(prepare_for_training)

# %%
print(f"yours: {bytes_after(prepare_for_training)}")

# %% [markdown]
# ## 10. In your own words  ·  2 points, marked by hand
#
# A colleague has fine-tuned a model of 7 billion parameters with QLoRA, and it scores well. For serving he merges the adapter
# and quantizes the result to NF4 again, "as it was in 4 bits all the time". The scores fall back almost to where they were
# before training. He suspects the adapter file, and wants to train again with a higher rank.
#
# In about 120 words: where did the training go? Why would a higher rank not help, and what would you advise him to serve
# instead, at which cost? Refer to at least two numbers that you measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the cause.* The update moves most weights by far less than half the distance between two levels, so
# quantizing again puts them back where they were and undoes the update (quoted from section 6: the last column is about 1, or
# nearly all packed bytes are unchanged). A higher rank does not make the update larger than the grid. *1 point: what to serve.*
# The 4-bit base with the adapter beside it (two thin products a layer, the adapter file of some megabytes, no merging), or a
# merge in 16 bits onto the *dequantized* base, which costs four times the bytes (section 4: bytes a parameter). At least one,
# with its cost in a number. Half points for either part without a number.
#
# **A full answer.** The base lies on NF4's grid, and training moved each weight by very little, most of them by far less than
# half the way to the next level. Quantizing again moves them back: in section 6 that rounding was about as large as the whole
# update (the ratio in the last column), and nearly all packed bytes were the old ones (the share below it). So what he serves
# is almost the 4-bit model from before training. The file is fine: with the adapter beside the 4-bit base the score is there. A
# higher rank allows more directions, not larger changes, and the grid stays as coarse. I would serve the 4-bit base, about 0.52
# bytes a parameter, and the adapter beside it, a few megabytes and two thin products in each layer. If that is too slow, merge
# into bf16, whose grid is finer (its line in section 6); but then it takes 2 bytes a parameter, and the merge must start from
# the dequantized weights, for these are what the adapter was trained with.
#
# **An answer worth one point.** Quantizing again makes rounding errors, and these are as large as the LoRA update, so the
# training is lost. He should not merge, and keep the adapter separate.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A 4-bit layer that equals bitsandbytes' to the bit and keeps nothing but its codes. LoRA on it that equals peft's. And the
# bytes of all of it, measured from 135 million parameters to 65 billion. Unit 11 sets every method side by side; unit 15 has
# the optimizer in eight bits.
#
# ## Sources
#
# - Dettmers et al. (2023), *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314: section 2 has the memory figures
#   for 7B, section 3 the method and paged optimizers.
# - Hu et al. (2022), *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
# - Chen et al. (2016), *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174: gradient checkpointing.
# - peft issues [816](https://github.com/huggingface/peft/issues/816), [1149](https://github.com/huggingface/peft/issues/1149),
#   [2105](https://github.com/huggingface/peft/issues/2105), [2321](https://github.com/huggingface/peft/issues/2321);
#   bitsandbytes issue [1569](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1569); TRL pull request
#   [4457](https://github.com/huggingface/trl/pull/4457).
# - On speed: open-instruct issue [109](https://github.com/allenai/open-instruct/issues/109), qlora issue
#   [249](https://github.com/artidoro/qlora/issues/249).
# - The model: Allal et al. (2025), *SmolLM2*, arXiv 2502.02737. The reviews: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and
#   Lee (2005).
