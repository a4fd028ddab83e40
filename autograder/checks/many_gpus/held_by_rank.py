"""Exercise 2: the bytes that a rank holds, by what is sharded."""

import torch

from autograder.checking.cases import between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import attempt


def held_by_rank(frozen: int, trained: int, optimizer_state: int, world_size: int, strategy: str) -> dict[str, float]:
    """Return the bytes of each kind, divided by the world size where the strategy shards them."""
    if strategy == "data parallel":
        sharded = []
    elif strategy == "ZeRO-1":
        sharded = ["optimizer_state"]
    elif strategy == "ZeRO-2":
        sharded = ["optimizer_state", "gradients"]
    elif strategy == "ZeRO-3":
        sharded = ["optimizer_state", "gradients", "parameters"]
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    whole = {"parameters": frozen + trained, "gradients": trained, "optimizer_state": optimizer_state}
    return {kind: size / world_size if kind in sharded else size for kind, size in whole.items()}


def held_case(generator: torch.Generator, world_size: int | None = None, frozen: int | None = None) -> dict:
    """Return the bytes of a model of which a small part is trained; the world size divides none of them, unless it is given."""
    world_size = world_size or between(generator, 3, 9)
    return {
        "frozen": world_size * between(generator, 10**8, 10**9) + 1 if frozen is None else frozen,
        "trained": world_size * between(generator, 10**6, 10**7) + 1,
        "optimizer_state": world_size * between(generator, 10**7, 10**8) + 1,
        "world_size": world_size,
    }


def drive_held_by_rank(held_by_rank, frozen, trained, optimizer_state, world_size):
    """Ask for each strategy, and for two that there are not."""
    held = {}
    for strategy in ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        answer = held_by_rank(frozen, trained, optimizer_state, world_size, strategy)
        if isinstance(answer, dict):
            held[strategy] = {str(kind): float(size) for kind, size in answer.items()}
        else:
            held[strategy] = type(answer).__name__
    errors = []
    for strategy in ("ZeRO-4", "tensor parallel"):
        errors.append(attempt(held_by_rank, frozen, trained, optimizer_state, world_size, strategy).split(":")[0])
    return {"held": held, "errors": errors}


_STRATEGIES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
_KINDS = ("parameters", "gradients", "optimizer_state")


def read_held_by_rank(observation: Observation, case: dict) -> Observation:
    """Compare what comes back and its keys, then strategy by strategy."""
    held = {strategy: observation["held"][strategy] for strategy in _STRATEGIES}
    dicts = [answer for answer in held.values() if isinstance(answer, dict)]
    others = {answer for answer in held.values() if not isinstance(answer, dict)}
    read = {
        "what comes back": " or ".join(sorted(others)) or "dict",
        "the list of keys": sorted({kind for answer in dicts for kind in answer}),
    }
    for strategy, answer in held.items():
        for kind in _KINDS:
            name = f"{kind!r} of a rank of {case['world_size']} under {strategy}"
            read[name] = answer.get(kind, "missing") if isinstance(answer, dict) else "missing"
    return read | {"the list of errors at the strategies 'ZeRO-4' and 'tensor parallel'": observation["errors"]}


def held_tolerance(case: dict) -> dict[str, float]:
    """At most two quotients and their sum, half an eps each of at most all bytes; two answers differ by twice that."""
    largest = case["frozen"] + case["trained"] + case["optimizer_state"]
    bound = 4 * torch.finfo(torch.float64).eps * largest
    size = case["world_size"]
    return {f"{kind!r} of a rank of {size} under {strategy}": bound for strategy in _STRATEGIES for kind in _KINDS}


_NOTHING = "sharded = []"
_STATE = 'sharded = ["optimizer_state"]'
_GRADIENTS = 'sharded = ["optimizer_state", "gradients"]'
_PARAMETERS = 'sharded = ["optimizer_state", "gradients", "parameters"]'
_WHOLE = '{"parameters": frozen + trained, "gradients": trained, "optimizer_state": optimizer_state}'
_HELD = "{kind: size / world_size if kind in sharded else size for kind, size in whole.items()}"
_UNKNOWN = 'raise ValueError(f"unknown strategy {strategy!r}")'

check_held_by_rank = Exercise(
    spec=[held_by_rank],
    cases=lambda generator: [held_case(generator), held_case(generator, world_size=1)],
    driver=drive_held_by_rank,
    reading=read_held_by_rank,
    helpers=[attempt],
    tolerance=held_tolerance,
    mistakes={
        "the frozen parameters are missing: every rank holds them, or its part of them": {"frozen + trained": "trained"},
        "the trained parameters are missing among the parameters": {"frozen + trained": "frozen"},
        "the frozen parameters get gradients: only trained ones have any": {
            '"gradients": trained': '"gradients": frozen + trained',
        },
        "the optimizer state is computed from `trained`: it is given, for all trained parameters together": {
            '"optimizer_state": optimizer_state}': '"optimizer_state": 4 * trained}',
        },
        "data parallel: the optimizer state is sharded; that is ZeRO-1, and under data parallel every rank holds everything": {
            _NOTHING: _STATE,
        },
        "data parallel: the gradients are sharded; after the all-reduce every rank holds all of them": {
            _NOTHING: 'sharded = ["gradients"]',
        },
        "the parameters are sharded first: ZeRO begins with the optimizer state, then come the gradients, and last the parameters": {
            _STATE: 'sharded = ["parameters"]',
            _GRADIENTS: 'sharded = ["parameters", "gradients"]',
        },
        "data parallel: everything is divided; under data parallel every rank holds everything": {_NOTHING: _PARAMETERS},
        "ZeRO-1: the gradients are sharded as well; that is ZeRO-2": {_STATE: _GRADIENTS},
        "ZeRO-1: the gradients are sharded, and the optimizer state is not; it is the other way round": {
            _STATE: 'sharded = ["gradients"]',
        },
        "ZeRO-1: nothing is sharded; the optimizer state is": {_STATE: "sharded = []"},
        "ZeRO-2: the gradients are whole; they are sharded like the optimizer state": {_GRADIENTS: _STATE},
        "ZeRO-2: the optimizer state is whole; each stage shards what the one before it shards, too": {
            _GRADIENTS: 'sharded = ["gradients"]',
        },
        "ZeRO-2: the parameters are sharded as well; that is ZeRO-3": {_GRADIENTS: _PARAMETERS},
        "ZeRO-3: the parameters are whole": {_PARAMETERS: _GRADIENTS},
        "ZeRO-3: only the parameters are sharded; each stage shards what the one before it shards, too": {
            _PARAMETERS: 'sharded = ["parameters"]',
        },
        "ZeRO-3: the frozen parameters are whole; they are sharded as the trained ones are": {
            "frozen + trained": "frozen * (world_size if strategy == 'ZeRO-3' else 1) + trained",
        },
        "ZeRO-3: the trained parameters are whole; they are sharded as the frozen ones are": {
            "frozen + trained": "frozen + trained * (world_size if strategy == 'ZeRO-3' else 1)",
        },
        "what is not sharded is multiplied by the world size: return the bytes of one rank": {
            _HELD: "{kind: size if kind in sharded else world_size * size for kind, size in whole.items()}",
        },
        "nothing is divided: a rank holds one part of what is sharded": {_HELD: "whole"},
        "the bytes are rounded: keep their fractions": {
            "size / world_size": "size // world_size",
        },
        "an unknown strategy is not refused: raise a ValueError": {_UNKNOWN: _NOTHING},
        "an unknown strategy raises something else: it should be a ValueError": {_UNKNOWN: "raise KeyError(strategy)"},
        "the keys are not the three that are asked for": {
            '"optimizer_state": optimizer_state}': '"optimizer": optimizer_state}'
        },
        "a number comes back: return a dict with three": {f"return {_HELD}": f"return sum({_HELD}.values())"},
        "nothing comes back: the `return` is missing": {f"return {_HELD}": _HELD},
    },
    variants={
        "by the stage's number": """
            def held_by_rank(frozen, trained, optimizer_state, world_size, strategy):
                stage = ["data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3"].index(strategy)
                held = {"optimizer_state": optimizer_state, "gradients": trained, "parameters": frozen + trained}
                for kind in list(held)[:stage]:
                    held[kind] /= world_size
                return held
        """,
        "a divisor for each kind": """
            def held_by_rank(frozen, trained, optimizer_state, world_size, strategy):
                n = world_size
                divisors = {"data parallel": (1, 1, 1), "ZeRO-1": (1, 1, n), "ZeRO-2": (1, n, n), "ZeRO-3": (n, n, n)}
                if strategy not in divisors:
                    raise ValueError(f"{strategy} is none of {', '.join(divisors)}")
                p, g, o = divisors[strategy]
                return dict(parameters=frozen / p + trained / p, gradients=trained / g, optimizer_state=optimizer_state / o)
        """,
        "match, with a share": """
            def held_by_rank(frozen, trained, optimizer_state, world_size, strategy):
                share = 1 / world_size
                match strategy:
                    case "data parallel":
                        parameters = gradients = state = 1
                    case "ZeRO-1":
                        parameters, gradients, state = 1, 1, share
                    case "ZeRO-2":
                        parameters, gradients, state = 1, share, share
                    case "ZeRO-3":
                        parameters = gradients = state = share
                    case _:
                        raise ValueError(strategy)
                return {
                    "parameters": parameters * (frozen + trained),
                    "gradients": gradients * trained,
                    "optimizer_state": state * optimizer_state,
                }
        """,
    },
)
