"""Random numbers, parameters and gradients that keep clear of the boundaries between codes, and what codes stand for."""

import torch
from torch import Tensor

from autograder.checking.cases import EPS, between, normal
from autograder.checks.eight_bit_optimizer.helpers import codes_of_our_own
from peftlab.dynamic_code import nearest_code


def _clear(x: Tensor, signed: bool) -> Tensor:
    """Return which values keep their code, and are no absmax in doubt, if they and their absmax are off by a millionth."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / largest.clamp(min=1e-38)
    margin = 1e-6 + 1e-6 * scaled.abs()
    same = nearest_code(scaled - margin, signed) == nearest_code(scaled + margin, signed)
    return (same | (scaled.abs() == 1) | (largest == 0)).flatten()[: x.numel()].view(x.shape)


def _clear_of_ours(x: Tensor, signed: bool) -> Tensor:
    """Return which values keep their code of `codes_of_our_own` if they, or the largest, are off by a ten-millionth or so."""
    to_8bit = codes_of_our_own()["to_8bit"]
    share = x / x.abs().max().clamp(min=1e-38)
    margin = 1e-7 + 1e-6 * share.abs()
    one = torch.ones(1)  # so that nothing is scaled again
    below, above = (to_8bit(torch.cat([one, moved.clamp(-1, 1)]), signed)[0][1:] for moved in (share - margin, share + margin))
    return (below == above) | (share.abs() == 1)


def codes_that_count(codes: object, absmax: object) -> object:
    """Return codes with 0 for those of blocks whose absmax is 0, which may be any; or as they are, if they are no such codes."""
    if not isinstance(codes, Tensor) or not isinstance(absmax, Tensor) or codes.dtype != torch.uint8 or absmax.dim() != 1:
        return codes
    if absmax.numel() != -(-codes.numel() // 256):
        return codes
    counted = codes.flatten().clone()
    for block, largest in enumerate(absmax):
        if largest == 0:
            counted[256 * block : 256 * (block + 1)] = 0
    return counted.view(codes.shape)


def stands_for(codes: object, absmax: object, signed: bool) -> object:
    """Return the numbers that `codes_of_our_own` stand for; or the codes, if they are no bytes with an absmax for every 256."""
    if not isinstance(codes, Tensor) or not isinstance(absmax, Tensor) or codes.dtype != torch.uint8 or absmax.dim() != 1:
        return codes
    if absmax.numel() != -(-codes.numel() // 256):
        return codes
    return codes_of_our_own()["from_8bit"](codes, absmax, signed)


def codes_case(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 1e-9, shape: tuple[int, ...] = (3, 200)
) -> dict:
    """Return numbers with a block of zeros, of which none is near the middle of two codes, and codes with absmax of their own.

    The largest of each block has a minus, so that no absmax is taken for a maximum.
    They are small, as second moments are: an absmax of 1e-9 and a floor of 1e-8 do not go together.
    """

    def drawn() -> Tensor:
        return scale * normal(generator, *shape, dtype=dtype)

    numbers = drawn()
    numbers.view(-1)[:256] = 0
    while True:
        for block in numbers.view(-1).split(256):
            if block.max() > -block.min():
                block.neg_()
        clear = _clear(numbers.float(), True) & _clear(numbers.abs().float(), False)
        if clear.all():
            break
        numbers = torch.where(clear, numbers, drawn())
    return {
        "numbers": numbers,
        "other_codes": torch.randint(0, 256, (7, 53), generator=generator, dtype=torch.uint8),
        "other_absmax": 0.2 + 3 * torch.rand(2, generator=generator),
    }


def _rounds_alike(weights: Tensor, gradients: Tensor, rates: Tensor, eps: float, weight_decay: float) -> Tensor:
    """Return which weights are rounded to the same 16 bits by every right answer after the first step.

    In the first step both corrected moments are the gradient's, so a weight moves by lr g / (|g| + eps). Right answers compute that in fp32
    and are off by some eps of the weight and of the rate: a product and a sum each, and a correction from a rounded beta, 1 - 0.95.
    """
    g, w = gradients.double(), weights.double()
    moved = (1 - rates * weight_decay) * w - rates * g / (g.abs() + eps)
    margin = 32 * EPS * (w.abs() + rates)
    return (moved - margin).to(weights.dtype) == (moved + margin).to(weights.dtype)


def adamw_case(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, steps: int = 3, large: int = 0, scale: float = 1.0
) -> dict:
    """Return parameters and gradients, of a given size, such that no moment lies on the boundary between two codes.

    Every right answer, however it rounds, then has the same codes: the moments are followed step by step, and gradients drawn
    again where a moment comes too near. In 16 bits, for a single step, the same is done with the weights.
    """
    if dtype != torch.float32 and steps > 1:
        raise ValueError("in 16 bits the weights are followed for one step")
    shapes = [[64, 64], [large or between(generator, 66, 70), 65], [3, between(generator, 5, 9), 37]]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    betas = [0.8 + 0.15 * torch.rand((), generator=generator).item(), 0.7 + 0.2 * torch.rand((), generator=generator).item()]
    first, second = [torch.zeros(size) for size in sizes], [torch.zeros(size) for size in sizes]
    ours, gradients = codes_of_our_own(), []
    for _ in range(steps):
        drawn = []
        for index, size in enumerate(sizes):
            gradient = scale * normal(generator, size, dtype=dtype)
            while True:
                m = betas[0] * first[index] + (1 - betas[0]) * gradient.float()
                v = betas[1] * second[index] + (1 - betas[1]) * gradient.float() ** 2
                clear = _clear_of_ours(m, True) & _clear_of_ours(v, False)
                if size < 4096 or clear.all():
                    break
                gradient = torch.where(clear, gradient, scale * normal(generator, size, dtype=dtype))
            if size >= 4096:
                m, v = (ours["from_8bit"](*ours["to_8bit"](x, signed), signed) for x, signed in ((m, True), (v, False)))
            first[index], second[index] = m, v
            drawn.append(gradient)
        gradients.append(torch.cat(drawn))
    rates, eps, weight_decay = [0.1 + 0.1 * torch.rand((), generator=generator).item(), 0.03], 0.05 * scale, 0.3
    weights = normal(generator, sum(sizes), dtype=dtype)
    if dtype != torch.float32:
        each = torch.tensor([rates[0]] * sizes[0] + [rates[1]] * sum(sizes[1:]), dtype=torch.float64)
        while not (alike := _rounds_alike(weights, gradients[0], each, eps, weight_decay)).all():
            weights = torch.where(alike, weights, normal(generator, sum(sizes), dtype=dtype))
    return {
        "weights": weights,
        "gradients": torch.stack(gradients),
        "few_gradients": normal(generator, 2, 7),
        "shapes": shapes,
        "rates": rates,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
    }
