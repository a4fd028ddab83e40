"""Exercise 1: the bytes that each rank sends in a training step, by what is sharded."""

import torch

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import attempt
from peftlab.distributed import bytes_sent


def sent_in_step(frozen: int, trained: int, world_size: int, strategy: str) -> float:
    """Return the bytes of all collectives of a step, for one rank."""
    if strategy == "data parallel":
        collectives = [("all_reduce", trained)]
    elif strategy in ("ZeRO-1", "ZeRO-2"):
        collectives = [("reduce_scatter", trained), ("all_gather", trained)]
    elif strategy == "ZeRO-3":
        forward, backward = ("all_gather", frozen + trained), ("all_gather", frozen + trained)
        collectives = [forward, backward, ("reduce_scatter", trained)]
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    return sum(bytes_sent(collective, size, world_size) for collective, size in collectives)


def step_case(generator: torch.Generator, world_size: int | None = None, frozen: int | None = None) -> dict:
    """Return the bytes of a model of which a small part is trained; the world size divides neither part, unless it is given."""
    world_size = world_size or between(generator, 3, 9)
    return {
        "frozen": world_size * between(generator, 10**8, 10**9) + 1 if frozen is None else frozen,
        "trained": world_size * between(generator, 10**6, 10**7) + 1,
        "world_size": world_size,
    }


def drive_sent_in_step(sent_in_step, frozen, trained, world_size):
    """Ask for each strategy, and for two that there are not."""
    sent = {}
    for strategy in ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        sent[f"the bytes that a rank of {world_size} sends under {strategy}"] = float(
            sent_in_step(frozen, trained, world_size, strategy)
        )
    errors = []
    for strategy in ("ZeRO-4", "tensor parallel"):
        errors.append(attempt(sent_in_step, frozen, trained, world_size, strategy).split(":")[0])
    return {**sent, "the list of errors at the strategies 'ZeRO-4' and 'tensor parallel'": errors}


def step_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    At most three terms, each rounded three times (the quotient, the product, the factor 2) and then added: six roundings of
    half an eps for an answer, of at most 3 * (frozen + trained); two answers differ by twice that.
    """
    largest = 3 * (case["frozen"] + case["trained"])
    strategies = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
    bound = 6 * torch.finfo(torch.float64).eps * largest
    return {f"the bytes that a rank of {case['world_size']} sends under {strategy}": bound for strategy in strategies}


_DATA_PARALLEL = '[("all_reduce", trained)]'
_ZERO_2 = '[("reduce_scatter", trained), ("all_gather", trained)]'
_TWICE = '("all_gather", frozen + trained)\n'
_ZERO_3 = '[forward, backward, ("reduce_scatter", trained)]'
_SUM = "sum(bytes_sent(collective, size, world_size) for collective, size in collectives)"
_UNKNOWN = 'raise ValueError(f"unknown strategy {strategy!r}")'

check_sent_in_step = Exercise(
    spec=[sent_in_step],
    cases=lambda generator: [step_case(generator), step_case(generator, world_size=1)],
    driver=drive_sent_in_step,
    helpers=[attempt],
    tolerance=step_tolerance,
    mistakes={
        "data parallel: the frozen parameters are counted too, and they have no gradients": {
            _DATA_PARALLEL: '[("all_reduce", frozen + trained)]',
        },
        "data parallel: a reduce-scatter alone leaves each rank with a part of the gradients; an all-reduce sends twice as much": {
            _DATA_PARALLEL: '[("reduce_scatter", trained)]',
        },
        "data parallel: every rank has made the same update, so the parameters need not be sent after it": {
            _DATA_PARALLEL: '[("all_reduce", trained), ("all_gather", trained)]',
        },
        "ZeRO-1 and ZeRO-2: one collective is missing; gradients are sent, and each rank then sends the part that it has updated": {
            _ZERO_2: '[("reduce_scatter", trained)]',
        },
        "ZeRO-1 and ZeRO-2: an all-reduce of the gradients; a rank needs the sum of its own part only, which is a reduce-scatter": {
            _ZERO_2: '[("all_reduce", trained), ("all_gather", trained)]',
        },
        "ZeRO-1: an all-reduce of the gradients; here it sends what ZeRO-2 sends": {
            _ZERO_2: '[("all_reduce" if strategy == "ZeRO-1" else "reduce_scatter", trained), ("all_gather", trained)]',
        },
        "ZeRO-1 and ZeRO-2: the frozen parameters are gathered too, and they have not changed": {
            _ZERO_2: '[("reduce_scatter", trained), ("all_gather", frozen + trained)]',
        },
        "ZeRO-3: the frozen parameters are missing; they are sharded too, and each layer has to be whole before it can compute": {
            "forward, backward = ": 'forward, backward = ("all_gather", trained), ("all_gather", trained)  # ',
        },
        "ZeRO-3: the parameters are gathered once; backward gathers them again, because they are freed after forward": {
            _ZERO_3: '[forward, ("reduce_scatter", trained)]',
        },
        "ZeRO-3: the frozen parameters are not gathered in backward; a frozen weight makes the gradient of its layer's input": {
            _TWICE: '("all_gather", trained)\n',
        },
        "ZeRO-3: the trained parameters are not gathered; they are sharded too": {
            "forward, backward = ": 'forward, backward = ("all_gather", frozen), ("all_gather", frozen)  # ',
        },
        "ZeRO-3: gradients of the frozen parameters are sent, and there are none": {
            _ZERO_3: '[forward, backward, ("reduce_scatter", frozen + trained)]',
        },
        "ZeRO-3: the gradients are not sent": {_ZERO_3: "[forward, backward]"},
        "ZeRO-3: the trained part is sent once too often; no all-reduce is needed, and the next forward gathers what was updated": {
            _ZERO_3: '[forward, backward, ("all_reduce", trained)]',
        },
        "these are the bytes of all ranks together: return what each one sends": {_SUM: f"world_size * {_SUM}"},
        "twice as much is counted: what a rank receives does not count, and a gradient has its parameter's dtype": {
            _SUM: f"2 * {_SUM}"
        },
        "`bytes_sent` is given the size of a shard: it takes the bytes of the whole tensor": {
            _SUM: "sum(bytes_sent(collective, size / world_size, world_size) for collective, size in collectives)",
        },
        "a rank's own piece is counted in place of the others': a collective sends (world size - 1) / world size of a tensor": {
            _SUM: 'sum((2 if collective == "all_reduce" else 1) * size / world_size for collective, size in collectives)',
        },
        "the whole tensor is counted: a collective sends (world size - 1) / world size of it, and nothing with one rank": {
            _SUM: 'sum((2 if collective == "all_reduce" else 1) * size for collective, size in collectives)',
        },
        "an unknown strategy is not refused: raise a ValueError": {_UNKNOWN: "collectives = []"},
        "an unknown strategy raises something else: it should be a ValueError": {_UNKNOWN: "raise KeyError(strategy)"},
        "the bytes are rounded: keep their fractions": {_SUM: f"int({_SUM})"},
        "nothing comes back: the `return` is missing": {f"return {_SUM}": _SUM},
    },
    variants={
        "a factor for each part": """
            def sent_in_step(frozen, trained, world_size, strategy):
                times = {"data parallel": (0, 2), "ZeRO-1": (0, 2), "ZeRO-2": (0, 2), "ZeRO-3": (2, 3)}
                if strategy not in times:
                    raise ValueError(strategy)
                of_frozen, of_trained = times[strategy]
                return (of_frozen * frozen + of_trained * trained) * (world_size - 1) / world_size
        """,
        "by phase": """
            def sent_in_step(frozen, trained, world_size, strategy):
                match strategy:
                    case "data parallel":
                        return bytes_sent("all_reduce", trained, world_size)
                    case "ZeRO-1" | "ZeRO-2" | "ZeRO-3":
                        sent = bytes_sent("reduce_scatter", trained, world_size)
                    case _:
                        raise ValueError(f"no such strategy: {strategy}")
                if strategy != "ZeRO-3":
                    return sent + bytes_sent("all_gather", trained, world_size)
                for _ in ("forward", "backward"):
                    for part in (frozen, trained):
                        sent += bytes_sent("all_gather", part, world_size)
                return sent
        """,
        "the share first, and zero for one rank": """
            def sent_in_step(frozen, trained, world_size, strategy):
                if strategy not in {"data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3"}:
                    raise ValueError("unknown")
                if world_size == 1:
                    return 0
                share = 1 - 1 / world_size
                total = 2 * share * trained
                if strategy == "ZeRO-3":
                    total += share * trained + 2 * share * frozen
                return total
        """,
    },
)
