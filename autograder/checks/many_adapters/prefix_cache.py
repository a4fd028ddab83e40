"""Exercise 6, the bug hunt: keys and values of a prompt, kept for the next request, under many adapters."""

import torch
from torch import Tensor

from autograder.checking.cases import normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


class PrefixCache:
    """The keys and values of prompts that were read before, for whoever asks with the same tokens and the same adapter."""

    def __init__(self):
        self.kept = {}

    def get(self, tokens: tuple[int, ...], adapter: str | None) -> Tensor | None:
        """Return what was kept for these tokens under this adapter, or None."""
        return self.kept.get((adapter, tokens))

    def put(self, tokens: tuple[int, ...], adapter: str | None, keys_and_values: Tensor) -> None:
        """Keep the keys and values of these tokens under this adapter."""
        self.kept[adapter, tokens] = keys_and_values

    def swapped(self, adapter: str) -> None:
        """Forget what was computed with an adapter whose weights have been replaced."""
        self.kept = {key: value for key, value in self.kept.items() if key[0] != adapter}


def prefix_case(generator: torch.Generator) -> dict:
    """Return prompts of which some are prefixes or permutations of others, weights, and requests and swaps in random order."""
    requests = [("ask", prompt, adapter) for prompt in range(4) for adapter in ("reviews", "calls", "-")]
    order = torch.randperm(len(requests), generator=generator).tolist()
    first, again = [requests[i] for i in order], [requests[i] for i in reversed(order)]
    events = [*first, ("swap", 0, "reviews"), *again, ("swap", 0, "calls"), *first[::2], ("swap", 0, "reviews"), *again[::2]]
    a, b, c, d = (torch.randperm(30, generator=generator)[:4] + 1).tolist()
    return {
        "prompts": [[a, b, c], [a, b], [c, b, a], [a, b, d]],
        "events": [" ".join(map(str, event)) for event in events],
        "embedding": normal(generator, 31, 6),
        "weights": normal(generator, len(events) + 3, 6, 4),
    }


def drive_prefix_cache(PrefixCache, prompts, events, embedding, weights):
    """Play requests and swaps with a one-layer stand-in; return what each request got, and who was computed anew."""
    import weakref

    import torch

    adapted = {"reviews": weights[0], "calls": weights[1], "-": weights[2]}
    cache, served, computed, made = PrefixCache(), [], [], []
    for number, event in enumerate(events):
        kind, prompt, adapter = event.split()
        name = None if adapter == "-" else adapter
        if kind == "swap":
            adapted[adapter] = weights[3 + number]
            cache.swapped(name)
            continue
        tokens = tuple(prompts[int(prompt)])
        found = cache.get(tokens, name)
        computed.append(found is None)
        if found is None:
            found = embedding[list(tokens)].cumsum(0) @ adapted[adapter]
            made.append(weakref.ref(found))
            cache.put(tokens, name, found)
        served.append(found.clone())
        del found
    lengths = [len(tensor) for tensor in served]
    return {
        "served": torch.cat(served),
        "lengths": lengths,
        "computed": computed,
        "alive": sum(reference() is not None for reference in made),
    }


def read_prefix_cache(observation: Observation, case: dict) -> Observation:
    """Compare what was served first, then how often it was computed, then what is still in memory."""
    return {
        "the lengths of what the requests got": observation["lengths"],
        "the keys and values that the requests got": observation["served"],
        "how many of the requests were computed anew": sum(observation["computed"]),
        "the number of keys and values that are in memory at the end": observation["alive"],
    }


_GET, _PUT = "self.kept.get((adapter, tokens))", "self.kept[adapter, tokens] = keys_and_values"
_FORGET = "self.kept = {key: value for key, value in self.kept.items() if key[0] != adapter}"


def _keyed(key: str) -> dict[str, str]:
    """Return the edits that keep an entry under another key."""
    return {_GET: f"self.kept.get({key})", _PUT: f"self.kept[{key}] = keys_and_values"}


check_prefix_cache = Exercise(
    spec=[PrefixCache],
    driver=drive_prefix_cache,
    reading=read_prefix_cache,
    cases=lambda generator: [prefix_case(generator)],
    mistakes={
        "an adapter gets keys and values that another one has computed: the key needs the adapter's name, too": _keyed("tokens")
        | {_FORGET: "pass"},
        "after a swap an adapter gets what its old weights have computed: `swapped` has to forget it": {_FORGET: "pass"},
        "a swap forgets every adapter's keys and values: those of the others are still right": {_FORGET: "self.kept.clear()"},
        "what the old weights have computed is never handed out again, but stays in memory: delete it": {
            "self.kept = {}": "self.kept, self.version = {}, {}",
            _GET: "self.kept.get((adapter, self.version.get(adapter, 0), tokens))",
            _PUT: "self.kept[adapter, self.version.get(adapter, 0), tokens] = keys_and_values",
            _FORGET: "self.version[adapter] = self.version.get(adapter, 0) + 1",
        },
        "a prompt gets what another one has left: the key needs the tokens, too": _keyed("(adapter, 0)"),
        "the order of the tokens is lost in the key": _keyed("(adapter, tuple(sorted(tokens)))"),
        "the key has the number of tokens in the place of the tokens": _keyed("(adapter, len(tokens))"),
        "the key has the first two tokens only: prompts that begin alike are then one": _keyed("(adapter, tokens[:2])"),
        "all adapters share an entry, and only rows without an adapter have one of their own": _keyed(
            '("any" if adapter else None, tokens)'
        )
        | {_FORGET: 'self.kept = {key: value for key, value in self.kept.items() if key[0] != "any"}'},
        "what is computed without an adapter is not kept: the base's prompts can be shared as well": {
            _PUT: "if adapter: self.kept[adapter, tokens] = keys_and_values",
        },
        "an entry is handed out only once: leave it for the next": {_GET: "self.kept.pop((adapter, tokens), None)"},
        "a swap forgets one prompt of the adapter, and keeps the others": {
            _FORGET: "self.kept.pop(next((key for key in self.kept if key[0] == adapter), None), None)",
        },
        "a swap forgets the other adapters' prompts, and keeps the adapter's own": {
            _FORGET: _FORGET.replace("!=", "=="),
        },
        "nothing is kept": {_PUT: "pass"},
    },
    variants={
        "a dict an adapter": {
            _GET: "self.kept.get(adapter, {}).get(tokens)",
            _PUT: "self.kept.setdefault(adapter, {})[tokens] = keys_and_values",
            _FORGET: "self.kept.pop(adapter, None)",
        },
        "deleting key by key": {
            _FORGET: "for key in list(self.kept):\n            if key[0] == adapter:\n                del self.kept[key]",
        },
        "a key of text": _keyed('f"{adapter}: {tokens}"')
        | {_FORGET: '[self.kept.pop(key) for key in list(self.kept) if key.startswith(f"{adapter}: ")]'},
    },
)
