"""`add_biases`: a bias of zeros for every linear layer that has none."""

import torch
from torch import nn

from autograder.cases import normal
from autograder.checks.bitfit.cases import llama_sizes
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import fill
from peftlab.llama import Llama


def add_biases(model: Llama) -> None:
    """Give every linear layer of every decoder layer a bias of zeros, unless it has one."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                zeros = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
                module.register_parameter("bias", nn.Parameter(zeros))


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


def drive_add_biases(add_biases, sizes, weights, existing, input_ids, dtype):
    """Add biases to a tiny LLaMA, one layer of which has a bias already, and to one on the device "meta"."""
    import copy

    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    model = Llama(LlamaConfig(*sizes))
    fill(model, weights)
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
    cases=lambda generator: [add_biases_case(generator)],
    driver=drive_add_biases,
    helpers=[fill],
    reading=read_add_biases,
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
