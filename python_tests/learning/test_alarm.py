"""A process that is killed while another one waits for it in a sum."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from support.helpers import TEXT, attached
from support.ranks import RanksFailed, run_ranks

import locas_ext as locas
from locas_ext.learning.alarm import alarm
from locas_ext.ops.processes import processes_of
from locas_ext.ops.ranks import Ranks


class WaitingMemory:
    """Memory whose sums wait for a process that does not come, as the kernel does, and give NaN when they are told to stop."""

    def __init__(self, group):
        self.stop = torch.zeros(1, dtype=torch.int32)
        self.processes = processes_of(group)
        self.processes.when_one_ends(lambda: self.stop.fill_(1))

    def takes(self, x):
        return True

    def add_up(self, x):
        while not self.stop.item():
            pass
        x.fill_(float("nan"))


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_sum_through_memory():
    ranks = Ranks(dist.group.WORLD, dist.get_rank(), 2, torch.device("cpu"), WaitingMemory(dist.group.WORLD))
    with alarm(ranks, tells=True):
        if ranks.rank:
            killed()
        numbers = torch.ones(3)
        ranks.add_up(numbers)
        assert numbers.isnan().all()
        with pytest.raises(locas.LocasError, match="rank 1 .* has ended"):
            ranks.add_up(numbers)  # the next one waits for nobody
        raise locas.LocasError("the loss is not finite")


def killed_between_two_steps():
    update = locas.Backprop(process_group=dist.group.WORLD)
    run = dict(window=16, stride=8, progress=False, update=update)
    attached()[1].memorize(TEXT, **run, callback=lambda chunk: dist.get_rank() and chunk.start and killed())


def survivor(case, folder):
    try:
        {"memory": killed_in_a_sum_through_memory, "steps": killed_between_two_steps}[case]()
    except locas.LocasError as error:
        (folder / case).write_text(str(error))
    os._exit(0)  # the group is of no use any more


@pytest.mark.parametrize("case", ["memory", "steps"])
def test_who_waits_for_a_process_that_was_killed_says_so(case, tmp_path):
    with pytest.raises(RanksFailed, match="exit status -9"):
        run_ranks(survivor, case, tmp_path)
    assert re.fullmatch(r"rank 1 \(process \d+\) has ended, so nothing .*", (tmp_path / case).read_text())
