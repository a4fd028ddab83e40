"""Bug hunt: an optimizer's state, loaded with the dtypes that were saved."""

import torch

from autograder.checking.cases import normal
from autograder.checking.exercise import Exercise


def load_as_saved(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a state dict; then put every tensor of the state back as it was saved, on its parameter's device."""
    optimizer.load_state_dict(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers):
        for name, value in saved["state"].get(number, {}).items():
            if torch.is_tensor(value):
                value = value.detach().to(parameter.device, copy=True)
            optimizer.state[parameter][name] = value


def saved_case(generator: torch.Generator, dtype: str = "bfloat16", second: str = "float32") -> dict:
    """Return codes, an absmax and moments, none of which survives a cast to 16 bits."""
    return {
        "codes": torch.randint(0, 256, (2, 300), generator=generator, dtype=torch.uint8),
        "absmax": 1 + normal(generator, 2, 2).abs() / 3,
        "moments": normal(generator, 2, 7),
        "steps": [int(step) for step in torch.randint(3, 90, (2,), generator=generator)],
        "rates": [0.1 + torch.rand((), generator=generator).item() for _ in range(2)],
        "dtypes": [dtype, second],
    }


def drive_load_as_saved(load_as_saved, codes, absmax, moments, steps, rates, dtypes):
    """Save an optimizer with two groups, one parameter of which has never had a gradient; load into a fresh one.

    The fresh one's last parameter is on the device "meta". Afterwards the loaded state is trained on, in place.
    """
    import copy

    import torch
    from torch import nn

    class Keeper(torch.optim.Optimizer):
        """An optimizer that keeps whatever it is given."""

        def __init__(self, groups, lr=0.5):
            super().__init__(groups, {"lr": lr})

        def step(self, closure=None):
            return None

    def keeper(rates, device="cpu"):
        first, second = (getattr(torch, dtype) for dtype in dtypes)
        made = [
            nn.Parameter(torch.zeros(300, dtype=first)),
            nn.Parameter(torch.zeros(5)),
            nn.Parameter(torch.zeros(7, dtype=first)),
        ]
        made += [nn.Parameter(torch.zeros(300, dtype=second, device=device))]
        groups = [{"params": made[:2], "lr": rates[0]}, {"params": made[2:], "lr": rates[1]}]
        return made, Keeper(groups)

    parameters, optimizer = keeper(rates)
    for parameter, number in ((parameters[0], 0), (parameters[3], 1)):
        optimizer.state[parameter] = {"codes": codes[number], "absmax": absmax[number], "step": steps[number]}
    optimizer.state[parameters[2]] = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "step": torch.tensor(float(steps[0]))}
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    others, fresh = keeper([0.5, 0.5], device="meta")
    load_as_saved(fresh, saved)
    states = [fresh.state.get(parameter, {}) for parameter in others]
    seen = {
        "the list of learning rates": [group["lr"] for group in fresh.param_groups],
        "the list of names in the state of each parameter": [sorted(map(str, state)) for state in states],
        "the dict of dtypes of the state": {
            f"{name} of parameter {number}": str(value.dtype)
            for number, state in enumerate(states)
            for name, value in state.items()
            if torch.is_tensor(value)
        },
        "the devices of the last parameter's state": sorted({v.device.type for v in states[3].values() if torch.is_tensor(v)}),
        "the list of steps": [int(state["step"]) if "step" in state else "missing" for state in states],
        "the optimizer still holds its own parameters": all(
            one is other for one, other in zip(others, [p for group in fresh.param_groups for p in group["params"]])
        ),
    }
    for number in (0, 2):
        for name, value in states[number].items():
            if name != "step":
                seen[f"{name} of parameter {number}"] = value.detach().clone() if torch.is_tensor(value) else str(type(value))
    with torch.no_grad():
        for state in states[:3]:
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()
    names = [(number, name) for number, state in before["state"].items() for name in state]
    seen["what of `saved` has changed after more training"] = [
        f"{name} of parameter {number}"
        for number, name in names
        if name not in saved["state"].get(number, {})
        or not torch.equal(torch.as_tensor(saved["state"][number][name]), torch.as_tensor(before["state"][number][name]))
    ]
    return seen


_LOAD = "    optimizer.load_state_dict(saved)\n"
_PARAMETERS = '[parameter for group in optimizer.param_groups for parameter in group["params"]]'
_NUMBERS = '[number for group in saved["param_groups"] for number in group["params"]]'
_TENSOR = "if torch.is_tensor(value):"
_COPY = "value.detach().to(parameter.device, copy=True)"
_PUT = "optimizer.state[parameter][name] = value"

check_load_as_saved = Exercise(
    spec=[load_as_saved],
    cases=lambda generator: [saved_case(generator)],
    driver=drive_load_as_saved,
    mistakes={
        "the state has the parameters' dtypes, as `load_state_dict` leaves it: put back what was saved": {
            _PUT: "pass",
        },
        "only the codes have their dtype back: absmax and the small moments were rounded to 16 bits": {
            _PUT: "if torch.is_tensor(value) and value.dtype == torch.uint8:\n                optimizer.state[parameter][name] = value",
        },
        "what was cast is cast back: the dtype is right, but the digits that 16 bits do not have are gone": {
            _COPY: "optimizer.state[parameter][name].to(value.dtype)",
        },
        "the groups' settings are not loaded, only the state": {_LOAD: ""},
        "the state is shared with `saved`, and training goes on in place: copy": {
            _COPY: "value.detach().to(parameter.device)",
        },
        "the state stays on the device where it was saved: move it to its parameter's": {
            _COPY: "value.detach().clone()",
        },
        "states go to the wrong parameters: one of them has no state, so go by the numbers in `param_groups`": {
            _NUMBERS: 'list(saved["state"])',
        },
        "only the first group's parameters are put back": {
            _PARAMETERS: 'optimizer.param_groups[0]["params"]',
        },
        "the absmax and the moments are fp32, and the codes are, too: they are bytes": {
            _COPY: "value.detach().to(parameter.device, torch.float32, copy=True)",
        },
        "`saved` has been emptied: it may be needed again": {
            'saved["state"].get(number, {})': 'saved["state"].pop(number, {})',
        },
        "the number of steps is lost": {
            f"            {_PUT}": f"            {_PUT}\n        optimizer.state[parameter].pop('step', None)",
        },
    },
    variants={
        "a deep copy": """
            def load_as_saved(optimizer, saved):
                import copy

                optimizer.load_state_dict(saved)
                numbers = sum((group["params"] for group in saved["param_groups"]), [])
                parameters = sum((group["params"] for group in optimizer.param_groups), [])
                for number, state in saved["state"].items():
                    parameter = parameters[numbers.index(number)]
                    kept = copy.deepcopy(state)
                    optimizer.state[parameter] = {n: v.to(parameter.device) if torch.is_tensor(v) else v for n, v in kept.items()}
        """,
        "tensors hidden from the cast": """
            def load_as_saved(optimizer, saved):
                optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
                pairs = zip(saved["param_groups"], optimizer.param_groups)
                of = {n: p for theirs, ours in pairs for n, p in zip(theirs["params"], ours["params"])}
                for number, state in saved["state"].items():
                    optimizer.state[of[number]] = {
                        name: value.clone().to(of[number].device) if torch.is_tensor(value) else value
                        for name, value in state.items()
                    }
        """,
        "groups by hand": """
            def load_as_saved(optimizer, saved):
                for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                    group.update({name: value for name, value in theirs.items() if name != "params"})
                    for parameter, number in zip(group["params"], theirs["params"], strict=True):
                        for name, value in saved["state"].get(number, {}).items():
                            if torch.is_tensor(value):
                                value = torch.empty_like(value, device=parameter.device).copy_(value)
                            optimizer.state[parameter][name] = value
        """,
    },
)
