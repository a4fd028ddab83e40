"""Exercise 1: the factors that each row names, gathered and applied in two batched products."""

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.judging import PEAK_BYTES


def gathered_update(x: Tensor, A: Tensor, B: Tensor, adapters: Tensor) -> Tensor:
    """Return B_a A_a x for every row's adapter a, and zeros where a is -1."""
    named = adapters.clamp(min=0)
    compressed = torch.einsum("bsi,bri->bsr", x, A[named])
    update = torch.einsum("bsr,bor->bso", compressed, B[named])
    return torch.where(adapters[:, None, None] >= 0, update, 0.0)


def gathered_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, slots: int = 4) -> dict:
    """Return adapters, and a batch with one row that has none, rows that share one, and no order."""
    rank, in_features, out_features = between(generator, 2, 3), between(generator, 8, 10), between(generator, 5, 7)
    rows = torch.tensor([2, -1, 0, slots - 1, 2, 0])
    return {
        "x": normal(generator, len(rows), 3, in_features, dtype=dtype),
        "A": normal(generator, slots, rank, in_features, dtype=dtype),
        "B": normal(generator, slots, out_features, rank, dtype=dtype),
        "adapters": torch.cat([rows[:1], rows[1:][torch.randperm(5, generator=generator)]]),  # the first row has an adapter
    }


def large_case(generator: torch.Generator) -> dict:
    """Return 16 rows, each with an adapter of its own: the products B A would take 64 MiB, the factors take 1."""
    return {
        "x": normal(generator, 16, 1, 1024),
        "A": normal(generator, 16, 8, 1024),
        "B": normal(generator, 16, 1024, 8),
        "adapters": torch.randperm(16, generator=generator),
    }


def drive_gathered(gathered_update, x, A, B, adapters):
    """Return the update, the adapters' numbers after the call, and how many operations one and three batches take."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    with Count() as once:
        update = gathered_update(x, A, B, adapters)
    after = adapters.clone()
    x, adapters = x.repeat(3, 1, 1), adapters.repeat(3)
    with Count() as thrice:
        gathered_update(x, A, B, adapters)
    return {"update": update, "after": after, "operations": [once.operations, thrice.operations]}


def read_gathered(observation: Observation, case: dict) -> Observation:
    """Compare the numbers of operations."""
    once, thrice = observation["operations"]
    return {
        "the update": observation["update"],
        "`adapters` after the call": observation["after"],
        "how many more operations it takes for three times as many rows": thrice - once,
    }


def gathered_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A dot product of n terms is off by at most n * u * (sum of |terms|), u = eps / 2; the chain B (A x) has in_features + rank
    roundings along its longest path, (B A) x as many, and two answers differ by twice one's error.
    """
    x, A, B = (case[name].double().abs() for name in ("x", "A", "B"))
    largest = (x.flatten(0, 1) @ A.amax(0).T @ B.amax(0).T).max().item()  # over all slots at once
    return {
        "the update": (A.shape[2] + A.shape[1]) * torch.finfo(case["x"].dtype).eps * largest,
        PEAK_BYTES: 32 * 2**20,
    }


_COMPRESSED = 'torch.einsum("bsi,bri->bsr", x, A[named])'
_UPDATE = 'torch.einsum("bsr,bor->bso", compressed, B[named])'
_MASKED = "torch.where(adapters[:, None, None] >= 0, update, 0.0)"

check_gathered = Exercise(
    spec=[gathered_update],
    driver=drive_gathered,
    reading=read_gathered,
    cases=lambda generator: [gathered_case(generator), large_case(generator)],
    tolerance=gathered_tolerance,
    measures_peak=lambda case: len(case["A"]) == 16,
    at_most=frozenset({PEAK_BYTES, "how many more operations it takes for three times as many rows"}),
    mistakes={
        "a row without an adapter gets the last slot's: -1 is a valid index in Python, so rows without one need a mask": {
            "adapters.clamp(min=0)": "adapters",
            _MASKED: "update",
        },
        "a row without an adapter gets slot 0's: set its update to zero": {_MASKED: "update"},
        "an adapter is applied to the wrong row: the slots were sorted, and the rows were not": {
            "adapters.clamp(min=0)": "adapters.sort().values.clamp(min=0)",
        },
        "every row gets the first row's adapter: gather with the whole of `adapters`": {
            "adapters.clamp(min=0)": "adapters[:1].clamp(min=0).expand(len(adapters))",
        },
        "A is the row's own, B is slot 0's for all rows: gather both": {"B[named]": "B[torch.zeros_like(named)]"},
        "B is the row's own, A is slot 0's for all rows: gather both": {"A[named]": "A[torch.zeros_like(named)]"},
        "slot 0 is taken for no adapter: only -1 means that": {_MASKED: _MASKED.replace(">= 0", "> 0")},
        "rows without an adapter are missing in the result: they get zeros": {_MASKED: "update[adapters >= 0]"},
        "only each row's last token gets the update: all of its tokens do": {
            _MASKED: "torch.cat([torch.zeros_like(update[:, :-1]), update[:, -1:]], 1)",
        },
        "`adapters` was changed in place, and the next layer reads it too: `clamp_` is in place, `clamp` is not": {
            "adapters.clamp(min=0)": "adapters.clamp_(min=0)",
        },
        "rows are taken one by one, in a Python loop: gather the factors and multiply all rows at once": {
            _COMPRESSED: "torch.stack([row @ A[slot].T for row, slot in zip(x, named)])",
        },
        "B A is built for every row, out × in numbers each: multiply x by A first, then by B": {
            _COMPRESSED: "B[named] @ A[named]",
            _UPDATE: "x @ compressed.mT",
        },
        "the update is summed over the batch: keep the batch's dimension": {_MASKED: "update.sum(0, keepdim=True)"},
        "nothing comes back: the `return` is missing": {f"return {_MASKED}": "update"},
    },
    variants={
        "bmm and a mask": {
            _COMPRESSED: "torch.bmm(x, A[named].mT)",
            _UPDATE: "torch.bmm(compressed, B[named].mT)",
            _MASKED: "update * (adapters >= 0)[:, None, None]",
        },
        "a slot of zeros at the end, which -1 names": """
            def gathered_update(x, A, B, adapters):
                A = torch.cat([A, torch.zeros_like(A[:1])])
                B = torch.cat([B, torch.zeros_like(B[:1])])
                return x @ A[adapters].transpose(1, 2) @ B[adapters].transpose(1, 2)
        """,
        "index_select, and the input masked": {
            _COMPRESSED: "torch.matmul(x.masked_fill((adapters < 0)[:, None, None], 0), A.index_select(0, named).mT)",
            _UPDATE: "torch.matmul(compressed, B.index_select(0, named).mT)",
            _MASKED: "update",
        },
    },
)
