"""`train_biases` and `train_norm_gains`: what learns."""

import torch
from torch import nn

from autograder.cases import between, normal
from autograder.checks.bitfit.cases import llama_sizes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import RMSNorm


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


def train_case(generator: torch.Generator, layers: int = 1) -> dict:
    """Return a tiny LLaMA's sizes and weights."""
    sizes = llama_sizes(generator, layers)
    tokens = torch.randint(0, sizes[0], (2, between(generator, 8, 11)), generator=generator)
    return {"sizes": sizes, "weights": normal(generator, 40_000) * 0.1, "input_ids": tokens}


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


_KINDS = ("gradient bytes", "optimizer state bytes", "bytes besides weights that forward saves for backward")


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


_IS_BIAS = 'parameter.requires_grad = own_name == "bias"'
_IS_GAIN = "weight.requires_grad = any(weight is gain for gain in gains)"
_EACH_WEIGHT = "for weight in model.parameters():"

check_train = Exercise(
    spec=[train_biases, train_norm_gains],
    cases=lambda generator: [train_case(generator)],
    driver=drive_train,
    reading=read_train,
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
        "a model without a single bias goes unnoticed: raise a ValueError, or a run would train nothing": {
            'if biases == 0:\n        raise ValueError("there is no bias to train")': "pass"
        },
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
        "train_norm_gains trains every module that is no nn.Linear, and so the embedding: only an RMSNorm has a gain": {
            "isinstance(module, RMSNorm)": "hasattr(module, 'weight') and not isinstance(module, nn.Linear)",
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
