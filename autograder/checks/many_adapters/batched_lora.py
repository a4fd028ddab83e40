"""Exercise 3: a layer with slots, into which adapters are written while others serve."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autograder.checking.cases import between, normal, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.judging import PEAK_BYTES


class BatchedLoRA(nn.Module):
    """A frozen linear layer with room for several LoRA adapters, of which each row of a batch uses one or none."""

    def __init__(self, base: nn.Linear, slots: int, max_rank: int, update: Callable):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.update = update
        like_base = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.register_buffer("A", torch.zeros(slots, max_rank, base.in_features, **like_base))
        self.register_buffer("B", torch.zeros(slots, base.out_features, max_rank, **like_base))
        self.adapters = None

    @torch.no_grad()
    def write(self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Put an adapter into a slot, in place of what was there."""
        rank = len(lora_A)
        if rank > self.A.shape[1]:
            raise ValueError(f"an adapter of rank {rank} does not fit into a slot of rank {self.A.shape[1]}")
        self.clear(slot)
        self.A[slot, :rank] = lora_A
        self.B[slot, :, :rank] = scaling * lora_B

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.A[slot] = 0
        self.B[slot] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus each row's update."""
        output = self.base(x)
        if self.adapters is None:
            return output
        return output + self.update(x, self.A, self.B, self.adapters)


def swap_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return a base, and factors of ranks 4, 2, 3 and 1 for three slots of rank 4."""
    in_features, out_features = between(generator, 8, 10), between(generator, 5, 7)
    return {
        "weight": normal(generator, out_features, in_features, dtype=dtype),
        "bias": normal(generator, out_features, dtype=dtype),
        "A": normal(generator, 4 + 2 + 3 + 1, in_features, dtype=dtype),
        "B": normal(generator, out_features, 4 + 2 + 3 + 1, dtype=dtype),
        "x": normal(generator, 4, 2, in_features, dtype=dtype),
        "scaling": 1.5 + torch.rand((), generator=generator).item(),
        "swaps": 0,
    }


def thousand_case(generator: torch.Generator) -> dict:
    """Return a base whose slots take a thousand adapters of 128 KiB, one after the other: 125 MiB in all."""
    empty = {"A": torch.zeros(0), "B": torch.zeros(0), "x": torch.ones(2, 1, 128), "bias": torch.zeros(128)}
    return empty | {"weight": torch.full((128, 128), 0.01), "scaling": 2.0, "swaps": 1000}


def drive_batched_lora(BatchedLoRA, weight, bias, A, B, x, scaling, swaps):
    """Write, replace, refuse and clear adapters, and return the outputs in between; or swap a thousand times."""
    import torch
    from torch import nn

    def update(x, A, B, adapters):
        named = adapters.clamp(min=0)
        return x @ A[named].mT @ B[named].mT * (adapters >= 0)[:, None, None]

    base = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    base.weight, base.bias = nn.Parameter(weight), nn.Parameter(bias)
    if swaps:
        layer = BatchedLoRA(base, 3, 128, update)
        layer.adapters = torch.tensor([0, 1])
        for swap in range(swaps):
            layer.write(swap % 3, torch.full((128, 128), 0.5), torch.full((128, 128), float(swap % 7)), scaling)
        return {"outputs": {"after a thousand swaps": layer(x).detach().clone()}}

    layer = BatchedLoRA(base, 3, 4, update)
    ranks = [4, 2, 3, 1]
    parts = zip(A.split(ranks), B.split(ranks, dim=1), strict=True)
    first, second, third, fourth = [(lora_A.clone(), lora_B.clone()) for lora_A, lora_B in parts]
    outputs = {"before any adapter is named": layer(x).detach().clone()}
    layer.adapters = torch.tensor([0, 1, 2, -1])
    places = [layer.A.data_ptr(), layer.B.data_ptr()]
    layer.write(0, *first, scaling)
    layer.write(1, *second, 2 * scaling)
    layer.write(2, *third, scaling)
    first[0].zero_(), first[1].zero_()  # an answer that keeps the given tensors has lost them now
    outputs["with adapters of ranks 4, 2 and 3"] = layer(x).detach().clone()
    refused = "nothing"
    try:
        layer.write(1, torch.ones(5, A.shape[1], dtype=A.dtype), torch.ones(B.shape[0], 5, dtype=B.dtype), 1.0)
    except Exception as error:
        refused = type(error).__name__
    outputs["after an adapter of rank 5 was refused"] = layer(x).detach().clone()
    layer.write(0, *fourth, scaling)
    outputs["after rank 1 has replaced rank 4 in slot 0"] = layer(x).detach().clone()
    layer.clear(2)
    outputs["after slot 2 was cleared"] = layer(x).detach().clone()
    layer.write(2, *second, scaling)
    outputs["after slot 2 was filled again"] = layer(x).detach().clone()
    layer.adapters = None
    outputs["when `adapters` is None again"] = layer(x).detach().clone()
    meta = BatchedLoRA(nn.Linear(3, 4, device="meta"), 1, 2, update)
    return {
        "outputs": outputs,
        "refused": refused,
        "in place": [layer.A.data_ptr(), layer.B.data_ptr()] == places,
        "base": torch.cat([layer.base.weight.detach().flatten(), layer.base.bias.detach()]),
        "same base": layer.base is base,
        "state": {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()},
        "trainable": sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad),
        "devices": [meta.A.device.type, meta.B.device.type],
    }


def read_batched_lora(observation: Observation, case: dict) -> Observation:
    """Compare every output, what happened to the base, and the bytes of the layer's state."""
    outputs = {f"the output {when}": output for when, output in observation["outputs"].items()}
    if case["swaps"]:
        return outputs
    return {
        "the error at an adapter that is too large": observation["refused"],
        **outputs,
        "the base's weight and bias after all of this": observation["base"],
        "the layer holds the base itself": observation["same base"],
        "A and B stay where they are in memory": observation["in place"],
        "the list of trainable parameters": observation["trainable"],
        "the devices of A and B on a base on `meta`": observation["devices"],
        "bytes of the layer's state": total_bytes(observation["state"].values()),
    }


def swap_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of W x + b + s B (A x): in_features + rank + 4 roundings of terms whose sizes add up as below."""
    if case["swaps"]:
        # An update is a sum of 128 * 128 numbers, each at most scaling * 6 * 0.5, along a chain of 256 roundings.
        return {"the output after a thousand swaps": 264 * 2**-23 * 128**2 * case["scaling"] * 3, PEAK_BYTES: 32 * 2**20}
    x, W, b, A, B = (case[name].double().abs() for name in ("x", "weight", "bias", "A", "B"))
    largest = (x @ (W + 2 * case["scaling"] * B @ A).T + b).max().item()
    bound = (A.shape[1] + 8) * torch.finfo(case["x"].dtype).eps * largest
    return dict.fromkeys((f"the output {when}" for when in WHEN), bound)


WHEN = (
    "before any adapter is named",
    "with adapters of ranks 4, 2 and 3",
    "after an adapter of rank 5 was refused",
    "after rank 1 has replaced rank 4 in slot 0",
    "after slot 2 was cleared",
    "after slot 2 was filled again",
    "when `adapters` is None again",
)
"""When the driver looks at the output."""


_SCALED = "scaling * lora_B"
_WRITE_A, _WRITE_B = "self.A[slot, :rank] = lora_A", "self.B[slot, :, :rank] = scaling * lora_B"
_REFUSE = "if rank > self.A.shape[1]:"
_CLEARED = "self.A[slot] = 0\n        self.B[slot] = 0"
_BUFFER_A = 'self.register_buffer("A", torch.zeros(slots, max_rank, base.in_features, **like_base))'
_BUFFER_B = 'self.register_buffer("B", torch.zeros(slots, base.out_features, max_rank, **like_base))'

check_batched_lora = Exercise(
    spec=[BatchedLoRA],
    driver=drive_batched_lora,
    reading=read_batched_lora,
    cases=lambda generator: [swap_case(generator, torch.float64), thousand_case(generator)],
    tolerance=swap_tolerance,
    measures_peak=lambda case: case["swaps"] > 0,
    at_most=frozenset({PEAK_BYTES, "bytes of the layer's state"}),
    mistakes={
        "the update is not scaled: fold `scaling` into B": {_SCALED: "lora_B"},
        "the update is scaled twice: `scaling` belongs to one of the two factors": {
            _WRITE_A: "self.A[slot, :rank] = scaling * lora_A"
        },
        "what is left of a larger rank leaks into the smaller one that replaces it: set the rest of the slot to zero": {
            "self.clear(slot)\n        ": "",
        },
        "clearing a slot does nothing": {_CLEARED: "pass", "self.clear(slot)\n": "self.A[slot] = 0; self.B[slot] = 0\n"},
        "writing one adapter empties the other slots, which were serving": {
            "self.clear(slot)\n": "self.A.zero_(); self.B.zero_()\n"
        },
        "A and B are replaced by new tensors: write into those that are there, or a swap needs both at once": {
            "self.clear(slot)\n": "self.A, self.B = self.A.clone(), self.B.clone()\n        self.clear(slot)\n",
        },
        "a swap keeps the old factors alive: nothing but A and B may refer to an adapter": {
            _WRITE_B: _WRITE_B + '\n        self.__dict__.setdefault("written", []).append((lora_A, lora_B))',
        },
        "the adapter was merged into the base: other rows, and other adapters, use the same weight": {
            _WRITE_B: _WRITE_B + "\n        self.base.weight += scaling * lora_B @ lora_A",
        },
        "the slots are trainable: what serves needs no gradient, so make A and B buffers": {
            _BUFFER_A: "self.A = nn.Parameter(torch.zeros(slots, max_rank, base.in_features, **like_base))",
            _BUFFER_B: "self.B = nn.Parameter(torch.zeros(slots, base.out_features, max_rank, **like_base))",
        },
        "an adapter that is too large is cut without a word: raise a ValueError": {
            _REFUSE: "lora_A, lora_B, rank = lora_A[: self.A.shape[1]], lora_B[:, : self.A.shape[1]], min(rank, self.A.shape[1])\n        if False:",
        },
        "a refused adapter has emptied the slot already: look at the rank before you write": {
            "rank = len(lora_A)": "rank = len(lora_A)\n        self.clear(slot)",
        },
        "the base's output is missing": {
            "return output + self.update(": "return self.update(",
        },
        "while `adapters` is None, rows get slot 0's adapter: they have none": {
            "return output\n": "return output + self.update(x, self.A, self.B, torch.zeros(len(x), dtype=torch.long))\n",
        },
        "A and B are in fp32 whatever the base is in: create them with `dtype=base.weight.dtype`": {
            '"dtype": base.weight.dtype': '"dtype": torch.float32',
        },
        "A and B are not on the base's device": {'"device": base.weight.device': '"device": "cpu"'},
        "the base is not frozen": {"base.requires_grad_(False)": "base"},
    },
    variants={
        "padded first, then copied": {
            "self.clear(slot)\n": "pad = self.A.shape[1] - rank\n",
            _WRITE_A: "self.A[slot].copy_(torch.nn.functional.pad(lora_A, (0, 0, 0, pad)))",
            _WRITE_B: "self.B[slot].copy_(torch.nn.functional.pad(scaling * lora_B, (0, pad)))",
        },
        "the rest set to zero afterwards, scale in A": {
            "self.clear(slot)\n": "self.A[slot, rank:] = 0\n        self.B[slot, :, rank:] = 0\n",
            _WRITE_A: "self.A[slot, :rank].copy_(lora_A).mul_(scaling)",
            _WRITE_B: "self.B[slot, :, :rank].copy_(lora_B)",
        },
        "new_zeros, and numbers of rows that mean none": {
            _BUFFER_A: 'self.register_buffer("A", base.weight.new_zeros(slots, max_rank, base.in_features))',
            _BUFFER_B: 'self.register_buffer("B", base.weight.new_zeros(slots, base.out_features, max_rank))',
            "if self.adapters is None:\n            return output\n        ": "",
            "self.update(x, self.A, self.B, self.adapters)": (
                "self.update(x, self.A, self.B, torch.full((len(x),), -1) if self.adapters is None else self.adapters)"
            ),
        },
    },
)
