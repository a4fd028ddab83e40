"""Measure the comparison of methods: every method on both tasks, its learning rate swept, on several seeds.

    python -m autograder.measuring.methods                        all that has not been measured yet
    python -m autograder.measuring.methods adapters bitfit        these methods
    python -m autograder.measuring.methods prompt_tuning:random   one variant of a method
    python -m autograder.measuring.methods --list                 what there is, and what has been measured
    python -m autograder.measuring.methods --again lora           measure a shipped row once more; both, side by side

A row is saved as soon as it is measured, below `course/peftlab/measured/comparison`, and what is there is not measured again:
it may be stopped at any time and started again, and several may run side by side on different methods. The methods are the
masters' own solutions.

The learning rate goes up and down from a first guess, by factors of about three, until the best lies between two that
are worse; `peftlab.comparison.late_loss` says which is best. The other seeds are run at that rate. If their mean is worse than
a single run at another rate, that rate gets the other seeds as well: what won may have been a lucky run.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from types import ModuleType

import torch
from torch import nn

from autograder.checking.masters import load_reference, units
from peftlab import results, tasks
from peftlab.comparison import UNIT, chosen_rate, late_losses, rows, summary, twin_table
from peftlab.llama import ALL_LINEAR, Llama
from peftlab.pretrained import load_smollm2
from peftlab.results import Row
from peftlab.tasks import Task
from peftlab.training import fine_tune, trainable

LADDER = tuple(round(digit * 10.0**power, 9) for power in range(-6, 1) for digit in (1, 3))
"""The learning rates that are tried: 1e-6, 3e-6, 1e-5 and so on, up to 3."""
SEEDS = (0, 1, 2)
TRAINING = {"movie_reviews": {"steps": 40, "batch_size": 16}, "tool_calls": {"steps": 60, "batch_size": 8}}
INSTRUCTIONS = {
    "movie_reviews": "Decide whether the review of this movie is good or bad.",
    "tool_calls": "Answer the request with a call of the right tool, in JSON.",
}
"""What a soft prompt or a prefix starts from, where it starts from text."""
TOKENS = 16
ATTENTION, MLP = ALL_LINEAR[:4], ALL_LINEAR[4:]
LORA_PLUS_RATIO = 16.0
"""By how much B's learning rate is larger than A's, as Hayou et al. (2024) have it in their experiments."""


def save_trainable(model: nn.Module, path: Path) -> None:
    """Write what is trained, under its names."""
    from safetensors.torch import save_file

    save_file({name: parameter.detach().contiguous() for name, parameter in trainable(model).items()}, path)


@dataclass(frozen=True)
class Method:
    """One way to train, as it is compared.

    Attributes:
        unit: whose master has the solution; None for what needs none.
        prepare: given the master's solutions, the model and the ids of the task's instruction, makes of the model what
            is trained.
        guess: the first learning rate, by the tasks that it is measured on.
        described: settings for the row.
        steps: how many, if not as many as in `TRAINING`.
        keeps_outputs: whether the prepared model computes what the untrained one does.
        save: writes what was learned.
        groups: given the master's solutions, the prepared model and the learning rate, returns the optimizer's parameter
            groups, if there are several.
    """

    unit: str | None
    prepare: Callable[[ModuleType | None, Llama, list[int]], object]
    guess: dict[str, float]
    described: dict
    steps: int | None = None
    keeps_outputs: bool = True
    save: Callable[[nn.Module, Path], None] = save_trainable
    groups: Callable[[ModuleType, nn.Module, float], list[dict]] | None = None


def _lora(solution: ModuleType, model: Llama, instruction: list[int]) -> None:
    solution.inject(model, ALL_LINEAR, lambda linear: solution.LoRALinear(linear, rank=8, alpha=16.0))


def _lora_of(rank: int, alpha: float, target_modules: Sequence[str] = ALL_LINEAR, variant: str = "", **settings) -> Method:
    """Return LoRA with settings of its own, or a variant of it, for the 30 steps that unit 12 compares."""

    def prepare(solution: ModuleType, model: Llama, instruction: list[int]) -> None:
        lora = load_reference(_LORA)

        def make_layer(linear: nn.Linear) -> nn.Module:
            if variant == "dora":
                return solution.DoRALinear(linear, rank, alpha)
            layer = lora.LoRALinear(linear, rank, alpha)
            if variant == "pissa":
                parts = solution.pissa(linear.weight, rank, layer.scaling)
                for parameter, part in zip((layer.lora_A, layer.lora_B, linear.weight), parts, strict=True):
                    parameter.data.copy_(part)
            return layer

        lora.inject(model, target_modules, make_layer)

    described = {"rank": rank, "alpha": alpha, "target_modules": list(target_modules)}
    return Method("12_lora_in_practice", prepare, described=described, steps=30, **settings)


def _qlora(solution: ModuleType, model: Llama, instruction: list[int]) -> None:
    def quantize(linear: nn.Linear) -> nn.Module:
        return solution.NF4Linear(*solution.bitsandbytes_nf4(linear.weight), linear.weight.shape, torch.float32)

    solution.qlora(model, quantize, rank=8, alpha=16.0)


def _biases(solution: ModuleType, model: Llama, instruction: list[int]) -> None:
    solution.add_biases(model)
    solution.train_biases(model)


def _prompt(start: str, solution: ModuleType, model: Llama, instruction: list[int]) -> None:
    embedding = model.model.embed_tokens
    starts = {
        "random": lambda: solution.random_start(TOKENS, model.config.hidden_size),
        "vocabulary": lambda: solution.vocabulary_start(embedding, TOKENS),
        "text": lambda: solution.text_start(embedding, instruction, TOKENS),
    }
    model.model = solution.PromptedModel(model.model, starts[start]())


def _prefix(start: str, solution: ModuleType, model: Llama, instruction: list[int]) -> None:
    config = model.config
    sizes = (config.num_hidden_layers, config.num_key_value_heads, TOKENS, config.head_dim)
    if start == "text":
        repeated = (instruction * TOKENS)[:TOKENS]
        prefix = solution.prefix_from_tokens(model, torch.tensor([repeated]))
    elif start == "mlp":
        prefix = solution.ReparameterizedPrefix(*sizes, width=config.hidden_size, mlp_width=config.hidden_size)
    else:
        prefix = solution.Prefix(torch.randn(sizes), torch.randn(sizes))
    model.model = solution.PrefixModel(model.model, prefix)


def _save_prefix(solution_unit: str, model: nn.Module, path: Path) -> None:
    """Save keys and values; an MLP that made them stays behind."""
    from safetensors.torch import save_file

    prefix = model.model.prefix
    solution = load_reference(solution_unit)
    folded = solution.fold(prefix) if isinstance(prefix, solution.ReparameterizedPrefix) else prefix
    save_file({"keys": folded.keys.detach().contiguous(), "values": folded.values.detach().contiguous()}, path)


def _rates(movie_reviews: float, tool_calls: float) -> dict[str, float]:
    return {"movie_reviews": movie_reviews, "tool_calls": tool_calls}


_TOKENS = {"tokens": TOKENS}
_FREEZING, _BITFIT, _PROMPT, _PREFIX = "03_layer_freezing", "04_bitfit", "05_prompt_tuning", "06_prefix_tuning"
_ADAPTERS, _LORA, _QLORA = "07_adapters", "08_lora", "10_qlora"
_prefixed = partial(Method, _PREFIX, described=_TOKENS, keeps_outputs=False, save=partial(_save_prefix, _PREFIX))
_prompted = partial(Method, _PROMPT, described=_TOKENS, keeps_outputs=False)

METHODS = {
    ("full", ""): Method(None, lambda solution, model, instruction: None, _rates(3e-5, 1e-4), {}),
    ("lora", ""): Method(_LORA, _lora, _rates(3e-4, 1e-3), {"rank": 8, "alpha": 16.0}),
    ("qlora", ""): Method(_QLORA, _qlora, _rates(3e-4, 1e-3), {"rank": 8, "alpha": 16.0}, keeps_outputs=False),
    ("lora", "long"): Method(_LORA, _lora, {"tool_calls": 3e-3}, {"rank": 8, "alpha": 16.0}, steps=120),
    ("qlora", "long"): Method(_QLORA, _qlora, {"tool_calls": 3e-3}, {"rank": 8, "alpha": 16.0}, steps=120, keeps_outputs=False),
    ("layer_freezing", ""): Method(
        _FREEZING, lambda solution, model, instruction: solution.train_last(model, 4), _rates(3e-4, 3e-4), {"layers": 4}
    ),
    ("layer_freezing", "first"): Method(
        _FREEZING, lambda solution, model, instruction: solution.train_first(model, 4), _rates(1e-4, 3e-4), {"layers": 4}
    ),
    ("bitfit", ""): Method(_BITFIT, _biases, _rates(3e-3, 3e-3), {}),
    ("bitfit", "norm_gains"): Method(
        _BITFIT, lambda solution, model, instruction: solution.train_norm_gains(model), _rates(3e-3, 1e-2), {}
    ),
    ("prompt_tuning", ""): _prompted(partial(_prompt, "text"), _rates(1e-1, 1e-1)),
    ("prompt_tuning", "random"): _prompted(partial(_prompt, "random"), _rates(3e-1, 3e-1)),
    ("prompt_tuning", "vocabulary"): _prompted(partial(_prompt, "vocabulary"), _rates(1e-1, 1e-1)),
    ("prefix_tuning", ""): _prefixed(partial(_prefix, "text"), _rates(1e-2, 1e-2)),
    ("prefix_tuning", "random"): _prefixed(partial(_prefix, "random"), _rates(1e-2, 1e-2)),
    ("prefix_tuning", "mlp"): _prefixed(partial(_prefix, "mlp"), _rates(1e-3, 1e-3)),
    ("adapters", ""): Method(
        _ADAPTERS, lambda solution, model, instruction: solution.add_adapters(model, 16), _rates(1e-3, 1e-3), {"bottleneck": 16}
    ),
    ("adapters", "pfeiffer"): Method(
        _ADAPTERS,
        lambda solution, model, instruction: solution.add_adapters(model, 32, ("mlp",)),
        _rates(1e-3, 1e-3),
        {"bottleneck": 32},
    ),
    ("lora", "rank_8"): _lora_of(8, 16.0, guess=_rates(1e-3, 3e-3)),
    ("lora", "rank_64"): _lora_of(64, 16.0, guess=_rates(3e-3, 3e-3)),
    ("lora", "rank_64_rslora"): _lora_of(64, 128.0, guess=_rates(3e-4, 1e-3)),
    ("lora", "dora"): _lora_of(8, 16.0, variant="dora", guess=_rates(1e-3, 3e-3)),
    ("lora", "pissa"): _lora_of(8, 16.0, variant="pissa", guess=_rates(3e-4, 3e-4)),
    ("lora", "lora_plus"): _lora_of(
        8,
        16.0,
        guess=_rates(3e-4, 1e-3),
        groups=lambda solution, model, learning_rate: solution.loraplus_groups(model, learning_rate, ratio=LORA_PLUS_RATIO),
    ),
    ("lora", "attention"): _lora_of(21, 42.0, ATTENTION, guess=_rates(1e-3, 3e-3)),
    ("lora", "mlp"): _lora_of(12, 24.0, MLP, guess=_rates(1e-3, 3e-3)),
    ("lora", "rank_1"): _lora_of(1, 2.0, guess=_rates(3e-3, 3e-3)),
}
"""Every method that is compared, by its name and variant; the standard form comes first."""


@dataclass
class Comparison:
    """Where rows are kept, and what the runs share."""

    folder: Path = results.SHIPPED
    seeds: tuple[int, ...] = SEEDS

    def measure(self, name: str, variant: str, task_name: str) -> None:
        """Run the sweep for one method and task, then the other seeds at the best rate; see this module's docstring."""
        position = LADDER.index(METHODS[name, variant].guess[task_name])
        wanted = [(LADDER[near], 0) for near in (position - 1, position, position + 1)]
        while wanted:
            for learning_rate, seed in wanted:
                self.run(name, variant, task_name, learning_rate, seed)
            wanted = self.next_runs(rows(name, task_name, variant, self.folder))

    def next_runs(self, found: list[Row]) -> list[tuple[float, int]]:
        """Return the learning rates and seeds that the rows of one method and task still lack."""
        late = late_losses(found)
        best = min(late, key=lambda rate: mean(late[rate].values()))
        place = LADDER.index(best)
        beside = [(rate, 0) for rate in LADDER[max(0, place - 1) : place + 2] if rate not in late]
        return beside or [(best, seed) for seed in self.seeds if seed not in late[best]]

    def run(self, name: str, variant: str, task_name: str, learning_rate: float, seed: int) -> None:
        """Measure one row, unless it is there."""
        before = rows(name, task_name, variant, self.folder)
        if any((row.settings["learning_rate"], row.settings["seed"]) == (learning_rate, seed) for row in before):
            return
        method = METHODS[name, variant]
        training = TRAINING[task_name] | ({"steps": method.steps} if method.steps else {})
        print(f"{name} {variant or ''} on {task_name}, learning rate {learning_rate:g}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        model, tokenizer = load_smollm2()
        task: Task = getattr(tasks, task_name)(tokenizer)
        base = sum(parameter.numel() for parameter in model.parameters())
        solution = load_reference(method.unit) if method.unit else None
        method.prepare(solution, model, tokenizer.encode(INSTRUCTIONS[task_name]))
        fine_tune(
            model,
            tokenizer,
            task,
            unit=UNIT,
            method=name,
            save=lambda path: method.save(model, path),
            learning_rate=learning_rate,
            seed=seed,
            score_before=self.score_before(name, variant, task_name, seed),
            memory=before[0].memory if before else None,
            total_parameters=base + sum(map(torch.numel, trainable(model).values())) if name == "qlora" else None,
            variant=variant,
            parameter_groups=method.groups(solution, model, learning_rate) if method.groups else None,
            **training,
            **method.described,
        )

    def score_before(self, name: str, variant: str, task_name: str, seed: int) -> float | None:
        """Return the untrained model's score, if a row has it: of the same seed, or any where the start changes nothing."""
        for row in results.load(UNIT, self.folder):
            key = (row.method, row.settings.get("variant", ""))
            same_start = key == (name, variant) and row.settings["seed"] == seed
            unchanged = METHODS[name, variant].keeps_outputs and key in METHODS and METHODS[key].keeps_outputs
            if row.task == task_name and (same_start or unchanged):
                return row.score_before
        return None


def again(name: str, variant: str, task_name: str) -> str:
    """Measure a shipped row once more, the first at the chosen learning rate; return both side by side. Nothing is kept.

    Raises:
        ValueError: if there is no such row.
    """
    shipped = summary(rows(name, task_name, variant)).row
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFTLAB_RESULTS"] = folder
        Comparison(Path(folder)).run(name, variant, task_name, shipped.settings["learning_rate"], shipped.settings["seed"])
        measured = rows(name, task_name, variant, Path(folder))
    return twin_table([(row, shipped) for row in measured])


def chosen(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the methods that the command line names, as `method` or `method:variant`.

    Raises:
        ValueError: for a name that there is not.
    """
    available = {key: method for key, method in METHODS.items() if method.unit in (None, *units())}
    for name in names or [":".join(key).rstrip(":") for key in available]:
        method, _, variant = name.partition(":")
        if (method, variant) not in available:
            raise ValueError(f"there is no {name!r}; there are {', '.join(':'.join(key).rstrip(':') for key in available)}")
        yield method, variant


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.measuring.methods", description="Measure and compare methods.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="such as adapters or prompt_tuning:random; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--folder", type=Path, default=results.SHIPPED, help="where rows are kept (default: the course's own)")
    parser.add_argument("--list", action="store_true", help="only say what has been measured")
    parser.add_argument("--again", action="store_true", help="measure one shipped row of each once more, and print both")
    options = parser.parse_args(arguments)
    try:
        selected = list(chosen(options.methods))
    except ValueError as error:
        parser.error(str(error))
    os.environ["PEFTLAB_RESULTS"] = str(options.folder)
    comparison = Comparison(options.folder)
    for name, variant in selected:
        for task_name in filter(METHODS[name, variant].guess.__contains__, options.tasks):
            if options.again:
                print(again(name, variant, task_name), flush=True)
                continue
            if not options.list:
                comparison.measure(name, variant, task_name)
            found = rows(name, task_name, variant, options.folder)
            print(f"{name:<16}{variant:<12}{task_name:<15}{len(found):>3} rows", end="")
            if found:
                rate = chosen_rate(found)
                scores = [f"{row.score_after:.1%}" for row in found if row.settings["learning_rate"] == rate]
                print(f", learning rate {rate:g}: {', '.join(scores)}", end="")
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
