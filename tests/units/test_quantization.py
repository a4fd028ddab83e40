"""The spec and the master's solution of unit 09 equal bitsandbytes, bit for bit; so does the 8-bit data type."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.cextension
    from bitsandbytes import functional as bnb

from autograder.checking.masters import load_reference
from autograder.checks.quantization import EXERCISES
from peftlab.dynamic_code import dynamic_code, nearest_code

MASTER = load_reference("09_quantization")
SPEC = SimpleNamespace(**{part.__name__: part for exercise in EXERCISES.values() for part in exercise.spec})
IMPLEMENTATIONS = pytest.mark.parametrize("ours", [SPEC, MASTER], ids=["spec", "master"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def with_zeros_and_outliers() -> torch.Tensor:
    weight = 0.02 * torch.randn(96, 160)
    weight.view(-1, 64)[3] = 0
    weight.view(-1, 64)[-1] = 0
    weight[5, 7], weight[50, 100] = 3.0, -40.0
    return weight


WEIGHTS = {
    "normal": lambda: 0.02 * torch.randn(192, 576),
    "zero blocks and outliers": with_zeros_and_outliers,
    "transposed": lambda: torch.randn(128, 96).T,
    "every other row": lambda: torch.randn(64, 96)[::2],
    "one block": lambda: torch.randn(8, 8),
    "all zeros": lambda: torch.zeros(16, 64),
    "fewer than 256 blocks, one axis": lambda: torch.randn(64 * 7),
    "exactly 256 blocks": lambda: torch.rand(256, 64),
    "three axes": lambda: torch.randn(4, 24, 40),
    "tiny and huge": lambda: torch.randn(8, 192) * 10.0 ** torch.arange(-4, 4)[:, None],
}


def same_weight(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """bitsandbytes returns a weight of one axis as a single row.

    Its library for CUDA has CPU kernels of its own, built without F16C: in fp16 they round halves up and not to even.
    """
    theirs = theirs.view(ours.shape)
    if ours.dtype == theirs.dtype == torch.float16 and bitsandbytes.cextension.lib.compiled_with_cuda:
        units_apart = ours.view(torch.int16).int() - theirs.view(torch.int16).int()
        return units_apart.abs().max().item() <= 1
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_one_unit_of_fp16_is_allowed_where_the_library_for_cuda_is_loaded(monkeypatch):
    weight = torch.randn(8, 64).half()
    above = (weight.view(torch.int16) + 1).view(torch.float16)
    for with_cuda in (True, False):
        monkeypatch.setattr(bitsandbytes.cextension.lib, "compiled_with_cuda", with_cuda, raising=False)
        assert same_weight(weight, above) == with_cuda
        assert not same_weight(weight, 1.01 * weight)
        assert not same_weight(weight.bfloat16(), (weight.bfloat16().view(torch.int16) + 1).view(torch.bfloat16))


def read_back_by_bitsandbytes(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantize with each block as a row of its own, for bitsandbytes' kernel for AVX-512 takes rows for whole blocks."""
    rows = copy.copy(state)
    rows.shape = torch.Size((-(-math.prod(state.shape) // state.blocksize), state.blocksize))
    return bnb.dequantize_4bit(packed, rows).flatten()[: math.prod(state.shape)].view(state.shape)


@pytest.mark.skipif(not bnb.has_avx512bf16(), reason="this CPU has no AVX-512 BF16")
def test_bitsandbytes_misreads_a_weight_whose_rows_are_no_whole_blocks():
    """Should this fail, the bug has been put right: then one call is enough above, and unit 10 may use any size."""
    packed, state = bnb.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    assert not torch.equal(bnb.dequantize_4bit(packed, state), read_back_by_bitsandbytes(packed, state))


@IMPLEMENTATIONS
def test_the_levels_are_those_of_the_table(ours):
    assert torch.equal(ours.nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_byte_is_equal(ours, dtype, name):
    weight = WEIGHTS[name]().to(dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = ours.quantize_nf4(weight)
    assert packed.dtype == theirs.dtype and torch.equal(packed, theirs)
    assert absmax.dtype == state.absmax.dtype and torch.equal(absmax, state.absmax)
    assert same_weight(ours.dequantize_nf4(packed, absmax, weight.shape, dtype), read_back_by_bitsandbytes(theirs, state))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantization_is_equal(ours, dtype, name):
    weight = WEIGHTS[name]().to(dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed, absmax = ours.quantize_nf4(weight)
    codes, nested_absmax, offset = ours.double_quantize(absmax)
    assert codes.dtype == torch.uint8 and torch.equal(codes, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    read_back = ours.undo_double(codes, nested_absmax, offset)
    assert same_weight(ours.dequantize_nf4(packed, read_back, weight.shape, dtype), read_back_by_bitsandbytes(theirs, state))


@IMPLEMENTATIONS
@pytest.mark.parametrize("block_size", [32, 128, 256, 512])
def test_other_block_sizes_are_equal(ours, block_size):
    weight = torch.randn(64, 96)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    packed, absmax = ours.quantize_nf4(weight, block_size)
    assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)
    read_back = ours.dequantize_nf4(packed, absmax, weight.shape, weight.dtype, block_size)
    assert torch.equal(read_back, read_back_by_bitsandbytes(theirs, state))


@IMPLEMENTATIONS
def test_ties_and_their_neighbours_are_equal(ours):
    """The midpoints between levels, the next number below each, and the next above; the 1 makes them what they are."""
    levels = bnb.get_4bit_type("nf4", device="cpu")
    midpoints = (levels[:-1] + levels[1:]) / 2
    infinity = torch.tensor(float("inf"))
    numbers = torch.cat([midpoints, midpoints.nextafter(-infinity), midpoints.nextafter(infinity), levels, torch.ones(3)])
    assert len(numbers) == 64
    assert torch.equal(ours.quantize_nf4(numbers)[0], bnb.quantize_4bit(numbers, quant_type="nf4")[0])


@IMPLEMENTATIONS
def test_what_does_not_fill_its_last_block_is_refused(ours):
    with pytest.raises(ValueError, match="do not fill blocks of 64"):
        ours.quantize_nf4(torch.randn(3, 50))


@pytest.mark.parametrize("seed", range(5))
def test_the_dynamic_data_type_is_bitsandbytes_own(seed):
    torch.manual_seed(seed)
    x = torch.randn(3000 + 37 * seed) * torch.rand(())
    x[:256] *= seed != 0  # a block of zeros
    theirs, state = bnb.quantize_blockwise(x, blocksize=256)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    codes = nearest_code(blocks * (1 / blocks.abs().amax(1))[:, None]).flatten()[: len(x)]
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())
    assert torch.equal(codes, theirs)
    assert torch.equal(
        dynamic_code()[codes.long()] * state.absmax.repeat_interleave(256)[: len(x)], bnb.dequantize_blockwise(theirs, state)
    )


def test_a_code_is_nearest_up_to_the_step_of_the_table():
    x = torch.cat([dynamic_code(), 2 * torch.rand(10_000) - 1])
    distance = (x[:, None] - dynamic_code()).abs()
    chosen = (x - dynamic_code()[nearest_code(x).long()]).abs()
    assert (chosen - distance.amin(1)).max() <= 2 / 65535
    assert nearest_code(torch.tensor([-9.0, 9.0, float("nan")])).tolist() == [0, 255, 0]


def test_the_data_type_cannot_be_changed_by_accident():
    dynamic_code().zero_()  # a copy: nobody's mistake reaches anybody else
    assert dynamic_code()[-1] == 1


def test_bits_counted_are_bits_measured():
    weight = torch.randn(1024, 1024)
    packed, absmax = MASTER.quantize_nf4(weight)
    codes, nested_absmax, offset = MASTER.double_quantize(absmax)
    assert 8 * (packed.nbytes + absmax.nbytes) / weight.numel() == MASTER.bits_per_parameter(4, 64) == 4.5
    measured = 8 * (packed.nbytes + codes.nbytes + nested_absmax.nbytes) / weight.numel()
    assert measured == MASTER.bits_per_parameter(4, 64, 256) and round(measured, 3) == 4.127
    assert offset.nbytes == 4
