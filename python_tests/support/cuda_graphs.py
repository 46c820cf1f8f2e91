"""Runs with CUDA graphs and without: on the GPU where there is one, and on the CPU with a stand-in for the graph.

The stand-in does the captured work again at each replay, its Python too. To capture is to run that Python alone.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import locas_ext as locas
from locas_ext.learning import captured, cuda_graph
from support.helpers import TEXT as FULL_CHUNKS
from support.helpers import random_ids, tiny_model

IDS = random_ids(20, seed=5)
TEXT = torch.cat([FULL_CHUNKS, random_ids(39, seed=8)])  # 103 tokens: the last chunk is not full
SETTINGS = dict(window=24, stride=7, learning_rate=1e-2, progress=False)
WRITE = dict(window=24, stride=7, progress=False)


def _capture(work, device):
    """The work's Python runs, and what it wrote of the memory is taken back: version counters stay where that left them."""
    tensors = [tensor for tensor in work.__self__._tensors() if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    work()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.data.copy_(value)
    return work


@contextmanager
def graphs_on_the_cpu():
    with (
        mock.patch.object(cuda_graph, "_is_capturable", lambda device: True),
        mock.patch.object(captured, "rehearse", lambda work, device: work()),
        mock.patch.object(captured, "capture", _capture),
    ):
        yield


def attached(device, family="llama", rank=5, dtype=torch.float32, rehome=False, settings=None, **config):
    model = tiny_model(family, dtype=dtype, **(settings or {})).to(device)
    return model, locas.attach(model, locas.LocasConfig(rank=rank, scale="host", **config), rehome=rehome)


def eagerly(monkeypatch, memory, ids, **settings):
    with monkeypatch.context() as patch:
        patch.setenv("LOCAS_CUDA_GRAPH", "0")
        report = memory.memorize(ids, **settings)
    assert report.graph == locas.GraphReport(0, report.graph.updates, "LOCAS_CUDA_GRAPH is 0")
    return report


def assert_same_run(memory, report, other, other_report, dtype=torch.float32):
    # AdamW divides by the gradient's size: where a gradient is about 0, its sign is a matter of rounding.
    distance = (memory.slots - other.slots).norm() / other.slots.norm()
    assert distance < (1e-3 if dtype == torch.float32 else 5e-2), distance
    assert memory.version == other.version and report.tokens == other_report.tokens
    for chunk, peer in zip(report.chunks, other_report.chunks, strict=True):
        assert (chunk.start, chunk.end, chunk.memory_version) == (peer.start, peer.end, peer.memory_version)
        assert chunk.nll == pytest.approx(peer.nll, rel=1e-4 if dtype == torch.float32 else 2e-2)
