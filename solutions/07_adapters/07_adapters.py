# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Adapters: small layers between the large ones
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 100, and 6 of experiments on two CPU cores | 2 of 5 | 14 | 00_start_here; some PyTorch |
#
# Instead of changing the weights of a trained model, one can put something between them: a small network behind each sub-layer,
# which alone is trained. That is an **adapter** (Houlsby et al. 2019).
#
# **When you have finished, you can**
#
# 1. build adapters, put them where Houlsby et al. and Pfeiffer et al. put them, and say beforehand how many parameters that
#    takes;
# 2. keep several adapters in one model, switch between tasks, stack two of them, and make one out of two without an error;
# 3. say, from your own measurements, which memory adapters save, and what they cost each time the model is used.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from autograder.checks.adapters import (
    check_adapted_memory,
    check_adapter,
    check_adapter_bank,
    check_adapter_memory,
    check_adapter_parameters,
    check_add_adapters,
    check_join,
)
from peftlab import plots
from peftlab.llama import PRESETS, Llama, LlamaConfig, causal_loss
from peftlab.progress import predict

UNIT = "07_adapters"

# %% [markdown]
# ## The idea
#
# Let $h$ be what a sub-layer, attention or MLP, gives for a token: $d$ numbers. An adapter squeezes them into $m$ numbers,
# bends these with GELU, spreads them out again, and adds the result to $h$:
#
# $$ \text{adapter}(h) = h + W_\text{up}\; \text{gelu}(W_\text{down}\, h + b_\text{down}) + b_\text{up} $$
#
# $m$ is the width of the **bottleneck**, much smaller than $d$. Read from the inside out, with the line of code beside it:
#
# | | | |
# |---|---|---|
# | squeeze | $z = W_\text{down}\, h + b_\text{down}$, from $d$ numbers to $m$ | `self.down(h)`, an `nn.Linear(d, m)` |
# | bend | $\text{gelu}(z)$ | `F.gelu(z)` |
# | spread out | $W_\text{up}\, \text{gelu}(z) + b_\text{up}$, from $m$ to $d$ | `self.up(...)`, an `nn.Linear(m, d)` |
# | add | $h + \dots$, the residual connection | `h + ...` |
#
# If $W_\text{up}$ and $b_\text{up}$ are zero, an adapter returns $h$, and the model with adapters in it is the model without.
# From there training starts.
#
# Where do adapters stand? A decoder layer adds the output of each sub-layer to what came in, the *residual stream*. The adapter
# stands between sub-layer and addition. Houlsby et al. put one behind attention and one behind the MLP; Pfeiffer et al. (2021)
# found that the one behind the MLP is nearly enough; at the same number of parameters it can be twice as wide.


# %%
def box(axes, x: float, y: float, text: str, colour: str, width: float = 2.0) -> None:
    """Draw a labelled box with its centre at (x, y)."""
    axes.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=colour, edgecolor="black", zorder=2))
    axes.annotate(text, (x, y), ha="center", va="center", fontsize=9, zorder=3)


def decoder_layer(axes, title: str, adapted: Sequence[str]) -> None:
    """Draw a decoder layer, read from the bottom up, with adapters behind the named sub-layers."""
    axes.annotate("", (0, 8.6), (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 2})
    for bottom, sublayer in ((0.5, "attention"), (4.5, "MLP")):
        axes.plot([0, 2, 2, 0], [bottom, bottom, bottom + 3.4, bottom + 3.4], color="black", lw=1, zorder=1)
        box(axes, 2, bottom + 0.7, "norm", "#DDDDDD")
        box(axes, 2, bottom + 1.7, sublayer, "#DDDDDD")
        if sublayer in adapted:
            box(axes, 2, bottom + 2.7, "adapter", "#E69F00")
        axes.annotate("+", (0, bottom + 3.4), ha="center", va="center", bbox={"boxstyle": "circle", "facecolor": "white"})
    axes.set(title=title, xlim=(-0.7, 3.3), ylim=(-0.2, 8.8))
    axes.axis("off")


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 4.6))
decoder_layer(left, "Houlsby: behind both sub-layers", ("attention", "MLP"))
decoder_layer(right, "Pfeiffer: behind the MLP", ("MLP",))
plots.show(
    figure,
    alt="Two decoder layers side by side. A branch leaves the residual stream, passes norm, sub-layer and adapter, and is added.",
)

# %% [markdown]
# *What to see.* Grey is frozen, orange is trained. There are two residual connections, one in the other: the large one, around
# norm, sub-layer and adapter, was there before; the small one is inside the orange box.

# %% [markdown]
# ## 1. Build the adapter  ·  3 points, about 15 minutes, ●○○
#
# Two things decide whether it works:
#
# - **The start.** `up` starts at zero, weight and bias, so that the adapter is the identity, to the bit. `down` starts at
#   random and small: `nn.init.normal_` with a standard deviation of 0.01 for the weight, and zero for its bias. (Were both
#   weights zero, neither would ever learn. Why?) Houlsby et al. start *near* the identity, with both matrices small, and cut
#   the normal distribution off at two standard deviations, which leaves one of 0.0088. That is accepted too: in a large
#   adapter, the check wants between 0.0084 and 0.0105, because chance takes or adds a little.
# - **What bends.** Without GELU, `up` and `down` are one matrix of rank $m$ that could be multiplied into the sub-layer's last
#   weight; unit 08's LoRA comes close to that. With it, nothing can be merged. This costs time each time the model is used, and
#   we shall measure how much.
#
# <details><summary>RuntimeError: mat1 and mat2 shapes cannot be multiplied</summary>
#
# `nn.Linear(a, b)` takes `a` features and gives `b`. `down` goes from `hidden` to `bottleneck`, `up` the other way.
# </details>
# <details><summary>An error about a leaf Variable that requires grad, used in an in-place operation</summary>
#
# `nn.init.zeros_(self.up.weight)` works without autograd watching. So does `self.up.weight.data.zero_()`, but not
# `self.up.weight.zero_()`.
# </details>
# <details><summary>An error about a variable needed for gradient computation that has been modified</summary>
#
# `h += change` writes into `h`, which backward needs as it was. `h + change` makes a new tensor.
# </details>
# <details><summary>The memory check says that forward saves too much</summary>
#
# Besides `h` and the weights, two tensors of `bottleneck` numbers a token need to be kept: GELU's input and its output. Each
# operation that you write out keeps tensors of its own. Is there a single function for it?
# </details>


# %% nbgrader={"grade": false, "grade_id": "adapter", "locked": false, "schema_version": 3, "solution": true, "task": false}
class Adapter(nn.Module):
    """h + up(gelu(down(h))), with GELU as `F.gelu` computes it by default (Houlsby et al. 2019, section 2.1).

    Attributes:
        down: `nn.Linear` from `hidden` to `bottleneck` features, small and random at the start.
        up: `nn.Linear` from `bottleneck` to `hidden` features, zero at the start.
    """

    def __init__(self, hidden: int, bottleneck: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.normal_(self.down.weight, std=0.01)
        for zero_at_the_start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero_at_the_start)
        ### END SOLUTION

    def forward(self, h: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Return h and what the bottleneck adds to it, in h's dtype."""
        ### BEGIN SOLUTION
        return h + self.up(F.gelu(self.down(h)))
        ### END SOLUTION


# %% [markdown]
# The first check looks at new adapters, then gives one random weights and compares its output, and all gradients, with the
# formula. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-adapter", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapter(Adapter)

# %% [markdown]
# The second *measures*: it takes a training step and counts the bytes of every gradient, of the optimizer's state, and of all
# that forward keeps for backward. *1 point.*

# %% nbgrader={"grade": true, "grade_id": "check-adapter-memory", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_adapter_memory(Adapter)

# %% [markdown]
# ### The first step
#
# At the start `up` is zero, so whatever `down` does is multiplied by zero, and its gradient is zero as well. Is it stuck? Look
# at both gradients for two steps.

# %%
torch.manual_seed(0)
adapter, h, target = Adapter(64, 8), torch.randn(32, 64), torch.randn(32, 64)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
for step in (1, 2):
    optimizer.zero_grad()
    (adapter(h) - target).square().mean().backward()
    print(f"step {step}: gradient of down {adapter.down.weight.grad.norm():.1e}, of up {adapter.up.weight.grad.norm():.1e}")
    optimizer.step()

# %% [markdown]
# `up` learns first, and from the second step on `down` does too. With both at zero, both gradients would stay zero: the one is
# multiplied by `up`, the other by what comes out of GELU, and gelu(0) = 0.

# %% [markdown]
# ## 2. Put it in its place  ·  4 points, about 20 minutes, ●●○
#
# In a decoder layer of our LLaMA there are two additions, and the adapter belongs between sub-layer and addition:
#
# | before | after |
# |---|---|
# | `x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)` | `x = x + adapter(self.self_attn(...))` |
# | `x + self.mlp(self.post_attention_layernorm(x))` | `x + adapter(self.mlp(...))` |
#
# You need not touch that code. `Adapted` takes the place of a sub-layer, calls it with whatever arguments it gets, and passes
# its output through the adapter. `add_adapters`
#
# 1. freezes the whole model: embedding, norms and head too (Houlsby et al. train the norms as well; we don't, to see what
#    adapters do alone);
# 2. in every decoder layer, replaces each of the sub-layers named in `places` by an `Adapted` of it and a new `Adapter` of
#    yours, in the model's dtype and on its device.
#
# Why does the order of 1 and 2 matter? (So that your mark does not depend on exercise 1, the checks lend `add_adapters` an
# `Adapter` of their own, under that name.)
#
# <details><summary>TypeError: forward() missing 3 required positional arguments: 'cos', 'sin' and 'mask'</summary>
#
# Attention is called with four arguments, the MLP with one. `def forward(self, *args)` takes all there are as a tuple, and
# `self.sublayer(*args)` hands them on.
# </details>
# <details><summary>RuntimeError: mat1 and mat2 must have the same dtype</summary>
#
# A new `nn.Linear` is in fp32, on the CPU. `module.to(device, dtype)` moves and converts a whole module; any of the model's
# weights knows both.
# </details>
# <details><summary>The logits have changed before anything was trained</summary>
#
# The sub-layer's output goes through the adapter and nowhere else: the residual connection that you know from exercise 1 is
# *in* it.
# </details>
# <details><summary>How do I replace a sub-layer by its name?</summary>
#
# `getattr(layer, "mlp")` is `layer.mlp`, and `setattr(layer, "mlp", new)` replaces it.
# </details>


# %% nbgrader={"grade": false, "grade_id": "add-adapters", "locked": false, "schema_version": 3, "solution": true, "task": false}
class Adapted(nn.Module):
    """A sub-layer whose output passes through an adapter.

    Attributes:
        sublayer: the very module that was given.
        adapter: what its output passes through.
    """

    def __init__(self, sublayer: nn.Module, adapter: nn.Module):
        super().__init__()
        ### BEGIN SOLUTION
        self.sublayer, self.adapter = sublayer, adapter
        ### END SOLUTION

    def forward(self, *args) -> Float[Tensor, "batch seq hidden"]:
        """Call the sub-layer with these arguments, and return what the adapter makes of its output."""
        ### BEGIN SOLUTION
        return self.adapter(self.sublayer(*args))
        ### END SOLUTION


def add_adapters(model: Llama, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> None:
    """Freeze the model, and put a new `Adapter` behind these sub-layers of every decoder layer, in its dtype and on its device.

    Args:
        bottleneck: the width of every adapter's bottleneck.
        places: names of sub-layers of a decoder layer.
    """
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    like = model.lm_head.weight
    for layer in model.model.layers:
        for place in places:
            adapter = Adapter(model.config.hidden_size, bottleneck).to(like.device, like.dtype)
            setattr(layer, place, Adapted(getattr(layer, place), adapter))
    ### END SOLUTION


# %% [markdown]
# The first check puts adapters into a tiny LLaMA, looks at its logits before and after, gives the adapters random weights, and
# looks at logits and gradients again. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-add-adapters", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_add_adapters(Adapted, add_adapters)

# %% [markdown]
# The second takes a training step with such a model, in fp32 and in bf16, and counts bytes. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-adapted-memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapted_memory(Adapted, add_adapters)

# %% [markdown]
# ### Nothing has changed, and that can be proved
#
# With `up` at zero every adapter adds zero, which rounds nothing. So the logits must be the same, not about the same:

# %%
torch.manual_seed(0)
tiny = Llama(PRESETS["tiny"])
input_ids = torch.randint(0, 256, (2, 12))
before = tiny(input_ids)
add_adapters(tiny, 8)
print("largest difference of any logit:", (tiny(input_ids) - before).abs().max().item())

# %% [markdown]
# ## 3. How many parameters?  ·  2 points, about 15 minutes, ●●○
#
# With $d$ features and a bottleneck of $m$, `down` has $md$ weights and $m$ biases, `up` has $dm$ weights and $d$ biases.
# Together that is the paper's formula, for *each* adapter:
#
# $$ 2md + d + m $$
#
# Predict first. SmolLM2 has 134,515,008 parameters, 30 layers and $d = 576$. With bottlenecks of 16 at both places, how many
# parameters are trained, and what share of the model is that?

# %%
my_count = predict("parameters of bottlenecks of 16 at both places", None)

# %% [markdown]
# Now write it down as a function, and turn it round: given a budget, how wide may the bottleneck be? All counts are whole
# numbers.
#
# <details><summary>The bottleneck is one too large or one too small</summary>
#
# The budget is the most there may be, and exactly the budget is allowed: solve the formula for $m$ and round *down*. `//` does
# that without going through floats.
# </details>
# <details><summary>The MLP is wider inside. Does that matter?</summary>
#
# The adapter stands behind `down_proj`, where there are `hidden_size` features again.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adapter-parameters", "locked": false, "schema_version": 3, "solution": true, "task": false}
def adapter_parameters(config: LlamaConfig, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return how many parameters all adapters of a LLaMA have together.

    Args:
        bottleneck: the width of every adapter's bottleneck.
        places: behind which sub-layers of each decoder layer one stands.
    """
    ### BEGIN SOLUTION
    hidden = config.hidden_size
    return config.num_hidden_layers * len(places) * (2 * bottleneck * hidden + hidden + bottleneck)
    ### END SOLUTION


def largest_bottleneck(config: LlamaConfig, budget: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return the largest bottleneck with which all adapters together have at most `budget` parameters.

    Raises:
        ValueError: if the budget is too small for a bottleneck of 1.
    """
    ### BEGIN SOLUTION
    each = budget // (config.num_hidden_layers * len(places))
    bottleneck = (each - config.hidden_size) // (2 * config.hidden_size + 1)
    if bottleneck < 1:
        raise ValueError(f"{budget} parameters are too few for adapters")
    return bottleneck
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adapter-parameters", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapter_parameters(adapter_parameters, largest_bottleneck)

# %% [markdown]
# A formula should be compared with the thing itself. On the device "meta" there are shapes without numbers, so that a model of
# any size can be built and counted:


# %%
def count(name: str, bottleneck: int, places: Sequence[str]) -> int:
    """Return how many parameters are trained after `add_adapters`, counted."""
    with torch.device("meta"):
        model = Llama(PRESETS[name])
        add_adapters(model, bottleneck, places)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


PLACEMENTS = {"Houlsby, 16": (16, ("self_attn", "mlp")), "Pfeiffer, 32": (32, ("mlp",))}
WHOLE = {"SmolLM2-135M": 134_515_008, "LLaMA-7B": 6_738_415_616}
for name, whole in WHOLE.items():
    for placement, choice in PLACEMENTS.items():
        counted = count(name, *choice)
        assert counted == adapter_parameters(PRESETS[name], *choice)
        print(f"{name:<14} {placement:<14}{counted:>11,} parameters, {counted / whole:.3%} of {whole:,}")
my_count.compare(count("SmolLM2-135M", *PLACEMENTS["Houlsby, 16"]))

# %% [markdown]
# Overviews of efficient fine-tuning say that adapters train 1 to 5% of a model's parameters. With a bottleneck of 16 we are
# below that, and on a 7B model far below. Which bottlenecks do they mean?

# %%
for name, whole in WHOLE.items():
    for share in (0.01, 0.036, 0.05):
        widest = largest_bottleneck(PRESETS[name], int(share * whole))
        print(
            f"{name:<14} at most {share:5.1%}: bottleneck {widest:>4}, {widest / PRESETS[name].hidden_size:.3f} of the hidden size"
        )

# %% [markdown]
# *What to see.* The share follows from how wide the bottleneck is *relative to the model*: adapters grow with $d$, the model's
# matrices with $d^2$. So 16 features are eight tenths of a percent of the small model and one tenth of a percent of the large
# one. Those 1 to 5% mean hundreds of features at 7 billion parameters. Houlsby et al. trained 3.6% a task on BERT, and came
# within 0.4% of full fine-tuning on GLUE.

# %% [markdown]
# ## 4. Measured: which memory do adapters save?
#
# A training step holds five kinds of bytes: the weights, their gradients, the optimizer's state (AdamW keeps two numbers for
# each trained one), the *activations* that forward leaves for backward, and whatever is needed for a moment. Which of them will
# be much smaller with adapters than in full fine-tuning? And LoRA, which sits at all seven linear layers: will it leave more
# activations than adapters at two places, or fewer?

# %%
# A set of names, of "parameters", "gradients", "optimizer_state" and "activations":
my_smaller = predict("kinds of bytes of which adapters need less than half", None)
my_larger = predict("more activations: LoRA or adapters", None)


# %% [markdown]
# To compare, here is the least of a LoRA. (Unit 08 builds a better one.) It adds a product of two thin matrices to a linear
# layer, and being linear it can be merged into that layer's weight.


# %%
class WithLoRA(nn.Module):
    """A linear layer and the two factors that LoRA trains beside it."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(0.01 * torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.A.T @ self.B.T

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add the product to the weight, and return the linear layer."""
        self.linear.weight += self.B @ self.A
        return self.linear


# %%
def replace_each(model: nn.Module, kind: type, new: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every module of this kind in the decoder layers by `new` of it."""
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and not isinstance(parent, WithLoRA | Adapter):
                setattr(parent, name, new(child))
    return model


def with_lora(model: Llama) -> Llama:
    """Put LoRA of rank 8 beside every linear layer."""
    return replace_each(model.requires_grad_(False), nn.Linear, lambda linear: WithLoRA(linear, rank=8))


def with_adapters(model: Llama, placement: str = "Houlsby, 16", from_layer: int = 0) -> Llama:
    """Give the model your adapters, and take them out again below a layer."""
    add_adapters(model, *PLACEMENTS[placement])
    for layer in model.model.layers[:from_layer]:
        for place in PLACEMENTS[placement][1]:
            setattr(layer, place, getattr(layer, place).sublayer)
    return model


# %% [markdown]
# One of the ways that we measure leaves the lower half of the layers without adapters. Rücklé et al. (2021) call this
# *AdapterDrop*. Before you look: which bytes will that save?
#
# We take one step of SmolLM2 on a real batch, and follow every allocation (on a GPU, we ask the allocator). This loads the
# model: about 15 seconds the first time, one second later on.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.memory import measure_training_step, step_table
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device, seconds_of

device = find_device()
model, tokenizer = load_smollm2()
reviews, calls = tasks.movie_reviews(tokenizer), tasks.tool_calls(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))

# %% tags=["experiment"]
WAYS = {
    "full fine-tuning": lambda model: model,
    "LoRA, rank 8": with_lora,
    "Houlsby, 16": with_adapters,
    "Pfeiffer, 32": lambda model: with_adapters(model, "Pfeiffer, 32"),
    "Houlsby, upper half": lambda model: with_adapters(model, from_layer=15),
}
measured = {}
for way, prepare in WAYS.items():
    model = prepare(load_smollm2()[0]).to(device)
    measured[way] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

# %% tags=["experiment"]
print(step_table(measured))
shares = {
    kind: getattr(measured["Houlsby, 16"], kind) / getattr(measured["full fine-tuning"], kind)
    for kind in ("parameters", "gradients", "optimizer_state", "activations")
}
for kind, share in shares.items():
    print(f"Houlsby, 16: {kind.replace('_', ' ')} of {share:.1%} the size of full fine-tuning's")
my_smaller.compare({kind for kind, share in shares.items() if share < 0.5})
more_with_lora = measured["LoRA, rank 8"].activations > measured["Houlsby, 16"].activations
my_larger.compare("LoRA" if more_with_lora else "adapters")
figure = plots.memory_bars(
    measured, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"
)
plots.show(
    figure,
    alt="A stacked bar for each way to train, of weights, gradients, optimizer state and activations, with the peak across.",
)

# %% [markdown]
# *What to see.* Gradients and optimizer state have almost disappeared, because only the trained parameters have them. The
# weights are all there. Activations have shrunk less: to reach the lowest adapter the gradient has to pass through everything
# above it, and each nonlinearity, norm and attention on the way needs what it saw. What a *frozen* linear layer saw is not
# needed, so that adapters at two places leave less than LoRA does, whose $A$ wants the input of each of the seven (four
# tensors: some of the seven read the same one).
#
# With adapters in the upper half only, the gradient goes no further down than the lowest of these. Nothing below keeps
# anything: half of the activations are gone. (Unit 03 gets its savings in the same way.)
#
# What would this be on a model of 7 billion parameters? Fake tensors, which have shapes and no numbers, let us measure it here.

# %% tags=["experiment"]
from peftlab.simulate import simulate_training_step

for way, prepare in {"full": lambda model: None, "Houlsby, 64": lambda model: add_adapters(model, 64)}.items():
    step = simulate_training_step(PRESETS["LLaMA-7B"], prepare, dtype="bf16", batch_size=1, sequence_length=512)
    sizes = (step.parameters, step.gradients, step.optimizer_state, step.activations, step.peak)
    names = ("weights", "gradients", "optimizer", "activations", "peak")
    print(f"LLaMA-7B, {way:<12}" + "".join(f"  {name} {size / 1e9:.2f} GB" for name, size in zip(names, sizes)))

# %% [markdown]
# ## 5. Several adapters in one place  ·  2 points, about 15 minutes, ●●○
#
# The base never changes, so one copy of it can serve many tasks, each with a set of adapters of its own. An `AdapterBank`
# stands where an adapter stood and holds several, by name. Its list `active` says which of them work: none (the base alone),
# one, or several *stacked*, one behind the other. Stacking is the idea of MAD-X (Pfeiffer et al. 2020): train an adapter for a
# language, then one for a task on top of it; exchange the lower one, and the task has learned another language.
#
# `activate(model, "swahili", "reviews")` switches every bank of the model, however deep inside: swahili first, reviews on what
# it gives. Only the *last* one learns; all other adapters are frozen, and become trainable again when their turn comes.
# `activate(model)` switches all off. What is in no bank stays as it is, trainable or frozen. If a bank lacks one of the names,
# a `ValueError` is raised and nothing has changed, in any bank.
#
# <details><summary>The names are not in the state dict, or nothing learns</summary>
#
# PyTorch finds the modules in an `nn.ModuleDict`, not those in a plain dict.
# </details>
# <details><summary>How do I find the banks?</summary>
#
# `model.modules()` walks through all modules, and `isinstance(module, AdapterBank)` tells which of them are banks.
# </details>
# <details><summary>A refused call has changed some banks already</summary>
#
# Two loops, one after the other: the first only looks, the second only changes.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adapter-bank", "locked": false, "schema_version": 3, "solution": true, "task": false}
class AdapterBank(nn.Module):
    """Several adapters in one place, of which some work, one behind the other.

    Attributes:
        adapters: `nn.ModuleDict`, empty at first: `bank.adapters["reviews"] = Adapter(576, 16)` puts one in.
        active: the names of those that work, in their order; none at first.
    """

    def __init__(self):
        super().__init__()
        ### BEGIN SOLUTION
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        ### END SOLUTION

    def forward(self, h: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Return what the active adapters make of h, each reading what the one before it gives; h itself if there are none."""
        ### BEGIN SOLUTION
        for name in self.active:
            h = self.adapters[name](h)
        return h
        ### END SOLUTION


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters work, in this order, in every `AdapterBank` of the model, and only the last of them learn.

    Raises:
        ValueError: if a bank lacks one of the names; nothing has changed then.
    """
    ### BEGIN SOLUTION
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    for bank in banks:
        missing = set(names) - set(bank.adapters)
        if missing:
            raise ValueError(f"a bank has no adapter {sorted(missing)}; it has {sorted(bank.adapters)}")
    for bank in banks:
        bank.active = list(names)
        bank.adapters.requires_grad_(False)
        for name in names[-1:]:
            bank.adapters[name].requires_grad_(True)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adapter-bank", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapter_bank(AdapterBank, activate)

# %% [markdown]
# ## 6. On a real model, one base for two tasks
#
# Now your adapters meet SmolLM2-135M. First the model gets banks with two adapters each, which share the places of Houlsby et
# al.


# %%
def with_banks(model: Llama, names: Sequence[str], bottleneck: int = 16) -> Llama:
    """Give the model an `AdapterBank` behind each sub-layer, with an adapter for each of the names."""
    add_adapters(model, bottleneck)
    for adapted in [module for module in model.modules() if isinstance(module, Adapted)]:
        first, bank = adapted.adapter, AdapterBank()
        for name in names:
            bank.adapters[name] = Adapter(first.down.in_features, bottleneck).to(first.down.weight.device)
        adapted.adapter = bank
    return model


def save_task(model: nn.Module, name: str, path: str | Path) -> None:
    """Write one task's adapters to a safetensors file, under their full names."""
    from safetensors.torch import save_file

    save_file({key: tensor for key, tensor in model.state_dict().items() if f".adapters.{name}." in key}, path)


# %% [markdown]
# The first task is to judge film reviews: after `Review: ...` and `This movie is`, does the model find ` good` or ` bad` more
# likely? Untrained it is right in about seven of ten cases. `fine_tune` scores the model, trains what is trainable, scores it
# again and writes a results row. The learning rates are those that our sweep chose (section 7). About a minute and a half on
# two CPU cores, ten seconds on an H200.

# %% tags=["experiment"]
from peftlab import comparison
from peftlab.training import fine_tune

found = {task: comparison.rows("adapters", task) for task in comparison.TASKS}
rates = {task: comparison.chosen_rate(rows) for task, rows in found.items() if rows}
torch.manual_seed(0)  # for the start of `down`
model, tokenizer = load_smollm2()
with_banks(model, ["reviews", "calls"])
activate(model, "reviews")
reviews_row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="adapters", save=lambda path: save_task(model, "reviews", path),
    steps=40, learning_rate=rates.get("movie_reviews", 1e-3), bottleneck=16,
)  # fmt: skip
save_task(model, "reviews", "reviews.safetensors")
with torch.no_grad():
    with_reviews = model.model(input_ids)  # to be held against what comes when the second task has been learned

# %% [markdown]
# The second task, `tool_calls`, asks for JSON, which the untrained model never gets right. The same base, the other adapter;
# the first one is frozen and switched off. Only 30 steps, about a minute.

# %% tags=["experiment"]
print(calls.test[0]["prompt"], calls.test[0]["answer"])
activate(model, "calls")
calls_row = fine_tune(
    model, tokenizer, calls, unit=UNIT, method="adapters", save=lambda path: save_task(model, "calls", path),
    steps=30, learning_rate=rates.get("tool_calls", 1e-3), bottleneck=16, batch_size=8, score_before=0.0,
)  # fmt: skip
save_task(model, "calls", "calls.safetensors")

# %% tags=["experiment"]
for row in (reviews_row, calls_row):
    print(
        f"{row.task:<14}{row.score_before:6.1%} -> {row.score_after:6.1%}, {row.trainable_parameters:,} trained, "
        f"{row.adapter_bytes / 1e6:,.1f} MB file, {row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
    )
losses = {row.task: row.losses for row in (reviews_row, calls_row)}
plots.show(
    plots.loss_curves(losses, "Training loss of two adapters on one base"),
    alt="The training loss of each of the two tasks against the optimizer step.",
)

# %% tags=["experiment"]
plots.show(
    plots.before_after([reviews_row, calls_row], "SmolLM2-135M before and after training its adapters"),
    alt="Two bars for each of the two tasks: the score before training and after it.",
)

# %% [markdown]
# *What to see.* With 480 test reviews, one standard error is about 1.4 points. *Forgetting* is by how much the loss on
# newspaper sentences has risen while the adapter is switched on, in nats per token. It can be a good deal: the adapter was only
# ever asked for one of two words.
#
# ### Switch
#
# Has learning the second task hurt the first? With the adapter for reviews switched on again, the model should do to the bit
# what it did before. And with none, it should be the untrained base, which has forgotten nothing. Both can be tested on the
# hidden states of a batch:

# %% tags=["experiment"]
import time

few, few_calls = (task.test.select(range(settings.examples(48))) for task in (reviews, calls))
for names in ([], ["reviews"], ["calls"], ["reviews", "calls"], ["calls", "reviews"]):
    started = time.perf_counter()
    activate(model, *names)
    switched = 1e3 * (time.perf_counter() - started)
    print(
        f"{' then '.join(names) or 'the base alone':<22}switched in {switched:4.1f} ms, "
        f"reviews right {reviews.score(model, few):4.0%}, calls right {calls.score(model, few_calls):4.0%}"
    )
untrained = load_smollm2()[0].to(device).model
with torch.no_grad():
    activate(model, "reviews")
    print("with `reviews`, to the bit as before `calls` was trained:", torch.equal(model.model(input_ids), with_reviews))
    activate(model)
    print("with none, to the bit the untrained base:", torch.equal(model.model(input_ids), untrained(input_ids)))
del untrained

# %% [markdown]
# *What to see.* Each adapter is good at its own task. Stacked they get in each other's way, in one order or in both: neither
# was trained with the other beneath it. (In MAD-X the upper one is trained with the lower one in its place.)
#
# The file holds one task and nothing else. A fresh model needs it and the base:

# %% tags=["experiment"]
from safetensors.torch import load_file

fresh = with_banks(load_smollm2()[0], ["reviews"]).to(device)
unknown = fresh.load_state_dict(load_file("reviews.safetensors"), strict=False).unexpected_keys
activate(fresh, "reviews")
activate(model, "reviews")
hidden_states = [one.model(input_ids) for one in (fresh, model)]
print(f"unknown names: {unknown}, largest difference: {(hidden_states[0] - hidden_states[1]).abs().max().item()}")

# %% [markdown]
# ## 7. The comparison, measured
#
# Which learning rate? A method that looks useless often just has the wrong one. These rows come with the course, for every
# method and both tasks.
#
# Each rate was run with one seed. What counts is the *late loss*, the mean training loss of the last ten steps. No row of the
# data comes twice in a run, so this is a loss on unseen rows, and the test split is not used. The best rate got two more seeds.
# If their mean then lost to another rate's single run, that rate got two more as well.

# %%
from peftlab import comparison

COMPARED = {
    "Houlsby, 16": ("adapters", ""),
    "Pfeiffer, 32": ("adapters", "pfeiffer"),
    "LoRA, rank 8": ("lora", ""),
    "full": ("full", ""),
}
shipped = plots.show_comparison(COMPARED, "adapters")

# %% [markdown]
# *What to see.* Each method has a valley of its own: full fine-tuning's lies at much smaller rates than those of the methods
# that train little. (On reviews, at 0.003, LoRA and Pfeiffer's adapters learn with two seeds and fail with the third: a single
# run would not have told.)
#
# Adapters behind the MLP alone, twice as wide, do as well as those at both places: the differences are smaller than the spread
# over seeds, on either task. They cost fewer activations, and half as many products at inference that wait for each other
# (section 8). Nor is there a difference beyond the spread to LoRA or to full fine-tuning. But look at the last column of the
# first table: adapters score about as high, and forget most. (The share is of the model *with* its adapters; in section 3 it
# was of the model without.)

# %% [markdown]
# ## 8. What cannot be merged is paid for at inference
#
# After training, LoRA is added to the weights and costs nothing. An adapter stays. How much time does it take? First count the
# arithmetic: a linear layer does one multiplication and addition per weight and token, so the adapters' share of the parameters
# is their share of the work. For SmolLM2's decoder layers:

# %%
in_layers = WHOLE["SmolLM2-135M"] - PRESETS["SmolLM2-135M"].vocab_size * PRESETS["SmolLM2-135M"].hidden_size
print(f"adapters add {adapter_parameters(PRESETS['SmolLM2-135M'], 16) / in_layers:.1%} to the arithmetic")

# %% [markdown]
# Predict: by how many percent will a forward pass get slower? Say it for one token (as when text is generated) and for 256
# tokens at once.

# %%
my_slowdown = predict("percent by which adapters slow a forward pass", {"1 token": None, "256 tokens": None})


# %% [markdown]
# Time is noisy, on a machine with other things to do all the more. So each model takes turns with the plain one, and what
# counts is the median over many turns of the *ratio* of the two in one turn. (Models are prepared one after the other, so that
# memory holds two of these at a time.)


# %% tags=["experiment"]
@torch.inference_mode()
def slowdown(plain: nn.Module, other: nn.Module, input_ids: Tensor, turns: int) -> float:
    """Return by what factor a model's decoder layers are slower than those of the plain one."""
    ratios = []
    for _ in range(turns + 1):
        seconds = []
        for model in (plain, other):
            seconds.append(seconds_of(lambda: model.model(input_ids), input_ids.device))
        ratios.append(seconds[1] / seconds[0])
    return median(ratios[1:])  # the first turn also sets things up


# %% tags=["experiment"]
served = {
    "LoRA, merged": lambda model: replace_each(with_lora(model), WithLoRA, WithLoRA.merged),
    "LoRA, not merged": with_lora,
    "Houlsby, 16": with_adapters,
    "Houlsby, upper half": lambda model: with_adapters(model, from_layer=15),
    "Pfeiffer, 32": lambda model: with_adapters(model, "Pfeiffer, 32"),
}
tokens = torch.randint(0, 49_152, (1, 256), generator=torch.Generator().manual_seed(0)).to(device)
plain = load_smollm2()[0].to(device)
factors: dict[str, dict[str, float]] = {"1 token": {}, "256 tokens": {}}
for name, prepare in served.items():
    other = prepare(load_smollm2()[0]).to(device)
    factors["1 token"][name] = slowdown(plain, other, tokens[:, :1], settings.steps(40))
    factors["256 tokens"][name] = slowdown(plain, other, tokens, settings.steps(10))
    del other  # before the next one is loaded
del plain

# %% tags=["experiment"]
figure, axes = plt.subplots(figsize=(7, 3))
for number, (length, found) in enumerate(factors.items()):
    slower = [100 * (factor - 1) for factor in found.values()]
    offset = 0.4 * number - 0.2
    axes.barh([position + offset for position in range(len(found))], slower, 0.38, color=plots.SERIES[number], label=length)
    for position, value in enumerate(slower):
        axes.annotate(
            f"{value:+.0f}", (max(value, 0), position + offset), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
axes.set_yticks(range(len(served)), list(served))
axes.invert_yaxis()
axes.margins(x=0.12)  # room for the number behind the longest bar
axes.set(title="How much slower a forward pass is than the plain model's", xlabel="percent")
axes.legend(frameon=False)
plots.show(
    figure,
    alt="Two bars for each way: by how many percent a forward pass is slower than the plain model's, for 1 token and for 256.",
)
my_slowdown.compare({length: 100 * (found["Houlsby, 16"] - 1) for length, found in factors.items()})

# %% [markdown]
# *What to see.* Merged LoRA is the plain model again; what its bar shows is the noise. Adapters cost more than their
# arithmetic, most of all for a single token. Why for a single one? Time one adapter by itself, with more and more tokens:

# %% tags=["experiment"]
one_adapter = Adapter(576, 16).to(device)
with torch.inference_mode():
    for count in (1, 16, 256):
        h = torch.randn(1, count, 576, device=device)
        microseconds = 1e6 * median(seconds_of(lambda: one_adapter(h), device) for _ in range(201))
        print(f"{count:>4} tokens: {microseconds:>6.0f} µs, {microseconds / count:>6.1f} µs a token")

# %% [markdown]
# *What to see.* Sixteen times the arithmetic takes less than twice the time. So with one token most of the time is not
# arithmetic: each of the small operations has to be *started*, one behind the other. On many tokens that cost is shared. Hu et
# al. (2022, table 1) found adapters slow on a GPU, too, with GPT-2 medium: 19.8 ms without adapters, 25.8 ms with Houlsby's, at
# batch size 1 and 128 tokens. Rücklé et al. (2021) report 4 to 6% on large batches.
#
# But look at LoRA that is *not* merged: two small products at each of seven places take their time as well. Merging is what is
# free, and merging means one task for each copy of the weights.

# %% [markdown]
# ## 9. Compared with an oracle
#
# Is what you built an *adapter*, or something like it? peft, our yardstick in other units, has no Houlsby adapter. So here is
# one written another way: a `transformers` LLaMA that nobody has touched, a *hook* behind each attention and MLP that replaces
# its output, products written in einsum, GELU from its definition. Same weights, same tokens, 20 AdamW steps; only rounding may
# differ.

# %% tags=["experiment"]
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from peftlab.training import trainable, twenty_steps

torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
ours = Llama(PRESETS["tiny"])
ours.load_state_dict(theirs.state_dict())
theirs.requires_grad_(False)
add_adapters(ours, 8)


# %% tags=["experiment"]
def bottleneck_behind(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Let a hook replace the module's output by h + W_up gelu(W_down h + b_down) + b_up."""

    def hook(module, inputs, output):
        h = output[0] if isinstance(output, tuple) else output  # transformers' attention returns a tuple
        z = torch.einsum("bsd,md->bsm", h, weights["down.weight"]) + weights["down.bias"]
        bent = z * (1 + torch.erf(z / 2**0.5)) / 2
        new = h + torch.einsum("bsm,dm->bsd", bent, weights["up.weight"]) + weights["up.bias"]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    module.register_forward_hook(hook)


oracle = []
for our_layer, their_layer in zip(ours.model.layers, theirs.model.layers):
    for place in ("self_attn", "mlp"):
        own = getattr(our_layer, place).adapter.named_parameters()
        copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in own}
        bottleneck_behind(getattr(their_layer, place), copies)
        oracle += copies.values()

# %% tags=["experiment"]
our_losses = twenty_steps(trainable(ours).values(), lambda ids: causal_loss(ours, ids, ids), 1e-2)
their_losses = twenty_steps(oracle, lambda ids: theirs(input_ids=ids, labels=ids).loss, 1e-2)

# %% tags=["experiment"]
apart = ((our_losses - their_losses).abs() / their_losses).max().item()
print(f"first losses {our_losses[0]:.6f} and {their_losses[0]:.6f}, last {our_losses[-1]:.6f} and {their_losses[-1]:.6f}")
print(f"largest relative difference of any loss: {apart:.1e}")
assert apart <= 1e-5, "your adapters and the oracle's have parted ways: run the checks above again"

# %% [markdown]
# ## 10. Bug hunt: one adapter out of two  ·  1 point, about 10 minutes, ●●○
#
# *After peft issues 1155 and 3761.* Two adapters were trained for two tasks, and somebody wants one that does a little of both:
# its change of $h$ should be $w_1$ times the first one's plus $w_2$ times the second one's. In peft, functions that combine
# LoRA adapters have been wrong without a word, more than once: weights that reached $A$ and not $B$, scalings and biases left
# out. Both issues use the same test: with *weight 1 for one adapter, and 0 or nothing else beside it, that adapter must come
# back.* The function below passes it.


# %%
def join_with_a_bug(first: dict[str, Tensor], second: dict[str, Tensor], weights: tuple[float, float]) -> dict[str, Tensor]:
    """Return the weighted sum of two adapters' state dicts, name by name."""
    return {name: weights[0] * first[name] + weights[1] * second[name] for name in first}


# %% [markdown]
# Here is a sharper test. The features of a bottleneck have no order: an adapter whose features are shuffled, in `down` and in
# `up` alike, does what it did. Then the half of it plus the half of its shuffled copy is the adapter itself.


# %%
def change(adapter: dict[str, Tensor], h: Tensor) -> Tensor:
    """Return what an adapter adds to h."""
    return F.linear(F.gelu(F.linear(h, adapter["down.weight"], adapter["down.bias"])), adapter["up.weight"], adapter["up.bias"])


torch.manual_seed(0)
shapes = {"down.weight": (8, 64), "down.bias": (8,), "up.weight": (64, 8), "up.bias": (64,)}
trained = {name: torch.randn(shape) for name, shape in shapes.items()}
order = torch.randperm(8)
shuffled = trained | {name: trained[name][order] for name in ("down.weight", "down.bias")}
shuffled["up.weight"] = trained["up.weight"][:, order]

h = torch.randn(100, 64)
for name, adapter in {
    "shuffled": shuffled,
    "joined (1, 0)": join_with_a_bug(trained, shuffled, (1.0, 0.0)),
    "joined (½, ½)": join_with_a_bug(trained, shuffled, (0.5, 0.5)),
}.items():
    off = (change(adapter, h) - change(trained, h)).norm() / change(trained, h).norm()
    print(f"{name:<15} is off by {off:.1%} of the change")

# %% [markdown]
# What is wrong with adding name by name? There *is* an adapter that does exactly what was wanted. Write `join`, which returns
# its state dict.
#
# <details><summary>I see no bug</summary>
#
# Between `down` and `up` stands GELU. Is the average of two bent things the bent average?
# </details>
# <details><summary>I see no way: the sum of two such networks is not one of them</summary>
#
# It is one with a wider bottleneck. GELU works on each feature by itself.
# </details>
# <details><summary>The check says that the weights are applied before GELU</summary>
#
# gelu(w z) is not w gelu(z). Which of the four tensors come after it?
# </details>


# %% nbgrader={"grade": false, "grade_id": "join", "locked": false, "schema_version": 3, "solution": true, "task": false}
def join(first: dict[str, Tensor], second: dict[str, Tensor], weights: tuple[float, float]) -> dict[str, Tensor]:
    """Return the state dict of one adapter that adds w1 times what the first adds to h, plus w2 times what the second adds.

    Args:
        first, second: state dicts of adapters with the same hidden size and dtype, left as they are: "down.weight" of shape
            (bottleneck, hidden), "down.bias" of (bottleneck,), "up.weight" of (hidden, bottleneck), "up.bias" of (hidden,).
            Their bottlenecks may differ.
        weights: w1 and w2, which may be negative and need not add up to one.
    """
    ### BEGIN SOLUTION
    w1, w2 = weights
    return {
        "down.weight": torch.cat([first["down.weight"], second["down.weight"]]),
        "down.bias": torch.cat([first["down.bias"], second["down.bias"]]),
        "up.weight": torch.cat([w1 * first["up.weight"], w2 * second["up.weight"]], dim=1),
        "up.bias": w1 * first["up.bias"] + w2 * second["up.bias"],
    }
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-join", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_join(join)

# %% [markdown]
# Does it matter on a real model? Join the two tasks' adapters of section 6, half and half, once right and once wrong. What will
# the two tasks' scores be, each way?

# %% tags=["experiment"]
for name, combine in (("joined", join), ("averaged", join_with_a_bug)):
    for bank in [module for module in model.modules() if isinstance(module, AdapterBank)]:
        state = combine(bank.adapters["reviews"].state_dict(), bank.adapters["calls"].state_dict(), (0.5, 0.5))
        bank.adapters[name] = Adapter(576, len(state["down.bias"])).to(device)
        bank.adapters[name].load_state_dict(state)
for name in ("reviews", "calls", "joined", "averaged"):
    activate(model, name)
    right = reviews.score(model, few), calls.score(model, few_calls)
    print(f"{name:<10} reviews right {right[0]:4.0%}, calls right {right[1]:4.0%}")

# %% [markdown]
# *What to see.* `joined` is exactly half of each change, in every layer; whether half of each is *useful* for either task is
# another question, which the scores answer. That a combination is computed rightly does not make it a good idea.

# %% [markdown]
# ## 11. In your own words  ·  2 points, marked by hand
#
# A colleague serves LLaMA-7B to 40 customers, each with adapters of bottleneck 64 of their own. Answers are generated token by
# token, and requests of different customers come in turn. He has read that "adapters are slow and LoRA is free", and wants to
# train all 40 again with LoRA and merge each.
#
# In about 120 words: why are adapters slower than their few parameters suggest? Is merged LoRA free for *him*? What would you
# advise him, and when would the advice be the opposite? Refer to at least one number that you measured in section 8.

# %% [markdown] nbgrader={"grade": true, "grade_id": "serving", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: where the time goes.* Adapters add small operations one behind the other, which at one token cost their
# start more than their arithmetic (about 1%); because of the nonlinearity they cannot be merged away. A figure measured in
# section 8 is quoted, with what it is compared to. *1 point: the advice.* Merging fits one task to one copy of the weights: 40
# merged copies of some 13 GB, or a merge and an unmerge at every change of customer; LoRA that is not merged costs time too. So
# for many customers in turn keep adapters (or LoRA unmerged), perhaps without the lower layers' (AdapterDrop) or behind the MLP
# only; for one task, or few with much traffic each, merge. Half points for either part without a reason or without the opposite
# case.
#
# **A full answer.** In my measurement a forward pass of one token took 19% longer with adapters, although they add 1% of
# arithmetic: each layer gets two more chains of small operations, and starting these takes longer than doing them. GELU stands
# in between, so they can't be merged. But merged LoRA is only free for whoever has one task. He would need 40 copies of 13 GB,
# or to merge and unmerge with every customer. Unmerged, LoRA cost 15% when I measured it, which is no great gain. I would keep
# the adapters, and try them behind the MLP only: 9%. If one customer made nearly all requests, I would merge a LoRA for that
# one.
#
# **An answer worth one point.** Adapters are extra layers, so there is more to compute one after the other, and as GELU is not
# linear they have to stay. In my plot it was 20% slower for one token than the plain model. LoRA can be merged, and then it is
# as fast as the plain model, so he should use LoRA.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# Adapters that equal an independent implementation to rounding, in some thirty lines; their memory and their latency, measured;
# two tasks on one base, switched in milliseconds. Unit 08 leaves the nonlinearity out, and gains merging by it.
#
# ## Sources
#
# - Houlsby et al. (2019), *Parameter-Efficient Transfer Learning for NLP*, arXiv 1902.00751: section 2.1 is the adapter and the
#   formula.
# - Pfeiffer et al. (2021), *AdapterFusion: Non-Destructive Task Composition for Transfer Learning*, arXiv 2005.00247: one
#   adapter a layer.
# - Pfeiffer et al. (2020), *MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer*, arXiv 2005.00052:
#   stacking.
# - Rücklé et al. (2021), *AdapterDrop: On the Efficiency of Adapters in Transformers*, arXiv 2010.11918.
# - Hu et al. (2022), *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685: table 1 is the latency of
#   adapters.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
# - peft issues [1155](https://github.com/huggingface/peft/issues/1155) and
#   [3761](https://github.com/huggingface/peft/issues/3761).
