"""The figures: memory by category, loss curves, scores before and after, a sweep.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every figure has its own white ground, so that
it reads in a dark theme too; `show` puts it on the page with alt text.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

from peftlab.memory import MEBIBYTE, StepMemory
from peftlab.results import Row

COLOURS = {
    "parameters": "#0072B2",
    "gradients": "#E69F00",
    "optimizer_state": "#CC79A7",
    "activations": "#009E73",
    "peak": "#000000",
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"


def show(figure: Figure, alt: str) -> None:
    """Display the figure as an image that a screen reader describes with `alt`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    display(Image(buffer.getvalue(), format="png", alt=alt))


def memory_bars(steps: Mapping[str, StepMemory], title: str) -> Figure:
    """Draw one stacked bar a training step, in MiB by category, its measured peak as a line across."""
    figure, axes = plt.subplots(figsize=(7, 0.7 * len(steps) + 1.4))
    for position, step in enumerate(steps.values()):
        left = 0.0
        for category in ("parameters", "gradients", "optimizer_state", "activations"):
            size = getattr(step, category) / MEBIBYTE
            axes.barh(position, size, left=left, color=COLOURS[category], label=_once(category.replace("_", " "), position))
            left += size
        peak = step.peak / MEBIBYTE
        axes.plot([peak, peak], [position - 0.4, position + 0.4], color=COLOURS["peak"], label=_once("peak", position))
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        axes.annotate(
            f"{peak:,.0f}", (peak, position), (5, 0), textcoords="offset points", va="center", fontsize=9, bbox=ground
        )
    axes.set_yticks(range(len(steps)), list(steps))
    axes.invert_yaxis()
    axes.set(title=title, xlabel="MiB")
    axes.margins(x=0.12)
    axes.legend(ncols=5, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.1 / len(steps)))
    return figure


def loss_curves(losses: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw the training loss, in nats per label, of one or several runs over their steps."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for number, (name, values) in enumerate(losses.items()):
        axes.plot(range(1, len(values) + 1), values, color=SERIES[number], marker=MARKERS[number], markersize=3, label=name)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per label)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def before_after(rows: Sequence[Row], title: str) -> Figure:
    """Draw each experiment's score before and after training as two bars, in percent."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for position, row in enumerate(rows):
        for offset, score, name, colour in (
            (-0.2, row.score_before, "before", "#999999"),
            (0.2, row.score_after, "after", SERIES[0]),
        ):
            axes.bar(position + offset, 100 * score, width=0.38, color=colour, label=_once(name, position))
            axes.annotate(f"{100 * score:.0f}", (position + offset, 100 * score), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(rows)), [f"{row.task}\n{row.method}" for row in rows])
    axes.set(title=title, ylabel="score (%)", ylim=(0, 112))
    axes.legend(frameon=False, ncols=2)
    return figure


def sweep(points: Mapping[int | float, float], title: str, xlabel: str, ylabel: str) -> Figure:
    """Draw a measured quantity against a setting that doubles from point to point."""
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(list(points), list(points.values()), color=SERIES[0], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [str(point) for point in points])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def _once(label: str, position: int) -> str | None:
    """Name a colour only where it appears first, so that the legend lists it once."""
    return label if position == 0 else None
