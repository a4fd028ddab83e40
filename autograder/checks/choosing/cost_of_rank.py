"""`cost_of_rank`: the bytes of one more rank."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from autograder.checks.choosing.cases import dice
from autograder.exercise import Exercise
from peftlab.memory import StepMemory


def cost_of_rank(measure: Callable[[int], StepMemory], ranks: Sequence[int]) -> list[dict[str, float]]:
    """Return, from each rank to the next, the bytes that one more of them costs, by category and in the file."""
    steps = [measure(rank) for rank in ranks]
    costs = []
    for (low, before), (high, after) in pairwise(zip(ranks, steps)):
        cost = {}
        for category in ("parameters", "gradients", "optimizer_state", "activations"):
            cost[category] = (getattr(after, category) - getattr(before, category)) / (high - low)
        cost["file"] = cost["gradients"]
        costs.append(cost)
    return costs


def rank_case(generator: torch.Generator, ranks: Sequence[int] = (2, 5, 16, 24)) -> dict:
    """Return a table of measurements; no two steps cost the same, so that no mean can hide."""
    dicing = dice(generator)
    sizes = [[10**6, 10**3, 3 * 10**3, 10**5, 2 * 10**6]]
    for low, high in pairwise(ranks):
        trained, kept = dicing.randrange(50, 90), dicing.randrange(10, 40)
        step = [2 * trained, 2 * trained, 4 * trained, kept, 3 * trained + kept]
        sizes.append([before + (high - low) * each for before, each in zip(sizes[-1], step)])
    return {"ranks": list(ranks), "sizes": sizes}


def drive_cost(cost_of_rank, ranks, sizes):
    """Ask for the costs; the measurement is a table here, and counts how often it is looked up."""
    from peftlab.memory import StepMemory

    asked = []

    def measure(rank):
        asked.append(rank)
        return StepMemory(*sizes[ranks.index(rank)])

    costs = cost_of_rank(measure, list(ranks))
    if not isinstance(costs, list):
        return {"what cost_of_rank returns": type(costs).__name__}
    seen = {"how many steps from one rank to the next": len(costs)}
    for number, cost in enumerate(costs):
        if not isinstance(cost, dict):
            return seen | {"what the list holds": type(cost).__name__}
        seen["the list of names in each dict"] = sorted(str(name) for name in cost)
        for name, value in cost.items():
            seen[f"`{name}` of step {number + 1}"] = value
    return seen | {"a rank is measured more than once": len(set(asked)) < len(asked)}


_DIFFERENCE = "(getattr(after, category) - getattr(before, category)) / (high - low)"

check_cost_of_rank = Exercise(
    spec=[cost_of_rank],
    cases=lambda generator: [rank_case(generator)],
    driver=drive_cost,
    # A quotient of two integers in fp64.
    tolerance=lambda case: {
        f"`{name}` of step {number}": 1e-6
        for name in ("parameters", "gradients", "optimizer_state", "activations", "file")
        for number in range(1, len(case["ranks"]))
    },
    mistakes={
        "the difference is for the whole step: divide by the number of ranks between": {" / (high - low)": ""},
        "the difference is divided by the higher rank: divide by the number of ranks between": {"(high - low)": "high"},
        "every rank is compared with the first: marginal cost is from one rank to the next": {
            "getattr(before, category)": "getattr(steps[0], category)",
            "(high - low)": "(high - ranks[0])",
        },
        "this is the average cost of a rank, the base model included: take the difference to the rank before": {
            _DIFFERENCE: "getattr(after, category) / high"
        },
        "the sign is wrong: the higher rank minus the lower": {
            _DIFFERENCE: "(getattr(before, category) - getattr(after, category)) / (high - low)"
        },
        "activations are the peak's difference: the peak holds the other categories as well": {
            _DIFFERENCE: "(getattr(after, c := category.replace('activations', 'peak')) - getattr(before, c)) / (high - low)"
        },
        "the file holds the factors once; it is as large as their gradients, and has no optimizer state in it": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = cost["gradients"] + cost["optimizer_state"]'
        },
        "the file is counted in fp32: it has the dtype of the weights, and so the bytes of the gradients": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = 2 * cost["gradients"]'
        },
        "the file's whole size is given: what one more rank adds to it is wanted": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = after.gradients'
        },
        "`file` is missing": {'cost["file"] = cost["gradients"]': "pass"},
        "the optimizer's state is missing: AdamW keeps two numbers for each trained one": {'"optimizer_state", ': ""},
        "bytes are rounded down: use / rather than //": {"/ (high - low)": "// (high - low) + 0.4"},
        "every rank but the ends is measured twice: measure once and keep it, for a measurement takes seconds": {
            "getattr(before, category)": "getattr(measure(low), category)",
        },
        "there is one entry too many: between n ranks are n - 1 steps": {
            "pairwise(zip(ranks, steps))": "[((0, steps[0]), (ranks[0], steps[0])), *pairwise(zip(ranks, steps))]"
        },
    },
    variants={
        "by index": """
            def cost_of_rank(measure, ranks):
                measured = {rank: measure(rank) for rank in ranks}
                found = []
                for i in range(1, len(ranks)):
                    more = ranks[i] - ranks[i - 1]
                    a, b = measured[ranks[i - 1]], measured[ranks[i]]
                    found.append({
                        "parameters": (b.parameters - a.parameters) / more,
                        "gradients": (b.gradients - a.gradients) / more,
                        "optimizer_state": (b.optimizer_state - a.optimizer_state) / more,
                        "activations": (b.activations - a.activations) / more,
                        "file": (b.gradients - a.gradients) / more,
                    })
                return found
        """,
        "from the fields of the dataclass": """
            def cost_of_rank(measure, ranks):
                from dataclasses import asdict
                steps = [asdict(measure(rank)) for rank in ranks]
                costs = []
                for low, high, before, after in zip(ranks, ranks[1:], steps, steps[1:]):
                    cost = {name: (after[name] - before[name]) / (high - low) for name in after if name != "peak"}
                    costs.append(cost | {"file": cost["gradients"]})
                return costs
        """,
        "measured as it goes": """
            def cost_of_rank(measure, ranks):
                costs, last = [], None
                for rank in ranks:
                    now = rank, measure(rank)
                    if last:
                        per = 1 / (now[0] - last[0])
                        cost = {n: per * (getattr(now[1], n) - getattr(last[1], n))
                                for n in ("gradients", "parameters", "activations", "optimizer_state")}
                        cost["file"] = cost["gradients"]
                        costs.append(cost)
                    last = now
                return costs
        """,
    },
)
