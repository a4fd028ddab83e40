# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · LoRA: learn the change, in two thin matrices
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 16 of experiments on two CPU cores | 3 of 5 | 14 | 00_start_here; some PyTorch |
#
# Fine-tuning a large model changes every weight a little. LoRA (Hu et al. 2022) asks whether that *change* needs as many
# numbers as the weights themselves, finds that it does not, and trains one or two percent as many here, and far less in large
# models.
#
# **When you have finished, you can**
#
# 1. build a LoRA layer, put it into a LLaMA, and prove that the model has not changed by that;
# 2. say, from your own measurements, which memory LoRA saves, and which it does not;
# 3. merge an adapter, save it to a file of ten megabytes, and serve two tasks from one set of weights.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from autograder.checks.lora import (
    check_adapter_files,
    check_inject,
    check_lora_forward,
    check_lora_memory,
    check_lora_start,
    check_merge,
    check_merge_into_head,
)
from peftlab import plots, results
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, causal_loss
from peftlab.progress import predict

UNIT = "08_lora"

# %% [markdown]
# ## The idea
#
# A linear layer of a trained model computes $y = W x$. Fine-tuning replaces $W$ by $W + \Delta W$, where $\Delta W$ has as many
# entries as $W$. LoRA leaves $W$ as it is and writes the change as a product of two thin matrices:
#
# $$ y = W x + \frac{\alpha}{r} \, B A \, x, \qquad A \in \mathbb{R}^{r \times \text{in}}, \quad B \in \mathbb{R}^{\text{out} \times r} $$
#
# $A$ squeezes the input into $r$ numbers, $B$ spreads them out again. $r$ is the **rank**: $BA$ is an out × in matrix, but one
# of rank at most $r$. Here is the query projection of a SmolLM2 layer and its two factors at rank 8, drawn to scale.

# %%
out_features, in_features, rank = 576, 576, 8
figure, axes = plt.subplots(figsize=(7, 3.4))
for x, y, width, height, name, colour in (
    (0, 0, in_features, out_features, "W (frozen)\n576 × 576", "#999999"),
    (700, 0, rank, out_features, "B\n576 × 8", "#D55E00"),
    (780, 284, in_features, rank, "A   8 × 576", "#0072B2"),
):
    axes.add_patch(plt.Rectangle((x, y), width, height, color=colour))
    axes.annotate(name, (x + width / 2, y - 14), ha="center", va="top")
axes.annotate("+", (638, 288), ha="center", va="center", fontsize=18)
axes.set(xlim=(-20, 1380), ylim=(-110, 600), aspect="equal", title="One projection of SmolLM2 and its LoRA factors, to scale")
axes.axis("off")
plots.show(figure, alt="A large grey square W, plus a thin upright bar B times a thin lying bar A.")

# %% [markdown]
# The two bars are all that is trained:

# %%
full = out_features * in_features
lora = rank * (in_features + out_features)
print(f"W: {full:,} numbers.  A and B: {lora:,} numbers, {lora / full:.1%} of that.")

# %% [markdown]
# The definition above can be typed in as it stands. The function below is right, and it is what your layer has to agree with;
# but it builds $BA$, a matrix as large as $W$, which is just what we want to be rid of.


# %%
def lora_by_definition(
    x: Float[Tensor, "... in"],
    weight: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    alpha: float,
) -> Float[Tensor, "... out"]:
    """y = (W + alpha / r B A) x: right, slow, and as large as the full matrix."""
    rank = lora_A.shape[0]
    return x @ (weight + alpha / rank * lora_B @ lora_A).T


# %% [markdown]
# ## 1. Build the layer  ·  5 points, about 25 minutes, ●●○
#
# `LoRALinear` takes the place of an `nn.Linear`, which it keeps as `base`. Three things decide whether it works:
#
# - **The order of the products.** $(BA)x$ and $B(Ax)$ are the same numbers, but the second never builds a large matrix.
# - **The start.** $B$ starts at zero, so $BA = 0$ and training begins from the model as it was. $A$ starts at random: were both
#   zero, neither would get a gradient, because the gradient of each is multiplied by the other. Use
#   `nn.init.kaiming_uniform_(..., a=math.sqrt(5))`, as `nn.Linear` itself does and peft does.
# - **The scale** $\alpha / r$, a plain number, says how much the update counts. Many set $\alpha = 2r$, as we do below, so that
#   the scale is 2 at every rank. Section 6 measures what that does when ranks are compared.
#
# Create both factors on the base's device and in its dtype. When `self.merged` is true (exercise 4), the base already holds the
# update, so `forward` returns the base's output alone.
#
# <details><summary>RuntimeError: mat1 and mat2 shapes cannot be multiplied</summary>
#
# `x` ends in `in_features`, and `lora_A` is `(rank, in_features)`: multiply by its transpose, `x @ self.lora_A.T`. What comes
# out ends in `rank`. Then the same with `lora_B`.
# </details>
# <details><summary>The check says that a gradient is missing</summary>
#
# A tensor is only found by an optimizer if it is an `nn.Parameter` and an attribute of the module. `.data`, `.detach()` and
# `torch.no_grad()` cut the gradient.
# </details>
# <details><summary>The check says that the base gets a gradient</summary>
#
# `base.requires_grad_(False)` freezes the weight and the bias of a layer at once.
# </details>
# <details><summary>The memory check says that forward saves too much</summary>
#
# Besides `x` and the weights, only `x @ A.T` needs to be kept, `rank` numbers a token. Look at which tensors your products make
# on the way, for each that takes part in a product is kept until backward: a matrix of the weight's size, a copy of `x` (also a
# *scaled* one: Python reads `s * x @ A.T` from the left), a scale expanded to the output's shape.
# </details>


# %% nbgrader={"grade": false, "grade_id": "lora-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
class LoRALinear(nn.Module):
    """y = W x + bias + (alpha / rank) B A x, with the base layer frozen (Hu et al. 2022, section 4.1).

    Attributes:
        base: the layer that is adapted, the very object that was given.
        lora_A: parameter of shape (rank, in_features), random at the start.
        lora_B: parameter of shape (out_features, rank), zero at the start.
        scaling: alpha / rank.
        merged: whether the base's weight holds the update already.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.merged = False
        ### END SOLUTION

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Return the base's output plus the scaled update's; the base's alone if it is merged."""
        ### BEGIN SOLUTION
        if self.merged:
            return self.base(x)
        return self.base(x) + (x @ self.lora_A.T) @ self.lora_B.T * self.scaling
        ### END SOLUTION


# %% [markdown]
# The first check gives your layer random factors and compares its output, and the gradients of `x`, `lora_A` and `lora_B`, with
# the definition. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-lora-forward", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_lora_forward(LoRALinear)

# %% [markdown]
# The second looks at a new layer: what it starts from, and what in it learns. *1 point.*

# %% nbgrader={"grade": true, "grade_id": "check-lora-start", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_lora_start(LoRALinear)

# %% [markdown]
# The third *measures*. It takes a training step with a small layer and counts the bytes of every gradient, of the optimizer's
# state and of all that forward keeps for backward. The last need be no more than `rank` numbers a token besides `x`. Then it
# takes one with a base of 64 MiB and watches by how much the process grows. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-lora-memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_lora_memory(LoRALinear)

# %% [markdown]
# ## 2. Put it into a model  ·  2 points, about 15 minutes, ●●○
#
# Parameters and layers of our LLaMA have the names that Hugging Face gives them: `model.layers.0.self_attn.q_proj` and so on.
# `target_modules` says which to adapt, by the *last part* of the name, as in peft. `inject`
#
# 1. freezes the whole model;
# 2. replaces every `nn.Linear` whose last name part is one of `target_modules` by `make_layer(that_linear)`;
# 3. returns the list of the full names of what it replaced, and raises a `ValueError` if nothing at all matched: a training run
#    that trains nothing is an expensive way to find a typo.
#
# Why does the order of 1 and 2 matter? And what would `endswith` do to a layer called `aux_q_proj`? (peft takes a *string* for
# a regular expression and a *list* for such names; that the two differ has confused people: peft issue 1206.)
#
# <details><summary>How do I replace a module whose name has dots in it?</summary>
#
# Split the name at its last dot. `model.get_submodule("model.layers.0.self_attn")` returns the parent (and
# `model.get_submodule("")` the model itself); `setattr(parent, "q_proj", new_layer)` replaces the child.
# </details>
# <details><summary>I change the model while I walk through it</summary>
#
# Right: `list(model.named_modules())` makes the list before the first change.
# </details>


# %% nbgrader={"grade": false, "grade_id": "inject", "locked": false, "schema_version": 3, "solution": true, "task": false}
def inject(model: nn.Module, target_modules: Sequence[str], make_layer: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Freeze the model, then replace every `nn.Linear` that is named in `target_modules` by `make_layer` of it.

    Returns:
        The full names of the replaced modules.

    Raises:
        ValueError: if no module matches.
    """
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    replaced = []
    for name, module in list(model.named_modules()):
        parent_name, _, own_name = name.rpartition(".")
        if isinstance(module, nn.Linear) and own_name in target_modules:
            setattr(model.get_submodule(parent_name), own_name, make_layer(module))
            replaced.append(name)
    if not replaced:
        raise ValueError(f"no nn.Linear is named one of {list(target_modules)}")
    return replaced
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-inject", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_inject(inject)

# %% [markdown]
# ### Predict, then measure: how many parameters?
#
# SmolLM2-135M has 134,515,008 parameters in 30 layers. The linear layers of one of them are
#
# | `q_proj` | `k_proj` | `v_proj` | `o_proj` | `gate_proj` | `up_proj` | `down_proj` |
# |---|---|---|---|---|---|---|
# | 576 → 576 | 576 → 192 | 576 → 192 | 576 → 576 | 576 → 1536 | 576 → 1536 | 1536 → 576 |
#
# How many numbers does LoRA train with rank 8 on all seven? Write your prediction down before you run the cell after.

# %%
my_count = predict("parameters that LoRA of rank 8 trains", None)


# %%
def with_lora(model: Llama, rank: int = 8, alpha: float = 16.0, target_modules: Sequence[str] = ALL_LINEAR) -> Llama:
    """Give the model LoRA layers, with your `LoRALinear` and your `inject`."""
    inject(model, target_modules, lambda linear: LoRALinear(linear, rank, alpha))
    return model


with torch.device("meta"):  # shapes without numbers: nothing is allocated
    on_paper = with_lora(Llama(PRESETS["SmolLM2-135M"]))
counted = sum(parameter.numel() for parameter in on_paper.parameters() if parameter.requires_grad)
my_count.compare(counted)
print(f"{counted / 134_515_008:.2%} of the model")

# %% [markdown]
# ### Nothing has changed, and that can be proved
#
# Because $B = 0$, a model with fresh LoRA layers must give the logits that it gave before: not about the same, but the same,
# for adding zero rounds nothing. Always test this after an injection; it takes one line and finds most mistakes.

# %%
torch.manual_seed(0)
tiny = Llama(PRESETS["tiny"])
input_ids = torch.randint(0, 256, (2, 12))
before = tiny(input_ids)
after = with_lora(tiny)(input_ids)
print("largest difference of any logit:", (after - before).abs().max().item())

# %% [markdown]
# ## 3. Measured: which memory does LoRA save?
#
# A training step holds five kinds of bytes: the weights, their gradients, the optimizer's state (AdamW keeps two numbers for
# each trained one), the *activations* that forward leaves for backward, and whatever is needed for a moment. Which of them will
# be much smaller with LoRA? Which will not?

# %%
# A set of "parameters", "gradients", "optimizer_state" and "activations":
my_smaller = predict("kinds of bytes of which LoRA needs less than half", None)

# %% [markdown]
# We take one step of SmolLM2 on a real batch, once trained in full and once with LoRA, and follow every allocation (on a GPU,
# we ask the allocator). This loads the model: about 15 seconds the first time, one second later on.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.memory import measure_training_step, step_table
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

device = find_device()
model, tokenizer = load_smollm2()
reviews, calls = tasks.movie_reviews(tokenizer), tasks.tool_calls(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))

# %% tags=["experiment"]
measured = {}
for method, prepare in {"full fine-tuning": lambda model: model, "LoRA, rank 8": with_lora}.items():
    model, _ = load_smollm2()
    model = prepare(model).to(device)
    measured[method] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

print(step_table(measured))
kinds = ("parameters", "gradients", "optimizer_state", "activations")
full, with_factors = ([getattr(step, kind) for kind in kinds] for step in measured.values())
my_smaller.compare({kind for kind, whole, size in zip(kinds, full, with_factors) if size < whole / 2})

# %% tags=["experiment"]
figure = plots.memory_bars(
    measured, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"
)
plots.show(figure, alt="Stacked bars: LoRA has no visible gradients or optimizer state; its activations are almost as large.")

# %% [markdown]
# *What to see.* Gradients and optimizer state have almost disappeared, because only the trained parameters have them. The
# weights are the same: LoRA does not shrink the model (that is unit 10's business). And the activations have shrunk only a
# little. The black line is the peak, the most that was needed at any one moment. For full fine-tuning it lies left of the bar's
# end: backward frees activations as it makes gradients, so the two are never there in full at the same time.
#
# Why so little? Backward needs, for every *trained* weight, that layer's input; those of frozen weights can be dropped. But to
# reach the first LoRA layer the gradient has to pass through every layer above it, and each nonlinearity, norm and attention on
# the way needs what it saw. And $A$ needs the layer's input too, just as $W$ did. On long sequences activations are most of the
# bill, so that LoRA saves next to nothing there, which surprises people (peft issues 1514 and 2196). The remedy is gradient
# checkpointing, in unit 10.
#
# Are these figures the same on a GPU? Not quite. Here is the same step as it was measured there, beside the CPU's:

# %%
from peftlab import comparison, gpu
from peftlab.memory import step_table

cpu_rows = results.load(UNIT, results.SHIPPED)
steps = {}
for here, cpu in comparison.twins(gpu.rows(UNIT), cpu_rows):
    if here.task == "movie_reviews":
        steps |= {f"{here.method}, CPU": cpu.memory, f"{here.method}, {here.hardware}": here.memory}
print(step_table(steps))

# %% [markdown]
# *What to see.* Weights, gradients and optimizer state agree, but for the 4 bytes a tensor in which AdamW counts its steps: on
# a GPU these stay in the CPU's memory. Activations are larger on the GPU. PyTorch 2.11 has no fast attention kernel there for
# fp32 and grouped queries, and attention that is written out keeps its scores. The peak of full fine-tuning is larger as well:
# on a GPU AdamW updates all parameters at once, for which it needs a temporary copy of everything that is trained. A simulation
# that is told both gives the GPU's figures to the byte:

# %%
for name, found in gpu.proofs("bytes against the simulation").items():
    for method, step in found["of"].items():
        here, simulated = step["here"], step["simulated"]
        print(f"{name}, {method}: peak measured {here['peak']:,} bytes, simulated {simulated['peak']:,}")

# %% [markdown]
# ## 4. Merge and unmerge  ·  2 points, about 15 minutes, ●○○
#
# A LoRA layer does three products where the base did one. After training there is no need for that: add the update to the
# weight once, $W \leftarrow W + \frac{\alpha}{r} BA$, and the layer is as fast as it ever was. Subtract it again, and the base
# is free for another task, up to rounding, which the cell after the check measures.
#
# Both functions change `layer.base.weight` **in place**, keep `layer.merged` up to date, and do nothing if there is nothing to
# do.
#
# <details><summary>An error about a leaf Variable, or a non-leaf Tensor</summary>
#
# Autograd watches you. Wrap the change in `with torch.no_grad():`, or decorate the function with `@torch.no_grad()`.
# </details>
# <details><summary>The check says that the layer got a new weight tensor</summary>
#
# `layer.base.weight = nn.Parameter(...)` makes another tensor. `+=` under `torch.no_grad()` writes into the one that is there.
# </details>


# %% nbgrader={"grade": false, "grade_id": "merge", "locked": false, "schema_version": 3, "solution": true, "task": false}
def merge(layer: LoRALinear) -> None:
    """Add `scaling * B A` to the base's weight, in place, unless it is there already; set `layer.merged`."""
    ### BEGIN SOLUTION
    if not layer.merged:
        with torch.no_grad():
            layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = True
    ### END SOLUTION


def unmerge(layer: LoRALinear) -> None:
    """Subtract `scaling * B A` from the base's weight, in place, if it is there; clear `layer.merged`."""
    ### BEGIN SOLUTION
    if layer.merged:
        with torch.no_grad():
            layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = False
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-merge", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_merge(merge, unmerge)

# %% [markdown]
# Merging is exact on paper. In floating point the product, the scaling and the sum are all rounded in the weights' dtype. The
# next cell gives a tiny model a random adapter, in fp32 and in bf16, whose eps, the distance from 1 to the next number, is
# 65,536 times as large. It compares logits with those of the same weights in fp64: before merging, after it, and if one merges
# in fp32 and rounds once.

# %%
from copy import deepcopy


def merge_in_fp32(layer: LoRALinear) -> None:
    """Merge in fp32, whatever the weight's dtype, and round once."""
    update = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
    layer.base.weight.data = (layer.base.weight.float() + update).to(layer.base.weight.dtype)
    layer.merged = True


# %%
ids = torch.arange(24)[None]
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    adapted = with_lora(Llama(PRESETS["tiny"]).to(dtype))
    layers = [module for module in adapted.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.05)
    bases = [layer.base.weight.detach().clone() for layer in layers]
    exact, logits = deepcopy(adapted).double()(ids), {"not merged": adapted(ids)}
    for name, change in (("merged", merge), ("unmerged", unmerge)):
        for layer in layers:
            change(layer)
        logits[name] = adapted(ids)
    differing = sum((layer.base.weight != base).sum().item() for layer, base in zip(layers, bases))
    for layer, base in zip(layers, bases):
        layer.base.weight.data = base
        merge_in_fp32(layer)
    logits["merged in fp32"] = adapted(ids)
    off = {name: ((found - exact).abs().max() / exact.abs().max()).item() for name, found in logits.items()}
    print(f"{dtype}, off by, of the largest logit: {', '.join(f'{name} {size:.1e}' for name, size in off.items())}")
    print(f"   merged and unmerged again: {differing / sum(base.numel() for base in bases):.1%} of the weights differ")

# %% [markdown]
# *What to see.* In fp32 nobody will notice. In bf16 the merged model is off by as much as the unmerged one, no more. So the
# error is that of bf16's forward pass, and merging in fp32 buys nothing here. But the two models are off in different places,
# so their outputs differ. People have taken that for a bug: a loss of 2.118 before and 2.121 after, in peft issue 1388. And the
# base does not come back: in either dtype a third of its weights differ in their last bits. Keep a copy, if you need the base
# to the bit.

# %% [markdown]
# ## 5. The adapter file  ·  2 points, about 15 minutes, ●●○
#
# What was learned is $A$ and $B$, and nothing else needs to be saved. `save_adapter` writes the factors of every layer to a
# [safetensors](https://huggingface.co/docs/safetensors) file, under their full names
# (`model.layers.0.self_attn.q_proj.lora_A`); `load_adapter` copies them into a model that has LoRA layers already, in place,
# because an optimizer may hold these very parameters, and in their dtype. If the names in the file are not exactly the model's,
# none missing and none too many, it raises a `ValueError` before it changes anything.
#
# <details><summary>The file is tiny</summary>
#
# Then no name matched, and you have saved nothing. A famous case: people trained for a day and found an adapter file of 443
# bytes (peft issue 286).
# </details>
# <details><summary>The file is as large as the model</summary>
#
# `model.state_dict()` holds the frozen weights too. Take the names with `lora_` in them.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adapter-files", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write every `lora_A` and `lora_B` of the model, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    ### BEGIN SOLUTION
    save_file({name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}, path)
    ### END SOLUTION


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of an adapter file into the model's own `lora_A` and `lora_B`, in place.

    Raises:
        ValueError: if the file's names are not exactly those of the model's factors.
    """
    from safetensors.torch import load_file

    ### BEGIN SOLUTION
    saved = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    if saved.keys() != own.keys():
        raise ValueError(f"{path} does not fit this model: {sorted(saved.keys() ^ own.keys())[:4]} ...")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adapter-files", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapter_files(save_adapter, load_adapter)

# %% [markdown]
# ## 6. On a real model
#
# Now your layers meet SmolLM2-135M. The experiments below take less than twenty minutes in all on two CPU cores. If you would
# rather read on, here is what we measured with them; your own rows will differ in the last digits, and in the seconds.

# %%
shipped = sorted(results.load(UNIT, results.SHIPPED), key=lambda row: (row.task, row.method, row.settings.get("rank", 0)))
print(shipped[0].hardware if shipped else "no rows here")
for row in (row for row in shipped if row.settings["steps"] >= 40):
    print(
        f"{row.task:<14}{row.method:<5} rank {row.settings.get('rank', '-')!s:<3}{row.settings['steps']:>3} steps: "
        f"{row.score_before:4.0%} -> {row.score_after:4.0%}, peak {row.memory.peak / 2**20:5,.0f} MiB, "
        f"{row.seconds_per_step:.1f} s a step, forgetting {row.forgetting:+.2f}"
    )

# %% [markdown]
# The first task is to judge film reviews: after `Review: ...` and `This movie is`, does the model find ` good` or ` bad` more
# likely? Untrained it is right in about seven of ten cases.

# %% tags=["experiment"]
for example in reviews.test.select(range(3)):
    print(repr(example["prompt"]), "->", repr(example["answer"]))

# %% [markdown]
# Fine-tune with LoRA. The learning rate is 25 times what full fine-tuning gets below (Schulman et al. find about ten times
# best): so few numbers, starting from zero, have a long way to go. `fine_tune` scores the model, trains it, scores it again and
# writes a results row. About two minutes on two CPU cores, fifteen seconds on an H200.

# %% tags=["experiment"]
from peftlab.training import fine_tune

torch.manual_seed(0)  # for the start of lora_A
model, tokenizer = load_smollm2()
with_lora(model)
lora_row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="lora", save=lambda path: save_adapter(model, path),
    steps=40, learning_rate=5e-4, rank=8, alpha=16.0, target_modules=ALL_LINEAR,
)  # fmt: skip
save_adapter(model, "reviews.safetensors")

# %% [markdown]
# And, to compare, all 134 million weights, on the same batches:

# %% tags=["experiment"]
from safetensors.torch import save_model

model, tokenizer = load_smollm2()
full_row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="full", save=lambda path: save_model(model, str(path)),
    steps=40, learning_rate=2e-5, score_before=lora_row.score_before,
)  # fmt: skip

# %% tags=["experiment"]
for row in (lora_row, full_row):
    print(
        f"{row.method:>5}: {row.score_before:.1%} -> {row.score_after:.1%} of {settings.examples(len(reviews.test))} reviews, "
        f"{row.trainable_parameters:,} trained, {row.adapter_bytes / 1e6:,.1f} MB file, "
        f"{row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
    )
plots.show(
    plots.loss_curves({row.method: row.losses for row in (lora_row, full_row)}, "Training loss on movie_reviews"),
    alt="Two loss curves that fall steeply in the first twenty steps and stay close to each other.",
)

# %% [markdown]
# *What to see.* With 480 test reviews, one standard error is about 1.4 points: the two methods are as good as each other here.
# The file is what differs, and the memory. *Forgetting* is by how much the loss on newspaper sentences has risen, in nats per
# token. Fine-tuning on two words costs some of what the model knew, and in our rows LoRA forgot four times as much as full
# fine-tuning: +0.31 against +0.07. (Biderman et al. 2024 find that LoRA forgets *less*, on far longer runs.)

# %% [markdown]
# ### A second task for the same base
#
# `tool_calls` asks for JSON: a task that the untrained model never gets right. Start again from the base, train another
# adapter.

# %% tags=["experiment"]
print(calls.test[0]["prompt"], calls.test[0]["answer"])
torch.manual_seed(0)
model, tokenizer = load_smollm2()
with_lora(model)
calls_row = fine_tune(
    model, tokenizer, calls, unit=UNIT, method="lora", save=lambda path: save_adapter(model, path),
    steps=60, learning_rate=2e-3, batch_size=8, rank=8, alpha=16.0, target_modules=ALL_LINEAR,
)  # fmt: skip
save_adapter(model, "calls.safetensors")

# %% tags=["experiment"]
plots.show(
    plots.before_after([lora_row, full_row, calls_row], "SmolLM2-135M before and after fine-tuning"),
    alt="Bars of scores before and after: reviews rise alike with LoRA and in full; tool calls start at zero and rise most.",
)

# %% [markdown]
# ### Two adapters, one base
#
# Both tasks are now served by one copy of the weights: loading an adapter takes milliseconds, where loading another model takes
# seconds and half a gigabyte. The model still in memory has the adapter for tool calls. Swap.

# %% tags=["experiment"]
import time

few = reviews.test.select(range(settings.examples(48)))
for adapter in ("calls.safetensors", "reviews.safetensors", "calls.safetensors"):
    started = time.perf_counter()
    load_adapter(model, adapter)
    swapped = time.perf_counter() - started
    print(f"{adapter:<20} swapped in {1e3 * swapped:4.0f} ms, reviews right: {reviews.score(model, few):.0%}")

# %% [markdown]
# ### How much rank does it take?
#
# Here is the usual experiment. Five ranks get the same 20 steps on `tool_calls`, with the same learning rate and $\alpha = 2r$.
# (These rows come with the course. The *late loss* is the mean of the last ten steps, in nats per label.)

# %%
ranks = (1, 2, 4, 8, 16)
RUNS = {(row.settings["rank"], row.settings["alpha"]): row for row in shipped if row.settings["steps"] == 20}
for rank in ranks:
    row = RUNS[rank, 2.0 * rank]
    print(f"rank {rank:>2}, alpha {2 * rank:>2}: late loss {comparison.late_loss(row):.3f}, {row.score_after:5.1%} right")

# %% [markdown]
# The higher the rank, the better it has learned. But two things change from line to line: the rank, and $\alpha$. Which of them
# is it? Take the two ends of the table, and exchange their $\alpha$. Predict the late losses.

# %%
# Between 0.410 and 0.103, the losses of the two ends?
my_losses = predict("late loss", {"rank 1, alpha 32": None, "rank 16, alpha 2": None})

# %% [markdown]
# The next cell makes the five runs again, and these two. About four minutes on two CPU cores; without it you see our rows.

# %% tags=["experiment"]
for rank, alpha in [(1, 32.0), (16, 2.0), *((rank, 2.0 * rank) for rank in ranks)]:
    torch.manual_seed(0)
    model, tokenizer = load_smollm2()
    with_lora(model, rank, alpha)
    RUNS[rank, alpha] = fine_tune(
        model, tokenizer, calls, unit=UNIT, method="lora", save=lambda path: save_adapter(model, path), score_before=0.0,
        steps=20, learning_rate=2e-3, batch_size=8, rank=rank, alpha=alpha, target_modules=ALL_LINEAR,
    )  # fmt: skip

# %%
late = {setting: comparison.late_loss(row) for setting, row in RUNS.items()}
for rank, alpha in ((1, 2.0), (16, 2.0), (1, 32.0), (16, 32.0)):
    print(f"rank {rank:>2}, alpha {alpha:>2g}: late loss {late[rank, alpha]:.3f}, {RUNS[rank, alpha].score_after:5.1%} right")
my_losses.compare({"rank 1, alpha 32": late[1, 32.0], "rank 16, alpha 2": late[16, 2.0]})

# %%
lines = {
    "alpha = 2 × rank": {rank: late[rank, 2.0 * rank] for rank in ranks},
    "alpha = 32": {rank: late[rank, 32.0] for rank in (1, 16)},
    "alpha = 2": {rank: late[rank, 2.0] for rank in (1, 16)},
}
figure = plots.by_setting(
    lines, "tool_calls after 20 steps: rank, or the size of the step?", "rank", "late loss (nats per label)"
)
plots.show(
    figure,
    alt="Late loss against rank. With alpha twice the rank it falls from 0.41 to 0.10. With alpha fixed, at 32 or at 2, it is the "
    "same at rank 1 and at rank 16, or nearly.",
)

# %% [markdown]
# *What to see.* With $\alpha = 2$ ranks 1 and 16 end at 0.410 and 0.411, with $\alpha = 32$ at 0.117 and 0.103. Sixteen times
# as many trained numbers bring next to nothing here, and sixteen times $\alpha$ brings nearly all. So the usual table does not
# measure rank. It measures the size of the step. (One seed each; with 200 test requests one standard error of a score is up to
# 3.5 points.)
#
# Why does $\alpha = 2r$ enlarge the step? Watch a single layer take its first step of AdamW, and measure by how much that step
# lowers the loss:

# %%
x, target = torch.randn(512, 64), torch.randn(512, 64)
print(f"{'rank':>4}{'loss falls by, with alpha = 2 × rank':>38}{'with alpha = 32':>17}")
for rank in ranks:
    falls = []
    for alpha in (2.0 * rank, 32.0):
        torch.manual_seed(0)
        layer = LoRALinear(nn.Linear(64, 64, bias=False), rank, alpha)
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-3)
        before = (layer(x) - target).square().mean()
        before.backward()
        optimizer.step()
        falls.append((before - (layer(x) - target).square().mean()).item())
    print(f"{rank:>4}{falls[0]:>38.5f}{falls[1]:>17.5f}")

# %% [markdown]
# *What to see.* With $\alpha = 2r$ a step of twice the rank goes about twice as far. Each column of $B$ makes a step of its
# own, all of them in directions that lower the loss, and the scale of 2 adds them up. With $\alpha$ fixed the scale $\alpha /
# r$ takes their mean instead.
#
# A comparison of ranks has to say which of the two is held fixed, or tune each rank's learning rate. Hu et al. (table 6) find
# rank 1 nearly as good as 64 on their tasks. Schulman et al. (2025) fix $\alpha$ at 32. They find a best learning rate that
# hardly depends on the rank, and that rank matters once there is more to learn than the factors can hold: 20 steps of eight
# requests are not that much. Unit 12 gives ranks, scales, places and variants of LoRA a tuned rate each.
#
# ### How much learning rate?
#
# LoRA wants a higher rate than full fine-tuning. Here are the sweeps of both, with 40 steps on `movie_reviews` and 60 on
# `tool_calls`. All units compare their methods in this way.

# %%
swept = plots.show_comparison({"LoRA, rank 8": ("lora", ""), "full fine-tuning": ("full", "")}, "lora")

# %% [markdown]
# *What to see.* On `movie_reviews` LoRA's chosen rate is 33 times that of full fine-tuning, on `tool_calls` ten times. At ten
# times LoRA's best rate nothing is learned on `movie_reviews`. The scores at the chosen rates differ by less than the spread of
# the seeds.

# %% [markdown]
# ## 7. The same thing in peft
#
# Is what you built *LoRA*, or something like it? Hold it against the library. Below, a small LLaMA exists twice with the same
# weights: as `transformers` model with peft's LoRA, and as our `Llama` with yours. Both start from peft's random $A$ and take
# 20 AdamW steps on the same tokens. Their losses must agree; only rounding may differ.

# %% tags=["experiment"]
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from peftlab.training import trainable, twenty_steps

torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
ours = Llama(PRESETS["tiny"])
ours.load_state_dict(theirs.state_dict())
theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR))
with_lora(ours)

# %% tags=["experiment"]
peft_factors = {
    name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
    for name, tensor in theirs.state_dict().items()
    if "lora_" in name
}
with torch.no_grad():
    for name, tensor in ours.state_dict().items():
        if "lora_" in name:
            tensor.copy_(peft_factors[name])
print(f"{len(peft_factors)} factors copied; their names are the same in both")

# %% tags=["experiment"]
our_losses = twenty_steps(trainable(ours).values(), lambda ids: causal_loss(ours, ids, ids))
their_losses = twenty_steps(trainable(theirs).values(), lambda ids: theirs(input_ids=ids, labels=ids).loss)

# %% tags=["experiment"]
apart = ((our_losses - their_losses).abs() / their_losses).max().item()
print(f"first losses {our_losses[0]:.6f} and {their_losses[0]:.6f}, last {our_losses[-1]:.6f} and {their_losses[-1]:.6f}")
print(f"largest relative difference of any loss: {apart:.1e}")
assert apart <= 1e-5, "your LoRA and peft's have parted ways: run the checks above again"

# %% [markdown]
# ## 8. Bug hunt  ·  1 point, about 10 minutes, ●●○
#
# *After peft issues 2018 and 2864.* Someone adapts the head of a small model, trains, merges, and finds that the merged model
# talks nonsense. The code looks innocent:


# %%
def merge_into_head_with_a_bug(model: Llama) -> None:
    """Merge the head's update into its weight."""
    head = model.lm_head
    with torch.no_grad():
        head.base.weight += head.scaling * (head.lora_B @ head.lora_A)
    head.merged = True


# %% [markdown]
# It works on LLaMA-7B. SmolLM2's configuration, like that of most small models, differs in one line:

# %%
print("LLaMA-7B: ", PRESETS["LLaMA-7B"].tie_word_embeddings)
print("SmolLM2:  ", PRESETS["SmolLM2-135M"].tie_word_embeddings)

# %% [markdown]
# Write `merge_into_head` so that the logits after merging equal those before, whether embedding and head are tied or not, and
# nothing is copied that need not be. `model.lm_head` is a LoRA layer; the embedding is `model.model.embed_tokens`.
#
# <details><summary>I see no bug</summary>
#
# What else uses the tensor `head.base.weight`? Compare it with `model.model.embed_tokens.weight`, with `is`.
# </details>
#
# (To save the merged model, its configuration must then say `tie_word_embeddings=False` too, or loading will tie the two
# again.)


# %% nbgrader={"grade": false, "grade_id": "merge-into-head", "locked": false, "schema_version": 3, "solution": true, "task": false}
def merge_into_head(model: Llama) -> None:
    """Merge the update of `model.lm_head` into the head's weight, and into nothing else."""
    ### BEGIN SOLUTION
    head = model.lm_head
    with torch.no_grad():
        if head.base.weight is model.model.embed_tokens.weight:
            head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)
        head.base.weight += head.scaling * (head.lora_B @ head.lora_A)
    head.merged = True
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-merge-into-head", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_merge_into_head(merge_into_head)

# %% [markdown]
# ## 9. In your own words  ·  2 points, marked by hand
#
# A colleague has one GPU with 24 GB. She reads that LoRA "cuts memory threefold" (Hu et al. report 1.2 TB → 350 GB for GPT-3),
# and takes a model whose weights fill 14 GB in 16 bits. She trains it on documents of 8,000 tokens with LoRA of rank 8, and
# runs out of memory in the first step. She halves the rank, and nothing changes.
#
# In about 120 words: which bytes did LoRA save her, and which does she still pay for? Why did halving the rank not help? What
# would you change, and what does that cost? Refer to at least one number that you measured in section 3.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: where the bytes are.* Gradients and optimizer state are gone (they exist only for what is trained);
# weights (14 GB) and activations, which grow with the sequence, remain; halving the rank halves what was under one percent. A
# measured figure from section 3 is quoted, with its unit. *1 point: what to do.* Gradient checkpointing (about one more forward
# pass in time), shorter sequences or a smaller batch with accumulation (more steps), or 4-bit weights as in QLoRA (slower
# steps); at least one, with its cost. Half points for either part without a reason or without a cost.
#
# **A full answer.** LoRA saved the gradients and AdamW's two moments: in my measurement these went from 1,539 MiB to under 30
# MiB. It saved nothing on the weights, and hardly anything on activations (look at the two green bars), which grow with her
# 8,000 tokens. The factors were under 1% of the model at rank 8, so half of that is noise. I would turn on gradient
# checkpointing: only each layer's input is kept, and the rest is computed again in backward, for roughly a third more time a
# step. If the weights are then too large, quantize them to 4 bits.
#
# **An answer worth one point.** LoRA only trains a few parameters, so there are no gradients and no optimizer state for the
# others. The activations are still there and they are large because the documents are long. She should use shorter documents.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A LoRA that equals peft's to rounding, in some thirty lines; its memory, measured; two tasks on one base. Unit 10 puts the
# same layer on a base of 4-bit weights.
#
# ## Sources
#
# - Hu et al. (2022), *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685: section 4.1 is the layer, section
#   4.2 the memory, table 6 the ranks.
# - Schulman and Thinking Machines Lab (2025), *LoRA Without Regret*: all linear layers rather than attention alone, a learning
#   rate about ten times that of full fine-tuning, nearly independent of the rank.
# - Biderman et al. (2024), *LoRA Learns Less and Forgets Less*, arXiv 2405.09673.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
# - peft issues [286](https://github.com/huggingface/peft/issues/286), [1206](https://github.com/huggingface/peft/issues/1206),
#   [1388](https://github.com/huggingface/peft/issues/1388), [1514](https://github.com/huggingface/peft/issues/1514),
#   [2018](https://github.com/huggingface/peft/issues/2018), [2196](https://github.com/huggingface/peft/issues/2196),
#   [2864](https://github.com/huggingface/peft/issues/2864).
