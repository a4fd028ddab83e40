# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Why PEFT: where the memory goes
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 90, and one of measuring on two CPU cores | 2 of 5 | 13 | 00_start_here |
#
# "Full fine-tuning does not fit." How much does not fit, and what is it made of? Overviews of the field answer with a table of
# three rows. In this unit you derive such a table, then *measure* it, for models of up to 70 billion parameters, on the
# computer in front of you; and you find out where the table is loose.
#
# **When you have finished, you can**
#
# 1. count the parameters of any LLaMA, and the bytes that any recipe needs to train it, in your head to ten percent;
# 2. say which of these bytes a method can save, and which it cannot;
# 3. tell the three families of methods apart by what they change.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it on new random numbers.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from autograder.checks.why_peft import (
    check_activation_bytes,
    check_adam_step,
    check_classify,
    check_count_parameters,
    check_count_trainable,
    check_training_bytes,
)
from peftlab import plots, settings
from peftlab.llama import PRESETS, Llama, LlamaConfig
from peftlab.progress import predict
from peftlab.simulate import RECIPES, simulate_training_step

GB = 1e9  # as papers count
CARD_GB = 2**30  # as graphics cards are sold: seven percent more

# %% [markdown]
# ## The claim
#
# The overview of efficient fine-tuning that this course began with prints this table:
#
# | model | parameters | weights (fp16) | "optimizer states" | total |
# |---|---|---|---|---|
# | LLaMA-7B | 7B | 14 GB | 42 GB | 56 GB |
# | LLaMA-13B | 13B | 26 GB | 78 GB | 104 GB |
# | LLaMA-70B | 70B | 140 GB | 420 GB | 560 GB |
#
# Before you read on, look for the rule behind it. Divide the "optimizer states" by the number of parameters: how many bytes per
# parameter is that, and what could they be?

# %%
claimed = {"LLaMA-7B": (7e9, 14e9, 42e9), "LLaMA-13B": (13e9, 26e9, 78e9), "Llama-2-70B": (70e9, 140e9, 420e9)}
for name, (parameters, weights, states) in claimed.items():
    print(f"{name:<12} weights: {weights / parameters:g} bytes a parameter, states: {states / parameters:g}")

# %% [markdown]
# Two bytes for a weight in 16 bits are clear. Six for "optimizer states" are not: Adam keeps two numbers a parameter, which are
# four bytes in fp16. Keep that in mind; you will find the other two.

# %% [markdown]
# ## 1. Count  ·  2 points, about 15 minutes, ●○○
#
# "7B" is a name. The number follows from six sizes in the model's configuration:

# %%
for name in ("SmolLM2-135M", "LLaMA-7B", "Llama-2-70B"):
    config = PRESETS[name]
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    print(f"{name:<13} vocab, hidden, intermediate, layers {sizes}, heads {heads}, tied {config.tie_word_embeddings}")

# %% [markdown]
# With $h$ for `hidden_size`, $i$ for `intermediate_size` and $k$ for the width of the keys, `num_key_value_heads * head_dim`:
#
# | where | tensor | numbers |
# |---|---|---|
# | once | `embed_tokens` | vocab × $h$ |
# | every layer | `q_proj`, `o_proj` | $h$ × $h$ each |
# | every layer | `k_proj`, `v_proj` | $h$ × $k$ each |
# | every layer | `gate_proj`, `up_proj`, `down_proj` | $h$ × $i$ each |
# | every layer | `input_layernorm`, `post_attention_layernorm` | $h$ each |
# | once | `norm` | $h$ |
# | once, unless it is tied to the embedding | `lm_head` | vocab × $h$ |
#
# Linear layers of a LLaMA have no biases, and RoPE learns nothing. `config.head_dim` is there for you to use.
#
# <details><summary>The count is wrong where num_key_value_heads is smaller than num_attention_heads</summary>
#
# Llama-2-70B has 64 query heads and 8 key-value heads: its `k_proj` is an eighth as wide as its `q_proj`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "count-parameters", "locked": false, "schema_version": 3, "solution": true, "task": false}
def count_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of a LLaMA of this size, as a whole number."""
    ### BEGIN SOLUTION
    h, i = config.hidden_size, config.intermediate_size
    k = config.num_key_value_heads * config.head_dim
    layer = 2 * h * h + 2 * h * k + 3 * h * i + 2 * h
    matrices = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + h + matrices * config.vocab_size * h
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-count-parameters", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_count_parameters(count_parameters)

# %% [markdown]
# A model on the device `meta` has shapes and no numbers, so that even the largest can be built and asked:

# %%
for name in ("LLaMA-7B", "LLaMA-13B", "LLaMA-65B", "Llama-2-70B"):
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Llama(PRESETS[name]).parameters())
    counted = count_parameters(PRESETS[name])
    print(f"{name:<12} counted {counted:>14,}   built {built:>14,}")

# %% [markdown]
# *What to see.* There is no LLaMA-70B: the first generation ends at 65B. Llama-2-70B has as many layers; it is larger because
# its MLP is wider, although its keys and values are narrower. The table's "70B" is a round 70 × 10⁹, 1.5% more than Llama-2-70B
# has.

# %% [markdown]
# ### In your head
#
# You need no program for a count to ten percent. The MLP of a LLaMA is about $8/3$ as wide as the model, $i \approx 8h/3$. So a
# layer has $4h^2$ numbers in attention and $3h \cdot 8h/3 = 8h^2$ in the MLP, together $12 h^2$, and the layers are nearly the
# whole model. LLaMA-7B has 32 layers with $h = 4096$: $4096^2$ is 16.8 million, times 12 is 201 million, times 32 is 6.4
# billion. It has 6.7.
#
# Predict these four in the same way. LLaMA-13B has 40 layers and $h = 5120$, LLaMA-65B has 80 and $h = 8192$. For the bytes,
# take 16 per parameter for full fine-tuning in mixed precision, and 2 for a frozen weight.

# %%
my_counts = predict("billions of parameters", {"LLaMA-13B": None, "LLaMA-65B": None})
my_bytes = predict("GB", {"LLaMA-13B in mixed precision": None, "LLaMA-65B, frozen in 16 bits": None})

# %%
billions = {name: count_parameters(PRESETS[name]) / 1e9 for name in ("LLaMA-13B", "LLaMA-65B")}
my_counts.compare(billions)
my_bytes.compare(
    {"LLaMA-13B in mixed precision": 16 * billions["LLaMA-13B"], "LLaMA-65B, frozen in 16 bits": 2 * billions["LLaMA-65B"]}
)

# %% [markdown]
# ## 2. Bytes of what stays  ·  3 points, about 20 minutes, ●●○
#
# From one training step to the next, three things stay in memory: the **weights**, their **gradients**, and the **optimizer's
# state**. How many bytes each takes depends on the recipe:
#
# | recipe | a weight | a gradient | Adam's two moments | besides |
# |---|---|---|---|---|
# | `fp16` | 2 | 2 | 2 + 2 | |
# | `8-bit Adam` | 2 | 2 | 1 + 1 | an fp32 scale for every 256 values, for each moment (unit 15) |
# | `bf16, fp32 moments` | 2 | 2 | 4 + 4 | |
# | `mixed precision` | 2 | 2 | 4 + 4 | a master copy of the weights in fp32, part of the optimizer's state |
# | `LoRA` | 2 | 2, of what is trained | 2 + 2, of what is trained | the trained factors are weights, too |
# | `QLoRA` | 4 bits where LoRA adapts, else 2 bytes | as with LoRA | as with LoRA | see below |
#
# The last two are methods of later units. LoRA freezes the model and *adapts* its matrices: beside each it trains two thin
# ones, the **factors**. QLoRA does the same, and stores the matrices that LoRA adapts in blocks of 64 values, 4 bits each. A
# block has one scale, stored in 8 bits; and 256 such scales share one of their own, in fp32 (*double quantization*, unit 09).
# What LoRA does not adapt, embedding, head and norms, stays in 16 bits, and so do the factors.
#
# The function that you write gets three numbers:
#
# | argument | counts | who needs it |
# |---|---|---|
# | `parameters` | the model's numbers, before any method | all recipes |
# | `adapted` | those of them that lie in adapted matrices | QLoRA |
# | `trained` | the numbers in the factors | LoRA and QLoRA |
#
# For 1,000 parameters, 900 of them adapted, and 50 trained, LoRA gives weights of 2,100 bytes, gradients of 100 and an
# optimizer state of 200. Fractions of bytes are fine. Raise a `ValueError` for an unknown recipe and for a negative number.
#
# <details><summary>How many bits a number has QLoRA, then?</summary>
#
# 4 + 8/64 + 32/(64 · 256) = 4.127. Eight bits are a byte.
# </details>


# %% nbgrader={"grade": false, "grade_id": "training-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
def training_bytes(parameters: int, adapted: int, trained: int, recipe: str) -> dict[str, float]:
    """Return the bytes that stay from step to step, under the names "weights", "gradients" and "optimizer state".

    Raises:
        ValueError: if a number is negative, or the recipe is not in the table above.
    """
    ### BEGIN SOLUTION
    if min(parameters, adapted, trained) < 0:
        raise ValueError(f"there is no negative number of parameters: {parameters}, {adapted}, {trained}")
    state = {"fp16": 4, "8-bit Adam": 2 * (1 + 4 / 256), "bf16, fp32 moments": 8, "mixed precision": 12}
    if recipe in state:
        return {"weights": 2 * parameters, "gradients": 2 * parameters, "optimizer state": state[recipe] * parameters}
    if recipe == "LoRA":
        base = 2 * parameters
    elif recipe == "QLoRA":
        base = (4 + 8 / 64 + 32 / (64 * 256)) / 8 * adapted + 2 * (parameters - adapted)
    else:
        raise ValueError(f"unknown recipe {recipe!r}")
    return {"weights": base + 2 * trained, "gradients": 2 * trained, "optimizer state": 4 * trained}
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-training-bytes", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_training_bytes(training_bytes)

# %% [markdown]
# Now the table of the claim can be taken apart. In your function's terms it is the recipe `fp16`:

# %%
for name, (_, weights, states) in claimed.items():
    ours = training_bytes(count_parameters(PRESETS[name]), 0, 0, "fp16")
    total = sum(ours.values())
    print(f"{name:<12}" + "".join(f" {key} {size / GB:6.1f}" for key, size in ours.items()) + f"  total {total / GB:6.1f} GB")
    print(f"{'  claimed':<12} weights {weights / GB:6.1f}, states {states / GB:6.1f}, total {(weights + states) / GB:.1f} GB")

# %% [markdown]
# *What to see.* The totals agree to four percent; the rest is rounding of the names "7B" and "70B". But the table's "optimizer
# states" are gradients *and* moments: 2 + 2 + 2 bytes. And something is missing altogether: a forward pass leaves its mark,
# too. That comes in section 4. First, a question: can one train like this at all?

# %% [markdown]
# ## 3. A recipe that cannot work  ·  2 points, about 15 minutes, ●●○
#
# The table's recipe keeps everything in fp16. Write one step of Adam (Kingma and Ba 2015, algorithm 1) and try. With gradient
# $g$, moments $m$ and $v$, step $t$ (1 in the first), and $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\epsilon = 10^{-8}$:
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 $$
#
# $$ \hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t}, \qquad w \leftarrow w - \eta \, \frac{\hat m}{\sqrt{\hat v} + \epsilon} $$
#
# Compute in the dtype that the tensors have, and leave the given tensors as they are: return new ones.
#
# <details><summary>The check says that in fp16 the weight should be -inf. Is that not a mistake?</summary>
#
# It is what the recipe does; that is the point of this section. If yours stays finite, you compute in a wider dtype somewhere.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adam-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
def adam_step(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight, the first moment (m) and the second (v) after one step, all of the dtype that they had."""
    ### BEGIN SOLUTION
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    corrected = exp_avg / (1 - beta1**step)
    corrected_sq = exp_avg_sq / (1 - beta2**step)
    return weight - learning_rate * corrected / (corrected_sq.sqrt() + eps), exp_avg, exp_avg_sq
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adam-step", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adam_step(adam_step)

# %% [markdown]
# A weight of 0.02, a gradient of 0.001, a learning rate of 0.00002: an ordinary first step of full fine-tuning, in three
# precisions.

# %%
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    one = torch.ones(1, dtype=dtype)
    weight, first, second = adam_step(0.02 * one, 1e-3 * one, 0 * one, 0 * one, step=1, learning_rate=2e-5)
    print(
        f"{dtype!s:<15} v = {second.item():.3g}   weight before {(0.02 * one).item():.6g}, after the step {weight.item():.6g}"
    )
start = torch.tensor([0.02]).bfloat16()
print(f"bf16: {start.item():.6g}, and the next number below it {torch.nextafter(start, 0 * start).item():.6g}")
print("the update subtracted in fp32, stored in bf16 again: changed", not torch.equal((start.float() - 2e-5).bfloat16(), start))

# %% [markdown]
# *What to see.* In **fp16**, $v = 0.001 \cdot g^2 = 10^{-9}$ is below the smallest number there is, so $v = 0$; so is
# $\epsilon$; and the step divides by zero. The weight is gone in the first step. In **bf16**, $v$ survives, but the update is
# smaller than the distance to the next number. It is rounded away. The run goes on, and learns nothing from such steps. The
# last line shows that fp32 moments are no cure: the *weight* has no room for the update.
#
# So nobody uses the table's recipe in fp16. Mixed precision (Micikevicius et al. 2018) keeps an fp32 *master copy* of the
# weights for the small updates, with the moments in fp32. That makes 16 bytes a parameter, not 8. The other recipes below write
# into 16-bit weights, and lose the updates that are too small for them:

# %%
for recipe in ("fp16", "8-bit Adam", "bf16, fp32 moments", "mixed precision"):
    total = sum(training_bytes(count_parameters(PRESETS["LLaMA-7B"]), 0, 0, recipe).values())
    print(f"LLaMA-7B, {recipe:<20} {total / GB:6.1f} GB")

# %% [markdown]
# ## 4. Bytes of what comes and goes  ·  2 points, about 20 minutes, ●●○
#
# Backward needs tensors from forward: a product needs its inputs, a norm its input, a softmax its output. These **activations**
# are kept from forward until backward has used them. They grow with the batch, and no table of weights can show them.
#
# In our LLaMA, in 16 bits with flash attention (`scaled_dot_product_attention`: the scores of all pairs of tokens are computed
# piece by piece, and never kept), this is kept *for every token*, in bytes:
#
# | part of a layer | what is kept | bytes |
# |---|---|---|
# | each of the two norms | its input in fp32, the normed input, its output | (4 + 2 + 2) $h$ |
# | attention | queries and output, keys and values | 2 ($h$ + $h$) + 2 ($k$ + $k$) |
# | | the logarithm of the softmax's denominator, in fp32, one a head | 4 × heads |
# | MLP | gate, silu(gate), up, and their product | 4 × 2 $i$ |
#
# and once, at the end, the last norm, (4 + 2 + 2) $h$, and the loss's logits in fp32, 4 × vocab. With **gradient
# checkpointing** a layer keeps its input alone, 2 $h$, and computes the rest a second time when backward arrives; norm and
# logits at the end remain.
#
# The check compares your estimate with a *measurement*, in two parts. What one more layer keeps must agree to the byte. (Each
# norm also keeps its scale, 4 bytes a token, which is left out here.) What the last norm and the logits keep may differ by 2%:
# RoPE's angles, the labels and the last norm's scale are measured with them, and the last token's logits are not needed.


# %% nbgrader={"grade": false, "grade_id": "activation-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
def activation_bytes(config: LlamaConfig, batch_size: int, sequence_length: int, checkpointing: bool) -> float:
    """Return the bytes that forward keeps for backward, in 16 bits, when everything is trained."""
    ### BEGIN SOLUTION
    h, i, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    k = config.num_key_value_heads * config.head_dim
    norm = (4 + 2 + 2) * h
    layer = 2 * norm + 2 * (2 * h + 2 * k) + 4 * heads + 4 * 2 * i
    if checkpointing:
        layer = 2 * h
    return batch_size * sequence_length * (config.num_hidden_layers * layer + norm + 4 * config.vocab_size)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-activation-bytes", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_activation_bytes(activation_bytes)

# %% [markdown]
# Korthikanti et al. (2022) count in units of $s\,b\,h$: sequence length times batch times hidden size. For a GPT layer in 16
# bits they find $34 + 5 a s / h$, with $a$ heads. Here is one layer of LLaMA-7B at 2,048 tokens, measured: with attention
# written out, which stores its $s \times s$ matrices; with flash attention; and with checkpointing.

# %% tags=["experiment"]
from dataclasses import replace

from torch.nn.attention import SDPBackend, sdpa_kernel


def bytes_of_one_layer(backend: SDPBackend, checkpointing: bool, tokens: int = 2048) -> float:
    """Return what one more layer keeps, in units of s b h."""
    with sdpa_kernel(backend):
        two, three = (
            simulate_training_step(
                replace(PRESETS["LLaMA-7B"], num_hidden_layers=layers), sequence_length=tokens, checkpointing=checkpointing
            ).activations
            for layers in (2, 3)
        )
    return (three - two) / (tokens * PRESETS["LLaMA-7B"].hidden_size)


print(f"a GPT layer by the formula: {34 + 5 * 32 * 2048 / 4096:6.1f} s b h")
print(f"attention written out:      {bytes_of_one_layer(SDPBackend.MATH, False):6.1f} s b h")
print(f"flash attention:            {bytes_of_one_layer(SDPBackend.FLASH_ATTENTION, False):6.1f} s b h")
print(f"checkpointing:              {bytes_of_one_layer(SDPBackend.FLASH_ATTENTION, True):6.1f} s b h")

# %% [markdown]
# The first two lines are close. Is it the same thing that they count? Look at what each kernel keeps, for bf16 queries, keys
# and values of 4 heads, 64 tokens and 16 features:

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel

queries, keys, values = (torch.randn(1, 4, 64, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
for name, backend in {"written out": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}.items():
    kept = {}

    def note(tensor: Tensor, kept: dict = kept) -> Tensor:
        kept[tensor.data_ptr()] = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
        return tensor

    with sdpa_kernel(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    print(f"{name:<12} {', '.join(kept.values())}")

# %% [markdown]
# *What to see.* No, it is a coincidence. PyTorch's written-out attention computes in fp32: it keeps queries, keys and values in
# 4 bytes instead of 2, which is 6 $s\,b\,h$ more, and the $s \times s$ matrix of the softmax in 4 bytes, $4 a s / h = 64$. With
# the 45.5 of the line for flash attention that makes 115.5. In the formula for a GPT the term with $s^2$ is $5 a s / h = 80$: a
# softmax in 2 bytes, a dropout mask in 1 and the output of that dropout in 2.
#
# Flash attention keeps no $s \times s$ matrix. What is left is linear in the number of tokens. Checkpointing leaves 2 of it, a
# layer's input.

# %% [markdown]
# ## 5. Measure: 7B to 70B, without a GPU
#
# No computer here holds 56 GB. But a training step can be run on **fake tensors**: each has a shape and a dtype, and no
# numbers. Every operation runs, the allocator's book-keeping is followed, and nothing is allocated. `simulate_training_step`
# does that for two and three layers and extrapolates linearly to all, which takes a second; `whole_model=True` runs every
# layer.
#
# Does a real GPU need as many bytes? It was tried, with the 4-bit layers of unit 10 on models of the published sizes:

# %%
from peftlab import gpu

for size in ("LLaMA-7B", "LLaMA-13B", "LLaMA-65B"):
    for name, found in gpu.proofs(size).items():
        here, simulated = found["here"]["peak"], found["simulated"]["peak"]
        print(
            f"{size:<10} on an {name:<22} peak measured {here:>14,} bytes, simulated {simulated:>14,}, apart {abs(here - simulated):,}"
        )

# %% [markdown]
# **Predict:** LLaMA-7B with LoRA of rank 16 (its factors are 16 numbers wide) on all linear layers, batch 1, 512 tokens. How
# many GB at the peak, and what part of them is activations?

# %%
my_peak = predict("GB at the peak", None)

# %% tags=["experiment"]
measured = RECIPES["LoRA"].measure(PRESETS["LLaMA-7B"], batch_size=1, sequence_length=512)
my_peak.compare(measured.peak / GB)
print(f"of which {measured.activations / GB:.1f} GB activations")

# %% [markdown]
# Now every model with every recipe, beside your formulas. *Stays* is what you computed in section 2, *peak* the largest moment
# of the whole step. Half a minute on two CPU cores.

# %% tags=["experiment"]
from tqdm.auto import tqdm

models = ("LLaMA-7B", "LLaMA-13B", "LLaMA-65B", "Llama-2-70B")[: settings.rows(2) if settings.short() else 4]
table = []
for name in tqdm(models, desc="measuring"):
    config = PRESETS[name]
    adapted = config.num_hidden_layers * (
        2 * config.hidden_size**2
        + 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
        + 3 * config.hidden_size * config.intermediate_size
    )
    for recipe in RECIPES:
        table.append((name, recipe, adapted, RECIPES[recipe].measure(config)))

# %% tags=["experiment"]
print(f"{'':<32}{'stays, GB':>22}{'':>9}{'peak, GB':>10}")
print(f"{'':<32}{'formula':>11}{'measured':>11}{'apart':>9}")
for name, recipe, adapted, step in table:
    trained = step.gradients // 2 if recipe.endswith("LoRA") else 0
    formula = sum(training_bytes(count_parameters(PRESETS[name]), adapted, trained, recipe).values())
    stays = step.parameters + step.gradients + step.optimizer_state
    print(f"{name:<12}{recipe:<20}{formula / GB:>11.2f}{stays / GB:>11.2f}{stays / formula - 1:>9.2%}{step.peak / GB:>10.1f}")

# %% [markdown]
# *What to see.* What stays follows the formulas to a hundredth of a percent. So where is the table of the claim loose? (1) Its
# "optimizer states" hold the gradients. (2) It leaves activations out. With 512 tokens that hardly shows in full fine-tuning,
# where they are freed as the gradients come in; in the peaks of LoRA and QLoRA it does, and with long sequences everywhere. (3)
# Its 70B is a round number. (4) Its recipe does not train in fp16, and a recipe with a master copy takes twice as much.
#
# QLoRA's paper says that full fine-tuning of the 65B model takes more than 780 GB, and QLoRA less than 48. The first is what
# stays with bf16 weights and fp32 moments. The second is not in this table, because these steps are measured without
# checkpointing. With checkpointing, and on a real card, it is in the lines at the beginning of this section.

# %% tags=["experiment"]
chosen = {recipe: step for name, recipe, _, step in table if name == "LLaMA-7B"}
figure = plots.memory_bars(
    chosen, "One training step of LLaMA-7B, 512 tokens, by recipe", unit="GB", card=("a GPU of 24 GB", 24 * CARD_GB)
)
plots.show(figure, alt="Six stacked bars; only LoRA's and QLoRA's end left of the line at 24 GB, and QLoRA's is the shortest.")

# %% [markdown]
# *What to see.* LoRA takes away gradients and optimizer state, nothing else: the blue bar of the weights is as long as before.
# QLoRA shortens that one. The green of the activations stays in all six; what shrinks it is checkpointing. The black line is
# the peak, the most that was there at one moment. Where it lies left of a bar's end, the parts were never there in full at the
# same time. (Section 1 of unit 03 draws that, operation by operation.)

# %% [markdown]
# ### The calculator
#
# The same measurement with controls: model, recipe, batch, length, checkpointing, GPU. Without checkpointing, what is the
# longest sequence with which LLaMA-13B trains with QLoRA on 24 GB? With checkpointing? Does LLaMA-65B fit on one GPU of 80 GB,
# and with which recipe?

# %% tags=["experiment"]
from peftlab.calculator import calculator

calculator()

# %% [markdown]
# ## 6. Three families  ·  1 point, about 10 minutes, ●○○
#
# All methods of this course train less than the whole model. They differ in *what*:
#
# - **selective** methods train some of the model's own tensors (layer freezing, BitFit);
# - **additive** methods train new tensors, and the deployed model has new ones: those (adapters, prompt and prefix tuning), or
#   others that were made from them (a prefix that comes out of an MLP);
# - **reparameterization** trains new tensors that are folded into the old ones in the end (LoRA): the deployed model has no new
#   names.

# %%
figure, axes = plt.subplots(figsize=(8, 2.9))
families = {
    "selective": ("#0072B2", ["03 layer freezing", "04 BitFit"]),
    "additive": ("#D55E00", ["05 prompt tuning", "06 prefix tuning", "07 adapters"]),
    "reparameterization": ("#009E73", ["08 LoRA", "10 QLoRA"]),
}
for column, (family, (colour, methods)) in enumerate(families.items()):
    axes.add_patch(plt.Rectangle((column * 3, 0), 2.8, 3, facecolor="white", edgecolor=colour, linewidth=2))
    axes.annotate(family, (column * 3 + 1.4, 2.6), ha="center", va="center", color=colour, fontweight="bold")
    for row, method in enumerate(methods):
        axes.annotate(method, (column * 3 + 1.4, 1.9 - 0.7 * row), ha="center", va="center")
axes.set(xlim=(-0.1, 9), ylim=(-0.1, 3.1), title="Methods by what they change, with their units")
axes.axis("off")
plots.show(figure, alt="Three boxes: selective, additive and reparameterization, with the methods that belong to each.")

# %% [markdown]
# Write the rule down. You get three sets of tensor names: those of the pretrained model, those that are trained, and those of
# the deployed model. Return `"full"`, `"selective"`, `"additive"` or `"reparameterization"`. A method that trains new tensors
# and some old ones belongs where its new ones put it.


# %% nbgrader={"grade": false, "grade_id": "classify", "locked": false, "schema_version": 3, "solution": true, "task": false}
def classify(base: frozenset[str], trained: frozenset[str], deployed: frozenset[str]) -> str:
    """Return the family of a method from the names of tensors; "full" if it trains the whole base and nothing else."""
    ### BEGIN SOLUTION
    if trained <= base:
        return "full" if trained == base else "selective"
    return "reparameterization" if deployed == base else "additive"
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-classify", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_classify(classify)

# %% [markdown]
# ## 7. Bug hunt  ·  1 point, about 10 minutes, ●●○
#
# *After transformers issue 25978 and peft issue 1020.* Someone loads a model of 13 billion parameters in 4 bits, counts, and
# reads that it has 6.7 billion. The code looks innocent:


# %%
def count_trainable_with_a_bug(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters())


# %% [markdown]
# A 4-bit weight is stored as bytes, two numbers in each: a `torch.uint8` tensor of about half as many elements. (The scripts of
# the QLoRA paper knew that the count is off by a factor of two somewhere, and halved the *other* number, the trained one: qlora
# issue 260.)
#
# A packed parameter carries its true shape in an attribute `original_shape`, a `torch.Size`; no other tensor has it. Write
# `count_trainable` so that every number counts once, in a packed tensor too, whose last byte may be half empty.


# %% nbgrader={"grade": false, "grade_id": "count-trainable", "locked": false, "schema_version": 3, "solution": true, "task": false}
def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers of a model are trained, and how many it has, packed ones included."""
    ### BEGIN SOLUTION
    trained = total = 0
    for parameter in model.parameters():
        count = torch.Size(getattr(parameter, "original_shape", parameter.shape)).numel()
        total += count
        if parameter.requires_grad:
            trained += count
    return trained, total
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-count-trainable", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_count_trainable(count_trainable)

# %% [markdown]
# ## 8. In your own words  ·  2 points, marked by hand
#
# Your group wants to adapt LLaMA-13B to medical notes of 4,096 tokens each. There is one GPU of 40 GB. A colleague proposes
# full fine-tuning "in fp16, that is 104 GB, so three such cards would do". (Take it that a model can be spread over cards
# without loss; unit 14 shows how.)
#
# In about 120 words: what is wrong with the number, what is wrong with the recipe, and what would you do with the one card?
# Refer to at least two numbers that you computed or measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "three-cards", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the number and the recipe.* 104 GB are weights, gradients and fp16 moments, without activations, which
# at 4,096 tokens are tens of gigabytes without checkpointing; and pure fp16 Adam loses its weights in the first step (or bf16
# its updates), so that the honest figure is 12 or 16 bytes a parameter, about 156 or 208 GB. *1 point: what to do.* LoRA with
# the weights in 16 bits (26 GB) and gradient checkpointing, or QLoRA, with a figure for what is left for activations. Half
# points for either part without numbers.
#
# **A full answer.** 104 GB is 8 bytes a parameter: weights, gradients and two fp16 moments. It leaves out activations, and the
# recipe does not train: in section 3 the first fp16 step divided by zero and the weight was gone. With fp32 moments it is 156
# GB, mixed precision 208 GB. On one card of 40 GB I would take LoRA: weights 26 GB, gradients and state under 0.4 GB together;
# the calculator shows that 4,096 tokens fit only with checkpointing, or I take QLoRA (7.7 GB stay) and have room for a larger
# batch.
#
# **An answer worth one point.** The 104 GB have no activations in them and fp16 explodes, you need mixed precision with 16
# bytes. I would use LoRA instead.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# Counts that are exact, bytes that agree with measurement, and an eye for what a table leaves out. Unit 02 asks why a change of
# few numbers can be enough.
#
# ## Sources
#
# - Touvron et al. (2023), *LLaMA*, arXiv 2302.13971, table 2: the sizes; Touvron et al. (2023), *Llama 2*, arXiv 2307.09288:
#   grouped-query attention.
# - Rajbhandari et al. (2020), *ZeRO*, arXiv 1910.02054, section 3.1: 16 bytes a parameter in mixed precision.
# - Micikevicius et al. (2018), *Mixed Precision Training*, arXiv 1710.03740: the master copy. Kingma and Ba (2015), *Adam*,
#   arXiv 1412.6980.
# - Dettmers et al. (2022), *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861; Dettmers et al. (2023), *QLoRA*,
#   arXiv 2305.14314, section 3: double quantization, and the 780 GB.
# - Korthikanti et al. (2022), *Reducing Activation Recomputation in Large Transformer Models*, arXiv 2205.05198, section 4.
# - Lialin et al. (2023), *Scaling Down to Scale Up*, arXiv 2303.15647: the families.
# - [transformers issue 25978](https://github.com/huggingface/transformers/issues/25978), [peft issue
#   1020](https://github.com/huggingface/peft/issues/1020), [qlora issue 260](https://github.com/artidoro/qlora/issues/260).
