"""`largest_batch`: the most rows that fit."""

from collections.abc import Callable

import torch

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise


def largest_batch(peak: Callable[[int], float], usable: float, limit: int) -> int:
    """Return the largest batch up to `limit` whose peak is within `usable` bytes; 0 if not even one sequence fits."""
    if peak(1) > usable:
        return 0
    fits, too_large = 1, 2
    while too_large <= limit and peak(too_large) <= usable:
        fits, too_large = too_large, 2 * too_large
    too_large = min(too_large, limit + 1)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak(middle) <= usable:
            fits = middle
        else:
            too_large = middle
    return fits


def batch_case(generator: torch.Generator, limit: int = 200) -> dict:
    """Return stages of training steps, [bytes at any batch, bytes a sequence], and what may be used."""
    fixed, each = between(generator, 10_000, 20_000), between(generator, 500, 900)
    batch = between(generator, limit // 3, limit // 2 - 3)
    batch += batch in (64, 128)  # no power of two
    flat = fixed + each * 9 + each // 2  # the optimizer's stage is the largest up to a batch of nine
    exactly = fixed + each * batch
    return {
        "situations": [
            ["where it just fits", [[fixed, each]], exactly, limit],
            ["where one byte is missing", [[fixed, each]], exactly - 1, limit],
            ["where the first batches have the same peak", [[flat, 0], [fixed, each]], exactly + each // 2, limit],
            ["where it grows faster later on", [[fixed, each], [fixed - 20 * each, 3 * each]], exactly, limit],
            [
                "where the peak is flat for long, and then steep",
                [[50 * flat, 0], [-8 * limit * flat, 30 * flat]],
                51 * flat,
                limit,
            ],
            ["where one sequence is too long", [[fixed, each]], fixed + each - 1, limit],
            ["where only one sequence fits", [[fixed, each]], fixed + each, limit],
            ["where more than the limit would fit", [[fixed, each]], fixed + 3 * each * limit, limit],
            ["where the limit itself just fits", [[fixed, each]], fixed + each * limit, limit],
            ["where the limit is 1", [[fixed, each]], fixed + 5 * each, 1],
        ]
    }


def drive_largest(largest_batch, situations):
    """Ask for several machines; the peak is the largest of a step's stages, each of which grows along a line."""
    import math

    seen = {}
    for label, stages, usable, limit in situations:
        asked = []

        def peak(batch, stages=stages, asked=asked):
            asked.append(batch)
            if len(asked) > 10_000:
                raise RuntimeError("10,000 measurements and no end")
            return max(fixed + each * batch for fixed, each in stages)

        answer = largest_batch(peak, usable, limit)
        seen |= {
            f"the type of the answer {label}": type(answer).__name__,
            f"the largest batch {label}": answer if isinstance(answer, int | float) else repr(answer),
            f"a batch below 1 or above the limit is measured {label}": any(not 1 <= batch <= limit for batch in asked),
            f"more than 2 log2(limit) + 2 measurements are made {label}": len(asked) > 2 * math.log2(limit) + 2,
        }
    return seen


_SEARCH = "while too_large - fits > 1:"
_ANSWER = "    return fits\n"

check_largest_batch = Exercise(
    spec=[largest_batch],
    cases=lambda generator: [batch_case(generator), batch_case(generator, limit=90)],
    driver=drive_largest,
    mistakes={
        "what just fits is refused: the peak may be as large as what is usable": {
            "if peak(middle) <= usable:": "if peak(middle) < usable:",
            "and peak(too_large) <= usable": "and peak(too_large) < usable",
            "if peak(1) > usable:": "if peak(1) >= usable:",
        },
        "a batch of 1 is returned where not even one sequence fits: that is 0": {
            "if peak(1) > usable:\n        return 0\n": "pass\n",
            "fits, too_large = 1, 2": "fits, too_large = 1, 2",
        },
        "a line is drawn through the peaks of 1 and 2 sequences: a step's peak is the largest of several stages, and no line": {
            _SEARCH: "first, each = peak(1), max(peak(2) - peak(1), 1e-9) if limit > 1 else 1\n    "
            "return min(limit, int((usable - first) // each) + 1)\n    while too_large - fits > 1:",
            "while too_large <= limit and peak(too_large) <= usable:": "while False:",
        },
        "the search goes by a line between two peaks, and then one by one: where the line is bent that takes too many measurements": """
            def largest_batch(peak, usable, limit):
                first, last = peak(1), peak(limit)
                if first > usable:
                    return 0
                if last <= usable:
                    return limit
                guess = 1 + int((usable - first) / max(last - first, 1) * (limit - 1))
                while guess > 1 and peak(guess) > usable:
                    guess -= 1
                while guess + 1 < limit and peak(guess + 1) <= usable:
                    guess += 1
                return guess
        """,
        "the batch is what is usable, divided by the peak of one sequence: weights are there only once": {
            _SEARCH: "return min(limit, int(usable // peak(1)))\n    while too_large - fits > 1:",
            "while too_large <= limit and peak(too_large) <= usable:": "while False:",
        },
        "only powers of two are tried: search between the last that fits and the first that does not": {
            _SEARCH: "while False:"
        },
        "every batch is measured one after the other: each costs seconds; double, then halve the interval": {
            "fits, too_large = too_large, 2 * too_large": "fits, too_large = too_large, too_large + 1"
        },
        "the first batch that does not fit is returned: the answer is the one before it": {_ANSWER: "    return too_large\n"},
        "the answer is one too small": {_ANSWER: "    return max(fits - 1, 1)\n"},
        "the limit is passed: nothing above it is asked for": {
            "while too_large <= limit and peak(too_large) <= usable:": "while peak(too_large) <= usable:",
            "    too_large = min(too_large, limit + 1)\n": "",
        },
        "the limit itself is never tried": {"min(too_large, limit + 1)": "min(too_large, max(limit, 2))"},
        "the answer is a float: use // where you halve": {"return fits\n": "return float(fits)\n"},
        "the peak is measured at a batch of 0, which there is not": {
            "if peak(1) > usable:": "if peak(0) > usable or peak(1) > usable:"
        },
    },
    variants={
        "halving alone": """
            def largest_batch(peak, usable, limit):
                low, high = 0, limit + 1
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if peak(middle) <= usable else (low, middle)
                return low
        """,
        "with bisect": """
            def largest_batch(peak, usable, limit):
                from bisect import bisect_right
                return bisect_right(range(1, limit + 1), usable, key=peak)
        """,
        "recursively": """
            def largest_batch(peak, usable, limit):
                def between(low, high):
                    if low == high:
                        return low
                    middle = low + (high - low + 1) // 2
                    return between(middle, high) if peak(middle) <= usable else between(low, middle - 1)
                return between(0, limit)
        """,
        "by bits": """
            def largest_batch(peak, usable, limit):
                batch = 0
                for bit in reversed(range(limit.bit_length())):
                    larger = batch + 2**bit
                    if larger <= limit and peak(larger) <= usable:
                        batch = larger
                return batch
        """,
    },
)
