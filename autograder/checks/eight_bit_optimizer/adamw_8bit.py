"""`AdamW8bit`: what it keeps, and how it steps."""

import torch

from autograder.checking.cases import EPS, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import seeing
from autograder.checks.eight_bit_optimizer.cases import adamw_case, stands_for
from autograder.checks.eight_bit_optimizer.helpers import codes_of_our_own
from autograder.checks.eight_bit_optimizer.spec import from_8bit, to_8bit


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits (Dettmers et al. 2022)."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                gradient = parameter.grad.float()
                small = parameter.numel() < 4096
                if not state:
                    state["step"] = 0
                    first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
                elif small:
                    first, second = state["exp_avg"], state["exp_avg_sq"]
                else:
                    first = from_8bit(state["exp_avg"], state["exp_avg_absmax"], True)
                    second = from_8bit(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False)
                state["step"] += 1
                first = beta1 * first + (1 - beta1) * gradient
                second = beta2 * second + (1 - beta2) * gradient**2
                corrected = first / (1 - beta1 ** state["step"])
                spread = (second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
                decayed = parameter.float() * (1 - group["lr"] * group["weight_decay"])
                parameter.copy_(decayed - group["lr"] * corrected / spread)
                if small:
                    state["exp_avg"], state["exp_avg_sq"] = first, second
                else:
                    state["exp_avg"], state["exp_avg_absmax"] = to_8bit(first, True)
                    state["exp_avg_sq"], state["exp_avg_sq_absmax"] = to_8bit(second, False)


def drive_adamw(AdamW8bit, weights, gradients, few_gradients, shapes, rates, betas, eps, weight_decay, large=0, filler_bytes=0):
    """Train parameters of several sizes, in two groups, with given gradients, and a few more with the default settings.

    If asked to, it trains so many large parameters by one step instead, makes a filler then, and returns a sample. While it runs,
    `to_8bit` and `from_8bit` are ours, whatever the student's are: they have a check of their own.
    """
    import inspect

    import torch
    from torch import nn

    from peftlab.memory import whole_storage

    def train():
        if large:
            parameters = [nn.Parameter(torch.ones(2**20)) for _ in range(large)]
            optimizer = AdamW8bit(parameters, lr=rates[0], betas=tuple(betas), eps=eps, weight_decay=weight_decay)
            gradient = torch.ones(2**20)
            for parameter in parameters:
                parameter.grad = gradient
            optimizer.step()
            torch.ones(filler_bytes, dtype=torch.uint8)
            return {"a sample of the outcome": torch.stack([parameter[:3].detach() for parameter in parameters])}
        sizes = [torch.Size(shape).numel() for shape in shapes]
        parameters = [nn.Parameter(part.clone().view(*shape)) for part, shape in zip(weights.split(sizes), shapes)]
        idle = nn.Parameter(torch.ones(5))
        groups = [{"params": [*parameters[:1], idle]}, {"params": parameters[1:], "lr": rates[1]}]
        optimizer = AdamW8bit(groups, lr=rates[0], betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        for gradient in gradients:
            for parameter, part, shape in zip(parameters, gradient.split(sizes), shapes):
                parameter.grad = part.clone().view(*shape)
            optimizer.step()
        few = nn.Parameter(weights[:7].float())
        by_default = AdamW8bit([few])
        for gradient in few_gradients:
            few.grad = gradient.clone()
            by_default.step()
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        steps = [state.get("step", "missing") for state in states]
        return {
            "parameters": [parameter.detach() for parameter in parameters],
            "the gradients afterwards": torch.cat([parameter.grad.flatten() for parameter in parameters]),
            "by default": few.detach(),
            "idle": idle.detach(),
            "idle state": sorted(map(str, optimizer.state.get(idle, {}))),
            "steps": [step if isinstance(step, str) else int(step) for step in steps],
            "states": [{name: v.clone() for name, v in state.items() if torch.is_tensor(v)} for state in states],
            "kept": [whole_storage(v) for state in states for v in state.values() if torch.is_tensor(v)],
        }

    with seeing(inspect.unwrap(getattr(AdamW8bit, "step", AdamW8bit)), **codes_of_our_own()):
        return train()


_STATE_BYTES = "bytes of optimizer state a parameter"


def _after(case: dict) -> str:
    """Return how far the parameters of a case are trained."""
    steps = len(case["gradients"])
    return "after a step" if steps == 1 else f"after {steps} steps"


def read_adamw(observation: Observation, case: dict) -> Observation:
    """Name the parameters by their sizes, read codes back, and count bytes."""
    read = {}
    read["the gradients afterwards"] = observation["the gradients afterwards"]
    read["a parameter without a gradient"] = observation["idle"]
    read["the list of states of a parameter without a gradient"] = observation["idle state"]
    read[f"the list of each parameter's `step`, {_after(case)}"] = observation["steps"]
    for shape, state in zip(case["shapes"], observation["states"]):
        size = torch.Size(shape).numel()
        held = {name: str(tensor.dtype) for name, tensor in state.items() if name != "step"}
        read[f"the state of a parameter of {size:,} values"] = dict(sorted(held.items()))
    for shape, state in zip(case["shapes"], observation["states"]):
        size = torch.Size(shape).numel()
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            value = state.get(name)
            if size >= 4096:
                value = stands_for(value, state.get(f"{name}_absmax"), signed)
            read[f"{name} of a parameter of {size:,} values, {_after(case)}"] = value
    trained = {torch.Size(shape).numel(): parameter for shape, parameter in zip(case["shapes"], observation["parameters"])}
    read["the list of parameters with NaN or infinite numbers, by size"] = [
        size for size, parameter in trained.items() if not parameter.isfinite().all()
    ]
    for size, parameter in trained.items():
        read[f"a parameter of {size:,} values, {_after(case)}"] = parameter
    read["a parameter of 7 values, after 2 steps with the default settings"] = observation["by default"]
    read[_STATE_BYTES] = total_bytes(observation["kept"]) / case["weights"].numel()
    return read


def adamw_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers, whose codes are the same.

    A moment is a sum of two terms, rounded a few times: 8 eps of the largest gradient (or its square). A parameter moves by lr m / (sqrt(v)
    + eps), so by the moment's rounding over eps, and by a few eps of its own size; in 16 bits right answers are equal (`_rounds_alike`).

    The state: codes that are cut off from padded blocks keep their storage, up to 255 bytes for each of a large parameter's two moments.
    A hundredth of a byte a parameter is room for the steps. The smallest excess that is wrong, a third code, is a byte.
    """
    steps, largest = len(case["gradients"]), case["gradients"].abs().max().item()
    weight = case["weights"].abs().max().item() + steps * max(case["rates"]) * largest
    moved = steps * (8 * EPS * weight + max(case["rates"]) * 32 * EPS * largest / case["eps"])
    if case["weights"].dtype != torch.float32:
        moved = 0.0
    sizes = [torch.Size(shape).numel() for shape in case["shapes"]]
    padding = sum(2 * (-size % 256) for size in sizes if size >= 4096)
    # By default a step moves by about 1e-3. If the step is counted in fp32, 1 - 0.999**t loses three digits: eps / 1e-3, twice.
    default = 4 * EPS * case["weights"].abs().max().item() + 2 * 1e-3 * EPS / 1e-3
    tolerance = {
        _STATE_BYTES: 0.01 + padding / sum(sizes),
        "a parameter of 7 values, after 2 steps with the default settings": default,
    }
    for size in sizes:
        tolerance[f"exp_avg of a parameter of {size:,} values, {_after(case)}"] = 8 * EPS * largest
        tolerance[f"exp_avg_sq of a parameter of {size:,} values, {_after(case)}"] = 8 * EPS * largest**2
        tolerance[f"a parameter of {size:,} values, {_after(case)}"] = moved
    return tolerance


_SMALL = "small = parameter.numel() < 4096"
_SECOND = "second = beta2 * second + (1 - beta2) * gradient**2"
_SPREAD = '(second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]'
_CORRECTED = 'first / (1 - beta1 ** state["step"])'
_DECAYED = 'parameter.float() * (1 - group["lr"] * group["weight_decay"])'
_MOVED = 'parameter.copy_(decayed - group["lr"] * corrected / spread)'

check_adamw_8bit = Exercise(
    spec=[AdamW8bit],
    cases=lambda generator: [adamw_case(generator), adamw_case(generator, torch.bfloat16, steps=1, scale=1e-4)],
    driver=drive_adamw,
    helpers=[seeing, codes_of_our_own],
    reading=read_adamw,
    tolerance=adamw_tolerance,
    at_most=frozenset({_STATE_BYTES}),
    mistakes={
        "it is computed in the parameter's dtype: go to fp32 first, moments, gradient and parameter": {
            "gradient = parameter.grad.float()": "gradient = parameter.grad",
            _DECAYED: _DECAYED.replace("parameter.float()", "parameter"),
        },
        "small tensors' moments are kept in the parameter's dtype: they stay in fp32": {
            'state["exp_avg"], state["exp_avg_sq"] = first, second': (
                'state["exp_avg"], state["exp_avg_sq"] = first.to(parameter.dtype), second.to(parameter.dtype)'
            ),
            'first, second = state["exp_avg"], state["exp_avg_sq"]': (
                'first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()'
            ),
        },
        "the parameter is rounded twice, after weight decay and after the step: compute both in fp32, and round once": {
            _DECAYED: 'parameter.mul_(1 - group["lr"] * group["weight_decay"]).float()',
        },
        "the second moment is stored in the signed type: it is never negative, and half of the codes stay idle": {
            "to_8bit(second, False)": "to_8bit(second, True)",
            'state["exp_avg_sq_absmax"], False)': 'state["exp_avg_sq_absmax"], True)',
        },
        "the second moment is stored in the unsigned type and read in the signed one: both take the same": {
            'from_8bit(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False)': (
                'from_8bit(state["exp_avg_sq"], state["exp_avg_sq_absmax"], True)'
            ),
        },
        "the moments are kept in fp32: keep codes and absmax": {
            _SMALL: "small = True",
        },
        "small tensors are quantized as well: below 4,096 values the moments stay in fp32": {_SMALL: "small = False"},
        "a tensor of exactly 4,096 values stays in fp32: only what has fewer does": {
            _SMALL: "small = parameter.numel() <= 4096",
        },
        "the update uses the moments as they are read back from 8 bits: use the new ones, and quantize them afterwards": {
            _SECOND: (
                f"{_SECOND}\n                if not small:\n"
                "                    first, second = from_8bit(*to_8bit(first, True), True), from_8bit(*to_8bit(second, False), False)"
            ),
        },
        "the moments are not corrected: in the first steps they are too small": {
            _CORRECTED: "first",
            f"spread = {_SPREAD}": 'spread = second.sqrt() + group["eps"]',
        },
        "eps is added under the root: it is added to the root": {
            f"spread = {_SPREAD}": 'spread = (second / (1 - beta2 ** state["step"]) + group["eps"]).sqrt()',
        },
        "the root is missing: Adam divides by the square root of the second moment": {
            f"spread = {_SPREAD}": 'spread = second / (1 - beta2 ** state["step"]) + group["eps"]',
        },
        "weight decay is added to the gradient, as in Adam: AdamW shrinks the parameter itself": {
            "gradient = parameter.grad.float()": (
                'gradient = parameter.grad.float() + group["weight_decay"] * parameter.float()'
            ),
            _DECAYED: "parameter.float()",
        },
        "weight decay is left out": {_DECAYED: "parameter.float()"},
        "weight decay is not multiplied by the learning rate": {_DECAYED: 'parameter.float() * (1 - group["weight_decay"])'},
        "weight decay shrinks the step as well: shrink the parameter first, then take the step": {
            _DECAYED: "parameter.float()",
            _MOVED: 'parameter.copy_((decayed - group["lr"] * corrected / spread) * (1 - group["lr"] * group["weight_decay"]))',
        },
        "the second moment is the mean of the gradients' sizes: it is the mean of their squares": {
            "(1 - beta2) * gradient**2": "(1 - beta2) * gradient.abs()",
        },
        "the two betas have changed places": {'beta1, beta2 = group["betas"]': 'beta2, beta1 = group["betas"]'},
        "every group gets the first group's learning rate: take it from its own": {
            _MOVED: 'parameter.copy_(decayed - self.defaults["lr"] * corrected / spread)',
        },
        "the optimizer's defaults are used in the place of the group's settings: every group has its own": {
            "state = self.state[parameter]": "group, state = self.defaults, self.state[parameter]",
        },
        "t is 1 in the first two steps: count the step before you use it": {
            _CORRECTED: 'first / (1 - beta1 ** max(1, state["step"] - 1))',
            _SPREAD: '(second / (1 - beta2 ** max(1, state["step"] - 1))).sqrt() + group["eps"]',
        },
        "t is 2 in the first step: it starts with 1": {
            _CORRECTED: 'first / (1 - beta1 ** (state["step"] + 1))',
            _SPREAD: '(second / (1 - beta2 ** (state["step"] + 1))).sqrt() + group["eps"]',
        },
        "t is 0 in the first step, so that the correction divides by zero: count the step before you use it": {
            _CORRECTED: 'first / (1 - beta1 ** (state["step"] - 1))',
            _SPREAD: '(second / (1 - beta2 ** (state["step"] - 1))).sqrt() + group["eps"]',
        },
        "a parameter without a gradient is not skipped": {"if parameter.grad is None:": "if False:"},
        "the step is not counted: the correction is that of the first step for ever": {
            'state["step"] += 1': 'state["step"] = 1',
        },
        "the moments start anew in every step: keep them from one step to the next": {
            "elif small:": "elif True:\n                    first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)\n                elif small:",
        },
        "absmax is kept from the first step: it changes with the moments": {
            'state["exp_avg"], state["exp_avg_absmax"] = to_8bit(first, True)': (
                'state["exp_avg"], now = to_8bit(first, True)\n                    state.setdefault("exp_avg_absmax", now)'
            ),
        },
        "the second moment's absmax is kept from the first step: it changes with the moment": {
            'state["exp_avg_sq"], state["exp_avg_sq_absmax"] = to_8bit(second, False)': (
                'state["exp_avg_sq"], now = to_8bit(second, False)\n                    state.setdefault("exp_avg_sq_absmax", now)'
            ),
        },
    },
    variants={
        "in place, bias correction in the step size": """
            class AdamW8bit(torch.optim.Optimizer):
                def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
                    super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

                @torch.no_grad()
                def step(self, closure=None):
                    for group in self.param_groups:
                        for p in group["params"]:
                            if p.grad is not None:
                                self.update(p, group)

                def update(self, p, group):
                    b1, b2 = group["betas"]
                    g, state = p.grad.float(), self.state[p]
                    t = state["step"] = state.get("step", 0) + 1
                    is_8bit = p.numel() >= 4096
                    moments = {}
                    for name, signed, beta, value in (("exp_avg", True, b1, g), ("exp_avg_sq", False, b2, g * g)):
                        if name not in state:
                            old = torch.zeros_like(g)
                        else:
                            old = from_8bit(state[name], state[name + "_absmax"], signed) if is_8bit else state[name]
                        moments[name] = old.mul_(beta).add_(value, alpha=1 - beta)
                    denominator = moments["exp_avg_sq"].sqrt().div_((1 - b2**t) ** 0.5).add_(group["eps"])
                    wide = p.float() * (1 - group["lr"] * group["weight_decay"])
                    p.copy_(wide.addcdiv_(moments["exp_avg"], denominator, value=-group["lr"] / (1 - b1**t)))
                    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                        if is_8bit:
                            state[name], state[name + "_absmax"] = to_8bit(moments[name], signed)
                        else:
                            state[name] = moments[name]
        """,
        "the state made at once, the step a tensor": {
            'state["step"] = 0': (
                'state["step"] = torch.zeros(())\n'
                "                    if not small:\n"
                '                        state["exp_avg"] = state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=torch.uint8)'
            ),
            'state["step"] += 1': 'state["step"] = state["step"] + 1',
        },
        "lerp": {
            "first = beta1 * first + (1 - beta1) * gradient": "first = torch.lerp(first, gradient, 1 - beta1)",
            _SECOND: "second = torch.lerp(second, gradient.square(), 1 - beta2)",
        },
        "eps scaled instead of the root": {
            f"spread = {_SPREAD}": (
                'root = (1 - beta2 ** state["step"]) ** 0.5\n                spread = (second.sqrt() + group["eps"] * root) / root'
            ),
        },
    },
)
