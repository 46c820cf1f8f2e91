"""The harness itself (support/ranks.py): a failure must be seen, and must not hang."""

import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import RanksFailed, run_ranks


def total(start):
    value = start + dist.get_rank()
    dist.all_reduce(value)
    return dist.get_rank(), value


def one_raises():
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError("only here")
    time.sleep(600)


def hangs():
    dist.barrier()
    time.sleep(600)


def test_each_rank_returns_its_result():
    assert run_ranks(total, torch.tensor(2.0), world=3) == [(rank, 9.0) for rank in range(3)]


def test_a_rank_that_fails_is_named_with_its_error_and_the_others_with_where_they_stand(monkeypatch):
    monkeypatch.setattr("support.ranks.GRACE", 0.5)
    with pytest.raises(RanksFailed, match="only here") as failure:
        run_ranks(one_raises)
    assert "in one_raises" in str(failure.value).split("---- rank 1")[0]


def test_a_rank_that_hangs_is_ended():
    for timeout in (2.0, 20.0, 200.0):  # on a loaded machine the first may be over before the ranks have met
        with pytest.raises(RanksFailed) as failure:
            run_ranks(hangs, timeout=timeout)
        if "in hangs" in str(failure.value):
            return
    raise failure.value
