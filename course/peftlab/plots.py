"""The figures: memory by category, loss curves, scores before and after, a sweep.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every figure has its own white ground, so that
it reads in a dark theme too; `show` puts it on the page with alt text.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from peftlab import comparison
from peftlab.comparison import chosen_rate, late_loss, sweep_rows
from peftlab.memory import BYTES_IN, Moment, StepMemory
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
    from IPython.display import display  # only a notebook has it: a bare GPU machine measures without

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    # Twice: JupyterLab takes alt text from HTML only, and where HTML is cleaned of data, as in feedback, the image remains.
    html = f'<img src="data:image/png;base64,{image}" alt="{escape(alt)}" style="max-width: 100%">'
    display({"image/png": image, "text/html": html, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def memory_bars(
    steps: Mapping[str, StepMemory], title: str, unit: str = "MiB", card: tuple[str, float] | None = None
) -> Figure:
    """Draw one stacked bar a training step, by category, its measured peak as a line across.

    Args:
        unit: of the axis, one of `peftlab.memory.BYTES_IN`.
        card: a GPU's name and its bytes, to be drawn as a line that the peaks should not cross.
    """
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(steps) + 1.6), layout="constrained")
    for position, step in enumerate(steps.values()):
        left = 0.0
        for category in ("parameters", "gradients", "optimizer_state", "activations"):
            size = getattr(step, category) / BYTES_IN[unit]
            axes.barh(position, size, left=left, color=COLOURS[category], label=_once(category.replace("_", " "), position))
            left += size
        peak = step.peak / BYTES_IN[unit]
        axes.plot([peak, peak], [position - 0.4, position + 0.4], color=COLOURS["peak"], label=_once("peak", position))
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        axes.annotate(
            f"{peak:,.0f}", (peak, position), (5, 0), textcoords="offset points", va="center", fontsize=9, bbox=ground
        )
    if card:
        axes.axvline(card[1] / BYTES_IN[unit], color="black", linestyle="--", label=card[0])
    axes.set_yticks(range(len(steps)), list(steps))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.margins(x=0.12)
    figure.legend(ncols=6 if card else 5, fontsize=8, frameon=False, loc="outside lower center")
    return figure


def memory_over_time(steps: Mapping[str, Sequence[Moment]], title: str, unit: str = "MiB") -> Figure:
    """Draw the bytes that are alive after each operation of a training step, stacked by category, a panel a step.

    Args:
        steps: what `peftlab.memory.memory_over_time` returns, by the panel's title.
        unit: of the axis, one of `peftlab.memory.BYTES_IN`.
    """
    figure, panels = plt.subplots(1, len(steps), figsize=(8.5, 3.4), sharey=True, squeeze=False, layout="constrained")
    categories = ("parameters", "optimizer_state", "gradients", "activations")
    for axes, (name, moments) in zip(panels[0], steps.items()):
        sizes = [[getattr(moment, category) / BYTES_IN[unit] for moment in moments] for category in categories]
        labels = [category.replace("_", " ") for category in categories]
        colours = [COLOURS[category] for category in categories]
        layers = axes.stackplot(range(len(moments)), sizes, colors=colours, labels=labels, linewidth=0)
        phases = [moment.phase for moment in moments]
        for phase in dict.fromkeys(phases):
            first, count = phases.index(phase), phases.count(phase)
            axes.axvline(first, color="black", linewidth=0.8, linestyle=":")
            place = (first + 0.98 * count, "right") if phase == phases[-1] else (first + count / 2, "center")
            axes.annotate(phase, (place[0], 0.97), xycoords=("data", "axes fraction"), ha=place[1], va="top", fontsize=8)
        axes.set(title=name, xlabel="operations, one after the other", xlim=(0, len(moments) - 1))
        axes.margins(y=0.15)
    panels[0][0].set_ylabel(unit)
    figure.suptitle(title)
    figure.legend(handles=layers, ncols=4, fontsize=8, frameon=False, loc="outside lower center")
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


def by_setting(lines: Mapping[str, Mapping[int | float, float]], title: str, xlabel: str, ylabel: str) -> Figure:
    """Draw a measured quantity against a setting that doubles from point to point, a line for each name."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(list(points), list(points.values()), color=SERIES[number], marker=MARKERS[number], label=name)
    places = sorted({place for points in lines.values() for place in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def learning_rate_sweep(measured: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """Draw, for one or several methods, late loss and score against the learning rate; a ring marks the rate that is chosen.

    The lines join the runs of the sweep, with seed 0; other seeds are small marks without a line.

    Args:
        measured: rows of one task, by the name that the legend shows for their method.
    """
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    losses, scores = panels
    for number, (name, rows) in enumerate(measured.items()):
        style = {"color": SERIES[number], "marker": MARKERS[number]}
        for axes, quantity in zip(panels, (late_loss, lambda row: 100 * row.score_after)):
            swept = {row.settings["learning_rate"]: quantity(row) for row in sweep_rows(rows)}
            axes.plot(*zip(*sorted(swept.items())), label=name, markersize=5, **style)
            # All runs, also those of the sweep, whose own marks hide these.
            runs = [(row.settings["learning_rate"], quantity(row)) for row in rows]
            axes.plot(*zip(*runs), linestyle="none", markersize=3, alpha=0.6, **style)
            best = chosen_rate(rows)
            axes.scatter(best, swept[best], s=140, facecolor="none", edgecolor=SERIES[number])
    losses.set(xlabel="learning rate", ylabel="late loss (nats per label)", yscale="log")
    losses.margins(y=0.1)
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    losses.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    scores.set(xlabel="learning rate", ylabel="score (%)", ylim=(0, 105))
    rates = sorted({row.settings["learning_rate"] for rows in measured.values() for row in rows})
    powers = [rate for rate in rates if math.isclose(math.log10(rate) % 1, 0, abs_tol=1e-6)]
    shown = powers if len(rates) > 6 and powers else rates  # there is room for about six
    for axes in (losses, scores):
        axes.set_xscale("log")
        axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def guesses(times: Mapping[str, float]) -> Figure:
    """Draw by how much guesses missed, one dot each; the grey band is a factor of two.

    Args:
        times: a guess over what was measured, above zero, by what was guessed.
    """
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(times) + 1.3), layout="constrained")
    axes.axvspan(0.5, 2, color="#DDDDDD")
    axes.axvline(1, color="black", linewidth=1)
    axes.plot(list(times.values()), range(len(times)), "o", color=SERIES[0])
    farthest = max(4.0, *(max(each, 1 / each) for each in times.values())) * 1.2
    axes.set(xscale="log", xlim=(1 / farthest, farthest), ylim=(len(times) - 0.4, -0.6))
    axes.set(title="Guesses", xlabel="times what was measured")
    axes.set_yticks(range(len(times)), times, fontsize=8)
    doublings = range(1, int(math.log2(farthest)) + 1)
    axes.set_xticks([2.0**-each for each in doublings] + [1] + [2.0**each for each in doublings])
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="x", alpha=0.3)
    return figure


def pareto(
    points: Mapping[str, tuple[float, float, float]], front: Iterable[str], title: str, xlabel: str, ylabel: str
) -> Figure:
    """Draw score against cost, with the noise of each score as a bar; what is on the front is filled, and joined by a line.

    Args:
        points: cost, score and its noise, by name; what is NaN is left out.
        front: names of those that nothing beats.
    """
    figure, axes = plt.subplots(figsize=(8, 3.4))
    front = set(front)
    drawn = {name: point for name, point in points.items() if not any(map(math.isnan, point[:2]))}
    steps = sorted(point[:2] for name, point in drawn.items() if name in front)
    axes.step([cost for cost, _ in steps], [score for _, score in steps], where="post", color="#999999", linewidth=1, zorder=1)
    for number, (name, (cost, score, noise)) in enumerate(drawn.items()):
        turn, place = divmod(number, len(SERIES))
        style = {"color": SERIES[place], "marker": MARKERS[(place + turn) % len(MARKERS)], "markersize": 8, "capsize": 3}
        filled = SERIES[place] if name in front else "white"
        axes.errorbar(cost, score, yerr=noise, linestyle="none", markerfacecolor=filled, label=name, **style)
    costs = [cost for cost, _, _ in drawn.values()]
    if costs and max(costs) > 2 * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 100 * min(costs) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.1, y=0.1)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _once(label: str, position: int) -> str | None:
    """Name a colour only where it appears first, so that the legend lists it once."""
    return label if position == 0 else None


def show_comparison(compared: Mapping[str, tuple[str, str]], method: str) -> dict[tuple[str, str], list[Row]]:
    """Show the learning-rate sweeps of several methods, a picture for each task, and print what the chosen rates gave.

    Args:
        compared: as for `comparison.select`.
        method: the one whose sweep is printed in figures as well.

    Returns:
        the rows, as `comparison.select` returns them.
    """
    shipped = _pictures(compared, "The learning rate", comparison.TASKS)
    print(comparison.HOW_TO_READ)
    print("\nThe sweep:")
    print(comparison.sweep_table({key: found for key, found in shipped.items() if found[0].method == method}))
    print("\nThe chosen rates, scores averaged over their seeds:")
    print(comparison.score_table(shipped))
    print("\nOne training step, in MiB:")
    print(comparison.memory_table(shipped))
    return shipped


def show_sweeps(
    compared: Mapping[str, tuple[str, str]], title: str, tasks: Sequence[str] = comparison.TASKS
) -> dict[tuple[str, str], list[Row]]:
    """Show the learning-rate sweeps of several settings, a picture for each task, and print their late losses.

    Args:
        compared: as for `comparison.select`.
        tasks: those that are shown.

    Returns:
        the rows, as `comparison.select` returns them.
    """
    shipped = _pictures(compared, title, tasks)
    print(comparison.late_table(shipped))
    return shipped


def _pictures(compared: Mapping[str, tuple[str, str]], title: str, tasks: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """Draw a picture of the sweeps for each task; return the rows."""
    shipped = comparison.select(compared, tasks=tasks)
    for task in tasks:
        by_name = comparison.on_task(shipped, task)
        if by_name:
            figure = learning_rate_sweep(by_name, f"{title}, on {task}")
            alt = f"Loss and score on {task} against the learning rate, with rings at the chosen rates: {'; '.join(by_name)}."
            show(figure, alt=alt)
    return shipped
