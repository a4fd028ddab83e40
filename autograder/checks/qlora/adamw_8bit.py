"""AdamW with its state in eight bits."""

import torch
from torch import Tensor

from peftlab.dynamic_code import dynamic_code, nearest_code


def to_8bit(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return dynamic codes in the shape of x, and the absmax, in fp32, of every 256 values in a row or what is left of them."""
    blocks = x.flatten().float().split(256)
    absmax = torch.stack([block.abs().max() for block in blocks])
    codes = [nearest_code(block / largest, signed) for block, largest in zip(blocks, absmax)]
    return torch.cat(codes).view(x.shape), absmax


def from_8bit(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the numbers that the codes stand for, in fp32 and in their shape."""
    values = dynamic_code(signed, codes.device)[codes.long()]
    scaled = [block * largest for block, largest in zip(values.flatten().split(256), absmax)]
    return torch.cat(scaled).view(codes.shape)


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
