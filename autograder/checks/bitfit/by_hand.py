"""What the drivers of layers with a forward and a backward pass by hand share. It travels with them, as source."""


def pass_by_hand(forward, backward, called, inputs, output_gradient):
    """Run a layer's two functions on given numbers, without autograd.

    Args:
        called: what a sentence calls the two functions.
        inputs: a dict of the forward function's arguments, in order, by what a sentence calls them.

    Returns:
        what can be seen of it; and the two gradients, or None if what came back is no output and no two gradients.
    """
    import torch

    given = {name: tensor.clone() for name, tensor in inputs.items()}
    gradient = output_gradient.clone()
    with torch.no_grad():
        answer = forward(*inputs.values())
        if not isinstance(answer, tuple) or len(answer) != 2:
            return {f"what {called[0]} returns": f"not a pair but a {type(answer).__name__}"}, None
        output, kept = answer
        if not isinstance(kept, tuple | list) or not all(torch.is_tensor(tensor) for tensor in kept):
            described = f"a pair whose second part is no tuple of tensors but a {type(kept).__name__}"
            return {f"what {called[0]} returns": described}, None
        seen = {f"what {called[0]} returns": "a pair", "the output": output}
        gradients = backward(tuple(kept), gradient)
        if not isinstance(gradients, tuple | list) or len(gradients) != 2:
            described = f"{len(gradients)} things" if isinstance(gradients, tuple | list) else f"a {type(gradients).__name__}"
            return seen | {f"what {called[1]} returns": f"not a pair but {described}"}, None
    changed = [name for name, before in given.items() if not torch.equal(before, inputs[name])]
    changed += [] if torch.equal(output_gradient, gradient) else ["the output's gradient"]
    return seen | {f"what {called[1]} returns": "a pair", "the list of inputs that were changed in place": changed}, gradients
