"""Random operands of the FFN operations, and their comparison with float64 formulas and with plain torch."""

import torch

from locas_ext import ops

from .helpers import act_formula, act_torch, assert_as_exact_as_torch, plain_ffn, plain_sideway

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, d, m, r; the last blocks are longer than the kernels' 256 columns, or one over, or a single element
SHAPES = {
    "one token": (1, 16, 24, 4),
    "odd": (7, 13, 29, 3),
    "one slot": (5, 32, 40, 1),
    "all ones": (1, 1, 1, 1),
    "two blocks": (33, 24, 257, 65),
    "many tokens": (130, 64, 300, 17),
}


class Case:
    """Random operands of one shape; `at(dtype)` rounds them, `exact` are those rounded operands in float64."""

    def __init__(self, shape, dtype, seed, biases=False, slots_dtype=None):
        tokens, d, m, r = shape
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        self.dtype, self.scale = dtype, 0.37
        self.x = normal(tokens, d).to(dtype)
        self.host = [normal(m, d) / d**0.5, normal(m, d) / d**0.5, normal(d, m) / m**0.5]
        self.host += [normal(m) / 2, normal(m) / 2, normal(d) / 2] if biases else [None] * 3
        self.host = [t if t is None else t.to(dtype) for t in self.host]
        self.slots = (normal(3, r, d) / d**0.5).to(slots_dtype or dtype)
        self.dy = normal(tokens, d).to(dtype)

    def run(self, function, dtype=None, x_grad=True, slots_grad=True):
        """-> y, dx, d_slots of function(x, host, slots) with the operands cast to dtype."""
        cast = lambda t: t if t is None else t.detach().clone() if dtype is None else t.to(dtype)
        x, slots, host = cast(self.x), cast(self.slots), [cast(t) for t in self.host]
        x.requires_grad_(x_grad), slots.requires_grad_(slots_grad)
        y = function(x, host, slots)
        y.backward(cast(self.dy))
        return y.detach(), x.grad, slots.grad

    def compare(self, ours, formula, x_grad=True, slots_grad=True):
        """`formula(x, host, slots, act)`: in float64 from definitions, at our dtype with torch's own activations."""
        exact = self.run(lambda *a: formula(*a, act_formula), torch.float64, x_grad, slots_grad)
        peer = self.run(lambda *a: formula(*a, act_torch), self.dtype, x_grad, slots_grad)
        mine = self.run(ours, None, x_grad, slots_grad)
        rounding = torch.finfo(self.dtype).eps
        for name, a, b, c in zip(("y", "dx", "d_slots"), mine, peer, exact, strict=False):
            assert (a is None) == (c is None), name
            if a is not None:
                assert_as_exact_as_torch(name, a, b, c, rounding)
        assert mine[0].dtype == self.dtype
        if slots_grad:
            assert mine[2].dtype == self.slots.dtype
        return mine


def fused(scale, activation, **options):
    return lambda x, host, slots: ops.glu_ffn(x, *host[:3], slots, scale, activation, *host[3:], **options)


def fused_formula(scale, activation):
    return lambda x, host, slots, act: plain_ffn(x, host, slots, scale, activation, act)


def alone(scale, activation, **options):
    return lambda x, host, slots: ops.sideway_glu(x, slots, scale, activation, **options)


def alone_formula(scale, activation):
    return lambda x, host, slots, act: plain_sideway(x, slots, scale, activation, act)
