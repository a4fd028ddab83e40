"""By how much two right answers may differ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autograder.drive import Observation

LOW_PRECISION = (torch.bfloat16, torch.float16)


def cast(case: dict, dtype: torch.dtype) -> dict:
    """Return the case with copies of its tensors, those of floating point in this dtype."""
    return {
        name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True) if isinstance(value, Tensor) else value
        for name, value in case.items()
    }


def rounding_tolerance(case: dict, spread: float, names: Sequence[str]) -> dict[str, float]:
    """Allow each of the named tensors twenty-five times the largest rounding error of the spec, `spread`.

    A right answer does the same sums in another order, or in a few more steps: its errors are as many and as large as the spec's, and
    have nothing else in common with them. The spec's largest error, in fp32 against double precision, was measured over a
    thousand random cases of each kind, the hidden ones too. No right variant was further from the spec than that. Twenty-five
    times is still about a thousandth of the numbers, or less. Double precision is allowed what single is, for RoPE's angles and a
    norm's mean square are computed in single everywhere.

    In 16 bits, where one rounding is a quarter of a percent, no bound on single numbers tells an error of 1% from rounding; the root
    mean square over all of them does (see `relative_errors`). Two right answers round to storage up to three times more or
    less often on the way; each time adds an error with a root mean square of at most u / sqrt(3), u = eps / 2, and three
    independent ones add sqrt(3) times that, u.
    """
    low = [value.dtype for value in case.values() if isinstance(value, Tensor) and value.dtype in LOW_PRECISION]
    if low:
        return {mean_error_of(name): torch.finfo(low[0]).eps / 2 for name in names}
    return dict.fromkeys(names, 25 * spread)


def relative_errors(observation: Observation, truth: Observation) -> Observation:
    """Replace every tensor by its dtype and by its root mean square error, as a share of the truth's root mean square."""
    read = {}
    for name, value in observation.items():
        exact = truth.get(name)
        if isinstance(value, Tensor) and isinstance(exact, Tensor) and value.shape == exact.shape:
            read[f"the dtype of {name}"] = str(value.dtype)
            read[mean_error_of(name)] = ((value.double() - exact).norm() / exact.norm()).item()
        else:
            read[name] = value
    return read


def mean_error_of(name: str) -> str:
    """Return the name of the field that holds a tensor's error."""
    return f"the relative mean error of {name}"
