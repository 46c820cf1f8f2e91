"""Native kernels of locas_ext, with and without CUDA. Written by csrc/bindings/generate_stub.py: do not edit."""

import collections.abc
import torch

ACTIVATIONS: tuple[str, str, str, str, str, str]
CPU_TOKEN_MULTIPLE: int
MOST_FACTOR_LAYERS: int
MOST_FACTOR_TOKENS: int
MOST_FACTOR_WIDTH: int
MOST_PEERS: int
PEER_BOX_BYTES: int
PIECE_ELEMENTS: int

def adamw_slots(
    slots: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: bool,
    compute: torch.Tensor | None,
    finite: torch.Tensor | None,
    stream: int,
) -> None: ...
def adamw_slots_from_factors(
    slots: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: bool,
    compute: torch.Tensor,
    finite: torch.Tensor | None,
    factors: collections.abc.Sequence[collections.abc.Sequence[torch.Tensor]],
    factor_scale: float,
    stream: int,
) -> None: ...
def build_info() -> dict: ...
def cpu_glu_ffn_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    saved: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_key: torch.Tensor,
    value: torch.Tensor,
    dx: torch.Tensor | None,
    slots_grad: torch.Tensor,
    activation: int,
    scale: float,
) -> None: ...
def cpu_glu_ffn_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_key: torch.Tensor,
    value: torch.Tensor,
    y: torch.Tensor,
    saved: torch.Tensor | None,
    activation: int,
    scale: float,
) -> None: ...
def cuda_families() -> list[str]: ...
def glu_activation_backward(
    d_hidden: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    d_gate: torch.Tensor,
    d_up: torch.Tensor | None,
    hidden: torch.Tensor | None,
    activation: int,
    scale: float,
    stream: int,
) -> None: ...
def glu_activation_forward(
    gate: torch.Tensor, up: torch.Tensor | None, out: torch.Tensor, activation: int, scale: float, stream: int
) -> None: ...
def glu_ffn_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_key: torch.Tensor,
    value: torch.Tensor,
    gate_saved: torch.Tensor,
    up_saved: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    memory_hidden: torch.Tensor,
    dx: torch.Tensor | None,
    slots_grad: torch.Tensor | None,
    workspace: torch.Tensor | None,
    activation: int,
    scale: float,
    stream: int,
) -> None: ...
def glu_ffn_backward_workspace(tokens: int, d: int, m: int, r: int, device: int) -> int: ...
def glu_ffn_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    gate_out: torch.Tensor | None,
    up_out: torch.Tensor | None,
    y: torch.Tensor,
    workspace: torch.Tensor | None,
    activation: int,
    scale: float,
    stream: int,
) -> None: ...
def glu_ffn_forward_workspace(tokens: int, d: int, m: int, r: int, device: int) -> int: ...
def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sum: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    inverse_std: torch.Tensor | None,
    eps: float,
    stream: int,
) -> None: ...
def layer_norm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    d_sum: torch.Tensor | None,
    dx: torch.Tensor,
    stream: int,
) -> None: ...
def neuron_importance(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    activation: int,
    stream: int,
) -> None: ...
def neuron_importance_of_products(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: int, stream: int
) -> None: ...
def neuron_importance_workspace(tokens: int, m: int, device: int) -> int: ...
def peer_sum(
    data: torch.Tensor, boxes: collections.abc.Sequence[int], rank: int, slot_bytes: int, stop: int, stream: int
) -> None: ...
def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    sum: torch.Tensor | None,
    out: torch.Tensor,
    inverse_rms: torch.Tensor | None,
    weight_offset: float,
    eps: float,
    stream: int,
) -> None: ...
def rms_norm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    d_sum: torch.Tensor | None,
    dx: torch.Tensor,
    weight_offset: float,
    stream: int,
) -> None: ...
def rotary_backward(
    d_query: torch.Tensor,
    d_key: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    head_size: int,
    weight_offset: float,
    eps: float,
    interleaved: bool,
    stream: int,
) -> None: ...
def rotary_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor | None,
    head_size: int,
    weight_offset: float,
    eps: float,
    interleaved: bool,
    stream: int,
) -> None: ...
def sgd_slots(
    slots: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    learning_rate: torch.Tensor,
    momentum: float,
    weight_decay: float,
    clip: bool,
    compute: torch.Tensor | None,
    finite: torch.Tensor | None,
    stream: int,
) -> None: ...
def sgd_slots_from_factors(
    slots: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    learning_rate: torch.Tensor,
    momentum: float,
    weight_decay: float,
    clip: bool,
    compute: torch.Tensor,
    finite: torch.Tensor | None,
    factors: collections.abc.Sequence[collections.abc.Sequence[torch.Tensor]],
    factor_scale: float,
    stream: int,
) -> None: ...
def token_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    nll: torch.Tensor,
    d_logits: torch.Tensor | None,
    soft_cap: float,
    logit_scale: float,
    stream: int,
) -> None: ...
def use_cuda_family(family: int) -> None: ...
def write_slots(
    slots: torch.Tensor,
    start: int,
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    epsilon: float,
    compute: torch.Tensor | None,
    gradient_norm: torch.Tensor | None,
    norms: torch.Tensor,
    workspace: torch.Tensor,
    stream: int,
) -> None: ...
def write_slots_workspace(layers: int, tokens: int) -> int: ...
