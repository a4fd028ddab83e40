"""Two models that should learn alike: ours with a unit's method, and the library's, of the same weights.

Each function here makes a `Pair`; `apart` says how far the two have gone different ways.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autograder.checking.masters import load_reference
from peftlab.llama import ALL_LINEAR, IGNORE, PRESETS, Llama, LlamaConfig, causal_loss
from peftlab.training import trainable, twenty_steps

SMALL = replace(PRESETS["tiny"], intermediate_size=192)
"""All its matrices have rows of whole blocks of 64: bitsandbytes misreads others on some CPUs."""
LEARNING_RATE = 1e-2
TOKENS = 5
"""Positions of a soft prompt or a prefix."""


@dataclass
class Pair:
    """Two models on one device, what is trained in each, and a function from token ids to each one's loss.

    Attributes:
        trained: of ours, what is trained; the library's starts with the same numbers.
    """

    ours: nn.Module
    theirs: nn.Module
    our_loss: Callable[[Tensor], Tensor]
    their_loss: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    their_trained: list[nn.Parameter]

    def our_losses(self, learning_rate: float = LEARNING_RATE) -> Float[Tensor, "20"]:
        """Take twenty steps of AdamW with ours, on one batch; return the losses, in fp32."""
        return twenty_steps(self.trained, self.our_loss, learning_rate, self.trained[0].device, batches=1).float()

    def their_losses(self) -> Float[Tensor, "20"]:
        """Do the same with the library's."""
        return twenty_steps(self.their_trained, self.their_loss, LEARNING_RATE, self.trained[0].device, batches=1).float()

    def disturb(self) -> None:
        """Change every parameter of ours, trained or frozen, by one unit in its last place, up or down at random."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.ours.parameters():
                up_or_down = 2 * torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) - 1
                parameter.mul_((1 + torch.finfo(parameter.dtype).eps * up_or_down).to(parameter.dtype))


def apart(losses: Float[Tensor, "steps"], others: Float[Tensor, "steps"]) -> float:
    """Return the largest difference of two loss curves as a share of the way that the second has come down."""
    return ((losses - others).abs().max() / (others[0] - others.min()).abs().clamp(min=1e-9)).item()


def bitsandbytes() -> ModuleType:
    """Return the library; it warns of what it does not find.

    Raises:
        ImportError: if it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes


def two_models(config: LlamaConfig) -> tuple[Llama, nn.Module]:
    """Return our model and transformers', with the same random weights, in fp32 on the CPU."""
    from transformers import LlamaConfig as HubConfig
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(HubConfig(**asdict(config), use_cache=False))
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    ours.tie_weights()
    return ours, theirs


def in_peft(model: nn.Module, settings: object) -> nn.Module:
    """Return transformers' model with a method of peft's."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # names that are about to change
        warnings.simplefilter("ignore")
        return get_peft_model(model, settings)


def paired(ours: Llama, theirs: nn.Module, skip_first: bool = False) -> Pair:
    """Return the pair of two models that are ready to be trained.

    Args:
        skip_first: do not count the first token's label, which peft predicts from a soft prompt and ours does not.
    """

    def labels(ids: Tensor) -> Tensor:
        counted = ids.clone()
        if skip_first:
            counted[:, 0] = IGNORE
        return counted

    return Pair(
        ours.train(),
        theirs.train(),
        lambda ids: causal_loss(ours, ids, labels(ids)),
        lambda ids: theirs(input_ids=ids, labels=labels(ids)).loss,
        list(trainable(ours).values()),
        list(trainable(theirs).values()),
    )


def lora_pair(device: torch.device, dtype: torch.dtype, config: LlamaConfig = SMALL, four_bits: bool = False) -> Pair:
    """Return LoRA of rank 8 on all linear layers, on a base in `dtype` or, with `four_bits`, in NF4: units 08 and 10."""
    from peft import LoraConfig

    ours, theirs = two_models(config)
    if four_bits:
        replace_with_linear4bit(theirs, dtype, device)
    theirs = in_peft(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR)).to(device, dtype)
    ours.to(device, dtype)
    if four_bits:
        unit = load_reference("10_qlora")
        unit.qlora(ours, lambda linear: nf4_of(unit, linear.weight, dtype), rank=8, alpha=16.0, dtype=dtype)
    else:
        unit = load_reference("08_lora")
        unit.inject(ours, ALL_LINEAR, lambda linear: unit.LoRALinear(linear, 8, 16.0))
        ours.to(device, dtype)
    factors = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in theirs.state_dict().items()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in trainable(ours).items():
            parameter.copy_(factors[name])
    return paired(ours, theirs)


def qlora_pair(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return LoRA on a base in NF4, beside peft on bitsandbytes' layers: unit 10."""
    bitsandbytes()
    return lora_pair(device, dtype, four_bits=True)


def nf4_of(unit: ModuleType, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return unit 10's layer of a weight that bitsandbytes quantizes."""
    return unit.NF4Linear(*unit.bitsandbytes_nf4(weight), weight.shape, dtype)


def replace_with_linear4bit(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put bitsandbytes' 4-bit layers into transformers' model instead of its linear ones; peft is told."""
    library = bitsandbytes()
    for name, linear in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name not in ALL_LINEAR:
            continue
        layer = library.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True
        )
        layer.weight = library.nn.Params4bit(
            linear.weight.detach().to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
        layer.support_avx512bf16_for_cpu = False  # where a CPU has AVX512-BF16 it would repack the weight, and lose gradients
        setattr(model.get_submodule(parent), own_name, layer.to(device))
    model.is_loaded_in_4bit = True


def prompt_pair(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return a soft prompt beside peft's: unit 05."""
    from peft import PromptTuningConfig

    ours, theirs = two_models(SMALL)
    theirs = in_peft(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    start = theirs.prompt_encoder["default"].embedding.weight.detach().clone()
    ours.requires_grad_(False)
    ours.model = load_reference("05_prompt_tuning").PromptedModel(ours.model, start)
    return paired(ours.to(device, dtype), theirs.to(device, dtype), skip_first=True)


def prefix_pair(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return a prefix of keys and values beside peft's: unit 06."""
    from peft import PrefixTuningConfig

    ours, theirs = two_models(SMALL)
    theirs = in_peft(theirs, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    rows = theirs.prompt_encoder["default"].embedding.weight.detach()
    # A row of peft's is a token, and reads (layers, keys and values, heads, features).
    each = rows.view(TOKENS, SMALL.num_hidden_layers, 2, SMALL.num_key_value_heads, SMALL.head_dim).permute(1, 2, 3, 0, 4)
    unit = load_reference("06_prefix_tuning")
    ours.requires_grad_(False)
    ours.model = unit.PrefixModel(ours.model, unit.Prefix(each[:, 0].clone(), each[:, 1].clone()))
    return paired(ours.to(device, dtype), theirs.to(device, dtype), skip_first=True)


def adapter_pair(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return Houlsby's adapters, which peft does not have, beside hooks on transformers' model that compute them: unit 07."""
    ours, theirs = two_models(SMALL)
    theirs.requires_grad_(False)
    load_reference("07_adapters").add_adapters(ours, 8)
    ours.to(device, dtype)
    theirs.to(device, dtype)
    pair = paired(ours, theirs)
    for our_layer, their_layer in zip(ours.model.layers, theirs.model.layers, strict=True):
        for place in ("self_attn", "mlp"):
            own = getattr(our_layer, place).adapter.named_parameters()
            copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in own}
            getattr(their_layer, place).register_forward_hook(_bottleneck(copies))
            pair.their_trained += copies.values()
    return pair


def _bottleneck(weights: dict[str, Tensor]) -> Callable:
    """Return a hook that replaces a module's output h by h + W_up gelu(W_down h + b_down) + b_up."""

    def hook(module: nn.Module, inputs: tuple, output: object) -> object:
        h = output[0] if isinstance(output, tuple) else output  # transformers' attention returns a tuple
        z = h @ weights["down.weight"].T + weights["down.bias"]
        bent = z * (1 + torch.erf(z / 2**0.5)) / 2
        new = h + bent @ weights["up.weight"].T + weights["up.bias"]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


PAIRS: dict[str, Callable[[torch.device, torch.dtype], Pair]] = {
    "LoRA": lora_pair,
    "QLoRA": qlora_pair,
    "prompt tuning": prompt_pair,
    "prefix tuning": prefix_pair,
    "adapters": adapter_pair,
}
"""Each method that has a counterpart, by its name in prose; a function of device and dtype."""
