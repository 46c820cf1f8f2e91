import os
import random

import pytest
import torch

# What tests draw with `random` is new in every run; the same for all workers, who inherit the environment.
SEED = os.environ.setdefault("LOCAS_TEST_SEED", str(random.randrange(2**32)))

# One thread: the tensors here are tiny, and waiting for a second thread on a busy machine costs more than all the rest.
torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_report_header():
    return f"LOCAS_TEST_SEED={SEED} draws what this run draws"


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Only a power cut shows whether fsync was called, and tests save some thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seeded(request):
    """Every test starts from the same random state, so a failure repeats on its own."""
    torch.manual_seed(0)
    random.seed(f"{SEED} {request.node.nodeid}")
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "a test left the grad mode changed"


def pytest_terminal_summary(terminalreporter):
    """The kernels that test_simt.py ran, also when it ran in another process."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "kernels":
                terminalreporter.section("CUDA kernels on the SIMT runner")
                terminalreporter.write(text)
