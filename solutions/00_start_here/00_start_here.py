# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Start here: the small LLaMA on your desk
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 10 | 1 of 5 | none | Python, and a little PyTorch |
#
# Every unit of this course changes a language model with as little as it can. This one only looks at the model: it is a LLaMA,
# the architecture of most open models, in about 200 lines, and small enough to train on a laptop.
#
# **When you have finished, you know**
#
# 1. that your computer has all that the course needs;
# 2. what is in a LLaMA layer, and under which names;
# 3. that our model is the real one: the same numbers as the Hugging Face library's, on pretrained weights.
#
# Run each cell with Shift+Enter, from top to bottom.

# %% [markdown]
# ## Is everything there?
#
# If the next cell says `No module named ...`, this notebook runs on another Python than the one with the course: choose the
# kernel of `.venv`, at the top right.

# %%
from importlib.metadata import version

import torch

from peftlab import plots, pretrained
from peftlab.training import find_device

for package in ("torch", "transformers", "peft", "datasets"):
    print(f"{package:<14}{version(package)}")
print(f"{'device':<14}{find_device()}, {torch.get_num_threads()} threads")

# %% [markdown]
# The model is SmolLM2-135M-Instruct. It comes as a package with its weights in 4 bits; the first load turns these into ordinary
# fp32 numbers, in about 15 seconds, and keeps the result. If there is no copy to be had, the error says which command gets one.

# %%
model, tokenizer = pretrained.load_smollm2()
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

# %% [markdown]
# ## Ask it something
#
# A language model continues text. An *instruct* model has been trained on conversations, in a fixed format, which the tokenizer
# knows. `generate` takes the likeliest next token, again and again.

# %%
from peftlab.llama import generate

question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
answer = generate(model, prompt, max_new_tokens=24, stop_token=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True))

# %% [markdown]
# ## What is inside
#
# Tokens become vectors (`embed_tokens`), pass through 30 layers, are normed once more and turned into one score, a *logit*, for
# every token of the vocabulary (`lm_head`). Here is a layer:

# %%
print(model.model.layers[0])

# %% [markdown]
# - **Attention** (`self_attn`) lets a token look at earlier ones. Each token makes a query; queries meet keys, and where they
#   agree, values are fetched: `q_proj`, `k_proj`, `v_proj`; `o_proj` mixes the heads. There are 9 query heads and only 3 of
#   keys and values, which is why `k_proj` and `v_proj` are smaller: *grouped-query attention*.
# - **The MLP** works on each token by itself: $\text{down}(\text{silu}(\text{gate}(x)) \odot \text{up}(x))$.
# - **RMSNorm** before each of the two keeps the numbers in range.
#
# Positions enter through RoPE: queries and keys are *rotated* by an angle that grows with the position, so that their product
# depends on how far apart two tokens are. All of it is in `peftlab/llama.py`, which is meant to be read.
#
# Where are the parameters? Guess first: attention, MLP or embeddings?

# %%
groups = {"embeddings": "embed_tokens", "attention": "self_attn", "MLP": "mlp", "norms": "norm"}
counts = {
    group: sum(parameter.numel() for name, parameter in model.named_parameters() if key in name)
    for group, key in groups.items()
}
for group, count in counts.items():
    print(f"{group:<12}{count:>13,}  {count / sum(counts.values()):7.2%}")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 1.8))
left = 0.0
for (group, count), colour in zip(counts.items(), plots.SERIES):
    axes.barh(0, count / 1e6, left=left, color=colour, label=f"{group}, {count / 1e6:.2f}")
    left += count / 1e6
axes.set(title="Parameters of SmolLM2-135M", xlabel="millions", yticks=[])
axes.legend(ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.45))
plots.show(
    figure, alt="One bar in four parts: the MLPs hold more than half of the parameters, embeddings and attention a fifth each."
)

# %% [markdown]
# *What to see.* The MLPs hold more than half. The head has no share of its own: it is *tied*, the very same tensor as the
# embedding, which saves a small model a fifth of its size (and causes trouble in unit 08).

# %%
print(model.lm_head.weight is model.model.embed_tokens.weight)

# %% [markdown]
# ## Is it the real thing?
#
# Our module and parameter names are Hugging Face's, so its `LlamaForCausalLM` takes our weights as they are. If the two models
# then give the same logits, what you learn on ours holds for the library's.

# %%
from dataclasses import asdict

from transformers import LlamaConfig, LlamaForCausalLM

theirs = LlamaForCausalLM(LlamaConfig(**asdict(model.config))).eval()
theirs.load_state_dict(model.state_dict())

text = tokenizer("Parameter-efficient fine-tuning changes a model a little.", return_tensors="pt")["input_ids"]
with torch.no_grad():
    ours, library = model(text), theirs(text).logits
apart = (ours - library).abs().max().item()
print(f"largest logit {library.abs().max():.1f}, largest difference {apart:.1e}")

# %% [markdown]
# A difference of a dozen units in the last place is rounding: the two add up the same numbers in another order. How much may it
# be? A tolerance should follow from the arithmetic and not from a feeling. Here is a rough estimate, not a bound: in each of
# the 30 layers a number goes through some 32 operations one after the other (norms, products, softmax, sums), each of which
# rounds it by at most eps of its size. Inside, the stream grows far beyond the logits, but its last norm divides that out
# again; so take eps of the largest logit:

# %%
tolerance = 30 * 32 * torch.finfo(torch.float32).eps * library.abs().max().item()
print(f"{apart:.1e} is at most {tolerance:.1e}: {apart <= tolerance}")
assert apart <= tolerance

# %% [markdown]
# ## How the units work
#
# In the units that follow there are cells with `raise NotImplementedError()`, where you write code, and below each a cell that
# *checks* it: on new random numbers every time, within a second or so, with a message that names the likely mistake. A check
# that fails costs nothing; run it as often as you like. Dots say how hard an exercise is, from ●○○ to ●●●. Experiments take
# minutes on a CPU; the text before them says how many. To see first that everything runs, set the environment variable
# `PEFTLAB_SHORT=1` before you start JupyterLab: experiments then take two steps. What a unit measures when it trains a model is
# kept in a folder `results` beside its notebook.
#
# Before a unit measures something, it asks you for a guess. `predict` takes it down, and a later cell compares. How many tokens
# are in the sentence above, "Parameter-efficient fine-tuning changes a model a little."?

# %%
from peftlab.progress import predict, show

my_tokens = predict("tokens of the sentence above", None)  # your number in the place of None

# %%
my_tokens.compare(text.shape[1])

# %% [markdown]
# Checks and guesses are kept, on your machine only. So you can see what has passed, and how near your guesses come:

# %%
show()

# %% [markdown]
# The functions that you write have shapes in their signatures. `Float[Tensor, "blocks size"]` is a tensor of floating-point
# numbers with two axes, which we call `blocks` and `size`; the same name twice means the same length, a number a fixed length,
# `...` any axes, and `""` none: a single number. `UInt8[Tensor, "n"]` holds bytes. Nothing enforces it; it is there to be read.
#
# ## Do I need a GPU?
#
# No. Every check takes about a second on a CPU, and experiments say how many minutes they take on two cores. On a GPU the same
# cells run as they are, and the training is quicker. These were measured there, in seconds, with the model's scoring before and
# after:

# %%
from peftlab import gpu

for name, found in gpu.proofs("notebooks").items():
    print(f"{name}, with {found['at once']} notebooks running at once on {found['cores']} cores:")
    for unit, experiments in found["experiments"].items():
        print(f"  {unit:<18}" + ", ".join(f"{experiment} {seconds:.0f} s" for experiment, seconds in experiments.items()))
    largest = max((row for unit in found["experiments"] for row in gpu.rows(unit)), key=lambda row: row.memory.peak)
    print(f"the largest peak of a training step: {largest.memory.peak / 1e9:.1f} GB, {largest.method} in unit {largest.unit}")

# %% [markdown]
# So a card of 4 GB has room for these experiments, and the T4 of a free Colab with its 16 GB has more than enough. Only unit
# 10's optional section with a larger model takes more.
#
# Go on with the next unit.
