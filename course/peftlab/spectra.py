"""Singular values of a model's weights and of a fine-tuning update: measured once, kept in one small file, drawn."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftlab import results, settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "update_spectra.npz"


# ======================================================================================================================
# A picture that is a matrix
# ======================================================================================================================
def picture() -> Tensor:
    """Draw a grey picture and return it as a matrix of 144 × 216 numbers, 0 for black and 1 for white."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Polygon, Rectangle

    figure = Figure(figsize=(3, 2), dpi=72, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 216), ylim=(0, 144))
    axes.axis("off")
    for left in range(10, 82, 12):
        axes.add_patch(Rectangle((left, 12), 6, 50, color="0.35"))
    axes.add_patch(Circle((48, 104), 28, color="0.6"))
    axes.add_patch(Polygon([(104, 12), (204, 12), (154, 62)], color="0.2"))
    axes.text(150, 106, "rank?", fontsize=34, ha="center", va="center", rotation=12, color="0.1")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_raw(buffer)
    pixels = np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(144, 216, 4)
    return torch.tensor(pixels[..., 0] / 255.0, dtype=torch.float32)


def columns_and_rows(matrix: Tensor, count: int, sweeps: int = 200) -> tuple[Tensor, Tensor]:
    """Return `count` columns and as many rows whose products, summed, come as near to `matrix` as any can.

    Found one pair after the other: multiply a row by what is left of the matrix, back and forth, until it no longer
    turns; subtract the product; go on.
    """
    left, columns, rows = matrix.double(), [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        row = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
        for _ in range(sweeps):
            column = left @ row
            column = column / column.norm()
            row = left.T @ column
        columns.append(column)
        rows.append(row)
        left = left - torch.outer(column, row)
    return torch.stack(columns, 1).to(matrix.dtype), torch.stack(rows).to(matrix.dtype)


# ======================================================================================================================
# What is measured on the model
# ======================================================================================================================
@dataclass
class Spectra:
    """What is kept of two full fine-tuning runs that differ in their seed, and of two with LoRA that differ in their rank.

    Attributes:
        weights, updates: singular values, largest first, of every linear layer's weight before training and of its change
            in the first run, by the layer's name.
        directions: for a few layers, the leading right singular vectors of the change in both runs, as columns.
        scores: the score of the model whose linear layers have only the first so many ranks of their change.
        lora_directions: as `directions`, of the products of LoRA's factors of rank 8 and of rank 64.
        described: where and how it was measured.
    """

    weights: dict[str, Tensor]
    updates: dict[str, Tensor]
    directions: dict[str, tuple[Tensor, Tensor]]
    scores: dict[int, float]
    lora_directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    described: dict = field(
        default_factory=lambda: {
            "short": settings.short(),
            "versions": results.package_versions(),
            "hardware": results.describe_hardware(),
        }
    )


def measure_here() -> bool:
    """Whether to fine-tune rather than load: in a short run, and if `PEFTLAB_MEASURE` is set to anything but 0."""
    return settings.short() or os.environ.get("PEFTLAB_MEASURE", "0") not in ("", "0")


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies, on the CPU, of the weights of all linear layers but the head, by the layer's name.

    In a short run, those of the layer in the middle alone.
    """
    found = {
        name.removeprefix("model."): module.weight.detach().cpu().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    return {name: weight for name, weight in found.items() if not settings.short() or name.startswith("layers.15.")}


@torch.no_grad()
def set_linear_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights, named as `linear_weights` names them, into the model."""
    for name, weight in weights.items():
        model.get_submodule(f"model.{name}").weight.copy_(weight)


def save(measured: Spectra, unit: str) -> Path:
    """Write to `<results folder>/<unit>/update_spectra.npz` and return that path.

    Singular values are stored in half precision relative to the largest (2 bytes each, off by at most 0.05%, except
    where they are under a ten-thousandth of it), vectors in half precision.
    """
    import numpy as np

    arrays = {"described": np.array(json.dumps(measured.described))}
    arrays["scores"] = np.array(sorted(measured.scores.items()), dtype=np.float64)
    arrays["names"] = np.array(json.dumps({name: len(sigma) for name, sigma in measured.weights.items()}))
    for kind in ("weights", "updates"):
        spectra = [getattr(measured, kind)[name] for name in measured.weights]
        arrays[f"{kind}/largest"] = torch.stack([sigma[0] for sigma in spectra]).numpy()
        arrays[kind] = torch.cat([sigma / sigma[0] for sigma in spectra]).half().numpy()
    for kind in ("directions", "lora_directions"):
        for name, pair in getattr(measured, kind).items():
            for number, vectors in enumerate(pair):
                arrays[f"{kind}/{name}/{number}"] = vectors.half().numpy()
    path = results.results_folder() / unit / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("unfinished.npz")
    np.savez_compressed(unfinished, **arrays)
    os.replace(unfinished, path)
    return path


def load(unit: str) -> Spectra:
    """Return this reader's own measurement if there is one, else the one that comes with the course.

    What an own measurement has not come to yet, the LoRA runs, is taken from the course's. A short run's file counts in
    short runs only.

    Raises:
        FileNotFoundError: if there is neither.
    """
    own, shipped = (folder / unit / FILE for folder in (results.results_folder(), results.SHIPPED))
    measured = _read(own) if own.is_file() else None
    if measured is None or (measured.described["short"] and not settings.short()):
        if not shipped.is_file():
            raise FileNotFoundError(f"{shipped} is missing: reinstall the course, or measure it again")
        return _read(shipped)
    if not measured.lora_directions and shipped.is_file():
        measured.lora_directions = _read(shipped).lora_directions
    return measured


def _read(path: Path) -> Spectra:
    import numpy as np

    measured = Spectra({}, {}, {}, {})
    with np.load(path) as arrays:
        measured.described = json.loads(str(arrays["described"]))
        measured.scores = {int(rank): score for rank, score in arrays["scores"].tolist()}
        sizes = json.loads(str(arrays["names"]))
        for kind in ("weights", "updates"):
            relative = torch.tensor(arrays[kind]).float().split(list(sizes.values()))
            largest = torch.tensor(arrays[f"{kind}/largest"])
            setattr(measured, kind, dict(zip(sizes, (r * x for r, x in zip(relative, largest)))))
        for key in arrays.files:
            kind, _, name = key.partition("/")
            if kind in ("directions", "lora_directions") and key.endswith("/0"):
                pair = tuple(torch.tensor(arrays[f"{key[:-2]}/{number}"]).float() for number in (0, 1))
                getattr(measured, kind)[name.removesuffix("/0")] = pair
    return measured


# ======================================================================================================================
# Figures
# ======================================================================================================================
def gallery(images: Mapping[str, Tensor], title: str) -> "Figure":
    """Draw grey pictures side by side, each under its name."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images), figsize=(2.5 * len(images), 2.3), squeeze=False)
    for panel, (name, image) in zip(axes[0], images.items(), strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=1)
        panel.set_title(name, fontsize=9)
        panel.set(xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def decay(spectra: Mapping[str, Tensor], title: str) -> "Figure":
    """Draw singular values, relative to the largest of each spectrum, over their number, on a logarithmic scale."""
    import matplotlib.pyplot as plt

    from peftlab.plots import SERIES

    figure, axes = plt.subplots(figsize=(7, 3.2))
    for number, (name, sigma) in enumerate(spectra.items()):
        axes.plot(range(1, len(sigma) + 1), sigma / sigma[0], color=SERIES[number], label=name)
    axes.set(title=title, xlabel="number of the singular value", ylabel="share of the largest", yscale="log", ylim=(1e-4, 1.3))
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes.grid(alpha=0.3)
    return figure


def by_layer(ranks: Mapping[str, Mapping[int, float]], title: str, ylabel: str) -> "Figure":
    """Draw a figure for every decoder layer, one line a kind of matrix."""
    import matplotlib.pyplot as plt

    from peftlab.plots import MARKERS, SERIES

    figure, axes = plt.subplots(figsize=(7, 3.2))
    for number, (name, values) in enumerate(ranks.items()):
        colour, marker = (*SERIES, "#000000")[number % 7], (*MARKERS, "X")[number % 7]
        axes.plot(list(values), list(values.values()), color=colour, marker=marker, markersize=4, label=name)
    axes.set(title=title, xlabel="decoder layer", ylabel=ylabel, ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes.grid(alpha=0.3)
    return figure


def overlap_maps(maps: Mapping[str, Tensor], title: str, xlabel: str, ylabel: str) -> "Figure":
    """Draw overlaps between 0 and 1 as colours, one panel a matrix; rows are i, columns j, both counted from 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(maps), figsize=(2.6 * len(maps) + 0.8, 2.6), squeeze=False, layout="constrained")
    for panel, (name, values) in zip(axes[0], maps.items(), strict=True):
        rows, columns = values.shape
        extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
        drawn = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
        panel.set_title(name, fontsize=9)
        panel.set(xlabel=xlabel, ylabel=ylabel if name == next(iter(maps)) else None)
    figure.colorbar(drawn, ax=axes[0].tolist(), label="overlap")
    figure.suptitle(title)
    return figure
