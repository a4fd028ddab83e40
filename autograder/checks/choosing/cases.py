"""What random cases of several exercises are made of."""

import random

import torch

from autograder.cases import between


def dice(generator: torch.Generator) -> random.Random:
    """Return Python's own random numbers, for what is no tensor, from the generator's next one."""
    return random.Random(between(generator, 0, 2**31 - 1))
