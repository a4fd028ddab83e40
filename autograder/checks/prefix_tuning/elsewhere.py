"""What happens on another device, in words."""

ELSEWHERE = "what happens on another device than the CPU"


def on_meta(happened: str) -> str:
    """Say in words what an error on the meta device means; the words of PyTorch's messages differ from release to release."""
    if any(words in happened for words in ("item()", "Cannot copy out of meta", "to numpy", "nonzero", "local_scalar_dense")):
        return "a number is read out of a tensor"
    return "tensors of two devices meet" if "device" in happened else happened
