"""Seconds and peak bytes of a LoRA training step: the course's reference against peft on transformers, as ratios.

    python benchmarks/lora_against_peft.py [--rounds 5]

Both train SmolLM2-135M with the same weights, the same batch, rank 8 on all linear layers, AdamW, fp32, in one process, in
turn: A B A B ... A ratio of at most 1.0 means that the course's is as fast, or as small, as the library's.

Two kinds of batch are measured. In `answers` only the answer's tokens have labels, as in the course's tasks; ours then
computes logits only where there is a label. In `all tokens` every token has one: both compute the same logits.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from autograder.checking.masters import load_reference
from peftlab import tasks
from peftlab.llama import ALL_LINEAR, IGNORE, Llama, causal_loss
from peftlab.memory import MEBIBYTE, measure_training_step
from peftlab.pretrained import load_smollm2
from peftlab.results import describe_hardware, package_versions


def pair() -> tuple[Llama, nn.Module, tasks.Task]:
    """Return the reference's LoRA on our model, peft's on transformers', and the task; both start from the same factors."""
    ours, tokenizer = load_smollm2()
    theirs = LlamaForCausalLM(LlamaConfig(**asdict(ours.config), use_cache=False))
    theirs.load_state_dict(ours.state_dict())
    theirs.tie_weights()
    theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR))
    reference = load_reference("08_lora")
    reference.inject(ours, ALL_LINEAR, lambda linear: reference.LoRALinear(linear, 8, 16.0))
    factors = {name: tensor for name, tensor in theirs.state_dict().items() if "lora_" in name}
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            if "lora_" in name:
                tensor.copy_(factors[f"base_model.model.{name}.default.weight"])
    return ours.train(), theirs.train(), tasks.movie_reviews(tokenizer)


def timed_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Take one training step; return its loss and its seconds."""
    started = time.perf_counter()
    value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item(), time.perf_counter() - started


def main() -> None:
    """Measure both kinds of batch and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    rounds = parser.parse_args().rounds
    print(describe_hardware(), package_versions())
    ours, theirs, task = pair()
    input_ids, answers = tasks.collate(list(task.train.select(range(16))))
    padding = torch.arange(input_ids.shape[1]) >= torch.tensor([[len(row)] for row in task.train[:16]["input_ids"]])
    mask = (~padding).long()
    for kind, labels in {"answers": answers, "all tokens": input_ids.masked_fill(padding, IGNORE)}.items():
        losses = {
            "ours": lambda labels=labels: causal_loss(ours, input_ids, labels),
            "peft": lambda labels=labels: theirs(input_ids=input_ids, attention_mask=mask, labels=labels).loss,
        }
        models = {"ours": ours, "peft": theirs}
        peaks = {name: measure_training_step(models[name], loss).peak for name, loss in losses.items()}
        optimizers = {
            name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.0) for name, m in models.items()
        }
        seconds: dict[str, list[float]] = {"ours": [], "peft": []}
        for turn in range(rounds + 1):
            values = {}
            for name, loss in losses.items():
                values[name], took = timed_step(loss, optimizers[name])
                if turn:  # the first is a warm-up
                    seconds[name].append(took)
            assert abs(values["ours"] - values["peft"]) <= 1e-4 * values["peft"], "the two do not compute the same"
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["peft"], strict=True)]
        ours_seconds, their_seconds = (statistics.median(seconds[name]) for name in ("ours", "peft"))
        ours_peak, their_peak = (peaks[name] / MEBIBYTE for name in ("ours", "peft"))
        print(f"{kind}, {input_ids.shape[0]} x {input_ids.shape[1]} tokens")
        print(
            f"  seconds a step {ours_seconds:.2f} against {their_seconds:.2f}: ratio {statistics.median(ratios):.2f}", end=" "
        )
        print(f"(from {min(ratios):.2f} to {max(ratios):.2f})")
        print(f"  peak MiB       {ours_peak:,.0f} against {their_peak:,.0f}: ratio {ours_peak / their_peak:.2f}")


if __name__ == "__main__":
    main()
