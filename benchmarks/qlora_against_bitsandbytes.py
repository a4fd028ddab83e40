"""Seconds and peak bytes of QLoRA's parts: the course's reference against bitsandbytes and peft on the CPU, as ratios.

    python benchmarks/qlora_against_bitsandbytes.py [--rounds 5] [--size 4096]

Three things are timed, in one process and in turn, A B A B ...: quantizing a weight to NF4 with double quantization (unit 09's
reference), dequantizing it (unit 10's), and a training step of SmolLM2-135M with QLoRA against peft on `Linear4bit`: the same
weights, the same batch, the same rank, AdamW, fp32. A ratio of at most 1.0 means that the course's is as fast, or as small, as
the library's. The training step is also timed with plain LoRA, which is what QLoRA's extra time is measured by.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model

from autograder.checking.masters import load_reference
from peftlab import tasks
from peftlab.llama import ALL_LINEAR, IGNORE, Llama, causal_loss
from peftlab.memory import MEBIBYTE, measure_training_step, tensor_bytes
from peftlab.pretrained import load_smollm2
from peftlab.results import describe_hardware, package_versions


def linear_4bit(
    linear: nn.Linear, double: bool = True, compute: torch.dtype = torch.float32, work_around: bool = True
) -> nn.Module:
    """Return bitsandbytes' layer for a linear one, quantized to NF4.

    Where a CPU has AVX512-BF16, bitsandbytes 0.50.2 repacks the weight at the first pass in `eval` mode, for good, and training
    afterwards drops the gradient through the base. The work-around is one attribute.
    """
    bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias, compute, compress_statistics=double, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    )
    if bias:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    if work_around:
        layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")  # this quantizes


def library_model(ours: Llama, rank: int = 8, alpha: int = 16) -> nn.Module:
    """Return peft's LoRA on bitsandbytes' layers, in transformers' model with the weights of ours."""
    theirs = LlamaForCausalLM(LlamaConfig(**asdict(ours.config), use_cache=False))
    theirs.load_state_dict(ours.state_dict())
    theirs.tie_weights()
    for name, module in list(theirs.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name in ALL_LINEAR:
            setattr(theirs.get_submodule(parent), own_name, linear_4bit(module))
    theirs.is_loaded_in_4bit = True  # by which peft chooses its layer
    return get_peft_model(theirs, LoraConfig(r=rank, lora_alpha=alpha, target_modules=ALL_LINEAR))


def quantizer(reference: ModuleType, compute: torch.dtype = torch.float32) -> Callable[[nn.Linear], nn.Module]:
    """Return a function that makes the reference's 4-bit layer of a linear one; bitsandbytes quantizes for both sides."""
    master = load_reference("10_qlora")
    return lambda linear: reference.NF4Linear(*master.bitsandbytes_nf4(linear.weight), linear.weight.shape, compute)


def copy_factors(theirs: nn.Module, ours: nn.Module) -> None:
    """Start ours from the library's random factors."""
    factors = {name: tensor for name, tensor in theirs.state_dict().items() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(factors[f"base_model.model.{name}.default.weight"])


def library_loss(theirs: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as `causal_loss` computes it: logits only where there is a label, in both."""
    inner = theirs.base_model.model
    hidden = inner.model(input_ids=input_ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORE
    return nn.functional.cross_entropy(inner.lm_head(hidden[counted]).float(), targets[counted])


def statistics_bytes(theirs: nn.Module) -> int:
    """Return the bytes of bitsandbytes' statistics and levels: no parameters, no buffers, so that no measurement sees them."""
    states = [module.weight.quant_state for module in theirs.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    return tensor_bytes([part for state in states for part in (state.absmax, state.state2.absmax, state.offset, state.code)])


class Unquantized(nn.Module):
    """A base that is not quantized: `qlora` with it is plain LoRA."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed, self.shape = linear.weight, tuple(linear.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed)


def in_turn(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every action in every round, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(what: str, seconds: dict[str, list[float]], ours: str, theirs: str) -> None:
    """Print medians, and the median of the ratios of neighbours in time."""
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    medians = [1e3 * statistics.median(seconds[name]) for name in (ours, theirs)]
    print(
        f"{what:<34}{medians[0]:>8,.0f} ms against {medians[1]:>6,.0f} ({theirs}): ratio {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def weights(size: int, rounds: int) -> None:
    """Time quantizing and dequantizing one square weight, in fp32 and bf16."""
    quantization, master = load_reference("09_quantization"), load_reference("10_qlora")
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(size, size)

    def ours() -> tuple:
        packed, absmax = quantization.quantize_nf4(weight)
        return packed, *quantization.double_quantize(absmax)

    def theirs() -> tuple:
        return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    packed, state = theirs()
    assert torch.equal(ours()[0], packed)
    report(f"quantize {size} x {size}", in_turn({"ours": ours, "bitsandbytes": theirs}, rounds), "ours", "bitsandbytes")
    tensors = master.bitsandbytes_nf4(weight)
    for dtype in (torch.float32, torch.bfloat16):
        layer = master.NF4Linear(*tensors, weight.shape, dtype)
        state.dtype = dtype
        assert torch.equal(layer.dequantized(), bnb.dequantize_4bit(packed, state))
        actions = {"ours": layer.dequantized, "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)}
        report(f"dequantize to {str(dtype)[6:]}", in_turn(actions, 4 * rounds), "ours", "bitsandbytes")


def training(rounds: int) -> None:
    """Time and measure a training step on a batch of film reviews."""
    master = load_reference("10_qlora")
    ours, tokenizer = load_smollm2()
    theirs = library_model(ours).train()
    lora, _ = load_smollm2()
    master.qlora(lora, Unquantized)
    master.qlora(ours, quantizer(master))
    copy_factors(theirs, ours)
    copy_factors(theirs, lora)
    input_ids, labels = tasks.collate(list(tasks.movie_reviews(tokenizer).train.select(range(16))))
    losses = {
        "ours": lambda: causal_loss(ours, input_ids, labels),
        "peft on Linear4bit": lambda: library_loss(theirs, input_ids, labels),
        "LoRA": lambda: causal_loss(lora, input_ids, labels),
    }
    models = {"ours": ours.train(), "peft on Linear4bit": theirs, "LoRA": lora.train()}
    values = {name: loss().item() for name, loss in losses.items()}
    assert math.isclose(values["ours"], values["peft on Linear4bit"], rel_tol=1e-4), "the two do not compute the same"
    peaks = {name: measure_training_step(models[name], loss).peak / MEBIBYTE for name, loss in losses.items()}
    peaks["peft on Linear4bit"] += statistics_bytes(theirs) / MEBIBYTE
    optimizers = {name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.0) for name, m in models.items()}

    def step(name: str) -> None:
        losses[name]().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    seconds = in_turn({name: (lambda name=name: step(name)) for name in losses}, rounds)
    what = f"training step, {input_ids.shape[0]} x {input_ids.shape[1]} tokens"
    report(what, seconds, "ours", "peft on Linear4bit")
    report(what, seconds, "ours", "LoRA")
    for name in ("peft on Linear4bit", "LoRA"):
        ratio = peaks["ours"] / peaks[name]
        print(f"{'peak MiB':<34}{peaks['ours']:>8,.0f}    against {peaks[name]:>6,.0f} ({name}): ratio {ratio:.2f}")


def main() -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each (default 5)")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight (default 4096)")
    options = parser.parse_args()
    print(describe_hardware(), package_versions())
    weights(options.size, options.rounds)
    training(options.rounds)


if __name__ == "__main__":
    main()
