"""What the unit's drivers call: it travels with them, so it stands alone."""


def codes_of_our_own():
    """Return `to_8bit` and `from_8bit`, by name: a mistake in the student's must not show in the optimizer that calls them."""
    import torch

    from peftlab.dynamic_code import dynamic_code, nearest_code

    def to_8bit(x, signed):
        blocks = torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % 256)).view(-1, 256)
        absmax = blocks.abs().amax(dim=1)
        codes = nearest_code(blocks / absmax[:, None], signed)
        return codes.flatten()[: x.numel()].clone().view(x.shape), absmax

    def from_8bit(codes, absmax, signed):
        scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
        return dynamic_code(signed, codes.device)[codes.int()] * scale

    return {"to_8bit": to_8bit, "from_8bit": from_8bit}
