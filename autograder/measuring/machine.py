"""What a check on a GPU is given, and what it gives back."""

from dataclasses import dataclass, replace

import torch

from peftlab.llama import PRESETS, LlamaConfig

TINY = LlamaConfig(512, 64, 192, 5, 4, 2)
"""The model of dry runs."""


class SkippedError(Exception):
    """Raised by a check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """What the checks run on.

    Attributes:
        device: a CUDA device, or the CPU in a dry run.
        dry: tiny shapes; figures mean nothing then.
    """

    device: torch.device
    dry: bool

    def smollm2(self, layers: int = 30) -> LlamaConfig:
        """Return SmolLM2's sizes, with so many layers and a small vocabulary; in a dry run a tiny model's."""
        return TINY if self.dry else replace(PRESETS["SmolLM2-135M"], num_hidden_layers=layers, vocab_size=8192)

    @property
    def on_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def free_bytes(self) -> int | None:
        """Return the bytes that the GPU has free; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else None


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        found: figures by name; what a limit names is a number, the rest may be anything that JSON holds.
        limits: the most that a figure may be. What has no limit is for the record.
    """

    found: dict
    limits: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """The names of the figures that are above their limits, or not numbers."""
        return [name for name, most in self.limits.items() if not self.found[name] <= most]
