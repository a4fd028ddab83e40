"""The two pictures of the front page: a step's measured memory by method, and a check that fails.

`autograder.building.build` draws them. Each carries a digest of what it shows and of the code that draws it. So it is drawn
again when one of these has changed, and not because another version of matplotlib sets a letter elsewhere.
"""

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from autograder.checking.failure import CheckFailedError
from autograder.checking.masters import SOLUTIONS
from autograder.checks.lora import check_lora_forward
from peftlab import comparison, plots

ROOT = SOLUTIONS.parent
METHODS = {
    "full fine-tuning": ("full", ""),
    "LoRA, rank 8": ("lora", ""),
    "prompt tuning": ("prompt_tuning", ""),
    "adapters": ("adapters", ""),
    "BitFit": ("bitfit", ""),
    "prefix tuning": ("prefix_tuning", ""),
    "QLoRA, rank 8": ("qlora", ""),
    "last 4 layers": ("layer_freezing", ""),
}


@dataclass(frozen=True)
class Picture:
    """A picture of the front page.

    Attributes:
        shown: what it shows, as text: a change of this is drawn.
        draw: makes the figure.
    """

    shown: Callable[[], str]
    draw: Callable[[], Figure]

    def digest(self) -> str:
        """Return a digest of what is shown and how."""
        return hashlib.sha256((self.shown() + inspect.getsource(self.draw)).encode()).hexdigest()[:16]


def measured() -> dict:
    """Return the bytes of a step of each method on the reviews, from the shipped rows, by the name in the picture."""
    rows = {name: comparison.rows(method, "movie_reviews", variant) for name, (method, variant) in METHODS.items()}
    steps = {name: comparison.summary(found).row.memory for name, found in rows.items()}
    return dict(sorted(steps.items(), key=lambda item: -item[1].peak))


def draw_memory() -> Figure:
    """Draw the measured bytes of a training step by method."""
    return plots.memory_bars(measured(), "Measured bytes of one training step of SmolLM2-135M")


# What a student might write in unit 08: everything is right but the scale.
class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x, with a mistake."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def answer_and_message() -> tuple[str, str]:
    """Return the end of the answer above, and what the check says of it."""
    try:
        check_lora_forward(LoRALinear, seed=0)
    except CheckFailedError as failed:
        return inspect.getsource(LoRALinear.forward).rstrip(), "\n".join(failed._render_traceback_())
    raise AssertionError("the check accepts an answer without the scale")


def draw_failed_check() -> Figure:
    """Draw a cell with the end of the answer, the cell that checks it, and the check's message."""
    answer, message = answer_and_message()
    cells = [
        (f"class LoRALinear(nn.Module):\n    ...\n\n{answer}", "#f5f5f5", "black"),
        ("check_lora_forward(LoRALinear)", "#f5f5f5", "black"),
        (message, "#fdecea", "#7a0016"),
    ]
    heights = [text.count("\n") + 2 for text, _, _ in cells]
    total = sum(heights) + 0.5 * len(cells)
    figure = plt.figure(figsize=(7.2, 0.21 * total))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-total, 0.1))
    axes.axis("off")
    top = 0.0
    for (text, ground, ink), height in zip(cells, heights):
        axes.add_patch(plt.Rectangle((0.005, -top - height), 0.99, height, facecolor=ground, edgecolor="#bbbbbb"))
        axes.text(0.02, -top - height / 2, text, va="center", family="monospace", fontsize=9.5, color=ink, linespacing=1.4)
        top += height + 0.5
    return figure


PICTURES = {
    Path("docs/images/memory.png"): Picture(
        lambda: repr({name: astuple(step) for name, step in measured().items()}), draw_memory
    ),
    Path("docs/images/failed_check.png"): Picture(lambda: repr(answer_and_message()), draw_failed_check),
}


def write() -> None:
    """Draw what is missing or shows something else than it would today."""
    for path in differing():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        picture = PICTURES[path]
        figure = picture.draw()
        metadata = {"Description": picture.digest(), "Software": None}
        figure.savefig(ROOT / path, dpi=110, facecolor="white", bbox_inches="tight", metadata=metadata)
        plt.close(figure)


def differing() -> list[Path]:
    """Return the pictures that are missing, or show something else than they would today."""
    return [path for path, picture in PICTURES.items() if _digest_in(ROOT / path) != picture.digest()]


def _digest_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Description")
