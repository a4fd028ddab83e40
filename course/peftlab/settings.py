"""The one setting that shortens the course's experiments."""

import os


def short() -> bool:
    """True if `PEFTLAB_SHORT` is set to anything but 0: experiments then take two steps on a few examples.

    Meant for seeing quickly that every cell runs; the numbers mean nothing then, and the rows say so.
    """
    return os.environ.get("PEFTLAB_SHORT", "0") not in ("", "0")


def steps(wanted: int) -> int:
    """Return how many training steps to take: `wanted`, or at most two in a short run."""
    return min(wanted, 2) if short() else wanted


def examples(wanted: int) -> int:
    """Return how many examples to score: `wanted`, or at most eight in a short run."""
    return min(wanted, 8) if short() else wanted


def rows(wanted: int) -> int:
    """Return how many rows a batch has: `wanted`, or at most two in a short run."""
    return min(wanted, 2) if short() else wanted
