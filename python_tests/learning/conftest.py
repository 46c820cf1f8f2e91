import pytest
from support.cuda_graphs import graphs_on_the_cpu
from support.devices import DEVICES

from locas_ext.learning import captured


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where steps go the way of CUDA graphs."""
    monkeypatch.delenv("LOCAS_CUDA_GRAPH", raising=False)
    if request.param == "cuda":
        yield request.param
        return
    with graphs_on_the_cpu():
        yield request.param


@pytest.fixture
def captures(device, monkeypatch):
    """As many items as there were captures."""
    done, capture = [], captured.capture
    monkeypatch.setattr(captured, "capture", lambda *args: done.append(1) or capture(*args))
    return done
