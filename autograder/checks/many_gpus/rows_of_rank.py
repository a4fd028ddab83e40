"""The bug hunt: which rows of the training data each rank reads in an epoch."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise

EPOCHS = 16
"""A quarter of the rows at most is left out in an epoch: chance leaves no row out in so many, and no two orders are alike."""


def rows_of_rank(rows: int, epoch: int, rank: int, world_size: int, seed: int) -> Tensor:
    """Return every world_size-th number of an order that all ranks share, without the remainder at its end."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(rows, generator=generator)
    whole = rows - rows % world_size
    return order[:whole][rank::world_size]


def rows_case(generator: torch.Generator, world_size: int | None = None, remainder: int | None = None, seeds: int = 20) -> dict:
    """Return 22 to 41 rows, which leave a remainder unless it is given, and three seeds; two of them are neighbours."""
    world_size = world_size or between(generator, 3, 6)
    if remainder is None:
        remainder = between(generator, 2, world_size - 1)
    seed = between(generator, 1, seeds)
    return {
        "rows": world_size * between(generator, 24 // world_size, 36 // world_size) + remainder,
        "world_size": world_size,
        "seeds": [seed, seed + 1, 0],
        "epochs": EPOCHS,
    }


def drive_rows_of_rank(rows_of_rank, rows, world_size, seeds, epochs):
    """Read many epochs with one seed, a few with others, some of it twice; and data of other sizes."""
    import random

    import torch

    kinds = []

    def read(rows, epoch, rank, world_size, seed):
        answer = rows_of_rank(rows, epoch, rank, world_size, seed)
        if not torch.is_tensor(answer):
            kinds.append(type(answer).__name__)
            return []
        kinds.append(f"{answer.dim()}-dimensional tensor of {answer.dtype}")
        return answer.flatten().tolist()

    def all_ranks(rows, epoch, world_size, seed):
        return [read(rows, epoch, rank, world_size, seed) for rank in range(world_size)]

    def states():
        return torch.get_rng_state().tolist(), random.getstate()

    before, python_before = torch.get_rng_state(), random.getstate()
    try:
        torch.manual_seed(0)
        random.seed(0)
        start = states()
        ranks = [all_ranks(rows, epoch, world_size, seeds[0]) for epoch in range(epochs)]
        alone = [read(rows, epoch, 0, 1, seeds[0]) for epoch in range(3 * epochs)]
        others = [[all_ranks(rows, epoch, world_size, seed) for epoch in range(3)] for seed in seeds]
        small = [all_ranks(few, 0, many, seeds[0]) for few, many in ((12, 4), (3, 3), (1, 1), (3, 4), (0, 2))]
        end = states()
        torch.manual_seed(1)
        random.seed(1)
        again = [all_ranks(rows, epoch, world_size, seeds[0]) for epoch in range(3)]
    finally:
        torch.set_rng_state(before)
        random.setstate(python_before)
    return {
        "ranks": ranks,
        "alone": alone,
        "seeds": others,
        "kinds": sorted(set(kinds)),
        "repeated": again == ranks[:3],
        "untouched": start == end,
        "small": [[len(numbers) for numbers in ranks] for ranks in small],
    }


def read_rows_of_rank(observation: Observation, case: dict) -> Observation:
    """Compare what holds of the rows; which order it is, is free."""
    rows, world_size = case["rows"], case["world_size"]
    ranks, alone, seeds = (observation[name] for name in ("ranks", "alone", "seeds"))
    lengths = [sorted({len(epoch[rank]) for epoch in ranks}) for rank in range(world_size)]
    everything = [[number for rank in epoch for number in rank] for epoch in ranks]
    return {
        "what comes back": " or ".join(observation["kinds"]),
        f"how many of {rows} rows the {world_size} ranks read in an epoch": [
            counts[0] if len(counts) == 1 else counts for counts in lengths
        ],
        "how many rows each rank reads of 12, 3, 1, 3 and 0 rows with 4, 3, 1, 4 and 2 ranks": observation["small"],
        "every number is that of a row": all(number in range(rows) for epoch in [*everything, *alone] for number in epoch),
        "no rank reads a row twice in an epoch": all(
            len(set(rank)) == len(rank) for epoch in [*ranks, [], alone] for rank in epoch
        ),
        "how many of a rank's rows others read as well in an epoch": _shared(ranks),
        "the same arguments give the same rows, whatever random numbers the notebook has drawn": observation["repeated"],
        "the notebook's random state is as it was": observation["untouched"],
        f"how many orders there are in {len(ranks)} epochs with one seed": _different(ranks),
        f"how many orders one rank alone has in {len(alone)} epochs": _different(alone),
        "the list of epochs, of 0, 1 and 2, in which each seed gives another order": [
            epoch for epoch, of_epoch in enumerate(zip(*seeds, strict=True)) if _different(of_epoch) == len(seeds)
        ],
        "the order is shuffled": _is_shuffled(alone),
        "the order, compared with that of one rank alone,": _dealing(ranks, alone, rows, world_size),
        f"every row is read in some of {case['epochs']} epochs": set().union(*everything) >= set(range(rows)),
        "rank 0 reads other rows in other epochs": len({tuple(sorted(epoch[0])) for epoch in ranks}) > 1,
    }


def _different(orders: Sequence[list]) -> int:
    return len({str(order) for order in orders})


def _shared(epochs: list) -> str:
    """Say whether any number is among the rows of two ranks in an epoch, or all ranks have the same rows."""
    if all(sum(len(set(rank)) for rank in epoch) == len(set().union(*epoch)) for epoch in epochs):
        return "none"
    return "all" if all(set(rank) == set(epoch[0]) for epoch in epochs for rank in epoch) else "some"


def _is_shuffled(orders: list[list[int]]) -> bool:
    """Whether neighbours in the order are seldom neighbours by number, which in a random order are 2 in every `rows`."""
    steps = [abs(after - before) for order in orders for before, after in pairwise(order)]
    return sum(step == 1 for step in steps) < len(steps) / 2


def _dealing(ranks: list, alone: list, rows: int, world_size: int) -> str:
    """Say how the ranks' rows lie in the order that one rank alone reads."""
    each = rows // world_size
    whole = each * world_size
    late = rows - whole
    ways = {
        "is the same, dealt in turn": lambda order: [order[rank:whole:world_size] for rank in range(world_size)],
        "is the same, cut into blocks": lambda order: [order[rank * each : (rank + 1) * each] for rank in range(world_size)],
        "is the same, without its beginning": lambda order: [order[late + rank :: world_size] for rank in range(world_size)],
        "has the rows of each rank sorted": lambda order: [sorted(order[rank:whole:world_size]) for rank in range(world_size)],
    }
    for said, way in ways.items():
        if all(epoch == way(order) for epoch, order in zip(ranks, alone)):
            return said
    dealt = ways["is the same, dealt in turn"]
    if all(sorted(epoch) == sorted(dealt(order)) for epoch, order in zip(ranks, alone)):
        return "is the same, dealt to other ranks"
    return "is another one"


_SEEDED = "torch.Generator().manual_seed(1_000_003 * seed + epoch)"
_SEED = "1_000_003 * seed + epoch"
_ORDER = "torch.randperm(rows, generator=generator)"
_WHOLE = "rows - rows % world_size"
_ROWS = "order[:whole][rank::world_size]"

check_rows_of_rank = Exercise(
    spec=[rows_of_rank],
    driver=drive_rows_of_rank,
    reading=read_rows_of_rank,
    cases=lambda generator: [rows_case(generator)],
    mistakes={
        "ranks shuffle differently, because the rank is part of the seed: some rows are read twice and others never": {
            _SEED: f"{_SEED} + 7919 * rank",
        },
        "every epoch has the same order: the epoch has to be part of the generator's seed": {_SEED: "seed"},
        "every seed gives the same orders: the seed is not used": {_SEED: "epoch"},
        "every epoch and every seed have the same order: the generator has not been seeded with them": {
            _SEEDED: "torch.Generator()",
        },
        "seed 0 and epoch 0 have one order for all: a product of seed and epoch is 0 there": {_SEED: "seed * epoch"},
        "`order[:-0]` is empty: where nothing is left out, everything is to be read": {
            _ROWS: "order[: -(rows % world_size)][rank::world_size]",
        },
        "some ranks read a row more than others, and would wait for them for ever: leave the remainder out": {_WHOLE: "rows"},
        "the order is filled up, so that some rows are read twice: leave the remainder out": {
            _ROWS: "torch.cat([order, order[: -rows % world_size]])[rank::world_size]",
        },
        "every rank reads all rows: each takes every world_size-th": {_ROWS: "order"},
        "every rank reads the same rows: each starts at its own number": {_ROWS: "order[:whole][::world_size]"},
        "rank 0 does not begin with the first row of the order: ranks are numbered from 0": {
            _ROWS: "order[:whole][rank + 1 :: world_size]",
        },
        "the position at which a rank starts changes with the epoch: it is always the rank's own number": {
            _ROWS: "order[:whole][(rank + epoch) % world_size :: world_size]",
        },
        "each rank takes a block of the order: take every world_size-th": {
            _ROWS: "order[rank * (rows // world_size) : (rank + 1) * (rows // world_size)]",
        },
        "the remainder is left out at the beginning of the order: leave it out at the end": {
            _ROWS: "order[rows - whole :][rank::world_size]",
        },
        "the last rows of the data are never read: shuffle all rows, then leave out the remainder of the order": {
            _ORDER: "torch.randperm(rows - rows % world_size, generator=generator)",
        },
        "each rank shuffles its own rows, the same in every epoch: shuffle all rows, then deal them": {
            _ROWS: "torch.arange(whole)[rank::world_size][torch.randperm(whole // world_size, generator=generator)]",
        },
        "the order depends on the number of ranks: leave `world_size` out of the seed": {_SEED: f"{_SEED} + 7919 * world_size"},
        "the rows of a rank are sorted, and their random order is lost": {_ROWS: f"{_ROWS}.sort().values"},
        "the rows are not shuffled": {_ORDER: "torch.arange(rows)"},
        "the order is turned, not shuffled: every row is still followed by its neighbour": {
            _ORDER: "torch.arange(rows).roll(int(torch.randint(10**9, (), generator=generator)))",
        },
        "rows are drawn with repetition: `randperm` draws each once": {
            _ORDER: "torch.randint(rows, (rows,), generator=generator)",
        },
        "the rows are numbered from 1: the first one is 0": {_ORDER: "1 + torch.randperm(rows, generator=generator)"},
        "the notebook's own random state is set: seed a `torch.Generator`, not torch or Python": {
            _SEEDED: "torch.manual_seed(1_000_003 * seed + epoch)",
            _ORDER: "torch.randperm(rows)",
        },
        "the order is drawn from the notebook's random state, and the ranks' differ: pass `generator=` to `randperm`": {
            _ORDER: "torch.randperm(rows)",
        },
        "each call gives another order: seed the generator with `seed` and `epoch`, by `manual_seed`, in every call": {
            _SEEDED: "torch.Generator()\n    generator.seed()",
        },
        "the generator's seed comes from the notebook's: take `seed` and `epoch`": {_SEED: "torch.initial_seed() + epoch"},
        "a tensor of no numbers is not int64: `torch.tensor([])` is float32, unless it is given a dtype": {
            _ROWS: f"torch.tensor({_ROWS}.tolist())",
        },
        "a list comes back: return a tensor": {_ROWS: f"{_ROWS}.tolist()"},
        "nothing comes back: the `return` is missing": {f"return {_ROWS}": _ROWS},
    },
    variants={
        "seed + epoch, and a view with a row for each step": """
            def rows_of_rank(rows, epoch, rank, world_size, seed):
                generator = torch.Generator()
                generator.manual_seed(seed + epoch)
                steps = rows // world_size
                order = torch.randperm(rows, generator=generator)
                return order[: steps * world_size].view(steps, world_size)[:, rank]
        """,
        "Python's own shuffling": """
            def rows_of_rank(rows, epoch, rank, world_size, seed):
                import random

                order = list(range(rows))
                random.Random(f"{seed}, {epoch}").shuffle(order)
                count = rows // world_size
                return torch.tensor([order[step * world_size + rank] for step in range(count)], dtype=torch.long)
        """,
        "the random state is set back": """
            def rows_of_rank(rows, epoch, rank, world_size, seed):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(hash((seed, epoch)) % 2**32)
                    order = torch.rand(rows, dtype=torch.float64).argsort()
                return order[torch.arange(rows // world_size) * world_size + rank]
        """,
        "PyTorch's sampler": """
            def rows_of_rank(rows, epoch, rank, world_size, seed):
                from torch.utils.data import DistributedSampler

                sampler = DistributedSampler(range(rows), world_size, rank, seed=seed, drop_last=True)
                sampler.set_epoch(epoch)
                return torch.tensor(list(sampler), dtype=torch.int64)
        """,
    },
)
