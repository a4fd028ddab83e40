"""Checks that a GPU computes what the CPU and the libraries compute: losses, codes, optimizers, twenty steps of a method."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autograder.checking.masters import load_reference
from autograder.measuring.machine import Machine, Outcome
from autograder.measuring.methods import METHODS
from autograder.measuring.pairs import PAIRS, apart, bitsandbytes
from peftlab.llama import ALL_LINEAR, Llama, LlamaConfig, causal_loss, set_gradient_checkpointing
from peftlab.memory import measure_training_step
from peftlab.simulate import next_token_loss
from peftlab.training import trainable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION = [3, 1, 4, 1, 5]
"""Token ids that a prompt or a prefix starts from."""


def methods() -> dict:
    """Return the compared methods, without QLoRA where bitsandbytes is missing, which quantizes for it."""
    try:
        bitsandbytes()
    except ImportError:
        return {key: method for key, method in METHODS.items() if key[0] != "qlora"}
    return METHODS


def prepared(key: tuple[str, str], config: LlamaConfig) -> Llama:
    """Return a random model that a compared method has made ready, on the CPU: the same for the same method and sizes."""
    torch.manual_seed(0)
    model, method = Llama(config), METHODS[key]
    method.prepare(load_reference(method.unit) if method.unit else None, model, INSTRUCTION)
    return model


def check_placement(machine: Machine) -> Outcome:
    """Compare the losses of three SGD steps with the CPU's, for every compared method, in fp32.

    Sums are made in another order: a loss is off by a few units in its last place, and three steps of SGD add little.
    """
    config = LlamaConfig(31, 64, 128, 5, 4, 2)
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    differences = {}
    for key in methods():
        curves = []
        for device in (torch.device("cpu"), machine.device):
            model = prepared(key, config).to(device).train()
            optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
            curve = []
            for _ in range(3):
                loss = next_token_loss(model, tokens.to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                curve.append(loss.item())
            curves.append(curve)
        differences[":".join(key).rstrip(":")] = max(abs(cpu - here) / cpu for cpu, here in zip(*curves, strict=True))
    return Outcome(
        {"largest relative difference": max(differences.values()), "of": differences}, {"largest relative difference": 1e-5}
    )


def check_own_quantizer(machine: Machine) -> Outcome:
    """Count the bytes, absmax and read-back weights of our NF4 that differ from the CPU's: none may.

    Division, product and comparison are rounded the same on both; nothing here is a sum.
    """
    unit, qlora = load_reference("09_quantization"), load_reference("10_qlora")
    size, differing = 256 if machine.dry else 4096, {}
    for dtype in DTYPES:
        weight = (0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))).to(dtype)
        made = []
        for device in (torch.device("cpu"), machine.device):
            levels = unit.nf4_levels().to(device)
            packed, absmax = unit.quantize_4bit(weight.to(device), levels)
            made.append((packed, absmax, qlora.dequantize_nf4(packed, absmax, levels, weight.shape, dtype)))
        differing[str(dtype)[6:]] = sum((cpu != here.cpu()).sum().item() for cpu, here in zip(*made, strict=True))
    return Outcome({"numbers that differ": sum(differing.values()), "of": differing}, {"numbers that differ": 0})


def check_nf4(machine: Machine) -> Outcome:
    """Compare codes, absmax and read-back weights with bitsandbytes' kernels on this device.

    Absmax and what is read back must be equal to the bit. Codes may differ by one level where a weight lies on the boundary
    of two: bitsandbytes' CUDA kernels are compiled with approximate division, and multiply by 1 / absmax.
    """
    library, unit, qlora = bitsandbytes().functional, load_reference("09_quantization"), load_reference("10_qlora")
    size = 256 if machine.dry else 4096
    found = {"share of codes that differ": 0.0, "levels apart": 0, "absmax that differ": 0, "weights read back that differ": 0}
    for dtype in DTYPES:
        weight = (0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(1))).to(machine.device, dtype)
        packed, absmax = unit.quantize_4bit(weight, unit.nf4_levels().to(machine.device))
        theirs, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        ours, others = unit.unpack(packed).int(), unit.unpack(theirs).int()
        share = (ours != others).float().mean().item()
        found["share of codes that differ"] = max(found["share of codes that differ"], share)
        found["levels apart"] = max(found["levels apart"], (ours - others).abs().max().item())
        found["absmax that differ"] += (absmax != state.absmax).sum().item()
        for double in (False, True):
            layer = qlora.NF4Linear(*qlora.bitsandbytes_nf4(weight, double), weight.shape, dtype)
            theirs, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
            apart_in_bits = layer.dequantized() != library.dequantize_4bit(theirs, state)
            found["weights read back that differ"] += apart_in_bits.sum().item()
    # On the CPU the library's kernels for fp16 are built without F16C in some releases, and round halves up.
    return Outcome(found, dict.fromkeys(found, 0) | {"share of codes that differ": 1e-5, "levels apart": 1})


def check_adamw8bit(machine: Machine) -> Outcome:
    """Compare thirty steps of our AdamW in eight bits with bitsandbytes', as a share of the way that is gone.

    The library's kernel for CUDA decays a weight after the update, and keeps the sign of moments that round to zero; ours
    does what its CPU code does. Both are much nearer to each other than to AdamW in fp32, which is the yardstick here.
    """
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(80, 96, generator=generator), torch.randn(30, 80, 96, generator=generator)

    def after(optimizer_class: type[torch.optim.Optimizer]) -> torch.Tensor:
        parameter = nn.Parameter(start.clone().to(machine.device))
        optimizer = optimizer_class([parameter], lr=1e-2, weight_decay=0.01)
        for gradient in gradients:
            parameter.grad = gradient.to(machine.device)
            optimizer.step()
        return parameter.detach().cpu()

    ours, exact = after(load_reference("15_eight_bit_optimizer").AdamW8bit), after(torch.optim.AdamW)
    theirs = after(bitsandbytes().optim.AdamW8bit)
    way = (exact - start).pow(2).mean().sqrt()

    def off(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).pow(2).mean().sqrt() / way).item()

    found = {"apart": off(ours, theirs), "ours and fp32 apart": off(ours, exact)}
    return Outcome(found, {"apart": found["ours and fp32 apart"] / 10})


def check_parity(machine: Machine, name: str) -> Outcome:
    """Compare twenty steps of a method with the library's, in fp32 and in bf16, as a share of the way that the loss comes down.

    How far may rounding carry two right models apart? That is measured, here: every weight of ours is changed by one unit in
    its last place, and the curve that this gives is so and so far from the undisturbed one. Ten times as far is allowed.
    And a control: a model that does not learn must be further away than that.
    """
    found, limits = {}, {}
    for dtype in (torch.float32, torch.bfloat16):

        def fresh(dtype: torch.dtype = dtype):
            torch.manual_seed(0)
            return PAIRS[name](machine.device, dtype)

        pair, label = fresh(), str(dtype)[6:]
        ours, theirs = pair.our_losses(), pair.their_losses()
        disturbed = fresh()
        disturbed.disturb()
        by_rounding = apart(disturbed.our_losses(), ours)
        untrained = apart(fresh().our_losses(learning_rate=0.0), theirs)
        found |= {label: apart(ours, theirs), f"{label}, disturbed": by_rounding, f"{label}, untrained": untrained}
        limits[label] = min(10 * by_rounding, untrained / 2)
    return Outcome(found, limits)


def check_checkpointing(machine: Machine) -> Outcome:
    """Compare gradients and activations with and without gradient checkpointing: the same gradients, far fewer bytes."""
    unit = load_reference("08_lora")
    config = machine.smollm2(layers=6)
    torch.manual_seed(0)
    model = Llama(config)
    unit.inject(model, ALL_LINEAR, lambda linear: unit.LoRALinear(linear, 8, 16.0))
    for module in model.modules():
        if isinstance(module, unit.LoRALinear):
            nn.init.normal_(module.lora_B, std=0.02)
    model.to(machine.device).train()
    ids = torch.randint(0, config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0)).to(machine.device)
    gradients, activations = [], []
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels add in no fixed order
        for enabled in (False, True):
            set_gradient_checkpointing(model, enabled)
            model.zero_grad()
            causal_loss(model, ids, ids).backward()
            gradients.append([parameter.grad.clone() for parameter in trainable(model).values()])
            activations.append(measure_training_step(model, lambda: causal_loss(model, ids, ids)).activations)
    difference = max(((one - other).abs().max() / one.abs().max()).item() for one, other in zip(*gradients, strict=True))
    found = {"gradients apart": difference, "activations left": activations[1] / activations[0]}
    # What is kept without it are more than ten tensors a layer of the size of its input, which is all that is kept with it.
    return Outcome(found, {"gradients apart": 1e-6, "activations left": 0.35})
