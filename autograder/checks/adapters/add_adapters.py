"""`Adapted` and `add_adapters`: where the adapters stand."""

from collections.abc import Sequence

import torch

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import fill, seeing
from autograder.checks.adapters.adapted import FROZEN, MOVED, NEW_ADAPTER, OUTPUT, Adapted, add_adapters
from autograder.checks.adapters.helpers import adapter_class


def add_case(
    generator: torch.Generator,
    places: Sequence[str] | None = None,
    layers: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Return a tiny LLaMA's weights, and weights for its adapters; the batch is padded on the left."""
    attention_mask = torch.ones(3, 5, dtype=torch.long)
    attention_mask[0, :2] = 0
    return {
        "layers": layers,
        "tied": tied,
        "weights": normal(generator, 5_000, dtype=dtype) * 0.4,
        "input_ids": torch.randint(0, 31, (3, 5), generator=generator),
        "attention_mask": attention_mask,
        "bottleneck": between(generator, 3, 4),
        "places": None if places is None else list(places),
        "trained": normal(generator, 1_500, dtype=dtype) * 0.5,
    }


def drive_add_adapters(Adapted, add_adapters, layers, tied, weights, input_ids, attention_mask, bottleneck, places, trained):
    """Put adapters into a tiny LLaMA; return its logits at the start and with other weights in the adapters, and gradients.

    The adapters are made by an `Adapter` of our own, so that this does not depend on an earlier exercise.
    """
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    Bottleneck = adapter_class()
    returned = Adapted(nn.Linear(12, 12), Bottleneck(12, bottleneck))(torch.ones(1, 2, 12))
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}

    def add(model):
        with seeing(add_adapters, Adapter=Bottleneck):
            add_adapters(model, bottleneck, *(() if places is None else (places,)))

    config = LlamaConfig(31, 12, 20, layers, 2, 1, tie_word_embeddings=tied)
    model = Llama(config).to(weights.dtype)
    fill(model, weights)
    before, held = model(input_ids, attention_mask).detach(), model.model.layers[0].self_attn.v_proj.weight
    add(model)
    adapters = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "down", None), nn.Linear)}
    seen = {
        "returned": "a tensor",
        "adapters": sorted(adapters),
        "before": before,
        "start": model(input_ids, attention_mask).detach(),
    }
    learned = [parameter for name in sorted(adapters) for parameter in adapters[name].parameters()]
    if learned:
        nn.utils.vector_to_parameters(trained[: sum(p.numel() for p in learned)].to(learned[0].dtype), learned)
    with torch.no_grad():
        held += 0.5  # someone else holds the base's weights: the adapted model still uses these very tensors
    logits = model.eval()(input_ids, attention_mask)
    if logits.requires_grad:
        logits.square().mean().backward()
    seen |= {
        "logits": logits.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "trainable": sorted(name for name, p in model.named_parameters() if p.requires_grad),
    }
    elsewhere = Llama(LlamaConfig(2, 4, 4, 1, 1, 1)).to("meta", torch.bfloat16)
    add(elsewhere)
    where = [m.down.weight for m in elsewhere.modules() if isinstance(getattr(m, "down", None), nn.Linear)]
    return seen | {"elsewhere": sorted({f"{weight.dtype} on {weight.device.type}" for weight in where})}


_ADDED_LOGITS = "the logits once the adapters have learned and the base's own v_proj has been changed"


def read_add_adapters(observation: Observation, case: dict) -> Observation:
    """Judge the start from the logits, and what learns from the gradients themselves."""
    read = {"what Adapted's forward returns": observation["returned"]}
    if "adapters" not in observation:
        return read
    gradients, trainable = observation["gradients"], set(observation["trainable"])
    learn = {
        f"{one}.{part}.{kind}" for one in observation["adapters"] for part in ("down", "up") for kind in ("weight", "bias")
    }
    read |= {
        "the list of adapters": observation["adapters"],
        "the logits at the start": observation["start"],
        "the logits are those of the base at the start, to the bit": torch.equal(observation["before"], observation["start"]),
        "the list of what wrongly gets a gradient": sorted(gradients.keys() - learn),
        "the list of what wrongly gets no gradient": sorted(learn - gradients.keys()),
        "the list of what wrongly requires a gradient": sorted(trainable - learn),
        "the list of what wrongly requires no gradient": sorted(learn - trainable),
        _ADDED_LOGITS: observation["logits"],
        "the list of dtypes and devices of the adapters of a bf16 model on the meta device": observation["elsewhere"],
    }
    adapters = [name for name in sorted(gradients) if ".adapter." in name]
    if adapters:
        read["the adapters' gradients"] = torch.cat([gradients[name].flatten() for name in adapters])
    return read


def add_tolerance(case: dict) -> dict[str, float]:
    """The adapted model does the same operations in the same order in every right answer, up to an addition or two.

    Logits here are of size 1 to 30, gradients of up to 100; a wrong order of two operations moves them in the first digits.
    """
    unit = 1e3 * torch.finfo(case["weights"].dtype).eps
    return {
        "the logits at the start": unit,
        _ADDED_LOGITS: unit,
        "the adapters' gradients": 10 * unit,
    }


_LAST_PLACE = "\n            setattr(layer, place, Adapted(sublayer, adapter))"
_OVER_LAYERS = "for number in range(len(model.model.layers)):"

check_add_adapters = Exercise(
    spec=[Adapted, add_adapters],
    cases=lambda generator: [add_case(generator), add_case(generator, places=["mlp"])],
    driver=drive_add_adapters,
    helpers=[fill, seeing, adapter_class],
    reading=read_add_adapters,
    tolerance=add_tolerance,
    mistakes={
        "the adapter stands after the residual addition, around the whole decoder layer: it belongs to the sub-layer's output": {
            "sublayer = getattr(layer, place)": "pass",
            "for place in places:\n": "for place in places[:1]:\n",
            _LAST_PLACE: "\n        model.model.layers[number] = Adapted(layer, adapter)",
        },
        "the adapter reads the sub-layer's input, beside it: it reads the sub-layer's output": {
            OUTPUT: "return self.sublayer(*args) + self.adapter(args[0]) - args[0]"
        },
        "the adapter stands before the sub-layer: it belongs behind it": {
            OUTPUT: "return self.sublayer(self.adapter(args[0]), *args[1:])"
        },
        "the sub-layer's output is added once more: the residual connection is inside the adapter already": {
            OUTPUT: "output = self.sublayer(*args)\n        return output + self.adapter(output)"
        },
        "only the first argument reaches the sub-layer: attention needs cos, sin and mask as well, `*args`": {
            OUTPUT: "return self.adapter(self.sublayer(args[0]))"
        },
        "the adapters work in training mode only: they always do": {
            OUTPUT: "output = self.sublayer(*args)\n        return self.adapter(output) if self.training else output"
        },
        "one adapter serves all layers: each place needs its own": {
            _OVER_LAYERS: f"shared = {NEW_ADAPTER}{MOVED}\n    {_OVER_LAYERS}",
            f"{NEW_ADAPTER}{MOVED}": "shared",
        },
        "the base is not frozen: adapters are all that is trained": {FROZEN: "pass"},
        "the model is frozen after the adapters were put in, so that they are frozen too: freeze it first": {
            FROZEN: "pass",
            _LAST_PLACE: f"{_LAST_PLACE}\n    model.requires_grad_(False)",
        },
        "only the wrapped sub-layers are frozen: freeze embedding, norms and head as well": {
            FROZEN: "pass",
            "sublayer = getattr(layer, place)": "sublayer = getattr(layer, place).requires_grad_(False)",
        },
        "the head is left trainable: freeze the whole model, not `model.model` alone": {
            FROZEN: FROZEN.replace("model.parameters()", "model.model.parameters()")
        },
        "the norms are left trainable: Houlsby et al. train them too, here adapters are all that learns": {
            FROZEN: FROZEN.replace("model.parameters()", "[p for n, p in model.named_parameters() if 'norm' not in n]")
        },
        "the adapters are in fp32 whatever the model is in, on the CPU wherever it is: `.to` the model's dtype and device": {
            MOVED: '.to("cpu", torch.float32)'
        },
        "the MLP's adapter has the MLP's inner width: it stands behind down_proj, where there are hidden_size features": {
            NEW_ADAPTER: ("Adapter(model.config.intermediate_size if place == 'mlp' else model.config.hidden_size, bottleneck)")
        },
        "`places` is ignored: adapters stand where it says, and nowhere else": {
            "for place in places:\n": 'for place in ("self_attn", "mlp"):\n'
        },
        "only the first layer gets adapters: every decoder layer does": {_OVER_LAYERS: "for number in range(1):"},
        "the sub-layer runs without gradients: its weights need none, but the adapters below need the one that passes through it": {
            OUTPUT: "with torch.no_grad():\n            output = self.sublayer(*args)\n        return self.adapter(output)"
        },
        "forward of Adapted returns None: its last line needs a `return`": {
            OUTPUT: "output = self.sublayer(*args)\n        self.adapter(output)"
        },
        "the sub-layer was copied: wrap the very module that is there": {
            "Adapted(sublayer, adapter)": "Adapted(__import__('copy').deepcopy(sublayer), adapter)"
        },
    },
    variants={
        "over the layers themselves": """
            class Adapted(nn.Module):
                def __init__(self, sublayer, adapter):
                    super().__init__()
                    self.adapter, self.sublayer = adapter, sublayer

                def forward(self, x, *more):
                    return self.adapter(self.sublayer(x, *more))

            def add_adapters(model, bottleneck, places=("self_attn", "mlp")):
                model.requires_grad_(False)
                like = next(model.parameters())
                for layer in model.model.layers:
                    for place in places:
                        adapter = Adapter(layer.input_layernorm.weight.numel(), bottleneck)
                        adapter.to(dtype=like.dtype, device=like.device)
                        layer._modules[place] = Adapted(layer._modules[place], adapter)
        """,
        "by name": """
            class Adapted(nn.Module):
                def __init__(self, sublayer, adapter):
                    super().__init__()
                    self.sublayer = sublayer
                    self.adapter = adapter

                def forward(self, *args, **named):
                    h = self.sublayer(*args, **named)
                    return self.adapter(h)

            def add_adapters(model, bottleneck, places=("self_attn", "mlp")):
                for parameter in model.parameters():
                    parameter.requires_grad = False
                hidden = model.config.hidden_size
                embedding = model.model.embed_tokens.weight
                for name, module in list(model.named_modules()):
                    if name.split(".")[-1] in places:
                        with torch.device(embedding.device):
                            adapter = Adapter(hidden, bottleneck).to(embedding.dtype)
                        model.set_submodule(name, Adapted(module, adapter))
        """,
        "frozen afterwards, the adapters thawed": {
            FROZEN: "pass",
            _LAST_PLACE: (
                f"{_LAST_PLACE}\n    for name, parameter in model.named_parameters():\n"
                '        parameter.requires_grad_(".adapter." in name)'
            ),
        },
    },
)
