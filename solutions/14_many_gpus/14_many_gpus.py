# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Many GPUs: when one is not enough
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 5 of experiments on two CPU cores | 5 of 5 | 17 | 08_lora, 10_qlora |
#
# A model that is too large for one GPU is shared by several. PyTorch has an engine for that, and it works with LoRA and with
# 4-bit weights. Here you build its core by hand, then use it, and count every byte on the way: what is sharded, what travels
# between the GPUs, and why a frozen weight changes both.
#
# **When you have finished, you can**
#
# 1. say what each of several GPUs holds and sends in a step, for full fine-tuning, LoRA and QLoRA;
# 2. shard a layer by hand, and a model with PyTorch's FSDP2, so that any number of ranks gives the losses of one;
# 3. find the mistakes that make ranks wait for ever, read the same rows, or divide a loss twice.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it on new random numbers, and
# says what is wrong. Where needed, it starts real processes, and may then take a few seconds to find out which mistake it is.
# No GPU is needed. (On Windows use WSL or Colab: the processes are made by forking this one.)

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import inspect
import math
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import barrier, get_rank, get_world_size
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from autograder.checks.many_gpus import (
    check_held_by_rank,
    check_rows_of_rank,
    check_save_trained,
    check_sent_in_step,
    check_shard,
    check_sharded_linear,
    check_train_step,
)
from peftlab import plots, results, settings, tasks
from peftlab.distributed import RankError, Traffic, all_gather, all_reduce, bytes_sent, loss_and_count, reduce_scatter, run
from peftlab.llama import ALL_LINEAR, IGNORE, PRESETS, Llama, set_gradient_checkpointing
from peftlab.memory import tensor_bytes
from peftlab.pretrained import load_smollm2
from peftlab.progress import predict
from peftlab.simulate import RANK_BYTES, RECIPES, RankBytes, Recipe, next_token_loss, simulate_sharded_step

UNIT = "14_many_gpus"

# %% [markdown]
# ## The idea
#
# A training step needs a layer's weights only while that layer computes. So $N$ processes can hold an $N$-th of every weight
# each: their *shards*. They put a layer together for the moment in which they need it. A process is called a *rank*, and has a
# number. Written out for one linear layer, on rank $i$ with its rows of the batch $x_i$ and its shard $W_i$:
#
# | | equation | line of code |
# |---|---|---|
# | forward | $W = [W_0; \dots; W_{N-1}]$, then $y_i = x_i W^T$ | `y = x @ all_gather(shard).T` |
# | backward, for the input | $\partial x_i = \partial y_i\, W$ | `grad_x = grad_y @ all_gather(shard)` |
# | backward, for a trained weight | $\partial W_i = \frac{1}{N} \sum_j (\partial y_j^T x_j)_i$ | `reduce_scatter(grad_y.T @ x) / N` |
#
# `all_gather` puts the shards of all ranks together, and `reduce_scatter` sums over the ranks and gives each its rows; more on
# both below. $\partial x_i$ and $\partial y_i$ belong to rank $i$'s own loss, $\partial W_i$ to the mean of the ranks' losses.
#
# A frozen weight has no third line. So fine-tuning a few parameters changes every count: what GPUs exchange in a step, what
# each of them holds, and which strategy is worth its bytes.
#
# On this machine, processes on the CPU stand for the GPUs. `run(function, 2)` calls a function in two processes at once, which
# are copies of this notebook, and returns what both return. `get_rank` and `get_world_size` are torch.distributed's:


# %%
def introduce_myself() -> str:
    """Return which process this is, and of how many."""
    return f"rank {get_rank()} of {get_world_size()}, process {os.getpid()}"


print(run(introduce_myself, 2))

# %% [markdown]
# ### Three collectives, and a ring
#
# Each GPU has a process of its own, which is called a **rank**. The number of ranks is the **world size** $N$. Ranks exchange
# tensors in **collectives**: all ranks call the same function, and a rank that is early waits for the others. A rank's part of
# a tensor is its **shard**. This unit needs three collectives. $S$ is the bytes of the whole tensor:
#
# | collective | what a rank gives | what a rank gets | what a rank sends |
# |---|---|---|---|
# | all-gather | its shard, `(n, ...)` | the shards of all ranks, one below the other, `(N n, ...)` | $\frac{N-1}{N} S$ |
# | reduce-scatter | a whole tensor, `(N n, ...)` | its shard of the sum over all ranks, `(n, ...)` | $\frac{N-1}{N} S$ |
# | all-reduce | a whole tensor, `(n, ...)` | the whole sum over all ranks, `(n, ...)` | $2 \, \frac{N-1}{N} S$ |
#
# The last column holds if the ranks stand in a **ring**. In each round a rank sends a piece of $S / N$ bytes to the next rank,
# and receives one from the rank before it. After $N - 1$ rounds every piece has been everywhere: that is an all-gather. In a
# reduce-scatter each rank adds its own numbers to a piece before it passes the piece on. An all-reduce is a reduce-scatter and
# then an all-gather, so it sends twice as much. `bytes_sent(collective, size, world_size)` computes the column. Below, four
# ranks on this machine run all three:


# %%
def exchange() -> dict[str, tuple[list[int], list[int]]]:
    """Return what this rank holds before and after each collective."""
    rank = get_rank()
    shard = torch.tensor([rank])
    whole = 10**rank * torch.tensor([1, 2, 3, 4])
    outcomes = {
        "all-gather": (shard, all_gather(shard)),
        "reduce-scatter": (whole, reduce_scatter(whole)),
        "all-reduce": (whole, all_reduce(whole)),
    }
    return {name: (before.tolist(), after.tolist()) for name, (before, after) in outcomes.items()}


# %%
held = run(exchange, 4)


def draw(axes: plt.Axes, name: str) -> None:
    """Draw what four ranks hold before and after a collective."""
    for rank in range(4):
        for side, numbers in enumerate(held[rank][name]):
            first = rank if len(numbers) == 1 else 0  # a shard stands where it stands in the whole tensor
            for place, number in enumerate(numbers, first):
                owner = number if name == "all-gather" else rank
                colour = plots.SERIES[owner] if side == 0 or name == "all-gather" else "#555555"
                left = 6 * side + 1.2 * place
                axes.add_patch(plt.Rectangle((left, -rank), 1.1, 0.8, color=colour))
                axes.annotate(number, (left + 0.55, 0.4 - rank), ha="center", va="center", color="white", fontsize=8)
        axes.annotate(f"rank {rank}", (-0.3, 0.4 - rank), ha="right", va="center", fontsize=8)
    axes.annotate("before", (2.4, 1), ha="center", fontsize=9)
    axes.annotate("after", (8.4, 1), ha="center", fontsize=9)
    axes.set(xlim=(-2, 11), ylim=(-3.2, 1.6), title=name)
    axes.axis("off")


# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
for axes, name in zip(panels, held[0]):
    draw(axes, name)
plots.show(
    figure,
    alt="Four ranks before and after three collectives. All-gather: from one number on each rank to all four on every rank. "
    "Reduce-scatter: from four numbers on each rank to one sum on each. All-reduce: from four numbers to all four sums on each.",
)

# %% [markdown]
# *What to see.* Colours are ranks, and grey is a sum: each of its digits comes from another rank. After a reduce-scatter a rank
# has one of the sums, after an all-reduce it has all of them.

# %% [markdown]
# ## 1. What a step sends  ·  2 points, about 10 minutes, ●●○
#
# Before you choose how to spread a model, count what each rank has to send.
#
# With **data parallel**, every rank holds the whole model and reads its own rows. **ZeRO** (Rajbhandari et al. 2020) shards
# what the ranks would hold several times over. It has three stages, and PyTorch's FSDP is the third:
#
# | strategy | what is sharded | what a rank sends in a training step |
# |---|---|---|
# | `"data parallel"` | nothing | an all-reduce of the gradients |
# | `"ZeRO-1"` | the optimizer's state | a reduce-scatter of the gradients; then each rank updates its own part of the trained parameters, and an all-gather gives all of these to everyone |
# | `"ZeRO-2"` | the gradients, too | as ZeRO-1 |
# | `"ZeRO-3"` | the parameters, too, frozen ones as well as trained | an all-gather of all parameters in forward, another one in backward, and a reduce-scatter of the gradients |
#
# Under ZeRO-3 a layer's parameters are gathered just before the layer computes, and freed right after. Backward gathers them
# once more. It also needs the frozen ones, because a frozen weight still makes the gradient of its layer's input.
#
# **Predict.** Eight ranks fine-tune 7 billion parameters in bf16 with LoRA. Trained are 40 million parameters, 80 MB. How many
# times as many bytes does a rank send under ZeRO-3 as under data parallel?

# %%
my_times = predict("times data parallel's bytes that ZeRO-3 sends, LoRA", None)

# %% [markdown]
# Write `sent_in_step`, which returns the bytes that *each* rank sends in one training step:
#
# - `frozen` and `trained` are the bytes of the model's frozen and of its trained parameters. A gradient has its parameter's
#   dtype, so it has as many bytes. Only trained parameters have gradients.
# - Count the collectives of the table above and nothing else. ZeRO-3 gathers every parameter twice, those of the first and the
#   last layer too.
# - Each collective costs what `bytes_sent` says: `"all_gather"`, `"reduce_scatter"` or `"all_reduce"`. With one rank that is
#   nothing.
# - Do not round: the bytes may have a fraction.
# - Any other strategy raises a `ValueError`, with one rank as well.
#
# An example: two collectives for a tensor of 100 bytes, and four ranks.

# %%
for collective in ("reduce_scatter", "all_reduce"):
    four, one = (bytes_sent(collective, 100, world_size) for world_size in (4, 1))
    print(f"{collective}: {four:g} bytes from each of four ranks; from a single rank {one:g}")

# %% [markdown]
# <details><summary>Which size do I give to `bytes_sent`?</summary>
#
# The bytes of the whole tensor, as if it were on one rank. For a reduce-scatter of the gradients that is `trained`, and the
# function takes care of the number of ranks.
# </details>


# %% nbgrader={"grade": false, "grade_id": "sent-in-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
def sent_in_step(frozen: int, trained: int, world_size: int, strategy: str) -> float:
    """Return the bytes that each rank sends in one training step.

    Args:
        frozen: the bytes of all frozen parameters together.
        trained: the bytes of all trained parameters together; their gradients have as many.
        world_size: how many ranks there are.
        strategy: "data parallel", "ZeRO-1", "ZeRO-2" or "ZeRO-3".

    Raises:
        ValueError: if the strategy is another one.
    """
    ### BEGIN SOLUTION
    if strategy == "data parallel":
        return bytes_sent("all_reduce", trained, world_size)
    gradients = bytes_sent("reduce_scatter", trained, world_size)
    if strategy in ("ZeRO-1", "ZeRO-2"):
        return gradients + bytes_sent("all_gather", trained, world_size)
    if strategy == "ZeRO-3":
        return gradients + 2 * bytes_sent("all_gather", frozen + trained, world_size)
    raise ValueError(f"unknown strategy {strategy!r}")
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-sent-in-step", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_sent_in_step(sent_in_step)

# %% [markdown]
# Three ways to fine-tune 7 billion parameters: all of them in bf16, LoRA on a base in bf16, and QLoRA on a base of 3.6 GB. What
# does each of eight ranks send in a step?

# %%
GB = 1e9
STRATEGIES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
BILLION = 1_000_000_000
METHODS = {  # bytes of the frozen and of the trained parameters
    "full fine-tuning": (0, 2 * 7 * BILLION),
    "LoRA": (2 * 7 * BILLION, 80_000_000),
    "QLoRA": (3_600_000_000, 80_000_000),
}
print(f"{'GB that each of 8 ranks sends in a step':<40}" + "".join(f"{strategy:>15}" for strategy in STRATEGIES))
for method, (frozen, trained) in METHODS.items():
    sent = [sent_in_step(frozen, trained, 8, strategy) / GB for strategy in STRATEGIES]
    print(f"{method:<40}" + "".join(f"{size:>15.2f}" for size in sent))

# %%
frozen, trained = METHODS["LoRA"]
times = sent_in_step(frozen, trained, 8, "ZeRO-3") / sent_in_step(frozen, trained, 8, "data parallel")
my_times.compare(times)

# %% [markdown]
# *What to see.* ZeRO-1 and ZeRO-2 send exactly what data parallel sends, in every row: an all-reduce *is* a reduce-scatter and
# an all-gather, and the update fits in between. So sharding the optimizer's state costs no bytes on the wire.
#
# ZeRO-3 costs full fine-tuning half as much again. LoRA turns this around. Its gradients are small, so data parallel is nearly
# free. But the frozen weights, which never change, travel twice in every step under ZeRO-3. QLoRA sends the codes, and each
# rank unpacks them itself.

# %% [markdown]
# ## 2. What a rank holds  ·  2 points, about 10 minutes, ●○○
#
# Sharding is worth its bytes only if the ranks' memory shrinks by enough.
#
# Write `held_by_rank`. It returns the bytes that a rank holds after backward and before the optimizer's step. Activations, and
# the layer that ZeRO-3 has gathered for a moment, do not count.
#
# - The result is a dict with exactly three keys, `"parameters"`, `"gradients"` and `"optimizer_state"`, in any order.
# - `frozen` and `trained` are bytes of parameters, as in section 1, and a gradient again has its parameter's dtype. Only
#   trained parameters have gradients. `optimizer_state` is the bytes of the optimizer's state for all trained parameters
#   together.
# - A rank holds $1 / N$ of what the strategy shards, and all of the rest. The table in section 1 says what is sharded; each
#   stage of ZeRO adds something to the stage before it.
# - Do not round: the bytes may have a fraction. With one rank nothing is divided.
# - Any other strategy raises a `ValueError`, with one rank as well.
#
# An example: with AdamW's two moments in fp32, what does a model with 1,000 trained parameters in bf16 hold on one rank?

# %%
parameters = torch.zeros(1_000, dtype=torch.bfloat16)
moments = torch.zeros(2, 1_000)
print({"parameters": parameters.nbytes, "gradients": parameters.nbytes, "optimizer_state": moments.nbytes})

# %% [markdown]
# <details><summary>The check says that a number is too large</summary>
#
# ZeRO-2 includes ZeRO-1, and ZeRO-3 includes ZeRO-2. The frozen parameters appear under one key only.
# </details>


# %% nbgrader={"grade": false, "grade_id": "held-by-rank", "locked": false, "schema_version": 3, "solution": true, "task": false}
def held_by_rank(frozen: int, trained: int, optimizer_state: int, world_size: int, strategy: str) -> dict[str, float]:
    """Return the bytes that a rank holds before the optimizer's step: "parameters", "gradients" and "optimizer_state".

    Args:
        frozen: the bytes of all frozen parameters together.
        trained: the bytes of all trained parameters together; their gradients have as many.
        optimizer_state: the bytes of the optimizer's state for all trained parameters together.
        world_size: how many ranks there are.
        strategy: "data parallel", "ZeRO-1", "ZeRO-2" or "ZeRO-3".

    Raises:
        ValueError: if the strategy is another one.
    """
    ### BEGIN SOLUTION
    sharded = {
        "data parallel": [],
        "ZeRO-1": ["optimizer_state"],
        "ZeRO-2": ["optimizer_state", "gradients"],
        "ZeRO-3": ["optimizer_state", "gradients", "parameters"],
    }
    if strategy not in sharded:
        raise ValueError(f"unknown strategy {strategy!r}")
    held = {"parameters": frozen + trained, "gradients": trained, "optimizer_state": optimizer_state}
    for kind in sharded[strategy]:
        held[kind] /= world_size
    return held
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-held-by-rank", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_held_by_rank(held_by_rank)

# %% [markdown]
# The three ways from section 1, on 1, 2 and 8 ranks. AdamW keeps two moments in fp32: 8 bytes for each trained parameter, which
# has 2 bytes itself. A star marks what fits a card of 24 GiB; activations need room on top.

# %%
CARD = 24 * 2**30  # what a card "of 24 GB" has: 25.8 GB
print(f"GB on each rank{'':<21}{'1 rank':>10}{'2 ranks':>10}{'8 ranks':>10}   on 8 ranks: parameters, gradients, state")
for method, (frozen, trained) in METHODS.items():
    for strategy in STRATEGIES:
        line = f"{method:<20}{strategy:<16}"
        for world_size in (1, 2, 8):
            parts = held_by_rank(frozen, trained, 8 * trained // 2, world_size, strategy)
            total = sum(parts.values())
            line += f"{total / GB:>9.2f}{'*' if total <= CARD else ' '}"
        kinds = ("parameters", "gradients", "optimizer_state")
        print(line + "   " + ", ".join(f"{parts[kind] / GB:.2f}" for kind in kinds))
    print()

# %% [markdown]
# *What to see.* Full fine-tuning does not fit one such card. ZeRO-2 on eight ranks brings it below 24 GiB, with 3 GB left for
# activations, because gradients and optimizer state are most of what there is. Under LoRA ZeRO-1 and ZeRO-2 save almost
# nothing: only trained parameters have gradients and states. What is left is the frozen base, which every rank holds whole. Two
# things make that smaller: ZeRO-3 divides it, and QLoRA stores it in 4 bits.
#
# If a LoRA run fits a card, data parallel is enough, because nothing sends less. If the base does not fit, try 4 bits first,
# because they add nothing to what is sent. ZeRO-3 is for a base that is too large even so.

# %% [markdown]
# ## 3. A linear layer in shards  ·  3 points, about 25 minutes, ●●●
#
# FSDP, PyTorch's ZeRO-3, puts each layer together just before it computes, and drops it right afterwards. Here you build that
# for one linear layer. Its three lines are in the table at the top. Two things in them surprise many readers:
#
# - **A frozen layer gathers its weight in backward as well.** Whatever is trained below it needs the gradient of its input, and
#   that takes the whole weight. Only the third line is spared.
# - **Only the gradient of $W$ is divided.** It is summed over the ranks, and the loss is their mean. The gradient of $x_i$
#   belongs to rank $i$'s own loss.
#
# **An example**, by hand, on two ranks. The weight has four rows, so each rank holds two.


# %%
def one_layer_by_hand() -> None:
    """Print what a rank holds, and what it computes with what it gathers."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    shard = weight[2 * get_rank() :][:2].clone()
    x = torch.tensor([[1.0, 10.0 * get_rank()]])  # each rank has another row of the batch
    output = x @ all_gather(shard).T
    grad_weight = torch.ones_like(output).T @ x  # as if the loss were the sum of the output
    print("shard", shard.tolist(), " output", output.tolist())
    print("its gradient of the whole weight", grad_weight.tolist())
    print("the mean over the ranks, its own rows", (reduce_scatter(grad_weight) / get_world_size()).tolist())


_ = run(one_layer_by_hand, 2)

# %% [markdown]
# Write two classes. `GatheredLinear` is a function with a backward of its own, which is called as `GatheredLinear.apply(x,
# shard)`:
#
# - It returns $x_i W^T$. `x` has the shape `(..., in)`, with one leading dimension or more, and the shard's dtype, which may be
#   bf16. Output and gradients have that dtype, too.
# - `forward` calls one all-gather.
# - For `backward`, `forward` keeps `x` and the shard at most. As soon as it has returned, nothing refers to the whole weight:
#   no saved tensor, no attribute. The same holds after `backward`.
# - `backward` returns the gradient of `x` and that of the shard. The first takes one all-gather, the second one reduce-scatter.
# - What needs no gradient gets `None`, and nothing is sent for it. There are no other collectives.
#
# `ShardedLinear(linear)` takes a linear layer without bias, the same one in every rank:
#
# - Its only parameter is `shard`, of shape `(out / world size, in)`: the first rows belong to rank 0, the next to rank 1, and
#   so on. It needs a gradient if the given weight does. There are no buffers.
# - The shard is a copy. Once the given layer is deleted, nothing keeps the whole weight alive.
# - If the rows cannot be dealt evenly, the constructor raises a `ValueError`.
# - `forward` returns `GatheredLinear.apply(x, self.shard)`.
#
# The collectives of `torch.distributed` are right as well.
#
# <details><summary>How does backward know what needs a gradient?</summary>
#
# `ctx.needs_input_grad` has a bool for each argument of `forward` behind `ctx`, in order. `backward` returns as many values.
# </details>
# <details><summary>The check says that something keeps the whole weight alive</summary>
#
# Rows that are cut out of a tensor are a view: they share its memory, and keep all of it. `.clone()` copies them.
# </details>
# <details><summary>The check says that a rank waits for ever</summary>
#
# A collective returns when all ranks have called it. So no condition in front of one may depend on the rank.
# </details>


# %% nbgrader={"grade": false, "grade_id": "sharded-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
class GatheredLinear(torch.autograd.Function):
    """x W^T, where each rank has some rows of W: gathers them in forward, and once more in backward."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*batch in"], shard: Float[Tensor, "rows in"]) -> Float[Tensor, "*batch out"]:
        """Return x W^T, keeping x and the shard for backward."""
        ### BEGIN SOLUTION
        ctx.save_for_backward(x, shard)
        return x @ all_gather(shard).T
        ### END SOLUTION

    @staticmethod
    def backward(
        ctx, grad_output: Float[Tensor, "*batch out"]
    ) -> tuple[Float[Tensor, "*batch in"] | None, Float[Tensor, "rows in"] | None]:
        """Return the gradients of x and of the shard, with None for what needs none."""
        ### BEGIN SOLUTION
        x, shard = ctx.saved_tensors
        grad_x = grad_shard = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ all_gather(shard)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2)
            grad_shard = reduce_scatter(grad_weight) / get_world_size()
        return grad_x, grad_shard
        ### END SOLUTION


class ShardedLinear(nn.Module):
    """A linear layer without bias that keeps this rank's rows of the weight.

    Attributes:
        shard: parameter of shape (out / world size, in).

    Raises:
        ValueError: if the rows of the weight cannot be dealt evenly to the ranks.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        ### BEGIN SOLUTION
        rows, rest = divmod(linear.out_features, get_world_size())
        if rest:
            raise ValueError(f"{linear.out_features} rows cannot be dealt evenly to {get_world_size()} ranks")
        own = linear.weight.detach()[get_rank() * rows :][:rows].clone()
        self.shard = nn.Parameter(own, requires_grad=linear.weight.requires_grad)
        ### END SOLUTION

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x times the transposed weight, of which this rank holds a shard."""
        ### BEGIN SOLUTION
        return GatheredLinear.apply(x, self.shard)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-sharded-linear", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_sharded_linear(GatheredLinear, ShardedLinear)

# %% [markdown]
# `Traffic` notes the collectives that are called in its context, and what each rank sends in them. One step of your layer, on
# two ranks, beside what `bytes_sent` says:


# %%
def sent_by_one_layer(trained: bool) -> dict[str, float]:
    """Return the bytes that this rank sends in one forward and backward, by collective."""
    layer = ShardedLinear(nn.Linear(64, 256, bias=False).requires_grad_(trained))
    x = torch.ones(3, 64, requires_grad=True)
    with Traffic() as traffic:
        layer(x).sum().backward()
    return traffic.sent()


weight_bytes = 4 * 64 * 256
print(f"one all-gather of {weight_bytes:,} bytes: {bytes_sent('all_gather', weight_bytes, 2):,.0f} bytes from each rank")
print(f"one reduce-scatter: {bytes_sent('reduce_scatter', weight_bytes, 2):,.0f}")
for trained in (True, False):
    sent = run(sent_by_one_layer, 2, trained)[0]
    each = ", ".join(f"{collective} {size:,.0f}" for collective, size in sent.items())
    print(f"{'trained' if trained else 'frozen':>8}: {each}; together {sum(sent.values()):,.0f} bytes")

# %% [markdown]
# *What to see.* A trained layer sends three times what one all-gather sends, and a frozen one twice.

# %% [markdown]
# ## 4. The engine  ·  2 points, about 15 minutes, ●●○
#
# PyTorch's FSDP2 does for every layer what yours does, and more: it gathers all weights of a *group* in one message, and frees
# them together. `fully_shard(module, ...)` turns a module into such a group. A group takes the parameters that lie in the
# module and do not belong to a group already. So inner modules come first; torch refuses the other order.
#
# Write `shard(model, mesh, compute_dtype)`, which
#
# - makes each decoder layer in `model.model.layers` a group of its own, and then the model itself, for what is left: the
#   embedding, the final norm and the head;
# - gives each group the mesh (the ranks) and one `MixedPrecisionPolicy`: weights are gathered and used in `compute_dtype`
#   (`param_dtype`), gradients are summed over the ranks in fp32 (`reduce_dtype`);
# - leaves everything else as it is: the dtype of the parameters, what is trained, FSDP's other options;
# - returns the very model that it was given.
#
# Frozen parameters are sharded as well: they are most of the model.
#
# An example: what `fully_shard` makes of a single linear layer, on rank 0 of two. Its weight becomes a `DTensor`, which has the
# shape of the whole and, in `to_local()`, this rank's rows.


# %%
def shard_one_layer() -> list[object]:
    """Return the type, the whole shape and this rank's shape of a sharded layer's weight."""
    layer = nn.Linear(6, 10, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (get_world_size(),)))
    return [type(layer.weight).__name__, tuple(layer.weight.shape), tuple(layer.weight.to_local().shape)]


print(run(shard_one_layer, 2)[0])

# %% [markdown]
# <details><summary>How does the policy get there?</summary>
#
# `fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=..., reduce_dtype=...))`, for the layers and for
# the model.
# </details>


# %% nbgrader={"grade": false, "grade_id": "shard", "locked": false, "schema_version": 3, "solution": true, "task": false}
def shard(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype) -> Llama:
    """Shard a Llama in place, each decoder layer as a group, then what is left; return it.

    Args:
        mesh: of one dimension, all ranks.
        compute_dtype: in which weights are gathered and used; gradients are summed in fp32.
    """
    ### BEGIN SOLUTION
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-shard", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_shard(shard)

# %% [markdown]
# What does a step of the sharded model send? Below, a small Llama with LoRA on all its linear layers (unit 08's layer), in
# fp32.


# %%
class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x, with the base layer frozen (unit 08)."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, rank: int = 8, alpha: float = 16):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


# %%
def with_lora(model: Llama, make_base: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> Llama:
    """Freeze the model, and put LoRA's factors beside each linear layer of its decoder layers."""
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name in ALL_LINEAR:
            adapted = LoRALinear(make_base(linear), linear.in_features, linear.out_features)
            setattr(model.get_submodule(parent), own_name, adapted)
    return model


# %%
def traffic_of_a_step(model: Llama) -> tuple[dict[str, int], dict[str, float], int, int]:
    """Return what a step calls and sends, and the bytes of the frozen and of the trained parameters."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.nbytes
    shard(model, init_device_mesh("cpu", (get_world_size(),)), torch.float32)
    with Traffic() as traffic:
        loss, count = loss_and_count(model, torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))
        (loss / count).backward()
    return traffic.calls(), traffic.sent(), sizes[False], sizes[True]


torch.manual_seed(0)
tiny = with_lora(Llama(PRESETS["tiny"]))
calls, sent, frozen, trained = run(traffic_of_a_step, 2, tiny)[0]
print(f"{len(tiny.model.layers)} decoder layers; calls: {calls}")
print(f"a rank sends {sum(sent.values()):,.0f} bytes; by `sent_in_step`: {sent_in_step(frozen, trained, 2, 'ZeRO-3'):,.0f}")
head_and_embedding = tensor_bytes([tiny.model.embed_tokens.weight, tiny.lm_head.weight, tiny.model.norm.weight])
print(f"half of the model's own group: {head_and_embedding / 2:,.0f}")

# %% [markdown]
# *What to see.* The engine sends less than the formula says, by exactly half of what the model's own group holds. That group is
# gathered once instead of twice: FSDP2 keeps the outermost one gathered from forward to backward, where it would be needed
# first anyway. The other bytes are those of `sent_in_step`, exactly. (In fp32; with bf16 weights our `reduce_dtype` doubles the
# gradients' bytes.)

# %% [markdown]
# ## 5. A step of several micro-batches  ·  2 points, about 20 minutes, ●●●
#
# A rank without room for its rows takes them in micro-batches, and adds up gradients before the optimizer steps. Two things go
# wrong in practice. FSDP reduces the gradients after *every* backward, although the sum is wanted once. And rows have different
# numbers of labels: a mean of means gives a token in a short row more weight (trl issue 2175).
#
# Write `train_step(model, optimizer, batches)`, which every rank calls with its own micro-batches, each a pair of `input_ids`
# and `labels`. The model went through `fully_shard`.
#
# - The gradient is that of the *mean over all labelled tokens* of all micro-batches of all ranks. `loss_and_count(model,
#   input_ids, labels)` returns the summed loss of a micro-batch, and how many labels it counted. FSDP has its own idea of a
#   mean: it adds up the ranks' gradients and divides them by the number of ranks.
# - Gradients are reduced once in a step, in the backward of the last micro-batch. `model.set_requires_gradient_sync(False)`
#   switches that off for the backwards to come, and `True` switches it on.
# - The optimizer steps once. Afterwards no parameter has a gradient.
# - It returns that mean loss, a number, the same on all ranks.
#
# The count of all ranks is needed *before* the first backward, or you have to scale the gradients at the end: both are right.
# `all_reduce(tensor)` returns the sum of the ranks' tensors. A label counts if it is not `IGNORE`; the first position of a row
# is predicted from nothing, so its label does not count.
#
# An example of the counts: two micro-batches of one row each.

# %%
two_batches = [
    (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8]])),
    (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[IGNORE, IGNORE, IGNORE, 8]])),
]
losses, counts = zip(*[loss_and_count(Llama(PRESETS["tiny"]), *batch) for batch in two_batches])
print(f"labels that count: {counts}; the mean of all: {sum(losses).item() / sum(counts):.4f}")
print(f"the mean of the means: {sum(loss.item() / count for loss, count in zip(losses, counts)) / 2:.4f}")

# %% [markdown]
# <details><summary>The check says that the loss is divided twice</summary>
#
# FSDP divides by the number of ranks, and so do you if you divide by the count of all ranks. Multiply the loss by
# `get_world_size()` before backward.
# </details>
# <details><summary>How do I count before the first backward?</summary>
#
# Go through the batches twice. The first time, `(labels[:, 1:] != IGNORE).sum()` is enough; then `all_reduce` what it gives.
# </details>


# %% nbgrader={"grade": false, "grade_id": "train-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]],
) -> float:
    """Update the model by the gradient of the mean loss of all labelled tokens; return that mean.

    Args:
        model: sharded by FSDP2.
        batches: this rank's `input_ids` and `labels`; the ranks have equally many micro-batches.
    """
    ### BEGIN SOLUTION
    count = all_reduce(torch.stack([(labels[:, 1:] != IGNORE).sum() for _, labels in batches]).sum())
    total = torch.zeros((), device=count.device)
    for number, (input_ids, labels) in enumerate(batches, start=1):
        model.set_requires_gradient_sync(number == len(batches))
        loss, _ = loss_and_count(model, input_ids, labels)
        (loss * get_world_size() / count).backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return (all_reduce(total) / count).item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-train-step", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_train_step(train_step)

# %% [markdown]
# ### The same losses on one, two and three ranks
#
# If all of this is right, the number of ranks changes nothing but rounding. Twenty steps with six rows each, dealt to one, two
# or three ranks, two rows at most in a micro-batch:


# %%
def twenty_steps(model: Llama, rows: Int[Tensor, "steps 6 seq"], labels: Int[Tensor, "steps 6 seq"]) -> list[float]:
    """Train a copy of the model on this rank's rows of each step; return the losses."""
    rank, world_size = get_rank(), get_world_size()
    shard(model, init_device_mesh("cpu", (world_size,)), torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for of_step, counted in zip(rows, labels):
        mine = slice(rank, None, world_size)
        batches = list(zip(of_step[mine].split(2), counted[mine].split(2)))
        losses.append(train_step(model, optimizer, batches))
    return losses


# %% tags=["experiment"]
rows = torch.randint(0, 256, (1, 6, 24), generator=torch.Generator().manual_seed(1)).repeat(20, 1, 1)
labels = torch.where(torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)) < 0.6, rows, IGNORE)
by_ranks = {
    world_size: run(twenty_steps, world_size, tiny, rows, labels, seconds=300)[0]
    for world_size in tqdm((1, 2, 3), file=sys.stdout, leave=False)
}
for world_size, losses in by_ranks.items():
    apart = max(abs(a - b) for a, b in zip(losses, by_ranks[1]))
    print(f"LoRA, {world_size} ranks: loss {losses[0]:.4f} to {losses[-1]:.4f}, at most {apart:.0e} from one rank's")
    assert apart < 1e-4, "the number of ranks changes the losses: run the checks above again"

# %% [markdown]
# ### And with a base in four bits  ·  optional, about 10 minutes
#
# QLoRA's weights are not numbers but bytes: two codes in each, and an `absmax` for every 64 weights (unit 10). Nothing keeps
# FSDP2 from sharding bytes: each rank holds some rows of codes, and rows of the `absmax` that belong to them. There are two
# conditions. They have to be parameters, because FSDP does not shard buffers. And the `absmax` are stored as bytes, too: a
# policy would round an fp32 parameter to `compute_dtype`.


# %% tags=["experiment"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes

NF4_LEVELS = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")  # the sixteen numbers of unit 09


# %% tags=["experiment"]
class NF4Linear(nn.Module):
    """A frozen linear layer in NF4, whose codes and absmax are parameters of bytes, a row for each output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        out_features, in_features = linear.weight.shape
        values = linear.weight.detach().view(out_features, in_features // 64, 64)
        absmax = values.abs().amax(-1)
        codes = (values / absmax[..., None])[..., None].sub(NF4_LEVELS).abs().argmin(-1).to(torch.uint8).view(out_features, -1)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        self.packed = nn.Parameter(packed, requires_grad=False)  # (out, in / 2)
        self.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)  # (out, 4 * in / 64): fp32 as bytes

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=-1).flatten(1).long()
        absmax = self.absmax.view(torch.float32)
        weight = NF4_LEVELS[codes].view(*absmax.shape, 64) * absmax[..., None]
        return x @ weight.flatten(1).to(x.dtype).T


# %% tags=["experiment"]
torch.manual_seed(0)
tiny_in_bits = with_lora(Llama(replace(PRESETS["tiny"], intermediate_size=192)), NF4Linear)
set_gradient_checkpointing(tiny_in_bits, True)  # or each layer's unpacked weight waits for backward
by_ranks = {
    world_size: run(twenty_steps, world_size, tiny_in_bits, rows, labels, seconds=300)[0]
    for world_size in tqdm((1, 2, 3), file=sys.stdout, leave=False)
}
for world_size, losses in by_ranks.items():
    apart = max(abs(a - b) for a, b in zip(losses, by_ranks[1]))
    print(f"QLoRA, {world_size} ranks: loss {losses[0]:.4f} to {losses[-1]:.4f}, at most {apart:.0e} from one rank's")
    assert apart < 1e-4, "the number of ranks changes the losses: run the checks above again"

# %% [markdown]
# In FSDP's first version this did not work. FSDP1 joins all parameters of a group into *one* flat tensor. Here is what it says
# to our layers:


# %% tags=["experiment"]
def flatten_as_fsdp1(model: nn.Module) -> str:
    """Return what FSDP's first version says when it is to shard a module."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed
        try:
            FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        except ValueError as error:
            return str(error)
    return "nothing"


mixed = LoRALinear(nn.Linear(64, 64, bias=False), 64, 64)
print("LoRA, a frozen and a trained parameter:", *run(flatten_as_fsdp1, 2, mixed)[:1])
print("NF4, bytes:", *run(flatten_as_fsdp1, 2, NF4Linear(nn.Linear(64, 64, bias=False)))[:1])

# %% [markdown]
# So trained and frozen parameters had to lie in groups of their own, and bytes had to look like floats. bitsandbytes got
# `bnb_4bit_quant_storage`: the codes are stored in a tensor whose dtype *says* bf16, the dtype of the rest of the group. If the
# two dtypes differ, FSDP converts codes as if they were numbers (the README of Answer.AI's `fsdp_qlora` warns of that).

# %% [markdown]
# ## 6. Seventy billion parameters on two cards
#
# Answer.AI's headline in 2024 was a 70B model on two gaming cards of 24 GB. Does it fit? You need no GPU to find out.
# `simulate_sharded_step` runs a training step with fake tensors, as unit 01 did, and with collectives that send nothing, as the
# first of so many ranks. It calls *your* `shard`. First, is it right? A real step of the small model in two real processes,
# every allocation followed, beside the simulation of one of them:


# %% tags=["experiment"]
def measured_step(model: Llama) -> tuple[dict[str, int], int]:
    """Return a rank's bytes by category before a step, and the peak of the step."""
    from peftlab.tracker import PeftMemTracker

    shard(model, init_device_mesh("cpu", (get_world_size(),)), torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tracker = PeftMemTracker()
    tracker.track_external(model, optimizer)
    input_ids = torch.ones(1, 512, dtype=torch.long)
    with tracker:
        next_token_loss(model, input_ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.reset_mod_stats()
        before = tracker.bytes_by_category("current")
        next_token_loss(model, input_ids).backward()
        optimizer.step()
    return before, tracker.bytes_by_category("peak")["Total"] - input_ids.nbytes


# %% tags=["experiment"]
recipe = RECIPES["QLoRA"]
config = PRESETS["tiny"]
with torch.device("meta"):
    model = Llama(config).to(torch.bfloat16)
    recipe.prepare(model)
set_gradient_checkpointing(model, True)
model.to_empty(device="cpu")
for world_size in (2, 3):
    before, peak = run(measured_step, world_size, model)[0]
    simulated = simulate_sharded_step(
        config, recipe.prepare, partial(shard, compute_dtype=torch.bfloat16), world_size=world_size
    )
    for kind, parameters, at_peak in (
        ("measured", before["Parameter"], peak),
        ("simulated", simulated.memory.parameters, simulated.memory.peak),
    ):
        print(f"{world_size} ranks, {kind:<9}: {parameters:>9,} bytes of parameters, {at_peak:>10,} at the peak")

# %% [markdown]
# Equal to the byte. Now the real sizes: Llama-2-70B, a row of 512 tokens for each rank, gradient checkpointing, AdamW with its
# moments in the dtype of what is trained. Rank 16 for LoRA.
#
# **Predict**: how many GB does each of two cards take at the peak, with QLoRA?

# %%
my_peak = predict("GB at the peak of each of two cards", None)

# %% tags=["experiment"]
LARGE, TOKENS = "Llama-2-70B", 512
SETTINGS = [("full", 8), ("full", 32), ("LoRA", 2), ("LoRA", 8), ("QLoRA", 1), ("QLoRA", 2), ("QLoRA", 4)]
in_bf16 = partial(shard, compute_dtype=torch.bfloat16)
rank_rows = []
for method, world_size in tqdm(SETTINGS[-1:] if settings.short() else SETTINGS, file=sys.stdout, leave=False):
    recipe = RECIPES.get(method, Recipe())
    step = simulate_sharded_step(
        PRESETS[LARGE],
        recipe.prepare,
        in_bf16,
        world_size=world_size,
        optimizer_class=recipe.optimizer_class,
        sequence_length=TOKENS,
    )
    held = step.memory
    kept = (held.parameters, held.gradients, held.optimizer_state, held.peak)
    rank_rows.append(RankBytes(LARGE, method, world_size, TOKENS, *kept, sum(step.sent.values())))
results.save_lines(rank_rows, UNIT, RANK_BYTES)

# %% [markdown]
# The course's own rows; a full run of the cell above wrote them:

# %%
rank_rows = results.load_lines(RankBytes, UNIT, RANK_BYTES, results.SHIPPED)
print(f"{'70B, GB a rank':<15}{'ranks':>5}{'parameters':>12}{'gradients':>11}{'state':>7}{'peak':>8}{'sent in a step':>16}")
for row in rank_rows:
    parts = (row.parameters, row.gradients, row.optimizer_state, row.peak, row.sent)
    line = "".join(f"{part / GB:>{width}.1f}" for part, width in zip(parts, (12, 11, 7, 8, 16)))
    print(f"{row.method:<15}{row.world_size:>5}{line}{'  fits 24 GiB' if row.peak <= CARD else ''}")
for row in rank_rows:
    if (row.method, row.world_size) == ("QLoRA", 2):
        my_peak.compare(row.peak / GB)

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
names = [f"{row.method}, {row.world_size}" for row in rank_rows]
left = [0.0] * len(names)
pieces = {"parameters": "parameters", "gradients": "gradients", "optimizer_state": "optimizer state"}
for (piece, label), colour in zip(pieces.items(), plots.SERIES):
    sizes = [getattr(row, piece) / GB for row in rank_rows]
    axes.barh(names, sizes, left=left, color=colour, label=label)
    left = [before + size for before, size in zip(left, sizes)]
rest = [max(0, row.peak / GB - before) for row, before in zip(rank_rows, left)]
axes.barh(names, rest, left=left, color="#bbbbbb", label="more at the peak")
axes.axvline(CARD / GB, color="black", linestyle="--", linewidth=1)
axes.annotate("a card of 24 GiB", (CARD / GB + 3, 1), va="center")
axes.set(title="Llama-2-70B: what each rank holds", xlabel="GB", ylabel="method, ranks")
axes.invert_yaxis()
axes.legend(frameon=False)
plots.show(
    figure, alt="A bar for each method and number of ranks; parts are parameters, gradients, optimizer state and the rest."
)

# %% [markdown]
# *What to see.* The shards fit two cards with QLoRA, and some GB are left for what is not counted here: CUDA's own memory,
# fragments, the buffers of the collectives, longer rows. Answer.AI's command for two cards has always kept the shards in the
# CPU's memory (`--use_cpu_offload true`). So is two times 24 GB enough for 70B? For one short row a rank, on paper, yes; the
# published recipe goes to the CPU. LoRA on a base in bf16 fits eight such cards on paper, with 1.5 GB left for all that is not
# counted. The last column: QLoRA on two ranks sends half of its base, twice in a step.

# %% [markdown]
# ## 7. Save what was trained  ·  2 points, about 15 minutes, ●●○
#
# A file that a rank writes from its memory would hold a part of the adapter. `parameter.full_tensor()` gathers a `DTensor`
# whole.


# %%
def sharded_adapter() -> nn.Module:
    """Return a sharded model with a frozen layer and a trained one, whose three rows are not dealt evenly to two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4, bias=False).requires_grad_(False), nn.Linear(4, 3, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (get_world_size(),)))
    return model


# %% [markdown]
# Now the classic mistake. Rank 0 writes the file, so only rank 0 needs the tensors, so only rank 0 gathers them:


# %%
def only_rank_0_gathers() -> None:
    """Gather in one rank of two."""
    model = sharded_adapter()
    if get_rank() == 0:
        model[1].weight.full_tensor()


try:
    run(only_rank_0_gathers, 2)
except RankError as error:
    print(error)

# %% [markdown]
# `full_tensor` is a **collective**: it returns when all ranks have called it. Rank 0 waits for rank 1's rows, which are never
# sent. Here `run` notices that rank 1 has ended. If it were alive, in another collective or in the next step, the job would
# stand still until a time-out.
#
# Write `save_trained(model, path)`. `model` has been through `fully_shard`, and every rank calls the function.
#
# - All ranks gather each parameter that needs a gradient, once. They gather no frozen one: that would send the whole base.
# - Rank 0, and no other, writes a file in safetensors format. It holds the gathered parameters as they are, in their dtype,
#   under the names that `model.named_parameters()` gives them.
# - It writes under another name in the folder of `path`, and gives the finished file the name `path` by `os.replace`. That
#   happens in one moment. A rank that is killed while it writes leaves an earlier file at `path` whole.
# - When the function returns, in whichever rank, the new file is at `path`. `barrier()` returns when all ranks have called it:
#   every rank calls it at the end.
# - No other file stays in the folder.
#
# <details><summary>What is another name in the same folder?</summary>
#
# `path.with_name(path.name + ".unfinished")`. Another folder may be on another disk, and there `os.replace` fails.
# </details>
# <details><summary>The check says that a rank waits for ever</summary>
#
# Look for a collective behind `if get_rank() == 0:`. `full_tensor` and `barrier` are collectives.
# </details>


# %% nbgrader={"grade": false, "grade_id": "save-trained", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save_trained(model: nn.Module, path: Path) -> None:
    """Write the trained parameters of a sharded model to a safetensors file, under their names; every rank calls this."""
    ### BEGIN SOLUTION
    adapter = {name: parameter.full_tensor() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if get_rank() == 0:
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(adapter, unfinished)
        os.replace(unfinished, path)
    barrier()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-save-trained", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_save_trained(save_trained)

# %% [markdown]
# The file knows nothing of ranks: one process can read it.

# %%
with tempfile.TemporaryDirectory() as folder:
    run(lambda: save_trained(sharded_adapter(), Path(folder) / "adapter.safetensors"), 2)
    for file in Path(folder).iterdir():
        print(file.name, {name: tuple(tensor.shape) for name, tensor in load_file(file).items()})

# %% [markdown]
# ### To go on with another number of ranks  ·  optional, about 10 minutes
#
# An adapter is what you serve. To *go on training* you need the optimizer's state as well, and perhaps on another number of
# GPUs. `torch.distributed.checkpoint` lets every rank write its own shards into one folder, with an index of which piece of
# which tensor lies where. Any number of ranks can read it. The folder gets its name when it is whole:


# %%
def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Return what is trained, and the optimizer's state, by the parameters' names; the frozen base is not among it."""
    options = StateDictOptions(ignore_frozen_params=True)
    parameters, state = get_state_dict(model, optimizer, options=options)
    return {"parameters": parameters, "optimizer": state}


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write a checkpoint; every rank calls it. The folder appears under its name when all ranks have written."""
    unfinished = folder.with_suffix(".unfinished")
    dcp.save(training_state(model, optimizer), checkpoint_id=unfinished)
    if get_rank() == 0:
        unfinished.rename(folder)
    barrier()


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Go on from a checkpoint, whatever number of ranks has written it; every rank calls it."""
    state = training_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=state["parameters"], optim_state_dict=state["optimizer"], options=options)


# %% [markdown]
# Now the worst case. Two ranks train, with a checkpoint every five steps. In step 13 the system kills one of them. Then one
# rank goes on from the last checkpoint, and so do three:


# %% tags=["experiment"]
def train_on(model: Llama, folder: Path, start: int, killed_in: int | None = None) -> list[float]:
    """Train from a step on, up to step 20, with a checkpoint every five; return the losses."""
    rank, world_size = get_rank(), get_world_size()
    shard(model, init_device_mesh("cpu", (world_size,)), torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if start:
        load_checkpoint(model, optimizer, folder / f"step_{start}")
    losses = []
    for step in range(start, 20):
        if step == killed_in and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        mine = slice(rank, None, world_size)
        losses.append(train_step(model, optimizer, list(zip(rows[step, mine].split(2), labels[step, mine].split(2)))))
        if (step + 1) % 5 == 0 and killed_in is not None:
            save_checkpoint(model, optimizer, folder / f"step_{step + 1}")
    return losses


# %% tags=["experiment"]
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    try:
        run(train_on, 2, tiny, folder, 0, 13, seconds=300)
    except RankError as error:
        print(error)
    print("checkpoints:", sorted(path.name for path in folder.iterdir()))
    undisturbed = run(train_on, 1, tiny, folder, 0, seconds=300)[0]
    for world_size in (1, 3):
        resumed = run(train_on, world_size, tiny, folder, 10, seconds=300)[0]
        apart = max(abs(a - b) for a, b in zip(resumed, undisturbed[10:], strict=True))
        print(
            f"{world_size} ranks go on from step 10: loss {resumed[-1]:.4f} in step 20; undisturbed, at most {apart:.0e} apart"
        )
        assert apart < 1e-4, "training goes on otherwise than it would have"

# %% [markdown]
# *What to see.* The killed rank takes the other one along: `run` ends it, and says who was killed. The checkpoint of step 10
# was written by two ranks, and one and three ranks read it.

# %% [markdown]
# ## 8. On real GPUs  ·  optional, about 10 minutes
#
# `run` forks this notebook, and a forked process cannot use a GPU that its parent has used. Real training starts a Python for
# each GPU with `torchrun`, and runs a file. Below, your functions and a `main` go into `train.py` as they are. What differs
# from the cells above is the device, the dtype and the backend, the library that carries messages: "gloo" between CPUs, "nccl"
# between GPUs. (`PYTHONPATH` tells it where `peftlab` is, if that is not installed.) On this machine `torchrun` starts two
# processes on the CPU, with SmolLM2 and `tool_calls`. On a machine with eight GPUs it is `torchrun --nproc-per-node 8 train.py
# 200`.

# %% tags=["experiment"]
IMPORTS = """
import math, os, sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import barrier, get_rank, get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from peftlab import tasks
from peftlab.distributed import all_reduce, loss_and_count
from peftlab.llama import ALL_LINEAR, IGNORE, Llama
from peftlab.pretrained import load_smollm2
"""


# %% tags=["experiment"]
def prepare_rank() -> tuple[torch.device, torch.dtype]:
    """Join the other ranks; return this one's device, a GPU if there is one for each rank, and the dtype to compute in."""
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu"), torch.float32
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device, torch.bfloat16


# %% tags=["experiment"]
def main(steps: int) -> None:
    """Fine-tune SmolLM2 with LoRA on all ranks that `torchrun` has started; write the adapter."""
    device, dtype = prepare_rank()
    torch.manual_seed(0)  # the same factors on every rank, before they are sharded
    model, tokenizer = load_smollm2()
    with_lora(model).to(device)
    shard(model, init_device_mesh(device.type, (get_world_size(),)), dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    train = tasks.tool_calls(tokenizer).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        mine = order[8 * step : 8 * step + 8][get_rank() :: get_world_size()]
        input_ids, labels = tasks.collate([train[row] for row in mine])
        loss = train_step(model, optimizer, [(input_ids.to(device), labels.to(device))])
        if get_rank() == 0:
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    save_trained(model, Path("adapter.safetensors"))
    dist.destroy_process_group()


# %% tags=["experiment"]
SHARDED = Path("sharded")
SHARDED.mkdir(exist_ok=True)
defined = [LoRALinear.__init__, with_lora, shard, train_step, save_trained, prepare_rank, main]
parts = ["".join(inspect.findsource(part)[0]) for part in defined]  # the whole cell in which each was defined
(SHARDED / "train.py").write_text("\n\n".join([IMPORTS, *parts, "main(steps=int(sys.argv[1]))\n"]))
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
finished = subprocess.run(
    [*torchrun, "train.py", str(settings.steps(8))], cwd=SHARDED, env=os.environ | paths, capture_output=True, text=True
)
print(finished.stdout if finished.returncode == 0 else finished.stderr[-2000:])
assert finished.returncode == 0, "torchrun has failed: its last lines stand above"

# %% [markdown]
# The adapter that two processes have trained is an ordinary file. One process loads it:

# %% tags=["experiment"]
model, tokenizer = load_smollm2()
test = tasks.tool_calls(tokenizer).test.select(range(settings.examples(32)))
before = tasks.mean_loss(model, test)
with_lora(model).load_state_dict(load_file(SHARDED / "adapter.safetensors"), strict=False)
print(f"loss on the test rows: {before:.3f} before, {tasks.mean_loss(model, test):.3f} with the adapter")

# %% [markdown]
# ## 9. Bug hunt: four ranks, one epoch  ·  2 points, about 10 minutes, ●●○
#
# *After PyTorch issues 31771 and 38174, and NVlabs/LongLive issue 71.* Each rank has to read its own rows, or the ranks compute
# the same thing several times. Someone writes a function that gives a rank the numbers of its rows in an epoch:


# %%
def rows_with_bugs(rows: int, epoch: int, rank: int, world_size: int, seed: int) -> Int[Tensor, "rows_of_rank"]:
    """Return the numbers of the rows that a rank reads in an epoch, in random order."""
    generator = torch.Generator().manual_seed(seed + rank)
    order = torch.randperm(rows, generator=generator)
    return order[rank::world_size]


# %% [markdown]
# Training runs, and the loss goes down. But with some data sets it stops before the end of an epoch, without an error, and goes
# on waiting. And the model knows some of the rows by heart, and others not at all. Four ranks read ten rows, for three epochs:


# %%
def read_epoch(rows_of, epoch: int) -> list[int]:
    """Return what this rank reads in an epoch of ten rows."""
    return rows_of(10, epoch, get_rank(), get_world_size(), seed=0).tolist()


def show_epochs(rows_of) -> None:
    """Let four ranks read for three epochs, and print what they read and how often each row was read."""
    times = torch.zeros(10, dtype=torch.long)
    for epoch in range(3):
        ranks = run(read_epoch, 4, rows_of, epoch)
        print(f"epoch {epoch}: " + "   ".join(f"rank {rank} {numbers}" for rank, numbers in enumerate(ranks)))
        for numbers in ranks:
            times += torch.bincount(torch.tensor(numbers, dtype=torch.long), minlength=10)
    print("how often rows 0 to 9 were read:", times.tolist())


show_epochs(rows_with_bugs)


# %%
def train_for_an_epoch(rows_of: Callable) -> None:
    """Stand for training: for each of its rows, this rank sums a gradient with the others."""
    for _ in rows_of(10, 0, get_rank(), get_world_size(), seed=0):
        all_reduce(torch.ones(1))


try:
    run(train_for_an_epoch, 4, rows_with_bugs)
except RankError as error:
    print(error)

# %% [markdown]
# Find out what is wrong, and write `rows_of_rank`. There is more than one bug.
#
# - All ranks share one random order of the numbers 0 to `rows - 1`. It depends on `rows`, `epoch` and `seed`, and on nothing
#   else: not on the rank, and not on how many ranks there are.
# - With one seed, every epoch has another order. In one epoch, every seed gives another order. Both are whole numbers from 0
#   on.
# - Rank $r$ takes every `world_size`-th number of the order, from position $r$ on, in the order's own sequence.
# - All ranks get equally many. The remainder at the *end of the order* is left out, so other epochs leave out other rows. If
#   there are fewer rows than ranks, each rank gets an empty tensor.
# - The result is an int64 tensor with one dimension. The same arguments always give the same numbers.
# - The random state of the notebook, torch's and Python's, is neither used nor changed.
#
# <details><summary>The check says that ranks read the same rows</summary>
#
# Ranks that seed a generator differently shuffle differently.
# </details>
# <details><summary>How do I make one seed out of two numbers?</summary>
#
# `seed + epoch` does. A product does not: it is 0 for seed 0, in every epoch.
# </details>


# %% nbgrader={"grade": false, "grade_id": "rows-of-rank", "locked": false, "schema_version": 3, "solution": true, "task": false}
def rows_of_rank(rows: int, epoch: int, rank: int, world_size: int, seed: int) -> Int[Tensor, "rows_of_rank"]:
    """Return the numbers of the rows that a rank reads in an epoch, in the order in which it reads them.

    Args:
        rows: how many rows the data have; they are numbered from 0.
        epoch: from 0 on.
        rank: from 0 to `world_size - 1`.
        world_size: how many ranks share the rows.
        seed: of the run; the same on all ranks.
    """
    ### BEGIN SOLUTION
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(rows, generator=generator)
    return order[: rows // world_size * world_size][rank::world_size]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-rows-of-rank", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_rows_of_rank(rows_of_rank)

# %%
show_epochs(rows_of_rank)

# %% [markdown]
# PyTorch has this as `DistributedSampler`. It seeds its generator with `seed + epoch`, too. But it does not know the epoch
# unless it is told:

# %%
from torch.utils.data import DistributedSampler

sampler = DistributedSampler(range(10), num_replicas=4, rank=0, seed=0, drop_last=True)
print("rank 0, nothing said:  ", [list(sampler) for _ in range(3)])
told = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    told.append(list(sampler))
print("rank 0, with set_epoch:", told)
print("your rank 0:           ", [rows_of_rank(10, epoch, 0, 4, seed=0).tolist() for epoch in range(3)])

# %% [markdown]
# *What to see.* Without `set_epoch` every epoch has the same order, and no error tells you.

# %% [markdown]
# ## 10. In your own words  ·  2 points, marked by hand
#
# A lab has eight cards of 24 GB in one machine, and two jobs: LoRA on a model with 7 billion parameters, and QLoRA on one with
# 70 billion. Someone proposes ZeRO-3 on eight ranks for both, "because it needs the least memory".
#
# In about 120 words: what would you use for each job, and why? What does a rank hold, and what does it send in a step? What has
# to be true of the loss and of the rows, so that eight ranks learn what one would? Refer to at least one number from section 1,
# 2 or 6.

# %% [markdown] nbgrader={"grade": true, "grade_id": "eight-cards", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the strategies.* Data parallel for the 7B: the base fits each card, and only small gradients are sent;
# ZeRO-3 would send the frozen base twice in every step and save memory that is there. The 70B in 4 bits fits no single card, so
# its base has to be sharded (ZeRO-3, FSDP), on two ranks or more, and pays with its base on the wire. A figure from the unit is
# quoted. *1 point: what must hold.* Each rank reads its own rows from one shared order, equally many; the gradient is that of
# the mean over all labelled tokens (one count for all ranks, FSDP's division by the number of ranks undone). Half points for
# either part without a reason.
#
# **A full answer.** For the 7B I would use data parallel on all eight cards. A rank then holds about 14 GB, which fits, and
# sends 0.14 GB a step; ZeRO-3 would send 25 GB, nearly all of it weights that never change. The 70B base in 4 bits is some 37
# GB, so here I shard: two ranks hold 18 GB each and peak at 22, more ranks leave room for longer rows. Every step sends the
# base twice. Two pairs of cards could also work side by side on different rows. All ranks shuffle with the same seed and the
# epoch, take every eighth row, and drop the remainder. The loss is divided by the number of labels of all ranks, and multiplied
# by the number of ranks, because FSDP averages.
#
# **An answer worth one point.** The 7B fits, so data parallel. For the 70B I use FSDP because one card is too small. Each rank
# gets its own rows.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# You have
#
# - a layer whose weight is whole only while it is used;
# - a model that PyTorch's engine shards, with LoRA and with a base in 4 bits, and a step that gives the same losses on any
#   number of ranks;
# - a file and a checkpoint that outlive a killed process;
# - `train.py`, which is made for real GPUs, and has run on two processes here.
#
# ## Sources
# - Rajbhandari et al. (2020), *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, arXiv 1910.02054: the
#   three stages; section 7 counts what they send.
# - Zhao et al. (2023), *PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel*, arXiv 2304.11277.
# - Patarasuk and Yuan (2009), *Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations*: the ring.
# - Answer.AI (2024), [*You can now train a 70b language model at home*](https://www.answer.ai/posts/2024-03-06-fsdp-qlora), and
#   its [fsdp_qlora](https://github.com/AnswerDotAI/fsdp_qlora); bitsandbytes,
#   [*FSDP-QLoRA*](https://huggingface.co/docs/bitsandbytes/fsdp_qlora): `bnb_4bit_quant_storage`.
# - trl issue [2175](https://github.com/huggingface/trl/issues/2175) and transformers pull request
#   [34191](https://github.com/huggingface/transformers/pull/34191): a mean of means.
# - PyTorch issues [31771](https://github.com/pytorch/pytorch/issues/31771) and
#   [11324](https://github.com/pytorch/pytorch/issues/11324) (the same order in every epoch without `set_epoch`),
#   [38174](https://github.com/pytorch/pytorch/issues/38174) (ranks with different numbers of rows).
# - NVlabs/LongLive issue [71](https://github.com/NVlabs/LongLive/issues/71): a seed for each rank, so rows are read twice.
