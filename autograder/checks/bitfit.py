"""Checks of unit 04_bitfit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from autograder.cases import between, normal, read_safetensors, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import Llama, LlamaAttention, RMSNorm


# ======================================================================================================================
# 1. add_biases
# ======================================================================================================================
def add_biases(model: Llama) -> None:
    """Give every linear layer of every decoder layer a bias of zeros, unless it has one."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                zeros = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
                module.register_parameter("bias", nn.Parameter(zeros))


def drive_add_biases(add_biases, sizes, weights, existing, input_ids, dtype):
    """Add biases to a tiny LLaMA, one layer of which has a bias already, and to one on the device "meta"."""
    import copy

    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    model = Llama(LlamaConfig(*sizes))
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in model.parameters())], model.parameters())
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(existing)
    model.to(getattr(torch, dtype)).requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    given = dict(model.named_parameters())
    trainable = {name: parameter.requires_grad for name, parameter in given.items()}
    before = {name: parameter.clone() for name, parameter in given.items()}
    logits = model(input_ids).detach()
    elsewhere = copy.deepcopy(model).to("meta")
    add_biases(model)
    after = dict(model.named_parameters())
    biases = {name: parameter.detach() for name, parameter in after.items() if name not in given}
    seen = {
        "parameters": sorted(after),
        "biases": biases,
        "buffers": [name for name, _ in model.named_buffers() if name.endswith("bias")],
        "storages": len({tensor.data_ptr() for tensor in biases.values()}),
        "changed": [name for name in before if name not in after or not torch.equal(before[name], after[name])],
        "same objects": all(after.get(name) is parameter for name, parameter in given.items()),
        "thawed": [name for name in given if name in after and after[name].requires_grad and not trainable[name]],
        "frozen": [name for name in given if name in after and trainable[name] and not after[name].requires_grad],
    }
    add_biases(elsewhere)
    seen["devices"] = sorted({parameter.device.type for parameter in elsewhere.parameters()})
    try:
        seen["logits"] = model(input_ids).detach() - logits
    except RuntimeError as error:
        seen["logits"] = f"RuntimeError: {error}"
    return seen


def read_add_biases(observation: Observation, case: dict) -> Observation:
    """Say of the biases whatever can be said without their random numbers, if they have any."""
    biases, changed = observation["biases"], observation["changed"]
    values = torch.cat([tensor.flatten().double() for tensor in biases.values()]) if biases else torch.zeros(0)
    different = values.unique().tolist()
    return {
        "the list of biases that are buffers": observation["buffers"],
        "the list of parameters that are no weights": [n for n in observation["parameters"] if not n.endswith(".weight")],
        "the list of shapes of the new biases": [list(biases[name].shape) for name in sorted(biases)],
        "the list of dtypes of the new biases": sorted({str(tensor.dtype) for tensor in biases.values()}),
        "the list of all numbers in the new biases": different if len(different) < 4 else "many different numbers",
        "the bias that was there before has changed": any(name.endswith("bias") for name in changed),
        "the list of weights that have changed": [name for name in changed if name.endswith("weight")],
        "the number of tensors that hold the new biases": observation["storages"],
        "the parameters that were there before are the same objects still": observation["same objects"],
        "the list of parameters that were frozen and have become trainable": observation["thawed"],
        "the list of parameters that were trainable and have become frozen": observation["frozen"],
        'the list of devices of the parameters, biases too, of a model on "meta"': observation["devices"],
        "the change of the logits": observation["logits"],
    }


def llama_sizes(generator: torch.Generator, layers: int = 2) -> list[int]:
    """Return sizes of a tiny LLaMA, as `LlamaConfig` takes them: queries are wider than keys and values."""
    head_dim = 2 * between(generator, 2, 3)
    return [between(generator, 30, 40), 4 * head_dim, 7 * between(generator, 5, 7), layers, 4, 2]


def add_biases_case(generator: torch.Generator, dtype: str = "bfloat16") -> dict:
    """Return a tiny LLaMA's sizes and weights, and a bias that one of its layers has already."""
    sizes = llama_sizes(generator)
    return {
        "sizes": sizes,
        "weights": normal(generator, 40_000) * 0.3,
        "existing": normal(generator, sizes[1]),
        "input_ids": torch.randint(0, sizes[0], (2, 7), generator=generator),
        "dtype": dtype,
    }


def add_biases_tolerance(case: dict) -> dict[str, float]:
    """Allow the logits one rounding of every layer: a product with a bias may run in another kernel than one without.

    Adding zero rounds nothing, so usually the change is zero. A logit is a sum of hidden_size products of a normed feature,
    at most sqrt(hidden_size) * max|gain|, and a weight; each of the 14 linear layers passes a relative error of eps on.
    """
    hidden, largest = case["sizes"][1], case["weights"].abs().max().item()
    eps = torch.finfo(getattr(torch, case["dtype"])).eps
    return {"the change of the logits": 14 * eps * hidden * hidden**0.5 * largest**2}


_WALK = "for layer in model.model.layers:\n        for module in layer.modules():"
_HAS_NONE = "isinstance(module, nn.Linear) and module.bias is None"
_ZEROS = "torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)"
_REGISTER = 'module.register_parameter("bias", nn.Parameter(zeros))'

check_add_biases = Exercise(
    spec=[add_biases],
    driver=drive_add_biases,
    reading=read_add_biases,
    cases=lambda generator: [add_biases_case(generator)],
    tolerance=add_biases_tolerance,
    mistakes={
        "the model has no biases: change it in place, a copy is lost": {
            _WALK: "import copy\n    model = copy.deepcopy(model)\n    " + _WALK,
        },
        "the biases start at random, as nn.Linear's own do: they start at zero, or the model changes": {
            _REGISTER: "module.bias = nn.Parameter(torch.randn_like(zeros) / 10)",
        },
        "the biases start at one, as a norm's gain does: a bias that does nothing is zero": {"torch.zeros(": "torch.ones("},
        "a bias that was there already was set to zero: leave it alone, it has been trained": {
            _HAS_NONE: "isinstance(module, nn.Linear)",
        },
        "the head got a bias as well: only the layers in `model.model.layers` get one": {
            _WALK: "for layer in [model]:\n        for module in layer.modules():",
        },
        "the layers of the MLP got none: every nn.Linear of a decoder layer gets one": {
            "layer.modules()": "layer.self_attn.modules()",
        },
        "the layers of attention got none: every nn.Linear of a decoder layer gets one": {
            "layer.modules()": "layer.mlp.modules()",
        },
        "only one of the decoder layers got its biases: go through all of them": {
            "in model.model.layers:": "in model.model.layers[:1]:",
        },
        "the norms got a bias too: only an nn.Linear gets one": {
            _HAS_NONE: "hasattr(module, 'weight') and getattr(module, 'bias', None) is None",
            "torch.zeros(module.out_features": "torch.zeros(module.weight.shape[0]",
        },
        "a bias has as many numbers as the layer has inputs: it has one for every output": {
            "torch.zeros(module.out_features": "torch.zeros(module.in_features",
        },
        "a bias is a single number for the whole layer: it has one for every output": {
            "torch.zeros(module.out_features": "torch.zeros(1",
        },
        "a bias is in fp32 whatever its layer's weight is in: create it with `dtype=module.weight.dtype`": {
            "dtype=module.weight.dtype, ": "",
        },
        "a bias is not on its layer's device: create it with `device=module.weight.device`": {
            ", device=module.weight.device": ', device="cpu"',
        },
        "the biases are buffers, not parameters: no optimizer would find them": {
            _REGISTER: 'del module.bias\n                module.register_buffer("bias", zeros)',
        },
        "layers of one width share one bias: create a new tensor for each layer": {
            "for layer in model.model.layers:": "shared = {}\n    for layer in model.model.layers:",
            "nn.Parameter(zeros)": "shared.setdefault(module.out_features, nn.Parameter(zeros))",
        },
        "the layers were replaced by new ones, whose weights are random: give the old layer a bias": {
            "for module in layer.modules():": "for name, module in list(layer.named_modules()):",
            _REGISTER: (
                "new = nn.Linear(module.in_features, module.out_features).to(zeros)\n"
                "                nn.init.zeros_(new.bias)\n"
                "                layer.set_submodule(name, new)"
            ),
        },
        "the weights have become trainable: add_biases adds biases, and decides nothing else": {
            _REGISTER: _REGISTER + "\n                module.weight.requires_grad_(True)",
        },
        "the weights have been frozen: add_biases adds biases, and decides nothing else": {
            _REGISTER: _REGISTER + "\n                module.weight.requires_grad_(False)",
        },
        "the weights were copied into new parameters: give the old layer a bias, and leave its weight where it is": {
            _REGISTER: "module.bias = nn.Parameter(zeros)\n"
            "                module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)",
        },
    },
    variants={
        "new_zeros": {
            _WALK: "for _ in [0]:\n        for module in model.model.layers.modules():",
            _ZEROS: "module.weight.new_zeros(module.out_features)",
            _REGISTER: "module.bias = nn.Parameter(zeros)",
        },
        "zeros like a column": {_ZEROS: "torch.zeros_like(module.weight[:, 0])"},
        "by the seven names": """
            def add_biases(model):
                names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
                for layer in model.model.layers:
                    for name in names:
                        linear = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
                        if linear.bias is None:
                            zeros = torch.zeros(len(linear.weight)).to(linear.weight)
                            linear.bias = nn.Parameter(zeros, requires_grad=False)
        """,
        "a new layer around the old weight": """
            def add_biases(model):
                for name, module in list(model.model.layers.named_modules()):
                    if type(module) == nn.Linear and module.bias is None:
                        new = nn.Linear(module.in_features, module.out_features, device="meta")
                        new.weight = module.weight
                        new.bias = nn.Parameter(torch.zeros_like(module.weight.sum(1)))
                        model.model.layers.set_submodule(name, new)
        """,
    },
)


# ======================================================================================================================
# 2. train_biases and train_norm_gains
# ======================================================================================================================
def train_biases(model: nn.Module) -> None:
    """Train the parameters whose own name is `bias`, and no others."""
    biases = 0
    for name, parameter in model.named_parameters():
        own_name = name.split(".")[-1]
        parameter.requires_grad = own_name == "bias"
        biases += own_name == "bias"
    if biases == 0:
        raise ValueError("there is no bias to train")


def train_norm_gains(model: nn.Module) -> None:
    """Train the gains of the RMSNorms, and nothing else."""
    gains = [module.weight for module in model.modules() if isinstance(module, RMSNorm)]
    for weight in model.parameters():
        weight.requires_grad = any(weight is gain for gain in gains)


def drive_train(train_biases, train_norm_gains, sizes, weights, input_ids):
    """Prepare a biased LLaMA with misleading names for either method in turn, and take a training step each time."""
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig, causal_loss
    from peftlab.memory import tensors_of_step

    model = Llama(LlamaConfig(*sizes))
    for layer in model.model.layers:
        for module in list(layer.modules()):
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        layer.self_attn.bias_gate = nn.Parameter(torch.zeros(3))
        layer.self_attn.score_bias = nn.Parameter(torch.zeros(5))
        layer.mlp.bias_tower = nn.Linear(3, 5, bias=False)
        layer.mlp.norm_proj = nn.Linear(5, 3, bias=False)
        layer.mlp.gate_norm = nn.Linear(3, 5, bias=False)
        layer.mlp.short_conv = nn.Conv1d(3, 5, 2)  # has a bias, and is no nn.Linear
    count = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(weights[:count], model.parameters())
    model.model.layers[0].self_attn.requires_grad_(False)  # whatever somebody did with the model before

    seen = {}
    for method, function in (("biases", train_biases), ("gains", train_norm_gains), ("biases again", train_biases)):
        model.zero_grad()
        function(model)
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen[method] = sorted(chosen)
        if chosen and method != "biases again":
            optimizer = torch.optim.AdamW(chosen.values(), lr=0.0)
            step = tensors_of_step(lambda: causal_loss(model, input_ids, input_ids), model.parameters(), optimizer)
            seen[method + ", bytes"] = [sum(tensor.nbytes for tensor in step[kind]) for kind in step]
            seen[method + ", gradients"] = sorted(name for name, p in model.named_parameters() if p.grad is not None)
    layer = nn.Linear(3, 4).requires_grad_(False)
    try:
        train_biases(layer)
        seen["bare"] = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    except Exception as error:
        seen["bare"] = type(error).__name__
    try:
        train_biases(nn.Linear(3, 4, bias=False))
        seen["refused"] = "nothing"
    except Exception as error:
        seen["refused"] = type(error).__name__
    return seen


def read_train(observation: Observation, case: dict) -> Observation:
    """Say what is trained, and what it costs, in bytes."""
    read = {}
    for method, after in (("biases", "train_biases"), ("gains", "train_norm_gains")):
        read[f"the list of trainable parameters after {after}"] = observation[method]
        read[f"the list of parameters that get a gradient after {after}"] = observation.get(method + ", gradients", [])
        for kind, size in zip(_KINDS, observation.get(method + ", bytes", [])):
            read[f"{kind} after {after}"] = size
    return read | {
        "the list of trainable parameters after train_norm_gains and train_biases": observation["biases again"],
        "the list of trainable parameters of a bare nn.Linear after train_biases": observation["bare"],
        "the error when train_biases gets a model without biases": observation["refused"],
    }


def train_case(generator: torch.Generator, layers: int = 1) -> dict:
    """Return a tiny LLaMA's sizes and weights."""
    sizes = llama_sizes(generator, layers)
    tokens = torch.randint(0, sizes[0], (2, between(generator, 8, 11)), generator=generator)
    return {"sizes": sizes, "weights": normal(generator, 40_000) * 0.1, "input_ids": tokens}


_KINDS = ("gradient bytes", "optimizer state bytes", "bytes besides weights that forward saves for backward")
_IS_BIAS = 'parameter.requires_grad = own_name == "bias"'
_NO_BIAS = 'if biases == 0:\n        raise ValueError("there is no bias to train")'
_IS_NORM = "isinstance(module, RMSNorm)"
_IS_GAIN = "weight.requires_grad = any(weight is gain for gain in gains)"
_EACH_WEIGHT = "for weight in model.parameters():"

check_train = Exercise(
    spec=[train_biases, train_norm_gains],
    driver=drive_train,
    reading=read_train,
    cases=lambda generator: [train_case(generator)],
    at_most=frozenset(f"{kind} after {after}" for kind in _KINDS for after in ("train_biases", "train_norm_gains")),
    mistakes={
        "everything is trained whose full name contains `bias`: compare the last part of the name, whole": {
            _IS_BIAS: 'parameter.requires_grad = "bias" in name',
        },
        "everything is trained whose name ends in the letters `bias`: `score_bias` is not a layer's bias": {
            _IS_BIAS: 'parameter.requires_grad = name.endswith("bias")',
        },
        "everything is trained whose own name begins with `bias`: `bias_gate` is not a layer's bias": {
            _IS_BIAS: 'parameter.requires_grad = own_name.startswith("bias")',
        },
        "the bias of the outermost module is missed: there the full name is `bias`, with no dot before it": {
            _IS_BIAS: 'parameter.requires_grad = name.endswith(".bias")',
            'biases += own_name == "bias"': 'biases += name.endswith(".bias")',
        },
        "a bias is missed whose layer is not called ..._proj: compare the last part of the name, and that alone": {
            _IS_BIAS: 'parameter.requires_grad = name.endswith("proj.bias")',
            'biases += own_name == "bias"': 'biases += name.endswith("proj.bias")',
        },
        "the biases of nn.Linear alone are trained: other layers have some too, so ask for the name, not for the type": """
            def train_biases(model):
                model.requires_grad_(False)
                linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
                if not linears:
                    raise ValueError("no bias")
                for linear in linears:
                    linear.bias.requires_grad_(True)

            def train_norm_gains(model):
                model.requires_grad_(False)
                for module in model.modules():
                    if isinstance(module, RMSNorm):
                        module.requires_grad_(True)
        """,
        "train_biases does not freeze the rest: the weights would be trained as well": {
            _IS_BIAS: 'parameter.requires_grad = parameter.requires_grad or own_name == "bias"',
        },
        "train_biases freezes the rest but does not turn the biases on: some may have been frozen before": {
            _IS_BIAS: 'parameter.requires_grad = parameter.requires_grad and own_name == "bias"',
        },
        "train_biases leaves the biases frozen: freeze the model first, then turn them on": {
            _IS_BIAS: "parameter.requires_grad = False",
        },
        "the norm gains are trained along with the biases: train_biases trains biases only": {
            _IS_BIAS: 'parameter.requires_grad = own_name == "bias" or "norm.weight" in name',
        },
        "the biases of attention alone are trained: train every bias": {
            _IS_BIAS: 'parameter.requires_grad = own_name == "bias" and "mlp" not in name',
        },
        "a model without a single bias goes unnoticed: raise a ValueError, or a run would train nothing": {_NO_BIAS: "pass"},
        "train_norm_gains trains whatever has `norm` in its name: `norm_proj` is a linear layer": {
            _EACH_WEIGHT: "for name, weight in model.named_parameters():",
            _IS_GAIN: 'weight.requires_grad = "norm" in name',
        },
        "train_norm_gains trains what is called `..._norm.weight`: `gate_norm` is a linear layer, so ask for the type": {
            _EACH_WEIGHT: "for name, weight in model.named_parameters():",
            _IS_GAIN: 'weight.requires_grad = name.endswith("norm.weight")',
        },
        "the final norm is left out: it comes after the last layer, and has a gain too": {
            "in model.modules() if isinstance": "in model.model.layers.modules() if isinstance",
        },
        "the norm before the MLP is left out: a decoder layer has two": {
            _IS_GAIN: _IS_GAIN + "\n    for layer in model.model.layers:\n"
            "        layer.post_attention_layernorm.weight.requires_grad = False",
        },
        "train_norm_gains does not freeze the rest: what was trained before is trained still": {
            _IS_GAIN: "weight.requires_grad = weight.requires_grad or any(weight is gain for gain in gains)",
        },
        "train_norm_gains trains every parameter that is called `weight`: only those of an RMSNorm": {
            _EACH_WEIGHT: "for name, weight in model.named_parameters():",
            _IS_GAIN: 'weight.requires_grad = name.endswith("weight")',
        },
        "train_norm_gains trains every parameter with one axis, and so the biases too: only those of an RMSNorm": {
            _IS_GAIN: "weight.requires_grad = weight.ndim == 1",
        },
        "`module.requires_grad = True` sets an attribute that nobody reads: it is `module.requires_grad_(True)`": {
            _EACH_WEIGHT: "for module in model.modules():\n        module.requires_grad = isinstance(module, RMSNorm)\n"
            "    for weight in model.parameters():",
            _IS_GAIN: "weight.requires_grad = False",
        },
    },
    variants={
        "frozen first": """
            def train_biases(model):
                model.requires_grad_(False)
                found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
                if not found:
                    raise ValueError("no bias")
                for p in found:
                    p.requires_grad_(True)

            def train_norm_gains(model):
                model.requires_grad_(False)
                for module in model.modules():
                    if isinstance(module, RMSNorm):
                        module.requires_grad_(True)
        """,
        "from the modules": """
            def train_biases(model):
                for p in model.parameters():
                    p.requires_grad_(False)
                biases = [m.bias for m in model.modules() if getattr(m, "bias", None) is not None]
                if len(biases) == 0:
                    raise ValueError
                for bias in biases:
                    bias.requires_grad = True

            def train_norm_gains(model):
                for p in model.parameters():
                    p.requires_grad_(False)
                for layer in model.model.layers:
                    layer.input_layernorm.requires_grad_(True)
                    layer.post_attention_layernorm.requires_grad_(True)
                model.model.norm.requires_grad_(True)
        """,
        "by names alone": {
            _IS_BIAS: 'parameter.requires_grad_(name == "bias" or name.endswith(".bias"))',
            _EACH_WEIGHT: "for name, weight in model.named_parameters():",
            _IS_GAIN: 'weight.requires_grad_(name.endswith(("model.norm.weight", "layernorm.weight")))',
        },
    },
)


# ======================================================================================================================
# 3. biased_linear and its backward: the values
# ======================================================================================================================
def biased_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the layer's output, and what the backward pass will need."""
    output = torch.einsum("...i,oi->...o", x, weight) + bias
    return output, (weight,)


def biased_linear_backward(kept: tuple[Tensor, ...], output_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the bias, from the gradient of the output."""
    (weight,) = kept
    x_gradient = torch.einsum("...o,oi->...i", output_gradient, weight)
    bias_gradient = torch.zeros_like(output_gradient[(0,) * (output_gradient.dim() - 1)])
    for row in output_gradient.reshape(-1, output_gradient.shape[-1]):
        bias_gradient += row
    return x_gradient, bias_gradient


def drive_backward(biased_linear, biased_linear_backward, x, weight, bias, output_gradient):
    """Run the layer forward and backward on the given numbers, and look whether it changed any of them."""
    import torch

    given = {"x": x.clone(), "the weight": weight.clone(), "the bias": bias.clone()}
    gradient = output_gradient.clone()
    with torch.no_grad():
        answer = biased_linear(x, weight, bias)
        if not isinstance(answer, tuple) or len(answer) != 2:
            return {"what biased_linear returns": f"not a pair but a {type(answer).__name__}"}
        output, kept = answer
        if not isinstance(kept, tuple | list) or not all(torch.is_tensor(tensor) for tensor in kept):
            return {
                "what biased_linear returns": f"a pair whose second part is no tuple of tensors but a {type(kept).__name__}"
            }
        seen = {"what biased_linear returns": "a pair", "output": output}
        gradients = biased_linear_backward(tuple(kept), gradient)
        if not isinstance(gradients, tuple | list) or len(gradients) != 2:
            described = f"{len(gradients)} things" if isinstance(gradients, tuple | list) else f"a {type(gradients).__name__}"
            return seen | {"what the backward function returns": f"not a pair but {described}"}
    seen |= {"what the backward function returns": "a pair", "x gradient": gradients[0], "bias gradient": gradients[1]}
    seen["changed"] = [
        name
        for name, before, after in (
            ("x", given["x"], x),
            ("the weight", given["the weight"], weight),
            ("the bias", given["the bias"], bias),
            ("the output's gradient", output_gradient, gradient),
        )
        if not torch.equal(before, after)
    ]
    return seen


def read_backward(observation: Observation, case: dict) -> Observation:
    """Name what came back as in a sentence."""
    names = {
        "output": "the output",
        "x gradient": "the gradient of x",
        "bias gradient": "the gradient of the bias",
        "changed": "the list of inputs that were changed in place",
    }
    return {names.get(name, name): value for name, value in observation.items()}


def numbers(generator: torch.Generator, dtype: torch.dtype, largest: int, *shape: int) -> Tensor:
    """Return normal numbers; in half precision whole ones up to `largest`, small enough that sums of their products are exact."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)
    return normal(generator, *shape, dtype=dtype)


def backward_case(generator: torch.Generator, *batch: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return random numbers for a layer; no two sizes are equal.

    In half precision they are whole numbers so small that every sum of their products is exact (at most 15 * 2 * 2 + 2 = 62 for
    the output, 12 * 4 * 2 = 96 and 21 * 4 = 84 for the gradients: bf16 has all whole numbers up to 256). Then nothing rounds, and
    no tolerance is needed, which at eps = 2^-8 would hide an error of several percent.
    """
    out_features = between(generator, 10, 12)
    in_features = out_features + between(generator, 2, 3)
    return {
        "x": numbers(generator, dtype, 2, *batch, in_features),
        "weight": numbers(generator, dtype, 2, out_features, in_features),
        "bias": numbers(generator, dtype, 2, out_features),
        "output_gradient": numbers(generator, dtype, 4, *batch, out_features),
    }


def backward_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers: nothing in half precision, where all sums are exact.

    Else a sum of n terms is off by at most n * u * (sum of |terms|), u = eps / 2 (Higham 2002, section 3.1), and two answers by
    twice that.
    """
    dtype = case["x"].dtype
    if dtype in (torch.bfloat16, torch.float16):
        return {}
    x, weight, bias, g = (case[name].double().abs() for name in ("x", "weight", "bias", "output_gradient"))
    out_features, in_features = weight.shape
    rows = g.flatten(0, -2)
    eps = torch.finfo(dtype).eps
    return {
        "the output": (in_features + 1) * eps * (x @ weight.T + bias).max().item(),
        "the gradient of x": out_features * eps * (g @ weight).max().item(),
        "the gradient of the bias": rows.shape[0] * eps * rows.sum(0).max().item(),
    }


_OUTPUT = 'torch.einsum("...i,oi->...o", x, weight) + bias'
_KEPT = "return output, (weight,)"
_TAKEN = "(weight,) = kept"
_X_GRADIENT = 'x_gradient = torch.einsum("...o,oi->...i", output_gradient, weight)'
_START = "bias_gradient = torch.zeros_like(output_gradient[(0,) * (output_gradient.dim() - 1)])"
_ADD_ROWS = "for row in output_gradient.reshape(-1, output_gradient.shape[-1]):\n        bias_gradient += row"
_GRADIENTS = "return x_gradient, bias_gradient"


def _bias_gradient(expression: str) -> dict[str, str]:
    """Return the edits that compute the bias's gradient by this expression."""
    return {_START: f"bias_gradient = {expression}", _ADD_ROWS: "pass"}


check_bias_backward = Exercise(
    spec=[biased_linear, biased_linear_backward],
    driver=drive_backward,
    reading=read_backward,
    cases=lambda generator: [
        backward_case(generator, 3, 7),
        backward_case(generator, 5),
        backward_case(generator, 2, 4, dtype=torch.bfloat16),
    ],
    tolerance=backward_tolerance,
    mistakes={
        "the bias is missing in the output": {_OUTPUT: _OUTPUT.removesuffix(" + bias")},
        "the bias is subtracted: it is added": {_OUTPUT: _OUTPUT.replace("+ bias", "- bias")},
        "the gradient of the bias is summed over the batch only: sum over every axis but the last, positions too": _bias_gradient(
            "output_gradient.sum(0)"
        ),
        "the gradient of the bias is not summed: every token's gradient reaches the same bias, so add them up": _bias_gradient(
            "output_gradient.clone()"
        ),
        "the gradient of the bias is summed over the outputs: the last axis is the one to keep": _bias_gradient(
            "output_gradient.sum(-1)"
        ),
        "the gradient of the bias is summed over everything: the last axis is the one to keep": _bias_gradient(
            "output_gradient.sum()"
        ),
        "the gradient of the bias is summed over the first two axes: `x` has just two here, and the last axis is the one to keep": (
            _bias_gradient("output_gradient.sum((0, 1))")
        ),
        "the gradient of the bias is in fp32, whatever the output's gradient is in: return it in that dtype": _bias_gradient(
            "output_gradient.float().flatten(0, -2).sum(0)"
        ),
        "the gradient of the bias is a mean over the tokens: it is their sum": {
            _GRADIENTS: "return x_gradient, bias_gradient / (output_gradient.numel() / output_gradient.shape[-1])"
        },
        "the gradient of the bias is the last token's alone: add up those of all tokens": _bias_gradient(
            "output_gradient[(-1,) * (output_gradient.dim() - 1)]"
        ),
        "the gradient of the bias is multiplied by the weight: nothing stands between the bias and the output": {
            _GRADIENTS: "return x_gradient, x_gradient.flatten(0, -2).sum(0)"
        },
        "the gradient of x is computed with the weight transposed: (..., out) times (out, in) gives (..., in)": {
            _X_GRADIENT: "x_gradient = output_gradient @ weight.T"
        },
        "the gradient of x is missing: the layers below would learn nothing": {
            _GRADIENTS: "return None, bias_gradient",
        },
        "the gradient of x is the output's gradient: it has to go through the weight": {
            _X_GRADIENT: "x_gradient = output_gradient.clone()"
        },
        "the two gradients have changed places: x's first, then the bias's": {_GRADIENTS: "return bias_gradient, x_gradient"},
        "a gradient of the weight is returned too: the weight is frozen, and that gradient would need x": {
            _GRADIENTS: "return x_gradient, torch.zeros_like(weight), bias_gradient"
        },
        "the output's gradient was changed in place: others may need it still": {
            _GRADIENTS: _GRADIENTS + " + 0 * output_gradient.zero_().sum()"
        },
        "biased_linear returns the output alone: return a pair, the output and a tuple of what to keep": {
            _KEPT: "return output"
        },
        "what is kept is a tensor: put it in a tuple, `(weight,)` with the comma": {_KEPT: "return output, weight"},
    },
    variants={
        "matrix products": {
            _OUTPUT: "x @ weight.T + bias",
            _X_GRADIENT: "x_gradient = output_gradient @ weight",
            **_bias_gradient("output_gradient.flatten(0, -2).sum(0)"),
        },
        "F.linear": {
            _OUTPUT: "nn.functional.linear(x, weight, bias)",
            _X_GRADIENT: "x_gradient = nn.functional.linear(output_gradient, weight.T)",
            **_bias_gradient("output_gradient.sum(dim=tuple(range(output_gradient.dim() - 1)))"),
        },
        "a product with ones, and a list": {
            _KEPT: "return output, [weight.T]",
            _TAKEN: "weight = kept[0].T",
            _START: "rows = output_gradient.reshape(-1, output_gradient.shape[-1])",
            _ADD_ROWS: "bias_gradient = rows.new_ones(len(rows)) @ rows",
        },
        "by autograd": """
            def biased_linear(x, weight, bias):
                return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T).view(*x.shape[:-1], -1), (weight, bias)

            def biased_linear_backward(kept, output_gradient):
                weight, bias = kept
                with torch.enable_grad():
                    x = output_gradient.new_zeros(*output_gradient.shape[:-1], weight.shape[1]).requires_grad_()
                    b = bias.detach().clone().requires_grad_()
                    return torch.autograd.grad(x @ weight.detach().T + b, (x, b), output_gradient)
        """,
    },
)


# ======================================================================================================================
# 4. biased_linear: measured memory
# ======================================================================================================================
def drive_bias_memory(biased_linear, biased_linear_backward, x, weight, bias):
    """Make a layer of the two functions, take a training step, and return what was kept and what came out."""
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    class BiasedLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            output, kept = biased_linear(x, weight, bias)
            ctx.save_for_backward(*kept)
            return output

        @staticmethod
        def backward(ctx, output_gradient):
            x_gradient, bias_gradient = biased_linear_backward(ctx.saved_tensors, output_gradient)
            return x_gradient, None, bias_gradient

    x.requires_grad_(True)  # its gradient is wanted by the layers below
    parameters = [nn.Parameter(weight, requires_grad=False), nn.Parameter(bias)]
    optimizer = torch.optim.AdamW(parameters[1:], lr=1e-3)
    step = tensors_of_step(lambda: BiasedLinear.apply(x, *parameters).sum(), parameters, optimizer)
    return step | {"x gradient": x.grad, "bias gradient": parameters[1].grad}


def read_bias_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes besides the layer's own weight and bias that forward keeps for backward": total_bytes(observation["saved"]),
        "the gradient of x": observation["x gradient"],
        "the gradient of the bias": observation["bias gradient"],
    }


def bias_memory_case(generator: torch.Generator, *batch: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return a layer and an input large enough that no two things that might be kept have the same size.

    In half precision the weights are whole numbers up to 2, so that the sum of a column, at most 60 * 2 = 120, is exact.
    """
    out_features = between(generator, 40, 60)
    in_features = out_features + between(generator, 11, 30)
    return {
        "x": numbers(generator, dtype, 2, *batch, in_features),
        "weight": numbers(generator, dtype, 2, out_features, in_features),
        "bias": numbers(generator, dtype, 2, out_features),
    }


def bias_memory_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding: the output's gradient is all ones, so that of x sums a column of the weight, the bias's counts rows.

    Counting up to 256 is exact in every dtype, and so is the other sum in half precision (see `bias_memory_case`).
    """
    if case["x"].dtype in (torch.bfloat16, torch.float16):
        return {}
    weight = case["weight"].double().abs()
    return {"the gradient of x": weight.shape[0] * torch.finfo(case["x"].dtype).eps * weight.sum(0).max().item()}


check_bias_memory = Exercise(
    spec=[biased_linear, biased_linear_backward],
    driver=drive_bias_memory,
    reading=read_bias_memory,
    cases=lambda generator: [bias_memory_case(generator, 3, between(generator, 20, 30))],
    tolerance=bias_memory_tolerance,
    at_most=frozenset(
        {
            "gradient bytes",
            "optimizer state bytes",
            "bytes besides the layer's own weight and bias that forward keeps for backward",
        }
    ),
    mistakes={
        "x is kept: it is needed for the gradient of the weight, and the weight is frozen": {
            _KEPT: "return output, (weight, x)",
            _TAKEN: "weight = kept[0]",
        },
        "a tensor as large as the output is kept (the output, the bias expanded, a one for every number): none is needed": {
            _KEPT: "return output, (weight, torch.ones_like(output))",
            _TAKEN: "weight = kept[0]\n    output_gradient = output_gradient * kept[1]",
        },
        "x and the output are both kept: neither is needed": {
            _KEPT: "return output, (weight, x, output)",
            _TAKEN: "weight = kept[0]",
        },
        "a copy of x in half precision is kept: cheaper than x, and just as needless": {
            _KEPT: "return output, (weight, x.bfloat16())",
            _TAKEN: "weight = kept[0]",
        },
        "a copy of the weight is kept, transposed or not: keep the weight itself, which is in memory anyway": {
            _KEPT: "return output, (weight.T.contiguous(),)",
            _TAKEN: "weight = kept[0].T",
        },
        "the weight is kept in fp64: keep it as it is": {
            _KEPT: "return output, (weight.double(),)",
            _TAKEN: "weight = kept[0].to(output_gradient.dtype)",
        },
        "an identity matrix is kept, the derivative by the bias: multiplying by it changes nothing": {
            _KEPT: "return output, (weight, torch.eye(len(bias)).to(x))",
            _TAKEN: "weight = kept[0]\n    output_gradient = output_gradient @ kept[1]",
        },
        "the bias was made a column of the weight, and that larger weight is kept": {
            _KEPT: "return output, (torch.cat([weight, bias[:, None]], dim=1),)",
            _TAKEN: "weight = kept[0][:, :-1]",
        },
        "the input with a column of ones is kept: so one would train a bias as a part of the weight": {
            _KEPT: "return output, (weight, torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))",
            _TAKEN: "weight = kept[0]",
        },
        "where x is positive is kept, as a relu would: a linear layer does not need to know": {
            _KEPT: "return output, (weight, x > 0)",
            _TAKEN: "weight = kept[0]",
        },
    },
    variants={
        "matrix products": {
            _OUTPUT: "x @ weight.T + bias",
            _X_GRADIENT: "x_gradient = output_gradient @ weight",
            **_bias_gradient("output_gradient.flatten(0, -2).sum(0)"),
        },
        "a view of the weight, and the bias": {
            _KEPT: "return output, (weight.T, bias)",
            _TAKEN: "weight = kept[0].T",
        },
        "F.linear, and the bias expanded": {
            _OUTPUT: "nn.functional.linear(x, weight, bias)",
            _KEPT: "return output, (weight, bias.expand_as(output))",
            _TAKEN: "weight = kept[0]",
        },
    },
)


# ======================================================================================================================
# 5. bias files
# ======================================================================================================================
def save_biases(model: nn.Module, path: str | Path) -> None:
    """Write every bias, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"}
    save_file(tensors, path)


@torch.no_grad()
def load_biases(model: nn.Module, path: str | Path) -> None:
    """Copy the biases from the file into the model's own, in place; names and shapes in both must be the same."""
    from safetensors.torch import load_file

    saved = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}
    if set(saved) != set(own):
        raise ValueError(f"the file does not fit: {sorted(set(saved) ^ set(own))}")
    for name in own:
        if saved[name].shape != own[name].shape:
            raise ValueError(f"{name} has another shape in the file")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def drive_bias_files(save_biases, load_biases, weights, other_weights, in_features, out_features):
    """Save one model's biases, load them into others, one in fp64, and try four models that the file does not fit."""
    import os
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up = nn.Linear(in_features, width)
            self.plain = nn.Linear(width, in_features, bias=False)
            self.norm = nn.LayerNorm(width)
            self.bias_gate = nn.Parameter(torch.empty(2))
            self.score_bias = nn.Parameter(torch.empty(3))

    def model(values, layers=2, width=out_features):
        built = nn.ModuleDict({"blocks": nn.ModuleList(Block(width) for _ in range(layers)), "head": nn.Linear(width, 3)})
        nn.utils.vector_to_parameters(values[: sum(p.numel() for p in built.parameters())].clone(), built.parameters())
        return built

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    source, target, double = model(weights), model(other_weights), model(other_weights).double()
    source["blocks"][1].up.bias.requires_grad_(False)
    held_by_an_optimizer = dict(target.named_parameters())
    memory = {name: parameter.data_ptr() for name, parameter in held_by_an_optimizer.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "biases.safetensors")
        save_biases(source, path)
        if not os.path.isfile(path):
            return {"file": None}
        with open(path, "rb") as file:
            content = torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8).clone()
        try:
            load_biases(target, path)
            load_biases(double, path)
            loading = "nothing"
        except Exception as error:
            loading = f"{type(error).__name__}: {error}"
        refused, untouched = [], []
        misfits = [model(other_weights, layers=1), model(other_weights, layers=3), model(other_weights, width=out_features + 1)]
        misfits.append(model(other_weights))
        misfits[-1]["head"].bias = nn.Parameter(misfits[-1]["head"].bias.detach()[None])
        for misfit in misfits:
            before = {name: tensor.clone() for name, tensor in misfit.state_dict().items()}
            try:
                load_biases(misfit, path)
                refused.append("nothing")
            except Exception as error:
                refused.append(type(error).__name__)
            untouched.append(all(torch.equal(before[name], tensor) for name, tensor in misfit.state_dict().items()))
    return {
        "file": content,
        "loading": loading,
        "untouched": untouched,
        "loaded": {name: tensor.detach() for name, tensor in target.state_dict().items()},
        "double": {name: tensor.detach() for name, tensor in double.state_dict().items() if name.endswith(".bias")},
        "moved": [name for name, p in target.named_parameters() if p.data_ptr() != memory.get(name)],
        "held": torch.cat([tensor.detach().flatten() for tensor in held_by_an_optimizer.values()]),
        "trainable": sorted(name for name, p in target.named_parameters() if p.requires_grad),
        "refused": refused,
    }


def read_bias_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help."""
    if observation["file"] is None:
        return {"what save_biases writes": "nothing"}
    names, tensors, size = read_safetensors(observation["file"])
    described = (
        "with a layer too many",
        "with a layer too few",
        "with layers of another width",
        "with a bias of shape (n,) for one of shape (1, n)",
    )
    return {
        "what save_biases writes": "a file",
        "the list of names in the file": names,
        "bytes of the file": size,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "the error when loading what was saved": observation["loading"],
        **{f"{name} after loading": tensor for name, tensor in observation["loaded"].items()},
        "the list of parameters whose memory is another after loading": observation["moved"],
        "the joined vector of the parameters that an optimizer already held": observation["held"],
        **{f"{name} after loading into a model in fp64": tensor for name, tensor in observation["double"].items()},
        "the list of trainable parameters after loading": observation["trainable"],
        **{f"the error for a file {kind}": error for kind, error in zip(described, observation["refused"])},
        **{f"the model is left alone by a file {kind}": alone for kind, alone in zip(described, observation["untouched"])},
    }


def bias_file_case(generator: torch.Generator, larger: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Return the flat weights of models with up to three blocks and a head; the saved one's are of `dtype`."""
    in_features, out_features = between(generator, 9, 12) + larger, between(generator, 5, 8) + larger
    width = out_features + 1
    size = 3 * (2 * in_features * width + 3 * width + 5) + 3 * width + 3
    sizes = {"in_features": in_features, "out_features": out_features}
    return {"weights": normal(generator, size).to(dtype), "other_weights": normal(generator, size), **sizes}


_SAVED = 'for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"}'
_OWN = 'for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}'
_REFUSE_NAMES = (
    'if set(saved) != set(own):\n        raise ValueError(f"the file does not fit: {sorted(set(saved) ^ set(own))}")'
)
_REFUSE_SHAPES = (
    "for name in own:\n        if saved[name].shape != own[name].shape:\n"
    '            raise ValueError(f"{name} has another shape in the file")'
)
_COPY = "for name, tensor in own.items():\n        tensor.copy_(saved[name])"

check_bias_files = Exercise(
    spec=[save_biases, load_biases],
    driver=drive_bias_files,
    reading=read_bias_files,
    cases=lambda generator: [bias_file_case(generator)],
    # Metadata may take some room in the header; weights may not.
    tolerance=lambda case: {"bytes of the file": 1024},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "save_biases wrote no file: write it to `path`": {"save_file(tensors, path)": "pass"},
        "loading replaced the parameters by new ones, and an optimizer would go on training the old: copy into them": {
            "tensor.copy_(saved[name])": (
                'layer, _, last = name.rpartition(".")\n'
                "        setattr(model.get_submodule(layer), last, nn.Parameter(saved[name].to(tensor.dtype)))"
            ),
        },
        "the biases changed their dtype on loading: copy the numbers into the model's own tensors": {
            "tensor.copy_(saved[name])": "model.get_parameter(name).data = saved[name]",
        },
        "`parameter.data = tensor` puts other memory in place of the parameter's own: copy the numbers into that": {
            "tensor.copy_(saved[name])": "model.get_parameter(name).data = saved[name].to(tensor.dtype)",
        },
        "a bias with as many numbers in another shape is taken: compare the shapes, not `numel()`": {
            "saved[name].shape != own[name].shape": "saved[name].numel() != own[name].numel()",
        },
        "the file holds `score_bias` too: compare the last part of the name, whole, not the last letters": {
            _SAVED: 'for name, parameter in model.named_parameters() if name.endswith("bias")}',
            _OWN: 'for name, tensor in model.state_dict().items() if name.endswith("bias")}',
        },
        "a frozen bias is missing in the file: every bias of the model is saved, whatever is trained": {
            _SAVED: _SAVED.replace("if name", "if parameter.requires_grad and name"),
        },
        "only the biases of nn.Linear are saved: other layers have some too, so ask for the name, not for the type": {
            _SAVED: _SAVED.replace(
                "if name", 'if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name'
            ),
            _OWN: _OWN.replace("if name", 'if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name'),
        },
        "a file that lacks biases of the model is loaded without a word: the names must be exactly the model's": {
            "if set(saved) != set(own):": "if set(saved) - set(own):",
            _REFUSE_SHAPES: "own = {name: own[name] for name in saved}\n    " + _REFUSE_SHAPES,
        },
        "a file with biases that the model lacks is loaded without a word: the names must be exactly the model's": {
            "if set(saved) != set(own):": "if set(own) - set(saved):",
        },
        "a file that does not fit the model is loaded without a word: raise a ValueError": {
            _REFUSE_NAMES: "own = {name: own[name] for name in own if name in saved and saved[name].shape == own[name].shape}",
            _REFUSE_SHAPES: "pass",
        },
        "a file whose biases have another shape fails half-way: compare the shapes too, before the first copy": {
            _REFUSE_SHAPES: "pass",
        },
        "a refused file has changed a part of the model already: compare names and shapes before the first copy": {
            _REFUSE_NAMES: "pass",
            _REFUSE_SHAPES: "pass",
            _COPY: (
                "for name, tensor in own.items():\n"
                "        if name not in saved or saved[name].shape != tensor.shape: raise ValueError(name)\n"
                "        tensor.copy_(saved[name])\n"
                "    if saved.keys() != own.keys():\n        raise ValueError('too late')"
            ),
        },
        "nothing was loaded: changing clones does not change the model": {
            "own = {name: tensor for": "own = {name: tensor.clone() for"
        },
        "the loaded biases were added to those that were there: copy them": {"tensor.copy_(": "tensor.add_("},
        "the biases are frozen after loading: training could not go on": {
            _COPY: _COPY + "\n    for name in own:\n        model.get_parameter(name).requires_grad_(False)",
        },
        "the file holds the whole model: the biases are all that was learned": {
            _SAVED: "for name, parameter in model.named_parameters()}",
            _OWN: "for name, tensor in model.state_dict().items()}",
        },
        "the file holds `bias_gate` too: take the parameters whose own name is `bias`, whole": {
            _SAVED: 'for name, parameter in model.named_parameters() if "bias" in name}',
            _OWN: 'for name, tensor in model.state_dict().items() if "bias" in name}',
        },
        "the head's bias is missing in the file: every bias of the model is saved": {
            _SAVED: _SAVED.replace("if name", 'if name.startswith("blocks") and name'),
            _OWN: _OWN.replace("if name", 'if name.startswith("blocks") and name'),
        },
        "the file holds no tensor at all: no name matched": {
            _SAVED: 'for name, parameter in model.named_parameters() if name == "bias"}',
            _REFUSE_NAMES: "own = {name: own[name] for name in saved}",
        },
        "layers overwrite each other in the file: keep the full name, not its last parts": {
            "{name: parameter.detach() for": '{".".join(name.split(".")[-2:]): parameter.detach() for',
            _REFUSE_NAMES: "pass",
            _REFUSE_SHAPES: "saved = {name: saved['.'.join(name.split('.')[-2:])] for name in own}",
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "the biases are rounded to bf16 in the file: save them as they are": {
            "parameter.detach() for": "parameter.detach().bfloat16() for",
        },
    },
    variants={
        "from the state dict": {
            "parameter.detach() for": "parameter for",
            _SAVED: 'for name, parameter in model.state_dict().items() if name.endswith(".bias")}',
        },
        "load_state_dict": {
            _COPY: "missing, unexpected = model.load_state_dict(saved, strict=False)\n    assert not unexpected"
        },
        "with open, and bytes": """
            def biases_of(model):
                modules = model.named_modules()
                return {name + ".bias": m.bias for name, m in modules if getattr(m, "bias", None) is not None}

            def save_biases(model, path):
                from safetensors.torch import save
                with open(path, "wb") as file:
                    file.write(save({name: bias.data.clone() for name, bias in biases_of(model).items()}))

            def load_biases(model, path):
                from safetensors import safe_open
                own = biases_of(model)
                with safe_open(path, "pt") as file:
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                    if shapes != {name: tuple(bias.shape) for name, bias in own.items()}:
                        raise ValueError("another model's")
                    for name, bias in own.items():
                        bias.data[:] = file.get_tensor(name)
        """,
    },
)


# ======================================================================================================================
# 6. bug hunt: folding the value bias
# ======================================================================================================================
@torch.no_grad()
def fold_value_bias(attention: LlamaAttention) -> None:
    """Add what the values' bias gives at the output to the output's bias, head by head, and set the values' bias to zero."""
    head_dim = attention.head_dim
    heads = attention.q_proj.out_features // head_dim
    group = attention.q_proj.out_features // attention.v_proj.out_features
    for head in range(heads):
        shared = head // group
        features = slice(head * head_dim, (head + 1) * head_dim)
        from_values = attention.v_proj.bias[shared * head_dim : (shared + 1) * head_dim]
        attention.o_proj.bias += attention.o_proj.weight[:, features] @ from_values
    attention.v_proj.bias.zero_()


def drive_fold(fold_value_bias, sizes, weights, x, dtype):
    """Fold the value bias of an attention with biases; return its output and its parameters, before and after."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaAttention, LlamaConfig, rotary_angles

    attention = LlamaAttention(LlamaConfig(*sizes))
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in attention.parameters())], attention.parameters())
    attention.to(getattr(torch, dtype)).requires_grad_(False)
    attention.o_proj.bias.requires_grad_(True)
    x = x.to(getattr(torch, dtype))
    cos, sin = (angles.to(x.dtype) for angles in rotary_angles(torch.arange(x.shape[1]), attention.head_dim, 1e4))
    held = dict(attention.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    output_before = attention(x, cos, sin, None).detach()
    fold_value_bias(attention)
    now = dict(attention.named_parameters())
    after = {name: parameter.detach().clone() for name, parameter in now.items()}
    once = attention(x, cos, sin, None).detach()
    fold_value_bias(attention)  # there is nothing left to fold
    return {
        "before": output_before,
        "output": once,
        "parameters": sorted(after),
        "v": after.get("v_proj.bias"),
        "o": after.get("o_proj.bias"),
        "others": [n for n in before if n not in ("v_proj.bias", "o_proj.bias") and not torch.equal(before[n], after[n])],
        "same objects": all(now.get(name) is parameter for name, parameter in held.items()),
        "trainable": sorted(name for name, p in attention.named_parameters() if p.requires_grad),
        "again": attention.o_proj.bias.detach().clone(),
    }


def read_fold(observation: Observation, case: dict) -> Observation:
    """Name what came back as in a sentence, and leave out what only the driver needs."""
    return {
        "the list of parameters": observation["parameters"],
        "o_proj.bias after folding": observation["o"],
        "v_proj.bias after folding": observation["v"],
        "the output after folding": observation["output"],
        "the list of other parameters that have changed": observation["others"],
        "the parameters are the same objects still": observation["same objects"],
        "the list of trainable parameters": observation["trainable"],
        "o_proj.bias after folding twice": observation["again"],
    }


def fold_case(generator: torch.Generator, heads: int, kv_heads: int, head_dim: int = 4, dtype: str = "float32") -> dict:
    """Return weights and an input for an attention with this many heads.

    In half precision the weights are whole numbers between -2 and 2, so that the new bias, at most 2 + 24 * 2 * 2 = 98, is exact in
    any order of summation: bf16 has all whole numbers up to 256.
    """
    hidden = heads * head_dim
    count = 2 * hidden * hidden + 2 * hidden + 2 * kv_heads * head_dim * (hidden + 1)
    whole = torch.randint(-2, 3, (count,), generator=generator).float()
    return {
        "sizes": [30, hidden, 20, 1, heads, kv_heads],
        "weights": whole if dtype != "float32" else normal(generator, count),
        "x": normal(generator, 2, between(generator, 5, 7), hidden),
        "dtype": dtype,
    }


def fold_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    Each entry of the new bias sums hidden_size products and the old bias: at most (hidden_size + 2) * eps * (sum of |terms|). The
    output is computed by the same operations from then on, and takes that difference over, and a rounding of its own. In half
    precision the bias is exact (see `fold_case`).
    """
    heads, hidden = case["sizes"][4], case["sizes"][1]
    largest = case["weights"].abs().max().item()
    exact = case["dtype"] != "float32"
    bias = 0.0 if exact else (hidden + 2) * torch.finfo(torch.float32).eps * (hidden * largest**2 + largest)
    values = case["x"].abs().max().item() * hidden * largest + largest
    output = 0.0 if exact else bias + heads * torch.finfo(torch.float32).eps * hidden * values * largest
    return {"o_proj.bias after folding": bias, "o_proj.bias after folding twice": bias, "the output after folding": output}


_SHARED = "shared = head // group"
_FROM_VALUES = "from_values = attention.v_proj.bias[shared * head_dim : (shared + 1) * head_dim]"
_ADD_BIAS = "attention.o_proj.bias += attention.o_proj.weight[:, features] @ from_values"
_CLEAR = "attention.v_proj.bias.zero_()"
_EACH_HEAD = "for head in range(heads):"

check_fold_value_bias = Exercise(
    spec=[fold_value_bias],
    driver=drive_fold,
    reading=read_fold,
    cases=lambda generator: [fold_case(generator, 6, 2)],
    tolerance=fold_tolerance,
    mistakes={
        "the heads are in the wrong order: neighbouring query heads share a value head, as in a a a b b b, not a b a b a b": {
            _SHARED: "shared = head % (heads // group)",
        },
        "single features are repeated, not whole heads: a head's bias is a block of head_dim numbers": {
            _FROM_VALUES: "from_values = attention.v_proj.bias.repeat_interleave(group)[features]",
        },
        "each value head counts only once: every query head of its group passes its bias on": {
            _EACH_HEAD: "for head in range(0, heads, group):",
        },
        "the bias is averaged over the query heads of a group: the heads' contributions add up": {
            _ADD_BIAS: _ADD_BIAS.replace("+= ", "+= 1 / group * "),
        },
        "the value bias is added to the output's bias as it is: it has to go through o_proj's weight": {
            _ADD_BIAS: "attention.o_proj.bias[features] += from_values",
        },
        "the weight is transposed: nn.Linear keeps (out_features, in_features), so it is weight @ bias": {
            _ADD_BIAS: _ADD_BIAS.replace("weight[:, features]", "weight.T[:, features]"),
        },
        "the output's own bias is lost: add to it": {
            _EACH_HEAD: "attention.o_proj.bias.zero_()\n    " + _EACH_HEAD,
        },
        "the value bias is subtracted: it is moved, so the output's bias gains what the values' loses": {
            _ADD_BIAS: _ADD_BIAS.replace("+=", "-="),
        },
        "the value bias is there still, so that it counts twice: set it to zero": {_CLEAR: "pass"},
        "nothing has changed: both biases are to be changed in place": {_ADD_BIAS: "pass", _CLEAR: "pass"},
        "the value bias was set to zero before it was used: fold it first": {
            _EACH_HEAD: "attention.v_proj.bias.zero_()\n    " + _EACH_HEAD,
        },
        "the value bias is gone altogether: set its numbers to zero, the parameter stays": {
            _CLEAR: "attention.v_proj.bias = None",
        },
        "the key bias was set to zero as well: with rotary positions it does not cancel": {
            _CLEAR: _CLEAR + "\n    attention.k_proj.bias.zero_()",
        },
        "the biases are new parameters: change the old ones in place, for an optimizer may hold them": {
            _CLEAR: _CLEAR + "\n    attention.o_proj.bias = nn.Parameter(attention.o_proj.bias.clone())",
        },
        "the weight of o_proj has changed: only the two biases do": {
            _CLEAR: _CLEAR + "\n    attention.o_proj.weight += attention.o_proj.bias[:, None] / 100",
        },
        "the output's bias got the value bias through v_proj's weight: it goes through o_proj's": {
            _ADD_BIAS: "attention.o_proj.bias += from_values @ attention.v_proj.weight"
            "[shared * head_dim : (shared + 1) * head_dim]",
        },
    },
    variants={
        "repeat_interleave of whole heads": """
            @torch.no_grad()
            def fold_value_bias(attention):
                groups = attention.o_proj.in_features // attention.v_proj.out_features
                per_head = attention.v_proj.bias.view(-1, attention.head_dim)
                spread = per_head.repeat_interleave(groups, dim=0).flatten()
                attention.o_proj.bias += attention.o_proj.weight @ spread
                attention.v_proj.bias.zero_()
        """,
        "expand, and o_proj itself": """
            def fold_value_bias(attention):
                with torch.no_grad():
                    heads = attention.v_proj.bias.reshape(-1, 1, attention.head_dim)
                    spread = heads.expand(-1, attention.q_proj.out_features // attention.v_proj.out_features, -1)
                    attention.o_proj.bias.copy_(attention.o_proj(spread.reshape(-1)))
                    attention.v_proj.bias.fill_(0)
        """,
        "the weight summed over each group, through .data": """
            def fold_value_bias(attention):
                out, dim = attention.o_proj.out_features, attention.head_dim
                kv_heads = attention.v_proj.out_features // dim
                weight = attention.o_proj.weight.data.view(out, kv_heads, -1, dim).sum(2).reshape(out, -1)
                attention.o_proj.bias.data += weight @ attention.v_proj.bias.data
                attention.v_proj.bias.data = torch.zeros_like(attention.v_proj.bias.data)
        """,
        "in fp64": {
            _ADD_BIAS: (
                "folded = attention.o_proj.weight[:, features].double() @ from_values.double()\n"
                "        attention.o_proj.bias.copy_(attention.o_proj.bias.double() + folded)"
            ),
        },
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
