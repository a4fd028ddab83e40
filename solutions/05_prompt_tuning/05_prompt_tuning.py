# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Prompt tuning: train the words, not the model
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 100, and 5 of experiments on two CPU cores | 3 of 5 | 14 | 00_start_here; some PyTorch |
#
# Everybody has tried to get more out of a language model by a better prompt. Lester et al. (2021) let gradient descent look for
# it. A prompt is a row of vectors before the model sees it, so they train these vectors, a few thousand numbers, and leave the
# model alone.
#
# **When you have finished, you can**
#
# 1. put a trained prompt in front of any text, padded or not, and prove that it gives what peft's gives;
# 2. serve several tasks in one batch from one frozen model, each from a file of some tens of kilobytes;
# 3. say what prompt tuning saves and what it costs, and find out why one does not learn.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autograder.checks.prompt_tuning import (
    check_diagnose,
    check_mixed_prompts,
    check_prompt_files,
    check_prompted_forward,
    check_prompted_loss,
    check_prompted_memory,
    check_starts,
)
from peftlab import plots
from peftlab.llama import IGNORE, PRESETS, Llama, LlamaModel, causal_loss
from peftlab.progress import predict

UNIT = "05_prompt_tuning"

# %% [markdown]
# ## The idea
#
# The first thing that a language model does is look up a vector for every token, $E(x)$. All layers above see vectors only. So
# the embeddings of a text can be taken apart from the rest, and our LLaMA has a method for each of the two steps:

# %%
torch.manual_seed(0)
tiny = Llama(PRESETS["tiny"]).eval()
input_ids = torch.randint(0, 256, (1, 7))
embeddings = tiny.model.embed_tokens(input_ids)  # (1, 7, 64)
hidden = tiny.model.run_layers(embeddings)
print("the same as for the ids themselves:", torch.equal(hidden, tiny.model(input_ids)))

# %% [markdown]
# `run_layers` does not ask where the vectors come from. A prompt in words stands in front of the text as embeddings of its
# tokens. Prompt tuning puts a matrix $P$ there instead and trains it. Its rows do not have to be the embedding of any token:
#
# $$ h = \mathrm{layers}\big([\,P;\, E(x)\,]\big), \qquad P \in \mathbb{R}^{p \times d}, \quad E(x) \in \mathbb{R}^{n \times d} $$
#
# This is a **soft prompt** of $p$ vectors. One line of code for the equation, and the definition that your model has to agree
# with:

# %%
soft_prompt = torch.randn(4, 64)  # p = 4, d = 64
hidden = tiny.model.run_layers(torch.cat([soft_prompt[None], embeddings], dim=1))
print("4 + 7 positions:", list(hidden.shape))

# %% [markdown]
# That would be all, were it not for the padding in a batch. Here is a batch of three rows with a soft prompt of four vectors.
# The number in each box is its position, by which RoPE turns queries and keys; grey boxes are padding, which the attention mask
# hides.

# %%
prompt_colour, text_colour, padding_colour = "#D55E00", "#56B4E9", "#DDDDDD"
figure, axes = plt.subplots(figsize=(7.5, 2.6))
for row, (name, left, right) in enumerate((("no padding", 0, 0), ("padded on the right", 0, 3), ("padded on the left", 3, 0))):
    position = 0
    for place in range(11):
        is_padding = 4 <= place < 4 + left or place >= 11 - right
        colour = padding_colour if is_padding else prompt_colour if place < 4 else text_colour
        axes.add_patch(plt.Rectangle((place, -row), 0.92, 0.8, color=colour))
        if not is_padding:
            axes.annotate(position, (place + 0.46, 0.4 - row), ha="center", va="center", fontsize=11)
            position += 1
    axes.annotate(name, (-0.3, 0.4 - row), ha="right", va="center")
axes.set(xlim=(-4.6, 11.2), ylim=(-2.3, 1.1), title="Positions of a soft prompt (orange) and a text (blue)")
axes.axis("off")
plots.show(
    figure,
    alt="Three rows of eleven boxes. Four orange ones, the prompt, come first. Where padding lies between prompt and text, the "
    "positions of the text go on from the prompt's as if it were not there.",
)

# %% [markdown]
# *What to see.* In the third row padding lies between prompt and text. The positions go on across it without a gap, so that the
# row gives what it gives alone. (peft leaves the gap in; section 9 shows what that does.)
#
# ### Predict, then count: how many numbers are trained?
#
# SmolLM2-135M has 134,515,008 parameters and a hidden size of 576; LLaMA-7B has 6,738,415,616 and 4,096. Papers and tables give
# "less than 0.01%" for prompt tuning. Is that so with 16 vectors, in both models? With 100, the number that Lester et al. use?

# %%
my_shares = predict(
    "percent of the parameters that is trained",
    {"SmolLM2-135M, 16": None, "SmolLM2-135M, 100": None, "LLaMA-7B, 16": None, "LLaMA-7B, 100": None},
)

# %% [markdown]
# ## 1. The model with its prompt  ·  4 points, about 25 minutes, ●●●
#
# `PromptedModel` takes the place of a `LlamaModel`, which it keeps as `base`. It returns hidden states for the **text's**
# positions only; those of the prompt are cut off. So `model.model = PromptedModel(model.model, start)` is all that it takes,
# and losses, scores and generation work as before: they never see the prompt. In particular
#
# - the base is frozen, and `soft_prompt` is an `nn.Parameter` that starts as a *copy* of `start`, in its dtype. In `forward` it
#   takes on the dtype of the embeddings: people train a prompt in fp32 on a model in bf16;
# - `attention_mask` speaks of the text alone, 1 for a token and 0 for padding on either side. `run_layers` wants one for prompt
#   and text. It may be None, for no padding or padding on the right;
# - with a mask, tell `run_layers` the positions, each row its own: whole numbers, in the shape of the mask that `run_layers`
#   gets.
#
# From your base you need two things: `embed_tokens(input_ids)` and `run_layers(x, attention_mask, positions)`.
#
# <details><summary>RuntimeError: Sizes of tensors must match except in dimension 1</summary>
#
# The embeddings are `(batch, seq, hidden)` and the prompt is `(prompt, hidden)`. `prompt.expand(batch, -1, -1)` shows the one
# prompt to every row, without copying it.
# </details>
# <details><summary>The size of the mask does not fit</summary>
#
# There are `prompt + seq` positions. Put ones in front: `attention_mask.new_ones(batch, prompt)` has the mask's dtype and
# device.
# </details>
# <details><summary>The check says that padding counts as distance</summary>
#
# Number the ones of the extended mask along each row. `mask.cumsum(dim=1)` counts them; it begins at 1, subtract 1 to begin
# at 0. What padding gets does not matter.
# </details>
# <details><summary>The check says that soft_prompt gets no gradient</summary>
#
# `.data`, `.detach()` and `torch.no_grad()` cut the gradient. In `forward`, use `self.soft_prompt` as it is.
# </details>
# <details><summary>The check says that soft_prompt is `start` itself</summary>
#
# `nn.Parameter(start)` shares the memory of `start`. `start.clone()` does not.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prompted-model", "locked": false, "schema_version": 3, "solution": true, "task": false}
class PromptedModel(nn.Module):
    """A frozen model that reads a trained prompt before every text (Lester et al. 2021, section 2).

    Attributes:
        base: the model, the very object that was given.
        soft_prompt: parameter of shape (prompt, hidden), a copy of `start` at first.
    """

    def __init__(self, base: LlamaModel, start: Float[Tensor, "prompt hidden"]):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.soft_prompt = nn.Parameter(start.detach().clone())
        ### END SOLUTION

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the hidden states of the text, each row read after the prompt.

        Args:
            attention_mask: 1 for a token, 0 for padding on either side; None for no padding or padding on the right.
        """
        ### BEGIN SOLUTION
        text = self.base.embed_tokens(input_ids)
        batch, length = text.shape[0], self.soft_prompt.shape[0]
        x = torch.cat([self.soft_prompt.to(text.dtype).expand(batch, -1, -1), text], dim=1)
        if attention_mask is None:
            return self.base.run_layers(x)[:, length:]
        mask = torch.cat([attention_mask.new_ones(batch, length), attention_mask], dim=1)
        return self.base.run_layers(x, mask, mask.cumsum(dim=1) - 1)[:, length:]
        ### END SOLUTION


# %% [markdown]
# The first check compares hidden states and the prompt's gradient with those of a spec that goes row by row, without padding
# and with it. *3 points.*

# %% nbgrader={"grade": true, "grade_id": "check-prompted-forward", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_prompted_forward(PromptedModel)

# %% [markdown]
# The second *measures*: it takes a training step and counts the bytes of every gradient, of the optimizer's state, and of all
# that forward keeps for backward. *1 point.*

# %% nbgrader={"grade": true, "grade_id": "check-prompted-memory", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prompted_memory(PromptedModel)

# %% [markdown]
# Now the count. `with_prompt` freezes the *whole* model first: the head lies outside of `model.model`, and where it is not tied
# to the embedding, as in LLaMA-7B, it would go on training. On the device "meta" tensors have shapes and no numbers, so a 7B
# costs nothing.


# %%
def with_prompt(model: Llama, start: Float[Tensor, "prompt hidden"]) -> Llama:
    """Put a soft prompt before a model in which nothing else is trained, with your `PromptedModel`."""
    model.requires_grad_(False)
    model.model = PromptedModel(model.model, start)
    return model


shares = {}
print(f"{'':<14}{'vectors':>8}{'trained':>10}{'of the model':>14}")
for name in ("SmolLM2-135M", "LLaMA-7B"):
    for length in (16, 100):
        with torch.device("meta"):
            on_paper = Llama(PRESETS[name])
            total = sum(parameter.numel() for parameter in on_paper.parameters())
            with_prompt(on_paper, torch.empty(length, PRESETS[name].hidden_size))
        trained = sum(parameter.numel() for parameter in on_paper.parameters() if parameter.requires_grad)
        shares[f"{name}, {length}"] = 100 * trained / total
        print(f"{name:<14}{length:>8}{trained:>10,}{trained / total:>14.5%}")
my_shares.compare(shares)

# %% [markdown]
# *What to see.* A soft prompt has $p\,d$ numbers; a model has about $d^2$ for every matrix in every layer. So the share falls
# as models grow. The table's "less than 0.01%" holds for a 7B even with 100 vectors, and for our small model with 16, not
# with 100.

# %% [markdown]
# ## 2. Where to start  ·  2 points, about 15 minutes, ●○○
#
# Three ways to start, simplest first. All return a tensor of shape `(length, hidden)` that shares no memory with the embedding
# and asks for no gradient, those from the embedding in its dtype:
#
# - `random_start`: standard normal numbers, as in peft (Lester et al. draw uniformly from $[-0.5, 0.5]$);
# - `vocabulary_start`: the embeddings of `length` *different* tokens, drawn from the whole vocabulary (Lester et al. draw from
#   the 5,000 most common);
# - `text_start`: the embeddings of a text's tokens, say of an instruction, as in peft (Lester et al. take the names of the
#   classes). A longer text is cut at its end, a shorter one begins again:
#
# $$ P_i = E(t_{\,i \bmod n}), \qquad i = 0, \dots, p - 1 $$
#
# for a text of $n$ tokens $t$.
#
# <details><summary>The check says that a token is drawn twice</summary>
#
# `torch.randint` puts every token back. `torch.randperm(n)` is all of them in a random order: take as many as you need.
# </details>
# <details><summary>The check says that a start hangs on the embedding</summary>
#
# `embedding(ids)` remembers where it comes from, for backward. `.detach()` forgets.
# </details>


# %% nbgrader={"grade": false, "grade_id": "starts", "locked": false, "schema_version": 3, "solution": true, "task": false}
def random_start(length: int, hidden: int) -> Float[Tensor, "length hidden"]:
    """Return a soft prompt of standard normal numbers, in fp32."""
    ### BEGIN SOLUTION
    return torch.randn(length, hidden)
    ### END SOLUTION


def vocabulary_start(embedding: nn.Embedding, length: int) -> Float[Tensor, "length hidden"]:
    """Return copies of the embeddings of `length` different tokens, drawn from the whole vocabulary."""
    ### BEGIN SOLUTION
    tokens = torch.randperm(embedding.num_embeddings)[:length]
    return embedding.weight[tokens].detach()
    ### END SOLUTION


def text_start(embedding: nn.Embedding, token_ids: Sequence[int], length: int) -> Float[Tensor, "length hidden"]:
    """Return copies of the embeddings of a text's first `length` tokens; if it is shorter, it begins again."""
    ### BEGIN SOLUTION
    repeated = [token_ids[place % len(token_ids)] for place in range(length)]
    return embedding.weight[repeated].detach()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-starts", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_starts(random_start, vocabulary_start, text_start)

# %% [markdown]
# A soft prompt that starts from a text *is* that text, until the first step. This can be proved, as any injection should be:
# the hidden states of what follows are those that the text in front, as tokens, would give.

# %%
instruction, text = torch.randint(0, 256, (1, 5)), torch.randint(0, 256, (2, 9))
as_tokens = tiny.model(torch.cat([instruction.expand(2, -1), text], dim=1))[:, 5:]
prompted = PromptedModel(tiny.model, text_start(tiny.model.embed_tokens, instruction[0].tolist(), 5))
print("largest difference:", (prompted(text) - as_tokens).abs().max().item())

# %% [markdown]
# ### How large is a word?
#
# Which of the three is a likely prompt? Look at sizes first. This loads SmolLM2: about 15 seconds the first time, a second
# later on.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

device = find_device()
model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
INSTRUCTION = tokenizer.encode("Decide whether the review of this movie is good or bad.")

# %% tags=["experiment"]
torch.manual_seed(0)
embedding = model.model.embed_tokens
STARTS = {
    "random": random_start(16, 576),
    "vocabulary": vocabulary_start(embedding, 16),
    "text": text_start(embedding, INSTRUCTION, 16),
}
for name, start in STARTS.items():
    print(f"{name:<11} root mean square of its numbers: {start.pow(2).mean().sqrt():.3f}")
sizes = embedding.weight.detach().pow(2).mean(1).sqrt()
print(f"{'one token':<11} {sizes.mean():.3f} on average, {sizes.max():.3f} at most")

# %% [markdown]
# *What to see.* A random start is three times as large as the largest token: the model has never seen such vectors. What does
# each start do to the untrained model? The next cell asks for its opinion on 96 reviews. Predict the order of the four losses.
# A fifth start is there to find out whether *size* is what hurts: the random one, made as small as words.

# %%
# A list of "no prompt", "random", "vocabulary" and "text":
my_order = predict("the starts by loss, the lowest first", None)

# %% tags=["experiment"]
few = reviews.test.select(range(settings.examples(96)))
bare, untrained = model.model, {"no prompt": (tasks.mean_loss(model, few), reviews.score(model, few))}
for name, start in {**STARTS, "random, small": 0.136 * STARTS["random"]}.items():
    model.model = PromptedModel(bare, start)
    untrained[name] = tasks.mean_loss(model, few), reviews.score(model, few)
model.model = bare
for name, (loss, score) in untrained.items():
    print(f"{name:<14} loss {loss:.2f} nats, {score:.0%} right, before any training")
asked = ("no prompt", "random", "vocabulary", "text")
my_order.compare(sorted(asked, key=lambda name: untrained[name][0]))

# %% [markdown]
# *What to see.* The instruction takes away more than two nats. The others change the loss by less than half a nat, the random
# one too, whose vectors the model has never seen. And size hardly matters: the small random start is not far from the large
# one. The first thing that a layer does is to norm its input, so queries, keys and values do not see how long a vector is.
#
# ## 3. Measured: what is saved, what is not
#
# What will a training step hold, compared with LoRA (unit 08: two thin trained matrices beside each frozen one), which trains
# over 250 times as many numbers here but adds no position? Write down, for each kind of bytes, whether prompt tuning needs
# "less" than LoRA, "as much" (to ten percent) or "more".

# %%
my_verdicts = predict(
    "a soft prompt's bytes beside LoRA's: less, as much or more",
    {"parameters": None, "gradients": None, "optimizer_state": None, "activations": None},
)

# %% tags=["experiment"]
from peftlab.memory import measure_training_step, step_table
from peftlab.simulate import with_factors  # LoRA's tensors; unit 08 builds them

input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))
METHODS = {
    "full fine-tuning": lambda model: None,
    "LoRA, rank 8": lambda model: with_factors(model, rank=8),
    "prompt, 16 vectors": lambda model: with_prompt(model, STARTS["text"]),
}
measured = {}
for method, prepare in METHODS.items():
    model, _ = load_smollm2()
    prepare(model)
    model.to(device)
    measured[method] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

# %% tags=["experiment"]
print(step_table(measured, digits=2))
print("\nthe prompt's bytes, beside LoRA's:")
verdicts = {}
for kind in ("parameters", "gradients", "optimizer_state", "activations"):
    ratio = getattr(measured["prompt, 16 vectors"], kind) / getattr(measured["LoRA, rank 8"], kind)
    verdicts[kind] = "less" if ratio < 0.9 else "more" if ratio > 1.1 else "as much"
    print(f"{kind:<16} {ratio:.3f} times as many")
for name, positions in (("LoRA, rank 8", input_ids.shape[1]), ("prompt, 16 vectors", 16 + input_ids.shape[1])):
    kept = measured[name].activations / 4 / input_ids.shape[0] / positions / 30
    print(f"{name:<19}{positions} positions a row; forward leaves {kept:,.0f} numbers for each position and layer")
my_verdicts.compare(verdicts)

# %% tags=["experiment"]
plots.show(
    plots.memory_bars(measured, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"),
    alt="Stacked bars: LoRA and the prompt have no visible gradients or optimizer state. Both have large activations.",
)

# %% [markdown]
# *What to see.* Gradients and optimizer state of a soft prompt are a tenth of a mebibyte. But its gradient has to come down
# through every layer to the very first position of the sequence. So each layer keeps what it needs for that, as with LoRA, and
# there are more positions: over half as many again. Then why are activations not half as many again? The last two lines say it.
# A LoRA layer also keeps the inputs of its trained factors. A prompt trains nothing inside a layer, and each position costs
# less.
#
# The longer sequence stays for ever after: unlike a LoRA, a prompt cannot be merged away. Every request reads it, and it takes
# its place in the context window.

# %% [markdown]
# ## 4. The loss over prompt and text  ·  1 point, about 10 minutes, ●●○
#
# `PromptedModel` hides the prompt's positions. Most libraries don't: peft's model returns logits for *all* positions, prompt
# and text, and code that computes a loss or a score from them must know it. (Pull request 533 to EleutherAI's evaluation
# harness is about logits that were taken from where the text would be without a prompt.) Write the loss for such logits. Given
#
# - `logits`, `(batch, prompt + seq, vocab)`, and `labels`, `(batch, seq)`, of the text only, with `IGNORE` (-100) where a
#   position has no label,
#
# return the mean of $-\log p(\text{label})$ over all labels, computed in fp32, where the logits at each position predict the
# *next* one.
#
# A question to answer on the way: without a prompt the first token of a text cannot be learned, for nothing predicts it. And
# with one?
#
# <details><summary>The check says that the first token is not counted</summary>
#
# The last position of the prompt predicts it.
# </details>
# <details><summary>The check says that the labels are shifted once too often</summary>
#
# Extend the labels by `IGNORE` in front, as many as the prompt has vectors. Now logits and labels have the same length, and
# everything is as usual: `logits[:, :-1]` predict `labels[:, 1:]`.
# </details>
# <details><summary>Cross-entropy complains about shapes</summary>
#
# `nn.functional.cross_entropy` wants the classes in the second dimension. Flatten batch and sequence into one: `(positions,
# vocab)` and `(positions,)`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prompted-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
def prompted_loss(logits: Float[Tensor, "batch prompt_and_seq vocab"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats per label, of logits that cover a prompt and the text after it."""
    ### BEGIN SOLUTION
    batch, length = labels.shape[0], logits.shape[1] - labels.shape[1]
    extended = torch.cat([labels.new_full((batch, length), IGNORE), labels], dim=1)
    predicting, predicted = logits[:, :-1].float().flatten(0, 1), extended[:, 1:].flatten()
    return nn.functional.cross_entropy(predicting, predicted, ignore_index=IGNORE)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prompted-loss", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prompted_loss(prompted_loss)

# %% [markdown]
# Cutting the prompt off and using the ordinary loss is the same, unless the first token has a label:

# %%
start = random_start(4, 64)
prompted = Llama(PRESETS["tiny"])
prompted.model = PromptedModel(tiny.model, start)
ids = torch.randint(0, 256, (2, 9))
all_positions = tiny.model.run_layers(torch.cat([start.expand(2, -1, -1), tiny.model.embed_tokens(ids)], dim=1))
for unlabelled in (1, 0):
    labels = ids.clone()
    labels[:, :unlabelled] = IGNORE
    cut, whole = causal_loss(prompted, ids, labels), prompted_loss(prompted.lm_head(all_positions), labels)
    print(f"first token {'without' if unlabelled else 'with'} a label: cut off {cut:.6f}, over all positions {whole:.6f}")

# %% [markdown]
# ## 5. One batch, several tasks  ·  2 points, about 20 minutes, ●●●
#
# A thousand customers, each with a task of their own, and one GPU. With full fine-tuning that is a thousand models; with LoRA a
# thousand adapters, which must not be merged if rows of one batch are to use different ones. With prompts nothing special is
# needed: the task is in the *input*. Each row simply reads another prompt.
#
# `MixedPrompts` holds several prompts, **of different lengths**, and one frozen base. Row $i$ of a batch is read with prompt
# `task_ids[i]`, and must give exactly what it would give alone. Yet the base runs *once*, over all rows together. Rows of a
# batch have equal length, so the shorter prompts must be padded, and the padding hidden. As in section 1, a prompt keeps its
# dtype, and takes on that of the embeddings in `forward`.
#
# <details><summary>How do I register a list of parameters?</summary>
#
# `nn.ParameterList([nn.Parameter(...), ...])`. A plain list is invisible to `parameters()`.
# </details>
# <details><summary>Where do I put a prompt's padding?</summary>
#
# In front or behind, as you like, if the mask says where it is and the positions skip it: `nn.functional.pad(prompt, (0, 0,
# missing, 0))` adds `missing` rows of zeros in front. Stack the padded prompts, `(tasks, longest, hidden)`, and index them by
# `task_ids`; the same with their masks.
# </details>
# <details><summary>The shape of the hidden states is wrong</summary>
#
# What is cut off is the longest prompt's length, padding included, in every row.
# </details>


# %% nbgrader={"grade": false, "grade_id": "mixed-prompts", "locked": false, "schema_version": 3, "solution": true, "task": false}
class MixedPrompts(nn.Module):
    """One frozen model and the prompts of several tasks; every row of a batch is read with its own task's.

    Attributes:
        base: the model, the very object that was given.
        soft_prompts: an `nn.ParameterList` of the prompts, each a copy of what was given, in the same order.
    """

    def __init__(self, base: LlamaModel, prompts: Sequence[Float[Tensor, "_ hidden"]]):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.soft_prompts = nn.ParameterList([nn.Parameter(prompt.detach().clone()) for prompt in prompts])
        ### END SOLUTION

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        task_ids: Int[Tensor, "batch"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the hidden states of the text, row i read after prompt `task_ids[i]`; the base runs once.

        Args:
            attention_mask: 1 for a token, 0 for padding on either side; None for no padding or padding on the right.
        """
        ### BEGIN SOLUTION
        longest = max(len(prompt) for prompt in self.soft_prompts)
        padded, used = [], []
        for prompt in self.soft_prompts:
            missing = longest - len(prompt)
            padded.append(nn.functional.pad(prompt, (0, 0, missing, 0)))
            used.append([0] * missing + [1] * len(prompt))
        text = self.base.embed_tokens(input_ids)
        x = torch.cat([torch.stack(padded)[task_ids].to(text.dtype), text], dim=1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = torch.cat([torch.tensor(used, device=x.device)[task_ids], attention_mask], dim=1)
        return self.base.run_layers(x, mask, mask.cumsum(dim=1) - 1)[:, longest:]
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-mixed-prompts", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_mixed_prompts(MixedPrompts)

# %% [markdown]
# ## 6. The prompt's file  ·  1 point, about 10 minutes, ●○○
#
# What was learned is the prompt. `save_prompt` writes it to a [safetensors](https://huggingface.co/docs/safetensors) file under
# the name `soft_prompt`, and nothing else. `load_prompt` copies it into the model's own parameter, in place, because an
# optimizer may hold that very tensor: the parameter keeps its memory and its dtype, whatever the file's dtype is. If the file
# holds anything else than one `soft_prompt` of the same shape, it raises a `ValueError` before it changes anything.
#
# <details><summary>The check says that a prompt of one vector is taken for a whole one</summary>
#
# `copy_` broadcasts: it fills sixteen rows from a file of one, without a word. Compare the shapes yourself.
# </details>
# <details><summary>An error about a leaf Variable</summary>
#
# Autograd watches you. Copy inside `with torch.no_grad():`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prompt-files", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save_prompt(prompted: PromptedModel, path: str | Path) -> None:
    """Write `prompted.soft_prompt`, and nothing else, to a safetensors file, under the name `soft_prompt`."""
    from safetensors.torch import save_file

    ### BEGIN SOLUTION
    save_file({"soft_prompt": prompted.soft_prompt.detach()}, path)
    ### END SOLUTION


def load_prompt(prompted: PromptedModel, path: str | Path) -> None:
    """Copy the prompt of a file into `prompted.soft_prompt`, in place.

    Raises:
        ValueError: if the file holds anything else than one `soft_prompt` of this shape; the model is then as it was.
    """
    from safetensors.torch import load_file

    ### BEGIN SOLUTION
    saved = load_file(path)
    if list(saved) != ["soft_prompt"] or saved["soft_prompt"].shape != prompted.soft_prompt.shape:
        raise ValueError(f"{path} does not hold one soft_prompt of shape {list(prompted.soft_prompt.shape)}, and that alone")
    with torch.no_grad():
        prompted.soft_prompt.copy_(saved["soft_prompt"])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prompt-files", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prompt_files(save_prompt, load_prompt)

# %% [markdown]
# ## 7. Bug hunt: metrics that never move  ·  2 points, about 20 minutes, ●●○
#
# *After peft issue 2642.* Someone runs the library's own example of prompt tuning and gets the same line after every epoch:
# accuracy 0.6838, F1 0.8122. The logits do change. The two numbers belong together:

# %%
accuracy = 0.6838235294117647  # as in the issue
print(f"F1 of one who says yes to everything and is right in {accuracy:.2%} of cases: {2 * accuracy / (1 + accuracy):.4f}")

# %% [markdown]
# So the model says yes to everything, before and after: whatever moved, it never was enough to change one answer. Nothing
# crashes in such a run, and as long as anything at all is trained (there, a classifier on top), the loss goes down a little. We
# don't know what was wrong in that one; but here are three in which the prompt does not learn either. Each has a fault of its
# own. Read them, and write down what you would change before you run the next cell.

# %%
my_faults = {"a": "", "b": "", "c": ""}


# %%
def run_a(learning_rate: float = 0.03):
    model = Llama(PRESETS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.model = PromptedModel(model.model, vocabulary_start(model.model.embed_tokens, 8))
    return model, optimizer


def run_b(learning_rate: float = 0.03):
    model = Llama(PRESETS["tiny"])
    model.model = PromptedModel(model.model, vocabulary_start(model.model.embed_tokens, 8))
    model.model.requires_grad_(False)  # nothing in the base is to be trained
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=learning_rate)
    return model, optimizer


def run_c(learning_rate: float = 1e-4):
    model = with_prompt(Llama(PRESETS["tiny"]), random_start(8, 64))
    optimizer = torch.optim.AdamW([model.model.soft_prompt], lr=learning_rate)
    return model, optimizer


# %%
batch = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
for name, run in {"a": run_a, "b": run_b, "c": run_c}.items():
    torch.manual_seed(0)
    model, optimizer = run()
    before, losses = model.model.soft_prompt.detach().clone(), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(causal_loss(model, batch, batch))
        losses[-1].backward()
        optimizer.step()
    moved = (model.model.soft_prompt - before).norm() / before.norm()
    print(f"run {name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, the prompt moved by {moved:.2%} of its length")

# %% [markdown]
# In two of the runs the loss falls nicely, and the prompt has not moved at all. What *is* trained there? Your `diagnose` will
# tell the two apart.
#
# In the third the prompt moves, and by next to nothing. AdamW divides by the gradient's size. So *whatever the gradient*, if it
# is well above AdamW's `eps` of 1e-8, it moves each number by about the learning rate in a step:

# %%
for size in (1e-6, 1.0, 1e3):
    number = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([number], lr=0.03)
    number.grad = torch.full((1,), size)
    optimizer.step()
    print(f"gradient {size:>6g}: moved by {number.item():.4f}")

# %% [markdown]
# All steps together can move a number by about `learning_rate * steps`, and no further. If that is little beside the size of
# the numbers themselves, the prompt stays where it started. Full fine-tuning is content with far less: in section 8 its 40
# steps at 3e-5 can move a weight by 0.0012, and it learns. The numbers of a prompt are words (0.13, above), or larger.
#
# Write `diagnose`, which says what is wrong *before* a night has been spent. It returns the first of these that applies:
#
# 1. `"no gradient"`: after `loss().backward()` the prompt's gradient is None, or all zeros (a small one counts as one, as you
#    have just seen);
# 2. `"not in the optimizer"`: no group of `optimizer.param_groups` holds the prompt, this very tensor;
# 3. `"too slow"`: the learning rate of its group, times `steps`, is less than a tenth of the root mean square of the prompt's
#    numbers;
# 4. `"learns"`.
#
# It takes no optimizer step, leaves no gradient of its own behind, and is not deceived by one that was there before, which it
# may clear.
#
# <details><summary>RuntimeError: element 0 of tensors does not require grad</summary>
#
# Nothing that the loss depends on is trainable. Then there is no gradient either: look at the loss's `requires_grad` before you
# call `backward`.
# </details>
# <details><summary>RuntimeError: Boolean value of Tensor with more than one value is ambiguous</summary>
#
# `prompt in group["params"]` compares with `==`, which for tensors goes number by number. Use `any(p is prompt for p in ...)`.
# </details>
# <details><summary>The check says that a gradient is left behind</summary>
#
# Other parameters get gradients too. `prompted.zero_grad()` and `optimizer.zero_grad()` between them clear all that matter.
# </details>


# %% nbgrader={"grade": false, "grade_id": "diagnose", "locked": false, "schema_version": 3, "solution": true, "task": false}
def diagnose(prompted: PromptedModel, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> str:
    """Say why training would leave `prompted.soft_prompt` where it is, or that it learns.

    Args:
        loss: runs the forward pass and returns the scalar to differentiate.
        steps: how many the training will take.

    Returns:
        "no gradient", "not in the optimizer", "too slow" or "learns".
    """
    ### BEGIN SOLUTION
    prompt = prompted.soft_prompt
    prompted.zero_grad()
    value = loss()
    if value.requires_grad:
        value.backward()
    has_gradient = prompt.grad is not None and prompt.grad.any()
    prompted.zero_grad()
    optimizer.zero_grad()
    if not has_gradient:
        return "no gradient"
    rates = [group["lr"] for group in optimizer.param_groups if any(held is prompt for held in group["params"])]
    if not rates:
        return "not in the optimizer"
    size = prompt.detach().pow(2).mean().sqrt().item()
    return "too slow" if rates[0] * steps < 0.1 * size else "learns"
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-diagnose", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_diagnose(diagnose)

# %%
for name, run in {"a": run_a, "b": run_b, "c": run_c, "c, learning rate 0.1": lambda: run_c(0.1)}.items():
    torch.manual_seed(0)
    model, optimizer = run()
    found = diagnose(model.model, optimizer, lambda: causal_loss(model, batch, batch), steps=40)
    print(f"run {name}: {found}; you wrote: {my_faults.get(name) or '-'}")

# %% [markdown]
# *What to see.* In run a the optimizer was made before the prompt was there. In run b `requires_grad_(False)` froze the prompt
# along with the base. What both train is the head, which lies outside of `model.model`; `with_prompt` freezes it first.
#
# And run c? Its learning rate is one for full fine-tuning. The rate decides a great deal here. peft has a benchmark:
# Llama-3.2-3B on school mathematics, 200 random vectors, 5,000 steps, AdamW. There prompt tuning solves 5% of the problems with
# the benchmark's default learning rate, 1e-4, and 25% with 1e-3; from sampled vocabulary, with 1e-3, 39%. Lester et al. use
# 0.3, with Adafactor.

# %% [markdown]
# ## 8. On a real model
#
# Which learning rate, and which start? These rows come with the course: the three starts on film reviews, and the one from text
# on a second task as well (`tool_calls` asks for a tool call in JSON, which the untrained model never gets right).
#
# Each rate was run with one seed. What counts is the *late loss*, the mean training loss of the last ten steps. No row of the
# data comes twice in a run, so this is a loss on unseen rows, and the test split is not used. The best rate got two more seeds.
# If their mean then lost to another rate's single run, that rate got two more as well. Of the rates with three seeds, the one
# with the lowest mean is chosen.

# %%
from peftlab import comparison

COMPARED = {
    "prompt, text": ("prompt_tuning", ""),
    "prompt, vocabulary": ("prompt_tuning", "vocabulary"),
    "prompt, random": ("prompt_tuning", "random"),
    "LoRA, rank 8": ("lora", ""),
    "full": ("full", ""),
}
shipped = plots.show_comparison(COMPARED, "prompt_tuning")
prompts = {key: rows for key, rows in shipped.items() if rows[0].method == "prompt_tuning"}

# %% [markdown]
# An untrained prompt changes what the model says; LoRA and full fine-tuning begin from the model as it is. So scores and losses
# differ before training (over all seeds):

# %%
for (task, name), rows in shipped.items():
    if name != "full":
        scores, losses = ([row.score_before for row in rows], [row.losses[0] for row in rows])
        label = "no prompt" if (task, name) not in prompts else name
        print(
            f"{task:<15}{label:<20} before training: {min(scores):.1%} to {max(scores):.1%}, "
            f"loss of the first batch {min(losses):.2f} to {max(losses):.2f}"
        )

# %% [markdown]
# What the start does to learning is plainest in the losses themselves, each at its own best rate:

# %%
for task in comparison.TASKS:
    curves = {name: comparison.summary(rows).row.losses for name, rows in comparison.on_task(prompts, task).items()}
    if len(curves) > 1:
        plots.show(
            plots.loss_curves(curves, f"Training loss by start, on {task}"),
            alt=f"Training loss on {task} over the steps, a curve for each start.",
        )

# %% [markdown]
# *What to see.* Where does each curve *begin*? The instruction in words leaves the model better than it was, in score and in
# loss. With words drawn at random, or with random numbers, the score is higher or lower than without a prompt, as luck has it.
# The loss of the same batch starts 1.8 to 2.9 nats above the instruction's, about where it is without any prompt.
#
# Where does it *end*? Half of the forty steps go into getting rid of that. Then the drawn words have caught up with the
# instruction, in the mean of three seeds, loss and score alike. Random numbers have not quite: three points less, and seven
# between their seeds. Three seeds on one task are a hint, no more.
#
# And the column of forgetting, above? On reviews only the prompt that began as a sensible instruction leaves the newspaper
# sentences alone. On tool calls it does not: +0.51.
#
# How far are they from LoRA? Three points on the task that asks for one word. On the one that asks for a format, one answer in
# five is right after sixty steps, where LoRA has nineteen in twenty. Sixty steps are few. Lester et al. train for 30,000, and
# in two of our three runs the loss was still falling. These rows do not say where it would end.
#
# Lester et al. find that the start matters a great deal in small models, class labels doing best and random numbers worst, and
# that prompt tuning falls short of training the whole model. Both differences shrink as models grow, and at 11 billion
# parameters they are gone: that is their title, *The Power of Scale*. SmolLM2 has about an eightieth of that.

# %% [markdown]
# ### Your own prompt
#
# Train one on the film reviews, at the rate that the rows above choose (or at 0.1, without them). `fine_tune` scores the model,
# trains it, scores it again and writes a results row. About a minute and a half on two CPU cores, ten seconds on an H200.

# %% tags=["experiment"]
from peftlab.training import fine_tune

known = shipped.get(("movie_reviews", "prompt, text"))
learning_rate = comparison.chosen_rate(known) if known else 0.1
model, tokenizer = load_smollm2()
with_prompt(model, text_start(model.model.embed_tokens, INSTRUCTION, 16))
row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="prompt_tuning", save=lambda path: save_prompt(model.model, path),
    steps=40, learning_rate=learning_rate, tokens=16,
)  # fmt: skip
save_prompt(model.model, "reviews.safetensors")

# %% tags=["experiment"]
print(
    f"{row.score_before:.1%} -> {row.score_after:.1%} of {settings.examples(len(reviews.test))} reviews, "
    f"{row.trainable_parameters:,} numbers trained, "
    f"{row.adapter_bytes / 1e3:.1f} kB file, {row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
)
plots.show(
    plots.loss_curves({"prompt, 16 vectors": row.losses}, "Training loss on movie_reviews"),
    alt="One loss curve over forty steps.",
)
plots.show(
    plots.before_after([row], "SmolLM2-135M with a soft prompt, before and after training"),
    alt="Two bars: the score with the untrained prompt, and with the trained one.",
)

# %% [markdown]
# *What to see.* With 480 test reviews, one standard error is about 1.4 points. *Forgetting* is by how much the loss on
# newspaper sentences has risen, in nats per token, with the prompt in front. But take the prompt away, and the model is what it
# was, to the last bit:

# %% tags=["experiment"]
untouched, _ = load_smollm2()
after = model.model.base.state_dict()
changed = [name for name, tensor in untouched.model.state_dict().items() if not torch.equal(after[name].cpu(), tensor)]
print(f"{len(after)} tensors of the base, changed: {changed or 'none'}")

# %% [markdown]
# ### What does it say?
#
# The rows of the prompt are no words, but each has nearest ones. Below, for each trained vector: the word that it started from,
# how far it has gone (against the length of that word's vector), and the two tokens that now point most nearly its way.

# %% tags=["experiment"]
words = nn.functional.normalize(model.model.base.embed_tokens.weight, dim=-1)
prompt, first = model.model.soft_prompt.detach(), STARTS["text"].to(device)
similar = nn.functional.normalize(prompt, dim=-1) @ words.T  # (16, 49152) cosines
for place, best in enumerate(similar.topk(2).indices.tolist()):
    moved = (prompt[place] - first[place]).norm() / first[place].norm()
    started = tokenizer.decode([INSTRUCTION[place % len(INSTRUCTION)]])
    print(
        f"{started!r:<11} moved by {moved:>5.0%}, now nearest to {', '.join(repr(tokenizer.decode([token])) for token in best)}"
    )

# %% [markdown]
# *What to see.* Lester et al. looked too: the class labels that a prompt starts from tend to stay the nearest tokens, and
# beyond that they could not read their prompts. Is yours an instruction that you could have written?
#
# ### Two prompts, one batch
#
# Your `MixedPrompts` at work: four reviews, each twice, once after the trained prompt and once after an instruction that asks
# for the contrary. The base reads all eight rows at once.

# %% tags=["experiment"]
contrary = tokenizer.encode("Say bad if the movie is good, and good if it is bad.")
embedding = model.model.base.embed_tokens
mixed = MixedPrompts(model.model.base, [model.model.soft_prompt, text_start(embedding, contrary, len(contrary))]).to(device)
examples = [example for example in reviews.test.select(range(4)) for _ in range(2)]
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(examples))
task_ids = torch.tensor([0, 1] * 4, device=device)
print(f"prompts of {[len(prompt) for prompt in mixed.soft_prompts]} vectors, {len(examples)} rows, one batch")

# %% tags=["experiment"]
choices = [tokenizer.encode(word)[0] for word in (" good", " bad")]
with torch.no_grad():
    hidden = mixed(input_ids, task_ids)[:, :-1][labels[:, 1:] != IGNORE]  # where the answer is predicted, in each row
    chances = model.lm_head(hidden)[:, choices].softmax(-1)[:, 0].tolist()
for example, task, chance in zip(examples, task_ids.tolist(), chances):
    review = example["prompt"].splitlines()[0].removeprefix("Review: ")
    print(f"{('trained', 'contrary')[task]:<9} P(good) = {chance:.2f}, in truth{example['answer']:<6} {review[:60]!r}")

# %% [markdown]
# Does the contrary instruction turn the answers round? Here are both instructions, as words and untrained, on 48 reviews:

# %% tags=["experiment"]
trained, several = model.model, reviews.test.select(range(settings.examples(48)))
for name, ids in (("sensible", INSTRUCTION), ("contrary", contrary)):
    model.model = PromptedModel(trained.base, text_start(embedding, ids, len(ids)))
    print(f"{name} instruction: {reviews.score(model, several):.0%} right")
model.model = trained

# %% [markdown]
# *What to see.* It does not: with it 83% of the 48 are right, with the sensible one 77%. What a prompt does to this model is
# not what its words say. Keep that in mind when you read a trained one.
#
# ## 9. The same thing in peft
#
# Is what you built *prompt tuning*, or something like it? Compare it with the library. Below, a small LLaMA exists twice with
# the same weights: as `transformers` model with peft's prompt, and as our `Llama` with yours, which starts as a copy of peft's.
# First a batch that is padded on the right: logits, loss, the prompt's gradient, and the prompt after one AdamW step. Only
# rounding may differ.

# %% tags=["experiment"]
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
ours = Llama(PRESETS["tiny"])
ours.load_state_dict(theirs.state_dict())
theirs = get_peft_model(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
their_prompt = theirs.prompt_encoder["default"].embedding.weight
_ = with_prompt(ours, their_prompt)

# %% tags=["experiment"]
ids = torch.randint(0, 256, (4, 14))
mask = (torch.arange(14) < torch.tensor([14, 11, 9, 6])[:, None]).long()
labels = torch.where(mask.bool(), ids, IGNORE)
labels[:, 0] = IGNORE  # or peft would count it, as your prompted_loss does

their_output = theirs(input_ids=ids, attention_mask=mask, labels=labels)
their_loss, their_logits = their_output.loss, their_output.logits
our_logits, our_loss = ours(ids, mask), causal_loss(ours, ids, labels, mask)
print(f"peft's logits {list(their_logits.shape)}, ours {list(our_logits.shape)}")

# %% tags=["experiment"]
steps = {}
for name, prompt, loss in (("peft", their_prompt, their_loss), ("ours", ours.model.soft_prompt, our_loss)):
    optimizer = torch.optim.AdamW([prompt], lr=0.1, eps=1e-5)  # the sign of a gradient near zero is rounding: keep it small
    loss.backward()
    optimizer.step()
    steps[name] = (loss.detach(), prompt.grad, prompt.detach())

text = mask.bool()
pairs = {"logits of the text": (their_logits[:, 8:][text], our_logits[text])}
pairs |= dict(zip(("loss", "gradient of the prompt", "prompt after a step"), zip(steps["peft"], steps["ours"])))
for name, (their, our) in pairs.items():
    apart = ((their - our).abs().max() / their.abs().max()).item()
    print(f"{name:<24} largest difference, relative to the largest entry: {apart:.1e}")
    assert apart <= 1e-5, f"{name}: yours and peft's have parted ways, run the checks above again"

# %% [markdown]
# The bound: some hundred roundings of 6e-8 each lie on the way through two layers and back, and two right answers differ by at
# most the sum, 1e-5. Your `prompted_loss` takes peft's logits as they come:

# %% tags=["experiment"]
print(f"peft's loss {their_loss:.6f}, yours from peft's logits {prompted_loss(their_logits, labels):.6f}")

# %% [markdown]
# And now padding on the left, on which libraries and people have disagreed since peft issue 54 (see also 1093, and pull request
# 1212). One row, alone and with five tokens of padding before it. Does padding change what the model says?

# %% tags=["experiment"]
row = ids[:1, :9]
padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], dim=1)
mask = (torch.arange(14) >= 5).long()[None]
with torch.no_grad():
    shifts = {
        "ours": (ours(padded, mask)[:, 5:] - ours(row)).abs().max(),
        "peft": (theirs(padded, attention_mask=mask).logits[:, 13:] - theirs(row).logits[:, 8:]).abs().max(),
    }
largest = ours(row).abs().max()
for name, shift in shifts.items():
    print(f"{name}: padding shifts a logit by up to {shift / largest:.1e} of the largest logit")

# %% [markdown]
# *What to see.* In peft's forward the padding stays between prompt and text and counts as distance, so a row says something
# else in another batch; in yours it does not. A prompt that is trained and used with the same padding may get used to it. Pad
# on the right for training, and you are safe in both.

# %% [markdown]
# ## 10. In your own words  ·  2 points, marked by hand
#
# A colleague serves 300 customers from one 7B model, each with a classification task of their own, on texts of about 50 tokens.
# He has read that prompt tuning trains "under 0.01% of the parameters" and expects it to need a fraction of LoRA's memory. So
# he trains prompts of 100 random vectors, with the learning rate of 1e-4 and the 60 steps that worked for his LoRA. Memory is
# *higher* than LoRA's, and no customer's accuracy moves.
#
# In about 120 words: where does the memory go? Why does nothing move, and what would you change? For his 300 customers, what
# speaks for prompts, and what against? Refer to at least one number that you measured in section 3 or printed in section 2.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: memory and cost.* Few trained numbers save gradients and optimizer state only, which LoRA saves too;
# activations grow with the number of positions, 150 instead of 50, in training and at every request. A measured figure is
# quoted, with its unit. *1 point: learning, and advice.* AdamW moves a number by about the learning rate a step, 60 × 1e-4 =
# 0.006 in all, beside random numbers of size 1 (or words of 0.14): raise the rate by some hundred times, start from text or
# vocabulary, take fewer vectors. For prompts: one frozen model, mixed batches, files of kilobytes. Against: longer sequences
# for ever, below LoRA in small models. Half points for either part without a reason or without a number.
#
# **A full answer.** Gradients and optimizer state are gone, but with LoRA they were gone already: the prompt's are 0.1 MiB in
# my table, and nobody misses the rest. Activations count positions, and 100 vectors make his texts three times as long; in my
# measurement 16 vectors on 26 tokens already needed more than LoRA did. Nothing moves because 60 steps of 1e-4 can shift a
# number by 0.006, and his random numbers have size 1. I would start from a text (0.11 in my cell), use 16 vectors and a
# learning rate of about 0.1, and sweep it. For 300 customers prompts are convenient: one model, one batch, files of some tens
# of kB. But every request pays for the longer sequence, and I would compare the accuracy with LoRA first.
#
# **An answer worth one point.** The learning rate is too small. AdamW moves each number by about the learning rate, so after 60
# steps it has moved by 0.006 and the prompt is still random. He should use 0.1 and start from words. Prompts are good because
# the model is shared.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A soft prompt that equals peft's to rounding, in a dozen lines, and does better under padding; its memory, measured; several
# tasks in one batch. In the next unit the trained vectors go into every layer, as keys and values, and their positions become a
# question again.
#
# ## Sources
#
# - Lester, Al-Rfou and Constant (2021), *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv 2104.08691: section 2
#   is the method, section 3.2 and figure 3 length and start, section 3 the learning rate, section 7 the nearest words.
# - Li and Liang (2021), *Prefix-Tuning*, arXiv 2101.00190: the method that this one simplifies.
# - peft's [method comparison](https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA): the results files of
#   June and October 2025 for prompt tuning.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
# - peft issues [54](https://github.com/huggingface/peft/issues/54), [1093](https://github.com/huggingface/peft/issues/1093),
#   [2642](https://github.com/huggingface/peft/issues/2642), pull request [1212](https://github.com/huggingface/peft/pull/1212);
#   lm-evaluation-harness pull request [533](https://github.com/EleutherAI/lm-evaluation-harness/pull/533).
