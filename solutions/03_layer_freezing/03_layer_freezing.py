# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Layer freezing: train a few layers, and choose the right end
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 5 of experiments on two CPU cores | 2 of 5 | 15 | 00_start_here; some PyTorch |
#
# The oldest way to fine-tune cheaply adds nothing to the model: it leaves most layers as they are and trains the rest. It takes
# five lines. What those five lines save depends on *which* layers they leave out, and by more than most people expect.
#
# **When you have finished, you can**
#
# 1. freeze any part of a LLaMA, tied embeddings included, and prove that nothing else has changed;
# 2. say for every layer, to the number, what it keeps for backward, and why the last layers are cheaper to train than the
#    first;
# 3. save and load what was trained, and find out why a frozen model under gradient checkpointing may not learn at all.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograder.checks.layer_freezing import (
    check_freezing_memory,
    check_numbers_kept,
    check_run_checkpointed,
    check_train_last,
    check_train_only,
    check_trained_files,
)
from peftlab import comparison, plots
from peftlab.llama import PRESETS, Llama, LlamaConfig, causal_loss, rotary_angles
from peftlab.progress import predict

UNIT = "03_layer_freezing"

# %% [markdown]
# ## The idea
#
# A decoder layer turns $x_{k-1}$ into $x_k$, using its weights $W_k$. The gradient of those weights is a chain of derivatives
# from the loss down to layer $k$:
#
# $$ \frac{\partial L}{\partial W_k} = \frac{\partial L}{\partial x_N} \cdot \frac{\partial x_N}{\partial x_{N-1}} \cdots
# \frac{\partial x_{k+1}}{\partial x_k} \cdot \frac{\partial x_k}{\partial W_k} $$
#
# Every layer *above* $k$ takes part in it, trained or not. None *below* does. So backward can stop at the lowest trained layer,
# and PyTorch does stop there: what has `requires_grad=False`, and depends on nothing that has `True`, is computed in forward as
# if under `torch.no_grad()`. Here are three ways to train a model of six layers.

# %%
PARTS = ["embedding", *(f"layer {number}" for number in range(6)), "head"]  # without the final norm
SHADES = {"trained": "#0072B2", "frozen, the gradient passes": "#F0C26E", "frozen, backward never comes here": "#DDDDDD"}
trained_parts = {"everything": range(8), "the last 2 layers": (5, 6), "the first 2 layers": (1, 2)}

figure, axes = plt.subplots(figsize=(7.5, 3.6))
for column, (title, trained) in enumerate(trained_parts.items()):
    for height, name in enumerate(PARTS):
        kind = list(SHADES)[0 if height in trained else 1 if height > min(trained) else 2]
        axes.add_patch(plt.Rectangle((3 * column, height), 2, 0.85, color=SHADES[kind]))
        ink = "white" if height in trained else "black"
        axes.annotate(name, (3 * column + 1, height + 0.42), ha="center", va="center", fontsize=8, color=ink)
    axes.annotate("", (3 * column + 2.25, min(trained)), (3 * column + 2.25, 7.85), arrowprops={"arrowstyle": "->"})
    axes.annotate(title, (3 * column + 1, 8.2), ha="center", fontsize=9)
axes.legend([plt.Rectangle((0, 0), 1, 1, color=shade) for shade in SHADES.values()], SHADES, ncols=3, fontsize=8, frameon=False,
            loc="upper center", bbox_to_anchor=(0.5, 0.02))  # fmt: skip
axes.set(xlim=(-0.2, 8.7), ylim=(-0.3, 8.8), title="How far down backward has to go (the arrow)")
axes.axis("off")
plots.show(
    figure,
    alt="Three stacks of layers. Training the last two, backward stops below them; training the first two, it passes through all.",
)

# %% [markdown]
# *What to see.* The second and the third model train equally many numbers. But in the third the arrow is as long as in the
# first: the frozen layers on top have to pass the gradient on, and to do so they must remember what they saw.
#
# What does a frozen layer remember? Look at a single linear layer, $y = W x$, with $g = \partial L / \partial y$ coming from
# above:
#
# | | equation | code | needs |
# |---|---|---|---|
# | the weight's gradient | $\partial L / \partial W = g\,x^\top$ | `g.T @ x` | the layer's input |
# | the input's gradient | $\partial L / \partial x = W^\top g$ | `g @ W` | the weight, which is there anyway |
#
# (In the code `x` and `g` have a row for each token, and `g.T @ x` sums the first gradient over them.)
#
# A frozen linear layer can therefore forget its input. A product of two vectors, a norm or a softmax cannot. How much that is,
# you will count in exercise 2.
#
# ## 1. Freeze all but one end  ·  4 points, about 20 minutes, ●●○
#
# `train_last` freezes the whole model, then thaws its last `count` decoder layers and the final norm, `model.model.norm`.
# `train_first` does the same at the other end, nearest to the embedding, and thaws the final norm too, so that the two differ
# in nothing but the end. Embedding and head stay frozen.
#
# - `count` may be anything from 0 to the number of layers. Anything else is a `ValueError`, raised before anything is changed.
# - A second call with another count must leave the model as if it had been the first.
#
# <details><summary>With a count of 0, everything is trained</summary>
#
# `layers[-0:]` is `layers[0:]`, the whole list. Count from the front: `layers[len(layers) - count:]`.
# </details>
# <details><summary>The check says that a layer has no such switch, or that layers are missing in the list of what is trained</summary>
#
# Python lets you write `layer.requires_grad = True` on any object, and on a module it does nothing. Parameters have
# `requires_grad`; modules have the method `requires_grad_(True)`, which goes through all of their parameters.
# </details>
# <details><summary>The memory check says that backward goes all the way down</summary>
#
# Something low in the model requires a gradient. Which of the names in `model.named_parameters()` is it?
# </details>


# %% nbgrader={"grade": false, "grade_id": "train-last", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_last(model: Llama, count: int) -> None:
    """Train the last `count` decoder layers and the final norm; freeze everything else.

    Args:
        model: its parameters stay the ones they are; only their `requires_grad` changes.
        count: from 0 (the final norm alone) to the number of layers.

    Raises:
        ValueError: if there are not so many layers, or `count` is negative; the model is then as it was.
    """
    ### BEGIN SOLUTION
    layers = model.model.layers
    if not 0 <= count <= len(layers):
        raise ValueError(f"count must be from 0 to {len(layers)}, got {count}")
    model.requires_grad_(False)
    layers[len(layers) - count :].requires_grad_(True)
    model.model.norm.requires_grad_(True)
    ### END SOLUTION


def train_first(model: Llama, count: int) -> None:
    """Train the first `count` decoder layers and the final norm; freeze everything else.

    Arguments and errors are those of `train_last`.
    """
    ### BEGIN SOLUTION
    layers = model.model.layers
    if not 0 <= count <= len(layers):
        raise ValueError(f"count must be from 0 to {len(layers)}, got {count}")
    model.requires_grad_(False)
    layers[:count].requires_grad_(True)
    model.model.norm.requires_grad_(True)
    ### END SOLUTION


# %% [markdown]
# The first check calls both, many times over, and looks at what requires a gradient. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-train-last", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_train_last(train_last, train_first)

# %% [markdown]
# The second *measures*: it takes a training step at either end, with an optimizer that holds all of the model's parameters. It
# counts the bytes of gradients, of optimizer state, and of all that forward saves for backward. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-freezing-memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_freezing_memory(train_last, train_first)

# %% [markdown]
# ### Zero is not None
#
# Why freeze with `requires_grad`? One could let the gradients come and set those of the frozen weights to zero. Below, a weight
# of 1 takes 1,000 steps of AdamW, whose `weight_decay` is 0.01 unless you say otherwise, with a learning rate of 0.001. Its
# gradient is `None` in every step, or zero in every step, or zero after ten steps in which it was 1. Where is the weight at the
# end? Write your three predictions down.

# %%
my_weights = predict("the weight after 1,000 steps", {"None": None, "zero": None, "zero after ten": None})

# %%
gradients = {
    "None": [None] * 1_000,
    "zero": [torch.zeros(1)] * 1_000,
    "zero after ten": [torch.ones(1)] * 10 + [torch.zeros(1)] * 990,
}
ended_at = {}
for name, steps in gradients.items():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    for gradient in steps:
        weight.grad = gradient
        optimizer.step()
    kept = sum(tensor.numel() for tensor in optimizer.state[weight].values()) if weight in optimizer.state else 0
    ended_at[name] = weight.item()
    print(f"{name:<15} the weight is {weight.item():.4f}; the optimizer keeps {kept} numbers for it")
my_weights.compare(ended_at)

# %% [markdown]
# *What to see.* An optimizer skips a parameter whose gradient is `None`. One whose gradient is zero it updates: weight decay
# shrinks it, and the momentum of earlier steps pushes it on. And it keeps its state, two moments and a step count, and so the
# memory. To freeze is to ask for no gradient at all.
#
# Because `train_last` may be called again and again, it also serves for *gradual unfreezing* (Howard and Ruder 2018): train the
# last layer for an epoch, then the last two, then the last three. Their reason is that a model which changes everywhere at once
# forgets. Build a new optimizer after each call, or one over all parameters before the first: an optimizer trains only what it
# was given.

# %% [markdown]
# ### Predict, then measure: which end is cheaper?
#
# SmolLM2-135M has 30 layers. Training all of them, one step on 16 reviews leaves about 600 MiB of activations for backward. How
# many MiB are left if you train the last 4 layers? And if you train the first 4? Write down two numbers.

# %%
my_activations = predict("MiB of activations", {"last 4": None, "first 4": None})

# %% [markdown]
# The next cells load the model (15 seconds the first time), then take a step for several counts at both ends. About half a
# minute on two CPU cores.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.memory import MEBIBYTE, measure_training_step, step_table
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

device = find_device()
model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))
model.to(device)
print(f"{input_ids.numel()} tokens: {input_ids.shape[0]} reviews of up to {input_ids.shape[1]}")

# %% tags=["experiment"]
curve = {}
for end, freeze in {"last": train_last, "first": train_first}.items():
    for count in (1, 4, 15) if end == "first" else (1, 4, 15, 30):
        freeze(model, count)
        curve[end, count] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))
curve["first", 30] = curve["last", 30]  # the same layers
model.requires_grad_(True)
in_full = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))
my_activations.compare({f"{end} 4": curve[end, 4].activations / MEBIBYTE for end in ("last", "first")})

# %% tags=["experiment"]
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), sharex=True)
for panel, quantity in zip(axes, ("activations", "peak")):
    for number, end in enumerate(("first", "last")):
        counts = [count for which, count in curve if which == end]
        sizes = [getattr(curve[end, count], quantity) / MEBIBYTE for count in counts]
        panel.plot(counts, sizes, color=plots.SERIES[number], marker=plots.MARKERS[number], label=f"the {end} layers")
    panel.axhline(getattr(in_full, quantity) / MEBIBYTE, color="#999999", linestyle="--", label="everything")
    panel.set(title=quantity, xlabel="trained layers", ylabel="MiB", ylim=(0, None))
    panel.grid(alpha=0.3)
axes[0].legend(frameon=False, fontsize=8)
figure.suptitle(f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens")
figure.tight_layout()
plots.show(
    figure, alt="Two rising lines a panel: from the last layers up from almost nothing, from the first from two thirds up."
)

# %% [markdown]
# *What to see.* From the top, activations grow from next to nothing, by the same amount with every layer. From the bottom they
# start at two thirds of the whole: training one layer, layer 0, makes 29 frozen ones remember. Where all 30 are trained, the
# lines meet, a hair below full fine-tuning. (The second panel shows this with 16 reviews. In a short run, with two, the
# optimizer's step is the peak.)
#
# Freezing the *embedding* saves hardly any activation: a trained one remembers which tokens there were, and lets layer 0 keep
# its first norm's input. What freezing does save is a gradient and two moments for each of its numbers. In this model the head
# is the same parameter as the embedding. So the second row below trains neither embedding nor head.

# %% tags=["experiment"]
bars = {
    "everything": in_full,
    "all 30 layers, not the embedding": curve["last", 30],
    "the first 4 layers": curve["first", 4],
    "the last 4 layers": curve["last", 4],
}
print(step_table(bars))

# %% tags=["experiment"]
figure = plots.memory_bars(bars, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens")
plots.show(
    figure, alt="Stacked bars: both ends save the same gradients and optimizer state, only the last layers save activations."
)

# %% [markdown]
# *What to see.* Gradients and optimizer state depend on *how many* numbers are trained: they are the same at both ends.
# Activations depend on *how deep* backward must go. The black line is the peak, the most that was needed at any one moment. It
# need not be where the bar ends. To see why, follow the step operation by operation, at both ends. (On the CPU, with eight
# rows; about half a minute.) Before you look: at which moment of the step will memory be highest, and where will each model
# begin to *keep* something?

# %%
my_highest = predict("memory is highest in: forward, backward or optimizer", {"last 4": None, "first 4": None})

# %% tags=["experiment"]
from peftlab.memory import memory_over_time

model.to("cpu")
half, half_labels = input_ids[:8].cpu(), labels[:8].cpu()
course, highest_in = {}, {}
for end, freeze in {"last 4": train_last, "first 4": train_first}.items():
    freeze(model, 4)
    course[end] = memory_over_time(model, lambda: causal_loss(model, half, half_labels))
    totals = [m.parameters + m.gradients + m.optimizer_state + m.activations for m in course[end]]
    place = totals.index(max(totals))
    inside = [moment.phase for moment in course[end]][:place].count(course[end][place].phase)
    highest_in[end] = course[end][place].phase
    print(f"{end}: highest at operation {inside + 1} of {highest_in[end]}")
my_highest.compare(highest_in)
figure = plots.memory_over_time(course, f"One training step of SmolLM2-135M, {half.shape[0]} × {half.shape[1]} tokens")
plots.show(
    figure,
    alt="Two panels of memory over the operations of a step. With the last four layers trained it stays flat through forward and "
    "rises at its end. With the first four it rises from the beginning, and falls through all of backward.",
)
model.to(device)

# %% [markdown]
# *What to see.* With the last four layers trained, memory stays flat while the frozen layers run: each forgets what it saw. The
# green begins at layer 26. With the first four it grows from the start, and is highest where forward turns into backward. Then
# backward comes down and frees activations; where it meets trained layers, gradients take their place. The first picture is
# highest later, in the optimizer's step, when its few activations are gone and all of its gradients are there.
#
# So a peak may lie left of a bar's end, because activations and gradients are never there in full at the same time. It may lie
# right of it, because AdamW computes with temporary tensors.

# %% [markdown]
# ## 2. What each layer keeps  ·  3 points, about 30 minutes, ●●●
#
# Two thirds: where does that come from? Ask a layer. The function below runs it forward and returns every tensor that it saved
# for backward, its weights aside. We ask a layer of the small LLaMA in four situations. In the first one it keeps all that it
# can; in the others we say which of these tensors are kept, by their places in the first list.


# %%
def kept_by(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Return what forward saves for backward, each storage once, without the weights, cos and sin."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, cos, sin, None)
    there_anyway = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), cos, sin)}
    return [tensor for pointer, tensor in kept.items() if pointer not in there_anyway]


# %%
config = PRESETS["tiny"]
layer = Llama(config).model.layers[0]
batch, length = 2, 12
cos, sin = rotary_angles(torch.arange(length), config.head_dim, config.rope_theta)
x = torch.randn(batch, length, config.hidden_size, requires_grad=True)
for norm in (layer.input_layernorm, layer.post_attention_layernorm):
    nn.init.uniform_(norm.weight)  # gains of 1 would give back what went in
everything = kept_by(layer, x, cos, sin)
print(f"hidden size {config.hidden_size}, MLP {config.intermediate_size}, {config.num_attention_heads} heads and "
      f"{config.num_key_value_heads} key-value heads of {config.head_dim}.\ntrained, and something below it is trained too: "
      "numbers per token")  # fmt: skip
sizes = [tensor.numel() // (batch * length) for tensor in everything]
print("   ", ", ".join(f"{place}: {size}" for place, size in enumerate(sizes, start=1)))


# %%
def numbers_in(tensor: Tensor) -> list[float]:
    """Return a tensor's numbers in order of size: the same tensor may be kept in another shape."""
    return sorted(tensor.flatten().tolist())


for situation, learns, wanted_below in (
    ("trained, the lowest of all", True, False),
    ("frozen, above a trained one", False, True),
    ("frozen, below every trained one", False, False),
):
    layer.requires_grad_(learns)
    below = x.detach().requires_grad_(wanted_below)
    kept = [numbers_in(tensor) for tensor in kept_by(layer, below, cos, sin)]
    places = [place for place, tensor in enumerate(everything, start=1) if numbers_in(tensor) in kept]
    print(f"{situation}: {len(kept)} tensors", *places)

# %% [markdown]
# The first list is complete. These are its seventeen tensors. Copy the table to a sheet of paper, and tick for each situation
# above what is kept:
#
# | place | what it is | read by | trained, the lowest | frozen, above | frozen, below |
# |---|---|---|---|---|---|
# | 1 | the input of the first norm | | | | |
# | 2 | what it is multiplied by, one number a token | | | | |
# | 3 | the product of the two | the norm's gain | | | |
# | 4 | the product times the gain | `q_proj`, `k_proj`, `v_proj` | | | |
# | 5, 6, 7 | keys, queries, values | attention | | | |
# | 8 | the logarithm of the softmax's sum, one number a head | attention | | | |
# | 9 | attention's output | attention, `o_proj` | | | |
# | 10 to 13 | the second norm's four, as 1 to 4 | the last by `gate_proj`, `up_proj` | | | |
# | 14, 15 | gate and up | silu, the product | | | |
# | 16 | silu(gate) | the product | | | |
# | 17 | silu(gate) · up | `down_proj` | | | |
#
# Write `numbers_kept`: for every layer of a LLaMA, how many numbers per token it keeps, if the layers with these numbers are
# trained, and perhaps the embedding. Your ticks tell *when* each tensor is kept. Its size is in the output above.
#
# <details><summary>Which layers does backward reach?</summary>
#
# A layer keeps something if it is trained or its input wants a gradient. Its input wants one if any layer below it is trained,
# or the embedding.
# </details>
# <details><summary>My numbers are right for other layers, but not for the lowest trained one</summary>
#
# The embedding below it is frozen, so the input of its *first* norm wants no gradient, and neither that input nor the number it
# is multiplied by is kept. The input of its *second* norm contains the output of its attention, and does want one.
# </details>
# <details><summary>Keys and values come out too wide</summary>
#
# Several query heads share one key-value head: keys have `num_key_value_heads * head_dim` numbers a token, and so have values.
# </details>


# %% nbgrader={"grade": false, "grade_id": "numbers-kept", "locked": false, "schema_version": 3, "solution": true, "task": false}
def numbers_kept(config: LlamaConfig, layers: Sequence[int], embedding: bool = False) -> list[int]:
    """Return how many numbers per token each decoder layer keeps for backward.

    Args:
        config: the sizes of the model.
        layers: the numbers of the layers that are trained, from 0, in any order; perhaps none.
        embedding: whether the embedding is trained.

    Returns:
        One number for each of the model's layers, from layer 0 up.
    """
    ### BEGIN SOLUTION
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    key_value = config.num_key_value_heads * config.head_dim
    attention = hidden + 2 * key_value + heads + hidden
    norm = hidden + 1
    counts, wanted_below = [], embedding
    for number in range(config.num_hidden_layers):
        learns = number in layers
        count = norm if wanted_below else 0
        if learns or wanted_below:
            count += attention + norm + 3 * wide
        if learns:
            count += 2 * 2 * hidden + wide
        counts.append(count)
        wanted_below = wanted_below or learns
    return counts
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-numbers-kept", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_numbers_kept(numbers_kept)

# %% [markdown]
# Now compare your formula with the curve that you measured: four bytes a number, times the tokens of the batch.

# %% tags=["experiment"]
smollm2 = PRESETS["SmolLM2-135M"]
print(f"{'MiB of activations':<20}{'predicted':>10}{'measured':>10}{'difference':>12}")
for (end, count), step in curve.items():
    trained = range(count) if end == "first" else range(30 - count, 30)
    predicted = 4 * sum(numbers_kept(smollm2, trained)) * input_ids.numel() / MEBIBYTE
    measured = step.activations / MEBIBYTE
    print(f"the {end} {count:<12}{predicted:>10.1f}{measured:>10.1f}{measured - predicted:>12.1f}")

# %% [markdown]
# *What to see.* On a CPU the difference is the same few MiB everywhere: the final norm, the loss, and the tables of cosines and
# sines, which are no part of any layer. On a GPU it grows with the number of layers. PyTorch 2.11 has no fast attention kernel
# there for fp32 and grouped queries, so attention is written out and keeps its scores (unit 08 proves it with a simulation).
# Here are activations that were measured on a GPU, of a step on 16 × 29 tokens:

# %%
from peftlab import gpu
from peftlab.memory import MEBIBYTE

for row in gpu.rows(UNIT):
    end = row.settings["variant"] or "last"
    trained = range(4) if end == "first" else range(26, 30)
    predicted = 4 * sum(numbers_kept(PRESETS["SmolLM2-135M"], trained)) * 16 * 29 / MEBIBYTE
    print(f"{row.hardware}, the {end} 4: predicted {predicted:.1f}, measured {row.memory.activations / MEBIBYTE:.1f} MiB")

# %% [markdown]
# A frozen layer that passes the gradient on keeps two thirds of what a trained one keeps. That is why LoRA, which trains a
# little in *every* layer, hardly reduces activations (unit 08), and why the last layers alone do.

# %%
kept = numbers_kept(PRESETS["SmolLM2-135M"], [0, 29])
passing, learning = kept[1], kept[29]
print(
    f"SmolLM2, numbers per token: {learning:,} in a trained layer, {passing:,} in a frozen one above it: {passing / learning:.0%}"
)

# %% [markdown]
# ## 3. Any part, and ties  ·  2 points, about 15 minutes, ●●○
#
# Which layers to train depends on what is new. Lee, Tang and Lin (2019) find that a quarter of BERT's layers, the last ones,
# reach 90% of the quality of fine-tuning them all; Lee et al. (2022) find the *first* layers better where the input has changed
# and the task has not, such as corrupted photographs. So you need a switch for every part. `train_only` takes the numbers of
# the layers and three flags, and freezes the rest.
#
# There is one trap. In SmolLM2, as in most small models, embedding and head are *tied*: one parameter under two names. It
# cannot be trained as the head and be frozen as the embedding, and code that tries does one of the two without a word.
# `train_only` raises a `ValueError` instead if it is asked for one end of a tie and not the other.
#
# Do not trust the config on that: people cut ties by hand (unit 08 does, to merge into a head), and a tensor that has equal
# *values* is not therefore the same tensor.
#
# <details><summary>How do I see whether two names mean one tensor?</summary>
#
# `a is b`, where `a` and `b` are the two `weight`s.
# </details>
# <details><summary>The check says that a refused request has frozen the model</summary>
#
# Look for the tie first, raise if you must, and only then begin to freeze.
# </details>


# %% nbgrader={"grade": false, "grade_id": "train-only", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_only(
    model: Llama, *, layers: Sequence[int] = (), embedding: bool = False, head: bool = False, norm: bool = False
) -> None:
    """Train these parts of the model; freeze everything else.

    Args:
        layers: the numbers of the decoder layers to train, from 0; the model has them all.
        embedding, head, norm: whether to train `model.model.embed_tokens`, `model.lm_head` and `model.model.norm`.

    Raises:
        ValueError: if embedding and head are one parameter, and one is to be trained without the other; the model is
            then as it was.
    """
    ### BEGIN SOLUTION
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied and embedding != head:
        raise ValueError("embedding and head are tied: they are one parameter, to be trained together or not at all")
    model.requires_grad_(False)
    for number in layers:
        model.model.layers[number].requires_grad_(True)
    if embedding:
        model.model.embed_tokens.requires_grad_(True)
    if head:
        model.lm_head.requires_grad_(True)
    if norm:
        model.model.norm.requires_grad_(True)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-train-only", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_train_only(train_only)

# %% [markdown]
# What does the tie cost? "Train the head alone" is the cheapest thing there is in a model whose head has a weight of its own.
# In a tied model the same parameter also stands at the very bottom. None of the decoder layers is trained then. What do they
# keep?

# %%
for name in ("LLaMA-7B", "SmolLM2-135M"):
    tied = PRESETS[name].tie_word_embeddings
    kept = sum(numbers_kept(PRESETS[name], [], embedding=tied))
    print(f"{name}: {'tied' if tied else 'not tied'}; to train the head, the decoder layers keep {kept:,} numbers a token")

# %% [markdown]
# *What to see.* Where there is no tie, backward ends at the head. Where there is one, every frozen layer passes the gradient
# down to the embedding.
#
# ## 4. The file  ·  2 points, about 15 minutes, ●○○
#
# What was trained is a few layers, and nothing else needs to be saved. `save_trained` writes every parameter that requires a
# gradient to a [safetensors](https://huggingface.co/docs/safetensors) file, under its full name
# (`model.layers.29.mlp.up_proj.weight`). `load_trained` copies the file's tensors into the parameters of a model, in place,
# whatever is trainable there: usually it is a base that was just loaded. It does not touch `requires_grad`. A name that the
# model lacks, or a tensor of another shape, is a `ValueError`, raised before anything is copied.
#
# Such a file *replaces* weights (those of later units add to them). To return to the base, or to go on to another task, you
# need the base's own layers again.
#
# <details><summary>The file is empty</summary>
#
# `state_dict()` returns detached tensors, which never require a gradient. `named_parameters()` returns the parameters
# themselves.
# </details>
# <details><summary>safetensors complains about tensors that share memory</summary>
#
# `state_dict()` lists a tied parameter under both of its names, `named_parameters()` under the first alone.
# </details>
# <details><summary>A leaf Variable that requires grad is being used in an in-place operation</summary>
#
# Autograd watches you. Decorate the function with `@torch.no_grad()`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "trained-files", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save_trained(model: nn.Module, path: str | Path) -> None:
    """Write every parameter that requires a gradient, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    ### BEGIN SOLUTION
    save_file({name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}, path)
    ### END SOLUTION


def load_trained(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of such a file into the model's own parameters, in place.

    Raises:
        ValueError: if the model lacks one of the file's names, or has it in another shape; it is then as it was.
    """
    from safetensors.torch import load_file

    ### BEGIN SOLUTION
    saved, own = load_file(path), dict(model.named_parameters())
    misfits = [name for name in saved if name not in own or own[name].shape != saved[name].shape]
    if misfits:
        raise ValueError(f"{path} does not fit this model: {misfits[:4]}")
    with torch.no_grad():
        for name in saved:
            own[name].copy_(saved[name])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-trained-files", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_trained_files(save_trained, load_trained)

# %% [markdown]
# ### How much is that?
#
# Predict first: what share of SmolLM2-135M are its last four layers and the final norm? And of LLaMA-7B?

# %%
my_shares = predict("percent of the parameters in the last 4 layers", {"SmolLM2-135M": None, "LLaMA-7B": None})

# %% tags=["experiment"]
four_layers = {}
for name in ("SmolLM2-135M", "LLaMA-7B"):
    with torch.device("meta"):  # shapes without numbers: nothing is allocated
        on_paper = Llama(PRESETS[name])
    total = sum(parameter.numel() for parameter in on_paper.parameters())
    print(f"{name}:")
    for count in (0, 1, 2, 4, 8):
        train_last(on_paper, count)
        trained = sum(parameter.numel() for parameter in on_paper.parameters() if parameter.requires_grad)
        if count == 4:
            four_layers[name] = 100 * trained / total
        print(
            f"   last {count} layers and norm: {trained:>13,} numbers, {trained / total:8.4%}, file of {2 * trained / 1e6:8,.1f} MB in 16 bits"
        )
my_shares.compare(four_layers)

# %% [markdown]
# The methods of the later units train less. Overviews say: adapters 1 to 5%, prefix tuning under 1%, BitFit under 0.1% and
# prompt tuning under 0.01%, in models of billions of parameters. Units 04 to 07 count for themselves. Four layers of 30 or 32
# are about a tenth of the model, in the small one as in the large one. Freezing is not the smallest method. It is the simplest,
# and it trains less of the *depth*.

# %% [markdown]
# ## 5. On a real model
#
# Fine-tune SmolLM2-135M on film reviews twice, with 40 steps on the same batches: the last four layers, then the first four.
# `fine_tune` scores the model, trains it, scores it again and writes a results row. About a minute and a half each on two CPU
# cores, fifteen seconds on an H200. Each end gets the learning rate that our sweep chose for it (see below): at a common rate
# you would compare luck. Which will be better? Which will be faster?

# %%
my_end = predict("the end, last or first, that is", {"better": None, "faster": None})

# %% tags=["experiment"]
from peftlab.training import fine_tune

rows = {}
swept = {
    end: comparison.rows("layer_freezing", "movie_reviews", variant) for end, variant in (("last", ""), ("first", "first"))
}
for end, freeze in {"last": train_last, "first": train_first}.items():
    model, tokenizer = load_smollm2()
    freeze(model, 4)
    rows[end] = fine_tune(
        model, tokenizer, reviews, unit=UNIT, method="layer_freezing",
        save=lambda path: save_trained(model, path), steps=40, learning_rate=comparison.chosen_rate(swept[end]) if swept[end] else 2e-4,
        score_before=rows["last"].score_before if rows else None, variant="" if end == "last" else end, layers=4,
    )  # fmt: skip
    save_trained(model, f"{end}.safetensors")

# %% tags=["experiment"]
for end, row in rows.items():
    print(
        f"{end:>5} 4: {row.score_before:.1%} -> {row.score_after:.1%} of {settings.examples(len(reviews.test))} reviews, "
        f"{row.trainable_parameters:,} trained, {row.adapter_bytes / 1e6:.1f} MB file, {row.memory.peak / MEBIBYTE:,.0f} MiB at the peak, "
        f"{row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
    )
better = max(rows, key=lambda end: rows[end].score_after)
faster = min(rows, key=lambda end: rows[end].seconds_per_step)
my_end.compare({"better": better, "faster": faster})
plots.show(
    plots.loss_curves({f"{end} 4 layers": row.losses for end, row in rows.items()}, "Training loss on movie_reviews"),
    alt="Two loss curves over 40 steps, one for the last four layers and one for the first four.",
)

# %% [markdown]
# *What to see.* Both train 14 million numbers and write files of the same size. A step that trains the last four layers is
# faster: its backward goes through four layers instead of thirty. With 480 test reviews, one standard error is about 1.4
# points: look at the shipped rows below before you call one end better. *Forgetting* is by how much the loss on newspaper
# sentences has risen, in nats per token.
#
# The files can be exchanged, on one base. The model in memory holds what its *first* layers learned:

# %% tags=["experiment"]
few = reviews.test.select(range(settings.examples(48)))
print(f"first 4 trained: {reviews.score(model, few):.0%} of a few reviews")
base, _ = load_smollm2()
load_trained(base.to(device), "last.safetensors")
print(f"the base with last.safetensors: {reviews.score(base, few):.0%}")
load_trained(base, "first.safetensors")
print(
    f"first.safetensors on top of it: {reviews.score(base, few):.0%}  (both ends have changed now, and never learned together)"
)

# %% [markdown]
# ### What we measured
#
# These rows come with the course, on both tasks. A learning rate was chosen like this:
#
# 1. Several rates are run with one seed. What counts is the mean loss of the last ten steps, the *late loss*. No batch comes
#    twice within a run, so this is a loss on rows not yet trained on, and the test split has no say in it.
# 2. The rate with the lowest late loss gets two more seeds. If their mean is worse than the single run of another rate, that
#    rate gets two more seeds as well.
# 3. Of the rates with three seeds, the one with the lowest mean is chosen: the star, and the ring.
#
# The table and the lines show seed 0, the small marks the other seeds. Beside freezing stand LoRA (unit 08) and full
# fine-tuning.

# %%
METHODS = {"last 4": ("layer_freezing", ""), "first 4": ("layer_freezing", "first"), "LoRA": ("lora", ""), "full": ("full", "")}
shipped = comparison.select(METHODS)
print(comparison.sweep_table(shipped))

# %% tags=["experiment"]
for task in comparison.TASKS:
    rows_by_name = comparison.on_task(shipped, task)
    if rows_by_name:
        figure = plots.learning_rate_sweep(rows_by_name, f"{task}: every method has its own learning rate")
        plots.show(
            figure, alt=f"Late loss and score against the learning rate on {task}, with the chosen rate ringed for each method."
        )

# %%
print(comparison.score_table(shipped))
print(comparison.memory_table(shipped))

# %% [markdown]
# Two runs with the same seed have seen the same batches, so they can be compared pair by pair, which takes the luck of the
# batches out:

# %%
for task in comparison.TASKS:
    for name in ("last 4", "first 4"):
        scores = comparison.summary(shipped[task, name]).scores
        print(f"{task:<15}{name:<9}seeds 0, 1, 2: {', '.join(f'{score:.1%}' for score in scores)}")

# %% [markdown]
# *What to see.* *Spread* is the best of the three seeds minus the worst, in points. A difference of two means that is smaller
# than the spreads says little by itself. Which end is better? On reviews the last four layers lead by four points, with a
# spread of nearly five; on tool calls the *first* four lead by eleven, with spreads of eleven and thirteen. By the means alone,
# then, neither verdict is safe.
#
# The pairs say more: on reviews the last four win with each of the three seeds, on tool calls the first four do, by 5 to 14.5
# points. Three pairs a task are still few: if the ends were equal, chance would give three wins to one side in one of four
# tasks. So these rows show no end that is better on both tasks, and hint that it depends on the task. The forgetting differs,
# too: the last four, at their best rate on reviews, forget most of all. Then read the last table across: the two ends cost the
# same in every column but two.

# %% [markdown]
# ## 6. Is that the right gradient?
#
# peft has no method of this name: freezing takes no library. Two other witnesses will do. The first is full fine-tuning itself.
# If freezing only leaves things out, then the gradients that remain must be those of full fine-tuning: not nearly, but to the
# bit.

# %%
torch.manual_seed(0)
small = Llama(replace(PRESETS["tiny"], num_hidden_layers=4))
ids = torch.randint(0, 256, (4, 24))
causal_loss(small, ids, ids).backward()
of_everything = {name: parameter.grad for name, parameter in small.named_parameters()}
for freeze in (train_last, train_first):
    small.zero_grad()
    freeze(small, 2)
    causal_loss(small, ids, ids).backward()
    same = [torch.equal(p.grad, of_everything[name]) for name, p in small.named_parameters() if p.requires_grad]
    absent = [p.grad is None for p in small.parameters() if not p.requires_grad]
    print(f"{freeze.__name__}: {sum(same)} of {len(same)} gradients equal, {sum(absent)} of {len(absent)} others absent")
    assert all(same) and all(absent), "freezing has changed a gradient: run the checks above again"

# %% [markdown]
# The second is the production library. A small LLaMA exists twice with the same weights, in `transformers` and here. Theirs is
# frozen as people do it there, by the parameters' names; ours by your `train_last`. Both take 20 AdamW steps on the same
# tokens.

# %% tags=["experiment"]
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from peftlab.training import trainable, twenty_steps

torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4)
theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
ours = Llama(replace(PRESETS["tiny"], num_hidden_layers=4))
ours.load_state_dict(theirs.state_dict())
for name, parameter in theirs.named_parameters():
    parameter.requires_grad = name.startswith(("model.layers.2.", "model.layers.3.", "model.norm."))
train_last(ours, 2)

# %% tags=["experiment"]
our_losses = twenty_steps(trainable(ours).values(), lambda ids: causal_loss(ours, ids, ids))
their_losses = twenty_steps(trainable(theirs).values(), lambda ids: theirs(input_ids=ids, labels=ids).loss)

# %% tags=["experiment"]
apart = ((our_losses - their_losses).abs() / their_losses).max().item()
print(f"first losses {our_losses[0]:.6f} and {their_losses[0]:.6f}, last {our_losses[-1]:.6f} and {their_losses[-1]:.6f}")
print(f"largest relative difference of any loss: {apart:.1e}")
assert apart <= 1e-5, "your freezing and transformers' have parted ways: run the checks above again"

# %% [markdown]
# ## 7. Bug hunt  ·  2 points, about 15 minutes, ●●○
#
# *After transformers issues 21381 and 42489.* Somebody trains the last layers of a model and is short of memory. Gradient
# checkpointing helps: keep only each layer's input, and run the layer again in backward. Training then goes through without an
# error, and the loss falls a little, but much less than before.


# %%
def run_with_a_bug(layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the decoder layers one after the other, each under gradient checkpointing."""
    for layer in layers:
        x = checkpoint(layer, x, cos, sin, None, use_reentrant=True)
    return x


def learning(run_layers) -> list[str]:
    """Return the names of the parameters that get a gradient when the layers are run by `run_layers`."""
    small.zero_grad()
    train_last(small, 2)
    cos, sin = rotary_angles(torch.arange(ids.shape[1]), small.config.head_dim, small.config.rope_theta)
    hidden = small.model.norm(run_layers(small.model.layers, small.model.embed_tokens(ids), cos, sin))
    small.lm_head(hidden).logsumexp(-1).mean().backward()
    return [name for name, parameter in small.named_parameters() if parameter.grad is not None]


with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    names = learning(run_with_a_bug)
print(f"19 parameters are trainable, and these get a gradient: {names}")
print(f"warnings: {len(warned)} (print them, if you are stuck)")

# %% [markdown]
# Write `run_checkpointed`: the same output, the gradients of a plain run for whatever is trained, and no more kept or computed
# than need be. Of the layers that backward visits only the input is kept; the frozen layers below them keep nothing and run
# once.
#
# <details><summary>I see no bug</summary>
#
# A *reentrant* checkpoint is one node of autograd's graph. It asks whether one of its *inputs* wants a gradient; the weights
# inside the layer are no inputs. What does the embedding's output say, if the embedding is frozen?
# </details>
# <details><summary>The check says that too many bytes are alive, or that layers run too often</summary>
#
# A popular remedy makes the embedding's output require a gradient (`enable_input_require_grads` in transformers). Gradients are
# right then, but backward goes through every frozen layer down to the embedding. The other kind of checkpoint,
# `use_reentrant=False`, needs no such thing.
# </details>
# <details><summary>The gradients are wrong, and I checkpoint a lambda</summary>
#
# A lambda in a loop looks its variables up when it is *called*. In backward the loop is over, and `layer` is the last one.
# </details>


# %% nbgrader={"grade": false, "grade_id": "run-checkpointed", "locked": false, "schema_version": 3, "solution": true, "task": false}
def run_checkpointed(
    layers: nn.ModuleList,
    x: Float[Tensor, "batch seq hidden"],
    cos: Float[Tensor, "seq head_dim"],
    sin: Float[Tensor, "seq head_dim"],
) -> Float[Tensor, "batch seq hidden"]:
    """Run the decoder layers, some of which may be frozen, under gradient checkpointing.

    Args:
        layers: each is called as `layer(x, cos, sin, None)`.
        x: the output of the embedding, which may be frozen.
        cos, sin: RoPE's angles.
    """
    ### BEGIN SOLUTION
    for layer in layers:
        x = checkpoint(layer, x, cos, sin, None, use_reentrant=False)
    return x
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-run-checkpointed", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_run_checkpointed(run_checkpointed)

# %%
print(f"{len(learning(run_checkpointed))} of 19 trainable parameters get a gradient")

# %% [markdown]
# ## 8. In your own words  ·  2 points, marked by hand
#
# Two colleagues share a GPU and a model of 32 layers. One trains its last 2 layers, on long documents, and it fits. The other
# has texts in a spelling that the model has never seen, and finds it natural to train the *first* 2 layers. "Equally many
# parameters," she says, and runs out of memory in the first step.
#
# In about 120 words: which bytes are the same for both, which are not, and why? What does a frozen layer above hers have to
# keep, and what can it forget? Propose one change that lets her train her two layers all the same, and say what it costs. Refer
# to at least one number that you measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "two-ends", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: which bytes, and why.* Weights, gradients and optimizer state are the same; activations differ, because
# backward passes through every layer above the lowest trained one. A frozen layer on the way keeps what nonlinearities, norms
# and attention need, and forgets what only its weights' gradients need (the inputs of its linear layers, as far as nothing else
# needs them). A measured figure is quoted, with its unit. *1 point: a remedy and its cost.* Gradient checkpointing that is not
# reentrant (about one more forward pass in time); shorter documents or smaller batches with accumulation (more steps); 16-bit
# numbers (rounding); or the last layers instead (and then she must show that they learn as much). Half points for either part
# without a reason or without a cost.
#
# **A full answer.** Weights, gradients and AdamW's state are the same: they depend on how many numbers are trained. Activations
# are not. Her gradient has to come down through all 30 frozen layers, and each needs what its norms, its attention and its
# SwiGLU saw; it can forget the inputs of most of its linear layers, because only the weights' gradients need them. In my
# measurement on SmolLM2 the last 4 layers left 83 MiB of activations and the first 4 left 419. Long documents make it worse,
# since activations grow with the tokens. I would turn on gradient checkpointing, with `use_reentrant=False` because her
# embedding is frozen: only each layer's input is kept, and backward takes about one more forward pass.
#
# **An answer worth one point.** Both train the same number of parameters so gradients and optimizer are the same, but backward
# has to go through all the layers above hers, and these keep their activations (419 MiB against 83 for us). She should use a
# smaller batch.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A switch for every part of a LLaMA, a formula for what each layer keeps, held against measurement, and files that hold what
# was trained. Unit 04 trains the fewest numbers that one can in *every* layer, the biases: compare its activations with those
# of this unit.
#
# ## Sources
#
# - Howard and Ruder (2018), *Universal Language Model Fine-tuning for Text Classification* (ULMFiT), arXiv 1801.06146: gradual
#   unfreezing, from the last layer down.
# - Lee, Tang and Lin (2019), *What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning*, arXiv 1911.03090: a quarter
#   of the layers reaches 90% of the quality of fine-tuning them all.
# - Lee et al. (2022), *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts*, arXiv 2210.11466: which part to train
#   depends on what has changed.
# - Chen et al. (2016), *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174: gradient checkpointing.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
# - transformers issues [21381](https://github.com/huggingface/transformers/issues/21381) and
#   [42489](https://github.com/huggingface/transformers/issues/42489): gradient checkpointing with frozen layers and with frozen
#   embeddings.
