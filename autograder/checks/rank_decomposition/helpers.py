"""What the unit's drivers call: it travels with them, so it stands alone."""


def as_number(value):
    """Return a number, or a tensor with a single one, as a plain number; of anything else the beginning of its text."""
    import torch

    if torch.is_tensor(value) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float):
        return repr(value)[:100]
    return float(value) if isinstance(value, float) else int(value)
