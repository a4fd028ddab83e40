"""`train_step`: one step over micro-batches whose ranks and rows have different numbers of labels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autograder.checking.cases import normal
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import fill
from autograder.checks.many_gpus.helpers import in_ranks
from peftlab.distributed import all_reduce, loss_and_count
from peftlab.llama import IGNORE


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Update the model by the gradient of the mean loss of all labelled tokens; return that mean."""
    world_size = torch.distributed.get_world_size()
    count = all_reduce(torch.tensor(sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches))).item()
    total = torch.tensor(0.0)
    for number, (input_ids, labels) in enumerate(batches):
        is_last = number == len(batches) - 1
        model.set_requires_gradient_sync(is_last)
        loss, _ = loss_and_count(model, input_ids, labels)
        (loss * world_size / count).backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return all_reduce(total).item() / count


def train_case(generator: torch.Generator, world_size: int = 2, micro_batches: int = 3) -> dict:
    """Return the weights of a small Llama, and token ids and labels by rank and micro-batch, of which some are ignored."""
    shape = (world_size, micro_batches, 2, 8)
    input_ids = torch.randint(40, shape, generator=generator)
    share = torch.linspace(0.2, 0.9, world_size * micro_batches)  # of the labels that count: each micro-batch has another
    share = share[torch.randperm(len(share), generator=generator)].view(world_size, micro_batches, 1, 1)
    labels = torch.where(torch.rand(shape, generator=generator) < share, input_ids, IGNORE)
    labels[..., 0, :3] = input_ids[
        ..., 0, :3
    ]  # some labels everywhere, one of them at the first position, which is not counted
    return {"weights": 0.5 * normal(generator, 5_000), "input_ids": input_ids, "labels": labels}


def drive_train_step(train_step, weights, input_ids, labels):
    """Return, of the last rank, what a step gives and sends."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from peftlab.distributed import Traffic
    from peftlab.llama import Llama, LlamaConfig

    def whole(tensors):
        tensors = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        return torch.cat([t.detach().flatten() for t in tensors]) if tensors else torch.zeros(0)

    def act(watch):
        model = Llama(LlamaConfig(40, 8, 12, 1, 2, 1))
        fill(model.requires_grad_(False), weights)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "lm_head" in name)
        mesh = init_device_mesh("cpu", (len(input_ids),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        seen = []

        class Watched(torch.optim.SGD):
            def step(self, *arguments):
                seen.append(whole([parameter.grad for parameter in trained]))
                return super().step(*arguments)

        optimizer = Watched(trained, lr=0.5)
        rank = dist.get_rank()
        batches = list(zip(input_ids[rank].clone(), labels[rank].clone(), strict=True))
        with Traffic() as traffic:
            value = watch.call(train_step, model, optimizer, batches)
        is_number = isinstance(value, (int, float))
        return {
            "what is returned": "a number" if is_number else type(value).__name__,
            "how often the optimizer steps": len(seen),
            "reduce-scatters (the model has two groups with trained parameters)": traffic.calls().get("reduce_scatter", 0),
            "parameters that have a gradient afterwards": sum(p.grad is not None for p in trained),
            "the gradient when the optimizer steps": seen[0] if seen else torch.zeros(0),
            "the mean loss": torch.tensor(float(value) if is_number else float("nan"), dtype=torch.float64),
            "the trained parameters afterwards": whole(trained),
        }

    return in_ranks(len(input_ids), act)[-1]


def step_tolerance(case: dict) -> dict[str, float]:
    """Sums of fewer than a hundred losses of a few nats, in fp32, in any order; a gradient's terms are smaller than one."""
    rounding = 100 * torch.finfo(torch.float32).eps
    return {
        "the gradient when the optimizer steps": rounding,
        "the mean loss": 4 * rounding,
        "the trained parameters afterwards": rounding,
    }


_COUNT = "all_reduce(torch.tensor(sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches))).item()"
_BACKWARD = "        (loss * world_size / count).backward()\n"
_SYNC = "        model.set_requires_gradient_sync(is_last)\n"
_STEP = "    optimizer.step()\n    optimizer.zero_grad()\n"
_RETURN = "all_reduce(total).item() / count"

check_train_step = Exercise(
    spec=[train_step],
    cases=lambda generator: [train_case(generator)],
    driver=drive_train_step,
    helpers=[fill, in_ranks],
    tolerance=step_tolerance,
    mistakes={
        "nothing is returned: return the mean loss": {f"    return {_RETURN}": f"    {_RETURN}"},
        "the loss is divided twice: FSDP has averaged over the ranks already, so multiply by the world size": {
            "loss * world_size / count": "loss / count"
        },
        "the loss is divided by the number of micro-batches as well": {
            "loss * world_size / count": "loss * world_size / count / len(batches)"
        },
        "the means of the micro-batches are averaged: a token in a short one then weighs more. Divide the sum of all by one count": {
            "loss, _ =": "loss, own =",
            "loss * world_size / count": "loss / own / len(batches)",
        },
        "each rank divides by its own count: a token of a rank with few labels then weighs more": {
            "loss * world_size / count": "loss / sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches)"
        },
        "every position is counted: only those with a label have a loss": {
            "(labels[:, 1:] != IGNORE)": "(labels[:, 1:] < 2**60)"
        },
        "the first position is counted as well: nothing predicts it, so its label has no loss": {
            "(labels[:, 1:] != IGNORE)": "(labels != IGNORE)"
        },
        "the gradients are reduced after every micro-batch: once, after the last one, is enough": {_SYNC: ""},
        "the gradients are never reduced: the last micro-batch has to turn it on again": {"sync(is_last)": "sync(False)"},
        "the gradients are reduced after the first micro-batch instead of the last": {"sync(is_last)": "sync(number == 0)"},
        "the optimizer steps after every micro-batch": {
            _SYNC: "",
            _BACKWARD: _BACKWARD + "        optimizer.step()\n        optimizer.zero_grad()\n",
            _STEP: "",
        },
        "a tensor is returned: `.item()` makes a number of it": {f"{_RETURN}": "all_reduce(total) / count"},
        "the parameters still have gradients after the step: `optimizer.zero_grad()` sets them to None": {
            _STEP: "    optimizer.step()\n"
        },
        "this rank's own mean is returned: sum losses over the ranks, too": {
            _RETURN: "total.item() / sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches)"
        },
        "what is returned is multiplied by the world size: that factor is for the gradient only": {
            _RETURN: "all_reduce(total).item() * world_size / count"
        },
    },
    variants={
        "one sum with weights": """
            def train_step(model, optimizer, batches):
                ranks = torch.distributed.get_world_size()
                own = torch.stack([(labels[:, 1:] != IGNORE).sum() for _, labels in batches]).sum()
                everywhere = all_reduce(own)
                losses = []
                *others, last = batches
                model.set_requires_gradient_sync(False)
                for ids, labels in others:
                    losses.append(loss_and_count(model, ids, labels)[0] * ranks / everywhere)
                    losses[-1].backward()
                model.set_requires_gradient_sync(True)
                losses.append(loss_and_count(model, *last)[0] * ranks / everywhere)
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return all_reduce(torch.stack(losses).detach().sum()).item() / ranks
        """,
        "gradients are scaled at the end": """
            def train_step(model, optimizer, batches):
                sums = torch.zeros(2)
                for left, (ids, labels) in zip(reversed(range(len(batches))), batches):
                    model.set_requires_gradient_sync(left == 0)
                    loss, count = loss_and_count(model, ids, labels)
                    loss.backward()
                    sums += torch.tensor([loss.item(), count])
                loss, count = all_reduce(sums).tolist()
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad.mul_(torch.distributed.get_world_size() / count)
                optimizer.step()
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
                return loss / count
        """,
        "torch's all_reduce": """
            def train_step(model, optimizer, batches):
                dist = torch.distributed
                count = torch.tensor(sum((labels[:, 1:] >= 0).sum().item() for _, labels in batches), dtype=torch.float32)
                dist.all_reduce(count)
                mean = 0
                for input_ids, labels in batches:
                    model.set_requires_gradient_sync(labels is batches[-1][1])
                    loss = loss_and_count(model, input_ids, labels)[0] / count
                    mean = mean + loss.detach()
                    (loss * dist.get_world_size()).backward()
                optimizer.step()
                optimizer.zero_grad()
                dist.all_reduce(mean)
                return mean.item()
        """,
    },
)
