"""What the native functions refuse, and in which words: the argument's own name, its value and what was expected."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from locas_ext import _C

ROWS, COLS = 5, 7  # constants: they are part of the tests' names, which every worker must collect alike


def refused(text, function, *arguments, op=None):
    """The call is a ValueError that says exactly this behind the function's name, or the op's."""
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{op or function.__name__}: {text}')}$"):
        function(*arguments)


def matrix(dtype=torch.float32, rows=ROWS, cols=COLS):
    return torch.zeros(rows, cols, dtype=dtype)


def transposed():
    """[ROWS, COLS] with contiguous columns."""
    return matrix(rows=COLS, cols=ROWS).t()


# ---- shape, dtype and strides of matrices and vectors ------------------------------------------------------------
def glu(gate=None, up=None, out=None, activation=0):
    return (matrix() if gate is None else gate, up, matrix() if out is None else out, activation, 1.0, 0)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (glu(gate=torch.zeros(3)), "gate has shape [3]; expected [rows, cols]"),
        (glu(gate=matrix(torch.float64)), "gate has dtype float64; expected float32, bfloat16 or float16"),
        (glu(gate=transposed()), f"gate has strides [1, {ROWS}]; expected a contiguous last dimension, a stride of 1"),
        (glu(up=matrix(rows=ROWS + 1)), f"up has shape [{ROWS + 1}, {COLS}]; expected [{ROWS}, {COLS}]"),
        (glu(up=matrix(torch.bfloat16)), "up has dtype bfloat16; expected float32, the dtype of gate"),
        (glu(out=transposed()), f"out has strides [1, {ROWS}]; expected a contiguous last dimension, a stride of 1"),
        (glu(activation=len(_C.ACTIVATIONS)), f"activation is {len(_C.ACTIVATIONS)}; expected 0 to {len(_C.ACTIVATIONS) - 1}"),
    ],
)
def test_of_matrices(arguments, text):
    refused(text, _C.glu_activation_forward, *arguments)


def test_up_and_its_gradient_come_together():
    arguments = matrix(), matrix(), None, matrix(), matrix(), None, 0, 1.0, 0
    refused("d_up is given, but up is None; expected both or none", _C.glu_activation_backward, *arguments)


@pytest.mark.parametrize(
    "weight, text",
    [
        (torch.zeros(COLS, dtype=torch.float16), "weight has dtype float16; expected float32, the dtype of x"),
        (torch.zeros(COLS + 2), f"weight has shape [{COLS + 2}]; expected [{COLS}]"),
        (torch.zeros(COLS, 1), f"weight has shape [{COLS}, 1]; expected [{COLS}]"),
        (torch.zeros(2 * COLS)[::2], f"weight has shape [{COLS}] and strides [2]; expected a contiguous tensor"),
    ],
)
def test_of_vectors(weight, text):
    refused(text, _C.rms_norm, matrix(), None, weight, None, matrix(), None, 0.0, 1e-6, 0)


def test_a_dtype_of_its_own_is_named():
    nll, targets = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    refused("targets has dtype float32; expected int64", _C.token_nll, matrix(), nll, nll, None, 0.0, 1.0, 0)
    refused("nll has dtype int64; expected float32", _C.token_nll, matrix(), targets, targets, None, 0.0, 1.0, 0)
    narrow = matrix(torch.bfloat16)
    text = "d_logits has dtype bfloat16; expected float32, the dtype of logits"
    refused(text, _C.token_nll, matrix(), targets, nll, narrow, 0.0, 1.0, 0)


# ---- slots -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, value, text",
    [
        ("slots", torch.zeros(ROWS, COLS, dtype=torch.float64), "slots has dtype float64; expected float32"),
        ("grad", torch.zeros(COLS), f"grad has shape [{COLS}]; expected [{ROWS}, {COLS}], the shape of slots"),
        ("exp_avg", matrix(torch.bfloat16), "exp_avg has dtype bfloat16; expected float32"),
        ("exp_avg_sq", transposed(), f"has shape [{ROWS}, {COLS}] and strides [1, {ROWS}]; expected a contiguous tensor"),
        ("compute", matrix(torch.float64), "compute has dtype float64; expected float32, bfloat16 or float16"),
        ("step", torch.ones(2), "step has shape [2]; expected a 0-d tensor"),
        ("finite", torch.ones((), dtype=torch.bfloat16), "finite has dtype bfloat16; expected float32, float64 or int64"),
    ],
)
def test_of_the_update(name, value, text):
    arguments = {
        **{each: matrix() for each in ("slots", "grad", "exp_avg", "exp_avg_sq")},
        **{"step": torch.ones(()), "learning_rate": torch.ones(()), "compute": None, "finite": None, "stream": 0},
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": True},
    }
    with pytest.raises(ValueError, match=rf"^update_slots_: .*{re.escape(text)}$"):
        _C.adamw_slots(**{**arguments, name: value})


def test_of_writing():
    layers, tokens, capacity = 2, 3, 5
    slots, inputs = torch.zeros(layers, 2, capacity, COLS), torch.zeros(layers, tokens, COLS)
    norms, workspace = torch.zeros(tokens), torch.zeros(_C.write_slots_workspace(layers, tokens), dtype=torch.float64)

    def write(start=0, inputs=inputs, gradients=inputs, norms=norms, workspace=workspace):
        return slots, start, inputs, gradients, 1e-2, None, None, norms, workspace, 0

    def refuses(text, **arguments):
        refused(text, _C.write_slots, *write(**arguments), op="write_slots_")

    room = f"start is 3; expected at least 0, and room for {tokens} tokens in the capacity of {capacity}"
    refuses(room, start=3)
    refuses("start is -1" + room[len("start is 3") :], start=-1)
    half = inputs.half()
    refuses("gradients has dtype float16; expected float32, the dtype of inputs", gradients=half)
    refuses(f"inputs has shape [2, 3]; expected [2, tokens, {COLS}]", inputs=torch.zeros(2, 3))
    refuses("norms has shape [4]; expected [3]", norms=torch.zeros(4))
    size = len(workspace)
    refuses(f"workspace has shape [1]; expected [{size}]", workspace=workspace[:1].clone())


# ---- what both sides must agree on -------------------------------------------------------------------------------
def factors_call(layers, tokens, width):
    rank = 2
    slots = torch.zeros(layers, 3, rank, width)
    factors = [(torch.zeros(tokens, rank).half(),) * 3 + (torch.zeros(tokens, width).half(),) * 2] * layers
    rate = torch.ones(())
    return slots, None, rate, 0.0, 0.0, True, slots.half(), None, factors, 1.0, 0


@pytest.mark.parametrize(
    "layers, tokens, width, text",
    [
        (
            _C.MOST_FACTOR_LAYERS + 1,
            1,
            8,
            f"factors has {_C.MOST_FACTOR_LAYERS + 1} layers; expected 1 to {_C.MOST_FACTOR_LAYERS}",
        ),
        (1, _C.MOST_FACTOR_TOKENS + 1, 8, f"expected [tokens, d], 1 to {_C.MOST_FACTOR_TOKENS} tokens"),
        (1, 1, _C.MOST_FACTOR_WIDTH + 8, f"d a multiple of {_C.PIECE_ELEMENTS} and at most {_C.MOST_FACTOR_WIDTH}"),
        (1, 1, 12, f"d a multiple of {_C.PIECE_ELEMENTS} and at most {_C.MOST_FACTOR_WIDTH}"),
    ],
)
def test_the_limits_of_factors_are_those_exported(layers, tokens, width, text):
    with pytest.raises(ValueError, match=rf"^sgd_slots_: .*{re.escape(text)}$"):
        _C.sgd_slots_from_factors(*factors_call(layers, tokens, width))


def test_within_the_limits_only_the_device_is_wrong():
    most = _C.MOST_FACTOR_LAYERS, _C.MOST_FACTOR_TOKENS, _C.MOST_FACTOR_WIDTH
    with pytest.raises((ValueError, RuntimeError), match="needs CUDA|no CUDA kernels"):
        _C.sgd_slots_from_factors(*factors_call(*most))


@pytest.mark.parametrize("rank", range(1, 2 * _C.PIECE_ELEMENTS + 2))
def test_the_memory_is_padded_to_whole_pieces(rank):
    d, m = 2 * _C.PIECE_ELEMENTS, 3 * _C.PIECE_ELEMENTS
    x, gate, down, slots = (torch.zeros(*shape).bfloat16() for shape in ((2, d), (m, d), (d, m), (3 * rank, d)))
    width = m + -(-rank // _C.PIECE_ELEMENTS) * _C.PIECE_ELEMENTS
    weights = x, gate, gate, down, None, None, None, slots[: 2 * rank], slots[2 * rank :]
    rest = None, None, x, None, 0, 1.0, 0
    refused(f"hidden has shape [2, 1]; expected [2, {width}]", _C.glu_ffn_forward, *weights, x[:, :1], *rest)


def test_rows_that_do_not_begin_at_whole_pieces_are_refused():
    shifted = torch.zeros(2 * 8 + 1).bfloat16()[1:].view(2, 8)
    weights = torch.zeros(8, 8).bfloat16()
    with pytest.raises(ValueError, match=r"^neuron_importance: x has rows of 16 bytes from address 16 n \+ \d+ on; expected"):
        _C.neuron_importance(shifted, weights, weights, None, None, torch.zeros(8), None, 0, 0)


def test_activations_are_numbered_as_exported():
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "gelu": torch.nn.functional.gelu,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    }
    assert set(_C.ACTIVATIONS) == functions.keys()
    x, out = torch.randn(5, 70), torch.empty(5, 70)
    for index, name in enumerate(_C.ACTIVATIONS):
        _C.glu_activation_forward(x, None, out, index, 1.0, 0)
        torch.testing.assert_close(out, functions[name](x), rtol=1e-5, atol=1e-6)


# ---- tensors without numbers of their own ------------------------------------------------------------------------
class Wrapper(torch.Tensor):
    """A tensor that holds another one, as those of quantization libraries do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def fake():
    with FakeTensorMode():
        return matrix()


def freed():
    tensor = matrix()
    tensor.untyped_storage().resize_(0)
    return tensor


WITHOUT_NUMBERS = {
    "fake": fake,
    "freed": freed,
    "wrapper": lambda: Wrapper(matrix()),
    "functional": lambda: torch._to_functional_tensor(matrix()),
    "zero": lambda: torch._efficientzerotensor((ROWS, COLS)),
    "sparse": lambda: matrix().to_sparse(),
    "mkldnn": lambda: matrix().to_mkldnn(),
}
EXPECTED = "expected a plain tensor with its numbers in memory"


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
def test_a_tensor_without_numbers_is_refused(kind):
    gate, out = WITHOUT_NUMBERS[kind](), torch.full((ROWS, COLS), 7.0)
    with pytest.raises(ValueError, match=EXPECTED):
        _C.glu_activation_forward(gate, None, out, 0, 1.0, 0)
    with pytest.raises(ValueError, match=EXPECTED):
        _C.glu_activation_forward(out, gate, out, 0, 1.0, 0)
    assert (out == 7.0).all()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_under_a_transform_it_is_refused(transform):
    def call(x):
        x = x.reshape(-1, COLS)
        _C.glu_activation_forward(x, None, torch.zeros(x.shape), 0, 1.0, 0)
        return x.sum()

    with pytest.raises(ValueError, match=EXPECTED):
        transform(call)(matrix())


def test_a_negated_view_is_refused():
    with pytest.raises(ValueError, match="is a negated view; expected its resolve_neg"):
        _C.glu_activation_forward(torch._neg_view(matrix()), None, matrix(), 0, 1.0, 0)


def test_a_tensor_of_no_elements_has_no_address_and_needs_none():
    empty = torch.zeros(0, COLS)
    assert empty.data_ptr() == 0
    _C.glu_activation_forward(empty, None, empty.clone(), 0, 1.0, 0)


def test_other_devices_are_named():
    with pytest.raises(ValueError, match="a tensor on device meta; the kernels take cpu and cuda tensors"):
        _C.glu_activation_forward(matrix().to("meta"), None, matrix(), 0, 1.0, 0)
