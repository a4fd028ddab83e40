"""NF4Linear: what it holds, and its forward and backward pass."""

import torch

from autograder.cases import EPS
from autograder.checks.qlora.cases import nf4_case
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
from autograder.exercise import Exercise
from autograder.helpers import seeing


def drive_nf4_linear(
    NF4Product, NF4Linear, packed, absmax, nested_absmax, offset, levels, shape, compute, bias, x, output_gradient, units
):
    """Use the layer, its copy from a state dict, and the layer after it has been sent to other dtypes and devices.

    While it runs, `dequantize_nf4` is ours, whatever the student's is: that has a check of its own.
    """
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

    with seeing(NF4Linear, dequantize_nf4=dequantize_nf4):
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


_UNDONE = "values * scale + self.offset"
_LOOKED_UP = "dynamic_code(device=absmax.device)[absmax.long()]"

check_nf4_linear = Exercise(
    spec=[NF4Product, NF4Linear],
    cases=lambda generator: [
        nf4_case(generator, bias=True),
        nf4_case(generator, "bfloat16", double=False),
        nf4_case(generator, "bfloat16", double=False, bias=True),
    ],
    driver=drive_nf4_linear,
    helpers=[seeing],
    tolerance=nf4_tolerance,
    mistakes={
        "a buffer of the docstring is missing or has another name: cells further down use packed, absmax, levels and the others": {
            ABSMAX_BUFFER: 'self.register_buffer("codes", statistics[0])',
            "absmax = self.absmax": "absmax = self.codes",
        },
        "a plain attribute is no buffer: it does not move with the layer, and the state dict lacks it; use `register_buffer`": {
            ABSMAX_BUFFER: "self.absmax = statistics[0]",
        },
        "a buffer is not in the state dict: it has to be persistent": {
            'self.register_buffer("packed", packed)': 'self.register_buffer("packed", packed, persistent=False)',
        },
        "no gradient reaches the layers below: x is detached, or the product made without gradients": {
            APPLIED: "NF4Product.apply(x.detach().to(self.compute_dtype), self)",
        },
        "backward returns no gradient of x: the codes get none, but x must, or the layers below never learn": {
            PRODUCT_BACKWARD + ", None": "None, None",
        },
        "the codes are made trainable: a weight that requires a gradient came back from somewhere, and nothing in this layer learns": {
            SIZES: SIZES + "\n        self.scale = nn.Parameter(torch.ones((), device=packed.device))",
        },
        "the output is in the compute dtype: give it back in the dtype of x": {"return product.to(x.dtype)": "return product"},
        "the bias was added in its own dtype, or in that of x: cast it to the compute dtype, and add it to the product": {
            "self.bias.to(self.compute_dtype)": "self.bias",
        },
        "x and the weight were cast to the dtype of x for the product: `compute_dtype` decides, whatever x is in": {
            APPLIED: "NF4Product.apply(x, self)",
            PRODUCT_FORWARD: PRODUCT_FORWARD.replace("dequantized()", "dequantized().to(x.dtype)"),
            "weight = ctx.layer.dequantized()": "weight = ctx.layer.dequantized().to(gradient.dtype)",
        },
        "it was computed in the dtype of x: `compute_dtype` decides, whatever x is in": {
            APPLIED: "NF4Product.apply(x, self)",
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
            APPLIED: "NF4Product.apply(x, self)",
            PRODUCT_FORWARD: 'torch.einsum("...i,oi->...o", x.to(layer.compute_dtype), layer.dequantized())',
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
            "self._buffers[name] = buffer.to(self._buffers[name].device)": "pass",
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
            PRODUCT_FORWARD: "x @ layer.dequantized().T",
            PRODUCT_BACKWARD: "gradient @ weight",
        },
        "F.linear, with the bias inside": {
            PRODUCT_FORWARD: (
                "torch.nn.functional.linear(x, layer.dequantized(), None if layer.bias is None else layer.bias.to(x.dtype))"
            ),
            PRODUCT_BACKWARD: "torch.nn.functional.linear(gradient, weight.T)",
            "if self.bias is not None:": "if False:",
        },
        "buffers for what there is, the dynamic code among them": """
            class NF4Product(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x, layer):
                    ctx.layer = layer
                    return x @ layer.dequantized().T

                @staticmethod
                def backward(ctx, gradient):
                    return gradient @ ctx.layer.dequantized(), None

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
        "saved tensors that are dequantized when they are asked for": BY_HOOKS,
        "casts inside the function, a fused multiply-add": {
            APPLIED: "NF4Product.apply(x, self)",
            KEEP_LAYER: "ctx.layer, ctx.given, x = layer, x.dtype, x.to(layer.compute_dtype)",
            "weight = ctx.layer.dequantized()": (
                "weight = ctx.layer.dequantized()\n        gradient = gradient.to(weight.dtype)"
            ),
            PRODUCT_BACKWARD: PRODUCT_BACKWARD + ".to(ctx.given)",
            _UNDONE: "torch.addcmul(self.offset, values, scale)",
        },
    },
)
