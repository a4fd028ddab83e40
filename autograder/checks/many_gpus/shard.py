"""`shard`: FSDP2's groups on a Llama (Zhao et al. 2023, arXiv 2304.11277)."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from autograder.checking.cases import normal
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import fill
from peftlab.llama import Llama


def shard(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype) -> Llama:
    """Shard a Llama in place, each decoder layer as a group, then what is left; return it."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def shard_case(
    generator: torch.Generator, world_size: int = 2, compute_dtype: str = "bfloat16", tied: bool = False, layers: int = 3
) -> dict:
    """Return the weights of a small Llama of which the query projections are trained, and a row of tokens for each rank."""
    return {
        "weights": 0.1 * normal(generator, 60_000),
        "input_ids": torch.randint(50, (world_size, 1, 9), generator=generator),
        "compute_dtype": compute_dtype,
        "tied": tied,
        "layers": layers,
    }


def drive_shard(shard, weights, input_ids, compute_dtype, tied, layers):
    """Return, of the first rank, what is sharded, what a training step sends, and the loss and gradients of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from peftlab.distributed import Traffic, run
    from peftlab.llama import Llama, LlamaConfig

    def sizes(traffic, collective):
        return sorted(f"{str(m.dtype)[6:]}, {m.size} bytes" for m in traffic.messages if m.collective == collective)

    def in_a_rank():
        model = Llama(LlamaConfig(50, 12, 20, layers, 2, 1, tie_word_embeddings=tied))
        fill(model.requires_grad_(False), weights)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        mesh = init_device_mesh("cpu", (len(input_ids),))
        returned = shard(model, mesh, getattr(torch, compute_dtype))
        parameters = dict(model.named_parameters())
        observation = {
            "the very model is returned": returned is model,
            "parameters that are not sharded": [name for name, p in parameters.items() if not isinstance(p, DTensor)],
            "the shards lie on the mesh that was given": all(
                p.device_mesh is mesh for p in parameters.values() if isinstance(p, DTensor)
            ),
            "the dtype in which the shards are kept": sorted({str(p.dtype)[6:] for p in parameters.values()}),
            "what is trained": [name for name, p in parameters.items() if p.requires_grad],
        }
        with Traffic() as forward:
            try:
                logits = model(input_ids[dist.get_rank()])
            except RuntimeError as error:
                return observation | {"what forward raises": f"{type(error).__name__}: {error}"}
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[dist.get_rank()][0, 1:])
        with Traffic() as backward:
            loss.backward()
        gradients = [parameters[name].grad for name in trained]
        gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients if g is not None]
        observation |= {
            "what forward raises": "nothing",
            "all-gathers in forward": sizes(forward, "all_gather"),
            "all-gathers in backward": sizes(backward, "all_gather"),
            "reduce-scatters in backward": sizes(backward, "reduce_scatter"),
            "the logits' dtype": str(logits.dtype)[6:],
            "this rank's loss": loss.detach(),
            "the gradients": torch.cat([g.float().flatten() for g in gradients]) if gradients else torch.zeros(1),
        }
        return observation

    return run(in_a_rank, len(input_ids), seconds=20)[0]


def shard_tolerance(case: dict) -> dict[str, float]:
    """Answers with the same groups do the same arithmetic: in another order of the ranks' sums, at most."""
    eps = torch.finfo(getattr(torch, case["compute_dtype"])).eps
    return {"this rank's loss": 8 * eps, "the gradients": 8 * eps}


_LAYER = "        fully_shard(layer, mesh=mesh, mp_policy=policy)"
_LAYERS = f"    for layer in model.model.layers:\n{_LAYER}\n"
_ROOT = "    fully_shard(model, mesh=mesh, mp_policy=policy)\n"
_POLICY = "MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)"

check_shard = Exercise(
    spec=[shard],
    cases=lambda generator: [shard_case(generator)],
    driver=drive_shard,
    helpers=[fill],
    tolerance=shard_tolerance,
    mistakes={
        "the model became a group before its layers did, which torch refuses: inner modules first": {
            _LAYERS: "",
            _ROOT: _ROOT + _LAYERS,
        },
        "no mesh is given: FSDP then makes one of its own": {
            _LAYER: "        fully_shard(layer, mp_policy=policy)",
            _ROOT: "    fully_shard(model, mp_policy=policy)\n",
        },
        "the model is not returned: end with `return model`": {"    return model": "    return None"},
        "the model is one group: all its weights are gathered at once. Make every decoder layer a group first": {_LAYERS: ""},
        "what is outside the decoder layers (embedding, norm, head) is not sharded: shard the model, too": {_ROOT: ""},
        "a decoder layer has no group of its own": {"in model.model.layers:": "in model.model.layers[:-1]:"},
        "each linear layer is a group: that makes many small messages. A decoder layer is to be one group": {
            _LAYER: "        for linear in layer.modules():\n            if isinstance(linear, nn.Linear):\n"
            "                fully_shard(linear, mesh=mesh, mp_policy=policy)"
        },
        "attention and MLP are separate groups: a decoder layer is to be one": {
            _LAYER: "        for part in (layer.self_attn, layer.mlp):\n            fully_shard(part, mesh=mesh, mp_policy=policy)"
        },
        "no `param_dtype` is given: the weights travel in fp32, twice as many bytes": {"param_dtype=compute_dtype, ": ""},
        "no `reduce_dtype` is given: gradients are summed in the compute dtype, in which small ones are lost": {
            ", reduce_dtype=torch.float32": ""
        },
        "the shards themselves were converted: leave the parameters in fp32, and give `param_dtype` to the policy": {
            "    policy =": "    model.to(compute_dtype)\n    policy ="
        },
        "the frozen parameters are left out: every rank holds all of them. Shard them, too": {
            _LAYER: "        frozen = {p for p in layer.parameters() if not p.requires_grad}\n"
            "        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=frozen)",
            _ROOT: "    frozen = {p for p in model.parameters() if not p.requires_grad}\n"
            "    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)\n",
        },
        "the weights stay gathered after forward (`reshard_after_forward=False`): then every rank holds all of them": {
            _LAYER: "        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)"
        },
        "the policy is not used for the decoder layers": {_LAYER: "        fully_shard(layer, mesh=mesh)"},
        "the policy is not used for the model's own group": {_ROOT: "    fully_shard(model, mesh=mesh)\n"},
        "everything is trained: leave `requires_grad` as it is": {
            "    return model": "    model.requires_grad_(True)\n    return model"
        },
        "nothing is sharded yet": {_LAYERS: "", _ROOT: ""},
    },
    variants={
        "from the last layer to the first": {"in model.model.layers:": "in reversed(model.model.layers):"},
        "modules by type, options in a dict": """
            def shard(model, mesh, compute_dtype):
                from peftlab.llama import LlamaDecoderLayer

                options = dict(
                    mesh=mesh,
                    reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
                )
                for module in model.modules():
                    if isinstance(module, LlamaDecoderLayer):
                        fully_shard(module, **options)
                options.pop("reshard_after_forward")
                return fully_shard(model, **options)
        """,
        "apply, from the inside out": """
            def shard(model, mesh, compute_dtype):
                policy = MixedPrecisionPolicy(compute_dtype, torch.float32)

                def visit(module):
                    if type(module).__name__ == "LlamaDecoderLayer" or module is model:
                        fully_shard(module, mesh=mesh, mp_policy=policy)

                model.apply(visit)
                return model
        """,
    },
)
