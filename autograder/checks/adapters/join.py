"""Bug hunt: two adapters made one."""

import math

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


def join(first: dict[str, Tensor], second: dict[str, Tensor], weights: tuple[float, float]) -> dict[str, Tensor]:
    """Return the state dict of one adapter whose change is w1 times the first one's plus w2 times the second one's.

    The bottlenecks stand side by side. GELU works on each of their features by itself, so it does not notice; the weights go
    behind it, into `up`.
    """
    w1, w2 = weights
    rows = [first["down.weight"], second["down.weight"]]
    offsets = [first["down.bias"], second["down.bias"]]
    columns = [w1 * first["up.weight"], w2 * second["up.weight"]]
    up_bias = w1 * first["up.bias"] + w2 * second["up.bias"]
    return {
        "down.weight": torch.cat(rows, dim=0),
        "down.bias": torch.cat(offsets, dim=0),
        "up.weight": torch.cat(columns, dim=1),
        "up.bias": up_bias,
    }


def join_case(
    generator: torch.Generator, widths: tuple[int, int], weights: list[float], dtype: torch.dtype = torch.float32
) -> dict:
    """Return two adapters of these widths."""
    hidden = between(generator, 9, 11)
    case: dict = {"weights": weights}
    for name, width in zip(("first", "second"), widths):
        case[name] = {
            "down.weight": normal(generator, width, hidden, dtype=dtype) * (1.5 / math.sqrt(hidden)),
            "down.bias": normal(generator, width, dtype=dtype),
            "up.weight": normal(generator, hidden, width, dtype=dtype),
            "up.bias": normal(generator, hidden, dtype=dtype),
        }
    return case


def drive_join(join, first, second, weights):
    """Return the joined adapter's tensors, or what came instead, and whether what was given is as it was."""
    import torch

    given = [tensor.clone() for adapter in (first, second) for tensor in adapter.values()]
    first, second = ({name: tensor.clone() for name, tensor in adapter.items()} for adapter in (first, second))
    joined = join(first, second, tuple(weights))
    if not isinstance(joined, dict) or not all(map(torch.is_tensor, joined.values())):
        return {"returned": repr(joined)[:100]}
    now = [tensor for adapter in (first, second) for tensor in adapter.values()]
    return {
        "returned": "a dict of tensors",
        "joined": {str(name): tensor.detach().clone() for name, tensor in joined.items()},
        "unchanged": all(map(torch.equal, given, now)),
    }


def read_join(observation: Observation, case: dict) -> Observation:
    """Put the joined adapter's features into an order of their own: in which one they stand is free."""
    read = {"what join returns": observation["returned"]}
    if "joined" not in observation:
        return read
    joined = observation["joined"]
    shapes = {name: list(tensor.shape) for name, tensor in sorted(joined.items())}
    read |= {
        "the shapes by name": shapes,
        "the dtypes": sorted({str(tensor.dtype) for tensor in joined.values()}),
        "what was given is left as it was": observation["unchanged"],
    }
    width = sum(len(case[adapter]["down.bias"]) for adapter in ("first", "second"))
    hidden = len(case["first"]["up.bias"])
    right = {"down.bias": [width], "down.weight": [width, hidden], "up.bias": [hidden], "up.weight": [hidden, width]}
    if shapes != right:
        return read
    features = torch.cat([joined["down.weight"], joined["down.bias"][:, None], joined["up.weight"].T], 1).double()
    return read | {
        "the joined features, each with its down.weight, down.bias and up.weight": features[features[:, 0].argsort()],
        "the joined up.bias": joined["up.bias"],
    }


def join_tolerance(case: dict) -> dict[str, float]:
    """Only `up` is computed: a product with a weight rounds once, the sum of the biases once more, and theirs once."""
    adapters = (case["first"], case["second"])
    eps = torch.finfo(adapters[0]["up.bias"].dtype).eps
    largest = max(
        abs(weight) * adapter[name].double().abs().max().item()
        for weight, adapter in zip(case["weights"], adapters)
        for name in ("up.weight", "up.bias")
    )
    return {
        "the joined features, each with its down.weight, down.bias and up.weight": eps * largest,
        "the joined up.bias": 4 * eps * largest,
    }


_ROWS = '[first["down.weight"], second["down.weight"]]'
_OFFSETS = '[first["down.bias"], second["down.bias"]]'
_COLUMNS = '[w1 * first["up.weight"], w2 * second["up.weight"]]'
_UP_BIAS = 'w1 * first["up.bias"] + w2 * second["up.bias"]'
_WEIGHTS_UNPACKED = "w1, w2 = weights"
_RETURN_JOINED = """return {
        "down.weight": torch.cat(rows, dim=0),
        "down.bias": torch.cat(offsets, dim=0),
        "up.weight": torch.cat(columns, dim=1),
        "up.bias": up_bias,
    }"""

check_join = Exercise(
    spec=[join],
    cases=lambda generator: [
        join_case(generator, (4, 4), [0.7, 0.6]),
        join_case(generator, (3, 5), [1.3, -0.4]),
    ],
    driver=drive_join,
    reading=read_join,
    tolerance=join_tolerance,
    mistakes={
        "the parameters were averaged: between them stands GELU, so that is not the average of what the adapters do": {
            _RETURN_JOINED: "return {name: w1 * first[name] + w2 * second[name] for name in first}"
        },
        "the weights are applied before GELU, in `down`: GELU(w x) is not w GELU(x), so they belong into `up`": {
            _ROWS: '[w1 * first["down.weight"], w2 * second["down.weight"]]',
            _OFFSETS: '[w1 * first["down.bias"], w2 * second["down.bias"]]',
            _COLUMNS: '[first["up.weight"], second["up.weight"]]',
        },
        "the weights are shared out as roots between down and up: that works for a product, not around GELU": {
            _WEIGHTS_UNPACKED: f"{_WEIGHTS_UNPACKED}\n    r1, r2 = abs(w1) ** 0.5, abs(w2) ** 0.5",
            _ROWS: '[r1 * first["down.weight"], r2 * second["down.weight"]]',
            _OFFSETS: '[r1 * first["down.bias"], r2 * second["down.bias"]]',
            _COLUMNS: '[r1 * first["up.weight"], (r2 if w2 > 0 else -r2) * second["up.weight"]]',
        },
        "the weights are left out": {_WEIGHTS_UNPACKED: "w1 = w2 = 1.0"},
        "the weights are divided by their sum: use them as they are": {
            _WEIGHTS_UNPACKED: f"{_WEIGHTS_UNPACKED}\n    w1, w2 = w1 / (w1 + w2), w2 / (w1 + w2)"
        },
        "the weights have changed places": {_WEIGHTS_UNPACKED: "w2, w1 = weights"},
        "up.bias is not weighted: it is a part of the change": {_UP_BIAS: 'first["up.bias"] + second["up.bias"]'},
        "up.bias was put side by side: it has `hidden` numbers, and is added": {
            _UP_BIAS: 'torch.cat([w1 * first["up.bias"], w2 * second["up.bias"]])'
        },
        "the features of down and of up stand in different orders": {
            _COLUMNS: '[w2 * second["up.weight"], w1 * first["up.weight"]]'
        },
        "down's biases were added up: each feature of the bottleneck keeps its own, so they stand side by side": {
            "torch.cat(offsets, dim=0)": "offsets[0] + offsets[1]"
        },
        "down.weight and up.weight are stacked the wrong way: down grows by rows, up by columns": {
            "torch.cat(rows, dim=0)": "torch.cat(rows, dim=1)",
            "torch.cat(columns, dim=1)": "torch.cat(columns, dim=0)",
        },
        "the result is in fp64: keep the adapters' dtype": {
            "torch.cat(columns, dim=1)": "torch.cat(columns, dim=1).double()",
            '"up.bias": up_bias': '"up.bias": up_bias.double()',
        },
        "the adapters given were changed: make new tensors": {
            _COLUMNS: '[first["up.weight"].mul_(w1), second["up.weight"].mul_(w2)]'
        },
    },
    variants={
        "the second first": {
            _ROWS: '[second["down.weight"], first["down.weight"]]',
            _OFFSETS: '[second["down.bias"], first["down.bias"]]',
            _COLUMNS: '[w2 * second["up.weight"], w1 * first["up.weight"]]',
        },
        "into empty tensors": """
            def join(first, second, weights):
                (m1, d), m2 = first["down.weight"].shape, second["down.weight"].shape[0]
                new = first["down.weight"].new_empty
                joined = {"up.weight": new(d, m1 + m2), "down.weight": new(m1 + m2, d), "down.bias": new(m1 + m2)}
                for where, adapter, weight in ((slice(0, m1), first, weights[0]), (slice(m1, None), second, weights[1])):
                    joined["down.weight"][where] = adapter["down.weight"]
                    joined["down.bias"][where] = adapter["down.bias"]
                    joined["up.weight"][:, where] = adapter["up.weight"] * weight
                joined["up.bias"] = sum(weight * adapter["up.bias"] for weight, adapter in zip(weights, (first, second)))
                return joined
        """,
        "the weights multiplied in double precision": {
            _COLUMNS: (
                '[(w1 * first["up.weight"].double()).to(first["up.weight"].dtype), '
                '(w2 * second["up.weight"].double()).to(first["up.weight"].dtype)]'
            ),
            _UP_BIAS: ('(w1 * first["up.bias"].double() + w2 * second["up.bias"].double()).to(first["up.bias"].dtype)'),
        },
        "features shuffled": {
            _RETURN_JOINED: (
                "order = torch.randperm(sum(map(len, rows)))\n    return {'down.weight': torch.vstack(rows)[order], "
                "'down.bias': torch.hstack(offsets)[order], 'up.weight': torch.hstack(columns)[:, order], 'up.bias': up_bias}"
            )
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
