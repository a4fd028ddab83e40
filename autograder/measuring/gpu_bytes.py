"""Checks of measured bytes: CUDA's allocator against the CPU's tracker, the simulation, and the paper's 48 GB."""

import time
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autograder.checking.masters import load_reference
from autograder.measuring.gpu_exact import methods, prepared
from autograder.measuring.machine import Machine, Outcome, SkippedError
from peftlab.llama import ALL_LINEAR, PRESETS, Llama, LlamaConfig, RMSNorm, set_gradient_checkpointing
from peftlab.memory import StepMemory, measure_training_step
from peftlab.simulate import next_token_loss, simulate_training_step
from peftlab.training import seconds_of, trainable

CATEGORIES = ("parameters", "gradients", "optimizer_state", "activations")
LARGE = {"LLaMA-7B": 7e9, "LLaMA-13B": 11e9, "LLaMA-65B": 46e9}
"""Models of the published sizes, and the bytes that must be free for each: its simulated peak, and a tenth more."""
PAPER_BYTES = 48e9
"""Dettmers et al. 2023, arXiv 2305.14314: QLoRA fine-tunes 65B on one GPU of 48 GB."""
loop_adamw = partial(torch.optim.AdamW, foreach=False)
"""AdamW that updates one parameter after the other, as it does on the CPU by default."""


def check_bytes(machine: Machine) -> Outcome:
    """Compare a step's bytes with those that the tracker follows on the CPU, for each method, in fp32.

    Attention is written out and AdamW goes from parameter to parameter on both, so the same operations run. What still
    differs: the 4 bytes a tensor in which AdamW counts steps, which stay on the CPU; index tensors and the like at the peak.
    """
    config = machine.smollm2(layers=6)
    shape = (2, 12) if machine.dry else (4, 29)
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    worst, steps = dict.fromkeys(CATEGORIES, 0) | {"peak": 0.0}, {}
    for key in methods():
        if key[1]:
            continue
        measured = []
        for device in (torch.device("cpu"), machine.device):
            model = prepared(key, config).to(device).train()
            ids = tokens.to(device)
            with sdpa_kernel(SDPBackend.MATH):
                measured.append(measure_training_step(model, partial(next_token_loss, model, ids), loop_adamw))
        expected = as_on(machine, measured[0], model)
        steps[key[0]] = {"expected": asdict(expected), "here": asdict(measured[1])}
        for name, difference in differences(measured[1], expected).items():
            worst[name] = max(worst[name], difference)
    return Outcome(worst | {"of": steps}, dict.fromkeys(CATEGORIES, 0) | {"activations": 4096, "peak": 1e-3})


def as_on(machine: Machine, step: StepMemory, model: nn.Module) -> StepMemory:
    """Return a step's bytes on the machine, from those on the CPU: AdamW's step counts are never on a GPU."""
    counts = 4 * len(trainable(model)) if machine.on_cuda else 0
    return replace(step, optimizer_state=step.optimizer_state - counts, peak=step.peak - counts)


def differences(here: StepMemory, expected: StepMemory) -> dict[str, float]:
    """Return by how many bytes two steps differ in each category; for the peak, the share of what is expected."""
    apart = {name: abs(getattr(here, name) - getattr(expected, name)) for name in CATEGORIES}
    return apart | {"peak": abs(here.peak / expected.peak - 1)}


def check_simulation(machine: Machine) -> Outcome:
    """Compare a step as everybody takes it, in fp32 and with AdamW's default, with a simulation that knows two things.

    In fp32 with grouped-query attention no fast kernel of CUDA's takes part, so attention is written out; and AdamW
    updates all parameters at once, for which it needs a temporary copy of all that is trained. Beside the requested bytes the
    row has what the allocator rounded them up to, and what it reserved.
    """
    config = machine.smollm2()
    rows, length = (2, 12) if machine.dry else (16, 29)
    lora = load_reference("08_lora")
    prepare = {
        "full": lambda model: None,
        "LoRA": lambda model: lora.inject(model, ALL_LINEAR, lambda linear: lora.LoRALinear(linear, 8, 16.0)),
    }
    at_once = partial(torch.optim.AdamW, foreach=True)
    worst, steps = dict.fromkeys(CATEGORIES, 0) | {"peak": 0.0}, {}
    for name, make in prepare.items():
        with sdpa_kernel(SDPBackend.MATH):
            simulated = simulate_training_step(
                config, make, optimizer_class=at_once, dtype="fp32", batch_size=rows, sequence_length=length, whole_model=True
            )
        torch.manual_seed(0)
        model = Llama(config)
        make(model)
        model.to(machine.device).train()
        ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(machine.device)
        if machine.on_cuda:
            here = measure_training_step(model, partial(next_token_loss, model, ids))
        else:
            with sdpa_kernel(SDPBackend.MATH):
                here = measure_training_step(model, partial(next_token_loss, model, ids), at_once)
        expected = as_on(machine, simulated, model)
        steps[name] = {"simulated": asdict(expected), "here": asdict(here)} | allocator(machine)
        for category, difference in differences(here, expected).items():
            worst[category] = max(worst[category], difference)
    return Outcome(worst | {"of": steps}, dict.fromkeys(CATEGORIES, 0) | {"activations": 4096, "peak": 1e-3})


def allocator(machine: Machine) -> dict[str, int]:
    """Return the most bytes, of the step measured last, that CUDA's allocator gave out and that it reserved."""
    if not machine.on_cuda:
        return {}
    return {
        "allocated at the peak": torch.cuda.max_memory_allocated(machine.device),
        "reserved at the peak": torch.cuda.max_memory_reserved(machine.device),
    }


def nf4_on_paper(unit: ModuleType, linear: nn.Linear) -> nn.Module:
    """Return unit 10's layer of the right sizes, doubly quantized, without numbers, on the device of the linear layer."""
    count, device, shape = linear.weight.numel(), linear.weight.device, linear.weight.shape
    blocks = count // 64
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    statistics = (codes, torch.empty(-(-blocks // 256), device=device), torch.empty((), device=device))
    packed = torch.empty(count // 2, 1, dtype=torch.uint8, device=device)
    return unit.NF4Linear(packed, statistics, torch.empty(16, device=device), shape, linear.weight.dtype)


def with_qlora(rank: int, model: Llama) -> None:
    """Put unit 10's QLoRA into a model on "meta": factors in bf16, bases without numbers."""
    unit = load_reference("10_qlora")
    unit.qlora(model, partial(nf4_on_paper, unit), rank, dtype=torch.bfloat16)


def random_qlora(config: LlamaConfig, rank: int, device: torch.device) -> Llama:
    """Return a model of unit 10's layers with random codes, in bf16, made where it is used: 33 GB cannot come from the CPU.

    The numbers are such that activations stay of ordinary size: codes stand for weights of about 0.01.
    """
    unit = load_reference("10_qlora")
    levels = load_reference("09_quantization").nf4_levels()
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
        with_qlora(rank, model)
    model.to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, unit.NF4Linear):
                module.packed.random_(256)
                module.absmax.random_(256)
                module.nested_absmax.fill_(0.005)
                module.offset.fill_(0.02)
                module.levels.copy_(levels)
            elif isinstance(module, unit.QLoRALinear):
                nn.init.kaiming_uniform_(module.lora_A, a=5**0.5)
                nn.init.zeros_(module.lora_B)
            elif isinstance(module, nn.Embedding | nn.Linear):
                module.weight.normal_(std=0.02)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
    return model.train()


def check_large(machine: Machine, name: str) -> Outcome:
    """Train a model of a published size with unit 10's layers, rank 64, 512 tokens, checkpointing; compare with the simulation.

    Its codes are random: bytes do not depend on them. What is allowed besides: nothing in weights, gradients and optimizer
    state; for activations and the peak a few numbers that attention's kernel keeps for itself.
    """
    config, rank, length = PRESETS[name], 64, 512
    if machine.dry:
        config, rank, length = LlamaConfig(512, 256, 704, 3, 8, 8), 8, 32
    free = machine.free_bytes()
    if free is not None and free < LARGE[name]:
        raise SkippedError(f"{free / 1e9:.0f} GB are free and {LARGE[name] / 1e9:.0f} GB are needed")
    simulated = simulate_training_step(
        config, partial(with_qlora, rank), optimizer_class=loop_adamw, sequence_length=length, checkpointing=True
    )
    started = time.perf_counter()
    model = random_qlora(config, rank, machine.device)
    built = time.perf_counter() - started
    set_gradient_checkpointing(model, True)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(machine.device)
    here = measure_training_step(model, partial(next_token_loss, model, ids), loop_adamw)
    given_out = allocator(machine)
    optimizer, losses, seconds = loop_adamw(trainable(model).values(), lr=1e-3), [], []

    def step() -> None:
        loss = next_token_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(2 if machine.dry else 4):
        seconds.append(seconds_of(step, machine.device))
    expected = as_on(machine, simulated, model)
    found = differences(here, expected) | {
        "last loss over first": losses[-1] / losses[0],
        "here": asdict(here),
        "simulated": asdict(expected),
        "paper": PAPER_BYTES,
        "tokens": length,
        "rank": rank,
        "losses": losses,
        "seconds a step": sorted(seconds)[len(seconds) // 2],
        "seconds to build": built,
    }
    found |= given_out
    limits = dict.fromkeys(CATEGORIES, 0) | {"activations": 1 << 20, "peak": 1e-3, "last loss over first": 0.999}
    if machine.on_cuda and name == "LLaMA-65B":
        limits["allocated at the peak"] = PAPER_BYTES
    return Outcome(found, limits)
