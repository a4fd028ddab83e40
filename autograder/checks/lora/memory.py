"""LoRALinear: measured memory."""

from autograder.cases import between, total_bytes
from autograder.checks.lora.lora_linear import COMPRESSED, RETURNED, SCALED, UPDATE, LoRALinear
from autograder.drive import Observation
from autograder.exercise import Exercise


def drive_memory(LoRALinear, in_features, out_features, rank, rows):
    """Take a training step; return what is there after it, and what forward kept for backward.

    The base is filled with a constant: a random 4096 x 4096 matrix would take longer to draw than all the rest.
    """
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    base = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
    nn.init.constant_(base.weight, 0.01)
    layer = LoRALinear(base, rank=rank, alpha=2.0 * rank)
    x = torch.ones(rows, in_features, requires_grad=True)  # its gradient is wanted by the layers below
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    tensors = tensors_of_step(lambda: layer(x).sum(), layer.parameters(), optimizer, not_counted=[x])
    if in_features >= 1024:  # too large to send: the process is measured from outside
        return {"shape": list(layer(x).shape)}
    return tensors | {"kept": {name: tensor.detach() for name, tensor in layer.state_dict().items()}}


def read_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "shape" in observation:
        return {"the shape of the output": observation["shape"]}
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes of weights and buffers": total_bytes(observation["kept"].values()),
        "bytes that forward saves for backward, besides x and the weights,": total_bytes(observation["saved"]),
    }


def memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a sparing answer may exceed the spec's bytes.

    Half of the large base for the peak; a scaled copy of the factors among the saved tensors; a scale kept as a buffer.
    """
    factors = 4 * case["rank"] * (case["in_features"] + case["out_features"])
    return {
        "peak bytes": 32 * 2**20,
        "bytes that forward saves for backward, besides x and the weights,": factors,
        "bytes of weights and buffers": 64,
    }


_BASE_PLUS_UPDATE = "self.base(x) + self.scaling * update"
_SCALING = "self.scaling = alpha / rank"

check_lora_memory = Exercise(
    spec=[LoRALinear],
    cases=lambda generator: [
        {"in_features": between(generator, 60, 90), "out_features": between(generator, 92, 99), "rank": 4, "rows": 50},
        # The base weighs 64 MiB; half of that tells a second matrix of its size from the noise of the process, 5 MiB.
        {"in_features": 4096, "out_features": 4096, "rank": 8, "rows": 4},
    ],
    driver=drive_memory,
    reading=read_memory,
    tolerance=memory_tolerance,
    at_most=frozenset(
        {
            "gradient bytes",
            "optimizer state bytes",
            "bytes of weights and buffers",
            "peak bytes",
            "bytes that forward saves for backward, besides x and the weights,",
        }
    ),
    measures_peak=lambda case: case["in_features"] >= 1024,
    mistakes={
        "the base is left trainable: its gradient and its optimizer state are what LoRA is there to save": {
            "self.base.requires_grad_(False)": "pass",
        },
        "the update is computed as a whole matrix B A: multiply x by A first, then by B": {
            COMPRESSED: "self.lora_B @ self.lora_A",
            UPDATE: "x @ compressed.T",
        },
        "the merged weight is built in every forward pass: that is one more matrix of the base's size": {
            RETURNED: "return x @ (self.base.weight + self.scaling * self.lora_B @ self.lora_A).T",
        },
        "a second matrix of the base's size is kept: merging adds to the base's own weight, unmerging subtracts again": {
            _SCALING: _SCALING + "\n        self.merged_weight = nn.Parameter(base.weight.detach() + 0, requires_grad=False)",
        },
        "the process grows by another matrix of the base's size: the base is copied, or a merged weight cached": {
            "self.base = base": "import copy; self.base = copy.deepcopy(base)",
        },
        "lora_A and lora_B are in fp64: twice the bytes, twice the optimizer state": {
            '"dtype": base.weight.dtype': '"dtype": torch.float64',
            "x, self.lora_A)": "x, self.lora_A.to(x.dtype))",
            "compressed, self.lora_B)": "compressed, self.lora_B.to(x.dtype))",
        },
        "the rank is not the one asked for: lora_A and lora_B are twice as large as they should be": {
            "torch.empty(rank,": "torch.empty(2 * rank,",
            "torch.zeros(base.out_features, rank,": "torch.zeros(base.out_features, 2 * rank,",
        },
        "a matrix as large as the base's is trained: the factors are to be trained, not their product": {
            _SCALING: _SCALING + "\n        self.delta = nn.Parameter(torch.zeros_like(base.weight))",
            _BASE_PLUS_UPDATE: _BASE_PLUS_UPDATE + " + x @ self.delta.T",
        },
        "the input is converted to fp64, and that copy is kept for backward": {
            "x, self.lora_A)": "x.double(), self.lora_A.double())",
            "compressed, self.lora_B)": "compressed, self.lora_B.double())",
            _BASE_PLUS_UPDATE: "self.base(x) + (self.scaling * update).to(x.dtype)",
        },
        "a scaled copy of x is kept for backward: scale the small product or the result instead, with brackets": {
            "x, self.lora_A)": "self.scaling * x, self.lora_A)",
            "self.scaling * update": "update",
        },
        "the scale is a tensor as large as the output, and kept for backward: multiply by the plain number": {
            "self.scaling * update": "torch.full_like(update, self.scaling).requires_grad_() * update",
        },
    },
    variants={
        "matrix products": {COMPRESSED: "x @ self.lora_A.T", UPDATE: "compressed @ self.lora_B.T"},
        "F.linear twice": {
            COMPRESSED: "torch.nn.functional.linear(x, self.lora_A)",
            UPDATE: "torch.nn.functional.linear(compressed, self.lora_B)",
        },
        "the small product scaled": {COMPRESSED: "self.scaling * (x @ self.lora_A.T)", SCALED: "update"},
        "a scaled copy of B, and a scale that is a buffer": {
            UPDATE: "compressed @ (self.scaling * self.lora_B).T",
            SCALED: "update",
            _SCALING: 'self.register_buffer("scaling", torch.tensor(alpha / rank), persistent=False)',
        },
        "a fused addition": {
            RETURNED: "return torch.add(self.base(x), update, alpha=self.scaling)",
        },
    },
)
