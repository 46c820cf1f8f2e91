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
    if dist.get_rank() == 1:
        raise ValueError("only here")
    time.sleep(60)


def test_each_rank_returns_its_result():
    assert run_ranks(total, torch.tensor(2.0), world=3) == [(rank, 9.0) for rank in range(3)]


def test_a_rank_that_fails_is_named_with_its_error_and_the_others_with_where_they_stand(monkeypatch):
    monkeypatch.setattr("support.ranks.GRACE", 0.5)
    with pytest.raises(RanksFailed, match="only here") as failure:
        run_ranks(one_raises)
    assert "in one_raises" in str(failure.value).split("---- rank 1")[0]


def test_a_rank_that_hangs_is_ended():
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="in one_raises"):
        run_ranks(one_raises, timeout=3.0)
    assert time.monotonic() - started < 30
