"""What only a GPU can show; skipped where there is none. Placement is proved without one, in `test_placement`."""

from functools import partial

import pytest
import torch

from autograder.comparison import METHODS
from peftlab.memory import measure_training_step
from peftlab.simulate import next_token_loss
from peftlab.training import find_device, trainable
from test_placement import prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def batch(device: str) -> torch.Tensor:
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)


def test_the_device_is_found():
    assert find_device().type == "cuda"


@pytest.mark.parametrize(("name", "variant"), METHODS)
def test_a_method_has_the_same_losses_as_on_the_cpu(name, variant):
    """Three steps; fp32 sums in another order, so equal to a thousandth."""
    losses = {}
    for device in ("cpu", "cuda"):
        model = prepared(name, variant).to(device).train()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
        losses[device] = []
        for _ in range(3):
            loss = next_token_loss(model, batch(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize(("name", "variant"), METHODS)
def test_the_allocator_agrees_with_the_tracker(name, variant):
    """Weights, gradients and optimizer state are the same tensors on both; CUDA rounds each up to 512 bytes."""
    measured = {}
    for device in ("cpu", "cuda"):
        model = prepared(name, variant).to(device).train()
        measured[device] = measure_training_step(model, partial(next_token_loss, model, batch(device)))
        tensors = len(list(model.parameters()))
    assert measured["cuda"].parameters == measured["cpu"].parameters
    for part in ("gradients", "optimizer_state"):
        excess = getattr(measured["cuda"], part) - getattr(measured["cpu"], part)
        assert 0 <= excess <= 3 * 512 * tensors
