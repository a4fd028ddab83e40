"""`loraplus_groups`: LoRA+'s two learning rates."""

import torch
from torch import nn

from autograder.checking.cases import EPS, between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


def loraplus_groups(model: nn.Module, learning_rate: float, ratio: float) -> list[dict]:
    """Return a group of its own for every parameter that is trained."""
    groups = []
    for name, parameter in model.named_parameters():
        own_name = name.split(".")[-1]
        rate = ratio * learning_rate if own_name == "lora_B" else learning_rate
        if parameter.requires_grad:
            groups.append({"params": [parameter], "lr": rate})
    return groups


def groups_case(generator: torch.Generator, layers: int = 3, frozen: list[str] | None = None, ratio: float = 4.0) -> dict:
    """Return what the model is like, a learning rate, and a ratio between `ratio` and twice that.

    Args:
        frozen: own names of parameters that are frozen everywhere, as all bases are.
    """
    fractions = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return {
        "layers": layers,
        "frozen_layer": between(generator, 1, layers - 1),  # its second lora_B is frozen
        "frozen": frozen or [],
        "learning_rate": 1e-3 * (1 + fractions[0]),
        "ratio": ratio * (1.1 + fractions[1] / 2),
    }


def drive_loraplus(loraplus_groups, layers, frozen_layer, frozen, learning_rate, ratio):
    """Ask for the groups of a model with misleading names; return at which rates each parameter is found in them."""
    import torch
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self, in_features, out_features, magnitude):
            super().__init__()
            self.base = nn.Linear(in_features, out_features).requires_grad_(False)
            self.lora_A = nn.Parameter(torch.ones(2, in_features))
            self.lora_B = nn.Parameter(torch.zeros(out_features, 2))
            if magnitude:
                self.magnitude = nn.Parameter(torch.ones(out_features))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = Adapted(5, 4, magnitude=False)
            self.mlp = nn.ModuleDict({"up_proj": Adapted(4, 6, magnitude=True), "down_proj": nn.Linear(6, 5)})
            self.mlp["down_proj"].requires_grad_(False)
            self.lora_B_norm = nn.LayerNorm(5)
            self.lora_B_norm.bias.requires_grad_(False)
            self.lora_Bias = nn.Parameter(torch.zeros(3))
            self.gate_lora_B = nn.Parameter(torch.zeros(7))

    model = Adapted(8, 5, magnitude=False)
    model.blocks = nn.ModuleList(Block() for _ in range(layers))
    model.head = nn.Linear(5, 9)
    first, last = model.blocks[0].q_proj, model.blocks[-1].q_proj
    last.lora_A, last.lora_B = first.lora_A, first.lora_B
    model.blocks[frozen_layer].mlp["up_proj"].lora_B.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] in frozen:
            parameter.requires_grad_(False)

    def state():
        named = model.named_parameters(remove_duplicate=False)
        return [(name, id(parameter), parameter.requires_grad, parameter.tolist()) for name, parameter in named]

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before, found, strangers = state(), {name: [] for name in names.values()}, set()
    groups = loraplus_groups(model, learning_rate, ratio)
    if not isinstance(groups, list | tuple):
        return {"form": f"no list: {type(groups).__name__}"}
    for group in groups:
        if not isinstance(group, dict) or not {"params", "lr"} <= group.keys():
            keys = sorted(map(str, group)) if isinstance(group, dict) else []
            return {"form": f"a group with the keys {keys}" if keys else f"no dict in the list: {type(group).__name__}"}
        members = group["params"]
        if isinstance(members, set | frozenset):
            return {"form": "a group whose params are a set, not a list"}
        for member in [members] if torch.is_tensor(members) else list(members):
            if id(member) in names:
                found[names[id(member)]].append(float(group["lr"]))
            else:
                strangers.add(type(member).__name__)
    return {
        "form": "a list of dicts",
        "found": found,
        "trained": trained,
        "strangers": sorted(strangers),
        "unchanged": state() == before,
    }


def read_loraplus(observation: Observation, case: dict) -> Observation:
    """Say of each parameter in words at which rates it is trained.

    A rate is a product, rounded by half an eps, of factors that are rounded themselves if they are in single precision: two
    right answers differ by two eps of it.
    """
    read = {"what loraplus_groups returns": observation["form"]}
    if observation["form"] != "a list of dicts":
        return read
    rates = {"learning_rate": case["learning_rate"], "ratio * learning_rate": case["ratio"] * case["learning_rate"]}

    def worded(rate: float) -> str:
        return next((word for word, right in rates.items() if abs(rate - right) <= 2 * EPS * right), f"{rate:.6g}")

    read["the list of types of what is in the groups and is not one of the model's parameters"] = observation["strangers"]
    for name, found in observation["found"].items():
        trained = "which requires a gradient" if name in observation["trained"] else "which is frozen"
        where = f"the learning rate of {name}, {trained},"
        read[where] = " and ".join(map(worded, found)) or "none, because it is in no group"
    return read | {"the model is as it was": observation["unchanged"]}


_B = 'own_name == "lora_B"'
_RATE = f"ratio * learning_rate if {_B} else learning_rate"
_TRAINED = "if parameter.requires_grad:"
_GROUP = '{"params": [parameter], "lr": rate}'

check_loraplus_groups = Exercise(
    spec=[loraplus_groups],
    cases=lambda generator: [groups_case(generator)],
    driver=drive_loraplus,
    reading=read_loraplus,
    mistakes={
        "a parameter gets the higher rate if `lora_B` occurs in its full name: compare the last part of the name, whole": {
            _B: '"lora_B" in name'
        },
        "a parameter gets the higher rate if `lora_B` occurs in its own name: compare the own name whole": {
            _B: '"lora_B" in own_name'
        },
        "a parameter gets the higher rate if its name ends with these letters: `gate_lora_B` is not `lora_B`": {
            _B: 'name.endswith("lora_B")'
        },
        "a parameter gets the higher rate if its own name begins with `lora_B`: `lora_Bias` is another parameter": {
            _B: 'own_name.startswith("lora_B")'
        },
        "a `lora_B` of the model itself is missed, because its name has no dot: take the last part": {
            _B: 'name.endswith(".lora_B")'
        },
        "lora_A gets the higher rate, not lora_B": {_B: 'own_name == "lora_A"'},
        "lora_A and lora_B both get the higher rate: only lora_B should": {_B: 'own_name in ("lora_A", "lora_B")'},
        "everything but lora_A gets the higher rate: only lora_B should": {_B: 'own_name != "lora_A"'},
        "lora_B gets the same rate as the rest: multiply it by `ratio`": {_RATE: "learning_rate"},
        "the rate of lora_B is `ratio` itself: multiply `ratio` by the learning rate": {"ratio * learning_rate": "ratio"},
        "the rate of lora_B is divided by `ratio`: multiply it": {"ratio * learning_rate": "learning_rate / ratio"},
        "lora_B gets the learning rate and the rest is divided by `ratio`: multiply lora_B's, and leave the rest's": {
            _RATE: f"learning_rate if {_B} else learning_rate / ratio"
        },
        "frozen parameters are in a group: leave out what does not require a gradient": {_TRAINED: "if True:"},
        "a frozen `lora_B` is in a group: its name is not enough, it has to require a gradient": {
            _TRAINED: f"if parameter.requires_grad or {_B}:"
        },
        "only lora_A and lora_B are in a group: a norm's gain that requires a gradient would not learn": {
            _TRAINED: 'if parameter.requires_grad and own_name in ("lora_A", "lora_B"):'
        },
        "only the parameters of one rate are in a group: those that are not lora_B belong into one as well": {
            _TRAINED: f"if parameter.requires_grad and {_B}:"
        },
        "lora_B is in a group of each rate: take it out of the slow one": {
            "    return groups": (
                "    groups += [{**group, 'lr': learning_rate} for group in groups if group['lr'] != learning_rate]\n"
                "    return groups"
            )
        },
        "a parameter with two names is in the groups twice: `named_parameters()` lists it once": {
            "named_parameters()": "named_parameters(remove_duplicate=False)"
        },
        "the groups hold names: an optimizer needs the parameters": {"[parameter]": "[name]"},
        "the groups hold copies of the parameters: an optimizer would change the copies": {
            "[parameter]": "[parameter.detach().clone().requires_grad_()]"
        },
        "the parameters of a group are a set: an optimizer needs an order, so make it a list": {"[parameter]": "{parameter}"},
        "a group has no `lr`: give each its learning rate": {_GROUP: f'({_GROUP} if {_B} else {{"params": [parameter]}})'},
        "the groups are pairs: make each a dict with the keys `params` and `lr`": {_GROUP: "([parameter], rate)"},
        "`requires_grad` was changed, and a frozen `lora_B` is trained now: leave the model as it is": {
            _TRAINED: f"parameter.requires_grad_(parameter.requires_grad or {_B})\n        {_TRAINED}"
        },
        "nothing is returned: write `return` in front of the result": {"return groups": "groups"},
    },
    variants={
        "two groups": """
            def loraplus_groups(model, learning_rate, ratio):
                named = [(n.rpartition(".")[2], p) for n, p in model.named_parameters() if p.requires_grad]
                return [
                    {"params": [p for own, p in named if own == "lora_B"], "lr": learning_rate * ratio},
                    {"params": [p for own, p in named if own != "lora_B"], "lr": learning_rate},
                ]
        """,
        "from the modules": """
            def loraplus_groups(model, learning_rate, ratio):
                fast = {id(module.lora_B) for module in model.modules() if hasattr(module, "lora_B")}
                by_speed = {True: [], False: []}
                for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                    by_speed[id(parameter) in fast].append(parameter)
                rates = {True: learning_rate * ratio, False: learning_rate}
                return [{"params": by_speed[speed], "lr": rates[speed]} for speed in by_speed if by_speed[speed]]
        """,
        "from a dict, and with rates in single precision": """
            def loraplus_groups(model, learning_rate, ratio):
                slow = {name: p for name, p in model.named_parameters() if p.requires_grad}
                fast = {name: slow.pop(name) for name in list(slow) if ("." + name).endswith(".lora_B")}
                rates = torch.tensor([1.0, ratio]) * learning_rate
                return tuple({"params": list(part.values()), "lr": lr, "name": "x"} for part, lr in zip((slow, fast), rates))
        """,
    },
)
