"""`AdapterBank` and `activate`: several adapters in one place."""

import torch
from torch import Tensor, nn

from autograder.cases import between, normal
from autograder.drive import Observation
from autograder.exercise import Exercise


class AdapterBank(nn.Module):
    """Several adapters in one place, by name; those that are active work one after the other (Pfeiffer et al. 2020, MAD-X)."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []

    def forward(self, h: Tensor) -> Tensor:
        """Return h after the active adapters, in their order; h itself if there are none."""
        for name in self.active:
            adapter = self.adapters[name]
            h = adapter(h)
        return h


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters work, in this order, in every bank of the model, and the last of them learn."""
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    for bank in banks:
        for name in names:
            if name not in bank.adapters:
                raise ValueError(f"there is no adapter {name!r}")
    for bank in banks:
        bank.active = list(names)
        for name, adapter in bank.adapters.items():
            learns = len(names) > 0 and name == names[-1]
            adapter.requires_grad_(learns)


_IN_BANKS = [["reviews", "fr", "en", "de"], ["en", "de", "reviews", "sw"]]


def bank_case(generator: torch.Generator, calls: list[list[str]], dtype: torch.dtype = torch.float32) -> dict:
    """Return weights for the small model's two layers and the adapters in its two banks, and inputs."""
    hidden = between(generator, 7, 9)
    return {
        "weights": normal(generator, (2 + sum(map(len, _IN_BANKS))) * (hidden * hidden + hidden)).to(dtype) * 0.5,
        "x": normal(generator, 3, hidden).to(dtype),
        "banks": _IN_BANKS,
        "calls": calls,
    }


# "fr" is missing in the last bank only, "sw" in the first only; a missing name comes first or last.
_CALLS = [
    *(["en", "reviews"], ["reviews", "fr"], ["fr", "reviews"], ["sw", "reviews"], ["reviews", "sw"]),
    *(["reviews", "en"], ["de", "en", "reviews"], []),
]


def drive_bank(AdapterBank, activate, weights, x, banks, calls):
    """Put two banks into a small model, the first of them deep inside, and activate one selection after the other.

    The model's first layer stays trainable, its third is frozen. At last, adapters of another model are switched on.
    """
    import contextlib

    import torch
    import torch.nn.functional as F
    from torch import nn

    hidden = x.shape[-1]

    class Bend(nn.Module):  # the least of an adapter: here what it does inside does not matter, but its order does
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(hidden, hidden)

        def forward(self, h):
            return h + F.gelu(self.line(h))

    first, last = AdapterBank(), AdapterBank()
    returned = last(x)
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    inside = nn.Sequential(nn.Sequential(first))
    model = nn.Sequential(nn.Linear(hidden, hidden), inside, nn.Linear(hidden, hidden), last).to(x.dtype)
    new, plain = model(x).detach(), model[2](model[0](x)).detach()
    for bank, names in zip((first, last), banks):
        for name in names:
            bank.adapters[name] = Bend().to(x.dtype)
    if len(list(model.parameters())) == 4 + 2 * sum(map(len, banks)):
        nn.utils.vector_to_parameters(weights.clone(), model.parameters())
    model[2].requires_grad_(False)
    seen = {"returned": "a tensor", "new": new, "plain": plain, "names": sorted(model.state_dict()), "calls": []}
    for names in calls:
        try:
            activate(model, *names)
            raised = "nothing"
        except Exception as error:
            raised = type(error).__name__
        model.zero_grad()
        try:
            output = model(x)
        except Exception as error:
            output = torch.zeros(0)
            raised = f"{raised}, and {type(error).__name__} in the forward pass that follows"
        if output.requires_grad and raised == "nothing":
            output.square().sum().backward()
        seen["calls"].append(
            {
                "raised": raised,
                "output": output.detach(),
                "trainable": sorted(name for name, p in model.named_parameters() if p.requires_grad),
                "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
            }
        )
    other = nn.Sequential(AdapterBank())
    other[0].adapters["en"] = Bend().to(x.dtype)
    try:
        activate(other, "en")
        seen["at last"] = model(x).detach()
    except Exception as error:
        seen["at last"] = type(error).__name__
    with contextlib.suppress(Exception):
        activate(other)  # a list that belongs to the class would be there when the check is run again
    return seen


_AT_LAST = "the output of the model after activate(another_model, 'en')"


def read_bank(observation: Observation, case: dict) -> Observation:
    """Name each observation by the call that led to it.

    What is to learn follows from the last call that was not to be refused: before it, everything but the frozen third layer.
    """
    read = {"what AdapterBank's forward returns": observation["returned"]}
    if "names" not in observation:
        return read
    read |= {
        "a new bank leaves everything as it is": torch.equal(observation["new"], observation["plain"]),
        "the list of names in the state dict": observation["names"],
    }
    learn = {name for name in observation["names"] if not name.startswith("2.")}
    for names, seen in zip(case["calls"], observation["calls"]):
        if all(name in bank for bank in case["banks"] for name in names):
            learner = names[-1] if names else "none"
            learn = {name for name in observation["names"] if name.startswith("0.") or f".adapters.{learner}." in name}
        call = f"activate(model, {', '.join(map(repr, names))})" if names else "activate(model)"
        read |= {
            f"the error of {call}": seen["raised"],
            f"the output after {call}": seen["output"],
        }
        for what, found in (("requires", set(seen["trainable"])), ("gets", set(seen["gradients"]))):
            read[f"the list of what wrongly {what} a gradient after {call}"] = sorted(found - learn)
            if what == "requires" or seen["raised"] == "nothing":  # after an error there is no backward pass
                read[f"the list of what wrongly {what} no gradient after {call}"] = sorted(learn - found)
    return read | {_AT_LAST: observation["at last"]}


_STACK = "h = adapter(h)"
_BANKS = "banks = [module for module in model.modules() if isinstance(module, AdapterBank)]"
_ACTIVE = "bank.active = list(names)"
_LEARNS = "len(names) > 0 and name == names[-1]"

check_adapter_bank = Exercise(
    spec=[AdapterBank, activate],
    cases=lambda generator: [bank_case(generator, _CALLS)],
    driver=drive_bank,
    reading=read_bank,
    # Everybody does the same operations; the outputs are of size 1 to 300.
    tolerance=lambda case: {
        name: 1e4 * torch.finfo(case["x"].dtype).eps
        for names in case["calls"]
        for name in [f"the output after activate(model{''.join(f', {name!r}' for name in names)})", _AT_LAST]
    },
    mistakes={
        "the active adapters work in the opposite order: the first name comes first": {
            "for name in self.active:": "for name in reversed(self.active):"
        },
        "the active adapters work in the order in which they were put in: the order of the names counts": {
            "for name in self.active:": "for name in [name for name in self.adapters if name in self.active]:"
        },
        "the active adapters work side by side, each on the bank's input: stacked, each reads what the one before it gives": {
            "for name in self.active:": "entering = h\n        for name in self.active:",
            _STACK: "h = h + adapter(entering) - entering",
        },
        "h is added once more behind each adapter: the residual connection is inside": {_STACK: "h = h + adapter(h)"},
        "only the last active adapter works: all of them do, one behind the other": {
            "for name in self.active:": "for name in self.active[-1:]:"
        },
        "forward of AdapterBank returns None: its last line needs a `return`": {"return h": "h"},
        "all adapters work, active or not": {"for name in self.active:": "for name in self.adapters:"},
        "the adapters are in a plain dict, where neither an optimizer nor a state dict finds them: use nn.ModuleDict": {
            "nn.ModuleDict()": "{}"
        },
        "every active adapter learns: only the last one does, those below it are finished": {
            _LEARNS: "name in names",
        },
        "the first of the active adapters learns: it is the last one, on top of those that are finished": {
            _LEARNS: "len(names) > 0 and name == names[0]"
        },
        "only active adapters are frozen: those that are switched off do not learn either": {
            "adapter.requires_grad_(learns)": "name in names and adapter.requires_grad_(learns)"
        },
        "nothing is frozen: adapters that do not learn must not ask for gradients": {
            "adapter.requires_grad_(learns)": "adapter.requires_grad_(True)"
        },
        "an adapter that was frozen once stays frozen: switch gradients on as well as off": {
            "adapter.requires_grad_(learns)": "learns or adapter.requires_grad_(False)"
        },
        "the whole model is frozen: `activate` freezes adapters in the banks, and leaves all else as it is": {
            "for bank in banks:\n        bank.active": "model.requires_grad_(False)\n    for bank in banks:\n        bank.active"
        },
        "only the model's direct children are searched: a bank may lie deeper, use model.modules()": {
            "model.modules()": "model.children()"
        },
        "only the first bank is switched: every bank of the model is": {_BANKS: _BANKS + "[:1]"},
        "a name that a bank does not have goes unnoticed: raise a ValueError": {
            'if name not in bank.adapters:\n                raise ValueError(f"there is no adapter {name!r}")': "pass",
            "adapter = self.adapters[name]": "adapter = self.adapters[name] if name in self.adapters else nn.Identity()",
        },
        "only the last of the names is looked up: any of them may be missing": {
            "for name in names:\n            if": "for name in names[-1:]:\n            if"
        },
        "only the first bank is looked into before the change: any bank may lack a name": {
            "for bank in banks:\n        for name in names:": "for bank in banks[:1]:\n        for name in names:"
        },
        "only the last bank is looked into before the change: any bank may lack a name": {
            "for bank in banks:\n        for name in names:": "for bank in banks[-1:]:\n        for name in names:"
        },
        "a refused call has changed some of the banks already: look into all of them before the first change": {
            'raise ValueError(f"there is no adapter {name!r}")\n    for bank in banks:\n        bank.active': (
                'raise ValueError(f"there is no adapter {name!r}")\n        bank.active'
            ),
        },
        "a bank is switched before its names are looked up: a refused call must leave everything as it was": {
            "for bank in banks:\n        for name in names:": "for bank in banks:\n        bank.active = list(names)\n"
            "        for name in names:",
        },
        "the names add up from call to call: each call says all that is active": {_ACTIVE: "bank.active += names"},
        "`active` belongs to the class, so that all models share one list: make it in __init__": {
            "    def __init__(self):": "    active = []\n\n    def __init__(self):",
            "self.active: list[str] = []": "pass",
            _ACTIVE: "bank.active[:] = names",
        },
        "activate(model) without a name leaves everything as it was: it switches all adapters off": {
            _BANKS: f"if not names:\n        return\n    {_BANKS}"
        },
    },
    variants={
        "early return, and a tuple": """
            class AdapterBank(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.active = ()
                    self.adapters = nn.ModuleDict({})

                def forward(self, h):
                    if not self.active:
                        return h
                    return nn.Sequential(*(self.adapters[name] for name in self.active))(h)

            def activate(model, *names):
                banks = [module for module in model.modules() if type(module) is AdapterBank]
                if any(set(names) - set(bank.adapters) for bank in banks):
                    raise ValueError(f"some bank lacks one of {names}")
                for bank in banks:
                    bank.active = names
                    bank.adapters.requires_grad_(False)
                    if names:
                        bank.adapters[names[-1]].requires_grad_(True)
        """,
        "functools.reduce": {
            "for name in self.active:\n            adapter = self.adapters[name]\n            h = adapter(h)\n        return h": (
                "import functools\n        return functools.reduce(lambda h, name: self.adapters[name](h), self.active, h)"
            ),
        },
        "one parameter at a time": {
            "adapter.requires_grad_(learns)": (
                "for parameter in adapter.parameters():\n                parameter.requires_grad = learns"
            ),
            _LEARNS: "list(names)[-1:] == [name]",
        },
    },
)
