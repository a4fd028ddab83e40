"""What the unit's drivers call: it travels with them, so it stands alone."""


def run_exactly(base, x, attention_mask, positions):
    """Return the hidden states of a base that rounds nothing when it is given small whole numbers.

    It replaces a LLaMA, whose rounding in 16 bits would hide mistakes. For every position it sums the vectors that the
    position may look at, each multiplied by its distance.
    """
    import torch

    from peftlab.llama import causal_mask

    batch, seq, _ = x.shape
    positions = (torch.arange(seq) if positions is None else positions).expand(batch, seq)
    looked_at = causal_mask(torch.ones(batch, seq) if attention_mask is None else attention_mask)[:, 0]
    distance = 1 + positions[:, :, None] - positions[:, None, :]
    return ((looked_at * distance).double() @ x.double() * base.norm.weight.double()).to(x.dtype)
