"""Bug hunt: out of memory in the middle of the night."""

from collections.abc import Sequence

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice


def heaviest_batch(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
    """Return rows and padded length of the batch with the most tokens, padding included (transformers issue 11388)."""
    most = (0, 0)
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        rows, longest = len(batch), max(batch)
        if rows * longest > most[0] * most[1]:
            most = rows, longest
    return most


def lengths_case(generator: torch.Generator, kind: str = "a long row") -> dict:
    """Return the lengths of an epoch's rows, in the order in which they are trained on.

    One batch has many middling rows. Of the others

    - with "a long row", one has a single long one, and the last, of one row, the longest of all;
    - with "a long row at the end", the last one, one row short of a full batch, has a row that makes it the heaviest;
    - with "middling rows", none has anything longer;
    - with "equals", the last one has half as many rows as the heaviest, each twice as long as its longest.
    """
    dicing = dice(generator)
    size = dicing.choice([6, 8]) if kind == "equals" else dicing.randrange(5, 9)
    batches = [[dicing.randrange(20, 60) for _ in range(size)] for _ in range(6)]
    batches[0][0] = 65  # so that the first batch is not the lightest
    batches[2] = dicing.sample(range(90, 110), size)
    last = [dicing.randrange(40, 60)]
    if kind == "equals":
        last = [2 * max(batches[2])] * (size // 2)
    elif kind != "middling rows":
        batches[4][dicing.randrange(size)] = dicing.randrange(190, 210)
        last = [dicing.randrange(300, 320)]
    if kind == "a long row at the end":
        last = [dicing.randrange(500, 520), *(30 for _ in range(size - 2))]
    return {"lengths": [length for batch in [*batches, last] for length in batch], "batch_size": size}


def drive_heaviest(heaviest_batch, lengths, batch_size):
    """Ask for one epoch."""
    given = list(lengths)
    answer = heaviest_batch(given, batch_size)
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return {"what heaviest_batch returns": type(answer).__name__}
    return {
        "the list of rows and padded length": [int(number) for number in answer],
        "the lengths that were given are changed": given != list(lengths),
    }


_LOOP = "for start in range(0, len(lengths), batch_size):"

check_heaviest_batch = Exercise(
    spec=[heaviest_batch],
    cases=lambda generator: [
        lengths_case(generator, kind) for kind in ("a long row", "a long row at the end", "middling rows", "equals")
    ],
    driver=drive_heaviest,
    mistakes={
        "only the first batch is looked at: the heaviest one may come an hour later": {_LOOP: "for start in [0]:"},
        "the last batch is left out because it has fewer rows: it can be the heaviest all the same": {
            _LOOP: "for start in range(0, len(lengths) - batch_size + 1, batch_size):"
        },
        "padding is not counted: every row of a batch is as long as its longest": {
            _LOOP: "heaviest = max((lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)), key=sum)\n"
            "    return len(heaviest), max(heaviest)\n    " + _LOOP
        },
        "the batch with the longest row is taken: with few rows it can be light": {
            "if rows * longest > most[0] * most[1]:": "if longest > most[1]:"
        },
        "the longest row of all is put into a full batch: that is safe, and more than is needed": {
            "    return most": "    return batch_size, max(lengths)"
        },
        "the rows are sorted by length first: they are trained on in the order given": {
            "most = (0, 0)": "most = (0, 0)\n    lengths = sorted(lengths)"
        },
        "the given list was sorted in place": {"most = (0, 0)": "most = (0, 0)\n    lengths.sort()"},
        "of two batches with as many tokens the last one, of longer rows, is taken: take the first": {
            "rows * longest > most[0]": "rows * longest >= most[0]"
        },
        "rows and length have changed places": {"    return most": "    return most[::-1]"},
        "the lightest batch is returned": {"most = (0, 0)": "most = (10**4, 10**4)", "* longest > most": "* longest < most"},
        "the shortest row of a batch is taken for its length": {"max(batch)": "min(batch)"},
        "a batch has one row too many": {"start + batch_size]": "start + batch_size + 1]"},
    },
    variants={
        "with max": """
            def heaviest_batch(lengths, batch_size):
                batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
                heaviest = max(batches, key=lambda batch: len(batch) * max(batch))
                return len(heaviest), max(heaviest)
        """,
        "with fewer tokens, then with fewer rows, it is not the heaviest": {
            "if rows * longest > most[0] * most[1]:": "if (rows * longest, rows) > (most[0] * most[1], most[0]):"
        },
        "row by row": """
            def heaviest_batch(lengths, batch_size):
                sizes, rows, longest = [], 0, 0
                for length in lengths:
                    rows, longest = rows + 1, max(longest, length)
                    if rows == batch_size:
                        sizes.append((rows, longest))
                        rows, longest = 0, 0
                if rows:
                    sizes.append((rows, longest))
                return max(sizes, key=lambda size: size[0] * size[1])
        """,
        "with itertools": """
            def heaviest_batch(lengths, batch_size):
                from itertools import islice
                rest, best = iter(lengths), None
                while batch := list(islice(rest, batch_size)):
                    size = [len(batch), max(batch)]
                    if best is None or size[0] * size[1] > best[0] * best[1]:
                        best = size
                return best
        """,
    },
)
"""Every exercise of the unit, by the name of its check."""
