# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Rank decomposition: how much of a matrix is in a few directions
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 75, and 15 more if you fine-tune here | 2 of 5 | 14 | 00_start_here; matrix products, and what an SVD is |
#
# LoRA, unit 08, writes the change of a weight matrix as a product of two thin ones. That can only work if the change has, or
# nearly has, a low *rank*. This unit gives you the tools to find out, and then looks at a real update.
#
# **When you have finished, you can**
#
# 1. split a matrix into two thin factors, and say beforehand how large the error will be;
# 2. measure how many ranks a matrix uses, in three ways that need not agree;
# 3. say what the update of a real model looks like after fine-tuning, from its singular values.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it at once, on new random
# numbers every time, and says what is wrong. Run the checks as often as you like.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from autograder.checks.rank_decomposition import (
    check_add_products,
    check_break_even,
    check_energy_rank,
    check_factor_gradients,
    check_soft_ranks,
    check_subspace_overlap,
    check_truncated_svd,
    check_truncation_error,
)
from peftlab import plots, results, settings, spectra
from peftlab.llama import PRESETS
from peftlab.progress import predict

UNIT = "02_rank_decomposition"

# %% [markdown]
# ## The idea
#
# A column times a row is a whole matrix, and the simplest there is: all its rows are multiples of one row. It has **rank** 1. A
# sum of $r$ such products has at most rank $r$. Put the columns side by side as $B$ and the rows on top of each other as $A$,
# and the sum is one product:
#
# $$ \sum_{k=1}^{r} b_k\, a_k^\top = B A, \qquad B \in \mathbb{R}^{\text{out} \times r}, \quad A \in \mathbb{R}^{r \times \text{in}} $$
#
# A grey picture is a matrix too. Here is one, rebuilt from 1, 4, 16 and 48 columns and rows, the best that there are.

# %%
image = spectra.picture()
columns, rows = spectra.columns_and_rows(image, 48)
rebuilt = {"original": image} | {f"rank {rank}": columns[:, :rank] @ rows[:rank] for rank in (1, 4, 16, 48)}
plots.show(
    spectra.gallery(rebuilt, f"A picture of {image.shape[0]} × {image.shape[1]} numbers, from few columns and rows"),
    alt="A picture of stripes, a disc, a triangle and slanted writing. At rank 1 it is a blur of bars; at 16 it can be read.",
)

# %% [markdown]
# *What to see.* Rank 1 is a pattern like woven cloth: every row the same, brighter or darker. The upright stripes come soon,
# for all their rows are alike. The slanted writing comes last: nothing about it lies along rows or columns. Low rank does not
# mean simple to the eye.
#
# The helper above finds columns and rows one by one, slowly. The **singular value decomposition** has them all at once:
#
# $$ W = U \Sigma V^\top = \sum_k \sigma_k\, u_k v_k^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0 $$
#
# The $u_k$ are orthogonal to each other and of length one, so are the $v_k$; the **singular values** $\sigma_k$ say how much
# each product counts. Keeping the first $r$ products gives the best approximation of rank $r$ that exists (Eckart and Young
# 1936).

# %% [markdown]
# ## 1. Two thin factors  ·  3 points, about 12 minutes, ●●○
#
# `truncated_svd` returns $B$ and $A$ such that $BA$ is the best approximation of rank $r$. Into which of them do the singular
# values go? The product does not care; training does. We share them out evenly:
#
# $$ B = U_r\, \Sigma_r^{1/2}, \qquad A = \Sigma_r^{1/2}\, V_r^\top $$
#
# so that $B^\top B = A A^\top = \Sigma_r$, largest first: the two are of the same size. The third case of the check is a 6 ×
# 4000 matrix, on which it *measures* your memory.
#
# <details><summary>RuntimeError: the size of tensor a must match the size of tensor b</summary>
#
# Broadcasting lines up the last axes. `U[:, :rank]` has its vectors as columns, so `* sigma[:rank].sqrt()` fits. `Vh[:rank]`
# has them as rows: make the roots a column, `[:, None]`.
# </details>
# <details><summary>The check speaks of Vh</summary>
#
# `torch.linalg.svd` returns $V^\top$, named `Vh`, not $V$: its *rows* are the singular vectors. (The older `torch.svd` returns
# $V$.)
# </details>
# <details><summary>The check says that a large square matrix is built</summary>
#
# By default `torch.linalg.svd` completes $U$ and $V$ to full square matrices, with vectors that no singular value belongs to.
# `full_matrices=False` leaves these out.
# </details>


# %% nbgrader={"grade": false, "grade_id": "truncated-svd", "locked": false, "schema_version": 3, "solution": true, "task": false}
def truncated_svd(matrix: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the factors B and A of the best approximation of `matrix` that has this rank.

    The columns of B and the rows of A come in the order of their singular values, largest first; each factor is
    multiplied by the singular values' square roots.

    Args:
        matrix: in single or double precision; the factors have its dtype.
        rank: from 1 to the smaller side.
    """
    ### BEGIN SOLUTION
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-truncated-svd", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_truncated_svd(truncated_svd)

# %% [markdown]
# Yours and the slow helper's pictures are the same, although their columns may differ in sign, and in length:

# %%
B, A = truncated_svd(image, 16)
print(f"largest difference of any pixel at rank 16: {(B @ A - rebuilt['rank 16']).abs().max():.1e}")
print(f"first column, length: {B[:, 0].norm():.2f} here, {columns[:, 0].norm():.2f} there")

# %% [markdown]
# ## 2. The error, before it is made  ·  1 point, about 8 minutes, ●○○
#
# What is dropped is $\sum_{k>r} \sigma_k u_k v_k^\top$. As all these vectors are orthogonal and of length one, the sizes add up
# as in Pythagoras' theorem. In the **Frobenius norm**, the root of the sum of all squared entries:
#
# $$ \lVert W - BA \rVert_F = \sqrt{\sum_{k>r} \sigma_k^2} $$
#
# This is Eckart and Young's theorem, and no other matrix of rank $r$ does better. Write `truncation_error`, which needs the
# singular values and nothing else.
#
# <details><summary>It is off by one</summary>
#
# The formula counts from 1, Python from 0: kept are the indices 0 to `rank - 1`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "truncation-error", "locked": false, "schema_version": 3, "solution": true, "task": false}
def truncation_error(singular_values: Float[Tensor, "values"], rank: int) -> float:
    """Return the Frobenius norm of what the best approximation of this rank leaves out.

    Args:
        singular_values: of the matrix, largest first.
        rank: from 0 (everything is left out) to their number (nothing is).
    """
    ### BEGIN SOLUTION
    return singular_values[rank:].norm().item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-truncation-error", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_truncation_error(truncation_error)

# %% [markdown]
# ### Predict, then measure
#
# By how many percent of the picture's norm is the picture of rank 16 off? Look at it again, write your guess down, then run the
# cell after.

# %%
my_error = predict("percent of the norm that the picture of rank 16 is off by", None)

# %%
sigma = torch.linalg.svdvals(image)
predicted = {rank: truncation_error(sigma, rank) for rank in (1, 2, 4, 8, 16, 32, 64)}
measured = {}
for rank in predicted:
    B, A = truncated_svd(image, rank)
    measured[rank] = (image - B @ A).norm().item()
    print(f"rank {rank:>2}: by the singular values {predicted[rank]:9.5f}, measured {measured[rank]:9.5f}")
my_error.compare(100 * predicted[16] / image.norm().item())

# %% [markdown]
# Equal, but not to the last digit. How far apart may they be? An SVD in fp32 is that of a matrix that is off by about (larger
# side) × eps × $\sigma_1$, and eps is $1.2 \cdot 10^{-7}$. That is the limit which the next line holds them to.

# %%
allowed = max(image.shape) * torch.finfo(image.dtype).eps * sigma[0].item()
apart = max(abs(predicted[rank] - measured[rank]) for rank in predicted)
print(f"at most {apart:.1e} apart; rounding explains {allowed:.1e}")
assert apart <= allowed, "prediction and measurement differ by more than rounding: run the checks above again"

# %% [markdown]
# ## 3. How many ranks does a matrix use?  ·  3 points, about 15 minutes, ●●○
#
# A matrix with a little noise has full rank, whatever is in it. So one counts *softly*. Three such counts are common:
#
# | | formula | what it asks |
# |---|---|---|
# | **energy rank** | smallest $r$ with $\sum_{k \le r} \sigma_k^2 \ge \text{share} \cdot \sum_k \sigma_k^2$ | how many ranks hold 90% of the energy? |
# | **stable rank** | $\lVert W \rVert_F^2 \,/\, \lVert W \rVert_2^2 = \sum_k \sigma_k^2 \,/\, \sigma_1^2$ | how much more is there than the first direction? |
# | **effective rank** | $\exp\big(-\sum_k p_k \ln p_k\big)$ with $p_k = \sigma_k / \sum_j \sigma_j$ | over how many directions is it spread? |
#
# Energy is the sum of squares, as in physics. The effective rank (Roy and Vetterli 2007) takes the values themselves, *not*
# squared, so that it gives much more weight to a long tail of small ones. A singular value of zero adds nothing to the entropy.
#
# <details><summary>The effective rank is nan</summary>
#
# $0 \cdot \ln 0$ is nan in floating point. Leave the zeros out, or use `torch.special.entr(p)`, which is $-p \ln p$ and 0 at 0.
# </details>


# %% nbgrader={"grade": false, "grade_id": "soft-ranks", "locked": false, "schema_version": 3, "solution": true, "task": false}
def stable_rank(singular_values: Float[Tensor, "values"]) -> float:
    """Return the squared Frobenius norm over the squared spectral norm; the values come largest first."""
    ### BEGIN SOLUTION
    return (singular_values / singular_values[0]).square().sum().item()
    ### END SOLUTION


def effective_rank(singular_values: Float[Tensor, "values"]) -> float:
    """Return exp of the entropy, in nats, of the singular values divided by their sum."""
    ### BEGIN SOLUTION
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-soft-ranks", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_soft_ranks(stable_rank, effective_rank)

# %% [markdown]
# And the energy rank. A rank that holds *exactly* the share is enough.
#
# <details><summary>It is one too small</summary>
#
# The index of the first sum that reaches the share counts from 0: index 0 means that one rank is enough.
# </details>


# %% nbgrader={"grade": false, "grade_id": "energy-rank", "locked": false, "schema_version": 3, "solution": true, "task": false}
def energy_rank(singular_values: Float[Tensor, "values"], share: float) -> int:
    """Return the smallest rank that holds at least this share of the energy.

    Args:
        singular_values: largest first, not all zero.
        share: between 0 and 1, both excluded.
    """
    ### BEGIN SOLUTION
    energy = singular_values.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-energy-rank", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_energy_rank(energy_rank)

# %% [markdown]
# Try them on four matrices of 144 rows. Which has the lowest stable rank? On which will the three disagree most?

# %%
torch.manual_seed(0)
noise = torch.randn(144, 216)
one_direction = torch.outer(torch.randn(144), torch.randn(216))
examples = {
    "the picture": image,
    "noise": noise,
    "one direction": one_direction,
    "one direction, some noise": one_direction + 0.1 * noise,
}
print(f"{'':<28}{'energy rank (90%)':>18}{'stable rank':>13}{'effective rank':>16}")
for name, matrix in examples.items():
    values = torch.linalg.svdvals(matrix)
    print(f"{name:<28}{energy_rank(values, 0.9):>18}{stable_rank(values):>13.1f}{effective_rank(values):>16.1f}")
print(f"the last one's 143 small values add up to {values[1:].sum() / values[0]:.2f} times the large one")

# %% [markdown]
# *What to see.* In the last row one percent of the energy is noise. Two of the counts do not notice. The effective rank jumps:
# it adds up the values without squaring them, and the 143 small ones together exceed the large one. "The rank is low" means
# nothing until one says which rank. And the picture: by energy it has rank 1, its brightness; yet at rank 1 nobody can read it.
# Energy is not meaning.

# %% [markdown]
# ## 4. What does it save?  ·  1 point, about 5 minutes, ●○○
#
# $B$ and $A$ together have $r\,(\text{out} + \text{in})$ numbers, the matrix has $\text{out} \cdot \text{in}$. Up to which rank
# are the factors smaller? `break_even_rank` returns the *largest* rank at which they have **fewer** numbers than the matrix;
# where they have as many, nothing is saved. Both functions return whole numbers.
#
# <details><summary>break_even_rank is off for square matrices</summary>
#
# For 10 × 10 the factors of rank 5 have 100 numbers, as many as the matrix. So the answer is 4.
# </details>


# %% nbgrader={"grade": false, "grade_id": "break-even", "locked": false, "schema_version": 3, "solution": true, "task": false}
def factor_parameters(out_features: int, in_features: int, rank: int) -> int:
    """Return how many numbers B and A have together."""
    ### BEGIN SOLUTION
    return rank * (out_features + in_features)
    ### END SOLUTION


def break_even_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank at which the factors have fewer numbers than the matrix."""
    ### BEGIN SOLUTION
    return (out_features * in_features - 1) // (out_features + in_features)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-break-even", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_break_even(factor_parameters, break_even_rank)

# %%
for preset in ("SmolLM2-135M", "LLaMA-7B", "Llama-2-70B"):
    hidden_size = PRESETS[preset].hidden_size
    share = factor_parameters(hidden_size, hidden_size, 8) / hidden_size**2
    limit = break_even_rank(hidden_size, hidden_size)
    print(f"{preset:<14} q_proj {hidden_size} × {hidden_size}: rank 8 is {share:.2%} of it, factors save up to rank {limit:,}")

# %% [markdown]
# *What to see.* The larger the matrix, the more a fixed rank saves: the factors grow with the side, the matrix with its square.

# %% [markdown]
# ## 5. The gradient of a product  ·  2 points, about 10 minutes, ●●○
#
# To *train* factors one needs their gradients. Let $W = BA$, and let $G$ be the gradient of the loss with respect to $W$, as if
# $W$ itself were trained. By the product rule, $\mathrm{d}W = \mathrm{d}B\, A + B\, \mathrm{d}A$, and so
#
# $$ \frac{\partial L}{\partial B} = G A^\top, \qquad \frac{\partial L}{\partial A} = B^\top G $$
#
# Each factor's gradient is multiplied by the *other* factor. What happens if one of them is zero? And if both are? You will
# measure that below. Write `factor_gradients` without autograd.
#
# <details><summary>The shapes do not fit</summary>
#
# `gradient` is (out, in), as W is. The gradient of B must come out as (out, rank): the side `in` has to be summed over.
# </details>


# %% nbgrader={"grade": false, "grade_id": "factor-gradients", "locked": false, "schema_version": 3, "solution": true, "task": false}
def factor_gradients(
    gradient: Float[Tensor, "out in"], B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the gradients of B and of A, given that of their product B A."""
    ### BEGIN SOLUTION
    return gradient @ A.T, B.T @ gradient
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-factor-gradients", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_factor_gradients(factor_gradients)

# %% [markdown]
# Autograd must come to the same numbers. Here is a loss that is not even quadratic:

# %%
torch.manual_seed(0)
B, A = torch.randn(24, 4, requires_grad=True), torch.randn(4, 32, requires_grad=True)
product = B @ A
product.retain_grad()
product.sin().sum().backward()
by_hand = factor_gradients(product.grad, B.detach(), A.detach())
print(f"largest differences: {(by_hand[0] - B.grad).abs().max():.1e} for B, {(by_hand[1] - A.grad).abs().max():.1e} for A")
assert torch.allclose(by_hand[0], B.grad, atol=1e-5) and torch.allclose(by_hand[1], A.grad, atol=1e-5)

# %% [markdown]
# ### A teacher with a rank of 4
#
# Now train. A *teacher* is a layer whose weight has changed by $\Delta$, a matrix of rank 4. A *student* layer starts without
# that change and learns $BA$ from the teacher's outputs. What will its error be at rank 1, 2, ..., 6?

# %%
out_features, in_features = 24, 32
torch.manual_seed(0)
left = torch.linalg.qr(torch.randn(out_features, 4))[0]
right = torch.linalg.qr(torch.randn(in_features, 4))[0]
delta = left * torch.tensor([4.0, 3.0, 2.0, 1.0]) @ right.T  # singular values 4, 3, 2, 1
floors = {rank: truncation_error(torch.linalg.svdvals(delta), rank) for rank in range(1, 7)}
print("Eckart-Young says:", {rank: round(floor, 3) for rank, floor in floors.items()})


# %% [markdown]
# The student sees 256 inputs, uncorrelated and of unit size ($X^\top X / n = I$). So the squared error of its outputs, summed
# over the outputs and averaged over the inputs, is $\lVert BA - \Delta \rVert_F^2$. Of the loss's gradient it needs only the
# part with respect to $BA$; your function does the rest. As in LoRA, $B$ starts at zero and $A$ at random.


# %%
def train_factors(rank: int, steps: int = 3000, A_size: float = 0.3, B_size: float = 0.0) -> list[float]:
    """Learn the change from the teacher's outputs by gradient descent; return the distance to it after each step."""
    learning_rate = 0.05
    inputs = torch.linalg.qr(torch.randn(256, in_features))[0] * math.sqrt(256)
    targets = inputs @ delta.T
    A, B = A_size * torch.randn(rank, in_features), B_size * torch.randn(out_features, rank)
    distances = []
    for _ in range(steps):
        gradient = (inputs @ (B @ A).T - targets).T @ inputs / len(inputs)  # of half the mean squared error
        dB, dA = factor_gradients(gradient, B, A)
        B, A = B - learning_rate * dB, A - learning_rate * dA
        distances.append((B @ A - delta).norm().item())
    return distances


curves = {rank: train_factors(rank) for rank in floors}
for rank, floor in floors.items():
    print(f"rank {rank}: trained to {curves[rank][-1]:.6f}, Eckart-Young {floor:.6f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
for rank, curve in curves.items():
    axes.plot(range(1, 301), curve[:300], color=plots.SERIES[rank - 1], label=f"rank {rank}")
    axes.axhline(floors[rank], color=plots.SERIES[rank - 1], linestyle=":", linewidth=1)
axes.set(
    title="A change of rank 4, learned with other ranks (dotted: Eckart-Young)", xlabel="step", ylabel="distance to the change"
)
axes.legend(frameon=False, ncols=3)
plots.show(figure, alt="Six falling curves. Ranks 1, 2 and 3 stop at dotted lines of their own; ranks 4, 5 and 6 go to zero.")

# %%
for rank, floor in floors.items():
    assert abs(curves[rank][-1] - floor) < 1e-4, f"rank {rank} did not reach its floor"
print("Every rank ends within 0.0001 of what the singular values said.")

# %% [markdown]
# *What to see.* Ranks below 4 stop at the floor that you computed before anything was trained; no patience and no learning rate
# gets them lower. From 4 on the error goes to zero, although not equally fast: the picture has the first 300 of 3,000 steps.
# (With correlated inputs the floor is Eckart and Young's for $\Delta$ times the root of the inputs' covariance: what counts is
# the change of the *outputs*.)
#
# And the start? The three below have rank 4 and 500 steps. Before the first step the distance to the change is 5.477.

# %%
for start, sizes in {"B zero, A random": (0.3, 0.0), "A zero, B random": (0.0, 0.3), "both zero": (0.0, 0.0)}.items():
    print(f"{start:<18} trained to {train_factors(4, 500, *sizes)[-1]:.3f}")

# %% [markdown]
# *What to see.* One zero does no harm: the other factor's gradient vanishes in the first step, and in that step alone. With
# both at zero both gradients are zero, and nothing ever moves. That is why LoRA starts one of its factors at random.

# %% [markdown]
# ## 6. A real update
#
# We fine-tuned all weights of SmolLM2-135M on film reviews, 40 steps, twice, with different seeds. A run sees 640 of the 3,489
# reviews, and the seed decides which; 124 are seen by both. The question of this unit: what does the *change* of each weight
# matrix look like, next to the matrix itself?
#
# Predict first. SmolLM2's query projections are 576 × 576, and those of noise hold 90% of their energy in 294 ranks.

# %%
my_ranks = predict("ranks that hold 90% of the energy of SmolLM2's query projection", {"the weight": None, "its change": None})

# %% [markdown]
# The cells below fine-tune here if you set `measure_here` to `True`, which takes about a quarter of an hour on two CPU cores.
# Otherwise they pass, and what we measured with these very cells is loaded.

# %% tags=["experiment"]
measure_here = spectra.measure_here()  # or True

# %% tags=["experiment"]
from safetensors.torch import save_model

from peftlab import tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device, fine_tune


def fine_tuned(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fine-tune all of SmolLM2; return the weights of its linear layers before, and their change."""
    model, tokenizer = load_smollm2()
    before = spectra.linear_weights(model)
    fine_tune(
        model, tokenizer, tasks.movie_reviews(tokenizer), unit=UNIT, method="full",
        save=lambda path: save_model(model, str(path)), steps=40, learning_rate=2e-5, seed=seed,
    )  # fmt: skip
    after = spectra.linear_weights(model)
    return before, {name: after[name] - before[name] for name in before}


# %% tags=["experiment"]
if measure_here:
    before, update = fine_tuned(seed=0)
    _, other_update = fine_tuned(seed=1)


# %% [markdown]
# Then the question that decides whether low rank is *enough*: put only the first $r$ ranks of the change into the model, and
# score it.


# %% tags=["experiment"]
def scores_by_rank(before: dict[str, Tensor], update: dict[str, Tensor], ranks: list[int]) -> dict[int, float]:
    """Score SmolLM2 with the linear layers' change cut to each rank, and with all of that (rank 576)."""
    model, tokenizer = load_smollm2()
    model, reviews = model.to(find_device()), tasks.movie_reviews(tokenizer)
    factors = {name: truncated_svd(change, max(ranks)) for name, change in update.items()}
    scores = {}
    for rank in ranks:
        cut = {name: before[name] + B[:, :rank] @ A[:rank] for name, (B, A) in factors.items()}
        spectra.set_linear_weights(model, cut)
        scores[rank] = reviews.evaluate(model)
    spectra.set_linear_weights(model, {name: before[name] + update[name] for name in update})
    return scores | {576: reviews.evaluate(model)}


# %% tags=["experiment"]
MIDDLE = [f"layers.15.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")]


def directions(matrix: Tensor, count: int = 32) -> Tensor:
    """Return the leading right singular vectors, as columns: the directions of the input that the change reacts to."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:count].T


if measure_here:
    mine = spectra.Spectra(
        weights={name: torch.linalg.svdvals(weight) for name, weight in before.items()},
        updates={name: torch.linalg.svdvals(change) for name, change in update.items()},
        directions={name: (directions(update[name]), directions(other_update[name])) for name in MIDDLE},
        scores=scores_by_rank(before, update, [0, 1, 2, 4, 8, 16]),
    )
    print(spectra.save(mine, UNIT))

# %% tags=["experiment"]
found = spectra.load(UNIT)
print(f"measured on {found.described['hardware']}, torch {found.described['versions']['torch']}")
print(f"{len(found.weights)} matrices; the score goes from {found.scores[0]:.1%} to {found.scores[576]:.1%}")

# %% [markdown]
# One layer first, in the middle of the model. Noise of the same shape is there to compare with: it is what "no structure" looks
# like.

# %% tags=["experiment"]
torch.manual_seed(0)
name = "layers.15.self_attn.q_proj"
lines = {
    "its change in fine-tuning": found.updates[name],
    "SmolLM2's own weight": found.weights[name],
    "noise of this shape": torch.linalg.svdvals(torch.randn(576, 576)),
}
figure = spectra.decay(lines, f"Singular values of {name}, 576 × 576")
plots.show(figure, alt="Noise falls slowly, the weight faster; the change drops steeply in the first ranks, then slowly.")

# %% tags=["experiment"]
print(f"{name:<30}{'energy rank (90%)':>18}{'stable rank':>13}{'effective rank':>16}")
for kind, values in lines.items():
    print(f"{kind:<30}{energy_rank(values, 0.9):>18}{stable_rank(values):>13.1f}{effective_rank(values):>16.1f}")
own, change = (energy_rank(lines[kind], 0.9) for kind in ("SmolLM2's own weight", "its change in fine-tuning"))
my_ranks.compare({"the weight": own, "its change": change})

# %% [markdown]
# Is this layer typical? Here are all of them, as medians over the layers of the model:

# %% tags=["experiment"]
from statistics import median

KINDS = sorted({name.split(".", 2)[2] for name in found.updates})
print(f"{'':<20}{'energy rank (90%)':^24}{'stable rank':^24}{'effective rank':^24}")
print(f"{'':<20}" + f"{'weight':>12}{'change':>12}" * 3)
for kind in KINDS:
    row = ""
    for count in (lambda values: energy_rank(values, 0.9), stable_rank, effective_rank):
        for measured in (found.weights, found.updates):
            row += f"{median(count(values) for name, values in measured.items() if name.endswith(kind)):>12.1f}"
    print(f"{kind:<20}{row}")

# %% tags=["experiment"]
by_layer = {
    kind.split(".")[1]: {
        int(name.split(".")[1]): energy_rank(values, 0.9) for name, values in found.updates.items() if name.endswith(kind)
    }
    for kind in KINDS
}
figure = spectra.by_layer(by_layer, "How many ranks hold 90% of the change's energy", "ranks (of 576; k and v: of 192)")
plots.show(
    figure,
    alt="Seven kinds of matrices over thirty layers: up to 73 ranks in the first layers, under 10 in the last.",
)

# %% [markdown]
# *What to see.* By energy the change *is* of low rank: least so in the MLPs of the first layers, most of all in the last ones.
# The weight that it is added to is not. LoRA relies on that. By effective rank the change is lower than the weight, but not
# low: 152 against 387 for the query projections, where noise of that shape has 464. A few strong directions stand on a long
# tail of weak ones, which together are many. Both are true of the same matrix.
#
# Two cautions. The task is small: 640 reviews, two possible answers. Biderman et al. (2024) fine-tuned on billions of tokens of
# code and mathematics and found changes of 10 to 100 times the rank that LoRA is usually given. And our copy of SmolLM2's
# weights was once stored in 4 bits; the rounding adds a little noise to the *weights'* spectra (not to the changes').

# %% [markdown]
# ### Where do the few directions come from, and where the tail?
#
# The gradient of a linear layer's weight is a sum of outer products, one a token: $G = \sum_t g_t\, x_t^\top$. Tokens that want
# about the same change add up to a strong direction. But AdamW does not step along $G$. It divides every entry by the usual
# size of that entry, so that its *first* step is $G / (|G| + \epsilon)$, hardly more than the sign. Take one batch of reviews
# and count both.

# %% tags=["experiment"]
from peftlab.llama import causal_loss

model, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
input_ids, labels = tasks.collate(list(reviews.train.select(range(settings.rows(16)))))
causal_loss(model, input_ids, labels).backward()

print(f"{'':<30}{'':<12}{'energy rank (90%)':>18}{'stable rank':>13}{'effective rank':>16}")
for name in ("layers.15.self_attn.q_proj", "layers.15.mlp.gate_proj", "layers.29.mlp.down_proj"):
    G = model.get_submodule(f"model.{name}").weight.grad
    for kind, matrix in (("gradient", G), ("first step", G / (G.abs() + 1e-8))):
        values = torch.linalg.svdvals(matrix)
        print(f"{name:<30}{kind:<12}{energy_rank(values, 0.9):>18}{stable_rank(values):>13.1f}{effective_rank(values):>16.1f}")

# %% [markdown]
# *What to see.* The gradient of a batch is of low rank by every count. The division by its size keeps the strong direction and
# raises all that is weak: in the first step, the tail is the optimizer's work. (In the last layer's MLP only the tokens before
# the 16 answers get a gradient at all.) With LoRA the optimizer works on $A$ and $B$, whose product has no room for a tail.
#
# But the first step alone has a *higher* energy rank than the sum of all forty, whose median for query projections is 7.
# Perhaps the strong directions point the same way in every step and add up, while the rest changes its signs and averages out.
# We have not measured that: keep the change after 1, 5 and 20 steps, and you can.

# %% [markdown]
# ### Does the tail matter?
#
# The count that decides is the score. Predict: how many ranks of the change are needed for half of the improvement?

# %%
my_rank = predict("ranks of the change for half of the improvement", None)

# %% tags=["experiment"]
linear_numbers = sum(factor_parameters(*shape, 1) for shape in ((576, 576), (192, 576), (192, 576), (576, 576)))
linear_numbers = 30 * (linear_numbers + 3 * factor_parameters(1536, 576, 1))
gained = found.scores[576] - found.scores[0]
for rank, score in found.scores.items():
    share = f"{(score - found.scores[0]) / gained:5.0%} of the gain" if gained else ""
    numbers = f"{rank * linear_numbers:,} numbers" if 0 < rank < 576 else ""
    print(f"rank {rank:>3}: {score:6.1%} right  {share}  {numbers}")
enough = (rank for rank, score in sorted(found.scores.items()) if score - found.scores[0] >= gained / 2)
my_rank.compare(next(enough))

# %% tags=["experiment"]
points = {max(rank, 0.5): 100 * score for rank, score in found.scores.items()}
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(list(points), list(points.values()), color=plots.SERIES[0], marker="o")
axes.set_xscale("log", base=2)
axes.set_xticks(list(points), ["none", *(str(rank) for rank in list(found.scores)[1:-1]), "all"])
axes.set(title="Reviews judged right, by ranks of the change kept", xlabel="ranks kept", ylabel="accuracy (%)", ylim=(0, 100))
axes.grid(alpha=0.3)
plots.show(figure, alt="Accuracy jumps with the first rank and then rises slowly to that of the whole change.")

# %% [markdown]
# *What to see.* One rank a matrix already brings most of the improvement, and the rest comes slowly (one standard error is
# about 1.4 points). At "all" the linear layers have their whole change. Embeddings and norms changed as well and are left out
# here: with them the model reaches 91.2%. Note what this does *not* say: that training with rank 1 would find it. It says that
# there is something to be found.

# %% [markdown]
# ## 7. Do two runs find the same directions?  ·  1 point, about 8 minutes, ●●○
#
# If the strong directions belong to the task, another run should find them again; if they are accidents, it will not. Hu et al.
# (section 7.2) compare the spaces that two sets of vectors span. With $U$ holding $i$ orthonormal columns and $V$ holding $j$:
#
# $$ \varphi(i, j) = \frac{\lVert U^\top V \rVert_F^2}{\min(i, j)} \in [0, 1] $$
#
# It is 1 if the smaller space lies in the larger, and 0 if the two are at right angles.
#
# <details><summary>Why squared?</summary>
#
# A singular vector may come with either sign. Squares do not notice, and they make the overlap the same for every orthonormal
# basis of the same space.
# </details>


# %% nbgrader={"grade": false, "grade_id": "subspace-overlap", "locked": false, "schema_version": 3, "solution": true, "task": false}
def subspace_overlap(first: Float[Tensor, "features i"], second: Float[Tensor, "features j"]) -> float:
    """Return the overlap of the spaces that two sets of orthonormal columns span (Hu et al. 2022, equation 4)."""
    ### BEGIN SOLUTION
    return (first.T @ second).square().sum().item() / min(first.shape[1], second.shape[1])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-subspace-overlap", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_subspace_overlap(subspace_overlap)

# %% [markdown]
# First the two full fine-tuning runs: the first $i$ directions of one change with the first $j$ of the other. An overlap means
# nothing without one to compare with. Two *random* spaces of 576 dimensions have $\varphi = \max(i, j) / 576$ on average, so at
# most 0.06 in this picture.


# %% tags=["experiment"]
def overlap_map(first: Tensor, second: Tensor, rows: int) -> Tensor:
    """Return phi(i, j) for i up to `rows` and j up to the number of columns of `second`."""
    return torch.tensor(
        [[subspace_overlap(first[:, :i], second[:, :j]) for j in range(1, second.shape[1] + 1)] for i in range(1, rows + 1)]
    )


maps = {name.removeprefix("layers.15."): overlap_map(*pair, rows=16) for name, pair in found.directions.items()}
figure = spectra.overlap_maps(
    maps, "Overlap of the change's directions in two runs, layer 15", "j, ranks of run 2", "i, ranks of run 1"
)
plots.show(
    figure, alt="Four maps, bright almost everywhere; a few less bright spots on the diagonal, more of them further down."
)

# %% tags=["experiment"]
torch.manual_seed(0)
random = tuple(torch.linalg.qr(torch.randn(576, 32))[0] for _ in range(2))
pairs = ((1, 1), (1, 8), (4, 4), (8, 8), (8, 32), (32, 32))
print(f"{'phi(i, j)':<20}" + "".join(f"{f'({i}, {j})':>10}" for i, j in pairs))
for name, (first, second) in (found.directions | {"random": random}).items():
    values = [subspace_overlap(first[:, :i], second[:, :j]) for i, j in pairs]
    print(f"{name.removeprefix('layers.15.'):<20}" + "".join(f"{value:>10.3f}" for value in values))

# %% [markdown]
# *What to see.* The strongest direction is nearly the same in both runs, and the first eight of the one are almost all found
# among the first 32 of the other. For `q_proj` the first *four* agree less than the first eight. Its fourth and fifth singular
# values are nearly equal, as the next cell shows, and such directions may change places from run to run. Both runs start from
# the same weights, which makes agreement easier.

# %% tags=["experiment"]
values = found.updates["layers.15.self_attn.q_proj"]
print("singular values of q_proj's change, the largest as 1:", *(f"{value:.2f}" for value in values[:7] / values[0]))

# %% [markdown]
# ### Rank 8 against rank 64
#
# Hu et al. ask the same of LoRA itself: are the directions that rank 8 finds among those of rank 64? Here is a first LoRA, on
# the query and value projections as in their section 7.2. PyTorch's *parametrization* puts $W + 2BA$ wherever the layer uses
# its weight, and autograd does what your `factor_gradients` does. (They compare $A$ alone. It starts at random, and 40 steps
# are few; so we compare the product $BA$, which is what the layer adds.)


# %% tags=["experiment"]
class AddedProduct(nn.Module):
    """W + 2 B A in the place of W. (Unit 08 builds a LoRA that does not make the whole matrix.)"""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.B @ self.A


# %% tags=["experiment"]
from safetensors.torch import save_file
from torch.nn.utils.parametrize import register_parametrization

TARGETS = ("q_proj", "v_proj")


def products_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the product of the factors beside each weight, by the weight's name."""
    return {
        name.removeprefix("model.").split(".parametrizations")[0]: (module.B @ module.A).detach().cpu()
        for name, module in model.named_modules()
        if isinstance(module, AddedProduct)
    }


# %% tags=["experiment"]
def lora_directions(rank: int) -> dict[str, Tensor]:
    """Fine-tune with factors of this rank; return the right singular vectors of two of their products."""
    torch.manual_seed(rank)
    model, tokenizer = load_smollm2()
    model.requires_grad_(False)
    for linear in [module for name, module in model.named_modules() if name.endswith(TARGETS)]:
        register_parametrization(linear, "weight", AddedProduct(linear.weight, rank))
    fine_tune(
        model, tokenizer, tasks.movie_reviews(tokenizer), unit=UNIT, method="lora",
        save=lambda path: save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, path),
        steps=40, learning_rate=5e-4, rank=rank, alpha=2.0 * rank, target_modules=list(TARGETS),
    )  # fmt: skip
    products = products_of(model)
    return {name: directions(products[name], rank) for name in MIDDLE if name in products}


# %% tags=["experiment"]
if measure_here:
    eight, sixty_four = lora_directions(8), lora_directions(64)
    found.lora_directions = {name: (eight[name], sixty_four[name]) for name in eight}
    spectra.save(found, UNIT)

# %% tags=["experiment"]
maps = {name.removeprefix("layers.15."): overlap_map(*pair, rows=8) for name, pair in found.lora_directions.items()}
figure = spectra.overlap_maps(maps, "Directions of LoRA's B A, layer 15", "j, of rank 64", "i, of rank 8")
plots.show(figure, alt="Two dark maps; the top row, for the first direction of rank 8, is a little brighter than the others.")
for name, values in maps.items():
    print(
        f"{name:<18}" + ", ".join(f"phi({i}, {j}) = {values[i - 1, j - 1]:.2f}" for i, j in ((1, 1), (1, 64), (8, 8), (8, 64)))
    )
print(f"{'random spaces':<18}phi(1, 1) = {1 / 576:.2f}, phi(1, 64) = phi(8, 64) = {64 / 576:.2f}, phi(8, 8) = {8 / 576:.2f}")

# %% tags=["experiment"]
own = [row for row in results.load(UNIT) if not row.short]  # rows of a short run mean nothing
for row in own or results.load(UNIT, results.SHIPPED):
    chosen = f"rank {row.settings['rank']}" if row.method == "lora" else f"seed {row.settings['seed']}"
    print(f"{row.method:<5}{chosen:<8}{row.trainable_parameters:>12,} trained, {row.score_before:.1%} -> {row.score_after:.1%}")

# %% [markdown]
# *What to see.* Far less agreement than between the two full runs. The first direction is no accident: an overlap of over 0.2,
# a hundred times that of random ones. But of all eight together hardly more lies in rank 64's space than chance would put
# there. Hu et al. find the same on GPT-3, with larger numbers: one direction shared (overlap above 0.5), the others not. A
# reason for ours being small: every row of $BA$ is a combination of $A$'s rows, which start at random, and in 40 steps they do
# not turn far.
#
# Nor do these two runs reach the score of the full ones. That is no verdict on LoRA: two kinds of matrices, one untuned
# learning rate. It does show the difference between a low rank that *exists* (section 6) and one that training has *found*.
# Unit 08 adapts all seven kinds.

# %% [markdown]
# ## 8. The same thing in peft
#
# peft can *start* LoRA from a truncated SVD of the weight: `init_lora_weights="pissa"` (Meng et al. 2024). Its factors must be
# yours. The base keeps the rest, so that nothing changes at the start.

# %% tags=["experiment"]
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(48, 36, bias=False))
weight = network[0].weight.detach().clone()
adapted = get_peft_model(network, LoraConfig(r=6, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa"))
layer = adapted.base_model.model[0]
peft_product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
peft_norms = [factor["default"].weight.norm().item() for factor in (layer.lora_B, layer.lora_A)]

# %% tags=["experiment"]
B, A = truncated_svd(weight, 6)
print(f"largest difference of the products: {(B @ A - peft_product).abs().max():.1e}")
print(f"norms of B and A: {B.norm():.4f}, {A.norm():.4f} here, {peft_norms[0]:.4f}, {peft_norms[1]:.4f} in peft")
assert torch.allclose(B @ A, peft_product, atol=1e-5), "your factors and peft's have different products"
assert torch.allclose(layer.base_layer.weight, weight - B @ A, atol=1e-5), "peft's base should hold what the factors leave out"

# %% [markdown]
# ## 9. Bug hunt  ·  1 point, about 8 minutes, ●○○
#
# *After peft issues 1155 and 3004.* Someone has two adapters for one layer, $B_1 A_1$ for one task and $B_2 A_2$ for another.
# They want $w_1 B_1 A_1 + w_2 B_2 A_2$ as *one* pair of factors, and write what seems to say just that:


# %%
def add_products_with_a_bug(first, second, weights):
    """Add two products of factors, weighted."""
    (B1, A1), (B2, A2) = first, second
    w1, w2 = weights
    return w1 * B1 + w2 * B2, A1 + A2


# %%
torch.manual_seed(0)
first, second = [(torch.randn(24, 4), torch.randn(4, 32)) for _ in range(2)]
for weights in ((1.0, 0.0), (1.0, 1.0), (1.0, -1.0)):
    wanted = weights[0] * first[0] @ first[1] + weights[1] * second[0] @ second[1]
    B, A = add_products_with_a_bug(first, second, weights)
    print(f"weights {weights}: the product is off by {(B @ A - wanted).norm() / wanted.norm():.0%} of what was wanted")

# %% [markdown]
# Even with a weight of zero the second adapter gets in. Multiply the brackets out to see what else the product holds. Then
# write `add_products`, right for any weights, also negative ones, and for two different ranks. What is the least rank that the
# result needs in general?
#
# <details><summary>How can two products be one?</summary>
#
# Read the first equation of this unit again: a product of factors is a sum over their columns and rows. A sum of two such sums
# has the columns, and the rows, of both.
# </details>


# %% nbgrader={"grade": false, "grade_id": "add-products", "locked": false, "schema_version": 3, "solution": true, "task": false}
def add_products(
    first: tuple[Float[Tensor, "out r1"], Float[Tensor, "r1 in"]],
    second: tuple[Float[Tensor, "out r2"], Float[Tensor, "r2 in"]],
    weights: tuple[float, float],
) -> tuple[Float[Tensor, "out r1+r2"], Float[Tensor, "r1+r2 in"]]:
    """Return factors B and A, of rank r1 + r2, of the weighted sum of two products.

    Args:
        first, second: the factors (B1, A1) and (B2, A2), which are left as they are.
        weights: one number a product, of either sign.
    """
    ### BEGIN SOLUTION
    (B1, A1), (B2, A2) = first, second
    return torch.cat([weights[0] * B1, weights[1] * B2], dim=1), torch.cat([A1, A2], dim=0)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-add-products", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_add_products(add_products)

# %% [markdown]
# The price is the rank: it adds up with every adapter. `truncated_svd` brings it down again, at an error which
# `truncation_error` knows beforehand. In peft these are the combination types `cat` and `svd`; `linear` still adds the factors,
# multiplied by the roots of the weights.

# %%
B, A = add_products(first, second, (1.0, -1.0))
values = torch.linalg.svdvals(B @ A)
print(
    f"the sum has rank {torch.linalg.matrix_rank(B @ A)}; cut to 4, it is off by {truncation_error(values, 4) / values.norm():.0%}"
)

# %% [markdown]
# ## 10. In your own words  ·  2 points, marked by hand
#
# A colleague writes: "LoRA works because fine-tuning updates have low rank. I computed the effective rank of ours, it is in the
# hundreds, so rank 8 cannot work for us."
#
# In about 120 words: what is wrong with the conclusion, and what in the first sentence needs care? Use at least two of your
# measurements of section 6. Which measurement would you ask for before choosing a rank, and why that one?

# %% [markdown] nbgrader={"grade": true, "grade_id": "colleague", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: the counts.* The effective rank is dominated by the tail of small singular values, while the energy rank
# and the stable rank of the same change are small; two figures from section 6 are quoted, with what they count. Care with the
# first sentence: *some* updates have a low rank by *some* count; a small task here, larger ones in Biderman et al. *1 point:
# what to ask for.* The score (or the loss) with the change cut to each rank, because the task decides whether the tail matters;
# or simply a run with LoRA at two ranks. Half points for a measurement without a reason.
#
# **A full answer.** In our update of q_proj in layer 15 six ranks hold 90% of the energy although the effective rank is 128:
# the latter counts a long tail of small values, each of which does next to nothing. When I kept one rank a matrix, the model
# already had about three quarters of its gain. So a high effective rank does not rule rank 8 out. But "updates have low rank"
# is too strong: the exact rank is full, we looked at a small task with two answers, and Biderman et al. find high ranks after
# training on billions of tokens. I would cut the colleague's update to ranks 1, 2, 4, ... and score it on their task, because
# the score is what we care about. If training in full is too expensive, LoRA at ranks 8 and 64 tells whether more rank helps.
#
# **An answer worth one point.** The effective rank is high because of the tail, but 90% of the energy is in few ranks, and the
# stable rank is only 1.6. So rank 8 could work.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# Two factors with an error known beforehand; three counts of rank and the reason why they differ; and a real update in which
# one direction in each matrix brings most of the gain. Unit 08 trains such factors from the start, without ever making the full
# update.
#
# ## Sources
#
# - Eckart and Young (1936), *The approximation of one matrix by another of lower rank*, Psychometrika 1: the theorem of
#   section 2.
# - Roy and Vetterli (2007), *The effective rank: a measure of effective dimensionality*, EUSIPCO: the entropy of section 3.
# - Rudelson and Vershynin (2007), *Sampling from large matrices*, J. ACM 54, arXiv math/0503442: the stable rank, there
#   "numerical rank".
# - Hu et al. (2022), *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685: section 7.2 compares the
#   directions of two ranks and two seeds; equation 4 is the overlap.
# - Aghajanyan et al. (2020), *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*, arXiv
#   2012.13255: why one might expect low rank at all.
# - Biderman et al. (2024), *LoRA Learns Less and Forgets Less*, arXiv 2405.09673: updates of high rank, after much more
#   training than here.
# - Meng et al. (2024), *PiSSA*, arXiv 2404.02948: factors of the weight as a start for LoRA.
# - peft issues [1155](https://github.com/huggingface/peft/issues/1155) and
#   [3004](https://github.com/huggingface/peft/issues/3004): adapters added factor by factor.
# - The text of `movie_reviews`: Hutto and Gilbert (2014), *VADER*, ICWSM; Pang and Lee (2005). The model: Allal et al. (2025),
#   *SmolLM2*, arXiv 2502.02737.
