"""The native kernels see only plain tensors of eager code."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.seen import Seen, SeenFunctions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from locas_ext.ops.routes import by_address

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")


class Subclass(torch.Tensor):
    pass


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def test_plain_tensors_go_by_address():
    x = torch.ones(3, 4)
    assert by_address(x, torch.nn.Parameter(x), x.T, x[:0], x.bfloat16(), x.clone().requires_grad_())
    with torch.no_grad():
        assert by_address(x)
    with torch.inference_mode():
        assert by_address(x, torch.ones(2))
    with torch.device("meta"):  # as torch.set_default_device leaves it on
        assert by_address(x)


OTHERS = {
    "a subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "a negative view": lambda: torch._neg_view(torch.ones(3)),
    "zeros without data": lambda: torch._efficientzerotensor(3),
    "freed storage": freed,
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_do_not(name):
    assert not by_address(torch.ones(3), OTHERS[name]())


MODES = {
    "dispatch mode": Seen,
    "function mode": SeenFunctions,
    "fake tensors": FakeTensorMode,
    "forward-mode AD": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", MODES)
def test_nor_does_anything_in_a_mode(name):
    x = torch.ones(3)
    with MODES[name]():
        assert not by_address(x)
    assert by_address(x)


@pytest.mark.parametrize(
    "run",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: make_fx(f)(x),
        lambda f, x: torch.jit.trace(f, x, check_trace=False),
    ],
    ids=["vmap", "grad", "jvp", "make_fx", "jit.trace"],
)
def test_nor_in_a_transform_or_a_trace(run):
    answers = []

    def f(x):
        answers.append(by_address(x))
        return x * 2

    run(f, torch.ones(3))
    assert answers and not any(answers)
