"""Bug hunt: what to cast before training."""

import torch
from torch import nn

from autograder.checking.cases import between, normal, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import constant_llama, fill


def prepare_for_training(model: nn.Module) -> None:
    """Cast what is trained to fp32, in place; leave alone what is frozen."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prepare_case(generator: torch.Generator, tied: bool = False, dtype: str = "bfloat16") -> dict:
    """Return a tiny LLaMA's weights and a batch."""
    return {
        "weights": 0.3 * normal(generator, 12_000),
        "tied": tied,
        "dtype": dtype,
        "input_ids": torch.randint(0, 40, (2, between(generator, 7, 9)), generator=generator),
    }


def drive_prepare(prepare_for_training, weights, tied, dtype, input_ids, large=False):
    """Prepare a tiny LLaMA in 16 bits; measure what it keeps and what forward leaves.

    One projection has trained factors, and a trained number that is called otherwise; another has frozen factors.
    Of a large model the dtypes are returned.
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
            update = (x @ self.lora_A.T.to(x.dtype)) @ self.lora_B.T.to(x.dtype)
            return self.base(x) + self.scale * self.magnitude.to(x.dtype) * update

    config = dataclasses.replace(LlamaConfig(40, 16, 24, 1, 2, 1), tie_word_embeddings=tied)
    model = constant_llama(8192, 1024, 4096, 2, 2, 1, dtype=getattr(torch, dtype)) if large else fill(Llama(config), weights)
    model.to(getattr(torch, dtype)).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj).requires_grad_(False)
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if large:
        prepare_for_training(model)
        causal_loss(model, input_ids, input_ids).backward()
        return {"the dict of dtypes": {name: str(p.dtype) for name, p in model.named_parameters()}}
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


_ONLY_TRAINED = "if parameter.requires_grad:"
_CAST = "parameter.data = parameter.data.float()"
_NAMED = "for parameter in model.parameters():"

check_prepare = Exercise(
    spec=[prepare_for_training],
    cases=lambda generator: [prepare_case(generator, tied=True), prepare_case(generator)],
    driver=drive_prepare,
    helpers=[fill, constant_llama],
    reading=read_prepare,
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
