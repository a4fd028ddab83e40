"""Bug hunt: a cache that may be asked again."""

import torch
from torch import Tensor, nn

from autograder.cases import between, normal
from autograder.checks.prefix_tuning.helpers import make_prefix
from autograder.checks.prefix_tuning.rounding import rounding_tolerance
from autograder.drive import Observation
from autograder.exercise import Exercise


class PrefixCache:
    """Puts the prefix in front of a layer's keys and values, and keeps nothing of what it is given."""

    def __init__(self, prefix: nn.Module):
        self.prefix = prefix

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (batch, kv_heads, tokens + seq, head_dim)."""
        prefix_keys, prefix_values = self.prefix(layer)
        shape = (keys.shape[0], -1, -1, -1)
        prefix_keys = prefix_keys.to(keys.dtype).expand(shape)
        prefix_values = prefix_values.to(values.dtype).expand(shape)
        return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)


def cache_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, layers: int = 2) -> dict:
    """Return a prefix and a text's states, already split into heads; no two sizes are equal."""
    kv_heads, head_dim = 2, 6
    shape = (layers, kv_heads, between(generator, 4, 5), head_dim)
    return {
        "raw_keys": normal(generator, *shape, dtype=dtype),
        "raw_values": normal(generator, *shape, dtype=dtype),
        "x": normal(generator, 3, kv_heads, between(generator, 7, 8), head_dim, dtype=dtype) / 2,
    }


def drive_cache(PrefixCache, raw_keys, raw_values, x):
    """Use one cache for two passes through two small layers, the second with gradient checkpointing and half of the batch."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    prefix = make_prefix(raw_keys, raw_values, computed=True)
    cache = PrefixCache(prefix)

    def run(x, layer):
        keys, values = cache.update(x.roll(1, -1), x.roll(2, -1), layer)
        return x + F.scaled_dot_product_attention(x, keys, values)

    seen = {}
    for name, given, checkpointing in (("", x, False), (" with gradient checkpointing", x[:2], True)):
        prefix.zero_grad()
        h = given.clone().requires_grad_(True)
        start = h
        for layer in range(len(raw_keys)):
            h = checkpoint(run, h, layer, use_reentrant=False) if checkpointing else run(h, layer)
        if checkpointing:
            seen["the output with gradient checkpointing"] = h.detach().clone()
        try:
            h.sum().backward()
        except RuntimeError as error:  # CheckpointError is one, with numbers in it that differ from answer to answer
            return seen | {f"what backward does{name}": type(error).__name__}
        seen |= {
            f"what backward does{name}": "it runs",
            f"the gradient of the prefix's keys{name}": prefix.keys.grad,
            f"the gradient of the prefix's values{name}": prefix.values.grad,
            f"the gradient of x{name}": start.grad,
        }
    with torch.no_grad():
        last = len(raw_keys) - 1
        for name, dtype in (("a text in the prefix's dtype", x.dtype), ("a text in bfloat16", torch.bfloat16)):
            keys, values = cache.update(x.roll(1, -1).to(dtype), x.roll(2, -1).to(dtype), last)
            seen |= {f"the keys for {name}": keys, f"the values for {name}": values}
    return seen


def read_cache(observation: Observation, case: dict) -> Observation:
    """Put what `update` returns first."""
    returned = {name: value for name, value in observation.items() if " for " in name}
    return returned | {name: value for name, value in observation.items() if " for " not in name}


_UPDATE_PAIR = "prefix_keys, prefix_values = self.prefix(layer)"
_CACHED = "return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)"
_HOLD = "self.prefix = prefix"

check_prefix_cache = Exercise(
    spec=[PrefixCache],
    cases=lambda generator: [cache_case(generator)],
    driver=drive_cache,
    helpers=[make_prefix],
    reading=read_cache,
    tolerance=lambda case: rounding_tolerance(
        case,
        1e-5,
        ["the output with gradient checkpointing"]
        + [
            f"the gradient of {part}{name}"
            for part in ("the prefix's keys", "the prefix's values", "x")
            for name in ("", " with gradient checkpointing")
        ],
    ),
    mistakes={
        "the cache grows: it keeps the text's keys and values, and when a layer is run again it has them twice": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer in self.held:\n"
                "            prefix_keys, prefix_values = self.held[layer]\n"
                "        keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        self.held[layer] = keys, values\n"
                "        return keys, values"
            ),
        },
        "the cache is emptied at the first layer: backward starts at the last, and finds there what forward left": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer == 0:\n"
                "            self.held = {}\n"
                "        if layer in self.held:\n"
                "            prefix_keys, prefix_values = self.held[layer]\n"
                "        keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        self.held[layer] = keys, values\n"
                "        return keys, values"
            ),
        },
        "what it returned at first it returns ever after, whatever it is given": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer not in self.held:\n"
                "            self.held[layer] = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        return self.held[layer]"
            ),
        },
        "the prefix is left out when there are gradients to compute, so that it gets none": {
            _UPDATE_PAIR: "if torch.is_grad_enabled(): return keys, values\n        " + _UPDATE_PAIR,
        },
        "the prefix was asked for its keys and values once, when the cache was made: ask in every update": {
            _HOLD: _HOLD + "\n        self.pairs = [prefix(layer) for layer in range(2)]",
            "self.prefix(layer)": "self.pairs[layer]",
        },
        "the prefix is detached, so that it gets no gradient": {
            "prefix_keys.to(keys.dtype)": "prefix_keys.detach().to(keys.dtype)",
            "prefix_values.to(values.dtype)": "prefix_values.detach().to(values.dtype)",
        },
        "the prefix stands behind the text: it goes in front, where the mask has it": {
            _CACHED: "return torch.cat([keys, prefix_keys], dim=2), torch.cat([values, prefix_values], dim=2)",
        },
        "the prefix is joined along the wrong axis: tokens are axis 2 of (batch, kv_heads, tokens, head_dim)": {
            _CACHED: _CACHED.replace("dim=2", "dim=1"),
        },
        "the values lack the prefix: each of its keys has a value": {
            _CACHED: "return torch.cat([prefix_keys, keys], dim=2), values",
        },
        "the prefix has no batch dimension: expand it to the batch of what is given": {
            "prefix_keys.to(keys.dtype).expand(shape)": "prefix_keys.to(keys.dtype)",
            "prefix_values.to(values.dtype).expand(shape)": "prefix_values.to(values.dtype)",
        },
        "every layer gets the first layer's prefix": {"self.prefix(layer)": "self.prefix(0)"},
        "keys and values of the prefix have changed places": {_UPDATE_PAIR: "prefix_values, prefix_keys = self.prefix(layer)"},
        "the prefix is not in the text's dtype: convert it": {
            "prefix_keys.to(keys.dtype)": "prefix_keys",
            "prefix_values.to(values.dtype)": "prefix_values",
        },
    },
    variants={
        "repeat, in a loop": {
            _CACHED: (
                "both = []\n"
                "        for own, text in zip(self.prefix(layer), (keys, values)):\n"
                "            both.append(torch.cat([own.type_as(text)[None].repeat(len(text), 1, 1, 1), text], dim=-2))\n"
                "        return tuple(both)"
            ),
        },
        "a cache that begins anew at each update": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "self.held[layer] = [prefix_keys, prefix_values]\n"
                "        self.held[layer] = [torch.cat([old, new], -2) for old, new in zip(self.held[layer], (keys, values))]\n"
                "        return self.held[layer][0], self.held[layer][1]"
            ),
        },
        "as a module": {
            "class PrefixCache:": "class PrefixCache(nn.Module):",
            _HOLD: "super().__init__()\n        self.prefix = prefix",
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
