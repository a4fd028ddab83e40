# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Prefix tuning: something more to look at, in every layer
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 7 of experiments on two CPU cores | 4 of 5 | 14 | 00_start_here; 05_prompt_tuning helps |
#
# A language model can be steered by what stands in front of the text. In its layers, that text in front is nothing but keys and
# values which later tokens look at. Prefix tuning (Li and Liang 2021) leaves the text out and learns the keys and values
# themselves, a few in every layer. The model stays as it is.
#
# **When you have finished, you can**
#
# 1. put trainable keys and values into every layer of a LLaMA, with grouped-query attention, RoPE and padding done right;
# 2. say, from your own measurements, what a random start does, what training repairs and what not, and start a prefix so that
#    it learns;
# 3. train a prefix through an MLP and throw the MLP away, and train one with gradient checkpointing, which libraries refuse.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import inspect
import math
from collections.abc import Callable
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from autograder.checks.prefix_tuning import (
    check_prefix_attention,
    check_prefix_cache,
    check_prefix_from_tokens,
    check_prefix_memory,
    check_prefix_model,
    check_reparameterized,
)
from peftlab import comparison, plots
from peftlab.llama import PRESETS, Llama, LlamaAttention, LlamaConfig, LlamaModel, causal_loss, rotary_angles, rotate
from peftlab.progress import predict
from peftlab.training import trainable, twenty_steps


class Prefix(nn.Module):
    """Trainable keys and values for every layer.

    Attributes:
        keys, values: parameters of shape (layers, kv_heads, tokens, head_dim).
    """

    def __init__(
        self,
        keys: Float[Tensor, "layers kv_heads tokens head_dim"],
        values: Float[Tensor, "layers kv_heads tokens head_dim"],
    ):
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def forward(
        self, layer: int
    ) -> tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]]:
        """Return the keys and the values of one layer."""
        return self.keys[layer], self.values[layer]


UNIT = "06_prefix_tuning"

# %% [markdown]
# ## The idea
#
# In each layer a token's query $q$ is compared with the keys of all tokens before it; the softmax of the comparisons says how
# much of each token's value it takes. Prefix tuning puts trainable keys $P_K$ and values $P_V$ in front of the text's:
#
# $$ \operatorname{attention}\left(q,\ [P_K; K],\ [P_V; V]\right) = \operatorname{softmax}\!\left(\tfrac{1}{\sqrt{d}}\, q\, [P_K; K]^\top\right) [P_V; V] $$
#
# No token belongs to them, and nothing computes them. They are parameters, and each layer has its own. The first cell has
# defined `Prefix`, which holds them:

# %%
print(inspect.getsource(Prefix.forward))
config = PRESETS["tiny"]
sizes = (config.num_hidden_layers, config.num_key_value_heads, 4, config.head_dim)
tiny_prefix = Prefix(torch.zeros(sizes), torch.zeros(sizes))
print(
    f"{config.num_attention_heads} query heads share {sizes[1]} key-value heads, so a layer's keys are {tuple(tiny_prefix(0)[0].shape)}"
)

# %% [markdown]
# Which query may look at which key? The text stays causal, and every token sees the whole prefix in front of it.

# %%
tokens, seq = 4, 8
seen = torch.cat([torch.full((seq, tokens), 2), torch.ones(seq, seq).tril()], dim=1)
figure, axes = plt.subplots(figsize=(6.5, 3.9))
axes.imshow(seen, cmap=plt.matplotlib.colors.ListedColormap(["white", plots.SERIES[0], plots.SERIES[1]]))
axes.set_xticks(range(tokens + seq), [f"P{n}" for n in range(tokens)] + [str(n) for n in range(seq)])
axes.set_yticks(range(seq), range(seq))
axes.set(title="Which keys a query sees", xlabel="key: of the prefix (P), or of a text token", ylabel="query of text token")
axes.axvline(tokens - 0.5, color="black", linewidth=1)
plots.show(figure, alt="Left four columns, the prefix, are filled in every row; right of them a triangle, the causal text.")

# %% [markdown]
# *What to see.* The rows are the text's: the prefix has keys and values but no queries. So it costs no pass through any layer,
# where a soft prompt of unit 05 goes through all of them like text. What it costs is these columns.
#
# The formula can be taken apart (He et al. 2022, section 3). Let $\lambda$ be the share of its attention that a query gives to
# the prefix. Then
#
# $$ \operatorname{attention}(q, [P_K; K], [P_V; V]) = \lambda \operatorname{attention}(q, P_K, P_V) + (1 - \lambda) \operatorname{attention}(q, K, V) $$
#
# A prefix adds something, *and takes as much of the rest away*. Remember this when a prefix that has not learned anything yet
# is put into a model.


# %%
def attend(query: Float[Tensor, "d"], keys: Float[Tensor, "n d"], values: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """Attention of one query."""
    return (keys @ query / math.sqrt(len(query))).softmax(0) @ values


torch.manual_seed(0)
q, prefix_k, prefix_v, text_k, text_v = (torch.randn(shape) for shape in (8, (4, 8), (4, 8), (6, 8), (6, 8)))
together = attend(q, torch.cat([prefix_k, text_k]), torch.cat([prefix_v, text_v]))
scores = torch.cat([prefix_k, text_k]) @ q / math.sqrt(8)
share = scores.softmax(0)[:4].sum()
apart = share * attend(q, prefix_k, prefix_v) + (1 - share) * attend(q, text_k, text_v)
print(f"the prefix's share is {share:.0%}; largest difference of the two sides: {(together - apart).abs().max():.1e}")

# %% [markdown]
# ## 1. Attention with a prefix  ·  5 points, about 25 minutes, ●●●
#
# For one head and without a batch, here is the definition, one query at a time. Your attention has to agree with it. Note what
# is *not* in it: the prefix's keys are not rotated. Why is below.


# %%
def prefix_attention_by_definition(
    queries: Float[Tensor, "seq head_dim"],
    keys: Float[Tensor, "seq head_dim"],
    values: Float[Tensor, "seq head_dim"],
    prefix_keys: Float[Tensor, "tokens head_dim"],
    prefix_values: Float[Tensor, "tokens head_dim"],
) -> Float[Tensor, "seq head_dim"]:
    """Causal attention of a text whose queries and keys are rotated already, with a prefix that all of it sees."""
    mixed = []
    for position, query in enumerate(queries):
        seen = position + 1  # the text up to this token, and this token
        mixed.append(attend(query, torch.cat([prefix_keys, keys[:seen]]), torch.cat([prefix_values, values[:seen]])))
    return torch.stack(mixed)


# %% [markdown]
# `PrefixAttention` takes the place of a layer's `self_attn` and is called as that is, with `x`, RoPE's `cos` and `sin`, and the
# mask or `None`. Begin with a look at `LlamaAttention.forward` in `peftlab/llama.py`; it is ten lines. Yours
#
# 1. projects `x` with the layer's own `q_proj`, `k_proj` and `v_proj`, splits the results into heads, and rotates queries and
#    keys;
# 2. asks `self.prefix(self.layer)` for keys and values, *in every call* (training changes them; exercise 4's computes them),
#    expands them to the batch, brings them to `x`'s dtype, and puts them in front of the text's. All tensors that you make are
#    on `x`'s device;
# 3. extends the mask: `mask` is True where a query (row) may look at a key of the *text* (column), shaped (batch, 1, seq, seq)
#    or (1, 1, seq, seq), and `None` stands for the plain causal one. All of the prefix may be looked at, also by padding;
# 4. attends with `F.scaled_dot_product_attention(..., attn_mask=..., enable_gqa=True)`, which lets query heads share key-value
#    heads without copying these, puts the heads side by side again, and applies `o_proj`.
#
# <details><summary>RuntimeError: Tensors must have same number of dimensions, or sizes must match except in dimension 2</summary>
#
# The prefix is `(kv_heads, tokens, head_dim)`, the text's keys are `(batch, kv_heads, seq, head_dim)`. `part.expand(batch, -1,
# -1, -1)` puts a batch dimension in front and copies nothing.
# </details>
# <details><summary>RuntimeError in `rotate`: the sizes of tensors must match</summary>
#
# There are angles for the text's tokens only. Rotate the text's keys first, then put the prefix in front.
# </details>
# <details><summary>The check says that the first query sees one key</summary>
#
# `is_causal=True` draws its triangle from the top left corner: query 0 sees key 0, query 1 sees keys 0 and 1. With a prefix in
# front, query 0 must see `tokens + 1` keys. (PyTorch's documentation shows the mask that it makes.) Build the mask yourself:
# `torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril()`, and columns of True in front of it.
# </details>
# <details><summary>The memory check says that forward saves too much</summary>
#
# A softmax written by hand leaves all probabilities for backward, (batch, heads, seq, keys) numbers a layer;
# `scaled_dot_product_attention` computes them again. `repeat_interleave` makes copies of the keys for every query head. And a
# mask that is True or False for all heads alike need not be there once for each. In bf16, a tensor that is raised to fp32 takes
# twice the bytes: bring the prefix down to `x`'s dtype, not the text up to the prefix's.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prefix-attention", "locked": false, "schema_version": 3, "solution": true, "task": false}
class PrefixAttention(nn.Module):
    """A layer's attention whose queries also look at that layer's part of a prefix (Li and Liang 2021, section 4.1).

    Attributes:
        attention: the layer's own attention, the very object that was given.
        prefix: returns keys and values, each (kv_heads, tokens, head_dim), when called with a layer's number.
        layer: the number of this layer.
    """

    def __init__(self, attention: LlamaAttention, prefix: nn.Module, layer: int):
        super().__init__()
        self.attention, self.prefix, self.layer = attention, prefix, layer

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "*#batch seq head_dim"],
        sin: Float[Tensor, "*#batch seq head_dim"],
        mask: Bool[Tensor, "#batch 1 seq seq"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return what the attention makes of `x` when there are the prefix's keys and values to look at, too."""
        ### BEGIN SOLUTION
        batch, seq, _ = x.shape
        queries, keys, values = (
            projection(x).view(batch, seq, -1, self.attention.head_dim).transpose(1, 2)
            for projection in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        )
        prefix_keys, prefix_values = (part.to(x.dtype).expand(batch, -1, -1, -1) for part in self.prefix(self.layer))
        if mask is None:
            mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=x.device).tril()
        mixed = F.scaled_dot_product_attention(
            rotate(queries, cos, sin),
            torch.cat([prefix_keys, rotate(keys, cos, sin)], dim=2),
            torch.cat([prefix_values, values], dim=2),
            attn_mask=F.pad(mask, (prefix_keys.shape[2], 0), value=True),
            enable_gqa=True,
        )
        return self.attention.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))
        ### END SOLUTION


# %% [markdown]
# The first check compares your output and its gradients with the spec's: in fp32, with and without padding, then in bf16 with
# padding and a prefix in fp32. *3 points.*

# %% nbgrader={"grade": true, "grade_id": "check-prefix-attention", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_prefix_attention(PrefixAttention)

# %% [markdown]
# The second *measures*. It puts your attention into two layers, takes a training step, and counts the bytes of every gradient,
# of the optimizer's state and of all that forward keeps for backward. Then it takes the step with gradient checkpointing, which
# runs each layer's forward again in backward: the prefix's gradient must be the same. All this in fp32, and in bf16 with a
# prefix in fp32. *2 points.*

# %% nbgrader={"grade": true, "grade_id": "check-prefix-memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_prefix_memory(PrefixAttention)

# %% [markdown]
# Against the definition, with one head. The projections are the identity, so that queries, keys and values are the text itself.

# %%
torch.manual_seed(0)
one_head = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
attention = LlamaAttention(one_head)
for parameter in attention.parameters():
    nn.init.eye_(parameter)
prefix, text = Prefix(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)), torch.randn(6, 8)
cos, sin = rotary_angles(torch.arange(3, 9), 8, one_head.rope_theta)
turned = rotate(text, cos, sin)
slow = prefix_attention_by_definition(turned, turned, text, prefix.keys[0, 0], prefix.values[0, 0])
fast = PrefixAttention(attention, prefix, 0)(text[None], cos, sin, None)[0]
print(f"largest difference from the definition: {(fast - slow).abs().max():.1e}")

# %% [markdown]
# ### Why the prefix is not rotated
#
# RoPE turns a query at position $m$ by $m$ times an angle, and a key at position $n$ by $n$ times the same angle, so that their
# product depends on $m - n$. A prefix's key has no token and no position. One could give it position $j$ and rotate it by $R_j$
# in every forward pass. But it is a free parameter: whatever key $k$ the training would like to have, $R_j^{-1} k$ is a
# parameter that becomes $k$. Rotation would only change the names of the same keys.

# %%
torch.manual_seed(0)
free = torch.randn(2, 5, 16)  # two heads, five tokens
cos, sin = rotary_angles(torch.arange(5), 16, 10_000.0)
turned_back = rotate(free, cos, -sin)  # by the opposite angles
print(f"rotated again, largest difference: {(rotate(turned_back, cos, sin) - free).abs().max():.1e}")

# %% [markdown]
# But all must agree. peft hands the prefix to the model as *past* keys and values, which count as rotated already. So the
# text's own positions start behind the prefix, at `tokens`.

# %% [markdown]
# ## 2. Every layer, and where the text starts  ·  2 points, about 15 minutes, ●●○
#
# First a picture of what is wanted: a batch of three rows with a prefix of four tokens. The number in each box is the text's
# position, by which RoPE turns its queries and keys; grey boxes are padding.

# %%
figure, axes = plt.subplots(figsize=(7.5, 2.6))
for row, (name, left, right) in enumerate((("no padding", 0, 0), ("padded on the right", 0, 3), ("padded on the left", 3, 0))):
    for place in range(11):
        is_padding = 4 <= place < 4 + left or place >= 11 - right
        colour = "#DDDDDD" if is_padding else plots.SERIES[1] if place < 4 else plots.SERIES[5]
        axes.add_patch(plt.Rectangle((place, -row), 0.92, 0.8, color=colour))
        label = "" if is_padding else f"P{place}" if place < 4 else place - left
        axes.annotate(label, (place + 0.46, 0.4 - row), ha="center", va="center", fontsize=11)
    axes.annotate(name, (-0.3, 0.4 - row), ha="right", va="center")
axes.set(xlim=(-4.6, 11.2), ylim=(-2.3, 1.1), title="A prefix of four (orange, no position) and a text (blue)")
axes.axis("off")
plots.show(
    figure,
    alt="Three rows of boxes: four of the prefix, P0 to P3, without positions, then a text whose first token has position 4. "
    "Where three boxes of padding lie between the two, the text's first token still has position 4.",
)

# %% [markdown]
# *What to see.* The text's first token has position 4 in every row, as if four tokens had been read before it. In the third row
# the padding takes up no positions. So a row gives the same in every batch.
#
# `PrefixModel` takes the place of `model.model`, the part of our LLaMA between token ids and hidden states. It
#
# 1. freezes the base, and puts `wrap(layer.self_attn, prefix, number)` in the place of each layer's `self_attn`. `wrap` is
#    `PrefixAttention` unless the caller has something else (the check has, so that it does not depend on your exercise 1);
# 2. lets the text's positions start at `tokens`, which it gets from the prefix's own shape;
# 3. with a mask (1 for a token, 0 for padding, on either side) counts *tokens*: the first one that is no padding has position
#    `tokens`;
# 4. calls `self.base.run_layers(embeddings, attention_mask, positions)`, and returns all that this returns. The prefix is no
#    part of the sequence: no mask to extend, no states to cut off, no labels to shift.
#
# <details><summary>How do I count along the mask?</summary>
#
# For one row `[0, 0, 1, 1, 1]` the positions are `[?, ?, tokens, tokens + 1, tokens + 2]`, and those of padding do not matter.
# `cumsum(1)` of the mask is `[0, 0, 1, 2, 3]`.
# </details>
# <details><summary>The check says that a number is read out of a tensor</summary>
#
# `int(...)`, `.item()` and `.tolist()` fetch numbers, and so does an `if` on a tensor: a GPU has to finish all its work before
# Python goes on. What you want to do with the numbers, tensors can do: add and compare these.
# </details>
# <details><summary>The check says that the prefix is frozen</summary>
#
# Once a layer's attention holds the prefix, the prefix is a part of the base, and `base.requires_grad_(False)` freezes it too.
# Mind the order.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prefix-model", "locked": false, "schema_version": 3, "solution": true, "task": false}
class PrefixModel(nn.Module):
    """A frozen `LlamaModel` in whose layers every token also looks at a prefix.

    Attributes:
        base: the model that was given, each layer's `self_attn` replaced.
        prefix: the prefix that was given, the only part that is trained.
    """

    def __init__(
        self,
        base: LlamaModel,
        prefix: nn.Module,
        wrap: Callable[[LlamaAttention, nn.Module, int], nn.Module] | None = None,
    ):
        super().__init__()
        wrap = wrap or PrefixAttention
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.prefix = prefix
        for number, layer in enumerate(base.layers):
            layer.self_attn = wrap(layer.self_attn, prefix, number)
        ### END SOLUTION

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the hidden states of the text, whose positions start at the number of the prefix's tokens."""
        ### BEGIN SOLUTION
        tokens = self.prefix(0)[0].shape[1]
        if attention_mask is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device) + tokens
        else:
            positions = attention_mask.cumsum(1) - 1 + tokens
        return self.base.run_layers(self.base.embed_tokens(input_ids), attention_mask, positions)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prefix-model", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_prefix_model(PrefixModel)

# %% [markdown]
# `PrefixModel` freezes its base. The head lies outside, and in LLaMA-7B it is a tensor of its own. So:


# %%
def with_prefix(model: Llama, prefix: nn.Module) -> Llama:
    """Freeze all of the model, head included, and put a prefix into every layer."""
    model.requires_grad_(False)
    model.model = PrefixModel(model.model, prefix)
    return model


def shape_of_prefix(config: LlamaConfig, tokens: int = 16) -> tuple[int, int, int, int]:
    """Return (layers, kv_heads, tokens, head_dim)."""
    return config.num_hidden_layers, config.num_key_value_heads, tokens, config.head_dim


# %% [markdown]
# ### Predict, then measure: how many numbers?
#
# SmolLM2-135M has 30 layers, 9 query heads that share 3 key-value heads, and heads of 64 features. How many numbers does a
# prefix of 16 tokens have? And what share of the model's 134,515,008 is that?

# %%
my_numbers = predict("a prefix of 16 tokens for SmolLM2", {"numbers": None, "percent of the model": None})

# %%
counted = {}
for preset in ("SmolLM2-135M", "LLaMA-7B"):
    with torch.device("meta"):  # shapes without numbers: nothing is allocated
        shape = shape_of_prefix(PRESETS[preset])
        model = with_prefix(Llama(PRESETS[preset]), Prefix(torch.empty(shape), torch.empty(shape)))
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    total = sum(parameter.numel() for parameter in model.parameters()) - trained
    counted[preset] = trained
    print(f"{preset:<14} {trained:>10,} trained beside {total:>14,} frozen: {trained / total:.3%}")
small = counted["SmolLM2-135M"]
my_numbers.compare({"numbers": small, "percent of the model": 100 * small / 134_515_008})

# %% [markdown]
# *What to see.* Both lie far below the one percent that overviews give for prefix tuning. Li and Liang train 0.1% of their
# model. A prefix grows with layers and key-value heads, the model with the square of its width, so that the share falls as
# models grow, and grouped-query attention makes it smaller still: here, a third. (LLaMA-7B has as many key-value heads as query
# heads.)

# %% [markdown]
# ## 3. Start from real tokens  ·  2 points, about 15 minutes, ●●○
#
# Take a few real tokens, an instruction say, let the model read them, and keep the keys and values that they leave in every
# layer. With that prefix the model must give for any text *exactly* what it gives for the tokens and the text together.
#
# `prefix_from_tokens(model, input_ids)` returns such a `Prefix`. The tokens are ordinary text, the first of all: their
# positions are 0, 1, 2 and so on, each layer's keys and values are made of that layer's *normed input*, and the keys are
# rotated as text is. Walk up the layers yourself: `layer(x, cos, sin, None)` returns the next layer's input.
#
# <details><summary>Which lines of the model do I need?</summary>
#
# `LlamaModel.run_layers` makes `cos` and `sin` from positions; `LlamaDecoderLayer.forward` shows where `input_layernorm` sits;
# `LlamaAttention.forward` shows how a projection's output becomes heads.
# </details>
# <details><summary>The shapes are (tokens, kv_heads, head_dim), or the numbers are all there but in other places</summary>
#
# A projection returns `(1, tokens, kv_heads * head_dim)`. View the last axis as `(kv_heads, head_dim)`, then swap heads and
# tokens. Viewing it as `(kv_heads, tokens, head_dim)` right away has the right shape and the wrong numbers.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prefix-from-tokens", "locked": false, "schema_version": 3, "solution": true, "task": false}
@torch.no_grad()
def prefix_from_tokens(model: Llama, input_ids: Int[Tensor, "1 tokens"]) -> Prefix:
    """Return the keys, rotated, and the values that real tokens leave in every layer of a model without a prefix."""
    ### BEGIN SOLUTION
    config, x = model.config, model.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=x.device)
    cos, sin = (angles.to(x.dtype) for angles in rotary_angles(positions, config.head_dim, config.rope_theta))
    all_keys, all_values = [], []
    for layer in model.model.layers:
        normed = layer.input_layernorm(x)
        keys, values = (
            projection(normed).view(len(positions), -1, config.head_dim).transpose(0, 1)
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        all_keys.append(rotate(keys, cos, sin))
        all_values.append(values)
        x = layer(x, cos, sin, None)
    return Prefix(torch.stack(all_keys), torch.stack(all_values))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prefix-from-tokens", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_prefix_from_tokens(prefix_from_tokens)

# %% [markdown]
# Now compare the two on a tiny model: five tokens in front of two texts, once as text and once as prefix. Both ways do the same
# sums, of up to 160 terms (the MLP's width), in an order that may differ; a sum of $n$ terms is off by at most $n$ eps of its
# size.

# %%
torch.manual_seed(0)
tiny = Llama(PRESETS["tiny"])
front, texts = torch.randint(0, 256, (1, 5)), torch.randint(0, 256, (2, 12))
as_text = tiny(torch.cat([front.expand(2, -1), texts], dim=1))[:, 5:]
as_prefix = with_prefix(tiny, prefix_from_tokens(tiny, front))(texts)
apart = (as_prefix - as_text).abs().max() / as_text.abs().max()
allowed = 160 * torch.finfo(torch.float32).eps
print(f"largest difference of any logit: {apart:.1e} of the largest; rounding explains {allowed:.1e}")
assert apart <= allowed, "the prefix does not stand for these tokens: run the checks above again"

# %% [markdown]
# And the positions matter for it: let the text start at position 0 instead, and the two part ways.

# %%
hidden_states = tiny.model.base.run_layers(tiny.model.base.embed_tokens(texts))  # positions 0, 1, 2, ...
apart = (tiny.lm_head(hidden_states) - as_text).abs().max() / as_text.abs().max()
print(f"with the text at position 0, the largest difference is {apart:.1e} of the largest logit")

# %% [markdown]
# ## 4. Through an MLP, which is thrown away  ·  2 points, about 15 minutes, ●●○
#
# Li and Liang found that training $P_K$ and $P_V$ directly was unstable, and trained something smaller with a network behind
# it: one embedding $e_j$ a token, and an MLP that makes all layers' keys and values of it.
#
# $$ \left[\,k_j^{(0)};\ v_j^{(0)};\ k_j^{(1)};\ v_j^{(1)};\ \dots\,\right] = W_{\text{up}} \tanh(W_{\text{down}}\, e_j + b_{\text{down}}) + b_{\text{up}} $$
#
# After training, `fold` computes keys and values once more and keeps them alone: *the MLP is scaffolding*. (Whether it helps
# depends on task and model: Liu et al. 2021 found both.) Every layer asks for its own part. The simplest `forward` runs the
# whole MLP each time and takes one slice; that is allowed.
#
# The layout is that of peft's `PrefixEncoder`, so that a prefix can be carried over: a row of the MLP's output belongs to one
# token, and reads as `(layers * 2, kv_heads, head_dim)`, for each layer its keys first, then its values. The embedding starts
# from a standard normal distribution, the two `nn.Linear` as PyTorch makes them.
#
# <details><summary>The check says that heads and tokens are mixed up</summary>
#
# `made.view(tokens, layers * 2, kv_heads, head_dim)` is the only view that keeps the numbers where they belong. Then `permute`
# the axes into the order `(layers * 2, kv_heads, tokens, head_dim)`.
# </details>
# <details><summary>The check says that fold keeps the MLP</summary>
#
# Return a new `Prefix`, made of detached tensors. It must hold nothing else.
# </details>


# %% nbgrader={"grade": false, "grade_id": "reparameterized-prefix", "locked": false, "schema_version": 3, "solution": true, "task": false}
class ReparameterizedPrefix(nn.Module):
    """Keys and values that an MLP makes of one embedding a token (Li and Liang 2021, section 4.3), laid out as in peft.

    Attributes:
        embedding: parameter of shape (tokens, width), standard normal at the start.
        down: nn.Linear, width -> mlp_width.
        up: nn.Linear, mlp_width -> layers * 2 * kv_heads * head_dim.
    """

    def __init__(self, layers: int, kv_heads: int, tokens: int, head_dim: int, width: int, mlp_width: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.shape = (tokens, layers, 2, kv_heads, head_dim)
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, mlp_width)
        self.up = nn.Linear(mlp_width, layers * 2 * kv_heads * head_dim)
        ### END SOLUTION

    def forward(
        self, layer: int
    ) -> tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]]:
        """Return the keys and the values of one layer."""
        ### BEGIN SOLUTION
        made = self.up(torch.tanh(self.down(self.embedding))).view(self.shape)
        keys, values = made[:, layer].permute(1, 2, 0, 3)
        return keys, values
        ### END SOLUTION


def fold(prefix: ReparameterizedPrefix) -> Prefix:
    """Return the keys and values that the MLP makes now, for all layers, as a `Prefix` of their own; `prefix` is left as it is."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        pairs = [prefix(layer) for layer in range(prefix.shape[1])]
    keys, values = (torch.stack(parts) for parts in zip(*pairs))
    return Prefix(keys, values)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-reparameterized", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_reparameterized(ReparameterizedPrefix, fold)

# %% [markdown]
# For SmolLM2, with an MLP as wide as the model:

# %%
config = PRESETS["SmolLM2-135M"]
with torch.device("meta"):
    mlp = ReparameterizedPrefix(*shape_of_prefix(config), width=config.hidden_size, mlp_width=config.hidden_size)
in_training = sum(parameter.numel() for parameter in mlp.parameters())
kept = counted["SmolLM2-135M"]
share = in_training / (134_515_008 + in_training)
print(f"trained {in_training:,} ({share:.1%} of model and MLP), kept {kept:,}: {in_training / kept:.0f} times as many")

# %% [markdown]
# ## 5. Measured: which memory does a prefix save?
#
# Predict. Full fine-tuning of SmolLM2 holds gradients and two AdamW moments for each of its 134 million weights. Which of these
# bars will a prefix leave visible, at 1% of full fine-tuning's or more? And a prefix with an MLP?

# %%
# For each a set of "gradients", "optimizer_state" and "activations":
my_visible = predict("bars of at least 1% of full fine-tuning's", {"prefix": None, "prefix with an MLP": None})

# %% [markdown]
# We take one step of SmolLM2 on a real batch and follow every allocation.

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.llama import set_gradient_checkpointing
from peftlab.memory import measure_training_step, step_table
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

INSTRUCTION = "Decide whether the review of this movie is good or bad."
TOKENS = 16
device = find_device()
model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(16))))))
instruction = (tokenizer.encode(INSTRUCTION) * TOKENS)[:TOKENS]  # repeated until there are enough
print(tokenizer.decode(instruction))


# %% tags=["experiment"]
def with_first_of(prefix: Prefix, other: Prefix) -> Prefix:
    """Return `prefix` with the first token of `other` in each layer."""
    with torch.no_grad():
        prefix.keys[:, :, 0], prefix.values[:, :, 0] = other.keys[:, :, 0], other.values[:, :, 0]
    return prefix


# %% tags=["experiment"]
def start(kind: str, model: Llama, seed: int = 0) -> nn.Module:
    """Make a prefix for the model: from "text", from a "random" normal distribution, from an "mlp", or of "zeros".

    And "sink": random, but for the first token, which is that of "text".
    """
    torch.manual_seed(seed)
    shape, width = shape_of_prefix(model.config, TOKENS), model.config.hidden_size
    starts = {
        "text": lambda: prefix_from_tokens(model, torch.tensor([instruction])),
        "random": lambda: Prefix(torch.randn(shape), torch.randn(shape)),
        "mlp": lambda: ReparameterizedPrefix(*shape, width=width, mlp_width=width),
        "zeros": lambda: Prefix(torch.zeros(shape), torch.zeros(shape)),
        "sink": lambda: with_first_of(start("random", model, seed), start("text", model)),
    }
    return starts[kind]()


# %% tags=["experiment"]
measured = {}
for name, kind in {
    "full fine-tuning": None,
    "prefix": "text",
    "prefix with an MLP": "mlp",
    "prefix, checkpointing": "text",
}.items():
    model, _ = load_smollm2()
    if kind:
        with_prefix(model, start(kind, model))
    model.to(device).train()
    set_gradient_checkpointing(model, "checkpointing" in name)
    measured[name] = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))

# %% tags=["experiment"]
print(step_table(measured))
whole, visible = measured["full fine-tuning"], {}
for name in ("prefix", "prefix with an MLP"):
    kinds = ("gradients", "optimizer_state", "activations")
    shares = {kind: getattr(measured[name], kind) / getattr(whole, kind) for kind in kinds}
    visible[name] = {kind for kind, share in shares.items() if share >= 0.01}
    described = ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for kind, share in shares.items())
    print(f"{name}, beside full fine-tuning: {described}")
my_visible.compare(visible)

# %% tags=["experiment"]
figure = plots.memory_bars(
    measured, f"One training step of SmolLM2-135M, fp32, {input_ids.shape[0]} × {input_ids.shape[1]} tokens"
)
plots.show(
    figure,
    alt="Stacked bars: with a prefix gradients and optimizer state vanish, with an MLP they are thin; activations stay, but for "
    "checkpointing.",
)

# %% [markdown]
# *What to see.* Gradients and optimizer state are gone, because only what is trained has them. With the MLP a sliver is there
# *during training*, and the peak is 13% higher in the rows of section 7. Most activations stay, as they do with LoRA: the
# prefix of the first layer is reached only through everything above it. Gradient checkpointing is what shrinks them. It works
# here because `PrefixAttention` asks for the prefix *inside* the layer. Section 9 shows what happens elsewhere.
#
# With fake tensors the same step of LLaMA-7B is measured without being run (unit 01).

# %% tags=["experiment"]
from peftlab.memory import StepMemory
from peftlab.simulate import RECIPES, simulate_training_step


def prefixed_on_paper(model: Llama) -> None:
    """Put a prefix without numbers into a model without numbers, in its dtype."""
    shape = shape_of_prefix(model.config)
    with_prefix(model, Prefix(*(torch.empty(shape, dtype=model.lm_head.weight.dtype) for _ in range(2))))


def line(name: str, step: StepMemory) -> str:
    sizes = (step.parameters, step.gradients + step.optimizer_state, step.activations, step.peak)
    return f"{name:<26}" + "".join(f"{size / 1e9:>12,.3f}" for size in sizes)


# %% tags=["experiment"]
llama = PRESETS["LLaMA-7B"]
print(f"{'GB, bf16, 512 tokens':<26}{'weights':>12}{'grad + opt':>12}{'activations':>12}{'peak':>12}")
print(line("LoRA, rank 16", RECIPES["LoRA"].measure(llama)))
print(line("prefix, 16 tokens", simulate_training_step(llama, prefixed_on_paper)))
print(line("prefix, checkpointing", simulate_training_step(llama, prefixed_on_paper, checkpointing=True)))

# %% [markdown]
# *What to see.* Beside 13.5 GB of weights, gradients and optimizer state are nothing with either method. The prefix leaves
# fewer activations than LoRA, and checkpointing takes away nearly all of them.
#
# ## 6. Where it starts decides
#
# peft starts a prefix from random normal numbers, and people report that such a prefix does not learn (peft issue 710). Why?
# Begin with the start itself. In which order do you expect the loss on reviews of the four starts of `start` to be, *before any
# training*? And where among them does the model without a prefix stand?

# %%
# A list of "none", "text", "random", "mlp" and "zeros":
my_order = predict("the starts by loss, the lowest first", None)

# %% [markdown]
# For each start we measure the loss of the untrained model, the share of its attention that goes to the prefix and to the very
# first key, and the length of that key's value. To get at the attention, the next cell listens at PyTorch's own function.


# %% tags=["experiment"]
@torch.no_grad()
def attention_by_key(model: Llama, input_ids: Tensor) -> tuple[Float[Tensor, "layers keys"], Float[Tensor, "layers keys"]]:
    """Return the share of all attention that each key gets, and the length of its value: means over texts, heads and queries."""
    shares, lengths = [], []
    attend = F.scaled_dot_product_attention

    def listen(queries, keys, values, attn_mask=None, **options):
        grouped = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries @ grouped.mT / math.sqrt(keys.shape[3])
        seen = torch.ones_like(scores[0, 0]).tril(keys.shape[2] - queries.shape[2]).bool()
        shares.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1, 2)))
        lengths.append(values.norm(dim=-1).mean((0, 1)))
        return attend(queries, keys, values, attn_mask=attn_mask, **options)

    with patch.object(F, "scaled_dot_product_attention", listen):
        model(input_ids)
    return torch.stack(shares).cpu(), torch.stack(lengths).cpu()


# %% tags=["experiment"]
some, some_labels = (t.to(device) for t in tasks.collate(list(reviews.train.select(range(settings.rows(32))))))
before_training = {}
for kind in ("none", "text", "zeros", "mlp", "random"):
    model, _ = load_smollm2()
    if kind != "none":
        with_prefix(model, start(kind, model))
    model.to(device)
    with torch.no_grad():
        loss = causal_loss(model, some, some_labels).item()
    before_training[kind] = loss, *attention_by_key(model, some)

# %% tags=["experiment"]
print(f"{'start':<8}{'loss':>7}{'prefix gets':>13}{'first key gets':>16}{'its value':>11}{'other values':>14}")
for kind, (loss, shares, lengths) in before_training.items():
    prefix_share = shares[:, :TOKENS].sum(1).mean() if kind != "none" else 0.0
    first, others = lengths[:, 0].mean(), lengths[:, 1:].mean()
    print(f"{kind:<8}{loss:>7.2f}{prefix_share:>13.0%}{shares[:, 0].mean():>16.0%}{first:>11.1f}{others:>14.1f}")
print(f"a guess among all {model.config.vocab_size:,} tokens: {math.log(model.config.vocab_size):.2f} nats")
my_order.compare(sorted(before_training, key=lambda kind: before_training[kind][0]))
evenly = sum(1 / seen for seen in range(1, some.shape[1] + 1)) / some.shape[1]
print(f"attention spread evenly would give the first key {evenly:.0%} without a prefix: early queries see few keys")

# %% tags=["experiment"]
figure, axes = plt.subplots(figsize=(7, 3.2))
for number, kind in enumerate(("none", "text", "random")):
    shares = 100 * before_training[kind][1][:, 0]
    name = {"none": "no prefix (first token)", "text": "prefix from text", "random": "random prefix"}[kind]
    axes.plot(range(len(shares)), shares, color=plots.SERIES[number], marker=plots.MARKERS[number], markersize=4, label=name)
axes.set(title="Attention that the very first key gets", xlabel="layer", ylabel="share of all attention (%)", ylim=(0, 100))
axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
axes.grid(alpha=0.3)
plots.show(
    figure,
    alt="Without a prefix the first key gets half or more of the attention in most layers, and little in the first three. With a "
    "prefix from text it gets half or more in about a third of the layers. The first key of a random prefix gets next to none.",
)

# %% [markdown]
# *What to see.* Without a prefix the model gives about half of its attention to the first token of whatever it reads. That
# token's value is far shorter than the others. It is a place to look at when there is nothing to see, an **attention sink**
# (Xiao et al. 2023). A prefix from text brings its own sink along, its first key. The model works as before, and its loss is
# even lower.
#
# A random prefix has no sink. It takes away a share of the same order (remember $\lambda$) and adds *random values* where there
# was next to nothing, in all 30 layers. What comes out is about as bad as guessing, or worse. Zeros are milder: they dilute the
# attention, and disturb less. An MLP's start is close to zeros in its loss, and its outputs are small.
#
# ### Then why not start from zeros?
#
# Zeros seem the natural choice: BitFit starts from zeros, and LoRA's change does. Try it on a tiny model. How many *different*
# tokens will a prefix of zeros have after twenty steps?

# %%
my_different = predict("different tokens of 16, from a prefix of zeros", None)

# %%
torch.manual_seed(0)
shape = shape_of_prefix(PRESETS["tiny"])
for name, made in {
    "zeros": Prefix(torch.zeros(shape), torch.zeros(shape)),
    "small random numbers": Prefix(0.02 * torch.randn(shape), 0.02 * torch.randn(shape)),
}.items():
    tiny = with_prefix(Llama(PRESETS["tiny"]), made)
    losses = twenty_steps(trainable(tiny).values(), lambda ids: causal_loss(tiny, ids, ids), 1e-2)
    rows = torch.cat([made.keys, made.values], dim=-1).detach().transpose(0, 2).flatten(1)  # a row is a token, in all layers
    different = len(rows.unique(dim=0))
    print(f"{name:<21} loss {losses[0]:.3f} -> {losses[-1]:.3f}, {different} different tokens of {len(rows)}")
    if name == "zeros":
        my_different.compare(different)

# %% [markdown]
# *What to see.* Equal tokens get equal attention, so they get equal gradients and stay equal for ever. Sixteen tokens of zeros
# are one token, sixteen times. A prefix needs a start that tells its tokens apart.

# %% [markdown]
# ### Can training undo the damage?
#
# AdamW moves each number by about the learning rate in a step (unit 05). So the learning rates of all steps added up say how
# far a number gets that is always pushed the same way. The schedule of our training loop goes up to its peak and down again:

# %%
optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40, cycle_momentum=False)
way = 0.0
for _ in range(40):
    way += optimizer.param_groups[0]["lr"]
    optimizer.step()
    schedule.step()
print(f"40 steps are worth {way:.1f} at the peak rate")
for rate in (3e-3, 1e-2, 1e-1):
    print(f"peak rate {rate:g}: a number gets about {way * rate:.2f} far; a standard normal one is 0.80 on average")

# %% [markdown]
# It looks as if at a rate of 0.003 a random prefix could not leave the place where it was dropped: it would have to cross its
# own size. Is that why it does not learn? Predict: from 10.9 nats, where will the loss be after 40 steps on reviews? These runs
# come with the course.

# %%
my_losses = predict("nats, the mean of the last ten steps, at a peak rate of", {0.003: None, 0.01: None, 0.3: None})

# %%
late_losses = {}
print(f"{'rate':>6}{'first step':>12}{'late loss':>11}{'score':>8}")
for row in comparison.sweep_rows(comparison.rows("prefix_tuning", "movie_reviews", "random")):
    rate, late = row.settings["learning_rate"], comparison.late_loss(row)
    late_losses[rate] = late
    print(f"{rate:>6g}{row.losses[0]:>12.2f}{late:>11.2f}{row.score_after:>8.1%}")
my_losses.compare({rate: late_losses[rate] for rate in (0.003, 0.01, 0.3) if rate in late_losses})

# %% [markdown]
# *What to see.* At 0.003 no number gets further than 0.06, and the loss falls by nine nats. A prefix has 184,320 numbers, and
# each has to move only a little for the damage to be gone. From 0.01 on, the rate hardly matters for where the loss ends. So
# distance is not what is missing.
#
# Look at where it ends: 0.69 nats is $\ln 2$. A model that knows the next word is *good* or *bad*, but not which, has exactly
# this loss, and half of the reviews right. The random prefix learns which two words are asked for. It does not learn, in 40
# steps, to tell the reviews apart.
#
# Is it the missing sink, then? Take a random prefix whose first token, in every layer, is the text prefix's: its sink. Will it
# learn? About a minute and a half on two CPU cores.

# %%
my_guess = predict("a random prefix with the text's sink learns: yes or no", None)

# %% tags=["experiment"]
from statistics import mean

from peftlab.training import train

model, _ = load_smollm2()
prefix = start("sink", model)
with_prefix(model, prefix).to(device)
losses = train(model, reviews.train, steps=settings.steps(40), learning_rate=0.01, batch_size=settings.rows(16)).losses
score = reviews.score(model, reviews.test.select(range(settings.examples(240))))
print(f"loss {losses[0]:.2f} at first, {mean(losses[-10:]):.3f} in the last ten steps, {score:.1%} right")
my_guess.compare("yes" if mean(losses[-10:]) < 0.6 else "no")  # who guesses between two words has 0.69
shares = attention_by_key(model, some)[0]
print(f"the prefix gets {shares[:, :TOKENS].sum(1).mean():.0%} of the attention, its first key {shares[:, 0].mean():.0%}")

# %% [markdown]
# *What to see.* It does not: the loss ends at 0.77, as without the sink, and 46% are right. The sink is in use (its key gets a
# third of the attention), and was not what is missing. What sets a random prefix apart from a random *soft prompt*, which
# learns (unit 05)? The prompt's keys and values are made by the model's own layers, out of whatever is put in. Here every one
# of 30 layers meets keys and values that no layer has made. That is a difference, not yet a proof.

# %% [markdown]
# ## 7. On a real model
#
# Fine-tune a prefix from text on film reviews: after `Review: ...` and `This movie is`, does the model find ` good` or ` bad`
# more likely? The learning rate is the one that our sweep chose (see below). The first score is already that of a model with an
# instruction in front. About two minutes on two CPU cores, ten seconds on an H200. Predict first: where will the loss *start*?

# %%
my_first_loss = predict("nats per label at the first step", None)

# %% tags=["experiment"]
from safetensors.torch import save_file

from peftlab.training import fine_tune

swept = comparison.rows("prefix_tuning", "movie_reviews")
learning_rate = comparison.chosen_rate(swept) if swept else 1e-2
model, tokenizer = load_smollm2()
prefix = start("text", model)
started_from = prefix.keys.detach().clone(), prefix.values.detach().clone()
with_prefix(model, prefix)
row = fine_tune(
    model, tokenizer, reviews, unit=UNIT, method="prefix_tuning", save=lambda path: save_file(prefix.state_dict(), path),
    steps=40, learning_rate=learning_rate, tokens=TOKENS, start="text",
)  # fmt: skip

# %% tags=["experiment"]
print(
    f"rate {learning_rate:g}: {row.score_before:.1%} -> {row.score_after:.1%} of {settings.examples(len(reviews.test))} reviews, "
    f"{row.trainable_parameters:,} trained, {row.adapter_bytes / 1e6:.2f} MB file, "
    f"{row.seconds_per_step:.2f} s a step, forgetting {row.forgetting:+.2f}"
)
my_first_loss.compare(row.losses[0])
plots.show(
    plots.loss_curves({"prefix from text": row.losses}, "Training loss on movie_reviews"),
    alt="The training loss of one run, by optimizer step.",
)

# %% [markdown]
# How far has the prefix travelled? Compare with the way that you computed, and with the size of what it started from. And has
# it kept its sink?

# %% tags=["experiment"]
for name, now, then in zip(("keys", "values"), (prefix.keys, prefix.values), started_from):
    moved = (now.detach().cpu() - then).abs()
    print(
        f"{name:<7} moved by {moved.mean():.3f} on average, {moved.max():.2f} at most; they are {then.abs().mean():.2f} on average"
    )
for when, shares in (("before", before_training["text"][1]), ("after", attention_by_key(model, some)[0])):
    all_of_it, first = shares[:, :TOKENS].sum(1).mean(), shares[:, 0].mean()
    print(f"{when:<7}training the prefix gets {all_of_it:.0%} of the attention, its first key {first:.0%}")

# %% [markdown]
# ### What we measured
#
# The rows below come with the course: prefix tuning with three starts, each with its learning rate swept, and beside it other
# methods, all on the same batches (the other starts on reviews only). The rate is chosen by the late loss: with one seed first,
# then by the mean of three. No batch comes twice in a run, and the test split has no say. The table and the lines show seed 0,
# small marks the other seeds; a star, or a ring, marks the chosen rate.

# %%
COMPARED = {
    "prefix, text": ("prefix_tuning", ""),
    "prefix, random": ("prefix_tuning", "random"),
    "prefix, mlp": ("prefix_tuning", "mlp"),
    "prompt, text": ("prompt_tuning", ""),
    "LoRA, rank 8": ("lora", ""),
    "full": ("full", ""),
}
shipped = comparison.select(COMPARED)
prefixes = {key: rows for key, rows in shipped.items() if rows[0].method == "prefix_tuning"}
print(comparison.sweep_table(prefixes))

# %% tags=["experiment"]
for task in comparison.TASKS:
    rows_by_name = comparison.on_task(prefixes, task)
    if rows_by_name:
        plots.show(
            plots.learning_rate_sweep(rows_by_name, f"Prefix tuning on {task}, by its start"),
            alt="Late loss and score against the learning rate, a line for each start, the chosen rate ringed.",
        )

# %% tags=["experiment"]
on_reviews = comparison.on_task(prefixes, "movie_reviews")
curves = {name: comparison.summary(rows).row.losses for name, rows in on_reviews.items()}
plots.show(
    plots.loss_curves(curves, "Training loss on movie_reviews, each start at its own best rate"),
    alt="Loss curves of prefix tuning, one for each start, at the learning rate with the lowest late loss.",
)

# %% [markdown]
# *What to see.* Look for 0.69 nats. Every run from random numbers ends there or above. With seed 0 the MLP ends there, too, at
# rates of 0.0003 and more; at 0.0001 it gets further. (The lone mark at the top is its seed 2 at 0.001.) The prefix from text
# learns at every rate of its sweep. So on reviews the start decides, and the rate for a text start is about 0.01. On tool calls
# a rate ten times as high is chosen. (Forty and sixty steps are few. What many thousand would do, these rows do not say.)
# Below, each start at the rate that suits it, with three seeds.

# %%
print(comparison.score_table(shipped))
print(comparison.memory_table(shipped))

# %% [markdown]
# *What to see.* Read the prefix and the soft prompt of unit 05, both from text, across the two tasks. On tool calls the prefix
# has 89.8%, the prompt 19.0%. On reviews it is the other way round: 83.8% against 86.5%, with a prefix of twenty times as many
# numbers. So keys and values in every layer are worth seventy points where a format is asked for, and nothing where one word
# is. (Is that depth, or the number of numbers? These rows do not tell the two apart.)
#
# Then the price. *Forgetting* is by how much the loss on newspaper sentences has risen, in nats per token, with the prefix in
# place: +1.75 on reviews, where the prompt has -0.01, and +3.96 on tool calls, the most of this table's four. But leave the
# prefix out, and the model is what it was, to the bit.
#
# With 480 test reviews one standard error is about 1.7 points here, with 200 tool calls it is up to 3.5.

# %% [markdown]
# ## 8. The same thing in peft
#
# There are two small LLaMAs with the same weights: a `transformers` model with peft's `PrefixTuningConfig`, and our `Llama`
# with yours. Keys and values are trained directly once, and once through an MLP. Both must give the same logits, and the same
# losses over 20 AdamW steps.

# %% tags=["experiment"]
import warnings

from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # new names are on their way


def in_both(projection: bool) -> tuple[nn.Module, Llama]:
    """Return peft's model and ours, with the same weights and the same prefix of five tokens."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
    ours = Llama(PRESETS["tiny"])
    ours.load_state_dict(theirs.state_dict())
    settings = dict(num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=24)
    theirs = get_peft_model(theirs, PrefixTuningConfig(task_type="CAUSAL_LM", **settings))
    encoder = theirs.prompt_encoder["default"]
    return theirs, with_prefix(ours, from_peft_mlp(encoder) if projection else from_peft(encoder.embedding.weight))


# %% [markdown]
# peft, too, has sized its prefix by the *key-value* heads. Here is how its tensors become ours.


# %% tags=["experiment"]
def from_peft(rows: Float[Tensor, "tokens numbers"]) -> Prefix:
    """Make a prefix of peft's layout: a row is a token, and reads (layers * 2, kv_heads, head_dim)."""
    made = rows.detach().view(5, 2, 2, 2, 16).permute(1, 2, 3, 0, 4)  # layers, keys and values, kv_heads, tokens, head_dim
    return Prefix(made[:, 0].clone(), made[:, 1].clone())


def from_peft_mlp(encoder: nn.Module) -> ReparameterizedPrefix:
    """Copy the embedding and the two layers of peft's encoder."""
    prefix = ReparameterizedPrefix(2, 2, 5, 16, width=encoder.embedding.embedding_dim, mlp_width=24)
    with torch.no_grad():
        prefix.embedding.copy_(encoder.embedding.weight)
    prefix.down.load_state_dict(encoder.transform[0].state_dict())
    prefix.up.load_state_dict(encoder.transform[2].state_dict())
    return prefix


# %% [markdown]
# The longest sum on the way to a loss is the softmax over 256 tokens; a sum of $n$ terms is off by at most $n$ eps of its size.

# %% tags=["experiment"]
allowed = 256 * torch.finfo(torch.float32).eps
ids = torch.arange(36).view(3, 12)
for projection in (False, True):
    theirs, ours = in_both(projection)
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits
        apart = ((ours(ids) - logits).abs().max() / logits.abs().max()).item()
    our_losses = twenty_steps(trainable(ours).values(), lambda batch: causal_loss(ours, batch, batch), 1e-2)
    their_losses = twenty_steps(trainable(theirs).values(), lambda batch: theirs(input_ids=batch, labels=batch).loss, 1e-2)
    steps_apart = ((our_losses - their_losses).abs() / their_losses).max().item()
    print(f"with an MLP: {projection!s:<6} logits {apart:.1e} apart, losses {steps_apart:.1e}; rounding explains {allowed:.1e}")
    assert max(apart, steps_apart) <= allowed, "your prefix and peft's have parted ways: run the checks above again"

# %% [markdown]
# When peft saves such a model, it saves the *folded* prefix. It must be yours:

# %% tags=["experiment"]
theirs, ours = in_both(projection=True)
saved, folded = from_peft(theirs.get_prompt_embedding_to_save("default")), fold(ours.model.prefix)
apart = max((saved.keys - folded.keys).abs().max().item(), (saved.values - folded.values).abs().max().item())
print(f"what peft saves and what you fold: {apart:.1e} apart")
assert apart <= 56 * torch.finfo(torch.float32).eps  # sums of up to 32 + 24 terms, of numbers up to one

# %% [markdown]
# And `prefix_from_tokens`: `transformers` keeps a *cache* of past keys and values when it reads text. Yours must be the same.

# %% tags=["experiment"]
front = torch.randint(0, 256, (1, 5))
plain = theirs.get_base_model()
with torch.no_grad():
    cache = plain(front, use_cache=True).past_key_values
ours = Llama(PRESETS["tiny"])
ours.load_state_dict(plain.state_dict())
mine = prefix_from_tokens(ours, front)
for number in range(2):
    keys, values = cache.layers[number].keys[0], cache.layers[number].values[0]
    apart = max((mine(number)[0] - keys).abs().max().item(), (mine(number)[1] - values).abs().max().item())
    print(f"layer {number}: {apart:.1e} apart")
    assert apart <= 160 * torch.finfo(torch.float32).eps * max(keys.abs().max().item(), values.abs().max().item())

# %% [markdown]
# One thing differs: padding on the left. You count positions along the mask; `transformers` counts padding as text unless it is
# told the positions, and peft takes none for a prefix ("Position ids are not supported"). So the text moves away from the
# prefix, by as many positions as there is padding. In a batch, the same review then gets another answer.

# %% tags=["experiment"]
theirs, ours = in_both(projection=False)
padded, mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:1]], dim=1), torch.ones(1, 18, dtype=torch.long)
mask[:, :6] = 0
with torch.no_grad():
    for name, alone, in_batch in (
        ("ours", ours(ids[:1]), ours(padded, mask)),
        ("peft", theirs(input_ids=ids[:1]).logits, theirs(input_ids=padded, attention_mask=mask).logits),
    ):
        apart = (in_batch[:, 6:] - alone).abs().max() / alone.abs().max()
        print(f"{name}: six tokens of padding move a logit by up to {apart:.1e} of the largest")

# %% [markdown]
# ## 9. Bug hunt  ·  1 point, about 12 minutes, ●●○
#
# *After peft issue 869.* In `transformers` a prefix is given to the model as a **cache**: an object that holds past keys and
# values. Each layer calls `cache.update(keys, values, layer)`, which appends what it is given, and gets back all there is. For
# writing text that is just right. Here is such a cache, with a prefix in it, and an attention that uses it.


# %%
class CacheWithABug:
    """Keys and values of every layer: the prefix, and all that has been added since."""

    def __init__(self, prefix: nn.Module):
        self.prefix, self.held = prefix, {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values, shaped (batch, kv_heads, seq, head_dim), and return all."""
        if layer not in self.held:
            self.held[layer] = [part.expand(len(keys), -1, -1, -1) for part in self.prefix(layer)]
        self.held[layer] = [torch.cat([old, new], dim=2) for old, new in zip(self.held[layer], (keys, values))]
        return self.held[layer][0], self.held[layer][1]


# %%
class CachedAttention(nn.Module):
    """A layer's attention that looks at whatever a cache returns."""

    def __init__(self, attention: LlamaAttention, cache: object, layer: int):
        super().__init__()
        self.attention, self.cache, self.layer = attention, cache, layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: None) -> Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)
            for projection in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        )
        keys, values = self.cache.update(rotate(keys, cos, sin), values, self.layer)
        seen = torch.ones(x.shape[1], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - x.shape[1])
        mixed = F.scaled_dot_product_attention(rotate(queries, cos, sin), keys, values, attn_mask=seen, enable_gqa=True)
        return self.attention.o_proj(mixed.transpose(1, 2).flatten(2))


# %% [markdown]
# With a new cache for each step, training works, until someone runs out of memory and turns gradient checkpointing on.


# %%
def gradient_of_prefix(
    make_cache: Callable[[nn.Module], object], checkpointing: bool, inputs_require_grad: bool = False
) -> Tensor | None:
    """Run backward on one batch with a cache; return the gradient of the prefix's keys, or None if none has arrived.

    Args:
        inputs_require_grad: whether the embeddings' output requires a gradient, as libraries arrange it for checkpointing.
    """
    torch.manual_seed(0)
    model, shape = Llama(PRESETS["tiny"]).requires_grad_(False), shape_of_prefix(PRESETS["tiny"], tokens=5)
    prefix = Prefix(torch.randn(shape), torch.randn(shape))
    cache = make_cache(prefix)
    model.model = PrefixModel(model.model, prefix, lambda attention, prefix, layer: CachedAttention(attention, cache, layer))
    model.model.base.gradient_checkpointing = checkpointing
    if inputs_require_grad:
        model.model.base.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    ids = torch.randint(0, 256, (3, 12))
    causal_loss(model, ids, ids).backward()
    return prefix.keys.grad


# %%
print(f"as it is: the gradient's largest entry is {gradient_of_prefix(CacheWithABug, False).abs().max():.1e}")
try:
    gradient_of_prefix(CacheWithABug, True)
except RuntimeError as error:
    print(f"with checkpointing: {type(error).__name__}:", *str(error).splitlines()[:4], sep="\n    ")

# %% [markdown]
# How many keys does a layer see in forward, and how many when backward runs it again? `transformers` now *throws the cache
# away* where a layer is checkpointed, with a line in the log. The prefix goes with it. Here is what is left:


# %%
class NoCache:
    """A cache that has been thrown away: each layer gets back its own keys and values."""

    def __init__(self, prefix: nn.Module):
        """Take a prefix, as the others do, and forget it."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return what is given."""
        return keys, values


try:
    gradient_of_prefix(NoCache, True)
except RuntimeError as error:
    print("frozen to the bottom:", error)
arrived = gradient_of_prefix(NoCache, True, inputs_require_grad=True)
print("embeddings' output requires a gradient: backward goes through without an error")

# %% [markdown]
# Does the prefix learn in that last run? Look at what has `arrived` before you open this.
#
# <details><summary>Nothing complains. Is it right, then?</summary>
#
# Backward runs through the frozen layers down to the embeddings. `prefix.keys.grad` stays `None`, because no layer has used the
# prefix, and the optimizer passes it over.
# </details>
#
# peft refuses the combination:

# %% tags=["experiment"]
hub_model = in_both(projection=False)[0].get_base_model()
hub_model.gradient_checkpointing_enable()
try:
    get_peft_model(hub_model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
except ValueError as error:
    print(f"peft: {error}")

# %% [markdown]
# It need not. Write `PrefixCache`. Its `update` returns the prefix with the given keys and values behind it, expanded to their
# batch and in their dtype. It may be called any number of times, in any order, with and without checkpointing.
#
# <details><summary>It works with checkpointing in one layer, and not in two</summary>
#
# Backward starts from the last layer. Whatever is emptied "at the first layer" has not been emptied yet.
# </details>


# %% nbgrader={"grade": false, "grade_id": "prefix-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
class PrefixCache:
    """Puts a prefix in front of every layer's keys and values, as often as it is asked to."""

    def __init__(self, prefix: nn.Module):
        ### BEGIN SOLUTION
        self.prefix = prefix
        ### END SOLUTION

    def update(
        self,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        layer: int,
    ) -> tuple[Float[Tensor, "batch kv_heads longer head_dim"], Float[Tensor, "batch kv_heads longer head_dim"]]:
        """Return the keys and values of the prefix, followed by those that are given."""
        ### BEGIN SOLUTION
        own = (part.to(keys.dtype).expand(len(keys), -1, -1, -1) for part in self.prefix(layer))
        own_keys, own_values = own
        return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prefix-cache", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prefix_cache(PrefixCache)

# %%
in_full, checkpointed = gradient_of_prefix(PrefixCache, False), gradient_of_prefix(PrefixCache, True)
print(f"largest difference of the gradient with checkpointing: {(in_full - checkpointed).abs().max():.1e}")

# %% [markdown]
# ## 10. In your own words  ·  2 points, marked by hand
#
# A colleague wants one LLaMA-7B for forty customers, each with a prefix of 32 tokens. For a first customer, who sorts letters
# into two kinds, he takes a library's default: keys and values from a standard normal distribution. In 40 steps the loss falls
# from 11 nats to 0.7, and he is pleased; but half of the answers are wrong. He turns gradient checkpointing on to make room for
# larger batches. His library is an older one that does not refuse: training runs without an error, and now the loss does not go
# down *at all*.
#
# In about 120 words: what has been learned in the first run, and what has not? Why does the second learn nothing? Name for each
# of the two the one measurement that would show it, and what you would change. And what will his prefixes cost when the model
# is in use, that a merged LoRA would not? Refer to at least one number that you measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the two runs, each with its measurement.* The first: the damage of a random start is undone, and the two
# words are learned, but not which is right: 0.7 nats is ln 2, the loss of a coin (shown by the score, or by the loss before
# training and at the end); change: start from tokens, or an MLP at a low rate. "The numbers cannot move far enough" is refuted
# by section 6. Checkpointing: the cache with the prefix is dropped, so that no gradient arrives (shown by `prefix.keys.grad`
# being `None`, or by equal losses with and without the prefix); change: read the prefix inside the layer, or no checkpointing.
# *1 point: the cost in use, and a number.* A prefix cannot be merged: for every request 32 more keys and values in each layer,
# in memory and in every token's attention; many customers in one batch are possible, though. A measured figure is quoted. Half
# points for either part where measurement or cost is missing.
#
# **A full answer.** A random prefix breaks the model at first: here the loss was 10.9 nats, against 6.5 without a prefix.
# Training has repaired that and learned the two words. It has not learned to tell the letters apart: 0.7 is ln 2, the loss of a
# coin, and the score says 50%. In this unit no rate got a random prefix below it in 40 steps. I would start from an
# instruction's keys and values. With checkpointing the library drops the past keys and values; `prefix.keys.grad` would be
# `None`. I would put the prefix into the attention itself, or shrink the batch and accumulate. In use the prefix stays: 32
# extra keys and values per layer for each request, where a merged LoRA costs nothing.
#
# **An answer worth one point.** The prefix starts at random and that confuses the model, so a real text should be used as the
# start. Gradient checkpointing does not work with prefix tuning in peft, so he has to turn it off. Prefixes make the input
# longer.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A prefix in every layer, equal to peft's to rounding, with MLP and without; a start that works, and measurements of what
# others do; gradient checkpointing, where the library gives up.
#
# ## Sources
#
# - Li and Liang (2021), *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, arXiv 2101.00190: section 4.1 is the
#   method, 4.3 the MLP, 7.4 the initialization: with few data, a start from real words does better than a random one.
# - Liu et al. (2021), *P-Tuning v2*, arXiv 2110.07602: the same in every layer, for models of many sizes, with and without the
#   MLP.
# - He et al. (2022), *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv 2110.04366: the formula with
#   $\lambda$.
# - Xiao et al. (2023), *Efficient Streaming Language Models with Attention Sinks*, arXiv 2309.17453.
# - Su et al. (2021), *RoFormer*, arXiv 2104.09864. Ainslie et al. (2023), *GQA*, arXiv 2305.13245.
# - peft issues [869](https://github.com/huggingface/peft/issues/869) and [710](https://github.com/huggingface/peft/issues/710),
#   pull request [2191](https://github.com/huggingface/peft/pull/2191).
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
