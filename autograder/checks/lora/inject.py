"""`inject`: LoRA in a model's linear layers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from autograder.checking.cases import normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


def inject(model: nn.Module, target_modules: Sequence[str], make_layer: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Freeze the model, then wrap every nn.Linear whose own name is in `target_modules`; return the wrapped names."""
    model.requires_grad_(False)
    wrapped = []
    for name, module in list(model.named_modules()):
        parent_name, _, own_name = name.rpartition(".")
        if own_name in target_modules and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent_name), own_name, make_layer(module))
            wrapped.append(name)
    if not wrapped:
        raise ValueError(f"no nn.Linear is named {target_modules}")
    return wrapped


def inject_case(generator: torch.Generator, target_modules: list[str], hopeless: list[str], width: int = 6) -> dict:
    """Return random weights for the small model: 8 biased and 2 unbiased square layers, and two norms."""
    parameters = (2 * 3 + 2) * (width * width + width) + 2 * width * width + 2 * 2 * width
    return {
        "weights": normal(generator, parameters) / math.sqrt(width),
        "x": normal(generator, 5, width),
        "target_modules": target_modules,
        "hopeless": hopeless,
    }


def drive_inject(inject, weights, x, target_modules, hopeless):
    """Inject a layer that scales its base's output into a small model with misleading names."""
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.gain = nn.Parameter(torch.tensor(2.0 + base.weight.detach().mean().abs().item()))

        def forward(self, x):
            return self.base(x) * self.gain

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q_proj = nn.Linear(width, width)
            self.v_proj = nn.Linear(width, width, bias=False)
            self.q_proj_gate = nn.Linear(width, width)
            self.aux_q_proj = nn.Linear(width, width)
            self.norms = nn.ModuleDict({"q_proj": nn.LayerNorm(width)})

        def forward(self, x):
            x = x + self.q_proj(x) * self.q_proj_gate(x)
            return self.norms["q_proj"](x + self.v_proj(x) + self.aux_q_proj(x))

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Linear(width, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.q_proj = nn.Linear(width, width)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.q_proj(x)

    def fresh():
        model = Model(x.shape[-1])
        nn.utils.vector_to_parameters(weights, model.parameters())
        return model

    model = fresh()
    returned = inject(model, target_modules, Scaled)
    output = model(x)
    gradients = {}
    if output.requires_grad:
        output.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    try:
        inject(fresh(), hopeless, Scaled)
        refused = "nothing"
    except Exception as error:
        refused = type(error).__name__
    return {
        "the list of wrapped modules": sorted(name for name, module in model.named_modules() if isinstance(module, Scaled)),
        "the model's output afterwards": output.detach(),
        "gradients": gradients,
        "the returned list": sorted(returned) if isinstance(returned, list) else f"no list but a {type(returned).__name__}",
        f"the error for target_modules={hopeless}, which match nothing,": refused,
    }


def read_inject(observation: Observation, case: dict) -> Observation:
    """List the parameters that got a gradient, from the gradients themselves."""
    read = {name: value for name, value in observation.items() if name != "gradients"}
    return read | {"the list of parameters that get a gradient": sorted(observation["gradients"])}


_FREEZE = "model.requires_grad_(False)"
_MATCH = "own_name in target_modules and isinstance(module, nn.Linear)"
_SETATTR = "setattr(model.get_submodule(parent_name), own_name, make_layer(module))"

check_inject = Exercise(
    spec=[inject],
    cases=lambda generator: [
        inject_case(generator, ["q_proj"], ["proj", "k_proj"]),
        inject_case(generator, ["v_proj", "q_proj"], ["blocks"]),
        inject_case(generator, ["embed", "v_proj"], ["_proj"]),
    ],
    driver=drive_inject,
    reading=read_inject,
    tolerance=lambda case: {
        # The wrapped model does the same operations in the same order in every right answer: only the norm's gains are large.
        "the model's output afterwards": 1e-4,
    },
    mistakes={
        "a name matches if it contains a target: compare the last part of the name, whole": {
            _MATCH: "any(target in name for target in target_modules) and isinstance(module, nn.Linear)",
        },
        "a name matches if its last part contains a target: compare the last part whole": {
            _MATCH: "any(target in own_name for target in target_modules) and isinstance(module, nn.Linear)",
        },
        "a name matches if it ends with a target's letters: `aux_q_proj` is not `q_proj`": {
            _MATCH: "name.endswith(tuple(target_modules)) and isinstance(module, nn.Linear)",
        },
        "a name matches if it begins with a target's letters: `q_proj_gate` is not `q_proj`": {
            _MATCH: "own_name.startswith(tuple(target_modules)) and isinstance(module, nn.Linear)",
        },
        "the rest of the model is not frozen: only what make_layer adds may learn": {_FREEZE: "pass"},
        "only the wrapped layers are frozen: freeze the whole model, norms and embeddings too": {
            _FREEZE: "pass",
            "wrapped.append(name)": "wrapped.append(name)\n            module.requires_grad_(False)",
        },
        "the model is frozen after wrapping, so the new parameters are frozen too: freeze it first": {
            _FREEZE: "pass",
            "return wrapped": "model.requires_grad_(False)\n    return wrapped",
        },
        "the new layer is set on the model, not on the module that held the old one: use `get_submodule`": {
            _SETATTR: "setattr(model, own_name, make_layer(module))",
        },
        "a module that is no nn.Linear was wrapped: ask `isinstance(module, nn.Linear)`": {
            _MATCH: "own_name in target_modules",
            "make_layer(module))": ("make_layer(module) if hasattr(module, 'weight') else module)"),
        },
        "only the first match is wrapped: do not return from inside the loop": {
            "wrapped.append(name)": "wrapped.append(name)\n            break",
        },
        "only direct children of the model are looked at: `named_modules` goes all the way down": {
            "model.named_modules()": "model.named_children()",
        },
        "one new layer was made for all: call make_layer once for every module": {
            _FREEZE: _FREEZE + "\n    shared = None",
            _SETATTR: "shared = shared or make_layer(module)\n            " + _SETATTR.replace("make_layer(module)", "shared"),
        },
        "targets that match nothing go unnoticed: raise a ValueError, or a typo would train nothing": {
            'if not wrapped:\n        raise ValueError(f"no nn.Linear is named {target_modules}")': "pass"
        },
        "the list of names is not returned": {"return wrapped": "return None"},
    },
    variants={
        "split": {
            'parent_name, _, own_name = name.rpartition(".")': (
                'parts = name.split(".")\n        parent_name, own_name = ".".join(parts[:-1]), parts[-1]'
            ),
        },
        "from the parents": """
            def inject(model, target_modules, make_layer):
                for parameter in model.parameters():
                    parameter.requires_grad = False
                names = []
                for prefix, parent in list(model.named_modules()):
                    for child_name, child in list(parent.named_children()):
                        if child_name in target_modules and type(child) is nn.Linear:
                            setattr(parent, child_name, make_layer(child))
                            names.append(f"{prefix}.{child_name}".lstrip("."))
                if len(names) == 0:
                    raise ValueError("nothing matched")
                return names
        """,
        "names first": """
            def inject(model, target_modules, make_layer):
                model.requires_grad_(False)
                linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
                chosen = [name for name in linears if name.split(".")[-1] in set(target_modules)]
                if not chosen:
                    raise ValueError(target_modules)
                for name in chosen:
                    model.set_submodule(name, make_layer(model.get_submodule(name)))
                return chosen
        """,
    },
)
