import pytest
import torch

# One thread: the tensors here are tiny, and waiting for a second thread on a busy machine costs more than all the rest.
torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, so a failure repeats on its own."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "a test left the grad mode changed"


def pytest_terminal_summary(terminalreporter):
    """The kernels that test_simt.py ran, also when it ran in another process."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "kernels":
                terminalreporter.section("CUDA kernels on the SIMT runner")
                terminalreporter.write(text)
