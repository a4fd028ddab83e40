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
# | 150, and six of measuring on two CPU cores | 3 of 5 | 20 | 01_why_peft and 08_lora; better all the others, too |
#
# "Which method should I take?" You have built most of the eight that follow, and seen each at its best, by itself. Overviews answer with a table
# of adjectives and five lines of advice. In this unit you put all methods side by side, on the same tasks, tuned, with three seeds; you
# find out which adjectives hold; and you write the advice down as a program that gives its reasons, and says no where it must.
#
# **When you have finished, you can**
#
# 1. make an honest table out of many runs: what counts, what is missing, and which differences are noise;
# 2. say which methods fit on a given GPU, with which batch, from measured bytes;
# 3. recommend a method with reasons that somebody else can check, and refuse with the nearest thing that is possible.
#
# Your answers go into the cells that raise `NotImplementedError`. The cell below each one checks it on new random numbers.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from itertools import pairwise
from statistics import mean, median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograder.checks.choosing import (
    check_broken_rules,
    check_choose_for,
    check_cost_of_rank,
    check_heaviest_batch,
    check_largest_batch,
    check_merge_rows,
    check_pareto_front,
    check_recommend,
    check_summarise,
)
from peftlab import comparison, plots, results, settings
from peftlab.choosing import ACCESS, Job, Option, Reason, Recommendation, Refusal
from peftlab.comparison import late_loss, machine
from peftlab.llama import PRESETS, Llama, LlamaConfig, rotate
from peftlab.memory import MEBIBYTE, StepMemory, step_table
from peftlab.recipes import RECIPES, recipe_with, with_factors
from peftlab.results import Row
from peftlab.simulate import simulate_training_step

GB = 1e9  # as papers count
CARD_GB = 2**30  # as graphics cards are sold: seven percent more

# %% [markdown]
# ## The claim
#
# This is the overview that the course started from. It has no numbers but the second column's, and no row for layer freezing, which we add.

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
# And its advice, in five lines: *limited GPU memory*: QLoRA. *Best quality*: LoRA with rank 16 to 64, or full fine-tuning. *Several tasks*:
# adapters or LoRA. *Minimal changes*: BitFit or prompt tuning. *API-only access*: prompt tuning.
#
# **Predict.** These are 28 cells; quality will be asked on two tasks, which makes 35 verdicts. One is "differs" if what we measure contradicts the cell more
# often than it agrees with it (section 9 says how). How many will be that? Which cell would you bet against
# first?

# %%
my_differing_cells, my_first_bet = None, None  # a number, and (method, column)

# %% [markdown]
# ## 1. Whose rows?  ·  2 points, about 20 minutes
#
# Every experiment of this course has left a row: yours in the `results` folders beside the notebooks, ours in the course. Yours come first, for you
# know how they were made. But rows may be put into one table only if they are of one kind. The rules, in their order:
#
# 1. A row **counts** if it is no short run (`row.short`), is a method's standard form (`row.settings.get("variant", "")` is empty), and belongs to
#    a task in `standard`; and if each setting that `standard[row.task]` names *and the row has* equals the standard one. A LoRA of rank 16 is
#    another experiment than one of rank 8; full fine-tuning has no rank, and may stay.
# 2. For each (task, method): **your rows if any of them count, else the shipped ones**. Never some of both.
# 3. Of these, the rows of **one machine**: the one with the most rows; of equals, the one that comes first. `machine(row)` is its name.
# 4. The same learning rate and seed **count once**: the last such row given.
#
# Return a dict from `(task, method)` to its rows. Where nothing counts, there is no key.
#
# <details><summary>The check says that rows that do not count hide the shipped ones</summary>
#
# Apply rule 1 to all rows before you ask whose there are.
# </details>
# <details><summary>The check says that one machine is taken for two</summary>
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
    candidates: dict[tuple[str, str], tuple[list[Row], list[Row]]] = {}
    for whose, rows in enumerate((own, shipped)):
        for row in rows:
            wanted = standard.get(row.task)
            if row.short or row.settings.get("variant") or wanted is None:
                continue
            if any(row.settings.get(name, value) != value for name, value in wanted.items()):
                continue
            candidates.setdefault((row.task, row.method), ([], []))[whose].append(row)
    merged = {}
    for key, (mine, theirs) in candidates.items():
        of_machine: dict[str, list[Row]] = {}
        for row in mine or theirs:
            of_machine.setdefault(machine(row), []).append(row)
        most = max(of_machine.values(), key=len)
        merged[key] = list({(row.settings["learning_rate"], row.settings["seed"]): row for row in most}.values())
    return merged
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-merge-rows", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_merge_rows(merge_rows)

# %% [markdown]
# Now with real rows. This notebook runs whether you have none, some or all; a file that is no row is named and left out. Both tasks were trained in
# one way by every method, and these are the sizes of the standard forms:

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
# How far does a row hold on another computer? Where one of yours was trained just as one of ours, here are both: scores may differ in the last points, for
# other processors round otherwise; bytes should not.

# %%
pairs = comparison.twins(own, shipped)
print(comparison.twin_table(pairs) or "None of your rows has a twin yet: the experiments of units 03 to 10 leave some.")

# %% [markdown]
# And how far on a GPU? The experiments of units 04 to 07 and of unit 10 were run on one as well, with the same rates and seeds:

# %%
from peftlab import gpu

print(comparison.twin_table(comparison.twins(gpu.rows(), shipped)))

# %% [markdown]
# *What to see.* What is trained is the same to the number, and the scores are within two points. A GPU adds up in another order: with the biases the
# losses agree to four digits
# all the same, with the soft prompt they do not. The peaks are two to six percent larger; unit 08 has the reason. QLoRA is another case: on that card it computed in
# bf16, which takes away nearly half of its activations. The seconds cannot be compared: eleven notebooks ran at once there, and the shipped rows come
# from one thread of busy machines.

# %% [markdown]
# What happens to a damaged file? Here is a folder with a row of ours and a file that broke off in the middle:

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "08_lora").mkdir()
    sound = next((results.SHIPPED / "08_lora").glob("*.json")).read_text()
    (Path(folder) / "08_lora" / "sound.json").write_text(sound)
    (Path(folder) / "08_lora" / "broken.json").write_text(sound[:700])
    print(f"{len(comparison.own_rows([Path(folder)]))} row is left")

# %% [markdown]
# ## 2. One line of the table  ·  3 points, about 25 minutes
#
# A method's rows on a task are a **sweep**, one run for each learning rate, and further seeds at the rate that looked best, sometimes at a
# second one as well. `summarise` makes one line of them.
#
# - `"learning_rate"`: of the rates with the most seeds, the one with the lowest `late_loss`, averaged over its seeds. That is the mean training loss of the last
#   ten steps. No row of the data comes twice in these runs, so it is a loss on unseen rows. The test score must not choose: then it would have been
#   trained on, in a way. A mean of NaN counts as infinite.
# - `"score"`: the mean over all rows at that rate, of any seed; `"spread"`: the largest minus the smallest, `None` if there is one; `"seeds"`: how many.
# - `"forgetting"`: the mean over the same rows.
# - `"share"` (`trainable_parameters` of `total_parameters`, as a fraction), `"file_bytes"` (`adapter_bytes`), `"peak_bytes"` (`memory.peak`): these do not
#   depend on the seed.
# - `"notes"`: a list. `"one seed"` if there is only one at the chosen rate. `"untuned"` if the chosen rate is the lowest or the highest of all that
#   were tried: then nobody knows what lies beyond. peft's own `method_comparison` has found that a poor learning rate costs more than the choice of method.
#
# Why only the rates with the most seeds? A mean of three runs against a single lucky one is no comparison.
#
# <details><summary>The check says that a run that diverged is chosen</summary>
#
# `nan < 1` is False, and so is `1 < nan`. If a NaN stands first, `min` never leaves it. `math.isnan` tells.
# </details>


# %% nbgrader={"grade": false, "grade_id": "summarise", "locked": false, "schema_version": 3, "solution": true, "task": false}
def summarise(rows: Sequence[Row]) -> dict:
    """Return one line of the table: what the rows of one method on one task say together.

    Args:
        rows: at least one, each with another learning rate or another seed.
    """
    ### BEGIN SOLUTION
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row.settings["learning_rate"], []).append(row)
    most = max(map(len, by_rate.values()))

    def loss(rate: float) -> float:
        late = mean(map(late_loss, by_rate[rate]))
        return math.inf if math.isnan(late) else late

    rate = min((rate for rate, runs in by_rate.items() if len(runs) == most), key=loss)
    chosen = by_rate[rate]
    scores = [row.score_after for row in chosen]
    alone, at_the_edge = len(chosen) == 1, rate in (min(by_rate), max(by_rate))
    return {
        "learning_rate": rate,
        "score": mean(scores),
        "spread": None if alone else max(scores) - min(scores),
        "seeds": len(chosen),
        "share": chosen[0].trainable_parameters / chosen[0].total_parameters,
        "file_bytes": chosen[0].adapter_bytes,
        "peak_bytes": chosen[0].memory.peak,
        "forgetting": mean(row.forgetting for row in chosen),
        "notes": ["one seed"] * alone + ["untuned"] * at_the_edge,
    }
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-summarise", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_summarise(summarise)

# %% [markdown]
# The whole table, then. *Forgetting* is by how much the loss on newspaper sentences has risen, in nats per token.

# %%
table = {key: summarise(rows) for key, rows in sets.items()}
print(f"{'':<30}{'rate':>8}{'score':>8}{'spread':>8}{'seeds':>6}{'share':>9}{'file, kB':>10}{'peak, MiB':>10}{'forgets':>8}")
for task in STANDARD:
    for method in METHODS:
        line = table.get((task, method))
        if line is None:
            print(f"{task:<15}{method:<15}  not measured yet")
            continue
        spread = "-" if line["spread"] is None else f"{line['spread']:.1%}"
        print(
            f"{task:<15}{method:<15}{line['learning_rate']:>8g}{line['score']:>8.1%}{spread:>8}{line['seeds']:>6}{line['share']:>9.3%}"
            f"{line['file_bytes'] / 1e3:>10,.0f}{line['peak_bytes'] / MEBIBYTE:>10,.0f}{line['forgetting']:>+8.2f}  {', '.join(line['notes'])}"
        )

# %% [markdown]
# Was the choice of a rate ever close? Where a rate has several seeds and was *not* chosen, it had won with one seed and lost with three.

# %%
for (task, method), rows in sets.items():
    for rate in sorted({row.settings["learning_rate"] for row in rows} - {table[task, method]["learning_rate"]}):
        scores = [row.score_after for row in rows if row.settings["learning_rate"] == rate]
        if len(scores) > 1:
            print(f"{task}, {method}, learning rate {rate:g}: {', '.join(f'{score:.1%}' for score in scores)}")

# %%
for task in STANDARD:
    figure, axes = plt.subplots(figsize=(7, 2.8))
    shown = [method for method in METHODS if (task, method) in table]
    for position, method in enumerate(shown):
        rate = table[task, method]["learning_rate"]
        scores = [100 * row.score_after for row in sets[task, method] if row.settings["learning_rate"] == rate]
        axes.plot(scores, [position] * len(scores), "o", color=plots.SERIES[0], alpha=0.6)
        axes.plot([100 * table[task, method]["score"]] * 2, [position - 0.3, position + 0.3], color=plots.SERIES[1])
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set(title=f"{task}: each seed at the chosen learning rate", xlabel="score (%)")
    axes.grid(axis="x", alpha=0.3)
    plots.show(figure, alt=f"Scores on {task}: for each method a dot a seed, and a line at their mean.")

# %% [markdown]
# *What to see.* A dot is a seed, the line is their mean. Two methods whose dots overlap are not told apart by these runs, whatever the
# digits of their means say. And the dots do not show all the noise: every run is scored on the same test rows, and others would
# move all scores, by one standard error $\sqrt{p (1 - p) / n}$. Take as the **noise** of a score the larger of the two:

# %%
TEST_ROWS = {"movie_reviews": 480, "tool_calls": 200}


def noise(task: str, line: dict) -> float:
    """Return the larger of the spread between seeds and one standard error of the test split."""
    score = line["score"]
    return max(line["spread"] or 0.0, math.sqrt(score * (1 - score) / TEST_ROWS[task]))


for (task, method), line in sorted(table.items()):
    print(f"{task:<15}{method:<15}{line['score']:>7.1%} ± {noise(task, line):.1%}")

# %% [markdown]
# ## 3. What nobody beats  ·  2 points, about 15 minutes
#
# No method is best at everything; but some are beaten by another on both counts, and need not be looked at again. What is left is the **Pareto
# front**. With noise, "better" needs care: A is *clearly better* than B if its score is higher by more than the larger of their two noises.
#
# Walk through the points from the cheapest to the dearest, at the same cost from the highest score down. A point joins the front unless
#
# - something **on the front** costs less, and the point is not clearly better than that: who pays more wants to see something for it; or
# - something on the front costs the same and is clearly better.
#
# A point whose cost or score is NaN was not measured: it is not on the front and beats nothing. Two points of the same cost that are not clearly
# apart may both be on it. The order of what you return does not matter.
#
# Why compare with the front alone? "Not clearly better" does not pass on: B may be no clear gain over A, and C none over B, while C is clearly better
# than A. If B, which is out, could throw C out, the front would lose a method that is worth its price.
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
# Is it a Pareto front, or something like it? Without noise there is a textbook definition: a point is on the front if no other is at least as good on
# both axes and better on one. Written down as it stands, over all pairs, it must give the same names.

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

# %%
on_the_front_by_memory, on_the_front_by_parameters = None, None  # sets of names


# %%
def points_of(task: str, cost: Callable[[str, dict], float]) -> dict[str, tuple[float, float, float]]:
    """Return cost, score and noise of every method that was measured on the task, scores in percent."""
    lines = {method: table[task, method] for method in METHODS if (task, method) in table}
    return {method: (cost(method, line), 100 * line["score"], 100 * noise(task, line)) for method, line in lines.items()}


for task in STANDARD:
    points = points_of(task, lambda method, line: line["peak_bytes"] / MEBIBYTE)
    figure = plots.pareto(
        points, pareto_front(points), f"{task}: score against peak memory", "peak of a step (MiB)", "score (%)"
    )
    plots.show(figure, alt=f"{task}: score against peak memory; filled markers are on the front, which a line joins.")

# %%
for task in STANDARD:
    points = points_of(task, lambda method, line: sets[task, method][0].trainable_parameters)
    figure = plots.pareto(
        points, pareto_front(points), f"{task}: score against what is trained", "trained parameters", "score (%)"
    )
    plots.show(figure, alt=f"{task}: score against trained parameters; filled markers are on the front, which a line joins.")

# %% [markdown]
# *What to see.* Filled markers are on the front, bars are the noise. Two pictures of the same runs, and the front is not the same in both: a method that
# trains a thousandth of another's parameters need not save a thousandth of the memory. "Efficient" always asks: in what?

# %% [markdown]
# ## 4. All eight in a hundred lines
#
# What would these methods take on *your* model? For that we need them on any `Llama`, on 7 billion parameters as on 135 million. Here they are once more, each
# in its shortest form, with the tensors that your own version has; what they start with does not matter for bytes and seconds. LoRA and QLoRA come from
# `peftlab.recipes`.


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
        hidden = self.base.decode(torch.cat([prompt, self.base.embed_tokens(input_ids)], dim=1))
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
# On the device `meta` a model has shapes and no numbers. Count what is trained in the small model, in the sizes of our rows, and in LLaMA-7B, there
# with rank 16; and hold the small model's counts against the rows.

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

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
in_peft = {
    "lora": LoraConfig(r=16, target_modules=LINEAR, task_type=TaskType.CAUSAL_LM),
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
# First the real thing: the bytes of one training step of SmolLM2-135M, as they stand in the rows, every allocation followed.

# %%
for task in STANDARD:
    steps = {method: sets[task, method][0].memory for method in METHODS if (task, method) in sets}
    if steps:
        figure = plots.memory_bars(steps, f"One training step of SmolLM2-135M on {task}, fp32")
        plots.show(
            figure, alt=f"Stacked bars for {task}: the weights are the same in all; full fine-tuning is the longest by far."
        )

# %% [markdown]
# *What to see.* Where the whole model is not trained, gradients and optimizer state can hardly be seen, whether a method trains two percent or a
# hundredth of one. The weights stay. And the activations differ little, except where the gradient may stop early.
#
# Then LLaMA-7B, in 16 bits, with fake tensors: batch 1, 512 tokens, rank 16. All layers of a method are alike, so that two and three layers tell the rest.
# Only layer freezing treats them differently; but what is *below* the trained layers keeps no activations and adds its weights alone, so that a
# line through five and six layers is exact, too.


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
# *What to see.* Two groups, and QLoRA. All methods that freeze the base in 16 bits pay for its weights, whatever they train beside it. Prompt tuning trains
# sixteen rows of numbers and is hardly cheaper than LoRA: its gradient has to come down through every layer. Layer freezing alone keeps
# activations for a few layers only; but four layers of this model are an eighth of it, with gradients and two moments of their own. QLoRA alone makes
# the weights smaller.

# %% [markdown]
# ## 6. Fit a job to a GPU  ·  2 points, about 15 minutes
#
# A card of 24 GB, a model, a recipe: how large may the batch be? `peak(batch)` *measures* a training step, which takes a second or two, so
# ask it seldom: at most $2 \log_2(\text{limit}) + 2$ times. The peak never falls when the batch grows. Write `largest_batch`: the largest batch of
# at most `limit` sequences whose peak is at most `usable` bytes; 0 if not even one fits.
#
# A tempting shortcut is to measure one and two sequences and draw a line. Here are these two for full fine-tuning of LLaMA-7B:

# %% tags=["experiment"]
FULL = RECIPES["bf16, fp32 moments"]
for batch in (1, 2, 16)[: 1 if settings.short() else 3]:
    print(f"{batch:>3} sequences of 512 tokens: peak {FULL.measure(PRESETS['LLaMA-7B'], batch_size=batch).peak / GB:.2f} GB")

# %% [markdown]
# A step's peak is the largest of several moments: in forward, in backward, in the optimizer's step. Each grows along a line of its own, or not at
# all, and while the largest one does not grow, two points say nothing of what comes.
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
# How much of a card is usable? The driver and CUDA's own code take some of it before the first tensor, and the allocator cannot use every gap. Hugging Face's
# `accelerate` plans with nine tenths when it places a model; so do we. What yours has, only it can say:

# %%
USABLE = 0.9
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(f"{torch.cuda.get_device_name()}: {total / GB:.2f} GB, of which {free / GB:.2f} GB are free with CUDA started")
else:
    print("no GPU here; the cards below are taken at their makers' word")

# %% [markdown]
# **Predict.** LLaMA-7B with LoRA on 24 GB, sequences of 2,048 tokens, gradient checkpointing: how many fit? And Llama-2-70B with QLoRA on 40 GB?

# %%
my_7b_on_24, my_70b_on_40 = None, None  # batches


# %% tags=["experiment"]
@cache
def measured_peak(name: str, recipe: str, batch: int) -> int:
    """Return the peak bytes of a step with checkpointing, 2,048 tokens a sequence."""
    return RECIPES[recipe].measure(PRESETS[name], batch_size=batch, sequence_length=2048, checkpointing=True).peak


CARDS, LIMIT = (16, 24, 40, 80), 1 if settings.short() else 8
MODELS = ("LLaMA-7B", "LLaMA-13B", "Llama-2-70B")[: 1 if settings.short() else 3]
print(f"{'largest batch of 2,048 tokens':<34}" + "".join(f"{card:>6} GB" for card in CARDS) + f"   (up to {LIMIT})")
for name in MODELS:
    for recipe in ("LoRA", "QLoRA"):
        batches = [largest_batch(partial(measured_peak, name, recipe), USABLE * card * CARD_GB, LIMIT) for card in CARDS]
        print(f"{name:<14}{recipe:<20}" + "".join(f"{batch or '-':>9}" for batch in batches), flush=True)

# %% [markdown]
# *What to see.* A dash is a job that does not fit at all. Read down the columns: on the cards of 16, 24 and 80 GB QLoRA trains a larger model than LoRA does. On 40 GB
# Llama-2-70B misses, with a single sequence. (How exact is this? Unit 01 held such figures against formulas.)

# %% [markdown]
# ## 7. What does one more rank cost?  ·  1 point, about 10 minutes
#
# "LoRA, rank 16 to 64" says the overview. A higher rank is not free; but how dear is *one* of them? That is the marginal cost: the difference between the steps
# at two neighbouring ranks of a list, divided by how many ranks lie between. `measure(rank)` returns the bytes of a step. Return a list, one
# dict for each pair of neighbours, with the bytes a rank in `"parameters"`, `"gradients"`, `"optimizer_state"`, `"activations"`, and in
# the `"file"`, which holds the factors in the dtype of the weights: as many bytes as their gradients have. Measure each rank once.


# %% nbgrader={"grade": false, "grade_id": "cost-of-rank", "locked": false, "schema_version": 3, "solution": true, "task": false}
def cost_of_rank(measure: Callable[[int], StepMemory], ranks: Sequence[int]) -> list[dict[str, float]]:
    """Return what one more rank costs, in bytes by category, from each of the ranks to the next.

    Args:
        ranks: ascending.
    """
    ### BEGIN SOLUTION
    measured = [(rank, measure(rank)) for rank in ranks]
    costs = []
    for (rank, step), (higher, next_step) in pairwise(measured):
        cost = {
            name: (getattr(next_step, name) - size) / (higher - rank) for name, size in vars(step).items() if name != "peak"
        }
        costs.append(cost | {"file": cost["gradients"]})
    return costs
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-cost-of-rank", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_cost_of_rank(cost_of_rank)

# %% [markdown]
# On the right, what a rank *brings*, from unit 08's rows: `tool_calls` after 20 steps, by rank. (The memory is LLaMA-7B's, the scores are SmolLM2's.)

# %% tags=["experiment"]
ranks = (1, 4, 16)
costs = cost_of_rank(lambda rank: recipe_with("LoRA", rank).measure(PRESETS["LLaMA-7B"]), ranks)
by_rank = {
    row.settings["rank"]: row.score_after
    for row in results.load("08_lora", results.SHIPPED)
    if row.task == "tool_calls" and row.settings["steps"] == 20
}
print(
    f"{'MB for one more rank':<22}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'file':>7}{'brings, points':>16}"
)
for (low, high), cost in zip(pairwise(ranks), costs):
    found = 100 * (by_rank[high] - by_rank[low]) / (high - low) if {low, high} <= by_rank.keys() else math.nan
    columns = zip(cost.values(), (9, 11, 11, 13, 7))
    print(f"from {low:>2} to {high:<12}" + "".join(f"{size / 1e6:>{width},.2f}" for size, width in columns) + f"{found:>16.1f}")
step = steps_7b["lora"]
print(
    f"for comparison: LLaMA-7B with LoRA peaks at {step.peak / 1e6:,.0f} MB, of which {step.parameters / 1e6:,.0f} are weights"
)

# %% [markdown]
# *What to see.* A rank always costs the same, and next to the weights it costs next to nothing; what it brings falls from rank to rank. So rank is cheap insurance, but
# seldom the thing to spend thought on. With time to finish, low ranks catch up: Hu et al. (2022, table 6) find for GPT-3 with $W_q$ and $W_v$ adapted
# 73.4, 73.3, 73.7, 73.8 and 73.5 percent on WikiSQL at ranks 1, 2, 4, 8 and 64.

# %% [markdown]
# ## 8. Speed, measured by turns
#
# The rows hold seconds, too, but of machines that had other work to do: no evidence. So measure here. One training step of the real SmolLM2-135M with each
# method, one after the other, and again; what counts is the median over the turns of the *ratio* to full fine-tuning in the same turn. QLoRA's base is
# bitsandbytes' here, because the layer of `peftlab.recipes` has the right bytes but computes nothing. The second column is a forward
# pass of a single token, as when text is generated, in turn with one of the plain model. Two minutes on two CPU cores.

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
    """Put bitsandbytes' NF4 layers in the place of the base's, and factors beside them."""
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
# Our Llama keeps no cache, and would read the soft prompt again for each token. With one, a soft prompt is what a prefix is: the
# keys and values of 16 more tokens.
token_ratio["prompt_tuning"] = token_ratio["prefix_tuning"]

# %% tags=["experiment"]
for method in METHODS:
    apart = [turn[method][0] / turn["full"][0] for turn in turns]
    print(
        f"{method:<15} a step takes {step_ratio[method]:.2f} of full fine-tuning's ({min(apart):.2f} to {max(apart):.2f}), "
        f"a token {token_ratio[method]:.2f} of the plain model's"
    )

# %% [markdown]
# *What to see.* A step of full fine-tuning does four things: forward; the gradient's way down; the products that make gradients of weights; and the
# optimizer's pass over all
# weights and moments. Freezing saves the last two. The products are a third of the arithmetic, in batches of any size. The optimizer's pass takes the same time
# whatever the batch: with few tokens a step, as here, it weighs a lot, and with many it disappears. (Who trains large batches finds hardly any gain in speed,
# and asks why: peft issue 960.) Where the gradient's way is short, as in layer freezing, there is more to save; and with 4-bit weights each
# use begins with unpacking them (qlora issue 107). In the second column LoRA stands unmerged; merged, it is the plain model. Full
# fine-tuning and layer freezing *are* plain models: what their tokens differ by is how far to trust this column.

# %% [markdown]
# ## 9. The overview, held against the measurements
#
# When does a number contradict an adjective? For the **share**, the overview gives numbers. An adjective only says *more* or *less*: "Low" memory is less than
# "Moderate". So take every pair of methods that the words put in an order. The measurement **confirms** the order, if the difference is
# larger than the noise, or finds **no difference**, or **contradicts** it. A cell's verdict is what most of its pairs say; where two say it equally
# often, the first of these three.
#
# Noise is 2% for bytes and 5% for seconds; for quality it is the larger of the two scores' noises, as in section 3.


# %%
def pairs_of(
    method: str, place: Mapping[str, int], value: Mapping[str, float], noise: Callable[[str, str], float]
) -> list[int]:
    """Return how many pairs with this method are confirmed, show no difference, and are contradicted.

    Args:
        place: of each method's word; a higher one claims a higher value.
        value: measured; methods without one are left out.
    """
    counted = [0, 0, 0]
    for other in value.keys() & place.keys() - {method}:
        claimed = place[method] - place[other]
        if method in value and claimed:
            measured = (value[method] - value[other]) * (1 if claimed > 0 else -1)
            margin = noise(method, other)
            counted[0 if measured > margin else 2 if measured < -margin else 1] += 1
    return counted


# %%
def verdict(counted: Sequence[int]) -> str:
    """Return what most pairs say, and how many are confirmed, show no difference, and are contradicted."""
    if not sum(counted):
        return "no pair to compare"
    word = ("agrees", "no difference", "differs")[counted.index(max(counted))]
    return f"{word} {counted[0]}/{counted[1]}/{counted[2]}"


# %% tags=["experiment"]
MEMORY = {"Minimal": 0, "Very low": 1, "Low": 2, "Moderate": 3, "Very high": 4}
QUALITY = {"Moderate": 0, "Good": 1, "Near-LoRA": 2, "Near-full FT": 3, "Best": 4}
SPEED = {"Fastest": 0, "Fast": 1, "Moderate": 2, "Slow": 3}
verdicts: list[str] = []


def hold(title: str, cells: Mapping[str, tuple[str, str, str]]) -> None:
    """Print what is claimed of each method, what was measured, and the verdict, and keep the verdict."""
    print(title)
    for method, (claimed, measured, said) in cells.items():
        print(f"  {method:<15}{claimed:<18}{measured:<34}{said}")
        verdicts.append(said)


# %% tags=["experiment"]
def hold_words(
    title: str, column: int, order: Mapping[str, int], value: Mapping[str, float], shown: str, noise: Callable
) -> None:
    """Do this for a column of words; `shown` is how a value is printed."""
    place = {method: order[claim[column]] for method, claim in CLAIMED.items()}
    hold(
        title,
        {
            method: (claim[column], shown.format(value[method]), verdict(pairs_of(method, place, value, noise)))
            if method in value
            else (claim[column], "", "not measured yet")
            for method, claim in CLAIMED.items()
        },
    )


# %% tags=["experiment"]
cells = {}
for method, (low, high, *_) in CLAIMED.items():
    small, large, _ = shares[method]
    inside = low <= small <= high, low <= large <= high
    said = {(True, True): "agrees", (False, True): "agrees for 7B only", (True, False): "agrees for 135M only"}.get(
        inside, "differs"
    )
    cells[method] = f"{low:.2%} to {high:.2%}", f"{small:.3%} of 135M, {large:.4%} of 7B", said
hold("share trained", cells)

peaks = {method: step.peak / GB for method, step in steps_7b.items()}
hold_words("memory: peak of a step of LLaMA-7B", 2, MEMORY, peaks, "{:.1f} GB", lambda a, b: 0.02 * max(peaks[a], peaks[b]))
hold_words(
    "speed: seconds of a step, of full fine-tuning's", 4, SPEED, step_ratio, "{:.2f}",
    lambda a, b: 0.05 * max(step_ratio[a], step_ratio[b]),
)  # fmt: skip

# %% tags=["experiment"]
for task in STANDARD:
    scores = {method: table[task, method]["score"] for method in METHODS if (task, method) in table}
    noises = {method: noise(task, table[task, method]) for method in scores}
    hold_words(f"quality: score on {task}", 3, QUALITY, scores, "{:.1%}", lambda a, b, of=noises: max(of[a], of[b]))
count = sum(said.startswith("differs") for said in verdicts)
print(f"{count} of {len(verdicts)} verdicts are 'differs'; you predicted {my_differing_cells}")

# %% [markdown]
# *Why cells differ,* where they do:
#
# - **Share.** LoRA's share of a square matrix of width $d$ is $2r/d$: it falls as models widen, and so do those of BitFit and adapters. Ranges like these
#   are for models of billions. And it is the size that you *choose*: our adapters have a bottleneck of 16; how wide would they be at the overview's 1%?

# %%
one_percent = 0.01 * trained_and_all("LLaMA-7B", full)[1] / (shares["adapters"][2] / 16)
print(f"adapters of LLaMA-7B train 1% of it at a bottleneck of {one_percent:.0f}")

# %% [markdown]
# - **Memory.** The words follow the count of trained numbers. Bytes do not: once the base is frozen, weights and activations are what is left. LoRA trains six
#   hundred times as many numbers of LLaMA-7B as prompt tuning, and takes a twentieth more memory. What is minimal about prompt tuning is its *file*.
# - **Speed.** Likewise. A gradient that has to reach the first layer costs its way through all of them, and 4-bit weights are unpacked each time.
# - **Quality.** Look at the two tasks apart. On one that is nearly saturated, differences drown in the noise; on one that asks for more, they come out. And
#   a method that seems poor here got 40 or 60 steps of a small model: Lester et al. (2021) find that prompt tuning catches up at billions of parameters.
#
# The overview has no column for **forgetting**, though it is a cost, too. Does what trains less forget less?

# %%
for task in STANDARD:
    lines = [(line["forgetting"], line["learning_rate"], method) for (t, method), line in table.items() if t == task]
    print(f"{task}: " + ", ".join(f"{method} {forgets:+.2f} (rate {rate:g})" for forgets, rate, method in sorted(lines)))

# %% [markdown]
# *What to see.* Sorted from least to most. If it went by what is trained, full fine-tuning would stand last. Biderman et al. (2024) find for long training that
# LoRA forgets less. Our runs are short, and tuned for the task alone: the learning rate that learns fastest is far higher for methods that train little, and
# nobody asked it to be gentle. Unmerge the adapter, and all is as it was; that is the other answer.

# %% [markdown]
# ## 10. The advice, as a program
#
# Now the five lines of advice. Five lines cannot say what happens when two of them meet: little memory *and* forty tasks, an API *and* LoRA. A program has to, and
# it can be tested. So write the tests first. A **job** says what is there and what is demanded; an **option** is a method with its figures for one
# model (`peftlab.choosing`):
#
# | `Job` | | `Option` | |
# |---|---|---|---|
# | `gpu_bytes` | memory that may be used | `peak_bytes` | of a training step |
# | `access` | how far the model can be reached | `access` | what it must reach |
# | `tasks` | served from one GPU at once | `base_bytes`, `task_bytes` | weights that all tasks share; for each task |
# | `quality` | least share of full fine-tuning's score | `quality`, `spread` | share of full fine-tuning's score; None if not measured |
# | `latency` | most that may be added to a forward pass | `latency`, `mergeable` | added if not merged; whether it can be merged |
# | `prefer`, `wish` | what to optimize; a method insisted on | `method` | its name |
#
# `ACCESS` is `("text", "embeddings", "weights")`, from least to most. The overview says: "API-only access: prompt tuning (no weight access needed)". That holds for an
# API that takes *embeddings* and returns their *gradients*. Through one that takes text, nothing can be trained: a soft prompt is no text.
#
# For the tests we put numbers in the place of the overview's adjectives. The peaks are those of section 5, rounded; the rest is made up, and the measured
# numbers come afterwards.

# %%
PEAK_7B = dict(full=54.4, lora=16.7, qlora=7.1, adapters=16.1, prefix_tuning=15.9, prompt_tuning=15.9, bitfit=15.8)
SCORE = {"Best": 1.0, "Near-full FT": 0.995, "Near-LoRA": 0.97, "Good": 0.96, "Moderate": 0.92}
FILE_MB = {"full": 13_480, "lora": 80, "qlora": 80, "adapters": 17, "prefix_tuning": 8, "prompt_tuning": 0.13, "bitfit": 2.7}
ADDED = {"full": 0.0, "lora": 0.2, "qlora": 0.5, "adapters": 0.2, "prefix_tuning": 0.05, "prompt_tuning": 0.05, "bitfit": 0.05}
GUIDE = [
    Option(
        method, "embeddings" if method == "prompt_tuning" else "weights", PEAK_7B[method] * GB,
        {"full": 0.0, "qlora": 3.9 * GB}.get(method, 13.5 * GB), FILE_MB[method] * 1e6,
        SCORE[CLAIMED[method][3]], 0.01, ADDED[method], method in ("full", "lora"),
    )
    for method in CLAIMED
]  # fmt: skip

# %% [markdown]
# What should the program say? Go through the scenarios below before you write it. The last entry is the method, or what comes nearest where the job is refused.

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
    ("it does not quite fit", Job(7.1 * GB - 1), REFUSED + "qlora"),
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
# ### The rules  ·  2 points, about 20 minutes
#
# An option breaks a rule, or it does not. `broken_rules` returns a `Reason(rule, figure, limit)` for **every** rule that is broken, in this order:
#
# | rule | is broken if | figure | limit |
# |---|---|---|---|
# | `"wish"` | the job wishes for a method, and this is another | the option's method | the wish |
# | `"access"` | the option must reach further than the job can | the option's access | the job's access |
# | `"training memory"` | the peak is more than the job's bytes | the peak | the job's bytes |
# | `"serving memory"` | the base and all tasks' bytes are more than the job's | their sum | the job's bytes |
# | `"latency"` | more is added than the job allows | what is added | what is allowed |
# | `"quality"` | something is demanded, and the quality is not known, or with its spread still below the demand | the quality | the demand |
#
# The two memory rules hold only for a job with access to the weights: otherwise the model runs on somebody else's computer. What can be merged adds nothing,
# *if there is one task*; one copy of the weights cannot hold two merged tasks. What just fits, fits.
#
# <details><summary>The check says that prompt tuning is refused where weights can be reached</summary>
#
# Whoever can reach the weights can reach the embeddings. Compare places in `ACCESS`, with `ACCESS.index`.
# </details>
# <details><summary>The check says that an unmeasured quality is refused though nothing is demanded</summary>
#
# `job.quality` of 0 demands nothing.
# </details>


# %% nbgrader={"grade": false, "grade_id": "broken-rules", "locked": false, "schema_version": 3, "solution": true, "task": false}
def broken_rules(option: Option, job: Job) -> list[Reason]:
    """Return a reason for every rule that the option breaks in this job, in the order of the table."""
    ### BEGIN SOLUTION
    serving = option.base_bytes + job.tasks * option.task_bytes
    merged = option.mergeable and job.tasks == 1
    added = 0.0 if merged else option.latency
    here = job.access == "weights"
    too_poor = option.quality is None or option.quality + option.spread < job.quality
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
# ### The recommendation  ·  3 points, about 30 minutes
#
# `recommend(job, options, broken_rules)` gets the rules as an argument, so that others can be tried; it works with any.
#
# **If options break no rule,** choose among them and return `Recommendation(method, rejected)`:
#
# - `prefer="memory"`: the smallest `peak_bytes`. `prefer="file"`: the smallest `task_bytes`.
# - `prefer="quality"`: look at those whose quality is measured. Take the best, and with it all that are *not clearly below* it, by no more than the larger
#   of the two spreads; of these the one with the smallest `peak_bytes`. If no quality is measured, the smallest `peak_bytes` of all.
# - Of equals, the first given.
#
# **If all are out,** return `Refusal(rejected, nearest, given_up, gpu_bytes)`, which says what is the least to give up. Take back the demands that
# the job made, one after the other and for good: first the wish (`None`), then latency (`math.inf`), then quality (`0.0`). As soon as something is
# possible, choose as above: that is `nearest`, and `given_up` holds the names of what was taken back, such as `("wish", "latency")`.
#
# If nothing is possible even so, it is for lack of memory or of access. Of the options whose access is enough, `nearest` is the one that needs the least memory,
# that is the larger of training and serving; `given_up` gets `"memory"` at its end, and `gpu_bytes` is what it needs. If there is no such option, `nearest`
# is None and `given_up` empty.
#
# In both cases `rejected` maps each method that is out of the job *as it was asked* to the first rule that it breaks.
#
# <details><summary>How do I change a job? It is frozen.</summary>
#
# `replace(job, wish=None)` makes another one.
# </details>
# <details><summary>The check says that demands are given up that nobody had made</summary>
#
# A job whose `latency` is `math.inf` demands nothing of it. Skip it.
# </details>


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
    within_reach = [option for option in options if ACCESS.index(option.access) <= ACCESS.index(job.access)]
    if not within_reach:
        return Refusal(rejected, None)
    needs = {
        option.method: max(option.peak_bytes, option.base_bytes + job.tasks * option.task_bytes) for option in within_reach
    }
    least = min(needs, key=needs.get)
    return Refusal(rejected, least, (*given_up, "memory"), needs[least])


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
# Now the made-up numbers go. Bytes are those of the simulated step, latency that of section 8, quality the mean over the tasks of a method's score as
# a share of full fine-tuning's, with its noise. (So bytes are LLaMA-7B's at rank 16, scores SmolLM2's in the rows' sizes: the best evidence that we have, and less
# than one would wish.) What has no row yet has no quality, and is not recommended where quality is demanded.


# %% tags=["experiment"]
def options_for(name: str) -> list[Option]:
    """Return all methods with their measured figures for a model, 512 tokens, batch 1, in bf16."""
    options = []
    for method in METHODS:
        step, (trained, whole) = simulated(name, method), trained_and_all(name, PREPARE[method])
        shared = {"full": 0, "qlora": step.parameters - 2 * trained}.get(method, 2 * whole)
        tasks_measured = [task for task in STANDARD if (task, method) in table and (task, "full") in table]
        relative = [table[task, method]["score"] / table[task, "full"]["score"] for task in tasks_measured]
        margins = [noise(task, table[task, method]) / table[task, "full"]["score"] for task in tasks_measured]
        options.append(
            Option(
                method, "embeddings" if method == "prompt_tuning" else "weights", step.peak, shared, 2 * trained,
                mean(relative) if relative else None, max(margins, default=0.0),
                0.0 if method in ("full", "layer_freezing") else max(token_ratio[method] - 1, 0.0),
                method in ("full", "lora", "layer_freezing"),
            )
        )  # fmt: skip
    return options


# %% tags=["experiment"]
measured_7b = options_for("LLaMA-7B")
for option in measured_7b:
    quality = "not measured yet" if option.quality is None else f"{option.quality:.1%} ± {option.spread:.1%}"
    print(
        f"{option.method:<15} peak {option.peak_bytes / GB:5.1f} GB, a task {option.task_bytes / 1e6:>9,.2f} MB, "
        f"adds {option.latency:4.0%}, quality {quality}"
    )

# %% tags=["experiment"]
for situation, job, expected in SCENARIOS:
    answer = outcome(recommend(job, measured_7b, broken_rules))
    print(f"{situation:<40} {answer:<35}" + ("" if answer == expected else f" (the guide: {expected})"))

# %% [markdown]
# *What to see.* Where the two columns differ, adjectives would have misled you. (Two borders were drawn for the rounded
# 7.1 GB, and may fall otherwise.) Look up the reason: every answer carries, for each method that is out, the rule and the figure. Here for two large
# wishes, with Llama-2-70B:


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
        needs = f", on {answer.gpu_bytes / GB:,.1f} GB" if answer.gpu_bytes else ""
        print(f"  for that, give up: {', '.join(answer.given_up)}{needs}")
    for method, (rule, figure, limit) in answer.rejected.items():
        print(f"  {method:<15}{rule}: {shown(rule, figure)}, where the job has {shown(rule, limit)}")


LARGE = "LLaMA-7B" if settings.short() else "Llama-2-70B"
measured_large = options_for(LARGE)
for job in (Job(24 * GB, wish="full"), Job(USABLE * 80 * GB, latency=0.0)):
    explain(job, measured_large)

# %% [markdown]
# ## 11. Eight situations  ·  1 point, about 10 minutes
#
# Without the program this time, but with section 5's table. Which method would you take? One of `full`, `lora`, `qlora`, `adapters`, `prefix_tuning`,
# `prompt_tuning`, `bitfit`,
# `layer_freezing`, or `none`. (In one of them, three answers are right.)
#
# - **A** LLaMA-13B, whose weights are 26 GB in 16 bits, on one card of 24 GB.
# - **B** Forty customers, each with a task of their own, come in turn and are served from one copy of LLaMA-7B; 72 GB of a card can be used. Quality
#   near full fine-tuning's.
# - **C** LLaMA-7B, one task, trained on 512 tokens with 18 GB that can be used. It will be deployed in 16 bits, and not a microsecond may be added to a forward pass.
# - **D** A hosted model. Its API takes embeddings, and returns the output and the gradient of the embeddings.
# - **E** A hosted model. Its API takes text and returns text.
# - **F** A model of 135 million parameters is to learn a new language from billions of tokens. There is a card of 80 GB, and one task.
# - **G** Ten thousand users of LLaMA-7B, whose weights are yours, each with a file of at most 200 kB.
# - **H** Long documents; activations fill the memory, and there is no time for checkpointing. Some quality may be lost.


# %% nbgrader={"grade": false, "grade_id": "choose-for", "locked": false, "schema_version": 3, "solution": true, "task": false}
def choose_for() -> dict[str, str]:
    """Return a method for each of the letters A to H, or "none"."""
    ### BEGIN SOLUTION
    return dict(A="qlora", B="adapters", C="lora", D="prompt_tuning", E="none", F="full", G="prompt_tuning", H="layer_freezing")
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-choose-for", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_choose_for(choose_for)

# %% [markdown]
# ## 12. Bug hunt: out of memory in the middle of the night  ·  1 point, about 10 minutes
#
# *After transformers issue 11388.* Somebody measures the first batch, finds room to spare, and goes home. After 5,906 of 30,625 steps: CUDA out of memory. Nothing
# leaks. A batch is padded to its longest row, and rows are not equally long:


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
# Write `heaviest_batch`: rows and padded length of the batch with the most tokens, padding included. Rows come in the order given; the last batch may be
# smaller, and counts. Of equals, the first. (transformers' `group_by_length` puts the longest batch first, so that a run that must fail fails at once: issue
# 13794.)
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
# ## 13. A design memo  ·  3 points, marked by hand
#
# A network of twelve clinics wants LLaMA-13B to draft discharge letters, each clinic in its own style. Letters have 512 tokens. They own one card of 24 GB, for
# training and for serving; the clinics' requests come in turn, and a tenth more time a token is acceptable. Their consultant proposes: "Full fine-tuning is best, so
# rent eight cards and fine-tune twelve models. Or else prompt tuning, which needs minimal memory."
#
# Write the memo that decides it, in about 200 words: what is wrong with either proposal; what you recommend, and on what grounds; what you would measure
# before you sign; and what would change your mind. Use at least three numbers that a cell of this notebook printed for you, and say for each
# how sure it is.

# %% [markdown] nbgrader={"grade": true, "grade_id": "memo", "locked": false, "points": 3, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: both proposals are refuted with figures.* Full fine-tuning: twelve copies of 26 GB cannot be served from one card, whatever is
# rented for training.
# Prompt tuning: its base is 26 GB in 16 bits like everybody's, and does not fit either; what is minimal is its file. *1 point: a recommendation that
# follows.* A 4-bit base with twelve small adapters beside it, unmerged (QLoRA), because nothing else fits 24 GB; the batch from section 6; and the
# conflict is seen: what it
# adds to a token's time in section 8 has to be held against the tenth allowed, so that the demand is given up, or a larger card bought for LoRA or
# adapters. *1 point: how sure.*
# Measured on which model, task, machine and number of seeds; bytes are exact, scores are of a small model and two other tasks, seconds of this computer. What would be
# measured first (the clinic's own letters, a held-out set, a learning-rate sweep; latency on the card) and what would change the decision. Half
# points where figures are missing or are not from the notebook's cells.
#
# **A full answer.** Neither. Twelve fully tuned models are 12 × 26 GB; our card serves none of them, so renting for training solves the wrong half.
# Prompt tuning trains
# 82 thousand numbers, but in section 5 its peak on 7B was less than 5% below LoRA's: the frozen base is what costs, and 26 GB of it are more than the
# card has. I recommend QLoRA:
# section 6 found a batch that fits 13B on 24 GB, and twelve adapters of rank 16 add 12 × 0.13 GB. These bytes I trust: they were counted, up to
# the tenth that we keep back. Quality I trust less: the rows are SmolLM2's, on film reviews and tool calls, three seeds; QLoRA against LoRA is a
# difference I would want to see on letters, after a sweep of learning rates for both. Latency I trust least. My own measurement says that unpacking
# adds far more than a
# tenth to a token, on a CPU. So before signing I would time one layer on the card itself. If a token is too slow there, the demands contradict each
# other, and the clinics
# must choose: a larger card, on which LoRA in 16 bits runs unmerged and still adds something, or 7B instead of 13B, or patience. A style that differs
# little between clinics would
# change my mind, too: then one merged adapter serves all.
#
# **An answer worth one and a half points.** Full fine-tuning of 13B needs more than 100 GB and twelve models are too many for one card. I would use
# QLoRA since it has the lowest peak in the
# table (7 GB for 7B, so about twice that), with one adapter for each clinic. Prompt tuning is not as good. I would check that the quality is good enough, because the
# tasks here were other ones. If they had a bigger card I would use LoRA.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A table in which every cell was measured, and says how sure it is; a front of what nothing beats; and a program that recommends, gives its reasons,
# and can say no. It was tested
# before it was written. Take it with you, and replace its evidence by your own.
#
# ## Sources
#
# - huggingface/peft, `method_comparison`: one configuration, one result file, a Pareto picture; and the lesson of the learning rates.
# - Dodge et al. (2019), *Show Your Work: Improved Reporting of Experimental Results*, arXiv 1909.03004: how tuning decides comparisons.
# - Hu et al. (2022), *LoRA*, arXiv 2106.09685, table 6. Dettmers et al. (2023), *QLoRA*, arXiv 2305.14314. Houlsby et al. (2019), arXiv 1902.00751.
# - Lester et al. (2021), *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv 2104.08691, figure 1.
# - Biderman et al. (2024), *LoRA Learns Less and Forgets Less*, arXiv 2405.09673.
# - [transformers issue 11388](https://github.com/huggingface/transformers/issues/11388), [13794](https://github.com/huggingface/transformers/issues/13794),
#   [peft issue 960](https://github.com/huggingface/peft/issues/960), [2321](https://github.com/huggingface/peft/issues/2321), [qlora issue
# 107](https://github.com/artidoro/qlora/issues/107).
