"""What unit 13 measures: seconds and bytes of serving many adapters, scores of combined ones; a line of JSON for each row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from peftlab import results, settings
from peftlab.llama import KeyValueCache, Llama
from peftlab.training import seconds_of


@dataclass(frozen=True)
class Served:
    """One way of serving a batch, measured.

    Attributes:
        way: such as "gathered".
        base: what the base's weights are stored in, such as "fp32".
        adapters: how many different ones the batch names; its rows share them evenly.
        batch: rows, of which each gets one token.
        rank: of every adapter.
        seconds: of one step of the whole batch, the fastest of several.
        bytes: of all weights and factors that have to be in memory.
        hardware, versions: where it was measured.
        short: True for a short run, whose figures mean nothing.
    """

    way: str
    base: str
    adapters: int
    batch: int
    rank: int
    seconds: float
    bytes: int
    hardware: str = field(default_factory=results.describe_hardware)
    versions: dict = field(default_factory=results.package_versions)
    short: bool = field(default_factory=settings.short)

    @property
    def tokens_per_second(self) -> float:
        """Each row of the batch gets one token a step."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Combined:
    """One adapter made of two, scored on the tasks of both.

    Attributes:
        way: how it was made.
        rank: of the result.
        scores: by task, between 0 and 1.
        examples: how many were scored, by task.
        distance: of its product from the sum of the two products, relative to that sum in the Frobenius norm, mean over layers.
        hardware, versions, short: as in `Served`.
    """

    way: str
    rank: int
    scores: dict[str, float]
    examples: dict[str, int]
    distance: float
    hardware: str = field(default_factory=results.describe_hardware)
    versions: dict = field(default_factory=results.package_versions)
    short: bool = field(default_factory=settings.short)


FILES = {Served: "serving.jsonl", Combined: "combined.jsonl"}
"""Where rows of each kind are kept."""


def decoding_step(model: Llama, batch: int, context: int = 64) -> Callable[..., Tensor]:
    """Return a function that computes the logits of one new token for each row, after `context` tokens that are in the cache.

    Each call starts from the same cache. The function takes a slice of the rows, by default all of them.
    """
    device, dtype = next(model.parameters()).device, model.model.norm.weight.dtype
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    kept = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tokens: Int[Tensor, "batch 1"] = torch.arange(batch, device=device)[:, None] % config.vocab_size
    mask = torch.ones(batch, context + 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def step(rows: slice = slice(None)) -> Tensor:
        caches = [KeyValueCache() for _ in model.model.layers]
        for cache in caches:
            cache.extend(kept[rows], kept[rows])
        positions = torch.tensor([context], device=device)
        hidden = model.model.run_layers(model.model.embed_tokens(tokens[rows]), mask[rows], positions, caches)
        return model.lm_head(hidden[:, -1])

    return step


def seconds_in_turn(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Return the fastest of some runs of each way, in seconds. The ways take turns, so that a busy machine slows all alike."""
    taken = [{name: seconds_of(work, device) for name, work in ways.items()} for _ in range(settings.steps(rounds))]
    return {name: min(seconds[name] for seconds in taken) for name in ways}


def save(rows: Sequence[Served | Combined], unit: str) -> Path:
    """Write rows of one kind to their file in `<results folder>/<unit>`, in place of those of an earlier run."""
    return results.save_lines(rows, unit, FILES[type(rows[0])])


def load(kind: type, unit: str, folder: Path | None = None) -> list:
    """Return the rows of one kind, of this reader's last run or of `folder`; an empty list if there are none."""
    return results.load_lines(kind, unit, FILES[kind], folder)
