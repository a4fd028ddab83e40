"""What the drivers of several units call. It travels with them, as source, to the process that a student's answer lives in.

So each of these stands alone, as a driver does: it imports what it uses, from torch, peftlab and the standard library only.
"""


def fill(model, weights):
    """Set the model's parameters to the first numbers of a flat tensor, as many as it has, and return the model."""
    from torch import nn

    needed = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(weights[:needed].clone(), model.parameters())
    return model


def constant_llama(*sizes, dtype=None):
    """Return a `Llama` of these sizes, all of whose weights are 0.01: to draw those of a large one takes longer than a step."""
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    with torch.device("meta"):
        model = Llama(LlamaConfig(*sizes)).to(dtype=dtype)
    for parameter in model.to_empty(device="cpu").parameters():
        nn.init.constant_(parameter, 0.01)
    return model


def attempt(call, *arguments):
    """Return "nothing" if the call raises nothing, else `TypeName: message`.

    Raises:
        NotImplementedError: if the call does: then the answer has not been written yet.
    """
    try:
        call(*arguments)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def read_file(path):
    """Return a file's bytes as a uint8 tensor; of an empty file, a single zero."""
    import torch

    with open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8).clone()


def try_misfits(load, misfits, path):
    """Load a file into models that it does not fit.

    Returns:
        for every model, the name of the error or "nothing"; and whether the model was left as it was.
    """
    import torch

    refused, untouched = [], []
    for misfit in misfits:
        before = {name: tensor.clone() for name, tensor in misfit.state_dict().items()}
        try:
            load(misfit, path)
            refused.append("nothing")
        except Exception as error:
            refused.append(type(error).__name__)
        untouched.append(all(torch.equal(before[name], tensor) for name, tensor in misfit.state_dict().items()))
    return refused, untouched


def seeing(answer, **replacements):
    """Return a context in which the answer's code sees these instead of its own global names.

    A name that it lacks is not added. The context's value is a dict of the answer's own. Drivers use it where one answer
    calls another, so that a mistake in the one does not cost the points of the other.
    """
    import contextlib
    import inspect

    @contextlib.contextmanager
    def replaced():
        names = getattr(inspect.unwrap(getattr(answer, "forward", answer)), "__globals__", {})
        theirs = {name: names[name] for name in replacements if name in names}
        names.update({name: replacements[name] for name in theirs})
        try:
            yield theirs
        finally:
            names.update(theirs)

    return replaced()
