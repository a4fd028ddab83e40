"""A linear layer whose weight is dealt to the ranks by rows, and gathered for as long as it is needed."""

import torch
import torch.distributed as dist
from torch import nn

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.many_gpus.helpers import in_ranks
from peftlab.distributed import all_gather, reduce_scatter


class GatheredLinear(torch.autograd.Function):
    """x W^T, where every rank has some rows of W: gathers them in forward, and in backward once more."""

    @staticmethod
    def forward(ctx, x, shard):
        """Return x W^T, keeping x and the shard for backward."""
        ctx.save_for_backward(x, shard)
        whole = all_gather(shard)
        return torch.einsum("...i,oi->...o", x, whole)

    @staticmethod
    def backward(ctx, grad_output):
        """Return the gradients of x and of the shard, None for what needs none."""
        x, shard = ctx.saved_tensors
        grad_x, grad_shard = None, None
        if ctx.needs_input_grad[0]:
            again = all_gather(shard)
            grad_x = torch.einsum("...o,oi->...i", grad_output, again)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.einsum("bo,bi->oi", grad_output.flatten(0, -2), x.flatten(0, -2))
            grad_shard = reduce_scatter(grad_weight) / dist.get_world_size()
        return grad_x, grad_shard


class ShardedLinear(nn.Module):
    """A linear layer without bias, of whose weight this rank keeps its rows."""

    def __init__(self, linear):
        super().__init__()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if linear.out_features % world_size != 0:
            raise ValueError(f"{linear.out_features} rows cannot be dealt evenly to {world_size} ranks")
        rows = linear.out_features // world_size
        own = linear.weight.detach()[rank * rows : (rank + 1) * rows].clone()
        self.shard = nn.Parameter(own, requires_grad=linear.weight.requires_grad)

    def forward(self, x):
        return GatheredLinear.apply(x, self.shard)


def sharded_case(
    generator: torch.Generator,
    world_size: int = 2,
    leading: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Return a weight, and for each rank its x and its output's gradient; the whole weight is larger than x and a shard."""
    in_features, out_features = between(generator, 5, 8), world_size * between(generator, 9, 11)
    return {
        "weight": normal(generator, out_features, in_features, dtype=dtype),
        "xs": normal(generator, world_size, *leading, in_features, dtype=dtype),
        "grads": normal(generator, world_size, *leading, out_features, dtype=dtype),
    }


def drive_sharded_linear(GatheredLinear, ShardedLinear, weight, xs, grads):
    """Take a step with a trained and with a frozen layer, with and without a gradient of x, and one without the layer."""
    import gc

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.multiprocessing.reductions import StorageWeakRef

    def linear_of(weight, trained):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight.data = weight.clone()
        linear.weight.requires_grad_(trained)
        return linear

    def gradient(tensor):
        return "none" if tensor.grad is None else tensor.grad

    def step(watch, shard, call, x, *more):
        shard.grad = None
        output = watch.call(call, x, *more)
        seen = {"output": output, "forward": dict(watch.calls)}
        right = isinstance(output, torch.Tensor) and output.shape == grads[dist.get_rank()].shape
        if not watch.agree(right):
            return seen | {"output": output.detach() if isinstance(output, torch.Tensor) else type(output).__name__}
        seen |= {"left": watch.left(x, shard, output), "output": output.detach(), "backward": {}, "left_at_last": 0}
        if watch.agree(output.requires_grad):
            watch.call(output.backward, grads[dist.get_rank()])
            seen["backward"] = dict(watch.calls)
            known = (x, shard, output, grads, x.grad, shard.grad)
            seen["left_at_last"] = watch.left(*(tensor for tensor in known if tensor is not None))
        return seen | {"x": gradient(x), "shard": gradient(shard)}

    def act(watch):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        seen = {"steps": []}
        for trained in (True, False):
            linear = linear_of(weight, trained)
            whole = StorageWeakRef(linear.weight.untyped_storage())
            layer = ShardedLinear(linear)
            del linear
            gc.collect()
            names = [name for name, _ in layer.named_parameters()]
            seen |= {"names": names, "buffers": [name for name, _ in layer.named_buffers()]}
            if not watch.agree(names == ["shard"]):
                return seen
            shard = layer.shard
            seen |= {f"trained {trained}": shard.requires_grad, "freed": whole.expired(), "shard": shard.detach()}
            shape = (weight.shape[0] // world_size, weight.shape[1])
            if not watch.agree(shard.shape == shape and shard.dtype == weight.dtype and shard.requires_grad == trained):
                return seen
            for of_x in (True, False):
                seen["steps"].append(step(watch, shard, layer, xs[rank].clone().requires_grad_(of_x)))
            if trained:
                seen["steps"].append(step(watch, shard, GatheredLinear.apply, xs[rank].clone().requires_grad_(True), shard))
        try:
            ShardedLinear(linear_of(torch.cat([weight, weight[:1]]), True))
            seen["error"] = "nothing"
        except NotImplementedError:
            raise
        except Exception as error:
            seen["error"] = type(error).__name__
        return seen

    return {"ranks": in_ranks(len(xs), act)}


STEPS = (
    "(trained weight, x needs a gradient)",
    "(trained weight, x needs none)",
    "(`GatheredLinear.apply` itself)",
    "(frozen weight, x needs a gradient)",
    "(frozen weight, x needs none)",
)
LEFT = {
    "left": "the bytes that forward leaves besides x, `shard` and the output",
    "left_at_last": "the bytes that backward leaves besides the gradients",
}


def read_sharded_linear(observation: Observation, case: dict) -> Observation:
    """Put the ranks side by side: a value of its own where they differ by right, one for all where they must not."""
    ranks = observation["ranks"]

    def common(values: list) -> object:
        return values[0] if all(value == values[0] for value in values) else values

    read = {
        "the list of the layer's parameters": common([seen["names"] for seen in ranks]),
        "the list of the layer's buffers": common([seen["buffers"] for seen in ranks]),
    }
    for name, field in {
        "`shard` needs a gradient, if the weight did": "trained True",
        "`shard` needs a gradient, if the weight did not": "trained False",
        "nothing is left of the whole weight when the given layer is deleted": "freed",
    }.items():
        if field in ranks[0]:
            read[name] = common([seen[field] for seen in ranks])
    for rank, seen in enumerate(ranks):
        read |= {f"rank {rank}'s `shard`": seen["shard"]} if "shard" in seen else {}
    for number, name in enumerate(STEPS[: len(ranks[0]["steps"])]):
        steps = [seen["steps"][number] for seen in ranks]
        read[f"the collectives called in forward {name}"] = common([step["forward"] for step in steps])
        read |= {f"rank {rank}'s output {name}": step["output"] for rank, step in enumerate(steps)}
        if all("left" in step for step in steps):
            read[f"{LEFT['left']} {name}"] = max(step["left"] for step in steps)
            read[f"the collectives called in backward {name}"] = common([step["backward"] for step in steps])
            for rank, step in enumerate(steps):
                read[f"rank {rank}'s gradient of x {name}"] = step["x"]
                read[f"rank {rank}'s gradient of `shard` {name}"] = step["shard"]
            read[f"{LEFT['left_at_last']} {name}"] = max(step["left_at_last"] for step in steps)
    if "error" in ranks[0]:
        read["the error for a weight that cannot be dealt evenly"] = common([seen["error"] for seen in ranks])
    return read


def sharded_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers, and the bytes of a copy of x and of the shard.

    A dot product of n terms is off by at most n * u * (sum of |terms|), with u = eps / 2 of fp32 for 16-bit numbers, and is
    then rounded once to their dtype. The sum over the ranks and the division round once more for each rank. Two answers differ
    by twice one's error.
    """
    weight, xs, grads = (case[name].double().abs() for name in ("weight", "xs", "grads"))
    world_size, dtype = len(xs), case["weight"].dtype
    rounding = torch.finfo(dtype).eps
    accumulating = min(rounding, torch.finfo(torch.float32).eps)
    rows = xs[0].numel() // xs.shape[-1]
    largest = {
        "output": (xs @ weight.T).max().item() * (weight.shape[1] * accumulating + rounding),
        "gradient of x": (grads @ weight).max().item() * (weight.shape[0] * accumulating + rounding),
        "gradient of `shard`": (grads.flatten(0, -2).T @ xs.flatten(0, -2)).max().item()
        / world_size
        * (rows * accumulating + (world_size + 1) * rounding),
    }
    tolerance = {
        f"rank {rank}'s {what} {name}": bound for rank in range(world_size) for name in STEPS for what, bound in largest.items()
    }
    copies = case["xs"][0].nbytes + case["weight"].nbytes // world_size
    return tolerance | {f"{left} {name}": copies for left in LEFT.values() for name in STEPS}


_SAVE = "ctx.save_for_backward(x, shard)\n        whole = all_gather(shard)"
_SAVED = "x, shard = ctx.saved_tensors"
_AGAIN = "again = all_gather(shard)"
_NEEDS_X = "if ctx.needs_input_grad[0]:"
_NEEDS_SHARD = "if ctx.needs_input_grad[1]:"
_GRAD_X = 'torch.einsum("...o,oi->...i", grad_output, again)'
_GRAD_SHARD = "reduce_scatter(grad_weight) / dist.get_world_size()"
_OWN = "linear.weight.detach()[rank * rows : (rank + 1) * rows].clone()"
_OWN_ROWS = "[dist.get_rank() * len(shard) : (dist.get_rank() + 1) * len(shard)]"
_REFUSE = "if linear.out_features % world_size != 0:"
_PARAMETER = "nn.Parameter(own, requires_grad=linear.weight.requires_grad)"

check_sharded_linear = Exercise(
    spec=[GatheredLinear, ShardedLinear],
    driver=drive_sharded_linear,
    helpers=[in_ranks],
    reading=read_sharded_linear,
    cases=lambda generator: [sharded_case(generator), sharded_case(generator, 3, (4,), torch.bfloat16)],
    tolerance=sharded_tolerance,
    at_most=frozenset(f"{left} {name}" for left in LEFT.values() for name in STEPS),
    mistakes={
        "the gradient of `shard` is the sum over the ranks: the loss is the mean over them, so divide by the world size": {
            _GRAD_SHARD: "reduce_scatter(grad_weight)",
        },
        "the gradient of `shard` is this rank's own, from its own rows of the batch: reduce-scatter adds those of all ranks": {
            _GRAD_SHARD: f"grad_weight{_OWN_ROWS}",
        },
        "the gradient of the whole weight is all-reduced, and then cut: that sends twice what a reduce-scatter sends": {
            "grad_shard = " + _GRAD_SHARD: (
                f"dist.all_reduce(grad_weight)\n            grad_shard = grad_weight{_OWN_ROWS} / dist.get_world_size()"
            ),
        },
        "a frozen weight's gradient is reduced: ask `ctx.needs_input_grad[1]`, and send nothing": {_NEEDS_SHARD: "if True:"},
        "a frozen layer passes no gradient on to x: the layers below it need it, and it takes the weight": {
            _NEEDS_X: "if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:",
        },
        "backward gathers the weight for an x that needs no gradient: ask `ctx.needs_input_grad[0]`": {_NEEDS_X: "if True:"},
        "the gradient of x is divided by the world size: it belongs to this rank's own rows, and nothing is summed in it": {
            _GRAD_X: _GRAD_X + " / dist.get_world_size()",
        },
        "the gradient of x comes from this rank's rows of the weight alone: every row of the whole weight adds to it": {
            _AGAIN: "again = shard",
            _GRAD_X: 'torch.einsum("...o,oi->...i", grad_output[..., dist.get_rank() * len(shard) :][..., : len(shard)], again)',
        },
        "the output has this rank's features only: gather the weight before you multiply": {
            _SAVE: "ctx.save_for_backward(x, shard)\n        whole = shard",
        },
        "x has more than one leading dimension, and the gradient of `shard` allows for one: flatten them into rows": {
            'torch.einsum("bo,bi->oi", grad_output.flatten(0, -2), x.flatten(0, -2))': "grad_output.mT @ x",
        },
        "something keeps the whole weight alive, such as `shard` if it is a view: copy this rank's rows, and keep nothing else": {
            ".clone()": ""
        },
        "the layer keeps the layer that it was given, with the whole weight: keep `shard` alone": {
            _PARAMETER: _PARAMETER + "\n        self.linear = linear",
        },
        "the rows are dealt in turn: rank 0 has the first rows side by side, rank 1 the next ones, and so on": {
            _OWN: "linear.weight.detach()[rank::world_size].clone()",
        },
        "every rank keeps the first rows: which ones are its own depends on its rank": {
            _OWN: "linear.weight.detach()[:rows].clone()",
        },
        "`shard` is trained though the given weight is frozen: take over its requires_grad": {_PARAMETER: "nn.Parameter(own)"},
        "a weight whose rows cannot be dealt evenly is accepted: raise a ValueError": {_REFUSE: "if False:"},
        "the whole weight is kept from forward to backward: keep the shard, and gather the rows again in backward": {
            _SAVE: "whole = all_gather(shard)\n        ctx.save_for_backward(x, whole)",
            _SAVED: "x, again = ctx.saved_tensors",
            _AGAIN: "",
        },
        "backward gathers again, and the whole weight of forward is still there: nothing may refer to it, `ctx` neither": {
            _SAVE: "ctx.save_for_backward(x, shard)\n        whole = ctx.whole = all_gather(shard)",
        },
        "backward keeps the weight that it has gathered: nothing may refer to it when backward has ended": {
            _AGAIN: "again = ctx.whole = GatheredLinear.whole = all_gather(shard)",
        },
        "nothing is returned: the `return` is missing": {'return torch.einsum("...i,oi->...o", x, whole)': "x @ whole.T"},
    },
    variants={
        "torch.distributed itself, into lists": """
            class GatheredLinear(torch.autograd.Function):
                @staticmethod
                def gather(shard):
                    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
                    dist.all_gather(shards, shard.detach())
                    return torch.cat(shards)

                @staticmethod
                def forward(ctx, x, shard):
                    ctx.x, ctx.shard = x.detach(), shard.detach()
                    return nn.functional.linear(x, GatheredLinear.gather(shard))

                @staticmethod
                def backward(ctx, grad_output):
                    needs_x, needs_shard = ctx.needs_input_grad
                    own = None
                    if needs_shard:
                        rows = grad_output.reshape(-1, grad_output.shape[-1]) / dist.get_world_size()
                        whole = rows.mT @ ctx.x.reshape(-1, ctx.x.shape[-1])
                        own = torch.empty_like(ctx.shard)
                        dist.reduce_scatter(own, list(whole.chunk(dist.get_world_size())))
                    return (torch.matmul(grad_output, GatheredLinear.gather(ctx.shard)) if needs_x else None), own

            class ShardedLinear(nn.Module):
                def __init__(self, linear):
                    super().__init__()
                    count = dist.get_world_size()
                    if linear.weight.shape[0] % count:
                        raise ValueError("uneven")
                    rows = linear.weight.data.unflatten(0, (count, -1))[dist.get_rank()]
                    self.register_parameter("shard", nn.Parameter(torch.empty_like(rows)))
                    self.shard.data.copy_(rows)
                    self.shard.requires_grad_(linear.weight.requires_grad)

                def forward(self, x):
                    return GatheredLinear.apply(x, self.shard)
        """,
        "setup_context, and x kept for a trained shard only": """
            class GatheredLinear(torch.autograd.Function):
                @staticmethod
                def forward(x, shard):
                    return (all_gather(shard) @ x.unsqueeze(-1)).squeeze(-1)

                @staticmethod
                def setup_context(ctx, inputs, output):
                    x, shard = inputs
                    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, shard)

                @staticmethod
                def backward(ctx, grad_output):
                    x, shard = ctx.saved_tensors
                    grad_x = grad_shard = None
                    if ctx.needs_input_grad[1]:
                        grad_weight = torch.tensordot(grad_output, x, dims=[list(range(x.dim() - 1))] * 2)
                        grad_shard = reduce_scatter(grad_weight).div_(dist.get_world_size())
                    if ctx.needs_input_grad[0]:
                        grad_x = torch.tensordot(grad_output, all_gather(shard), dims=1)
                    return grad_x, grad_shard

            class ShardedLinear(nn.Module):
                def __init__(self, linear):
                    super().__init__()
                    rows, rest = divmod(linear.out_features, dist.get_world_size())
                    if rest != 0:
                        raise ValueError(rest)
                    with torch.no_grad():
                        self.shard = nn.Parameter(torch.empty(rows, linear.in_features, dtype=linear.weight.dtype))
                        self.shard.copy_(linear.weight[dist.get_rank() * rows :][:rows])
                    self.shard.requires_grad = linear.weight.requires_grad

                def forward(self, x):
                    return GatheredLinear.apply(x, self.shard)
        """,
        "the gradient reduced in fp32": {
            "grad_shard = " + _GRAD_SHARD: (
                "grad_shard = reduce_scatter(grad_weight.to(torch.promote_types(x.dtype, torch.float32)))\n"
                "            grad_shard = (grad_shard / dist.get_world_size()).to(x.dtype)"
            ),
            _OWN: "linear.weight.detach().chunk(world_size)[rank].clone()",
        },
    },
)
