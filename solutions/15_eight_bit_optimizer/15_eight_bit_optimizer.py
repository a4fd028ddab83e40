# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 15 · An optimizer in eight bits: what is kept between steps
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 90, and 5 of experiments on two CPU cores | 4 of 5 | 13 | 01_why_peft and 09_quantization; 10_qlora helps |
#
# Adam keeps two numbers for every trained one. In full fine-tuning they take more memory than the model. Dettmers et al. (2022)
# keep them in eight bits, in blocks with a scale each. This unit builds that optimizer and measures what it saves. Then it asks
# what a number can still do that has 256 places to be.
#
# **When you have finished, you can**
#
# 1. keep Adam's moments in eight bits, and say in bytes what that saves and what an update needs for a moment;
# 2. say which second moments a step can move at all, and show one that it cannot;
# 3. mend that, and go on with a saved run without losing anything.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import copy
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from autograder.checks.eight_bit_optimizer import (
    check_adamw_8bit,
    check_dead_zone,
    check_load_as_saved,
    check_random_code,
    check_to_8bit,
)
from peftlab import plots, settings
from peftlab.dynamic_code import dynamic_code, nearest_code
from peftlab.llama import PRESETS, Llama, causal_loss
from peftlab.memory import MEBIBYTE, measure_training_step, step_table, tensor_bytes
from peftlab.progress import predict

# %% [markdown]
# ## The idea
#
# With gradient $g$, both moments zero at the start, and $t = 1$ in the first step, a step of AdamW is
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \qquad
# \theta \leftarrow (1 - \eta \lambda)\, \theta - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} $$
#
# with learning rate $\eta$ and weight decay $\lambda$. Only $m$ and $v$ have to last until the next step. So they may be stored
# in another form:
#
# | | | |
# |---|---|---|
# | read back | $m = \text{code}[q_m] \cdot a_m$, and $v$ likewise | `from_8bit(codes, absmax, signed)` |
# | step | the three formulas above, in fp32 | `first.mul_(beta1).add_(gradient, alpha=1 - beta1)` ... |
# | store | $q_m$, and an absmax $a_m$ for every 256 numbers | `to_8bit(first, True)` |
#
# The codes are those of unit 09's *dynamic* data type. The first moment has a sign and takes the signed type. The second is
# never negative and takes the unsigned one, which has one bit more for its digits. Here are the unsigned type's values, decade
# by decade.

# %%
code = dynamic_code(False)
figure, axes = plt.subplots(figsize=(7.5, 2.2))
axes.vlines(code[1:], 0, 1, color=plots.COLOURS["optimizer_state"], linewidth=0.8)
axes.set(
    xscale="log",
    yticks=[],
    xlabel="value, as a share of the block's absmax",
    title="The 255 values above zero of the unsigned dynamic type",
)
plots.show(
    figure, alt="Vertical lines on a logarithmic axis: crowded between a tenth and one, half as many in each decade below."
)
for decade in range(7):
    top = 10.0**-decade
    inside = code[(code > 0.1 * top) & (code <= top)]
    gaps = (inside.diff() / inside[:-1]).tolist() or [math.nan]
    print(
        f"{0.1 * top:.0e} to {top:.0e}: {len(inside):>3} values, each {min(gaps):5.1%} to {max(gaps):5.1%} above the one below it"
    )

# %% [markdown]
# *What to see.* Seven decades are covered, but each has half as many values as the one above it. A small number is stored with
# a larger relative error.
#
# ### Predict
#
# A parameter has four bytes of weight and four of gradient. How many bytes of state has it with moments in eight bits?
#
# And a thought experiment. For 300 steps every gradient is 1. From then on it is 0.05, except for one number in every 256,
# where it stays 1. In fp32 the second moment of the others sinks. After 1,500 steps, by which factor is the one kept in eight
# bits too large or too small? Sections 3 and 4 measure both.

# %%
my_bytes = predict("bytes of state a parameter", None)
my_factor = predict("v kept in eight bits over v kept in fp32, after 1,500 steps", None)

# %% [markdown]
# ## 1. Numbers as codes  ·  2 points, about 10 minutes, ●●○
#
# An optimizer reads and writes its moments in every step, so both ways have to be exact about shapes and blocks. Write two
# functions.
#
# - `to_8bit(x, signed)` returns codes, `uint8` and in the shape of `x`, and the absmax of every 256 values in a row (or of what
#   is left), in fp32. `x` stays as it is.
# - `from_8bit(codes, absmax, signed)` returns value times absmax, in fp32 and in the shape of the codes.
# - `nearest_code(x, signed)` finds codes for numbers between -1 and 1, and `dynamic_code(signed, device)` is the table of
#   values. Both are given.
# - No floor below absmax: the second moment of a small gradient is smaller than any floor that looks harmless.

# %%
values = torch.tensor([[0.5, -1.0, 0.26]])
print("one block, absmax 1:", dynamic_code(True)[nearest_code(values, True).int()].tolist())

# %% [markdown]
# <details><summary>The last block has fewer than 256 values</summary>
#
# Pad the flat tensor with zeros to a multiple of 256, view it as blocks, and cut the codes off again at the end; or
# `split(256)` and a loop.
# </details>
# <details><summary>A block of zeros gives NaN</summary>
#
# 0 / 0 is NaN. `nearest_code` takes it and returns some code, which an absmax of 0 turns back into 0.
# </details>


# %% nbgrader={"grade": false, "grade_id": "to-8bit", "locked": false, "schema_version": 3, "solution": true, "task": false}
def to_8bit(x: Float[Tensor, "..."], signed: bool) -> tuple[UInt8[Tensor, "..."], Float[Tensor, "blocks"]]:
    """Return dynamic codes in the shape of x, and in fp32 the absmax of every 256 values, or what is left of them."""
    ### BEGIN SOLUTION
    blocks = nn.functional.pad(x.float().flatten(), (0, -x.numel() % 256)).view(-1, 256)
    absmax = blocks.abs().amax(dim=1)
    codes = nearest_code(blocks * (1 / absmax)[:, None], signed)
    return codes.flatten()[: x.numel()].clone().view(x.shape), absmax
    ### END SOLUTION


def from_8bit(codes: UInt8[Tensor, "..."], absmax: Float[Tensor, "blocks"], signed: bool) -> Float[Tensor, "..."]:
    """Return the numbers that the codes stand for, in fp32, in the shape of the codes."""
    ### BEGIN SOLUTION
    scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
    return dynamic_code(signed, codes.device)[codes.int()] * scale
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-to-8bit", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_to_8bit(to_8bit, from_8bit)

# %% [markdown]
# ## 2. AdamW on codes  ·  3 points, about 20 minutes, ●●●
#
# Quantize too early, and the step is taken with rounded numbers. Write `update`, which takes one step for one parameter:
#
# 1. read both moments back to fp32 (zeros before the first step);
# 2. take AdamW's step with the *new* moments, as if nothing had happened: compute in fp32 whatever the parameter's dtype, and
#    round once, when the parameter is written;
# 3. quantize the new moments, and forget the fp32 ones.
#
# `group` is the parameter's own: its `"lr"`, `"betas"`, `"eps"` and `"weight_decay"` count. Keep in `self.state[parameter]`:
# the moments as `exp_avg` and `exp_avg_sq`, their absmax as `exp_avg_absmax` and `exp_avg_sq_absmax`, and the number of steps
# as `step`. A tensor of fewer than 4,096 values keeps its moments in fp32, without absmax, as in bitsandbytes: there is little
# to save. The gradient stays as it is. (The check lends its own `to_8bit` and `from_8bit`.)
#
# <details><summary>How is an optimizer built?</summary>
#
# `self.param_groups` is a list of dicts, each with its `"params"`. `self.state[parameter]` is a dict that starts empty.
# `parameter.copy_(...)` changes it in place; `step` runs under `torch.no_grad()`.
# </details>
# <details><summary>The check says that the parameter is rounded twice</summary>
#
# `parameter.mul_(...)` rounds to the parameter's dtype, and the step rounds again. Make both changes to `parameter.float()`,
# then copy.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adamw-8bit", "locked": false, "schema_version": 3, "solution": true, "task": false}
class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are stored in eight bits (Dettmers et al. 2022)."""

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every parameter that has a gradient, and its moments. (A closure is not used.)"""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: nn.Parameter, group: dict) -> None:
        """Take one step for one parameter, with the settings of its group."""
        ### BEGIN SOLUTION
        state, gradient = self.state[parameter], parameter.grad.float()
        small = parameter.numel() < 4096
        first = self._moment(state, "exp_avg", gradient, small)
        second = self._moment(state, "exp_avg_sq", gradient, small)
        state["step"] = step = state.get("step", 0) + 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = second.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
        decayed = parameter.float() * (1 - lr * group["weight_decay"])
        parameter.copy_(decayed.addcdiv_(first, denominator, value=-lr / (1 - beta1**step)))
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            if small:
                state[name] = moment
            else:
                state[name], state[f"{name}_absmax"] = to_8bit(moment, name == "exp_avg")

    @staticmethod
    def _moment(state: dict, name: str, gradient: Tensor, small: bool) -> Tensor:
        """Return a moment in fp32, zeros before the first step."""
        if name not in state:
            return torch.zeros_like(gradient)
        return state[name] if small else from_8bit(state[name], state[f"{name}_absmax"], name == "exp_avg")
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adamw-8bit", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_adamw_8bit(AdamW8bit)

# %% [markdown]
# Does it train as well as AdamW? Here is a tiny LLaMA, trained in full, once with each, on the same random sentences, to learn
# them by heart.


# %%
def learn_by_heart(optimizer_class: type[torch.optim.Optimizer]) -> tuple[list[float], float]:
    """Return the losses, and the bytes of optimizer state a parameter."""
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"])
    sentences = torch.randint(0, 256, (8, 24))
    optimizer = optimizer_class(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = causal_loss(model, sentences, sentences)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return losses, tensor_bytes(held) / sum(parameter.numel() for parameter in model.parameters())


# %%
curves = {}
for name, optimizer_class in {"AdamW": torch.optim.AdamW, "AdamW8bit": AdamW8bit}.items():
    curves[name], bytes_each = learn_by_heart(optimizer_class)
    print(f"{name:<10} last loss {curves[name][-1]:.4f}, {bytes_each:.3f} bytes of state a parameter")
plots.show(
    plots.loss_curves(curves, "A tiny LLaMA learns eight sentences, with moments in 32 and in 8 bits"),
    alt="Two loss curves, one on top of the other, that fall from above five towards zero.",
)

# %% [markdown]
# *What to see.* The two curves can hardly be told apart. The state takes less than a third of AdamW's (small tensors stay in
# fp32).
#
# ## 3. Measured: what is in memory
#
# State is only one part of a step's bytes, and an update unpacks what it needs. So measure whole steps, by category: a LLaMA
# with four of SmolLM2's layers and a small vocabulary, trained in full. `InPieces` is your optimizer again, but it takes a
# large parameter 262,144 numbers at a time. Each piece is a view of the parameter with a state of its own.

# %% tags=["experiment"]
import warnings
from dataclasses import replace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes


class InPieces(AdamW8bit):
    """The same optimizer, which never unpacks more than a piece of a parameter."""

    def update(self, parameter: nn.Parameter, group: dict) -> None:
        if parameter.numel() < 4096:
            return super().update(parameter, group)
        views = parameter.detach().view(-1).split(2**18)
        pieces = self.state[parameter].setdefault("pieces", [nn.Parameter(view) for view in views])
        for piece, gradient in zip(pieces, parameter.grad.view(-1).split(2**18)):
            piece.grad = gradient
            super().update(piece, group)
            piece.grad = None


# %% tags=["experiment"]
torch.manual_seed(0)
small = Llama(replace(PRESETS["SmolLM2-135M"], num_hidden_layers=4, vocab_size=8_192))
ids = torch.randint(0, 8_192, (2, 32))
steps = {}
for name, optimizer_class in (
    ("AdamW", torch.optim.AdamW),
    ("yours", AdamW8bit),
    ("yours, in pieces", InPieces),
    ("bitsandbytes", bitsandbytes.optim.AdamW8bit),
):
    steps[name] = measure_training_step(small, lambda: causal_loss(small, ids, ids), optimizer_class)
count = sum(parameter.numel() for parameter in small.parameters())
print(step_table(steps))
for name, step in steps.items():
    print(f"{name:<17} {step.optimizer_state / count:.3f} bytes of state a parameter")
my_bytes.compare(steps["yours"].optimizer_state / count)

# %% tags=["experiment"]
plots.show(
    plots.memory_bars(steps, f"A training step of {count / 1e6:.1f} million parameters, fp32"),
    alt="Four stacked bars: the state shrinks to a quarter in three of them; the peak of the second is above the first's.",
)

# %% [markdown]
# *What to see.* The state shrinks to a quarter. The *peak* of your optimizer grows instead: for a moment the largest parameter
# has both moments, a denominator and more in fp32, and `nearest_code` computes in fp64. Taken in pieces, the same numbers need
# little at once. bitsandbytes has one compiled loop, which holds a few numbers of a block at a time.
#
# With LoRA there is little to save: the state belongs to the factors alone. Eight bits are for those who train many parameters.
#
# **Paging.** On an NVIDIA GPU bitsandbytes can also put the state into *unified memory*: pages that the driver moves between
# GPU and main memory, as an operating system swaps pages to disk. While there is room, the pages stay on the GPU. When a long
# sequence fills it for a moment, pages of the state make way, and come back for the next `step()`. QLoRA's authors use it
# against out-of-memory errors at the longest batches. The class is `PagedAdamW8bit`. It pages only tensors of 100,000 numbers
# and more, and on a CPU nothing.
#
# ## 4. What a step cannot move  ·  2 points, about 15 minutes, ●●○
#
# A step changes $v$ a little, and then $v$ is rounded to the nearest value. If the change is smaller than half the gap to the
# next value, rounding undoes it. The next step starts from the same number, so nothing adds up. Which gradients are too weak to
# move a value, then, and which too *strong* to be noticed?
#
# Write `dead_zone(code, beta2)`. A block's absmax is 1 and stays 1. A second moment is stored as `code[k]`. For each `k` return
# the smallest and the largest size of a gradient after which it is stored as `code[k]` again:
#
# - the new moment is $\beta_2 \cdot \text{code}[k] + (1 - \beta_2)\, g^2$;
# - it is stored as `code[k]` while it lies between the middles of the gaps below and above;
# - where even $g = 0$ leaves it in place, the smallest size is 0;
# - the first value has no gap below it: its smallest size is 0. The last value is the absmax itself, so its moment may not grow
#   beyond it.
#
# `code` is any ascending table from 0 to 1. Both results have its shape.

# %%
table = torch.tensor([0.0, 0.5, 1.0])
print("stored as 0.5, beta2 = 0.9, gradient 0:", 0.9 * 0.5, "lies above the middle 0.25, so it stays")
print("stored as 0.5, beta2 = 0.9, gradient 2:", round(0.9 * 0.5 + 0.1 * 2**2, 2), "lies above the middle 0.75, so it moves")

# %% [markdown]
# <details><summary>Where do I start?</summary>
#
# Solve $\beta_2 c + (1 - \beta_2)\, g^2 = e$ for $g$, where $e$ is one end of what is rounded to $c$.
# </details>
# <details><summary>The check says NaN</summary>
#
# If the solution for $g^2$ is negative, no gradient is weak enough: `clamp(min=0)` before the root.
# </details>


# %% nbgrader={"grade": false, "grade_id": "dead-zone", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dead_zone(code: Float[Tensor, "codes"], beta2: float) -> tuple[Float[Tensor, "codes"], Float[Tensor, "codes"]]:
    """Return the smallest and the largest size of a gradient that leaves each stored second moment where it is.

    Args:
        code: the values that a moment is stored as, ascending from 0 to 1; the absmax is 1, and stays.
    """
    ### BEGIN SOLUTION
    middles = (code[:-1] + code[1:]) / 2
    below, above = torch.cat([code[:1], middles]), torch.cat([middles, code[-1:]])
    squares = [(end - beta2 * code) / (1 - beta2) for end in (below, above)]
    return squares[0].clamp(min=0).sqrt(), squares[1].sqrt()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-dead-zone", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_dead_zone(dead_zone)

# %% [markdown]
# Now for the real type. A value of $v$ that suits the gradients would be $g^2$. So draw the zone around the line $g =
# \sqrt{v}$.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axis, beta2 in zip(axes, (0.999, 0.95)):
    weakest, strongest = (end[1:] for end in dead_zone(code, beta2))
    axis.fill_between(code[1:], weakest.clamp(min=1e-5), strongest, color=plots.SERIES[1], alpha=0.4, label="v stays as it is")
    axis.plot(code[1:], code[1:].sqrt(), color="black", linewidth=1, label="g = √v")
    axis.set(xscale="log", yscale="log", ylim=(1e-5, 2), xlabel="stored v, of the block's absmax", title=f"β2 = {beta2}")
    falls = (weakest > 0).sum().item()
    print(f"beta2 {beta2}: with a gradient of zero {falls} of 255 values move; at the median value, gradients up to "
          f"{(strongest / code[1:].sqrt()).median():.1f} times √v leave it")  # fmt: skip
axes[0].set_ylabel("size of the gradient")
axes[1].legend(loc="lower right")
plots.show(
    figure,
    alt="Two bands around a diagonal. At beta2 0.999 the band reaches down to zero everywhere; at 0.95 it is narrow near absmax.",
)

# %% [markdown]
# *What to see.* With the usual $\beta_2 = 0.999$ *no* value can sink by itself, not even if its gradients are zero from now on.
# A step takes away a thousandth, and the narrowest half gap is wider. With $\beta_2 = 0.95$ most values can sink, but the
# smallest ones, whose gaps are wide, cannot.
#
# ### Measured: a moment that sticks
#
# Run the thought experiment, with your optimizer, with bitsandbytes' and in fp32.


# %% tags=["experiment"]
def second_moment(optimizer: torch.optim.Optimizer) -> Float[Tensor, "n"]:
    """Return the second moment of the only parameter, in fp32, whatever the optimizer calls it."""
    (state,) = optimizer.state.values()
    if "state2" in state:  # bitsandbytes' names
        return from_8bit(state["state2"], state["absmax2"], False)
    codes = state["exp_avg_sq"]
    return from_8bit(codes, state["exp_avg_sq_absmax"], False) if codes.dtype == torch.uint8 else codes


# %% tags=["experiment"]
OUTLIER = torch.arange(4096) % 256 == 0
optimizers = {
    name: optimizer_class([nn.Parameter(torch.zeros(4096))], lr=1e-3, weight_decay=0.0)
    for name, optimizer_class in (
        ("fp32", torch.optim.AdamW),
        ("yours", AdamW8bit),
        ("bitsandbytes", bitsandbytes.optim.AdamW8bit),
    )
}
traces = {name: [] for name in optimizers} | {"the outlier, in fp32": []}
for step in range(settings.steps(1500)):
    gradient = torch.where(OUTLIER | (torch.tensor(step) < 300), 1.0, 0.05)
    for name, optimizer in optimizers.items():
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = gradient.clone()
        optimizer.step()
        traces[name].append(second_moment(optimizer)[~OUTLIER].mean().item())
    traces["the outlier, in fp32"].append(second_moment(optimizers["fp32"])[0].item())

# %% tags=["experiment"]
last = len(traces["fp32"])
for step in sorted({min(step, last) for step in (300, 600, 1000, 1500)}):
    exact, *eight_bits = (traces[name][step - 1] for name in ("fp32", "yours", "bitsandbytes"))
    print(
        f"step {step:>4}: v in fp32 {exact:.4f}, too large by {eight_bits[0] / exact:.2f} (yours), {eight_bits[1] / exact:.2f} (bitsandbytes)"
    )
ways = {name: -optimizer.param_groups[0]["params"][0].detach()[1].item() for name, optimizer in optimizers.items()}
print("the way that a parameter has gone:", ", ".join(f"{name} {way:.3f}" for name, way in ways.items()))
my_factor.compare(traces["yours"][-1] / traces["fp32"][-1])
figure, axes = plt.subplots(figsize=(7, 3))
for number, (name, trace) in enumerate(traces.items()):
    axes.plot(trace, label=name, color=plots.SERIES[number], linestyle="--" if name == "bitsandbytes" else "-")
axes.set(
    xlabel="step",
    ylabel="second moment",
    title="Gradients fall from 1 to 0.05 after 300 steps, but for one number in each block",
)
axes.legend()
plots.show(figure, alt="In fp32 the second moment sinks; in eight bits, yours and bitsandbytes', it rises with the outlier's.")

# %% [markdown]
# *What to see.* In eight bits $v$ does not even stay: it *rises*. Soon its code stands still, and the code's value is
# multiplied by the absmax of its block, which is the outlier's $v$. bitsandbytes does exactly the same. Adam divides by
# $\sqrt{v}$, so the steps are too short by the root of the factor, and the parameter goes a shorter way.
#
# How much harm is that? In fp32, too, $v$ forgets slowly: after $n$ steps without gradients $0.999^n$ of it is left, which is
# 37% after 1,000 steps. A run of a hundred steps hardly sees the difference. A long one whose gradients shrink does.
#
# ## 5. Round at random  ·  2 points, about 10 minutes, ●○○
#
# A change that is always rounded away is lost. If it is rounded away only *most* of the time, and once in a while counts as a
# whole gap, then it is right on average. Write `random_code(x, code, noise)`:
#
# - `code` is an ascending table, and each number of `x` lies between its first and its last value;
# - with neighbours $a \le x \le b$ in the table, the code of $b$ is taken where `noise` is below $(x - a) / (b - a)$, otherwise
#   that of $a$;
# - a number that is itself a value gets that value's code;
# - the codes are `uint8`, in the shape of `x`. Nothing that was given is changed.
#
# With `noise` uniform between 0 and 1 the mean of what is stored is $x$: $b$ has the probability $(x - a) / (b - a)$.

# %%
quarter = torch.full((8,), 0.25)
above = torch.rand(8, generator=torch.Generator().manual_seed(0)) < quarter
print("0.25 between the values 0 and 1, eight times:", above.float().tolist(), "- mean in the long run 0.25")

# %% [markdown]
# <details><summary>Which function finds the neighbours?</summary>
#
# `torch.searchsorted(code, x)` returns the index of the first value that is not below `x`. That is $b$; $a$ stands before it.
# Clamp it, so that both exist.
# </details>


# %% nbgrader={"grade": false, "grade_id": "random-code", "locked": false, "schema_version": 3, "solution": true, "task": false}
def random_code(x: Float[Tensor, "..."], code: Float[Tensor, "codes"], noise: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Return, for each number, the code of one of its two neighbours, chosen by noise so that the mean is right."""
    ### BEGIN SOLUTION
    upper = torch.searchsorted(code, x).clamp(1, len(code) - 1)
    low, high = code[upper - 1], code[upper]
    return torch.where(noise < (x - low) / (high - low), upper, upper - 1).to(torch.uint8)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-random-code", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_random_code(random_code)

# %% [markdown]
# Follow $v$ alone through the same 1,500 steps, stored in three ways, with three values of $\beta_2$.


# %% tags=["experiment"]
def stored_at_random(v: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return v as it is read back after rounding at random, in blocks of 256."""
    absmax = v.view(-1, 256).amax(1)
    codes = random_code(v / absmax.repeat_interleave(256), code, torch.rand_like(v))
    return from_8bit(codes, absmax, False)


WAYS = {
    "nearest": lambda v: from_8bit(*to_8bit(v, False), False),
    "at random": stored_at_random,
    "bf16": lambda v: v.bfloat16().float(),
}

# %% tags=["experiment"]
torch.manual_seed(0)
for beta2 in (0.999, 0.99, 0.95):
    exact, kept = torch.zeros(4096), {name: torch.zeros(4096) for name in WAYS}
    for step in range(settings.steps(1500)):
        square = torch.where(OUTLIER | (torch.tensor(step) < 300), 1.0, 0.05**2)
        exact = beta2 * exact + (1 - beta2) * square
        kept = {name: way(beta2 * kept[name] + (1 - beta2) * square) for name, way in WAYS.items()}
    ratios = {name: (v / exact)[~OUTLIER] for name, v in kept.items()}
    print(
        f"beta2 {beta2}: v over that in fp32: "
        + ", ".join(f"{name} {r.mean():.2f} ± {r.std():.2f}" for name, r in ratios.items())
    )

# %% [markdown]
# *What to see.* Rounded at random, the mean is right for every $\beta_2$, and the price is noise: the number behind ±. A
# smaller $\beta_2$ alone does not help here. The moment sinks until the gaps are too wide, sticks there, and is then too large
# by even more. Sixteen bits do not solve it either: bf16 keeps 8 significant bits, whose half gap is also more than a
# thousandth.
#
# bitsandbytes rounds to the nearest. torchao's optimizers can round at random, but the *parameters*, where they are kept in
# bf16: there, too, small changes are lost.
#
# ## 6. On a real model
#
# Train the last two decoder layers of SmolLM2 on reviews, with AdamW and with yours. Beside yours, the exact second moments of
# the same gradients are kept in fp32, so that both can be compared at the end. About two minutes on two quiet CPU cores.

# %% tags=["experiment"]
from peftlab import tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

device = find_device()
model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
few = reviews.test.select(range(settings.examples(160)))
START = {name: tensor.clone() for name, tensor in model.model.layers[-2:].state_dict().items()}


# %% tags=["experiment"]
def train_last_layers(optimizer_class: type[torch.optim.Optimizer]) -> tuple[list[float], torch.optim.Optimizer, list[Tensor]]:
    """Return the losses, the optimizer, and the second moments of the same gradients, kept in fp32."""
    model.model.layers[-2:].load_state_dict(START)
    model.to(device).requires_grad_(False).train()
    parameters = list(model.model.layers[-2:].requires_grad_(True).parameters())
    optimizer, losses, exact = (
        optimizer_class(parameters, lr=2e-4, weight_decay=0.0),
        [],
        [torch.zeros_like(p) for p in parameters],
    )
    rows = settings.rows(8)
    for step in range(settings.steps(40)):
        ids, labels = tasks.collate(list(reviews.train.select(range(rows * step, rows * (step + 1)))))
        loss = causal_loss(model, ids.to(device), labels.to(device))
        loss.backward()
        for v, parameter in zip(exact, parameters):
            v.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer, exact


# %% tags=["experiment"]
curves = {}
for name, optimizer_class in (("AdamW", torch.optim.AdamW), ("AdamW8bit", AdamW8bit)):
    curves[name], optimizer, exact = train_last_layers(optimizer_class)
    print(
        f"{name}: reviews right {reviews.score(model.eval(), few):.1%}, last losses {[round(loss, 2) for loss in curves[name][-5:]]}"
    )
plots.show(
    plots.loss_curves(curves, "SmolLM2's last two layers on movie reviews"),
    alt="Two loss curves that lie nearly on each other.",
)

# %% tags=["experiment"]
shares, ratios = [], []
for (parameter, state), v in zip(optimizer.state.items(), exact):
    if parameter.numel() >= 4096:
        absmax = state["exp_avg_sq_absmax"].repeat_interleave(256)[: v.numel()].view(v.shape)
        shares.append((v / absmax).flatten())
        ratios.append((from_8bit(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False) / v).flatten())
share, ratio = torch.cat(shares), torch.cat(ratios)
for decade in range(7):
    inside = ratio[(share <= 10.0**-decade) & (share > 0.1 * 10.0**-decade)].sort().values
    if len(inside):
        low, middle, high = (inside[int(part * (len(inside) - 1))].item() for part in (0.05, 0.5, 0.95))
        print(
            f"v up to {10.0**-decade:.0e} of its block's absmax: {len(inside) / len(ratio):6.2%} of the numbers; "
            f"in eight bits over fp32 {middle:.2f} (nine in ten from {low:.2f} to {high:.2f})"
        )
zero = torch.zeros((), device=device)
print(f"and zero is stored as {dynamic_code(False, device)[nearest_code(zero, False).int()]:.1e} of the absmax")

# %% [markdown]
# *What to see.* In so short a run both train alike. Where $v$ is near its block's absmax, the stored one is nearly right. The
# smaller it is beside the absmax, the further it is off. (On a CPU the smallest values are mixed up, in bitsandbytes as here:
# see `nearest_code`. On a GPU zero is zero.)
#
# ## 7. The same thing in bitsandbytes
#
# Is it *that* optimizer, or something like it? The same parameters, the same gradients, thirty steps, on this machine's CPU;
# then what was measured on GPUs.

# %% tags=["experiment"]
from peftlab import gpu

torch.manual_seed(0)
start, gradients = torch.randn(80, 96), torch.randn(30, 80, 96)
held = {}
for name, optimizer_class in (
    ("yours", AdamW8bit),
    ("bitsandbytes", bitsandbytes.optim.AdamW8bit),
    ("fp32", torch.optim.AdamW),
):
    parameter = nn.Parameter(start.clone())
    optimizer = optimizer_class([parameter], lr=1e-2, weight_decay=0.01)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    held[name] = parameter.detach()

# %% tags=["experiment"]
moved = (held["fp32"] - start).pow(2).mean().sqrt()
apart = {name: ((held["yours"] - held[name]).pow(2).mean().sqrt() / moved).item() for name in ("bitsandbytes", "fp32")}
for name, distance in apart.items():
    print(f"yours and {name}: apart by {distance:.1e} of the way that was gone")
for card, found in gpu.proofs("AdamW8bit against bitsandbytes").items():
    print(f"{card}: yours and bitsandbytes {found['apart']:.1e}, yours and fp32 {found['ours and fp32 apart']:.1e}")
assert apart["bitsandbytes"] <= apart["fp32"] / 10, "your optimizer and the library's have parted ways: run the checks again"

# %% [markdown]
# *What to see.* On the CPU yours and bitsandbytes' go the same way, to the last bit. On a GPU bitsandbytes has another kernel:
# by its source it decays a weight after the update, and keeps the sign of a moment that rounds to zero. The difference is a
# hundredth of that to AdamW in fp32, which is the price of eight bits.
#
# One difference is a policy. Embeddings trained in full are less stable in eight bits (Dettmers et al. 2022, section 2.3), and
# bitsandbytes lets you keep their moments in 32.
#
# ## 8. Bug hunt  ·  2 points, about 15 minutes, ●●○
#
# *After PyTorch issue 43706 and torchao issue 3314.* A run is saved after ten steps and goes on later. Nothing fails, but it is
# not the run that it would have been. Here are twenty steps in one go, and twenty with a pause, with parameters in bf16 and in
# fp32:


# %%
def trained(dtype: torch.dtype, load: Callable[[torch.optim.Optimizer, dict], None] | None) -> tuple[list[Tensor], dict]:
    """Return two parameters after twenty steps, with a pause after ten if there is a way to load, and the state after loading."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in (8192, 100)]
    optimizer = AdamW8bit(parameters, lr=1e-2)
    state = {}
    for step in range(20):
        if step == 10 and load is not None:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamW8bit(parameters, lr=1e-2)
            load(optimizer, saved)
            state = dict(optimizer.state[parameters[0]])
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], state


# %%
def show_resumed(load: Callable[[torch.optim.Optimizer, dict], None]) -> None:
    """Print, for two dtypes of parameters, what loading makes of the state, and whether the run ends as it would have."""
    for dtype in (torch.bfloat16, torch.float32):
        straight, (resumed, state) = trained(dtype, None)[0], trained(dtype, load)
        equal = all(torch.equal(one, other) for one, other in zip(straight, resumed))
        held = [value for value in state.values() if torch.is_tensor(value)]
        print(
            f"parameters in {str(dtype)[6:]}: codes in {str(state['exp_avg'].dtype)[6:]}, absmax in {str(state['exp_avg_absmax'].dtype)[6:]}, "
            f"{tensor_bytes(held) / 8192:.2f} bytes of state a parameter; the same run: {equal}"
        )


show_resumed(lambda optimizer, saved: optimizer.load_state_dict(saved))

# %% [markdown]
# `load_state_dict` takes every floating-point parameter's state to the *parameter's* dtype. It does so on purpose: a state
# saved by one model may be loaded into the same model in another dtype. For an optimizer whose state has dtypes of its own,
# that is wrong. With fp32 the codes survive, as numbers of four bytes each. With bf16 absmax and small moments are rounded.
# bitsandbytes has a loader of its own for this reason.
#
# Write `load_as_saved(optimizer, saved)`, for any optimizer. It loads the state dict `saved`, and afterwards
#
# - the groups' settings are the saved ones;
# - every tensor of the state has the dtype and the numbers that were saved, and is on the device of its parameter;
# - what is no tensor is as it was saved; a parameter without a saved state has none;
# - `saved` is as it was, and stays so while training goes on, in place.
#
# <details><summary>How do I know which state belongs to which parameter?</summary>
#
# In a state dict parameters are numbers. `saved["param_groups"]` lists them, group by group, in the order of
# `optimizer.param_groups`. `saved["state"]` has those that have a state.
# </details>
# <details><summary>The check says that what was cast is cast back</summary>
#
# The digits are lost when `load_state_dict` rounds. Take the tensors from `saved`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "load-as-saved", "locked": false, "schema_version": 3, "solution": true, "task": false}
def load_as_saved(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a state dict into an optimizer, and leave every tensor of its state the dtype that was saved."""
    ### BEGIN SOLUTION
    optimizer.load_state_dict(saved)
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"]):
        for parameter, number in zip(group["params"], theirs["params"]):
            for name, value in saved["state"].get(number, {}).items():
                if torch.is_tensor(value):
                    value = value.to(parameter.device, copy=True)
                optimizer.state[parameter][name] = value
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-load-as-saved", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_load_as_saved(load_as_saved)

# %%
show_resumed(load_as_saved)

# %% [markdown]
# ## 9. In your own words  ·  2 points, marked by hand
#
# A team trains all weights of a model for 20,000 steps. To save memory they change from AdamW to AdamW in eight bits, with the
# same settings. For some hundred steps both runs agree. Later the gradients become small, except in a few rows of each matrix.
# From there on the new run learns more slowly. Someone raises the learning rate, and that helps in part.
#
# In about 120 words: what has happened to $v$, and why did nothing show in the beginning? Why does a higher rate help only in
# part? What would you change, and what does it cost in bytes? Refer to at least two numbers that you measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "slower", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the cause.* With $\beta_2 = 0.999$ a step takes a thousandth of $v$, less than half a gap, so its code
# cannot sink (section 4: 0 of 255 values). It follows its block's absmax, which the few rows with large gradients keep up. $v$
# is too large, and steps are too short by the root of the factor. In the beginning nothing shows because $v$ in fp32 forgets
# slowly, too. *1 point: rate and remedy.* The rate is one number for all, and the factor differs from number to number: where
# $v$ is right, the steps become too long. Round $v$ at random (no bytes, some noise), or keep $v$ in fp32 (4 bytes in place of
# about 1) at least for such tensors. Half points for either part without a number.
#
# **A full answer.** $v$ sticks. One step changes it by a thousandth, rounding takes that back, and no value of the type can
# sink by itself. Its code is multiplied by the block's absmax, and the busy rows keep that high: in section 4 $v$ was 9 times
# too large after 1,500 steps, so steps were a third as long as they should be. In the first hundred steps the exact $v$ has not
# sunk yet, so both runs agree. A higher rate lengthens all steps, also where $v$ is right. I would round $v$ at random: the
# same bytes, and in section 5 the mean was right, with some noise. Or keep $v$ in fp32: five bytes of state a parameter where
# we had two.
#
# **An answer worth one point.** The second moment is stored too coarsely, so small changes are lost and the steps are too
# small. I would use 32 bits for it.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# An optimizer that equals bitsandbytes' to the bit on a CPU. What it saves, in bytes, and why a peak may hide it. A second
# moment that sticks, with the gap that holds it and the noise that frees it. And a loader that brings back what was saved.
#
# ## Sources
#
# - Dettmers et al. (2022), *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861; the data type: Dettmers (2015),
#   arXiv 1511.04561.
# - Dettmers et al. (2023), *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314: section 3 has paged optimizers.
# - Kingma and Ba (2015), *Adam: A Method for Stochastic Optimization*, arXiv 1412.6980; Loshchilov and Hutter (2019),
#   *Decoupled Weight Decay Regularization*, arXiv 1711.05101.
# - Gupta et al. (2015), *Deep Learning with Limited Numerical Precision*, arXiv 1502.02551: rounding at random.
# - PyTorch issue [43706](https://github.com/pytorch/pytorch/issues/43706) and pull request
#   [3658](https://github.com/pytorch/pytorch/pull/3658) (why the state is cast); torchao issue
#   [3314](https://github.com/pytorch/ao/issues/3314). torchao's `bf16_stochastic_round` rounds parameters at random.
# - The model: Allal et al. (2025), *SmolLM2*, arXiv 2502.02737. The reviews: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and
#   Lee (2005).
