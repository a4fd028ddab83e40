"""`qlora`: a model in four bits with LoRA on it."""

from collections.abc import Callable

import torch
from torch import nn

from autograder.checking.cases import between, normal
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import constant_llama, fill, seeing
from autograder.checks.qlora.qlora_layer import QLoRALinear


def qlora(
    model: nn.Module, quantize: Callable, rank: int = 8, alpha: float = 16.0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze the model; replace every linear layer of its decoder layers by LoRA on a quantized base."""
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


def drive_qlora(qlora, weights, tied, layers, rank, alpha, stored, input_ids, factors, filler_bytes=0):
    """Quantize a tiny LLaMA with a toy quantizer, and take a training step under gradient checkpointing.

    While it runs, `QLoRALinear` is ours, whatever the student's is: that has a check of its own.

    With a filler the model is large. The filler is made with the last quantized weight, so that the process is largest then, and by
    what is still there; the names of the new layers are returned.
    """
    import dataclasses
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
        quantized = Toy(linear)
        if filler_bytes and len(given) == 7 * layers:
            torch.ones(filler_bytes, dtype=torch.uint8)
        return quantized

    config = dataclasses.replace(LlamaConfig(40, 16, 24, layers, 2, 1), tie_word_embeddings=tied)
    model = constant_llama(40, 512, 1024, layers, 2, 1) if filler_bytes else fill(Llama(config), weights)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" not in name}
    dtype = getattr(torch, stored)
    with seeing(qlora, QLoRALinear=QLoRALinear):
        given_settings = () if rank is None else (rank, alpha)
        given_dtype = {} if stored == "float32" else {"dtype": dtype}
        returned = qlora(model, quantize, *given_settings, **given_dtype)
    on_base = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if filler_bytes:
        return {"the list of layers with LoRA": sorted(on_base)}
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

check_qlora = Exercise(
    spec=[qlora],
    cases=lambda generator: [qlora_case(generator), qlora_case(generator, tied=True, stored="bfloat16", by_default=True)],
    driver=drive_qlora,
    helpers=[fill, seeing, constant_llama],
    tolerance=qlora_tolerance,
    at_most=frozenset({_IN_MEMORY}),
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
