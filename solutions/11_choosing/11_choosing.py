# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · Choosing: from measurements to a recommendation
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and six of measuring on two CPU cores | 3 of 5 | 20 | 01_why_peft and 08_lora; better all the others, too |
#
# "Which method should I take?" Overviews answer with a table of adjectives and five lines of advice. In this unit you put eight
# methods side by side, on the same two tasks, tuned, with three seeds. You find out how much such rows can tell. Then you write
# the advice down as a program, which gives its reasons and can say no.
#
# **When you have finished, you can**
#
# 1. make one table out of many runs, and say which differences it cannot tell;
# 2. say which methods fit on a given GPU, with which batch, from measured bytes;
# 3. recommend a method with reasons that somebody else can check, and refuse where nothing fits.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it on new random numbers.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from itertools import permutations
from statistics import mean, median, stdev

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograder.checks.choosing import (
    check_broken_rules,
    check_choose_for,
    check_compare,
    check_heaviest_batch,
    check_largest_batch,
    check_merge_rows,
    check_pareto_front,
    check_recommend,
)
from peftlab import comparison, plots, results, settings
from peftlab.jobs import ACCESS, Job, Option, Reason, Recommendation, Refusal
from peftlab.comparison import chosen_rate, machine
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, rotate
from peftlab.memory import MEBIBYTE, StepMemory, step_table
from peftlab.progress import predict
from peftlab.results import Row
from peftlab.simulate import RANK_BYTES, RECIPES, RankBytes, recipe_with, simulate_training_step, with_factors

GB = 1e9  # as papers count
CARD_GB = 2**30  # as graphics cards are sold: seven percent more

# %% [markdown]
# ## The claim
#
# This is the overview that the course started from. Its second column has numbers, the others have words. It has no row for
# layer freezing, which we add.

# %%
CLAIMED = {  # share trained from, to; memory, quality, speed
    "full": (1.0, 1.0, "Very high", "Best", "Slow"),
    "lora": (1e-3, 1e-2, "Low", "Near-full FT", "Fast"),
    "qlora": (1e-3, 1e-2, "Very low", "Near-LoRA", "Fast"),
    "adapters": (1e-2, 5e-2, "Moderate", "Good", "Moderate"),
    "prefix_tuning": (0.0, 1e-2, "Low", "Good", "Fast"),
    "prompt_tuning": (0.0, 1e-4, "Minimal", "Moderate", "Fastest"),
    "bitfit": (0.0, 1e-3, "Low", "Moderate", "Fast"),
}
METHODS = [*CLAIMED, "layer_freezing"]
for method, (low, high, *words) in CLAIMED.items():
    print(f"{method:<15}{low:>8.2%} to {high:<9.2%}" + "".join(f"{word:<15}" for word in words))

# %% [markdown]
# And its advice, in five lines: *limited GPU memory*: QLoRA. *Best quality*: LoRA with rank 16 to 64, or full fine-tuning.
# *Several tasks*: adapters or LoRA. *Minimal changes*: BitFit or prompt tuning. *API-only access*: prompt tuning.
#
# **Predict.** "Low" memory is LoRA's, "Minimal" is prompt tuning's. How many times as many bytes does a training step of
# LLaMA-7B take with LoRA? And the words for quality put 19 pairs of methods in an order. How many of these pairs will our rows
# confirm, on a task with 480 test rows? Section 8 has the answers.

# %%
my_ratio = predict("LoRA's bytes over prompt tuning's, LLaMA-7B", None)
my_confirmed = predict("pairs of 19 whose order the rows confirm, on movie_reviews", None)

# %% [markdown]
# ## 1. Whose rows?  ·  2 points, about 10 minutes, ●○○
#
# Every experiment of this course has left a row: yours in the `results` folders beside the notebooks, ours in the course. One
# table may hold only rows of one kind, and one lonely row of yours should not replace a sweep of ours. Write `merge_rows`:
#
# 1. A row **counts** if it is no short run (`row.short`), is a method's standard form (`row.settings.get("variant", "")` is
#    empty), and belongs to a task in `standard`. Each setting that `standard[row.task]` names *and the row has* must equal the
#    standard one. A LoRA of rank 16 is another experiment than one of rank 8. Full fine-tuning has no rank, and may stay.
# 2. A **run** is a learning rate and a seed. A **set** holds one person's runs (yours or ours) of one task and method on one
#    machine, whose name is `machine(row)`. If a run was repeated there, the last row given stands for it.
# 3. For each (task, method), take the **largest set**: the one with the most runs. Of equals take yours before ours, and of
#    those the one that comes first.
#
# Return a dict from `(task, method)` to the rows of that set. Where nothing counts, there is no key.
#
# <details><summary>The check says that one machine is taken for another</summary>
#
# `row.hardware` ends in the number of threads. That does not change a score, or bytes.
# </details>


# %% nbgrader={"grade": false, "grade_id": "merge-rows", "locked": false, "schema_version": 3, "solution": true, "task": false}
def merge_rows(
    own: Sequence[Row], shipped: Sequence[Row], standard: Mapping[str, Mapping]
) -> dict[tuple[str, str], Sequence[Row]]:
    """Return the rows that may stand in one table, by (task, method).

    Args:
        own: this reader's rows.
        shipped: those that come with the course.
        standard: for each task that is compared, the settings that its rows must have, such as {"steps": 40, "rank": 8}.
    """
    ### BEGIN SOLUTION
    sets: dict[tuple[str, str], dict[tuple, dict[tuple, Row]]] = {}
    for whose, rows in enumerate((own, shipped)):
        for row in rows:
            wanted = standard.get(row.task)
            if row.short or row.settings.get("variant") or wanted is None:
                continue
            if any(row.settings.get(name, value) != value for name, value in wanted.items()):
                continue
            run = row.settings["learning_rate"], row.settings["seed"]
            sets.setdefault((row.task, row.method), {}).setdefault((whose, machine(row)), {})[run] = row
    return {key: list(max(of_key.values(), key=len).values()) for key, of_key in sets.items()}
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-merge-rows", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_merge_rows(merge_rows)

# %% [markdown]
# Now with real rows. Both tasks were trained in one way by every method, and these are the sizes of the standard forms:

# %%
SIZES = {"rank": 8, "layers": 4, "tokens": 16, "bottleneck": 16}
STANDARD = {
    "movie_reviews": {"steps": 40, "batch_size": 16} | SIZES,
    "tool_calls": {"steps": 60, "batch_size": 8} | SIZES,
}
# A step on a GPU has other bytes than the shipped rows, which are from CPUs: such rows of yours would not fit into this table.
own = [row for row in comparison.own_rows() if row.on_cpu]
shipped = results.load("comparison", results.SHIPPED)
sets = merge_rows(own, shipped, STANDARD)
print(f"{len(own)} rows of yours, {len(shipped)} shipped, {sum(map(len, sets.values()))} of them used")
for task in STANDARD:
    for method in METHODS:
        rows = sets.get((task, method), [])
        origin = "not measured yet" if not rows else "yours" if rows[0] in own else "shipped"
        print(f"{task:<15}{method:<15}{len(rows):>3} rows  {origin:<17} {machine(rows[0]) if rows else ''}")

# %% [markdown]
# The last column names the machine: QLoRA's shipped rows come from another processor.
#
# How far does a row hold on another computer? Here are your rows beside ours that were trained alike, and then those of a GPU:

# %%
from peftlab import gpu

pairs = comparison.twins(own, shipped)
print(comparison.twin_table(pairs) or "None of your rows has a twin yet: the experiments of units 03 to 10 leave some.")
print("\nOn a GPU\n")
print(comparison.twin_table(comparison.twins(gpu.rows(), shipped)))

# %% [markdown]
# *What to see.* The number of trained parameters is the same, and the scores are within two points. The peaks are a few percent
# larger, but not QLoRA's, which computed in bf16 on that card. The seconds cannot be compared: other notebooks ran there at the
# same time.
#
# ## 2. Can they be told apart?  ·  3 points, about 15 minutes, ●●●
#
# A method's rows on a task are a sweep: one run for each learning rate, and two more seeds at the best. The table takes the
# rate with the lowest late loss, as `chosen_rate` finds it. *Forgetting* is by how much the loss on newspaper sentences rose,
# in nats a token.

# %%
sets = {(task, method): sets[task, method] for task in STANDARD for method in METHODS if (task, method) in sets}
table = {key: comparison.summary(rows) for key, rows in sets.items()}
print(comparison.score_table(sets))
for (task, method), rows in sets.items():
    rates = sorted({row.settings["learning_rate"] for row in rows})
    chosen = table[task, method].learning_rate
    if chosen in (rates[0], rates[-1]):
        print(f"{task}, {method}: the chosen rate is the lowest or the highest that was tried; nobody knows what lies beyond")
    for rate in set(rates) - {chosen}:
        scores = [row.score_after for row in rows if row.settings["learning_rate"] == rate]
        if len(scores) > 1:
            print(f"{task}, {method}, at a rate of {rate:g} instead: {', '.join(f'{score:.1%}' for score in scores)}")

# %% [markdown]
# *What to see.* On reviews one seed of LoRA at the rate of 0.003 ends at 61%, the other two above 90%. A single lucky seed can
# choose a rate.
#
# On tool calls LoRA's mean is above full fine-tuning's, with every seed. Is LoRA better? Write `compare`, which says so only if
# two kinds of chance cannot explain the difference:
#
# - **The seed.** It decides in which order a run sees its rows, with every method alike. So compare runs *with the same seed*,
#   at each method's `chosen_rate`. With $n$ seeds that both have there, and differences $d_i$ (the first method's score minus
#   the second's), the mean $\bar d$ has the standard error $\operatorname{stdev}(d) / \sqrt{n}$.
# - **The test rows.** All runs are scored on the same `test_rows` rows, and others would give other scores. With each method's
#   mean score $p$ over these seeds, this part is $\sqrt{(p_1 (1 - p_1) + p_2 (1 - p_2)) / \text{test rows}}$.
#
# Take the two as independent: the square of the whole error is the sum of their squares. Return a dict:
#
# | key | value |
# |---|---|
# | `"seeds"` | how many seeds both methods have |
# | `"difference"` | $\bar d$; `None` without such a seed |
# | `"error"` | the standard error; `None` with fewer than two seeds |
# | `"verdict"` | `"first"` or `"second"`, whichever is better by more than two errors; else `"cannot tell"` |
#
# A run that diverged counts, with the score that it has.
#
# <details><summary>The check says that runs are paired in the order of the rows</summary>
#
# Make a dict from seed to score for each method.
# </details>
# <details><summary>The check says that the two methods' errors are taken apart from each other</summary>
#
# Take the standard deviation of the differences. What a seed does to both methods cancels.
# </details>
#
# **Predict.** What will the verdict on LoRA and full fine-tuning be, on tool calls?

# %%
my_verdict = predict("the better on tool_calls: LoRA, full fine-tuning or cannot tell", None)


# %% nbgrader={"grade": false, "grade_id": "compare", "locked": false, "schema_version": 3, "solution": true, "task": false}
def compare(first: Sequence[Row], second: Sequence[Row], test_rows: int) -> dict:
    """Return whether the first of two methods is better on a task, as far as its rows can tell.

    Args:
        first: rows of one method, each with another learning rate or another seed.
        second: rows of another method on the same task.
        test_rows: how many rows the scores are shares of.
    """
    ### BEGIN SOLUTION
    scores = []
    for rows in (first, second):
        rate = chosen_rate(rows)
        scores.append({row.settings["seed"]: row.score_after for row in rows if row.settings["learning_rate"] == rate})
    pairs = [(scores[0][seed], scores[1][seed]) for seed in scores[0].keys() & scores[1].keys()]
    found = {"seeds": len(pairs), "difference": None, "error": None, "verdict": "cannot tell"}
    if pairs:
        found["difference"] = mean(one - other for one, other in pairs)
    if len(pairs) > 1:
        of_seeds = stdev(one - other for one, other in pairs) / math.sqrt(len(pairs))
        of_test_rows = math.sqrt(sum(p * (1 - p) for p in map(mean, zip(*pairs))) / test_rows)
        found["error"] = math.hypot(of_seeds, of_test_rows)
        if abs(found["difference"]) > 2 * found["error"]:
            found["verdict"] = "first" if found["difference"] > 0 else "second"
    return found
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-compare", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_compare(compare)

# %% [markdown]
# An example, with two made-up methods of two seeds each, and then every method against full fine-tuning. The last column is the
# number of test rows that it would take to tell such a difference, even if all seeds agreed.

# %%
TEST_ROWS = {"movie_reviews": 480, "tool_calls": 200}
like = shipped[0]


def made_up(method: str, scores: Sequence[float]) -> list[Row]:
    """Return rows with these scores, of the seeds 0, 1 and so on."""
    settings_of = [{"learning_rate": 0.001, "seed": seed} for seed in range(len(scores))]
    return [replace(like, method=method, settings=s, score_after=score) for s, score in zip(settings_of, scores)]


print(compare(made_up("lora", [0.90, 0.80]), made_up("bitfit", [0.85, 0.77]), test_rows=1000))

# %%
verdicts = {}
for task in STANDARD:
    for method in METHODS[1:]:
        if {(task, method), (task, "full")} <= sets.keys():
            found = compare(sets[task, method], sets[task, "full"], TEST_ROWS[task])
            shares_right = table[task, method].score, table[task, "full"].score
            needed = 4 * sum(p * (1 - p) for p in shares_right) / max(abs(shares_right[0] - shares_right[1]), 1e-9) ** 2
            error = "unknown" if found["error"] is None else f"{found['error']:.1%}"
            difference = "unknown" if found["difference"] is None else f"{found['difference']:+.1%}"
            verdict = {"first": "better", "second": "worse"}.get(found["verdict"], found["verdict"])
            print(f"{task:<15}{method:<15}{difference:>8}, error {error:>8}   {verdict:<12}{needed:>12,.0f} test rows")
            verdicts[task, method] = {"better": "LoRA", "worse": "full fine-tuning"}.get(verdict, verdict)
my_verdict.compare(verdicts.get(("tool_calls", "lora")))

# %%
for task in STANDARD:
    measured = [method for method in METHODS if (task, method) in sets]
    print(f"{task}: + if the method of the line is better than that of the column, - if it is worse, ? if the rows cannot tell")
    for method in measured:
        verdicts = [compare(sets[task, method], sets[task, other], TEST_ROWS[task])["verdict"] for other in measured]
        print(f"{method:<15}" + "".join(f"{ {'first': '+', 'second': '-'}.get(said, '?'):>3}" for said in verdicts))

# %% [markdown]
# *What to see.* On reviews 4 of 28 pairs can be told apart, each with prefix tuning in it. On tool calls there are 14, most of
# them with prompt tuning or layer freezing. LoRA's three seeds agree, but 200 test rows are too few for two points, and further
# seeds would not mend that. If the rows held each single answer, one could pair the test rows, too. And two errors is a
# convention. With three seeds a stricter test would ask for more.
#
# ## 3. What nobody beats  ·  2 points, about 10 minutes, ●○○
#
# Some methods are beaten by another: they cost more and bring less. The others are the **Pareto front**. With noise, A is
# *clearly better* than B if its score is higher by more than the larger of their two noises.
#
# Walk through the points from the cheapest to the dearest, at the same cost from the highest score down. A point joins the
# front unless
#
# - something **on the front** costs less, and the point is not clearly better than that; or
# - something on the front costs the same and is clearly better.
#
# A point whose cost or score is NaN was not measured: it is not on the front and beats nothing. Two points of the same cost
# that are not clearly apart may both be on it. The order of what you return does not matter.
#
# Why compare with the front alone? B may be no clear gain over A, and C none over B, while C is clearly better than A. If B,
# which is out, could throw C out, the front would lose a method that is worth its price.
#
# <details><summary>The check says that what is off the front still beats others</summary>
#
# Build the front as a list while you walk, and look at that list only.
# </details>


# %% nbgrader={"grade": false, "grade_id": "pareto-front", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pareto_front(points: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Return the names of the points that nothing on the front beats.

    Args:
        points: cost (to be low), score (to be high) and the score's noise, by name.
    """
    ### BEGIN SOLUTION
    front: list[str] = []
    measured = [name for name, (cost, score, _) in points.items() if not math.isnan(cost + score)]
    for name in sorted(measured, key=lambda name: (points[name][0], -points[name][1])):
        cost, score, noise = points[name]
        rivals = [points[other] for other in front]
        too_dear = any(rival[0] < cost and score - rival[1] <= max(noise, rival[2]) for rival in rivals)
        too_poor = any(rival[0] == cost and rival[1] - score > max(noise, rival[2]) for rival in rivals)
        if not (too_dear or too_poor):
            front.append(name)
    return front
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-pareto-front", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_pareto_front(pareto_front)

# %% [markdown]
# Without noise, a point is on the front if no other is at least as good on both axes and better on one. Written down over all
# pairs, that must give the same names.

# %%
generator = torch.Generator().manual_seed(0)
for _ in range(50):
    pairs = torch.randint(0, 12, (20, 2), generator=generator).tolist()  # few values, so that there are many ties
    textbook = {
        i
        for i, (cost, score) in enumerate(pairs)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in pairs)
    }
    assert textbook == set(pareto_front({i: (float(cost), float(score), 0.0) for i, (cost, score) in enumerate(pairs)}))
print("50 random sets of points, many ties: the same front as by the definition")

# %% [markdown]
# **Predict.** Which methods will be on the front of score against peak memory? And on that of score against trained parameters?
# As noise take two standard errors of a method's mean score.

# %%
# For each a set of names, such as {"lora", "bitfit"}:
my_front_by_memory = predict("on the front by memory", {task: None for task in STANDARD})
my_front_by_parameters = predict("on the front by parameters", {task: None for task in STANDARD})


# %%
def noise(task: str, scores: Sequence[float]) -> float:
    """Return two standard errors of the mean of these scores: of the seeds and of the test rows."""
    p, of_seeds = mean(scores), stdev(scores) ** 2 / len(scores) if len(scores) > 1 else 0.0
    return 2 * math.sqrt(of_seeds + p * (1 - p) / TEST_ROWS[task])


def show_front(task: str, cost: Callable[[str, str], float], xlabel: str) -> set[str]:
    """Draw score against cost for every method that was measured on the task, and return the front."""
    measured = {method: table[task, method] for method in METHODS if (task, method) in table}
    points = {
        method: (cost(task, method), 100 * line.score, 100 * noise(task, line.scores)) for method, line in measured.items()
    }
    front = pareto_front(points)
    figure = plots.pareto(points, front, f"{task}: score against {xlabel}", xlabel, "score (%)")
    plots.show(figure, alt=f"{task}: score against {xlabel}; filled markers are on the front, bars are the noise.")
    return set(front)


# %%
def peak(*key: str) -> float:
    """Return the peak of a step, in MiB, for a task and a method."""
    return table[key].row.memory.peak / MEBIBYTE


my_front_by_memory.compare({task: show_front(task, peak, "peak of a step (MiB)") for task in STANDARD})


# %%
def trained(*key: str) -> int:
    """Return how many parameters are trained, for a task and a method."""
    return table[key].row.trainable_parameters


my_front_by_parameters.compare({task: show_front(task, trained, "trained parameters") for task in STANDARD})

# %% [markdown]
# *What to see.* By memory the front is a single method: layer freezing on reviews, QLoRA on tool calls. It is the cheapest, and
# nothing dearer is *clearly* better. By trained parameters two or three methods are left, and others. "Efficient" always asks:
# in what?
#
# ## 4. All eight in a hundred lines
#
# For *your* model we need the methods on any `Llama`. Here they are, each in its shortest form, with the tensors that your own
# version has. What they start with does not matter for bytes and seconds. LoRA and QLoRA come from `peftlab.simulate`. You need
# not read these cells closely.


# %%
def full(model: Llama) -> None:
    """Train everything."""


def layer_freezing(model: Llama, layers: int = 4) -> None:
    """Train the last layers, and the norm behind them."""
    model.requires_grad_(False)
    model.model.layers[-layers:].requires_grad_(True)
    model.model.norm.requires_grad_(True)


def bitfit(model: Llama) -> None:
    """Train a bias in every linear layer of the decoder; a LLaMA has none, so they start at zero."""
    model.requires_grad_(False)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


# %%
class Prompted(nn.Module):
    """Trained embeddings in front of the text's."""

    def __init__(self, base: nn.Module, tokens: int):
        super().__init__()
        self.base, self.config = base, base.config
        self.soft_prompt = nn.Parameter(base.embed_tokens.weight.new_zeros(tokens, base.config.hidden_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        prompt = self.soft_prompt.expand(input_ids.shape[0], -1, -1)
        hidden = self.base.run_layers(torch.cat([prompt, self.base.embed_tokens(input_ids)], dim=1))
        return hidden[:, self.soft_prompt.shape[0] :]


def prompt_tuning(model: Llama, tokens: int = 16) -> None:
    """Train a soft prompt."""
    model.requires_grad_(False)
    model.model = Prompted(model.model, tokens)


# %%
class PrefixAttention(nn.Module):
    """Attention that also looks at trained keys and values."""

    def __init__(self, attention: nn.Module, tokens: int):
        super().__init__()
        self.attention, shape = attention, (tokens, attention.k_proj.out_features)
        self.keys = nn.Parameter(attention.k_proj.weight.new_zeros(shape))
        self.values = nn.Parameter(attention.k_proj.weight.new_zeros(shape))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        old, batch, seq, tokens = self.attention, x.shape[0], x.shape[1], self.keys.shape[0]
        q, k, v = (p(x).view(batch, seq, -1, old.head_dim).transpose(1, 2) for p in (old.q_proj, old.k_proj, old.v_proj))
        keys, values = (
            # Times one: so the gradient is a tensor of its own, and no window that keeps that of all tokens alive.
            (1.0 * learned).view(1, tokens, -1, old.head_dim).transpose(1, 2).expand(batch, -1, -1, -1)
            for learned in (self.keys, self.values)
        )
        k, v = torch.cat([keys, rotate(k, cos, sin)], dim=2), torch.cat([values, v], dim=2)
        seen = torch.ones(seq, tokens + seq, dtype=torch.bool, device=x.device).tril(tokens)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, attn_mask=seen, enable_gqa=True)
        return old.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))


# %%
def prefix_tuning(model: Llama, tokens: int = 16) -> None:
    """Train keys and values in every layer."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn = PrefixAttention(layer.self_attn, tokens)


# %%
class Adapted(nn.Module):
    """A sub-layer with a bottleneck behind it: h + up(gelu(down(h)))."""

    def __init__(self, sublayer: nn.Module, hidden: int, bottleneck: int):
        super().__init__()
        self.sublayer = sublayer
        self.down, self.up = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = self.sublayer(*inputs)
        return h + self.up(F.gelu(self.down(h)))


def adapters(model: Llama, bottleneck: int = 16) -> None:
    """Train a bottleneck behind each attention and each MLP."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for place in ("self_attn", "mlp"):
            setattr(layer, place, Adapted(getattr(layer, place), model.config.hidden_size, bottleneck))
    model.to(model.lm_head.weight)


# %% [markdown]
# On the device `meta` a model has shapes and no numbers. Count what is trained in the small model, in the sizes of our rows,
# and in LLaMA-7B, there with rank 16. The small model's counts must be those of the rows.

# %%
PREPARE = {
    "full": full, "lora": with_factors, "qlora": partial(with_factors, four_bits=True), "adapters": adapters,
    "prefix_tuning": prefix_tuning, "prompt_tuning": prompt_tuning, "bitfit": bitfit, "layer_freezing": layer_freezing,
}  # fmt: skip


# %%
@cache
def trained_and_all(name: str, prepare: Callable[[Llama], object]) -> tuple[int, int]:
    """Return how many numbers the method trains on this model, and how many parameters the model has without it."""
    with torch.device("meta"):
        model = Llama(PRESETS[name])
        whole = sum(parameter.numel() for parameter in model.parameters())
        prepare(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), whole


# %%
shares = {}
for method, prepare in PREPARE.items():
    small, whole = trained_and_all("SmolLM2-135M", partial(prepare, rank=8) if method.endswith("lora") else prepare)
    large, whole_7b = trained_and_all("LLaMA-7B", prepare)
    shares[method] = small / whole, large / whole_7b, large
    print(f"{method:<15} SmolLM2-135M {small:>12,} {small / whole:>9.4%}    LLaMA-7B {large:>14,} {large / whole_7b:>9.4%}")
    for task in STANDARD:
        if (task, method) in sets:
            assert small == sets[task, method][0].trainable_parameters, f"the row of {method} on {task} trains another number"

# %% [markdown]
# ### The same thing in peft
#
# The library counts alike, where it has the method: on a `transformers` LLaMA-7B, on the same device, by its own code.

# %% tags=["experiment"]
import warnings

from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

in_peft = {
    "lora": LoraConfig(r=16, target_modules=ALL_LINEAR, task_type=TaskType.CAUSAL_LM),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=16, task_type=TaskType.CAUSAL_LM),
    "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=16, task_type=TaskType.CAUSAL_LM),
}
sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
for method, config in in_peft.items():
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        counted, _ = get_peft_model(LlamaForCausalLM(HubConfig(**sizes)), config).get_nb_trainable_parameters()
    print(f"{method:<15} peft trains {counted:>12,} numbers of LLaMA-7B, we {shares[method][2]:>12,}")
    assert counted == shares[method][2]

# %% [markdown]
# ## 5. Measured memory
#
# First the bytes of one training step of SmolLM2-135M, as they stand in the rows, every allocation followed.

# %%
for task in STANDARD:
    steps = {method: sets[task, method][0].memory for method in METHODS if (task, method) in sets}
    if steps:
        figure = plots.memory_bars(steps, f"One training step of SmolLM2-135M on {task}, fp32")
        plots.show(
            figure, alt=f"Stacked bars for {task}: the weights are the same in all; full fine-tuning is the longest by far."
        )

# %% [markdown]
# *What to see.* Where the whole model is not trained, gradients and optimizer state can hardly be seen, except layer
# freezing's. The weights stay. Activations are what differs. On reviews prompt tuning trains 9,216 numbers and its peak, 1,130
# MiB, is above LoRA's 1,084: its 16 tokens pass through every layer together with the text.
#
# Then LLaMA-7B in 16 bits, with fake tensors: batch 1, 512 tokens, rank 16. Gradients and Adam's moments are in bf16 here, as
# the trained weights are. All layers of a method are alike, so two and three of them tell the rest. With layer freezing, what
# is *below* the trained layers adds its weights alone, so a line through five and six layers is exact.


# %%
@cache
def simulated(name: str, method: str, sequence_length: int = 512, checkpointing: bool = False) -> StepMemory:
    """Return the bytes of one training step of a model in bf16, batch 1."""
    config, kept = PRESETS[name], {"sequence_length": sequence_length, "checkpointing": checkpointing}
    if method != "layer_freezing":
        return simulate_training_step(config, PREPARE[method], **kept)
    five, six = (
        astuple(simulate_training_step(replace(config, num_hidden_layers=n), layer_freezing, whole_model=True, **kept))
        for n in (5, 6)
    )
    return StepMemory(*(low + (config.num_hidden_layers - 5) * (high - low) for low, high in zip(five, six)))


# %% tags=["experiment"]
from tqdm.auto import tqdm

steps_7b = {method: simulated("LLaMA-7B", method) for method in tqdm(METHODS, desc="measuring", leave=False)}
print(step_table(steps_7b, "GB", digits=2))

# %% tags=["experiment"]
figure = plots.memory_bars(
    steps_7b, "One training step of LLaMA-7B in bf16, 512 tokens", unit="GB", card=("a GPU of 24 GB", 24 * CARD_GB)
)
plots.show(
    figure, alt="Eight stacked bars: full fine-tuning far beyond 24 GB; QLoRA the shortest; the others close to one another."
)

# %% [markdown]
# *What to see.* All methods that freeze the base in 16 bits pay for its weights, whatever they train beside it. Prompt tuning
# trains sixteen rows of numbers and is hardly cheaper than LoRA: its gradient has to come down through every layer. Layer
# freezing keeps activations for a few layers only, but four layers of this model are an eighth of it, with gradients and two
# moments of their own. QLoRA alone makes the weights smaller.
#
# ## 6. Fit a job to a GPU  ·  2 points, about 10 minutes, ●●○
#
# A card of 24 GB, a model, a recipe: how large may the batch be? `peak(batch)` *measures* a training step, which takes a second
# or two, so ask it seldom: at most $2 \log_2(\text{limit}) + 2$ times. The peak never falls when the batch grows. Write
# `largest_batch`: the largest batch of at most `limit` sequences whose peak is at most `usable` bytes; 0 if not even one fits.
#
# It is tempting to measure two batches and draw a line. Here are three for full fine-tuning of LLaMA-7B. They take more than
# section 5's 54 GB, because this recipe keeps both moments in fp32.

# %% tags=["experiment"]
FULL = RECIPES["bf16, fp32 moments"]
for batch in (1, 2, 16)[: 1 if settings.short() else 3]:
    print(f"{batch:>3} sequences of 512 tokens: peak {FULL.measure(PRESETS['LLaMA-7B'], batch_size=batch).peak / GB:.2f} GB")

# %% [markdown]
# A step's peak is the largest of several moments: in forward, in backward, in the optimizer's step. Each grows along a line of
# its own, or not at all. While the largest one does not grow, two points say nothing of what comes.
#
# <details><summary>The check says that too many measurements are made</summary>
#
# Keep two numbers: a batch that fits and one that does not. Measure halfway between. When they are neighbours you are done.
# </details>
# <details><summary>It is one too many, or too few, at the limit</summary>
#
# Start from `fits = 0` and `too_large = limit + 1`: neither has to be measured.
# </details>


# %% nbgrader={"grade": false, "grade_id": "largest-batch", "locked": false, "schema_version": 3, "solution": true, "task": false}
def largest_batch(peak: Callable[[int], float], usable: float, limit: int) -> int:
    """Return the largest batch, from 0 to `limit`, whose peak is at most `usable` bytes.

    Args:
        peak: measures the bytes of a step with 1 to `limit` sequences; it never falls.
        limit: at least 1.
    """
    ### BEGIN SOLUTION
    fits, too_large = 0, limit + 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak(middle) <= usable:
            fits = middle
        else:
            too_large = middle
    return fits
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-largest-batch", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_largest_batch(largest_batch)

# %% [markdown]
# The driver and CUDA's own code take some of a card before the first tensor, and the allocator cannot use every gap. Hugging
# Face's `accelerate` plans with nine tenths when it places a model, and so do we.

# %%
USABLE = 0.9
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(f"{torch.cuda.get_device_name()}: {total / GB:.2f} GB, of which {free / GB:.2f} GB are free with CUDA started")
else:
    print("no GPU here; the cards below are taken at their makers' word")

# %% [markdown]
# **Predict.** LLaMA-7B with LoRA on 24 GB, sequences of 2,048 tokens, gradient checkpointing: how many fit? And Llama-2-70B
# with QLoRA on 40 GB?

# %%
my_batches = predict("largest batch", {"LLaMA-7B, LoRA, 24 GB": None, "Llama-2-70B, QLoRA, 40 GB": None})


# %% tags=["experiment"]
@cache
def measured_peak(name: str, recipe: str, batch: int) -> int:
    """Return the peak bytes of a step with checkpointing, 2,048 tokens a sequence."""
    return RECIPES[recipe].measure(PRESETS[name], batch_size=batch, sequence_length=2048, checkpointing=True).peak


CARDS, LIMIT = (16, 24, 40, 80), 1 if settings.short() else 8
MODELS = ("LLaMA-7B", "LLaMA-13B", "Llama-2-70B")[: 1 if settings.short() else 3]
print(f"{'largest batch of 2,048 tokens':<34}" + "".join(f"{card:>6} GB" for card in CARDS) + f"   (up to {LIMIT})")
largest = {}
for name in MODELS:
    for recipe in ("LoRA", "QLoRA"):
        batches = [largest_batch(partial(measured_peak, name, recipe), USABLE * card * CARD_GB, LIMIT) for card in CARDS]
        print(f"{name:<14}{recipe:<20}" + "".join(f"{batch or '-':>9}" for batch in batches), flush=True)
        largest |= {f"{name}, {recipe}, {card} GB": batch for card, batch in zip(CARDS, batches)}
my_batches.compare({job: largest.get(job) for job in my_batches.guess})

# %% [markdown]
# *What to see.* A dash is a job that does not fit at all. On the cards of 16, 24 and 80 GB QLoRA trains a larger model than
# LoRA does. On 40 GB Llama-2-70B misses, with a single sequence.
#
# ### What one more rank costs
#
# "LoRA, rank 16 to 64" says the overview. Here is the difference between the steps at two ranks, divided by the ranks between
# them.

# %% tags=["experiment"]
for low, high in ((1, 4), (4, 16)):
    steps = [vars(recipe_with("LoRA", rank).measure(PRESETS["LLaMA-7B"])) for rank in (low, high)]
    each = {name: (steps[1][name] - steps[0][name]) / (high - low) / 1e6 for name in steps[0]}
    print(
        f"from rank {low:>2} to {high:>2}: "
        + ", ".join(f"{name} {size:.2f}" for name, size in each.items())
        + " MB for one more"
    )
print(f"for comparison: LLaMA-7B with LoRA peaks at {steps_7b['lora'].peak / 1e6:,.0f} MB")

# %% [markdown]
# *What to see.* A rank always costs the same, and next to the weights that is little. What it *brings* is another question: in
# unit 08 the usual experiment measured the size of the step, not the rank. Hu et al. (2022, table 6) find for GPT-3 with $W_q$
# and $W_v$ adapted 73.4, 73.3, 73.7, 73.8 and 73.5 percent on WikiSQL at ranks 1, 2, 4, 8 and 64.
#
# ## 7. Speed, measured by turns  ·  optional, about 10 minutes
#
# *Run these cells in any case: sections 8 and 9 use their figures. Reading them is optional.* They take one training step of
# the real SmolLM2-135M with each method, in turn. What counts is the median over the turns of the *ratio* to full fine-tuning
# in the same turn. QLoRA's base is bitsandbytes' here, because the layer of `peftlab.simulate` computes nothing. The second
# column is a forward pass of a single token, as when text is generated, against the plain model's. It takes two minutes.

# %% tags=["experiment"]
from peftlab import tasks
from peftlab.llama import causal_loss
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device, seconds_of, trainable

device = find_device()
_, tokenizer = load_smollm2()
reviews = tasks.movie_reviews(tokenizer)
input_ids, labels = (tensor.to(device) for tensor in tasks.collate(list(reviews.train.select(range(settings.rows(8))))))


# %% tags=["experiment"]
def in_four_bits(model: Llama) -> None:
    """Replace the base's linear layers by bitsandbytes' NF4 layers, with factors beside them."""
    import bitsandbytes as bnb

    with_factors(model, rank=8)
    for module in model.model.layers.modules():
        if hasattr(module, "lora_A"):
            weight = module.base.weight
            packed = bnb.nn.Linear4bit(
                weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=weight.dtype
            )
            packed.weight = bnb.nn.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False  # it would repack the weight and lose the gradient
            module.base = packed


# %% tags=["experiment"]
def speed_of(method: str, plain: Llama) -> tuple[float, float]:
    """Return the seconds of a training step, and how much longer than the plain model's one token's forward pass takes."""
    model, _ = load_smollm2()
    {"lora": partial(with_factors, rank=8), "qlora": in_four_bits}.get(method, PREPARE[method])(model)
    model.to(device)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.0)

    def step() -> None:
        causal_loss(model, input_ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one allocates the optimizer's state
    taken, token = median(seconds_of(step, device) for _ in range(settings.steps(3))), input_ids[:1, :1]

    def read_by(reader: Llama) -> float:
        return seconds_of(lambda: reader.model(token), device)

    with torch.inference_mode():
        pairs = [(read_by(model), read_by(plain)) for _ in range(settings.steps(20))]
    return taken, median(changed / unchanged for changed, unchanged in pairs)


# %% tags=["experiment"]
plain = load_smollm2()[0].to(device)
turns: list[dict[str, tuple[float, float]]] = []
for _ in tqdm(range(1 if settings.short() else 3), desc="turns", leave=False):
    turns.append({method: speed_of(method, plain) for method in METHODS})
step_ratio = {method: median(turn[method][0] / turn["full"][0] for turn in turns) for method in METHODS}
token_ratio = {method: median(turn[method][1] for turn in turns) for method in METHODS}
# Measured without a cache, in which the soft prompt is read again for each token. With one, a soft prompt is what a prefix is:
# the keys and values of 16 more tokens.
token_ratio["prompt_tuning"] = token_ratio["prefix_tuning"]

# %% tags=["experiment"]
for method in METHODS:
    apart = [turn[method][0] / turn["full"][0] for turn in turns]
    print(
        f"{method:<15} a step takes {step_ratio[method]:.2f} of full fine-tuning's ({min(apart):.2f} to {max(apart):.2f}), "
        f"a token {token_ratio[method]:.2f} of the plain model's"
    )
plain_models = ("full", "layer_freezing")  # their tokens take what the plain model's take, so what is measured is the error
latency_error = max(abs(token_ratio[method] - 1) for method in plain_models)
print(f"two plain models differ from a third by up to {latency_error:.0%}: less than that is no latency")

# %% [markdown]
# *What to see.* A step of full fine-tuning does four things: forward; the gradient's way down; the products that make gradients
# of weights; and the optimizer's pass over all weights and moments. Freezing saves most of the last two. Where the gradient's
# way is short, as in layer freezing, there is more to save. With 4-bit weights each use begins with unpacking them (qlora issue
# 107). In the second column LoRA stands unmerged. QLoRA's figure there is bitsandbytes' *on this computer*: from a CPU it says
# nothing about a GPU.
#
# ## 8. The overview beside the measurements
#
# First the columns with a number or a word for the cost.

# %% tags=["experiment"]
print(f"{'':<15}{'share claimed':<18}{'of 135M':>9}{'of 7B':>10}   {'memory':<11}{'peak, GB':>9}   {'speed':<10}{'of full':>8}")
for method, (low, high, memory, _, speed) in CLAIMED.items():
    small, large, _ = shares[method]
    print(
        f"{method:<15}{f'{low:.2%} to {high:.2%}':<18}{small:>9.3%}{large:>10.4%}   {memory:<11}{steps_7b[method].peak / GB:>9.1f}"
        f"   {speed:<10}{step_ratio[method]:>8.2f}"
    )
ratios = {other: steps_7b["lora"].peak / steps_7b[other].peak for other in ("prompt_tuning", "qlora")}
print(f"LoRA ('Low') takes {ratios['prompt_tuning']:.2f} times what prompt tuning ('Minimal') takes,")
print(f"and {ratios['qlora']:.2f} times what QLoRA ('Very low') takes")
my_ratio.compare(ratios["prompt_tuning"])

# %% [markdown]
# Then quality. Of the pairs that the words put in an order, how many do the rows confirm?

# %%
QUALITY = {"Moderate": 0, "Good": 1, "Near-LoRA": 2, "Near-full FT": 3, "Best": 4}
for task in STANDARD:
    ordered = [
        (better, worse)
        for better, worse in permutations(CLAIMED, 2)
        if QUALITY[CLAIMED[better][3]] > QUALITY[CLAIMED[worse][3]] and {(task, better), (task, worse)} <= sets.keys()
    ]
    found = [compare(sets[task, better], sets[task, worse], TEST_ROWS[task])["verdict"] for better, worse in ordered]
    said = ", ".join(
        f"{found.count(verdict)} {words}" for verdict, words in (("first", "confirmed"), ("second", "contradicted"))
    )
    print(f"{task}: {len(found)} pairs, {said}, {found.count('cannot tell')} cannot be told")
    if task == "movie_reviews":
        my_confirmed.compare(found.count("first"))

# %% [markdown]
# *What to see.* The words contradict no quality that we can tell, and that is worth little: an adjective never says how much.
#
# - **Share.** LoRA's share of a square matrix of width $d$ is $2r/d$: it falls as models widen. And it is the size that you
#   *choose*.
# - **Memory.** "Low" and "Minimal" are a twentieth apart, though LoRA trains six hundred times as many numbers of LLaMA-7B.
#   QLoRA is only "Very low", and takes less than half of "Minimal". What is minimal about prompt tuning is its *file*.
# - **Quality.** Most of the order is neither confirmed nor refuted. What is clear is prompt tuning on tool calls, after 60
#   steps of a small model. Lester et al. (2021) find that it catches up at billions of parameters.
#
# The overview has no column for **forgetting**, though it is a cost, too. Does what trains less forget less?

# %%
for task in STANDARD:
    lines = [(line.forgetting, line.learning_rate, method) for (of, method), line in table.items() if of == task]
    print(f"{task}: " + ", ".join(f"{method} {forgets:+.2f} (rate {rate:g})" for forgets, rate, method in sorted(lines)))

# %% [markdown]
# *What to see.* If it went by what is trained, full fine-tuning would stand last. Instead adapters on reviews and prefix tuning
# on tool calls lose about four nats a token. Biderman et al. (2024) find for long training that LoRA forgets less. Our learning
# rates were chosen for the task alone.
#
# ## 9. The advice, as a program
#
# Five lines of advice cannot say what happens when two of them meet: little memory *and* forty tasks. A program has to, and it
# can be tested. A **job** says what is there and what is demanded. An **option** is a method with its figures for one model
# (`peftlab.jobs`):
#
# | `Job` | | `Option` | |
# |---|---|---|---|
# | `gpu_bytes` | memory that may be used | `peak_bytes` | of a training step |
# | `access` | how far the model can be reached | `access` | what it must reach |
# | `tasks` | served from one GPU at once | `base_bytes`, `task_bytes` | weights that all tasks share; for each task |
# | `quality` | least share of full fine-tuning's score | `quality`, `spread` | share of full fine-tuning's score, or None; two standard errors |
# | `latency` | most that may be added to a forward pass | `latency`, `mergeable` | added if not merged; whether it can be merged |
# | `prefer`, `wish` | what to optimize; a method insisted on | `method` | its name |
#
# `ACCESS` is `("text", "embeddings", "weights")`, from least to most. The overview says: "API-only access: prompt tuning (no
# weight access needed)". That holds for an API that takes *embeddings* and returns their *gradients*. Through one that takes
# text, nothing can be trained: a soft prompt is no text.
#
# For the tests we replace the adjectives by numbers. The peaks are those of section 5, rounded. The rest is made up.

# %%
PEAK_7B = dict(full=54.4, lora=16.7, qlora=7.1, adapters=16.1, prefix_tuning=15.9, prompt_tuning=15.9, bitfit=15.8)
SCORE = {"Best": 1.0, "Near-full FT": 0.995, "Near-LoRA": 0.97, "Good": 0.96, "Moderate": 0.92}
FILE_MB = {"full": 13_480, "lora": 80, "qlora": 80, "adapters": 17, "prefix_tuning": 8, "prompt_tuning": 0.13, "bitfit": 2.7}
ADDED = {"full": 0.0, "lora": 0.2, "qlora": 0.5, "adapters": 0.2, "prefix_tuning": 0.05, "prompt_tuning": 0.05, "bitfit": 0.05}
GUIDE = [
    Option(
        method, "embeddings" if method == "prompt_tuning" else "weights", PEAK_7B[method] * GB,
        {"full": 0.0, "qlora": 3.9 * GB}.get(method, 13.5 * GB), FILE_MB[method] * 1e6,
        SCORE[CLAIMED[method][3]], 0.0 if method == "full" else 0.01, ADDED[method], method in ("full", "lora"),
    )
    for method in CLAIMED
]  # fmt: skip

# %% [markdown]
# What should the program say? The last entry of a scenario is the method, or what comes nearest where the job is refused.

# %%
REFUSED = "refused; nearest: "
SCENARIOS = [
    ("limited memory: a card of 12 GB", Job(12 * GB), "qlora"),
    ("best quality, a card of 80 GB", Job(80 * GB), "lora"),
    ("20 tasks at once, nearly full quality", Job(40 * GB, tasks=20, quality=0.97), "lora"),
    ("as few bytes a task as can be", Job(24 * GB, prefer="file"), "prompt_tuning"),
    ("an API for embeddings and gradients", Job(0, access="embeddings"), "prompt_tuning"),
    ("one task, nothing added at inference", Job(24 * GB, latency=0.0), "lora"),
    ("it just fits", Job(7.1 * GB), "qlora"),
    ("it does not quite fit", Job(7.1 * GB - 1), REFUSED + "None"),
    ("full fine-tuning, please, on 24 GB", Job(24 * GB, wish="full"), REFUSED + "lora"),
    ("full quality on 12 GB", Job(12 * GB, quality=1.0), REFUSED + "qlora"),
    ("QLoRA, please, through the API", Job(0, access="embeddings", wish="qlora"), REFUSED + "prompt_tuning"),
    ("the API, and nothing added", Job(0, access="embeddings", latency=0.0), REFUSED + "prompt_tuning"),
    ("20 tasks at once, and nothing added", Job(80 * GB, tasks=20, latency=0.0), REFUSED + "lora"),
    ("an API for text", Job(80 * GB, access="text"), REFUSED + "None"),
]


def outcome(answer: Recommendation | Refusal) -> str:
    """Return the answer as the scenarios write it."""
    return answer.method if isinstance(answer, Recommendation) else f"{REFUSED}{answer.nearest}"


# %% [markdown]
# ### The rules  ·  2 points, about 10 minutes, ●○○
#
# `broken_rules` returns a `Reason(rule, figure, limit)` for **every** rule that an option breaks, in this order:
#
# | rule | is broken if | figure | limit |
# |---|---|---|---|
# | `"wish"` | the job wishes for a method, and this is another | the option's method | the wish |
# | `"access"` | the option must reach further than the job can | the option's access | the job's access |
# | `"training memory"` | the peak is more than the job's bytes | the peak | the job's bytes |
# | `"serving memory"` | the base and all tasks' bytes are more than the job's | their sum | the job's bytes |
# | `"latency"` | more is added than the job allows | what is added | what is allowed |
# | `"quality"` | something is demanded, and the quality is not known, or *less its spread* it is below the demand | the quality | the demand |
#
# - The two memory rules hold only for a job with access to the weights. Otherwise the model runs on somebody else's computer.
# - What can be merged adds nothing, *if there is one task*. One copy of the weights cannot hold two merged tasks.
# - What just fits, fits. A `quality` of 0 demands nothing.
#
# Why less its spread? A demand is a promise. If the spread counted *for* a method, a noisier one would meet a higher demand.
#
# <details><summary>The check says that prompt tuning is refused where weights can be reached</summary>
#
# A job that reaches the weights also reaches the embeddings. Compare places in `ACCESS`, with `ACCESS.index`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "broken-rules", "locked": false, "schema_version": 3, "solution": true, "task": false}
def broken_rules(option: Option, job: Job) -> list[Reason]:
    """Return a reason for every rule that the option breaks in this job, in the order of the table."""
    ### BEGIN SOLUTION
    serving = option.base_bytes + job.tasks * option.task_bytes
    merged = option.mergeable and job.tasks == 1
    added = 0.0 if merged else option.latency
    here = job.access == "weights"
    too_poor = option.quality is None or option.quality - option.spread < job.quality
    checked = [
        (job.wish not in (None, option.method), Reason("wish", option.method, job.wish)),
        (ACCESS.index(option.access) > ACCESS.index(job.access), Reason("access", option.access, job.access)),
        (here and option.peak_bytes > job.gpu_bytes, Reason("training memory", option.peak_bytes, job.gpu_bytes)),
        (here and serving > job.gpu_bytes, Reason("serving memory", serving, job.gpu_bytes)),
        (added > job.latency, Reason("latency", added, job.latency)),
        (job.quality > 0 and too_poor, Reason("quality", option.quality, job.quality)),
    ]
    return [reason for broken, reason in checked if broken]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-broken-rules", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_broken_rules(broken_rules)

# %% [markdown]
# ### The recommendation  ·  3 points, about 15 minutes, ●●○
#
# `recommend(job, options, broken_rules)` gets the rules as an argument, so that others can be tried. It works with any, and
# leaves `options` as they are.
#
# **If some options break no rule,** choose among them and return `Recommendation(method, rejected)`:
#
# - `prefer="memory"`: the smallest `peak_bytes`. `prefer="file"`: the smallest `task_bytes`.
# - `prefer="quality"`: look at those whose quality is measured. Take the best and all that are *not clearly below* it, by no
#   more than the larger of the two spreads. Of these take the smallest `peak_bytes`. If no quality is measured, take the
#   smallest `peak_bytes` of all.
# - Of equals, the first given.
#
# **If none is left,** return `Refusal(rejected, nearest, given_up)`. Take back the demands that the job made, one after the
# other and for good: first the wish (`None`), then latency (`math.inf`), then quality (`0.0`). As soon as something is
# possible, choose as above: that is `nearest`. `given_up` holds the names of what was taken back, such as `("wish",
# "latency")`. If nothing is possible even then, `nearest` is `None`. This order is ours; another may give up less.
#
# In both cases `rejected` maps each method that is out of the job *as it was asked* to the first reason that the rules give.
#
# **An example.** Somebody insists on full fine-tuning, on 24 GB. The wish rejects all other methods, and memory rejects full
# fine-tuning. Without the wish, LoRA is possible. The cell below the hints prints that answer.
#
# <details><summary>How do I change a job? It is frozen.</summary>
#
# `replace(job, wish=None)` makes another one.
# </details>
# <details><summary>The check says that demands are given up that nobody had made</summary>
#
# A job whose `latency` is `math.inf` demands nothing of it. Skip it.
# </details>

# %%
insisting = Job(24 * GB, wish="full")
print(Refusal({option.method: broken_rules(option, insisting)[0] for option in GUIDE[:3]}, nearest="lora", given_up=("wish",)))


# %% nbgrader={"grade": false, "grade_id": "recommend", "locked": false, "schema_version": 3, "solution": true, "task": false}
def recommend(
    job: Job, options: Sequence[Option], broken_rules: Callable[[Option, Job], Sequence[Reason]]
) -> Recommendation | Refusal:
    """Return the method to take, or why there is none, and what comes nearest."""
    ### BEGIN SOLUTION
    reasons = {option.method: broken_rules(option, job) for option in options}
    rejected = {method: broken[0] for method, broken in reasons.items() if broken}
    demands, given_up = job, ()
    for demand, nothing in ((None, None), ("wish", None), ("latency", math.inf), ("quality", 0.0)):
        if demand and getattr(job, demand) != nothing:
            demands, given_up = replace(demands, **{demand: nothing}), (*given_up, demand)
        possible = [option for option in options if not broken_rules(option, demands)]
        if possible and not given_up:
            return Recommendation(best_of(possible, job.prefer).method, rejected)
        if possible:
            return Refusal(rejected, best_of(possible, job.prefer).method, given_up)
    return Refusal(rejected, None, given_up)


def best_of(possible: Sequence[Option], prefer: str) -> Option:
    """Return the option to take of those that break no rule."""
    measured = [option for option in possible if option.quality is not None]
    if prefer == "quality" and measured:
        best = max(measured, key=lambda option: option.quality)
        possible = [option for option in measured if best.quality - option.quality <= max(best.spread, option.spread)]
    return min(possible, key=lambda option: option.task_bytes if prefer == "file" else option.peak_bytes)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-recommend", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_recommend(recommend)

# %% [markdown]
# The scenarios, then, which were written before the program:

# %%
for situation, job, expected in SCENARIOS:
    answer = outcome(recommend(job, GUIDE, broken_rules))
    print(f"{situation:<40} {answer}")
    assert answer == expected, f"expected {expected}"

# %% [markdown]
# ### The same, on measured evidence
#
# Bytes are those of section 5, latency that of section 7 where it exceeds the error measured there. Quality is the mean over
# the tasks of a method's score as a share of full fine-tuning's, and its spread is two of your `compare`'s errors. Bytes are
# LLaMA-7B's at rank 16, scores SmolLM2's.


# %%
def quality_of(method: str) -> tuple[float | None, float]:
    """Return the mean of the method's scores as shares of full fine-tuning's, and two standard errors; None if not known."""
    if method == "full":
        return 1.0, 0.0
    differences, errors = [], []
    for task in STANDARD:
        rows, of_full = sets.get((task, method)), sets.get((task, "full"))
        found = compare(rows, of_full, TEST_ROWS[task]) if rows and of_full else {"error": None}
        if found["error"] is None:
            return None, 0.0
        differences.append(found["difference"] / table[task, "full"].score)
        errors.append(2 * found["error"] / table[task, "full"].score)
    return 1 + mean(differences), math.hypot(*errors) / len(errors)


# %% tags=["experiment"]
def options_for(name: str) -> list[Option]:
    """Return all methods with their measured figures for a model, 512 tokens, batch 1, in bf16."""
    options = []
    for method in METHODS:
        step, (trained, whole) = simulated(name, method), trained_and_all(name, PREPARE[method])
        shared = {"full": 0, "qlora": step.parameters - 2 * trained}.get(method, 2 * whole)
        quality, spread = quality_of(method)
        added = token_ratio[method] - 1
        options.append(
            Option(
                method, "embeddings" if method == "prompt_tuning" else "weights", step.peak, shared, 2 * trained,
                quality, spread,
                0.0 if method in plain_models or added <= latency_error else added,
                method in ("full", "lora", "layer_freezing"),
            )
        )  # fmt: skip
    return options


# %% tags=["experiment"]
def show_options(options: Sequence[Option]) -> None:
    """Print the figures of each option."""
    for option in options:
        quality = "not measured yet" if option.quality is None else f"{option.quality:.1%} ± {option.spread:.1%}"
        print(
            f"{option.method:<15} peak {option.peak_bytes / GB:5.1f} GB, base {option.base_bytes / GB:5.1f} GB, "
            f"a task {option.task_bytes / 1e6:>9,.2f} MB, adds {option.latency:4.0%}, quality {quality}"
        )


# %% tags=["experiment"]
measured_7b = options_for("LLaMA-7B")
show_options(measured_7b)

# %% tags=["experiment"]
for situation, job, expected in SCENARIOS:
    answer = outcome(recommend(job, measured_7b, broken_rules))
    print(f"{situation:<40} {answer:<35}" + ("" if answer == expected else f" (the guide: {expected})"))

# %% [markdown]
# *What to see.* Nearly full quality for twenty tasks is refused: LoRA's mean is above full fine-tuning's, but less its spread
# it does not promise 97%. "Best quality" gives QLoRA, because it is not clearly below LoRA and has the smallest peak. If its
# slow token matters, the job has to demand latency. And neither job nor option knows **forgetting**: this program could hand
# out a model that has lost four nats a token. Other answers differ because 7.1 GB was rounded, or because the guide has no
# layer freezing. Here are LLaMA-13B's figures, and the answer to section 12's job:


# %% tags=["experiment"]
def shown(rule: str, value: object) -> str:
    """Return a figure with its unit."""
    if "memory" in rule:
        return f"{value / GB:,.1f} GB"
    return f"{value:.1%}" if isinstance(value, int | float) else str(value)


def explain(job: Job, options: Sequence[Option]) -> None:
    """Print the answer and its reasons."""
    answer = recommend(job, options, broken_rules)
    print(outcome(answer))
    if isinstance(answer, Refusal) and answer.given_up:
        print(f"  for that, give up: {', '.join(answer.given_up)}")
    for method, (rule, figure, limit) in answer.rejected.items():
        print(f"  {method:<15}{rule}: {shown(rule, figure)}, where the job has {shown(rule, limit)}")


measured_13b = options_for("LLaMA-7B" if settings.short() else "LLaMA-13B")
show_options(measured_13b)
explain(Job(USABLE * 24 * CARD_GB, tasks=12, latency=0.1), measured_13b)

# %% [markdown]
# ### More than one GPU
#
# A job on several cards needs no new rule. An option may be a method *on so many cards*: then its bytes are those of one rank,
# and the job's are those of one card. Unit 14 builds such ranks and measures them. These are its rows for Llama-2-70B, with
# full fine-tuning's quality taken from the guide above:

# %%
ranks = results.load_lines(RankBytes, "14_many_gpus", RANK_BYTES, results.SHIPPED)
on_cards = [
    Option(
        f"{row.method.lower()} on {row.world_size}", "weights", row.peak, row.parameters, 0,
        SCORE[CLAIMED[row.method.lower()][3]], 0.0 if row.method == "full" else 0.01, 0.0, row.method != "QLoRA",
    )
    for row in ranks
]  # fmt: skip
for cards in (1, 2, 8):
    possible = [option for option in on_cards if int(option.method.split()[-1]) <= cards]
    for size in (24, 80):
        print(f"70B, {cards:>2} cards of {size} GiB: {outcome(recommend(Job(size * 2**30), possible, broken_rules))}")

# %% [markdown]
# *What to see.* Two cards of 24 GiB train 70B with QLoRA. LoRA on a base in 16 bits needs two cards of 80 GiB, or eight small
# ones. Full fine-tuning would fit eight cards of 80 GiB as well. It is not chosen, because LoRA's quality is not clearly below
# and its peak is smaller. The program does not know what a card costs.

# %% [markdown]
# ## 10. Eight situations  ·  2 points, about 10 minutes, ●●○
#
# Without the program this time. Peaks are in section 5, shares and files in sections 2 and 4, quality in section 9. Which
# method would you take? `full`, `lora`, `qlora`, `adapters`, `prefix_tuning`, `prompt_tuning`, `bitfit`, `layer_freezing`, or
# `none`. In one of them three answers are right.
#
# - **A** LLaMA-13B, whose weights are 26 GB in 16 bits, on one card of 24 GB.
# - **B** Forty customers, each with a task of their own, come in turn and are served from one copy of LLaMA-7B. 72 GB of a card
#   can be used. The mean quality is at least 97% of full fine-tuning's.
# - **C** LLaMA-7B, one task, trained on 512 tokens with 18 GB that can be used. What was learned is merged into the original
#   16-bit weights, outputs stay as trained, and no time is added.
# - **D** A hosted model. Its API takes embeddings, and returns the output and the gradient of the embeddings.
# - **E** A hosted model. Its API takes text and returns text.
# - **F** A model of 135 million parameters is to learn a new language from billions of tokens. There is a card of 80 GB, and
#   one task.
# - **G** Ten thousand users of LLaMA-7B, whose weights are yours, each with a file of at most 200 kB.
# - **H** Long documents. Activations fill the memory, and there is no time for checkpointing. Some quality may be lost.


# %% nbgrader={"grade": false, "grade_id": "choose-for", "locked": false, "schema_version": 3, "solution": true, "task": false}
def choose_for() -> dict[str, str]:
    """Return a method for each of the letters A to H, or "none"."""
    ### BEGIN SOLUTION
    return dict(A="qlora", B="adapters", C="lora", D="prompt_tuning", E="none", F="full", G="prompt_tuning", H="layer_freezing")
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-choose-for", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_choose_for(choose_for)

# %% [markdown]
# ## 11. Bug hunt: out of memory in the middle of the night  ·  1 point, about 5 minutes, ●○○
#
# *After transformers issue 11388.* Somebody measures the first batch, finds room to spare, and goes home. After 5,906 of 30,625
# steps: CUDA out of memory. Nothing leaks. A batch is padded to its longest row, and rows are not equally long:


# %%
def heaviest_batch_with_a_bug(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
    """Return rows and padded length of the batch to plan for."""
    return batch_size, max(lengths[:batch_size])


# %% tags=["experiment"]
lengths = [len(row) for row in reviews.train["input_ids"]]
rows, longest = heaviest_batch_with_a_bug(lengths, 16)
padded = [16 * max(lengths[start : start + 16]) for start in range(0, len(lengths) - 15, 16)]
print(
    f"planned for {rows} x {longest} = {rows * longest:,} tokens; the batches of an epoch have {min(padded):,} to {max(padded):,}"
)

# %% [markdown]
# Write `heaviest_batch`: rows and padded length of the batch with the most tokens, padding included. Rows come in the order
# given. The last batch may be smaller, and counts. Of equals, the first.
#
# <details><summary>I took the longest row</summary>
#
# The longest row may sit in a last batch of one. Rows *times* length.
# </details>


# %% nbgrader={"grade": false, "grade_id": "heaviest-batch", "locked": false, "schema_version": 3, "solution": true, "task": false}
def heaviest_batch(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
    """Return how many rows the batch with the most tokens has, and how long they are with padding.

    Args:
        lengths: of every row, in the order of training; at least one. Left as they are.
    """
    ### BEGIN SOLUTION
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return max(((len(batch), max(batch)) for batch in batches), key=math.prod)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-heaviest-batch", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_heaviest_batch(heaviest_batch)

# %% [markdown]
# ## 12. A design memo  ·  3 points, marked by hand
#
# A network of twelve clinics wants LLaMA-13B to draft discharge letters, each clinic in its own style. Letters have 512 tokens.
# They own one card of 24 GB, for training and for serving. The clinics' requests come in turn, and a tenth more time a token is
# acceptable. Their consultant proposes: "Full fine-tuning is best, so rent eight cards and fine-tune twelve models. Or else
# prompt tuning, which needs minimal memory."
#
# Write the memo that decides it, in about 200 words: what is wrong with either proposal; what you recommend, and on what
# grounds; what you would measure before you sign; and what would change your mind. Use at least three numbers that a cell of
# this notebook printed, and say for each how sure it is. LLaMA-13B's figures, and what the program says, are at the end of
# section 9. Its latency was measured on this computer, not on their card.

# %% [markdown] nbgrader={"grade": true, "grade_id": "memo", "locked": false, "points": 3, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: both proposals are refuted with figures.* Full fine-tuning: twelve copies of 26 GB cannot be served from
# one card, whatever is rented for training. Prompt tuning: its base is 26 GB in 16 bits like everybody's, and does not fit
# either. What is minimal is its file.
#
# *1 point: a recommendation that follows.* A 4-bit base with twelve small adapters beside it, unmerged (QLoRA), because nothing
# else fits 24 GB. The conflict is seen: what QLoRA adds to a token in section 7 is more than the tenth allowed. So the figure
# is measured again on the card, or the demand is given up, or a larger card is bought. "Nothing, until the latency on the card
# is known" is as good, with these figures.
#
# *1 point: how sure.* Measured on which model, task, machine and number of seeds. Bytes are exact. Scores are of a small model
# and two other tasks, and most of their differences cannot be told. Seconds are this computer's. What would be measured first
# (the clinics' own letters, a held-out set, a learning-rate sweep, forgetting, latency on the card) and what would change the
# decision. Half points where figures are missing or are not from the notebook's cells.
#
# **A full answer.** Neither. Twelve fully tuned models are 12 × 26 GB. Our card serves none of them, so renting for training
# solves the wrong half. Prompt tuning peaks at 29.7 GB, hardly below LoRA's 31.0: the frozen base is what costs, and 26 GB of
# it are more than the card has. I recommend QLoRA: it peaks at 12.1 GB, and twelve adapters of rank 16 add 12 × 0.13 GB to a
# base of 7.2. These bytes I trust, because they were counted. Quality I trust less: the rows are SmolLM2's, on film reviews and
# tool calls, three seeds, and they cannot tell QLoRA from LoRA. I would want to see both on letters, after a sweep of learning
# rates. Latency I trust least. My own measurement says that unpacking adds far more than a tenth to a token, on a CPU. So
# before signing I would time one layer on the card itself. If a token is too slow there, the demands contradict each other.
# Then the clinics must choose: a larger card, on which LoRA in 16 bits runs unmerged and still adds something, or 7B instead of
# 13B, or patience. A style that differs little between clinics would change my mind, too: then one merged adapter serves all.
#
# **An answer worth one and a half points.** Full fine-tuning of 13B needs more than 100 GB and twelve models are too many for
# one card. I would use QLoRA since it has the lowest peak in the table (7 GB for 7B, so about twice that), with one adapter for
# each clinic. Prompt tuning is not as good. I would check that the quality is good enough, because the tasks here were other
# ones. If they had a bigger card I would use LoRA.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A table that says which of its differences it can tell, and a program that recommends, gives its reasons and can say no. Take
# it with you, and replace its evidence by your own.
#
# And your own record: which checks have passed, what you guessed, and what was measured.

# %%
from peftlab import progress

progress.show()

# %% [markdown]
# ## Sources
#
# - huggingface/peft, `method_comparison`: one configuration, one result file, a Pareto picture.
# - Dodge et al. (2019), *Show Your Work: Improved Reporting of Experimental Results*, arXiv 1909.03004: how tuning decides
#   comparisons.
# - Hu et al. (2022), *LoRA*, arXiv 2106.09685, table 6.
# - Lester et al. (2021), *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv 2104.08691, figure 1.
# - Biderman et al. (2024), *LoRA Learns Less and Forgets Less*, arXiv 2405.09673.
# - [transformers issue 11388](https://github.com/huggingface/transformers/issues/11388), [qlora issue
#   107](https://github.com/artidoro/qlora/issues/107).
