# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · BitFit: train the biases, and nothing else
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 90, and 5 of experiments on two CPU cores | 2 of 5 | 14 | 00_start_here; some PyTorch |
#
# A linear layer multiplies by a large matrix and then, often, adds a short vector, its bias. Ben Zaken et al. (2022) train only
# these vectors of a BERT, 0.08% of its parameters, and come close to full fine-tuning where there are few examples. They call
# it BitFit. A LLaMA has no biases at all, like many large models since PaLM, whose authors found training more stable without.
# You will give it some, and see what they can do, what they cost, and which of them do nothing.
#
# **When you have finished, you can**
#
# 1. give a model without biases zero ones, prove that this changes nothing, and train only these;
# 2. write the backward pass of such a layer by hand, and show from measured bytes that it keeps no input;
# 3. say what each bias of a LLaMA acts on, and move one into another without changing the model's output.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from autograder.checks.bitfit import (
    check_add_biases,
    check_bias_backward,
    check_bias_files,
    check_bias_memory,
    check_fold_value_bias,
    check_gain,
    check_train,
)
from peftlab import comparison, plots
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, LlamaAttention, RMSNorm, causal_loss
from peftlab.progress import predict

UNIT = "04_bitfit"
KINDS = ALL_LINEAR

# %% [markdown]
# ## The idea
#
# A linear layer with a bias computes, for every token's vector $x$,
#
# $$ y = W x + b, \qquad W \in \mathbb{R}^{\text{out} \times \text{in}}, \quad b \in \mathbb{R}^{\text{out}} $$
#
# in code `x @ W.T + b`. BitFit freezes $W$ and trains $b$. Here are the seven linear layers of one decoder layer of SmolLM2.
# Their weights are drawn to scale. Each bias is the thin bar on its matrix's right.

# %%
config = PRESETS["SmolLM2-135M"]
with torch.device("meta"):  # shapes without numbers: nothing is allocated
    layer = Llama(config).model.layers[0]
shapes = {name.split(".")[-1]: tuple(m.weight.shape) for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
figure, axes = plt.subplots(figsize=(9, 2.6))
left = 0
for name, (height, width) in shapes.items():
    axes.add_patch(plt.Rectangle((left, 0), width, -height, color="#BBBBBB"))
    axes.add_patch(plt.Rectangle((left + width + 12, 0), 14, -height, color="#D55E00"))
    axes.annotate(f"{name}\n{height} × {width}", (left, 40), fontsize=8, va="bottom")
    left += max(width, 640) + 150
axes.set(xlim=(-20, left), ylim=(-1600, 330), aspect="equal", title="Weights (grey, frozen) and biases (orange) of one layer")
axes.axis("off")
plots.show(figure, alt="Seven grey rectangles, each with an orange bar on its right that is as high and very thin.")

# %% [markdown]
# *What to see.* To scale, the biases would be too thin to print: they are drawn fourteen times as wide as they are. A bias has
# one number where the weight has a whole row.

# %%
weights = sum(height * width for height, width in shapes.values())
biases = sum(height for height, _ in shapes.values())
print(f"one layer: {weights:,} numbers in the weights, {biases:,} in the biases, {biases / weights:.2%} of that")

# %% [markdown]
# How can so little do anything? A bias cannot depend on the token: it adds the same vector everywhere. But what it adds it to
# is read by everything that follows. A bias on the queries shifts what is attended to; one on `gate_proj` opens or shuts
# features of the MLP, whatever the input; one on `o_proj` or `down_proj` writes a constant into the residual stream, and thirty
# layers make many such shifts. Ben Zaken et al. take its success as a sign that fine-tuning mostly *brings out* what a model
# knows already, rather than teaching it something new.

# %% [markdown]
# ## 1. Biases for a model that has none  ·  2 points, about 10 minutes, ●○○
#
# Our LLaMA creates its linear layers with `bias=False`, and so does Hugging Face's. In such a layer the attribute `bias` is
# there and is `None`; assign a parameter to it, and `forward` uses it from then on. Write `add_biases`:
#
# - every `nn.Linear` inside `model.model.layers` that has no bias gets one of **zeros**, so that the model's output does not
#   change;
# - it has the dtype of the layer's weight, and is on the same device;
# - a bias that is there already stays as it is, and so do all weights, and the head, which lies outside `model.model.layers`.
#
# <details><summary>TypeError: cannot assign 'torch.FloatTensor' as parameter 'bias'</summary>
#
# `bias` is kept for a parameter: wrap the tensor in `nn.Parameter(...)`.
# </details>
# <details><summary>The check speaks of a dtype or a device, and I have no GPU</summary>
#
# A tensor is created in fp32 on the CPU unless you say otherwise. `layer.weight.new_zeros(size)` takes both from the weight.
# </details>
# <details><summary>RuntimeError: the size of tensor a must match the size of tensor b, or "expanded size"</summary>
#
# A bias is added to the *output*: it has `out_features` numbers.
# </details>


# %% nbgrader={"grade": false, "grade_id": "add-biases", "locked": false, "schema_version": 3, "solution": true, "task": false}
def add_biases(model: Llama) -> None:
    """Give every linear layer of the decoder layers a bias of zeros, shape (out_features,), unless it has a bias already.

    The new biases are parameters, in the dtype of the layer's weight and on its device. Nothing else of the model changes.
    """
    ### BEGIN SOLUTION
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-add-biases", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_add_biases(add_biases)

# %% [markdown]
# Adding zero rounds nothing, so on a CPU the logits are the same to the last bit, in either dtype. (A GPU may choose another
# kernel for a product with a bias, which may round otherwise.)

# %%
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    tiny = Llama(PRESETS["tiny"]).to(dtype)
    input_ids = torch.randint(0, 256, (2, 12))
    before = tiny(input_ids)
    add_biases(tiny)
    print(f"{dtype}: largest difference of any logit {(tiny(input_ids) - before).abs().max().item()}")

# %% [markdown]
# ## 2. Train only these  ·  2 points, about 10 minutes, ●○○
#
# Two functions, each of which decides for *every* parameter of the model whether it is trained, whatever was done with the
# model before:
#
# - `train_biases(model)`: all parameters whose own name is exactly `bias`. A parameter's own name is the last part of its full
#   name. A model without any is a `ValueError`: on a LLaMA fresh from the Hub, "train the biases" trains nothing.
# - `train_norm_gains(model)`: the gains of the norms, and no others. An RMSNorm multiplies each feature by a number of its own,
#   $y = \gamma \odot x / \operatorname{rms}(x)$, and our LLaMA calls it `RMSNorm`, with `weight` for $\gamma$. These are the
#   small vectors that a LLaMA *does* have, and our second candidate.
#
# The check takes a training step after each, and measures its bytes: gradients, optimizer state, and all that forward saves.
#
# <details><summary>I set requires_grad, and the check says that nothing changed</summary>
#
# `module.requires_grad = True` creates an attribute that nobody reads. `module.requires_grad_(True)` goes through the module's
# parameters; for a single parameter both spellings work.
# </details>
# <details><summary>The check says that something is trained that only has bias or norm in its name</summary>
#
# `"bias" in name` is also true for `bias_gate` and `bias_tower.weight`. `name.rpartition(".")[2]` is the last part of a name,
# with or without a dot before it. For the norms, ask for the type: `isinstance(module, RMSNorm)`.
# </details>
# <details><summary>The check says that the final norm is missing</summary>
#
# It is `model.model.norm`, after the last layer. `model.modules()` finds it along with the others.
# </details>


# %% nbgrader={"grade": false, "grade_id": "train-biases", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_biases(model: nn.Module) -> None:
    """Make the parameters whose own name is `bias` trainable, and freeze all others.

    Raises:
        ValueError: if the model has no bias.
    """
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError("the model has no biases: add some, or nothing would be trained")
    for bias in biases:
        bias.requires_grad_(True)
    ### END SOLUTION


def train_norm_gains(model: nn.Module) -> None:
    """Make the gain of every `RMSNorm` trainable, and freeze all other parameters."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.requires_grad_(True)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-train", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_train(train_biases, train_norm_gains)

# %% [markdown]
# ### Predict, then measure: which share?
#
# You have seen the biases of one of SmolLM2's thirty layers. What share of all 134,515,008 parameters are the biases of the
# whole model? And for a LLaMA of fifty times the size: is that share larger, about the same, or smaller? Write both down before
# you run the cells after.

# %%
my_share = predict("percent of SmolLM2's parameters that are biases", None)
my_trend = predict("the share in LLaMA-7B: larger, the same or smaller", None)


# %%
def with_biases(model: Llama) -> Llama:
    """Prepare the model for BitFit, with your two functions."""
    add_biases(model)
    train_biases(model)
    return model


def with_norm_gains(model: Llama) -> Llama:
    """Prepare the model for training its norm gains alone."""
    train_norm_gains(model)
    return model


# %%
METHODS = {"biases": with_biases, "norm gains": with_norm_gains}
shares = {}
for size in ("SmolLM2-135M", "LLaMA-7B"):
    with torch.device("meta"):
        model = Llama(PRESETS[size])
        whole = sum(parameter.numel() for parameter in model.parameters())
        for method, prepare in METHODS.items():
            trained = sum(parameter.numel() for parameter in prepare(model).parameters() if parameter.requires_grad)
            width, shares[size, method] = PRESETS[size].hidden_size, trained / whole
            print(f"{size:<13} width {width:>5,}: {trained:>9,} {method:<10}, {trained / whole:.4%} of {whole:,}")
small, large = shares["SmolLM2-135M", "biases"], shares["LLaMA-7B", "biases"]
my_share.compare(100 * small)
my_trend.compare("the same" if 0.8 < large / small < 1.25 else "larger" if large > small else "smaller")

# %% [markdown]
# *What to see.* BitFit is usually listed with "less than 0.1% of the parameters". The large model keeps to that with much to
# spare; our small one is a little above it. A layer of width $d$ has about $d$ biases and $d^2$ weights, so the share falls
# about as $1 / d$. (Section 7's table divides by the model *with* its biases: 0.115%.)

# %% [markdown]
# ## 3. What backward needs  ·  4 points, about 30 minutes, ●●●
#
# Let $g_t = \partial \mathcal{L} / \partial y_t$ be the gradient of the loss by the layer's output at token $t$, in code
# `output_gradient`. From $y_t = W x_t + b$ follow three gradients:
#
# $$ \frac{\partial \mathcal{L}}{\partial x_t} = W^\top g_t, \qquad
#    \frac{\partial \mathcal{L}}{\partial b} = \sum_t g_t, \qquad
#    \frac{\partial \mathcal{L}}{\partial W} = \sum_t g_t\, x_t^\top $$
#
# Only the third contains $x$. That is why training a weight keeps the layer's input in memory from forward to backward, for
# every token, and why training a bias need not.
#
# ### Adding
#
# Write the layer as two functions, without autograd and without loops. `biased_linear` returns the output and a **tuple of what
# has to be kept** for backward; `biased_linear_backward` gets that tuple and `output_gradient`, and returns the gradients of
# `x` and of the bias. The weight is frozen and gets none. `x` has one or more axes before the last: `(tokens, in)`, `(batch,
# seq, in)` and so on. Which of `x`, `weight`, `bias` and the output does backward need? Keep nothing else: a second check
# counts the bytes.
#
# <details><summary>RuntimeError: mat1 and mat2 shapes cannot be multiplied</summary>
#
# `x` ends in `in`, and `weight` is `(out, in)`: forward multiplies by its transpose. `output_gradient` ends in `out`: backward
# multiplies by the weight as it is.
# </details>
# <details><summary>The gradient of the bias should have shape (out,); it has more axes</summary>
#
# Sum over *every* axis but the last: the batch and the positions. `flatten(0, -2)` makes one axis of them.
# </details>
# <details><summary>The check says that biased_linear returns a tensor, or what it keeps is one</summary>
#
# A tuple of one element needs its comma: `return output, (weight,)`.
# </details>
# <details><summary>The memory check says that too much is kept</summary>
#
# Look at what your backward function *uses*. The layer's own weight costs nothing, because it is in memory in any case; a copy
# of it does (`.clone()`, `.contiguous()`, another dtype), and so does everything as large as the input or the output.
# </details>


# %% nbgrader={"grade": false, "grade_id": "biased-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
def biased_linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"]
) -> tuple[Float[Tensor, "*batch out"], tuple[Tensor, ...]]:
    """Return y = W x + b for every vector in `x`, and a tuple of the tensors that backward needs."""
    ### BEGIN SOLUTION
    return x @ weight.T + bias, (weight,)
    ### END SOLUTION


def biased_linear_backward(
    kept: tuple[Tensor, ...], output_gradient: Float[Tensor, "*batch out"]
) -> tuple[Float[Tensor, "*batch in"], Float[Tensor, "out"]]:
    """Return the gradients of `x` and of the bias, in the dtype of `output_gradient`, which stays as it is.

    Args:
        kept: the tuple that `biased_linear` returned.
        output_gradient: the gradient of the loss by the layer's output.
    """
    ### BEGIN SOLUTION
    (weight,) = kept
    return output_gradient @ weight, output_gradient.flatten(0, -2).sum(0)
    ### END SOLUTION


# %% [markdown]
# The first check compares outputs and gradients. *1 point.*

# %% nbgrader={"grade": true, "grade_id": "check-bias-backward", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_bias_backward(biased_linear, biased_linear_backward)

# %% [markdown]
# The second *measures*: it makes a layer of your two functions, takes a training step, and counts what forward left. *1 point.*

# %% nbgrader={"grade": true, "grade_id": "check-bias-memory", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_bias_memory(biased_linear, biased_linear_backward)

# %% [markdown]
# ### Multiplying
#
# The norm gains are as few as the biases, and can be trained alone as well. A norm multiplies each feature $n_i$ of its normed
# input by a gain $w_i$, so that $y_i = w_i\, n_i$ at every token. This time no formula is given. Write `gained` and
# `gained_backward` with the same contract:
#
# - `gained` returns the output and a tuple of what backward needs, which is as few bytes as possible;
# - `gained_backward` returns the gradients of the normed input and of the gain;
# - a gain may be zero in places, nothing that is given changes, and gradients have the dtype of `output_gradient`.
#
# An example with two tokens of two features. For normed inputs $[[1, 2], [3, 4]]$, a gain of $[10, 0]$ and an output gradient
# of ones, the gradient of the normed inputs is $[[10, 0], [10, 0]]$, and that of the gain is $[4, 6]$. The check looks at
# values and bytes. *2 points.*
#
# <details><summary>The gradient of the gain is not [4, 6] in the example</summary>
#
# How much does the loss change if $w_1$ grows a little? At each token $y_1$ changes by $n_1$ times that. Every token has a
# share.
# </details>
# <details><summary>The check says that the output is kept, and divided by the gain</summary>
#
# A zero in the gain makes a zero in the output, and the input cannot be had back from it.
# </details>


# %% nbgrader={"grade": false, "grade_id": "gained", "locked": false, "schema_version": 3, "solution": true, "task": false}
def gained(
    normed: Float[Tensor, "*batch features"], gain: Float[Tensor, "features"]
) -> tuple[Float[Tensor, "*batch features"], tuple[Tensor, ...]]:
    """Return every normed vector times the gain, and a tuple of the tensors that backward needs."""
    ### BEGIN SOLUTION
    return normed * gain, (normed, gain)
    ### END SOLUTION


def gained_backward(
    kept: tuple[Tensor, ...], output_gradient: Float[Tensor, "*batch features"]
) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "features"]]:
    """Return the gradients of the normed input and of the gain.

    Args:
        kept: the tuple that `gained` returned.
        output_gradient: the gradient of the loss by the output.
    """
    ### BEGIN SOLUTION
    normed, gain = kept
    return output_gradient * gain, (output_gradient * normed).flatten(0, -2).sum(0)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-gain", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_gain(gained, gained_backward)


# %% [markdown]
# Adding is free, and multiplying is not: the gain's gradient contains what was multiplied, for every token. Does PyTorch do as
# well by itself? Here are your layers, made into ones that autograd can use, beside `nn.Linear` with other things trained.
# Every number is what forward kept, besides the parameters themselves:


# %%
class BiasedLinear(torch.autograd.Function):
    """Your two functions, as autograd wants them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output, kept = biased_linear(x, weight, bias)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, bias_gradient = biased_linear_backward(ctx.saved_tensors, output_gradient)
        return x_gradient, None, bias_gradient


# %%
class Gained(torch.autograd.Function):
    """Your other two."""

    @staticmethod
    def forward(ctx, normed: Tensor, gain: Tensor) -> Tensor:
        output, kept = gained(normed, gain)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor, ...]:
        return gained_backward(ctx.saved_tensors, output_gradient)


# %%
from peftlab.memory import tensors_of_step

x = torch.randn(8, 128, 576, requires_grad=True)
for name, weight_trained, layer_of in (
    ("nn.Linear, weight and bias trained", True, lambda linear: linear(x)),
    ("nn.Linear, bias trained", False, lambda linear: linear(x)),
    ("yours, bias trained", False, lambda linear: BiasedLinear.apply(x, linear.weight, linear.bias)),
):
    linear = nn.Linear(576, 192)
    linear.weight.requires_grad_(weight_trained)
    optimizer = torch.optim.AdamW([p for p in linear.parameters() if p.requires_grad])
    step = tensors_of_step(lambda: layer_of(linear).sum(), linear.parameters(), optimizer)
    print(f"{name:<36}{sum(tensor.nbytes for tensor in step['saved']):>10,} bytes")
gain = nn.Parameter(torch.ones(576))
step = tensors_of_step(lambda: Gained.apply(x, gain).sum(), [gain], torch.optim.AdamW([gain]))
print(f"{'yours, gain trained':<36}{sum(tensor.nbytes for tensor in step['saved']):>10,} bytes")

# %% [markdown]
# The first line is $8 \times 128 \times 576$ numbers of four bytes, the input. PyTorch saves it if the weight wants a gradient,
# and otherwise does not. A gain of 576 numbers keeps as much as a weight of 576 × 192.

# %% [markdown]
# ## 4. Measured: which memory does BitFit save?
#
# A training step holds five kinds of bytes: the weights, their gradients, the optimizer's state (AdamW keeps two numbers for
# each trained one), the *activations* that forward leaves for backward, and whatever is needed for a moment.
#
# First a prediction. SmolLM2 gets 155,520 biases, and has 35,136 norm gains. Which of the two methods leaves more activations?

# %%
my_larger = predict("more activations: biases or norm gains", None)

# %% [markdown]
# One step of SmolLM2 on a real batch, trained in full, with biases, with norm gains; every allocation is followed (on a GPU, we
# ask the allocator). This loads the model: about 15 seconds the first time, one second later on.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.memory import MEBIBYTE, measure_training_step, step_table
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

device = find_device()
model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))

# %% tags=["experiment"]
measured = {}
for method, prepare in {"full fine-tuning": lambda model: model, **METHODS}.items():
    model, _ = load_smollm2()
    model = prepare(model).to(device)
    measured[method] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

print(step_table(measured))
most = max(METHODS, key=lambda method: measured[method].activations)
my_larger.compare(most)

# %% tags=["experiment"]
figure = plots.memory_bars(
    measured, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"
)
plots.show(figure, alt="Stacked bars: without gradients and optimizer state; activations are smallest with biases.")

# %% [markdown]
# *What to see.* Gradients and optimizer state have almost disappeared in both. Activations are a third smaller with biases than
# in full: no linear layer keeps its input for its own sake. They are not gone, because the gradient has to pass through
# everything that is not linear (the gate, the product with it, attention, the norms), and each of these needs what it saw. The
# black line is the peak, the most that was needed at any one moment.
#
# And the norm gains, a quarter as many numbers, keep *more*. The gradient of a gain is $\partial \mathcal{L} / \partial
# \gamma = \sum_t g_t \odot \hat x_t$, where $g_t$ is again the output's gradient and $\hat x$ the normed input: a gain
# multiplies, so its gradient needs what it is multiplied with. One such tensor a norm:

# %% tags=["experiment"]
norms = sum(isinstance(module, RMSNorm) for module in model.modules())
one_tensor = input_ids.numel() * model.config.hidden_size * 4
print(f"{norms} norms × {one_tensor:,} bytes = {norms * one_tensor / MEBIBYTE:.1f} MiB")
more = measured["norm gains"].activations - measured["biases"].activations
print(f"norm gains keep more than biases by {more / MEBIBYTE:.1f} MiB")

# %% [markdown]
# So the number of trained parameters says little about activations: what counts is *how* a parameter enters. Adding is free,
# multiplying is not.

# %% [markdown]
# ## 5. The bias file  ·  2 points, about 15 minutes, ●●○
#
# What was learned is the biases, and nothing else needs to be saved. `save_biases` writes every parameter whose own name is
# `bias` to a [safetensors](https://huggingface.co/docs/safetensors) file, under its full name
# (`model.layers.0.self_attn.q_proj.bias`) and in its own dtype. `load_biases` copies them into a model that has biases already,
# **in place**, because an optimizer may hold these very parameters, and in the model's dtype. If the names or the shapes in the
# file are not exactly the model's, it raises a `ValueError` before it changes anything.
#
# Such files do go wrong silently: in peft, `LoraConfig(bias="lora_only")` trained biases that `save_pretrained` left out,
# because it looked them up under another name (peft issue 3306).
#
# <details><summary>The check says that the file holds something that is no bias</summary>
#
# As in exercise 2: compare the last part of the name, whole.
# </details>
# <details><summary>RuntimeError: a leaf Variable that requires grad is being used in an in-place operation</summary>
#
# Autograd watches the parameters. Wrap the copying in `with torch.no_grad():`. The tensors of `model.state_dict()` are the
# parameters' own, and are not watched.
# </details>
# <details><summary>The check says that a refused file has changed the model, or has failed half-way</summary>
#
# Compare all names and all shapes first. Copy when you know that everything fits.
# </details>


# %% nbgrader={"grade": false, "grade_id": "bias-files", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save_biases(model: nn.Module, path: str | Path) -> None:
    """Write every parameter whose own name is `bias`, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    ### BEGIN SOLUTION
    save_file({name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}, path)
    ### END SOLUTION


def load_biases(model: nn.Module, path: str | Path) -> None:
    """Copy the biases from a file into the model's own, in place.

    Raises:
        ValueError: if the file's names and shapes are not exactly those of the model's biases; the model has not changed then.
    """
    from safetensors.torch import load_file

    ### BEGIN SOLUTION
    saved = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"{path} does not fit this model: it holds {len(saved)} biases, the model has {len(own)}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-bias-files", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_bias_files(save_biases, load_biases)

# %% [markdown]
# ## 6. On a real model
#
# The task is to judge film reviews: after `Review: ...` and `This movie is`, does the model find ` good` or ` bad` more likely?
# Untrained it is right in about seven of ten cases.

# %% tags=["experiment"]
for example in reviews.test.select(range(3)):
    print(repr(example["prompt"]), "->", repr(example["answer"]))

# %% [markdown]
# Train the biases, with the learning rate that our sweep chose (section 7), thirty times that of full fine-tuning. `fine_tune`
# scores the model, trains it, scores it again and writes a results row. About a minute and a half on two CPU cores, ten seconds
# on an H200.

# %% tags=["experiment"]
from peftlab.training import fine_tune

known = {variant: comparison.rows("bitfit", "movie_reviews", variant) for variant in ("", "norm_gains")}
rates = {variant: comparison.chosen_rate(rows) if rows else 3e-3 for variant, rows in known.items()}
print(f"learning rate of the biases {rates['']:g}, of the norm gains {rates['norm_gains']:g}")
model, tokenizer = load_smollm2()
with_biases(model)
bias_row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="bitfit", save=lambda path: save_biases(model, path),
    steps=40, learning_rate=rates[""], variant="",
)  # fmt: skip
save_biases(model, "review-biases.safetensors")
trained_biases = {name: parameter.detach().cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}

# %% [markdown]
# And, to compare, the norm gains, on the same batches:

# %% tags=["experiment"]
from safetensors.torch import save_file


def save_gains(model: nn.Module, path: Path) -> None:
    """Write the norm gains to a safetensors file."""
    save_file({name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}, path)


model, tokenizer = load_smollm2()
with_norm_gains(model)
gain_row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="bitfit", save=lambda path: save_gains(model, path),
    steps=40, learning_rate=rates["norm_gains"], variant="norm_gains", score_before=bias_row.score_before,
)  # fmt: skip

# %% tags=["experiment"]
for name, row in (("biases", bias_row), ("norm gains", gain_row)):
    print(
        f"{name:>10}: {row.score_before:.1%} -> {row.score_after:.1%} of {settings.examples(len(reviews.test))} reviews, "
        f"{row.trainable_parameters:,} trained, {row.adapter_bytes / 1e3:,.0f} kB file, "
        f"{row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
    )
plots.show(
    plots.loss_curves({"biases": bias_row.losses, "norm gains": gain_row.losses}, "Training loss on movie_reviews"),
    alt="The training loss of both methods over forty steps.",
)

# %% [markdown]
# *What to see.* The two curves fall together, from six nats to about 0.4, though one method trains four times as many numbers.
# *Forgetting* is by how much the loss on newspaper sentences has risen, in nats per token. With 480 test reviews, one standard
# error is about 1.5 points.
#
# Swapping a task is a matter of milliseconds: the file holds 210 short vectors. Your `load_biases` puts the reviews' biases
# into a fresh model, and the scores must be the same:

# %% tags=["experiment"]
model, _ = load_smollm2()
with_biases(model).to(device)
load_biases(model, "review-biases.safetensors")
print(f"trained: {bias_row.score_after:.1%}; loaded from the file: {reviews.evaluate(model):.1%}")

# %% [markdown]
# ### Which biases do the work?
#
# Every bias started at zero, so its size is how far it has gone. Ben Zaken et al. look at that in a BERT. They find that the
# biases of the queries and of the middle of the MLP change most, and that training these two kinds alone costs little accuracy.
#
# Does a kind that has moved far do much? Ask the model: set one kind to zero, in all layers, and score it. Then the other way
# round: keep one kind and set the other six to zero. Predict the order. About two minutes on two CPU cores.

# %%
my_most_needed = predict("the kind of bias without which the loss rises most, one of KINDS", None)

# %% tags=["experiment"]
few = reviews.test.select(range(settings.examples(160)))


@torch.no_grad()
def with_only(kept: list[str]) -> tuple[float, float]:
    """Return loss and score on a few reviews when only these kinds of bias are there, the others zero."""
    for name, parameter in model.named_parameters():
        if name in trained_biases:
            parameter.copy_(trained_biases[name] if name.split(".")[-2] in kept else torch.zeros_like(parameter))
    return tasks.mean_loss(model, few), reviews.score(model, few)


moved = {kind: torch.cat([b for name, b in trained_biases.items() if f".{kind}." in name]).abs().mean() for kind in KINDS}
without = {kind: with_only([other for other in KINDS if other != kind]) for kind in KINDS}
alone = {kind: with_only([kind]) for kind in KINDS}
nothing, everything = with_only([]), with_only(KINDS)

# %% tags=["experiment"]
print(f"{'':<12}{'mean |bias|':>12}{'without it:':>13}{'score':>8}{'alone:':>10}{'score':>8}")
for kind in KINDS:
    columns = f"{moved[kind]:>12.4f}{without[kind][0]:>8.2f} nats{without[kind][1]:>8.1%}{alone[kind][0]:>5.2f} nats{alone[kind][1]:>8.1%}"
    print(f"{kind:<12}{columns}")
print(f"no bias: {nothing[0]:.2f} nats, {nothing[1]:.1%}; all: {everything[0]:.2f} nats, {everything[1]:.1%}")
my_most_needed.compare(max(without, key=lambda kind: without[kind][0]))

# %% tags=["experiment"]
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for number, (found, label) in enumerate(((without, "all but this kind"), (alone, "this kind alone"))):
    places = [position + 0.4 * number - 0.2 for position in range(len(KINDS))]
    axes.bar(places, [found[kind][0] for kind in KINDS], width=0.38, color=plots.SERIES[number], label=label)
for size, style, label in ((nothing[0], ":", "no bias"), (everything[0], "--", "all seven kinds")):
    axes.axhline(size, color="black", linestyle=style, linewidth=1, label=label)
axes.set_xticks(range(len(KINDS)), KINDS, fontsize=9)
axes.set(title="What each kind of bias does: the loss without it, and with it alone", ylabel="loss on reviews (nats per label)")
figure.legend(ncols=4, fontsize=8, frameon=False, loc="outside lower center")
plots.show(
    figure,
    alt="Two bars for each of the seven kinds of bias: the loss without this kind, and the loss with this kind alone. A dashed line "
    "marks the loss with all seven, a dotted one the loss with none.",
)

# %% [markdown]
# *What to see.* First the column of mean |bias|: all seven kinds have gone about equally far, 0.0079 to 0.0093, though section
# 9 will find gradients that differ by factors of a thousand. That is AdamW, which divides each gradient by its recent size. So
# how far a bias has moved says nothing about what it does. (With other optimizers it might.)
#
# Then the figure. Where the blue bar stays at the dashed line, the other six kinds do without this one. Where the orange bar
# stays at the dotted line, this kind alone does nothing. The keys' bars stand at both: their biases have moved as far as the
# others', and do next to nothing. Section 9 returns to them.

# %% [markdown]
# ## 7. The comparison, measured
#
# Which learning rate? A method that looks useless often just has the wrong one. These rows come with the course, for every
# method and two tasks (`tool_calls` asks for a tool call in JSON, which the untrained model never gets right).
#
# Each rate was run with one seed. What counts is the *late loss*, the mean training loss of the last ten steps. No row of the
# data comes twice in a run, so this is a loss on unseen rows, and the test split is not used. The best rate got two more seeds.
# If their mean then lost to another rate's single run, that rate got two more as well.

# %%
COMPARED = {
    "biases": ("bitfit", ""),
    "norm gains": ("bitfit", "norm_gains"),
    "LoRA, rank 8": ("lora", ""),
    "full": ("full", ""),
}
shipped = plots.show_comparison(COMPARED, "bitfit")

# %% [markdown]
# *What to see.* Each method has a valley of its own: full fine-tuning wants far smaller steps than the methods that train few
# numbers.
#
# Read the two tasks apart. The first asks for one of two words, which the model knows; the second for a format that it has
# never written. Does a constant shift suffice for both? Compare the biases' score with LoRA's in each, and keep the spread in
# mind before you call one better.
#
# The norm gains do as well as the biases, with fewer than a quarter of their numbers: on reviews within half a point, on tool
# calls a little better in the mean, by less than either's seeds lie apart. There they also forget less than half as much. But
# look at the column of activations: the biases need none of their own, and the gains want their normed input. In bytes of a
# training step the smaller method is the larger one.

# %% [markdown]
# ## 8. The same thing in peft
#
# Few libraries have BitFit under its name, but peft has its parts. `BeftConfig` (Huang et al. 2025, who train the values' bias
# alone) adds a zero vector to the output of whichever linear layers you name; named for all seven, that is BitFit on a LLaMA.
# `LNTuningConfig` trains norms. Below, for each of the two methods, there are two small LLaMAs with the same weights: a
# `transformers` model with peft, and our `Llama` with your functions. After 20 AdamW steps on the same tokens the losses must
# agree; only rounding may differ.

# %% tags=["experiment"]
from peft import BeftConfig, LNTuningConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from peftlab.training import trainable, twenty_steps

SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5,
)  # fmt: skip
PEFT = {
    "biases": BeftConfig(target_modules=KINDS),
    "norm gains": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
}

# %% tags=["experiment"]
for method, prepare in METHODS.items():
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HubConfig(**SIZES))
    ours = Llama(PRESETS["tiny"])
    ours.load_state_dict(theirs.state_dict())
    prepare(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that biases could not be merged: more on that below
        theirs = get_peft_model(theirs, PEFT[method])
    our_losses = twenty_steps(trainable(ours).values(), lambda ids: causal_loss(ours, ids, ids), 1e-2)
    their_losses = twenty_steps(trainable(theirs).values(), lambda ids: theirs(input_ids=ids, labels=ids).loss, 1e-2)
    apart = ((our_losses - their_losses).abs() / their_losses).max().item()
    print(f"{method:<11} losses from {our_losses[0]:.4f} to {our_losses[-1]:.4f}; largest relative difference {apart:.1e}")
    assert apart <= 1e-5, "your training and peft's have parted ways: run the checks above again"
    if method == "biases":
        our_biased, their_biased = ours, theirs

# %% [markdown]
# ### Serving it elsewhere
#
# peft keeps its vectors beside the layers, and will not merge them: the layers have no bias to merge them into, and giving them
# one would make another architecture. Yours *are* another architecture. Which one, `transformers` can say: a LLaMA whose
# configuration sets `attention_bias` and `mlp_bias`.

# %% tags=["experiment"]
try:
    their_biased.merge_and_unload()
except ValueError as error:
    print("peft:", error)

input_ids = torch.arange(24)[None]
for flags in ({}, {"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}):
    served = LlamaForCausalLM(HubConfig(**SIZES, **flags))
    lost = served.load_state_dict(our_biased.state_dict(), strict=False).unexpected_keys
    apart = (served(input_ids).logits - our_biased(input_ids)).abs().max().item()
    print(f"{len(lost):>2} biases dropped, logits off by {apart:.1e}, with {flags or 'the default configuration'}")
assert apart <= 1e-5, "with both flags the two models must agree"

# %% [markdown]
# Forget a flag, and biases are dropped without a word: that is what `strict=False` does. It happens. A way round an engine that
# knew no biases in a LLaMA was to pass the model off as a Qwen2, which has them on queries, keys and values only; of one model,
# 240 of 420 vectors were lost so (mlc-llm pull request 3494).

# %% [markdown]
# ## 9. Where a bias acts
#
# Not all of the seven are worth having. Look at attention. The score of query $i$ and key $j$, with a bias on each and without
# rotary positions, is
#
# $$ (q_i + b_q) \cdot (k_j + b_k) = q_i \cdot k_j + b_q \cdot k_j + \underbrace{q_i \cdot b_k + b_q \cdot b_k}_{\text{the same for all } j} $$
#
# and softmax over $j$ does not see what all scores have in common. RoPE turns query and key by angles that depend on their
# positions before the product. Predict: for which of the seven is the gradient zero *without* rotation, and for which *with*
# it?

# %%
# For each a list of names from KINDS, perhaps empty:
my_zeros = predict("kinds of bias with a gradient of zero", {"without rotation": None, "with rotation": None})


# %%
def gradient_sizes(positions: Tensor | None) -> dict[str, float]:
    """Return the norm of the gradient of each kind of bias in a tiny LLaMA; equal positions mean no rotation."""
    torch.manual_seed(0)
    tiny = with_biases(Llama(PRESETS["tiny"]))
    input_ids = torch.randint(0, 256, (4, 24))
    hidden = tiny.model.run_layers(tiny.model.embed_tokens(input_ids), positions=positions)
    F.cross_entropy(tiny.lm_head(hidden[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in tiny.named_parameters() if parameter.requires_grad}
    return {k: torch.cat([g for name, g in gradients.items() if f".{k}." in name]).norm().item() for k in KINDS}


# %%
rotated, still = gradient_sizes(None), gradient_sizes(torch.zeros(24))
print(f"{'gradient of':<14}{'with RoPE':>12}{'without':>12}")
for kind in KINDS:
    print(f"{kind:<14}{rotated[kind]:>12.1e}{still[kind]:>12.1e}")
zeros = {
    f"{name} rotation": {kind for kind in KINDS if sizes[kind] < 1e-7 * max(sizes.values())}  # zero but for rounding
    for name, sizes in (("without", still), ("with", rotated))
}
my_zeros.compare(zeros)

# %% [markdown]
# *What to see.* Without rotation the key's bias has no gradient, but for rounding: it cannot matter. Whisper and BEiT, which do
# not rotate, leave it out, and readers of such code wonder why (EVA issue 53). With RoPE it does not cancel: the product of a
# *turned* query with the *turned* bias depends on the distance between the two. Query and key bias together can say "look so
# far back", whatever the tokens are.
#
# The largest gradients are those of `o_proj` and `down_proj`, which write straight into the residual stream. And the value
# bias? Attention weights sum to one, so that
#
# $$ W_o \sum_j a_{ij} (v_j + b_v) + b_o = W_o \sum_j a_{ij} v_j + (W_o\, b_v + b_o) $$
#
# The value bias does something, but nothing that the output bias could not do. One of the two is redundant.

# %% [markdown]
# ## 10. Bug hunt  ·  2 points, about 15 minutes, ●●○
#
# So the value bias can be folded into the output bias, as TransformerLens does by default with the models that it loads (its
# pull request 116). Someone has written that down:


# %%
@torch.no_grad()
def fold_value_bias_with_a_bug(attention: LlamaAttention) -> None:
    """Move the value bias into the output bias."""
    groups = attention.o_proj.in_features // attention.v_proj.out_features
    attention.o_proj.bias += attention.o_proj.weight @ attention.v_proj.bias.repeat(groups)
    attention.v_proj.bias.zero_()


# %% [markdown]
# It works on LLaMA-7B, and on models like SmolLM2 it gives other logits than before:


# %%
def change_by(fold: Callable[[LlamaAttention], None]) -> float:
    """Return by how much folding changes the largest logit of a tiny LLaMA with random biases."""
    torch.manual_seed(0)
    tiny = with_biases(Llama(PRESETS["tiny"]))
    for parameter in tiny.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    input_ids = torch.arange(24)[None]
    before = tiny(input_ids)
    for layer in tiny.model.layers:
        fold(layer.self_attn)
    return (tiny(input_ids) - before).abs().max().item()


print(f"largest change of any logit: {change_by(fold_value_bias_with_a_bug):.1e}")

# %% [markdown]
# Write `fold_value_bias` so that the attention's output stays what it was, for any number of heads. It changes two parameters,
# in place: `o_proj.bias` gains what `v_proj.bias` gave, and `v_proj.bias` becomes zero (it stays there, so that the
# configuration still fits). Both biases exist. `attention.head_dim` is the size of a head.
#
# <details><summary>I see no bug</summary>
#
# Compare the configurations of the two models in `PRESETS`. Which of the numbers that differ does this function depend on? What
# is `groups` in each model?
# </details>
# <details><summary>I see that the heads differ, and still no bug</summary>
#
# Neighbouring query heads share a value head: with four and two, heads 0 and 1 use value head 0, heads 2 and 3 use value
# head 1. What order does `repeat` give, on `torch.tensor([0, 1]).repeat(2)`, say? (ONNX's definition of this kind of attention
# had the same mix-up: onnx pull request 7274.)
# </details>
# <details><summary>`repeat_interleave` does not help either</summary>
#
# It repeats single numbers, unless the tensor has an axis for the heads: `.view(-1, head_dim)` first.
# </details>


# %% nbgrader={"grade": false, "grade_id": "fold-value-bias", "locked": false, "schema_version": 3, "solution": true, "task": false}
def fold_value_bias(attention: LlamaAttention) -> None:
    """Move the bias of `v_proj`, shape (kv_heads * head_dim,), into that of `o_proj`, shape (hidden,), both in place.

    The attention's output does not change, but for rounding; `v_proj.bias` is zero afterwards.
    """
    ### BEGIN SOLUTION
    groups = attention.o_proj.in_features // attention.v_proj.out_features
    with torch.no_grad():
        heads = attention.v_proj.bias.view(-1, attention.head_dim).repeat_interleave(groups, dim=0)
        attention.o_proj.bias += attention.o_proj.weight @ heads.flatten()
        attention.v_proj.bias.zero_()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-fold-value-bias", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_fold_value_bias(fold_value_bias)

# %%
print(f"largest change of any logit: {change_by(fold_value_bias):.1e}")

# %% [markdown]
# The biases that you trained on reviews, folded: the same answers from 5,760 numbers fewer.

# %% tags=["experiment"]
for layer in model.model.layers:
    fold_value_bias(layer.self_attn)
left = sum(int(parameter.count_nonzero()) for parameter in model.parameters() if parameter.requires_grad)
print(f"{left:,} of {sum(tensor.numel() for tensor in trained_biases.values()):,} biases are left")
print(f"before: {bias_row.score_after:.1%}; folded: {reviews.evaluate(model):.1%}")

# %% [markdown]
# That the two have the same *effect* does not mean that they *train* alike: $W_o b_v$ reaches the output through a weight, so
# the same gradient step moves it elsewhere. Huang et al. (2025) train only the values' bias, and find it better than those of
# queries or keys.

# %% [markdown]
# ## 11. In your own words  ·  2 points, marked by hand
#
# A colleague has one GPU whose memory is nearly full of weights. She reads your two counts, 155,520 biases and 35,136 norm
# gains, and argues: "Gains are four times fewer, so training them takes less memory. And in either case backward has next to
# nothing to do."
#
# In about 120 words: which bytes differ between the two methods, which way, and why? What does backward still have to compute
# when only biases are trained, and what is it spared? Refer to at least two numbers that you measured in section 4.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the bytes.* Gradients and optimizer state are fewer with gains, but small beside the rest in both (under
# 2 MiB together); activations are larger with gains (453 against 391 MiB), because the gradient of a factor needs what it is
# multiplied with, one normed hidden state a norm, while that of a summand needs nothing. Two measured figures are quoted, with
# their unit. *1 point: the work.* The gradient still has to pass back through every layer, with a product by each weight, and
# through attention, gate and norms, which need what they saw (so that activations are not zero); spared are the products that
# make weight gradients, about half of backward, and keeping their inputs. Half points for either part without its reason.
#
# **A full answer.** She is right about gradients and optimizer state, but those are 1.8 MiB with biases and 0.4 with gains,
# which is nothing beside 513 MiB of weights. Activations go the other way: 391 MiB with biases and 453 with gains. A bias is
# added, so its gradient is the sum of the output's gradients and nothing has to be kept; a gain multiplies the normed input, so
# that input is kept, once for each of 61 norms, 62 MiB in all. Backward is not idle: to reach the first layer's biases, the
# gradient goes through all thirty layers, one product with every weight, and the gate and attention need their inputs. It is
# spared the second product, the one that gives the weights' gradients, and keeping the linear layers' inputs.
#
# **An answer worth one point.** She is wrong, because the gains use more memory (453 MiB activations) than the biases (391
# MiB): a gain is multiplied, so you need to save what it is multiplied with for backward. Backward has little to do because
# only the biases get gradients.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A LLaMA with biases that it was not born with, trained with a hundred and fifty thousand numbers; a backward pass that keeps
# nothing but weights; and a file of some six hundred kilobytes a task. Unit 07 puts small layers of their own between the
# frozen ones, unit 08 changes the weights themselves, at low rank.
#
# ## Sources
#
# - Ben Zaken, Goldberg and Ravfogel (2022), *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
#   Language-models*, ACL, arXiv 2106.10199.
# - Huang, Balashankar and Aminifar (2025), *BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes*, arXiv
#   2509.15974: which of the attention's biases to train, also for models without any.
# - Chowdhery et al. (2022), *PaLM: Scaling Language Modeling with Pathways*, arXiv 2204.02311: section 2, a model without
#   biases.
# - Su et al. (2021), *RoFormer: Enhanced Transformer with Rotary Position Embedding*, arXiv 2104.09864; Zhang and Sennrich
#   (2019), *Root Mean Square Layer Normalization*, arXiv 1910.07467.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
# - peft issue [3306](https://github.com/huggingface/peft/issues/3306); TransformerLens pull request
#   [116](https://github.com/TransformerLensOrg/TransformerLens/pull/116); onnx pull request
#   [7274](https://github.com/onnx/onnx/pull/7274); mlc-llm pull request [3494](https://github.com/mlc-ai/mlc-llm/pull/3494);
#   EVA issue [53](https://github.com/baaivision/EVA/issues/53).
