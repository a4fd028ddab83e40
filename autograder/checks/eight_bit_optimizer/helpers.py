"""What the unit's drivers call: it travels with them, so it stands alone."""


def codes_of_our_own():
    """Return a `to_8bit` and a `from_8bit`, by name: a mistake in the student's must not show in the optimizer that calls them.

    They are not what the student builds: the codes are 8-bit floating-point numbers, of one scale for the whole tensor.
    """
    import torch

    kinds = {True: torch.float8_e5m2, False: torch.float8_e4m3fn}

    def to_8bit(x, signed):
        largest = x.abs().max().float()
        share = x.float() / largest.clamp(min=1e-38)
        codes = (share if signed else share.abs()).to(kinds[signed]).view(torch.uint8)
        return codes, largest.repeat(-(-x.numel() // 256))

    def from_8bit(codes, absmax, signed):
        return codes.view(kinds[signed]).float() * absmax[0]

    return {"to_8bit": to_8bit, "from_8bit": from_8bit}
