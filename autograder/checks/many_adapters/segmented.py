"""Exercise 2: the same update, by segments of rows that share an adapter."""

import torch
from torch import Tensor

from autograder.checking.cases import normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.judging import PEAK_BYTES
from autograder.checks.many_adapters.gathered import gathered_case, gathered_tolerance


def segmented_update(x: Tensor, A: Tensor, B: Tensor, adapters: Tensor) -> Tensor:
    """Return B_a A_a x for every row's adapter a, and zeros where a is -1, one pair of products an adapter."""
    order = adapters.argsort(stable=True)
    slots, sizes = adapters[order].unique_consecutive(return_counts=True)
    update = x.new_zeros(x.shape[0], x.shape[1], B.shape[1])
    start = 0
    for slot, size in zip(slots.tolist(), sizes.tolist(), strict=True):
        rows = order[start : start + size]
        if slot >= 0:
            update[rows] = x[rows] @ A[slot].T @ B[slot].T
        start += size
    return update


def segmented_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return eight slots, of which a batch of twelve rows names three, in no order."""
    case = gathered_case(generator, dtype, slots=8)
    present = 1 + torch.randperm(7, generator=generator)[:3]  # slot 0 is absent, so slot numbers are not segment numbers
    rows = torch.cat([present.repeat_interleave(torch.tensor([3, 2, 4])), torch.full((3,), -1)])
    x = normal(generator, 12, 3, case["x"].shape[2], dtype=dtype)
    return case | {"x": x, "adapters": rows[torch.randperm(12, generator=generator)]}


def shared_case(generator: torch.Generator) -> dict:
    """Return 64 rows that share two adapters of rank 256: a copy of A for each row would take 64 MiB, and of B as much."""
    return {
        "x": normal(generator, 64, 1, 1024),
        "A": normal(generator, 2, 256, 1024) / 32,
        "B": normal(generator, 2, 1024, 256) / 16,
        "adapters": torch.randint(0, 2, (64,), generator=generator),
    }


def drive_segmented(segmented_update, x, A, B, adapters):
    """Return the update, the adapters' numbers after the call, and the number of matrix products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")
            return function(*args, **(kwargs or {}))

    with Products() as products:
        update = segmented_update(x, A, B, adapters)
    return {"update": update, "after": adapters.clone(), "products": products.count}


def read_segmented(observation: Observation, case: dict) -> Observation:
    """Name what is compared."""
    return {
        "the update": observation["update"],
        "`adapters` after the call": observation["after"],
        "the number of matrix products, two for each adapter that a row names,": observation["products"],
    }


def segmented_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding as for gathered factors: the products are the same, taken in another order."""
    return gathered_tolerance(case)


_ROWS = "order[start : start + size]"
_WRITE = "update[rows] = x[rows] @ A[slot].T @ B[slot].T"
_LOOP = "for slot, size in zip(slots.tolist(), sizes.tolist(), strict=True):"
_SEGMENTS = "adapters[order].unique_consecutive(return_counts=True)"

check_segmented = Exercise(
    spec=[segmented_update],
    driver=drive_segmented,
    reading=read_segmented,
    cases=lambda generator: [segmented_case(generator), shared_case(generator)],
    tolerance=segmented_tolerance,
    measures_peak=lambda case: len(case["x"]) == 64,
    at_most=frozenset({PEAK_BYTES, "the number of matrix products, two for each adapter that a row names,"}),
    mistakes={
        "the result is left in sorted order: every update goes back to the row that it belongs to": {
            _WRITE: "update[start : start + size] = x[rows] @ A[slot].T @ B[slot].T",
        },
        "the order was applied a second time instead of being undone: write to `update[order]`, or index with its argsort": {
            _WRITE: "update[start : start + size] = x[rows] @ A[slot].T @ B[slot].T",
            "return update": "return update[order]",
        },
        "the adapters were sorted, and the rows of x were not": {
            _WRITE: "update[rows] = x[start : start + size] @ A[slot].T @ B[slot].T",
        },
        "rows without an adapter get the last slot's: -1 is a valid index in Python": {"if slot >= 0:": "if True:"},
        "slot 0 is taken for no adapter: only -1 means that": {
            "if slot >= 0:": "if slot > 0:",
        },
        "the number of a segment is taken for its slot: the k-th segment need not be slot k": {
            _LOOP: "for slot, size in enumerate(sizes.tolist(), -1):",
        },
        "the last segment is missing": {
            _LOOP: _LOOP.replace("slots.tolist(), sizes.tolist()", "slots.tolist()[:-1], sizes.tolist()[:-1]")
        },
        "all segments begin at row 0: move the start on after each": {"start += size": "pass"},
        "a segment also takes the first row of the next: its end is not included": {
            _LOOP: "for slot, size in reversed(list(zip(slots.tolist(), sizes.tolist(), strict=True))):",
            _ROWS: "order[len(order) - start - size : len(order) - start + 1]",
        },
        "the segments were cut before sorting: an adapter's rows are then in many segments": {
            "adapters.argsort(stable=True)": "torch.arange(len(adapters))",
        },
        "every row is a segment of its own: sort, or pick an adapter's rows by a mask, and multiply them together": {
            _SEGMENTS: "adapters[order], torch.ones_like(adapters)",
        },
        "adapters that no row names are multiplied as well: go through the adapters of the batch": {
            _LOOP: "for slot, size in [(slot, (adapters == slot).sum().item()) for slot in range(-1, len(A))]:",
        },
        "every row gets a copy of its factors, as when they are gathered: a segment uses the one that is there": {
            _SEGMENTS: "adapters[:1], adapters[:1]",
            _LOOP: "for slot, size in [(0, len(x))]:",
            _WRITE: "update[rows] = (x @ A[adapters].mT @ B[adapters].mT * (adapters >= 0)[:, None, None])[rows]",
        },
        "nothing comes back: the `return` is missing": {"return update": "pass"},
    },
    variants={
        "a mask an adapter, without sorting": """
            def segmented_update(x, A, B, adapters):
                update = torch.zeros(*x.shape[:2], B.shape[1], dtype=x.dtype)
                for slot in adapters.unique().tolist():
                    if slot != -1:
                        rows = adapters == slot
                        update[rows] = torch.nn.functional.linear(torch.nn.functional.linear(x[rows], A[slot]), B[slot])
                return update
        """,
        "sorted, multiplied, and sorted back": """
            def segmented_update(x, A, B, adapters):
                order = adapters.argsort()
                counts = torch.bincount(adapters + 1, minlength=len(A) + 1).tolist()
                parts = []
                for slot, part in enumerate(x[order].split(counts), -1):
                    if slot < 0:
                        parts.append(part.new_zeros(len(part), part.shape[1], B.shape[1]))
                    elif len(part):
                        parts.append(part @ A[slot].T @ B[slot].T)
                return torch.cat(parts)[order.argsort()]
        """,
        "index_copy_": {_WRITE: "update.index_copy_(0, rows, x.index_select(0, rows) @ A[slot].T @ B[slot].T)"},
    },
)
