"""Bug hunt: metrics that never move."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autograder.cases import between, normal
from autograder.exercise import Exercise


def diagnose(prompted: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> str:
    """Say why training would leave `prompted.soft_prompt` where it is, or that it learns; leave no gradient behind."""
    parameters = [*prompted.parameters(), *(held for group in optimizer.param_groups for held in group["params"])]
    for parameter in parameters:
        parameter.grad = None
    value = loss()
    if value.requires_grad:
        value.backward()
    gradient = prompted.soft_prompt.grad
    for parameter in parameters:
        parameter.grad = None
    if gradient is None or not gradient.abs().sum() > 0:
        return "no gradient"
    for group in optimizer.param_groups:
        for held in group["params"]:
            if held is prompted.soft_prompt:
                size = prompted.soft_prompt.detach().pow(2).mean().sqrt()
                return "too slow" if group["lr"] * steps < size / 10 else "learns"
    return "not in the optimizer"


_REACHES = (80, 15, 9.6, 5.8, 4.2, 2.85, 1.6, 1.06, 0.3, 0.6, 0.85, 0.95)
"""How far runs reach, where 1 is just enough, so that every wrong size and share is wrong in other runs.

With 45 to 84 entries, 9 to 12 a row, of the numbers below, it takes: by a mean 0.45, a mean absolute value 0.80, a standard deviation 0.90,
the mean square 1.12 (where the scale is 1), the largest entry 2.5 to 2.7, a row's norm 2.9 to 3.5, half of the size 5, the norm 6.7 to 9.2, the whole
size 10, a hundredth 0.1, without the steps 30 to 60, and with the tenth on the wrong side 100.
"""


def diagnose_case(generator: torch.Generator, scale: float = 1.0) -> dict:
    """Return a prompt, a head, and situations: both learning rates, the steps, and how optimizer and head were set up.

    The prompt's numbers are those of a normal distribution with mean 0.5 and standard deviation 1, times the scale, evenly drawn, in
    random order: a wrong size is then off by the same factor in every case.
    """
    length, hidden, steps = between(generator, 5, 7), between(generator, 9, 12), between(generator, 30, 60)
    drawn = torch.special.ndtri((torch.arange(length * hidden) + 0.5) / (length * hidden))
    prompt = scale * (drawn / drawn.std() + 0.5)[torch.randperm(length * hidden, generator=generator)].view(length, hidden)
    needed = prompt.pow(2).mean().sqrt().item() / 10
    enough = 1.1 * needed / steps
    data = "a forward that uses soft_prompt.data"
    situations = [
        *(
            (
                f"a run that reaches {reach:g} times what is enough",
                reach * needed / steps,
                reach * needed / steps,
                steps,
                False,
                False,
            )
            for reach in _REACHES
        ),
        ("a run that is all right", enough, enough / 50, steps, True, False),
        ("a second run that is all right", enough, 50 * enough, steps, False, True),
        ("a run of one step", 1.1 * needed, enough, 1, False, False),
        ("a run whose gradients are tiny", enough, enough, steps, False, False),
        ("a run whose gradients cancel in their sum", enough, enough, steps, False, False),
        ("a slow run", 0.9 * needed / steps, 50 * enough, steps, True, False),
        (data, enough, enough, steps, True, False),
        (f"{data}, with an old gradient left over", enough, enough, steps, True, False),
        (f"{data} before a frozen head", enough, enough, steps, False, True),
        (f"{data}, and an optimizer that holds the head alone", enough, enough, steps, False, False),
        (
            f"{data}, and an optimizer that holds the head alone, with an old gradient left over",
            enough,
            enough,
            steps,
            False,
            False,
        ),
        (f"a slow run: {data}", 0.7 * needed / steps, enough, steps, False, False),
        ("a forward that multiplies the prompt by zero", enough, enough, steps, True, False),
        ("a prompt that is frozen", enough, enough, steps, False, False),
        ("a prompt that was replaced after the optimizer was made", enough, enough, steps, False, False),
        ("an optimizer that holds the head alone", enough, enough, steps, False, False),
    ]
    return {
        "prompt": prompt,
        "head": normal(generator, between(generator, 3, 4), hidden) / 4,
        "x": normal(generator, hidden),
        "situations": situations,
    }


def drive_diagnose(diagnose, prompt, head, x, situations):
    """Set up training runs, some of which cannot work, and return what is said of each."""
    import torch
    from torch import nn

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.soft_prompt = nn.Parameter(prompt.clone())

        def forward(self, used):
            return used.sum(0) + x

    seen = {}
    for situation, rate, other_rate, steps, head_first, head_frozen in situations:
        model, own_head = (
            Prompted(),
            nn.Parameter(head.clone(), requires_grad=not head_frozen),
        )  # the head is outside, as lm_head is
        held = model.soft_prompt
        if "replaced" in situation:
            model.soft_prompt = nn.Parameter(held.detach().clone())
        if "frozen" in situation:
            model.soft_prompt.requires_grad_(False)
        groups = [{"params": [held], "lr": rate}, {"params": [own_head], "lr": other_rate}]
        groups = groups[1:] if "the head alone" in situation else groups
        # With so small an eps AdamW takes the same steps for tiny gradients as for large ones.
        optimizer = torch.optim.AdamW(groups[::-1] if head_first else groups, lr=other_rate, weight_decay=0.1, eps=1e-20)
        if "left over" in situation:
            model.soft_prompt.grad = torch.ones_like(model.soft_prompt)
        calls = []
        before = [
            parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in (model.soft_prompt, own_head)
        ]

        def loss(model=model, own_head=own_head, situation=situation, calls=calls):
            calls.append(situation)
            if "cancel" in situation:
                return (model.soft_prompt[0] - model.soft_prompt[1]).sum()
            prompt = model.soft_prompt.data if ".data" in situation else model.soft_prompt
            value = (own_head @ model(prompt * 0 if "zero" in situation else prompt)).pow(2).sum()
            value = 1e-12 * value if "tiny" in situation else value
            return -value if "second" in situation else value

        answer = diagnose(model, optimizer, loss, steps)
        label = f"{situation} (learning rate {rate:.2g}, {steps} steps)"
        seen[f"the diagnosis of {label}"] = answer if isinstance(answer, str) else repr(answer)
        left = [
            parameter.grad is not None and parameter.grad.any() and (old is None or not torch.equal(parameter.grad, old))
            for parameter, old in zip((model.soft_prompt, own_head), before)
        ]
        seen[f"gradients are left behind by {label}"] = any(left)
        moved = not torch.equal(model.soft_prompt.detach(), prompt) or not torch.equal(own_head.detach(), head)
        seen[f"weights have changed in {label}"] = moved
        seen[f"the loss was computed in {label}"] = bool(calls)
    return seen


_CLEAR = "    for parameter in parameters:\n        parameter.grad = None\n    value"
_CLEAR_AFTER = "gradient = prompted.soft_prompt.grad\n    for parameter in parameters:\n        parameter.grad = None\n"
_NO_GRADIENT = "gradient is None or not gradient.abs().sum() > 0"
_IS_HELD = "if held is prompted.soft_prompt:"
_SIZE = "prompted.soft_prompt.detach().pow(2).mean().sqrt()"
_REACH = 'group["lr"] * steps < size / 10'

check_diagnose = Exercise(
    spec=[diagnose],
    cases=lambda generator: [diagnose_case(generator)],
    driver=drive_diagnose,
    mistakes={
        "a gradient that an earlier step left behind is taken for this loss's: clear the gradients first": {
            _CLEAR: "    value"
        },
        "a gradient of zeros is taken for one: a prompt that the mask hides gets zeros, not None": {
            _NO_GRADIENT: "gradient is None"
        },
        "only the optimizer's gradients are cleared first: where it does not hold the prompt, an old one stays": {
            _CLEAR: "    optimizer.zero_grad()\n    value"
        },
        "a small gradient is taken for none: AdamW divides by its size, only None and exact zeros count": {
            _NO_GRADIENT: "gradient is None or gradient.norm() < 1e-6"
        },
        "the sum of the gradient is asked, in which positive and negative numbers cancel: ask whether any is not zero": {
            _NO_GRADIENT: "gradient is None or gradient.sum() == 0"
        },
        "`requires_grad` is asked instead of backward: a prompt may require a gradient and get none": {
            _NO_GRADIENT: "not prompted.soft_prompt.requires_grad"
        },
        'a loss that depends on nothing trainable makes backward fail: ask its `requires_grad` first, and say "no gradient"': {
            "if value.requires_grad:": "if True:"
        },
        "a tensor with the prompt's numbers is taken for the prompt: compare with `is`, an optimizer holds objects": {
            _IS_HELD: "if held.shape == prompted.soft_prompt.shape and torch.equal(held, prompted.soft_prompt):"
        },
        "`in` compares tensors by their numbers, and fails or misleads: compare with `is`": {
            _IS_HELD: 'if prompted.soft_prompt in group["params"]:'
        },
        "only the first group of the optimizer is looked at: there may be several": {
            "for group in optimizer.param_groups:\n        for": "for group in optimizer.param_groups[:1]:\n        for"
        },
        "the learning rate is the first group's: it is that of the group that holds the prompt": {
            'group["lr"] * steps': 'optimizer.param_groups[0]["lr"] * steps'
        },
        "the number of steps is left out: what counts is how far all of them can go together": {
            _REACH: 'group["lr"] < size / 10'
        },
        "the prompt's size is its mean, where positive and negative numbers cancel: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().mean()"
        },
        "the prompt's size is its standard deviation, which leaves the mean out: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().std()"
        },
        "the prompt's size is the mean of its absolute values: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().abs().mean()"
        },
        "the prompt's size is its largest entry: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().abs().max()"
        },
        "the prompt's size is its mean square: take the root of it": {_SIZE: "prompted.soft_prompt.detach().pow(2).mean()"},
        "the prompt's size is that of a row, whose norm grows with its length: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().norm(dim=1).mean()"
        },
        "the prompt's size is its norm, which grows with the number of its entries: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().norm()"
        },
        "the factor of a tenth is missing: too slow is what reaches less than a tenth of the size": {
            _REACH: 'group["lr"] * steps < size'
        },
        "the tenth is on the wrong side: the learning rate times the steps is compared with a tenth of the size": {
            _REACH: 'group["lr"] * steps / 10 < size'
        },
        "a hundredth of the size is taken for enough: less than a tenth is too slow": {
            _REACH: 'group["lr"] * steps < size / 100'
        },
        "half of the size is asked for: a tenth of it is enough": {_REACH: 'group["lr"] * steps < size / 2'},
        "the comparison is upside down: too slow is what reaches less than a tenth of the size": {
            _REACH: 'group["lr"] * steps > size / 10'
        },
        "gradients are left behind: the first step of training would add to them": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n"
        },
        "the optimizer's other parameters are left with gradients: clear these too, not the prompted model's alone": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n    prompted.zero_grad()\n"
        },
        "the prompt is left with a gradient where the optimizer does not hold it: clear the prompted model's too": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n    gradient = gradient if gradient is None else gradient.clone()\n    optimizer.zero_grad()\n"
        },
        "the prompt has moved: a diagnosis takes no step": {"value.backward()": "value.backward()\n        optimizer.step()"},
        'the optimizer is searched for the prompt before the gradient is known: say "no gradient" first': {
            "    value = loss()": (
                "    if not any(held is prompted.soft_prompt for group in optimizer.param_groups for held in group['params']):\n"
                '        return "not in the optimizer"\n    value = loss()'
            )
        },
        'the optimizer is asked before the gradient: say "no gradient" first': {
            "    value = loss()": (
                '    holding = [group for group in optimizer.param_groups if any(p is prompted.soft_prompt for p in group["params"])]\n'
                '    if not holding:\n        return "not in the optimizer"\n'
                '    if holding[0]["lr"] * steps < prompted.soft_prompt.detach().pow(2).mean().sqrt() / 10:\n'
                '        return "too slow"\n    value = loss()'
            )
        },
    },
    variants={
        "torch.autograd.grad": """
            def diagnose(prompted, optimizer, loss, steps):
                prompt, value = prompted.soft_prompt, loss()
                for p in prompted.parameters():
                    p.grad = None
                gradient = None
                if value.requires_grad and prompt.requires_grad:
                    (gradient,) = torch.autograd.grad(value, prompt, allow_unused=True)
                if gradient is None or not gradient.any():
                    return "no gradient"
                rates = [g["lr"] for g in optimizer.param_groups if id(prompt) in map(id, g["params"])]
                if not rates:
                    return "not in the optimizer"
                rms = (prompt.detach().double() ** 2).mean() ** 0.5
                return "learns" if steps * rates[0] >= 0.1 * rms else "too slow"
        """,
        "old gradients put back": {
            _CLEAR: f"    old = [parameter.grad for parameter in parameters]\n{_CLEAR}",
            _CLEAR_AFTER: (
                "gradient = prompted.soft_prompt.grad\n"
                "    for parameter, was in zip(parameters, old):\n        parameter.grad = was\n"
            ),
        },
        "zero_grad, and a walrus": """
            def diagnose(prompted, optimizer, loss, steps):
                prompted.zero_grad()
                optimizer.zero_grad()
                if (value := loss()).requires_grad:
                    value.backward()
                found = prompted.soft_prompt.grad is not None and prompted.soft_prompt.grad.abs().max().item() > 0
                prompted.zero_grad()
                optimizer.zero_grad()
                if not found:
                    return "no gradient"
                mine = next((g for g in optimizer.param_groups if any(p is prompted.soft_prompt for p in g["params"])), None)
                if mine is None:
                    return "not in the optimizer"
                size = prompted.soft_prompt.data.norm() / prompted.soft_prompt.numel() ** 0.5
                return "too slow" if mine["lr"] * steps < 0.1 * size else "learns"
        """,
        "an early return at the end": {
            "if gradient is None or not gradient.abs().sum() > 0:": "if gradient is None or torch.count_nonzero(gradient) == 0:",
            _SIZE: "torch.linalg.vector_norm(prompted.soft_prompt.detach()) / math.sqrt(prompted.soft_prompt.numel())",
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
