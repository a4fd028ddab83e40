"""One experiment, one JSON row: what was done, what it cost, what it brought, on which machine.

The columns are those of peft's `method_comparison`, and every figure in a row was measured.
"""

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from peftlab import settings
from peftlab.memory import StepMemory

SHIPPED = Path(__file__).parent / "measured"
"""The rows that come with the course, one folder a unit."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Row:
    """One experiment.

    Attributes:
        unit: the folder name of the unit that ran it.
        task, method: what was fine-tuned on, and how.
        settings: rank, learning rate, steps, seed: all that it takes to run it again.
        trainable_parameters, total_parameters: counts.
        adapter_bytes: size of the file that holds what was learned; for full fine-tuning, the whole model.
        memory: bytes of one training step.
        seconds_per_step: median over the run.
        metric: what the scores are.
        score_before, score_after: between 0 and 1, on the task's test split.
        forgetting: rise of the loss on general text, in nats per token; negative where it fell.
        losses: training loss of every step.
        versions, hardware: where it was measured.
        short: True for a short run, whose figures mean nothing.
    """

    unit: str
    task: str
    method: str
    settings: dict
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    memory: StepMemory
    seconds_per_step: float
    metric: str
    score_before: float
    score_after: float
    forgetting: float
    losses: list[float]
    versions: dict = field(default_factory=lambda: package_versions())
    hardware: str = field(default_factory=lambda: describe_hardware())
    short: bool = field(default_factory=settings.short)

    @property
    def on_cpu(self) -> bool:
        """Whether a processor measured it: `describe_hardware` names its threads. Bytes of a GPU's step are others."""
        return bool(re.search(r", \d+ threads?$", self.hardware))

    @property
    def name(self) -> str:
        """The row's file name without its ending: the same experiment replaces its earlier row."""
        described = json.dumps([self.settings, self.short], sort_keys=True)
        return f"{self.task}-{self.method}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def results_folder() -> Path:
    """Return where this reader's rows are kept: `PEFTLAB_RESULTS`, or `results` beside the running notebook."""
    return Path(os.environ.get("PEFTLAB_RESULTS") or "results")


def save(row: Row) -> Path:
    """Write the row to `<results folder>/<unit>/<name>.json` and return that path."""
    path = results_folder() / row.unit / f"{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(row), indent=1) + "\n")
    os.replace(unfinished, path)
    return path


def load(unit: str, folder: Path | None = None) -> list[Row]:
    """Return the rows of a unit, from this reader's results folder or from `folder`; an empty list if it has none.

    A file that is no row is left alone and reported with a warning.
    """
    rows = []
    for path in sorted(((folder or results_folder()) / unit).glob("*.json")):
        try:
            fields = json.loads(path.read_text())
            rows.append(_sound(Row(**{**fields, "memory": StepMemory(**fields["memory"])})))
        except (ValueError, TypeError, KeyError) as error:
            warnings.warn(f"{path} is not a results row and is left out ({error})", stacklevel=2)
    return rows


def save_lines(rows: Sequence, unit: str, name: str) -> Path:
    """Write rows of one dataclass to `<results folder>/<unit>/<name>`, a line of JSON each, in place of an earlier run's."""
    path = results_folder() / unit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return path


def load_lines(kind: type, unit: str, name: str, folder: Path | None = None) -> list:
    """Return the rows that `save_lines` wrote, of this reader's last run or of `folder`; an empty list if there are none.

    Args:
        kind: the rows' dataclass.
    """
    path = (folder or results_folder()) / unit / name
    return [kind(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def _sound(row: Row) -> Row:
    """Return a row whose values can be counted with.

    Raises:
        ValueError: if it has every column, but not what belongs there.
    """
    counts = (row.trainable_parameters, row.total_parameters, row.adapter_bytes, *astuple(row.memory))
    figures = (*counts, row.seconds_per_step, row.score_before, row.score_after, row.forgetting)
    if not all(isinstance(figure, int | float) for figure in figures):
        raise ValueError("something else where a number belongs")
    if not (isinstance(row.losses, list) and row.losses and all(isinstance(loss, int | float) for loss in row.losses)):
        raise ValueError("no losses")
    if not isinstance(row.settings, dict) or {"steps", "learning_rate", "seed"} - row.settings.keys():
        raise ValueError("no steps, learning rate or seed among its settings")
    if not 0 <= row.score_after <= 1:
        raise ValueError(f"a score of {row.score_after}")
    return row


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_hardware() -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"
