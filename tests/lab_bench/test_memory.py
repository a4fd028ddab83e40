"""The measured bytes are those that torch's profiler sees, to the byte."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from peftlab import memory
from peftlab.llama import PRESETS, Llama, causal_loss
from peftlab.memory import measure_training_step, tensor_bytes, tensors_of_step, whole_storage
from peftlab.tracker import PeftMemTracker


def model_with(trainable: str) -> Llama:
    model = Llama(PRESETS["tiny"]).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    return model


def balance(run) -> tuple[int, int]:
    """Return the peak and the final balance, in bytes, of all that the CPU allocator gave and took while `run` ran."""
    gc.collect()  # what a checkpoint leaves in circles must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak, now


@pytest.mark.parametrize("trainable", ["", "q_proj", "layers.1"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_profiler_to_the_byte(trainable, checkpointing):
    model = model_with(trainable)
    model.model.gradient_checkpointing = checkpointing
    input_ids = torch.randint(0, 256, (4, 33))
    measured = measure_training_step(model, lambda: causal_loss(model, input_ids, input_ids))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step():
        causal_loss(model, input_ids, input_ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the state is there from now on
    peak, after = balance(step)
    assert after == 0
    state = tensor_bytes([t for slots in optimizer.state.values() for t in slots.values()])
    standing = tensor_bytes(list(model.parameters())) + state
    # Checkpointing keeps the random generator's state for every layer; no tensor operation makes it, so no tracker of
    # these can see it.
    unseen = {layers * torch.get_rng_state().nbytes for layers in range(3 if checkpointing else 1)}
    assert standing + peak - measured.peak in unseen
    assert measured.parameters == tensor_bytes(list(model.parameters()))
    assert measured.optimizer_state == state

    _, forward = balance(lambda: causal_loss(model, input_ids, input_ids))
    assert forward - measured.activations in unseen
    _, both = balance(lambda: causal_loss(model, input_ids, input_ids).backward())
    assert measured.gradients == both


@pytest.mark.parametrize("trainable", ["", "q_proj"])
def test_the_reading_of_cuda_agrees(trainable, monkeypatch):
    """No GPU here: its allocator is played by the tracker, so that the arithmetic on what it says is tested all the same."""
    model = model_with(trainable)
    input_ids = torch.randint(0, 256, (4, 33))
    allocator = PeftMemTracker()
    allocator.track_external(model)

    workspaces = []  # of cuBLAS: made at the first product of a process, and never given back

    def run() -> torch.Tensor:
        allocator.reset_mod_stats()
        if torch.cuda.is_available() and not workspaces:
            workspaces.append(torch.empty(2**20))
        return causal_loss(model, input_ids, input_ids)

    expected = measure_training_step(model, run)

    def stats(device=None) -> dict[str, int]:
        return {
            "requested_bytes.all.current": allocator.bytes_by_category("current")["Total"],
            "requested_bytes.all.peak": allocator.bytes_by_category("peak")["Total"],
        }

    def reset(device=None) -> None:
        allocator._peak_mem = {device: snapshot["Total"] for device, snapshot in allocator._curr_mem_snap.items()}
        allocator._peak_mem_snap = {device: dict(snapshot) for device, snapshot in allocator._curr_mem_snap.items()}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with allocator:
        allocator.track_external(input_ids)
        assert memory._measure_on_cuda(model, run, optimizer) == expected
    assert workspaces


@pytest.mark.parametrize("trainable", ["", "q_proj"])
def test_the_moments_of_a_step_add_up_to_its_peak(trainable):
    model = model_with(trainable)
    input_ids = torch.randint(0, 256, (4, 33))
    moments = memory.memory_over_time(model, lambda: causal_loss(model, input_ids, input_ids))
    step = measure_training_step(model, lambda: causal_loss(model, input_ids, input_ids))
    totals = [moment.parameters + moment.gradients + moment.optimizer_state + moment.activations for moment in moments]
    assert max(totals) == step.peak
    assert [*dict.fromkeys(moment.phase for moment in moments)] == ["forward", "backward", "optimizer"]
    assert moments[0].gradients == 0 and moments[-1].gradients == step.gradients
    assert all(parameter.grad is None for parameter in model.parameters())


def test_leaves_the_model_as_it_was():
    model = model_with("q_proj")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 256, (2, 9))
    measure_training_step(model, lambda: causal_loss(model, ids, ids))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_is_refused():
    model = Llama(PRESETS["tiny"]).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_training_step(model, lambda: None)


def test_a_device_that_cannot_be_measured_is_refused():
    with torch.device("meta"):
        model = Llama(PRESETS["tiny"])
    with pytest.raises(ValueError, match="meta cannot be measured"):
        measure_training_step(model, lambda: None)


def test_a_tied_weight_counts_once():
    shared = torch.zeros(10)
    assert tensor_bytes([shared, shared.view(2, 5), torch.zeros(3)]) == 52


def test_the_tensors_of_a_step_are_those_that_it_keeps():
    layer = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    added = torch.nn.Parameter(torch.zeros(5))
    x = torch.ones(3, 6, requires_grad=True)
    optimizer = torch.optim.AdamW([added], lr=0.1)
    tensors = tensors_of_step(lambda: (layer(x) + added).exp().sum(), [layer.weight, added], optimizer, not_counted=[x])
    assert [t.shape for t in tensors["gradients"]] == [(5,)]
    assert sorted(t.numel() for t in tensors["optimizer state"]) == [1, 5, 5]
    # exp keeps its result; the frozen weight, which x's gradient needs, is there anyway.
    assert [t.nbytes for t in tensors["saved"]] == [4 * 3 * 5]


def test_a_view_counts_with_all_that_it_keeps_alive():
    view = torch.arange(12.0)[2:4]
    assert whole_storage(view).nbytes == 48
    assert torch.equal(whole_storage(view).view(torch.float32), torch.arange(12.0))
