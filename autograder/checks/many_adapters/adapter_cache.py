"""Exercise 4: a bounded cache of adapters, by name, which drops the least recently used."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


class AdapterCache:
    """Which adapter is in which slot: loads adapters by name when a batch needs them, and drops the least recently used."""

    def __init__(self, slots: int, load: Callable[[str, int], None]):
        self.load = load
        self.size = slots
        self.free = list(range(slots))
        self.slot_of = {}  # by name, the least recently used first

    def assign(self, names: Sequence[str | None]) -> Tensor:
        """Return each row's slot, and -1 where the row names none, after loading what is missing."""
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if len(wanted) > self.size:
            raise ValueError(f"the batch names {len(wanted)} adapters, and there are {self.size} slots")
        for name in wanted:
            if name in self.slot_of:
                self.slot_of[name] = self.slot_of.pop(name)
        for name in wanted:
            if name not in self.slot_of:
                if not self.free:
                    oldest = next(iter(self.slot_of))
                    self.free.append(self.slot_of.pop(oldest))
                self.load(name, self.free[-1])
                self.slot_of[name] = self.free.pop()
        return torch.tensor([-1 if name is None else self.slot_of[name] for name in names])


SCRIPTS = {
    3: ["a -", "b a b", "c", "b - b", "d c", "b", "c", "a", "b a - c", "a", "c", "d b"],
    2: ["a -", "b", "a", "c", "a", "c", "b -", "c"],
}
"""The first batches by the number of slots: oldest, newest, first loaded and first used are different adapters in these."""


def cache_case(generator: torch.Generator, slots: int = 3, batches: int = 18, names: int = 6) -> dict:
    """Return batches of names, separated by spaces and with - for none, which leave no doubt as to what is dropped.

    Two adapters that were used last in the same batch are as recent as each other. A batch that would make the cache choose
    between such is not taken.
    """
    script = SCRIPTS.get(slots, [])[:]
    last_used, taken = {}, []
    while len(taken) < batches:
        if script:
            batch = script.pop(0).split()
        else:
            chosen = torch.randint(0, names, (between(generator, 1, 4),), generator=generator).tolist()
            batch = ["-" if number == 0 and len(chosen) > 1 else "abcdefgh"[number] for number in chosen]
        wanted = set(batch) - {"-"}
        others = sorted((last_used[name], name) for name in last_used.keys() - wanted)
        dropped = len(last_used.keys() | wanted) - slots
        unclear = 0 < dropped < len(others) and others[dropped - 1][0] == others[dropped][0]
        if len(wanted) > slots or unclear:
            continue
        for _, name in others[: max(dropped, 0)]:
            del last_used[name]
        last_used |= dict.fromkeys(wanted, len(taken))
        taken.append(" ".join(batch))
    return {"slots": slots, "batches": taken}


def drive_adapter_cache(AdapterCache, slots, batches):
    """Play the batches; return which adapter each row got, what was loaded, and how errors were survived."""
    import torch

    content, loaded = {}, []

    def load(name, slot):
        if name == "missing":
            content[slot] = "half of a file"
            raise FileNotFoundError(name)
        loaded.append(name)
        content[slot] = name

    def serve(cache, batch):
        names = [None if name == "-" else name for name in batch.split()]
        before = len(loaded)
        slots = cache.assign(names)
        if not torch.is_tensor(slots):
            return type(slots).__name__, []
        served = ["-" if slot == -1 else content.get(slot, "an empty slot") for slot in slots.tolist()]
        return " ".join(served), sorted(loaded[before:])

    cache = AdapterCache(slots, load)
    played = [serve(cache, batch) for batch in batches]
    used = sorted(content)

    full = " ".join(f"n{number}" for number in range(slots))
    cache = AdapterCache(slots, load)
    serve(cache, full)
    errors, survived = [], []
    for names in ([f"m{number}" for number in range(slots + 1)], ["missing"], ["missing"]):
        before = len(loaded)
        try:
            cache.assign(names)
            errors.append("none")
        except Exception as error:
            errors.append(type(error).__name__)
        survived.append(len(loaded) - before)
    served_after, loaded_after = serve(cache, full)
    again, loaded_again = serve(cache, full)
    return {
        "served": [served for served, _ in played],
        "loads": [names for _, names in played],
        "slots": used,
        "dtype": str(cache.assign(["n0"]).dtype) if torch.is_tensor(cache.assign(["n0"])) else "none",
        "errors": errors,
        "survived": survived,
        "after": [served_after, len(loaded_after), again, len(loaded_again)],
    }


def read_adapter_cache(observation: Observation, case: dict) -> Observation:
    """Compare batch by batch: what was served first, then what was loaded for it."""
    batches = zip(case["batches"], observation["served"], observation["loads"], strict=True)
    read = {}
    for number, (batch, served, loads) in enumerate(batches, 1):
        read[f"what the rows of batch {number}, {batch!r}, get"] = served
        read[f"what is loaded for batch {number}, {batch!r},"] = loads
    too_many, missing, again = observation["errors"]
    return read | {
        "the list of slots in use": observation["slots"],
        "the dtype of the slots": observation["dtype"],
        "the error at a batch with more adapters than slots": too_many,
        "how many adapters were loaded for that batch": observation["survived"][0],
        "the error at an adapter whose file is missing": missing,
        "the error when it is asked for again": again,
        "what the rows get after that, how many are loaded for it, and the same once more": observation["after"],
    }


_WANTED = "list(dict.fromkeys(name for name in names if name is not None))"
_TOO_MANY = "if len(wanted) > self.size:"
_REFRESH = "self.slot_of[name] = self.slot_of.pop(name)"
_OLDEST = "next(iter(self.slot_of))"
_DROP = "self.free.append(self.slot_of.pop(oldest))"
_LOAD = "self.load(name, self.free[-1])\n                self.slot_of[name] = self.free.pop()"
_RETURN = "torch.tensor([-1 if name is None else self.slot_of[name] for name in names])"

check_adapter_cache = Exercise(
    spec=[AdapterCache],
    driver=drive_adapter_cache,
    reading=read_adapter_cache,
    cases=lambda generator: [cache_case(generator), cache_case(generator), cache_case(generator, slots=2)],
    mistakes={
        "the cache hands out an evicted adapter: whoever loses its slot must lose its entry, too": {
            _DROP: 'self.gone = [*getattr(self, "gone", []), oldest]\n                    self.free.append(self.slot_of.pop(oldest))',
            "for name in wanted:\n            if name in self.slot_of:\n                ": (
                "for name in wanted:\n"
                '            if name in getattr(self, "gone", []):\n'
                "                self.slot_of[name] = 0\n"
                "            if name in self.slot_of:\n                "
            ),
        },
        "an adapter is dropped that was used only just now: being served makes it the most recent, not only being loaded": {
            _REFRESH: "pass",
            _OLDEST: "next(name for name in self.slot_of if name not in wanted)",
        },
        "the most recently used is dropped: drop the one that has waited longest": {
            _OLDEST: "[name for name in self.slot_of if name not in wanted][-1]",
        },
        "an adapter is dropped that another row of the same batch needs: mark all of the batch as used before the first load": {
            f"for name in wanted:\n            if name in self.slot_of:\n                {_REFRESH}\n        ": "",
            "if name not in self.slot_of:\n": (
                "if name in self.slot_of:\n                self.slot_of[name] = self.slot_of.pop(name)\n            else:\n"
            ),
            _RETURN: "torch.tensor([-1 if name is None else self.slot_of.get(name, 0) for name in names])",
        },
        "what is in its slot already is loaded again": {
            "if name not in self.slot_of:\n": "if name in self.slot_of:\n                self.load(name, self.slot_of[name])\n            else:\n",
        },
        "an adapter that two rows name is loaded twice": {
            "if not self.free:": "if names.count(name) > 1 and self.free: self.load(name, self.free[-1])\n                if not self.free:",
        },
        "a row that names no adapter gets slot 0: return -1 for it": {"[-1 if name is None": "[0 if name is None"},
        "the slots are those of the different names, in order, and not of the rows": {
            _RETURN: "torch.tensor([self.slot_of[name] for name in wanted] + [-1] * (len(names) - len(wanted)))",
        },
        "a batch with more adapters than slots is not refused: raise a ValueError": {
            _TOO_MANY: "wanted = wanted[: self.size]\n        if False:",
            _RETURN: "torch.tensor([-1 if name is None else self.slot_of.get(name, -1) for name in names])",
        },
        "a batch that is refused has been loaded in part: count its adapters first": {
            f'{_TOO_MANY}\n            raise ValueError(f"the batch names {{len(wanted)}} adapters, and there are {{self.size}} slots")\n        ': "",
            "if not self.free:\n": "if not self.free:\n                    if not self.slot_of.keys() - wanted:\n                        raise ValueError\n",
        },
        "rows are counted where different adapters should be: two rows may share one": {
            _TOO_MANY: "if len([name for name in names if name is not None]) > self.size:",
        },
        "an adapter whose file could not be read counts as loaded: enter it after `load` has returned": {
            _LOAD: "slot = self.slot_of[name] = self.free.pop()\n                self.load(name, slot)",
        },
        "a slot is lost for good when a file cannot be read: it is free again": {
            _LOAD: "slot = self.free.pop()\n                self.load(name, slot)\n                self.slot_of[name] = slot",
        },
        "only one slot is ever used": {"self.free = list(range(slots))": "self.free = [0] * slots"},
        "a list comes back: return a tensor, with which the factors can be gathered": {
            _RETURN: "[-1 if name is None else self.slot_of[name] for name in names]"
        },
    },
    variants={
        "an OrderedDict": {
            "self.slot_of = {}": "from collections import OrderedDict\n        self.slot_of = OrderedDict()",
            _REFRESH: "self.slot_of.move_to_end(name)",
        },
        "a clock": """
            class AdapterCache:
                def __init__(self, slots, load):
                    self.load, self.names, self.used, self.clock = load, [None] * slots, [0] * slots, 0

                def assign(self, names):
                    self.clock += 1
                    needed = {name for name in names if name is not None}
                    if len(needed) > len(self.names):
                        raise ValueError("too many")
                    for slot, name in enumerate(self.names):
                        if name in needed:
                            self.used[slot] = self.clock
                    for name in sorted(needed - set(self.names)):
                        slot = min(range(len(self.names)), key=lambda slot: (self.names[slot] is not None, self.used[slot]))
                        self.names[slot] = None
                        self.load(name, slot)
                        self.names[slot], self.used[slot] = name, self.clock
                    return torch.tensor([self.names.index(name) if name else -1 for name in names])
        """,
        "in alphabetical order, with torch.as_tensor": {
            _WANTED: "sorted({name for name in names if name is not None})",
            _RETURN: "torch.as_tensor([self.slot_of.get(name, -1) for name in names])",
        },
    },
)
