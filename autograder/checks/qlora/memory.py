"""NF4Linear: measured bytes."""

import torch

from autograder.checking.cases import normal, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import seeing
from autograder.checks.qlora.cases import nf4_case, random_bytes
from autograder.checks.qlora.nf4_linear import (
    ABSMAX_BUFFER,
    APPLIED,
    BY_HOOKS,
    KEEP_LAYER,
    PRODUCT_BACKWARD,
    PRODUCT_FORWARD,
    SIZES,
    NF4Linear,
    NF4Product,
)


def nf4_memory_case(generator: torch.Generator, compute: str = "float32", double: bool = True) -> dict:
    """Return a layer of some 100,000 weights, x in the compute dtype, and few rows of it."""
    case = nf4_case(generator, compute, getattr(torch, compute), double)
    out_features, in_features = 2 * case["shape"][0], 2 * case["shape"][1]
    blocks = out_features * in_features // 64
    statistics = {
        "absmax": random_bytes(generator, blocks) if double else torch.rand(blocks, generator=generator),
        "nested_absmax": torch.rand(-(-blocks // 256), generator=generator) if double else None,
    }
    case = {name: case[name] for name in ("offset", "levels", "compute")} | statistics
    dtype = getattr(torch, compute)
    return case | {
        "packed": random_bytes(generator, out_features * in_features // 2, 1),
        "shape": [out_features, in_features],
        "x": normal(generator, 5, in_features, dtype=dtype),
        "output_gradient": normal(generator, 5, out_features, dtype=dtype),
    }


def drive_nf4_memory(
    NF4Product, NF4Linear, packed, absmax, nested_absmax, offset, levels, shape, compute, x, output_gradient, copies=1
):
    """Run forward and backward while every allocation is followed; return the numbers, and the bytes that the layer keeps.

    Of several layers, one after the other, every second one the other way round, a sample is returned.
    """
    import torch

    from peftlab.memory import whole_storage
    from peftlab.tracker import PeftMemTracker

    def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
        table = torch.cartesian_prod(levels, levels)
        return (table[packed.flatten().int()].view(-1, block_size).mul_(absmax[:, None])).view(tuple(shape)).to(dtype)

    with seeing(NF4Linear, dequantize_nf4=dequantize_nf4):
        statistics = (absmax,) if nested_absmax is None else (absmax, nested_absmax, offset)
        layer = NF4Linear(packed, statistics, levels, tuple(shape), getattr(torch, compute))
        x.requires_grad_(True)
        if copies > 1:
            shapes = [tuple(shape), tuple(shape[::-1])] * (copies // 2)
            layers = [NF4Linear(packed, statistics, levels, each, getattr(torch, compute)) for each in shapes]
            h = x
            for layer in layers:
                h = layer(h) / 50
            h.backward(output_gradient)
            return {"a sample of the outcome": torch.nn.functional.normalize(x.grad[0], dim=0)}
        tracker = PeftMemTracker()
        tracker.track_external(layer, x, output_gradient, packed, levels, *statistics)
        with tracker:
            start = tracker.bytes_by_category("current")["Total"]
            output = layer(x * 1)  # an answer that keeps this keeps what nothing else does
            after_forward = tracker.bytes_by_category("current")["Total"]
            output.backward(output_gradient)
            peak = tracker.bytes_by_category("peak")["Total"]
        held = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if torch.is_tensor(v))]
        kept = {tensor.untyped_storage().data_ptr(): whole_storage(tensor.detach()) for tensor in held}
        gradients = [tensor.grad for tensor in held if tensor.grad is not None]
    return {
        "kept": list(kept.values()),
        "gradients": gradients,
        "alive": after_forward - start - output.untyped_storage().nbytes(),
        "peak": peak - start,
        "x gets a gradient": x.grad is not None,
    }


_KEPT = "bytes that the layer keeps"
_ALIVE = "bytes that forward leaves for backward besides the output and what the layer keeps"
_STEP_PEAK = "peak bytes of forward and backward besides what was there before"


def read_nf4_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    return {
        "x gets a gradient": observation["x gets a gradient"],
        _KEPT: total_bytes(observation["kept"]),
        "bytes of gradients in the layer": total_bytes(observation["gradients"]),
        _ALIVE: observation["alive"],
        _STEP_PEAK: observation["peak"],
    }


def nf4_memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a right answer may exceed the spec's bytes.

    Kept: the dynamic code's table and a few numbers, less than the fp32 absmax of a doubly quantized weight. Left by forward: a few
    numbers. The peak: a quarter of a weight in the compute dtype; what is wrong takes a whole one.
    """
    weights = 2 * case["packed"].numel()
    return {_KEPT: 1024 + 256, _ALIVE: 64, _STEP_PEAK: weights * getattr(torch, case["compute"]).itemsize // 4}


check_nf4_memory = Exercise(
    spec=[NF4Product, NF4Linear],
    cases=lambda generator: [nf4_memory_case(generator), nf4_memory_case(generator, "bfloat16", double=False)],
    driver=drive_nf4_memory,
    helpers=[seeing],
    reading=read_nf4_memory,
    tolerance=nf4_memory_tolerance,
    at_most=frozenset({_KEPT, "bytes of gradients in the layer", _ALIVE, _STEP_PEAK}),
    mistakes={
        "the weight is dequantized once and kept: then it takes what an unquantized weight takes, and its codes besides": {
            SIZES: f"{SIZES}\n        self.weight = self.dequantized()",
            PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x, layer.weight)',
            "ctx.layer.dequantized()": "ctx.layer.weight",
        },
        "the weight that forward dequantized is kept until backward, by you or by autograd: dequantize it again instead": {
            KEEP_LAYER: "ctx.weight = layer.dequantized()",
            PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x, ctx.weight)',
            "weight = ctx.layer.dequantized()": "weight = ctx.weight",
        },
        "x is kept for backward: its gradient does not depend on it, only a weight's gradient would": {
            KEEP_LAYER: "ctx.layer = layer\n        ctx.save_for_backward(x)",
        },
        "absmax is dequantized once and kept: that gives back what double quantization had saved": {
            ABSMAX_BUFFER: (
                'self.register_buffer("absmax", statistics[0] if len(statistics) == 1 else '
                "dynamic_code()[statistics[0].int()] * statistics[1].repeat_interleave(256)[: len(statistics[0])] + statistics[2])"
            ),
            "if self.nested_absmax is not None:": "if False:",
        },
        "the codes are kept one to a byte: two share one": {
            'self.register_buffer("packed", packed)': (
                'self.register_buffer("packed", torch.cat([packed >> 4, packed & 15], 1).flatten())'
            ),
            "dequantize_nf4(self.packed, absmax": "dequantize_nf4(self.packed[::2] * 16 + self.packed[1::2], absmax",
        },
        "the packed bytes are kept in a wider dtype: that is four times the bytes": {
            'self.register_buffer("packed", packed)': 'self.register_buffer("packed", packed.int())',
        },
        "the packed bytes are copied for backward: keep the layer, not a copy of what it holds": {
            KEEP_LAYER: "ctx.layer, ctx.packed = layer, layer.packed.clone()",
        },
        "two dequantized weights are there at the same time: multiply by a view of the one, `.T` copies nothing": {
            "weight = ctx.layer.dequantized()": "weight = ctx.layer.dequantized()\n        weight = weight.T.contiguous().T",
        },
        "the weight is dequantized to fp64: `compute_dtype` decides": {
            "self.levels, self.shape, self.compute_dtype)": "self.levels, self.shape, torch.float64)",
            PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x.double(), layer.dequantized()).to(x.dtype)',
            PRODUCT_BACKWARD: 'torch.einsum("...o,oi->...i", gradient.double(), weight).to(gradient.dtype)',
        },
        "the dequantized weight is a parameter with a gradient of its own: the base is frozen": {
            SIZES: f"{SIZES}\n        self.weight = nn.Parameter(self.dequantized())",
            APPLIED: "torch.nn.functional.linear(x.to(self.compute_dtype), self.weight)",
        },
        "the layer holds the original statistics besides the quantized ones": {
            SIZES: f"{SIZES}\n        self.statistics = self.absmax.float().clone()",
        },
        "backward returns no gradient of x: the codes get none, but x must, or the layers below never learn": {
            PRODUCT_BACKWARD + ", None": "None, None",
        },
    },
    variants={
        "matrix products": {
            PRODUCT_FORWARD: "x @ layer.dequantized().T",
            PRODUCT_BACKWARD: "gradient @ weight",
        },
        "the layer's own tensors saved for backward": {
            KEEP_LAYER: "ctx.layer = layer\n        ctx.save_for_backward(layer.packed, layer.absmax, layer.levels)",
        },
        "the dynamic code as a buffer": {
            SIZES: f'{SIZES}\n        self.register_buffer("code", dynamic_code(device=packed.device), persistent=False)',
            "dynamic_code(device=absmax.device)[absmax.long()]": "self.code[absmax.long()]",
        },
        "saved tensors that are dequantized when they are asked for": BY_HOOKS,
    },
)
