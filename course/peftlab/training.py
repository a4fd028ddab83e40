"""One plain fine-tuning loop, and an experiment around it: score, measure a step, train, score again, save a row.

Only what requires a gradient is trained, so the same loop serves every method.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from peftlab import results, settings
from peftlab.llama import causal_loss, set_gradient_checkpointing
from peftlab.memory import StepMemory, measure_training_step
from peftlab.results import Row
from peftlab.tasks import Task, collate, general_text, mean_loss

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class History:
    """What one training run recorded: the loss, in nats per label, and the seconds of every optimizer step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """The median time of a step: one slow step, on a busy machine, does not move it."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2] if ordered else float("nan")


def find_device() -> torch.device:
    """Return the device that the environment variable `PEFTLAB_DEVICE` names; by default CUDA if it is there, else the CPU.

    Apple's MPS is taken only if it is named: bytes by category cannot be measured there, and most experiments measure them.

    Raises:
        ValueError: if `PEFTLAB_DEVICE` is no device.
    """
    wanted = os.environ.get("PEFTLAB_DEVICE")
    try:
        return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"PEFTLAB_DEVICE is {wanted!r}: name a device of PyTorch's, such as cpu, cuda, cuda:1 or mps"
        ) from None


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which products are fast and safe: bf16 on a GPU that computes in it, else fp32.

    CUDA computes in bf16 from compute capability 8.0 on. A T4 has 7.5: PyTorch emulates bf16 there and has none of its fast
    attention kernels for it, although `torch.cuda.is_bf16_supported` says True. Most CPUs are slow in 16 bits.
    """
    on_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if on_ampere else torch.float32


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a piece of work takes on the device, in seconds.

    A GPU works on while Python goes on. So the clock starts when the device has finished what it was given before, and stops
    when it has finished this.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(
    model: nn.Module,
    dataset: "Dataset",
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 16,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    parameter_groups: Sequence[dict] | None = None,
) -> History:
    """Fine-tune the trainable parameters of `model` in place, with AdamW and a one-cycle learning rate.

    Args:
        dataset: rows with `input_ids` and `labels`, as `peftlab.tasks` makes them.
        steps: optimizer steps (fewer in a short run, see `peftlab.settings`; so are the rows of a batch).
        learning_rate: the peak, reached after a third of the steps.
        batch_size: rows whose gradients one optimizer step averages.
        accumulate: how many parts a batch is split into; one part after the other goes through the model, so
            activations shrink and the result is the same.
        gradient_checkpointing: keep only each decoder layer's input, and compute the layer again in backward.
        seed: fixes the order of the rows, and dropout if there is any.
        device: where to train; by default the GPU if there is one. The model stays there.
        checkpoint: a file to save to every `checkpoint_every` steps and at the end. If it exists, training goes on
            from there and ends as an undisturbed run would have: to the bit on a CPU, up to rounding on a GPU, whose
            fast attention kernels add in no fixed order.
        parameter_groups: as an optimizer takes them, each with a peak rate `lr` of its own; by default there is one, with
            every trainable parameter and `learning_rate`.

    Raises:
        ValueError: if nothing is trainable, `accumulate` does not divide the batch, the dataset is smaller than a
            batch, or `checkpoint` is broken or comes from other settings.
    """
    parameters = trainable(model)
    if not parameters:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    if batch_size % accumulate:
        raise ValueError(f"batch_size {batch_size} does not split into accumulate={accumulate} equal parts")
    device = torch.device(device) if device else find_device()
    steps, batch_size = settings.steps(steps), settings.rows(batch_size)
    torch.manual_seed(seed)
    model.to(device).train()
    set_gradient_checkpointing(model, gradient_checkpointing)

    groups = parameter_groups or [{"params": list(parameters.values()), "lr": learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(steps, 2), cycle_momentum=False)
    run = _Run(parameters, optimizer, schedule, History())
    identity = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    done = run.resume(Path(checkpoint), identity) if checkpoint and Path(checkpoint).exists() else 0

    batches = _batches(len(dataset), batch_size, seed)
    for _ in range(done):
        next(batches)
    progress = tqdm(range(done, steps), initial=done, total=steps, unit="step", ncols=80, file=sys.stdout)
    for step in progress:
        started = time.perf_counter()
        rows = [dataset[index] for index in next(batches)]
        loss = _backward(model, rows, batch_size // accumulate, device)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.history.losses.append(loss)
        run.history.seconds.append(time.perf_counter() - started)
        progress.set_postfix(loss=f"{loss:.3f}")
        if checkpoint and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
            run.save(Path(checkpoint), identity)
    model.eval()
    return run.history


def _backward(model: nn.Module, rows: list[dict], part_size: int, device: torch.device) -> float:
    """Add the gradient of the batch's mean loss, part by part; return that loss.

    A part counts by its number of labels: the mean over a batch is not the mean of its parts' means when rows have
    answers of different lengths.
    """
    parts = [collate(rows[start : start + part_size]) for start in range(0, len(rows), part_size)]
    labels_in_batch = sum((labels[:, 1:] >= 0).sum().item() for _, labels in parts)
    total = 0.0
    for input_ids, labels in parts:
        share = (labels[:, 1:] >= 0).sum().item() / labels_in_batch
        loss = causal_loss(model, input_ids.to(device), labels.to(device)) * share
        loss.backward()
        total += loss.item()
    return total


def _batches(rows: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row numbers for ever, every epoch in a new order; the order depends on nothing but the seed.

    Rows are not grouped by length, although that would save padding: in `tool_calls` rows of one length ask for one
    tool, and a model that sees one tool a batch forgets the others (measured: 56% exact match instead of 81%).
    """
    generator = random.Random(seed)
    if rows < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many rows, and the dataset has {rows}")
    while True:
        order = generator.sample(range(rows), rows)
        for start in range(0, rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


@dataclass
class _Run:
    """The state of a training run that a checkpoint holds. Frozen weights are not in it: they have not changed."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: History

    def save(self, path: Path, identity: dict) -> None:
        """Write the checkpoint beside `path`, then rename: a run that is stopped here leaves the old one whole."""
        state = {
            "identity": identity,
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": asdict(self.history),
            "random": torch.get_rng_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path, identity: dict) -> int:
        """Take the state from `path` and return how many steps it has behind it."""
        try:
            state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
            saved = state["identity"]
        except Exception as error:
            raise ValueError(f"the checkpoint {path} is broken ({type(error).__name__}); delete it to start again") from None
        names = sorted(self.parameters)
        if saved != identity or sorted(state["parameters"]) != names:
            raise ValueError(
                f"the checkpoint {path} belongs to another run ({saved}, {len(state['parameters'])} trainable tensors), not to "
                f"this one ({identity}, {len(names)} trainable tensors); delete it, or name another file"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                tensor: Tensor = state["parameters"][name]
                if tensor.shape != parameter.shape:
                    raise ValueError(f"the checkpoint {path} holds {name} in another shape; delete it, or name another file")
                parameter.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history.losses[:] = state["history"]["losses"]
        self.history.seconds[:] = state["history"]["seconds"]
        torch.set_rng_state(state["random"])
        return len(self.history.losses)


def twenty_steps(
    parameters: Iterable[Tensor],
    loss: Callable[[Int[Tensor, "4 24"]], Float[Tensor, ""]],
    learning_rate: float = 1e-3,
    device: torch.device | str = "cpu",
    batches: int = 20,
) -> Float[Tensor, "20"]:
    """Take 20 AdamW steps on fixed random tokens below 256; return the losses.

    Two models with the same start must have the same losses, up to rounding: so a unit compares a method with a library.

    Args:
        loss: of one batch of token ids.
        batches: how many different ones there are. With 20 each is new, and there is nothing to learn but which tokens there
            are; with one it is learned by heart, and the loss comes down a long way.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    tokens = torch.randint(0, 256, (batches, 4, 24), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        losses.append(loss(tokens[step % batches]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


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
