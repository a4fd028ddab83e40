"""One experiment from start to results row: score, measure a step, train, score again, save."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from peftlab import results, settings
from peftlab.llama import causal_loss
from peftlab.memory import StepMemory, measure_training_step
from peftlab.results import Row
from peftlab.tasks import Task, collate, general_text, mean_loss
from peftlab.training import find_device, train, trainable


def fine_tune(
    model: nn.Module,
    tokenizer,
    task: Task,
    *,
    unit: str,
    method: str,
    save: Callable[[Path], None],
    steps: int,
    learning_rate: float,
    batch_size: int = 16,
    seed: int = 0,
    score_before: float | None = None,
    memory: StepMemory | None = None,
    total_parameters: int | None = None,
    parameter_groups: Sequence[dict] | None = None,
    **described: object,
) -> Row:
    """Fine-tune `model` in place on `task`, and return the results row, which is also written to the results folder.

    Args:
        unit, method: as they stand in the row.
        save: writes what was learned to a file, whose size the row reports.
        score_before, memory: the score of the untrained model and the bytes of a step, if they have been measured
            already, with the same settings; else they are measured.
        total_parameters: of the model, where its parameters don't tell: 4-bit weights are buffers. By default they are counted.
        parameter_groups: for the optimizer, as in `peftlab.training.train`; by default there is one.
        described: further settings for the row, such as the rank.
    """
    model.to(find_device())
    steps, batch_size = settings.steps(steps), settings.rows(batch_size)
    general = general_text(tokenizer)
    if score_before is None:
        score_before = task.evaluate(model)
    loss_before = mean_loss(model, general)
    if memory is None:
        device = next(model.parameters()).device
        input_ids, labels = (tensor.to(device) for tensor in collate(list(task.train.select(range(batch_size)))))
        memory = measure_training_step(model, lambda: causal_loss(model, input_ids, labels))
    history = train(
        model,
        task.train,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        parameter_groups=parameter_groups,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learned.safetensors"
        save(path)
        adapter_bytes = path.stat().st_size
    chosen = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    row = Row(
        unit=unit,
        task=task.name,
        method=method,
        settings=chosen | described,
        trainable_parameters=sum(parameter.numel() for parameter in trainable(model).values()),
        total_parameters=total_parameters or sum(parameter.numel() for parameter in model.parameters()),
        adapter_bytes=adapter_bytes,
        memory=memory,
        seconds_per_step=history.seconds_per_step,
        metric=task.metric,
        score_before=score_before,
        score_after=task.evaluate(model),
        forgetting=mean_loss(model, general) - loss_before,
        losses=history.losses,
    )
    results.save(row)
    return row
