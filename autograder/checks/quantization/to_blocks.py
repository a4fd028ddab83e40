"""Bug hunt: blocks of a weight that does not lie in memory as it looks."""

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.exercise import Exercise


def to_blocks(weight: Tensor, block_size: int = 64) -> Tensor:
    """Return the weight's values row by row, as it shows them, `block_size` to a row; without a copy where that can be."""
    flat = weight.contiguous().view(-1)
    return flat.view(flat.numel() // block_size, block_size)


def blocks_case(generator: torch.Generator, block_size: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Return a matrix that divides into blocks whichever way it is cut below."""
    block_size = block_size or between(generator, 4, 8)
    return {"memory": normal(generator, 2 * between(generator, 3, 5), 4 * block_size, dtype=dtype), "block_size": block_size}


def drive_blocks(to_blocks, memory, block_size):
    """Cut several views of one piece of memory into blocks; say which of the results share that memory."""
    import torch

    views = {
        "a whole weight": memory,
        "the lower rows of a weight": memory[2:],
        "a transposed weight": memory.T,
        "every other row": memory[::2],
        "some columns": memory[:, block_size : 3 * block_size],
        "a row, repeated without a copy": memory[1].expand(5, -1),
        "a weight of three axes": memory.view(2, -1, memory.shape[1]),
    }
    seen = {}
    for name, view in views.items():
        blocks = to_blocks(view) if block_size == 64 else to_blocks(view, block_size)
        if not torch.is_tensor(blocks):
            raise TypeError(f"to_blocks should return a tensor, not {blocks!r}")
        seen[f"the blocks of {name}"] = blocks.clone()
        if view.is_contiguous():
            start = blocks.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
            seen[f"the blocks of {name} share its memory"] = start
    return seen | {"the weight afterwards": memory}


_FLAT = "weight.contiguous().view(-1)"
_CUT = "flat.view(flat.numel() // block_size, block_size)"

check_to_blocks = Exercise(
    spec=[to_blocks],
    cases=lambda generator: [blocks_case(generator), blocks_case(generator, dtype=torch.bfloat16)],
    driver=drive_blocks,
    mistakes={
        "a weight in 16 bits becomes one in fp32, which is a copy of twice its size: blocks are the weight's own values": {
            _FLAT: "weight.float().reshape(-1)"
        },
        "the values come in the order in which they lie in memory: take them in the order in which the weight shows them": {
            _FLAT: "torch.as_strided(weight, (weight.numel(),), (1,))",
        },
        "a weight that is not contiguous raises an error: `view` cannot copy, `reshape` and `contiguous` can": {
            _FLAT: "weight.view(-1)",
        },
        "a weight that is contiguous is copied all the same: that doubles its memory for nothing": {
            _FLAT: "weight.clone().reshape(-1)"
        },
        "the values come column by column: take them row by row": {_FLAT: "weight.T.contiguous().view(-1)"},
        "only the transposed weight is put right: other views lie in memory in other ways": {
            _FLAT: "weight.reshape(-1) if weight.T.is_contiguous() else torch.as_strided(weight, (weight.numel(),), (1,))",
        },
        "the values are read from the beginning of the memory: a view may start further on": {
            _FLAT: "torch.as_strided(weight, (weight.numel(),), (1,), 0) if weight.is_contiguous() else weight.reshape(-1)",
        },
        "a block takes every n-th value: its values are neighbours": {
            _CUT: "flat.view(block_size, -1).T",
        },
        "blocks lie in columns: the shape is (blocks, block_size)": {_CUT: "flat.view(-1, block_size).T"},
        "the values lie flat: the shape is (blocks, block_size)": {_CUT: "flat"},
        "`block_size` is not used": {_CUT: "flat.view(-1, 2)"},
        "the dtype is changed: blocks are the weight's own values": {_FLAT: "weight.double().reshape(-1)"},
    },
    variants={
        "reshape": """
            def to_blocks(weight, block_size=64):
                return weight.reshape(-1, block_size)
        """,
        "flatten and unflatten": """
            def to_blocks(weight, block_size=64):
                return weight.flatten().unflatten(0, (-1, block_size))
        """,
        "copied only if need be": """
            def to_blocks(weight, block_size=64):
                if not weight.is_contiguous():
                    weight = weight.clone(memory_format=torch.contiguous_format)
                return weight.view(weight.numel() // block_size, block_size)
        """,
        "ravel and unfold": """
            def to_blocks(weight, block_size=64):
                return weight.ravel().unfold(0, block_size, block_size)
        """,
    },
)
