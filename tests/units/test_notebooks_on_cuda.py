"""Every tensor of every notebook is where CUDA needs it: proved without a GPU, on the one that `played_cuda` plays.

To run one master, on a GPU of compute capability 7.5, with the experiments cut short:

    PEFTLAB_SHORT=1 python tests/units/test_notebooks_on_cuda.py 10_qlora 7.5
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import played_cuda
import smaller
from autograder.checking.masters import Cell, code_cells, master_path, units
from peftlab.llama import PRESETS, Llama
from peftlab.memory import measure_training_step
from peftlab.simulate import next_token_loss

AMPERE, T4 = "8.0", "7.5"
"""Compute capabilities. From 8.0 on a GPU computes in bf16, and so does unit 10; a T4 cannot."""

NOT_PLAYED = ("14_many_gpus",)
"""Its ranks never use a GPU, and those that `torchrun` starts are Pythons of their own, in which nothing is played."""

PLAYED = [(unit, AMPERE) for unit in units() if unit not in NOT_PLAYED] + [("10_qlora", T4)]


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "capability"), PLAYED)
def test_the_master_runs_on_cuda(unit, capability, tmp_path):
    settings = {
        "PEFTLAB_SHORT": "1",
        "PEFTLAB_RESULTS": str(tmp_path / "results"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PEFTLAB_DEVICE"} | settings
    command = [sys.executable, __file__, unit, capability]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-6000:]


def run_on_played_cuda(unit: str, capability: tuple[int, int]) -> str | None:
    """Run the code cells of a master, but not its checks; return a report of the first failure, or None if all cells run."""
    prepare_process(unit)
    master = ModuleType(f"master_{unit}")
    sys.modules[master.__name__] = master  # so that classes defined here know their module
    with played_cuda.played(capability):
        for cell in code_cells(unit):
            if cell.metadata.get("nbgrader", {}).get("grade"):
                continue
            # With blank lines before it: errors and `inspect.getsource` then find the master's lines.
            code = compile("\n" * (cell.line - 1) + cell.source, master_path(unit), "exec")
            try:
                exec(code, vars(master))
            except Exception as error:
                return failure(unit, cell, error)
    return None


def prepare_process(unit: str) -> None:
    """Make cheap what takes time and has nothing to do with the places of tensors."""
    import bitsandbytes  # noqa: F401  it looks for CUDA at its import, and the played one has no kernels for it

    from peftlab import plots, simulate

    torch.set_num_threads(1)
    plots.show = lambda figure, alt: plots.plt.close(figure)
    smaller.make_smaller(unit)
    simulate.simulate_training_step = of_one_layer(simulate.simulate_training_step)


def of_one_layer(simulate: Callable) -> Callable:
    """Return a function like `simulate_training_step` that simulates one layer only; a simulation does not use the GPU."""
    return lambda config, *args, **kwargs: simulate(replace(config, num_hidden_layers=1), *args, **kwargs)


def failure(unit: str, cell: Cell, error: Exception) -> str:
    """Return which line of the master failed and why, and the calls that led to the error, without those inside PyTorch."""
    hidden = (str(Path(torch.__file__).parent), played_cuda.__file__, __file__)
    calls = [call for call in traceback.extract_tb(error.__traceback__) if not call.filename.startswith(hidden)]
    return (
        f"{unit} fails on CUDA: line {calls[0].lineno} of the master, in the cell that begins on line {cell.line}\n"
        f"    {calls[0].line}\n{type(error).__name__}: {error}\n\n{''.join(traceback.format_list(calls))}"
    )


def main(unit: str, capability: str) -> int:
    """Run a master on a played GPU, print its failure or the processor time it took, and return the exit status."""
    major, minor = map(int, capability.split("."))
    report = run_on_played_cuda(unit, (major, minor))
    print(report or f"{unit}: {time.process_time():.0f} s", file=sys.stderr)
    return 1 if report else 0


# ---- The player itself ----
# Where there is a GPU, the controls run on it: they then show whether the player does what CUDA does.


@pytest.fixture
def cuda():
    with nullcontext() if torch.cuda.is_available() else played_cuda.played():
        yield torch.device("cuda")


class Stray(nn.Module):
    """A layer with a scale that is neither parameter nor buffer, and so does not move with the model."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), torch.full((4,), 0.5)

    def forward(self, x):
        return self.linear(x) * self.scale


class Masked(nn.Module):
    """A layer that makes a mask in forward, on the CPU."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).masked_fill(torch.ones(4).bool(), 0.0)


class Doubled(torch.autograd.Function):
    """2x, with a two that backward makes on the CPU."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full((4,), 2.0)


def on_the_cpu(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# Each is named after what is left on the wrong device.
REFUSED = {
    "a plain attribute of a module": lambda x: Stray().to(x.device)(x),
    "a mask made in forward": lambda x: Masked().to(x.device)(x),
    "a tensor made in backward": lambda x: Doubled.apply(x.requires_grad_()).sum().backward(),
    "a target": lambda x: nn.functional.cross_entropy(x, torch.tensor([1, 2, 3])),
    "token ids": lambda x: nn.Embedding(4, 4).to(x.device)(torch.tensor([0])),
    "a number in a stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a result": lambda x: torch.tensor(1.0).add_(x.sum()),
    "values to be assigned at indices": lambda x: x.__setitem__(x > 0, on_the_cpu(12)),
    "a tensor that is indexed from the GPU": lambda x: on_the_cpu(3, 4)[x > 0],
    "numpy": lambda x: x.numpy(),
    "numpy, by the back door": lambda x: numpy.asarray(x),
    "a generator for a new tensor": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "a generator for an old tensor": lambda x: nn.init.normal_(x, generator=torch.Generator()),
    "a generator of the GPU": lambda x: torch.rand(3, generator=torch.Generator(x.device)),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cuda_refuses_is_refused(mistake, cuda):
    x = on_the_cpu(3, 4).to(cuda)
    with pytest.raises((RuntimeError, TypeError), match="device"):
        REFUSED[mistake](x)


def one_training_step(x: Tensor) -> Tensor:
    """Return a weight that AdamW, whose step counter stays on the CPU, has trained in a checkpointed model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to(x)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint(model, x, use_reentrant=False).pow(2).mean().backward()
    optimizer.step()
    assert {slot.device.type for state in optimizer.state.values() for slot in state.values()} == {"cpu", "cuda"}
    return model[0].weight.grad


def gradient_across_devices(x: Tensor) -> Tensor:
    x.requires_grad_()
    (x.cpu() * on_the_cpu(3, 4)).sum().backward()
    return x.grad


def made_on_the_device(x: Tensor) -> Tensor:
    with torch.device(x.device):
        return torch.zeros(2)


ALLOWED = {
    "a number in arithmetic": lambda x: torch.tensor(2.0) * x + 1,
    "a number in where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "a number to fill with": lambda x: x.masked_fill(x > 0, torch.tensor(0.0)),
    "indices": lambda x: x[torch.tensor([0, 2])],
    "a mask as index": lambda x: x[on_the_cpu(3, 4) > 0],
    "a list of indices": lambda x: x[[0, 2], :2],
    "a copy into a slice": lambda x: x[0].copy_(on_the_cpu(4)),
    "another tensor's device and dtype": lambda x: torch.ones(3).to(x.half()),
    "like another tensor": lambda x: torch.zeros_like(x) + x.new_ones(4) + x.new_tensor([1.0]) + torch.rand_like(x),
    "by keyword": lambda x: torch.arange(4, device=x.device) + torch.tensor([1], device="cuda") + torch.rand(4, device=0),
    "in a block": made_on_the_device,
    "a copy of a copy": lambda x: deepcopy(nn.Linear(4, 4).cuda()).weight + deepcopy(x)[0],
    "a generator": lambda x: torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
    "a training step": one_training_step,
    "a gradient across devices": gradient_across_devices,
}


@pytest.mark.parametrize("use", ALLOWED)
def test_what_cuda_allows_is_allowed_and_stays_on_cuda(use, cuda):
    made = ALLOWED[use](on_the_cpu(3, 4).to(cuda))
    assert made.is_cuda and made.device == torch.device("cuda", 0)
    assert made.detach().cpu().numpy() is not None


def test_the_played_allocator_finds_the_bytes_that_the_cpu_takes():
    """All but the 4 bytes a trained tensor in which AdamW counts its steps: they stay on the CPU."""
    model = Llama(PRESETS["tiny"])
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    cpu = measure_training_step(model, lambda: next_token_loss(model, ids))
    with played_cuda.played():
        model, ids = model.to("cuda"), ids.to("cuda")
        gpu = measure_training_step(model, lambda: next_token_loss(model, ids))
    expected = replace(cpu, optimizer_state=cpu.optimizer_state - 4 * len(list(model.parameters())), peak=gpu.peak)
    assert gpu == expected
    assert gpu.peak > cpu.peak, "AdamW's temporaries are those of all parameters at once on CUDA"


def test_nothing_is_left_of_the_player():
    before = torch.cuda.is_available(), torch.Generator, torch.compile
    with played_cuda.played():
        x = torch.ones(3, device="cuda")
    assert x.device.type == "cpu" and (x + torch.ones(3)).numpy().sum() == 6
    assert before == (torch.cuda.is_available(), torch.Generator, torch.compile)


def test_a_failure_names_the_master_and_the_line(monkeypatch):
    cells = (Cell({}, "x = torch.ones(3)", 40), Cell({}, "y = 2 * x\n\nprint(x.cuda() + y)", 50))
    monkeypatch.setattr(sys.modules[__name__], "code_cells", lambda unit: (Cell({}, "import torch", 1), *cells))
    monkeypatch.setattr(sys.modules[__name__], "prepare_process", lambda unit: None)
    report = run_on_played_cuda("00_start_here", (8, 0))
    assert report.startswith("00_start_here fails on CUDA: line 52 of the master, in the cell that begins on line 50")
    assert "cuda:0 and cpu" in report


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
