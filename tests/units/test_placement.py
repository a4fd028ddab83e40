"""Every method trains where its model is: proved on a device that is not the CPU, without a GPU.

The model's parameters and buffers become fake tensors on "meta", a device without numbers. A tensor that a method has left
on the CPU meets them there, and that is an error.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autograder.checking.masters import load_reference
from autograder.measuring.methods import METHODS
from peftlab.llama import Llama, LlamaConfig, set_gradient_checkpointing
from peftlab.simulate import fake_parameters
from peftlab.training import trainable

CONFIG = LlamaConfig(
    vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
)


def prepared(name: str, variant: str) -> Llama:
    """Return a small model that has been made ready on the CPU, as the comparison does it with the real one."""
    torch.manual_seed(0)
    model, method = Llama(CONFIG), METHODS[name, variant]
    method.prepare(load_reference(method.unit) if method.unit else None, model, [3, 1, 4, 1, 5])
    return model


def train_elsewhere(model: nn.Module, checkpointing: bool) -> None:
    """Take a training step on another device, with a mask; all that is trained must get its gradient there."""
    set_gradient_checkpointing(model.train(), checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is not fake was left behind: let it meet the others
        fake_parameters(model, "meta")
        input_ids = torch.empty((2, 9), dtype=torch.long, device="meta")
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        logits = model(input_ids, torch.ones_like(input_ids))
        nn.functional.cross_entropy(logits.float().flatten(0, 1), input_ids.flatten()).backward()
        optimizer.step()
    for own, parameter in trainable(model).items():
        assert parameter.grad is not None and parameter.grad.device.type == "meta", own


@pytest.mark.parametrize("checkpointing", [False, True], ids=["in full", "checkpointed"])
@pytest.mark.parametrize(("name", "variant"), METHODS)
def test_a_training_step_on_another_device(name, variant, checkpointing):
    train_elsewhere(prepared(name, variant), checkpointing)


class Stray(nn.Module):
    """A layer with a scale that is neither parameter nor buffer, and so does not move with the model."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.scale = linear, torch.full((CONFIG.hidden_size,), 0.5)

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tensor_left_on_the_cpu_is_found(checkpointing):
    model = prepared("lora", "")
    attention = model.model.layers[2].self_attn
    attention.o_proj = Stray(attention.o_proj)
    with pytest.raises(RuntimeError, match="device"):
        train_elsewhere(model, checkpointing)


@pytest.mark.parametrize("name", ["positions", "mask"])
def test_a_tensor_made_on_the_cpu_in_forward_is_found(name, monkeypatch):
    model = prepared("bitfit", "")
    run_layers = model.model.run_layers

    def careless(x, attention_mask=None, positions=None):
        made = {"positions": torch.arange(x.shape[1]), "mask": torch.ones(x.shape[:2], dtype=torch.long)}
        mask = made["mask"] if name == "mask" else attention_mask
        return run_layers(x, mask, made["positions"] if name == "positions" else None)

    monkeypatch.setattr(model.model, "run_layers", careless)
    with pytest.raises(RuntimeError, match="device"):
        train_elsewhere(model, False)
