"""bench/kernel_times.py adds up what a profiler has seen; the profiler itself needs a GPU."""

from types import SimpleNamespace

import pytest
import torch

from bench.kernel_times import KernelTimes


def kernel(name, begin, end):
    device = torch.autograd.DeviceType.CUDA
    times = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=False)


def test_what_a_profiler_saw_is_added_up_by_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times, did = KernelTimes(first=1, chunks=2), []
    seen = [kernel("nccl_x", 0, 1000), kernel("nvjet_y", 500, 2000), kernel("locas::PeerSum", 3000, 3500)]
    seen += [kernel("void locas::rms", 3500, 4000), kernel("mine", 4000, 4002)]
    times._profiler = SimpleNamespace(start=lambda: did.append("start"), stop=lambda: did.append("stop"), events=lambda: seen)
    for number in range(5):
        times(None)
        did.append(number)
    assert did == [0, "start", 1, 2, "stop", 3, 4]
    record = times.record()
    expected = {"sums, NCCL": 0.5, "products": 0.75, "sums, ours": 0.25, "our kernels": 0.25, "torch's kernels": 1e-3}
    assert record["ms"] == pytest.approx({**expected, "no kernel": 0.5})
    assert record["launches"]["sums, ours"] == 0.5 and record["longest"][0]["name"] == "nvjet_y"
