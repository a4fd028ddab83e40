"""What only a GPU can show; skipped where there is none. Placement is proved without one, in `test_placement`."""

import pytest
import torch

from autograder.measuring import gpu
from autograder.measuring.machine import Machine
from peftlab.training import find_device

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.xdist_group("cuda"),  # one process: every one of them takes half a gigabyte of the GPU before its first tensor
]


def test_the_device_is_found(monkeypatch):
    monkeypatch.delenv("PEFTLAB_DEVICE", raising=False)
    assert find_device().type == "cuda"


@pytest.mark.parametrize("name", [name for name in gpu.checks() if name not in ("dequantize", "training steps", "SmolLM2")])
def test_a_check_passes(name):
    row = gpu.run(name, gpu.checks()[name], Machine(torch.device("cuda", 0), dry=False))
    assert row["ok"] is not False, gpu.line(row)
