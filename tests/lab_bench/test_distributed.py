"""Ranks start, exchange, and end: all of them, with a message that says which one was the first to fail."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftlab.distributed import (
    RankError,
    Traffic,
    all_gather,
    all_reduce,
    bytes_sent,
    loss_and_count,
    reduce_scatter,
    run,
    run_apart,
)
from peftlab.llama import IGNORE, PRESETS, Llama, causal_loss


def left_over() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = {child.pid for child in left_over()}
    yield
    assert {child.pid for child in left_over()} <= before


def test_each_rank_returns_its_own(capsys):
    outside = torch.tensor([3.0])

    def inside(factor: float):
        print("here")
        return dist.get_rank() * factor * outside, dist.get_world_size()

    assert run(inside, 3, 2.0) == [(torch.tensor([6.0 * rank]), 3) for rank in range(3)]
    assert capsys.readouterr().out.splitlines() == [f"rank {rank}: here" for rank in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives_and_what_they_send(world_size):
    def inside():
        rank = float(dist.get_rank())
        with Traffic() as traffic:
            gathered = all_gather(torch.full((2, 3), rank).T.contiguous().T)  # not contiguous
            mine = reduce_scatter(gathered)
            total = all_reduce(mine)
            pieces = [torch.empty(5) for _ in range(world_size)]
            dist.all_gather(pieces, torch.full((5,), rank))
        return gathered, mine, total, torch.cat(pieces), traffic.messages, traffic.calls(), traffic.sent()

    for rank, (gathered, mine, total, pieces, messages, calls, sent) in enumerate(run(inside, world_size)):
        assert torch.equal(gathered, torch.arange(world_size).float().repeat_interleave(2)[:, None].expand(-1, 3))
        assert torch.equal(mine, torch.full((2, 3), float(world_size * rank)))
        assert torch.equal(total, torch.full((2, 3), float(world_size * sum(range(world_size)))))
        assert torch.equal(pieces, torch.arange(world_size).float().repeat_interleave(5))
        assert [message.size for message in messages] == [24 * world_size, 24 * world_size, 24, 20 * world_size]
        assert calls == {"all_gather": 2, "reduce_scatter": 1, "all_reduce": 1}
        others = (world_size - 1) / world_size
        expected = {"all_gather": 44 * world_size * others, "reduce_scatter": 24 * world_size * others}
        assert sent == pytest.approx(expected | {"all_reduce": 48 * others})


def test_what_a_dtensor_gathers_is_noted():
    def inside():
        layer = torch.nn.Linear(4, 6, bias=False)
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        with Traffic() as traffic:
            layer.weight.full_tensor()
        return traffic.calls(), traffic.sent()

    assert run(inside, 2) == [({"all_gather": 1}, {"all_gather": 48.0})] * 2


def test_what_cannot_be_dealt_or_counted_is_refused():
    with pytest.raises(RankError, match=r"ValueError: 3 rows cannot be dealt evenly to 2 ranks \(.*line \d+ of"):
        run(lambda: reduce_scatter(torch.ones(3)), 2)
    with pytest.raises(ValueError, match="unknown collective"):
        bytes_sent("scatter", 100, 2)


def test_a_summed_loss_is_the_mean_times_its_count():
    model, input_ids = Llama(PRESETS["tiny"]), torch.randint(0, 256, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.5, input_ids, IGNORE)
    loss, count = loss_and_count(model, input_ids, labels)
    torch.testing.assert_close(loss / count, causal_loss(model, input_ids, labels))


def killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce(torch.ones(2))


def wrong() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no")
    all_reduce(torch.ones(2))


def alone() -> None:
    if dist.get_rank() == 0:
        all_gather(torch.ones(2))


def unwritten() -> None:
    raise NotImplementedError("write me")


@pytest.mark.parametrize(
    ("function", "error", "sentence"),
    [
        (killed, RankError, r"rank 1 of 3 was killed \(SIGKILL\)"),
        (wrong, RankError, r"rank 1 of 3 raised ValueError: no \(line \d+ of `wrong`\)"),
        (
            alone,
            RankError,
            r"rank 0 of 3 waited in `all_gather` \(line \d+ of `alone`\) for a rank that had ended: 1, 2",
        ),
        (unwritten, NotImplementedError, "write me"),
        (lambda: os._exit(3), RankError, "rank 0 of 3 ended itself with exit code 3"),
    ],
)
def test_the_first_to_fail_is_named_and_nobody_waits(function, error, sentence):
    with pytest.raises(error, match=sentence):
        run(function, 3, seconds=50)


def test_who_does_not_end_in_time_is_ended_and_says_where_it_was():
    def late() -> None:
        if dist.get_rank() == 0:
            all_gather(torch.ones(2))
        else:
            time.sleep(100)

    with pytest.raises(
        RankError, match=r"after 2 seconds: rank 0 is still in `all_gather`.*rank 1 is still in line \d+ of `late`"
    ):
        run(late, 2, seconds=2)


def test_an_interrupt_ends_the_ranks():
    def interrupt() -> None:
        if dist.get_rank() == 0:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(100)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(interrupt, 2)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_end_when_the_notebook_dies():
    source = "import time\nfrom peftlab.distributed import run\nprint('ready', flush=True)\nrun(lambda: time.sleep(100), 2)"
    notebook = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    notebook.stdout.readline()
    ranks = []
    while len(ranks) < 2:
        ranks = psutil.Process(notebook.pid).children()
        time.sleep(0.05)
    notebook.kill()
    notebook.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    for rank in alive:
        rank.kill()
    assert len(gone) == 2


def test_what_runs_apart_belongs_to_no_group():
    def inside(number):
        return dist.is_initialized(), os.getpid() != outside, number

    outside = os.getpid()
    assert run_apart(inside, 7) == (False, True, 7)
    with pytest.raises(RankError, match=r"raised ValueError: no \(line \d+ of `fails`\)"):
        run_apart(fails)


def fails() -> None:
    raise ValueError("no")


def test_a_backward_in_the_notebook_is_named_where_it_forbids_one_in_ranks():
    def inside():
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    with pytest.raises(RankError, match="restart the notebook"):
        run(inside, 1)
