"""`adam_step`: one step of Adam, in a given precision."""

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise


def adam_step(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new weight and the two new moments (Kingma and Ba 2015, algorithm 1)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (gradient * gradient)
    unbiased = exp_avg / (1 - beta1**step)
    unbiased_sq = exp_avg_sq / (1 - beta2**step)
    weight = weight - learning_rate * unbiased / (unbiased_sq.sqrt() + eps)
    return weight, exp_avg, exp_avg_sq


def adam_case(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict:
    """Return a weight, a gradient and moments as they may be in the midst of training."""
    shape = (between(generator, 3, 5), between(generator, 6, 8))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "weight": normal(),
        "gradient": normal(),
        "exp_avg": normal(),
        "exp_avg_sq": normal() ** 2 + 0.5,
        "step": between(generator, 2, 9),
        "learning_rate": 0.1 + torch.rand((), generator=generator).item(),
    }


def drive_adam(adam_step, weight, gradient, exp_avg, exp_avg_sq, step, learning_rate):
    """Take a step, then two from nothing in fp16 and bf16."""
    import torch

    given = [tensor.clone() for tensor in (weight, gradient, exp_avg, exp_avg_sq)]
    new_weight, new_exp_avg, new_exp_avg_sq = adam_step(weight, gradient, exp_avg, exp_avg_sq, step, learning_rate)
    unchanged = all(torch.equal(*pair) for pair in zip(given, (weight, gradient, exp_avg, exp_avg_sq), strict=True))
    half = torch.ones(1, dtype=torch.float16)
    brain = torch.ones(1, dtype=torch.bfloat16)
    fell = adam_step(half, half * 1e-3, half * 0, half * 0, 1, 1e-3)[0]
    stayed = adam_step(brain, brain * 1e-3, brain * 0, brain * 0, 1, 1e-3)[0]
    return {
        "the dtype after a step in fp16": str(fell.dtype),
        "a weight of 1 in fp16, after one step with a gradient of 0.001 and a learning rate of 0.001,": f"{fell.item():.6g}",
        "a weight of 1 in bf16, after the same step,": f"{stayed.item():.6g}",
        f"the first moment, of {weight.dtype},": new_exp_avg,
        f"the second moment, of {weight.dtype},": new_exp_avg_sq,
        f"the weight, of {weight.dtype},": new_weight,
        "the given tensors are unchanged": unchanged,
    }


def adam_tolerance(case: dict) -> dict[str, float]:
    """Some ten roundings, each of at most eps / 2 of numbers whose size is bounded by those in the case.

    The quotient is at most max|m| / sqrt(min v), and each moment is divided by its bias correction before.
    """
    dtype = case["weight"].dtype
    eps = torch.finfo(dtype).eps
    first = case["exp_avg"].abs().max().item() + case["gradient"].abs().max().item()
    second = case["exp_avg_sq"].max().item() + case["gradient"].abs().max().item() ** 2
    smallest = case["exp_avg_sq"].min().item() * 0.99
    quotient = case["learning_rate"] * first / (1 - 0.9 ** case["step"]) / smallest**0.5
    return {
        f"the first moment, of {dtype},": 4 * eps * first,
        f"the second moment, of {dtype},": 4 * eps * second,
        f"the weight, of {dtype},": 16 * eps * (quotient + case["weight"].abs().max().item()),
    }


_UPDATE = "weight - learning_rate * unbiased / (unbiased_sq.sqrt() + eps)"

check_adam_step = Exercise(
    spec=[adam_step],
    cases=lambda generator: [adam_case(generator), adam_case(generator)],
    driver=drive_adam,
    tolerance=adam_tolerance,
    mistakes={
        "the second moment averages the gradient, not its square": {"(gradient * gradient)": "gradient"},
        "the moments are not corrected for having started at zero: divide by 1 - beta^step": {
            "unbiased = exp_avg / (1 - beta1**step)": "unbiased = exp_avg",
            "unbiased_sq = exp_avg_sq / (1 - beta2**step)": "unbiased_sq = exp_avg_sq",
        },
        "the first moment is not corrected": {"unbiased = exp_avg / (1 - beta1**step)": "unbiased = exp_avg"},
        "the second moment is not corrected": {"unbiased_sq = exp_avg_sq / (1 - beta2**step)": "unbiased_sq = exp_avg_sq"},
        "the correction takes beta once, not to the power of the step": {
            "(1 - beta1**step)": "(1 - beta1)",
            "(1 - beta2**step)": "(1 - beta2)",
        },
        "the root is missing: the update is divided by the root of the second moment": {
            "unbiased_sq.sqrt() + eps": "unbiased_sq + eps"
        },
        "the step goes uphill: subtract it": {"weight - learning_rate": "weight + learning_rate"},
        "the betas are mixed up: 0.9 for the first moment, 0.999 for the second": {
            "beta1, beta2, eps = 0.9, 0.999": "beta1, beta2, eps = 0.999, 0.9"
        },
        "beta and 1 - beta are mixed up: a moment keeps most of what it was": {
            "beta1 * exp_avg + (1 - beta1) * gradient": "(1 - beta1) * exp_avg + beta1 * gradient",
            "beta2 * exp_avg_sq + (1 - beta2)": "(1 - beta2) * exp_avg_sq + beta2",
        },
        "the learning rate is missing": {"learning_rate * unbiased": "unbiased"},
        "the moments that come back are the corrected ones: the next step would correct them again": {
            "return weight, exp_avg, exp_avg_sq": "return weight, unbiased, unbiased_sq"
        },
        "the moments that come back are the old ones": {
            "exp_avg = beta1 * exp_avg": "old = exp_avg, exp_avg_sq\n    exp_avg = beta1 * exp_avg",
            "return weight, exp_avg, exp_avg_sq": "return weight, *old",
        },
        "epsilon is added inside the root: it comes after it": {"unbiased_sq.sqrt() + eps": "(unbiased_sq + eps).sqrt()"},
        "the correction takes the power of the next step: the first step is 1": {
            "(1 - beta1**step)": "(1 - beta1 ** (step + 1))",
            "(1 - beta2**step)": "(1 - beta2 ** (step + 1))",
        },
        "the numbers go through fp32, and the given ones are in fp64: compute in the dtype that is given": {
            "exp_avg = beta1": "weight, gradient, exp_avg, exp_avg_sq = "
            "(t.float().to(t.dtype) for t in (weight, gradient, exp_avg, exp_avg_sq))\n    exp_avg = beta1",
        },
        "the numbers are converted to a wider dtype on the way: compute in the dtype that is given": {
            "exp_avg = beta1": "dtype = weight.dtype\n    weight, gradient, exp_avg, exp_avg_sq = "
            "(t.double() for t in (weight, gradient, exp_avg, exp_avg_sq))\n    exp_avg = beta1",
            "return weight, exp_avg, exp_avg_sq": "return weight.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)",
        },
        "the tensors that were given have been changed: compute new ones": {
            "exp_avg = beta1 * exp_avg + (1 - beta1) * gradient": "exp_avg.mul_(beta1).add_((1 - beta1) * gradient)",
        },
    },
    variants={
        "with lerp": {
            "beta1 * exp_avg + (1 - beta1) * gradient": "torch.lerp(exp_avg, gradient, 1 - beta1)",
        },
        "as torch.optim orders it": {
            _UPDATE: "weight - (learning_rate / (1 - beta1**step)) * (exp_avg / "
            "(exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + eps))",
        },
        "on clones, in place": {
            "beta2 * exp_avg_sq + (1 - beta2) * (gradient * gradient)": (
                "exp_avg_sq.clone().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)"
            ),
            _UPDATE: "weight.clone().sub_(learning_rate * unbiased / (unbiased_sq**0.5 + eps))",
        },
    },
)
