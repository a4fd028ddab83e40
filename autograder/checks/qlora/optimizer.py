"""The 8-bit optimizer: what it keeps, and how it steps."""

import torch
from torch import Tensor

from autograder.cases import EPS, total_bytes
from autograder.checks.qlora.adamw_8bit import AdamW8bit, from_8bit, to_8bit
from autograder.checks.qlora.adamw_cases import adamw_case
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.dynamic_code import dynamic_code


def drive_adamw(
    to_8bit,
    from_8bit,
    AdamW8bit,
    numbers,
    other_codes,
    other_absmax,
    weights,
    gradients,
    shapes,
    rates,
    betas,
    eps,
    weight_decay,
):
    """Quantize some numbers; then train parameters of several sizes, in two groups, with given gradients."""
    import torch
    from torch import nn

    from peftlab.memory import whole_storage

    seen = {}
    for signed, kind in ((True, "signed"), (False, "unsigned")):
        codes, absmax = to_8bit(numbers if signed else numbers.abs(), signed)
        seen |= {
            f"codes, {kind}": codes,
            f"the absmax from to_8bit, {kind}": absmax,
            f"what from_8bit returns, {kind}": from_8bit(other_codes, other_absmax, signed),
        }
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
    for gradient in (numbers.view(-1)[256:263], numbers.view(-1)[263:270]):
        few.grad = gradient.clone()
        by_default.step()
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    seen |= {
        "parameters": [parameter.detach() for parameter in parameters],
        "the gradients afterwards": torch.cat([parameter.grad.flatten() for parameter in parameters]),
        "by default": few.detach(),
        "idle": idle.detach(),
        "idle state": sorted(map(str, optimizer.state.get(idle, {}))),
        "states": [{name: v.clone() for name, v in state.items() if torch.is_tensor(v)} for state in states],
        "kept": [whole_storage(v) for state in states for v in state.values() if torch.is_tensor(v)],
    }
    return seen


def _stands_for(codes: object, absmax: object, signed: bool) -> object:
    """Return the numbers that codes stand for, for the code of a zero is a matter of taste in a block of zeros; else the codes."""
    if not isinstance(codes, Tensor) or not isinstance(absmax, Tensor) or codes.dtype != torch.uint8 or absmax.dim() != 1:
        return codes
    if absmax.numel() != -(-codes.numel() // 256):
        return codes
    return dynamic_code(signed)[codes.long()] * absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)


_STATE_BYTES = "bytes of optimizer state a parameter"


def _after(case: dict) -> str:
    """Return how far the parameters of a case are trained."""
    steps = len(case["gradients"])
    return "after a step" if steps == 1 else f"after {steps} steps"


def read_adamw(observation: Observation, case: dict) -> Observation:
    """Name the parameters by their sizes, read codes back, and count bytes."""
    read = {}
    for kind in ("signed", "unsigned"):
        codes, absmax = observation[f"codes, {kind}"], observation[f"the absmax from to_8bit, {kind}"]
        read[f"the absmax from to_8bit, {kind}"] = absmax
        read[f"the dtype of to_8bit's codes, {kind}"] = str(getattr(codes, "dtype", type(codes)))
        read[f"what the codes from to_8bit stand for, {kind}"] = _stands_for(codes, absmax, kind == "signed")
        read[f"what from_8bit returns, {kind}"] = observation[f"what from_8bit returns, {kind}"]
    read["the gradients afterwards"] = observation["the gradients afterwards"]
    read["a parameter without a gradient"] = observation["idle"]
    read["the list of states of a parameter without a gradient"] = observation["idle state"]
    for shape, state in zip(case["shapes"], observation["states"]):
        size = torch.Size(shape).numel()
        held = {name: str(tensor.dtype) for name, tensor in state.items() if name != "step"}
        read[f"the state of a parameter of {size:,} values"] = dict(sorted(held.items()))
    for shape, state in zip(case["shapes"], observation["states"]):
        size = torch.Size(shape).numel()
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            value = state.get(name)
            if size >= 4096:
                value = _stands_for(value, state.get(f"{name}_absmax"), signed)
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
    for kind in ("signed", "unsigned"):
        tolerance[f"what from_8bit returns, {kind}"] = 2 * EPS * case["other_absmax"].max().item()
        tolerance[f"what the codes from to_8bit stand for, {kind}"] = 4 * EPS * case["numbers"].abs().max().item()
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
    spec=[to_8bit, from_8bit, AdamW8bit],
    cases=lambda generator: [adamw_case(generator), adamw_case(generator, torch.bfloat16, steps=1, scale=1e-4)],
    driver=drive_adamw,
    reading=read_adamw,
    tolerance=adamw_tolerance,
    at_most=frozenset({_STATE_BYTES}),
    mistakes={
        "one absmax for the whole tensor: every 256 values have their own, or one outlier spoils all": {
            "x.flatten().float().split(256)": "x.flatten().float().split(x.numel())",
            "values.flatten().split(256)": "values.flatten().split(values.numel())",
        },
        "the blocks have 64 values, as those of a weight: here they have 256": {
            "x.flatten().float().split(256)": "x.flatten().float().split(64)",
            "values.flatten().split(256)": "values.flatten().split(64)",
        },
        "absmax is repeated as a whole: each belongs to 256 neighbours, so `repeat_interleave(256)`": {
            "scaled = [block * largest for block, largest in zip(values.flatten().split(256), absmax)]": (
                "scaled = [values.flatten() * absmax.repeat(256)[: codes.numel()]]"
            ),
        },
        "something is added to absmax lest it be zero: the second moments of small gradients are smaller; `nearest_code` takes 0 / 0": {
            "nearest_code(block / largest, signed)": "nearest_code(block / (largest + 1e-8), signed)",
        },
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
        "`signed` is not used": {
            "nearest_code(block / largest, signed)": "nearest_code(block / largest)",
            "dynamic_code(signed, codes.device)": "dynamic_code(device=codes.device)",
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
            def to_8bit(x, signed):
                count = x.numel()
                blocks = torch.nn.functional.pad(x.flatten().float(), (0, -count % 256)).view(-1, 256)
                absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks * (1 / absmax)[:, None], signed)
                return codes.flatten()[:count].clone().view(x.shape), absmax

            def from_8bit(codes, absmax, signed):
                scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
                return dynamic_code(signed, codes.device)[codes.int()] * scale

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
        "codes cut off from padded blocks without a copy, as in the hint": {
            (
                "    blocks = x.flatten().float().split(256)\n"
                "    absmax = torch.stack([block.abs().max() for block in blocks])\n"
                "    codes = [nearest_code(block / largest, signed) for block, largest in zip(blocks, absmax)]\n"
                "    return torch.cat(codes).view(x.shape), absmax\n"
            ): (
                "    flat = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % 256)).view(-1, 256)\n"
                "    absmax = flat.abs().amax(1)\n"
                "    return nearest_code(flat / absmax[:, None], signed).flatten()[: x.numel()].view(x.shape), absmax\n"
            ),
        },
        "eps scaled instead of the root": {
            f"spread = {_SPREAD}": (
                'root = (1 - beta2 ** state["step"]) ** 0.5\n                spread = (second.sqrt() + group["eps"] * root) / root'
            ),
        },
        "padded blocks": {
            "    blocks = x.flatten().float().split(256)\n    absmax = torch.stack([block.abs().max() for block in blocks])\n": (
                "    flat = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % 256)).view(-1, 256)\n"
                "    absmax = torch.linalg.vector_norm(flat, float('inf'), dim=1)\n"
                "    blocks = (flat * (1 / absmax.clamp(min=1e-38))[:, None] * absmax[:, None]).flatten()[: x.numel()].split(256)\n"
            ),
        },
    },
)
