"""Unit 15: the optimizer equals bitsandbytes' to the bit, a second moment sticks in both, and a saved run goes on as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from bitsandbytes import functional as bnb

from autograder.checking.masters import load_reference
from peftlab.dynamic_code import dynamic_code, nearest_code

MASTER = load_reference("15_eight_bit_optimizer")


def test_the_unsigned_data_type_is_bitsandbytes_own():
    assert torch.equal(dynamic_code(signed=False), bnb.create_dynamic_map(signed=False))
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_are_bitsandbytes_own(signed):
    torch.manual_seed(0)
    x = torch.randn(3, 1000) if signed else torch.randn(3, 1000).square()
    x[0, :256] = 0
    theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed=signed), blocksize=256)
    codes, absmax = MASTER.to_8bit(x, signed)
    assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
    assert torch.equal(MASTER.from_8bit(codes, absmax, signed), bnb.dequantize_blockwise(theirs, state))


def test_codes_on_another_device_are_the_true_nearest():
    """What runs on a GPU, run here: the device "meta" has no numbers, so the branch is taken by hand."""
    x = torch.rand(1000)
    code = dynamic_code(False)
    nearest = torch.bucketize(x, 0.5 * (code[:-1] + code[1:]))
    distance = (x[:, None] - code).abs()
    assert (distance.gather(1, nearest[:, None]).squeeze(1) == distance.amin(1)).all()
    assert nearest_code(x.to("meta"), signed=False).device.type == "meta"


def test_the_table_goes_to_a_gpu_once(monkeypatch):
    """Each copy from the host waits until the GPU has done its work, and a step reads the table some four hundred times."""
    copies = []
    monkeypatch.setattr(torch, "tensor", lambda values, device: copies.append(str(device)) or values)
    for _ in range(2):
        for device in ("cuda:6", torch.device("cuda", 7), "cpu"):
            dynamic_code(device=device)
    assert sorted(copies) == ["cpu", "cpu", "cuda:6", "cuda:7"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimizer_is_bitsandbytes_own(dtype, weight_decay):
    """Thirty steps: moments have the same codes and absmax to the bit; so have the parameters, on the CPU.

    A tensor with fewer than 4,096 values is kept in fp32 by both; bitsandbytes then divides in another order, so its parameters
    agree to rounding: a few ulps a step.
    """
    torch.manual_seed(0)
    starts = [torch.randn(80, 96), torch.randn(64, 64), torch.randn(30, 20)]
    gradients = [[torch.randn_like(start).to(dtype) for start in starts] for _ in range(30)]
    results = []
    for optimizer_class in (MASTER.AdamW8bit, bitsandbytes.optim.AdamW8bit):
        parameters = [nn.Parameter(start.to(dtype)) for start in starts]
        optimizer = optimizer_class(parameters, lr=1e-2, weight_decay=weight_decay)
        for of_step in gradients:
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append((parameters, [optimizer.state[parameter] for parameter in parameters]))
    (ours, our_states), (theirs, their_states) = results
    for index in (0, 1):
        names = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_absmax": "absmax1", "exp_avg_sq_absmax": "absmax2"}
        for mine, other in names.items():
            assert torch.equal(our_states[index][mine], their_states[index][other].view(our_states[index][mine].shape))
        assert torch.equal(ours[index], theirs[index])
    assert our_states[2]["exp_avg"].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (ours[2] - theirs[2]).abs().max() <= 30 * 2 * eps * theirs[2].abs().max()


def test_state_takes_two_bytes_and_a_little():
    parameter = nn.Parameter(torch.randn(512, 512))
    optimizer = MASTER.AdamW8bit([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    assert sum(value.nbytes for value in held) / parameter.numel() == 2 + 2 * 4 / 256


def test_on_a_cpu_paged_optimizers_are_ordinary_ones():
    parameter = nn.Parameter(torch.randn(80, 96))
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        optimizer = bitsandbytes.optim.PagedAdamW8bit([parameter], lr=1e-2)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [MASTER.AdamW8bit, bitsandbytes.optim.AdamW8bit], ids=["ours", "bitsandbytes"])
def test_a_second_moment_sticks_while_its_block_s_absmax_grows(optimizer_class):
    """What the unit shows over 1,500 steps: the code of v stays, although its gradients have become small."""
    outlier, parameter = torch.arange(4096) % 256 == 0, nn.Parameter(torch.zeros(4096))
    optimizer = optimizer_class([parameter], lr=1e-3, weight_decay=0.0)
    name = "exp_avg_sq" if optimizer_class is MASTER.AdamW8bit else "state2"
    absmax = "exp_avg_sq_absmax" if name == "exp_avg_sq" else "absmax2"
    seen = []
    for step in range(600):
        parameter.grad = torch.where(outlier | torch.tensor(step < 300), 1.0, 0.05)
        optimizer.step()
        state = optimizer.state[parameter]
        if step in (399, 599):
            seen.append((state[name][~outlier].clone(), state[absmax].clone()))
    (before, small), (after, large) = seen
    assert torch.equal(before, after) and (large > 1.3 * small).all()
    exact = 0.999**300 * (1 - 0.999**300) + (1 - 0.999**300) * 0.05**2
    stored = MASTER.from_8bit(state[name], state[absmax], False)[~outlier]
    assert (stored > 2 * exact).all()


def test_no_value_of_the_unsigned_type_can_sink_alone_at_the_usual_beta():
    code = dynamic_code(False)
    assert (MASTER.dead_zone(code, 0.999)[0] == 0).all()
    weakest, strongest = MASTER.dead_zone(code, 0.95)
    assert (weakest[-100:] > 0).all() and (weakest <= code.sqrt()).all() and (strongest >= 0.999 * code.sqrt()).all()


def test_the_zone_is_what_a_step_does():
    """The ends of the zone, a little inside and a little outside, through one step of v and the nearest value."""
    code, beta2 = dynamic_code(False)[64:].double(), 0.95
    weakest, strongest = MASTER.dead_zone(code, beta2)

    def stored(gradient):
        moment = beta2 * code + (1 - beta2) * gradient**2
        return (moment[:, None] - code).abs().argmin(1)

    here = torch.arange(len(code))
    inner = slice(1, -1)
    inside = torch.stack([stored(weakest * 1.0001), stored(strongest * 0.9999)])
    assert (inside == here)[:, inner].all()
    falls = weakest[inner] > 0
    assert (stored(weakest * 0.999)[inner] < here[inner])[falls].all() and (stored(strongest * 1.001) > here)[inner].all()


def test_rounding_at_random_is_right_in_the_mean():
    code, x = dynamic_code(False), torch.rand(400, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2000, 400, generator=torch.Generator().manual_seed(1))
    stored = code[MASTER.random_code(x.repeat(2000, 1), code, noise).int()]
    gaps = code.diff()[torch.searchsorted(code, x).clamp(1, 255) - 1]
    # The mean of 2,000 draws from two values is off by at most gap / 2 / sqrt(2000), its standard error, times six.
    assert ((stored.mean(0) - x).abs() <= 6 * gaps / 2 / 2000**0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_run_goes_on_as_if_there_had_been_no_pause(dtype):
    torch.manual_seed(0)
    gradients = [[torch.randn(size).to(dtype) for size in (8192, 100)] for _ in range(10)]
    ends = []
    for pause in (False, True):
        parameters = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in (8192, 100)]
        optimizer = MASTER.AdamW8bit(parameters, lr=1e-2)
        for step, of_step in enumerate(gradients):
            if pause and step == 5:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = MASTER.AdamW8bit(parameters, lr=0.5)
                MASTER.load_as_saved(optimizer, saved)
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_torch_s_own_loader_casts_the_state_and_bitsandbytes_one_does_not():
    """Should the first half fail, PyTorch has changed, and the unit's bug hunt has lost its bug."""
    for optimizer_class, codes, kept in ((MASTER.AdamW8bit, "exp_avg", False), (bitsandbytes.optim.AdamW8bit, "state1", True)):
        parameter = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = optimizer_class([parameter], lr=1e-2)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        other = optimizer_class([parameter], lr=1e-2)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert (other.state[parameter][codes].dtype == torch.uint8) is kept
