"""The bytes that a model with adapters takes."""

from collections.abc import Sequence

import torch

from autograder.cases import between, total_bytes
from autograder.checks.adapters.adapted import FROZEN, MOVED, NEW_ADAPTER, OUTPUT, WRAPPED, Adapted, add_adapters
from autograder.checks.adapters.add_adapters import check_add_adapters
from autograder.checks.adapters.helpers import adapter_class, tensors_kept
from autograder.checks.adapters.memory import WEIGHTS
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import seeing


def adapted_memory_case(
    generator: torch.Generator, places: Sequence[str] = ("self_attn", "mlp"), dtype: str = "float32", layers: int = 2
) -> dict:
    """Return sizes, no two of them equal."""
    return {
        "layers": layers,
        "seq": between(generator, 8, 13),
        "bottleneck": between(generator, 3, 5),
        "places": list(places),
        "dtype": dtype,
    }


def drive_adapted_memory(Adapted, add_adapters, layers, seq, bottleneck, places, dtype):
    """Put adapters into a tiny LLaMA and take a training step; return what is there after it, and what forward kept.

    The adapters are made by an `Adapter` of our own, so that this does not depend on an earlier exercise.
    """
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig
    from peftlab.memory import tensors_of_step

    Bottleneck = adapter_class()
    returned = Adapted(nn.Linear(12, 12), Bottleneck(12, bottleneck))(torch.ones(1, 2, 12))
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    model = Llama(LlamaConfig(31, 12, 20, layers, 2, 1)).to(getattr(torch, dtype))
    with seeing(add_adapters, Adapter=Bottleneck):
        add_adapters(model, bottleneck, places)
    input_ids = torch.arange(2 * seq).view(2, seq)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tensors = tensors_of_step(
        lambda: model(input_ids).float().square().mean(), model.parameters(), optimizer, not_counted=[input_ids]
    )
    return tensors | {"returned": "a tensor", "kept": tensors_kept(model)}


_MODEL_SAVED = "the bytes that forward saves for backward besides the weights"


def read_adapted_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "kept" not in observation:
        return {"what Adapted's forward returns": observation["returned"]}
    return {
        "what Adapted's forward returns": observation["returned"],
        "the bytes of gradients": total_bytes(observation["gradients"]),
        "the bytes of optimizer state": total_bytes(observation["optimizer state"]),
        WEIGHTS: total_bytes(observation["kept"]),
        _MODEL_SAVED: total_bytes(observation["saved"]),
    }


_GATE = (
    "self.adapter = adapter\n        self.gate = nn.Parameter(torch.ones_like(adapter.up.bias))",
    "output = self.sublayer(*args)\n        return self.gate * self.adapter(output)",
)

check_adapted_memory = Exercise(
    spec=[Adapted, add_adapters],
    cases=lambda generator: [adapted_memory_case(generator), adapted_memory_case(generator, ["mlp"], "bfloat16")],
    driver=drive_adapted_memory,
    helpers=[seeing, adapter_class, tensors_kept],
    reading=read_adapted_memory,
    # Gradients and optimizer state belong to the adapters, and are counted to the byte.
    tolerance=lambda case: {WEIGHTS: 64},
    at_most=frozenset({WEIGHTS, _MODEL_SAVED}),
    mistakes={
        "the base is left trainable: its gradients and its optimizer state are what adapters are there to save": {
            FROZEN: "pass"
        },
        "only the wrapped sub-layers are frozen: embedding, norms and head still have gradients": {
            FROZEN: "pass",
            "sublayer = getattr(layer, place)": "sublayer = getattr(layer, place).requires_grad_(False)",
        },
        "the head is left trainable: its gradient is as large as itself": {
            FROZEN: FROZEN.replace("model.parameters()", "model.model.parameters()")
        },
        "the adapters of a bf16 model are in fp32: use the model's dtype": {
            MOVED: ".to(weight.device)",
            OUTPUT: "output = self.sublayer(*args)\n        return self.adapter(output.float()).to(output.dtype)",
        },
        "the bottleneck is not the one asked for: the adapters are twice as large as they should be": {
            NEW_ADAPTER: "Adapter(model.config.hidden_size, 2 * bottleneck)"
        },
        "there are adapters at places that were not asked for": {
            "for place in places:\n": 'for place in ("self_attn", "mlp"):\n'
        },
        "every place has two adapters, one behind the other: one is asked for": {
            WRAPPED: (
                f"{WRAPPED}\n            another = {NEW_ADAPTER}{MOVED}\n"
                "            setattr(layer, place, Adapted(getattr(layer, place), another))"
            )
        },
        "the sub-layer runs twice in every forward pass, and keeps its activations twice: call it once": {
            OUTPUT: "return self.sublayer(*args) + (self.adapter(self.sublayer(*args)) - self.sublayer(*args))"
        },
        "there is a learned gate behind the adapter: it has gradients, and keeps the adapter's output": {
            "self.adapter = adapter": _GATE[0],
            OUTPUT: _GATE[1],
        },
        "the sub-layer's last output is kept as an attribute: it stays in memory until the next one": {
            OUTPUT: "self.output = self.sublayer(*args)\n        return self.adapter(self.output)"
        },
        "the sub-layer is there twice, once as a copy: wrap the very module that is there": {
            "self.sublayer = sublayer": "self.sublayer, self.untouched = sublayer, __import__('copy').deepcopy(sublayer)"
        },
    },
    variants={
        "over the layers themselves": check_add_adapters.variants["over the layers themselves"],
        "by name": check_add_adapters.variants["by name"],
        "frozen afterwards, the adapters thawed": check_add_adapters.variants["frozen afterwards, the adapters thawed"],
        "computed again in backward": {
            OUTPUT: (
                "output = self.sublayer(*args)\n"
                "        return torch.utils.checkpoint.checkpoint(self.adapter, output, use_reentrant=False)"
            )
        },
    },
)
