"""Checks of unit 10_qlora (Dettmers et al. 2023, arXiv 2305.14314; the 8-bit optimizer: Dettmers et al. 2022, arXiv 2110.02861).

No check needs a quantizer: packed bytes, statistics and levels are random numbers, and the levels are uneven, so that no data
type can be known beforehand. Where a case rounds to 16 bits, its numbers are such that right answers agree to the bit.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autograder.cases import between, normal, total_bytes
from autograder.checks.quantization import uneven_levels
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.dynamic_code import dynamic_code, nearest_code

EPS = torch.finfo(torch.float32).eps


def random_bytes(generator: torch.Generator, *shape: int) -> Tensor:
    """Return bytes of every value."""
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def unit_rows(generator: torch.Generator, rows: int, size: int) -> Tensor:
    """Return rows with a single number in each, a power of two with a sign, no two in one column.

    What is multiplied by such a row is not rounded, in whatever dtype: the product shows the numbers of a matrix themselves.
    """
    unit = torch.zeros(rows, size)
    sizes = 2.0 ** torch.randint(-1, 2, (rows,), generator=generator)
    signs = 2 * torch.randint(0, 2, (rows,), generator=generator) - 1
    unit[torch.arange(rows), torch.randperm(size, generator=generator)[:rows]] = sizes * signs
    return unit


def coarse(generator: torch.Generator, *shape: int) -> Tensor:
    """Return multiples of 1/4 from -3/2 to 3/2: sums of a few products of these are exact in bf16, too."""
    return torch.randint(-6, 7, shape, generator=generator) / 4


# ======================================================================================================================
# 1. dequantize, fast and in few bytes
# ======================================================================================================================
def dequantize_nf4(
    packed: Tensor, absmax: Tensor, levels: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64
) -> Tensor:
    """Return level times absmax, a product in fp32, rounded to `dtype` at the end: a table of bytes, a gather, a product."""
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    positions = packed.flatten().int()
    values = table.index_select(0, positions)
    del positions
    blocks = values.view(-1, block_size)
    blocks.mul_(absmax[:, None])
    return values.view(tuple(shape)).to(dtype)


def drive_dequantize_nf4(dequantize_nf4, packed, absmax, levels, shape, dtype, block_size):
    """Dequantize, and follow every allocation while that is going on; then do it on the device "meta"."""
    import torch

    from peftlab.tracker import PeftMemTracker

    target = (tuple(shape), getattr(torch, dtype), *(() if block_size == 64 else (block_size,)))
    tracker = PeftMemTracker()
    tracker.track_external(packed, absmax, levels)
    with tracker:
        start = tracker.bytes_by_category("current")["Total"]
        weight = dequantize_nf4(packed, absmax, levels, *target)
        peak = tracker.bytes_by_category("peak")["Total"] - start
    seen = {
        "the weight": weight,
        "the packed bytes afterwards": packed,
        "absmax afterwards": absmax,
        "the levels afterwards": levels,
        "peak bytes a weight of all that was made, beyond the 6 that fp32 values (4) and an index of bytes (2) take": max(
            0.0, peak / (2 * packed.numel()) - 6
        ),
    }
    elsewhere = dequantize_nf4(packed.to("meta"), absmax.to("meta"), levels.to("meta"), *target)
    return seen | {"the device of the weight, if all was on the device 'meta'": elsewhere.device.type}


_PEAK = "peak bytes a weight of all that was made, beyond the 6 that fp32 values (4) and an index of bytes (2) take"


def fast_case(generator: torch.Generator, dtype: str = "float32", block_size: int = 64) -> dict:
    """Return random bytes for a weight whose rows are one and a half blocks long."""
    rows = 1000 * between(generator, 3, 5)
    columns = block_size * 3 // 2
    return {
        "packed": random_bytes(generator, rows * columns // 2, 1),
        "absmax": 0.2 + 3 * torch.rand(rows * 3 // 2, generator=generator),
        "levels": uneven_levels(generator),
        "shape": [rows, columns],
        "dtype": dtype,
        "block_size": block_size,
    }


def fast_tolerance(case: dict) -> dict[str, float]:
    """Return what the table of bytes takes, twice, and a tenth of a byte a weight: what is wrong takes half a byte and more.

    Less than six bytes is no mistake: a weight can be made some blocks at a time, as the master does.
    """
    return {_PEAK: 0.1 + 2 * 256 * 8 / (2 * case["packed"].numel())}


_TABLE = "torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)"
_GATHER = "table.index_select(0, positions)"
_PRODUCT = "blocks.mul_(absmax[:, None])"

check_fast_dequantize = Exercise(
    spec=[dequantize_nf4],
    driver=drive_dequantize_nf4,
    cases=lambda generator: [fast_case(generator), fast_case(generator, "bfloat16", 32)],
    # One product in fp32 and one rounding: there is only one right answer. For the bytes see `fast_tolerance`.
    tolerance=fast_tolerance,
    at_most=frozenset({_PEAK}),
    mistakes={
        "the two values of a byte have changed places: the first is in the high half": {
            _TABLE: "torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1)",
        },
        "the first values of all bytes come first, then the second ones: the two values of a byte are neighbours": {
            _GATHER: "table.index_select(0, positions).T.contiguous().flatten()",
        },
        "absmax is left out: the levels are between -1 and 1 and have to be scaled": {_PRODUCT: "pass"},
        "the levels are divided by absmax: quantizing divides, dequantizing multiplies": {
            _PRODUCT: "blocks.div_(absmax[:, None])"
        },
        "the product was computed in the target dtype: multiply in fp32, and round once, at the end": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.to(dtype).repeat_interleave(16), levels.to(dtype).repeat(16)",
            _PRODUCT: "blocks.mul_(absmax.to(dtype)[:, None])",
        },
        "the table was cast to the target dtype, and the product is rounded to it, too: cast once, at the end": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.to(dtype).repeat_interleave(16), levels.to(dtype).repeat(16)",
        },
        "absmax was rounded to the target dtype before it was multiplied: round once, at the end": {
            _PRODUCT: "blocks.mul_(absmax.to(dtype).float()[:, None])",
        },
        "value i is multiplied by absmax i % blocks: a block is `block_size` neighbours, so it is i // block_size": {
            "values.view(-1, block_size)": "values.view(block_size, -1)",
            "absmax[:, None]": "absmax",
        },
        "the weight lies flat, or two values a row: return it in `shape`": {"values.view(tuple(shape))": "values"},
        "the dtype asked for is ignored": {".to(dtype)": ""},
        "`block_size` is not used: it need not be 64": {
            "values.view(-1, block_size)": "values.view(-1, 64)",
            "absmax[:, None]": "absmax.repeat_interleave(block_size)[::64][:, None]",
        },
        "the index is int64, eight bytes for each packed one: int32 is enough": {
            "packed.flatten().int()": "packed.flatten().long()",
        },
        "every weight has an index of its own: look up bytes, two weights at a time": {
            "packed.flatten().int()": "torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()",
            _GATHER: "levels.index_select(0, positions)",
        },
        "every weight has an index of its own, and the product is a second copy: look up bytes, and multiply in place": """
            def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
                codes = torch.cat([packed >> 4, packed & 0xF], dim=1).flatten().int()
                return (levels[codes].view(-1, block_size) * absmax[:, None]).view(shape).to(dtype)
        """,
        "the product is a second fp32 copy of the weight: multiply in place": {
            "blocks = values.view(-1, block_size)": "blocks = values.view(-1, block_size) * absmax[:, None]",
            _PRODUCT: "pass",
            "values.view(tuple(shape))": "blocks.view(tuple(shape))",
        },
        "the table is in fp64, and with it all that is gathered: fp32 will do": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.double().repeat_interleave(16), levels.double().repeat(16)",
            "values.view(tuple(shape)).to(dtype)": "values.float().view(tuple(shape)).to(dtype)",
        },
        "the packed bytes have been changed: they are needed in every step": {
            "del positions": "packed.zero_()",
        },
        "the table is not on the device of the packed bytes: make it from `levels`, which is": {
            _TABLE: f"torch.empty(256, 2).copy_({_TABLE})",
        },
    },
    variants={
        "indexing": {_GATHER: "table[positions]"},
        "pairs as numbers of eight bytes": {
            _TABLE: "torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.float64).flatten()",
            _GATHER: "table.index_select(0, positions).view(torch.float32)",
        },
        "the table from every byte": {
            _TABLE: (
                "torch.stack([levels[torch.arange(256, device=levels.device) // 16], "
                "levels[torch.arange(256, device=levels.device) % 16]], 1)"
            ),
        },
        "an embedding": {_GATHER: "torch.nn.functional.embedding(positions, table)"},
        "block by block": """
            def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
                table = torch.cartesian_prod(levels, levels)
                weight = torch.empty(shape, dtype=dtype, device=packed.device)
                rows = weight.view(-1, block_size)
                for start in range(0, len(absmax), 100):
                    some = packed.view(-1, block_size // 2)[start : start + 100].long()
                    rows[start : start + 100] = table[some].view(-1, block_size) * absmax[start : start + 100, None]
                return weight
        """,
    },
)


# ======================================================================================================================
# 2. NF4Linear
# ======================================================================================================================
class NF4Product(torch.autograd.Function):
    """x W^T for the weight of an `NF4Linear`, which is dequantized in forward and once more in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "NF4Linear") -> Tensor:
        ctx.layer = layer
        return torch.einsum("...i,oi->...o", x, layer.dequantized())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantized()
        return torch.einsum("...o,oi->...i", gradient, weight), None


class NF4Linear(nn.Module):
    """A frozen linear layer that holds packed codes and statistics, nothing else."""

    def __init__(self, packed, statistics, levels, shape, compute_dtype, bias=None):
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", statistics[0])
        self.register_buffer("nested_absmax", statistics[1] if len(statistics) == 3 else None)
        self.register_buffer("offset", statistics[2] if len(statistics) == 3 else None)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)
        self.shape, self.compute_dtype = tuple(shape), compute_dtype

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def dequantized(self) -> Tensor:
        absmax = self.absmax
        if self.nested_absmax is not None:
            scale = torch.cat([largest.expand(256) for largest in self.nested_absmax])[: absmax.numel()]
            values = dynamic_code(device=absmax.device)[absmax.long()]
            absmax = values * scale + self.offset
        return dequantize_nf4(self.packed, absmax, self.levels, self.shape, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = NF4Product.apply(x.to(self.compute_dtype), self)
        if self.bias is not None:
            product = product + self.bias.to(self.compute_dtype)
        return product.to(x.dtype)


def drive_nf4_linear(
    NF4Product, NF4Linear, packed, absmax, nested_absmax, offset, levels, shape, compute, bias, x, output_gradient, units
):
    """Use the layer, its copy from a state dict, and the layer after it has been sent to other dtypes and devices.

    While it runs, `dequantize_nf4` is ours, whatever the student's is: that has a check of its own.
    """
    import inspect

    import torch

    def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().int()
        return (levels[codes].view(-1, block_size) * absmax[:, None]).view(tuple(shape)).to(dtype)

    def build(change):
        statistics = (absmax,) if nested_absmax is None else (absmax, nested_absmax, offset)
        changed = [change(tensor.clone()) for tensor in (packed, levels)]
        return NF4Linear(
            changed[0],
            tuple(change(tensor.clone()) for tensor in statistics),
            changed[1],
            tuple(shape),
            getattr(torch, compute),
            None if bias is None else change(bias.clone()),
        )

    scope = getattr(inspect.unwrap(getattr(NF4Linear, "forward", NF4Linear)), "__globals__", {})
    theirs = {"dequantize_nf4": scope["dequantize_nf4"]} if "dequantize_nf4" in scope else {}
    scope.update({name: dequantize_nf4 for name in theirs})
    try:
        layer = build(lambda tensor: tensor)
        given = {
            "packed": packed,
            "absmax": absmax,
            "nested_absmax": nested_absmax,
            "offset": offset,
            "levels": levels,
            "bias": bias,
        }
        names = [name for name, tensor in given.items() if tensor is not None]
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
        seen = {
            "every tensor has the name that the docstring gives it": all(getattr(layer, n, None) is not None for n in names),
            "every tensor is a buffer or a parameter": all(n in parameters or n in buffers for n in names),
            "the list of parameters": list(parameters),
            "the list of buffers that require a gradient": [n for n, b in buffers.items() if b.requires_grad],
        }
        if not all(list(seen.values())[:2]):
            return seen  # what is no buffer raises further down, and says nothing useful
        x.requires_grad_(True)
        output = layer(x)
        if not torch.is_tensor(output):
            return seen | {"what forward returns": repr(output)}
        rounded = output.to(getattr(torch, compute)).to(output.dtype)
        seen |= {
            "what forward returns": "a tensor",
            "the dtype of the output": str(output.dtype),
            "every number of the output exists in the compute dtype": torch.equal(output, rounded),
            "the output for rows with a single number": output.detach()[..., :units, :],
            "the output": output.detach(),
            "the output requires a gradient": output.requires_grad,
        }
        if not output.requires_grad:
            return seen
        output.backward(output_gradient)
        seen |= {"x gets a gradient": x.grad is not None}
        if x.grad is None:
            return seen
        rounded = x.grad.to(getattr(torch, compute)).to(x.grad.dtype)
        seen |= {
            "the dtype of the gradient of x": str(x.grad.dtype),
            "every number of the gradient of x exists in the compute dtype": torch.equal(x.grad, rounded),
            "the gradient of x for output gradients with a single number": x.grad[..., :units, :],
            "the gradient of x": x.grad,
            "the weight from dequantized()": layer.dequantized().detach(),
        }
        with torch.no_grad():
            copy = build(torch.zeros_like)
            copy.load_state_dict(layer.state_dict())
            seen |= {"the output of a layer that was loaded from a state dict": copy(x)}
            for dtype in (torch.bfloat16, torch.float64):
                returned = layer.to(dtype)
                name = str(dtype).removeprefix("torch.")
                seen |= {
                    f"layer.to({name}) returns the layer": returned is layer,
                    f"the output after layer.to({name})": layer(x),
                }
            elsewhere = build(lambda tensor: tensor.to("meta"))(x.to("meta"))
            seen |= {"the device of the output, if all is on the device 'meta'": elsewhere.device.type}
            moved = layer.to("meta")(x.to("meta"))
            return seen | {"the device of the output after layer.to('meta')": moved.device.type}
    finally:
        scope.update(theirs)


def nf4_case(
    generator: torch.Generator,
    compute: str = "float32",
    dtype: torch.dtype = torch.float32,
    double: bool = True,
    bias: bool = False,
    batch: bool = True,
) -> dict:
    """Return a layer of random bytes with more than 256 blocks of 64, whose rows are no whole number of blocks.

    Of every sequence the first three rows, and output gradients, have a single number other than zero.
    """
    out_features = 8 * between(generator, 17, 20)
    in_features = out_features + 8 * between(generator, 1, 3)
    blocks = out_features * in_features // 64
    absmax = 0.2 + 3 * torch.rand(blocks, generator=generator)
    x = normal(generator, 2, 6, in_features)
    output_gradient = normal(generator, 2, 6, out_features)
    for row in range(2):
        x[row, :3] = unit_rows(generator, 3, in_features)
        output_gradient[row, :3] = unit_rows(generator, 3, out_features)
    return {
        "packed": random_bytes(generator, out_features * in_features // 2, 1),
        "absmax": random_bytes(generator, blocks) if double else absmax,
        "nested_absmax": 0.2 + torch.rand(-(-blocks // 256), generator=generator) if double else None,
        "offset": 2 + torch.rand((), generator=generator) if double else None,
        "levels": uneven_levels(generator),
        "shape": [out_features, in_features],
        "compute": compute,
        "bias": normal(generator, out_features) if bias else None,
        "x": (x if batch else x[0]).to(dtype),
        "output_gradient": (output_gradient if batch else output_gradient[0]).to(dtype),
        "units": 3,
    }


def nf4_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A weight is at most the largest absmax a. Where a row of x has a single number, a power of two up to 2, nothing is rounded but the
    weight: without double quantization and bias right answers are equal. An absmax from double quantization may differ by an ulp of
    fp32 (a fused multiply-add), which may round a weight to the neighbour in the compute dtype; adding the bias rounds
    once. Otherwise a dot product of n terms is off by n * eps / 2 times the sum of their sizes, of two answers by twice that.
    """
    eps = max(torch.finfo(getattr(torch, case["compute"])).eps, torch.finfo(case["x"].dtype).eps)
    double = case["nested_absmax"] is not None
    largest = (case["nested_absmax"].max() + case["offset"]).item() if double else case["absmax"].max().item()
    bias = 0.0 if case["bias"] is None else case["bias"].abs().max().item()
    single = (eps + 4 * EPS) * (2 * largest + bias) if double or bias else 0.0
    rows, gradients = case["x"].double().abs().sum(-1).max().item(), case["output_gradient"].double().abs().sum(-1).max().item()
    output = eps * case["shape"][1] * (largest * rows + bias)
    return {
        "the output for rows with a single number": single,
        "the output": output,
        "the gradient of x for output gradients with a single number": 2 * (eps + 4 * EPS) * largest if double else 0.0,
        "the gradient of x": eps * case["shape"][0] * largest * gradients,
        "the weight from dequantized()": (eps + 4 * EPS) * largest if double else 0.0,
        "the output of a layer that was loaded from a state dict": output,
        "the output after layer.to(bfloat16)": output / 8 if eps < 1e-5 else output,
        "the output after layer.to(float64)": output,
    }


_APPLIED = "NF4Product.apply(x.to(self.compute_dtype), self)"
_BACK_TO_X = "return product.to(x.dtype)"
_UNDONE = "values * scale + self.offset"
_LOOKED_UP = "dynamic_code(device=absmax.device)[absmax.long()]"
_CTX = "ctx.layer = layer"
_PRODUCT_FORWARD = 'torch.einsum("...i,oi->...o", x, layer.dequantized())'
_PRODUCT_BACKWARD = 'torch.einsum("...o,oi->...i", gradient, weight)'
_KEEP = "self._buffers[name] = buffer.to(self._buffers[name].device)"
_ABSMAX_BUFFER = 'self.register_buffer("absmax", statistics[0])'
_SIZES = "self.shape, self.compute_dtype = tuple(shape), compute_dtype"
_NF4_PRODUCT = """
            class NF4Product(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x, layer):
                    ctx.layer = layer
                    return x @ layer.dequantized().T

                @staticmethod
                def backward(ctx, gradient):
                    return gradient @ ctx.layer.dequantized(), None
        """

check_nf4_linear = Exercise(
    spec=[NF4Product, NF4Linear],
    driver=drive_nf4_linear,
    cases=lambda generator: [
        nf4_case(generator, bias=True),
        nf4_case(generator, "bfloat16", double=False),
        nf4_case(generator, "bfloat16", double=False, bias=True),
    ],
    tolerance=nf4_tolerance,
    mistakes={
        "a buffer of the docstring is missing or has another name: cells further down use packed, absmax, levels and the others": {
            _ABSMAX_BUFFER: 'self.register_buffer("codes", statistics[0])',
            "absmax = self.absmax": "absmax = self.codes",
        },
        "a plain attribute is no buffer: it does not move with the layer, and the state dict lacks it; use `register_buffer`": {
            _ABSMAX_BUFFER: "self.absmax = statistics[0]",
        },
        "a buffer is not in the state dict: it has to be persistent": {
            'self.register_buffer("packed", packed)': 'self.register_buffer("packed", packed, persistent=False)',
        },
        "no gradient reaches the layers below: x is detached, or the product made without gradients": {
            _APPLIED: "NF4Product.apply(x.detach().to(self.compute_dtype), self)",
        },
        "backward returns no gradient of x: the codes get none, but x must, or the layers below never learn": {
            _PRODUCT_BACKWARD + ", None": "None, None",
        },
        "the codes are made trainable: a weight that requires a gradient came back from somewhere, and nothing in this layer learns": {
            _SIZES: _SIZES + "\n        self.scale = nn.Parameter(torch.ones((), device=packed.device))",
        },
        "the output is in the compute dtype: give it back in the dtype of x": {_BACK_TO_X: "return product"},
        "the bias was added in its own dtype, or in that of x: cast it to the compute dtype, and add it to the product": {
            "self.bias.to(self.compute_dtype)": "self.bias",
        },
        "x and the weight were cast to the dtype of x for the product: `compute_dtype` decides, whatever x is in": {
            _APPLIED: "NF4Product.apply(x, self)",
            _PRODUCT_FORWARD: _PRODUCT_FORWARD.replace("dequantized()", "dequantized().to(x.dtype)"),
            "weight = ctx.layer.dequantized()": "weight = ctx.layer.dequantized().to(gradient.dtype)",
        },
        "it was computed in the dtype of x: `compute_dtype` decides, whatever x is in": {
            _APPLIED: "NF4Product.apply(x, self)",
            "self.levels, self.shape, self.compute_dtype)": "self.levels, self.shape, torch.float32)",
            "self.bias.to(self.compute_dtype)": "self.bias",
        },
        "the bias is left out": {"if self.bias is not None:": "if False:"},
        "the offset is forgotten: double quantization has subtracted the mean of absmax": {_UNDONE: "values * scale"},
        "the offset was added before the nested absmax was multiplied: it was subtracted first, so it is added last": {
            _UNDONE: "(values + self.offset) * scale",
        },
        "the codes of absmax were looked up in the unsigned table: what is left without the mean has a sign": {
            _LOOKED_UP: "dynamic_code(False, absmax.device)[absmax.long()]",
        },
        "the nested absmax of the wrong block: 256 neighbouring codes share one": {
            "torch.cat([largest.expand(256) for largest in self.nested_absmax])[: absmax.numel()]": (
                "self.nested_absmax.repeat(256)[: absmax.numel()]"
            ),
        },
        "the 8-bit codes are taken for evenly spaced numbers: they are indices of `dynamic_code()`": {
            _LOOKED_UP: "absmax.float() / 127.5 - 1",
        },
        "backward computes in another dtype than forward: `compute_dtype` decides there, too": {
            _APPLIED: "NF4Product.apply(x, self)",
            _PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x.to(layer.compute_dtype), layer.dequantized())',
            "weight = ctx.layer.dequantized()": (
                "layer = ctx.layer\n"
                "        kept, layer.compute_dtype = layer.compute_dtype, torch.float32\n"
                "        weight, gradient = layer.dequantized(), gradient.float()\n"
                "        layer.compute_dtype = kept"
            ),
        },
        "backward treats rounding as if it were not there, and leaves absmax out: its weight is forward's weight": {
            "weight = ctx.layer.dequantized()": (
                "layer = ctx.layer\n"
                "        weight = dequantize_nf4(layer.packed, torch.ones_like(layer.absmax, dtype=torch.float32), "
                "layer.levels, layer.shape, layer.compute_dtype)"
            ),
        },
        "`layer.to(torch.bfloat16)` has rounded absmax or the levels: whatever the model is cast to, these stay fp32": {
            _KEEP: "pass",
        },
        "a tensor does not move with the layer: what is not a parameter must be a buffer": {
            'self.register_buffer("packed", packed)': 'self.register_buffer("packed", packed)\n        self.held = levels',
            "absmax, self.levels, self.shape": "absmax, self.held, self.shape",
        },
        "the dynamic code is not on the layer's device: make it with `device=`": {
            "dynamic_code(device=absmax.device)": 'dynamic_code(device="cpu")',
        },
        "the codes are taken to the CPU to be looked up, for which a GPU must wait: make the table where they are, with `device=`": {
            _LOOKED_UP: "dynamic_code()[absmax.int().cpu()].to(self.levels.device)",
        },
        "a number is read out of a tensor (`.item()`, `float()`), for which a GPU must wait: compute with the tensor": {
            _UNDONE: "values * scale + self.offset.item()",
        },
        "`_apply` does not return the layer, so that `layer.to(...)` is None": {"return self\n": "return None\n"},
    },
    variants={
        "matrix products": {
            _PRODUCT_FORWARD: "x @ layer.dequantized().T",
            _PRODUCT_BACKWARD: "gradient @ weight",
        },
        "F.linear, with the bias inside": {
            _PRODUCT_FORWARD: (
                "torch.nn.functional.linear(x, layer.dequantized(), None if layer.bias is None else layer.bias.to(x.dtype))"
            ),
            _PRODUCT_BACKWARD: "torch.nn.functional.linear(gradient, weight.T)",
            "if self.bias is not None:": "if False:",
        },
        "buffers for what there is, the dynamic code among them": _NF4_PRODUCT
        + """
            class NF4Linear(nn.Module):
                def __init__(self, packed, statistics, levels, shape, compute_dtype, bias=None):
                    super().__init__()
                    self.shape, self.compute_dtype, self.double = shape, compute_dtype, len(statistics) == 3
                    held = dict(zip(("absmax", "nested_absmax", "offset"), statistics), packed=packed, levels=levels)
                    if self.double:
                        held["code"] = dynamic_code(device=packed.device)
                    for name, tensor in held.items():
                        self.register_buffer(name, tensor)
                    self.register_buffer("bias", bias)

                def _apply(self, fn, recurse=True):
                    kept = {name: buffer for name, buffer in self.named_buffers()}
                    super()._apply(fn, recurse)
                    for name, buffer in kept.items():
                        setattr(self, name, buffer.to(getattr(self, name).device))
                    return self

                def dequantized(self):
                    absmax = self.absmax
                    if self.double:
                        scale = self.nested_absmax[torch.arange(len(absmax), device=absmax.device) // 256]
                        absmax = self.code.index_select(0, absmax.int()) * scale + self.offset
                    return dequantize_nf4(self.packed, absmax, self.levels, self.shape, self.compute_dtype)

                def forward(self, x):
                    y = NF4Product.apply(x.to(self.compute_dtype), self)
                    if self.bias is not None:
                        y = y + self.bias.to(y.dtype)
                    return y.to(x.dtype)
        """,
        "saved tensors that are dequantized when they are asked for": {
            _APPLIED: "self._product(x.to(self.compute_dtype))",
            "    def dequantized(self)": (
                "    def _product(self, x):\n"
                "        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, self._again):\n"
                "            return torch.nn.functional.linear(x, self.dequantized())\n\n"
                "    def _again(self, shape):\n"
                "        weight = self.dequantized()\n"
                "        return weight if weight.shape == shape else weight.T\n\n"
                "    def dequantized(self)"
            ),
        },
        "casts inside the function, a fused multiply-add": {
            _APPLIED: "NF4Product.apply(x, self)",
            _CTX: "ctx.layer, ctx.given, x = layer, x.dtype, x.to(layer.compute_dtype)",
            "weight = ctx.layer.dequantized()": (
                "weight = ctx.layer.dequantized()\n        gradient = gradient.to(weight.dtype)"
            ),
            _PRODUCT_BACKWARD: _PRODUCT_BACKWARD + ".to(ctx.given)",
            _UNDONE: "torch.addcmul(self.offset, values, scale)",
        },
    },
)


# ======================================================================================================================
# 3. NF4Linear: measured bytes
# ======================================================================================================================
def drive_nf4_memory(NF4Product, NF4Linear, packed, absmax, nested_absmax, offset, levels, shape, compute, x, output_gradient):
    """Run forward and backward while every allocation is followed; return the numbers, and the bytes that the layer keeps."""
    import inspect

    import torch

    from peftlab.memory import whole_storage
    from peftlab.tracker import PeftMemTracker

    def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
        table = torch.cartesian_prod(levels, levels)
        return (table[packed.flatten().int()].view(-1, block_size).mul_(absmax[:, None])).view(tuple(shape)).to(dtype)

    scope = getattr(inspect.unwrap(getattr(NF4Linear, "forward", NF4Linear)), "__globals__", {})
    theirs = {"dequantize_nf4": scope["dequantize_nf4"]} if "dequantize_nf4" in scope else {}
    scope.update({name: dequantize_nf4 for name in theirs})
    try:
        statistics = (absmax,) if nested_absmax is None else (absmax, nested_absmax, offset)
        layer = NF4Linear(packed, statistics, levels, tuple(shape), getattr(torch, compute))
        x.requires_grad_(True)
        tracker = PeftMemTracker()
        tracker.track_external(layer, x, output_gradient, packed, levels, *statistics)
        with tracker:
            start = tracker.bytes_by_category("current")["Total"]
            output = layer(x * 1)  # whoever keeps this keeps what nobody else does
            after_forward = tracker.bytes_by_category("current")["Total"]
            output.backward(output_gradient)
            peak = tracker.bytes_by_category("peak")["Total"]
        held = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if torch.is_tensor(v))]
        kept = {tensor.untyped_storage().data_ptr(): whole_storage(tensor.detach()) for tensor in held}
        gradients = [tensor.grad for tensor in held if tensor.grad is not None]
    finally:
        scope.update(theirs)
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


def nf4_memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a right answer may exceed the spec's bytes.

    Kept: the dynamic code's table and a few numbers, less than the fp32 absmax of a doubly quantized weight. Left by forward: a few
    numbers. The peak: a quarter of a weight in the compute dtype; what is wrong takes a whole one.
    """
    weights = 2 * case["packed"].numel()
    return {_KEPT: 1024 + 256, _ALIVE: 64, _STEP_PEAK: weights * getattr(torch, case["compute"]).itemsize // 4}


_SAVE_NOTHING = f"{_CTX}\n        return {_PRODUCT_FORWARD}"

check_nf4_memory = Exercise(
    spec=[NF4Product, NF4Linear],
    driver=drive_nf4_memory,
    reading=read_nf4_memory,
    cases=lambda generator: [nf4_memory_case(generator), nf4_memory_case(generator, "bfloat16", double=False)],
    at_most=frozenset({_KEPT, "bytes of gradients in the layer", _ALIVE, _STEP_PEAK}),
    tolerance=nf4_memory_tolerance,
    mistakes={
        "the weight is dequantized once and kept: then it takes what an unquantized weight takes, and its codes besides": {
            _SIZES: f"{_SIZES}\n        self.weight = self.dequantized()",
            _PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x, layer.weight)',
            "ctx.layer.dequantized()": "ctx.layer.weight",
        },
        "the weight that forward dequantized is kept until backward, by you or by autograd: dequantize it again instead": {
            _CTX: "ctx.weight = layer.dequantized()",
            _PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x, ctx.weight)',
            "weight = ctx.layer.dequantized()": "weight = ctx.weight",
        },
        "x is kept for backward: its gradient does not depend on it, only a weight's gradient would": {
            _CTX: "ctx.layer = layer\n        ctx.save_for_backward(x)",
        },
        "absmax is dequantized once and kept: that gives back what double quantization had saved": {
            _ABSMAX_BUFFER: (
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
            _CTX: "ctx.layer, ctx.packed = layer, layer.packed.clone()",
        },
        "two dequantized weights are there at the same time: multiply by a view of the one, `.T` copies nothing": {
            "weight = ctx.layer.dequantized()": "weight = ctx.layer.dequantized()\n        weight = weight.T.contiguous().T",
        },
        "the weight is dequantized to fp64: `compute_dtype` decides": {
            "self.levels, self.shape, self.compute_dtype)": "self.levels, self.shape, torch.float64)",
            _PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x.double(), layer.dequantized()).to(x.dtype)',
            _PRODUCT_BACKWARD: 'torch.einsum("...o,oi->...i", gradient.double(), weight).to(gradient.dtype)',
        },
        "the dequantized weight is a parameter with a gradient of its own: the base is frozen": {
            _SIZES: f"{_SIZES}\n        self.weight = nn.Parameter(self.dequantized())",
            _APPLIED: "torch.nn.functional.linear(x.to(self.compute_dtype), self.weight)",
        },
        "the layer holds the original statistics besides the quantized ones": {
            _SIZES: f"{_SIZES}\n        self.statistics = self.absmax.float().clone()",
        },
        "backward returns no gradient of x: the codes get none, but x must, or the layers below never learn": {
            _PRODUCT_BACKWARD + ", None": "None, None",
        },
    },
    variants={
        "matrix products": {
            _PRODUCT_FORWARD: "x @ layer.dequantized().T",
            _PRODUCT_BACKWARD: "gradient @ weight",
        },
        "the layer's own tensors saved for backward": {
            _CTX: "ctx.layer = layer\n        ctx.save_for_backward(layer.packed, layer.absmax, layer.levels)",
        },
        "the dynamic code as a buffer": {
            _SIZES: f'{_SIZES}\n        self.register_buffer("code", dynamic_code(device=packed.device), persistent=False)',
            "dynamic_code(device=absmax.device)[absmax.long()]": "self.code[absmax.long()]",
        },
        "saved tensors that are dequantized when they are asked for": {
            _APPLIED: "self._product(x.to(self.compute_dtype))",
            "    def dequantized(self)": (
                "    def _product(self, x):\n"
                "        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, self._again):\n"
                "            return torch.nn.functional.linear(x, self.dequantized())\n\n"
                "    def _again(self, shape):\n"
                "        weight = self.dequantized()\n"
                "        return weight if weight.shape == shape else weight.T\n\n"
                "    def dequantized(self)"
            ),
        },
    },
)


# ======================================================================================================================
# 4. LoRA on a quantized base
# ======================================================================================================================
class QLoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A x; the factors stored in `dtype`, the products computed in the dtype of x."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.base = base
        out_features, in_features = base.shape
        stored = {"dtype": dtype, "device": base.packed.device}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **stored))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **stored))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        compressed = torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))
        update = torch.einsum("...r,or->...o", compressed, self.lora_B.to(x.dtype))
        return self.base(x) + self.scaling * update


def drive_qlora_layer(QLoRALinear, weight, lora_A, lora_B, alpha, stored, x, output_gradient):
    """Put the layer on a base that multiplies by `weight` and keeps nothing; take a training step with it."""
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ weight.to(x.dtype).T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ weight.to(gradient.dtype)

    class Base(nn.Module):
        def __init__(self, device="cpu"):
            super().__init__()
            self.register_buffer("packed", torch.zeros(4, 1, dtype=torch.uint8, device=device))
            self.shape = tuple(weight.shape)

        def forward(self, x):
            return Product.apply(x)

    dtype = getattr(torch, stored)
    base = Base()
    given_dtype = () if stored == "float32" else (dtype,)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.empty` then holds NaN, not what was in memory
    try:
        layer = QLoRALinear(base, lora_A.shape[0], alpha, *given_dtype)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    factors = [layer.lora_A, layer.lora_B]
    seen = {
        "the list of shapes of lora_A and lora_B": [list(factor.shape) for factor in factors],
        "the list of dtypes of lora_A and lora_B": [str(factor.dtype) for factor in factors],
        "the list of parameters that require a gradient": sorted(n for n, p in layer.named_parameters() if p.requires_grad),
        "lora_B is zero at the start": not factors[1].detach().any().item(),
        "start": factors[0].detach().clone(),
        "the layer holds the base itself": layer.base is base,
        "the attribute `scaling`": float(layer.scaling) if hasattr(layer, "scaling") else None,
    }
    if seen["the list of shapes of lora_A and lora_B"] != [list(lora_A.shape), list(lora_B.shape)]:
        return seen
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    x.requires_grad_(True)
    output = layer(x)
    seen |= {"the dtype of the output": str(output.dtype), "the output": output.detach()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.0)
    loss = lambda: (layer(x).float() * output_gradient.float()).sum()  # noqa: E731
    tensors = tensors_of_step(loss, layer.parameters(), optimizer, not_counted=[x, output_gradient, weight])
    seen |= {
        "the gradient of x": x.grad,
        "the gradient of lora_A": layer.lora_A.grad,
        "the gradient of lora_B": layer.lora_B.grad,
        "saved": tensors["saved"],
    }
    elsewhere = QLoRALinear(Base("meta"), 2, 4.0)
    return seen | {
        "the list of devices of the factors on a base on 'meta'": [elsewhere.lora_A.device.type, elsewhere.lora_B.device.type]
    }


_SPREAD_OF_A = "log2 of lora_A's spread at the start over that of kaiming_uniform_ with a=sqrt(5)"
_SAVED = "bytes that forward saves for backward besides x and the factors"


def read_qlora_layer(observation: Observation, case: dict) -> Observation:
    """Count the saved bytes; the loss's own, a product in fp32, are the same for everybody.

    A spread that is no number, or off by a million, is that of what was in memory: one value for all of these.
    """
    read = {name: value for name, value in observation.items() if name not in ("saved", "start")}
    spread = observation["start"].double().std().item() * math.sqrt(3 * case["lora_A"].shape[1])
    if spread == 0:
        read[_SPREAD_OF_A] = -99.0
    else:
        read[_SPREAD_OF_A] = math.log2(spread) if 1e-6 < spread < 1e6 else 99.0
    if "saved" in observation:
        read[_SAVED] = total_bytes(observation["saved"])
    return read


def qlora_layer_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, stored: str = "float32") -> dict:
    """Return a base, factors and an input of random shapes; in 16 bits such that right answers are exact."""
    out_features = between(generator, 40, 50)
    in_features = out_features + between(generator, 40, 60)
    rank, tokens = between(generator, 3, 4), 2 * between(generator, 10, 15)
    exact = dtype.itemsize == 2
    draw = (lambda *shape: coarse(generator, *shape)) if exact else (lambda *shape: normal(generator, *shape))
    x = unit_rows(generator, tokens, in_features) if exact else normal(generator, tokens, in_features)
    gradient = normal(generator, tokens, out_features)
    if exact:
        gradient = torch.zeros(tokens, out_features)
        gradient[torch.arange(tokens), torch.randint(0, out_features, (tokens,), generator=generator)] = 1.0
    return {
        "weight": draw(out_features, in_features),
        "lora_A": draw(rank, in_features),
        "lora_B": draw(out_features, rank),
        "alpha": rank * (0.5 if exact else 2.2 + torch.rand((), generator=generator).item()),
        "stored": stored,
        "x": x.view(2, -1, in_features).to(dtype),
        "output_gradient": gradient.view(2, -1, out_features).to(dtype),
    }


def qlora_layer_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers, as in unit 08; in 16 bits the output and the factors' gradients are exact.

    (In 16 bits every row of x has a single number, so nothing is rounded but the sum of base and update, the same in every order.) Two
    copies of the factors, and a scale, may be saved.
    """
    dtype = case["x"].dtype
    rank, in_features = case["lora_A"].shape
    out_features = case["lora_B"].shape[0]
    copies = 2 * dtype.itemsize * rank * (in_features + out_features) + 64
    scaling = case["alpha"] / rank
    A, B, W, x, g = (case[name].double().abs() for name in ("lora_A", "lora_B", "weight", "x", "output_gradient"))
    dense = W + scaling * B @ A
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    unit = (in_features + out_features + len(x) + rank + 4) * torch.finfo(dtype).eps
    # The standard deviation of 250 numbers or more scatters by 4%; 0.6 doublings are 50%.
    tolerance = {"the gradient of x": unit * (g @ dense).max().item(), _SAVED: copies, _SPREAD_OF_A: 0.6}
    tolerance |= {"the attribute `scaling`": 2 * EPS * scaling}  # a quotient, rounded once if it is a tensor
    if dtype.itemsize == 2:
        return tolerance
    return tolerance | {
        "the output": unit * (x @ dense.T).max().item(),
        "the gradient of lora_A": unit * scaling * (B.T @ g.T @ x).max().item(),
        "the gradient of lora_B": unit * scaling * (g.T @ (x @ A.T)).max().item(),
    }


_COMPRESSED = 'torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))'
_UPDATE = 'torch.einsum("...r,or->...o", compressed, self.lora_B.to(x.dtype))'
_SUM = "self.base(x) + self.scaling * update"
_INIT_A = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"

check_qlora_layer = Exercise(
    spec=[QLoRALinear],
    driver=drive_qlora_layer,
    reading=read_qlora_layer,
    cases=lambda generator: [
        qlora_layer_case(generator),
        qlora_layer_case(generator, torch.bfloat16),
        qlora_layer_case(generator, torch.bfloat16, "bfloat16"),
    ],
    at_most=frozenset({_SAVED}),
    tolerance=qlora_layer_tolerance,
    mistakes={
        "x is cast to the factors' dtype, and that copy is kept for backward: cast the factors, which are small": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", x.to(self.lora_A.dtype), self.lora_A)',
            _UPDATE: 'torch.einsum("...r,or->...o", compressed, self.lora_B).to(x.dtype)',
        },
        "the output is in the factors' dtype: all that follows would be computed in it, and take its bytes": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", x.to(self.lora_A.dtype), self.lora_A)',
            _UPDATE: 'torch.einsum("...r,or->...o", compressed, self.lora_B)',
        },
        "the factors are stored in 16 bits whatever `dtype` says: small updates would be rounded away": {
            '"dtype": dtype,': '"dtype": torch.bfloat16,',
        },
        "`dtype` is not used: the factors are stored in it": {'"dtype": dtype,': '"dtype": torch.float32,'},
        "the factors are cast and detached on the way: they get no gradient": {
            "self.lora_A.to(x.dtype)": "self.lora_A.detach().to(x.dtype)",
        },
        "the update is not scaled: multiply it by alpha / rank": {_SUM: "self.base(x) + update"},
        "the scale is upside down: it should be alpha / rank": {"= alpha / rank": "= rank / alpha"},
        "the scale is alpha alone: it should be alpha / rank": {"= alpha / rank": "= alpha"},
        "the scale is rounded down: `//` drops what is left over, so divide with `/`": {"= alpha / rank": "= alpha // rank"},
        "alpha is divided by the root of the rank, as in rsLoRA: here the scale is alpha / rank": {
            "= alpha / rank": "= alpha / rank**0.5",
        },
        "the scale has another name than the docstring gives it: cells further down use `scaling`": {
            "self.scaling = alpha / rank": "self.scale = alpha / rank",
            _SUM: "self.base(x) + self.scale * update",
        },
        "a scaled copy of x is kept for backward: scale the update, which needs no copy of x": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", self.scaling * x, self.lora_A.to(x.dtype))',
            _SUM: "self.base(x) + update",
        },
        "the base's output is missing: the update is added to it": {_SUM: "self.scaling * update"},
        "the base's output is scaled as well: alpha / rank belongs to the update alone": {
            _SUM: "self.scaling * (self.base(x) + update)"
        },
        "the base is computed without gradients: the layers below would only learn through the update": {
            _SUM: "self.base(x).detach() + self.scaling * update",
        },
        "the update does not pass its gradient on to x: nothing may be detached on the way": {
            '"...i,ri->...r", x,': '"...i,ri->...r", x.detach(),',
        },
        "lora_B starts at random, so that the model changes before it has learned anything: B starts at zero": {
            _INIT_A: f"{_INIT_A}\n        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))",
        },
        "lora_A and lora_B both start at zero: each then multiplies the other's gradient by zero, for ever": {
            _INIT_A: "nn.init.zeros_(self.lora_A)",
        },
        "lora_A is not initialized: `torch.empty` holds whatever was in memory, so use kaiming_uniform_ with a=sqrt(5)": {
            _INIT_A: "pass",
        },
        "lora_A starts with standard deviation 1: use kaiming_uniform_ with a=sqrt(5), as nn.Linear does": {
            _INIT_A: "nn.init.normal_(self.lora_A)",
        },
        "lora_A starts from kaiming_uniform_ without a=sqrt(5), so about 2.4 times too large": {
            _INIT_A: "nn.init.kaiming_uniform_(self.lora_A)",
        },
        "in and out have changed places: `base.shape` is (out_features, in_features)": {
            "out_features, in_features = base.shape": "in_features, out_features = base.shape",
        },
        "lora_A and lora_B are not on the base's device: create them with `device=base.packed.device`": {
            '"device": base.packed.device': '"device": "cpu"',
        },
        "the update is computed as a whole matrix B A: multiply x by A first, then by B": {
            _COMPRESSED: "self.lora_B.to(x.dtype) @ self.lora_A.to(x.dtype)",
            _UPDATE: "x @ compressed.T",
        },
    },
    variants={
        "matrix products": {
            _COMPRESSED: "x @ self.lora_A.to(x.dtype).T",
            _UPDATE: "compressed @ self.lora_B.to(x.dtype).T",
        },
        "F.linear twice": {
            _COMPRESSED: "torch.nn.functional.linear(x, self.lora_A.type_as(x))",
            _UPDATE: "torch.nn.functional.linear(compressed, self.lora_B.type_as(x))",
        },
        "the small product scaled": {
            _COMPRESSED: 'self.scaling * torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))',
            _SUM: "self.base(x) + update",
        },
        "a fused addition": {_SUM: "torch.add(self.base(x), update, alpha=self.scaling)"},
        "new_empty, and a start by hand": {
            "torch.empty(rank, in_features, **stored)": "base.packed.new_empty((rank, in_features), dtype=dtype)",
            _INIT_A: "nn.init.uniform_(self.lora_A, -(in_features**-0.5), in_features**-0.5)",
        },
    },
)


# ======================================================================================================================
# 5. a model in four bits with LoRA on it
# ======================================================================================================================
def qlora(
    model: nn.Module, quantize: Callable, rank: int = 8, alpha: float = 16.0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze the model; put LoRA on a quantized base in the place of every linear layer of its decoder layers."""
    model.requires_grad_(False)
    names = []
    for number, decoder_layer in enumerate(model.model.layers):
        for name, module in decoder_layer.named_modules():
            if isinstance(module, nn.Linear):
                names.append(f"model.layers.{number}.{name}")
    module = None
    for name in names:
        parent, _, own_name = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), own_name, QLoRALinear(quantize(linear), rank, alpha, dtype))
    return names


def drive_qlora(qlora, weights, tied, layers, rank, alpha, stored, input_ids, factors):
    """Quantize a tiny LLaMA with a toy quantizer, and take a training step under gradient checkpointing.

    While it runs, `QLoRALinear` is ours, whatever the student's is: that has a check of its own.
    """
    import dataclasses
    import inspect
    import weakref

    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig, causal_loss, set_gradient_checkpointing

    class Toy(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("packed", torch.round(linear.weight.detach() * 8).to(torch.int8))
            self.shape = tuple(linear.weight.shape)

        def forward(self, x):
            return x @ (self.packed / 8).to(x.dtype).T

    class QLoRALinear(nn.Module):
        def __init__(self, base, rank, alpha, dtype=torch.float32):
            super().__init__()
            self.base, self.scaling = base, alpha / rank
            self.lora_A = nn.Parameter(torch.zeros(rank, base.shape[1], dtype=dtype))
            self.lora_B = nn.Parameter(torch.zeros(base.shape[0], rank, dtype=dtype))

        def forward(self, x):
            return self.base(x) + self.scaling * (x @ self.lora_A.to(x.dtype).T @ self.lora_B.to(x.dtype).T)

    given, alive = [], []

    def quantize(linear):
        alive.append(sum(weight() is not None for weight in given))
        given.append(weakref.ref(linear.weight))
        return Toy(linear)

    config = dataclasses.replace(LlamaConfig(40, 16, 24, layers, 2, 1), tie_word_embeddings=tied)
    model = Llama(config)
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in model.parameters())], model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" not in name}
    dtype = getattr(torch, stored)
    scope = getattr(inspect.unwrap(qlora), "__globals__", {})
    theirs = {"QLoRALinear": scope["QLoRALinear"]} if "QLoRALinear" in scope else {}
    scope.update({name: QLoRALinear for name in theirs})
    try:
        given_settings = () if rank is None else (rank, alpha)
        given_dtype = {} if stored == "float32" else {"dtype": dtype}
        returned = qlora(model, quantize, *given_settings, **given_dtype)
    finally:
        scope.update(theirs)
    on_base = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    seen = {
        "the list of layers with LoRA": sorted(on_base),
        "the list that qlora returns": returned if returned is None else sorted(returned),
        "how often `quantize` was called": len(given),
        "how many weights that had been quantized were in memory when the next was": max(alive, default=0),
        "the list of linear layers that are left": sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear)),
        "the list of parameters that require a gradient": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }
    left = dict(model.named_parameters())
    seen |= {
        "the list of dtypes of the factors": sorted({str(m.lora_A.dtype) for m in on_base.values()}),
        "the list of ranks and scales": sorted({(m.lora_A.shape[0], m.scaling) for m in on_base.values()}),
        "the list of other parameters that have changed": [
            n for n in before if n not in left or not torch.equal(left[n], before[n])
        ],
        "embedding and head are one tensor": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    if seen["the list of layers with LoRA"] != sorted(f"model.layers.{i}.{n}" for i in range(layers) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    )):  # fmt: skip
        return seen
    start = 0
    with torch.no_grad():
        for name in sorted(on_base):
            for factor in (on_base[name].lora_A, on_base[name].lora_B):
                factor.copy_(factors[start : start + factor.numel()].view_as(factor))
                start += factor.numel()
    seen |= {"the logits": model(input_ids).detach()}
    set_gradient_checkpointing(model.train(), True)
    loss = causal_loss(model, input_ids, input_ids)
    if loss.requires_grad:
        loss.backward()
    gradients = {n: p.grad.float().flatten() for n, p in model.named_parameters() if p.grad is not None}
    return seen | {
        "the list of parameters that get a gradient, with gradient checkpointing": sorted(gradients),
        "the gradients, with gradient checkpointing": torch.cat([gradients[n] for n in sorted(gradients)] or [torch.zeros(0)]),
    }


_IN_MEMORY = "how many weights that had been quantized were in memory when the next was"


def qlora_case(generator: torch.Generator, tied: bool = False, stored: str = "float32", by_default: bool = False) -> dict:
    """Return a tiny LLaMA's weights, large enough to survive the toy quantizer, and factors for it, of given or default rank."""
    rank = None if by_default else between(generator, 2, 4)
    return {
        "weights": normal(generator, 12_000) * 0.3,
        "tied": tied,
        "layers": 2,
        "rank": rank,
        "alpha": None if by_default else rank * 1.5 + 0.25,
        "stored": stored,
        "input_ids": torch.randint(0, 40, (2, 7), generator=generator),
        "factors": 0.1 * normal(generator, 12_000),
    }


def qlora_tolerance(case: dict) -> dict[str, float]:
    """The layers are ours, and equal; their order of creation does not matter. At most one decoder layer's weights may wait."""
    return {
        _IN_MEMORY: 7,
        "the logits": 1e-5,
        "the gradients, with gradient checkpointing": 1e-5,
    }


_FREEZE = "model.requires_grad_(False)"
_IS_LINEAR = "if isinstance(module, nn.Linear):"
_NEW_LAYER = "QLoRALinear(quantize(linear), rank, alpha, dtype)"
_APPEND = 'names.append(f"model.layers.{number}.{name}")'

check_qlora = Exercise(
    spec=[qlora],
    driver=drive_qlora,
    cases=lambda generator: [qlora_case(generator), qlora_case(generator, tied=True, stored="bfloat16", by_default=True)],
    at_most=frozenset({_IN_MEMORY}),
    tolerance=qlora_tolerance,
    mistakes={
        "the head is quantized as well: it stays in 16 bits, and may be the embedding's own tensor": {
            "module = None": 'names.append("lm_head")',
        },
        "only attention is quantized: the MLP's three matrices are most of the weights": {
            _IS_LINEAR: 'if isinstance(module, nn.Linear) and "attn" in name:',
        },
        "only the query and value projections are adapted and quantized: QLoRA does all linear layers": {
            _IS_LINEAR: 'if isinstance(module, nn.Linear) and name.endswith(("q_proj", "v_proj")):',
        },
        "only the first decoder layer is quantized": {"enumerate(model.model.layers)": "enumerate(model.model.layers[:1])"},
        "the model is not frozen: embedding, head and norms are trained as well": {_FREEZE: "pass"},
        "the factors are frozen along with the model: freeze it before you put them in": {
            "return names": "model.requires_grad_(False)\n    return names",
        },
        "the factors are not in the dtype that was asked for": {_NEW_LAYER: "QLoRALinear(quantize(linear), rank, alpha)"},
        "rank and alpha have changed places": {_NEW_LAYER: "QLoRALinear(quantize(linear), alpha, rank, dtype)"},
        "every weight that has been quantized stays in memory until the last one is: keep names, not modules, in your list": {
            "module = None": "modules = [model.get_submodule(name) for name in names]",
        },
        "the names of the replaced layers are not returned": {"return names": "return None"},
        "the names do not start with `model.`: their first part belongs to them, as in `model.layers.0.self_attn.q_proj`": {
            "return names": 'return [name.removeprefix("model.") for name in names]',
        },
        "the names are not full ones: `model.layers.0.self_attn.q_proj` and so on": {
            "return names": 'return [name.rpartition(".")[2] for name in names]',
        },
        "every layer is quantized from the weight of the first one of its name": {
            "linear = model.get_submodule(name)": (
                "linear = model.get_submodule(name)\n"
                '        first = originals.setdefault(name.split(".", 3)[-1], linear.weight.detach().clone())\n'
                "        linear.weight.data = first.clone()"
            ),
            "module = None": "originals = {}",
        },
        "the tie of embedding and head is cut: leave both alone": {
            "module = None": (
                "if model.config.tie_word_embeddings:\n"
                "        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)"
            ),
        },
        "the norms are changed: they are small, and stay as they are": {
            "module = None": (
                "for layer in model.model.layers:\n"
                "        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.bfloat16().float()"
            ),
        },
    },
    variants={
        "one walk over names": """
            def qlora(model, quantize, rank=8, alpha=16.0, dtype=torch.float32):
                model.requires_grad_(False)
                replaced = []
                for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]:
                    parent, own = name.rsplit(".", 1)
                    base = quantize(model.get_submodule(name))
                    setattr(model.get_submodule(parent), own, QLoRALinear(base, rank, alpha, dtype))
                    replaced.append(name)
                return replaced
        """,
        "parents and their children": """
            def qlora(model, quantize, rank=8, alpha=16.0, dtype=torch.float32):
                for parameter in model.parameters():
                    parameter.requires_grad = False
                replaced = []
                for index, layer in enumerate(model.model.layers):
                    for kind in ("self_attn", "mlp"):
                        block = getattr(layer, kind)
                        for own, child in list(block.named_children()):
                            if isinstance(child, nn.Linear):
                                setattr(block, own, QLoRALinear(quantize(child), rank=rank, alpha=alpha, dtype=dtype))
                                replaced.append(f"model.layers.{index}.{kind}.{own}")
                return replaced
        """,
        "by the names of the projections": {_IS_LINEAR: 'if name.endswith("_proj"):'},
        "frozen one by one": {
            _FREEZE: "for parameter in model.parameters():\n        parameter.requires_grad_(False)",
        },
    },
)


# ======================================================================================================================
# 6. the 8-bit optimizer
# ======================================================================================================================
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
_NOT_FINITE = "the list of parameters with NaN or infinite numbers, by size"


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
    read[_NOT_FINITE] = [size for size, parameter in trained.items() if not parameter.isfinite().all()]
    for size, parameter in trained.items():
        read[f"a parameter of {size:,} values, {_after(case)}"] = parameter
    read["a parameter of 7 values, after 2 steps with the default settings"] = observation["by default"]
    read[_STATE_BYTES] = total_bytes(observation["kept"]) / case["weights"].numel()
    return read


def _clear(x: Tensor, signed: bool) -> Tensor:
    """Return which values keep their code, and are no absmax in doubt, if they and their absmax are off by a millionth."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / largest.clamp(min=1e-30)
    margin = 1e-6 + 1e-6 * scaled.abs()
    same = nearest_code(scaled - margin, signed) == nearest_code(scaled + margin, signed)
    return (same | (scaled.abs() == 1) | (largest == 0)).flatten()[: x.numel()].view(x.shape)


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
    gradients = []
    for _ in range(steps):
        drawn = []
        for index, size in enumerate(sizes):
            gradient = scale * normal(generator, size, dtype=dtype)
            while True:
                m = betas[0] * first[index] + (1 - betas[0]) * gradient.float()
                v = betas[1] * second[index] + (1 - betas[1]) * gradient.float() ** 2
                clear = _clear(m, True) & _clear(v, False)
                if size < 4096 or clear.all():
                    break
                gradient = torch.where(clear, gradient, scale * normal(generator, size, dtype=dtype))
            if size >= 4096:
                m, v = from_8bit(*to_8bit(m, True), True), from_8bit(*to_8bit(v, False), False)
            first[index], second[index] = m, v
            drawn.append(gradient)
        gradients.append(torch.cat(drawn))
    numbers = normal(generator, 3, 200)
    numbers.view(-1)[:256] = 0  # a block of zeros
    while not (_clear(numbers, True) & _clear(numbers.abs(), False)).all():
        clear = _clear(numbers, True) & _clear(numbers.abs(), False)
        numbers = torch.where(clear, numbers, normal(generator, 3, 200))
    rates, eps, weight_decay = [0.1 + 0.1 * torch.rand((), generator=generator).item(), 0.03], 0.05 * scale, 0.3
    weights = normal(generator, sum(sizes), dtype=dtype)
    if dtype != torch.float32:
        each = torch.tensor([rates[0]] * sizes[0] + [rates[1]] * sum(sizes[1:]), dtype=torch.float64)
        while not (alike := _rounds_alike(weights, gradients[0], each, eps, weight_decay)).all():
            weights = torch.where(alike, weights, normal(generator, sum(sizes), dtype=dtype))
    return {
        "numbers": numbers,
        "other_codes": random_bytes(generator, 7, 53),
        "other_absmax": 0.2 + 3 * torch.rand(2, generator=generator),
        "weights": weights,
        "gradients": torch.stack(gradients),
        "shapes": shapes,
        "rates": rates,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
    }


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
_FIRST = "first = beta1 * first + (1 - beta1) * gradient"
_SECOND = "second = beta2 * second + (1 - beta2) * gradient**2"
_SPREAD = '(second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]'
_CORRECTED = 'first / (1 - beta1 ** state["step"])'
_DECAYED = 'parameter.float() * (1 - group["lr"] * group["weight_decay"])'
_MOVED = 'parameter.copy_(decayed - group["lr"] * corrected / spread)'
_SMALL_READ = 'first, second = state["exp_avg"], state["exp_avg_sq"]'
_SMALL_STORED = 'state["exp_avg"], state["exp_avg_sq"] = first, second'
_FIRST_STORED = 'state["exp_avg"], state["exp_avg_absmax"] = to_8bit(first, True)'
_SECOND_STORED = 'state["exp_avg_sq"], state["exp_avg_sq_absmax"] = to_8bit(second, False)'
_SECOND_READ = 'from_8bit(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False)'
_HELPERS_CODES = """    blocks = x.flatten().float().split(256)
    absmax = torch.stack([block.abs().max() for block in blocks])
    codes = [nearest_code(block / largest, signed) for block, largest in zip(blocks, absmax)]
    return torch.cat(codes).view(x.shape), absmax
"""
_HELPERS = """
            def to_8bit(x, signed):
                count = x.numel()
                blocks = torch.nn.functional.pad(x.flatten().float(), (0, -count % 256)).view(-1, 256)
                absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks * (1 / absmax)[:, None], signed)
                return codes.flatten()[:count].clone().view(x.shape), absmax

            def from_8bit(codes, absmax, signed):
                scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
                return dynamic_code(signed, codes.device)[codes.int()] * scale
        """

check_adamw_8bit = Exercise(
    spec=[to_8bit, from_8bit, AdamW8bit],
    driver=drive_adamw,
    reading=read_adamw,
    cases=lambda generator: [adamw_case(generator), adamw_case(generator, torch.bfloat16, steps=1, scale=1e-4)],
    at_most=frozenset({_STATE_BYTES}),
    tolerance=adamw_tolerance,
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
            _SMALL_STORED: 'state["exp_avg"], state["exp_avg_sq"] = first.to(parameter.dtype), second.to(parameter.dtype)',
            _SMALL_READ: 'first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()',
        },
        "the parameter is rounded twice, after weight decay and after the step: compute both in fp32, and round once": {
            _DECAYED: 'parameter.mul_(1 - group["lr"] * group["weight_decay"]).float()',
        },
        "the second moment is stored in the signed type: it is never negative, and half of the codes stay idle": {
            "to_8bit(second, False)": "to_8bit(second, True)",
            'state["exp_avg_sq_absmax"], False)': 'state["exp_avg_sq_absmax"], True)',
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
            _FIRST_STORED: 'state["exp_avg"], now = to_8bit(first, True)\n                    state.setdefault("exp_avg_absmax", now)',
        },
    },
    variants={
        "in place, bias correction in the step size": _HELPERS
        + """
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
            _FIRST: "first = torch.lerp(first, gradient, 1 - beta1)",
            _SECOND: "second = torch.lerp(second, gradient.square(), 1 - beta2)",
        },
        "codes cut off from padded blocks without a copy, as in the hint": {
            _HELPERS_CODES: (
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


# ======================================================================================================================
# 7. the merged weight
# ======================================================================================================================
@torch.no_grad()
def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W + scaling B A, computed in fp32 and rounded once, at the end."""
    update = torch.einsum("or,ri->oi", layer.lora_B.float(), layer.lora_A.float())
    return (layer.base.dequantized().float() + layer.scaling * update).to(dtype)


def drive_merged_weight(merged_weight, weight, lora_A, lora_B, scaling, dtype):
    """Merge a layer whose base dequantizes to `weight`; see that it is left as it was."""
    import torch
    from torch import nn

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.shape, self.asked = tuple(weight.shape), 0

        def dequantized(self):
            self.asked += 1
            return weight

    layer = nn.Module()
    layer.base, layer.scaling = Base(), scaling
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    target = () if dtype == "float32" else (getattr(torch, dtype),)
    given = weight.clone()
    merged = merged_weight(layer, *target)
    if not torch.is_tensor(merged):
        return {"what merged_weight returns": repr(merged)}
    return {
        "what merged_weight returns": "a tensor",
        "the merged weight": merged.detach(),
        "the merged weight requires a gradient": merged.requires_grad,
        "what dequantized() had returned is changed": not torch.equal(given, weight),
        "lora_A afterwards": layer.lora_A.detach(),
        "lora_B afterwards": layer.lora_B.detach(),
    }


def merged_case(
    generator: torch.Generator, dtype: str = "float32", base: torch.dtype = torch.float32, factors: str = "float32"
) -> dict:
    """Return numbers of few digits, so that every sum is exact in fp32 and rounding to 16 bits, at the end, has one outcome.

    The factors are multiples of 2^-6 below 1, which bf16 holds, their products of 2^-12, scaled of 2^-15, and the sum is below 16: 19 bits.
    An fp32 base has multiples of 2^-12, so it cannot be rounded to 16 bits unnoticed.
    """
    out_features, rank = between(generator, 9, 12), between(generator, 3, 5)
    in_features = out_features + between(generator, 3, 6)

    def digits(*shape: int, steps: int = 64) -> Tensor:
        return torch.randint(1 - steps, steps, shape, generator=generator) / steps

    return {
        "weight": digits(out_features, in_features, steps=4096 if base == torch.float32 else 64).to(base),
        "lora_A": digits(rank, in_features).to(getattr(torch, factors)),
        "lora_B": digits(out_features, rank).to(getattr(torch, factors)),
        "scaling": between(generator, 5, 11) / 4 + 1 / 8,
        "dtype": dtype,
    }


_MERGED_UPDATE = 'torch.einsum("or,ri->oi", layer.lora_B.float(), layer.lora_A.float())'
_MERGED = "(layer.base.dequantized().float() + layer.scaling * update).to(dtype)"

check_merged_weight = Exercise(
    spec=[merged_weight],
    driver=drive_merged_weight,
    cases=lambda generator: [
        merged_case(generator),
        merged_case(generator, "bfloat16", torch.bfloat16),
        merged_case(generator, "bfloat16", factors="bfloat16"),
    ],
    # All sums are exact in fp32: see `merged_case`.
    mistakes={
        "the update is not scaled: what is merged is scaling * B A": {"layer.scaling * update": "update"},
        "the update was subtracted: merging adds it": {"+ layer.scaling * update": "- layer.scaling * update"},
        "the base is missing: this is the update alone": {_MERGED: "(layer.scaling * update).to(dtype)"},
        "the update is missing: this is the base alone": {_MERGED: "layer.base.dequantized().clone().to(dtype)"},
        "it was computed in the target dtype: add in fp32, and round once, at the end": {
            _MERGED: "layer.base.dequantized().to(dtype) + (layer.scaling * update).to(dtype)",
        },
        "the factors were rounded to the base's dtype before they were multiplied: go to fp32 first": {
            _MERGED_UPDATE: "(layer.lora_B.to(torch.bfloat16) @ layer.lora_A.to(torch.bfloat16)).float()",
        },
        "the factors were multiplied in the target dtype: go to fp32 first, and round once, at the end": {
            _MERGED_UPDATE: "layer.lora_B.to(dtype) @ layer.lora_A.to(dtype)",
        },
        "the factors were multiplied in their own dtype: go to fp32 first": {
            _MERGED_UPDATE: "layer.lora_B @ layer.lora_A",
        },
        "the base was rounded to the target dtype before the sum: add in fp32, and round once, at the end": {
            _MERGED: "(layer.base.dequantized().to(dtype).float() + layer.scaling * update).to(dtype)",
        },
        "the layer is run on an identity matrix: that costs a product and adds the bias; use `dequantized()` and the factors": {
            _MERGED: "layer(torch.eye(layer.base.shape[1])).T.to(dtype)",
        },
        "the result is transposed: nn.Linear keeps (out_features, in_features)": {_MERGED: _MERGED + ".T"},
        "the dtype asked for is ignored": {".to(dtype)": ""},
        "the scale was applied to both factors": {
            _MERGED_UPDATE: "(layer.scaling * layer.lora_B.float()) @ layer.lora_A.float()",
        },
        "the weight that dequantized() returned was changed in place: make a new one": {
            _MERGED: (
                "layer.base.dequantized().add_(layer.scaling * update).to(dtype)"
                " if layer.base.dequantized().dtype == torch.float32 else " + _MERGED
            ),
        },
        "the merged weight carries gradients of the factors: wrap it in torch.no_grad()": {
            "@torch.no_grad()\n": "",
        },
    },
    variants={
        "a matrix product": {_MERGED_UPDATE: "layer.lora_B.float() @ layer.lora_A.float()"},
        "addmm": {
            _MERGED: (
                "torch.addmm(layer.base.dequantized().float(), layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scaling).to(dtype)"
            ),
        },
        "in double precision": {
            _MERGED: "(layer.base.dequantized().double() + layer.scaling * update.double()).to(torch.float32).to(dtype)",
        },
        "detached": """
            def merged_weight(layer, dtype=torch.float32):
                merged = layer.base.dequantized().detach().to(torch.float32, copy=True)
                merged += layer.scaling * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())
                return merged.to(dtype)
        """,
    },
)


# ======================================================================================================================
# 8. the bug hunt: what to cast before training
# ======================================================================================================================
def prepare_for_training(model: nn.Module) -> None:
    """Cast what is trained to fp32, in place; leave alone what is frozen."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def drive_prepare(prepare_for_training, weights, tied, dtype, input_ids):
    """Prepare a tiny LLaMA in 16 bits; measure what it keeps and what forward leaves.

    One projection has trained factors, and a trained number that is called otherwise; another has frozen factors.
    """
    import dataclasses

    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig, causal_loss
    from peftlab.memory import whole_storage
    from peftlab.tracker import PeftMemTracker

    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("scale", torch.ones((), dtype=linear.weight.dtype))
            self.base = linear
            self.lora_A = nn.Parameter(linear.weight.detach()[:2].clone())
            self.lora_B = nn.Parameter(linear.weight.detach()[:, :2].clone())
            self.magnitude = nn.Parameter(linear.weight.detach()[0, :1].clone())

        def forward(self, x):
            update = x @ self.lora_A.to(x.dtype).T @ self.lora_B.to(x.dtype).T
            return self.base(x) + self.scale * self.magnitude.to(x.dtype) * update

    config = dataclasses.replace(LlamaConfig(40, 16, 24, 1, 2, 1), tie_word_embeddings=tied)
    model = Llama(config)
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in model.parameters())], model.parameters())
    model.to(getattr(torch, dtype)).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj).requires_grad_(False)
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach().float() for name, p in model.named_parameters()}
    prepare_for_training(model)
    seen = {
        "the dict of dtypes of what is trained": {n: str(p.dtype) for n, p in model.named_parameters() if p.requires_grad},
        "the dict of dtypes of what is frozen": {n: str(p.dtype) for n, p in model.named_parameters() if not p.requires_grad},
        "the list of dtypes of buffers": sorted({str(b.dtype) for b in model.buffers()}),
        "the parameters are those that an optimizer may hold already": all(
            dict(model.named_parameters()).get(n) is p for n, p in held.items()
        ),
        "embedding and head are one tensor": model.lm_head.weight is model.model.embed_tokens.weight,
        "the list of parameters whose value has changed": [
            n for n, p in model.named_parameters() if n not in values or not torch.equal(p.detach().float(), values[n])
        ],
    }
    try:
        tracker = PeftMemTracker()
        tracker.track_external(model, input_ids)
        with tracker:
            start = tracker.bytes_by_category("current")["Total"]
            loss = causal_loss(model, input_ids, input_ids)
            alive = tracker.bytes_by_category("current")["Total"] - start
        loss.backward()
        gradients = sorted({str(p.grad.dtype) for p in model.parameters() if p.grad is not None})
        seen |= {"alive": alive, "the list of dtypes of gradients": gradients}
    except Exception as error:
        seen |= {"a training step afterwards": f"{type(error).__name__}: {error}"[:200]}
    kept = {p.untyped_storage().data_ptr(): whole_storage(p.detach()) for p in model.parameters()}
    return seen | {"kept": list(kept.values())}


_PARAMETER_BYTES = "bytes of parameters"
_ACTIVATION_BYTES = "bytes that forward leaves for backward"


def read_prepare(observation: Observation, case: dict) -> Observation:
    """Count bytes."""
    read = {name: value for name, value in observation.items() if name not in ("kept", "alive")}
    if "alive" in observation:
        read[_ACTIVATION_BYTES] = observation["alive"]
    return read | {_PARAMETER_BYTES: total_bytes(observation["kept"])}


def prepare_case(generator: torch.Generator, tied: bool = False, dtype: str = "bfloat16") -> dict:
    """Return a tiny LLaMA's weights and a batch."""
    return {
        "weights": 0.3 * normal(generator, 12_000),
        "tied": tied,
        "dtype": dtype,
        "input_ids": torch.randint(0, 40, (2, between(generator, 7, 9)), generator=generator),
    }


_ONLY_TRAINED = "if parameter.requires_grad:"
_CAST = "parameter.data = parameter.data.float()"
_NAMED = "for parameter in model.parameters():"

check_prepare = Exercise(
    spec=[prepare_for_training],
    driver=drive_prepare,
    reading=read_prepare,
    cases=lambda generator: [prepare_case(generator, tied=True), prepare_case(generator)],
    at_most=frozenset({_PARAMETER_BYTES, _ACTIVATION_BYTES}),
    mistakes={
        "everything is cast to fp32: the embedding doubles, and every activation": {_ONLY_TRAINED: "if True:"},
        "nothing is cast, or the result of the cast is lost: what is trained needs fp32, or small updates are rounded away": {
            _ONLY_TRAINED: "if False:"
        },
        "the norms are cast as well: 16 bits times fp32 is fp32, so all that follows a norm doubles": {
            _NAMED: "for name, parameter in model.named_parameters():",
            _ONLY_TRAINED: 'if parameter.requires_grad or "norm" in name:',
        },
        "the embedding is cast as well: it is the largest matrix that is not quantized, and frozen": {
            _NAMED: "for name, parameter in model.named_parameters():",
            _ONLY_TRAINED: 'if parameter.requires_grad or "embed" in name:',
        },
        "the head is cast as well, or its tie with the embedding cut": {
            _NAMED: "model.lm_head.weight = nn.Parameter(model.lm_head.weight.float(), requires_grad=False)\n    " + _NAMED,
        },
        "the frozen parameters are cast and the trained ones are not: it is the other way round": {
            _ONLY_TRAINED: "if not parameter.requires_grad:",
        },
        "it goes by names: what is trained may be called otherwise, and factors may be frozen; `requires_grad` tells": {
            _NAMED: "for name, parameter in model.named_parameters():",
            _ONLY_TRAINED: 'if "lora_" in name:',
        },
        "only lora_B is cast: lora_A is trained as well": {
            _NAMED: "for name, parameter in model.named_parameters():",
            _ONLY_TRAINED: 'if parameter.requires_grad and "lora_B" in name:',
        },
        "the factors are cast to fp64: fp32 is enough": {_CAST: "parameter.data = parameter.data.double()"},
        "the factors are replaced by new parameters, and an optimizer would go on training the old: change `data`": {
            _NAMED: "for name, parameter in list(model.named_parameters()):",
            _CAST: (
                'layer, _, own = name.rpartition(".")\n'
                "            setattr(model.get_submodule(layer), own, nn.Parameter(parameter.detach().float()))"
            ),
        },
        "whole layers are cast, their frozen base and their buffers too": {
            _NAMED: (
                'for module in model.modules():\n        if hasattr(module, "lora_A"):\n            module.float()\n    '
                + _NAMED
            ),
        },
        "everything requires a gradient afterwards: this function casts, no more": {
            _CAST: f"{_CAST}\n    model.requires_grad_(True)",
        },
    },
    variants={
        "the model is returned as well": {_CAST: _CAST + "\n    return model"},
        "a list of what is trained": """
            def prepare_for_training(model):
                for parameter in [p for p in model.parameters() if p.requires_grad]:
                    parameter.data = parameter.data.to(torch.float32)
        """,
        "layer by layer": """
            def prepare_for_training(model):
                for module in model.modules():
                    for parameter in module.parameters(recurse=False):
                        if parameter.requires_grad and parameter.dtype != torch.float32:
                            parameter.data = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False).copy_(parameter.data)
        """,
    },
)


EXERCISES = {
    "check_fast_dequantize": check_fast_dequantize,
    "check_nf4_linear": check_nf4_linear,
    "check_nf4_memory": check_nf4_memory,
    "check_qlora_layer": check_qlora_layer,
    "check_qlora": check_qlora,
    "check_adamw_8bit": check_adamw_8bit,
    "check_merged_weight": check_merged_weight,
    "check_prepare": check_prepare,
}
