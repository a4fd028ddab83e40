"""How many parameters adapters have, and which bottleneck fits a budget."""

from collections.abc import Sequence

import torch

from autograder.cases import between
from autograder.exercise import Exercise
from peftlab.llama import LlamaConfig


def adapter_parameters(config: LlamaConfig, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return the number of parameters of a LLaMA's adapters: 2 m d + d + m each (Houlsby et al. 2019, section 2.1)."""
    count = 0
    for _ in range(config.num_hidden_layers):
        for _ in places:
            count += config.hidden_size * bottleneck + bottleneck  # down
            count += bottleneck * config.hidden_size + config.hidden_size  # up
    return count


def largest_bottleneck(config: LlamaConfig, budget: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return the largest bottleneck whose adapters have, all together, at most `budget` parameters."""
    bottleneck = 0
    while adapter_parameters(config, bottleneck + 1, places) <= budget:
        bottleneck += 1
    if bottleneck == 0:
        raise ValueError(f"{budget} parameters are not enough")
    return bottleneck


def parameters_case(generator: torch.Generator, places: Sequence[str] = ("mlp",), low: int = 3) -> dict:
    """Return a LLaMA's sizes, a bottleneck, and budgets: exactly enough for one, one less, between two, too small for any.

    The budgets come from the formula 2 m d + d + m; the last but one is exactly enough for m = 1. The fourth to sixth tell
    apart those who round to the nearest and those who forget biases where they turn the formula round. Just above half way,
    only the former get one too many. With all of an adapter but `up`'s d biases, who forgets all of these gets one too many,
    and who takes d off once does not; with half of these biases, who takes d off once does, and who forgets down's does not.
    """
    heads = 2 * between(generator, 2, 4)
    hidden = heads * 2 * between(generator, low, low + 2)
    number = (layers := between(generator, 3, 7)) * len(places)
    chosen = between(generator, 10, 15)
    exactly, one_less, above_half = (number * (2 * m * hidden + hidden + m) for m in (chosen, chosen + 2, chosen + 4))
    above_half += number * hidden + 3 * number // 4
    no_bias = number * (chosen + 6) * (2 * hidden + 1)
    half_bias = number * (5 * (2 * hidden + 1) + hidden // 2)
    smallest = number * (3 * hidden + 1)
    return {
        "sizes": {
            "vocab_size": between(generator, 300, 400),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden + between(generator, 3, 20),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
        },
        "bottleneck": between(generator, 17, 29),
        "places": list(places),
        "budgets": [2 * exactly + 3, exactly, one_less - 1, above_half, no_bias, half_bias, smallest, smallest - 1],
    }


def drive_parameters(adapter_parameters, largest_bottleneck, sizes, bottleneck, places, budgets):
    """Count, then ask for the bottleneck of several budgets, the last of which is too small."""
    from peftlab.llama import LlamaConfig

    config = LlamaConfig(**sizes)
    both = adapter_parameters(config, bottleneck)
    seen = {
        "the type of what adapter_parameters returns": type(both).__name__,
        "the number of parameters, at both places": both,
        f"the number of parameters, at places {places}": adapter_parameters(config, bottleneck, tuple(places)),
    }

    def widest(budget, *where):
        try:
            return largest_bottleneck(config, budget, *where)
        except ValueError:
            return "ValueError"

    found = widest(budgets[0])
    return seen | {
        "the type of what largest_bottleneck returns": type(found).__name__,
        f"the largest bottleneck for a budget of {budgets[0]} parameters, at both places": found,
        f"the list of largest bottlenecks for budgets of {budgets} parameters, at places {places}": [
            widest(budget, tuple(places)) for budget in budgets
        ],
    }


_DOWN_COUNT = "config.hidden_size * bottleneck + bottleneck"
_UP_COUNT = "bottleneck * config.hidden_size + config.hidden_size"
_FITS = "adapter_parameters(config, bottleneck + 1, places) <= budget"
_SEARCH = f"while {_FITS}:\n        bottleneck += 1"
_TURNED = "d, adapters = config.hidden_size, config.num_hidden_layers * len(places)\n    bottleneck = "

check_adapter_parameters = Exercise(
    spec=[adapter_parameters, largest_bottleneck],
    cases=lambda generator: [parameters_case(generator), parameters_case(generator, ("mlp", "self_attn"))],
    driver=drive_parameters,
    mistakes={
        "the biases are not counted: each adapter has d + m of them": {
            _DOWN_COUNT: "config.hidden_size * bottleneck",
            _UP_COUNT: "bottleneck * config.hidden_size",
        },
        "both biases are counted with the hidden size: down's has m numbers": {
            _DOWN_COUNT: "config.hidden_size * bottleneck + config.hidden_size"
        },
        "only one of the two matrices is counted: down and up have m d numbers each": {
            _UP_COUNT: "config.hidden_size",
        },
        "only one layer is counted: every decoder layer has its own adapters": {
            "for _ in range(config.num_hidden_layers):": "for _ in range(1):"
        },
        "one adapter a layer is counted, whatever `places` says": {"for _ in places:": "for _ in range(1):"},
        "two adapters a layer are counted, whatever `places` says": {"for _ in places:": "for _ in range(2):"},
        "the MLP's adapter is counted with the MLP's inner width: it stands behind down_proj, where there are d features": {
            "for _ in places:\n": "for place in places:\n            d = config.intermediate_size if place == 'mlp' "
            "else config.hidden_size\n",
            _DOWN_COUNT: "d * bottleneck + bottleneck",
            _UP_COUNT: "bottleneck * d + d",
        },
        "the number of parameters is a float: count in whole numbers": {"return count": "return float(count)"},
        "a budget that is used up exactly fits as well: at most, not less than": {_FITS: _FITS.replace("<=", "<")},
        "the bottleneck is rounded to the nearest: the budget is the most there may be, so round down": {
            _SEARCH: (
                "fixed = config.num_hidden_layers * len(places) * config.hidden_size\n    bottleneck = round((budget - fixed) "
                "/ (config.num_hidden_layers * len(places) * (2 * config.hidden_size + 1)))"
            ),
        },
        "up's biases are forgotten where the formula is turned round: each adapter's d of them come off the budget first": {
            _SEARCH: f"{_TURNED}budget // (adapters * (2 * d + 1))"
        },
        "up's biases come off the budget once: each adapter has d of them": {
            _SEARCH: f"{_TURNED}(budget - d) // (adapters * (2 * d + 1))"
        },
        "down's biases are forgotten where the formula is turned round: a feature of the bottleneck takes 2 d + 1 numbers": {
            _SEARCH: f"{_TURNED}(budget // adapters - d) // (2 * d)"
        },
        "the budget is for one layer: it is for all of them together": {
            _FITS: _FITS + " * config.num_hidden_layers",
        },
        "largest_bottleneck ignores `places`": {_FITS: "adapter_parameters(config, bottleneck + 1) <= budget"},
        "a budget too small for a bottleneck of 1 goes unnoticed: raise a ValueError": {
            'if bottleneck == 0:\n        raise ValueError(f"{budget} parameters are not enough")': "pass"
        },
        "the bottleneck is a float: use // where you divide": {
            _SEARCH: (
                "fixed = config.num_hidden_layers * len(places) * config.hidden_size\n    bottleneck = float((budget - fixed) "
                "// (config.num_hidden_layers * len(places) * (2 * config.hidden_size + 1)))"
            ),
        },
    },
    variants={
        "in closed form": """
            def adapter_parameters(config, bottleneck, places=("self_attn", "mlp")):
                d, m = config.hidden_size, bottleneck
                return config.num_hidden_layers * len(places) * (2 * m * d + d + m)

            def largest_bottleneck(config, budget, places=("self_attn", "mlp")):
                d = config.hidden_size
                each = budget // (config.num_hidden_layers * len(places))
                if each < 3 * d + 1:
                    raise ValueError("too small")
                return (each - d) // (2 * d + 1)
        """,
        "shape by shape, and bisection": """
            def adapter_parameters(config, bottleneck, places=("self_attn", "mlp")):
                shapes = [(bottleneck, config.hidden_size), (bottleneck,), (config.hidden_size, bottleneck), (config.hidden_size,)]
                return sum(torch.Size(shape).numel() for shape in shapes) * len(list(places)) * config.num_hidden_layers

            def largest_bottleneck(config, budget, places=("self_attn", "mlp")):
                if adapter_parameters(config, 1, places) > budget:
                    raise ValueError(f"not even a bottleneck of 1: {budget}")
                low, high = 1, 2
                while adapter_parameters(config, high, places) <= budget:
                    low, high = high, 2 * high
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if adapter_parameters(config, middle, places) <= budget else (low, middle)
                return low
        """,
        "from two points of the line": {
            _SEARCH: (
                "first, second = (adapter_parameters(config, m, places) for m in (1, 2))\n"
                "    bottleneck = max(0, 1 + (budget - first) // (second - first))"
            ),
        },
    },
)
