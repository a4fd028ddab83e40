# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Many adapters: one base, one batch
#
# | minutes | difficulty | points | before this unit |
# |---|---|---|---|
# | 110, and 15 of experiments on two CPU cores | 4 of 5 | 15 | 08_lora; 02_rank_decomposition helps |
#
# A fine-tuned model is as large as the model it was made of. A LoRA adapter is a hundredth of that. So one copy of the weights
# can serve a hundred tasks, if the requests for all of them may share a batch. This unit builds what makes that possible, and
# measures what it costs.
#
# **When you have finished, you can**
#
# 1. run a batch whose rows use different adapters, in two ways, and say beforehand which one is faster;
# 2. add, replace and remove adapters while others serve, and keep a bounded number of them in memory;
# 3. make one adapter out of several, and say what is lost.
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

from autograder.checks.many_adapters import (
    check_adapter_cache,
    check_batched_lora,
    check_combine,
    check_gathered,
    check_prefix_cache,
    check_segmented,
)
from peftlab import plots, results, serving
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, generate
from peftlab.memory import MEBIBYTE, tensor_bytes
from peftlab.progress import predict

UNIT = "13_many_adapters"

# %% [markdown]
# ## The idea
#
# With LoRA a layer computes $y = W x + s\,B A\,x$. The first term is the same for every task, and it is nearly all of the work.
# Let row $i$ of a batch name its adapter $a_i$:
#
# $$ y_i = W x_i + B_{a_i} A_{a_i} x_i $$
#
# The base multiplies all rows at once. Only the thin products differ from row to row. (The scale $s$ is part of $B$ in all of
# this unit.)

# %%
figure, axes = plt.subplots(figsize=(7.5, 2.9))
named = [2, 0, -1, 2, 1]
for row, slot in enumerate(named):
    colour = plots.SERIES[slot] if slot >= 0 else "#bbbbbb"
    axes.add_patch(plt.Rectangle((0, -row), 2.2, 0.75, color=colour))
    axes.annotate(f"row {row}: {slot if slot >= 0 else 'none'}", (1.1, 0.37 - row), ha="center", va="center", color="white")
axes.add_patch(plt.Rectangle((3.2, -4), 3, 4.75, color="#999999"))
axes.annotate("W, once for all rows", (4.7, -1.6), ha="center", va="center", color="white")
for slot in range(3):
    axes.add_patch(plt.Rectangle((7.2, -1.9 * slot), 0.35, 0.75, color=plots.SERIES[slot]))
    axes.add_patch(plt.Rectangle((7.7, -1.9 * slot + 0.4), 2, 0.35, color=plots.SERIES[slot]))
    axes.annotate(f"slot {slot}:  B, A", (10, 0.4 - 1.9 * slot), va="center")
axes.set(xlim=(-0.2, 12), ylim=(-4.2, 1), title="A batch, the base, and a stack of adapters")
axes.axis("off")
plots.show(
    figure,
    alt="Five rows of a batch, coloured by the adapter that each names; one grey base; three pairs of thin factors in slots.",
)

# %% [markdown]
# The adapters of a layer stand in two stacks, `A` of shape `(slots, rank, in)` and `B` of shape `(slots, out, rank)`. The
# tensor `adapters` has one whole number a row: its slot, or -1 for none. Said slowly, this is what we want:


# %%
def row_by_row(x: Float[Tensor, "batch seq in"], A, B, adapters: Int[Tensor, "batch"]) -> Float[Tensor, "batch seq out"]:
    """Return each row's update, one row after the other: right and slow."""
    update = x.new_zeros(*x.shape[:2], B.shape[1])
    for row, slot in enumerate(adapters.tolist()):
        if slot >= 0:
            update[row] = x[row] @ A[slot].T @ B[slot].T
    return update


A = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two adapters of rank 1: one reads the first feature, one the second
B = torch.tensor([[[10.0]], [[100.0]]])
x = torch.tensor([[[3.0, 4.0]]]).repeat(3, 1, 1)  # three equal rows of one token
print(row_by_row(x, A, B, torch.tensor([1, -1, 0])).flatten().tolist())

# %% [markdown]
# ## 1. Gather the factors  ·  3 points, about 15 minutes, ●●○
#
# A loop over rows starts two small products a row in each of 210 layers, and the processor spends its time on starting them.
# Write `gathered_update`, which returns what `row_by_row` returns, and
#
# - has no loop: `A[adapters]` makes a stack with the right factors for every row, and one batched product multiplies all rows;
# - multiplies by $A$ first, then by $B$, and never builds $BA$;
# - gives rows with -1 exactly zero;
# - leaves `adapters` as it is: the next layer reads it as well.
#
# The check counts operations (three times as many rows must not take more of them) and watches the memory that the process
# takes.
#
# <details><summary>Which function multiplies a stack by a stack?</summary>
#
# `torch.bmm`, or `@`: for two tensors with three dimensions both multiply `(batch, seq, in)` by `(batch, in, rank)`. `.mT`
# swaps the last two dimensions.
# </details>
# <details><summary>The check says that a row without an adapter gets one</summary>
#
# `A[-1]` is the last slot: Python counts from the end. Let such rows take any slot, then set their update to zero, for example
# with `torch.where`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "gathered-update", "locked": false, "schema_version": 3, "solution": true, "task": false}
def gathered_update(
    x: Float[Tensor, "batch seq in"],
    A: Float[Tensor, "slots rank in"],
    B: Float[Tensor, "slots out rank"],
    adapters: Int[Tensor, "batch"],
) -> Float[Tensor, "batch seq out"]:
    """Return B[a] A[a] x for each row, with a the slot that the row names, and zeros where that is -1."""
    ### BEGIN SOLUTION
    named = adapters.clamp(min=0)
    update = x @ A[named].mT @ B[named].mT
    return torch.where(adapters[:, None, None] >= 0, update, 0.0)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-gathered", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_gathered(gathered_update)

# %% [markdown]
# ## 2. Work by segments  ·  2 points, about 15 minutes, ●●○
#
# Gathering copies the factors for every row. If 64 rows share two adapters, it makes 32 copies of each. The other way: put rows
# with the same adapter side by side, and multiply such a *segment* by the factors that are there. Write `segmented_update`,
# which returns the same update, and
#
# - takes one pair of matrix products for each adapter that a row names, none for the others;
# - copies no factors.
#
# Sort the rows, or pick an adapter's rows with a mask, as you like. A loop over the *adapters* of the batch is right here.
#
# <details><summary>How do I find the segments?</summary>
#
# `order = adapters.argsort()` lists the rows in the order of their adapters.
# `adapters[order].unique_consecutive(return_counts=True)` returns the slots that occur and how many rows each has.
# </details>
# <details><summary>The check says that the result is left in sorted order</summary>
#
# `order[start:stop]` are the numbers of the rows in a segment: write the segment's update to `update[order[start:stop]]`.
# </details>


# %% nbgrader={"grade": false, "grade_id": "segmented-update", "locked": false, "schema_version": 3, "solution": true, "task": false}
def segmented_update(
    x: Float[Tensor, "batch seq in"],
    A: Float[Tensor, "slots rank in"],
    B: Float[Tensor, "slots out rank"],
    adapters: Int[Tensor, "batch"],
) -> Float[Tensor, "batch seq out"]:
    """Return what `gathered_update` returns, with one pair of products for each adapter that is named."""
    ### BEGIN SOLUTION
    update = x.new_zeros(*x.shape[:2], B.shape[1])
    order = adapters.argsort()
    slots, sizes = adapters[order].unique_consecutive(return_counts=True)
    for slot, rows in zip(slots.tolist(), order.split(sizes.tolist())):
        if slot >= 0:
            update[rows] = x[rows] @ A[slot].T @ B[slot].T
    return update
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-segmented", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_segmented(segmented_update)

# %% [markdown]
# ### Predict: which bytes move?
#
# When a model writes one token for each row, there is little to compute. The time goes into reading weights from memory. So
# count the bytes that a step moves in SmolLM2's linear layers, with adapters of rank 8 in fp32. Gathering reads the factors,
# writes a copy for each row, and reads the copy.

# %%
with torch.device("meta"):  # shapes without numbers
    linears = [m for name, m in Llama(PRESETS["SmolLM2-135M"]).named_modules() if name.rpartition(".")[2] in ALL_LINEAR]
base_bytes = sum(4 * linear.in_features * linear.out_features for linear in linears)
adapter_bytes = sum(4 * 8 * (linear.in_features + linear.out_features) for linear in linears)
print(f"the base's linear layers: {base_bytes / MEBIBYTE:,.0f} MiB; an adapter: {adapter_bytes / MEBIBYTE:.1f} MiB")
print(f"{'batch':>6}{'adapters':>10}{'gathered':>12}{'segmented':>12}   MiB moved beside the base's")
for batch, different in ((1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (64, 64)):
    moved = (3 * batch * adapter_bytes / MEBIBYTE, different * adapter_bytes / MEBIBYTE)
    print(f"{batch:>6}{different:>10}{moved[0]:>12,.0f}{moved[1]:>12,.0f}")

# %% [markdown]
# By bytes alone, segments always win. But every segment costs two products that have to be started, in each of 210 layers. With
# 64 rows that share 2 adapters, which way is faster? And with 64 rows that have an adapter each?

# %%
# "gathered" or "segmented":
my_ways = predict("the faster way with 64 rows of", {"2 adapters": None, "64 adapters": None})

# %% [markdown]
# ## 3. Slots, and a hot swap  ·  3 points, about 20 minutes, ●●○
#
# A server cannot stop in order to load an adapter. `BatchedLoRA` is a frozen linear layer with a fixed number of **slots**. Its
# stacks are allocated once; after that an adapter is only ever *written into* them, and the other slots go on serving. The
# contract:
#
# - `A` and `B` are buffers of shape `(slots, max_rank, in)` and `(slots, out, max_rank)`, zero at the start, with the base's
#   dtype and device. Nothing in the layer is trainable. `base` is the very layer that was given.
# - `adapters` is `None` at the start: then no row has an adapter. Otherwise it has one slot, or -1, for each row.
# - `forward` returns the base's output plus `update(x, A, B, adapters)`. The last argument of the constructor is one of your
#   two functions.
# - `write` puts an adapter of any rank up to `max_rank` into a slot, in place, with `scaling` folded into one of the factors,
#   and keeps nothing else. A larger rank raises a `ValueError` and changes nothing.
# - `clear` empties one slot.
#
# A smaller rank leaves a part of the slot unused. That part has to be zero, whatever stood there before.
#
# <details><summary>Why is zero the right padding?</summary>
#
# $BA$ is a sum over the rank: one column of $B$ times one row of $A$ each. A pair of zeros adds nothing. (One zero of the two
# is enough, but set both: the next adapter may be larger.)
# </details>
# <details><summary>The check says that a swap keeps the old factors alive</summary>
#
# After a thousand swaps the process has grown. Something still refers to factors that were written before: a list, a dict, the
# tensors themselves.
# </details>


# %% nbgrader={"grade": false, "grade_id": "batched-lora", "locked": false, "schema_version": 3, "solution": true, "task": false}
class BatchedLoRA(nn.Module):
    """A frozen linear layer with room for several LoRA adapters, of which each row of a batch uses one or none.

    Attributes:
        base: the layer that is adapted, the very object that was given.
        A: buffer of shape (slots, max_rank, in).
        B: buffer of shape (slots, out, max_rank); the adapter's scale is folded into it.
        adapters: of shape (batch,), the slot of each row, -1 for none; or None, if no row has an adapter.
    """

    def __init__(self, base: nn.Linear, slots: int, max_rank: int, update: Callable[..., Tensor]):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.update = update
        self.register_buffer("A", base.weight.new_zeros(slots, max_rank, base.in_features))
        self.register_buffer("B", base.weight.new_zeros(slots, base.out_features, max_rank))
        self.adapters = None
        ### END SOLUTION

    @torch.no_grad()
    def write(self, slot: int, lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"], scaling: float) -> None:
        """Put an adapter into a slot, in place of what was there.

        Raises:
            ValueError: if its rank is larger than the slots'; nothing has changed then.
        """
        ### BEGIN SOLUTION
        rank = len(lora_A)
        if rank > self.A.shape[1]:
            raise ValueError(f"an adapter of rank {rank} does not fit into a slot of rank {self.A.shape[1]}")
        self.clear(slot)
        self.A[slot, :rank] = lora_A
        self.B[slot, :, :rank] = scaling * lora_B
        ### END SOLUTION

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        ### BEGIN SOLUTION
        self.A[slot] = 0
        self.B[slot] = 0
        ### END SOLUTION

    def forward(self, x: Float[Tensor, "batch seq in"]) -> Float[Tensor, "batch seq out"]:
        """Return the base's output plus each row's update."""
        ### BEGIN SOLUTION
        output = self.base(x)
        if self.adapters is None:
            return output
        return output + self.update(x, self.A, self.B, self.adapters)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-batched-lora", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
check_batched_lora(BatchedLoRA)

# %% [markdown]
# What does a further adapter cost? Its own bytes, if its rank is the slots' rank. A smaller one pays for the padding:

# %%
layer = BatchedLoRA(nn.Linear(576, 1536, bias=False), slots=4, max_rank=8, update=gathered_update)
slot_bytes = tensor_bytes([layer.A, layer.B]) / 4
for rank in (8, 4, 1):
    own = 4 * rank * (576 + 1536)
    print(f"rank {rank}: {own:>7,} bytes of its own, {slot_bytes:,.0f} in a slot, {1 - own / slot_bytes:.0%} of them padding")

# %% [markdown]
# ## 4. A bounded cache  ·  2 points, about 15 minutes, ●●○
#
# A thousand adapters are on disk, and there is room for eight. `AdapterCache` knows which adapter is in which slot. `assign`
# gets the names that a batch's rows ask for (`None` for none), loads what is missing, and returns a tensor with each row's
# slot, -1 for `None`. The rules:
#
# - Loading is `load(name, slot)`, which the cache gets when it is made. What is in a slot already is not loaded again.
# - If no slot is free, the **least recently used** adapter makes room. *Used* means that a batch has named it. With two slots,
#   after the batches `[a]`, `[b]`, `[a]`, a batch `[c]` takes the slot of `b`.
# - Nobody loses a slot to another row of the same batch. Which of two adapters goes first that were last used in the same batch
#   is up to you.
# - A batch that names more different adapters than there are slots raises a `ValueError`, before anything is loaded.
# - If `load` raises, the error is passed on. The adapter does not count as loaded, and its slot counts as free.
#
# <details><summary>How do I know which one is the least recent?</summary>
#
# A dict remembers the order in which keys were put in. Take a key out and put it in again when it is used, and the first key is
# the one that has waited longest.
# </details>
# <details><summary>The check says that another row of the same batch needs the adapter</summary>
#
# Mark all adapters of the batch that are there as used, before you load the first one.
# </details>


# %% nbgrader={"grade": false, "grade_id": "adapter-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
class AdapterCache:
    """Which adapter is in which slot: loads adapters by name when a batch needs them, and drops the least recently used."""

    def __init__(self, slots: int, load: Callable[[str, int], None]):
        ### BEGIN SOLUTION
        self.load = load
        self.free = list(range(slots))
        self.slot_of = {}  # by name, the least recently used first
        ### END SOLUTION

    def assign(self, names: Sequence[str | None]) -> Int[Tensor, "batch"]:
        """Return each row's slot, and -1 where the row names none, after loading what is missing.

        Raises:
            ValueError: if the batch names more different adapters than there are slots.
        """
        ### BEGIN SOLUTION
        wanted = {name: None for name in names if name is not None}  # a dict, as a set that keeps the order
        room = len(self.free) + len(self.slot_of)
        if len(wanted) > room:
            raise ValueError(f"the batch names {len(wanted)} adapters, and there are {room} slots")
        for name in wanted:
            if name in self.slot_of:
                self.slot_of[name] = self.slot_of.pop(name)
        for name in wanted:
            if name not in self.slot_of:
                if not self.free:
                    self.free.append(self.slot_of.pop(next(iter(self.slot_of))))
                self.load(name, self.free[-1])
                self.slot_of[name] = self.free.pop()
        return torch.tensor([-1 if name is None else self.slot_of[name] for name in names])
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-adapter-cache", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_adapter_cache(AdapterCache)

# %% [markdown]
# ## 5. On a real model
#
# Train two adapters for SmolLM2, one for each of our tasks, as in unit 08. The layer below is that unit's, for training only.
# About three minutes on two CPU cores.


# %% tags=["experiment"]
class LoRALayer(nn.Module):
    """y = W x + scaling B A x with the base frozen: unit 08's layer, without merging."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


def replace_linears(model: nn.Module, make_layer: Callable[[nn.Linear], nn.Module]) -> dict[str, nn.Module]:
    """Freeze the model, replace the linear layers of its decoder layers, and return the new ones by name."""
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in ALL_LINEAR]
    for name, module in found:
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, make_layer(module))
    return {name: model.get_submodule(name) for name, _ in found}


# %% tags=["experiment"]
from safetensors.torch import load_file, save_file

from peftlab import settings, tasks
from peftlab.pretrained import load_smollm2
from peftlab.training import find_device, train

RANK, SCALING = 8, 2.0
ADAPTERS = Path("adapters")
ADAPTERS.mkdir(exist_ok=True)
device = find_device()
model, tokenizer = load_smollm2()
reviews, calls = tasks.movie_reviews(tokenizer), tasks.tool_calls(tokenizer)


def train_adapter(name: str, dataset, **how: object) -> None:
    """Train an adapter on the base, and write its factors to `adapters/<name>.safetensors`."""
    torch.manual_seed(0)
    model, _ = load_smollm2()
    layers = replace_linears(model, lambda linear: LoRALayer(linear, RANK, SCALING))
    train(model, dataset, **how)
    factors = {f"{at}.{of}": getattr(layer, of).detach().cpu() for at, layer in layers.items() for of in ("lora_A", "lora_B")}
    save_file(factors, ADAPTERS / f"{name}.safetensors")


# %% tags=["experiment"]
train_adapter("reviews", reviews.train, steps=30, learning_rate=5e-4, batch_size=8)
train_adapter("calls", calls.train, steps=40, learning_rate=2e-3, batch_size=8)
for file in sorted(ADAPTERS.glob("*.safetensors")):
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# Now serve both from one base, with your layer and your cache.


# %% tags=["experiment"]
def with_slots(model: Llama, slots: int, max_rank: int, update: Callable[..., Tensor]) -> dict[str, BatchedLoRA]:
    """Give every linear layer of the decoder layers slots; return the new layers by name."""
    return replace_linears(model, lambda linear: BatchedLoRA(linear, slots, max_rank, update))


def name_adapters(layers: dict[str, BatchedLoRA], adapters: Int[Tensor, "batch"] | None) -> None:
    """Tell every layer which slot each row of the next batch uses."""
    for layer in layers.values():
        layer.adapters = adapters


def load_from_disk(name: str, slot: int) -> None:
    """Write an adapter's factors from its file into a slot of every layer."""
    factors = load_file(ADAPTERS / f"{name}.safetensors")
    for at, layer in layers.items():
        layer.write(slot, factors[f"{at}.lora_A"].to(device), factors[f"{at}.lora_B"].to(device), SCALING)


model = load_smollm2()[0].to(device)
layers = with_slots(model, slots=2, max_rank=RANK, update=gathered_update)
cache = AdapterCache(2, load_from_disk)

# %% tags=["experiment"]
prompts = [calls.test[0]["prompt"], reviews.test[0]["prompt"], calls.test[1]["prompt"], calls.test[0]["prompt"]]
names = ["calls", "reviews", "calls", None]
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
batch = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
stop = tokenizer.eos_token_id


def answers(rows: slice) -> list[str]:
    """Return what the model writes after the prompts of some rows, each row with its own adapter."""
    name_adapters(layers, cache.assign(names[rows]).to(device))
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    written = generate(model, ids, settings.examples(32), stop, attention_mask=mask)[:, ids.shape[1] :]
    return tokenizer.batch_decode(written, skip_special_tokens=True)


mixed = answers(slice(None))
for prompt, name, answer in zip(prompts, names, mixed):
    print(f"[{name}] {prompt}{answer.splitlines()[0] if answer.strip() else answer!r}")

# %% tags=["experiment"]
alone = [answers(slice(row, row + 1))[0] for row in range(len(prompts))]
print("one batch writes what each row would have written alone:", mixed == alone)

# %% [markdown]
# *What to see.* The last row has the first row's prompt and no adapter, and answers as the base does. `generate` is the
# bench's: it keeps each layer's keys and values, so that a new token needs one pass of one token, and it lets every row end by
# itself. Read it in `peftlab/llama.py`.
#
# ### Measured: tokens a second, and bytes
#
# Four ways to serve a batch whose rows share some adapters evenly:
#
# | way | what is in memory | a step |
# |---|---|---|
# | merged | a whole model for each adapter | each model takes its rows |
# | swapped | one base, one adapter | for each adapter: write it into the only slot, take its rows |
# | gathered | one base, all adapters | all rows at once, your first function |
# | segmented | one base, all adapters | all rows at once, your second function |
#
# A step gives one token to every row, after 64 tokens that are in the cache. The ways take turns, and the fastest of three
# rounds counts. Merged models are all alike in time, so one of them is timed for all, and its bytes are multiplied. About three
# minutes on two CPU cores.


# %% tags=["experiment"]
def ways_to_serve(model: Llama, layers: dict[str, BatchedLoRA], different: int, batch: int) -> dict[str, Callable[[], None]]:
    """Return what each way does for one step, with rows that share the adapters of the slots evenly."""
    step = serving.decoding_step(model, batch)
    adapters = torch.arange(batch, device=device) * different // batch
    groups = [slice(batch * i // different, batch * (i + 1) // different) for i in range(different)]
    stored = [{name: (layer.A[i].clone(), layer.B[i].clone()) for name, layer in layers.items()} for i in range(different)]

    def together(update: Callable[..., Tensor]) -> None:
        for layer in layers.values():
            layer.adapters, layer.update = adapters, update
        step()

    def one_by_one(swap: bool) -> None:
        for factors, rows in zip(stored, groups):
            name_adapters(layers, torch.zeros_like(adapters[rows]) if swap else None)
            for name, layer in layers.items() if swap else ():
                layer.write(0, *factors[name], 1.0)
            step(rows)

    separate = {"merged": lambda: one_by_one(swap=False), "swapped": lambda: one_by_one(swap=True)}
    return separate | {"gathered": lambda: together(gathered_update), "segmented": lambda: together(segmented_update)}


# %% tags=["experiment"]
def measure(different: int, batch: int, dtype: str = "fp32", base: Callable = lambda linear: linear) -> list[serving.Served]:
    """Time the ways in turn, with random adapters, which are as fast as trained ones, and count their bytes."""
    model = load_smollm2()[0].to(device)
    layers = with_slots(model, different, RANK, gathered_update)
    for layer in layers.values():
        layer.A.normal_(std=0.02)
        layer.B.normal_(std=0.02)
        layer.base = base(layer.base)
    slots = tensor_bytes([part for layer in layers.values() for part in (layer.A, layer.B)])
    states = [layer.base.weight.quant_state for layer in layers.values() if hasattr(layer.base.weight, "quant_state")]
    scales = tensor_bytes([part for state in states for part in (state.absmax, state.state2.absmax, state.offset)])
    weights = tensor_bytes([*model.parameters(), *model.buffers()]) - slots + scales
    sizes = {"merged": different * weights, "swapped": weights + slots // different}
    run = ways_to_serve(model, layers, different, batch)
    if states:
        del run["merged"]  # a 4-bit weight plus an update is no longer in 4 bits
    seconds = serving.seconds_in_turn(run, device)
    return [serving.Served(way, dtype, different, batch, RANK, seconds[way], sizes.get(way, weights + slots)) for way in run]


# %% tags=["experiment"]
pairs = [(different, batch) for batch in (1, 8, 64) for different in (1, 2, 8, 64) if different <= batch]
rows = []
for different, batch_size in [(1, 1), (2, 4)] if settings.short() else pairs:
    rows += measure(different, batch_size)
    serving.save(rows, UNIT)
    print(f"{different} adapters, batch {batch_size}: measured")

# %% [markdown]
# And on the base of unit 10, whose weights are in 4 bits, with bitsandbytes' layer:

# %% tags=["experiment"]
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes


def four_bits(linear: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 4-bit layer with the weight of a linear layer."""
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    layer.support_avx512bf16_for_cpu = False  # some CPUs would repack the weight for good
    return layer.to(device)


for different, batch_size in [(2, 4)] if settings.short() else [(1, 1), (8, 64)]:
    rows += measure(different, batch_size, "NF4", four_bits)
    serving.save(rows, UNIT)
    print(f"{different} adapters, batch {batch_size}: measured")

# %% [markdown]
# The rows that ship with the course, or your own, if you have just measured:


# %%
def serving_table(rows: list[serving.Served]) -> str:
    """Return tokens a second, and GB, of each way, a line for each batch and number of adapters."""
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = [f"{'batch':>6}{'adapters':>10}" + "".join(f"{way:>20}" for way in ways) + "   tokens/s, GB"]
    for batch, different in dict.fromkeys((row.batch, row.adapters) for row in rows):
        here = {row.way: row for row in rows if (row.batch, row.adapters) == (batch, different)}
        cells = "".join(f"{here[way].tokens_per_second:>12,.1f}{here[way].bytes / 1e9:>8.2f}" for way in ways)
        lines.append(f"{batch:>6}{different:>10}{cells}")
    return "\n".join(lines)


shipped = serving.load(serving.Served, UNIT, results.SHIPPED)
print(shipped[0].hardware if shipped else "no rows here")
for base in ("fp32", "NF4"):
    print(f"the base in {base}")
    print(serving_table([row for row in shipped if row.base == base]), end="\n\n")


# %%
def serving_picture(rows: list[serving.Served]) -> plt.Figure:
    """Draw tokens a second of the four ways, for the largest batch."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    largest = max(row.batch for row in rows)
    for way, colour, marker in zip(dict.fromkeys(row.way for row in rows), plots.SERIES, plots.MARKERS):
        points = {row.adapters: row.tokens_per_second for row in rows if (row.way, row.batch) == (way, largest)}
        axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=way)
    axes.set(
        xscale="log", yscale="log", title=f"A batch of {largest} rows", xlabel="adapters in the batch", ylabel="tokens a second"
    )
    axes.set_xticks(list(points), list(map(str, points)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if shipped:
    plots.show(
        serving_picture([row for row in shipped if row.base == "fp32"]),
        alt="Tokens a second against the number of adapters in a batch of 64 rows, a line for each way of serving.",
    )

# %%
speed = {(row.way, row.adapters): row.tokens_per_second for row in shipped if (row.base, row.batch) == ("fp32", 64)}
faster = {count: max(("gathered", "segmented"), key=lambda way: speed[way, count]) for count in (2, 64) if speed}
my_ways.compare({f"{count} adapters": way for count, way in faster.items()})

# %% [markdown]
# *What to see.* The shipped rows were timed with one thread on a machine that was busy with other work. So compare the ways
# within a line: all of them were slowed alike. A difference of a tenth says nothing.
#
# - **Merged** is fastest where nothing is mixed: one adapter, a small batch. As soon as rows differ, it splits the batch, and a
#   step that reads all weights serves a few rows only. With 64 adapters it needs 34 GB, and gathered factors give more than six
#   times its tokens.
# - **Swapped** saves that memory and pays with time: it splits the batch as well.
# - **Gathered** and **segmented** are close to each other up to eight adapters: their differences change sign from line to
#   line, and are noise. Where each of 64 rows has an adapter of its own, gathered is well ahead, although it moves three times
#   the bytes: the number of operations decides.
# - In 4 bits the base is a third as large, and the adapters' bytes are what they were. Each step dequantizes all weights, which
#   takes most of its time here. That is the same work for one row as for 64, so splitting a batch costs more than on the base
#   in fp32.
#
# Why is an unmerged adapter slow at batch 1? Its numbers are two percent of the base's. Count the operations of one step in a
# model with two layers; those that compute nothing, such as views, are counted too:

# %% tags=["experiment"]
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch starts."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


# %% tags=["experiment"]
tiny = Llama(PRESETS["tiny"])
tiny_layers = with_slots(tiny, slots=8, max_rank=RANK, update=gathered_update)
for update, adapters in (
    (gathered_update, None),
    (gathered_update, [0]),
    (segmented_update, [0]),
    (segmented_update, range(8)),
):
    for layer in tiny_layers.values():
        layer.adapters, layer.update = adapters if adapters is None else torch.tensor(adapters), update
    with Operations() as operations, torch.no_grad():
        tiny(torch.ones(1 if adapters is None else len(adapters), 1, dtype=torch.long))
    way = "no adapter" if adapters is None else f"{update.__name__}, {len(adapters)} rows, {len(adapters)} adapters"
    print(f"{way:<40}{operations.count:>6} operations")

# %% [markdown]
# *What to see.* The update multiplies the number of operations. Each one costs some microseconds to start, whatever it
# computes, and at batch 1 there is little else. Engines put the whole update into one kernel. Users of vLLM see the rest of
# this price: up to half of the throughput in issue 10062.

# %% [markdown]
# ## 6. One adapter out of several  ·  2 points, about 15 minutes, ●●○
#
# Sometimes one adapter should do the work of several. What adds up are the *products*: $\sum_i w_i B_i A_i$. Stacked side by
# side, the factors hold that sum exactly, and the ranks add up. To get back to a given rank, cut off the smallest singular
# values, as unit 02 did. Adding the $A$'s and the $B$'s instead gives every $B_i$ with every $A_j$: units 02 and 07 met that
# mistake, and it is in libraries to this day.
#
# Write `combine`, for adapters of any ranks and weights of either sign. It returns `A` of shape `(rank, in)` and `B` of shape
# `(out, rank)`, in the adapters' dtype; `rank` is at most the sum of the ranks. It never builds a matrix of out × in numbers:
# for a head of 200,000 outputs that would be far larger than the factors. The given factors stay as they are.
#
# <details><summary>How can I have the SVD of BA without BA?</summary>
#
# Decompose the thin factors first: `torch.linalg.qr` gives $B = Q_B R_B$ and $A^T = Q_A R_A$ with orthonormal columns in both
# $Q$. Then $BA = Q_B\,(R_B R_A^T)\,Q_A^T$, and the middle is as small as the ranks. Its singular values are those of $BA$.
# </details>


# %% nbgrader={"grade": false, "grade_id": "combine", "locked": false, "schema_version": 3, "solution": true, "task": false}
def combine(
    factors: Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]]], weights: Sequence[float], rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return A and B of a rank, with B A as near as can be to the weighted sum of the adapters' products.

    Args:
        factors: lora_A and lora_B of each adapter.
        weights: one number an adapter, of either sign.
    """
    ### BEGIN SOLUTION
    A = torch.cat([A for A, _ in factors])
    B = torch.cat([weight * B for weight, (_, B) in zip(weights, factors)], dim=1)
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    return Vh[:rank] @ Q_A.T, Q_B @ U[:, :rank] * sigma[:rank]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-combine", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
check_combine(combine)

# %% [markdown]
# **TIES** (Yadav et al. 2023) argues that adding is wrong where two tasks pull a number in opposite directions. It keeps the
# largest numbers of each task, lets the tasks vote on every sign, and averages those that agree with the outcome:


# %%
def ties(tensors: Sequence[Float[Tensor, "..."]], weights: Sequence[float], density: float) -> Float[Tensor, "..."]:
    """Merge tensors as TIES does: trim, elect signs, average what agrees.

    Args:
        density: which part of each tensor's numbers, the largest, is kept.
    """
    kept = []
    for tensor in tensors:
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = True
        kept.append(torch.where(mask.view(tensor.shape), tensor, 0.0))
    stack = torch.stack(kept)
    elected = torch.where(stack.sum(0) >= 0, 1, -1)
    agree = stack.sign() == elected
    weighted = stack * torch.tensor(weights, device=stack.device).view(-1, *[1] * tensors[0].dim())
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


print(ties([torch.tensor([3.0, -2.0, 0.1]), torch.tensor([1.0, 4.0, 0.2])], [1.0, 1.0], density=0.67))

# %% [markdown]
# What do these do to our two adapters? Each way below makes one adapter out of both, which is then scored on both tasks. Which
# score will suffer most?

# %%
my_worst = predict("the way that loses most calls: concatenated, svd, mean of factors or ties", None)


# %% tags=["experiment"]
def from_product(product: Float[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of a matrix: the best of this rank, as `combine` returns them."""
    U, sigma, Vh = torch.linalg.svd(product, full_matrices=False)
    return Vh[:rank], U[:, :rank] * sigma[:rank]


def one_of(way: str, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return one adapter made of two, each with weight one."""
    both, weights = [first, second], [1.0, 1.0]
    products = [B @ A for A, B in both]
    match way:
        case "reviews alone" | "calls alone":
            return first if way == "reviews alone" else second
        case "concatenated":
            return torch.cat([A for A, _ in both]), torch.cat([B for _, B in both], dim=1)
        case "svd, rank 8":
            return combine(both, weights, RANK)
        case "mean of factors":
            return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
        case "ties, rank 8":
            return from_product(ties(products, weights, density=0.5), RANK)


# %% tags=["experiment"]
ways = ["reviews alone", "calls alone", "concatenated", "svd, rank 8", "mean of factors", "ties, rank 8"]
model = load_smollm2()[0].to(device)
layers = with_slots(model, len(ways), 2 * RANK, gathered_update)
files = {name: load_file(ADAPTERS / f"{name}.safetensors") for name in ("reviews", "calls")}
lost, ranks = dict.fromkeys(ways, 0.0), {}
for at, layer in layers.items():
    pair = [(files[name][f"{at}.lora_A"].to(device), files[name][f"{at}.lora_B"].to(device)) for name in files]
    exact = sum(B @ A for A, B in pair)
    for slot, way in enumerate(ways):
        A, B = one_of(way, *pair)
        layer.write(slot, A, B, SCALING)
        ranks[way] = len(A)
        lost[way] += ((B @ A - exact).norm() / exact.norm()).item() / len(layers)


# %% tags=["experiment"]
def score_all(task: tasks.Task, count: int) -> list[float]:
    """Return the score of every way's adapter on some test examples."""
    few = task.test.select(range(settings.examples(count)))
    scores = []
    for slot in range(len(ways)):

        def all_rows_use_it(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            name_adapters(layers, torch.full((len(inputs[0]),), slot, device=device))

        hook = model.model.register_forward_pre_hook(all_rows_use_it)
        scores.append(task.score(model, few))
        hook.remove()
    return scores


# %% tags=["experiment"]
examples = {"reviews": settings.examples(64), "calls": settings.examples(32)}
scored = zip(ways, score_all(reviews, examples["reviews"]), score_all(calls, examples["calls"]))
made = [
    serving.Combined(way, ranks[way], {"reviews": on_reviews, "calls": on_calls}, examples, lost[way])
    for way, on_reviews, on_calls in scored
]
serving.save(made, UNIT)

# %% [markdown]
# The rows that ship with the course:

# %%
combined_rows = serving.load(serving.Combined, UNIT, results.SHIPPED)
print(f"{'':<18}{'rank':>5}{'reviews':>9}{'calls':>8}{'away from the sum':>20}")
for row in combined_rows:
    scores = "".join(f"{row.scores[task]:>{width}.0%}" for task, width in (("reviews", 9), ("calls", 8)))
    print(f"{row.way:<18}{row.rank:>5}{scores}{row.distance:>20.0%}")
kept = {row.way.partition(",")[0]: row.scores["calls"] for row in combined_rows if not row.way.endswith("alone")}
my_worst.compare(min(kept, key=kept.get) if kept else None)

# %% [markdown]
# *What to see.* With 64 reviews and 32 calls, one standard error is about five points on the reviews and seven on the calls. So
# the concatenated adapter, the SVD and each adapter on its own task are level. Cutting from rank 16 back to 8 costs 7% of the
# sum, and no score that can be seen. The mean of the factors loses half of the calls: its product is 62% away from the sum.
# TIES keeps the calls, and on reviews does no better than the calls' adapter alone. The last column suggests why: the reviews'
# update is so small that the sum without it is hardly another one (the row *calls alone*), and TIES lets the larger numbers
# win.

# %% [markdown]
# ## 7. The same thing in peft
#
# Below, a small LLaMA exists twice with the same weights: as `transformers` model with three adapters in peft, and as our
# `Llama` with yours. A mixed batch goes through both. A logit is made by 14 products, one after the other, each of sums of at
# most 160 terms, and each term rounds once.

# %% tags=["experiment"]
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

EPS = torch.finfo(torch.float32).eps
torch.manual_seed(0)
ours = Llama(PRESETS["tiny"])
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
theirs.load_state_dict(ours.state_dict())
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
    theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR), adapter_name="first")
theirs.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR))
theirs.add_adapter("third", LoraConfig(r=8, lora_alpha=4, target_modules=ALL_LINEAR))
# %% tags=["experiment"]
their_layers = {
    name.removeprefix("base_model.model."): m
    for name, m in theirs.named_modules()
    if hasattr(m, "lora_A") and hasattr(m, "base_layer")
}
our_layers = with_slots(ours, slots=3, max_rank=8, update=segmented_update)
for name, layer in our_layers.items():
    for slot, adapter in enumerate(("first", "second", "third")):
        A, B = (getattr(their_layers[name], of)[adapter].weight for of in ("lora_A", "lora_B"))
        nn.init.normal_(B, std=0.1)  # peft's B starts at zero
        layer.write(slot, A, B, their_layers[name].scaling[adapter])

# %% tags=["experiment"]
input_ids = torch.randint(0, 256, (5, 12))
with torch.no_grad():
    expected = theirs.eval()(input_ids=input_ids, adapter_names=["third", "__base__", "first", "second", "first"]).logits
    name_adapters(our_layers, torch.tensor([2, -1, 0, 1, 0]))
    logits = ours(input_ids)
tolerance = 14 * 160 * EPS * expected.abs().max().item()
apart = (logits - expected).abs().max().item()
print(f"largest difference of any logit: {apart:.1e}, where rounding may make {tolerance:.1e}")
assert apart <= tolerance, "a mixed batch gives something else than in peft: run the checks above again"

# %% [markdown]
# And `add_weighted_adapter`, which combines adapters. In peft, `cat` and `svd` do what `combine` does, and `ties_svd` merges
# the products. `linear` and `ties` work on the factors, each multiplied by the root of its weight.

# %% tags=["experiment"]
weights, roots = [0.7, 1.2], [math.sqrt(0.7 * 2.0), math.sqrt(1.2 * 0.5)]  # the two scales are 2 and 1/2
kinds = {"cat": 16, "svd": 8, "ties_svd": 8, "linear": None, "ties": None}
for kind, rank in kinds.items():
    theirs.add_weighted_adapter(["first", "third"], weights, kind, combination_type=kind, density=0.5, svd_rank=rank)


def combined(layer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return our A and B of every kind for one of peft's layers."""
    plain = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("first", "third")]
    scaled = [(A, scale * B) for scale, (A, B) in zip((2.0, 0.5), plain)]
    return {
        "cat": combine(scaled, weights, 16),
        "svd": combine(scaled, weights, 8),
        "ties_svd": from_product(ties([B @ A for A, B in scaled], weights, 0.5), 8),
        "linear": tuple(sum(root * factor for root, factor in zip(roots, of)) for of in zip(*plain)),
        "ties": tuple(ties(of, roots, 0.5) for of in zip(*plain)),
    }


# %% [markdown]
# A computed SVD belongs to a matrix that is off by `size × eps` of its largest singular value. Cutting off multiplies that
# error by one over the gap between the last singular value that is kept and the first that is not (unit 02). Two answers may
# differ by twice as much.

# %% tags=["experiment"]
apart, gap = dict.fromkeys(kinds, 0.0), 1.0
with torch.no_grad():
    for layer in their_layers.values():
        for kind, (A, B) in combined(layer).items():
            product = layer.lora_B[kind].weight @ layer.lora_A[kind].weight * layer.scaling[kind]
            sigma = torch.linalg.svdvals(B @ A)
            apart[kind] = max(apart[kind], ((B @ A - product).norm() / sigma[0]).item())
            if kind == "cat":
                gap = min(gap, ((sigma[7] - sigma[8]) / sigma[0]).item())
for kind, distance in apart.items():
    print(f"{kind:<9} differs from peft's by {distance:.1e} of the largest singular value")
    assert distance <= 2 * 160 * EPS * (1 + 1 / gap), f"{kind} gives something else than in peft"

# %% [markdown]
# How fast is peft's mixed batch? It works by segments too: with Python lists of row numbers, in every layer. The same weights
# and rows, one token each, in turn:


# %% tags=["experiment"]
def in_peft(model: nn.Module, count: int) -> nn.Module:
    """Return the model with so many of peft's adapters, called 0, 1, 2 and so on."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ALL_LINEAR)
    model = get_peft_model(model, config, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), config)
    return model.eval()


# %% tags=["experiment"]
def against_peft(different: int, batch: int) -> list[serving.Served]:
    """Time one token for each row, with peft and with both of your functions."""
    ours, theirs = load_smollm2()[0].to(device), in_peft(load_smollm2()[0].to(device), different)
    layers = with_slots(ours, different, RANK, gathered_update)
    adapters = torch.arange(batch, device=device) * different // batch
    names, ids = list(map(str, adapters.tolist())), torch.arange(batch, device=device)[:, None]

    @torch.no_grad()
    def run(update: Callable[..., Tensor]) -> None:
        for layer in layers.values():
            layer.adapters, layer.update = adapters, update
        ours(ids)

    ways = {way: lambda update=update: run(update) for way, update in OURS.items()}
    ways["peft"] = torch.no_grad()(lambda: theirs(ids, adapter_names=names))
    size = tensor_bytes([*ours.parameters(), *ours.buffers()])
    seconds = serving.seconds_in_turn(ways, device)
    return [serving.Served(way, "fp32, beside peft", different, batch, RANK, seconds[way], size) for way in ways]


# %% tags=["experiment"]
OURS = {"gathered": gathered_update, "segmented": segmented_update}
for different, batch_size in [(2, 4)] if settings.short() else [(8, 8), (8, 64), (16, 64)]:
    rows += against_peft(different, batch_size)
    serving.save(rows, UNIT)

# %%
beside_peft = [row for row in shipped if row.base == "fp32, beside peft"]
for theirs_row in (row for row in beside_peft if row.way == "peft"):
    here = {row.way: row for row in beside_peft if (row.adapters, row.batch) == (theirs_row.adapters, theirs_row.batch)}
    ratios = ", ".join(f"{way} {here[way].seconds / theirs_row.seconds:.2f}" for way in ("gathered", "segmented"))
    print(
        f"batch {theirs_row.batch:>2}, {theirs_row.adapters:>2} adapters: peft {theirs_row.seconds:.2f} s a step; of that, {ratios}"
    )

# %% [markdown]
# *What to see.* Both of your functions take less time than peft in every line: gathered about half with 8 rows, two thirds to
# four fifths with 64. Neither of the two is ahead of the other everywhere.

# %% [markdown]
# ## 8. Bug hunt  ·  1 point, about 8 minutes, ●○○
#
# *After vLLM issues 3264 and 30931.* Many requests begin with the same words. A server keeps the keys and values of such a
# prompt for the next request. Someone turns adapters on, and from then on some answers are a mixture of two tasks. The code
# looks innocent:


# %%
class PrefixCacheWithABug:
    """The keys and values of prompts that were read before."""

    def __init__(self):
        self.kept = {}

    def get(self, tokens, adapter):
        return self.kept.get(tokens)

    def put(self, tokens, adapter, keys_and_values):
        self.kept[tokens] = keys_and_values

    def swapped(self, adapter):
        pass


# %% [markdown]
# Here the second adapter is handed what the first has computed:

# %%
buggy = PrefixCacheWithABug()
buggy.put((7, 1, 4), "reviews", "computed with reviews")
print(buggy.get((7, 1, 4), "calls"))

# %% [markdown]
# Write `PrefixCache`. `get` returns what was put for these tokens under this adapter (a name, or `None` for the base), or
# `None`. `swapped(adapter)` is called after an adapter's weights have been replaced under its old name: then everything that
# the old weights have computed is forgotten and its memory freed, and nothing else is.
#
# <details><summary>I see no bug</summary>
#
# Keys and values are $W_k x$ and $W_v x$. Which of these matrices does an adapter change? And what does $x$ hold, after the
# first layer?
# </details>


# %% nbgrader={"grade": false, "grade_id": "prefix-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
class PrefixCache:
    """The keys and values of prompts that were read before, for whoever asks with the same tokens and the same adapter."""

    def __init__(self):
        ### BEGIN SOLUTION
        self.kept = {}
        ### END SOLUTION

    def get(self, tokens: tuple[int, ...], adapter: str | None) -> Tensor | None:
        """Return what was kept for these tokens under this adapter, or None."""
        ### BEGIN SOLUTION
        return self.kept.get((adapter, tokens))
        ### END SOLUTION

    def put(self, tokens: tuple[int, ...], adapter: str | None, keys_and_values: Tensor) -> None:
        """Keep the keys and values of these tokens under this adapter."""
        ### BEGIN SOLUTION
        self.kept[adapter, tokens] = keys_and_values
        ### END SOLUTION

    def swapped(self, adapter: str) -> None:
        """Forget what was computed with an adapter whose weights have been replaced."""
        ### BEGIN SOLUTION
        self.kept = {key: value for key, value in self.kept.items() if key[0] != adapter}
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "check-prefix-cache", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
check_prefix_cache(PrefixCache)

# %% [markdown]
# ## 9. In your own words  ·  2 points, marked by hand
#
# A company has fine-tuned one model for each of its 200 customers with LoRA of rank 16. Most requests come from ten customers;
# each of the others sends a few an hour. Today every customer has a merged model, loaded when a request comes in. Someone
# proposes one base with all adapters, someone else wants to merge the ten busiest.
#
# In about 120 words: what would you keep in memory, and in which form? What does an unmerged adapter cost when a request is
# alone in its batch, and when it is not? What has to happen when a customer's adapter is trained anew? Refer to at least one
# number from section 5.

# %% [markdown] nbgrader={"grade": true, "grade_id": "customers", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# ### BEGIN SOLUTION
# **Rubric.** *1 point: what is where, and what it costs.* One base, slots for the adapters in use, the others on disk and
# loaded on demand (least recently used). Merged copies cost a whole model each, and split the batch. Unmerged costs most in a
# small batch, where the two small products of each layer are added to a step that is short anyway; in a large batch of mixed
# requests it is far ahead. A figure from section 5 is quoted. *1 point: the swap.* The new factors are written into the slot in
# place, requests that are running finish with one version, and whatever the old weights have computed (kept keys and values) is
# forgotten. Half points for either part without a reason.
#
# **A full answer.** I would keep one base and some 32 slots, and load the other adapters when they are asked for. Ten merged
# models take ten times the memory, and their requests could not share a batch: with 8 adapters in a batch of 64, merged models
# gave 5.8 tokens a second and gathered ones 9.6. Alone, a request pays: at batch 1 the small products of 210 layers are pure
# overhead, so a customer with steady traffic and a strict latency may get a merged model. When an adapter is trained anew, I
# write it into its slot between two steps, and forget the prompts that were kept under its name.
#
# **An answer worth one point.** One base with all adapters, because they are small. The merged ones are faster for one request
# but need a lot of memory. You load the new adapter when it changes.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# A layer that serves many adapters in one batch, a cache that keeps the right ones, one adapter out of several, and numbers
# that say when each is worth it. What a production engine adds, and how to serve your adapter with one, stands on the project's
# page *From here to production* (`docs/from_here_to_production.md`).
#
# ## Sources
#
# - Hu et al. (2022), *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685: section 4.2 names the cost of
#   batching different tasks when adapters are merged.
# - Chen et al. (2023), *Punica: Multi-Tenant LoRA Serving*, arXiv 2310.18547: gathered and segmented products in one kernel.
# - Sheng et al. (2023), *S-LoRA: Serving Thousands of Concurrent LoRA Adapters*, arXiv 2311.03285: adapters in pages beside the
#   cache of keys and values.
# - Yadav et al. (2023), *TIES-Merging: Resolving Interference When Merging Models*, arXiv 2306.01708.
# - Kwon et al. (2023), *Efficient Memory Management for Large Language Model Serving with PagedAttention*, arXiv 2309.06180:
#   vLLM.
# - vLLM issues [3264](https://github.com/vllm-project/vllm/issues/3264),
#   [30931](https://github.com/vllm-project/vllm/issues/30931) (kept prompts under several adapters),
#   [3316](https://github.com/vllm-project/vllm/issues/3316), [10062](https://github.com/vllm-project/vllm/issues/10062) (what
#   unmerged adapters cost).
# - peft issues [1155](https://github.com/huggingface/peft/issues/1155),
#   [2796](https://github.com/huggingface/peft/issues/2796), [3761](https://github.com/huggingface/peft/issues/3761): adapters
#   combined factor by factor.
