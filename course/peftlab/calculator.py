"""What will it take? Model, recipe, batch, length and GPU in; measured bytes out, as a picture, with controls."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from peftlab import plots
from peftlab.llama import PRESETS
from peftlab.memory import StepMemory
from peftlab.simulate import RECIPES, recipe_with

GIGABYTE = 1e9
SOLD = {"T4, 16 GB": 16, "RTX 4090, 24 GB": 24, "A100, 40 GB": 40, "H100, 80 GB": 80, "8 x H100, 640 GB": 640}
GPUS = {name: size * 2**30 for name, size in SOLD.items()}
"""Memory in bytes. A card's GB are 2^30 bytes: an H100 of 80 GB reports 85.0e9 (`peftlab.gpu`), the driver's share taken off.
Eight GPUs are taken for one large one: no sharding is perfect."""


def needs(
    model: str = "LLaMA-7B",
    recipe: str = "LoRA",
    batch_size: int = 1,
    sequence_length: int = 512,
    checkpointing: bool = True,
    rank: int = 16,
) -> StepMemory:
    """Return the bytes of a training step, measured with fake tensors.

    Raises:
        ValueError: if the model or the recipe is not known, or a size is not positive.
    """
    if model not in PRESETS:
        raise ValueError(f"unknown model {model!r}: choose one of {', '.join(PRESETS)}")
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    return recipe_with(recipe, rank).measure(
        PRESETS[model], batch_size=batch_size, sequence_length=sequence_length, checkpointing=checkpointing
    )


def picture(memory: StepMemory, gpu: str, title: str) -> Figure:
    """Draw a step's bytes as one bar, in GB by category, and the GPU's memory as a line."""
    figure, axes = plt.subplots(figsize=(8, 2.2))
    left = 0.0
    for category in ("parameters", "gradients", "optimizer_state", "activations"):
        size = getattr(memory, category) / GIGABYTE
        label = f"{category.replace('_', ' ')} {size:,.1f} GB"
        axes.barh(0, size, left=left, color=plots.COLOURS[category], label=label)
        left += size
    peak = memory.peak / GIGABYTE
    axes.plot([peak, peak], [-0.45, 0.45], color=plots.COLOURS["peak"], linewidth=2, label=f"peak {peak:,.1f} GB")
    axes.axvline(GPUS[gpu] / GIGABYTE, color="#D55E00", linestyle="--", label=gpu)
    verdict = "fits" if memory.peak <= GPUS[gpu] else "does not fit"
    axes.set(title=f"{title}: {verdict}", xlabel="GB", yticks=[], xlim=(0, 1.08 * max(peak, left, GPUS[gpu] / GIGABYTE)))
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return figure


def calculator() -> None:
    """Show the calculator: with controls if ipywidgets is installed, else the picture of one choice."""
    try:
        import ipywidgets
    except ImportError:
        _draw("LLaMA-7B", "LoRA", 1, 512, True, "RTX 4090, 24 GB")
        print("Install ipywidgets for controls: pip install ipywidgets")
        return
    shown = {"style": {"description_width": "9em"}, "layout": {"width": "28em"}}
    steps = shown | {"continuous_update": False}
    ipywidgets.interact(
        _draw,
        model=ipywidgets.Dropdown(
            description="model", options=[name for name in PRESETS if name != "tiny"], value="LLaMA-7B", **shown
        ),
        recipe=ipywidgets.Dropdown(description="recipe", options=list(RECIPES), value="LoRA", **shown),
        batch_size=ipywidgets.SelectionSlider(description="batch size", options=[1, 2, 4, 8, 16, 32], **steps),
        sequence_length=ipywidgets.SelectionSlider(
            description="sequence length", options=[128, 256, 512, 1024, 2048, 4096, 8192], value=512, **steps
        ),
        checkpointing=ipywidgets.Checkbox(description="checkpointing", value=True, **shown),
        gpu=ipywidgets.Dropdown(description="GPU", options=list(GPUS), value="RTX 4090, 24 GB", **shown),
    )


def _draw(model: str, recipe: str, batch_size: int, sequence_length: int, checkpointing: bool, gpu: str) -> None:
    memory = needs(model, recipe, batch_size, sequence_length, checkpointing)
    verdict = "fits" if memory.peak <= GPUS[gpu] else "does not fit"
    title = f"{model}, {recipe}, {batch_size} x {sequence_length} tokens"
    plots.show(
        picture(memory, gpu, title),
        alt=f"{title} needs {memory.peak / GIGABYTE:,.1f} GB at its peak and {verdict} on {gpu}.",
    )
