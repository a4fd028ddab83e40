"""What the unit's drivers call: it travels with them, so it stands alone."""


def adapter_class():
    """Return an `Adapter` class of our own: a mistake in the student's must not show where adapters are put into a model."""
    import torch
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, hidden, bottleneck):
            super().__init__()
            self.down, self.up = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, h):
            return h * (1 + self.up(torch.tanh(self.down(h))))  # not what the student builds: the adapter does not matter here

    return Bottleneck


def tensors_kept(model):
    """Return the tensors that a model keeps: weights, buffers, and what its modules have as attributes or in lists of them."""
    import torch

    values = [value for module in model.modules() for value in vars(module).values()]
    attributes = [one for value in values for one in (value if isinstance(value, list) else [value]) if torch.is_tensor(one)]
    return [*model.state_dict().values(), *(held.detach() for held in attributes)]
