"""What unit 11 chooses between, and what it answers: options, a job, a recommendation or a refusal."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

ACCESS = ("text", "embeddings", "weights")
"""How far somebody else's model can be reached, from least to most: by sending text; by sending embeddings and getting
gradients back; down to its weights."""


@dataclass(frozen=True)
class Option:
    """A method, and what it costs and brings for one model, sequence length and batch.

    Attributes:
        method: its name.
        access: what it must reach, one of `ACCESS`.
        peak_bytes: of a training step.
        base_bytes: weights that all tasks share when they are served.
        task_bytes: what is kept for each task.
        quality: score as a share of full fine-tuning's; None where it has not been measured.
        spread: two standard errors of the quality, in the same unit.
        latency: added to a forward pass, as a share, if what was learned is not merged.
        mergeable: whether it can be merged into the weights, for one task.
    """

    method: str
    access: str
    peak_bytes: float
    base_bytes: float
    task_bytes: float
    quality: float | None
    spread: float
    latency: float
    mergeable: bool


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what.

    Attributes:
        gpu_bytes: memory that may be used; it does not matter where others run the model.
        access: how far the model can be reached, one of `ACCESS`.
        tasks: how many are served from one GPU at the same time.
        quality: the least score, as a share of full fine-tuning's; 0 demands nothing.
        latency: the most that may be added to a forward pass, as a share; 0 demands that nothing be added.
        prefer: of what is possible: "quality", "memory" (the smallest training step) or "file" (the fewest bytes a task).
        wish: the one method that is asked for, or None.
    """

    gpu_bytes: float
    access: str = "weights"
    tasks: int = 1
    quality: float = 0.0
    latency: float = math.inf
    prefer: str = "quality"
    wish: str | None = None


class Reason(NamedTuple):
    """Why an option is out: the rule that it breaks, the option's figure, and the job's limit."""

    rule: str
    figure: float | str | None
    limit: float | str


@dataclass(frozen=True)
class Recommendation:
    """The method to take, and for every option that is out the first rule that it breaks."""

    method: str
    rejected: Mapping[str, Reason]


@dataclass(frozen=True)
class Refusal:
    """Nothing does all that was asked.

    Attributes:
        rejected: for every option the first rule that it breaks.
        nearest: what to take if these are given up; None if nothing is possible even then.
        given_up: the demands that were taken back, in the order in which they went.
    """

    rejected: Mapping[str, Reason]
    nearest: str | None
    given_up: tuple[str, ...] = ()
